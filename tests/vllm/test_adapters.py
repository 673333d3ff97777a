"""vLLM under a LoRA run: it gets adapters alone, and writes what transformers says under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights import (
    DirectoryReader,
    DirectoryWriter,
    LoadedPolicy,
    PolicyFetcher,
    PolicySender,
    announced,
)
from onstream.settings.sections.inference import InferenceSettings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.guard import FLOAT32_TOLERANCE, Guard
from onstream.workers.generator.student import Student
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.publication.policy_probe import prober
from onstream.workers.trainer.publication.publisher import student_files
from tests.vllm.reference import CLOSE_NATS, gaps, model_of

pytestmark = pytest.mark.slow
FIRST = 2000  # policy versions that no other test of the session uses
REQUESTS = 16
LORA = {"rank": 8, "alpha": 16.0}


class LoraRun:
    """A trainer that publishes adapters into `run_dir`, and the generator that reads them there."""

    def __init__(self, engine: Any, student_dir: Path, run_dir: Path) -> None:
        settings = TrainerSettings.model_validate({"lora": LORA})
        self.engine = engine
        self.run_dir = run_dir
        self.learner = Learner(student_dir, settings, torch.device("cpu"))
        self.packer = self.learner.packer(whole=False)
        store = DirectoryWriter(run_dir, student_files(run_dir, self.learner))
        self.sender = PolicySender(store, None)
        self.fetcher = PolicyFetcher(DirectoryReader(run_dir), deltas=False)
        self.guard = Guard(engine, interval=1, tolerance=FLOAT32_TOLERANCE, family="qwen3")
        self.prober = prober(self.learner, InferenceSettings())
        self.fetched_bytes: list[int] = []
        self.models: dict[int, Any] = {}

    def factors(self) -> dict[str, Tensor]:
        named = self.learner.model.named_parameters()
        return {name: weight for name, weight in named if ".lora_" in name}

    @torch.no_grad()
    def set_factors(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.factors().items():
            weight.copy_(values[name])

    def publish(self, number: int) -> None:
        """Publish what the learner has, and put it into the engine, as trainer and generator do."""
        state = self.learner.live_state()
        made = LoadedPolicy(number, None, self.packer.pack(state))
        sent = self.sender.send(made, adapter_base=lambda: self.packer.base(state))
        assert sent.update_bytes == made.data.size
        policy = replace(announced(made), probe=self.prober.ask())
        self._load(policy)
        # transformers reads the published directory by itself, with peft.
        self.models[number] = model_of(self.run_dir / policy.path)

    def _load(self, policy: PolicyVersion) -> None:
        self.engine.load(self.fetcher.fetch(policy))
        self.fetched_bytes.append(self.fetcher.fetched_bytes)
        self.guard.look(policy)

    def step(self) -> list[Completion]:
        return self.guard.take(self.engine.step())


@pytest.fixture
def lora_run(student: Student, student_dir: Path, tmp_path: Path) -> Iterator[LoraRun]:
    engine: Any = student.engine
    engine.on_new_weights = "recompute"
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    yield LoraRun(engine, student_dir, run_dir)
    while engine.active:
        engine.step()


def requests(version: int) -> dict[int, GenerationRequest]:
    """One that is short and others that an update interrupts, by their keys."""
    draw = np.random.default_rng(version)
    keys = range(version * 100, version * 100 + REQUESTS)
    lengths = [4, *draw.integers(100, 160, REQUESTS - 1).tolist()]
    return {
        key: GenerationRequest(key, draw.integers(8, 128, 24).astype(np.int32), length, seed=key)
        for key, length in zip(keys, lengths, strict=True)
    }


def wide_factors(lora_run: LoraRun, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=draw) * 0.2
        for name, weight in lora_run.factors().items()
    }


def test_from_one_adapter_to_another_and_back_every_token_is_its_versions(
    lora_run: LoraRun, record_testsuite_property: Callable[[str, object], None]
) -> None:
    first = wide_factors(lora_run, 3)
    asked: dict[int, GenerationRequest] = {}
    written: list[Completion] = []
    for number, factors in enumerate((first, wide_factors(lora_run, 4), first), FIRST):
        lora_run.set_factors(factors)
        lora_run.publish(number)
        new = requests(number)
        asked |= new
        lora_run.engine.add(list(new.values()))
        while number * 100 not in {one.key for one in written}:
            written += lora_run.step()
    while lora_run.engine.active:
        written += lora_run.step()
    spans = [[span.version for span in one.version_spans] for one in written]
    assert {version for one in spans for version in one} == {FIRST, FIRST + 1, FIRST + 2}
    assert max(len(one) for one in spans) > 1, "some are interrupted by an update"
    worst = max(float(gaps(lora_run.models, asked[one.key], one).max()) for one in written)
    print(f"vLLM and transformers differ by at most {worst:.1e} nats")
    record_testsuite_property("nats that vLLM is off under adapters", worst)
    assert worst < CLOSE_NATS
    assert farthest_apart(lora_run) > 1


@torch.no_grad()
def farthest_apart(lora_run: LoraRun) -> float:
    """How far the second version's logits are from the first's, in nats; those of the third, which
    has the first one's factors, are the first's.
    """
    ids = torch.arange(8, 40)[None]
    one, other, again = (model(ids).logits for model in lora_run.models.values())
    assert torch.equal(one, again)
    return float((one - other).abs().max())


def test_a_generator_reads_the_base_once_and_then_the_factors_alone(lora_run: LoraRun) -> None:
    for number in range(FIRST + 10, FIRST + 13):
        lora_run.set_factors(wide_factors(lora_run, number))
        lora_run.publish(number)
        while lora_run.engine.active:
            lora_run.step()
    whole, *later = lora_run.fetched_bytes
    assert later == [later[0]] * 2
    assert later[0] < whole / 4
    print(f"{whole:,} bytes, then {later[0]:,} a version")
