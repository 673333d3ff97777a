"""The check of a vLLM server before it writes for a run, and whenever it comes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from onstream.pipeline.errors import UserError
from onstream.pipeline.http import (
    EndpointError,
    EndpointFault,
    RequestRefused,
    decoded,
    require_model,
)
from onstream.pipeline.images.vllm_prompts import VllmPrompts
from onstream.settings.sections.client import StudentClientSettings
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.server.student_server import (
    GENERATE,
    RPC,
    WEIGHT_INFO,
    StudentServer,
)
from onstream.workers.generator.engines.vllm.request import (
    VllmRequest,
    fields_of,
    require_same_tokens,
)

CHECK_S = 30.0
CLIENT = "inference.client"
TEXT = "Write 12 + 30 = 42 backwards, déjà vu.\n\n"
GONE = (403, 404, 405)
EXTENSION_FLAGS = (
    "--worker-extension-cls onstream.workers.generator.engines.vllm.extension.Extension "
    """--weight-transfer-config '{"backend": "disk"}'"""
)
START = "Start the server by `onstream student-server`, or as docs/engines.md says"


@dataclass(frozen=True)
class ServerCheck:
    """Asks a server for everything that the engine needs.

    Args:
        client: how the server is reached.
        model: the student's name at the server.
        text_ids: the tokens of `TEXT` by the student's own tokenizer.
        max_completion: the most tokens of a completion.
        vllm_prompts: builds prompts with images.
        image_request: a request with an image; None for a student that reads none.
    """

    client: StudentClientSettings
    model: str
    text_ids: list[int]
    max_completion: int
    vllm_prompts: VllmPrompts
    image_request: GenerationRequest | None

    async def __call__(self, server: StudentServer) -> None:
        """Check `server`, and note the length of its context.

        Raises:
            UserError: it answers, and cannot be used.
            EndpointFault: it does not answer, or not in time.
        """
        try:
            async with asyncio.timeout(CHECK_S):
                await self._check_model(server)
                await self._check_updates(server)
                await self._check_tokens(server)
                await self._check_generation(server)
                if self.image_request is not None:
                    await self._check_images(server, VllmRequest(self.image_request))
        except TimeoutError as error:
            raise EndpointFault(f"the check took longer than {CHECK_S:g} s") from error

    async def _check_model(self, server: StudentServer) -> None:
        if self.client.skip_model_check:
            return
        named = f"{CLIENT}.model" if self.client.model else "model.name"
        listed = await require_model(server, self.model, "inference", named)
        context: int | None = listed.get("max_model_len")
        server.context_tokens = context
        if context is not None and context <= self.max_completion:
            raise UserError(
                f"the context of {server.name} is {context} tokens, "
                f"with inference.sampling.max_completion = {self.max_completion}",
                expected="room for a prompt beside the longest completion",
                next_step="Lower inference.sampling.max_completion, "
                "or start the server with a longer --max-model-len.",
            )

    async def _check_updates(self, server: StudentServer) -> None:
        """Whether weights can be replaced.

        A server that somebody left paused goes on: it gets no request before new weights.
        """
        try:
            paused = decoded(await server.get("/is_paused"))
            await server.found_label()
        except EndpointFault as fault:
            if fault.status not in GONE:
                raise
            raise _misses(
                server,
                f"no {WEIGHT_INFO} ({fault})",
                "the environment variable VLLM_SERVER_DEV_MODE=1",
            ) from fault
        try:
            await server.rpc("onstream_staged")
        except EndpointFault as fault:
            if fault.status is None:
                raise
            raise _misses(
                server, f"nothing of Onstream's behind {RPC} ({fault})", EXTENSION_FLAGS
            ) from fault
        if paused.get("is_paused"):
            await server.resume()

    async def _check_tokens(self, server: StudentServer) -> None:
        """Whether its tokenizer is the student's; servers without the route are not asked."""
        body = {"model": self.model, "prompt": TEXT, "add_special_tokens": False}
        try:
            reply = decoded(await server.post("/tokenize", body))
        except EndpointError as error:
            if error.status is None or error.status >= 500:
                raise
            return
        theirs = reply.get("tokens")
        if theirs != self.text_ids:
            raise UserError(
                f"{server.name} reads {TEXT[:9]!r}… as the tokens {str(theirs)[:60]}…",
                expected=f"{str(self.text_ids)[:60]}…, as the student's tokenizer does",
                next_step="Serve the student of `model.name` there, with its own tokenizer.",
            )

    async def _check_generation(self, server: StudentServer) -> None:
        """Whether it takes and gives token ids, and logprobs of the distribution it draws from.

        With top-k 1 there is one token to draw, so its logprob must be exactly 0.
        """
        sampling = {"max_tokens": 1, "top_k": 1, "seed": 0, "logprobs": 0, "detokenize": False}
        body = {"model": self.model, "token_ids": self.text_ids, "sampling_params": sampling}
        try:
            part = await server.generate(body)
        except EndpointFault as fault:
            if fault.status not in GONE:
                raise
            raise _misses(
                server, f"no {GENERATE} ({fault})", "the flag --enable-scale-out"
            ) from fault
        if part.logprobs != [0.0]:
            got = (
                "logprobs before sampling's filters "
                f"({part.logprobs} of the one token that could be drawn)"
            )
            raise _misses(server, got, "the flag --logprobs-mode processed_logprobs")

    async def _check_images(self, server: StudentServer, request: VllmRequest) -> None:
        """Whether it reads images, and makes the student's tokens of them."""
        body = {
            "model": self.model,
            "sampling_params": request.sampling_params(()),
            **fields_of(request, self.vllm_prompts),
        }
        try:
            part = await server.generate(body)
        except RequestRefused as refusal:
            raise _misses(
                server,
                f"no answer to a prompt with a picture ({refusal})",
                "a server of the student of `model.name`, which reads images, with torchvision",
            ) from refusal
        require_same_tokens(part.prompt_ids, request)


def _misses(server: StudentServer, got: str, expected: str) -> UserError:
    return UserError(f"{server.name} has {got}", expected=expected, next_step=f"{START}.")
