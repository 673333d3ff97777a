"""What is said of the learning rate before a run starts."""

from __future__ import annotations

import pytest

from onstream.settings.load import load_settings
from onstream.workers.launcher.learning_rate import learning_rate_line

HERE = "model.name=examples/reverse-text/student"
TAUGHT = ("trainer.loss.teacher_tau=1.0", "teacher_inference.model.name=teacher")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            [HERE, *TAUGHT],
            '0.0005 after 10 steps of warm-up; trainer.optim.lr = "auto": hidden size 96',
        ),
        (
            [HERE, *TAUGHT, "trainer.lora.rank=4"],
            '0.005 after 10 steps of warm-up; trainer.optim.lr = "auto": hidden size 96, an '
            "adapter is trained",
        ),
        (
            [HERE],
            '0.0001 after 10 steps of warm-up; trainer.optim.lr = "auto": hidden size 96, rewards '
            "alone teach",
        ),
        ([HERE, "trainer.optim.lr=2e-4", "trainer.optim.warmup=0"], "0.0002 without warm-up"),
        (
            ["model.name=nobody/has-this-one"],
            'after 10 steps of warm-up; trainer.optim.lr = "auto", and the student is not on this '
            "machine",
        ),
    ],
    ids=["whole weights", "an adapter", "rewards alone", "given", "no student here"],
)
def test_the_rate_is_told_with_its_warm_up_and_why(overrides: list[str], line: str) -> None:
    assert learning_rate_line(load_settings([], overrides, environ={})) == line
