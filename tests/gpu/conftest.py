"""What `make test-gpu` runs on a GPU: every test runs on a CPU too, with smaller models.

ONSTREAM_TEST_DEVICE says where: `cpu` by default, `cuda` for `make test-gpu`. Nothing is skipped:
without a GPU, a run that asks for one fails. No fixture of other tests is used, so that a machine
with torch, transformers and deploy/gpu-wheels.txt can run all of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from onstream.workers.tiny_models.fresh import ModelShape, write_fresh

# Read when cuBLAS starts: its sums are the same each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SHAPES = {
    "cpu": ModelShape(hidden=64, layers=2, intermediate=128),
    "cuda": ModelShape(hidden=1024, layers=8, intermediate=3072, heads=16, key_value_heads=8),
}


@pytest.fixture(scope="session")
def device() -> torch.device:
    asked = os.environ.get("ONSTREAM_TEST_DEVICE", "cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        pytest.fail("ONSTREAM_TEST_DEVICE = cuda, and torch finds no GPU")
    return torch.device(asked)


@pytest.fixture(autouse=True)
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU the models are too small for two."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dir(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the layout of Qwen3 with random weights, wide enough that nothing is flat."""
    directory = tmp_path_factory.mktemp("model")
    return write_fresh(directory, SHAPES[device.type], seed=7, initializer_range=0.1)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels that give the same bits each time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
