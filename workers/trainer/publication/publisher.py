"""Publishes policy versions: to the generators first, then in an announcement."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from msgspec.structs import replace

from onstream.pipeline import weights
from onstream.pipeline.record_codec import RecordError
from onstream.pipeline.records import PolicyVersion, Probe
from onstream.pipeline.redis.bus import Bus, redis_url
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights import (
    DirectoryWriter,
    LoadedPolicy,
    PolicyPacker,
    PolicySender,
    SendResult,
    StoreWriter,
    VersionId,
    WeightSum,
)
from onstream.pipeline.weights.directory_store import pinned
from onstream.pipeline.weights.nccl_transfer import TransferCoordinator
from onstream.pipeline.weights.redis_store import ChunkWriter
from onstream.settings import engines
from onstream.settings.problems import SettingsError
from onstream.settings.root import Settings
from onstream.settings.rules.engines import vllm_missing
from onstream.workers.trainer.background import BACKGROUND_BYTES
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.publication.background import PolicyBuffers, Publication
from onstream.workers.trainer.publication.nccl_sender import NcclTransfer, address_towards
from onstream.workers.trainer.publication.policy_probe import Prober

MEND_S = 1.0

log = get_logger()

if TYPE_CHECKING:
    from torch import Tensor

    from onstream.workers.trainer.learner import Learner


class Publisher:
    """Publishes the versions of one run.

    It remembers what was announced. So a trainer that resumes, and takes steps a second time,
    announces nothing again: the same step has the same weights. `sent` says what the last version
    took. Model directories that fell behind `checkpoint.keep_policies` are removed, but for the
    first one, which evaluations compare with, those pinned for a job, and one that deltas in use
    start from.
    """

    def __init__(
        self,
        bus: Bus,
        lease: Lease,
        settings: Settings,
        model_files: Path,
        transfer: NcclTransfer | None,
        prober: Prober,
        packer: PolicyPacker,
    ) -> None:
        self._bus = bus
        self._lease = lease
        self._settings = settings
        self._model_files = model_files
        self._run_dir = settings.run_dir
        self._on_disk = settings.weights.transport != "redis"
        full_every = settings.weights.full_every if settings.weights.deltas else None
        self._sender = PolicySender(self._store(), full_every)
        self._transfer = transfer
        self._prober = prober
        self._packer = packer
        self._base_on_disk = False
        self._buffers = PolicyBuffers()
        # The newest version, where it went from GPU to GPU and into no file.
        self._unwritten: LoadedPolicy | None = None
        self.sent = SendResult(0, None)
        self._announced: dict[int, str] = {}
        self._next_look = 0.0
        for policy in bus.state.announced_policies():
            if policy.number <= settings.trainer.max_steps:  # else it is forged
                self._remember(policy)

    def publish(self, number: int, state: Mapping[str, Tensor | WeightSum]) -> PolicyVersion:
        """Give version `number`, the weights `state`, to the generators, and announce it.

        Nothing is announced where the number was announced before with the same weights. Other
        weights under an announced number are: generators load them in place of the old ones.

        Raises:
            LeaseLost: another trainer took over.
            UserError: Redis has no room for it.
            OSError: it could not be written.
        """
        return self._publish(number, state, self._prober.ask(), lambda: None)

    def start(self, number: int, state: Mapping[str, Tensor | WeightSum]) -> Publication:
        """Start to `publish`, in a thread where the version is large.

        `state` must not change before the publication's `wait_until_copied`. Until it is done,
        nothing else may be asked of this publisher.
        """
        if self._transfer is not None or self._packer.size_bytes(state) < BACKGROUND_BYTES:
            return Publication(lambda _: self.publish(number, state), wake=None)
        probe = self._prober.ask()  # computes with the model, as the main thread does
        threads = torch.get_num_threads()

        def publish(copied: Callable[[], None]) -> PolicyVersion:
            # A thread has a number of its own, and the bits of a merged adapter may depend on it.
            torch.set_num_threads(threads)
            return self._publish(number, state, probe, copied)

        return Publication(publish, wake=self._bus.connection.unblock)

    def _publish(
        self,
        number: int,
        state: Mapping[str, Tensor | WeightSum],
        probe: Probe,
        copied: Callable[[], None],
    ) -> PolicyVersion:
        policy = self._copied(number, state, copied)
        if policy.adapter is not None and not self._base_on_disk:
            self._write_base(state)
        whole = self._is_whole(number)
        # The digest of a new number is computed while it is written.
        known = number in self._announced and self._announced[number] == policy.digest
        given_before = known and self._offered(number, policy.digest)
        if given_before:
            self.sent = self._sender.skip(policy)
        else:
            self.sent = self._give(policy, state, whole=whole)
        self._packer.forget_base()
        if whole and (given_before or not self._on_disk):
            weights.write_directory(self._run_dir, policy, self._model_files, self._fence)
        announced = replace(weights.announced(policy), probe=probe)
        # Last: a generator that reads the announcement finds the weights.
        if not known:
            self._bus.lease.announce(self._lease, announced)
            self._remember(announced)
        with self._fence():
            kept = {0, number, max(self._announced), *pinned(self._run_dir)}
            weights.prune(self._run_dir, self._settings.checkpoint.keep_policies, kept)
        return announced

    def restore(
        self, policy: PolicyVersion, state: Callable[[], Mapping[str, Tensor | WeightSum]]
    ) -> None:
        """Announce `policy`, the newest, again where Redis has forgotten it.

        Its weights, `state`, are given again first if Redis lost them too.

        Raises:
            LeaseLost: another trainer took over.
            UserError: Redis has no room for it.
        """
        newest = self._bus.state.newest_policy()
        if newest is not None and newest.number >= policy.number:
            return
        if not self._sender.offers(VersionId(policy.number, policy.digest)):
            weights_now = state()
            loaded = self._copied(policy.number, weights_now, lambda: None)
            self._give(loaded, weights_now, whole=True)
            self._packer.forget_base()
        self._bus.lease.announce(self._lease, policy)

    def mend(self, policy: PolicyVersion) -> None:
        """Announce the newest version, `policy` as a rule, again where its key holds another value
        than was announced, written by hand say. Looks every `MEND_S`.

        Raises:
            LeaseLost: another trainer took over.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + MEND_S
        try:
            found = self._bus.state.policy_in_key()
        except RecordError:
            found = None
        if found is not None and self._is_announced(found):
            return
        # After a return to a checkpoint, a later version than `policy` may be the newest.
        announced = filter(self._is_announced, self._bus.state.announced_policies())
        newest = max(announced, key=lambda one: one.number, default=policy)
        log.error("redis held no policy of this run as the newest; mended", policy=newest.number)
        self._bus.lease.announce(self._lease, newest)

    def _is_announced(self, policy: PolicyVersion) -> bool:
        return self._announced.get(policy.number) == policy.digest

    @property
    def file_requested(self) -> bool:
        """Whether a generator that missed the newest version's transfer asks for it as a file."""
        return (
            self._unwritten is not None
            and self._bus.transfer.requested_file() == self._unwritten.digest
        )

    def write_file(self) -> None:
        """Write the newest version, which went from GPU to GPU alone, for those that missed it.

        Raises:
            OSError: it cannot be written.
        """
        if self._unwritten is not None:
            self._sender.send(self._unwritten, whole=True)
            self._unwritten = None

    def close(self) -> None:
        """Leave the group of GPUs, where weights go that way."""
        if self._transfer is not None:
            self._transfer.close()

    def _copied(
        self, number: int, state: Mapping[str, Tensor | WeightSum], copied: Callable[[], None]
    ) -> LoadedPolicy:
        """`state` as version `number`, in memory that no version in use is in.

        Calls `copied` before the digest is computed.
        """
        in_use = [self._sender.base.data] if self._sender.base else []
        data = self._packer.pack(state, self._buffers.free(in_use))
        copied()
        # A transfer that hangs is left behind, and may read its version's memory for ever.
        if self._transfer is None:
            self._buffers.keep(data, in_use)
        return LoadedPolicy(number, None, data)

    def _write_base(self, state: Mapping[str, Tensor | WeightSum]) -> None:
        """Write the full set that adapters belong to, unless it is there as it should be."""
        base = self._packer.base(state)
        weights.write_directory(self._run_dir, base, self._model_files, self._fence)
        self._base_on_disk = True

    def _fence(self) -> AbstractContextManager[None]:
        """The right to change the run's files; held for as short as can be.

        The main thread needs it too.
        """
        return self._bus.lease.writing(self._lease)

    def _give(
        self, policy: LoadedPolicy, state: Mapping[str, Tensor | WeightSum], *, whole: bool
    ) -> SendResult:
        """Give `policy` to the generators; again where Redis lost a part of it meanwhile."""
        self._unwritten = None
        if self._transfer is not None and self._transfer.send(policy) and not whole:
            self._unwritten = policy
            return SendResult(policy.data.size, None)
        base = partial(self._packer.base, state)
        sent = self._sender.send(policy, whole=whole, adapter_base=base)
        if not self._sender.offers(VersionId(policy.number, policy.digest)):
            sent = self._sender.send(policy, whole=True, adapter_base=base)
        return sent

    def _store(self) -> StoreWriter:
        if self._on_disk:
            return DirectoryWriter(self._run_dir, self._model_files, self._fence)
        return ChunkWriter(
            self._bus.weights,
            self._lease,
            self._settings.weights.max_share,
            self._settings.redis.connect_timeout,
        )

    def _is_whole(self, number: int) -> bool:
        """Whether `number` becomes a model directory: what evaluations and exports read."""
        settings = self._settings
        if settings.weights.transport == "filesystem" and not settings.weights.deltas:
            return True
        interval = settings.eval.interval
        evaluated = bool(interval) and number % interval == 0
        by_interval = number % settings.weights.full_every == 0
        return evaluated or by_interval or number == settings.trainer.max_steps

    def _offered(self, number: int, digest: str) -> bool:
        """Whether nobody needs version `number` again: it is there, or a later one is newest."""
        return number < max(self._announced) or self._sender.offers(VersionId(number, digest))

    def _remember(self, policy: PolicyVersion) -> None:
        """Note that `policy` was announced.

        Where its number had other weights before, what was announced after those does not count:
        it came of a training that is not gone on with.
        """
        self._bus.limits.note(version=policy.number)
        if self._announced.get(policy.number) != policy.digest:
            later = [number for number in self._announced if number > policy.number]
            for number in later:
                del self._announced[number]
            self._announced[policy.number] = policy.digest


def nccl_transfer(bus: Bus, lease: Lease, settings: Settings) -> NcclTransfer | None:
    """The transfer from GPU to GPU, with `weights.transport = "nccl"`; None with another one.

    Raises:
        SettingsError: vLLM, which does the transfer, is not installed.
    """
    if settings.weights.transport != "nccl":
        return None
    if not engines.vllm_importable():
        raise SettingsError([vllm_missing("weights.transport")])
    patience_s = settings.weights.patience
    return NcclTransfer(
        TransferCoordinator(bus.transfer, lease, patience_s),
        address_towards(redis_url(settings)),
        patience_s,
    )


def packer_of(learner: Learner, settings: Settings) -> PolicyPacker:
    """What makes versions of the weights of `learner`: from GPU to GPU they go whole."""
    return learner.packer(whole=settings.weights.transport == "nccl")


def student_files(run_dir: Path, learner: Learner) -> Path:
    """The directory with the student's configuration and tokenizer, linked by every version."""
    directory = run_dir / "student"
    if not directory.exists():
        unfinished = run_dir / ".student"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        learner.save_model(unfinished)
        for path in (*unfinished.glob("*.safetensors"), *unfinished.glob("*.index.json")):
            path.unlink()
        checkpoint.sync_tree(unfinished)
        unfinished.rename(directory)
    return directory
