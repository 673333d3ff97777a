"""`[trainer]` and `[checkpoint]`: the objective, the optimizer, and what is kept on disk."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from onstream.settings.base import CHANGEABLE, RUN, WORKER, Section, Unit
from onstream.settings.sections.inference import AttentionSetting
from onstream.settings.sections.losses import Loss, RlLoss

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSettings(Section):
    """The optimizer and its schedule."""

    type: Annotated[Literal["adamw", "muon"], RUN] = "adamw"
    """`muon` moves the matrices inside the model, or the factors of an adapter, by Muon, with one
    moment instead of two, and the rest by AdamW: embeddings, the output layer, norms and biases.
    """
    lr: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0, le=10)], CHANGEABLE, Unit("per step")
    ] = "auto"
    """Learning rate at the end of the warm-up. `auto` is 5e-4 for a student of hidden size 96 and
    falls with the square of the size, to 4.4e-6 at 1,024; of an adapter it is ten times that, and
    at least 1e-4; where rewards alone teach a fifth. `onstream check` prints it, and the run's plan
    keeps the number.
    """
    betas: Annotated[tuple[Beta, Beta], RUN, Unit("ratio")] = (0.9, 0.95)
    """AdamW's decay rates of the two moments, each ≥ 0 and < 1."""
    weight_decay: Annotated[float, RUN, Unit("ratio"), Field(ge=0, le=10)] = 0.0
    """AdamW's decoupled weight decay."""
    eps: Annotated[float, RUN, Unit("gradient"), Field(gt=0, le=1)] = 1e-8
    """AdamW's denominator term."""
    momentum: Annotated[float, RUN, Unit("ratio"), Field(ge=0, lt=1)] = 0.95
    """Muon's decay rate of its moment."""
    warmup: Annotated[int, RUN, Unit("steps"), Field(ge=0, le=10**6)] = 10
    """Steps over which the learning rate rises linearly. Without them the first steps harm a
    student, most of all one that is near its teacher.
    """
    schedule: Annotated[Literal["constant", "linear", "cosine"], RUN] = "constant"
    """What the learning rate does after the warm-up, until `trainer.max_steps`."""
    min_lr_ratio: Annotated[float, RUN, Unit("ratio"), Field(ge=0, le=1)] = 0.0
    """Where a falling schedule ends, as a share of `lr`."""
    max_grad_norm: Annotated[float, RUN, Unit("gradient"), Field(gt=0, le=10**6)] = 1.0
    """Gradients are scaled down to this global norm."""
    states: Annotated[Literal["device", "host", "8bit"], WORKER] = "device"
    """Where AdamW's two moments are kept, 8 bytes a trained parameter: beside the weights, or in
    the `host`'s memory, which frees that much of a GPU and takes two copies over its bus each step.
    `8bit` keeps them beside the weights in 2 bytes, rounded, by bitsandbytes (the extra `8bit`). A
    run cannot change to it or from it.
    """

    @property
    def known_lr(self) -> float:
        """`lr` as a number; whoever asks has put one in the place of `auto`."""
        assert self.lr != "auto"
        return self.lr


class LoraSettings(Section):
    """Train a low-rank adapter instead of the weights.

    It is used where the section is present, and needs the extra `lora`.
    """

    rank: Annotated[int, RUN, Unit("dimensions"), Field(ge=1, le=4096)] = 16
    """Rank of each adapted layer's update."""
    alpha: Annotated[float, RUN, Unit("weight"), Field(gt=0, le=10**6)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, RUN, Unit("probability"), Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input. With `rl` it has to be 0: the trainer's logprobs would differ
    from the generator's.
    """
    target_modules: Annotated[tuple[str, ...] | None, RUN, Field(min_length=1)] = None
    """The layers adapted, by the last part of their name, such as `["q_proj", "v_proj"]`. Unset:
    every linear layer but the output.
    """


class TrainerSettings(Section):
    """The trainer."""

    max_steps: Annotated[int, CHANGEABLE, Unit("steps"), Field(ge=1, le=10**9)] = 100
    """The run ends after so many steps."""
    microbatch: Annotated[int, WORKER, Unit("tokens"), Field(ge=16, le=1 << 24)] = 8192
    """Tokens that one forward and backward pass takes, what prompts share counted once."""
    head_chunk: Annotated[int, WORKER, Unit("tokens"), Field(ge=1, le=1 << 20)] = 1024
    """Positions whose logits over the whole vocabulary exist at once."""
    recompute: Annotated[Literal["auto", "none", "layer"], WORKER] = "auto"
    """What is computed anew in the backward pass instead of being kept from the forward pass:
    nothing, or each `layer`, which takes a third more work, far less memory, and changes no bit in
    float32. `auto` is `layer` on CUDA where by a formula the trainer would otherwise fill more than
    90 % of its GPU, and `none` on a CPU.
    """
    attention: Annotated[AttentionSetting, WORKER] = "auto"
    """How rows with shared prompts are read: by torch's `sdpa` under masks, whose memory grows with
    the square of a row, or by cumulative lengths (`varlen`), without masks. `auto` is `varlen` on
    CUDA in bfloat16, if a trial at the start gives what `sdpa` gives, and `sdpa` otherwise. On a
    CPU `varlen` is a slow reference.
    """
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], RUN] = "auto"
    """Precision of the computation; master weights and optimizer state are float32. `auto` is
    float32 on a CPU and bfloat16 on CUDA. The frozen weights under an adapter are kept in it.
    """
    max_bad_rollouts: Annotated[int, WORKER, Unit("rollouts"), Field(ge=0, le=1 << 20)] = 4
    """Where the gradient of a step is not finite, up to so many of its rollouts, those with the
    largest losses, become dead letters, and the step is tried once more. If that fails too, the run
    stops. 0: it stops at once.
    """
    sample_interval: Annotated[int, WORKER, Unit("steps"), Field(ge=1, le=10**6)] = 10
    """A few rollouts are written to `samples.jsonl` every so many steps."""
    record: Annotated[bool, WORKER] = False
    """Write every record that the training depends on to `recording/` in the run's directory, for
    `onstream replay`.
    """
    train_vision: Annotated[bool, RUN] = False
    """Train the vision tower of a student that reads images too; else it stays as it is, and only
    the rest of the model is trained.
    """
    loss: Annotated[Loss, Field(discriminator="type")] = RlLoss()
    optim: OptimSettings = OptimSettings()
    lora: LoraSettings | None = None

    @field_validator("loss", mode="before")
    @classmethod
    def _rl_by_default(cls, loss: Any) -> Any:
        return {"type": "rl", **loss} if isinstance(loss, dict) else loss


class CheckpointSettings(Section):
    """What is written so that nothing is lost."""

    interval: Annotated[int, CHANGEABLE, Unit("steps"), Field(ge=1, le=10**6)] = 20
    """Steps between checkpoints: what is trained again after a crash, at most."""
    keep: Annotated[int, CHANGEABLE, Unit("checkpoints"), Field(ge=2, le=10**6)] = 2
    """Newest checkpoints kept with their optimizer state. At least 2: where one is torn, the run
    goes on from the one before.
    """
    keep_every: Annotated[int | None, CHANGEABLE, Unit("steps"), Field(ge=1, le=10**9)] = None
    """Checkpoints of steps that divide by this are kept for good; without their optimizer's state,
    unless `trainer.record` is on.
    """
    max_unacked_bytes: Annotated[
        int | None, WORKER, Unit("bytes"), Field(ge=1 << 16, le=1 << 50)
    ] = None
    """A checkpoint is taken early when records with images, which wait for it, hold half of this in
    Redis. Other records are acknowledged by the run's journal. Unset: 256 MiB, or four batches at
    their longest, where that is more.
    """
    keep_policies: Annotated[int, CHANGEABLE, Unit("versions"), Field(ge=2, le=10**6)] = 4
    """Newest published policy versions kept on disk."""
