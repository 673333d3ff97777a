"""The trainer's answers to the probe are those of the weights it publishes, and cost the training
nothing but their time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from onstream.pipeline.record_codec import ids_array, logprobs_array
from onstream.pipeline.records import Probe
from onstream.pipeline.redis.bus import Bus
from onstream.settings.sections.inference import InferenceSettings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.publication.policy_probe import PROMPTS, TOP, prober
from tests.models.families import tiny_config
from tests.tiny import VOCABULARY, sequences, tiny_tokenizer, write_tiny
from tests.workers.trainer.driver import Run

LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.5}}


def learner(directory: Path, **trainer: Any) -> Learner:
    settings = {"loss": {"type": "sft"}, "optim": {"lr": 1e-2, "warmup": 0}, **trainer}
    return Learner(directory, TrainerSettings.model_validate(settings), torch.device("cpu"))


def inference(**guard: Any) -> InferenceSettings:
    return InferenceSettings.model_validate({"guard": guard})


def batch() -> list[TrainSample]:
    made = zip(*sequences(3, 2, completion=(3, 7), seed=5), strict=True)
    return [
        TrainSample(prompt, done, np.ones(len(done), np.uint8), np.zeros(len(done), np.float32))
        for prompt, done in made
    ]


def asked(of: Learner, **guard: Any) -> Probe:
    return prober(of, inference(**guard)).ask()


@pytest.mark.parametrize(
    "trainer",
    [{}, LORA, {"microbatch": 64}],
    ids=["plain", "an adapter with dropout", "a row a prompt"],
)
def test_the_answers_are_those_of_the_published_weights(
    tmp_path: Path, trainer: dict[str, Any]
) -> None:
    found = learner(write_tiny(tmp_path), **trainer)
    for _ in range(3):
        found.step(batch(), 10)
    probe = asked(found, tokens=40)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain.load_state_dict(found.published_state(), strict=False)
    prompts = torch.from_numpy(np.stack([ids_array(prompt) for prompt in probe.prompts])).long()
    with torch.no_grad():
        top = plain(prompts).logits[:, -1].log_softmax(-1).topk(TOP)
    assert prompts.shape == (PROMPTS, 40)
    assert ids_array(probe.top_ids).reshape(PROMPTS, TOP).tolist() == top.indices.tolist()
    assert np.abs(logprobs_array(probe.top_logprobs) - top.values.flatten().numpy()).max() < 1e-5


@pytest.mark.parametrize("trainer", [{}, LORA], ids=["plain", "an adapter with dropout"])
def test_asking_changes_no_bit_of_the_training(tmp_path: Path, trainer: dict[str, Any]) -> None:
    directory = write_tiny(tmp_path)
    after = []
    for asks in (False, True):
        torch.manual_seed(3)
        found = learner(directory, **trainer)
        probing = prober(found, inference())
        for _ in range(3):
            found.step(batch(), 10)
            if asks:
                assert probing.ask() == probing.ask()
        after.append((found.published_state(), torch.get_rng_state()))
    (weights, random), (others, other_random) = after
    assert torch.equal(random, other_random)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_the_prompts_are_the_same_ordinary_tokens_each_time(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path)
    probe = asked(learner(directory))
    assert probe.prompts == asked(learner(directory)).prompts
    special = {tiny_tokenizer().unk_token_id, tiny_tokenizer().eos_token_id}
    assert not special & {token for prompt in probe.prompts for token in ids_array(prompt).tolist()}
    assert {len(prompt) // 4 for prompt in probe.prompts} == {144}


def test_the_prompts_leave_room_for_the_answer_in_the_engines_context(tmp_path: Path) -> None:
    found = prober(learner(write_tiny(tmp_path)), InferenceSettings(max_model_len=100))
    assert {len(prompt) // 4 for prompt in found.ask().prompts} == {99}


@pytest.mark.parametrize(
    ("window", "tokens"), [(200, 216), (40, 144), (None, 144), (512, 144)], ids=str
)
def test_the_prompts_reach_beyond_a_window_of_the_model(
    tmp_path: Path, window: int | None, tokens: int
) -> None:
    config = tiny_config("mistral", sliding_window=window, vocab_size=VOCABULARY)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    probe = asked(learner(tmp_path))
    assert {len(prompt) // 4 for prompt in probe.prompts} == {tokens}


def test_a_window_that_no_layer_uses_makes_no_prompt_longer(tmp_path: Path) -> None:
    config = tiny_config("qwen3", sliding_window=300, vocab_size=VOCABULARY)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert {len(prompt) // 4 for prompt in asked(learner(tmp_path)).prompts} == {144}


@pytest.mark.parametrize("interval", [0, 3])
def test_every_version_is_announced_with_its_probe_whatever_the_interval(
    run: Callable[..., Run], bus: Bus, interval: int
) -> None:
    """A generator that starts later asks about the first version that it loads, whichever it is."""
    job = run(inference__guard__interval=interval)
    job.ready()
    job.until(2)
    probes = [policy.probe for policy in bus.state.announced_policies()]
    assert len(probes) == 3
    assert all(probe is not None and len(probe.prompts) == PROMPTS for probe in probes)
    assert len({probe.top_logprobs for probe in probes if probe is not None}) == 3
