"""Scores of external teachers, kept for a replay, and the tokens spent on endpoints."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from redis.exceptions import OutOfMemoryError

from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.connection import Connection
from onstream.pipeline.redis.keys import ScoreKeys
from onstream.settings.stages import StreamName

KEPT_BYTES = 64 << 20  # of a Redis that carries the run's records first of all
log = structlog.get_logger(__name__)
_KEYS = ScoreKeys()


class ScoreStore:
    """Scores by digest, bounded by their number and by `KEPT_BYTES`.

    The least recently used go first.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._keys = connection.keys

    def recall(self, digests: Sequence[bytes]) -> list[bytes | None]:
        """The scores kept under each of `digests`; None where there are none."""
        if not digests:
            return []
        return list(
            self._connection.run_script(
                scripts.RECALL_SCORES, [_KEYS.scores, _KEYS.used, _KEYS.clock], digests
            )
        )

    def keep(self, scores: Sequence[tuple[bytes, bytes]], most: int) -> None:
        """Keep pairs of digest and scores, at most `most` in all. A full Redis keeps none."""
        if not scores:
            return
        keys = [_KEYS.scores, _KEYS.used, _KEYS.clock, _KEYS.size]
        try:
            self._connection.run_script(
                scripts.KEEP_SCORES,
                keys,
                [most, KEPT_BYTES, *(part for pair in scores for part in pair)],
            )
        except OutOfMemoryError as error:
            log.warning("redis is full; scores are not kept", scores=len(scores), error=str(error))

    def teacher_check(self, name: bytes) -> bytes | None:
        """What `note_teacher_check` noted last for the teacher `name`."""
        noted: bytes | None = self._connection.ask("HGET", _KEYS.teachers, name)
        return noted

    def note_teacher_check(self, name: bytes, checked: bytes) -> None:
        """Note what the teacher `name` scored the text that it was checked with.

        So another teacher of that name is found out. A full Redis notes nothing.
        """
        try:
            self._connection.ask("HSET", _KEYS.teachers, name, checked)
        except OutOfMemoryError as error:
            log.warning(
                "redis is full; what the teacher scored at the start is not noted", error=str(error)
            )

    def own_spent_tokens(self, stage: StreamName) -> int:
        """Tokens spent in this run on the endpoints of `stage` by workers of this one's name."""
        return int(
            self._connection.ask("HGET", self._keys.spent(stage), self._connection.consumer) or 0
        )

    def report_spent_tokens(self, stage: StreamName, tokens: int) -> int:
        """Report `tokens`, all that workers of this name have spent; returns the stage's total."""
        return int(
            self._connection.run_script(
                scripts.REPORT_SPENT, [self._keys.spent(stage)], [self._connection.consumer, tokens]
            )
        )
