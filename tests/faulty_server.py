"""A teacher written by hand, for the faults that no real server produces on demand. What works is tested on real servers, in tests/vllm.

It speaks all four protocols over a language model that is a table: the logprob of a token depends on the one before it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np

from workers.models.tokenizer import VOCABULARY_SIZE, character_tokenizer

Fault = Callable[["Handler", bytes], None]
"""Answers a scoring request in the server's stead; gets the handler and the right reply."""
ALL_ROUTES = frozenset({"vllm-generate", "vllm-completions", "echo", "sglang", "tokenize", "models"})


def status(code: int, words: str = "out of order", *, retry_after: str | None = None) -> Fault:
    """Replies with `code`."""

    def answer(handler: Handler, reply: bytes) -> None:
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        handler.reply(code, json.dumps({"error": {"message": words}}).encode(), headers)

    return answer


def cut(handler: Handler, reply: bytes) -> None:
    """Cuts the connection in the middle of the reply."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(reply)))
    handler.end_headers()
    handler.wfile.write(reply[: len(reply) // 2])
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def drip(handler: Handler, reply: bytes) -> None:
    """Sends a byte now and then, so that no single read waits long, and never ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(reply)))
    handler.end_headers()
    with contextlib.suppress(OSError):
        for byte in reply:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            if handler.table.stopped.wait(0.02):
                return


def wrong_ids(handler: Handler, reply: bytes) -> None:
    """The scores of other tokens than those that were sent."""
    handler.reply(200, json.dumps(handler.table.answer(handler.path, handler.asked | {"token_ids": [5] * 40, "prompt": [5] * 40})).encode())


@dataclass
class FaultyServer:
    """The server. `faults` answer one scoring request each, in order; `forever` answers all of them."""

    routes: frozenset[str] = ALL_ROUTES
    models: Sequence[str] = ("teacher",)
    max_model_len: int = 512
    max_top_k: int = 20
    named_ids: bool = True
    seed: int = 0
    noise: float = 0.0
    tokenizer: Any = field(default_factory=character_tokenizer)
    delay_s: float = 0.0
    key: str | None = None
    port: int = 0

    def __post_init__(self) -> None:
        logits = np.random.default_rng(self.seed).normal(0, 2, (VOCABULARY_SIZE, VOCABULARY_SIZE))
        self.logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # [before, token]
        self.faults: deque[Fault] = deque()
        self.forever: Fault | None = None
        self.scored: list[list[int]] = []  # the ids of each scoring request that was answered rightly
        self.most_in_flight = self.in_flight = 0
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()

    @property
    def base_url(self) -> str:
        """The address, as settings give it."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> FaultyServer:
        """Listen; at the same port as before, after a stop."""
        self.stopped.clear()
        table = self

        class Bound(Handler):
            pass

        Bound.table = table
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Bound)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Die: stop listening and cut every connection."""
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.connections.clear()
        self._thread.join()

    def expected(self, prompt: Sequence[int], completion: Sequence[int]) -> np.ndarray:
        """The logprobs that the completion should be scored with."""
        ids = [*prompt, *completion]
        return np.array([self.logprobs[ids[at - 1], ids[at]] for at in range(len(prompt), len(ids))], dtype=np.float32)

    def answer(self, path: str, asked: dict[str, Any]) -> Any:
        """The right reply to a scoring request; raises ValueError with the words of a refusal."""
        if path == "/generate":
            return self._sglang(asked)
        sampling = asked.get("sampling_params", asked)
        ids, echo = asked.get("token_ids", asked.get("prompt")), bool(asked.get("echo"))
        k = sampling.get("logprobs", 0) if echo else sampling.get("prompt_logprobs")
        positions = None if k is None else self._positions(ids, k)
        if path == "/inference/v1/generate":
            return {"prompt_logprobs": positions}
        if echo:
            return {"choices": [{"logprobs": self._echoed(ids, positions or [], named=bool(asked.get("return_tokens_as_token_ids")))}]}
        return {"choices": [{"prompt_logprobs": positions if "vllm-completions" in self.routes else None}]}

    def _positions(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        """As vLLM has them: the actual token first, then the k likeliest, so that a look-up by position goes wrong."""
        self._check(ids, k)
        positions: list[dict[str, Any] | None] = [None]
        for before, token in pairwise(ids):
            row = self.logprobs[before] + (np.random.default_rng().normal(0, self.noise) if self.noise else 0)
            chosen = [*np.argsort(row)[: -k - 1 : -1], token][::-1]
            positions.append({str(t): {"logprob": float(row[t]), "decoded_token": self.tokenizer.decode([int(t)])} for t in chosen})
        return positions

    def _check(self, ids: list[int], k: int) -> None:
        if k > self.max_top_k:
            raise ValueError(f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_top_k}")
        if len(ids) + 1 > self.max_model_len:
            raise ValueError(f"The prompt (length {len(ids)}) is longer than the maximum model length of {self.max_model_len}")

    def _echoed(self, ids: list[int], positions: list[dict[str, Any] | None], *, named: bool) -> dict[str, Any]:
        def word(token: int | str) -> str:
            return f"token_id:{token}" if named and self.named_ids else str(self.tokenizer.decode([int(token)]))

        return {
            "tokens": [word(token) for token in ids],
            "token_logprobs": [p and p[str(token)]["logprob"] for token, p in zip(ids, positions, strict=True)],
            "top_logprobs": [p and {word(token): entry["logprob"] for token, entry in p.items()} for p in positions],
        }

    def _sglang(self, asked: dict[str, Any]) -> dict[str, Any]:
        ids, k, start = asked["input_ids"], asked["top_logprobs_num"], asked["logprob_start_len"]
        positions = self._positions(ids, k)
        tops = [p and [[e["logprob"], int(t), e["decoded_token"]] for t, e in list(p.items())[-k:]] for p in positions] if k else None
        tokens = [[p and p[str(t)]["logprob"], t, self.tokenizer.decode([t])] for t, p in zip(ids, positions, strict=True)]
        tokens[start][0] = None  # it pads the first one that it lists
        return {"meta_info": {"input_token_logprobs": tokens[start:], "input_top_logprobs": tops and tops[start:]}}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    table: FaultyServer
    asked: dict[str, Any]
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Note the connection, so that a stop can cut it."""
        super().setup()
        with self.table.lock:
            self.table.connections.add(self.connection)

    def handle(self) -> None:
        """Serve the connection; one that was cut is no error here."""
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def reply(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a whole reply."""
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """`/v1/models`."""
        if not self._let_in():
            return
        if self.path != "/v1/models" or "models" not in self.table.routes:
            self.reply(404, b'{"detail":"Not Found"}')
            return
        length = {"max_model_len": self.table.max_model_len} if "tokenize" in self.table.routes else {}
        self.reply(200, json.dumps({"data": [{"id": name, **length} for name in self.table.models]}).encode())

    def do_POST(self) -> None:
        """Everything else."""
        self.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._let_in():
            return
        if self.path in ("/tokenize", "/detokenize"):
            self._tokenize()
            return
        routes = {"/inference/v1/generate": {"vllm-generate"}, "/v1/completions": {"vllm-completions", "echo"}, "/generate": {"sglang"}}
        echo_off = bool(self.asked.get("echo")) and "echo" not in self.table.routes
        if not routes.get(self.path, set()) & self.table.routes or echo_off:
            self.reply(404, b'{"detail":"Not Found"}')
            return
        self._score()

    def _let_in(self) -> bool:
        if self.table.key is None or self.headers["Authorization"] == f"Bearer {self.table.key}":
            return True
        self.reply(401, b'{"error":"Unauthorized"}')
        return False

    def _tokenize(self) -> None:
        tokenizer = self.table.tokenizer
        if "tokenize" not in self.table.routes:
            self.reply(404, b'{"detail":"Not Found"}')
        elif self.path == "/detokenize":
            self.reply(200, json.dumps({"prompt": tokenizer.decode(self.asked["tokens"])}).encode())
        else:
            messages = self.asked.get("messages")
            ids = (
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                if messages
                else tokenizer.encode(self.asked["prompt"], add_special_tokens=False)
            )
            self.reply(200, json.dumps({"tokens": ids, "count": len(ids), "max_model_len": self.table.max_model_len}).encode())

    def _score(self) -> None:
        table = self.table
        with table.lock:
            table.in_flight += 1
            table.most_in_flight = max(table.most_in_flight, table.in_flight)
            fault = table.forever or (table.faults.popleft() if table.faults else None)
        try:
            time.sleep(table.delay_s)
            right = json.dumps(table.answer(self.path, self.asked)).encode()
            if fault is not None:
                fault(self, right)
                return
            self.reply(200, right)
            table.scored.append(self.asked.get("token_ids") or self.asked.get("prompt") or self.asked.get("input_ids"))
        except ValueError as refusal:
            self.reply(400, json.dumps({"error": {"message": str(refusal)}}).encode())
        finally:
            with table.lock:
                table.in_flight -= 1
