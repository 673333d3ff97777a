"""Which rollout numbers and policy versions a run has come to: a record beyond them is forged."""

from __future__ import annotations

from onstream.pipeline.redis.run_state import RunState


class RunLimits:
    """The last number issued and the newest version announced, as last heard from Redis.

    Both only grow, so Redis is asked again for a record beyond them alone. Where Redis does not
    know, having lost its data say, nothing is beyond them: the trainer restores both.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._issued: int = 0
        self._version: int = -1

    def note(self, *, issued: int = 0, version: int = -1) -> None:
        """Take in what the trainer, whose own doing both are, knows before Redis does."""
        self._issued = max(self._issued, issued)
        self._version = max(self._version, version)

    def was_issued(self, number: int) -> bool:
        """Whether the run has issued `number`."""
        if number <= self._issued:
            return True
        issued = self._state.known_issued()
        self._issued = max(self._issued, issued or 0)
        return issued is None or number <= self._issued

    def was_announced(self, version: int, ahead: int = 0) -> bool:
        """Whether the run has announced `version`, or one at most `ahead` older."""
        version -= ahead
        if version <= self._version:
            return True
        newest = self._state.newest_policy()
        if newest is None:
            return True
        self._version = max(self._version, newest.number)
        if version > self._version:
            # A trainer that went back to a checkpoint has announced a lower number than before.
            announced = [policy.number for policy in self._state.announced_policies()]
            self._version = max(self._version, *announced)
        return version <= self._version

    @property
    def issued(self) -> int:
        """The last number issued, as last heard."""
        return self._issued

    @property
    def version(self) -> int:
        """The newest version announced, as last heard; −1 before the first."""
        return self._version
