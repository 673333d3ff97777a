"""Whether weights are a model's, by names and shapes alone."""

from __future__ import annotations

import pytest

from onstream.pipeline.models.weight_shapes import WeightShapes, shapes_of
from tests.tiny import tiny_model


def shapes(family: str = "qwen3") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tiny_model(family).state_dict().items()}  # type: ignore[arg-type]


def test_the_shapes_without_weights_are_those_of_the_model() -> None:
    model = tiny_model()
    assert set(shapes_of(model.config).tensors) == set(WeightShapes.of(model).tensors)


def test_a_models_own_weights_fit_with_and_without_its_tied_head() -> None:
    own = WeightShapes.of(tiny_model())
    given = shapes()
    assert own.misfit(given) == ""
    del given["lm_head.weight"]
    assert own.misfit(given) == ""
    del given["model.embed_tokens.weight"]
    assert own.misfit(given) == (
        "weights do not fit Qwen3ForCausalLM: missing ['model.embed_tokens.weight'], "
        "of another shape []"
    )


def test_a_head_of_its_own_must_be_there() -> None:
    own = WeightShapes.of(tiny_model("llama"))
    given = shapes("llama")
    del given["lm_head.weight"]
    assert "missing ['lm_head.weight']" in own.misfit(given)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_another_shape_is_told_with_both(name: str) -> None:
    misfit = WeightShapes.of(tiny_model()).misfit(shapes() | {name: (3,)})
    assert f"of another shape ['{name} [3], not [" in misfit
