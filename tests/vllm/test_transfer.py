"""vLLM's processes as receivers: what fails leaves the model as it was; the transfer itself needs
two GPUs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Stats
from onstream.pipeline.weights import DirectoryReader, PolicyFetcher, WeightsError, announced
from onstream.pipeline.weights.nccl_transfer import PolicyHeader, TransferCoordinator
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.nccl_receiver import READING, TransferReceiver
from onstream.workers.generator.policy_loader import PolicyLoader
from onstream.workers.generator.student import Student, open_student
from onstream.workers.trainer.publication.nccl_sender import NcclTransfer
from tests.vllm.reference import CLOSE_NATS, gaps, model_of, policy_of

pytestmark = pytest.mark.slow
NOWHERE = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
PATIENCE_S = 120.0


def written(engine: Any, request: GenerationRequest) -> Completion:
    engine.add([request])
    found: list[Completion] = []
    while engine.active:
        found += engine.step()
    return found[0]


def ended(engine: Any) -> str:
    """What becomes of what the process does."""
    while (state := engine.ask_processes("onstream_staged")[0]) == READING:
        time.sleep(0.01)
    return str(state)


def worst(engine: Any, models: Mapping[int, Any]) -> float:
    request = GenerationRequest(1, np.arange(20, 60, dtype=np.int32), 40, seed=1)
    return float(gaps(models, request, written(engine, request)).max())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would wait for a trainer")
def test_where_no_group_can_be_joined_the_old_weights_serve_on_and_the_next_come_by_file(
    student: Student, student_dir: Path
) -> None:
    engine: Any = student.engine
    engine.on_new_weights = "recompute"
    model = model_of(student_dir)
    first = policy_of(900_001, model)
    second = policy_of(900_002, model)
    engine.load(first)
    engine.ask_processes("onstream_join", json.dumps(NOWHERE))
    assert "the group of trainer and generators cannot be joined" in ended(engine)
    update = {
        "names": list(first.shapes),
        "dtype_names": ["float32"] * len(first.shapes),
        "shapes": [list(x) for x in first.shapes.values()],
    }
    engine.ask_processes(
        "onstream_receive",
        json.dumps(update),
        msgspec.json.encode(PolicyHeader.of(second)).decode(),
    )
    assert "version 900002 was not received" in ended(engine)
    with pytest.raises(WeightsError):
        engine.load_received(900_002, second.digest)
    assert worst(engine, {900_001: model}) < CLOSE_NATS
    engine.ask_processes("onstream_leave")
    engine.load(second)
    assert worst(engine, {900_002: model}) < CLOSE_NATS


def trainer(url: str, run: str, model: Path, gpu: str) -> None:
    """A process that sends `model` as versions 1 and 2."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    bus = Bus.connect(url, run, consumer="trainer", block_s=0.2, connect_timeout_s=5)
    lease = bus.lease.acquire(600)
    transfer = NcclTransfer(
        TransferCoordinator(bus.transfer, lease, PATIENCE_S), "127.0.0.1", PATIENCE_S
    )
    for number in (1, 2):
        policy = policy_of(number, model_of(model))
        assert transfer.send(policy)
        bus.lease.announce(lease, announced(policy))
    transfer.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_versions_go_from_gpu_to_gpu_while_requests_are_written(
    redis_url: str, bus: Bus, student_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    inference = {
        "engine": "vllm",
        "dtype": "float32",
        "max_batch": 16,
        "sampling": {"max_completion": 200},
    }
    given = {
        "model": {"name": str(student_dir)},
        "deployment": {"device": "cuda"},
        "inference": inference,
    }
    engine: Any = open_student(Settings.model_validate(given)).engine
    try:
        receiver = TransferReceiver(bus.transfer, engine, PATIENCE_S)
        policies = PolicyLoader(
            engine,
            PolicyFetcher(DirectoryReader(tmp_path), deltas=False),
            bus.state.newest_policy,
            receiver=receiver,
        )
        sending = multiprocessing.get_context("spawn").Process(
            target=trainer, args=(redis_url, bus.run, teacher_dir, "1"), daemon=True
        )
        bus.state.write_heartbeat("generate", Stats())
        sending.start()
        deadline = time.monotonic() + 2 * PATIENCE_S
        while policies.version < 2 and time.monotonic() < deadline:
            bus.state.write_heartbeat("generate", Stats())
            policies.refresh()
            if not engine.active:
                engine.add([GenerationRequest(1, np.arange(20, 60, dtype=np.int32), 40, seed=1)])
            engine.step()
        sending.join(timeout=PATIENCE_S)
        assert sending.exitcode == 0
        while engine.active:
            engine.step()
        assert worst(engine, {2: model_of(teacher_dir)}) < 1e-2  # kernels of a GPU round otherwise
    finally:
        engine.close()
