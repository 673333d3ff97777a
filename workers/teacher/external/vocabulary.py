"""Whether a server means the same tokens as the student by the same ids."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from onstream.pipeline.errors import UserError
from onstream.pipeline.http import Endpoint, EndpointError, EndpointFault, RequestRefused, decoded
from onstream.pipeline.telemetry import get_logger
from onstream.settings.decoding import UNDECODABLE
from onstream.workers.teacher.compatibility import TURNS, ModelInfo
from onstream.workers.teacher.external.student_info import TEXT, prompt_ids

SPECIAL_TOKENS = 64
DECODED_IDS = 256
NO_ROUTE = {404, 405, 501}
REPLACED = "\ufffd"  # what a part of a character decodes to
_CHOOSE = "Serve a teacher of the student's family, or choose another student with model.name."

log = get_logger()


class Tokenized(msgspec.Struct):
    """A reply of `/tokenize`."""

    tokens: list[int]
    max_model_len: int | None = None


async def compare_by_routes(student: ModelInfo, endpoint: Endpoint, model: str) -> Tokenized | None:
    """Compares by the server's own tokenizer; returns what it said of a text, None where it has no
    `/tokenize`.

    A text, the special tokens, the end of turn, a spread of ids over the whole vocabulary, and the
    chat template.

    Raises:
        UserError: the vocabularies or the chat templates differ.
        EndpointFault: the server did not answer.
    """
    text = TEXT + "".join(_special_tokens(student.tokenizer))
    theirs = await _tokenized(
        endpoint, {"model": model, "prompt": text, "add_special_tokens": False}
    )
    if theirs is None:
        return None
    _same_ids(
        student, endpoint, student.tokenizer.encode(text, add_special_tokens=False), theirs.tokens
    )
    await _same_decoding(student, endpoint, model)
    await _same_template(student, endpoint, model)
    return theirs


def compare_by_texts(student: ModelInfo, endpoint: Endpoint, texts: dict[int, str]) -> None:
    """Compares the texts that came with logprobs, by token id, with what the student's tokenizer
    says of the ids.

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
        if REPLACED in ours + theirs or not _bare(ours) or not _bare(theirs):
            continue
        if _bare(ours) != _bare(theirs):
            raise _differs(
                student,
                endpoint,
                f"id {token} is {ours!r} to the student and {theirs!r} to the teacher",
            )


def _special_tokens(tokenizer: Any) -> list[str]:
    return list(dict.fromkeys([*tokenizer.all_special_tokens, tokenizer.eos_token]))[
        :SPECIAL_TOKENS
    ]


async def _tokenized(endpoint: Endpoint, body: dict[str, Any]) -> Tokenized | None:
    try:
        return msgspec.json.decode(await endpoint.post("/tokenize", body), type=Tokenized)
    except UNDECODABLE:
        return None  # another server's /tokenize, of another form
    except EndpointError as fault:
        if fault.status is not None and (fault.status < 500 or fault.status == 501):
            return None
        raise


def _same_ids(student: ModelInfo, endpoint: Endpoint, ours: list[int], theirs: list[int]) -> None:
    if ours == theirs:
        return
    at = next(
        (at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    seen = [
        f"{ids[at]} ({student.tokenizer.decode([ids[at]])!r})" if at < len(ids) else "no token"
        for ids in (ours, theirs)
    ]
    raise _differs(
        student,
        endpoint,
        f"one text is {len(ours)} tokens to the student and {len(theirs)} to the teacher; the first that differs is {seen[0]} to the "
        f"student and {seen[1]} to the teacher, by the student's vocabulary",
    )


async def _same_decoding(student: ModelInfo, endpoint: Endpoint, model: str) -> None:
    """One request decodes ids from the whole of the student's vocabulary; the last ones show a
    vocabulary that is shorter.
    """
    ids = np.unique(np.linspace(0, len(student.tokenizer) - 1, DECODED_IDS).astype(int)).tolist()
    try:
        reply = await endpoint.post("/detokenize", {"model": model, "tokens": ids})
    except RequestRefused as refusal:
        raise _differs(
            student, endpoint, f"the teacher does not know all ids up to {ids[-1]} ({refusal})"
        ) from refusal
    except EndpointFault as fault:
        if fault.status in NO_ROUTE:
            return
        raise
    body = decoded(reply)
    theirs = str(body.get("prompt") if isinstance(body, dict) else body)
    ours = student.tokenizer.decode(ids)
    if _bare(ours) != _bare(theirs):
        raise _differs(
            student, endpoint, f"{len(ids)} ids from 0 to {ids[-1]} read {_around(ours, theirs)}"
        )


async def _same_template(student: ModelInfo, endpoint: Endpoint, model: str) -> None:
    theirs = await _tokenized(
        endpoint, {"model": model, "messages": TURNS, "add_generation_prompt": True}
    )
    if theirs is None:
        log.warning(
            "the endpoint does not render conversations, so its chat template is not compared",
            endpoint=endpoint.name,
        )
        return
    ours = prompt_ids(student, TURNS)
    if ours != theirs.tokens:
        texts = [student.tokenizer.decode(ids)[:160] for ids in (theirs.tokens, ours)]
        raise UserError(
            f"the teacher at {endpoint.name} writes a conversation as {texts[0]!r}, the student {student.name!r} as {texts[1]!r}",
            expected="chat templates that render alike, since the teacher sees the student's prompts",
            next_step=f"Serve the teacher with the student's chat template (vLLM: --chat-template). {_CHOOSE}",
        )


def _bare(text: str) -> str:
    """`text` without white space, which tokenizers' clean-up settings change."""
    return "".join(text.split())


def _around(ours: str, theirs: str) -> str:
    ours = _bare(ours)
    theirs = _bare(theirs)
    at = next(
        (at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    window = slice(max(0, at - 8), at + 24)
    return f"…{ours[window]!r} to the student and …{theirs[window]!r} to the teacher"


def _differs(student: ModelInfo, endpoint: Endpoint, how: str) -> UserError:
    return UserError(
        f"the vocabulary of the teacher at {endpoint.name} is not that of the student {student.name!r}: {how}",
        expected="the same token for every id, since the teacher judges the student's token ids",
        next_step=f"Check orchestrator.teacher_model.client.base_url. {_CHOOSE}",
    )
