"""Rules between the settings of what is trained on, and how."""

from __future__ import annotations

from collections.abc import Iterator

from onstream.settings.fields import known
from onstream.settings.problems import SettingsProblem, problem_with
from onstream.settings.root import Settings
from onstream.settings.route import rewards_on, verification_on


def whole_groups(settings: Settings) -> Iterator[SettingsProblem]:
    """A batch is whole groups."""
    batch = settings.orchestrator.batch_size
    group = settings.orchestrator.group_size
    if batch % group:
        nearest = max(group, round(batch / group) * group)
        yield problem_with(
            settings,
            ["orchestrator.batch_size", "orchestrator.group_size"],
            "a batch of whole groups",
            f"Set orchestrator.batch_size = {nearest}.",
        )


def reward_bounds(settings: Settings) -> Iterator[SettingsProblem]:
    """Some reward is within the bounds."""
    verification = settings.orchestrator.verification
    if verification.min_reward >= verification.max_reward:
        names = ("min_reward", "max_reward")
        yield problem_with(
            settings,
            [f"orchestrator.verification.{name}" for name in names],
            "a least reward below the greatest",
            "Correct one of them.",
        )


def judge(settings: Settings) -> Iterator[SettingsProblem]:
    """There is a judge where answers are judged, and it is told what to look for."""
    found = settings.orchestrator.judge_model
    judged = settings.task.scorer == "judge"
    if judged and found is None:
        yield problem_with(
            settings,
            ["task.scorer"],
            "a judge: orchestrator.judge_model, with a rubric, a model.name and a client.base_url",
            "Set them, or another task.scorer.",
        )
    if found is not None and not judged:
        yield problem_with(
            settings,
            ["task.scorer", "orchestrator.judge_model.model.name"],
            'the scorer "judge", which alone asks a judge',
            'Set task.scorer = "judge", or leave orchestrator.judge_model out.',
        )
    if found is not None and not found.rubric.strip():
        yield problem_with(
            settings,
            ["orchestrator.judge_model.rubric"],
            "what makes an answer good, in words",
            "Set orchestrator.judge_model.rubric.",
        )


def learning_signal(settings: Settings) -> Iterator[SettingsProblem]:
    """There is a teacher or a reward to learn from."""
    loss = settings.trainer.loss
    has_rewards = rewards_on(settings)
    rewarded = loss.needs_reward and has_rewards
    turned_off = settings.orchestrator.verification.enabled is False and not has_rewards
    if loss.needs_reward and turned_off:
        yield problem_with(
            settings,
            ["orchestrator.verification.enabled", loss.REWARD_SETTING],
            "rewards for the advantage to come from",
            f"{loss.WITHOUT_REWARD}, or enable verification.",
        )
    elif loss.teaches_own_rollouts and not loss.needs_teacher and not rewarded:
        stages = ["deployment.stages"] if settings.deployment.stages else []
        yield problem_with(
            settings,
            [*dict.fromkeys([loss.TEACHER_SETTING, loss.REWARD_SETTING]), *stages],
            "a teacher or rewards to learn from",
            f"{loss.LEARN_FROM}.",
        )
    elif rewarded and settings.orchestrator.group_size == 1:
        yield problem_with(
            settings,
            ["orchestrator.group_size", loss.REWARD_SETTING],
            "at least 2 rollouts a group, whose mean is the baseline of the advantage",
            f"Set orchestrator.group_size = 4. Or: {loss.WITHOUT_REWARD}.",
        )


def sampling_temperature(settings: Settings) -> Iterator[SettingsProblem]:
    """The sampled teacher term needs temperature 1."""
    sampling = settings.inference.sampling
    loss = settings.trainer.loss
    if not loss.reads_generator:
        return
    if sampling.temperature != 1 and loss.needs_temperature_1:
        yield problem_with(
            settings,
            [
                "inference.sampling.temperature",
                "trainer.loss.teacher_tau",
                "trainer.loss.teacher_top_k",
            ],
            "temperature 1 with the sampled teacher term, as the teacher judges at temperature 1",
            "Set inference.sampling.temperature = 1.0, or trainer.loss.teacher_top_k = 4.",
        )


def sampled_divergence(settings: Settings) -> Iterator[SettingsProblem]:
    """The sampled teacher term is the reverse KL's."""
    loss = settings.trainer.loss
    if loss.needs_bins and not loss.needs_top_k:
        yield problem_with(
            settings,
            ["trainer.loss.teacher_divergence", "trainer.loss.teacher_top_k"],
            'the reverse KL ("reverse") with the sampled teacher term, or teacher_top_k > 0',
            "Set trainer.loss.teacher_top_k = 4.",
        )


def hard_distillation(settings: Settings) -> Iterator[SettingsProblem]:
    """A teacher's completions are trained on by a loss for them, and by that alone."""
    loss = settings.trainer.loss
    source = settings.orchestrator.teacher_rollout_model
    if source is None and not loss.teaches_own_rollouts:
        yield problem_with(
            settings,
            ["trainer.loss.type", "orchestrator.teacher_rollout_model.model.name"],
            "a teacher whose completions are trained on: the student's own teach it nothing",
            'Set orchestrator.teacher_rollout_model, or trainer.loss.type = "rl".',
        )
    if source is not None and (loss.reads_generator or loss.reads_teacher):
        yield problem_with(
            settings,
            ["orchestrator.teacher_rollout_model.model.name", "trainer.loss.type"],
            'the loss "sft", since what the teacher wrote has no importance ratios',
            'Set trainer.loss.type = "sft", or leave orchestrator.teacher_rollout_model out.',
        )
    if source is not None and source.keep == "verified" and not verification_on(settings):
        yield problem_with(
            settings,
            [
                "orchestrator.teacher_rollout_model.keep",
                "orchestrator.verification.enabled",
                "deployment.stages",
            ],
            "verification, to know which completions are right",
            "Set orchestrator.verification.enabled = true, or "
            'orchestrator.teacher_rollout_model.keep = "all".',
        )


def token_client(settings: Settings) -> Iterator[SettingsProblem]:
    """Completions are token ids where the student writes them, and text where a teacher does."""
    tokens = settings.orchestrator.use_token_client
    source = settings.orchestrator.teacher_rollout_model
    names = ["orchestrator.use_token_client", "orchestrator.teacher_rollout_model.model.name"]
    if tokens and source is not None:
        yield problem_with(
            settings,
            names,
            "chat messages with a teacher_rollout_model, whose token ids are not the student's",
            "Set orchestrator.use_token_client = false.",
        )
    if not tokens and source is None:
        yield problem_with(
            settings,
            names,
            "token ids, since the student itself writes the rollouts",
            "Leave orchestrator.use_token_client out, or set orchestrator.teacher_rollout_model.",
        )


def adapter_dropout(settings: Settings) -> Iterator[SettingsProblem]:
    """Importance ratios compare whole models."""
    adapter = settings.trainer.lora
    loss = settings.trainer.loss
    if adapter is not None and adapter.dropout > 0 and loss.reads_generator:
        yield problem_with(
            settings,
            ["trainer.lora.dropout", "trainer.loss.type"],
            f"no dropout with {loss.type}: the ratios would compare a model with parts left out "
            "to the generator's whole one",
            "Leave trainer.lora.dropout out.",
        )


def muon_states(settings: Settings) -> Iterator[SettingsProblem]:
    """Muon keeps its moment beside the weights."""
    optim = settings.trainer.optim
    if optim.type == "muon" and optim.states != "device":
        yield problem_with(
            settings,
            ["trainer.optim.type", "trainer.optim.states"],
            'moments beside the weights ("device") with Muon, which has half as many',
            'Leave trainer.optim.states out, or set trainer.optim.type = "adamw".',
        )


def task_files(settings: Settings) -> Iterator[SettingsProblem]:
    """A `jsonl` task has a file, and no other task has one; local data may have one to hold out."""
    name = settings.task.name
    if name == "jsonl" and settings.task.path is None:
        yield problem_with(
            settings, ["task.name", "task.path"], "the file of the jsonl task", "Set task.path."
        )
    if name != "jsonl" and settings.task.path is not None:
        yield problem_with(
            settings,
            ["task.name", "task.path"],
            "no task.path, which only a jsonl task reads",
            "Leave task.path out; of a Parquet or CSV file, task.name is hf:<path>.",
        )
    if name != "jsonl" and not name.startswith("hf:") and settings.task.eval_path is not None:
        yield problem_with(
            settings,
            ["task.name", "task.eval_path"],
            "no task.eval_path, which only tasks over files read",
            "Leave task.eval_path out.",
        )


def held_out_prompts(settings: Settings) -> Iterator[SettingsProblem]:
    """Evaluations have prompts."""
    if settings.eval.interval and not settings.eval.samples:
        yield problem_with(
            settings,
            ["eval.interval", "eval.samples"],
            "held-out prompts to evaluate on",
            "Set eval.samples = 256.",
        )


def hard_distillation_warnings(settings: Settings) -> Iterator[str]:
    """What hard distillation does not read."""
    if settings.orchestrator.teacher_rollout_model is None:
        return
    temperature = known()["inference.sampling.temperature"]
    if temperature.value(settings) != temperature.default:
        yield (
            f"{temperature.name} has no effect: the completions are those of "
            "orchestrator.teacher_rollout_model."
        )


TRAINING_RULES = (
    whole_groups,
    reward_bounds,
    judge,
    learning_signal,
    sampling_temperature,
    sampled_divergence,
    hard_distillation,
    token_client,
    adapter_dropout,
    muon_states,
    task_files,
    held_out_prompts,
)
