from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.forward import SHARED_PREFIX, VARLEN, hidden_states
from onstream.pipeline.models.loading import text_config
from onstream.pipeline.models.logprobs import OutputHead
from onstream.pipeline.models.packing import SharedPrefixRow, pack, share_prompts
from onstream.settings.root import Settings
from onstream.workers.teacher import local_scorer
from onstream.workers.teacher.local_scorer import LocalScorer, load_local
from onstream.workers.teacher.scorer import ScoreRequest, Scores
from tests.models.test_gradients import KINDS, written


def scorer_of(model_dir: Path, **teacher: object) -> LocalScorer:
    return load_local(
        Settings.model_validate({"model": {"name": str(model_dir)}, "teacher_inference": teacher})
    )


def some_requests(seed: int = 0) -> list[ScoreRequest]:
    """Three groups of 5, 1 and 3 samples, mixed, of different lengths.

    One completion is a single token.
    """
    random = np.random.default_rng(seed)
    prompts = [random.integers(8, 128, length).astype(np.int32) for length in (19, 30, 3)]
    order = [0, 1, 0, 2, 0, 2, 0, 2, 0]
    lengths = [7, 1, 12, 30, 1, 4, 9, 2, 3]
    return [
        ScoreRequest(prompts[group], random.integers(3, 128, length).astype(np.int32))
        for group, length in zip(order, lengths, strict=True)
    ]


@torch.no_grad()
def one_by_one(model_dir: Path, requests: Sequence[ScoreRequest]) -> list[torch.Tensor]:
    """The log distribution [C, V] at every completion token, by plain transformers, one sample at a
    time.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    found = []
    for request in requests:
        ids = torch.from_numpy(
            np.concatenate((request.prompt_ids, request.completion_ids)).astype(np.int64)
        )
        logits = model(ids[None], use_cache=False).logits[0]
        found.append(logits[len(request.prompt_ids) - 1 : -1].log_softmax(-1))
    return found


@pytest.mark.parametrize("max_batch_tokens", [8192, 48, 16])
def test_scores_equal_one_sample_at_a_time_however_they_are_packed(
    model_dir: Path, max_batch_tokens: int
) -> None:
    requests = some_requests()
    scores = scorer_of(model_dir, max_batch_tokens=max_batch_tokens, head_chunk=5).score(
        requests, top_k=4
    )
    for request, score, wanted in zip(
        requests, scores, one_by_one(model_dir, requests), strict=True
    ):
        targets = torch.from_numpy(request.completion_ids.astype(np.int64))
        np.testing.assert_allclose(
            score.logprobs, wanted.gather(1, targets[:, None])[:, 0].numpy(), atol=1e-5
        )
        assert score.top_ids is not None and score.top_logprobs is not None
        np.testing.assert_allclose(score.top_logprobs, wanted.topk(4).values, atol=1e-5)
        np.testing.assert_allclose(
            wanted.gather(1, torch.from_numpy(score.top_ids.astype(np.int64))),
            score.top_logprobs,
            atol=1e-5,
        )


@pytest.mark.parametrize("max_batch_tokens", [8192, 48])
def test_scores_by_cumulative_lengths_are_those_under_masks(
    model_dir: Path, max_batch_tokens: int
) -> None:
    states: dict[str, torch.Tensor] = {}
    scores: dict[str, list[Scores]] = {}
    for attention in ("varlen", "sdpa"):
        scorer = scorer_of(model_dir, max_batch_tokens=max_batch_tokens, attention=attention)
        scores[attention] = scorer.score(some_requests(), top_k=4)
        rows = pack(share_prompts(*zip(*map(ids_of, some_requests()), strict=True)), 8192)
        states[attention] = torch.cat([hidden_states(scorer._model, row) for row in rows])
    gap = (states["varlen"] - states["sdpa"]).norm() / states["sdpa"].norm()
    assert gap <= 1e-6
    for found, expected in zip(scores["varlen"], scores["sdpa"], strict=True):
        for name in ("logprobs", "top_logprobs", "tail_logprobs"):
            np.testing.assert_allclose(
                getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5
            )
        np.testing.assert_array_equal(found.top_ids, expected.top_ids)


def ids_of(request: ScoreRequest) -> tuple[np.ndarray, np.ndarray]:
    return request.prompt_ids, request.completion_ids


def test_a_prompt_of_a_group_is_scored_once_and_no_mask_is_made_by_cumulative_lengths(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[SharedPrefixRow] = []
    states = local_scorer.hidden_states

    def spy(model: object, packed: SharedPrefixRow, *others: object) -> torch.Tensor:
        read.append(packed)
        return states(model, packed, *others)  # type: ignore[arg-type]

    scorer = scorer_of(model_dir, attention="varlen")
    monkeypatch.setattr(local_scorer, "hidden_states", spy)
    scorer.score(some_requests(), top_k=4)
    (row,) = read
    prompts = 19 + 30 + 3
    completions = sum(len(request.completion_ids) - 1 for request in some_requests())
    assert len(row.input_ids) == prompts + completions
    assert "cumulative" in vars(row) and "calls" not in vars(row)


@pytest.mark.parametrize(
    ("asked", "chosen"), [("auto", SHARED_PREFIX), ("sdpa", SHARED_PREFIX), ("varlen", VARLEN)]
)
def test_on_a_cpu_the_teacher_reads_by_cumulative_lengths_only_where_that_is_asked_for(
    model_dir: Path, asked: str, chosen: str
) -> None:
    scorer = scorer_of(model_dir, attention=asked)
    assert text_config(scorer._model)._attn_implementation == chosen


def test_a_teacher_on_padded_rows_is_refused_by_name_where_cumulative_lengths_are_asked_for(
    tmp_path: Path,
) -> None:
    directory = written(tmp_path, *KINDS["hybrid"])
    words = r"(?s)teacher_inference\.attention = .varlen.*linear_attention"
    with pytest.raises(UserError, match=words):
        scorer_of(directory, attention="varlen")


def test_the_likeliest_tokens_and_the_tail_sum_to_one(model_dir: Path) -> None:
    for score in scorer_of(model_dir).score(some_requests(), top_k=4):
        assert score.top_logprobs is not None and score.tail_logprobs is not None
        total = np.exp(score.top_logprobs.astype(np.float64)).sum(-1) + np.exp(
            score.tail_logprobs.astype(np.float64)
        )
        np.testing.assert_allclose(total, 1, atol=1e-5)


def test_without_top_k_there_are_sampled_logprobs_alone(model_dir: Path) -> None:
    (score,) = scorer_of(model_dir).score(some_requests()[:1], top_k=0)
    assert score == Scores(score.logprobs)
    assert score.logprobs.shape == (7,) and score.logprobs.dtype == np.float32


def test_k_of_the_whole_vocabulary_leaves_one_token_to_the_tail(model_dir: Path) -> None:
    (score,) = scorer_of(model_dir).score(some_requests()[:1], top_k=1024)
    assert score.top_ids is not None and score.top_ids.shape == (7, 127)
    assert score.tail_logprobs is not None and np.isfinite(score.tail_logprobs).all()


def test_entries_that_only_the_teacher_has_take_no_probability(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    narrow = LocalScorer(
        "narrow",
        model,
        context_tokens=512,
        vocabulary_size=100,
        max_batch_tokens=8192,
        head_chunk=64,
    )
    request = ScoreRequest(np.arange(10, 20, dtype=np.int32), np.arange(30, 35, dtype=np.int32))
    (score,) = narrow.score([request], top_k=4)
    with torch.no_grad():
        logits = model(torch.tensor([[*range(10, 20), *range(30, 35)]])).logits[0, 9:-1, :100]
    np.testing.assert_allclose(
        score.logprobs, logits.log_softmax(-1)[torch.arange(5), torch.arange(30, 35)], atol=1e-5
    )
    assert score.top_ids is not None and score.top_ids.max() < 100


def test_no_more_positions_than_a_chunk_have_logits_at_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    logits = OutputHead.logits

    def spy(head: OutputHead, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return logits(head, hidden, out)

    requests = some_requests()
    scorer = scorer_of(model_dir, head_chunk=8)
    monkeypatch.setattr(OutputHead, "logits", spy)
    scorer.score(requests, top_k=4)
    assert max(seen) == 8
    assert sum(seen) == sum(len(request.completion_ids) for request in requests)


def test_every_pass_is_begun_before_the_results_of_one_are_read(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the next pass is packed while the last one is computed."""
    order: list[str] = []

    def noted(name: str) -> None:
        original = getattr(local_scorer, name)

        def call(*given: object, **named: object) -> object:
            order.append(name)
            return original(*given, **named)

        monkeypatch.setattr(local_scorer, name, call)

    scorer = scorer_of(model_dir, max_batch_tokens=48)
    noted("token_logprobs")
    noted("_split")
    scorer.score(some_requests(), top_k=4)
    passes = len(order) // 2
    assert passes > 2 and order == ["token_logprobs"] * passes + ["_split"] * passes


def test_results_leave_the_device_in_the_form_of_records(model_dir: Path) -> None:
    for scores in scorer_of(model_dir).score(some_requests(), top_k=4):
        assert scores.top_ids is not None and scores.top_ids.dtype == np.int32
        for field in (scores.logprobs, scores.top_logprobs, scores.tail_logprobs):
            assert field is not None and field.dtype == np.float32
