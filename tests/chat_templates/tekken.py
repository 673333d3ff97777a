"""Mistral's tekken file as tokenizer.json: `python -m tests.chat_templates.tekken FROM TO`."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTROL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
"""The control tokens in the order of their ids."""


def converted(tekken: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a tekken file: a token's id is its rank behind the control tokens."""
    config = tekken["config"]
    first = config["default_num_special_tokens"]
    count = config["default_vocab_size"] - first
    ranks = {base64.b64decode(token["token_bytes"]): at for at, token in _vocabulary(tekken, count)}
    signs = bytes_to_unicode()
    shown = {token: "".join(signs[byte] for byte in token) for token in ranks}
    vocabulary = {shown[token]: first + rank for token, rank in ranks.items()}
    vocabulary |= {token: at for at, token in enumerate(CONTROL)}
    merges = [(shown[left], shown[right]) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    split = pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL]
    )
    return tokenizer


def _vocabulary(tekken: dict[str, Any], count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for token in tekken["vocab"][:count]:
        yield token["rank"], token


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pairs that make each token, in the order of its rank."""
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    converted(json.loads(source.read_text())).save(str(target))
