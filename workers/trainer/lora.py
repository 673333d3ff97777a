"""LoRA: trains a low-rank adapter instead of the weights.

Checkpoints and published versions hold the adapter alone. Exported weights have it merged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor, nn

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.end_tokens import add_stops
from onstream.pipeline.models.loading import ADAPTER_CONFIG, base_of, load_model
from onstream.pipeline.models.tokenizer import load_tokenizer
from onstream.pipeline.weights import LowRank, WeightSum
from onstream.pipeline.weights.policy import values_of
from onstream.settings.extras import missing_package
from onstream.settings.paths import absolute_model
from onstream.settings.sections.trainer import LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"


def attach(model: PreTrainedModel, lora: LoraSettings, saved: str | Path | None) -> Any:
    """Put an adapter into `model`, in place; returns peft's wrapper of it.

    It is the adapter in the directory `saved`, or a new one, which changes nothing until its first
    step. Only its weights require gradients.

    Raises:
        UserError: peft is not installed, or `target_modules` names no layer, or the output layer.
    """
    if saved is not None:
        wrapped = _peft().PeftModel.from_pretrained(model, str(saved), is_trainable=True)
    else:
        wrapped = _new_adapter(model, lora)
    if not isinstance(model.get_output_embeddings(), nn.Linear) or not isinstance(
        model.get_input_embeddings(), nn.Embedding
    ):
        raise _no_such_layers(
            model, lora, "the embeddings and the output layer are trained whole or not at all"
        )
    wrapped.eval()
    for layer in _layers(model).values():
        layer.lora_dropout.train()
    return wrapped


def _new_adapter(model: PreTrainedModel, lora: LoraSettings) -> Any:
    peft = _peft()
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) if lora.target_modules else "all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        # With a fixed seed, a trainer that dies before its first checkpoint starts again from the
        # same adapter.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            wrapped = peft.get_peft_model(model, config)
    except ValueError as error:
        raise _no_such_layers(model, lora, error) from error
    if base := config.base_model_name_or_path:
        config.base_model_name_or_path = absolute_model(base)
    return wrapped


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """A context in which the adapter in `model`, if there is one, drops nothing at random."""
    dropouts = [
        module
        for name, module in model.named_modules()
        if name.endswith(".lora_dropout") and module.training
    ]
    for dropout in dropouts:
        dropout.eval()
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.train()


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights with the adapter added, in float32, under the names of a model without one.

    In float32 what the adapter changes is not rounded away. Weights that are tied stay tied. The
    live model stays as it is.
    """
    made: dict[int, Tensor] = {}
    merged = {}
    for name, weight in live_state(model).items():
        values = values_of(weight)
        merged[name] = made.setdefault(values.data_ptr(), values.float())
    return merged


def live_state(model: nn.Module) -> dict[str, Tensor | WeightSum]:
    """The same in the dtypes they have, where each sum is made when it is asked for."""
    layers = _layers(model)
    merged: dict[str, Tensor | WeightSum] = {}
    for name, weight in model.state_dict().items():
        if ".lora_" in name:
            continue
        owner, inside, leaf = name.rpartition(".base_layer.")
        name = f"{owner}.{leaf}" if inside else name
        merged[name] = weight
        if inside and leaf == "weight":
            merged[name] = WeightSum(weight, _addition(layers[owner]))
    return merged


def _addition(layer: Any) -> Callable[[], Tensor]:
    """What the adapter adds to the weight of `layer`: as two factors where that is all of it."""
    from peft.tuners.lora import Linear

    factors = (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER])
    float32 = all(factor.weight.dtype == torch.float32 for factor in factors)
    if type(layer) is not Linear or _ADAPTER in layer.lora_variant or not float32:
        return partial(layer.get_delta_weight, _ADAPTER)
    a, b = (factor.weight.detach() for factor in factors)
    return LowRank(a, b, layer.scaling[_ADAPTER], layer.fan_in_fan_out)


def configuration(wrapped: Any) -> str:
    """peft's configuration of the adapter, as it writes it beside one: JSON."""
    config = wrapped.peft_config[_ADAPTER]
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        fields = msgspec.json.decode((Path(directory) / ADAPTER_CONFIG).read_bytes())
    fields["inference_mode"] = True
    if isinstance(fields["target_modules"], list):
        fields["target_modules"].sort()  # they are a set
    return msgspec.json.format(msgspec.json.encode(fields), indent=2).decode()


def adapter_state(wrapped: Any) -> dict[str, Tensor]:
    """The adapter's weights, as `save_adapter` takes them."""
    return {name: weight for name, weight in wrapped.state_dict().items() if ".lora_" in name}


def save_adapter(wrapped: Any, directory: Path, weights: dict[str, Tensor] | None) -> None:
    """Write the adapter's weights and configuration, which names the base model.

    `weights` is a copy of `adapter_state`; None: the adapter's own.
    """
    wrapped.save_pretrained(directory, save_embedding_layers=False, state_dict=weights)
    (directory / "README.md").unlink(missing_ok=True)  # peft's template of a model card


def write_merged(directory: Path, out: Path) -> None:
    """Write the model whose adapter is in `directory` to `out`, merged in float32.

    Raises:
        UserError: peft is not installed, or the base model cannot be loaded.
    """
    base = base_of(directory)
    assert base is not None, "a directory with an adapter"
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = load_tokenizer(directory)
    add_stops(model, [tokenizer.eos_token_id])
    _peft().PeftModel.from_pretrained(model, str(directory)).merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)


def _layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise missing_package("peft", "trainer.lora") from error
    return peft


def _no_such_layers(model: PreTrainedModel, lora: LoraSettings, reason: object) -> UserError:
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    given = ", ".join(map(repr, lora.target_modules or ()))
    words = " ".join(str(reason).split())[:200]
    inside = ", ".join(sorted(linear - {"lm_head"}))
    return UserError(
        f"trainer.lora.target_modules = [{given}] ({words})",
        expected=f"names of linear layers inside the model: {inside}",
        next_step="Name some of those, or leave trainer.lora.target_modules out for all of them.",
    )
