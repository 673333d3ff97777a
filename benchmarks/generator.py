"""Rollouts per CPU second of the generator's engine on one thread, against transformers' own
`generate()` in the same run.

A random student of the example's shape writes completions of a set length, so that both do the same
work and the weights do not matter. CPU seconds are those of this process, so a busy machine
disturbs the figures less; wall-clock beside them. Run it as `OMP_NUM_THREADS=1 python -m
benchmarks.generator`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from onstream.pipeline.weights import LoadedPolicy
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.transformers.engine import TransformersEngine

PREFETCH = 64


def random_student(hidden: int, layers: int) -> Qwen3ForCausalLM:
    """Qwen3-shaped, three query heads a key/value head; with the defaults 0.37M parameters."""
    torch.manual_seed(0)
    heads = max(1, hidden // 32)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=hidden * 10 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def workload(count: int, group_size: int) -> list[GenerationRequest]:
    """Prompts of 24 to 32 tokens, shared by a group; completions of 5 to 11."""
    random = np.random.default_rng(0)
    prompts = [
        random.integers(3, 128, random.integers(24, 33)).astype(np.int32)
        for _ in range(-(-count // group_size))
    ]
    return [
        GenerationRequest(key, prompts[key // group_size], int(random.integers(5, 12)), seed=key)
        for key in range(count)
    ]


def run_engine(
    model: Any, requests: Sequence[GenerationRequest], slots: int, swap_every: int | None = None
) -> None:
    """Write all of `requests`; with `swap_every`, new weights come after so many rollouts."""
    engine = TransformersEngine(model, (), slots=slots)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    waiting = list(requests)[::-1]
    done = 0
    version = 0
    while done < len(requests):
        engine.add(
            [waiting.pop() for _ in range(min(len(waiting), slots + PREFETCH - engine.active))]
        )
        done += len(engine.step())
        if swap_every and done // swap_every > version:
            version = done // swap_every
            engine.load(LoadedPolicy.of(version, weights))


@torch.inference_mode()
def run_generate(model: Any, requests: Sequence[GenerationRequest], rows: int) -> None:
    """`generate()` in left-padded batches, with the logits kept that logprobs are made of; every
    row runs to the batch's end.
    """
    for start in range(0, len(requests), rows):
        batch = requests[start : start + rows]
        width = max(len(request.prompt_ids) for request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt_ids) :] = torch.from_numpy(
                request.prompt_ids.astype(np.int64)
            )
            mask[row, width - len(request.prompt_ids) :] = 1
        written = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=max(request.max_tokens for request in batch),
            return_dict_in_generate=True,
            output_scores=True,
        )
        torch.stack(written.scores, dim=1).log_softmax(dim=-1)


def measured(name: str, count: int, work: Callable[[], None]) -> float:
    """Do `work`, which writes `count` rollouts, and print and return how many a CPU second."""
    wall = time.perf_counter()
    cpu = time.process_time()
    work()
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    print(f"{name:34} {count / cpu:7,.0f} rollouts per CPU second {count / wall:7,.0f} per second")
    return count / cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("rollouts", 4096),
        ("slots", 256),
        ("group-size", 8),
        ("hidden", 96),
        ("layers", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    requests = workload(options.rollouts, options.group_size)
    alone = workload(options.rollouts, 1)
    few = requests[: max(options.slots, options.rollouts // 4)]
    slots = options.slots

    def student() -> Qwen3ForCausalLM:
        return random_student(options.hidden, options.layers)

    print(
        f"{student().num_parameters():,} parameters, {options.rollouts} rollouts in groups of "
        f"{options.group_size}, one thread"
    )
    run_engine(student(), requests[:512], slots)  # warms up
    base = measured(
        f"generate(), {slots} rows", len(few), lambda: run_generate(student(), few, slots)
    )
    rate = measured(
        f"engine, {slots} slots", len(requests), lambda: run_engine(student(), requests, slots)
    )
    measured(
        "engine, new weights every 128",
        len(requests),
        lambda: run_engine(student(), requests, slots, swap_every=128),
    )
    measured("engine, no prompt shared", len(alone), lambda: run_engine(student(), alone, slots))
    print(f"the engine writes {rate / base:.1f}× what generate() writes")


if __name__ == "__main__":
    main()
