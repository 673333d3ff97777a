"""Writes docs/settings.md, and the names of settings in compose.yaml, from the settings' fields.

`python -m onstream.settings.docs`
"""

from __future__ import annotations

import runpy
from itertools import groupby
from pathlib import Path

from onstream.settings.fields import NAME, Setting, known, sections
from onstream.settings.toml import shown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

_HEAD = """# Settings

Written by `python -m onstream.settings.docs` from the fields in `settings/sections/`; edit those.

Sources, strongest first: the command line (`--set trainer.loss.teacher_tau=0.5`), the environment
(`ONSTREAM_TRAINER__LOSS__TEACHER_TAU=0.5`), TOML files (several: a later one wins), the defaults.
Lists and tables are written as JSON on the command line and in the environment, `null` unsets a
value there, and an empty variable counts as not set. A *secret* may also be in a file, whose path
is in the variable's name with `_FILE` at its end: `ONSTREAM_REDIS__PASSWORD_FILE`. A key that no
section has is an error. `onstream check [FILE…]` prints what the sources add up to.

**Scope**: *run* settings define the run. They are written to Redis once, and a worker that
disagrees stops; *run, changeable* ones may be changed when the run is resumed. *worker* settings
concern one process alone.
"""


def text() -> str:
    """The whole page."""
    parts = [_HEAD]
    own = [setting for setting in known().values() if not _is_told_elsewhere(setting)]
    for (section, types), settings in groupby(own, key=_group):
        parts.append(f"{_heading(section, types)}\n\n{_table(list(settings))}\n")
    return "\n".join(parts)


def _is_told_elsewhere(setting: Setting) -> bool:
    """Whether it is one of another section's, within a section that users name."""
    _, named, inner = setting.name.partition(f"{NAME}.")
    return bool(named) and "." in inner


def _group(setting: Setting) -> tuple[str, tuple[str, ...]]:
    return setting.name.rpartition(".")[0], setting.types


def _heading(section: str, types: tuple[str, ...]) -> str:
    if types:
        return f"### [{section}] with `type` {' or '.join(f'`{name}`' for name in types)}"
    about = " ".join((sections()[section].__doc__ or "").split())
    return f"## [{section}]\n\n{about}"


def _table(settings: list[Setting]) -> str:
    rows = [
        "| Setting | Default | Type | Bound | Unit | Scope | Meaning |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in settings:
        cells = (
            f"`{setting.name}`",
            f"`{shown(setting.default)}`",
            setting.type,
            _bound(setting),
            setting.unit,
            _scope(setting),
            setting.doc,
        )
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows)


def _bound(setting: Setting) -> str:
    return f"`{setting.bound}`" if "matches" in setting.bound else setting.bound


def _scope(setting: Setting) -> str:
    return "run, changeable" if setting.scope.changeable else setting.scope.kind


def main() -> None:
    """Write the page, and what the files to deploy by say of the settings."""
    PAGE.write_text(text(), encoding="utf-8")
    runpy.run_path(str(PAGE.parent.parent / "deploy" / "generate.py"), run_name="__main__")


if __name__ == "__main__":
    main()
