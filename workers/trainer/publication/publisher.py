"""Policy versions: given to the generators, announced, and not announced again when replayed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from onstream.pipeline import weights
from onstream.pipeline.records import PolicyVersion, Probe
from onstream.pipeline.redis.access import redis_url
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.trainer_lease import Lease
from onstream.pipeline.weights import (
    DirectoryWriter,
    LoadedPolicy,
    PolicySender,
    SendResult,
    StoreWriter,
    VersionId,
)
from onstream.pipeline.weights.nccl_transfer import TransferCoordinator
from onstream.pipeline.weights.pins import pinned
from onstream.pipeline.weights.redis_store import ChunkWriter
from onstream.settings import engines
from onstream.settings.problems import SettingsError
from onstream.settings.root import Settings
from onstream.settings.rules.engines import vllm_missing
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.publication.nccl_sender import Transfer, address_towards

if TYPE_CHECKING:
    from torch import Tensor

    from onstream.workers.trainer.learner import Learner


class Publisher:
    """Publishes the versions of one run. Remembers what was announced, so that a replayed step
    announces nothing anew.

    `sent` says what the last version took. Model directories that fell behind
    `checkpoint.keep_policies` are removed, but for the first one, which evaluations compare with,
    those pinned for a job, and one that deltas in use start from.
    """

    def __init__(
        self,
        bus: Bus,
        lease: Lease,
        settings: Settings,
        model_files: Path,
        transfer: Transfer | None = None,
    ) -> None:
        self._bus = bus
        self._lease = lease
        self._settings = settings
        self._model_files = model_files
        self._run_dir = settings.run_dir
        self._on_disk = settings.weights.transport != "redis"
        self._sender = PolicySender(
            self._outlet(), settings.weights.full_every if settings.weights.deltas else None
        )
        self._transfer = transfer
        self._unwritten: LoadedPolicy | None = (
            None  # the newest version, where it went from GPU to GPU alone
        )
        self.sent = SendResult(0, None)
        self._announced: dict[int, str] = {}
        for policy in bus.state.announced_policies():
            self._remember(policy)

    def publish(
        self, number: int, state: Mapping[str, Tensor], probe: Probe | None = None
    ) -> PolicyVersion:
        """Give version `number` to the generators and announce it with its `probe`, unless it was
        announced with the same weights.

        Raises:
            LeaseLost: another trainer took over.
            UserError: Redis has no room for it.
            OSError: it could not be written.
        """
        policy = LoadedPolicy.of(number, state)
        announced = replace(weights.announced(policy), probe=probe)
        whole = self._whole(number)
        known = self._announced.get(number) == policy.digest
        if replayed := known and self._offered(number, policy.digest):
            self.sent = self._sender.skip(policy)
        else:
            self.sent = self._give(policy, whole=whole)
        if whole and (replayed or not self._on_disk):
            weights.write_directory(
                self._run_dir, number, policy.digest, policy.data, self._model_files
            )
        if not known:
            self._bus.lease.announce(self._lease, announced)
            self._remember(announced)
        kept = {0, number, max(self._announced), *pinned(self._run_dir)}
        weights.prune(self._run_dir, self._settings.checkpoint.keep_policies, kept)
        return announced

    def restore(self, policy: PolicyVersion, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Where Redis has forgotten `policy`, the newest, announce it anew; first give its weights,
        `state`, again if they went with it.

        Raises:
            LeaseLost: another trainer took over.
            UserError: Redis has no room for it.
        """
        newest = self._bus.state.newest_policy()
        if newest is not None and newest.number >= policy.number:
            return
        if not self._sender.offers(VersionId(policy.number, policy.digest)):
            self._give(LoadedPolicy.of(policy.number, state()), whole=True)
        self._bus.lease.announce(self._lease, policy)

    @property
    def wanted(self) -> bool:
        """Whether a generator wants the newest version as a file, since it was not there when that
        went from GPU to GPU.
        """
        return (
            self._unwritten is not None
            and self._bus.transfer.requested_file() == self._unwritten.digest
        )

    def supply(self) -> None:
        """Write it.

        Raises:
            OSError: it cannot be written.
        """
        if self._unwritten is not None:
            self._sender.send(self._unwritten, whole=True)
            self._unwritten = None

    def close(self) -> None:
        """Let go of the GPUs of the generators."""
        if self._transfer is not None:
            self._transfer.close()

    def _give(self, policy: LoadedPolicy, *, whole: bool) -> SendResult:
        """Give `policy` to the generators; a second time where Redis lost the first half of it
        meanwhile.
        """
        self._unwritten = None
        if self._transfer is not None and self._transfer.send(policy) and not whole:
            self._unwritten = policy
            return SendResult(policy.data.size, None)
        sent = self._sender.send(policy, whole=whole)
        if not self._sender.offers(VersionId(policy.number, policy.digest)):
            sent = self._sender.send(policy, whole=True)
        return sent

    def _outlet(self) -> StoreWriter:
        if self._on_disk:
            return DirectoryWriter(self._run_dir, self._model_files)
        return ChunkWriter(
            self._bus.weights,
            self._lease,
            self._settings.weights.max_share,
            self._settings.redis.connect_timeout,
        )

    def _whole(self, number: int) -> bool:
        """Whether `number` becomes a model directory: what evaluations and exports read."""
        interval = self._settings.eval.interval
        if self._settings.weights.transport == "filesystem" and not self._settings.weights.deltas:
            return True
        asked = bool(interval) and number % interval == 0
        return (
            asked
            or number % self._settings.weights.full_every == 0
            or number == self._settings.trainer.max_steps
        )

    def _offered(self, number: int, digest: str) -> bool:
        """Whether nobody needs version `number` anew: a later one is the newest, or it can be had
        still.
        """
        return number < max(self._announced) or self._sender.offers(VersionId(number, digest))

    def _remember(self, policy: PolicyVersion) -> None:
        """Other weights under a number end the story that the later numbers told."""
        if self._announced.get(policy.number) != policy.digest:
            self._announced = {
                number: digest
                for number, digest in self._announced.items()
                if number < policy.number
            }
            self._announced[policy.number] = policy.digest


def transfer_of(bus: Bus, lease: Lease, settings: Settings) -> Transfer | None:
    """The way from GPU to GPU, with `weights.transport = "nccl"`.

    Raises:
        SettingsError: vLLM, whose way it is, is not installed.
    """
    if settings.weights.transport != "nccl":
        return None
    if not engines.vllm_importable():
        raise SettingsError([vllm_missing("weights.transport")])
    patience_s = settings.weights.patience
    return Transfer(
        TransferCoordinator(bus.transfer, lease, patience_s),
        address_towards(redis_url(settings)),
        patience_s,
    )


def student_files(run_dir: Path, learner: Learner) -> Path:
    """The directory with the student's configuration and tokenizer, which every published version
    gets a copy of.
    """
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
