"""A policy version on its way to the generators, and the memory that versions are copied into."""

from __future__ import annotations

from collections.abc import Sequence

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights.file_format import Bytes
from onstream.workers.trainer.background import BackgroundTask


class Publication(BackgroundTask[PolicyVersion]):
    """Publishes a version, and returns what was announced; in a thread where it is large."""

    name = "onstream-publish"


class PolicyBuffers:
    """Memory that one version after the other is copied into.

    Fresh memory costs several times as much as the copy itself: the kernel clears every page.
    """

    def __init__(self) -> None:
        self._all: list[Bytes] = []

    def free(self, in_use: Sequence[Bytes]) -> Bytes | None:
        """A buffer that is not `in_use`; None where there is none."""
        return next((one for one in self._all if not _among(one, in_use)), None)

    def keep(self, buffer: Bytes, in_use: Sequence[Bytes]) -> None:
        """Keep `buffer` for later versions, and of the others those `in_use`."""
        self._all = [buffer, *(one for one in in_use if one is not buffer)]


def _among(buffer: Bytes, others: Sequence[Bytes]) -> bool:
    return any(buffer is one for one in others)
