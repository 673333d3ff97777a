"""Where a vLLM server scores for the teacher beside the run, what it takes, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from onstream.settings import engines
from onstream.settings.check import Findings, report
from onstream.settings.engines import starts_vllm, teacher_engine, vllm_importable
from onstream.settings.gpus import gpu_problems, placement
from onstream.settings.load import load_settings, resolve
from onstream.settings.plan import Plan, make_plan, refuse_differences
from onstream.settings.rules import problems_of
from onstream.settings.rules.engines import engine_problems
from onstream.settings.stages import WORKERS
from onstream.workers.launcher.preflight import find_problems

CUDA = "deployment.device=cuda"
IN_PROCESS = ("trainer.loss.teacher_tau=0.5", "teacher_inference.engine=vllm-in-process")
SERVED = ("trainer.loss.teacher_tau=0.5", "teacher_inference.engine=vllm")
TWO = "deployment.num_teacher_gpus=2"
ENDPOINT = (
    "orchestrator.teacher_model.model.name=Qwen/Qwen3-0.6B",
    'orchestrator.teacher_model.client.base_url=["http://a/v1"]',
)


def plan(*overrides: str) -> Plan:
    return make_plan(load_settings(overrides=overrides, environ={}))


@pytest.mark.parametrize(
    ("installed", "overrides", "engine"),
    [
        (True, [CUDA], "vllm"),
        (True, [], "transformers"),
        (False, [CUDA], "transformers"),
        (True, [CUDA, "teacher_inference.engine=transformers"], "transformers"),
        (False, ["teacher_inference.engine=vllm"], "vllm"),
    ],
)
def test_vllm_serves_where_it_is_asked_for_or_installed_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, installed: bool, overrides: list[str], engine: str
) -> None:
    monkeypatch.setattr(engines, "vllm_importable", lambda: installed)
    assert teacher_engine(load_settings(overrides=overrides, environ={})) == engine


def test_a_directory_called_vllm_is_no_vllm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.undo()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert not vllm_importable()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.setattr(
        "sys.path", [str(tmp_path), ""]
    )  # another path, so that no finder answers from memory
    assert vllm_importable()


@pytest.mark.parametrize(
    ("overrides", "workers", "gpus"),
    [
        (
            [*SERVED, TWO, CUDA],
            {"generator": 1, "verifier": 1, "teacher": 0, "teacher-external": 1, "trainer": 1},
            2,
        ),
        # On a CPU N is a number of processes, and a server is one whatever N.
        (
            [*SERVED, TWO],
            {"generator": 1, "verifier": 1, "teacher": 0, "teacher-external": 1, "trainer": 1},
            1,
        ),
        (
            [*SERVED, TWO, *ENDPOINT],
            {"generator": 1, "verifier": 1, "teacher": 0, "teacher-external": 2, "trainer": 1},
            1,
        ),
        (
            [*SERVED, *ENDPOINT],
            {"generator": 1, "verifier": 1, "teacher-external": 1, "trainer": 1},
            0,
        ),
        ([SERVED[1]], {"generator": 1, "verifier": 1, "trainer": 1}, 0),
        (
            [*SERVED, TWO, 'deployment.stages=["generate", "train"]'],
            {"generator": 1, "teacher": 0, "teacher-external": 0, "trainer": 1},
            0,
        ),
    ],
)
def test_a_server_takes_the_place_of_the_teacher_workers(
    overrides: list[str], workers: dict[str, int], gpus: int
) -> None:
    made = plan(*overrides)
    assert (made.workers, made.teacher_server) == (workers, gpus)


def test_vllm_in_process_runs_in_the_teacher_workers_one_for_each_gpu() -> None:
    made = plan(*IN_PROCESS, TWO, CUDA)
    counts = {"generator": 1, "verifier": 1, "teacher": 2, "trainer": 1}
    assert (made.workers, made.teacher_server) == (counts, 0)
    settings = load_settings(overrides=[*IN_PROCESS, TWO, CUDA], environ={})
    assert placement(settings, made, ["0", "1", "2", "3"]) == {
        ("trainer", 0): "0",
        ("generator", 0): "1",
        ("teacher", 0): "2",
        ("teacher", 1): "3",
    }
    refuse_differences(plan(*IN_PROCESS, TWO), plan(IN_PROCESS[0], TWO))


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        (["inference.engine=vllm", *SERVED], ["generator"]),
        (["inference.engine=server", *IN_PROCESS], ["teacher"]),
        (["inference.engine=transformers", SERVED[0]], []),
    ],
)
def test_the_kinds_whose_processes_are_ended_with_them_are_those_that_start_vllm(
    overrides: list[str], kinds: list[str]
) -> None:
    settings = load_settings(overrides=[*overrides, TWO], environ={})
    assert [kind for kind in WORKERS if starts_vllm(kind, settings)] == kinds


def test_vllm_in_process_that_is_missing_is_refused_and_named_in_the_plan_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed = io.StringIO()
    resolved = resolve(overrides=[*IN_PROCESS, TWO], environ={})
    problems = find_problems(resolved, online=False)
    report(resolved, Findings(problems), Console(file=printed, width=200), everything=False)
    assert "Qwen/Qwen3-0.6B beside the run by vLLM in its workers\n" in printed.getvalue()
    missing = 'teacher_inference.engine = "vllm-in-process", and vLLM is not installed here'
    assert missing in printed.getvalue()
    assert "pip install '.[vllm]'" in printed.getvalue()
    monkeypatch.setattr(engines, "vllm_importable", lambda: True)
    assert engine_problems(resolved.settings, make_plan(resolved.settings)) == []


def test_the_engine_concerns_this_deployment_alone() -> None:
    refuse_differences(plan(*SERVED, TWO), plan(SERVED[0], TWO))


def test_each_part_of_the_teacher_has_another_gpu_even_where_gpus_are_shared() -> None:
    shares = [
        "deployment.share_gpus=true",
        *(f"deployment.gpu_memory_shares.{role}=0.3" for role in ("train", "inference", "teacher")),
    ]
    settings = load_settings(overrides=[*SERVED, TWO, CUDA, *shares], environ={})
    made = make_plan(settings)
    assert placement(settings, made, ["4", "5"]) == {
        ("trainer", 0): "4",
        ("generator", 0): "4",
        ("teacher", 0): "4",
        ("teacher", 1): "5",
    }
    [problem] = gpu_problems(settings, made, ["4"])
    assert str(problem) == (
        "train 1 × 0.3 + inference 1 × 0.3 + teacher 2 × 0.3 = 1.2 GPUs "
        "(deployment.num_teacher_gpus = 2); expected workers that fit the 1 found here, each part "
        "of the teacher on another one. Lower deployment.num_teacher_gpus or the shares. "
        'teacher_inference.engine = "transformers" starts no vLLM server.'
    )


def test_a_server_needs_a_gpu_of_its_own_though_nobody_said_how_many() -> None:
    settings = load_settings(
        overrides=[*SERVED, CUDA, "teacher_inference.model.name=big"], environ={}
    )
    assert gpu_problems(settings, make_plan(settings), ["0", "1", "2"]) == []
    [problem] = gpu_problems(settings, make_plan(settings), ["0"])
    assert (
        "train 1 + inference 1 + teacher 1 = 3 GPUs (deployment.num_teacher_gpus = unset)"
        in str(problem)
    )


def test_vllm_that_is_asked_for_and_missing_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed = io.StringIO()
    resolved = resolve(overrides=[*SERVED, TWO], environ={})
    report(
        resolved,
        Findings(find_problems(resolved, online=False)),
        Console(file=printed, width=200),
        everything=False,
    )
    assert "Qwen/Qwen3-0.6B beside the run by a vLLM server\n" in printed.getvalue()
    assert 'teacher_inference.engine = "vllm", which is not installed here' in printed.getvalue()
    assert "pip install '.[vllm]'" in printed.getvalue()
    monkeypatch.setattr(engines, "vllm_importable", lambda: True)
    settings = load_settings(overrides=[*SERVED, TWO], environ={})
    assert engine_problems(settings, make_plan(settings)) == []


def test_endpoints_that_others_ask_need_no_address_here_beside_a_server() -> None:
    without_address = [*SERVED, TWO, ENDPOINT[0], "deployment.workers.teacher_external=0"]
    assert problems_of(load_settings(overrides=without_address, environ={})) == []
