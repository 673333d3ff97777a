"""Who may import whom. A room imports itself and the layers below it; rooms of one layer do not
import one another. Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from onstream.settings.stages import WORKERS

ROOT = Path(__file__).parents[1]
LAYERS: tuple[set[str], ...] = (  # from the bottom up; CONTRIBUTING.md explains them
    {"settings"},
    {"pipeline"},
    {".".join(worker.class_path.split(".")[1:3]) for worker in WORKERS.values()},  # the stages
    {"workers.evaluation", "workers.inspection"},
    {"workers.launcher"},
    {"workers.jobs", "workers.replay", "workers.tiny_models"},
    {"workers.api", "workers.monitoring"},
    {"workers.runner"},
    {"workers.commands"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
LEAF = "pipeline.errors"  # every layer may import it; it imports nothing of ours
MATHS = "workers.trainer.maths"
MATHS_MAY_IMPORT = {"numpy", "torch", *sys.stdlib_module_names}

Imports = dict[str, list[str]]


@cache
def imports_below(root: Path) -> Imports:
    """For each module of ours, by its name without `onstream.`: what it imports, ours likewise."""
    files = [
        file for top in ("settings", "pipeline", "workers") for file in (root / top).rglob("*.py")
    ]
    names = {file: ".".join(file.relative_to(root).with_suffix("").parts) for file in files}
    modules = {name.removesuffix(".__init__") for name in names.values()}
    return {
        names[file].removesuffix(".__init__"): list(_imported(file, modules))
        for file in sorted(files)
    }


def _imported(file: Path, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("onstream.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}:{node.lineno}: a relative import"
            module = node.module.removeprefix("onstream.")
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                yield submodule if submodule in modules else module


def room_of(module: str) -> str:
    """`pipeline.redis.streams` is in `pipeline`, `workers.trainer.trainer` in `workers.trainer`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "workers" else parts[0]


def upward_imports(imports: Imports) -> list[str]:
    """The imports that go up, or across a layer."""
    return [
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target in targets
        if (room := room_of(target)) in LEVEL and room != room_of(module) and target != LEAF
        if LEVEL[room] >= LEVEL[room_of(module)]
    ]


def impure_imports(imports: Imports) -> list[str]:
    """What the maths import besides torch, numpy, the standard library and themselves."""
    return [
        f"{module} imports {target}"
        for module, targets in imports.items()
        if module.startswith(MATHS)
        for target in targets
        if not target.startswith(MATHS) and target.split(".")[0] not in MATHS_MAY_IMPORT
    ]


def import_loop(imports: Imports) -> list[str]:
    """The modules of a loop, if there is one."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        loop: list[str] = error.args[1]
        return loop
    return []


def test_nothing_imports_upwards_and_stages_do_not_import_one_another() -> None:
    assert upward_imports(imports_below(ROOT)) == []


def test_every_module_is_in_a_room_of_a_layer() -> None:
    rooms = {room_of(module) for module in imports_below(ROOT)} - {"workers"}  # its __init__.py
    assert rooms == set(LEVEL)


def test_the_leaf_imports_nothing_of_ours() -> None:
    imports = imports_below(ROOT)
    assert [target for target in imports[LEAF] if target in imports] == []


def test_the_maths_import_torch_numpy_and_the_standard_library_only() -> None:
    assert impure_imports(imports_below(ROOT)) == []


def test_there_is_no_import_loop() -> None:
    assert import_loop(imports_below(ROOT)) == []


def test_the_checks_find_what_they_are_for(tmp_path: Path) -> None:
    _write(tmp_path / "settings/run.py", "from onstream.pipeline.errors import Exit")
    _write(tmp_path / "pipeline/errors.py", "import enum")
    _write(tmp_path / "pipeline/loop.py", "def run():\n    import onstream.workers.runner")
    _write(tmp_path / "workers/runner.py", "from onstream.pipeline import loop")
    _write(tmp_path / "workers/teacher/stage.py", "import onstream.workers.trainer.maths.loss")
    _write(tmp_path / "workers/trainer/maths/loss.py", "import math\nimport redis\nimport torch.nn")

    imports = imports_below(tmp_path)

    assert upward_imports(imports) == [
        "pipeline.loop imports workers.runner",
        "workers.teacher.stage imports workers.trainer.maths.loss",
    ]
    assert impure_imports(imports) == ["workers.trainer.maths.loss imports redis"]
    assert set(import_loop(imports)) == {"pipeline.loop", "workers.runner"}


def _write(file: Path, source: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
