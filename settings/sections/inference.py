"""`[inference]` and `[teacher_inference]`: how the student samples, and the local teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from onstream.settings.base import RUN, WORKER, Section, TemplateArguments, Unit
from onstream.settings.sections.client import StudentClientSettings

EngineName = Literal["transformers", "vllm", "server"]
"""The engines that write rollouts: the keys of `onstream.workers.generator.engines.ENGINES`."""
AttentionSetting = Literal["auto", "sdpa", "varlen"]
"""How the trainer and the built-in teacher read packed rows."""


class SamplingSettings(Section):
    """The distribution that training rollouts are sampled from."""

    temperature: Annotated[float, RUN, Unit("ratio"), Field(ge=0.001, le=10)] = 1.0
    """Sampling temperature. Other than 1 needs `trainer.loss.teacher_top_k` with a teacher."""
    max_completion: Annotated[int, RUN, Unit("tokens"), Field(ge=1, le=1 << 20)] = 512
    """The longest completion, end-of-sequence token included."""


class GuardSettings(Section):
    """Whether the engine really computes the policy that the trainer published: both are asked the
    same, and their answers compared.
    """

    interval: Annotated[int, WORKER, Unit("versions"), Field(ge=0, le=10**6)] = 10
    """A generator compares the first version that it loads, and then one every so many; 0: no
    other.
    """
    tolerance: Annotated[float | None, WORKER, Unit("nats"), Field(gt=0, le=100)] = None
    """The largest difference between a logprob of the engine's and the trainer's; beyond it the
    generator stops. Unset: 0.001 where both compute in float32, else 0.3."""
    tokens: Annotated[int, WORKER, Unit("tokens"), Field(ge=8, le=1 << 16)] = 144
    """Length of the prompts that are asked; longer where the model has a window, so that they
    reach beyond it, and shorter where its context leaves less. More than one block of the engine's
    prefix cache (16 tokens on a GPU, 128 on a CPU), so that blocks kept from an older version
    show."""


class InferenceSettings(Section):
    """The generator's engine."""

    engine: Annotated[Literal["auto", EngineName], WORKER] = "auto"
    """The engine that generates rollouts: `transformers`, which is built in; `vllm`, inside the
    generator, where it is installed; or `server`, vLLM servers that the generator asks over HTTP:
    those of `inference.client.base_url`, or started by `onstream up`. `auto` is vLLM on CUDA where
    it is installed and knows the model, and transformers otherwise; on a CPU, where vLLM takes
    longer to start than a small model to learn, only where it is asked for."""
    max_batch: Annotated[int, WORKER, Unit("rollouts"), Field(ge=1, le=65536)] = 256
    """Rollouts that one generator decodes at once; with `data_parallel_size` replicas, each of
    them. `transformers` on a CPU, with a student of 256 channels or more, decodes at most a step's
    `orchestrator.batch_size`, or 64 where that is more: further rows are no faster there, and are
    computed anew under new weights.
    """
    prefetch: Annotated[int, WORKER, Unit("rollouts"), Field(ge=0, le=65536)] = 64
    """Tickets that a generator holds beyond those it decodes, so that a slot never waits for Redis.
    """
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], WORKER] = "auto"
    """Precision of the engine's weights; `auto` is float32 on a CPU and bfloat16 on CUDA."""
    on_new_weights: Annotated[Literal["recompute", "keep", "wait", "abort"], WORKER] = "recompute"
    """What becomes of completions in progress when a new policy version arrives: `recompute` their
    keys and values under it, so that each token is drawn from one policy alone; `keep` those of the
    old one, which is cheaper for long completions and inexact; `wait` until they are finished, and
    start no others meanwhile; or `abort` them and ask anew with what was written, which comes to
    the same as `recompute` and loses a draw to the seeds."""
    tensor_parallel_size: Annotated[int, WORKER, Unit("GPUs"), Field(ge=1, le=1024)] = 1
    """GPUs that each layer is split over, by vLLM."""
    data_parallel_size: Annotated[int, WORKER, Unit("replicas"), Field(ge=1, le=1024)] = 1
    """Replicas of the model inside one vLLM engine. More generators
    (`deployment.workers.generator`) do the same, and fail one by one."""
    gpu_memory_utilization: Annotated[float | None, WORKER, Unit("share"), Field(gt=0, le=1)] = None
    """Share of its GPU's memory that vLLM takes. Unset: `deployment.gpu_memory_shares.inference`
    where GPUs are shared, else vLLM's own choice."""
    max_model_len: Annotated[int | None, WORKER, Unit("tokens"), Field(ge=2, le=1 << 24)] = None
    """The longest prompt and completion together that vLLM keeps room for. Unset: the model's
    context.
    """
    enforce_eager: Annotated[bool | None, WORKER] = None
    """Keep vLLM from compiling the model and capturing CUDA graphs. Unset: true on a CPU, false on
    CUDA.
    """
    extra_args: Annotated[dict[str, Any], WORKER] = Field(default_factory=dict)
    """Further arguments of vLLM's engine by their Python names, such as `{ max_num_batched_tokens =
    16384 }`; they win over those that follow from the settings."""
    sampling: SamplingSettings = SamplingSettings()
    guard: GuardSettings = GuardSettings()
    client: StudentClientSettings = StudentClientSettings()


TeacherEngineName = Literal["transformers", "vllm", "vllm-in-process"]


class TeacherModelName(Section):
    """The local teacher's model."""

    name: Annotated[str | None, RUN, Field(min_length=1)] = None
    """A Hugging Face model id, or a directory. Unset: the student's starting model."""
    chat_template_kwargs: Annotated[TemplateArguments | None, RUN] = None
    """Variables of the teacher's own chat template, which must render conversations as the
    student's does. Unset: `model.chat_template_kwargs`."""


class TeacherInferenceSettings(Section):
    """The teacher that runs beside the run."""

    model: TeacherModelName = TeacherModelName()
    engine: Annotated[Literal["auto", TeacherEngineName], WORKER] = "auto"
    """What scores: `teacher` workers with `transformers`, or with vLLM in their own process
    (`vllm-in-process`), or one `vllm` server that `onstream up` starts and stops, over
    `deployment.num_teacher_gpus` GPUs by tensor parallelism. `auto` is `vllm` where models run on
    CUDA and vLLM is installed."""
    extra_args: Annotated[tuple[str, ...], WORKER, Field(max_length=64)] = ()
    """Further arguments of vLLM for the teacher, such as `["--max-num-seqs", "64"]`; they win over
    those that follow from the settings.
    """
    max_in_flight: Annotated[int, WORKER, Unit("requests"), Field(ge=1, le=65536)] = 64
    """Requests that vLLM computes at once for the teacher: what its server is given, or what it
    takes in process."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], WORKER] = "auto"
    """Precision that the teacher computes in. `auto` is bfloat16 on CUDA. On a CPU it is float32,
    but bfloat16 for a built-in teacher of 256 channels or more whose products a probe at the start
    finds at least 1.3 times faster in it (processors with AMX, say).
    """
    attention: Annotated[AttentionSetting, WORKER] = "auto"
    """How a teacher in `transformers` reads rows with shared prompts: as `trainer.attention` says
    of the trainer, for the teacher's model.
    """
    max_batch_tokens: Annotated[int, WORKER, Unit("tokens"), Field(ge=16, le=1 << 24)] = 8192
    """Tokens that one forward pass of the teacher takes, what prompts share counted once. A vLLM
    server goes by limits of its own.
    """
    head_chunk: Annotated[int, WORKER, Unit("tokens"), Field(ge=1, le=1 << 20)] = 1024
    """Positions whose logits over the whole vocabulary exist at once. vLLM goes by limits of its
    own.
    """
