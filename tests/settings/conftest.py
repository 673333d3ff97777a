"""The plan and the rules are those of a machine without GPUs, wherever these tests run."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
