"""What a teacher reads in place of the student's prompt, by `task.teacher_prompt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onstream.pipeline.tasks.base import Message
from onstream.settings.prompt_template import fill, template_fields
from onstream.settings.sections.task import TeacherPromptSettings

PROMPT = "prompt"
"""The field that stands for the student's last message."""


class TeacherPromptError(ValueError):
    """A problem of which no teacher's prompt can be made: what it holds, and what was expected."""

    def __init__(self, got: str, *, expected: str) -> None:
        self.got = got
        self.expected = expected
        super().__init__(f"{got}; expected {expected}")


class TeacherPrompt:
    """Makes the messages that the teacher reads of those that the student reads.

    student                              teacher
    system: Be brief.                    system: as the student's, or `system`
                                         user, assistant: each of `examples`
    user: 1 + 1?                         user: 1 + 1?
    assistant: 2.                        assistant: 2.
    user: 2 + 2?                         user: `template`, in which {prompt} is 2 + 2?
    """

    def __init__(self, settings: TeacherPromptSettings) -> None:
        self._settings = settings
        self._template = settings.template
        self._fields = template_fields(settings.template or "")
        self._examples = [
            message
            for example in settings.examples
            for message in (
                {"role": "user", "content": example["prompt"]},
                {"role": "assistant", "content": example["answer"]},
            )
        ]

    def messages(
        self, student: Sequence[Message], fields: Mapping[str, Any]
    ) -> list[Message] | None:
        """What the teacher reads where the student reads `student`; None where it is the same.

        Args:
            student: the conversation, up to where the student answers.
            fields: the values that the template may name.

        Raises:
            TeacherPromptError: a message has parts, such as images, or a field is no text or
                number.
        """
        if not self._settings.differs:
            return None
        for message in student:
            if not isinstance(message["content"], str):
                raise TeacherPromptError(
                    "a message has parts, which may be images",
                    expected="texts alone, since the teacher is to read another prompt "
                    "(task.teacher_prompt)",
                )
        system = [message for message in student[:1] if message["role"] == "system"]
        *earlier, last = student[len(system) :]
        if self._settings.system is not None:
            system = [{"role": "system", "content": self._settings.system}]
        return [*system, *self._examples, *earlier, self._filled(last, fields)]

    def _filled(self, last: Message, fields: Mapping[str, Any]) -> Message:
        if self._template is None:
            return last
        values = {name: _text(name, fields) for name in self._fields if name != PROMPT}
        return {**last, "content": fill(self._template, {**values, PROMPT: last["content"]})}


def _text(name: str, fields: Mapping[str, Any]) -> str:
    value = fields.get(name)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    got = f"is {str(value)[:100]!r}" if name in fields else "is missing"
    known = ", ".join(sorted({PROMPT, *map(str, fields)}))
    raise TeacherPromptError(
        f"`{name}`, which task.teacher_prompt.template shows, {got}",
        expected=f"a text or a number (names here: {known})",
    )
