"""The names of everything a run keeps in Redis; docs/streams.md lists the fields of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from onstream.settings.stages import STAGE_NAMES, WORK_STAGES, score_stream

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


class Keys:
    """The keys of one run.

    They share a hash tag, so that a script may use several of them on a Redis cluster too.
    `teachers` are those that have streams of their own.
    """

    def __init__(self, run: str, teachers: Sequence[str] = ()) -> None:
        self.run = run
        self.streams: Mapping[str, str] = {}
        """Streams of the records that each stage consumes, in the order of the flow; beside that of
        `score` those of teachers by name.
        """
        self.add_teachers(teachers)
        self.dead = self._key("dead")
        """Stream of dead letters; no group."""
        self.policies = self._key("policies")
        """Stream of announced policy versions; no group."""
        self.policy = self._key("policy")
        """String: the newest policy version."""
        self.announced = self._key("announced")
        """String: the greatest number that a policy version was announced by."""
        self.weights = self._key("weights")
        """Hash: the weights that are offered, whole sets and deltas, by place.

        Only with `weights.transport = "redis"`.
        """
        self.weight_places = self._key("weights:places")
        """Set: every place with chunks of weights, finished or not."""
        self.receivers = self._key("weights:receivers")
        """Hash: the generators that take weights from GPU to GPU, and over how many GPUs.

        Only with `weights.transport = "nccl"`.
        """
        self.transfer = self._key("weights:transfer")
        """String: what the trainer asks of the receivers now."""
        self.wanted_weights = self._key("weights:wanted")
        """String: the digest of a version that a generator missed and asks for as a file."""
        self.issued = self._key("issued")
        """String: how many tickets were issued; the number of the last one."""
        self.reissued = self._key("reissued")
        """Set: the tokens of the re-issues that were done."""
        self.epoch = self._key("epoch")
        """String: counts how often the lease was taken; every script of the trainer carries it."""
        self.lease = self._key("lease")
        """String with expiry: who the trainer is."""
        self.plan = self._key("plan")
        """String: the run's plan."""
        self.ready = self._key("ready")
        """Set: the stages of which a worker has been ready once."""
        self.finished = self._key("finished")
        """String: present once the run has ended."""
        self.requests = self._key("requests")
        """Stream: what operators ask of the trainer; no group."""
        self.requeued = self._key("requeued")
        """Hash: the numbers issued in place of dead ones, with the dead numbers."""
        self.images = self._key("images")
        """Hash: the bytes of images, by digest."""
        self.images_counted = self._key("images:counted")
        """Hash: how many numbers need each image, by digest."""
        self.images_held = self._key("images:held")
        """Hash: the digests that each number needs, until it has settled."""
        self.workers = self._key("workers")
        """Hash: the last heartbeat of each worker."""

    def add_teachers(self, teachers: Sequence[str]) -> None:
        """Name the streams of `teachers` too."""
        own = [name for name in self.streams if name not in STAGES]
        own += [name for name in map(score_stream, teachers) if name not in (*STAGES, *own)]
        names = [
            name for stage in STAGES for name in ((stage, *own) if stage == "score" else (stage,))
        ]
        self.streams = {name: self._key(f"stream:{name}") for name in names}

    def _key(self, name: str) -> str:
        return f"{{onstream:{self.run}}}:{name}"

    def spent(self, stream: str) -> str:
        """Hash: tokens that each worker of `stream` had endpoints read and write."""
        return self._key(f"spent:{stream}")

    def weight_chunks(self, place: str) -> str:
        """Hash: the chunks of one part of weights, by their index."""
        return self._key(f"weights:{place}")

    def transfer_answers(self, call: str) -> str:
        """Hash with expiry: what each receiver answered to one call."""
        return self._key(f"weights:answers:{call}")


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
