"""The names of everything a run keeps in Redis; docs/streams.md lists the fields of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from onstream.settings.stages import STAGE_NAMES, WORK_STAGES, StageName

STAGES: Final = STAGE_NAMES
"""Every stage with a stream, in the order of the flow."""
WORKING: Final = WORK_STAGES
"""The stages whose streams hold only work to do: XLEN is their exact backlog, and gates the issuing
of tickets.
"""
GROUP: Final = "workers"
"""The one consumer group of each stream."""
PARKED: Final = "_parked"
"""The consumer that holds what a draining worker gave back, until a reaper hands it on."""


@dataclass(frozen=True)
class Keys:
    """The keys of one run.

    They share a hash tag, so that a script may use several of them on a Redis cluster too.
    """

    run: str

    def _key(self, name: str) -> str:
        return f"{{onstream:{self.run}}}:{name}"

    def stream(self, stage: StageName) -> str:
        """Stream of the records that `stage` consumes."""
        return self._key(f"stream:{stage}")

    def streams(self, stages: Sequence[StageName]) -> list[str]:
        """Streams of the records that each of `stages` consumes."""
        return [self.stream(stage) for stage in stages]

    @property
    def dead(self) -> str:
        """Stream of dead letters; no group."""
        return self._key("dead")

    @property
    def policies(self) -> str:
        """Stream of announced policy versions; no group."""
        return self._key("policies")

    @property
    def policy(self) -> str:
        """String: the newest policy version."""
        return self._key("policy")

    @property
    def weights(self) -> str:
        """Hash: the weights that are offered, whole sets and deltas, by place.

        Only with `weights.transport = "redis"`.
        """
        return self._key("weights")

    @property
    def weight_places(self) -> str:
        """Set: every place with chunks of weights, finished or not."""
        return self._key("weights:places")

    def weight_chunks(self, place: str) -> str:
        """Hash: the chunks of one part of weights, by their index."""
        return self._key(f"weights:{place}")

    @property
    def receivers(self) -> str:
        """Hash: the generators that take weights from GPU to GPU, and over how many GPUs.

        Only with `weights.transport = "nccl"`.
        """
        return self._key("weights:receivers")

    @property
    def transfer(self) -> str:
        """String: what the trainer asks of the receivers now."""
        return self._key("weights:transfer")

    def transfer_answers(self, call: str) -> str:
        """Hash with expiry: what each receiver answered to one call."""
        return self._key(f"weights:answers:{call}")

    @property
    def wanted_weights(self) -> str:
        """String: the digest of a version that a generator missed and asks for as a file."""
        return self._key("weights:wanted")

    @property
    def issued(self) -> str:
        """String: how many tickets were issued; the number of the last one."""
        return self._key("issued")

    @property
    def reissued(self) -> str:
        """Set: the tokens of the re-issues that were done."""
        return self._key("reissued")

    @property
    def epoch(self) -> str:
        """String: counts how often the lease was taken; every script of the trainer carries it."""
        return self._key("epoch")

    @property
    def lease(self) -> str:
        """String with expiry: who the trainer is."""
        return self._key("lease")

    @property
    def plan(self) -> str:
        """String: the run's plan."""
        return self._key("plan")

    def spent(self, stage: StageName) -> str:
        """Hash: tokens that each worker of `stage` had endpoints read and write."""
        return self._key(f"spent:{stage}")

    @property
    def ready(self) -> str:
        """Set: the stages of which a worker has been ready once."""
        return self._key("ready")

    @property
    def finished(self) -> str:
        """String: present once the run has ended."""
        return self._key("finished")

    @property
    def requests(self) -> str:
        """Stream: what operators ask of the trainer; no group."""
        return self._key("requests")

    @property
    def requeued(self) -> str:
        """Hash: the numbers issued in place of dead ones, with the dead numbers."""
        return self._key("requeued")

    @property
    def images(self) -> str:
        """Hash: the bytes of images, by digest."""
        return self._key("images")

    @property
    def images_counted(self) -> str:
        """Hash: how many numbers need each image, by digest."""
        return self._key("images:counted")

    @property
    def images_held(self) -> str:
        """Hash: the digests that each number needs, until it has settled."""
        return self._key("images:held")

    @property
    def workers(self) -> str:
        """Hash: the last heartbeat of each worker."""
        return self._key("workers")


@dataclass(frozen=True)
class ScoreKeys:
    """The keys of the scores that external teachers gave, which all runs of a Redis share."""

    scores: str = "{onstream:scores}:scores"
    """Hash: scores by digest."""
    used: str = "{onstream:scores}:used"
    """Sorted set: the same digests by when they were last used."""
    clock: str = "{onstream:scores}:clock"
    """String: counts uses."""
    size: str = "{onstream:scores}:bytes"
    """String: bytes of all scores."""
    teachers: str = "{onstream:scores}:teachers"
    """Hash: by name, what each teacher scored a text that it was checked with."""
