"""What a task asks, as its student reads it: prompts, their lengths, and what is asked twice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from rich.console import Console
from rich.text import Text

from onstream.pipeline.images import ImageError, Message
from onstream.pipeline.models.tokenizer import load_configs, load_student_tokenizer
from onstream.pipeline.prompts import PromptBuilder, prompt_builder, render_prompt
from onstream.pipeline.records import Ids
from onstream.pipeline.tasks import Problem, load_task
from onstream.pipeline.tasks.base import FiniteTask
from onstream.settings.root import Settings
from onstream.workers.inspection.tables import add_row, plain_table

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHOWN_CHARACTERS = 1200
"""Of a prompt; of an answer a tenth."""
_FATE = {
    "trained on": "each becomes a dead letter",
    "held out": "an evaluation stops at the first",
}
"""What becomes of a prompt that the student cannot take."""


@dataclass(frozen=True)
class StudentReader:
    """Reads problems as the student does, without the student's weights."""

    tokenizer: Any
    builder: PromptBuilder
    template_arguments: dict[str, Any]

    def read(self, problem: Problem) -> tuple[str, int]:
        """The prompt as text, in which each image is one placeholder, and its tokens.

        Raises:
            TemplateError: the chat template refuses the problem.
            ImageError: one of its images cannot be used.
        """
        images = self.builder.images_of(problem.messages)
        text, ids = self._rendered(problem.messages)
        return text, len(self.builder.build(ids, problem.messages, images).ids)

    def teacher_reads(self, problem: Problem) -> tuple[str, int] | None:
        """The same of the teacher's own prompt; None where it reads the student's.

        Raises:
            TemplateError: the chat template refuses it.
        """
        if problem.teacher_messages is None:
            return None
        text, ids = self._rendered(problem.teacher_messages)
        return text, len(ids)

    def _rendered(self, messages: list[Message]) -> tuple[str, Ids]:
        ids = render_prompt(self.tokenizer, messages, self.template_arguments)
        text: str = self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        return text, ids


@dataclass(frozen=True)
class Lengths:
    """The tokens of prompts, and why others cannot be read."""

    tokens: list[int] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def summary(self) -> tuple[str, ...]:
        """How many there are, and the least, the median, the 95th percentile and the most."""
        ordered = sorted(self.tokens)
        if not ordered:
            return ("0", "", "", "", "")
        rank = (95 * len(ordered) + 99) // 100 - 1  # the least that 95 % do not exceed
        numbers = (len(ordered), ordered[0], median(ordered), ordered[rank], ordered[-1])
        return tuple(f"{number:,.0f}" for number in numbers)


def preview(settings: Settings, console: Console, *, prompts: int, sample: int) -> None:
    """Print the first `prompts` problems, and the lengths of `sample` of them.

    Raises:
        UserError: the task or the student's tokenizer cannot be used.
    """
    task = load_task(settings)
    name = settings.model.name
    tokenizer = load_student_tokenizer(name, settings.model)
    config, _ = load_configs(name)
    reader = StudentReader(
        tokenizer, prompt_builder(name, config, settings), settings.model.chat_template_kwargs
    )
    if isinstance(task, FiniteTask):
        sample = min(sample, task.size)
    trained = [task.train(index) for index in range(sample)]
    held_out = (task.held_out(index) for index in range(min(sample, task.held_out_size)))
    _line(console, f"{settings.task.name}, as {name} reads it", style="bold")
    for number, problem in enumerate(trained[:prompts], start=1):
        _print_prompt(console, number, problem, reader)
    lengths = {"trained on": _lengths(trained, reader), "held out": _lengths(held_out, reader)}
    _print_lengths(console, lengths | _teacher_lengths(trained, reader))
    _print_room(
        console, lengths, settings.inference.sampling.max_completion, _context(settings, config)
    )
    _print_problems(console, task, held_out=task.held_out_size)


def _lengths(problems: Iterable[Problem], reader: StudentReader) -> Lengths:
    lengths = Lengths()
    for problem in problems:
        try:
            lengths.tokens.append(reader.read(problem)[1])
        except (TemplateError, ImageError) as error:
            lengths.refused.append(str(error))
    return lengths


def _teacher_lengths(problems: Iterable[Problem], reader: StudentReader) -> dict[str, Lengths]:
    """The lengths of the teacher's own prompts; none where it reads the student's."""
    lengths = Lengths()
    for problem in problems:
        try:
            read = reader.teacher_reads(problem)
        except TemplateError as error:
            lengths.refused.append(str(error))
            continue
        if read is None:
            return {}
        lengths.tokens.append(read[1])
    return {"as the teacher reads them": lengths}


def _context(settings: Settings, config: PretrainedConfig) -> int | None:
    """The most tokens that prompt and completion may have; None where nothing bounds them."""
    model: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    bounds = [bound for bound in (model, settings.inference.max_model_len) if bound is not None]
    return min(bounds, default=None)


def _print_prompt(console: Console, number: int, problem: Problem, reader: StudentReader) -> None:
    try:
        text, tokens = reader.read(problem)
    except (TemplateError, ImageError) as error:
        _line(console, f"\nPrompt {number} cannot be read: {error}", style="red")
        return
    _line(console, f"\nPrompt {number}, {tokens:,} tokens", style="bold")
    _line(console, _cut(text, SHOWN_CHARACTERS))
    _print_teacher_prompt(console, number, problem, reader)
    if (answer := problem.info.get("answer")) is not None:
        _line(console, f"Its answer: {_cut(str(answer), SHOWN_CHARACTERS // 10)}", style="dim")


def _print_teacher_prompt(
    console: Console, number: int, problem: Problem, reader: StudentReader
) -> None:
    try:
        read = reader.teacher_reads(problem)
    except TemplateError as error:
        _line(console, f"\nThe teacher cannot read prompt {number}: {error}", style="red")
        return
    if read is not None:
        _line(
            console, f"\nPrompt {number} as the teacher reads it, {read[1]:,} tokens", style="bold"
        )
        _line(console, _cut(read[0], SHOWN_CHARACTERS))


def _print_lengths(console: Console, lengths: dict[str, Lengths]) -> None:
    table = plain_table("Tokens of prompts", "number", "least", "median", "95 %", "most")
    for column in table.columns[1:]:
        column.justify = "right"
    for which, each in lengths.items():
        add_row(table, which, *each.summary)
    console.print()
    console.print(table)


def _print_room(
    console: Console, lengths: dict[str, Lengths], longest: int, context: int | None
) -> None:
    """What becomes of prompts that leave less room than a completion may take, or none."""
    bound = (
        "; its configuration names no context"
        if context is None
        else f", and with its prompt up to {context:,}, the student's context"
    )
    _line(console, f"\nA completion has up to {longest:,} tokens{bound}.")
    for which, each in lengths.items():
        rooms = [] if context is None else [context - tokens for tokens in each.tokens]
        short = [room for room in rooms if 0 < room < longest]
        none = sum(room < 1 for room in rooms)
        if short:
            told = f"{len(short):,}; the first is cut off after {min(short):,} tokens"
            _line(console, f"Prompts {which} that leave less: {told}.", style="yellow")
        if none:
            told = f"{none:,}; {_FATE[which]}"
            _line(console, f"Prompts {which} that do not fit: {told}.", style="red")
        if each.refused:
            told = f"{len(each.refused):,}; {_FATE[which]}. The first: {each.refused[0]}"
            _line(console, f"Prompts {which} that cannot be read: {told}.", style="red")


def _print_problems(console: Console, task: object, *, held_out: int) -> None:
    table = plain_table("Problems", "number")
    table.columns[1].justify = "right"
    add_row(table, "held out", f"{held_out:,}")
    if isinstance(task, FiniteTask):
        repeats = task.repeats()
        add_row(table, "other rows", f"{repeats.rows:,}")
        add_row(
            table, "  that ask what a held-out one asks: not trained on", f"{repeats.held_out:,}"
        )
        add_row(
            table,
            "  that do so but for case and white space: trained on",
            f"{repeats.nearly_held_out:,}",
        )
        add_row(table, "  that ask what an earlier row asks", f"{repeats.earlier:,}")
    else:
        add_row(table, "to train on, drawn at random; none that is held out", "no end")
    console.print()
    console.print(table)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[:most]}… ({len(text) - most:,} more characters)"


def _line(console: Console, text: str, *, style: str = "") -> None:
    # As Text: rich reads square brackets as markup, and prompts have some.
    console.print(Text(text, style=style))
