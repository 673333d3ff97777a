"""What Prometheus is told of a run, read back by its own parser."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from onstream.pipeline.errors import UserError
from onstream.pipeline.records import PolicyVersion, StageName, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Stats
from onstream.settings.load import load_settings
from onstream.settings.plan import make_plan
from onstream.settings.root import Settings
from onstream.workers.monitoring.exporter import Exporter
from onstream.workers.monitoring.families import OF_A_STEP
from tests.workers.monitoring.scraping import page, scrape

PAGE = Path(__file__).parents[3] / "docs" / "prometheus.md"
STEP = {
    **dict.fromkeys(OF_A_STEP, 0.5),
    "step": 1,
    "rollouts": 8,
    "tokens": 64,
    "dead": 1,
    "dropped_stale": 2,
    "dropped_other": 0,
    "wait_s": 0.5,
    "waited_for": {"generate": 0.25},
    "latency_generate_s": 2.0,
    "queue_train_s": 0.5,
    "queue_verify_s": None,
    "scored_by": {"http://teacher/v1": 0.75},
    "loss": 1.25,
}


def write_rows(path: Path, *rows: dict[str, Any], mode: str = "a") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def settings(tmp_path: Path, redis_url: str, run_name: str) -> Settings:
    overrides = [f"run.dir={tmp_path}", f"run.name={run_name}", f"redis.url={redis_url}"]
    return load_settings(overrides=overrides, environ={})


@pytest.fixture
def exporter(settings: Settings) -> Iterator[Exporter]:
    exporter = Exporter(settings, "127.0.0.1", 0)
    yield exporter
    exporter.close()


def start(bus: Bus, settings: Settings) -> None:
    """What a trainer does first: a plan, a policy and two tickets; a generator has one in hand."""
    lease = bus.lease.acquire(30)
    bus.lease.write_plan(lease, make_plan(settings).encode())
    bus.lease.announce(lease, PolicyVersion(3, "d", "policies/000003", 1))
    route: list[StageName] = ["verify", "train"]
    tickets = [Ticket(number, 0, 2, 0, 1, 0, route) for number in (1, 2)]
    assert bus.lease.issue(lease, 0, tickets, max_backlog=10)
    assert len(bus.streams.read("generate", 1)) == 1
    bus.state.write_heartbeat("generate", Stats())


def test_a_run_that_nobody_started_is_served_without_what_it_does_not_have(
    exporter: Exporter,
) -> None:
    found = scrape(exporter.port)
    assert found["onstream_run_phase[not started]"] == 1
    assert found["onstream_run_phase[running]"] == 0
    assert found["onstream_rollouts_trained_total"] == 0
    assert not [name for name in found if "onstream_step" in name or "eval" in name]


def test_backlog_hands_workers_and_memory_are_those_of_redis(
    exporter: Exporter, settings: Settings, bus: Bus
) -> None:
    start(bus, settings)
    found = scrape(exporter.port)
    assert found["onstream_run_phase[running]"] == 1
    assert found["onstream_redis_up"] == 1
    assert found["onstream_policy_version"] == 3
    assert found["onstream_rollouts_issued_total"] == 2
    assert found["onstream_backlog_records[generate]"] == 2
    assert found["onstream_pending_records[generate]"] == 1
    assert 0 <= found["onstream_pending_oldest_seconds[generate]"] < 60
    assert "onstream_pending_oldest_seconds[verify]" not in found
    assert (found["onstream_workers[generate]"], found["onstream_workers[verify]"]) == (1, 0)
    assert found["onstream_waits"] >= 1
    assert found["onstream_redis_memory_max_bytes"] == 512 << 20
    assert 0 < found["onstream_redis_memory_used_bytes"] < 512 << 20


def test_a_worker_that_died_is_counted_as_gone(
    exporter: Exporter, settings: Settings, bus: Bus
) -> None:
    start(bus, settings)
    bus.state.write_heartbeat("generate", Stats(), state="failed")
    found = scrape(exporter.port)
    assert found["onstream_workers[generate]"] == 0
    assert found["onstream_workers_gone[generate]"] == 1


def test_steps_are_added_up_and_the_newest_is_shown(exporter: Exporter, settings: Settings) -> None:
    metrics = settings.run_dir / "metrics.jsonl"
    write_rows(metrics, STEP)
    first = scrape(exporter.port)
    assert first["onstream_loss_nats"] == 1.25
    write_rows(metrics, STEP | {"step": 2, "rollouts": 24, "latency_generate_s": 1.0, "loss": None})
    write_rows(settings.run_dir / "evals.jsonl", {"version": 0, "exact": 0.25, "reward": None})

    found = scrape(exporter.port)

    assert found["onstream_step"] == 2
    assert found["onstream_rollouts_trained_total"] == 32
    assert found["onstream_tokens_trained_total"] == 128
    assert found["onstream_rollouts_dropped_total[stale]"] == 4
    assert found["onstream_rollouts_dropped_total[other]"] == 0
    assert found["onstream_rollouts_dead_total"] == 2
    assert found["onstream_trainer_waited_seconds_total[generate]"] == 0.5
    assert found["onstream_teacher_rollouts_total[http://teacher/v1]"] == 24
    # 8 rollouts of 2 s and 24 of 1 s
    assert found["onstream_stage_handling_seconds_sum[generate]"] == 40
    assert found["onstream_stage_handling_seconds_count[generate]"] == 32
    assert found["onstream_stage_queue_seconds_sum[train]"] == 16
    assert "onstream_stage_queue_seconds_sum[verify]" not in found
    assert "onstream_loss_nats" not in found
    assert found["onstream_eval_exact_ratio"] == 0.25
    assert "onstream_eval_reward" not in found


def test_steps_that_a_resume_took_back_no_longer_count(
    exporter: Exporter, settings: Settings
) -> None:
    metrics = settings.run_dir / "metrics.jsonl"
    write_rows(metrics, STEP, STEP | {"step": 2}, STEP | {"step": 3})
    assert scrape(exporter.port)["onstream_rollouts_trained_total"] == 24
    write_rows(metrics, STEP, STEP | {"step": 2, "loss": 7.0}, mode="w")
    found = scrape(exporter.port)
    assert (found["onstream_step"], found["onstream_loss_nats"]) == (2, 7)
    assert found["onstream_rollouts_trained_total"] == 16


def test_a_redis_that_is_away_leaves_what_the_files_tell(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", "run.name=away", "redis.url=redis://127.0.0.1:1/0"]
    settings = load_settings(overrides=overrides, environ={})
    write_rows(settings.run_dir / "metrics.jsonl", STEP)
    exporter = Exporter(settings, "127.0.0.1", 0)
    found = scrape(exporter.port)
    exporter.close()
    assert found["onstream_redis_up"] == 0
    assert found["onstream_step"] == 1
    assert not [name for name in found if "backlog" in name or "memory" in name]


def test_the_tokens_of_a_teacher_by_name_have_its_stage(
    exporter: Exporter, settings: Settings, bus: Bus
) -> None:
    start(bus, settings)
    bus.state.write_heartbeat("score:math", Stats(numbers={"tokens": 7.0}))
    assert scrape(exporter.port)["onstream_teacher_tokens[score:math]"] == 7


def test_every_metric_is_on_the_page_and_the_page_has_no_others(
    exporter: Exporter, settings: Settings, bus: Bus
) -> None:
    start(bus, settings)
    bus.state.write_heartbeat("score", Stats(numbers={"tokens": 7.0}))
    write_rows(settings.run_dir / "metrics.jsonl", STEP)
    write_rows(settings.run_dir / "evals.jsonl", {"version": 0, "exact": 0.25, "reward": 0.5})
    served = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(page(exporter.port))
    }
    tables = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    told = {name for line in tables for name in re.findall(r"`(onstream_\w+)`", line)}
    assert served == told


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (of Prometheus) is missing")
def test_promtool_finds_nothing_to_say(exporter: Exporter, settings: Settings, bus: Bus) -> None:
    start(bus, settings)
    write_rows(settings.run_dir / "metrics.jsonl", STEP)
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=page(exporter.port), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_address_that_is_taken_is_an_error_that_names_it(
    exporter: Exporter, settings: Settings
) -> None:
    with pytest.raises(UserError, match=f"^http://127.0.0.1:{exporter.port}: .*another --port"):
        Exporter(settings, "127.0.0.1", exporter.port)


def test_the_command_says_where_it_serves_and_ends_when_it_is_told_to(
    settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f'[run]\nname = "{settings.run.name}"\ndir = "{tmp_path}"\n')
    command = [sys.executable, "-P", "-m", "onstream", "metrics", str(file), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout as printed:
        run, address = printed.readline().split(": ")
        assert run == f"run {settings.run.name}"
        port = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/metrics\n", address)
        assert port
        assert scrape(int(port[1]))["onstream_redis_up"] == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
