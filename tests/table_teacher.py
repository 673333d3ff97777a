"""A teacher for the faulty server: it speaks all four protocols over a language model that is a
table.

The logprob of a token depends on the one before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from onstream.workers.tiny_models.character_tokenizer import VOCABULARY_SIZE, character_tokenizer
from tests.faulty_server import NOT_FOUND, Answer, Asked, Body, FaultyServer

ALL_ROUTES = frozenset(
    {"vllm-generate", "vllm-completions", "echo", "sglang", "tokenize", "models"}
)
_PROTOCOLS = {
    "/inference/v1/generate": {"vllm-generate"},
    "/v1/completions": {"vllm-completions", "echo"},
    "/generate": {"sglang"},
}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class TableTeacher(FaultyServer):
    """The teacher. Faults answer scoring requests alone, and `delay_s` is how long these take.

    `logprobs` is the table, [token before, token]. With `noise` each request has other logprobs,
    and each of them is a distribution still.
    """

    def __init__(
        self,
        *,
        routes: frozenset[str] = ALL_ROUTES,
        models: Sequence[str] = ("teacher",),
        max_model_len: int = 512,
        max_top_k: int = 20,
        named_ids: bool = True,
        seed: int = 0,
        noise: float = 0.0,
        tokenizer: Any = None,
        key: str | None = None,
        port: int = 0,
    ) -> None:
        super().__init__(lambda body: NOT_FOUND, models, key=key, port=port)
        self.routes = routes
        self.max_model_len = max_model_len
        self.max_top_k = max_top_k
        self.named_ids = named_ids
        self.noise = noise
        self.tokenizer = tokenizer or character_tokenizer()
        self.delay_s = 0.0
        draw = np.random.default_rng(seed)
        self.logprobs = _log_softmax(draw.normal(0, 2, (VOCABULARY_SIZE, VOCABULARY_SIZE)))
        self._draw = draw
        self.scored: list[
            list[int]
        ] = []  # the ids of each scoring request that was answered rightly

    def expected(self, prompt: Sequence[int], completion: Sequence[int]) -> np.ndarray:
        """The logprobs that the completion should be scored with."""
        ids = [*prompt, *completion]
        return np.array(
            [self.logprobs[ids[at - 1], ids[at]] for at in range(len(prompt), len(ids))],
            dtype=np.float32,
        )

    def listing(self, path: str) -> Answer:
        """The models, with their context where the server tells of it."""
        if path != "/v1/models" or "models" not in self.routes:
            return NOT_FOUND
        length = {"max_model_len": self.max_model_len} if "tokenize" in self.routes else {}
        return Answer(body={"data": [{"id": name, **length} for name in self.models]})

    def posted(self, asked: Asked) -> Answer:
        """Tokens or scores, or a fault in place of scores."""
        body = asked.body or {}
        if asked.path in ("/tokenize", "/detokenize"):
            return self._tokenized(asked.path, body) if "tokenize" in self.routes else NOT_FOUND
        echo_off = bool(body.get("echo")) and "echo" not in self.routes
        if echo_off or not _PROTOCOLS.get(asked.path, set()) & self.routes:
            return NOT_FOUND
        right = self._answered(asked.path, body)
        answer = self.or_fault(asked, right)
        if answer is right and right.status == 200:
            self.scored.append(body.get("token_ids") or body.get("prompt") or body.get("input_ids"))
        return answer

    def _answered(self, path: str, body: Body) -> Answer:
        time.sleep(self.delay_s)
        try:
            return Answer(body=self.scores(path, body))
        except ValueError as refusal:
            return Answer(400, {"error": {"message": str(refusal)}})

    def _tokenized(self, path: str, body: Body) -> Answer:
        if path == "/detokenize":
            return Answer(body={"prompt": self.tokenizer.decode(body["tokens"])})
        if messages := body.get("messages"):
            ids = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                return_dict=False,
                **body.get("chat_template_kwargs", {}),
            )
        else:
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=False)
        return Answer(body={"tokens": ids, "count": len(ids), "max_model_len": self.max_model_len})

    def scores(self, path: str, asked: dict[str, Any]) -> Any:
        """The right reply to a scoring request; raises ValueError with the words of a refusal."""
        if path == "/generate":
            return self._sglang(asked)
        sampling = asked.get("sampling_params", asked)
        ids = asked.get("token_ids", asked.get("prompt"))
        echo = bool(asked.get("echo"))
        k = sampling.get("logprobs", 0) if echo else sampling.get("prompt_logprobs")
        positions = None if k is None else self._positions(ids, k)
        if path == "/inference/v1/generate":
            return {"prompt_logprobs": positions}
        if echo:
            return {
                "choices": [
                    {
                        "logprobs": self._echoed(
                            ids,
                            positions or [],
                            named=bool(asked.get("return_tokens_as_token_ids")),
                        )
                    }
                ]
            }
        return {
            "choices": [
                {"prompt_logprobs": positions if "vllm-completions" in self.routes else None}
            ]
        }

    def _positions(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        """As vLLM has them: the actual token first, then the k likeliest, so that a look-up by
        position goes wrong.
        """
        self._check(ids, k)
        positions: list[dict[str, Any] | None] = [None]
        for before, token in pairwise(ids):
            row = self.logprobs[before]
            if self.noise:
                row = _log_softmax(row + self._draw.normal(0, self.noise, row.shape))
            chosen = [*np.argsort(row)[: -k - 1 : -1], token][::-1]
            positions.append(
                {
                    str(t): {
                        "logprob": float(row[t]),
                        "decoded_token": self.tokenizer.decode([int(t)]),
                    }
                    for t in chosen
                }
            )
        return positions

    def _check(self, ids: list[int], k: int) -> None:
        if k > self.max_top_k:
            raise ValueError(
                f"Requested prompt logprobs of {k}, "
                f"which is greater than max allowed: {self.max_top_k}"
            )
        if len(ids) + 1 > self.max_model_len:
            raise ValueError(
                f"The prompt (length {len(ids)}) is longer than the maximum model length of "
                f"{self.max_model_len}"
            )

    def _echoed(
        self, ids: list[int], positions: list[dict[str, Any] | None], *, named: bool
    ) -> dict[str, Any]:
        def word(token: int | str) -> str:
            return (
                f"token_id:{token}"
                if named and self.named_ids
                else str(self.tokenizer.decode([int(token)]))
            )

        return {
            "tokens": [word(token) for token in ids],
            "token_logprobs": [
                p and p[str(token)]["logprob"] for token, p in zip(ids, positions, strict=True)
            ],
            "top_logprobs": [
                p and {word(token): entry["logprob"] for token, entry in p.items()}
                for p in positions
            ],
        }

    def _sglang(self, asked: dict[str, Any]) -> dict[str, Any]:
        ids = asked["input_ids"]
        k = asked["top_logprobs_num"]
        start = asked["logprob_start_len"]
        positions = self._positions(ids, k)
        tops = (
            [
                p and [[e["logprob"], int(t), e["decoded_token"]] for t, e in list(p.items())[-k:]]
                for p in positions
            ]
            if k
            else None
        )
        tokens = [
            [p and p[str(t)]["logprob"], t, self.tokenizer.decode([t])]
            for t, p in zip(ids, positions, strict=True)
        ]
        tokens[start][0] = None  # it pads the first one that it lists
        return {
            "meta_info": {
                "input_token_logprobs": tokens[start:],
                "input_top_logprobs": tops and tops[start:],
            }
        }


def wrong_ids(asked: Asked, right: Answer) -> Answer:
    """The scores of other tokens than those that were sent."""
    body = (asked.body or {}) | {"token_ids": [5] * 40, "prompt": [5] * 40}
    return Answer(body=TableTeacher().scores(asked.path, body))
