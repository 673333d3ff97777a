"""`[task]` and `[eval]`: what the student is asked, how answers are scored, and how progress is
measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from onstream.settings.base import CHANGEABLE, RUN, WORKER, Section, Unit
from onstream.settings.prompt_template import template_fields


def _question_and_answer(example: dict[str, str]) -> dict[str, str]:
    if set(example) != {"prompt", "answer"}:
        raise ValueError("a table with `prompt` and `answer`")
    return example


Example = Annotated[dict[str, str], AfterValidator(_question_and_answer)]
"""A question with its answer."""


def _with_fields(template: str) -> str:
    template_fields(template)
    return template


Template = Annotated[str, Field(min_length=1), AfterValidator(_with_fields)]
"""A text with names in braces."""


class TeacherPromptSettings(Section):
    """What the teacher reads in place of the student's prompt, where any of this is set: the same
    completion behind a prompt that says more (docs/teacher-prompt.md).
    """

    system: Annotated[str | None, RUN, Field(min_length=1)] = None
    """The system message that the teacher reads. Unset: the student's, where there is one."""
    examples: Annotated[tuple[Example, ...], RUN, Field(max_length=64)] = ()
    """Questions with answers, such as `[{ prompt = "1 + 1", answer = "2" }]`, which the teacher
    reads as earlier turns of the conversation."""
    template: Annotated[Template | None, RUN] = None
    """The teacher's last message. `{prompt}` stands for the student's, `{answer}` for the problem's
    answer, and another name in braces for that column or key of the row. Braces that are part of
    the text are written twice. Unset: the student's message as it is."""

    @property
    def differs(self) -> bool:
        """Whether the teacher reads another prompt than the student."""
        return bool(self.given)

    @property
    def given(self) -> list[str]:
        """The names of the settings that are set."""
        values = {"system": self.system, "examples": self.examples, "template": self.template}
        return [f"task.teacher_prompt.{name}" for name, value in values.items() if value]


class TaskSettings(Section):
    """The prompts and their scorer."""

    name: Annotated[str, RUN, Field(min_length=1)] = "reverse-text"
    """`reverse-text`, `alphabet-sort`, `arithmetic`, `colour-words`, `reasoning-gym:<dataset>`,
    `jsonl`, or `hf:<path>` (a Hugging Face dataset)."""
    path: Annotated[Path | None, WORKER] = None
    """The file of a `jsonl` task: one object a line, with `messages` (or `prompt`) and `answer`."""
    eval_path: Annotated[Path | None, WORKER] = None
    """The held-out file of a `jsonl` task, or of an `hf:` task over a local file. Unset: the last
    `eval.samples` lines or rows, which are then not trained on.
    """
    split: Annotated[str, RUN, Field(min_length=1)] = "train"
    """The split of a Hugging Face dataset."""
    prompt_field: Annotated[str, RUN, Field(min_length=1)] = "prompt"
    """The column or key that holds the prompt where there is no `messages`."""
    answer_field: Annotated[str, RUN, Field(min_length=1)] = "answer"
    """The column or key that holds the answer."""
    scorer: Annotated[
        str | None,
        RUN,
        Field(pattern=r"^(math|number|choice|json-schema|regex|code|judge|[\w.]+:[\w.]+)$"),
    ] = None
    """Instead of the task's own scorer: `math`, `number`, `choice`, `json-schema` or `regex`, which
    compare a completion with the problem's answer (docs/tasks.md); `code`, which runs the
    completion's program against the problem's `tests` in a sandbox; `judge`, a model that scores
    it by a rubric (`orchestrator.judge_model`); or an importable function
    `module:function(completion: str, info: dict) -> float | dict[str, float]`."""
    args: Annotated[dict[str, Any], RUN] = Field(default_factory=dict)
    """Arguments of the task, such as `min_length` and `max_length` of `reverse-text`, or a
    reasoning-gym dataset's configuration.
    """
    system_prompt: Annotated[str | None, RUN] = None
    """A system message put before each prompt."""
    environment: Annotated[str | None, RUN, Field(pattern=r"^([a-z-]+|[\w.]+:[\w.]+)$")] = None
    """Play an episode of several turns on each problem: `calculator`, `sort-turns`, or a class or
    function of yours, `module:name`, that makes an environment (docs/environments.md). It gives the
    reward.
    """
    max_turns: Annotated[int, RUN, Unit("turns"), Field(ge=1, le=100)] = 8
    """With an environment: the most turns of the student in an episode, which then ends."""
    max_episode: Annotated[int, RUN, Unit("tokens"), Field(ge=1, le=1 << 20)] = 4096
    """With an environment: the most tokens of an episode after its first prompt, those of the
    environment included. The episode ends where the next turn would have none left.
    """
    teacher_prompt: TeacherPromptSettings = TeacherPromptSettings()


class EvalSettings(Section):
    """Evaluation on held-out prompts, greedy: before and after the run, and in its course where
    asked for.
    """

    samples: Annotated[int, RUN, Unit("prompts"), Field(ge=0, le=10**6)] = 256
    """Held-out prompts; 0 turns evaluation off. They never overlap with the prompts trained on."""
    interval: Annotated[int, CHANGEABLE, Unit("steps"), Field(ge=0, le=10**9)] = 0
    """Evaluate every so many steps too, beside the training, by a jobs worker; 0 does not."""
    swap_images: Annotated[bool, CHANGEABLE] = False
    """Ask each held-out prompt a second time, with the images of another one that has another
    answer. `exact_swapped` is the share that is still exact: near 0, or at chance, for a student
    that looks; as high as `exact` for one that does not. For tasks that show images."""
