"""The engine over vLLM, with images: what is sampled and what is said of it, in each family,
through updates of the vision tower too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import PromptImage
from onstream.pipeline.images.vision import load_vision
from onstream.pipeline.models.loading import load_model
from onstream.pipeline.weights import LoadedPolicy
from onstream.workers.generator.engines.base import Completion
from onstream.workers.generator.engines.vllm.request import VllmRequest, input_of
from onstream.workers.generator.student import Student, open_student
from onstream.workers.tiny_models.vlm_families import VlmFamily
from tests.vision.conftest import Tiny, noise, write_tiny
from tests.vision.test_engine import gap, requests
from tests.vllm.conftest import on_vllm
from tests.vllm.reference import CLOSE_NATS

pytestmark = [pytest.mark.slow, pytest.mark.rotates("images on vLLM", 0, 3)]
MODES = ("recompute", "keep", "wait", "abort")
NUMBERS = count(1)
"""Version numbers that no other test of the session has used."""


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen3-vl", "llava"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_of(request.param, tmp_path_factory.mktemp(request.param))


def tiny_of(family: VlmFamily, directory: Path) -> Tiny:
    """A model of `family` in `directory`."""
    if find_spec("torchvision") is None:
        pytest.skip("vLLM reads images with torchvision: `make test-vllm` has it")
    write_tiny(directory, family)
    return Tiny(
        family,
        directory,
        load_model(directory, dtype=torch.float32, device=torch.device("cpu")),
        load_vision(directory),
    )


@pytest.fixture(scope="module")
def started(tiny: Tiny) -> Iterator[Student]:
    """The family's model on a real vLLM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's imports warn of what torch deprecates
        student = open_student(on_vllm(tiny.directory, max_batch=8))
    yield student
    student.engine.close()


@pytest.fixture
def engine(started: Student, weights: dict[str, dict[str, Any]]) -> Any:
    """The engine with nothing in hand, under the first weights; `recompute`."""
    engine: Any = started.engine
    engine.on_new_weights = "recompute"
    load(engine, weights["first"])
    return engine


@pytest.fixture(scope="module")
def weights(tiny: Tiny) -> dict[str, dict[str, Any]]:
    return weights_of(tiny)


def weights_of(tiny: Tiny) -> dict[str, dict[str, Any]]:
    """The model's own weights, and others: in all of it, in its vision tower alone, and in what
    joins the two.
    """
    first = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    parts = {"all": ("",), "tower": ("visual", "vision_tower"), "joint": ("merger", "projector")}
    changed = {
        part: {
            name: weight * 1.3 if any(word in name for word in words) else weight
            for name, weight in first.items()
        }
        for part, words in parts.items()
    }
    return {"first": first, **changed}


def load(engine: Any, weights: dict[str, Any]) -> int:
    """Loads `weights` under a number of their own."""
    number = next(NUMBERS)
    engine.load(LoadedPolicy.of(number, weights))
    return number


def finish(engine: Any) -> list[Completion]:
    """All that is in hand."""
    written: list[Completion] = []
    while engine.active:
        written += engine.step()
    return written


def test_every_logprob_is_that_of_a_plain_forward_pass_from_weights_to_weights_and_back(
    engine: Any, tiny: Tiny, weights: dict[str, dict[str, Any]]
) -> None:
    asked = requests(tiny)
    for name in ("first", "tower", "joint", "all", "first"):
        load(engine, weights[name])
        tiny.model.load_state_dict(weights[name])
        engine.add(asked)
        written = finish(engine)
        worst = max(gap(tiny, asked[one.key], one) for one in written)
        print(f"{tiny.family}, {name}: vLLM and transformers differ by at most {worst:.1e} nats")
        assert len(written) == len(asked) and worst < CLOSE_NATS


@pytest.mark.parametrize("mode", MODES)
def test_a_new_vision_tower_in_the_middle_is_seen_by_all_that_its_version_writes(
    engine: Any, tiny: Tiny, weights: dict[str, dict[str, Any]], mode: str
) -> None:
    """But where keys and values are kept: there, by all that begins after it."""
    engine.on_new_weights = mode
    asked = [
        replace(request, key=key, max_tokens=100, seed=key)
        for key, request in enumerate(requests(tiny) * 2)
    ]
    versions = {engine.version: weights["first"]}
    engine.add(asked)
    written = []
    while not written:
        written += engine.step()
    versions[load(engine, weights["tower"])] = weights["tower"]
    written += finish(engine)
    assert len(written) == len(asked)
    spans = [
        (one, span)
        for one in written
        for span in one.version_spans
        if mode != "keep" or len(one.version_spans) == 1
    ]
    assert {span.version for _, span in spans} == set(versions)
    for version, state in versions.items():
        tiny.model.load_state_dict(state)
        gaps = [
            gap(tiny, asked[one.key], one, span.start, span.end)
            for one, span in spans
            if span.version == version
        ]
        assert max(gaps) < CLOSE_NATS


def test_a_prompt_that_vllm_reads_otherwise_is_refused(engine: Any, tiny: Tiny) -> None:
    asked = requests(tiny)[0]
    two = PromptImage(
        noise(9),
        replace(asked.images[0].features, token_ids=np.tile(asked.images[0].features.token_ids, 2)),
    )
    ids = np.insert(asked.prompt_ids, 3, asked.images[0].features.token_ids)
    with pytest.raises(
        UserError, match=r"of a prompt with 1 images vLLM makes \d+ tokens that are not the \d+"
    ):
        input_of(
            VllmRequest(replace(asked, prompt_ids=ids, images=(two,))),
            engine._vllm_prompts,
            engine._llm.renderer,
        )


def test_vllm_is_told_how_many_images_a_prompt_may_hold(engine: Any, tiny: Tiny) -> None:
    limits = engine._llm.vllm_config.model_config.multimodal_config.limit_per_prompt
    assert limits["image"].count == on_vllm(tiny.directory).images.max_per_prompt
