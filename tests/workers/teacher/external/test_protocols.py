from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from onstream.pipeline.http import BadReply
from onstream.settings.teacher_protocols import TEACHER_PROTOCOLS
from onstream.workers.teacher.external.protocols import TeacherProtocol, load_variants
from onstream.workers.teacher.external.protocols.echo import Echo
from onstream.workers.teacher.external.protocols.sglang import Sglang
from onstream.workers.teacher.external.protocols.vllm import VllmCompletions, VllmGenerate
from onstream.workers.teacher.scorer import ScoreRequest
from tests.table_teacher import TableTeacher

REQUEST = ScoreRequest(
    np.array([2, 5, 40], dtype=np.int32), np.array([50, 60, 70, 3], dtype=np.int32)
)
TABLE = TableTeacher()


def reply(protocol: TeacherProtocol, top_k: int, table: TableTeacher = TABLE) -> bytes:
    return json.dumps(
        table.scores(protocol.path, protocol.body("teacher", REQUEST, top_k))
    ).encode()


def changed(answer: bytes, change: Any) -> bytes:
    decoded = json.loads(answer)
    change(decoded)
    return json.dumps(decoded).encode()


@pytest.mark.parametrize("protocol", load_variants("auto"), ids=str)
def test_every_protocol_gives_the_logprobs_of_the_completion_alone(
    protocol: TeacherProtocol,
) -> None:
    scores = protocol.scores(reply(protocol, 0), REQUEST, 0)
    np.testing.assert_allclose(
        scores.logprobs, TABLE.expected(REQUEST.prompt_ids, REQUEST.completion_ids), rtol=1e-6
    )
    assert scores.logprobs.dtype == np.float32
    assert scores.top_ids is scores.top_logprobs is scores.tail_logprobs is None


@pytest.mark.parametrize("protocol", [VllmGenerate(), VllmCompletions(), Echo(), Sglang()], ids=str)
def test_the_k_likeliest_come_likeliest_first_and_without_the_sampled_token_that_is_none_of_them(
    protocol: TeacherProtocol,
) -> None:
    scores = protocol.scores(reply(protocol, 3), REQUEST, 3)
    ids = [2, 5, 40, 50, 60, 70, 3]
    rows = np.array([TABLE.logprobs[before] for before in ids[2:-1]])
    assert scores.top_ids is not None and scores.top_logprobs is not None
    np.testing.assert_array_equal(scores.top_ids, np.argsort(-rows)[:, :3])
    np.testing.assert_allclose(scores.top_logprobs, -np.sort(-rows)[:, :3], rtol=1e-6)
    assert (
        scores.tail_logprobs is None
    )  # the trainer computes it from the k, and counts where it was floored


def test_a_protocol_is_called_what_the_table_calls_it() -> None:
    for name in TEACHER_PROTOCOLS:
        assert {variant.name for variant in load_variants(name)} == {name}
    names = [variant.name for variant in load_variants("auto")]
    assert list(dict.fromkeys(names)) == list(TEACHER_PROTOCOLS)


def test_logprobs_are_looked_up_by_id_whatever_their_order() -> None:
    def reverse(answer: Any) -> None:
        answer["prompt_logprobs"] = [
            p and dict(reversed(p.items())) for p in answer["prompt_logprobs"]
        ]

    protocol = VllmGenerate()
    right = protocol.scores(reply(protocol, 5), REQUEST, 5)
    assert (
        right.logprobs.tolist()
        == protocol.scores(changed(reply(protocol, 5), reverse), REQUEST, 5).logprobs.tolist()
    )


def test_echo_in_text_is_taken_in_order_and_cannot_give_the_likeliest() -> None:
    textual = TableTeacher(named_ids=False)
    scores = Echo().scores(reply(Echo(), 0, textual), REQUEST, 0)
    np.testing.assert_allclose(
        scores.logprobs, TABLE.expected(REQUEST.prompt_ids, REQUEST.completion_ids), rtol=1e-6
    )
    with pytest.raises(BadReply, match="the likeliest tokens as text"):
        Echo().scores(reply(Echo(), 2, textual), REQUEST, 2)


def test_echo_ignores_the_token_that_a_server_had_to_generate() -> None:
    def add(answer: Any) -> None:
        answer["choices"][0]["logprobs"]["tokens"].append("x")
        answer["choices"][0]["logprobs"]["token_logprobs"].append(-1.0)

    protocol = Echo(named_ids=False, max_tokens=1)
    assert len(protocol.scores(changed(reply(protocol, 0), add), REQUEST, 0).logprobs) == 4


def other_token(answer: Any) -> None:
    answer["prompt_logprobs"][4] = {"9": {"logprob": -1.0}}


def one_too_few(answer: Any) -> None:
    answer["prompt_logprobs"].pop()


def none_at_all(answer: Any) -> None:
    answer["prompt_logprobs"] = None


def not_finite(answer: Any) -> None:
    answer["prompt_logprobs"][4]["60"]["logprob"] = -1e999


def above_zero(answer: Any) -> None:
    answer["prompt_logprobs"][4]["60"]["logprob"] = 0.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_token, "token 9 where token 60 was sent, at position 1 of the completion"),
        (one_too_few, "logprobs of 6 tokens for a prompt of 7"),
        (none_at_all, "a reply without prompt_logprobs"),
        (not_finite, "does not have the protocol's form"),
        (above_zero, "logprob 0.25 for token 60 at position 1 .*; expected -32768 to 0, in nats"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for_is_refused_in_words(
    change: Any, words: str
) -> None:
    with pytest.raises(BadReply, match=words):
        VllmGenerate().scores(changed(reply(VllmGenerate(), 0), change), REQUEST, 0)


def test_a_likely_token_with_a_logprob_above_0_is_refused() -> None:
    def raise_another(answer: Any) -> None:
        others = answer["prompt_logprobs"][4]
        others[next(token for token in others if token != "60")]["logprob"] = 0.5

    with pytest.raises(BadReply, match=r"logprobs .* to 0.5 at position 1 .*; expected -32768 to"):
        VllmGenerate().scores(changed(reply(VllmGenerate(), 4), raise_another), REQUEST, 4)


@pytest.mark.parametrize("protocol", load_variants("auto"), ids=str)
def test_a_logprob_that_rounding_put_a_little_above_0_is_taken(protocol: TeacherProtocol) -> None:
    rounded = TableTeacher()
    rounded.logprobs[40, 50] = 0.0005
    scores = protocol.scores(reply(protocol, 0, rounded), REQUEST, 0)
    assert scores.logprobs[0] == np.float32(0.0005)


def test_fewer_likeliest_tokens_than_asked_for_are_refused() -> None:
    with pytest.raises(
        BadReply, match="2 likeliest tokens at position 0 of the completion where 4 were asked for"
    ):
        VllmGenerate().scores(
            changed(
                reply(VllmGenerate(), 4),
                lambda a: a.update(
                    prompt_logprobs=[p and dict(list(p.items())[:2]) for p in a["prompt_logprobs"]]
                ),
            ),
            ScoreRequest(REQUEST.prompt_ids, REQUEST.completion_ids),
            4,
        )


def test_other_ids_in_echo_and_sglang_are_noticed() -> None:
    def echo(answer: Any) -> None:
        answer["choices"][0]["logprobs"]["tokens"][5] = "token_id:9"

    def sglang(answer: Any) -> None:
        answer["meta_info"]["input_token_logprobs"][-1][1] = 9

    for protocol, change, words in (
        (Echo(), echo, "token 9 where token 70"),
        (Sglang(), sglang, "token 9 where token 3"),
    ):
        with pytest.raises(BadReply, match=words):
            protocol.scores(changed(reply(protocol, 0), change), REQUEST, 0)
