"""Requests that show images, for vLLM in process and behind servers: it must read them as the
student does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.images.vllm_prompts import VllmPrompts

if TYPE_CHECKING:
    from vllm.inputs.engine import EngineInput

    from onstream.workers.generator.engines.vllm.request import VllmRequest


def input_of(writing: VllmRequest, sent: VllmPrompts, renderer: Any) -> EngineInput:
    """The prompt of `writing` and what is written of it, with its images, as vLLM's own `renderer`
    makes it.

    Of an image in its cache vLLM sends its processes the digest alone. So inputs must reach them in
    the order in which they are made, and none be made while an update clears the caches.

    Raises:
        UserError: vLLM reads other tokens than the student's processor made.
    """
    [made] = renderer.render_cmpl(
        [sent.prompt(writing.request.prompt_ids, writing.request.images, writing.token_ids)]
    )
    require_same_tokens(made["prompt_token_ids"], writing)
    result: EngineInput = made
    return result


def fields_of(writing: VllmRequest, sent: VllmPrompts) -> dict[str, Any]:
    """The same as fields of a request to a server, whose answer tells what it read."""
    return sent.fields(writing.request.prompt_ids, writing.request.images, writing.token_ids)


def require_same_tokens(made: Sequence[int], writing: VllmRequest) -> None:
    """Do nothing where vLLM made of a prompt with images what the student's processor made of it.

    Raises:
        UserError: it made something else.
    """
    ours = writing.prompt_ids
    if list(made) == ours:
        return
    raise UserError(
        f"of a prompt with {len(writing.request.images)} images vLLM makes {len(made)} tokens that are not the {len(ours)} that the "
        "student's processor makes",
        expected="the same tokens: the trainer would see another prompt than the one that was answered",
        next_step='Set inference.engine = "transformers".',
        exit=Exit.REFUSED,
    )
