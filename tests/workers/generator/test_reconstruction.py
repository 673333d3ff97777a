"""What the student is trained on when another model wrote the answer: a table of chats, templates
and the text that is trained.
"""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from onstream.workers.generator.reconstruction import (
    ReconstructedSample,
    ReconstructionError,
    Reconstructor,
)
from onstream.workers.tiny_models.character_tokenizer import character_tokenizer
from tests.workers.generator import templates

USER = {"role": "user", "content": "hi"}
TOKENIZER = character_tokenizer()
END = "<|im_end|>"


def reconstructor(template: str) -> Reconstructor:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return Reconstructor(tokenizer, {tokenizer.eos_token_id})


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def shown(sample: ReconstructedSample) -> str:
    """The sample as text: the prompt, a bar, and the completion with what is not trained in
    brackets.
    """
    text = TOKENIZER.decode(sample.prompt_ids.tolist()) + "|"
    inside = False
    for token, trained in zip(
        sample.completion_ids.tolist(), sample.loss_mask.tolist(), strict=True
    ):
        if inside == bool(trained):
            text += "]" if inside else "["
            inside = not inside
        text += TOKENIZER.decode([token])
    return text + ("]" if inside else "")


CASES: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]], list[str]]] = {
    "one answer and its end of turn, without what the template puts behind it": (
        templates.PLAIN,
        [USER],
        [assistant("ok")],
        ["<|im_start|>user:hi<|im_end|>\n<|im_start|>assistant:|ok<|im_end|>"],
    ),
    "earlier answers in the prompt are read, not trained": (
        templates.PLAIN,
        [USER, assistant("yo"), USER],
        [assistant("ok")],
        [
            "<|im_start|>user:hi<|im_end|>\n<|im_start|>assistant:yo<|im_end|>\n<|im_start|>user:hi<|im_end|>\n<|im_start|>assistant:|"
            "ok<|im_end|>"
        ],
    ),
    "whitespace around and inside the answer is kept": (
        templates.PLAIN,
        [USER],
        [assistant("\n  a\n\n b \n")],
        ["<|im_start|>user:hi<|im_end|>\n<|im_start|>assistant:|\n  a\n\n b \n<|im_end|>"],
    ),
    "whitespace is kept where the template trims": (
        templates.TRIMMING,
        [USER],
        [assistant("  a b\n\n")],
        ["<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n|  a b\n\n<|im_end|>"],
    ),
    "nothing but whitespace is kept as it is": (
        templates.TRIMMING,
        [USER],
        [assistant(" \n")],
        ["<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n| \n<|im_end|>"],
    ),
    "content in parts is one text": (
        templates.PLAIN,
        [USER],
        [
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "o"}, {"type": "text", "text": "k"}],
            }
        ],
        ["<|im_start|>user:hi<|im_end|>\n<|im_start|>assistant:|ok<|im_end|>"],
    ),
    "a template that leaves the end of the turn out gets one": (
        templates.ENDLESS,
        [USER],
        [assistant("ok")],
        ["user:hi<|im_end|>assistant:|ok<|im_end|>"],
    ),
    "reasoning is trained where the template renders it": (
        templates.THINKING,
        [USER],
        [assistant("ok", reasoning_content="hm")],
        [
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n|<think>\nhm\n</think>\n\nok<|im_end|>"
        ],
    ),
    "reasoning under another name, with the newlines that a parser left": (
        templates.THINKING,
        [USER],
        [assistant("\n\nok", reasoning="\nhm\n")],
        [
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n|<think>\nhm\n</think>\n\nok<|im_end|>"
        ],
    ),
    "reasoning is left out where the template does not render it": (
        templates.PLAIN,
        [USER],
        [assistant("\n\nok", reasoning_content="hm")],
        ["<|im_start|>user:hi<|im_end|>\n<|im_start|>assistant:|ok<|im_end|>"],
    ),
    "a block that the template adds is the student's to write": (
        templates.SCAFFOLD,
        [USER],
        [assistant("ok")],
        ["<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n|<think></think>ok<|im_end|>"],
    ),
    "reasoning that the prompt opens and the finished chat does not show is closed": (
        templates.PREFILLED,
        [USER],
        [assistant("ok")],
        ["<|im_start|>user:hi<|im_end|><|im_start|>assistant:<think>\n|\n</think>\n\nok<|im_end|>"],
    ),
    "reasoning inside the content is told apart from it": (
        templates.PREFILLED,
        [USER],
        [assistant("<think>\nhm\n</think>\n\nok")],
        [
            "<|im_start|>user:hi<|im_end|><|im_start|>assistant:<think>\n|hm\n</think>\n\nok<|im_end|>"
        ],
    ),
    "reasoning is left out where the prompt closes it": (
        templates.SWITCHED.replace("enable_thinking is defined and enable_thinking is false", "1"),
        [USER],
        [assistant("<think>\nhm\n</think>\n\nok")],
        [
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n|"
            "ok<|im_end|>"
        ],
    ),
    "a token that ends every chat is not trained": (
        templates.CLOSED,
        [USER],
        [assistant("a"), USER, assistant("b")],
        ["user:hi<|im_end|>\nassistant:|a<|im_end|>[\nuser:hi<|im_end|>\nassistant:]b<|im_end|>"],
    ),
    "a system message keeps the place that it has in the prompt": (
        templates.MOVING,
        [{"role": "system", "content": "be kind"}, USER],
        [assistant("ok")],
        ["be kind;user:hi<|im_end|>|ok<|im_end|>"],
    ),
    "a template that takes arguments as text gets text": (
        templates.ONE_CALL,
        [USER],
        [assistant("", tool_calls=[call("add", '{"a": 1}')])],
        ['user:hi<|im_end|>assistant:|add {"a": 1}<|im_end|>'],
    ),
    "a tool call is trained, with its arguments as an object": (
        templates.THINKING,
        [USER],
        [assistant(None, tool_calls=[call("add", '{"a":1}')])],
        [
            '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n|<call>add {"a": '
            "1}</call><|im_end|>"
        ],
    ),
    "what a tool answers is read, not trained": (
        templates.THINKING,
        [USER],
        [
            assistant("", tool_calls=[call("add", "{}")]),
            {"role": "tool", "content": "3"},
            assistant("3!"),
        ],
        [
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n|<call>add {}</call><|im_end|>"
            "[\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n]3!<|im_end|>"
        ],
    ),
    "two turns with their reasoning kept share a sample": (
        templates.THINKING,
        [USER],
        [
            assistant("a", reasoning_content="x"),
            {"role": "tool", "content": "t"},
            assistant("b", reasoning_content="y"),
        ],
        [
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n|<think>\nx\n</think>\n\na<|im_end|>"
            "[\n<|im_start|>tool\nt<|im_end|>\n<|im_start|>assistant\n]<think>\ny\n</think>\n\nb<|im_end|>"
        ],
    ),
    "a template that drops earlier reasoning starts a new sample": (
        templates.THINKING,
        [USER],
        [
            assistant("a", reasoning_content="x"),
            {"role": "user", "content": "go"},
            assistant("b", reasoning_content="y"),
        ],
        [
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n|<think>\nx\n</think>\n\na<|im_end|>",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n|"
            "<think>\ny\n</think>\n\nb<|im_end|>",
        ],
    ),
    "a block that only the last answer has starts a new sample": (
        templates.SCAFFOLD,
        [USER],
        [assistant("a"), USER, assistant("b")],
        [
            "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n|<think></think>a<|im_end|>",
            "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\na<|im_end|><|im_start|>user\nhi<|im_end|><|im_start|>assistant\n|"
            "<think></think>b<|im_end|>",
        ],
    ),
}


@pytest.mark.parametrize(("template", "prompt", "written", "expected"), CASES.values(), ids=CASES)
def test_what_is_trained(
    template: str, prompt: list[dict[str, Any]], written: list[dict[str, Any]], expected: list[str]
) -> None:
    assert [
        shown(sample) for sample in reconstructor(template).samples(prompt, written)
    ] == expected


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (
            templates.PLAIN,
            assistant("half an ans"),
            "<|im_start|>user:hi<|im_end|>\n<|im_start|>assistant:|half an ans",
        ),
        (
            templates.TRIMMING,
            assistant(" half \n"),
            "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n| half \n",
        ),
        (
            templates.THINKING,
            assistant("", reasoning_content="let me "),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n|<think>\nlet me ",
        ),
    ],
    ids=["content", "whitespace at the cut", "reasoning"],
)
def test_an_answer_that_was_cut_off_is_trained_up_to_the_cut_without_an_end_of_turn(
    template: str, answer: dict[str, Any], expected: str
) -> None:
    (sample,) = reconstructor(template).samples([USER], [answer], truncated=True)
    assert shown(sample) == expected


@pytest.mark.parametrize(
    ("template", "answer", "truncated", "words"),
    [
        (templates.PLAIN, assistant(""), False, "the answer is empty"),
        (templates.PLAIN, assistant(None, reasoning_content="hm"), False, "the answer is empty"),
        (templates.PLAIN, assistant("", reasoning_content="hm"), True, "the answer is empty"),
        (templates.THINKING, assistant("", tool_calls=[call("add", '{"a"')]), True, "no JSON"),
        (
            templates.THINKING,
            assistant("", tool_calls=[call("add", "{}")]),
            True,
            "cut off before it had any content",
        ),
        (
            templates.PLAIN,
            assistant("ok<|im_end|>more"),
            False,
            "contains '<|im_end|>', a control token",
        ),
        (
            templates.PLAIN,
            assistant("naïve"),
            False,
            "characters that the student's tokenizer has no token for",
        ),
        (
            templates.PLAIN,
            assistant(None, tool_calls=[call("add", "{}")]),
            False,
            "template drops a tool call of the answer",
        ),
        (
            templates.ONE_CALL,
            assistant("", tool_calls=[call("add", "{}"), call("add", "{}")]),
            False,
            "template drops a tool call of the answer",
        ),
        (
            templates.ONE_CALL,
            assistant("see", tool_calls=[call("add", "{}")]),
            False,
            "template drops the content of the answer",
        ),
        (
            templates.ANNOUNCING,
            assistant("ok"),
            False,
            "ends the prompt with ', briefly:', where the finished chat has ':ok",
        ),
        (templates.FICKLE, assistant("ok"), False, "renders what came before in another way"),
        (templates.ALTERNATING, {"role": "assistant", "content": "ok"}, False, None),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_told_apart_is_refused_in_words(
    template: str, answer: dict[str, Any], truncated: bool, words: str | None
) -> None:
    prompt = [USER] if words else [{"role": "tool", "content": "3"}]
    with pytest.raises(ReconstructionError, match=words or "only user and assistant here"):
        reconstructor(template).samples(prompt, [answer], truncated=truncated)


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_before_the_answer() -> None:
    tokenizer = spacing_tokenizer()
    (sample,) = Reconstructor(tokenizer, {tokenizer.eos_token_id}).samples(
        [USER], [assistant("[a]")]
    )
    assert tokenizer.convert_ids_to_tokens(sample.prompt_ids.tolist()) == ["▁", "[", "h", "i", "]"]
    assert tokenizer.convert_ids_to_tokens(sample.completion_ids.tolist()) == [
        "[",
        "a",
        "]",
        "</s>",
    ]


def spacing_tokenizer() -> PreTrainedTokenizerFast:
    """Of the kind of Llama 2's, with a token `][` that may span the end of a prompt."""
    tokens = ["</s>", "▁", "[", "]", "h", "i", "a", "\n", "]["]
    backend = Tokenizer(BPE({token: at for at, token in enumerate(tokens)}, [("]", "[")]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[' + message['content'] + ']' }}{% else %}{{ message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    return tokenizer


def test_the_text_for_the_verifier_is_the_last_answers_content() -> None:
    (sample,) = reconstructor(templates.THINKING).samples(
        [USER], [assistant("ok", reasoning_content="hm")]
    )
    assert sample.text == "ok"


def test_private_signs_in_the_chat_itself_stay_what_they_are() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = templates.TRIMMING
    tokenizer.unk_token = None
    made = Reconstructor(tokenizer, {tokenizer.eos_token_id}).samples(
        [{"role": "user", "content": "\ue000"}], [assistant(" ok ")]
    )
    assert shown(made[0]).endswith("| ok <|im_end|>")


def test_the_field_that_the_template_renders_reasoning_from_is_found_by_trying() -> None:
    assert reconstructor(templates.THINKING).template.reasoning_field == "reasoning_content"
    assert (
        reconstructor(
            templates.THINKING.replace("reasoning_content", "thinking")
        ).template.reasoning_field
        == "thinking"
    )
    assert not reconstructor(templates.PLAIN).template.renders_reasoning()
