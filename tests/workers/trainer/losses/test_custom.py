"""A loss that is the user's own function: what it is given, and what is refused at the start."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.settings.load import load_settings
from onstream.settings.sections.losses import CustomLoss
from onstream.workers.launcher.preflight import check_loss
from onstream.workers.trainer.losses import loss_function
from tests.tiny import write_tiny
from tests.workers.trainer.test_learner import learner, samples

MINE = """
import torch

def nll(inputs):
    return -inputs.trainer_logprobs

def policy_gradient(inputs, *, adv_tau, kl_tau):
    log_ratio = inputs.trainer_logprobs - inputs.generator_logprobs
    policy = -log_ratio.exp() * adv_tau * inputs.advantage
    drift = kl_tau * log_ratio.square()
    return policy + drift, {"policy": policy, "drift": drift}

def over_top_k(inputs):
    trainer = torch.cat((inputs.trainer_top_logprobs, inputs.trainer_tail_logprobs[:, None]), 1)
    teacher = torch.cat((inputs.teacher_top_logprobs, inputs.teacher_tail_logprobs[:, None]), 1)
    return (trainer.exp() * (trainer - teacher)).sum(-1)

def raises(inputs):
    return inputs.trainer_logprobs / inputs.nothing

def a_number(inputs):
    return 1.0

def one_for_all(inputs):
    return -inputs.trainer_logprobs.sum()

def detached(inputs):
    return -inputs.trainer_logprobs.detach()

def infinite(inputs):
    return 1 / (inputs.trainer_logprobs - inputs.trainer_logprobs)

def infinite_gradient(inputs):
    return (inputs.trainer_logprobs - inputs.trainer_logprobs_unscaled).sqrt()

def odd_metric(inputs):
    return -inputs.trainer_logprobs, {"mine": inputs.trainer_logprobs.mean()}

def metrics_in_a_list(inputs):
    return -inputs.trainer_logprobs, [inputs.entropy]
"""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("student"))


@pytest.fixture(autouse=True)
def users_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the user's module, which no other test can have imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    (tmp_path / "my_losses.py").write_text(MINE)
    return tmp_path


def custom(name: str, **settings: Any) -> dict[str, Any]:
    return {"type": "custom", "function": f"my_losses:{name}", **settings}


def test_the_negative_log_likelihood_as_a_custom_loss_equals_sft(student: Path) -> None:
    ours = learner(student, type="sft")
    theirs = learner(student, **custom("nll"))
    given = samples(ours)
    assert theirs.step(given, 3) == ours.step(given, 3)
    assert theirs.step(given, 3) == ours.step(given, 3)


def test_a_policy_gradient_as_a_custom_loss_equals_rl_and_has_its_metrics(student: Path) -> None:
    taus = {"adv_tau": 0.5, "kl_tau": 0.01}
    ours = learner(student, trust_region="none", **taus)
    theirs = learner(
        student,
        **custom("policy_gradient", needs=["generator_logprobs", "reward"], args=taus),
    )
    for _ in range(2):
        given = samples(learner(student), temperature=0.7)
        expected = ours.step(given, 3)
        found = theirs.step(given, 3)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert found["custom_policy"] == pytest.approx(expected["loss_policy"], rel=1e-5)
        assert found["custom_drift"] == pytest.approx(expected["loss_kl"], rel=1e-4, abs=1e-9)
        for shared in ("entropy", "mismatch_mean", "mismatch_max"):
            assert found[shared] == pytest.approx(expected[shared], rel=1e-4, abs=1e-6)


def test_a_divergence_over_the_top_k_as_a_custom_loss_equals_that_of_rl(
    student: Path, tmp_path: Path
) -> None:
    teacher = learner(write_tiny(tmp_path / "teacher", seed=1))
    ours = learner(student, teacher_tau=1.0, adv_tau=0.0, kl_tau=0.0, teacher_top_k=4)
    theirs = learner(student, **custom("over_top_k", needs=["teacher_logprobs"], teacher_top_k=4))
    given = samples(ours, teacher, top_k=4)
    expected = ours.step(given, 3)
    found = theirs.step(given, 3)
    for name in ("loss", "grad_norm", "teacher_kl", "tail_floored_share"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("nowhere", {}, "has no attribute 'nowhere'"),
        ("torch.pi", {}, "it is a float"),
        ("raises", {}, "raised AttributeError"),
        ("policy_gradient", {}, "missing 2 required keyword-only arguments"),
        (
            "policy_gradient",
            {"args": {"adv_tau": 1.0, "kl_tau": 0.0}},
            "raised TypeError: unsupported operand type(s) for -: 'Tensor' and 'NoneType'",
        ),
        ("a_number", {}, "returned the loss as a float; expected a tensor of shape [5]"),
        ("one_for_all", {}, "returned the loss of shape []; expected a tensor of shape [5]"),
        ("detached", {}, "does not depend on the trainer's logprobs"),
        ("infinite", {}, "gave the loss [inf, inf, inf, inf, inf] on a made-up batch"),
        ("infinite_gradient", {}, "gave the gradient [inf"),
        ("odd_metric", {}, "returned the metric 'mine' of shape []"),
        ("metrics_in_a_list", {}, "returned metrics as a list; expected a dictionary"),
    ],
)
def test_a_function_that_is_no_loss_is_refused_before_the_model_is_loaded(
    name: str, settings: dict[str, Any], told: str
) -> None:
    loss = CustomLoss(**custom(name, **settings))
    with pytest.raises(UserError) as caught:
        loss_function(loss)
    assert told in str(caught.value)
    assert "trainer.loss.function" in str(caught.value)


def test_the_example_of_the_docs_trains(users_directory: Path, student: Path) -> None:
    page = (Path(__file__).parents[4] / "docs" / "objective.md").read_text(encoding="utf-8")
    table = tomllib.loads(page.partition("```toml\n")[2].partition("```")[0])
    code = page.partition("```python\n")[2].partition("```")[0]
    (users_directory / "my_losses.py").write_text(code)
    found = learner(student, **table["trainer"]["loss"])
    teacher = learner(student)
    metrics = found.step(samples(found, teacher), 3)
    # With the student as its own teacher every ratio is 1, and the loss is half of that of sft.
    expected = learner(student, type="sft").step(samples(teacher), 3)["loss"]
    assert metrics["custom_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["loss"] == pytest.approx(expected / 2, rel=1e-5)


def test_where_the_function_failed_is_told_by_file_and_line(users_directory: Path) -> None:
    line = MINE.splitlines().index("    return inputs.trainer_logprobs / inputs.nothing") + 1
    with pytest.raises(UserError, match=f"{users_directory / 'my_losses.py'}:{line}"):
        loss_function(CustomLoss(**custom("raises")))


def test_the_launcher_tries_a_custom_loss_and_imports_nothing_for_the_others() -> None:
    overrides = ["trainer.loss.type=custom", 'trainer.loss.needs=["reward"]']
    good = load_settings(overrides=[*overrides, "trainer.loss.function=my_losses:nll"], environ={})
    check_loss(good)
    bad = load_settings(overrides=[*overrides, "trainer.loss.function=my_losses:no"], environ={})
    with pytest.raises(UserError, match="has no attribute 'no'"):
        check_loss(bad)
    check_loss(load_settings(environ={}))
