"""Trims a tokenizer to what some texts need: `python -m tests.chat_templates.trim FROM TO TEXTS`.

What is left gives those texts the same ids. Every other text has ids too, of shorter tokens.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


def trimmed(tokenizer: dict[str, Any], text: str) -> dict[str, Any]:
    """`tokenizer.json` with the merges that words of `text` may need; ids are as they were."""
    parts = _parts_of_words(Tokenizer.from_str(json.dumps(tokenizer)), tokenizer, text)
    vocabulary = tokenizer["model"]["vocab"]
    control = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    kept = {token: at for token, at in vocabulary.items() if len(token) == 1 or token in parts}
    pairs = [
        merge.split(" ") if isinstance(merge, str) else merge
        for merge in tokenizer["model"]["merges"]
    ]
    merges = [pair for pair in pairs if "".join(pair) in kept and set(pair) <= kept.keys()]
    return {**tokenizer, "model": {**tokenizer["model"], "vocab": kept | control, "merges": merges}}


def _parts_of_words(tokenizer: Tokenizer, described: dict[str, Any], text: str) -> set[str]:
    """Every part of every word of `text`: a merge whose result is none of them never applies."""
    control = (re.escape(token["content"]) for token in described["added_tokens"])
    words = set[str]()
    for between in re.split("|".join(control), text):
        words |= {word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(between)}
    return {part for word in words for part in _parts(word)}


def _parts(word: str) -> Iterable[str]:
    for start in range(len(word)):
        for end in range(start + 1, len(word) + 1):
            yield word[start:end]


if __name__ == "__main__":
    source, target, texts = map(Path, sys.argv[1:])
    result = trimmed(json.loads(source.read_text()), texts.read_text())
    target.write_text(json.dumps(result, ensure_ascii=False, separators=(",", ":")) + "\n")
