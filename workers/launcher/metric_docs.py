"""Every field of `metrics.jsonl`, `evals.jsonl` and `report.json`; writes docs/metrics.md of them.

`python -m onstream.workers.launcher.metric_docs`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"

_HEAD = """# Metrics and the report

Written by `python -m onstream.workers.launcher.metric_docs` from the tables in that module; edit
those.
"""


@dataclass(frozen=True)
class MetricField:
    """One field: its dotted name, the unit of its value, and what it says.

    `when` says under which conditions a run has it; nothing: always. A field that is there always
    may be null.
    """

    name: str
    unit: str
    doc: str
    when: str = ""


@dataclass(frozen=True)
class MetricFile:
    """One file of a run, and its fields."""

    name: str
    about: str
    fields: tuple[MetricField, ...]


_STEP = (
    MetricField("step", "", "The step, from 1."),
    MetricField("policy_version", "", "The version that the step made."),
    MetricField("time", "s", "When it was taken, in seconds since 1970."),
    MetricField("rollouts", "rollouts", "What it trained on."),
    MetricField("tokens", "tokens", "Loss-mask tokens of those."),
    MetricField(
        "loss",
        "nats/token",
        "The loss; the sum of the next three with `rl`. Means of this and the next are over the "
        "loss-mask tokens of the step ([objective.md](objective.md) has the formulas).",
    ),
    MetricField("loss_policy", "nats/token", "−keep · ratio · adv_tau · A."),
    MetricField(
        "loss_teacher",
        "nats/token",
        "The teacher's term: keep · ratio · teacher_tau · reverse_kl, or the sum over bins.",
    ),
    MetricField("loss_kl", "nats/token", "kl_tau · log_ratio²."),
    MetricField(
        "custom_…",
        "",
        "What a custom loss returns beside its loss.",
        when='`trainer.loss.type = "custom"`',
    ),
    MetricField(
        "teacher_kl",
        "nats/token",
        "`reverse_kl`, not clipped. **Lower is closer, zero is equal.** As a mean over samples it "
        "can be a little below zero. It is there whenever rollouts carry teacher logprobs, also "
        "with `teacher_tau = 0`.",
    ),
    MetricField(
        "teacher_kl_k3",
        "nats/token",
        "exp(−reverse_kl) − 1 + reverse_kl, the same in expectation on the student's own tokens, "
        "of lower variance and never negative (http://joschu.net/blog/kl-approx.html). Far from "
        "the teacher its exponential makes it large: read it when they are near.",
    ),
    MetricField(
        "entropy", "nats/token", "Of the student's distribution, at the sampling temperature."
    ),
    MetricField("ratio_mean", "ratio", "Mean importance ratio. On fresh rollouts it is 1."),
    MetricField("ratio_max", "ratio", "The largest importance ratio."),
    MetricField(
        "mismatch_mean",
        "nats",
        "Mean of \\|trainer − generator\\| over all tokens: the engine's numerical difference, and "
        "how far the weights have moved since.",
    ),
    MetricField("mismatch_max", "nats", "The largest of those."),
    MetricField(
        "mismatch_fresh_mean",
        "nats",
        "The same over the tokens that were written by the very version that takes the step: the "
        "engine's numerical difference alone. In float32 it stays below 1e-4; more is a fault of "
        "the engine. Null where no token is fresh.",
    ),
    MetricField("mismatch_fresh_max", "nats", "The largest of those."),
    MetricField(
        "mismatch_by_staleness",
        "nats",
        'The same for each staleness of a token, as `{"0": {"mean": …, "max": …, "tokens": …}, '
        "…}`. A token's staleness is the version that takes the step less the version of the span "
        "it is in; tokens that no policy wrote are left out.",
    ),
    MetricField("masked_share", "share", "Of the tokens, those that `keep` drops."),
    MetricField(
        "teacher_top_k",
        "tokens",
        "Of the teacher's likeliest tokens, those that a token was trained with, on average: 0 in "
        "the sampled form. Between two whole numbers some endpoint gives fewer than another.",
    ),
    MetricField(
        "tail_floored_share",
        "share",
        "Of the tokens, those whose tail was floored, with `teacher_top_k`.",
    ),
    MetricField("grad_norm", "gradient", "Of the step, before it is clipped."),
    MetricField("lr", "rate", "The step's learning rate."),
    MetricField("reward", "reward", "Mean of the rollouts that have one."),
    MetricField("reward_std", "reward", "Standard deviation of those."),
    MetricField("unscored", "rollouts", "Those that the scorer itself failed on."),
    MetricField("unscored_reason", "", "The commonest reason of those."),
    MetricField(
        "scored_by",
        "share",
        "Of the rollouts, those that each teacher scored, by the teacher's name or address.",
    ),
    MetricField(
        "teachers",
        "",
        'Where teachers have names, what each did, as `{"math": {"share": …, "kl": …, "latency_s": '
        "…}, …}`: its share of the rollouts, the generator's logprob less its own over their "
        "trained tokens (nats), and the mean time of a rollout with it (s). Null otherwise.",
    ),
    MetricField(
        "staleness_mean",
        "steps",
        "Mean age of the rollouts: the version that takes the step less the oldest one that wrote.",
    ),
    MetricField("staleness_max", "steps", "The oldest."),
    MetricField("completion_tokens_mean", "tokens", "Mean length of a completion."),
    MetricField(
        "turns_mean", "turns", "Mean of what the student wrote; 1 without `task.environment`."
    ),
    MetricField(
        "truncated_share",
        "share",
        "Of the rollouts, those that were cut at `inference.sampling.max_completion`.",
    ),
    MetricField("latency_generate_s", "s", "Mean time of a rollout with a generator."),
    MetricField(
        "latency_act_s",
        "s",
        "The same of a turn with an environment worker. Null without `task.environment`.",
    ),
    MetricField("latency_verify_s", "s", "The same with a verifier."),
    MetricField("latency_score_s", "s", "The same with a teacher."),
    MetricField(
        "queue_act_s",
        "s",
        "Mean time of a turn in the stream before the environment worker. Null without one.",
    ),
    MetricField("queue_verify_s", "s", "Mean time of a rollout in the stream before the verifier."),
    MetricField("queue_score_s", "s", "The same before the teacher."),
    MetricField("queue_train_s", "s", "The same before the trainer."),
    MetricField("dropped_stale", "rollouts", "Dropped since the step before, as too old."),
    MetricField(
        "dropped_other",
        "rollouts",
        "Dropped since the step before for another reason: not right with `keep = "
        '"verified"`, alone of their group, or purged.',
    ),
    MetricField("dead", "rollouts", "Given up since the step before: dead letters."),
    MetricField("wait_s", "s", "How long the trainer waited for the batch."),
    MetricField(
        "waited_for",
        "s",
        "Of that, the seconds that the rollout which came last spent with each stage or in the "
        "stream before it. `train`: on its way to the trainer, and with it.",
    ),
    MetricField(
        "step_s",
        "s",
        "From the whole batch until the trainer goes on: the new version is published, or, from "
        "32 MiB on, on its way.",
    ),
    MetricField(
        "publish_wait_s",
        "s",
        "Of that, how long the trainer waited for publishing: of this version where it is small, "
        "of the one before where that was still on its way.",
    ),
    MetricField(
        "checkpoint_wait_s",
        "s",
        "How long the trainer stood still for checkpoints since the step before: while a small one "
        "was written; of a large one, until it was begun, and where its copy was not made yet when "
        "this step changed the weights.",
    ),
    MetricField(
        "publish_s", "s", "Publishing, from the copy of the weights to their announcement."
    ),
    MetricField("publish_bytes", "bytes", "Size of the update."),
    MetricField("delta_share", "share", "Of the weights, those that changed; null without deltas."),
    MetricField("tokens_per_s", "tokens/s", "`tokens` over the time of learning."),
    MetricField(
        "elapsed_s",
        "s",
        "Wall-clock time of the step. It begins when the step before is done; for the first after "
        "a start, when all stages are ready and the first ticket is issued.",
    ),
    MetricField("rollouts_per_s", "rollouts/s", "`rollouts` over `elapsed_s`."),
    MetricField(
        "eval_version",
        "",
        "The version of the newest evaluation that ended since the step before.",
        when="`eval.interval`",
    ),
    MetricField("eval_exact", "share", "Its exact answers.", when="`eval.interval`"),
    MetricField("eval_reward", "reward", "Its mean reward.", when="`eval.interval`"),
)

_EVALUATION = (
    MetricField("version", "", "The policy version."),
    MetricField("time", "s", "When it was evaluated, in seconds since 1970."),
    MetricField("exact", "share", "Of the held-out problems, those with a reward of 1 or more."),
    MetricField("reward", "reward", "Mean of those that were scored; null if none was."),
    MetricField("samples", "problems", "The held-out problems."),
    MetricField(
        "unscored", "problems", "Those that the scorer or the environment itself failed on."
    ),
    MetricField("seconds", "s", "How long it took."),
    MetricField(
        "exact_swapped",
        "share",
        "Answers that are right although another problem's images are shown.",
        when="`eval.swap_images`",
    ),
    MetricField(
        "samples_swapped", "problems", "The problems that show images.", when="`eval.swap_images`"
    ),
    MetricField("turns", "turns", "Mean of an episode.", when="`task.environment`"),
    MetricField(
        "tool_calls",
        "calls",
        "Mean of an episode: calls that were answered.",
        when="`task.environment`",
    ),
)

_REPORT = (
    MetricField("steps", "steps", "Steps taken."),
    MetricField("seconds", "s", "Wall-clock time of training: the sum of `elapsed_s`."),
    MetricField("rollouts", "rollouts", "Rollouts trained on."),
    MetricField("rollouts_per_s", "rollouts/s", "`rollouts` over `seconds`."),
    MetricField("tokens", "tokens", "Loss-mask tokens trained on."),
    MetricField("eval.before", "share", "Exact answers of version 0."),
    MetricField("eval.after", "share", "Exact answers of the last version evaluated."),
    MetricField("eval.version", "", "That version."),
    MetricField("eval.samples", "problems", "The held-out problems."),
    MetricField("eval.reward", "reward", "`before` and `after` as mean rewards.", when="a scorer"),
    MetricField(
        "eval.swapped",
        "share",
        "`before` and `after` with another problem's images.",
        when="`eval.swap_images`",
    ),
    MetricField("evals", "", "`version`, `exact` (and `exact_swapped`) of each evaluation."),
    MetricField("teacher_kl", "nats/token", "`first` step, and the mean of the `last` 10 steps."),
    MetricField("reward", "reward", "The same of the rollouts trained on."),
    MetricField("loss", "nats/token", "The same of the loss."),
    MetricField("staleness", "steps", "`mean` and `max` over all steps."),
    MetricField("masked_share", "share", "Mean over the steps."),
    MetricField("truncated_share", "share", "Mean over the steps."),
    MetricField("mismatch_max", "nats", "The largest of all steps."),
    MetricField(
        "mismatch_by_staleness",
        "nats",
        "Of each staleness the `mean` and `max` over the tokens of all steps, and their number.",
    ),
    MetricField("wait_share", "share", "Of `seconds`, those that the trainer waited for rollouts."),
    MetricField("waited_for", "share", "Of `seconds`, those that it waited for each stage."),
    MetricField("publish_bytes", "bytes", "Mean size of an update."),
    MetricField("delta_share", "share", "Mean share of weights that changed; null without deltas."),
    MetricField("unscored.rollouts", "rollouts", "Trained rollouts that the scorer failed on."),
    MetricField("unscored.reason", "", "The commonest reason in the last step with such."),
    MetricField("dropped.stale", "rollouts", "Dropped as too old."),
    MetricField("dropped.other", "rollouts", "Dropped for another reason."),
    MetricField("dead", "rollouts", "Given up."),
    MetricField("dead_letters", "", "How many there are of each `stage` and `reason`."),
    MetricField(
        "steps_without_gradient", "steps", "Steps whose gradient was 0: nothing was learned."
    ),
    MetricField(
        "cpu_seconds",
        "s",
        "CPU time of each kind of process after the first step.",
        when="`onstream up`",
    ),
    MetricField(
        "cores_busy",
        "share",
        "Of the time of this machine's cores after the first step, what the run's processes used.",
        when="`onstream up`",
    ),
    MetricField(
        "one_more_worker",
        "rollouts/s",
        "What one more worker of a stage may at most give: without the share of the waiting that "
        "it would take over, and with no more time of the cores than there is.",
        when="`onstream up`",
    ),
    MetricField(
        "balance",
        "",
        'What `deployment.balance = "auto"` did, a worker each: the `stage`, its `workers` with '
        "that one, the rollouts/s that were `predicted`, those `before` and `after` (null where "
        "the run ended first), and whether it was `kept`.",
        when="`onstream up`",
    ),
    MetricField(
        "cpu_seconds_startup",
        "s",
        "CPU time of each kind of process before that.",
        when="`onstream up`",
    ),
)

FILES = (
    MetricFile(
        "metrics.jsonl",
        "A line for each step, which the trainer writes. A field is null where the step has no "
        "such value: where the loss does not read what it needs, or no rollout has one.",
        _STEP,
    ),
    MetricFile("evals.jsonl", "A line for each evaluation on the held-out prompts.", _EVALUATION),
    MetricFile("report.json", "What the run came to, written at its end.", _REPORT),
)


def text() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(f"{_section(file)}\n" for file in FILES)])


def _section(file: MetricFile) -> str:
    rows = ["| Field | Unit | Meaning | Only with |", "|---|---|---|---|"]
    rows += [f"| `{one.name}` | {one.unit} | {one.doc} | {one.when} |" for one in file.fields]
    return f"## {file.name}\n\n{file.about}\n\n" + "\n".join(rows)


def main() -> None:
    """Write the page."""
    PAGE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
