"""The pairs, and the prompts that both sides get."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.peers.sizes import Size
from onstream.pipeline.tasks import load_task
from onstream.settings.root import Settings

EXAMPLE = Path("examples/reverse-text")
TOKENIZER_FILE = "mistral_common/data/tekken_240911.json"
VOCABULARY = 65536
CONTEXT_TOKENS = 2048
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES = {
    "student": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 10},
    "teacher": {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 12},
}
HEAD_DIM = 32


@dataclass(frozen=True)
class ModelPair:
    """A student and its teacher; `problems` is a file of prompts, where the task makes none."""

    student: Path
    teacher: Path
    problems: Path | None = None


def pair_of(size: Size, directory: Path, packages: Path) -> ModelPair:
    """The pair of `size`. A random one is made in `directory`, unless it is there.

    Its tokenizer is made of a file in `packages`, the site-packages of TRL's environment.
    """
    if size.prompt_tokens is None:
        return ModelPair(EXAMPLE / "student", EXAMPLE / "teacher")
    pair = ModelPair(
        directory / "student",
        directory / "teacher",
        directory / f"prompts-{size.prompt_tokens}.jsonl",
    )
    for seed, role in enumerate(SHAPES):
        if not (directory / role / "model.safetensors").exists():
            write_model(directory / role, role, seed, packages / TOKENIZER_FILE)
    if pair.problems is not None and not pair.problems.exists():
        steps = max(size.steps.values())
        write_problems(pair.problems, pair.student, size.prompt_tokens, steps * size.prompts_a_step)
    return pair


def train_prompts(settings: Settings, count: int) -> list[list[dict[str, Any]]]:
    """The conversations that a run with `settings` asks, in its order."""
    task = load_task(settings)
    return [task.train(index).messages for index in range(count)]


def write_model(directory: Path, role: str, seed: int, tokenizer_file: Path) -> None:
    """A Qwen3 model with random weights and tied embeddings, and its tokenizer."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    shape = SHAPES[role]
    tokenizer = tekken_tokenizer(tokenizer_file)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        **shape,
        **ends,
        bos_token_id=None,
        vocab_size=VOCABULARY,
        num_attention_heads=shape["hidden_size"] // HEAD_DIM,
        num_key_value_heads=shape["hidden_size"] // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)  # as the shipped pair
    model.generation_config = GenerationConfig(**ends)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def tekken_tokenizer(file: Path) -> Any:
    """The first tokens of Mistral's vocabulary Tekken (Apache-2.0), and three special ones.

    Tokens are ranked by their merges, so the first ones are a vocabulary by themselves.
    """
    import base64

    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    content = json.loads(file.read_text())
    words = content["vocab"][: VOCABULARY - len(SPECIAL)]

    class TekkenConverter(TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return {base64.b64decode(word["token_bytes"]): word["rank"] for word in words}

    pattern = content["config"]["pattern"]
    converted = TekkenConverter(str(file), pattern, extra_special_tokens=SPECIAL).converted()
    pad, _, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=converted,
        pad_token=pad,
        eos_token=end,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_problems(file: Path, student: Path, tokens: int, count: int) -> None:
    """Write `count` problems, whose prompts have `tokens` tokens each: words of the vocabulary."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    words = sorted(word[1:] for word in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{3,}", word))
    random = Random(tokens)
    lines = [prompt_of(tokens, words, random, tokenizer) for _ in range(count)]
    file.write_text("".join(json.dumps({"prompt": line, "answer": ""}) + "\n" for line in lines))


def prompt_of(tokens: int, words: Sequence[str], random: Random, tokenizer: Any) -> str:
    """Random words which come to `tokens` tokens in the chat template."""
    chosen: list[str] = []
    missing = tokens
    while missing:
        chosen += random.choices(words, k=missing) if missing > 0 else []
        chosen = chosen[: len(chosen) + min(missing, 0)]
        messages = [{"role": "user", "content": " ".join(chosen)}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        missing = tokens - len(ids)
    return " ".join(chosen)
