"""A character tokenizer of 128 entries, for models small enough to be trained on a laptop."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 128
CONTEXT_TOKENS = 512

PAD = "<|endoftext|>"
UNKNOWN = "<|unk|>"
START = "<|im_start|>"
END = "<|im_end|>"
IMAGE_START = "<|vision_start|>"
IMAGE = "<|image_pad|>"
IMAGE_END = "<|vision_end|>"
VIDEO = "<|video_pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

# One token for each role keeps the template at five tokens around a prompt: on models this small,
# the prompt is most of the work.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|><|' + message['role'] + '|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|><|assistant|>' }}{% endif %}"
)

IMAGES_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ '<|im_start|><|' + message['role'] + '|>' + message['content'] + '<|im_end|>' }}",
    "{{ '<|im_start|><|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    f"{{% if part['type'] in ('image', 'image_url') %}}{IMAGE_START}{IMAGE}{IMAGE_END}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}",
)
"""The same with content in parts, of which some are images."""

TOOL_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    '{"name": "',
    '", "arguments": {"',
    '": "',
    '"}}',
    "calculate",
    "expression",
)
"""What a call is made of besides its values. Tokenizers of large models have such tokens too."""

TOOLS_TEMPLATE = (
    "{% for tool in tools or [] %}"
    "{% set function = tool['function'] %}"
    "{{ '<|im_start|><|system|>' + function['description'] + '<tool_call>{\"name\": \"' }}"
    "{{ function['name'] + '\", \"arguments\": {\"' }}"
    "{{ function['parameters']['properties'] | join('\": \"\", \"') }}"
    '{{ \'": ""}}</tool_call><|im_end|>\' }}'
    "{% endfor %}"
) + CHAT_TEMPLATE
"""The same behind what each tool does, and an empty call of it."""

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": f"{START}<|assistant|>",
    "fields": {"content": {"close": END, "content": "text"}},
}
"""Where an answer begins and ends, for `transformers serve`.

It would otherwise look for the markers of the Qwen3 family.
"""


def special_tokens(*, images: bool = False, others: int = 0) -> list[str]:
    """The named special tokens, then as many reserved ones as fill the vocabulary, where it has
    `others` besides the characters.
    """
    named = [PAD, UNKNOWN, START, END, *ROLES]
    if images:
        named += [IMAGE_START, IMAGE, IMAGE_END, VIDEO]
    reserved = VOCABULARY_SIZE - len(named) - others - len(characters())
    return named + [f"<|reserved_{number}|>" for number in range(reserved)]


def characters() -> list[str]:
    """Printable ASCII and the newline: the 96 characters that are tokens of their own."""
    return ["\n", " ", *sorted(string.ascii_letters + string.digits + string.punctuation)]


def character_tokenizer(*, images: bool = False, tools: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer: one token a character; EOS is the token that ends a turn.

    With `images` its template shows images; with `tools` it tells of tools, and what a call is made
    of are tokens too. Characters outside printable ASCII become `<|unk|>`. `AutoTokenizer` and vLLM
    load what it saves.

    >>> character_tokenizer()("abc").input_ids
    [98, 99, 100]
    """
    words = TOOL_TOKENS if tools else ()
    specials = special_tokens(images=images, others=len(words))
    tokens = [*specials, *words, *characters()]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials]
    )
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if images:
        tokenizer.chat_template = IMAGES_TEMPLATE
    if tools:
        tokenizer.chat_template = TOOLS_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer
