"""Requests with images for vLLM, which must read them as the student does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.images.vllm_prompts import VllmPrompts

if TYPE_CHECKING:
    from vllm.inputs.engine import EngineInput

    from onstream.workers.generator.engines.vllm.request import VllmRequest


def input_of(request: VllmRequest, vllm_prompts: VllmPrompts, renderer: Any) -> EngineInput:
    """The prompt, its images and what has been written, as vLLM's own `renderer` makes them.

    Of an image in its cache vLLM sends its processes only the digest. So inputs must reach them in
    the order in which they are made, and none may be made while an update clears the caches.

    Raises:
        UserError: vLLM reads other tokens than the student's processor made.
    """
    asked = request.request
    prompt = vllm_prompts.prompt(asked.prompt_ids, asked.images, request.token_ids)
    [rendered] = renderer.render_cmpl([prompt])
    require_same_tokens(rendered["prompt_token_ids"], request)
    result: EngineInput = rendered
    return result


def fields_of(request: VllmRequest, vllm_prompts: VllmPrompts) -> dict[str, Any]:
    """The same as fields of a request to a server, whose answer tells what it read."""
    asked = request.request
    return vllm_prompts.fields(asked.prompt_ids, asked.images, request.token_ids)


def require_same_tokens(theirs: Sequence[int], request: VllmRequest) -> None:
    """Check that vLLM made the same tokens of a prompt with images as the student's processor.

    Raises:
        UserError: it made others.
    """
    ours = request.prompt_ids
    if list(theirs) == ours:
        return
    raise UserError(
        f"of a prompt with {len(request.request.images)} images vLLM makes {len(theirs)} tokens "
        f"that are not the {len(ours)} that the student's processor makes",
        expected="the same tokens: the trainer would see another prompt than was answered",
        next_step='Set inference.engine = "transformers".',
        exit=Exit.REFUSED,
    )
