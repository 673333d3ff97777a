"""A student that reads an answer in its prompt: it copies that, and else answers as before."""

from __future__ import annotations

from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 160
ROWS = 64
RATE = 1e-3
TEMPLATE = "{prompt} ({answer})"
"""How a prompt shows an answer."""


def make_answer_reader(student: Path, directory: Path) -> Path:
    """Teach the reverse-text student of that directory to copy; returns `directory`.

    It copies any word that stands in brackets behind the question, so that it learns no reversing
    here. Without one it is held to the distributions that it had.
    """
    torch.manual_seed(0)
    random = Random(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(student)
    model: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    before: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / STEPS)
        ids, targets = _batch(tokenizer, random, shown=True)
        copying = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), targets.flatten())
        ids, targets = _batch(tokenizer, random, shown=False)
        written = targets >= 0
        with torch.no_grad():
            held = before(ids).logits[:, :-1][written].log_softmax(-1)
        now = model(ids).logits[:, :-1][written].log_softmax(-1)
        (copying + kl_div(now, held, log_target=True, reduction="batchmean")).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _batch(tokenizer: Any, random: Random, *, shown: bool) -> tuple[Tensor, Tensor]:
    """Conversations [R, T], and their next tokens [R, T - 1], -100 but in the answers."""
    rows = []
    for _ in range(ROWS):
        word = _word(random)
        answer = _word(random) if shown else word[::-1]
        question = f"Reverse: {word}"
        asked = TEMPLATE.format(prompt=question, answer=answer) if shown else question
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=False
        )
        end = [tokenizer.eos_token_id]
        rows.append((prompt, tokenizer.encode(answer, add_special_tokens=False) + end))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros((ROWS, longest), dtype=torch.long)
    targets = torch.full((ROWS, longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        end_at = len(prompt) + len(answer)
        ids[row, :end_at] = torch.tensor([*prompt, *answer])
        targets[row, len(prompt) : end_at] = torch.tensor(answer)
    return ids, targets[:, 1:]


def _word(random: Random) -> str:
    return "".join(random.choices(ascii_lowercase, k=random.randint(4, 10)))
