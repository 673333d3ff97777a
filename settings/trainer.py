"""`[trainer]` and `[checkpoint]`: the objective, the optimizer, and what is kept on disk."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from onstream.settings.base import CHANGEABLE, RUN, WORKER, Section, Unit

Beta = Annotated[float, Field(ge=0, lt=1)]


class LossSettings(Section):
    """The objective: docs/objective.md has its formulas."""

    type: Annotated[Literal["rl", "sft"], RUN] = "rl"
    """`rl`: rewards and the teacher's judgement of the student's own tokens. `sft`: masked negative
    log-likelihood.
    """
    teacher_tau: Annotated[float, RUN, Unit("weight"), Field(ge=0, le=1000)] = 0.0
    """Distillation strength. Set > 0 to enable."""
    adv_tau: Annotated[float, RUN, Unit("weight"), Field(ge=0, le=1000)] = 1.0
    """Weight of the reward's advantage. Set 0 for pure distillation."""
    kl_tau: Annotated[float, RUN, Unit("weight"), Field(ge=0, le=1000)] = 1e-3
    """Weight of the squared log importance ratio, which keeps the trainer near the policy that
    sampled.
    """
    teacher_top_k: Annotated[int, RUN, Unit("tokens"), Field(ge=0, le=1024)] = 0
    """With k > 0 the teacher term is the reverse KL over the teacher's k likeliest tokens and one
    tail bin, differentiated; with 0 it is the sampled token's."""
    teacher_tail_floor: Annotated[float, RUN, Unit("probability"), Field(gt=0, lt=1)] = 1e-6
    """Least probability of the tail bin, where an endpoint gives only the top k and their sum comes
    to 1 or more.
    """
    reverse_kl_clip: Annotated[float | None, RUN, Unit("nats"), Field(gt=0, le=1000)] = None
    """Bounds the sampled reverse KL of a token to ± this; unset, it is not bounded."""
    trust_region: Annotated[Literal["signed", "symmetric", "none"], RUN] = "signed"
    """Which tokens are dropped when the trainer's probability has moved from the generator's:
    `signed` those moving on in the direction of their advantage, `symmetric` on either side."""
    trust_low: Annotated[float, RUN, Unit("probability"), Field(ge=0, le=1)] = 0.2
    """How far a token's probability may have fallen."""
    trust_high: Annotated[float, RUN, Unit("probability"), Field(ge=0, le=1)] = 0.2
    """How far a token's probability may have risen."""
    max_log_ratio: Annotated[float, RUN, Unit("nats"), Field(gt=0, le=80)] = 20.0
    """Bound of the log importance ratio before it is exponentiated."""
    normalize_advantage: Annotated[bool, RUN] = False
    """Divide a group's advantages by the standard deviation of its rewards."""


class OptimSettings(Section):
    """AdamW and its schedule."""

    lr: Annotated[float, CHANGEABLE, Unit("per step"), Field(gt=0, le=10)] = 1e-5
    """Learning rate at the end of the warm-up."""
    betas: Annotated[tuple[Beta, Beta], RUN, Unit("ratio")] = (0.9, 0.95)
    """AdamW's decay rates of the two moments, each ≥ 0 and < 1."""
    weight_decay: Annotated[float, RUN, Unit("ratio"), Field(ge=0, le=10)] = 0.0
    """AdamW's decoupled weight decay."""
    eps: Annotated[float, RUN, Unit("gradient"), Field(gt=0, le=1)] = 1e-8
    """AdamW's denominator term."""
    warmup: Annotated[int, RUN, Unit("steps"), Field(ge=0, le=10**6)] = 0
    """Steps over which the learning rate rises linearly."""
    schedule: Annotated[Literal["constant", "linear", "cosine"], RUN] = "constant"
    """What the learning rate does after the warm-up, until `trainer.max_steps`."""
    min_lr_ratio: Annotated[float, RUN, Unit("ratio"), Field(ge=0, le=1)] = 0.0
    """Where a falling schedule ends, as a share of `lr`."""
    max_grad_norm: Annotated[float, RUN, Unit("gradient"), Field(gt=0, le=10**6)] = 1.0
    """Gradients are scaled down to this global norm."""


class LoraSettings(Section):
    """Train a low-rank adapter instead of the weights. Present: it is used; needs `pip install
    'onstream[lora]'`.
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

    max_steps: Annotated[int, CHANGEABLE, Unit("steps"), Field(ge=0, le=10**9)] = 100
    """The run ends after so many steps."""
    microbatch: Annotated[int, WORKER, Unit("tokens"), Field(ge=16, le=1 << 24)] = 8192
    """Tokens that one forward and backward pass takes, shared prompts counted once."""
    head_chunk: Annotated[int, WORKER, Unit("tokens"), Field(ge=1, le=1 << 20)] = 1024
    """Positions whose logits over the whole vocabulary exist at once."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], RUN] = "auto"
    """Precision of the computation; master weights and optimizer state are float32. `auto` is
    float32 on a CPU and bfloat16 on CUDA.
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
    loss: LossSettings = LossSettings()
    optim: OptimSettings = OptimSettings()
    lora: LoraSettings | None = None


class CheckpointSettings(Section):
    """What is written so that nothing is lost."""

    interval: Annotated[int, CHANGEABLE, Unit("steps"), Field(ge=1, le=10**6)] = 20
    """Steps between checkpoints. Records are acknowledged by checkpoints, so it also bounds what is
    trained again after a crash.
    """
    keep: Annotated[int, CHANGEABLE, Unit("checkpoints"), Field(ge=2, le=10**6)] = 2
    """Newest checkpoints kept with their optimizer state. At least 2: what one holds is
    acknowledged when the next is durable.
    """
    keep_every: Annotated[int | None, CHANGEABLE, Unit("steps"), Field(ge=1, le=10**9)] = None
    """Checkpoints of steps that divide by this are kept for good; without their optimizer's state,
    unless `trainer.record` is on.
    """
    max_unacked_bytes: Annotated[int, WORKER, Unit("bytes"), Field(ge=1 << 16, le=1 << 50)] = (
        256 << 20
    )
    """A checkpoint is taken early when the records it would acknowledge hold this much of Redis's
    memory.
    """
    keep_policies: Annotated[int, CHANGEABLE, Unit("versions"), Field(ge=2, le=10**6)] = 4
    """Newest published policy versions kept on disk."""
