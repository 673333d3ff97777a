"""The bytes of real records, and the room in Redis that is derived from them."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from onstream.pipeline.record_codec import encode, ids_bytes, logprobs_bytes, mask_bytes
from onstream.pipeline.records import Rollout, Sample, Timing, VersionSpan
from onstream.settings.check import Findings, report
from onstream.settings.load import load_settings, resolve
from onstream.settings.record_sizes import (
    longest_rollout,
    max_backlog,
    max_memory_mib,
    max_unacked_bytes,
    record_sizes,
)
from onstream.settings.root import Settings

TEACHER = ["deployment.num_teacher_gpus=1", "trainer.loss.teacher_tau=1"]
ENDPOINT = [
    'orchestrator.teacher_model.client.base_url=["http://teacher/v1"]',
    "orchestrator.teacher_model.model.name=big",
]
LONG = [*TEACHER, "inference.sampling.max_completion=16384", "trainer.loss.teacher_top_k=32"]


def settings_of(*overrides: str) -> Settings:
    return load_settings([], ["run.name=sizes", *overrides])


def encoded(prompt: int, completion: int, k: int | None, images: int = 0) -> int:
    """Bytes of a rollout with all that a run adds to it; no teacher has scored it with k None."""
    sample = Sample(
        prompt_ids=ids_bytes(range(prompt)),
        completion_ids=ids_bytes(range(completion)),
        loss_mask=mask_bytes([1] * completion),
        generator_logprobs=logprobs_bytes([-1.0] * completion),
        version_spans=[VersionSpan(10**6, 0, completion)],
        completion_text="word" * completion,
        images=["ab" * 32] * images,
    )
    if k is not None:
        sample.teacher_logprobs = logprobs_bytes([-1.0] * completion)
    if k:
        sample.teacher_top_ids = ids_bytes([7] * completion * k)
        sample.teacher_top_logprobs = logprobs_bytes([-5.0] * completion * k)
        sample.teacher_tail_logprobs = logprobs_bytes([-1.0] * completion)
    now = time.time()
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "word" * prompt}],
        "info": {"answer": "forty-two " * 10},
        "timings": [Timing(stage, "teacher-node-1-12345", now, now) for stage in ("verify",) * 3],
        "reward": 0.5,
        "reward_parts": {"exact": 1.0, "format": 0.5},
        "scored_by": "Qwen/Qwen3-4B",
    }
    return len(
        encode(
            Rollout(
                10**6,
                10**5,
                8,
                10**5,
                samples=[sample],
                temperature=1.0,
                finish_reason="stop",
                route=["train"],
                **fields,
            )
        )
    )


@pytest.mark.parametrize(("k", "token_bytes"), [(None, 13), (0, 17), (8, 85), (32, 277)])
def test_a_token_of_a_record_weighs_what_the_formula_says(k: int | None, token_bytes: int) -> None:
    """Beside a few bytes for the lengths of its fields."""
    longer = encoded(10, 9000, k) - encoded(10, 1000, k)
    assert token_bytes * 8000 <= longer <= token_bytes * 8000 + 32


def test_prompts_images_and_the_rest_of_a_record_weigh_what_the_formula_says() -> None:
    assert 8000 * 8 <= encoded(9000, 1, 0) - encoded(1000, 1, 0) <= 8000 * 8 + 16
    assert 64 * 16 <= encoded(1, 1, 0, images=16) - encoded(1, 1, 0) <= 66 * 16 + 4
    assert encoded(1, 1, None) < 1024


@pytest.mark.parametrize("k", [0, 8, 32])
def test_the_longest_rollout_of_a_run_is_within_its_bytes(k: int) -> None:
    settings = settings_of(
        *TEACHER, "inference.sampling.max_completion=2048", f"trainer.loss.teacher_top_k={k}"
    )
    rollout_bytes = record_sizes(settings).rollout_bytes
    assert 0.9 * rollout_bytes < encoded(2048, 2048, k) <= rollout_bytes


def test_an_automatic_top_k_counts_with_its_bound() -> None:
    assert record_sizes(settings_of(*TEACHER)) == record_sizes(
        settings_of(*TEACHER, "trainer.loss.teacher_top_k=8")
    )
    assert record_sizes(settings_of()).top_k == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (TEACHER, "of completion, top-k 8\n"),
        ([*ENDPOINT, TEACHER[1]], "of completion, top-k 8, or what the teacher's endpoint gives\n"),
        ([*ENDPOINT, TEACHER[1], "trainer.loss.teacher_top_k=4"], "of completion, top-k 4\n"),
        ([], "of completion\n"),
    ],
)
def test_the_check_says_how_many_of_the_likeliest_tokens_a_record_holds(
    overrides: list[str], words: str
) -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    report(resolve(overrides=overrides, environ={}), Findings(), console, everything=False)
    assert words in printed.getvalue()


DERIVED = [
    # overrides, MiB of Redis, backlog, bytes that wait for a checkpoint
    ([], 1024, 16384, 256 << 20),
    (LONG, 6144, 16384, 3_108_660_840),
    ([*LONG, "orchestrator.max_off_policy_steps=0"], 4608, 16384, 3_108_660_840),
    ([*LONG, "checkpoint.max_unacked_bytes=1048576"], 3072, 16384, 3_108_660_840),
    ([*LONG, "weights.transport=redis"], 12032, 16384, 3_108_660_840),
    (["orchestrator.batch_size=8192"], 1024, 24576, 501_638_760),
]


@pytest.mark.parametrize(("overrides", "memory", "backlog", "unacked"), DERIVED)
def test_room_is_derived_from_batch_and_tokens_and_k(
    overrides: list[str], memory: int, backlog: int, unacked: int
) -> None:
    sizes = record_sizes(settings_of(*overrides))
    derived = (sizes.max_memory_mib, sizes.max_backlog, sizes.max_unacked_bytes)
    assert derived == (memory, backlog, unacked)


def test_what_is_given_is_never_changed() -> None:
    given = [
        "redis.max_memory=8192",
        "orchestrator.max_backlog=7",
        "checkpoint.max_unacked_bytes=65536",
    ]
    settings = settings_of(*LONG, *given)
    used = (max_memory_mib(settings), max_backlog(settings), max_unacked_bytes(settings))
    assert used == (8192, 7, 65536)


def test_a_prompt_of_the_teachers_own_is_counted_where_a_teacher_reads_it() -> None:
    teacher = ["deployment.num_teacher_gpus=1", "trainer.loss.teacher_tau=1"]
    own = ["task.teacher_prompt.template={prompt} {answer}", "task.teacher_prompt.system=Think."]
    plain, more = (
        longest_rollout(settings_of(*overrides), scored=True)
        for overrides in (teacher, [*teacher, *own])
    )
    assert more - plain == 4 * (512 + len("{prompt} {answer}") + len("Think."))
