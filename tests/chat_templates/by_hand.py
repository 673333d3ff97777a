"""What is trained of chats, worked out by hand from the text of each template.

No code of ours wrote these. A line is a sample: the text between `⟦` and `⟧` is trained, the rest
is read; `⏎` is a newline. A line begins with the chat's first character, or with `…` where a
template puts a long text of its own, or the date, before it. How a line is worked out:

- The prompt is the template's text for the messages before the answer, with its generation prompt.
- Trained is what the template puts after exactly that text once the answer is there, up to and
  with the token that ends the turn. What a prompt opens (`<think>`) the answer closes.
- A later answer of the same chat is in the same sample if its prompt begins with all that the
  sample has, token for token; otherwise it is a sample of its own.
- `DROPPED`: the template leaves out the tool call, so the rest must not be trained.
- `REWRITTEN`: the student never gets a prompt from which the finished chat goes on.
"""

from __future__ import annotations

from tests.chat_templates.chats import ADD, QUESTION, Chat, Message

DROPPED = "the student's template drops a tool call of the answer"
REWRITTEN = "the student's template renders what came before in another way once the answer follows"


def _assistant(content: str, **fields: object) -> Message:
    return {"role": "assistant", "content": content, **fields}


USER = {"role": "user", "content": QUESTION}
NEXT = {"role": "user", "content": "And 3+3?"}
SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "add", "content": "4"}

TURNS = Chat([SYSTEM, USER], [_assistant("Four."), NEXT, _assistant("Six.")])
CALL = Chat([USER], [_assistant("", tool_calls=[ADD]), RESULT, _assistant("Four.")])
THOUGHT = Chat(
    [USER],
    [
        _assistant("Four.", reasoning_content="2+2=4"),
        NEXT,
        _assistant("Six.", reasoning_content="3+3=6"),
    ],
)
THOUGHT_CALL = Chat(
    [USER],
    [
        _assistant("", reasoning_content="I add.", tool_calls=[ADD]),
        RESULT,
        _assistant("Four.", reasoning_content="It is 4."),
    ],
)
CHATS = {"turns": TURNS, "call": CALL, "thought": THOUGHT, "thought, call": THOUGHT_CALL}

_QWEN_SYSTEM = "<|im_start|>system⏎Be brief.<|im_end|>⏎"
_QWEN_USER = "<|im_start|>user⏎What is 2+2?<|im_end|>⏎<|im_start|>assistant⏎"
_QWEN_NEXT = "<|im_start|>user⏎And 3+3?<|im_end|>⏎<|im_start|>assistant⏎"
_QWEN_RESULT = (
    "<|im_start|>user⏎<tool_response>⏎4⏎</tool_response><|im_end|>⏎<|im_start|>assistant⏎"
)
_QWEN3_CALL = '<tool_call>⏎{"name": "add", "arguments": {"a": 2, "b": 2}}⏎</tool_call><|im_end|>'
_QWEN35_CALL = (
    "<tool_call>⏎<function=add>⏎<parameter=a>⏎2⏎</parameter>⏎<parameter=b>⏎2⏎</parameter>⏎"
    "</function>⏎</tool_call><|im_end|>"
)
_EMPTY = "<think>⏎⏎</think>⏎⏎"
_LLAMA = "<|start_header_id|>"
_LLAMA_USER = f"{_LLAMA}user<|end_header_id|>⏎⏎What is 2+2?<|eot_id|>"
_LLAMA_NEXT = f"{_LLAMA}user<|end_header_id|>⏎⏎And 3+3?<|eot_id|>"
_LLAMA_ANSWER = f"{_LLAMA}assistant<|end_header_id|>⏎⏎"
_LLAMA31_SYSTEM = (
    f"<|begin_of_text|>{_LLAMA}system<|end_header_id|>⏎⏎"
    "Cutting Knowledge Date: December 2023⏎Today Date: 26 Jul 2024⏎⏎"
)
_GEMMA_USER = "<start_of_turn>user⏎What is 2+2?<end_of_turn>⏎<start_of_turn>model⏎"
_GEMMA_NEXT = "⏎<start_of_turn>user⏎And 3+3?<end_of_turn>⏎<start_of_turn>model⏎"
_OSS_USER = "<|start|>user<|message|>What is 2+2?<|end|>"
_OSS_NEXT = "<|start|>user<|message|>And 3+3?<|end|>"
_OSS_FINAL = "<|channel|>final<|message|>"
_OSS_CALL = ' to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": 2}<|call|>'
_OSS_RESULT = '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"4"<|end|>'
_PHI3_NEXT = "⏎<|user|>⏎And 3+3?<|end|>⏎<|assistant|>⏎"
_PHI4_ANSWER = "<|im_start|>assistant<|im_sep|>"
_PHI4_USER = f"<|im_start|>user<|im_sep|>What is 2+2?<|im_end|>{_PHI4_ANSWER}"
_PHI4_NEXT = f"<|im_start|>user<|im_sep|>And 3+3?<|im_end|>{_PHI4_ANSWER}"
_R1_END = "<｜end▁of▁sentence｜>"
_SMOL_OWN = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_MISTRAL3_CALL = (
    '[TOOL_CALLS][{"name": "add", "arguments": {"a": 2, "b": 2}, "id": "call00001"}]</s>'
)

MARKED: dict[str, dict[str, list[str] | str]] = {
    "Qwen3": {
        # An answer before the last question is shown without its <think>: a sample of its own.
        "turns": [
            f"{_QWEN_SYSTEM}{_QWEN_USER}⟦{_EMPTY}Four.<|im_end|>⟧",
            f"{_QWEN_SYSTEM}{_QWEN_USER}Four.<|im_end|>⏎{_QWEN_NEXT}⟦{_EMPTY}Six.<|im_end|>⟧",
        ],
        # After the last question, an answer without reasoning has <think> while it is the last.
        "call": [
            f"{_QWEN_USER}⟦{_EMPTY}{_QWEN3_CALL}⟧",
            f"{_QWEN_USER}{_QWEN3_CALL}⏎{_QWEN_RESULT}⟦{_EMPTY}Four.<|im_end|>⟧",
        ],
        "thought": [
            f"{_QWEN_USER}⟦<think>⏎2+2=4⏎</think>⏎⏎Four.<|im_end|>⟧",
            f"{_QWEN_USER}Four.<|im_end|>⏎{_QWEN_NEXT}⟦<think>⏎3+3=6⏎</think>⏎⏎Six.<|im_end|>⟧",
        ],
        # With reasoning it keeps its <think> behind a tool's result, so both turns are one sample.
        "thought, call": [
            f"{_QWEN_USER}⟦<think>⏎I add.⏎</think>⏎⏎{_QWEN3_CALL}⟧⏎"
            f"{_QWEN_RESULT}⟦<think>⏎It is 4.⏎</think>⏎⏎Four.<|im_end|>⟧",
        ],
    },
    "Qwen3, not thinking": {
        "turns": [
            f"{_QWEN_SYSTEM}{_QWEN_USER}{_EMPTY}⟦Four.<|im_end|>⟧",
            f"{_QWEN_SYSTEM}{_QWEN_USER}Four.<|im_end|>⏎{_QWEN_NEXT}{_EMPTY}⟦Six.<|im_end|>⟧",
        ],
        "call": [
            f"{_QWEN_USER}{_EMPTY}⟦{_QWEN3_CALL}⟧",
            f"{_QWEN_USER}{_QWEN3_CALL}⏎{_QWEN_RESULT}{_EMPTY}⟦Four.<|im_end|>⟧",
        ],
        "thought": [  # there is no place for reasoning: it is left out
            f"{_QWEN_USER}{_EMPTY}⟦Four.<|im_end|>⟧",
            f"{_QWEN_USER}Four.<|im_end|>⏎{_QWEN_NEXT}{_EMPTY}⟦Six.<|im_end|>⟧",
        ],
    },
    "Qwen3.5": {
        # The prompt has <think> and a newline; the answer goes on from there.
        "turns": [
            f"{_QWEN_SYSTEM}{_QWEN_USER}<think>⏎⟦⏎</think>⏎⏎Four.<|im_end|>⟧",
            f"{_QWEN_SYSTEM}{_QWEN_USER}Four.<|im_end|>⏎{_QWEN_NEXT}"
            "<think>⏎⟦⏎</think>⏎⏎Six.<|im_end|>⟧",
        ],
        # The text goes on, the tokens do not: two newlines are one token where the text is whole.
        "call": [
            f"{_QWEN_USER}<think>⏎⟦⏎</think>⏎⏎{_QWEN35_CALL}⟧",
            f"{_QWEN_USER}{_EMPTY}{_QWEN35_CALL}⏎{_QWEN_RESULT}"
            "<think>⏎⟦⏎</think>⏎⏎Four.<|im_end|>⟧",
        ],
        "thought": [
            f"{_QWEN_USER}<think>⏎⟦2+2=4⏎</think>⏎⏎Four.<|im_end|>⟧",
            f"{_QWEN_USER}Four.<|im_end|>⏎{_QWEN_NEXT}<think>⏎⟦3+3=6⏎</think>⏎⏎Six.<|im_end|>⟧",
        ],
        "thought, call": [
            f"{_QWEN_USER}<think>⏎⟦I add.⏎</think>⏎⏎{_QWEN35_CALL}⟧⏎"
            f"{_QWEN_RESULT}<think>⏎⟦It is 4.⏎</think>⏎⏎Four.<|im_end|>⟧",
        ],
    },
    "Qwen3.5, not thinking": {
        "turns": [
            f"{_QWEN_SYSTEM}{_QWEN_USER}{_EMPTY}⟦Four.<|im_end|>⟧",
            f"{_QWEN_SYSTEM}{_QWEN_USER}Four.<|im_end|>⏎{_QWEN_NEXT}{_EMPTY}⟦Six.<|im_end|>⟧",
        ],
        # Behind the last question every answer has its <think>, as the prompt had it.
        "call": [
            f"{_QWEN_USER}{_EMPTY}⟦{_QWEN35_CALL}⟧⏎{_QWEN_RESULT}{_EMPTY}⟦Four.<|im_end|>⟧",
        ],
    },
    "Llama 3": {
        "turns": [
            f"<|begin_of_text|>{_LLAMA}system<|end_header_id|>⏎⏎Be brief.<|eot_id|>"
            f"{_LLAMA_USER}{_LLAMA_ANSWER}⟦Four.<|eot_id|>⟧"
            f"{_LLAMA_NEXT}{_LLAMA_ANSWER}⟦Six.<|eot_id|>⟧",
        ],
        "call": DROPPED,
        "thought": [
            f"<|begin_of_text|>{_LLAMA_USER}{_LLAMA_ANSWER}⟦Four.<|eot_id|>⟧"
            f"{_LLAMA_NEXT}{_LLAMA_ANSWER}⟦Six.<|eot_id|>⟧",
        ],
    },
    "Llama 3.1": {
        "turns": [
            f"{_LLAMA31_SYSTEM}Be brief.<|eot_id|>{_LLAMA_USER}{_LLAMA_ANSWER}⟦Four.<|eot_id|>⟧"
            f"{_LLAMA_NEXT}{_LLAMA_ANSWER}⟦Six.<|eot_id|>⟧",
        ],
        # A result that is text is written as JSON.
        "call": [
            f"{_LLAMA31_SYSTEM}<|eot_id|>{_LLAMA_USER}{_LLAMA_ANSWER}"
            '⟦{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>⟧'
            f'{_LLAMA}ipython<|end_header_id|>⏎⏎"4"<|eot_id|>{_LLAMA_ANSWER}⟦Four.<|eot_id|>⟧',
        ],
    },
    "Gemma 3": {
        # It has no system turn: the message is put before the first question.
        "turns": [
            "<bos><start_of_turn>user⏎Be brief.⏎⏎What is 2+2?<end_of_turn>⏎<start_of_turn>model⏎"
            f"⟦Four.<end_of_turn>⟧{_GEMMA_NEXT}⟦Six.<end_of_turn>⟧",
        ],
        "call": DROPPED,
        "thought": [
            f"<bos>{_GEMMA_USER}⟦Four.<end_of_turn>⟧{_GEMMA_NEXT}⟦Six.<end_of_turn>⟧",
        ],
    },
    "Mistral v3": {
        # The system message is put before the last question alone, so the first answer's prompt
        # is no beginning of the second's.
        "turns": [
            "<s>[INST]Be brief.⏎⏎What is 2+2?[/INST]⟦Four.</s>⟧",
            "<s>[INST]What is 2+2?[/INST]Four.</s>[INST]Be brief.⏎⏎And 3+3?[/INST]⟦Six.</s>⟧",
        ],
        "call": [
            f"<s>[INST]What is 2+2?[/INST]⟦{_MISTRAL3_CALL}⟧"
            '[TOOL_RESULTS]{"content": 4, "call_id": "call00001"}[/TOOL_RESULTS]⟦Four.</s>⟧',
        ],
    },
    "Mistral v7": {
        "turns": [
            "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]What is 2+2?[/INST]"
            "⟦Four.</s>⟧[INST]And 3+3?[/INST]⟦Six.</s>⟧",
        ],
        "call": DROPPED,
    },
    "gpt-oss": {
        # The last answer ends in <|return|>, an earlier one in <|end|>: a sample each.
        "turns": [
            "…<|start|>developer<|message|># Instructions⏎⏎Be brief.⏎⏎<|end|>"
            f"{_OSS_USER}<|start|>assistant⟦{_OSS_FINAL}Four.<|return|>⟧",
            "…<|start|>developer<|message|># Instructions⏎⏎Be brief.⏎⏎<|end|>"
            f"{_OSS_USER}<|start|>assistant{_OSS_FINAL}Four.<|end|>"
            f"{_OSS_NEXT}<|start|>assistant⟦{_OSS_FINAL}Six.<|return|>⟧",
        ],
        "call": [
            f"…{_OSS_USER}<|start|>assistant⟦{_OSS_CALL}⟧"
            f"{_OSS_RESULT}<|start|>assistant⟦{_OSS_FINAL}Four.<|return|>⟧",
        ],
        # The model itself begins the message that follows its analysis.
        "thought": [
            f"…{_OSS_USER}<|start|>assistant⟦<|channel|>analysis<|message|>2+2=4<|end|>"
            f"<|start|>assistant{_OSS_FINAL}Four.<|return|>⟧",
            f"…{_OSS_USER}<|start|>assistant{_OSS_FINAL}Four.<|end|>{_OSS_NEXT}<|start|>assistant"
            "⟦<|channel|>analysis<|message|>3+3=6<|end|>"
            f"<|start|>assistant{_OSS_FINAL}Six.<|return|>⟧",
        ],
        # The analysis before a call is dropped as soon as a final message follows.
        "thought, call": REWRITTEN,
    },
    "Phi-3": {
        "turns": [
            "<|system|>⏎Be brief.<|end|>⏎<|user|>⏎What is 2+2?<|end|>⏎<|assistant|>⏎"
            f"⟦Four.<|end|>⟧{_PHI3_NEXT}⟦Six.<|end|>⟧",
        ],
        "call": DROPPED,
        "thought": [
            f"<|user|>⏎What is 2+2?<|end|>⏎<|assistant|>⏎⟦Four.<|end|>⟧{_PHI3_NEXT}⟦Six.<|end|>⟧",
        ],
    },
    "Phi-4": {
        "turns": [
            f"<|im_start|>system<|im_sep|>Be brief.<|im_end|>{_PHI4_USER}"
            f"⟦Four.<|im_end|>⟧{_PHI4_NEXT}⟦Six.<|im_end|>⟧",
        ],
        "call": DROPPED,
        "thought": [f"…{_PHI4_USER}⟦Four.<|im_end|>⟧{_PHI4_NEXT}⟦Six.<|im_end|>⟧"],
    },
    "DeepSeek-R1-Distill": {
        # The finished chat shows no reasoning, the prompt opens it: the answer has to close it.
        "turns": [
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>What is 2+2?<｜Assistant｜><think>⏎"
            f"⟦⏎</think>⏎⏎Four.{_R1_END}⟧",
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>What is 2+2?"
            f"<｜Assistant｜>Four.{_R1_END}<｜User｜>And 3+3?<｜Assistant｜><think>⏎"
            f"⟦⏎</think>⏎⏎Six.{_R1_END}⟧",
        ],
        "call": DROPPED,
        "thought": [
            "<｜begin▁of▁sentence｜><｜User｜>What is 2+2?<｜Assistant｜><think>⏎"
            f"⟦2+2=4⏎</think>⏎⏎Four.{_R1_END}⟧",
            "<｜begin▁of▁sentence｜><｜User｜>What is 2+2?"
            f"<｜Assistant｜>Four.{_R1_END}<｜User｜>And 3+3?<｜Assistant｜><think>⏎"
            f"⟦3+3=6⏎</think>⏎⏎Six.{_R1_END}⟧",
        ],
    },
    "SmolLM2": {
        "turns": [
            f"{_QWEN_SYSTEM}{_QWEN_USER}⟦Four.<|im_end|>⟧⏎{_QWEN_NEXT}⟦Six.<|im_end|>⟧",
        ],
        "call": DROPPED,
        "thought": [
            f"<|im_start|>system⏎{_SMOL_OWN}<|im_end|>⏎"
            f"{_QWEN_USER}⟦Four.<|im_end|>⟧⏎{_QWEN_NEXT}⟦Six.<|im_end|>⟧",
        ],
    },
}
