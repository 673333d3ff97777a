"""The shipped teacher behind HTTP, for a container of its own: `/v1/completions` with `echo`,
`/v1/chat/completions`, and a key.

No server of the kind that people use fits the time of these tests; those are in tests/vllm.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from onstream.settings.load import load_settings
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.student import load_student
from onstream.workers.teacher.local_scorer import load_local
from onstream.workers.teacher.scorer import ScoreRequest

SETTINGS = load_settings([sys.argv[1]], environ={})
NAME = str(SETTINGS.teacher_inference.model.name)
SCORER = load_local(SETTINGS)
WRITER = load_student(Path(NAME), SETTINGS)
LOCK = threading.Lock()


def echoed(body: dict[str, Any]) -> dict[str, Any]:
    if not body.get("echo"):
        return {
            "choices": [{"text": ""}]
        }  # one that was asked for prompt_logprobs, say, which it does not know
    ids = np.array(body["prompt"], dtype=np.int32)
    k = int(body["logprobs"])
    (scores,) = SCORER.score([ScoreRequest(ids[:1], ids[1:])], top_k=k)
    tops: list[dict[str, float] | None] = [None]
    for at, token in enumerate(ids[1:]):
        likeliest = (
            zip(scores.top_ids[at], scores.top_logprobs[at], strict=True)
            if scores.top_ids is not None
            else ()
        )
        tops.append(
            {f"token_id:{token}": float(scores.logprobs[at])}
            | {f"token_id:{top}": float(logprob) for top, logprob in likeliest}
        )
    logprobs = [None, *map(float, scores.logprobs)]
    return {
        "choices": [
            {
                "logprobs": {
                    "tokens": [f"token_id:{t}" for t in ids],
                    "token_logprobs": logprobs,
                    "top_logprobs": tops,
                }
            }
        ]
    }


def answered(body: dict[str, Any]) -> dict[str, Any]:
    prompt = WRITER.prompt(body["messages"]).ids
    seed = int(body.get("seed") or 0)
    temperature = float(body.get("temperature", 1))
    WRITER.engine.add(
        [GenerationRequest(0, prompt, int(body.get("max_tokens") or 16), seed, temperature)]
    )
    written: list[Any] = []
    while not written:
        written = list(WRITER.engine.step())
    message = {"role": "assistant", "content": WRITER.text(written[0].token_ids)}
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(written[0].token_ids)}
    return {
        "model": NAME,
        "choices": [{"index": 0, "message": message, "finish_reason": written[0].finish_reason}],
        "usage": usage,
    }


ROUTES = {"/v1/completions": echoed, "/v1/chat/completions": answered}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self.reply(200, {"data": [{"id": NAME, "max_model_len": SCORER.context_tokens}]})
        self.reply(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization") != f"Bearer {os.environ['KEY']}":
            return self.reply(401, {"error": {"message": "wrong key"}})
        if self.path not in ROUTES:
            return self.reply(404, {})
        with LOCK:
            self.reply(200, ROUTES[self.path](body))

    def reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


print("serving", NAME, flush=True)
ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
