"""What `deployment.balance = "auto"` does, by the metrics of steps that are written here.

The processes are stubs: no real worker gives rates on demand. tests/runs/test_balance.py has real
ones.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onstream.settings.load import load_settings
from onstream.settings.plan import make_plan
from onstream.settings.stages import WorkerKind
from onstream.workers.inspection.run_snapshot import RunSnapshot
from onstream.workers.launcher.balance import WINDOW_STEPS, Balance
from onstream.workers.launcher.run_watcher import MetricsTail
from onstream.workers.launcher.supervisor import Child


class StubProcesses:
    """One verifier beside the trainer, and those that are added."""

    trainer = object()
    threads = 1

    def __init__(self) -> None:
        self.added: list[Child] = []
        self.broken = False

    @property
    def workers_by_stage(self) -> dict[str, int]:
        return {"generate": 1, "verify": 1 + sum(not child.dismissed for child in self.added)}

    def count(self, kind: WorkerKind) -> int:
        return 1

    def bytes_of_one(self, kind: WorkerKind) -> int:
        return 0

    def add_worker(self, kind: WorkerKind) -> Child:
        if self.broken:
            raise OSError("out of processes")
        name = f"{kind}-{len(self.added) + 1}"
        self.added.append(Child(name, kind, "none", (), Path("log")))
        return self.added[-1]

    def take_away(self, child: Child) -> None:
        child.dismissed = True


class Scene:
    """A run whose steps, workers and CPU seconds are what the test says."""

    def __init__(self, directory: Path) -> None:
        overrides = ["deployment.balance=auto", "deployment.device=cpu", "trainer.max_steps=1000"]
        settings = load_settings(overrides=overrides, environ={})
        self.path = directory / "metrics.jsonl"
        self.metrics = MetricsTail(self.path)
        self.processes = StubProcesses()
        self.watcher: Any = SimpleNamespace(latest=RunSnapshot(taking={"verify": 1}))
        cpu: Any = SimpleNamespace(total_s=lambda: 0.0)
        processes: Any = self.processes
        self.balance = Balance(
            settings, make_plan(settings), processes, cpu, self.metrics, self.watcher
        )

    def taking(self, verifiers: int) -> None:
        self.watcher.latest = RunSnapshot(taking={"verify": verifiers})

    def steps(self, count: int, rollouts_per_s: float, waited: float) -> list[str]:
        """What is said in the course of `count` steps."""
        said = []
        for _ in range(count):
            row = {
                "step": self.metrics.step + 1,
                "time": time.time() + 1,
                "rollouts": rollouts_per_s,
                "elapsed_s": 1.0,
                "waited_for": {"verify": waited},
            }
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.metrics.read()
            said += self.balance.look()
        return said


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def window(scene: Scene, rollouts_per_s: float, waited: float) -> list[str]:
    return scene.steps(1 + WINDOW_STEPS, rollouts_per_s, waited)


def test_a_stage_that_is_waited_for_gets_a_worker_and_is_told_what_it_gave(scene: Scene) -> None:
    assert window(scene, 64, 0.9) == [
        "the trainer waited 90% of the last 10 steps for verify: verifier-1 is started, "
        "116.4 rollouts/s are predicted (now 64)"
    ]
    assert scene.steps(50, 64, 0.9) == []  # it loads: these steps say nothing of it
    scene.taking(2)
    assert window(scene, 118, 0.1) == ["2 verifiers: 118 rollouts/s, 116.4 predicted, 64 before"]
    assert scene.balance.report() == [
        {
            "stage": "verify",
            "workers": 2,
            "predicted": 116.36,
            "before": 64,
            "after": 118,
            "kept": True,
        }
    ]
    assert scene.steps(50, 118, 0.1) == []


def test_a_worker_that_gives_little_leaves_and_its_stage_is_left_alone(scene: Scene) -> None:
    window(scene, 64, 0.9)
    scene.taking(2)
    assert window(scene, 70, 0.9) == [
        "2 verifiers: 70 rollouts/s, 116.4 predicted, 64 before; verifier-1 leaves again"
    ]
    [added] = scene.processes.added
    assert added.dismissed
    added.done = True
    assert scene.steps(50, 64, 0.9) == []
    assert scene.balance.report()[0]["kept"] is False


def test_one_more_is_added_at_once_where_the_last_one_helped_and_more_is_promised(
    scene: Scene,
) -> None:
    window(scene, 64, 0.9)
    scene.taking(2)
    said = window(scene, 110, 0.8)
    assert [sentence.partition(":")[0] for sentence in said] == [
        "2 verifiers",
        "the trainer waited 80% of the last 10 steps for verify",
    ]
    assert [entry["after"] for entry in scene.balance.report()] == [110, None]


def test_a_worker_that_joined_from_elsewhere_counts_in_the_prediction(scene: Scene) -> None:
    scene.taking(3)
    [sentence] = window(scene, 60, 0.8)
    assert "75 rollouts/s are predicted" in sentence  # a quarter of the waiting


def test_near_the_end_of_the_run_nothing_is_added(scene: Scene) -> None:
    scene.steps(985, 64, 0.0)
    assert scene.steps(15, 64, 0.9) == []


def test_a_run_that_has_ended_does_not_wait_for_a_worker_that_still_loads(scene: Scene) -> None:
    window(scene, 64, 0.9)
    scene.watcher.latest = RunSnapshot(taking={"verify": 1}, finished=True)
    assert scene.steps(1, 64, 0.9) == []
    assert scene.processes.added[0].dismissed
    assert scene.balance.report()[0]["after"] is None


def test_a_balance_that_fails_is_a_warning_and_the_workers_stay_as_they_are(scene: Scene) -> None:
    scene.processes.broken = True
    [sentence] = window(scene, 64, 0.9)
    assert sentence.startswith("the workers stay as many as they are: deployment.balance failed")
    assert "out of processes" in sentence
    assert scene.steps(50, 64, 0.9) == []
