from __future__ import annotations

from pathlib import Path

import pytest

from onstream.workers.tiny_models.fresh import ModelShape, write_fresh


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with weights wide enough that its distributions are not flat."""
    return write_fresh(
        tmp_path_factory.mktemp("teacher"),
        ModelShape(hidden=64, layers=2, intermediate=128),
        seed=7,
        initializer_range=0.3,
    )
