"""What a compressed model is worth: its score, its distance to the teacher, and what it forgot.

By transformers, in bfloat16; no engine and no trainer of ours takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real.plain import AT_ONCE, LONGEST, greedy_answers
from onstream.pipeline.tasks import Problem
from onstream.pipeline.tasks.answer_scorers.json_schema import score

WINDOW_TOKENS = 512
"""The text outside the domain is read in pieces of so many tokens."""
KL_PROBLEMS = 64
SHOWN = 10
"""Held-out problems whose answers are kept, to read."""


@dataclass(frozen=True)
class Measured:
    """What one model comes to.

    `reverse_kl` is in nats a token; `perplexity` is that of English text outside the domain.
    """

    parameters: int
    right: int
    asked: int
    reverse_kl: float
    perplexity: float
    answers: list[str]


@torch.inference_mode()
def measure(student: Path, teacher: Path, problems: Sequence[Problem]) -> Measured:
    """Measure the model in `student` on held-out `problems`, beside the one in `teacher`."""
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    model = load(student)
    answers: list[str] = []
    for start in range(0, len(problems), AT_ONCE):
        asked = problems[start : start + AT_ONCE]
        answers += greedy_answers(model, tokenizer, [problem.messages for problem in asked])
    rewards = [
        score(answer, problem.info)["reward"]
        for answer, problem in zip(answers, problems, strict=True)
    ]
    return Measured(
        parameters=sum(weights.numel() for weights in model.parameters()),
        right=rewards.count(1.0),
        asked=len(problems),
        reverse_kl=reverse_kl(model, load(teacher), tokenizer, problems[:KL_PROBLEMS]),
        perplexity=perplexity(model, tokenizer(outside_text(), return_tensors="pt").input_ids[0]),
        answers=answers[:SHOWN],
    )


def load(directory: Path) -> Any:
    """The model in `directory`."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def reverse_kl(student: Any, teacher: Any, tokenizer: Any, problems: Sequence[Problem]) -> float:
    """KL(student ‖ teacher) over the whole vocabulary, the mean over tokens the student draws.

    It draws at temperature 1, with the same seed each time. The teacher reads its own prompt.
    """
    torch.manual_seed(0)
    found = []
    for problem in problems:
        prompt = _prompt(tokenizer, problem.messages)
        drawn = student.generate(
            prompt, max_new_tokens=LONGEST, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        completion = drawn[:, prompt.shape[1] :]
        of_student = _logprobs(student, prompt, completion)
        its_prompt = _prompt(tokenizer, problem.teacher_messages or problem.messages)
        of_teacher = _logprobs(teacher, its_prompt, completion)
        found.append((of_student.exp() * (of_student - of_teacher)).sum(-1))
    return float(torch.cat(found).mean())


def _prompt(tokenizer: Any, messages: list[dict[str, Any]]) -> Any:
    """The tokens of a conversation up to the answer: [1, P]."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def _logprobs(model: Any, prompt: Tensor, completion: Tensor) -> Tensor:
    """At each of the C tokens of `completion` [1, C], the logprobs of all tokens: [C, V]."""
    logits: Tensor = model(torch.cat([prompt, completion], dim=1)).logits
    return logits[0, prompt.shape[1] - 1 : -1].float().log_softmax(-1)


def perplexity(model: Any, text: Tensor) -> float:
    """The perplexity of the tokens `text` [T], in pieces that each begin without context."""
    losses = [
        cross_entropy(model(piece[None]).logits[0, :-1].float(), piece[1:], reduction="none")
        for piece in text.split(WINDOW_TOKENS)
    ]
    return exp(float(torch.cat(losses).mean()))


def outside_text() -> str:
    """The story "In the Year 2889" by Jules or Michel Verne (1889), in the public domain.

    The package reasoning-gym ships the file of Project Gutenberg; its notices are left out.
    """
    file = distribution("reasoning-gym").locate_file("reasoning_gym/data/in_the_year_2889.txt")
    notices_and_text = Path(str(file)).read_text(encoding="utf-8").split("***")
    return notices_and_text[2].strip()
