"""The program's side: runs the program, then calls of its functions as the checker asks.

It is in one process with the program, which can do with it as it likes. All that the program gains
by that are other answers to the same calls. It needs the standard library alone.

Messages of the checker are `["call", nonce, function, arguments, keyword arguments]`. The answer is
`["ok", nonce, value, arguments]`, `["raised", nonce, …]` or `["end", nonce]`, the last where an
iterator has no more. While a call runs, `["back", nonce, handle, operation, arguments, keywords]`
uses something that the tests passed; `["answer", …]` follows.
"""

from __future__ import annotations

import _socket
import builtins
import operator
import sys
import types
from collections import deque

from onstream.pipeline.tasks.code_tests.wire import Channel, ChannelError, pack, unpack

TYPE_CHECKING = False  # as typing has it, whose import takes long where each try pays for it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PROGRAM = "program.py"
OWN_FRAMES = 40
"""Depth of the stack below a function of the program: it may recurse as deep as in a script."""
NUMBERS: tuple[Any, ...] = (int, float, complex)
TEXTS: tuple[Any, ...] = (str, bytes, bytearray)
CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset, deque)


def content(value: Any) -> Any:
    """What an instance of a subclass of a built-in type holds, as one of that type.

    The methods are those of the type, not those of the subclass.
    """
    for kind in NUMBERS:
        if isinstance(value, kind):
            return kind.__pos__(value)
    for text in TEXTS:
        if isinstance(value, text):
            return text.__getitem__(value, slice(None))
    for container in CONTAINERS:
        if isinstance(value, container):
            return container(container.__iter__(value))
    if isinstance(value, dict):
        return dict(dict.items(value))
    raise TypeError(f"{type(value).__name__} has no plain content")


def is_builtin(kind: type) -> bool:
    """Whether `kind` is Python's own, under its own name."""
    return getattr(builtins, kind.__name__, None) is kind


class TestsObject:
    """Something of the tests' that they passed as an argument. It stays in the checker."""

    def __init__(self, server: ProgramServer, handle: int) -> None:
        object.__setattr__(self, "_use", lambda *use, **named: server.use(handle, use, named))
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._use("call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._use("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._use("setattr", name, value)

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self._use("eq", other))

    def __hash__(self) -> int:
        return hash((TestsObject, self._handle))

    def __iter__(self) -> Any:
        return self._use("iter")

    def __next__(self) -> Any:
        return self._use("next")

    def __len__(self) -> int:
        return int(self._use("len"))

    def __bool__(self) -> bool:
        return bool(self._use("bool"))

    def __str__(self) -> str:
        return str(self._use("str"))

    def __getitem__(self, key: Any) -> Any:
        return self._use("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._use("setitem", key, value)

    def __contains__(self, item: Any) -> bool:
        return bool(self._use("contains", item))

    def __lt__(self, other: Any) -> bool:
        return bool(self._use("lt", other))

    def __gt__(self, other: Any) -> bool:
        return bool(self._use("gt", other))


class ProgramServer:
    """Answers the checker's calls.

    Consumes messages on `channel`; waits for them alone; is unblocked by them, and by the checker's
    end; produces one answer a call.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._module = types.ModuleType("__main__")
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}  # id of an object -> its place in the list
        self._handles: dict[int, TestsObject] = {}
        self._nonce = ""
        self._operations: dict[str, Callable[..., Any]] = {
            "global": self._global,
            "content": content,
            "enter": lambda manager: manager.__enter__(),
            "exit": lambda manager, *error: manager.__exit__(*error),
            "getattr": getattr,
            "setattr": setattr,
            "delattr": delattr,
        }

    def run_program(self, source: str) -> None:
        """Run the program as a script, and say how that ended."""
        self._module.__dict__["__file__"] = PROGRAM
        self._module.__dict__["__builtins__"] = builtins
        sys.modules["__main__"] = self._module
        sys.argv = [PROGRAM]
        sys.setrecursionlimit(sys.getrecursionlimit() + OWN_FRAMES)
        try:
            exec(compile(source, PROGRAM, "exec"), self._module.__dict__)
        except BaseException as error:
            self._channel.send(["raised", *self._error(error)])
            return
        self._channel.send(["loaded", sorted(map(str, self._module.__dict__))])

    def run(self) -> None:
        """Answer until the checker is gone."""
        while True:
            try:
                message = self._channel.receive()
            except ChannelError:
                return
            self._answer(message)

    def use(self, handle: int, use: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The result of an operation on something of the tests'."""
        operation, *args = use
        packed = [self._pack(args), self._pack(named)]
        self._channel.send(["back", self._nonce, handle, operation, *packed])
        nonce = self._nonce
        while (message := self._channel.receive())[0] != "answer":
            self._answer(message)
        self._nonce = nonce
        _, how, *result = message
        if how == "ok":
            return self._unpack(result[0])
        if how == "end":
            raise StopIteration
        name, text = result
        kind = getattr(builtins, name, RuntimeError)
        raise kind(text)

    def _answer(self, message: list[Any]) -> None:
        _, self._nonce, function, packed, packed_keywords = message
        nonce = self._nonce
        try:
            answer = self._call(nonce, function, packed, packed_keywords)
        except BaseException as error:
            answer = ["raised", nonce, *self._error(error)]
        try:
            self._channel.send(answer)
        except ChannelError as error:
            self._channel.send(["raised", nonce, ["ValueError"], ["list", str(error)], "", {}])

    def _call(self, nonce: str, function: Any, packed: Any, packed_keywords: Any) -> list[Any]:
        args = self._unpack(packed)
        keywords = self._unpack(packed_keywords)
        is_next = function == ["operation", "next"]
        try:
            value = self._unpack(function)(*args, **keywords)
        except StopIteration:
            if is_next:
                return ["end", nonce]
            raise
        answer = ["ok", nonce, self._pack(value)]
        # A function that changes its arguments in place returns None, as list.sort does.
        if value is None:
            after = [self._pack(args), self._pack(keywords)]
            answer += [after] if after != [packed, packed_keywords] else []
        return answer

    def _global(self, name: str) -> Any:
        return self._module.__dict__[name]

    def _error(self, error: BaseException) -> list[Any]:
        names = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, BaseException)]
        fields = {
            name: self._pack(value)
            for name, value in getattr(error, "__dict__", {}).items()
            if not name.startswith("_")
        }
        return [names, self._pack(list(error.args)), str(error), fields]

    def _pack(self, value: Any) -> Any:
        return pack(value, self._refer)

    def _refer(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__, self._number(value)]
        if isinstance(value, TestsObject):
            return ["handle", value._handle]
        if isinstance(value, type) and is_builtin(value):
            return ["builtin", value.__name__]
        if isinstance(value, type) and issubclass(value, BaseException):
            names = [each.__name__ for each in value.__mro__ if issubclass(each, BaseException)]
            return ["exception", self._number(value), names]
        has_content = isinstance(value, (*NUMBERS, *TEXTS, *CONTAINERS, dict))
        if has_content and not self._has_own_methods(value):
            return self._pack(content(value))
        return ["object", self._number(value), has_content]

    def _has_own_methods(self, value: Any) -> bool:
        """Whether tests may want more of an instance of a subclass than what it holds."""
        enum = sys.modules.get("enum")
        if enum is not None and isinstance(value, enum.Enum):
            return True
        return type(value).__module__ == "__main__" and not isinstance(value, (*NUMBERS, *TEXTS))

    def _number(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)  # which keeps it, and so its id, for good
        return number

    def _unpack(self, data: Any) -> Any:
        return unpack(data, self._resolve)

    def _resolve(self, reference: list[Any]) -> Any:
        tag, name, *_ = reference
        if tag == "object":
            return self._objects[name]
        if tag == "handle":
            return self._handles.setdefault(name, TestsObject(self, name))
        if tag == "builtin":
            return getattr(builtins, name)
        if tag == "module":
            return __import__(name)
        if tag == "operation":
            found = self._operations.get(name) or getattr(builtins, name, None)
            return found or getattr(operator, name)
        raise ChannelError(f"an unknown reference {tag!r}")


def main() -> None:
    """Run the program on standard input's place, and serve."""
    connection = _socket.socket(fileno=int(sys.argv[1]))
    with open(PROGRAM, encoding="utf-8", errors="replace") as file:
        source = file.read()
    server = ProgramServer(Channel(connection))
    server.run_program(source)
    server.run()
