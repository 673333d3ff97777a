"""The state of a run as families of metrics, by the naming conventions of Prometheus.

No label takes values that grow with the run: stages, reasons, phases and teachers are few.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from onstream.settings.stages import teacher_of
from onstream.workers.inspection.run_phase import Phase
from onstream.workers.launcher.metric_rows import Row, number
from onstream.workers.monitoring.step_totals import StepTotals

OF_A_STEP = {
    "step": ("step", "The newest step."),
    "time": ("last_step_timestamp_seconds", "When the newest step was taken."),
    "loss": ("loss_nats", "The loss of the newest step, a token."),
    "teacher_kl": ("teacher_kl_nats", "Reverse KL to the teacher in the newest step, a token."),
    "entropy": ("entropy_nats", "Of the student in the newest step, a token."),
    "reward": ("reward", "Mean reward of the newest step."),
    "mismatch_max": ("mismatch_max_nats", "Largest |trainer - generator| of the newest step."),
    "masked_share": ("masked_ratio", "Tokens of the newest step that the trust region drops."),
    "truncated_share": ("truncated_ratio", "Rollouts of the newest step that were cut off."),
    "completion_tokens_mean": ("completion_mean_tokens", "Mean completion of the newest step."),
    "staleness_mean": ("staleness_mean_steps", "Mean age of the newest step's rollouts."),
    "staleness_max": ("staleness_max_steps", "Age of the newest step's oldest rollout."),
    "grad_norm": ("gradient_norm", "Of the newest step, before it is clipped."),
    "lr": ("learning_rate", "Of the newest step."),
    "elapsed_s": ("step_seconds", "Wall-clock time of the newest step."),
    "rollouts_per_s": ("step_rollouts_per_second", "Rollouts trained in the newest step's time."),
}
"""For fields of metrics.jsonl, the gauge's name without `onstream_`, and its help."""
OF_AN_EVALUATION = {
    "version": ("eval_policy_version", "The policy version of the newest evaluation."),
    "exact": ("eval_exact_ratio", "Held-out problems that it answers exactly right."),
    "reward": ("eval_reward", "Its mean reward on the held-out problems."),
}
"""The same for fields of evals.jsonl."""
OF_A_STAGE = {
    "stage_ready": ("ready", "1 where a stage is ready."),
    "backlog_records": ("backlog", "Records of a stage, waiting or in hand."),
    "pending_records": ("in_hand", "Records of a stage in the hands of workers."),
    "pending_oldest_seconds": ("oldest_in_hand_s", "Age of the oldest record in hand."),
}
"""For gauges by stage: the field in the stages of `onstream status`, and the help."""
OF_WORKERS = {
    "workers": ("workers", "Workers of a stage that live."),
    "workers_gone": ("gone", "Workers of a stage that died within the last hour."),
}
"""For gauges by stage: the list of workers in `onstream status` that is counted, and the help."""
DROPPED = ("stale", "other")
TIMES = {
    "handling": "Time of rollouts with the workers of a stage: means of steps, by their rollouts.",
    "queue": "Time of rollouts in the stream before a stage: means of steps, by their rollouts.",
}


def of_state(state: Mapping[str, Any]) -> Iterator[Metric]:
    """What `onstream status` says of a run, or what its files do where its Redis is away."""
    info = {"run": state["run"], "version": state["version"], "route": ",".join(state["route"])}
    yield InfoMetricFamily("onstream_run", "The run.", info)
    phases = GaugeMetricFamily(
        "onstream_run_phase", "1 for the phase that the run is in.", labels=["phase"]
    )
    for phase in get_args(Phase):
        phases.add_metric([phase], phase == state["phase"])
    yield phases
    yield _gauge("redis_up", "Whether the run's Redis answers.", "redis" not in state)
    if state["policy_version"] is not None:
        yield _gauge("policy_version", "The newest policy version.", state["policy_version"])
    if "redis" not in state:
        yield from _of_redis(state)


def _of_redis(state: Mapping[str, Any]) -> Iterator[Metric]:
    yield _counter("rollouts_issued", "Rollouts that were asked for.", state["issued"])
    yield _gauge("dead_letters", "Dead letters in Redis.", state["dead"])
    yield _gauge("images", "Images that Redis holds.", state["images"]["held"])
    yield _gauge("images_bytes", "Size of the images that Redis holds.", state["images"]["bytes"])
    waits = len(state["waits"])
    yield _gauge("waits", "Things that the run waits for; `onstream status` tells them.", waits)
    stages = state["stages"]
    for name, (field, help_text) in OF_A_STAGE.items():
        yield _by_stage(name, help_text, {stage: row[field] for stage, row in stages.items()})
    for name, (field, help_text) in OF_WORKERS.items():
        there = Counter(worker["stage"] for worker in state[field])
        yield _by_stage(name, help_text, {stage: there[stage] for stage in stages})
    tokens: dict[str, float] = defaultdict(float)
    for worker in state["workers"]:
        if teacher_of(worker["stage"]) is not None and "tokens" in worker["numbers"]:
            tokens[worker["stage"]] += worker["numbers"]["tokens"]
    if tokens:
        yield _by_stage("teacher_tokens", "Tokens that external teachers were sent.", tokens)


def of_steps(totals: StepTotals) -> Iterator[Metric]:
    """What the steps of a run add up to, and the figures of the newest one."""
    yield _counter("rollouts_trained", "Rollouts that steps trained on.", totals.sums["rollouts"])
    yield _counter("tokens_trained", "Tokens that steps trained on.", totals.sums["tokens"])
    yield _counter("rollouts_dead", "Rollouts that were given up.", totals.sums["dead"])
    yield _counter(
        "rollouts_unscored", "Trained rollouts that the scorer failed on.", totals.sums["unscored"]
    )
    dropped = CounterMetricFamily(
        "onstream_rollouts_dropped", "Rollouts that no step trained on.", labels=["reason"]
    )
    for reason in DROPPED:
        dropped.add_metric([reason], totals.sums[f"dropped_{reason}"])
    yield dropped
    waited = CounterMetricFamily(
        "onstream_trainer_waited_seconds", "Time the trainer waited for a stage.", labels=["stage"]
    )
    for stage, seconds in sorted(totals.waited_s.items()):
        waited.add_metric([stage], seconds)
    yield waited
    scored = CounterMetricFamily(
        "onstream_teacher_rollouts", "Trained rollouts that a teacher scored.", labels=["teacher"]
    )
    for teacher, rollouts in sorted(totals.scored_by.items()):
        scored.add_metric([teacher], rollouts)
    yield scored
    yield from _times(totals)
    yield from _of_row(OF_A_STEP, totals.newest)


def of_evaluation(newest: Row) -> Iterator[Metric]:
    """The newest evaluation on the held-out prompts, a row of evals.jsonl."""
    yield from _of_row(OF_AN_EVALUATION, newest)


def of_server(memory: Mapping[str, Any]) -> Iterator[Metric]:
    """The memory of the run's Redis, from its `INFO memory`."""
    used = memory["used_memory"]
    yield _gauge("redis_memory_used_bytes", "Memory that the run's Redis uses.", used)
    most = memory["maxmemory"]
    yield _gauge("redis_memory_max_bytes", "Memory that it may use; 0: all there is.", most)


def of_disk(free_bytes: int) -> Iterator[Metric]:
    """The room on the disk of the run's directory."""
    yield _gauge("disk_free_bytes", "Room on the disk of the run's directory.", free_bytes)


def _times(totals: StepTotals) -> Iterator[Metric]:
    for kind, help_text in TIMES.items():
        summary = SummaryMetricFamily(f"onstream_stage_{kind}_seconds", help_text, labels=["stage"])
        for (of_kind, stage), (seconds, count) in sorted(totals.times.items()):
            if of_kind == kind:
                summary.add_metric([stage], count_value=count, sum_value=seconds)
        yield summary


def _of_row(names: Mapping[str, tuple[str, str]], row: Row) -> Iterator[Metric]:
    """A gauge for each field of `names` that the row has a number in."""
    for field, (name, help_text) in names.items():
        if (value := number(row, field)) is not None:
            yield _gauge(name, help_text, value)


def _by_stage(name: str, help_text: str, values: Mapping[str, float | None]) -> Metric:
    """A gauge for each stage that has a value."""
    family = GaugeMetricFamily(f"onstream_{name}", help_text, labels=["stage"])
    for stage, value in values.items():
        if value is not None:
            family.add_metric([stage], float(value))
    return family


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"onstream_{name}", help_text, value=float(value))


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(f"onstream_{name}", help_text, value=value)
