"""How a worker joins a run: its plan, the refusal of other settings, waiting and stopping."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.models import loading
from onstream.pipeline.redis.bus import Bus
from onstream.settings.load import load_settings
from onstream.settings.plan import make_plan
from onstream.settings.root import Settings
from onstream.workers import runner
from onstream.workers.runner import class_path, run_kind


@pytest.fixture
def settings(redis_url: str, run_name: str) -> Settings:
    return load_settings(
        overrides=[f"run.name={run_name}", f"redis.url={redis_url}", "redis.block=0.05"], environ={}
    )


def write_plan(bus: Bus, settings: Settings) -> None:
    bus.lease.write_plan(bus.lease.acquire(30), make_plan(settings).encode())


def test_a_worker_with_other_run_settings_is_refused_with_names_and_both_values(
    settings: Settings, bus: Bus
) -> None:
    write_plan(bus, settings)
    url = settings.redis.url.get_secret_value() if settings.redis.url else ""
    ours = load_settings(
        overrides=[
            f"run.name={settings.run.name}",
            f"redis.url={url}",
            "run.seed=7",
            "trainer.max_steps=9",
            "log.level=error",
        ],
        environ={},
    )
    with pytest.raises(UserError, match=r"run\.seed \(here 7, the run has 0\); expected") as caught:
        run_kind("verifier", ours)
    assert caught.value.exit is Exit.REFUSED


def test_a_worker_of_a_stage_that_no_rollout_passes_is_refused(
    settings: Settings, bus: Bus
) -> None:
    write_plan(bus, settings)
    with pytest.raises(
        UserError, match=r"a teacher worker .* whose rollouts pass generate → verify → train"
    ) as caught:
        run_kind("teacher", settings)
    assert caught.value.exit is Exit.REFUSED


def test_a_worker_that_asks_endpoints_needs_their_addresses(
    redis_url: str, settings: Settings, bus: Bus
) -> None:
    overrides = [
        *(f"run.name={bus.run}", f"redis.url={redis_url}", "redis.block=0.05"),
        *("teacher_inference.model.name=big", "trainer.loss.teacher_tau=1"),
    ]
    scored = load_settings(overrides=overrides, environ={})
    write_plan(bus, scored)
    with pytest.raises(
        UserError,
        match=r"a teacher-external worker .* "
        r"Set orchestrator\.teacher_model for a teacher-external",
    ):
        run_kind("teacher-external", scored)


def test_the_generator_of_hard_distillation_asks_an_endpoint(settings: Settings) -> None:
    hard = load_settings(
        overrides=[
            *(
                "trainer.loss.type=sft",
                "orchestrator.use_token_client=false",
                "orchestrator.teacher_rollout_model.model.name=big",
            ),
            "orchestrator.teacher_rollout_model.client.base_url=http://a/v1",
        ],
        environ={},
    )
    assert class_path("generator", settings) == "onstream.workers.generator.stage:Generator"
    assert class_path("generator", hard) == "onstream.workers.generator.chat_stage:ChatGenerator"


def test_a_plan_of_another_version_is_refused(settings: Settings, bus: Bus) -> None:
    bus.lease.write_plan(bus.lease.acquire(30), b"{}")
    with pytest.raises(UserError, match="the run's plan does not decode"):
        run_kind("verifier", settings)


def test_a_worker_waits_for_the_plan_saying_so_and_stops_cleanly_when_told_to(
    settings: Settings, bus: Bus
) -> None:
    url = settings.redis.url.get_secret_value() if settings.redis.url else ""
    command = [
        sys.executable,
        "-m",
        "onstream",
        "worker",
        "verifier",
        "--set",
        f"run.name={bus.run}",
        "--set",
        f"redis.url={url}",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as worker:
        assert worker.stderr is not None
        told = worker.stderr.readline()  # the log line
        while not (states := bus.state.workers()):
            assert worker.poll() is None
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == Exit.OK
    assert (
        "waiting for the trainer to write the run's plan" in told
        and f'"run":"{bus.run}"' in told.replace(" ", "")
    )
    assert [(state.stage, state.state, state.detail) for state in states] == [
        ("verify", "starting", "waiting for the trainer to write the run's plan")
    ]


def test_an_admitted_worker_takes_changeable_settings_of_its_own_and_exits_0(
    settings: Settings, bus: Bus
) -> None:
    write_plan(bus, settings)
    assert bus.lease.current is not None
    bus.lease.finish(bus.lease.current)
    url = settings.redis.url.get_secret_value() if settings.redis.url else ""
    command = [sys.executable, "-m", "onstream", "worker", "verifier"]
    overrides = [
        f"run.name={bus.run}",
        f"redis.url={url}",
        "redis.block=0.05",
        "trainer.max_steps=9",
    ]
    done = subprocess.run(
        [*command, *(part for override in overrides for part in ("--set", override))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == Exit.OK, done.stderr
    assert "verify" in bus.state.ready_stages()


@pytest.mark.parametrize("kind", ["verifier", "teacher-external", "jobs"])
def test_the_kinds_of_the_slim_image_come_up_where_torch_is_not_installed(kind: str) -> None:
    module = {"jobs": "onstream.workers.jobs.worker"}.get(kind) or class_path(
        kind, Settings()
    ).partition(":")[0]  # type: ignore[arg-type]
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        f"import {module}, onstream.workers.runner\nprint('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_a_tokenizer_loads_where_torch_is_not_installed() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from onstream.settings.load import load_settings\n"
        "from onstream.workers.teacher.compatibility import load_student\n"
        "settings = load_settings(overrides=['model.name=examples/reverse-text/student'])\n"
        "print(load_student(settings).context_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "512\n", done.stderr


@pytest.mark.parametrize("kind", ["generator", "teacher", "trainer"])
def test_a_kind_that_computes_says_how_to_install_torch(kind: str) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        f"sys.argv = ['onstream', 'worker', '{kind}']\n"
        "from onstream.workers.commands.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == Exit.USAGE
    assert f"a {kind} worker where torch is not installed" in done.stderr
    assert "pip install '.[train]'" in done.stderr


def test_an_optional_worker_that_the_run_has_no_place_for_leaves_and_is_not_waited_for(
    settings: Settings, bus: Bus
) -> None:
    write_plan(bus, settings)
    assert run_kind("teacher", settings, optional=True) == Exit.OK
    assert bus.state.last_heartbeats(60) == []


@pytest.mark.parametrize(("engine", "limits"), [("transformers", [0.3]), ("vllm-in-process", [])])
def test_a_teacher_keeps_to_its_share_of_a_gpu_unless_vllm_is_told_it(
    monkeypatch: pytest.MonkeyPatch, engine: str, limits: list[float]
) -> None:
    given: list[float] = []
    monkeypatch.setattr(loading, "limit_gpu_memory", given.append)
    overrides = [
        "deployment.device=cuda",
        "deployment.share_gpus=true",
        "deployment.gpu_memory_shares.teacher=0.3",
        f"teacher_inference.engine={engine}",
    ]
    runner._limit_gpu_memory("teacher", load_settings(overrides=overrides, environ={}))
    assert given == limits
