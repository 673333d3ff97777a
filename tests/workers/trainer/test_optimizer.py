"""Moments in the host's memory, the same steps and checkpoints; Muon for matrices."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.memory import DecoderSizes, trainer_memory
from onstream.settings.sections.trainer import OptimSettings, TrainerSettings
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.optimizer import HostStatesAdamW, new_optimizer
from tests.tiny import sequences, write_tiny

CPU = torch.device("cpu")
STEPS = 3


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("student"))


def learner(directory: Path, states: str = "device", kind: str = "adamw") -> Learner:
    optim = {"lr": 1e-2, "warmup": 0, "weight_decay": 0.1, "states": states, "type": kind}
    settings = TrainerSettings.model_validate({"loss": {"type": "sft"}, "optim": optim})
    return Learner(directory, settings, CPU)


def samples() -> list[TrainSample]:
    return [
        TrainSample(
            prompt,
            completion,
            np.ones(len(completion), np.uint8),
            np.zeros(len(completion), np.float32),
        )
        for prompt, completion in zip(*sequences(3, 2, completion=(3, 7), seed=5), strict=True)
    ]


def steps(of: Learner) -> None:
    for _ in range(STEPS):
        of.step(samples(), 2 * STEPS)


def weights(of: Learner) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in of.model.state_dict().items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_moments_on_the_host_change_no_bit(student: Path) -> None:
    plain = learner(student, "device")
    on_host = learner(student, "host")
    for one in (plain, on_host):
        steps(one)
    assert isinstance(on_host._optimizer, HostStatesAdamW)
    assert_same_bits(weights(on_host), weights(plain))


@pytest.mark.parametrize(("first", "then"), [("device", "host"), ("host", "device")])
def test_a_trainer_goes_on_from_the_moments_that_the_other_kind_has_saved(
    student: Path, first: str, then: str, tmp_path: Path
) -> None:
    undisturbed = learner(student, first)
    steps(undisturbed)
    undisturbed.save_checkpoint(tmp_path)
    state = copy.deepcopy(undisturbed.state())
    resumed = learner(tmp_path, then)
    resumed.load_state(state)
    for one in (undisturbed, resumed):
        steps(one)
    assert_same_bits(weights(resumed), weights(undisturbed))


def test_a_weight_without_a_gradient_stays_and_has_no_moments() -> None:
    moved = torch.nn.Parameter(torch.ones(3))
    still = torch.nn.Parameter(torch.ones(3))
    optimizer = new_optimizer(
        [moved, still], OptimSettings(lr=1e-3, states="host", weight_decay=0.5)
    )
    moved.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(moved, torch.ones(3))
    assert torch.equal(still, torch.ones(3))
    assert list(optimizer.state_dict()["state"]) == [0]


@pytest.fixture(scope="module")
def wide_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with weights of 4,096 numbers and more: smaller ones keep their moments in 32 bits."""
    shape = ModelShape(hidden=64, layers=1, intermediate=128, heads=4, key_value_heads=2)
    return write_fresh(tmp_path_factory.mktemp("wide"), shape, seed=0)


@pytest.fixture
def eight_bits() -> None:
    """The optimizer of the extra `8bit`, where it is installed."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, of the extra `8bit`")


@pytest.mark.usefixtures("eight_bits")
def test_moments_in_8_bits_are_near_those_in_32_and_take_a_quarter(wide_student: Path) -> None:
    plain = learner(wide_student, "device")
    rounded = learner(wide_student, "8bit")
    losses = {}
    for name, one in (("plain", plain), ("rounded", rounded)):
        losses[name] = [one.step(samples(), 100)["loss"] for _ in range(8)]
    assert losses["rounded"][-1] < 0.8 * losses["rounded"][0]
    assert losses["rounded"] == pytest.approx(losses["plain"], rel=0.05)
    moments = rounded._optimizer.state.values()
    kinds = {one["state1"].dtype for one in moments if one["state1"].numel() >= 4096}
    assert kinds == {torch.uint8}


@pytest.mark.usefixtures("eight_bits")
def test_a_trainer_with_moments_in_8_bits_resumes_with_the_same_bits(
    wide_student: Path, tmp_path: Path
) -> None:
    undisturbed = learner(wide_student, "8bit")
    steps(undisturbed)
    undisturbed.save_checkpoint(tmp_path)
    torch.save(undisturbed.state(), tmp_path / "state")
    resumed = learner(tmp_path, "8bit")
    resumed.load_state(torch.load(tmp_path / "state", weights_only=True))
    for one in (undisturbed, resumed):
        steps(one)
    assert_same_bits(weights(resumed), weights(undisturbed))


@pytest.mark.usefixtures("eight_bits")
def test_weights_under_moments_in_8_bits_wait_for_what_comes_before_an_update(
    wide_student: Path,
) -> None:
    rounded = learner(wide_student, "8bit")
    before = weights(rounded)
    rounded.before_update(lambda: assert_same_bits(weights(rounded), before))
    rounded.step(samples(), 10)
    with pytest.raises(AssertionError):
        assert_same_bits(weights(rounded), before)


@pytest.mark.usefixtures("eight_bits")
@pytest.mark.parametrize(("first", "then"), [("8bit", "device"), ("host", "8bit")])
def test_moments_of_other_bits_are_refused_with_the_setting_that_the_run_had(
    wide_student: Path, first: str, then: str
) -> None:
    saved = learner(wide_student, first)
    steps(saved)
    had = "8bit" if first == "8bit" else "host"
    with pytest.raises(UserError, match=rf'(?s)moments in .* bits.*states = .*"{had}"'):
        learner(wide_student, then).load_state(saved.state())


def test_muon_takes_the_matrices_inside_the_model_and_adamw_the_rest(student: Path) -> None:
    made = learner(student, kind="muon")
    made.step(samples(), 10)
    kinds = {
        name: "muon" if "momentum_buffer" in made._optimizer.state[weight] else "adamw"
        for name, weight in made.model.named_parameters()
    }
    assert kinds["model.embed_tokens.weight"] == "adamw"  # tied to the output layer
    by_muon = {name.rpartition("layers.")[2] for name, kind in kinds.items() if kind == "muon"}
    assert {name for name in by_muon if name.startswith("0.")} == {
        *(f"0.self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


def test_untied_output_layers_are_not_muons(tmp_path: Path) -> None:
    made = learner(write_tiny(tmp_path, "llama"), kind="muon")
    made.step(samples(), 10)
    of_tokens = (made.model.get_input_embeddings(), made.model.get_output_embeddings())
    for module in of_tokens:
        assert set(made._optimizer.state[module.weight]) >= {"exp_avg", "exp_avg_sq"}


def test_muon_moves_a_matrix_as_far_as_adamw_does_at_the_same_rate() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(32, 96)
    moved = {}
    for kind in ("adamw", "muon"):
        matrix = torch.nn.Parameter(torch.zeros(32, 96))
        optimizer = new_optimizer([matrix], OptimSettings(lr=1e-3, type=kind), [matrix])
        for _ in range(20):
            matrix.grad = gradient + torch.randn(32, 96)
            optimizer.step()
        moved[kind] = float(matrix.detach().square().mean().sqrt())
    assert 0.2 < moved["muon"] / moved["adamw"] < 1


def test_a_trainer_with_muon_resumes_with_the_same_bits(student: Path, tmp_path: Path) -> None:
    undisturbed = learner(student, kind="muon")
    steps(undisturbed)
    undisturbed.save_checkpoint(tmp_path)
    torch.save(undisturbed.state(), tmp_path / "state")
    resumed = learner(tmp_path, kind="muon")
    resumed.load_state(torch.load(tmp_path / "state", weights_only=True))
    for one in (undisturbed, resumed):
        steps(one)
    assert_same_bits(weights(resumed), weights(undisturbed))


def test_weights_under_muon_wait_for_what_comes_before_an_update(student: Path) -> None:
    made = learner(student, kind="muon")
    before = weights(made)
    made.before_update(lambda: assert_same_bits(weights(made), before))
    made.step(samples(), 10)
    with pytest.raises(AssertionError):
        assert_same_bits(weights(made), before)


def test_the_memory_formula_counts_one_moment_of_each_matrix_with_muon(student: Path) -> None:
    made = learner(student, kind="muon")
    made.step(samples(), 10)
    moments = [
        value.numel()
        for state in made._optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    shape = DecoderSizes.of(json.loads((student / "config.json").read_text()))
    assert shape is not None
    total = sum(weight.numel() for weight in made.model.parameters())
    memory = trainer_memory(
        shape, made.trainer, half=False, recompute=False, row_tokens=64, parameters=total
    )
    assert memory.optimizer == 4 * sum(moments)
