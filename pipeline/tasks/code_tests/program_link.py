"""The checker's link to the program: calls go out, and plain data comes back.

What comes back is not trusted. What breaks the rules ends the tests: the program then fails,
whatever the tests make of it.
"""

from __future__ import annotations

import builtins
import importlib
import operator
import os
import types
from collections import Counter, OrderedDict, defaultdict, deque

from onstream.pipeline.tasks.code_tests.remote import Remote
from onstream.pipeline.tasks.code_tests.wire import Channel, ChannelError, pack, unpack

TYPE_CHECKING = False  # as typing has it, whose import takes long where each try pays for it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

HIDDEN = (
    types.FunctionType,
    types.MethodType,
    types.GeneratorType,
    types.CoroutineType,
    types.AsyncGeneratorType,
    types.CodeType,
    types.FrameType,
    types.TracebackType,
    type,
)
"""What the program may call or iterate where it is passed, and see no attribute of: they lead to
the tests' own variables.
"""
DATA_MODULES = {
    "bisect",
    "cmath",
    "collections",
    "copy",
    "datetime",
    "decimal",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "re",
    "statistics",
    "string",
    "typing",
}
"""Modules that a program may have under a name of its own (`import collections as c`). They can
neither end a process nor make an object that is equal to others.
"""
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "contains": operator.contains,
    "eq": operator.eq,
    "lt": operator.lt,
    "gt": operator.gt,
}
"""What the program may do with what it is passed, beside its public attributes."""


class ProgramFault(BaseException):
    """The program broke the rules of the channel, or ended. No test may catch it."""


class ProgramExit(SystemExit):
    """The program called `sys.exit`. If the tests do not expect it, the program fails."""


class ProgramError(Exception):
    """An exception of a class that the tests do not know."""


class ProgramLink:
    """Calls the program. `fault` says why it cannot be called any more; `calls` counts."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._exceptions: dict[str, type[BaseException]] = {}
        self._numbers: dict[type[BaseException], int] = {}
        self._passed: list[Any] = []
        self.fault = ""
        self.calls = 0

    def start(self) -> set[str]:
        """Wait until the program is loaded; returns the names that it defines.

        Raises:
            ProgramFault: it ended, or raised an exception.
        """
        kind, *rest = self._receive()
        if kind != "loaded" or len(rest) != 1 or type(rest[0]) is not list:
            raise self._broken("the program did not load")
        return {name for name in rest[0] if type(name) is str}

    def named(self, name: str) -> Any:
        """What the program has by `name`. Plain data counts as a call."""
        value = self.call(["operation", "global"], name)
        self.calls -= isinstance(value, Remote | type)
        return value

    def call(self, function: list[Any], *args: Any, **kwargs: Any) -> Any:
        """The result of `function` in the program.

        Raises:
            ProgramFault: it broke the rules.
            Exception: what the function raised, as an exception of Python's or of this link.
        """
        if self.fault:
            raise ProgramFault(self.fault)
        self.calls += 1
        nonce = os.urandom(8).hex()  # what was sent before this call cannot be its answer
        self._send(["call", nonce, function, self._pack(list(args)), self._pack(kwargs)])
        is_next = function == ["operation", "next"]
        while True:
            kind, *rest = self._receive()
            raised: BaseException | None = None
            value = None
            try:
                if rest.pop(0) != nonce:
                    raise ChannelError("an answer to another call")
                if kind == "back":
                    self._answer(*rest)
                    continue
                if kind == "raised":
                    raised = self._error(*rest)
                elif kind == "end" and is_next:
                    raised = StopIteration()
                else:
                    value = self._result(kind, list(args), kwargs, *rest)
            except Exception as error:
                raise self._broken(f"no answer to a call: {error}") from error
            if raised is not None:
                raise raised
            return value

    def _result(
        self, kind: str, args: list[Any], kwargs: dict[str, Any], value: Any, after: Any = None
    ) -> Any:
        if kind != "ok":
            raise ChannelError(f"a message {kind!r}")
        if after is not None and value is None:
            new_args, new_kwargs = (self._unpack(part) for part in after)
            _refill(args, new_args)
            _refill(kwargs, new_kwargs)
        return self._unpack(value)

    def _error(self, names: list[str], packed: Any, text: str, fields: dict[str, Any]) -> Any:
        """The exception that the program raised, as one of a class that exists here."""
        kind = self._exception(names)
        args = self._unpack(packed)
        try:
            error = kind(*args)
        except Exception:  # some classes want arguments that these are not
            error = kind.__new__(kind)
            error.args = tuple(args)
        if isinstance(error, _Mirrored):
            error.text = str(text)
        for name, value in fields.items():
            if name.isidentifier() and not name.startswith("_"):
                error.__dict__[name] = self._unpack(value)
        return error

    def _exception(self, names: list[str]) -> type[BaseException]:
        """The first of `names`, those of a class and its bases, that is a class here."""
        for name in names:
            if name in self._exceptions:
                return self._exceptions[name]
            if name == "SystemExit":
                return ProgramExit
            if name in ("StopIteration", "StopAsyncIteration"):
                # It would end the tests' own loops, as if the cases that are left had passed.
                return RuntimeError
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
                return kind
        if "Exception" in names:
            return ProgramError
        raise ChannelError(f"an exception of class {names[:1]}")

    def _mirrored(self, number: int, names: list[str]) -> type[BaseException]:
        """The class here that stands for an exception class of the program."""
        name = str(names[0])
        known = getattr(builtins, name, None)
        if name not in self._exceptions and known is None:
            base = self._exception(names[1:])
            bases = (base,) if issubclass(base, _Mirrored) else (_Mirrored, base)
            self._exceptions[name] = type(name, bases, {})
        kind = self._exception(names)
        self._numbers[kind] = number
        return kind

    def _answer(self, handle: int, operation: str, packed: Any, packed_keywords: Any) -> None:
        """Let the program use something that the tests passed to it."""
        args = self._unpack(packed)
        kwargs = self._unpack(packed_keywords)
        if type(handle) is not int or not 0 <= handle < len(self._passed):
            raise ChannelError("nothing that was passed")
        try:
            answer = ["ok", self._pack(_use(self._passed[handle], operation, args, kwargs))]
        except StopIteration:
            answer = ["end"] if operation == "next" else ["raised", "RuntimeError", ""]
        except AssertionError:
            answer = ["raised", "AssertionError", ""]  # its text may say what was expected
        except Exception as error:
            answer = ["raised", type(error).__name__, str(error)]
        self._send(["answer", *answer])

    def _send(self, message: list[Any]) -> None:
        try:
            self._channel.send(message)
        except (OSError, ChannelError) as error:
            raise self._broken(str(error)) from error

    def _receive(self) -> list[Any]:
        try:
            return self._channel.receive()
        except ChannelError as error:
            raise self._broken(str(error)) from error

    def _broken(self, reason: str) -> ProgramFault:
        self.fault = self.fault or reason
        return ProgramFault(self.fault)

    def _pack(self, value: Any) -> Any:
        return pack(value, self._refer)

    def _refer(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return ["object", value._onstream_number]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, type) and value in self._numbers:
            return ["object", self._numbers[value]]
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and getattr(builtins, name, None) is value:
            return ["builtin", name]
        if type(value) in (Counter, OrderedDict, defaultdict):
            return self._pack(dict(value))
        self._passed.append(value)
        return ["handle", len(self._passed) - 1]

    def _unpack(self, data: Any) -> Any:
        return unpack(data, self._resolve)

    def _resolve(self, reference: list[Any]) -> Any:
        tag, key, *rest = reference
        if tag == "handle" and 0 <= key < len(self._passed):
            return self._passed[key]
        if tag == "builtin":
            return _builtin_type(key)
        if tag == "module":
            [number] = rest
            known = key in DATA_MODULES
            return importlib.import_module(key) if known else Remote(self.call, int(number), False)
        if tag == "exception":
            return self._mirrored(int(key), *rest)
        if tag == "object":
            [has_content] = rest
            return Remote(self.call, int(key), has_content is True)
        raise ChannelError(f"an unknown tag {tag!r}")


class _Mirrored(Exception):
    """An exception whose class the program defines. Its text is the program's too."""

    text: str | None = None

    def __str__(self) -> str:
        return super().__str__() if self.text is None else self.text


def _builtin_type(name: str) -> type:
    kind = getattr(builtins, name)
    ends = isinstance(kind, type) and issubclass(kind, BaseException)
    if not isinstance(kind, type) or (ends and not issubclass(kind, Exception)):
        raise ChannelError(f"{name!r} instead of a type")
    return kind


def _use(target: Any, operation: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The result of an operation of the program's on an object of the tests'."""
    if operation not in ("getattr", "setattr"):
        return OPERATIONS[operation](target, *args, **kwargs)
    name, *value = args
    if name.startswith("_") or isinstance(target, HIDDEN):
        raise AttributeError(name)
    if operation == "setattr":
        return setattr(target, name, *value)
    return getattr(target, name)


def _refill(old: Any, new: Any) -> Any:
    """Give `old` the items of `new`, in place where it is a container that can change.

    Returns what stands for it now.
    """
    if type(old) is not type(new):
        return new
    if type(old) is list:
        kept = [_refill(*pair) for pair in zip(old, new, strict=False)]
        old[:] = kept + new[len(kept) :]
    elif type(old) is dict:
        kept_items = {key: _refill(old[key], new[key]) if key in old else new[key] for key in new}
        old.clear()
        old.update(kept_items)
    elif type(old) is set:
        old.clear()
        old.update(new)
    elif type(old) in (deque, bytearray):
        old.clear()
        old.extend(new)
    else:
        return new
    return old
