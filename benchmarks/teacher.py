"""How fast the local teacher scores: rollouts/s and tokens/s, beside the padded batches that a
transformers user would write.

    OMP_NUM_THREADS=1 python benchmarks/teacher.py [--model DIR] [--groups 32] [--group-size 8]

Both score the same rollouts of `reverse-text` with the same model in the same run, and give each
sampled token's logprob; the teacher's scorer gives the 4 likeliest tokens of each position and the
tail besides. Tokens are those of all samples, prompts counted once a rollout, whether or not they
were computed so often.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from onstream.pipeline.models.loading import load_model
from onstream.pipeline.models.tokenizer import load_tokenizer
from onstream.pipeline.tasks import load_task
from onstream.settings.root import Settings
from onstream.workers.teacher.local_scorer import load_local
from onstream.workers.teacher.scorer import ScoreRequest
from onstream.workers.tiny_models.fresh import write_fresh
from onstream.workers.tiny_models.recipes import RECIPES

PADDED_ROWS = 64
SECONDS = 3.0


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--model",
        type=Path,
        help="a model directory; by default one of the example teacher's shape",
    )
    options.add_argument("--groups", type=int, default=32)
    options.add_argument("--group-size", type=int, default=8)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = asked.model or write_fresh(Path(scratch), RECIPES["teacher"].shape, seed=0)
        Console().print(measured(model_dir, rollouts(model_dir, asked.groups, asked.group_size)))


def rollouts(model_dir: Path, groups: int, group_size: int) -> list[ScoreRequest]:
    """Answers of right length and wrong letters to problems of reverse-text, group by group."""
    tokenizer = load_tokenizer(model_dir)
    task = load_task(Settings())
    random = np.random.default_rng(0)
    made = []
    for group in range(groups):
        problem = task.train(group)
        prompt = np.array(
            tokenizer.apply_chat_template(problem.messages, add_generation_prompt=True)[
                "input_ids"
            ],
            dtype=np.int32,
        )
        answer = np.array(
            [*tokenizer(problem.info["answer"]).input_ids, tokenizer.eos_token_id], dtype=np.int32
        )
        made += [
            ScoreRequest(prompt, np.concatenate((random.permutation(answer[:-1]), answer[-1:])))
            for _ in range(group_size)
        ]
    return made


def measured(model_dir: Path, requests: Sequence[ScoreRequest]) -> Table:
    """A line for each way and precision, and how far the logprobs of the two ways are apart."""
    table = Table(
        f"{len(requests)} rollouts, {torch.get_num_threads()} thread(s)",
        "rollouts/s",
        "tokens/s",
        "× padded",
        "max |Δ| nats",
    )
    for dtype in ("float32", "bfloat16"):
        settings = Settings.model_validate(
            {"model": {"name": str(model_dir)}, "teacher_inference": {"dtype": dtype}}
        )
        scorer = load_local(settings)
        plain = load_model(model_dir, dtype=getattr(torch, dtype), device=torch.device("cpu"))
        baseline = per_second(lambda plain=plain: padded_logprobs(plain, requests))  # type: ignore[misc]
        packed = per_second(lambda scorer=scorer: scorer.score(requests, top_k=4))  # type: ignore[misc]
        ours = np.concatenate([scores.logprobs for scores in scorer.score(requests, top_k=4)])
        apart = float(np.abs(ours - torch.cat(padded_logprobs(plain, requests)).numpy()).max())
        tokens = sum(request.tokens for request in requests)
        for name, rate in (
            (f"padded batches of {PADDED_ROWS}, {dtype}", baseline),
            (f"the teacher's scorer, {dtype}", packed),
        ):
            table.add_row(
                name,
                f"{rate * len(requests):,.0f}",
                f"{rate * tokens:,.0f}",
                f"{rate / baseline:.1f}",
                f"{apart:.1g}",
            )
    return table


@torch.inference_mode()
def padded_logprobs(model: PreTrainedModel, requests: Sequence[ScoreRequest]) -> list[torch.Tensor]:
    """Logprobs of each completion, by rows padded on the right under the usual attention mask."""
    found = []
    for start in range(0, len(requests), PADDED_ROWS):
        batch = requests[start : start + PADDED_ROWS]
        rows = [
            torch.from_numpy(
                np.concatenate((request.prompt_ids, request.completion_ids)).astype(np.int64)
            )
            for request in batch
        ]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logprobs = (
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            .logits[:, :-1]
            .float()
            .log_softmax(-1)
        )
        sampled = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        found += [
            sampled[i, len(request.prompt_ids) - 1 : request.tokens - 1]
            for i, request in enumerate(batch)
        ]
    return found


def per_second(work: Callable[[], object]) -> float:
    """How often a second `work` is done, after one unmeasured time."""
    work()
    started = time.perf_counter()
    times = 0
    while time.perf_counter() - started < SECONDS:
        work()
        times += 1
    return times / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
