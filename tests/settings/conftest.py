"""The plan and the rules are those of a machine without GPUs and without vLLM, wherever these tests
run.
"""

from __future__ import annotations

import pytest

from onstream.settings import engines


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(engines, "vllm_importable", lambda: False)
