"""What the user is told of an endpoint that cannot be this run's teacher."""

from __future__ import annotations

from collections.abc import Mapping

from onstream.pipeline.errors import UserError
from onstream.pipeline.http import Endpoint, EndpointError, EndpointFault
from onstream.pipeline.http.served_models import key_refused
from onstream.settings.teacher_protocols import TEACHER_PROTOCOLS
from onstream.workers.teacher.external.endpoint import IMAGE_PROTOCOL

SECTION = "orchestrator.teacher_model"


def other_weights(endpoint: Endpoint, nats: float, bound: float, model: str) -> UserError:
    """It scores the check's text otherwise than the first endpoint did."""
    return UserError(
        f"{endpoint.name} scores one text {nats:.3g} nats a token away from what this teacher "
        "scored it first",
        expected=f"at most {bound:g}, from one teacher with the same weights everywhere",
        next_step=f"Serve {model!r} with the same weights at every address of "
        f"{SECTION}.client.base_url.",
    )


def not_repeatable(endpoint: Endpoint, nats: float, bound: float) -> UserError:
    """It scores one text differently each time."""
    return UserError(
        f"the teacher at {endpoint.name} scored one text twice, {nats:.3g} nats a token apart",
        expected=f"at most {bound:g}: its scores would be mostly noise",
        next_step=f"Check that {SECTION}.client.base_url is one server, or several with the same "
        "weights.",
    )


def too_few_likeliest(endpoint: Endpoint, top_k: int, most: int) -> UserError:
    """It gives fewer likeliest tokens than `trainer.loss.teacher_top_k`."""
    gives = "no likeliest tokens beside the one asked for"
    if most:
        gives = f"the {most} likeliest tokens of a position at most"
    return UserError(
        f"trainer.loss.teacher_top_k = {top_k}, but the teacher at {endpoint.name} gives {gives}",
        expected=f"teacher_top_k ≤ {most}, or a server that gives more",
        next_step=f"Set trainer.loss.teacher_top_k = {most}, or raise the server's own limit "
        "(vLLM: --max-logprobs).",
    )


def no_logprobs(endpoint: Endpoint, refusals: Mapping[str, EndpointError]) -> Exception:
    """No protocol gave the logprobs of a prompt. `refusals` has what came instead, by protocol."""
    answers = "; ".join(f"{name}: {fault}" for name, fault in refusals.items())
    statuses = {fault.status or 0 for fault in refusals.values()}
    if statuses <= {401}:
        return key_refused(endpoint, next(iter(refusals.values())), SECTION)
    if all(status >= 500 or status == 429 for status in statuses):
        return EndpointFault(answers, status=max(statuses))
    return UserError(
        f"the teacher at {endpoint.name} returns no logprobs of a prompt ({answers})",
        expected=f"a server that speaks {', '.join(TEACHER_PROTOCOLS)}",
        next_step=f"Correct {SECTION}.client.base_url, or serve the teacher with vLLM. Chat "
        "endpoints can be teachers by orchestrator.teacher_rollout_model alone.",
    )


def context_too_short(endpoint: Endpoint, context: str, longest: int) -> UserError:
    """A sample of `longest` tokens does not fit its context."""
    return UserError(
        f"the context of the teacher at {endpoint.name} is {context}",
        expected=f"at least {longest + 1}: a sample of up to {longest} tokens, prompt and "
        "completion, and one more that scoring takes",
        next_step="Lower inference.sampling.max_completion, or serve the teacher with a longer "
        "context (vLLM: --max-model-len).",
    )


def no_images(endpoint: Endpoint, refusal: Exception) -> UserError:
    """It cannot be sent the images of the task's prompts."""
    return UserError(
        f"the task's prompts hold images, and the teacher at {endpoint.name} would score them "
        f"without: {refusal}",
        expected=f"a vLLM server of the student's family, asked by the protocol {IMAGE_PROTOCOL}",
        next_step="Serve such a teacher with --enable-scale-out, or score with a local one "
        "(docs/images.md).",
    )
