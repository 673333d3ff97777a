"""A recorded run with images is trained again to the same weights, from the images that the
recording holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from onstream.pipeline.images.feature_cache import FetchImages
from onstream.pipeline.record_codec import ids_bytes, logprobs_bytes, mask_bytes
from onstream.pipeline.records import Rollout, Sample
from onstream.pipeline.run_files import recording
from onstream.pipeline.weights import LoadedPolicy
from onstream.settings.root import Settings
from onstream.workers.trainer.durability.recording import Recording
from onstream.workers.trainer.training import Training, learner_at
from tests.vision.conftest import Tiny, noise

BATCH = 4


def rollout(number: int, tiny: Tiny, image: str, tokens: int) -> Rollout:
    """An answer of four tokens to a prompt that is one image of `tokens` tokens."""
    sample = Sample(
        prompt_ids=ids_bytes([tiny.vision.placeholder_id] * tokens + [70]),
        completion_ids=ids_bytes([50 + number, 60, 61, 62]),
        loss_mask=mask_bytes([1] * 4),
        generator_logprobs=logprobs_bytes([0.0] * 4),
        version_spans=[],
        completion_text="",
        images=[image],
    )
    return Rollout(number, number - 1, 1, number - 1, [], {}, [sample], 1.0, "stop", ["train"])


def trained(
    settings: Settings, records: list[Rollout], images: FetchImages, recorded: Recording | None
) -> tuple[str, Any]:
    """The digest of the weights after a step on `records`, and the fates of their numbers."""
    training = Training(settings, learner_at(settings, None), worker="t", images=images)
    for record in records:
        training.take(record, 1.0)
    considered = training.advance()
    if recorded:
        for timed in considered.considered:
            recorded.record(timed.record, timed.taken)
    step = training.take_step()
    training.close()
    fates = {line.number: line.fate for line in (*considered.settled, *step.settled)}
    return LoadedPolicy.of(1, training.learner.published_state()).digest, fates


def test_images_lie_in_the_recording_once_and_train_to_the_same_bits(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = Settings.model_validate(
        {
            "model": {"name": str(tiny.directory)},
            "run": {"dir": str(tmp_path), "name": "run"},
            "deployment": {"device": "cpu"},
            "orchestrator": {"group_size": 1, "batch_size": BATCH},
            "trainer": {"record": True, "loss": {"type": "sft"}},
        }
    )
    pictures = [noise(1), noise(2)]
    live = {picture.digest: picture.data for picture in pictures}

    def fetch(digests: Sequence[str]) -> list[bytes | None]:
        return [live.get(digest) for digest in digests]

    tokens = len(tiny.vision.features(pictures[0]).token_ids)
    settings.run_dir.mkdir()
    recorded = Recording(settings, None, "start", fetch)
    made = [
        rollout(number, tiny, pictures[number % 2].digest, tokens) for number in range(1, BATCH + 1)
    ]
    gone = rollout(BATCH + 1, tiny, "0" * 64, tokens)
    first = trained(settings, [gone, *made], fetch, recorded)
    recorded.close()

    directory = settings.run_dir / recording.FOLDER
    assert sorted(path.name for path in (directory / recording.IMAGES).iterdir()) == sorted(live)
    assert first[1][BATCH + 1] == "dead"
    assert trained(settings, [gone, *made], partial(recording.images, directory), None) == first
