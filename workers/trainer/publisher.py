"""Policy versions: written to the run directory, announced to the generators, and not announced again when replayed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import weights
from pipeline.pins import pinned
from pipeline.records import PolicyVersion
from pipeline.streams import Bus, Lease
from workers.trainer import checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from workers.trainer.learner import Learner


class Publisher:
    """Publishes the versions of one run. Remembers what was announced, so that a replayed step announces nothing anew.

    Versions that fell behind `keep` are removed, but for the first one, which evaluations compare with, and those pinned for a job.
    """

    def __init__(self, bus: Bus, lease: Lease, run_dir: Path, model_files: Path, keep: int) -> None:
        self._bus, self._lease, self._run_dir, self._model_files, self._keep = bus, lease, run_dir, model_files, keep
        self._announced: dict[int, str] = {}
        for _, policy in bus.announcements():
            self._remember(policy)

    def publish(self, number: int, state: Mapping[str, Tensor]) -> PolicyVersion:
        """Write version `number` and announce it, unless it was announced with the same weights.

        Raises:
            LeaseLost: another trainer took over.
            OSError: the version could not be written.
        """
        policy = weights.publish(self._run_dir, number, state, self._model_files)
        if self._announced.get(number) != policy.digest:
            self._bus.announce(self._lease, policy)
            self._remember(policy)
        newest = max(self._announced)
        weights.prune(self._run_dir, self._keep, pinned={0, number, newest, *pinned(self._run_dir)})
        return policy

    def _remember(self, policy: PolicyVersion) -> None:
        """Other weights under a number end the story that the later numbers told."""
        if self._announced.get(policy.number) != policy.digest:
            self._announced = {number: digest for number, digest in self._announced.items() if number < policy.number}
            self._announced[policy.number] = policy.digest


def student_files(run_dir: Path, learner: Learner) -> Path:
    """The directory with the student's configuration and tokenizer, which every published version gets a copy of."""
    directory = run_dir / "student"
    if not directory.exists():
        unfinished = run_dir / ".student"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        learner.save_model(unfinished)
        for path in (*unfinished.glob("*.safetensors"), *unfinished.glob("*.index.json")):
            path.unlink()
        checkpoint.sync_tree(unfinished)  # once: the published versions link to these files
        unfinished.rename(directory)
    return directory
