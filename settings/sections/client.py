"""`client` and `model` of the endpoints that a run asks over HTTP: external teachers, teachers
whose completions are trained on, and servers of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from onstream.settings.base import RUN, WORKER, HidesLogin, Section, TemplateArguments, Unit, listed
from onstream.settings.teacher_protocols import ProtocolName


def _address(url: str) -> str:
    """`url` without slashes at its end; refused where its parts cannot be told apart."""
    try:
        _ = urlsplit(url).port
    except ValueError:  # whose text may hold a part of a password
        raise ValueError(
            "an address such as http://host:8000/v1; in a user or a password, signs such as / "
            "and @ are written %2F and %40"
        ) from None
    return url.rstrip("/")


BaseUrl = Annotated[str, Field(pattern=r"^https?://[^\s/]+"), AfterValidator(_address)]
Addresses = tuple[BaseUrl, ...]
HiddenAddresses = Annotated[
    Addresses, NoDecode, BeforeValidator(listed), WORKER, HidesLogin(), Field(repr=False)
]


class EndpointSettings(Section):
    """How endpoints are reached, and what is asked of them at once."""

    base_url: HiddenAddresses = ()
    """The endpoints' addresses, such as `["http://teacher-server:8000/v1"]`; requests go to the one
    with the fewest in flight. The environment may hold one address as it is. A user and a password
    in an address are not shown, and not kept in the run's `settings.toml`."""
    api_key: Annotated[SecretStr | None, WORKER] = None
    """Sent as `Authorization: Bearer …`. Best given by the environment."""
    headers: Annotated[dict[str, SecretStr], WORKER] = Field(default_factory=dict)
    """Further headers of every request."""
    skip_model_check: Annotated[bool, WORKER] = False
    """Do not ask `/models` at start whether the endpoint serves the model; some endpoints have no
    such list.
    """
    timeout: Annotated[float, WORKER, Unit("s"), Field(ge=0.1, le=86400)] = 60.0
    """The longest that one request may take."""
    connect_timeout: Annotated[float, WORKER, Unit("s"), Field(ge=0.05, le=600)] = 5.0
    """The longest that connecting may take."""
    max_reply: Annotated[int, WORKER, Unit("MiB"), Field(ge=1, le=1 << 16)] = 256
    """The longest reply that is read, unpacked; a longer one counts as a failure."""
    max_in_flight: Annotated[int, WORKER, Unit("requests"), Field(ge=1, le=65536)] = 16
    """Requests that one endpoint is given at once."""
    max_retries: Annotated[int, WORKER, Unit("retries"), Field(ge=0, le=1000)] = 5
    """How often a request that failed for the server's sake is sent again before its rollout waits
    in the stream.
    """
    requests_per_second: Annotated[
        float | None, WORKER, Unit("requests/s"), Field(gt=0, le=10**6)
    ] = None
    """Budget of this worker over all its endpoints. Unset: none."""
    breaker_failures: Annotated[int, WORKER, Unit("failures"), Field(ge=1, le=1000)] = 5
    """Failures of one endpoint in a row, after which it is left alone for a while."""
    breaker_pause: Annotated[float, WORKER, Unit("s"), Field(ge=0.05, le=3600)] = 5.0
    """How long it is left alone before it is tried again."""


class ClientSettings(EndpointSettings):
    """How a teacher's endpoints are reached, and what may be asked of them."""

    max_tokens_per_run: Annotated[int | None, WORKER, Unit("tokens"), Field(ge=1, le=10**15)] = None
    """Budget in tokens sent and received; past it the workers take no more rollouts and say so. It
    is one budget for the whole run, which all workers that ask these endpoints share, restarts
    included. Unset: none."""


class StudentClientSettings(EndpointSettings):
    """The vLLM servers that generate for `inference.engine = "server"`, and whose weights the
    generator replaces.
    """

    base_url: HiddenAddresses = ()
    """The servers' addresses, such as `["http://gpu-host:8000"]`, for one generator alone. Unset:
    `onstream up` starts the servers, on `deployment.num_infer_gpus`. The environment may hold one
    address as it is."""
    model: Annotated[str | None, WORKER, Field(min_length=1)] = None
    """The student's name there, as `/models` lists it. Unset: `model.name`."""
    weights_dir: Annotated[Path | None, WORKER] = None
    """A directory that the generator and the servers share, at the same path: there the generator
    puts each policy version for them. Unset: the generator's directory for temporary files, which
    only servers on the same machine can read."""
    timeout: Annotated[float, WORKER, Unit("s"), Field(ge=0.1, le=86400)] = 3600.0
    """The longest that one completion may take, and one step of an update."""
    max_in_flight: Annotated[int, WORKER, Unit("requests"), Field(ge=1, le=65536)] = 256
    """Completions that one server is asked for at once. Servers that `onstream up` starts are given
    `inference.max_batch`.
    """
    breaker_failures: Annotated[int, WORKER, Unit("failures"), Field(ge=1, le=1000)] = 1
    """Failures of one server in a row, after which it gets no request until it was looked at anew:
    a server that was started again has the weights that it was started with."""
    breaker_pause: Annotated[float, WORKER, Unit("s"), Field(ge=0.05, le=3600)] = 1.0
    """How long it is left alone before it is tried again."""


class TeacherClientSettings(ClientSettings):
    """How the external teacher's endpoints are reached."""

    protocol: Annotated[ProtocolName, WORKER] = "auto"
    """How logprobs are asked for. `auto` tries them in this order at start: vLLM's
    `/inference/v1/generate`, vLLM's `/v1/completions` with `prompt_logprobs`, `/v1/completions`
    with `echo` and `logprobs`, SGLang's `/generate`."""


class EndpointModel(Section):
    """The model that the endpoints serve."""

    name: Annotated[str, RUN] = ""
    """Its name there, as `/models` lists it. Required."""
    chat_template_kwargs: Annotated[TemplateArguments | None, RUN] = None
    """Variables of its chat template, sent as `chat_template_kwargs` with each conversation. Unset:
    `model.chat_template_kwargs`. `{}` sends none, for endpoints that refuse the field."""


class TeacherModelSettings(Section):
    """A teacher that runs elsewhere and is asked for logprobs. Present: it is used."""

    client: TeacherClientSettings = TeacherClientSettings()
    model: EndpointModel = EndpointModel()


class JudgeModelSettings(Section):
    """A model that scores answers by a rubric, with `task.scorer = "judge"`
    (docs/tasks.md#a-judge).
    """

    rubric: Annotated[str, RUN] = ""
    """What makes an answer good, in your words. Required. The judge reads it before the question,
    the problem's right answer where there is one, and the answer."""
    max_score: Annotated[int, RUN, Unit("points"), Field(ge=1, le=1000)] = 10
    """The judge gives whole numbers from 0 to this; the reward is their share of it."""
    max_completion: Annotated[int, RUN, Unit("tokens"), Field(ge=8, le=1 << 20)] = 512
    """The longest judgement. One that is cut off gives no reward."""
    client: ClientSettings = ClientSettings()
    model: EndpointModel = EndpointModel()


class TeacherRolloutModelSettings(Section):
    """Hard distillation: a chat endpoint whose completions the student is trained on. Present: it
    is used.
    """

    keep: Annotated[Literal["all", "verified"], RUN] = "all"
    """`all` completions are trained on, or only those that verification gives the full reward of 1.
    """
    temperature: Annotated[float, RUN, Unit("ratio"), Field(ge=0, le=10)] = 1.0
    """Sampling temperature that the endpoint is asked for."""
    max_completion: Annotated[int | None, RUN, Unit("tokens"), Field(ge=1, le=1 << 20)] = None
    """The longest completion that the endpoint is asked for. Unset:
    `inference.sampling.max_completion`.
    """
    client: ClientSettings = ClientSettings()
    model: EndpointModel = EndpointModel()
