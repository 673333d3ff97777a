"""A teacher on a real vLLM in its worker's process, beside a server of the same model and plain
transformers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus
from onstream.settings.root import Settings
from onstream.workers.teacher.external import ExternalTeacher
from onstream.workers.teacher.scorer import ScoreRequest, Scores
from onstream.workers.teacher.stage import Teacher
from onstream.workers.teacher.vllm.startup import engine_arguments, load_vllm
from tests.vllm.reference import CLOSE_NATS
from tests.vllm.server import VllmServer
from tests.vllm.test_families import written
from tests.workers.teacher.external.conftest import work
from tests.workers.teacher.test_stage import delivered, rollout

if TYPE_CHECKING:
    from onstream.workers.teacher.vllm.scorer import VllmScorer

pytestmark = pytest.mark.slow
BATCH_TOKENS = 128  # a forward pass of vLLM's, and a block of its prefix cache on a CPU
SAME_NATS = 1e-6
KS = (0, 8, 32)


def settings_of(model: Path, top_k: int = 32, **teacher: Any) -> Settings:
    return Settings.model_validate(
        {
            "model": {"name": str(model)},
            "deployment": {"device": "cpu"},
            "inference": {"sampling": {"max_completion": 64}},
            "trainer": {"loss": {"teacher_tau": 1.0, "teacher_top_k": top_k}},
            "teacher_inference": {
                "engine": "vllm-in-process",
                "max_batch_tokens": BATCH_TOKENS,
                **teacher,
            },
        }
    )


def loaded(settings: Settings) -> VllmScorer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's imports warn of what torch deprecates
        return load_vllm(settings)


@pytest.fixture(scope="module")
def scorer(teacher_dir: Path) -> Iterator[VllmScorer]:
    """The teacher in this process, with forward passes shorter than some samples."""
    scorer = loaded(settings_of(teacher_dir))
    yield scorer
    scorer.close()


@pytest.fixture(scope="module")
def wide_server(
    teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """A real server of the teacher that gives as many likeliest tokens as are asked for here."""
    options = ("--max-logprobs", "32", "--max-num-batched-tokens", str(BATCH_TOKENS))
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    server = VllmServer(teacher_dir, log, options=options)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def some_requests() -> list[ScoreRequest]:
    """Samples alone, of unlike length and longer than a forward pass, and groups that share prompts
    shorter than a block, of whole blocks, and of some more.
    """
    random = np.random.default_rng(0)

    def ids(tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return random.integers(8, 128, tokens).astype(np.int32)

    alone = [ScoreRequest(ids(p), ids(c)) for p, c in ((1, 1), (3, 200), (30, 7), (290, 210))]
    prompts = [ids(20), ids(BATCH_TOKENS), ids(2 * BATCH_TOKENS + 40)]
    groups = [ScoreRequest(prompt, ids(int(c))) for prompt in prompts for c in (5, 40, 150)]
    return [*alone, *groups, *groups[-1:]]  # one of them twice, as after a redelivery


def assert_alike(ours: Sequence[Scores], theirs: Sequence[Scores], nats: float) -> float:
    """The largest difference, which is below `nats`."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        worst = max(worst, float(np.abs(one.logprobs - other.logprobs).max()))
        assert (one.top_ids is None) == (other.top_ids is None)
        if one.top_logprobs is not None and other.top_logprobs is not None:
            assert one.top_logprobs.shape == other.top_logprobs.shape
            worst = max(worst, float(np.abs(one.top_logprobs - other.top_logprobs).max()))
    assert worst < nats
    return worst


@torch.no_grad()
def by_transformers(model_dir: Path, requests: Sequence[ScoreRequest], k: int) -> list[Scores]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    found = []
    for request in requests:
        ids = np.concatenate((request.prompt_ids, request.completion_ids)).astype(np.int64)
        logits = model(torch.from_numpy(ids)[None]).logits[0, len(request.prompt_ids) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        written = torch.from_numpy(request.completion_ids.astype(np.int64))
        own = logprobs.gather(1, written[:, None])[:, 0].numpy()
        top = logprobs.topk(k)
        found.append(Scores(own, top.indices.numpy(), top.values.numpy()) if k else Scores(own))
    return found


@pytest.mark.parametrize("k", KS)
def test_vllm_in_process_scores_as_transformers_does(
    scorer: VllmScorer, teacher_dir: Path, k: int
) -> None:
    requests = some_requests()
    scored = scorer.score(requests, top_k=k)
    worst = assert_alike(scored, by_transformers(teacher_dir, requests, k), CLOSE_NATS)
    print(f"k = {k}: vLLM and transformers differ by at most {worst:.1e} nats")
    # Prompts are in the cache now, and whole samples too.
    assert_alike(scored, scorer.score(requests, top_k=k), SAME_NATS * 10)


@pytest.mark.parametrize("k", KS)
def test_vllm_in_process_scores_as_a_server_does(
    scorer: VllmScorer, wide_server: VllmServer, student_dir: Path, bus: Bus, k: int
) -> None:
    requests = some_requests()
    client = {"base_url": wide_server.base_url, "protocol": "vllm-generate"}
    teacher = {"client": client, "model": {"name": "teacher"}}
    asked = settings_of(student_dir, k).model_dump()
    asked["orchestrator"] |= {"score_cache": 0, "teacher_model": teacher}
    stage = ExternalTeacher(Settings.model_validate(asked), bus)
    stage.setup()
    rollouts = [
        rollout(
            number,
            prompt=request.prompt_ids.tolist(),
            completion=request.completion_ids.tolist(),
        )
        for number, request in enumerate(requests)
    ]
    try:
        outcomes = work(stage, delivered(*rollouts))
    finally:
        stage.close(finished=True)
    served = {}
    for outcome in outcomes:
        assert outcome.dead is None
        served[outcome.delivery.number] = _scores(outcome.delivery.rollout.samples[0], k)
    theirs = [served[number] for number in range(len(requests))]
    worst = assert_alike(scorer.score(requests, top_k=k), theirs, SAME_NATS)
    print(f"k = {k}: in process and over HTTP differ by at most {worst:.1e} nats")


def _scores(sample: Any, k: int) -> Scores:
    own = np.frombuffer(sample.teacher_logprobs, "<f4")
    if not k:
        return Scores(own)
    top = np.frombuffer(sample.teacher_top_logprobs, "<f4").reshape(-1, k)
    ids = np.frombuffer(sample.teacher_top_ids, "<i4").reshape(-1, k)
    return Scores(own, ids, top)


def test_the_prompt_of_a_group_is_computed_once(scorer: VllmScorer) -> None:
    """What vLLM's cache holds of a prompt is not computed again, but for its last block."""
    random = np.random.default_rng(1)
    prompt = random.integers(8, 128, 300).astype(np.int32)
    group = [ScoreRequest(prompt, random.integers(8, 128, 20).astype(np.int32)) for _ in range(4)]
    computed = []
    core: Any = scorer._engine.engine_core
    take = core.get_output

    def get_output() -> Any:
        outputs = take()
        computed.extend(320 - one.prefill_stats.num_cached_tokens for one in outputs.outputs)
        return outputs

    core.get_output = get_output
    try:
        scorer.score(group, top_k=0)
    finally:
        core.get_output = take
    assert computed == [320, 64, 64, 64]


def test_the_worker_writes_the_scores_of_vllm_in_process_into_the_record(
    scorer: VllmScorer, teacher_dir: Path, bus: Bus
) -> None:
    teacher = Teacher(settings_of(teacher_dir, 8), bus, load=lambda _: scorer)
    teacher.setup()
    (outcome,) = teacher.handle(delivered(rollout(1, completion=[20, 30, 3])))
    assert outcome.dead is None
    record = outcome.delivery.rollout
    assert record.scored_by == str(teacher_dir)
    [own, k] = [_scores(record.samples[0], 8).logprobs, record.samples[0].teacher_top_ids]
    assert own.shape == (3,) and len(k or b"") == 3 * 8 * 4
    assert record.samples[0].teacher_tail_logprobs is None, "the trainer computes it"


def test_arguments_that_vllm_does_not_know_are_refused(teacher_dir: Path) -> None:
    with pytest.raises(UserError, match=r"vLLM does not take .*--colour"):
        load_vllm(settings_of(teacher_dir, extra_args=["--colour", "red"]))


def test_its_arguments_follow_from_the_settings(teacher_dir: Path) -> None:
    settings = settings_of(teacher_dir, dtype="bfloat16", extra_args=["--max-num-seqs", "5"])
    words = engine_arguments(settings, 512, images=True)
    assert words[words.index("--dtype") + 1] == "bfloat16"
    assert words[words.index("--max-logprobs") + 1] == "32"
    assert words[words.index("--max-num-batched-tokens") + 1] == str(BATCH_TOKENS)
    assert words[-2:] == ["--max-num-seqs", "5"]
    assert json.loads(words[words.index("--limit-mm-per-prompt") + 1])["video"] == 0


@pytest.mark.rotates("a run on vLLM in the teacher's worker", 2, 3)
def test_a_model_that_vllm_cannot_compute_in_float32_is_refused_and_scored_in_bfloat16(
    tmp_path: Path,
) -> None:
    """Layers that keep a state in place of keys and values, whose prompts are not shared."""
    hybrid = written(tmp_path, "qwen3_5_text")
    with pytest.raises(UserError, match=r"vLLM cannot compute the teacher .*requires BF16"):
        loaded(settings_of(hybrid, 8, dtype="float32", max_batch_tokens=512))
    scorer = loaded(settings_of(hybrid, 8, dtype="bfloat16", max_batch_tokens=512))
    try:
        requests = [one for one in some_requests() if one.tokens < scorer.context_tokens]
        scored = scorer.score(requests, top_k=8)
        exact = by_transformers(hybrid, requests, 8)
        gaps = [
            np.abs(one.logprobs - other.logprobs).mean()
            for one, other in zip(scored, exact, strict=True)
        ]
        assert not scorer._shares_prompts
        print(f"on average {np.mean(gaps):.1e} nats from float32")
        assert np.mean(gaps) < 0.1
    finally:
        scorer.close()
