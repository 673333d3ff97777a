"""Functions of the user's own, by import path: a scorer, a loss."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onstream.pipeline.errors import UserError


def search_modules_in(directory: Path | None) -> None:
    """Find modules in `directory` too, by default the working directory.

    After all others: a `redis.py` that lies there must not take the place of ours.
    """
    place = str(directory or Path.cwd())
    if place not in sys.path:
        sys.path.append(place)


def import_function(path: str, *, setting: str) -> Callable[..., Any]:
    """The function that `path` names as `module:function`.

    `setting` is where `path` stands, for messages.

    Modules in the working directory are found too, as `search_modules_in` says.

    Raises:
        UserError: the module cannot be imported or has no such function.
    """
    module_name, _, names = path.partition(":")
    search_modules_in(None)
    try:
        found: Any = importlib.import_module(module_name)
        for name in names.split("."):
            found = getattr(found, name)
    except Exception as error:  # the module is the user's own code, and may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise _cannot_be_used(path, setting, reason) from error
    if not callable(found):
        raise _cannot_be_used(path, setting, f"it is a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _cannot_be_used(path: str, setting: str, reason: str) -> UserError:
    return UserError(
        f"`{setting}` = {path!r} cannot be used: {reason}",
        expected="an importable `module:function`",
        next_step=f"Put its module in {os.getcwd()}, in run.modules or on PYTHONPATH, or correct "
        "the name.",
    )
