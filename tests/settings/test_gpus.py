"""Which GPUs there are, who gets which, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.settings.devices import device_of, gpus_found
from onstream.settings.gpus import gpu_problems, gpus_of, memory_share, placement
from onstream.settings.load import load_settings
from onstream.settings.plan import Plan, make_plan
from onstream.settings.root import Settings

STARTED = (
    "deployment.device=cuda",
    "deployment.num_teacher_gpus=2",
    "trainer.loss.teacher_tau=0.5",
)
SHARED = (
    *("deployment.share_gpus=true", "deployment.gpu_memory_shares.train=0.5"),
    *("deployment.gpu_memory_shares.inference=0.2", "deployment.gpu_memory_shares.teacher=0.15"),
)


def made(*overrides: str) -> tuple[Settings, Plan]:
    settings = load_settings(overrides=overrides, environ={})
    return settings, make_plan(settings)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["0", "1", "2"]),
        ("", []),
        ("-1", []),
        ("2", ["2"]),
        ("2,0,-1,1", ["2", "0"]),
        ("GPU-8f2a, GPU-11bc", ["GPU-8f2a", "GPU-11bc"]),
    ],
)
def test_gpus_are_the_device_files_that_cuda_may_see(
    tmp_path: Path, visible: str | None, found: list[str]
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert (
        gpus_found(tmp_path, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == found
    )


def test_a_machine_without_device_files_computes_on_the_cpu(tmp_path: Path) -> None:
    assert gpus_found(tmp_path, {"CUDA_VISIBLE_DEVICES": "0"}) == []
    assert device_of(load_settings(environ={}).deployment) == "cpu"


def test_each_worker_that_computes_gets_a_gpu_of_its_own() -> None:
    settings, plan = made(*STARTED)
    gpus = ["4", "5", "6", "7"]
    assert gpu_problems(settings, plan, gpus) == []
    assert placement(settings, plan, gpus) == {
        ("trainer", 0): "4",
        ("generator", 0): "5",
        ("teacher", 0): "6",
        ("teacher", 1): "7",
    }


def test_more_gpus_than_there_are_is_refused_with_the_sum() -> None:
    settings, plan = made(*STARTED, "deployment.workers.generator=3")
    [problem] = gpu_problems(settings, plan, ["0", "1", "2"])
    assert str(problem) == (
        "train 1 + inference 3 + teacher 2 = 6 GPUs (deployment.num_teacher_gpus = 2); "
        "expected workers that fit the 3 found here. "
        "Lower deployment.num_teacher_gpus, or set deployment.share_gpus = true with "
        "deployment.gpu_memory_shares, "
        'or deployment.device = "cpu".'
    )


def test_shared_gpus_take_workers_until_their_memory_is_given_away() -> None:
    settings, plan = made(*STARTED, *SHARED)
    assert gpu_problems(settings, plan, ["0"]) == []
    assert set((placement(settings, plan, ["0"]) or {}).values()) == {"0"}
    assert memory_share(settings, "teacher") == 0.15
    assert memory_share(settings, "verifier") is None
    crowded, crowd = made(*STARTED, *SHARED, "deployment.workers.generator=2")
    [problem] = gpu_problems(crowded, crowd, ["0"])
    assert problem.got == (
        "train 1 × 0.5 + inference 2 × 0.2 + teacher 2 × 0.15 = 1.2 GPUs "
        "(deployment.num_teacher_gpus = 2)"
    )
    assert gpu_problems(crowded, crowd, ["0", "1"]) == []


def test_shared_gpus_need_every_share_stated() -> None:
    settings, plan = made(*STARTED, *SHARED[:2])
    [problem] = gpu_problems(settings, plan, ["0"])
    assert problem.names == (
        "deployment.gpu_memory_shares.inference",
        "deployment.gpu_memory_shares.teacher",
    )
    assert (
        "share_gpus = true without deployment.gpu_memory_shares.inference, "
        "deployment.gpu_memory_shares.teacher" in problem.got
    )


@pytest.mark.parametrize(
    "elsewhere",
    [
        ["deployment.device=cpu"],
        ['deployment.stages=["generate", "score"]', "orchestrator.verification.enabled=true"],
    ],
)
def test_only_what_computes_on_the_gpus_of_this_machine_counts(elsewhere: list[str]) -> None:
    settings, plan = made(*STARTED, *elsewhere)
    assert gpu_problems(settings, plan, ["0", "1", "2"]) == []


def test_without_a_started_teacher_workers_without_a_gpu_of_their_own_are_not_refused() -> None:
    settings, plan = made("deployment.device=cuda")
    assert gpu_problems(settings, plan, ["0"]) == []
    assert placement(settings, plan, ["0"]) is None


def test_a_student_that_vllm_splits_has_all_gpus_of_each_generator_to_itself() -> None:
    split = (
        "deployment.device=cuda",
        "inference.engine=vllm",
        "inference.tensor_parallel_size=2",
        "deployment.workers.generator=2",
    )
    settings, plan = made(*split)
    gpus = ["0", "1", "2", "3", "4"]
    assert gpu_problems(settings, plan, gpus) == []
    placed = placement(settings, plan, gpus)
    assert placed is not None
    assert gpus_of(settings, plan, placed, ("trainer", 0)) == "0"
    assert [gpus_of(settings, plan, placed, ("generator", index)) for index in range(2)] == [
        "1,2",
        "3,4",
    ]
    assert gpus_of(settings, plan, placed, ("generator", 2)) == ""
    [problem] = gpu_problems(settings, plan, gpus[:4])
    assert problem.got.startswith("train 1 + inference 4 = 5 GPUs")
    assert (
        problem.expected
        == "workers that fit the 4 found here, each part of the student on another one"
    )
