"""What scores answers: the task's scorer in killable children, or a judge over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from onstream.pipeline.tasks import JUDGE
from onstream.settings.root import Settings
from onstream.workers.verifier.scorer_messages import Verdict
from onstream.workers.verifier.scorer_pool import ScorerPool

if TYPE_CHECKING:
    from onstream.pipeline.redis.bus import Bus


class Scorers(Protocol):
    """Takes answers, and gives a verdict on each. `close` it."""

    def start(self) -> None:
        """Make it ready. Raises UserError where it cannot score."""
        ...

    @property
    def room(self) -> int:
        """How many more answers it takes in hand."""
        ...

    @property
    def problem(self) -> str:
        """What answers wait for; empty where they do not."""
        ...

    def score(
        self, key: int, question: Sequence[Mapping[str, Any]], answer: str, info: dict[str, Any]
    ) -> None:
        """Queue the `answer` to the messages of `question`; `collect` has its verdict by `key`."""
        ...

    def collect(self, wait_s: float) -> list[tuple[int, Verdict]]:
        """The verdicts that come within `wait_s`."""
        ...

    def close(self) -> None:
        """Give up what is in hand."""
        ...


def scorers_of(
    settings: Settings,
    bus: Bus | None = None,
    *,
    timeout_s: float | None = None,
    processes: int | None = None,
) -> Scorers:
    """What scores the answers of a run, by `task.scorer`; `start` it.

    A judge with a `bus` keeps to the run's budget and asks nothing twice. `timeout_s` and
    `processes` stand in for the settings of children.
    """
    if settings.task.scorer != JUDGE:
        return ScorerPool(settings, timeout_s=timeout_s, processes=processes)
    from onstream.workers.verifier.judge import Judge  # its HTTP client is for judges alone

    if bus is None:
        return Judge(settings)
    # A run that had verdicts before waits for its judge. One that begins hears of a wrong address.
    return Judge(settings, bus.scores, patient="verify" in bus.state.ready_stages())
