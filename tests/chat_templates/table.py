"""Writes docs/chat-templates.md from the expectations: `python -m tests.chat_templates.table`."""

from __future__ import annotations

from pathlib import Path

from tests.chat_templates import FAMILIES, expected_of
from tests.chat_templates.chats import QUESTION

PAGE = Path(__file__).parents[2] / "docs" / "chat-templates.md"
HEAD = """\
# Chat templates

What [hard distillation](hard-distillation.md#from-text-to-the-students-tokens) makes of a teacher's
answer with the templates of these families. Written by `python -m tests.chat_templates.table` from
expectations that were read through, token by token, and that the tests compare with what is
trained: [tests/chat_templates](../tests/chat_templates/README.md) has them, and where the templates
are from. In each family an answer, with and without a system message, cut off, and in several
turns, is trained on exactly, and its prompt has the tokens that the student gets. For fourteen of
them what is trained of several turns, tool calls and reasoning was also worked out by hand, from
the text of the template alone (`tests/chat_templates/by_hand.py`), and is the same.

- **prompt ends in**: the end of what the student reads; `⏎` is a newline. Everything behind it is
  trained, up to the end of the turn.
- **reasoning**: what becomes of reasoning that the endpoint returns beside the answer. Without a
  place for it, it is left out, with a warning.
- **tool call**, **text and call**, **two calls**: trained, or a
  [dead letter](troubleshooting.md#the-students-template-drops-a-part-of-the-teachers-answer).

| template | prompt ends in | reasoning | tool call | text and call | two calls |
|---|---|---|---|---|---|
"""
CALLS = ("a tool call", "a tool call after text", "two tool calls")


def page() -> str:
    """The page as it should be."""
    return HEAD + "".join(_row(name) for name in FAMILIES)


def _row(name: str) -> str:
    chats = expected_of(name)
    prompt_end = chats["an answer"][0].partition("▸")[0].removeprefix(QUESTION)
    reasoning = "trained" if "4" in chats["reasoning"][0].partition("▸")[2] else "left out"
    calls = [_outcome(chats[chat]) for chat in CALLS]
    escaped = prompt_end.replace("|", "\\|")
    return f"| {name} | `{escaped}` | {reasoning} | {' | '.join(calls)} |\n"


def _outcome(lines: list[str]) -> str:
    return "dead letter" if lines[0].startswith("refused") else "trained"


if __name__ == "__main__":
    PAGE.write_text(page())
