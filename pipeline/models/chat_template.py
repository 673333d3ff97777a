"""Which variables a chat template reads, and how it ends an answer. Needs no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from onstream.pipeline.errors import UserError

NO_TEMPLATE = (
    "For a base student, set model.chat_template to the teacher's model id or directory, or to a "
    "Jinja file (docs/teachers.md has the recipe). Else use the instruction-tuned variant of the "
    "model, or add a chat_template.jinja to its directory."
)
"""What to do about a model without a chat template."""

ANSWER = "Yes, certainly"
ANSWERED_CHAT = [
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": ANSWER},
]


class GenerationTag(Extension):
    """The tag by which templates of transformers mark what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What is inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateRefusal(TemplateError):
    """What a template says of a conversation that it does not render."""


def tail_of_answer(template: str, variables: Mapping[str, Any]) -> str:
    """What `template` writes behind the last answer; empty where it cannot be rendered here."""
    try:
        text = rendered(template, ANSWERED_CHAT, variables) or ""
    except TemplateRefusal:
        return ""
    _, answer, tail = text.rpartition(ANSWER)
    return tail if answer else ""


def rendered(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str | None:
    """`messages` as text by `template`; None where it cannot be rendered here.

    Raises:
        TemplateRefusal: the template refuses them.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = str
    try:
        return environment.from_string(template).render(messages=messages, **variables)
    except TemplateRefusal:
        raise
    except Exception:  # templates raise anything: jinja's errors, TypeError, …
        return None


def refused_teacher_prompt(model: str, reason: str) -> UserError:
    """The error of a chat template that refuses what the teacher is to read, a system role say."""
    return UserError(
        f"the chat template of {model} refuses the teacher's prompt: {reason}",
        expected="a conversation that it renders: task.teacher_prompt.system is a system message, "
        "and each of task.teacher_prompt.examples a user's and an assistant's",
        next_step="Put the text into task.teacher_prompt.template instead.",
    )


def too_long_teacher_prompt(model: str, longest: int, context: int) -> UserError:
    """The error of a teacher whose `context` is less than the `longest` sample that it may read."""
    return UserError(
        f"the teacher {model} reads up to {longest} tokens, its own prompt and a completion, "
        f"and its context is {context}",
        expected="a prompt and a completion within it",
        next_step="Shorten task.teacher_prompt, or lower inference.sampling.max_completion.",
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def unread_arguments(template: str | Mapping[str, str], arguments: Mapping[str, Any]) -> list[str]:
    """The names among `arguments` that `template` reads nowhere.

    A model may have several templates, by name. None where a template does not parse: whoever
    renders it says so.
    """
    texts = [template] if isinstance(template, str) else list(template.values())
    environment = Environment(extensions=[GenerationTag, "jinja2.ext.loopcontrols"])
    read = set[str]()
    for text in texts:
        try:
            read |= find_undeclared_variables(environment.parse(text))
        except TemplateError:
            return []
    return [name for name in arguments if name not in read]


def unread_warning(setting: str, model: str, unread: Sequence[str]) -> str:
    """That variables of `setting` have no effect."""
    return f"{setting}: the chat template of {model} reads no {', '.join(unread)}"
