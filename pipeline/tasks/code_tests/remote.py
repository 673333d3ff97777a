"""What tests get of the program: its functions, classes and objects, which stay in its process.

Nothing here lets the program decide a comparison, or lets it see what it is compared with:
`==` compares plain data or nothing, and operators refuse plain operands.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, whose import takes long where each try pays for it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T", bool, int, float, str)
    Caller = Callable[..., Any]

OPEN_DUNDERS = ("__name__", "__qualname__", "__doc__", "__annotations__")
"""Attributes with two underscores that are asked for; no other is, since Python asks for them on
its own account."""


class Remote:
    """A function, a class or an object of the program.

    `has_content` says that its class is made from a built-in type, whose value it also has.
    """

    def __init__(self, call: Caller, number: int, has_content: bool) -> None:
        object.__setattr__(self, "_onstream_call", call)
        object.__setattr__(self, "_onstream_number", number)
        object.__setattr__(self, "_onstream_has_content", has_content)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._onstream_call(["object", self._onstream_number], *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in OPEN_DUNDERS:
            raise AttributeError(name)
        return _operate(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _operate(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        _operate(self, "delattr", name)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not self._onstream_has_content:
            return False
        content = _operate(self, "content")
        return not isinstance(content, Remote) and bool(content == other)

    def __hash__(self) -> int:
        if self._onstream_has_content:
            return hash(_operate(self, "content"))
        return object.__hash__(self)

    def __bool__(self) -> bool:
        return _plain(self, "bool", bool)

    def __len__(self) -> int:
        return _plain(self, "len", int)

    def __int__(self) -> int:
        return _plain(self, "int", int)

    def __float__(self) -> float:
        return _plain(self, "float", float)

    def __str__(self) -> str:
        return _plain(self, "str", str)

    def __repr__(self) -> str:
        return _plain(self, "repr", str)

    def __iter__(self) -> Any:
        return iter(_Iterator(_operate(self, "iter")))

    def __next__(self) -> Any:
        return _operate(self, "next")

    def __reversed__(self) -> Any:
        return iter(_Iterator(_operate(self, "reversed")))

    def __getitem__(self, key: Any) -> Any:
        return _operate(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _operate(self, "setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        _operate(self, "delitem", key)

    def __enter__(self) -> Any:
        return _operate(self, "enter")

    def __exit__(self, *error: object) -> None:
        # The program must not learn of an error of the tests', nor swallow it.
        _operate(self, "exit", None, None, None)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote) and bool(
            self._onstream_call(["operation", "isinstance"], instance, self)
        )


class _Iterator:
    """An iterator over a value that the program may have sent whole."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __iter__(self) -> Any:
        if isinstance(self._source, Remote):
            return self
        return iter(self._source)

    def __next__(self) -> Any:
        return next(self._source)


def _operate(remote: Remote, operation: str, *args: Any) -> Any:
    return remote._onstream_call(["operation", operation], remote, *args)


def _plain(remote: Remote, operation: str, kind: type[T]) -> T:
    """The result of an operation that Python wants as exactly one type."""
    value = _operate(remote, operation)
    if type(value) is not kind:
        raise TypeError(f"{operation}() of the program's object gave no {kind.__name__}")
    return value


def _between_remotes(operation: str) -> Callable[[Remote, object], Any]:
    def operate(self: Remote, other: object) -> Any:
        # The other operand may be what the tests expect, and the program must not see it.
        if not isinstance(other, Remote):
            return NotImplemented
        return _operate(self, operation, other)

    return operate


def _alone(operation: str) -> Callable[[Remote], Any]:
    return lambda self: _operate(self, operation)


for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"):
    setattr(Remote, f"__{_name}__", _between_remotes(_name))
for _name in ("and_", "or_", "xor"):
    setattr(Remote, f"__{_name.strip('_')}__", _between_remotes(_name))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _between_remotes(_name))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(Remote, f"__{_name}__", _alone(_name))
