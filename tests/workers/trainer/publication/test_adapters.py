"""A LoRA run publishes its adapter alone. What generators, evaluations, exports and replays read is
the same, bit for bit, as if it had published merged weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from onstream.pipeline.models.loading import base_of
from onstream.pipeline.weights import (
    DirectoryReader,
    LoadedPolicy,
    PolicyFetcher,
    StoreReader,
    directory_store,
    packer,
)
from onstream.pipeline.weights.digest import is_of_adapter
from onstream.pipeline.weights.merging import is_adapter
from onstream.pipeline.weights.redis_store import ChunkReader
from onstream.settings.root import Settings
from onstream.workers.evaluation import greedy
from onstream.workers.evaluation.versions import evaluate_version
from onstream.workers.jobs.export import export
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.publication import publisher
from tests.workers.trainer.driver import Run, killed, twin_to_the_end
from tests.workers.trainer.durability.test_recording import assert_replays

LORA = {"trainer__lora": {"rank": 2}, "checkpoint__keep_policies": 9}


@pytest.fixture
def undisturbed(redis_url: str, run_name: str, model: Path, tmp_path: Path) -> Iterator[Run]:
    """A LoRA run to which nothing happened."""
    with twin_to_the_end(redis_url, run_name, model, tmp_path, **LORA) as job:
        yield job


def store_reader(job: Run) -> StoreReader:
    if job.settings().weights.transport == "redis":
        return ChunkReader(job.bus.weights)
    return DirectoryReader(job.trainer.directory.path)


def newest(job: Run) -> LoadedPolicy:
    """What a generator that joins now loads."""
    policy = job.bus.state.newest_policy()
    assert policy is not None
    return PolicyFetcher(store_reader(job), deltas=False).fetch(policy)


def merged(job: Run) -> bytes:
    """The trainer's weights with the adapter merged, as a file."""
    learner = job.trainer.training.learner
    return LoadedPolicy.of(0, learner.live_state(), learner.dtype).data.tobytes()


def digests(job: Run) -> list[tuple[int, str]]:
    return [(policy.number, policy.digest) for policy in job.bus.state.announced_policies()]


@pytest.fixture
def published_whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Trainers merge the adapter before they publish, as earlier versions of Onstream did, until
    this is called.
    """
    packer_as_it_is = Learner.packer
    monkeypatch.setattr(Learner, "packer", lambda self, **_: packer_as_it_is(self, whole=True))
    return lambda: monkeypatch.setattr(Learner, "packer", packer_as_it_is)


@pytest.mark.parametrize("transport", ["filesystem", "redis"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_step_publishes_the_adapter_and_generators_get_the_merged_weights(
    run: Callable[..., Run], model: Path, transport: str, dtype: str
) -> None:
    job = run(**LORA, weights__transport=transport, trainer__dtype=dtype)
    job.ready()
    steady = PolicyFetcher(store_reader(job), deltas=False)
    for step in range(7):
        job.until(step)
        policy = job.bus.state.newest_policy()
        assert policy is not None and is_of_adapter(policy.digest)
        found = steady.fetch(policy)
        assert found.data.tobytes() == newest(job).data.tobytes() == merged(job)
        assert not step or steady.fetched_bytes == policy.size_bytes
    factors = job.trainer.training.learner.model.state_dict()
    factor_bytes = sum(one.nbytes for name, one in factors.items() if ".lora_" in name)
    for row in job.rows():
        assert factor_bytes < row["publish_bytes"] < factor_bytes + 10_000


def test_a_version_of_a_lora_run_is_far_smaller_than_one_of_a_full_run(
    run: Callable[..., Run], undisturbed: Run
) -> None:
    full = run()
    full.ready()
    full.until(1)
    [row] = full.rows()
    directory = undisturbed.trainer.directory.path / "policies" / "000006"
    files = {path.name for path in directory.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files
    assert not {"config.json", "model.safetensors"} & files
    factors = (directory / "adapter_model.safetensors").stat().st_size
    assert factors == undisturbed.rows()[0]["publish_bytes"]
    assert row["publish_bytes"] == newest(undisturbed).data.size
    assert factors < row["publish_bytes"] / 2


@pytest.mark.parametrize(
    "killed_at",
    ["serialised", "write_weights", "sync", "_discard", "announce", "prune"],
)
def test_a_kill_between_any_two_stages_of_an_adapter_is_made_good(
    run: Callable[..., Run], undisturbed: Run, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    job = run(**LORA)
    job.ready()
    job.until(2)
    owner: Any = {"serialised": packer, "announce": job.bus.lease}.get(killed_at, directory_store)
    if killed_at == "prune":
        owner = publisher.weights
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, killed_at, killed)
        job.until(4)
    assert (3 in job.announced()) == (killed_at == "prune")
    assert newest(job).number == max(job.announced())
    job.start()
    job.to_the_end()
    assert digests(job) == digests(undisturbed)
    assert newest(job).data.tobytes() == newest(undisturbed).data.tobytes()
    left = {path.name[0] for path in (job.trainer.directory.path / "policies").iterdir()}
    assert left == {"0", "b"}, "versions and the base"


@pytest.mark.parametrize("killed_at", ["write_weights", "_discard"])
def test_a_kill_while_the_base_is_written_is_made_good(
    run: Callable[..., Run], undisturbed: Run, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(directory_store, killed_at, killed)
        run(**LORA)
    job = run(**LORA)
    job.ready()
    job.to_the_end()
    assert digests(job) == digests(undisturbed)
    assert newest(job).data.tobytes() == newest(undisturbed).data.tobytes()


def test_a_lora_run_that_an_earlier_version_began_goes_on_with_adapters_and_replays(
    run: Callable[..., Run], undisturbed: Run, published_whole: Callable[[], None]
) -> None:
    job = run(**LORA, trainer__record=True)
    job.ready()
    job.until(3)
    assert not any(is_of_adapter(digest) for _, digest in digests(job))
    published_whole()
    job.start()
    announced = job.bus.state.newest_policy()
    assert announced is not None and is_of_adapter(announced.digest)
    assert newest(job).data.tobytes() == merged(job)
    job.to_the_end()
    assert dict(digests(job)) | dict(digests(undisturbed)[2:]) == dict(digests(job))
    directory = job.trainer.directory.path / "policies"
    assert [is_adapter(directory / f"{number:06d}") for number in (1, 3)] == [False, True]
    job.trainer.recording.sync()
    assert_replays(job)


@pytest.mark.parametrize("transport", ["filesystem", "redis"])
def test_a_redis_that_lost_its_data_gets_the_base_and_the_adapter_again(
    run: Callable[..., Run], transport: str
) -> None:
    job = run(**LORA, weights__transport=transport)
    job.ready()
    job.until(3)
    job.lose_redis()
    job.bus.lease.renew_from_heartbeat(job.trainer.lease)
    job.ready()
    job.turn(3)
    assert newest(job).data.tobytes() == merged(job)
    job.to_the_end()
    assert newest(job).number == 6


def test_an_export_and_an_evaluation_of_a_version_have_the_adapter_merged(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = undisturbed.settings()
    assert export(settings, 6, tmp_path / "out") == 6
    assert base_of(tmp_path / "out") is None
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == merged(undisturbed)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = newest(undisturbed).tensors()
    assert all(torch.equal(loaded.state_dict()[name], one) for name, one in wanted.items())
    directory = undisturbed.trainer.directory.path / "policies" / "000006"
    unmerged = AutoModelForCausalLM.from_pretrained(directory)  # by transformers with peft
    ids = torch.arange(20)[None]
    torch.testing.assert_close(unmerged(ids).logits, loaded(ids).logits, atol=1e-5, rtol=1e-5)
    asked: list[Path] = []

    def evaluated(directory: Path, _: Settings) -> dict[str, Any]:
        asked.append(directory)
        assert (directory / "model.safetensors").read_bytes() == merged(undisturbed)
        return {"exact": 1.0}

    monkeypatch.setattr(greedy, "evaluate", evaluated)
    assert evaluate_version(settings, 6)["exact"] == 1.0
    assert asked and not asked[0].exists()


def test_a_run_directory_that_was_moved_still_opens_its_versions(
    undisturbed: Run, tmp_path: Path
) -> None:
    wanted = merged(undisturbed)
    settings = undisturbed.settings(run__dir=str(tmp_path / "elsewhere"))
    shutil.copytree(undisturbed.trainer.directory.path, settings.run_dir)
    assert export(settings, None, tmp_path / "out") == 6
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted
