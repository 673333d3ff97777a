"""What is trained in real templates is what the templates' text says, worked out by hand."""

from __future__ import annotations

from itertools import groupby

import pytest

from onstream.workers.generator.reconstruction import (
    ReconstructedSample,
    ReconstructionError,
    Reconstructor,
)
from tests.chat_templates import FAMILIES
from tests.chat_templates.by_hand import CHATS, MARKED

CASES = [(family, chat) for family, chats in MARKED.items() for chat in chats]


@pytest.mark.parametrize(("family_name", "chat_name"), CASES)
def test_exactly_the_marked_characters_are_trained(family_name: str, chat_name: str) -> None:
    family = FAMILIES[family_name]
    tokenizer = family.load()
    stop_ids = set(tokenizer.convert_tokens_to_ids(list(family.ends)))
    reconstructor = Reconstructor(tokenizer, stop_ids, family.arguments)
    chat = CHATS[chat_name]
    expected = MARKED[family_name][chat_name]
    if isinstance(expected, str):
        with pytest.raises(ReconstructionError) as refusal:
            reconstructor.samples(chat.prompt, chat.written)
        assert str(refusal.value) == expected
        return
    samples = reconstructor.samples(chat.prompt, chat.written)
    assert len(samples) == len(expected)
    for sample, line in zip(samples, expected, strict=True):
        found = marked(tokenizer, sample)
        if line.startswith("…"):
            found = "…" + found[-len(line) + 1 :]
        assert found == line


def marked(tokenizer: object, sample: ReconstructedSample) -> str:
    """The sample as text, with `⟦` and `⟧` around what is trained."""
    decode = tokenizer.decode  # type: ignore[attr-defined]
    text: str = decode(sample.prompt_ids.tolist())
    tokens = zip(sample.completion_ids.tolist(), sample.loss_mask.tolist(), strict=True)
    for trained, run in groupby(tokens, key=lambda token: token[1]):
        part = decode([token for token, _ in run])
        text += f"⟦{part}⟧" if trained else part
    return text.replace("\n", "⏎")
