"""Whether a server means the same tokens by the same ids as the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from onstream.pipeline.errors import UserError
from onstream.pipeline.http import Endpoint, EndpointError, EndpointFault, RequestRefused, decoded
from onstream.pipeline.telemetry import get_logger
from onstream.settings.chat_templates import TEACHER_ARGUMENTS
from onstream.settings.decoding import UNDECODABLE
from onstream.workers.teacher.compatibility import CONVERSATION, ModelInfo
from onstream.workers.teacher.external.student_info import TEXT, prompt_ids

SPECIAL_TOKENS = 64
DECODED_IDS = 256
NO_ROUTE = {404, 405, 501}
REPLACEMENT_CHARACTER = "\ufffd"
"""What a part of a character decodes to."""
_CHOOSE_ANOTHER = (
    "Serve a teacher of the student's family, or choose another student with model.name."
)

log = get_logger()


class TokenizeReply(msgspec.Struct):
    """A reply of `/tokenize`."""

    tokens: list[int]
    max_model_len: int | None = None


async def compare_by_routes(
    student: ModelInfo, endpoint: Endpoint, model: str, template_arguments: Mapping[str, Any]
) -> TokenizeReply | None:
    """Compare by the server's own tokenizer.

    Returns its reply about a text, None where the server has no `/tokenize`.

    Compared are a text, the special tokens, the end of turn, ids from the whole vocabulary, and the
    chat template, which the server renders with `template_arguments`.

    Raises:
        UserError: the vocabularies or the chat templates differ.
        EndpointFault: the server did not answer.
    """
    text = TEXT + "".join(_special_tokens(student.tokenizer))
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    theirs = await _tokenize(endpoint, body)
    if theirs is None:
        return None
    ours = student.tokenizer.encode(text, add_special_tokens=False)
    _check_ids(student, endpoint, ours, theirs.tokens)
    await _check_decoding(student, endpoint, model)
    await _check_template(student, endpoint, model, template_arguments)
    return theirs


def compare_by_texts(student: ModelInfo, endpoint: Endpoint, texts: dict[int, str]) -> None:
    """Compare the texts that came with logprobs with those of the student's tokenizer.

    Raises:
        UserError: one differs by more than white space.
    """
    if not texts:
        log.warning(
            "the endpoint has no /tokenize and returns no text, so its vocabulary is not compared",
            endpoint=endpoint.name,
        )
    for token, theirs in texts.items():
        ours = student.tokenizer.decode([token])
        if REPLACEMENT_CHARACTER in ours + theirs or not _bare(ours) or not _bare(theirs):
            continue
        if _bare(ours) != _bare(theirs):
            difference = f"id {token} is {ours!r} to the student and {theirs!r} to the teacher"
            raise _other_vocabulary(student, endpoint, difference)


def _special_tokens(tokenizer: Any) -> list[str]:
    tokens = dict.fromkeys([*tokenizer.all_special_tokens, tokenizer.eos_token])
    return list(tokens)[:SPECIAL_TOKENS]


async def _tokenize(endpoint: Endpoint, body: dict[str, Any]) -> TokenizeReply | None:
    try:
        return msgspec.json.decode(await endpoint.post("/tokenize", body), type=TokenizeReply)
    except UNDECODABLE:
        return None  # another server's /tokenize, of another form
    except EndpointError as fault:
        if fault.status is not None and (fault.status < 500 or fault.status == 501):
            return None
        raise


def _check_ids(student: ModelInfo, endpoint: Endpoint, ours: list[int], theirs: list[int]) -> None:
    if ours == theirs:
        return
    at = _first_difference(ours, theirs)
    our_token = _token_at(student, ours, at)
    their_token = _token_at(student, theirs, at)
    difference = (
        f"one text is {len(ours)} tokens to the student and {len(theirs)} to the teacher; "
        f"the first that differs is {our_token} to the student and {their_token} to the teacher, "
        "by the student's vocabulary"
    )
    raise _other_vocabulary(student, endpoint, difference)


def _token_at(student: ModelInfo, ids: list[int], at: int) -> str:
    if at >= len(ids):
        return "no token"
    return f"{ids[at]} ({student.tokenizer.decode([ids[at]])!r})"


async def _check_decoding(student: ModelInfo, endpoint: Endpoint, model: str) -> None:
    """Have ids from the student's whole vocabulary decoded.

    The last ones show a vocabulary that is shorter.
    """
    ids = np.unique(np.linspace(0, len(student.tokenizer) - 1, DECODED_IDS).astype(int)).tolist()
    try:
        reply = await endpoint.post("/detokenize", {"model": model, "tokens": ids})
    except RequestRefused as refusal:
        difference = f"the teacher does not know all ids up to {ids[-1]} ({refusal})"
        raise _other_vocabulary(student, endpoint, difference) from refusal
    except EndpointFault as fault:
        if fault.status in NO_ROUTE:
            return
        raise
    body = decoded(reply)
    theirs = str(body.get("prompt") if isinstance(body, dict) else body)
    ours = student.tokenizer.decode(ids)
    if _bare(ours) != _bare(theirs):
        difference = f"{len(ids)} ids from 0 to {ids[-1]} read {_around(ours, theirs)}"
        raise _other_vocabulary(student, endpoint, difference)


async def _check_template(
    student: ModelInfo, endpoint: Endpoint, model: str, arguments: Mapping[str, Any]
) -> None:
    body = {"model": model, "messages": CONVERSATION, "add_generation_prompt": True}
    if arguments:
        body["chat_template_kwargs"] = arguments
    theirs = await _tokenize(endpoint, body)
    if theirs is None:
        log.warning(
            "the endpoint does not render conversations, so its chat template is not compared",
            endpoint=endpoint.name,
        )
        return
    ours = prompt_ids(student, CONVERSATION)
    if ours != theirs.tokens:
        our_text = student.tokenizer.decode(ours)[:160]
        their_text = student.tokenizer.decode(theirs.tokens)[:160]
        raise UserError(
            f"the teacher at {endpoint.name} writes a conversation as {their_text!r}, "
            f"the student {student.name!r} as {our_text!r}",
            expected="chat templates that render alike, since the teacher gets the student's "
            "prompts",
            next_step="Serve the teacher with the student's chat template (vLLM: --chat-template), "
            f"or set {TEACHER_ARGUMENTS[1]} so that they agree; where only the ends of turns "
            f"differ, set model.end_tokens to the teacher's. {_CHOOSE_ANOTHER}",
        )


def _bare(text: str) -> str:
    """`text` without white space, which tokenizers' clean-up settings change."""
    return "".join(text.split())


def _around(ours: str, theirs: str) -> str:
    ours = _bare(ours)
    theirs = _bare(theirs)
    at = _first_difference(ours, theirs)
    window = slice(max(0, at - 8), at + 24)
    return f"…{ours[window]!r} to the student and …{theirs[window]!r} to the teacher"


def _first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """The first place where they differ, at the latest the end of the shorter one."""
    for at, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return at
    return min(len(ours), len(theirs))


def _other_vocabulary(student: ModelInfo, endpoint: Endpoint, difference: str) -> UserError:
    return UserError(
        f"the vocabulary of the teacher at {endpoint.name} is not that of the student "
        f"{student.name!r}: {difference}",
        expected="the same token for every id, since the teacher scores the student's token ids",
        next_step=f"Check orchestrator.teacher_model.client.base_url. {_CHOOSE_ANOTHER}",
    )
