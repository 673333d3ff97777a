"""The maths reads no files, no settings and no streams."""

from __future__ import annotations

import subprocess
import sys

IMPORT = """
import sys
before = set(sys.modules)
import {module}
print(*set(sys.modules) - before)
"""
OUTSIDE = {"torch", "transformers", "redis", "pydantic", "msgspec"}


def imported_by(module: str) -> set[str]:
    """What a fresh interpreter imports with `module`: ours in full, others by package."""
    child = subprocess.run(
        [sys.executable, "-c", IMPORT.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
    )
    names = child.stdout.split()
    ours = {name for name in names if name.partition(".")[0] == "onstream"}
    return ours | {name.partition(".")[0] for name in names if name not in ours}


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("onstream.")}


def packages_around(module: str) -> set[str]:
    """`module` and the packages that it is in."""
    parts = module.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts) + 1)}


def test_plain_numbers_need_the_standard_library_alone() -> None:
    module = "onstream.workers.trainer.maths.scalars"
    assert imported_by(module) <= set(sys.stdlib_module_names) | packages_around(module)


def test_packing_needs_numpy_alone() -> None:
    module = "onstream.pipeline.models.packing"
    allowed = set(sys.stdlib_module_names) | packages_around(module) | {"numpy"}
    assert imported_by(module) <= allowed


def test_batches_need_the_records_and_no_tensors() -> None:
    names = imported_by("onstream.workers.trainer.batches.batch_builder")
    assert not names & {"torch", "transformers", "redis", "pydantic"}
    settings = {name for name in names if name.startswith("onstream.settings.")}
    # The names of the stages and the errors of decoding, for the records: no settings.
    assert settings <= {"onstream.settings.stages", "onstream.settings.decoding"}


def test_the_formulas_need_torch_and_nothing_of_ours() -> None:
    module = "onstream.workers.trainer.maths.loss"
    names = imported_by(module)
    assert "torch" in names
    assert not names & (OUTSIDE - {"torch"})
    assert ours(names) <= packages_around(module)
