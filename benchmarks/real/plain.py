"""How many problems a model directory answers right, with transformers and nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

AT_ONCE = 32
LONGEST = 40
"""Tokens of an answer, as in examples/smollm2/onstream.toml."""


@torch.inference_mode()
def right_answers(directory: Path, problems: Path) -> int:
    """The problems of the file `problems` that the model in `directory` answers right, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    right = 0
    for start in range(0, len(rows), AT_ONCE):
        asked = rows[start : start + AT_ONCE]
        chats = [[{"role": "user", "content": row["prompt"]}] for row in asked]
        right += sum(
            _value(answer) == row["answer"]["const"]
            for answer, row in zip(greedy_answers(model, tokenizer, chats), asked, strict=True)
        )
    return right


def greedy_answers(model: Any, tokenizer: Any, chats: list[list[dict[str, Any]]]) -> list[str]:
    """The answers to `chats`, all at once; the tokenizer pads on the left."""
    read = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**read, max_new_tokens=LONGEST, do_sample=False)
    answers: list[str] = tokenizer.batch_decode(
        written[:, read["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return answers


def _value(answer: str) -> object:
    try:
        return json.loads(answer)
    except ValueError:
        return None
