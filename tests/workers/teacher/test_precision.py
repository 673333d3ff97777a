"""The precision of a built-in teacher."""

from __future__ import annotations

import pytest
import torch

from onstream.workers.teacher import precision
from onstream.workers.teacher.precision import LEAST_HIDDEN, bfloat16_speed_up, teacher_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("setting", "hidden", "speed_up", "expected"),
    [
        ("auto", LEAST_HIDDEN, 2.0, torch.bfloat16),
        ("auto", LEAST_HIDDEN, 1.2, torch.float32),
        ("auto", LEAST_HIDDEN - 1, 2.0, torch.float32),
        ("float32", LEAST_HIDDEN, 2.0, torch.float32),
        ("bfloat16", LEAST_HIDDEN, 0.5, torch.bfloat16),
    ],
)
def test_on_a_cpu_a_probe_decides_where_the_setting_leaves_it_open(
    monkeypatch: pytest.MonkeyPatch,
    setting: precision.DtypeSetting,
    hidden: int,
    speed_up: float,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(precision, "bfloat16_speed_up", lambda hidden: speed_up)
    assert teacher_dtype(setting, hidden, CPU) == expected


def test_cuda_needs_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(precision, "bfloat16_speed_up")
    assert teacher_dtype("auto", LEAST_HIDDEN, torch.device("cuda")) == torch.bfloat16


def test_the_probe_compares_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = {torch.float32: [3.0, 2.0, 9.0, 9.0, 9.0], torch.bfloat16: [0.5] * 5}
    monkeypatch.setattr(precision, "_product_s", lambda left, right: tried[left.dtype].pop(0))
    assert bfloat16_speed_up(LEAST_HIDDEN) == 4.0
