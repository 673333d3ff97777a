"""The files of a run are one trainer's, whatever its predecessor was doing when it froze."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from onstream.pipeline.errors import LeaseLost
from onstream.pipeline.run_files.ownership import FILE, Ownership

ROOT = Path(__file__).parents[3]


def claimed(run_dir: Path, epoch: int, holder: str = "a trainer") -> Ownership:
    files = Ownership(run_dir)
    files.take(epoch, holder)
    return files


def test_the_file_says_whose_the_run_is_and_the_epoch_outlives_its_trainer(tmp_path: Path) -> None:
    claimed(tmp_path, 3, "trainer-slot0 on here pid 7").close()
    assert (tmp_path / FILE).read_text() == "3 trainer-slot0 on here pid 7\n"
    assert Ownership(tmp_path).newest() == 3


def test_one_that_was_followed_changes_nothing_and_learns_by_whom(tmp_path: Path) -> None:
    older = claimed(tmp_path, 1)
    with older.held():
        pass
    claimed(tmp_path, 2, "its successor")
    with (
        pytest.raises(
            LeaseLost, match="belong to epoch 2, of its successor; this trainer's epoch is 1"
        ),
        older.held(),
    ):
        raise AssertionError("it got in")


def test_an_epoch_is_taken_once_and_never_goes_back(tmp_path: Path) -> None:
    newer = claimed(tmp_path, 5)
    for epoch in (4, 5):
        with pytest.raises(LeaseLost, match=f"epoch {epoch} was followed by 5"):
            claimed(tmp_path, epoch, "another")
    with newer.held():
        newer.take(6, "a trainer")
        with newer.held():
            pass
    assert newer.newest() == newer.epoch == 6


def test_a_successor_waits_for_a_change_under_way_and_a_change_that_comes_later_is_refused(
    tmp_path: Path,
) -> None:
    older = claimed(tmp_path, 1)
    newer = Ownership(tmp_path)
    taken = threading.Event()
    waiting = threading.Thread(target=lambda: (newer.take(2, "its successor"), taken.set()))
    with older.held():
        waiting.start()
        assert not taken.wait(0.3)
        assert newer.newest() == 1
    waiting.join()
    with pytest.raises(LeaseLost), older.held():
        pass


def test_the_lock_of_a_process_that_was_stopped_in_a_change_goes_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from onstream.pipeline.run_files.ownership import Ownership\n"
        f"files = Ownership(Path({str(tmp_path)!r})); files.take(1, 'stopped on here pid 7')\n"
        "with files.held(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE
    ) as stopped:
        assert stopped.stdout is not None
        stopped.stdout.readline()
        os.kill(stopped.pid, signal.SIGSTOP)
        newer = Ownership(tmp_path)
        kill = threading.Timer(1.5, stopped.kill)
        kill.start()
        newer.take(2, "its successor")
    assert (
        "waiting for a trainer in the middle of a write" in (said := capsys.readouterr().out)
        and "stopped on here pid 7" in said
    )
    assert newer.newest() == 2
