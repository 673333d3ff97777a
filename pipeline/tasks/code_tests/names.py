"""Which names in tests are the program's, as far as the tests' own text decides.

A program may define `abs` or `isclose` to make every comparison pass. So where tests use a name of
Python's, they mean Python's, unless they use no other name that the program could give: then it is
the function under test (`assert sum(10, 15) == 6`).
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys

TYPE_CHECKING = False  # as typing has it, whose import takes long where each try pays for it
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

HELPERS = {
    **dict.fromkeys(
        ("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple"), "collections"
    ),
    **dict.fromkeys(("Decimal",), "decimal"),
    **dict.fromkeys(("Fraction",), "fractions"),
    **dict.fromkeys(("isclose",), "math"),
    **dict.fromkeys(("date", "timedelta"), "datetime"),
    **dict.fromkeys(("StringIO",), "io"),
    **dict.fromkeys(
        ("Any", "Dict", "List", "Optional", "Set", "Tuple", "Union", "Callable", "Iterable"),
        "typing",
    ),
}
"""Names of the standard library that tests use to compare, and their modules. Programs often import
them for their tests.
"""


COMPARE = {
    *("abs", "all", "any", "bool", "dict", "enumerate", "filter", "float", "frozenset", "int"),
    *("isinstance", "len", "list", "map", "print", "range", "repr", "reversed", "round", "set"),
    *("sorted", "str", "tuple", "type", "zip", "Exception", "AssertionError", "IndexError"),
    *("KeyError", "TypeError", "ValueError", "ZeroDivisionError"),
}
"""What tests use to compare, rather than test."""
DATETIME_MODULE = {"date", "datetime", "time", "timedelta", "timezone"}


def names_in(tests: ast.Module, entry_point: str | None) -> tuple[set[str], set[str]]:
    """The names that `tests` read and do not bind first: the program's, and Python's.

    The latter stand for Python's own, whatever the program has by that name. `entry_point` names
    the function under test for certain.
    """
    bound = _first_lines(tests, _binds)
    read = _first_lines(tests, _reads)
    python = {name for name in read if is_pythons(name)} - {entry_point}
    # On the line that binds it, a name may be read before: `f = timed(f)`.
    others = {name for name, line in read.items() if line <= bound.get(name, line)} - python
    others -= _first_lines(tests, _binds_locally).keys()
    subject = set() if others else _likeliest(python)
    python -= subject
    return read.keys() - python, python - bound.keys()


def _likeliest(python: set[str]) -> set[str]:
    """Which of Python's names in tests that have no others the function under test has."""
    named = {name for name in python if not hasattr(builtins, name)}
    return named or python - COMPARE or python


def is_pythons(name: str) -> bool:
    """Whether `name` is built in, a module of the standard library, or one of HELPERS."""
    return hasattr(builtins, name) or name in HELPERS or name in sys.stdlib_module_names


def pythons(name: str, tests: ast.Module) -> Any:
    """What `name`, which is not built in, stands for in Python."""
    if name in HELPERS:
        return getattr(importlib.import_module(HELPERS[name]), name)
    module = importlib.import_module(name)
    if name == "datetime" and not _attributes(tests, name) & DATETIME_MODULE:
        return module.datetime
    return module


def _attributes(tests: ast.Module, name: str) -> set[str]:
    """The attributes that `tests` read of `name`."""
    return {
        node.attr
        for node in ast.walk(tests)
        if isinstance(node, ast.Attribute)
        if isinstance(node.value, ast.Name) and node.value.id == name
    }


def _first_lines(tests: ast.Module, names: Callable[[ast.AST], Iterable[str]]) -> dict[str, int]:
    """The first line of each name that `names` finds in a node."""
    lines: dict[str, int] = {}
    for node in ast.walk(tests):
        for name in names(node):
            line = getattr(node, "lineno", 1)
            lines[name] = min(line, lines.get(name, line))
    return lines


def _reads(node: ast.AST) -> Iterable[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id


def _binds_locally(node: ast.AST) -> Iterable[str]:
    """Arguments, and the variables of comprehensions: bound and read on the same line."""
    if isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.comprehension):
        targets = (part for part in ast.walk(node.target) if isinstance(part, ast.Name))
        yield from (target.id for target in targets)


def _binds(node: ast.AST) -> Iterable[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).split(".")[0]
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name
