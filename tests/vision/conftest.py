"""Tiny models of each family, made once, and pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from onstream.pipeline.images import ImageFile
from onstream.pipeline.images.vision import Vision, load_vision
from onstream.pipeline.models.loading import load_model
from onstream.pipeline.models.multimodal import ImageFeatures, joined
from onstream.workers.tiny_models.character_tokenizer import IMAGE, IMAGE_END, IMAGE_START
from onstream.workers.tiny_models.fresh import ModelShape
from onstream.workers.tiny_models.vlm_families import VlmFamily, write_fresh_vlm

torch.set_num_threads(1)

SHAPE = ModelShape(hidden=64, layers=2, intermediate=128, heads=2, key_value_heads=1)
SPREAD = 5.0  # wide enough that attention, and the images, matter to the logprobs


@dataclass
class Tiny:
    """A model, what it makes of images, and where it lies."""

    family: VlmFamily
    directory: Path
    model: PreTrainedModel
    vision: Vision

    @property
    def token_kinds(self) -> str | None:
        """The argument by which the model's own code is told which tokens are of images."""
        if self.family == "llava":
            return None
        return "token_type_ids" if self.family == "gemma3" else "mm_token_type_ids"

    def own_inputs(self, row: Tensor, images: Sequence[ImageFeatures]) -> dict[str, Tensor]:
        """What the model's own forward takes of one sequence, `row` [1, S], and its images."""
        inputs = {"input_ids": row, **joined(images)}
        if images and self.token_kinds:
            inputs[self.token_kinds] = (row == self.model.config.image_token_id).int()
        return inputs

    @property
    def wide(self) -> ImageFile:
        """A picture that is wider than others, where the family takes some."""
        return noise(3, 32 if self.family in ("llava", "gemma3") else 48, 32)

    @property
    def placeholder(self) -> str:
        """What the chat template writes where an image is."""
        if self.family == "gemma3":
            return IMAGE_START
        return f"{IMAGE_START}{IMAGE}{IMAGE_END}"

    def features(self, *pictures: ImageFile) -> dict[str, ImageFeatures]:
        return {picture.digest: self.vision.features(picture) for picture in pictures}


@pytest.fixture(scope="session", params=["qwen2.5-vl", "qwen3-vl", "llava"])
def directory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VlmFamily, Path]:
    """A model of the family on disk, with weights wide enough to matter."""
    return family_in(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session", params=get_args(VlmFamily))
def any_family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VlmFamily, Path]:
    """The same of every family, those too that only train on padded rows."""
    return family_in(tmp_path_factory.mktemp(request.param), request.param)


def family_in(directory: Path, family: VlmFamily) -> tuple[VlmFamily, Path]:
    """`family`, and `directory` with a model of it."""
    if family != "llava" and find_spec("torchvision") is None:
        pytest.skip(
            "the processors of Qwen and Gemma need torchvision: `make test` has it, and "
            "tests/vision/__init__.py says how"
        )
    return family, write_tiny(directory, family)


def write_tiny(directory: Path, family: VlmFamily) -> Path:
    """A model of the family in `directory`, with weights wide enough to matter."""
    write_fresh_vlm(directory, family, SHAPE, seed=0)
    model = load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(SPREAD if weight.ndim > 1 else 1.0)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def tiny(directory: tuple[VlmFamily, Path]) -> Tiny:
    """The family's model, fresh from disk."""
    family, path = directory
    return Tiny(
        family,
        path,
        load_model(path, dtype=torch.float32, device=torch.device("cpu")),
        load_vision(path),
    )


def noise(seed: int, width: int = 32, height: int = 32) -> ImageFile:
    """A picture that no two seeds share."""
    return of(
        Image.fromarray(
            np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        )
    )


def of(image: Image.Image, form: str = "PNG", **options: Any) -> ImageFile:
    target = io.BytesIO()
    image.save(target, form, **options)
    return ImageFile(target.getvalue())
