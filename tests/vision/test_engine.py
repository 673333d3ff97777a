"""The built-in engine samples from prompts with images: what it says of a token is what the
family's own forward says.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onstream.pipeline.images import PromptImage
from onstream.pipeline.models.end_tokens import stop_ids
from onstream.pipeline.models.loading import load_model
from onstream.pipeline.weights import LoadedPolicy
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.engines.transformers.engine import TransformersEngine
from onstream.workers.generator.student import load_student_model
from onstream.workers.tiny_models.vlm_families import VlmFamily
from tests.models.measured import note
from tests.vision.conftest import Tiny, noise


@pytest.fixture
def directory(any_family: tuple[VlmFamily, Path]) -> tuple[VlmFamily, Path]:
    """A model of each family, those too that are served through their own cache."""
    return any_family


def requests(tiny: Tiny) -> list[GenerationRequest]:
    """Twelve requests over four prompts: two of the same ids and other pixels, one of two images,
    one of none.
    """
    first, second, wide = (
        tiny.vision.features(picture) for picture in (noise(1), noise(2), tiny.wide)
    )
    shown = [
        (PromptImage(noise(1), first),),
        (PromptImage(noise(2), second),),
        (PromptImage(tiny.wide, wide), PromptImage(noise(1), first)),
        (),
    ]
    made = []
    for key in range(12):
        images = shown[key // 3]
        text = "ab" + "".join(f"{tiny.placeholder}c" for _ in images)
        ids = np.array(
            tiny.vision.tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32
        )
        prompt = tiny.vision.expand(ids, [image.features for image in images])
        made.append(GenerationRequest(key, prompt, max_tokens=3 + key % 5, seed=key, images=images))
    return made


@torch.no_grad()
def gap(
    tiny: Tiny,
    request: GenerationRequest,
    completion: Completion,
    start: int = 0,
    end: int | None = None,
) -> float:
    """The largest difference of the completion's logprobs [start:end] from one plain forward's, in
    nats.
    """
    row = torch.from_numpy(np.concatenate((request.prompt_ids, completion.token_ids[:-1]))).long()[
        None
    ]
    inputs = tiny.own_inputs(row, [image.features for image in request.images])
    logits = tiny.model(**inputs).logits[0, len(request.prompt_ids) - 1 :]
    plain = logits.log_softmax(-1).gather(
        -1, torch.from_numpy(completion.token_ids).long()[:, None]
    )[:, 0]
    return float((plain - torch.from_numpy(completion.logprobs))[start:end].abs().max())


def an_engine(tiny: Tiny, slots: int) -> TransformersEngine:
    model = load_model(tiny.directory, dtype=torch.float32, device=torch.device("cpu"))
    stops = stop_ids(tiny.vision.tokenizer, model.config, model.generation_config)
    return TransformersEngine(model, stop_ids=stops, slots=slots)


@pytest.mark.parametrize("slots", [12, 5])
def test_every_logprob_is_that_of_a_plain_forward_pass(tiny: Tiny, slots: int) -> None:
    engine = an_engine(tiny, slots)
    asked = requests(tiny)
    engine.add(asked)
    written: list[Completion] = []
    while engine.active:
        written += engine.step()
    assert sorted(one.key for one in written) == list(range(12))
    worst = max(gap(tiny, asked[one.key], one) for one in written)
    assert worst < 1e-4
    way = "own cache" if engine.own_cache_because else "slots"
    note("images: built-in generator", tiny.family, f"{worst:.0e} nats, {way}")


def test_a_completion_ends_where_the_student_writes_a_placeholder(tiny: Tiny) -> None:
    stops = stop_ids(tiny.vision.tokenizer, tiny.model.config, tiny.model.generation_config)
    assert tiny.model.config.image_token_id in stops


def test_a_completion_ends_with_any_token_after_which_its_images_would_not_fit(tiny: Tiny) -> None:
    settings = Settings.model_validate({"model": {"name": str(tiny.directory)}})
    student = load_student_model(tiny.directory, settings)
    image = tiny.vision.features(noise(1))
    refused = {
        token
        for token in range(len(tiny.vision.tokenizer))
        if tiny.vision.misplaced(np.append(image.token_ids, token), [image])
    }
    assert refused and refused <= student.stop_ids


def test_new_weights_in_the_middle_see_the_images_too(tiny: Tiny) -> None:
    engine = an_engine(tiny, 12)
    asked = requests(tiny)
    changed = {name: weight * 1.1 for name, weight in tiny.model.state_dict().items()}
    engine.add(asked)
    written = [*engine.step(), *engine.step()]
    engine.load(LoadedPolicy.of(1, changed))
    while engine.active:
        written += engine.step()
    before = max(gap(tiny, asked[one.key], one, end=2) for one in written)
    tiny.model.load_state_dict(changed)
    after = max(
        gap(tiny, asked[one.key], one, start=2) for one in written if len(one.token_ids) > 2
    )
    assert max(before, after) < 1e-4
