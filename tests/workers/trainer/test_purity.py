"""The maths reads no files, no settings and no streams."""

from __future__ import annotations

import subprocess
import sys

import pytest

ASK = """
import sys
before = set(sys.modules)
import {module}
brought = (name.removeprefix("onstream.") for name in set(sys.modules) - before)
print(*{{name.partition(".")[0] for name in brought}})
"""
OWN = {"onstream", "pipeline", "workers"}


def imported_by(module: str) -> set[str]:
    """Top-level names of everything that a fresh interpreter imports with `module`."""
    asked = subprocess.run(
        [sys.executable, "-c", ASK.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(asked.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "onstream.workers.trainer.maths.advantages",
        "onstream.workers.trainer.maths.staleness",
        "onstream.workers.trainer.maths.schedule",
    ],
)
def test_plain_numbers_need_the_standard_library_alone(module: str) -> None:
    assert imported_by(module) <= set(sys.stdlib_module_names) | OWN


def test_packing_needs_numpy_alone() -> None:
    assert imported_by("onstream.pipeline.models.packing") <= set(sys.stdlib_module_names) | OWN | {
        "numpy"
    }


def test_groups_need_the_records_and_no_tensors() -> None:
    assert not imported_by("onstream.workers.trainer.batches.batch_builder") & {
        "torch",
        "transformers",
        "redis",
        "pydantic",
        "settings",
    }


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "module", ["onstream.workers.trainer.maths.loss", "onstream.workers.trainer.maths.mismatch"]
)
def test_the_loss_needs_torch_and_nothing_of_ours(module: str) -> None:
    names = imported_by(module)
    assert "torch" in names
    assert not names & {"transformers", "redis", "pydantic", "msgspec", "settings", "pipeline"}
