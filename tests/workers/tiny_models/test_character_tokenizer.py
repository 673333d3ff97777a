from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from onstream.pipeline.models.tokenizer import load_tokenizer
from onstream.workers.tiny_models.character_tokenizer import (
    CONTEXT_TOKENS,
    VOCABULARY_SIZE,
    character_tokenizer,
    characters,
)

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Reverse: ab\ncd"}]


def test_every_printable_character_and_the_newline_is_one_token_and_comes_back() -> None:
    tokenizer = character_tokenizer()
    text = "".join(characters()) + "  two  spaces , kept ."
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_the_vocabulary_is_full_and_the_end_of_a_turn_is_the_end_of_the_sequence() -> None:
    tokenizer = character_tokenizer()
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY_SIZE))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.unk_token_id)


def test_a_character_outside_ascii_is_unknown_and_not_dropped() -> None:
    tokenizer = character_tokenizer()
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]


def test_a_conversation_has_two_tokens_before_each_turn_and_one_after() -> None:
    tokenizer = character_tokenizer()
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|><|system|>Be brief.<|im_end|>"
        "<|im_start|><|user|>Reverse: ab\ncd<|im_end|>"
        "<|im_start|><|assistant|>"
    )
    assert len(tokenizer(text).input_ids) == 3 + len("Be brief.") + 3 + len("Reverse: ab\ncd") + 2


@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, load_tokenizer])
def test_what_it_saves_loads_as_the_same_tokenizer(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    saved = character_tokenizer()
    saved.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.get_vocab() == saved.get_vocab()
    assert loaded.apply_chat_template(TURNS, tokenize=False) == saved.apply_chat_template(
        TURNS, tokenize=False
    )
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (
        saved.eos_token_id,
        saved.pad_token_id,
        CONTEXT_TOKENS,
    )
    assert loaded.decode(loaded("a b  c").input_ids) == "a b  c"
