"""The precision that a built-in teacher computes in: on a CPU decided by a probe."""

from __future__ import annotations

import time

import torch

from onstream.pipeline.models.loading import DtypeSetting, resolve_dtype
from onstream.pipeline.telemetry import get_logger

LEAST_HIDDEN = 256
"""Below this hidden size the products are too small a part of the work to gain by."""
LEAST_SPEED_UP = 1.3
PROBE_ROWS = 256
PROBE_TIMES = 5


def teacher_dtype(setting: DtypeSetting, hidden: int, device: torch.device) -> torch.dtype:
    """The precision of a teacher whose hidden states have `hidden` channels.

    `auto` on a CPU is bfloat16 where this processor multiplies it faster, and float32 elsewhere.
    That is a teacher's alone: what it says is recorded with the rollout, and nobody computes it
    again. Trainer and generator must agree, so they stay with what `resolve_dtype` says.
    """
    if setting != "auto" or device.type != "cpu" or hidden < LEAST_HIDDEN:
        return resolve_dtype(setting, device)
    speed_up = bfloat16_speed_up(hidden)
    if speed_up < LEAST_SPEED_UP:
        return torch.float32
    get_logger().info(
        "the teacher computes in bfloat16, which this processor multiplies faster",
        times=round(speed_up, 1),
        setting='teacher_inference.dtype = "auto"',
    )
    return torch.bfloat16


def bfloat16_speed_up(hidden: int) -> float:
    """How many times faster a product of `hidden` channels is in bfloat16 than in float32, here.

    The least time of a few tries of each: what other programs take only adds to it.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(PROBE_ROWS, hidden, dtype=dtype)
        right = torch.ones(hidden, 4 * hidden, dtype=dtype)
        seconds[dtype] = min(_product_s(left, right) for _ in range(PROBE_TIMES))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _product_s(left: torch.Tensor, right: torch.Tensor) -> float:
    began = time.perf_counter()
    left @ right
    return time.perf_counter() - began
