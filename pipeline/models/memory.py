"""How much memory a trainer takes, from its settings and its model's configuration alone.

Pure arithmetic: no torch, and no weights. The formula of a layer is that of a Qwen3 layer, whose
tensors were counted with hooks (`tests/saved_bytes.py`); other families differ somewhat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onstream.settings.record_sizes import longest_completion
from onstream.settings.root import Settings
from onstream.settings.sections.trainer import LoraSettings, TrainerSettings

FLOAT32 = 4
BFLOAT16 = 2
ROOM = 0.9
"""The share of a device's memory that a plan may fill; the rest goes to CUDA and to fragments."""
SCALED_TOGETHER = 256
"""Moments in 8 bits that share a float32 scale."""
LOGITS = 4
"""Float32 tensors of [chunk, vocabulary] at once: logits, probabilities, the tail, one between."""


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes of a decoder. Widths are numbers per token."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    query: int  # of all heads together
    key: int  # of all key-value heads together
    intermediate: int  # of the experts that a token takes, where there are experts
    experts_taken: int
    experts: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DecoderSizes | None:
        """The sizes that a `config.json` says; None where it does not say them all."""
        text = config.get("text_config")
        named = text if isinstance(text, dict) else config
        hidden = _first(named, "hidden_size", "n_embd", "d_model")
        layers = _first(named, "num_hidden_layers", "n_layer", "num_layers")
        heads = _first(named, "num_attention_heads", "n_head", "num_heads")
        vocabulary = _first(named, "vocab_size")
        if not (hidden and layers and heads and vocabulary):
            return None
        head = _first(named, "head_dim") or hidden // heads
        key_value_heads = _first(named, "num_key_value_heads") or heads
        taken = _first(named, "num_experts_per_tok") or 1
        return cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            key_value_heads=key_value_heads,
            query=heads * head,
            key=key_value_heads * head,
            intermediate=_intermediate(named, hidden, taken),
            experts_taken=taken,
            experts=_first(named, "num_experts", "num_local_experts", "n_routed_experts") or 1,
            vocabulary=vocabulary,
            tied=bool(named.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
        )

    @property
    def head(self) -> int:
        """Parameters of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one layer with a gated MLP."""
        return self._attention + self._mlp + 2 * self.hidden

    @property
    def matrices(self) -> int:
        """Parameters of the layers in matrices; experts are in tensors of three dimensions."""
        return self.layers * (self._attention + (self._mlp if self.experts == 1 else 0))

    @property
    def _attention(self) -> int:
        return 2 * self.hidden * (self.query + self.key)

    @property
    def _mlp(self) -> int:
        return 3 * self.hidden * self.intermediate * self.experts // self.experts_taken

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.head * (1 if self.tied else 2) + self.hidden

    def adapter(self, lora: LoraSettings) -> int:
        """Parameters of an adapter of these settings."""
        widths = {
            "q_proj": self.hidden + self.query,
            "k_proj": self.hidden + self.key,
            "v_proj": self.hidden + self.key,
            "o_proj": self.query + self.hidden,
            "gate_proj": self.hidden + self.intermediate,
            "up_proj": self.hidden + self.intermediate,
            "down_proj": self.intermediate + self.hidden,
        }
        named = [widths[name] for name in lora.target_modules or () if name in widths]
        return self.layers * lora.rank * sum(named or widths.values())


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes that a trainer takes on its device, and beside it."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    host_optimizer: int
    """In the host's memory, as is what follows."""
    published: int
    checkpoint: int
    """A copy of what is trained and of its moments, while one is written."""

    @property
    def device(self) -> int:
        """On the device, where the most is there at once."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def trainer_memory(
    shape: DecoderSizes,
    trainer: TrainerSettings,
    *,
    half: bool,
    recompute: bool,
    row_tokens: int,
    parameters: int | None = None,
) -> TrainerMemory:
    """What a trainer takes whose longest row has `row_tokens` tokens.

    Args:
        shape: of the model.
        trainer: its settings.
        half: whether it computes in bfloat16.
        recompute: whether layers are recomputed in the backward pass.
        row_tokens: tokens of one forward and backward pass.
        parameters: of the model, where they were counted.
    """
    total = parameters or shape.parameters
    trained = shape.adapter(trainer.lora) if trainer.lora else total
    weights = total * FLOAT32
    if trainer.lora:
        weights = total * (BFLOAT16 if half else FLOAT32) + trained * FLOAT32
    moments = 2 * trained * FLOAT32
    if trainer.optim.type == "muon":
        matrices = trained if trainer.lora else shape.matrices
        moments -= matrices * FLOAT32
    if trainer.optim.states == "8bit":
        moments = 2 * trained + 2 * FLOAT32 * trained // SCALED_TOGETHER
    on_host = trainer.optim.states == "host"
    return TrainerMemory(
        weights=weights,
        gradients=trained * FLOAT32,
        optimizer=0 if on_host else moments,
        activations=row_tokens * token_bytes(shape, trainer, half=half, recompute=recompute)
        + _cast_bytes(shape, trainer, half=half, recompute=recompute),
        head=_head_bytes(shape, trainer, half=half),
        host_optimizer=moments if on_host else 0,
        published=total * (BFLOAT16 if half else FLOAT32),
        checkpoint=trained * FLOAT32 + moments,
    )


def token_bytes(
    shape: DecoderSizes, trainer: TrainerSettings, *, half: bool, recompute: bool
) -> int:
    """Bytes that a forward pass keeps of one token for the backward pass.

    With `recompute` these are the inputs of all layers, and one whole layer while its gradient is
    computed.
    """
    layer = layer_token_bytes(shape, trainer.lora, half=half)
    around = 2 * FLOAT32 * shape.hidden  # the last norm
    if recompute:
        return shape.layers * FLOAT32 * shape.hidden + layer + around
    return shape.layers * layer + around


def layer_token_bytes(shape: DecoderSizes, lora: LoraSettings | None, *, half: bool) -> int:
    """The same of one layer without recomputation.

    The factors are bytes: each tensor that is kept is float32, or bfloat16 where a matrix product
    takes it. A layer that is not trained keeps no inputs of its products; its adapter keeps them.
    """
    hidden, query, key, intermediate = KEPT[half, lora is not None]
    kept = (
        hidden * shape.hidden
        + query * shape.query
        + key * shape.key
        + intermediate * shape.intermediate
        + 8 * shape.heads
        + 4 * shape.key_value_heads
        + 8
    )
    if lora is not None:
        adapted = len(lora.target_modules or ()) or 7
        kept += adapted * lora.rank * (BFLOAT16 if half else FLOAT32)
    return kept


KEPT = {
    (False, False): (24, 20, 16, 16),
    (False, True): (16, 16, 12, 16),
    (True, False): (26, 12, 10, 8),
    (True, True): (18, 10, 8, 8),
}
"""Bytes per token that a layer keeps for each number of its hidden state, queries, keys and MLP.

By whether it computes in bfloat16, and whether an adapter is trained.
"""


def _cast_bytes(
    shape: DecoderSizes, trainer: TrainerSettings, *, half: bool, recompute: bool
) -> int:
    """Weights in bfloat16 that autocast makes of float32 ones, until the backward pass."""
    if not half or trainer.lora:
        return 0
    return BFLOAT16 * shape.layer * (1 if recompute else shape.layers)


def _head_bytes(shape: DecoderSizes, trainer: TrainerSettings, *, half: bool) -> int:
    """The logits of a chunk, the output layer in bfloat16, and its gradient by one row."""
    logits = LOGITS * FLOAT32 * trainer.head_chunk * shape.vocabulary
    cast = BFLOAT16 * shape.head if half and not trainer.lora else 0
    gradient = 0 if trainer.lora else FLOAT32 * shape.head
    return logits + cast + gradient


@dataclass(frozen=True)
class MemoryPlan:
    """What the trainer of a run takes; `memory` is None where the model's sizes are not known."""

    memory: TrainerMemory | None
    recompute: bool
    row_tokens: int


def memory_plan(
    settings: Settings,
    config: Mapping[str, Any],
    *,
    half: bool,
    device_bytes: float | None,
    parameters: int | None = None,
) -> MemoryPlan:
    """What the trainer of `settings` takes with the model of this `config`.

    `trainer.recompute = "auto"` is settled here: layers are recomputed where the trainer would fill
    more than `ROOM` of a GPU, or its model's sizes are not known, and never on a CPU.

    Args:
        settings: of the run.
        config: the model's `config.json`.
        half: whether the trainer computes in bfloat16.
        device_bytes: the memory of its GPU; None: it computes on a CPU, or the GPU is not known.
        parameters: of the model, where they were counted.
    """
    shape = DecoderSizes.of(config)
    row_tokens = longest_row(settings)

    def taken(recompute: bool) -> TrainerMemory | None:
        if shape is None:
            return None
        return trainer_memory(
            shape,
            settings.trainer,
            half=half,
            recompute=recompute,
            row_tokens=row_tokens,
            parameters=parameters,
        )

    recompute = settings.trainer.recompute == "layer"
    if settings.trainer.recompute == "auto" and device_bytes is not None:
        plain = taken(False)
        recompute = plain is None or plain.device > ROOM * device_bytes
    return MemoryPlan(taken(recompute), recompute, row_tokens)


def longest_row(settings: Settings) -> int:
    """Tokens of the longest row that a forward pass may get, as far as the settings say.

    A sequence longer than a microbatch has a row of its own.
    """
    return max(settings.trainer.microbatch, longest_completion(settings))


def _intermediate(named: Mapping[str, Any], hidden: int, taken: int) -> int:
    """The width of the MLP that a token takes."""
    expert = _first(named, "moe_intermediate_size")
    whole = _first(named, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    return taken * (expert or whole)


def _first(named: Mapping[str, Any], *names: str) -> int | None:
    """The first of `names` that `named` has a number for."""
    return next((int(named[name]) for name in names if isinstance(named.get(name), int)), None)
