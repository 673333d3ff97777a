"""A run whose directory is renamed, copied or forked goes on under its new name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus
from onstream.settings.load import load_settings
from onstream.settings.plan import Plan
from onstream.workers.jobs.fork import fork
from tests.workers.trainer.driver import Run

ALL = {"issued": 48, "trained": 48}


@pytest.fixture
def other(redis_url: str, run_name: str) -> Iterator[Bus]:
    """The bus of a run with another name."""
    name = f"{run_name}-other"
    bus = Bus.connect(redis_url, name, consumer="tester", block_s=0.2, connect_timeout_s=5)
    yield bus
    bus.close()


@pytest.fixture
def stopped(run: Callable[..., Run]) -> Run:
    """A run of 6 steps that stopped in its fifth."""
    job = run()
    job.ready()
    job.until(5)
    job.close_files()
    return job


def go_on(bus: Bus, model: Path, directory: Path) -> Run:
    job = Run(bus, model, directory)
    assert job.trainer.step == 4
    job.ready()
    job.to_the_end()
    job.close_files()
    return job


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_renamed_or_copied_directory_goes_on_from_its_newest_checkpoint(
    stopped: Run, other: Bus, model: Path, tmp_path: Path, how: Callable[[Path, Path], Path]
) -> None:
    how(tmp_path / stopped.bus.run, tmp_path / other.run)
    job = go_on(other, model, tmp_path)
    assert job.counts() == ALL
    plan = Plan.decode((tmp_path / other.run / "plan.json").read_bytes())
    assert (plan.run, plan.run_settings["run.name"]) == (other.run, other.run)


def test_a_fork_goes_on_to_the_weights_that_the_run_itself_comes_to(
    stopped: Run, bus: Bus, other: Bus, model: Path, tmp_path: Path
) -> None:
    directory, step = fork(stopped.settings(), other.run, 4)
    assert (directory, step) == (tmp_path / other.run, 4)
    settings = load_settings([directory], environ={})
    assert (settings.run.name, settings.run_dir) == (other.run, directory)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]

    forked = go_on(other, model, tmp_path)
    assert forked.counts() == ALL
    own = go_on(bus, model, tmp_path)
    assert own.counts() == ALL
    digests = [job.bus.state.newest_policy().digest for job in (forked, own)]  # type: ignore[union-attr]
    assert digests[0] == digests[1]


def test_what_cannot_be_forked_is_told_and_leaves_nothing(stopped: Run, tmp_path: Path) -> None:
    settings = stopped.settings()
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .* is whole: 2, 4"):
        fork(settings, "new", 3)
    with pytest.raises(UserError, match=r"run\.name = /elsewhere"):
        fork(settings, "/elsewhere", 4)
    with pytest.raises(UserError, match=f"{stopped.bus.run} exists"):
        fork(settings, stopped.bus.run, 4)
    weights = next(
        (tmp_path / stopped.bus.run / "checkpoints" / "step-000004").glob("*.safetensors")
    )
    weights.write_bytes(b"torn")
    with pytest.raises(
        UserError, match=r"step-000004: model\.safetensors does not have the digest"
    ):
        fork(settings, "new", 4)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {stopped.bus.run}
