"""Texts with names in braces, such as `{prompt}`, and what stands in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter

_NAME = re.compile(r"[^\W\d]\w*")


def template_fields(template: str) -> list[str]:
    """The names in braces, each once, in their order.

    >>> template_fields("{prompt} Its answer is {answer}. Write {{x}}, then {prompt}")
    ['prompt', 'answer']

    Raises:
        ValueError: braces hold something else than a name, or are not closed.
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError:
        raise ValueError(f"every brace closed; {_ADVICE}") from None
    names = []
    for _, name, form, conversion in pieces:
        if name is None:
            continue
        if form or conversion or not _NAME.fullmatch(name):
            shown = (
                f"{name}{'!' if conversion else ''}{conversion or ''}{':' if form else ''}{form}"
            )
            raise ValueError(f"a name in braces, which {{{shown}}} is not; {_ADVICE}")
        names.append(name)
    return list(dict.fromkeys(names))


_ADVICE = "braces that are part of the text are written twice, as in \\boxed{{x}}"


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with the values of its fields, all of which `values` has."""
    return Formatter().vformat(template, (), values)
