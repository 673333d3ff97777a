"""`make bench-gpu` runs to its end: every row, with tiny shapes."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from benchmarks.gpu import TINY, measured


def test_every_row_of_the_benchmark_is_measured(device: torch.device) -> None:
    printed = io.StringIO()
    measured(device, TINY, Console(file=printed, width=200))
    words = printed.getvalue()
    for row in ("0.6B full, 48", "0.6B full, 96", "4B LoRA 16", "teacher, 4B", "publication"):
        assert f"{row}" in words
    assert "whole step 0.6B ← 4B" in words
