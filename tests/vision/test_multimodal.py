"""Packed rows with images give what the family's own code gives of one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor

from onstream.pipeline.images import ImageFile
from onstream.pipeline.images.feature_cache import FeatureCache
from onstream.pipeline.images.vision import PlaceholderMismatch
from onstream.pipeline.models.forward import SHARED_PREFIX, hidden_states
from onstream.pipeline.models.loading import text_config
from onstream.pipeline.models.multimodal import joined
from onstream.pipeline.models.output_layer import head_of
from onstream.pipeline.models.packing import Ids, pack, share_prompts
from onstream.pipeline.models.padded_rows import single_rows
from onstream.pipeline.models.prompt_sharing import prepare
from onstream.pipeline.record_codec import ids_array, ids_bytes
from onstream.settings.sections.losses import SftLoss
from onstream.settings.sections.trainer import OptimSettings, TrainerSettings
from onstream.workers.tiny_models.character_tokenizer import VOCABULARY_SIZE
from onstream.workers.tiny_models.vlm_families import VlmFamily
from onstream.workers.trainer.learner import Learner, TrainSample
from tests.models.measured import note
from tests.models.test_gradients import flat_gradient, gradient_of_a_step
from tests.vision.conftest import Tiny, noise

SHARED_PROMPTS = ("qwen2.5-vl", "qwen3-vl", "llava")


@pytest.fixture
def directory(any_family: tuple[VlmFamily, Path]) -> tuple[VlmFamily, Path]:
    """A model of each family, those too that only train on padded rows."""
    return any_family


@dataclass
class Case:
    """Sequences, the images that each prompt shows, and what the model makes of those."""

    prompts: list[Ids]
    completions: list[Ids]
    images: list[tuple[str, ...]]
    pictures: dict[str, ImageFile]


def a_case(tiny: Tiny) -> Case:
    """Groups of three over one image, another of the same ids, an image of another size, two
    images, and none.
    """
    one = noise(1)
    same_size = noise(2)
    wide = tiny.wide
    features = tiny.features(one, same_size, wide)
    random = np.random.default_rng(0)
    case = Case([], [], [], {picture.digest: picture for picture in (one, same_size, wide)})
    for shown in [(one,), (same_size,), (wide,), (wide, one), ()]:
        names = tuple(picture.digest for picture in shown)
        text = "a\n\nb" + "".join(f"{tiny.placeholder}c" for _ in names)
        ids = np.array(
            tiny.vision.tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32
        )
        prompt = tiny.vision.expand(ids, [features[name] for name in names])
        for _ in range(3):
            case.prompts.append(prompt)
            case.completions.append(
                random.integers(40, VOCABULARY_SIZE, random.integers(1, 8)).astype(np.int64)
            )
            case.images.append(names)
    return case


@torch.no_grad()
def one_by_one(tiny: Tiny, case: Case) -> list[Tensor]:
    """Logprobs [C, V] of each sequence, by the model's forward on the processor's own tensors."""
    found = []
    for prompt, completion, names in zip(case.prompts, case.completions, case.images, strict=True):
        inputs = inputs_of(tiny, case, prompt, completion, names)
        found.append(tiny.model(**inputs).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    return found


def inputs_of(
    tiny: Tiny, case: Case, prompt: Ids, completion: Ids, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """What the model's forward takes of one sequence, with its processor's own tensors."""
    row = torch.from_numpy(np.concatenate((prompt, completion))).long()[None]
    return tiny.own_inputs(row, [tiny.vision.features(case.pictures[name]) for name in names])


@pytest.mark.parametrize("max_tokens", [4096, 24])
@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "padded rows"])
def test_a_batch_with_images_gives_the_models_own_logprobs(
    tiny: Tiny, shared: bool, max_tokens: int
) -> None:
    case = a_case(tiny)
    wanted = one_by_one(tiny, case)
    features = tiny.features(*case.pictures.values())
    if shared:
        packed = tiny.family in SHARED_PROMPTS
        assert (prepare(tiny.model) is None) == packed
        assert (text_config(tiny.model)._attn_implementation == SHARED_PREFIX) == packed
    arrange = share_prompts if shared else single_rows
    got: dict[int, Tensor] = {}
    with torch.no_grad():
        for packed in pack(arrange(case.prompts, case.completions, case.images), max_tokens):
            logprobs = (
                head_of(tiny.model)
                .logits(hidden_states(tiny.model, packed, features))
                .log_softmax(-1)
            )
            got |= dict(zip(packed.sequences, logprobs.split(packed.lengths), strict=True))
    worst = max(float((got[at] - wanted[at]).abs().max()) for at in range(len(wanted)))
    assert worst < 1e-4
    if shared:
        way = "packed" if tiny.family in SHARED_PROMPTS else "padded"
        note("images: trainer and teacher", tiny.family, f"{worst:.0e} nats, {way}")
    # The images matter: the second group has the ids of the first, and other pixels.
    assert float((wanted[0][0] - wanted[3][0]).abs().max()) > 0.01


def test_the_tensors_and_tokens_are_the_processors_own_of_the_whole_prompt(tiny: Tiny) -> None:
    pictures = [noise(1), tiny.wide, noise(4)]
    processor = AutoProcessor.from_pretrained(tiny.directory)
    shows = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    chat = [
        {"role": "user", "content": shows},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "then"}, {"type": "image"}]},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    whole = processor(
        text=[text], images=[picture.decoded() for picture in pictures], return_tensors="pt"
    )
    features = [tiny.vision.features(picture) for picture in pictures]
    ids = np.array(tiny.vision.tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)
    assert (
        ids_array(ids_bytes(tiny.vision.expand(ids, features))).tolist()
        == whole["input_ids"][0].tolist()
    )
    own = {
        name
        for name in whole
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    }
    assert set(joined(features)) == own
    for name, tensor in joined(features).items():
        assert torch.equal(tensor, whole[name])


def test_empty_lines_in_a_text_are_not_taken_for_those_around_an_image(tiny: Tiny) -> None:
    image = tiny.features(noise(1)).popitem()[1]
    text = f"a\n\nb{tiny.placeholder}\n\n?"
    ids = np.array(tiny.vision.tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)
    shown = tiny.vision.expand(ids, [image])
    assert tiny.vision.misplaced(shown, [image]) is None
    assert "it holds" in (tiny.vision.misplaced(shown, []) or "")
    assert "it holds" in (tiny.vision.misplaced(shown[:-8], [image, image]) or "")


def test_a_placeholder_written_in_a_text_is_found_out(tiny: Tiny) -> None:
    ids = np.array([60, tiny.vision.placeholder_id, 70], dtype=np.int32)
    with pytest.raises(PlaceholderMismatch, match="shows 1 images of a prompt that holds 0"):
        tiny.vision.expand(ids, [])


def test_a_placeholder_written_in_an_answer_is_found_out(tiny: Tiny) -> None:
    """Without an image of its own it would take the place of another sample's."""
    features = tiny.vision.features(noise(1))
    shown = np.array([60, *features.token_ids, 70], dtype=np.int32)
    stray = np.array([61, tiny.vision.placeholder_id, 71], dtype=np.int32)
    cache = FeatureCache(
        tiny.vision,
        lambda digests: [{"one": noise(1).data}.get(digest) for digest in digests],
        keep_bytes=1 << 20,
    )
    try:
        assert cache.problem_with(shown, stray[:1], ["one"]) is None
        assert cache.problem_with(shown, stray[:2], ["one"]) is None  # a last token is never read
        assert "it holds" in (cache.problem_with(shown, stray, ["one"]) or "")
        assert "it holds 1 tokens of images, where 0 stand for the 0" in (
            cache.problem_with(stray[:1], stray, []) or ""
        )
        assert "is gone" in (cache.problem_with(shown, stray, ["two"]) or "")
    finally:
        cache.close()


def a_sample(prompt: Ids, completion: Ids, images: tuple[str, ...]) -> TrainSample:
    tokens = len(completion)
    return TrainSample(
        prompt,
        completion.astype(np.int32),
        np.ones(tokens, np.uint8),
        np.zeros(tokens, np.float32),
        images=images,
    )


def test_a_steps_gradient_over_images_is_that_of_single_sequences(tiny: Tiny) -> None:
    """That of the vision tower too; the reference is the model's own forward."""
    settings = TrainerSettings(loss=SftLoss(), microbatch=60, train_vision=True)
    learner = Learner(tiny.directory, settings, torch.device("cpu"))
    case = a_case(tiny)
    features = tiny.features(*case.pictures.values())
    batch = list(zip(case.prompts, case.completions, case.images, strict=True))
    found = gradient_of_a_step(learner, [a_sample(*one) for one in batch], features)
    tokens = sum(map(len, case.completions))
    for prompt, completion, names in batch:
        inputs = inputs_of(tiny, case, prompt, completion, names)
        logits = tiny.model(**inputs).logits[0, len(prompt) - 1 : -1]
        targets = torch.from_numpy(completion)[:, None]
        loss = -logits.log_softmax(-1).gather(-1, targets).sum() / tokens
        loss.backward()
    expected = flat_gradient(tiny.model)
    gap = float((found - expected).norm() / expected.norm())
    print(f"{tiny.family}: gradients differ by {gap:.1e}")
    assert gap <= 1e-5


@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_lowers_the_loss_and_moves_the_vision_tower_only_where_asked(
    tiny: Tiny, train_vision: bool, dtype: str
) -> None:
    settings = TrainerSettings(
        loss=SftLoss(),
        optim=OptimSettings(lr=2e-3, warmup=0, schedule="constant"),
        dtype=dtype,
        train_vision=train_vision,
    )
    learner = Learner(tiny.directory, settings, torch.device("cpu"))
    case = a_case(tiny)
    features = tiny.features(*case.pictures.values())
    samples = [
        a_sample(*one) for one in zip(case.prompts, case.completions, case.images, strict=True)
    ]
    tower = learner.model.get_encoder(modality="image")
    before = [weight.clone() for weight in tower.parameters()]
    losses = [learner.step(samples, 100, features=features)["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]
    moved = any(
        not torch.equal(old, new) for old, new in zip(before, tower.parameters(), strict=True)
    )
    assert moved is train_vision


def test_recomputed_layers_change_no_bit_of_a_step_with_images(tiny: Tiny) -> None:
    settings = TrainerSettings(loss=SftLoss(), train_vision=True)
    case = a_case(tiny)
    features = tiny.features(*case.pictures.values())
    samples = [
        a_sample(*one) for one in zip(case.prompts, case.completions, case.images, strict=True)
    ]
    plain, again = (
        gradient_of_a_step(
            Learner(tiny.directory, settings, torch.device("cpu"), recompute=recompute),
            samples,
            features,
        )
        for recompute in (False, True)
    )
    assert torch.equal(plain, again)
    assert plain.any()
