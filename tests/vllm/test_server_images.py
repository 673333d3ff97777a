"""The engine `server` over a real vLLM server, with images: the same logprobs, through updates of
the vision tower too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion
from onstream.workers.generator.student import open_student
from tests.vision.conftest import Tiny
from tests.vision.test_engine import gap, requests
from tests.vllm.reference import CLOSE_NATS
from tests.vllm.server import VllmServer
from tests.vllm.test_images import finish, load, tiny_of, weights_of

pytestmark = [pytest.mark.slow, pytest.mark.rotates("images on vLLM", 1, 3)]
UPDATES = 6
COMPLETION = "inference.sampling.max_completion=120"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_of("qwen2.5-vl", tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A real server of the model, as `onstream student-server` starts it."""
    server = VllmServer(
        tiny.directory,
        tmp_path_factory.mktemp("vllm") / "vllm.log",
        student=["inference.max_batch=8", COMPLETION],
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def settings_of(tiny: Tiny, server: VllmServer, run_dir: Path, on_new_weights: str) -> Settings:
    client = {"base_url": server.base_url, "breaker_pause": 0.2}
    inference = {
        "engine": "server",
        "on_new_weights": on_new_weights,
        "client": client,
        "sampling": {"max_completion": 120},
    }
    return Settings.model_validate(
        {
            "model": {"name": str(tiny.directory)},
            "run": {"dir": str(run_dir)},
            "inference": inference,
        }
    )


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_every_token_is_of_the_version_that_its_span_names_while_the_vision_tower_is_replaced(
    tiny: Tiny, server: VllmServer, tmp_path: Path, mode: str
) -> None:
    """But where keys and values are kept: there, in all that begins after an update."""
    engine: Any = open_student(settings_of(tiny, server, tmp_path, mode)).engine
    states = [weights_of(tiny)[name] for name in ("first", "tower")]
    weights = dict[int, Any]()
    written: list[Completion] = []
    try:
        asked = [
            replace(one, key=key, max_tokens=40, seed=key)
            for key, one in enumerate(requests(tiny) * 2 * UPDATES)
        ]
        for update in range(UPDATES):
            number = load(engine, states[update % 2])
            weights[number] = states[update % 2]
            while engine.version < number:
                written += engine.step()
            engine.add(asked[24 * update : 24 * update + 24])
            while len(written) < 24 * update + 4:
                written += engine.step()
        written += finish(engine)
    finally:
        engine.close()
    assert sorted(one.key for one in written) == list(range(24 * UPDATES))
    spans = [
        (one, span)
        for one in written
        for span in one.version_spans
        if mode != "keep" or len(one.version_spans) == 1
    ]
    assert {span.version for _, span in spans} == set(weights)
    for version, state in weights.items():
        tiny.model.load_state_dict(state)
        gaps = [
            gap(tiny, asked[one.key], one, span.start, span.end)
            for one, span in spans
            if span.version == version
        ]
        print(f"{mode}, version {version}: at most {max(gaps):.1e} nats in {len(gaps)} spans")
        assert max(gaps) < CLOSE_NATS


def test_a_server_that_reads_images_otherwise_than_the_student_is_refused(
    tiny: Tiny, server: VllmServer, tmp_path: Path
) -> None:
    settings = settings_of(tiny, server, tmp_path, "recompute")
    processor = tiny.directory / "processor_config.json"
    whole = processor.read_text()
    processor.write_text(whole.replace('"longest_edge": 4096', '"longest_edge": 1024'))
    assert processor.read_text() != whole
    try:
        with pytest.raises(
            UserError, match=r"of a prompt with 1 images vLLM makes \d+ tokens that are not the \d+"
        ):
            open_student(settings)
    finally:
        processor.write_text(whole)
