"""Students and quickly trained teachers of kinds that are not full attention in every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from onstream.pipeline.tasks import Task, load_task
from onstream.settings.root import Settings
from onstream.settings.sections.losses import SftLoss
from onstream.settings.sections.trainer import OptimSettings, TrainerSettings
from onstream.workers.tiny_models.character_tokenizer import VOCABULARY_SIZE, character_tokenizer
from onstream.workers.tiny_models.fresh import save_fresh
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from tests.models.families import tiny_config
from tests.modes.run import ROOT, Run

WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": LINEAR,
    "gemma3_text": WINDOWS,
    "gpt_oss": WINDOWS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layer_types": ["linear_attention", "full_attention", "moe"]},
}
STEPS = 18
BATCH = 32


def learns(directory: Path, family: str, *settings: str, **sizes: Any) -> Run:
    """Run reverse-text with a student and a teacher of `family`, and check that it learns.

    `sizes` are of both models.
    """
    student = fresh(directory / "student", family, seed=0, **sizes)
    teacher = quickly_trained(directory / "teacher", family, **sizes)
    run = Run(
        directory,
        ROOT / "examples/reverse-text/onstream.toml",
        f"model.name={student}",
        f"teacher_inference.model.name={teacher}",
        f"orchestrator.batch_size={BATCH}",
        f"trainer.max_steps={STEPS}",
        "trainer.optim.lr=5e-3",
        "trainer.optim.warmup=2",
        "trainer.loss.teacher_top_k=40",  # so early a teacher hardly prefers one letter to another
        "eval.samples=8",
        *settings,
    )
    run.up()
    kl = [row["teacher_kl"] for row in run.rows("metrics.jsonl")]
    print(f"{family}: teacher_kl {kl[0]:.2f} to {kl[-1]:.2f} in {len(kl)} steps")
    assert len(kl) == STEPS and sum(kl[-3:]) / 3 <= kl[0] / 2
    audit = run.audit()
    assert (audit["lost"], audit["duplicated"], audit["trained"]) == (0, 0, STEPS * BATCH)
    return run


def fresh(directory: Path, family: str, seed: int, **sizes: Any) -> Path:
    """A model of random weights, with the character tokenizer."""
    tokenizer = character_tokenizer()
    kind = KINDS[family] | sizes
    config = tiny_config(
        family,
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        num_hidden_layers=len(kind["layer_types"]),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **kind,
    )
    return save_fresh(directory, config, seed)


def quickly_trained(directory: Path, family: str, steps: int = 60, **sizes: Any) -> Path:
    """A teacher that has read right answers for a few steps: it writes letters, and ends."""
    optim = OptimSettings(lr=5e-3, warmup=5)
    trainer = TrainerSettings(loss=SftLoss(), optim=optim, dtype="float32")
    learner = Learner(fresh(directory, family, seed=1, **sizes), trainer, torch.device("cpu"))
    task = load_task(Settings.model_validate({"task": {"name": "reverse-text"}}))
    for step in range(steps):
        samples = [right_answer(task, index) for index in range(step * 16, step * 16 + 16)]
        learner.step(samples, steps)
    learner.save_model(directory)
    return directory


def right_answer(task: Task, index: int) -> TrainSample:
    tokenizer = character_tokenizer()
    problem = task.train(index)
    prompt = tokenizer.apply_chat_template(
        problem.messages, add_generation_prompt=True, return_dict=False
    )
    answer = [*tokenizer(problem.info["answer"]).input_ids, tokenizer.eos_token_id]
    return TrainSample(
        prompt_ids=np.array(prompt, dtype=np.int32),
        completion_ids=np.array(answer, dtype=np.int32),
        loss_mask=np.ones(len(answer), dtype=np.uint8),
        generator_logprobs=np.zeros(len(answer), dtype=np.float32),
        group=index,
    )
