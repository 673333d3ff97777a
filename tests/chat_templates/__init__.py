"""Real chat templates, each with a real tokenizer: README.md says where they are from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
EXPECTED = FOLDER / "expected"


@dataclass(frozen=True)
class Family:
    """A template, and the tokenizer that it is rendered for.

    `control` are tokens of the family that its own tokenizer would have, where `tokenizer` is
    another's. `ends` end a turn; the first is the end of sequence.
    """

    template: str
    tokenizer: str
    ends: tuple[str, ...]
    control: tuple[str, ...] = ()
    start: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def load(self, tokenizers: Path = FOLDER / "tokenizers") -> PreTrainedTokenizerFast:
        """The tokenizer with the template."""
        backend = Tokenizer.from_file(str(tokenizers / f"{self.tokenizer}.json"))
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self.control]
        )
        loaded = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token=self.ends[0],
            bos_token=self.start,
            clean_up_tokenization_spaces=False,
        )
        loaded.chat_template = (FOLDER / "templates" / f"{self.template}.jinja").read_text()
        return loaded


LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
R1_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)

FAMILIES = {
    "Qwen3": Family("qwen3", "qwen3", ("<|im_end|>",)),
    "Qwen3, not thinking": Family(
        "qwen3", "qwen3", ("<|im_end|>",), arguments={"enable_thinking": False}
    ),
    "Qwen3.5": Family("qwen3_5", "qwen3", ("<|im_end|>",)),
    "Qwen3.5, not thinking": Family(
        "qwen3_5", "qwen3", ("<|im_end|>",), arguments={"enable_thinking": False}
    ),
    "DeepSeek-R1-Distill": Family(
        "deepseek_r1_distill",
        "qwen3",
        ("<｜end▁of▁sentence｜>",),
        R1_TOKENS,
        "<｜begin▁of▁sentence｜>",
    ),
    "Nemotron 3": Family("nemotron_3_nano", "qwen3", ("<|im_end|>",)),
    "Nemotron 3, not thinking": Family(
        "nemotron_3_nano", "qwen3", ("<|im_end|>",), arguments={"enable_thinking": False}
    ),
    "LFM2.5": Family(
        "lfm2_2_5_v2",
        "qwen3",
        ("<|im_end|>",),
        ("<|startoftext|>", "<|tool_call_start|>", "<|tool_call_end|>"),
        "<|startoftext|>",
    ),
    "gpt-oss": Family("gptoss", "gpt-oss", ("<|return|>", "<|call|>")),
    "Llama 3": Family("llama3", "qwen3", ("<|eot_id|>",), LLAMA_TOKENS, "<|begin_of_text|>"),
    "Llama 3.1": Family("llama3_1", "qwen3", ("<|eot_id|>",), LLAMA_TOKENS, "<|begin_of_text|>"),
    "Gemma 3": Family(
        "gemma3",
        "qwen3",
        ("<end_of_turn>",),
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
    ),
    "Gemma 4": Family(
        "gemma4_v5",
        "qwen3",
        ("<turn|>", "<|tool_response>"),
        (
            "<bos>",
            "<|turn>",
            "<turn|>",
            "<|channel>",
            "<channel|>",
            "<|tool_call>",
            "<tool_call|>",
            "<|tool_response>",
            "<tool_response|>",
            '<|"|>',
        ),
        "<bos>",
    ),
    "Mistral v3": Family("mistral_v3_tekken", "mistral", ("</s>",), start="<s>"),
    "Mistral v7": Family("mistral_v7_tekken", "mistral", ("</s>",), start="<s>"),
    "Phi-3": Family(
        "phi3",
        "qwen3",
        ("<|endoftext|>", "<|end|>"),
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "Phi-4": Family("phi_4", "qwen3", ("<|im_end|>",), ("<|im_sep|>",)),
    "SmolLM2": Family("smollm2", "smollm2", ("<|im_end|>",)),
}


def expected_of(name: str) -> dict[str, list[str]]:
    """What `expected/<name>.txt` has for each chat: a line for each sample, or the refusal."""
    chats: dict[str, list[str]] = {}
    for line in (EXPECTED / f"{name}.txt").read_text().splitlines():
        if line.startswith("# "):
            lines = chats.setdefault(line.removeprefix("# "), [])
        else:
            lines.append(line)
    return chats
