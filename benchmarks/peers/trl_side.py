"""One run of TRL, in the environment that holds TRL and nothing of Onstream.

    python -P benchmarks/peers/trl_side.py REQUEST.json RESULT.json

The result has a row for each step: `time` (its end, seconds since 1970), `elapsed_s`, `rollouts`
and `tokens`. Policies to evaluate are kept in memory during the run and written after it, so
neither saving nor evaluating them is on the clock.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DistillationConfig, DistillationTrainer

WARMUP_STEPS = 5
MIN_LR_SHARE = 0.1
TOP_K = 4


class TrlStepClock(TrainerCallback):
    """Notes each step's end, and keeps the policies that are evaluated later."""

    def __init__(self, rollouts: int, keep_every: int | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.policies: dict[int, dict[str, torch.Tensor]] = {}
        self.tokens = 0
        self._rollouts = rollouts
        self._keep_every = keep_every
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = {
            "time": time.time(),
            "elapsed_s": time.perf_counter() - self._began,
            "rollouts": self._rollouts,
            "tokens": self.tokens,
        }
        self.rows.append(row)
        self.tokens = 0
        if self._keep_every and state.global_step % self._keep_every == 0:
            weights = kwargs["model"].state_dict()
            self.policies[state.global_step] = {name: weights[name].clone() for name in weights}
        self._began = time.perf_counter()


def counting(trainer: type, clock: TrlStepClock) -> type:
    """`trainer`, which tells `clock` how many tokens its loss reads."""

    class CountingTrainer(trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
            mask = inputs.get("completion_mask")
            if mask is None:
                mask = inputs["labels"] != -100
                # TRL 1.16 counts tokens before they are written, which gives 0 for prompts alone,
                # and a loss of infinity.
                accumulated = self.args.gradient_accumulation_steps
                named["num_items_in_batch"] = mask.sum() * accumulated
            clock.tokens += int(mask.sum())
            return super().compute_loss(model, inputs, *others, **named)

    return CountingTrainer


def schedule_arguments(schedule: str) -> dict[str, Any]:
    """A constant rate, or the example's: a warm-up, then a cosine to a tenth."""
    if schedule == "constant":
        return {"lr_scheduler_type": "constant"}
    return {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": MIN_LR_SHARE},
        "warmup_steps": WARMUP_STEPS,
    }


def common_arguments(request: dict[str, Any]) -> dict[str, Any]:
    """What both of TRL's trainers are told. Layers are not recomputed, which only costs time."""
    form = request["form"]
    return {
        "output_dir": request["directory"],
        "max_steps": request["steps"],
        "per_device_train_batch_size": form["rows"],
        "gradient_accumulation_steps": request["batch"] // form["rows"],
        "max_completion_length": request["max_completion"],
        "temperature": 1.0,
        "beta": 1.0,
        "learning_rate": form["lr"],
        "bf16": form["precision"] == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": request["seed"],
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        **schedule_arguments(form["schedule"]),
    }


def full_vocabulary_trainer(request: dict[str, Any], clock: TrlStepClock, **models: Any) -> Any:
    """`DistillationTrainer`. It writes one completion a prompt, so each prompt is there a group."""
    prompts = [prompt for prompt in request["prompts"] for _ in range(request["group"])]
    return counting(DistillationTrainer, clock)(
        args=DistillationConfig(**common_arguments(request), shuffle_dataset=False),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[clock],
        **models,
    )


def top_k_trainer(request: dict[str, Any], clock: TrlStepClock, **models: Any) -> Any:
    """`IWOPDTrainer`, the one with a top-k loss for a teacher in the same process."""
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    config = IWOPDConfig(
        **common_arguments(request),
        distillation_objective="jsd",
        lmbda=1.0,
        loss_top_k=TOP_K,
        top_p=1.0,
        num_generations=request["group"],
        max_length=None,
        max_prompt_length=request["max_prompt"],
    )
    return counting(IWOPDTrainer, clock)(
        args=config,
        train_dataset=Dataset.from_dict({"messages": request["prompts"]}),
        callbacks=[clock],
        **models,
    )


TRAINERS = {"full": full_vocabulary_trainer, "top-k": top_k_trainer}


def main() -> None:
    """Do the run that the request names."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(request["form"]["threads"])
    tokenizer = AutoTokenizer.from_pretrained(request["student"], padding_side="left")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(request[role], dtype=torch.float32)
        for role in ("student", "teacher")
    )
    clock = TrlStepClock(request["batch"], request["keep_every"])
    trainer = TRAINERS[request["form"]["objective"]](
        request, clock, model=student, teacher_model=teacher, processing_class=tokenizer
    )
    trainer.train()
    for step, weights in clock.policies.items():
        directory = Path(request["directory"]) / f"{step:06d}"
        student.save_pretrained(directory, state_dict=weights)
        tokenizer.save_pretrained(directory)
    Path(sys.argv[2]).write_text(json.dumps(clock.rows))


if __name__ == "__main__":
    main()
