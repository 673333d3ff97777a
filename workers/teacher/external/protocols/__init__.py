"""The ways in which servers are asked for the logprobs of tokens that they did not write.

`onstream.settings.teacher_protocols` lists them by name.
"""

from __future__ import annotations

import importlib

from onstream.settings.teacher_protocols import TEACHER_PROTOCOLS
from onstream.workers.teacher.external.protocols.base import TeacherProtocol

__all__ = ["TeacherProtocol", "load_variants"]


def load_variants(name: str) -> list[TeacherProtocol]:
    """The variants of the protocol `name`; with `auto`, those of all protocols, in their order."""
    names = list(TEACHER_PROTOCOLS) if name == "auto" else [name]
    return [variant for each in names for variant in _protocol_class(each).variants()]


def _protocol_class(name: str) -> type[TeacherProtocol]:
    module, _, class_name = TEACHER_PROTOCOLS[name].partition(":")
    found: type[TeacherProtocol] = getattr(importlib.import_module(module), class_name)
    return found
