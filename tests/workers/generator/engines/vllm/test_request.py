"""A request that vLLM writes in one piece or in several."""

from __future__ import annotations

import numpy as np
import pytest

from onstream.pipeline.records import VersionSpan
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.vllm.request import VllmRequest

REQUEST = GenerationRequest(
    5, np.array([7, 8], dtype=np.int32), max_tokens=6, seed=11, temperature=0.7
)


def test_a_request_is_asked_for_in_vllms_words() -> None:
    writing = VllmRequest(REQUEST)
    assert writing.prompt_ids == [7, 8]
    assert writing.sampling_params({9, 3}) == {
        "max_tokens": 6,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 11,
        "stop_token_ids": [3, 9],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


def test_a_piece_that_finishes_is_the_completion() -> None:
    writing = VllmRequest(REQUEST)
    writing.take([1, 3], [-0.5, -0.25], [(4, 0, 1), (5, 1, 2)], "stop")
    one = writing.completion()
    assert (one.key, one.token_ids.tolist(), one.logprobs.tolist(), one.finish_reason) == (
        5,
        [1, 3],
        [-0.5, -0.25],
        "stop",
    )
    assert one.version_spans == [VersionSpan(4, 0, 1), VersionSpan(5, 1, 2)]


def test_what_was_aborted_goes_on_with_what_was_written_under_another_seed() -> None:
    writing = VllmRequest(REQUEST)
    writing.take([1, 2], [-1.0, -2.0], [(4, 0, 2)], "abort")
    assert writing.finish_reason is None
    assert writing.prompt_ids == [7, 8, 1, 2]
    rest = writing.sampling_params({3})
    assert rest["max_tokens"] == 4
    assert rest["seed"] not in (11, None) and 0 <= rest["seed"] < 1 << 63
    assert rest["seed"] == writing.sampling_params({3})["seed"], "the same whenever it is asked for"
    writing.take([], [], [], "abort")  # before its first token
    writing.take([1], [-3.0], [(4, 0, 1)], "abort")
    writing.take([2, 1, 1], [-4.0, -5.0, -6.0], [(6, 0, 3)], "length")
    one = writing.completion()
    assert one.token_ids.tolist() == [1, 2, 1, 2, 1, 1]
    assert one.logprobs.tolist() == [-1, -2, -3, -4, -5, -6]
    assert one.version_spans == [VersionSpan(4, 0, 3), VersionSpan(6, 3, 6)]
    assert one.finish_reason == "length"


def test_an_end_that_no_rollout_can_have_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended request 5 for the reason 'error'"):
        VllmRequest(REQUEST).take([], [], [], "error")


def test_seeds_of_64_bits_are_ones_that_vllm_takes() -> None:
    assert (
        VllmRequest(GenerationRequest(1, REQUEST.prompt_ids, 3, seed=-1)).sampling_params(())[
            "seed"
        ]
        == (1 << 63) - 1
    )
