"""What an environment rules out."""

from __future__ import annotations

from collections.abc import Iterator

from onstream.settings.problems import SettingsProblem, problem_with
from onstream.settings.root import Settings


def environment_gives_the_reward(settings: Settings) -> Iterator[SettingsProblem]:
    """Nothing scores an episode beside its environment."""
    if settings.task.environment is None:
        return
    if settings.orchestrator.verification.enabled:
        yield problem_with(
            settings,
            ["task.environment", "orchestrator.verification.enabled"],
            "no verifier: an environment gives the reward itself",
            "Leave orchestrator.verification.enabled out.",
        )
    if settings.task.scorer is not None:
        yield problem_with(
            settings,
            ["task.environment", "task.scorer"],
            "no scorer: an environment gives the reward itself",
            "Leave task.scorer out, and have the environment score the episode.",
        )


def episodes_are_the_students(settings: Settings) -> Iterator[SettingsProblem]:
    """A teacher writes answers, and no episodes."""
    if settings.task.environment is None:
        return
    if settings.orchestrator.teacher_rollout_model is not None:
        yield problem_with(
            settings,
            ["task.environment", "orchestrator.teacher_rollout_model.model.name"],
            "a student that writes the turns of its episodes itself",
            "Leave one of them out.",
        )


def episodes_show_no_images(settings: Settings) -> Iterator[SettingsProblem]:
    """There are none to swap."""
    if settings.task.environment is not None and settings.eval.swap_images:
        yield problem_with(
            settings,
            ["task.environment", "eval.swap_images"],
            "no swapped images: episodes show none",
            "Leave eval.swap_images out.",
        )


def episodes_have_one_prompt(settings: Settings) -> Iterator[SettingsProblem]:
    """A teacher reads an episode as it was played."""
    given = settings.task.teacher_prompt.given
    if settings.task.environment is not None and given:
        yield problem_with(
            settings,
            ["task.environment", *given],
            "no prompt of the teacher's own: it reads an episode as it was played",
            "Leave task.teacher_prompt out.",
        )


EPISODE_RULES = (
    environment_gives_the_reward,
    episodes_are_the_students,
    episodes_show_no_images,
    episodes_have_one_prompt,
)
