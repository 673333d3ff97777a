"""`make bench-gpu` runs to its end: every row, with tiny shapes."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from benchmarks.gpu import TINY, measured
from onstream.settings.extras import installed


def test_every_row_of_the_benchmark_is_measured(device: torch.device) -> None:
    printed = io.StringIO()
    measured(device, TINY, Console(file=printed, width=200))
    words = printed.getvalue()
    expected = (
        "trainer, 0.6B full, 48 tokens",
        "trainer, 0.6B full, 96 tokens, layers recomputed",
        "AdamW's moments in the host's memory",
        "trainer, 4B LoRA 16",
        "teacher, 4B, top 16 and tail, samples of 48 tokens, by varlen",
        "teacher, 4B, top 16 and tail, samples of 48 tokens, by sdpa",
        "publication of 0.6B",
        "whole step 0.6B ← 4B",
    )
    assert [row for row in expected if row not in words] == []
    assert ("AdamW's moments in 8 bits" in words) == installed("bitsandbytes")
