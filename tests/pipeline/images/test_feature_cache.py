"""The images that records name: each fetched and processed once while it is kept, and no dearer to
ask for the more there are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from onstream.pipeline.images import ImageFile
from onstream.pipeline.images.feature_cache import FETCHED_AT_ONCE, FeatureCache, MissingImage
from onstream.pipeline.images.vision import Vision, load_vision
from tests.vision.conftest import noise
from tests.waiting import LONGEST_S

STUDENT = Path(__file__).parents[3] / "examples/colour-words/student"
PICTURES = {picture.digest: picture for picture in map(noise, range(40))}
NAMES = list(PICTURES)
ROOM = 1 << 30


@pytest.fixture(scope="module")
def vision() -> Vision:
    return load_vision(STUDENT)


class Source:
    """Where the bytes come from: counts how often each was asked for, and may fail."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.failure: Exception | None = None

    def __call__(self, digests: Sequence[str]) -> list[bytes | None]:
        self.asked.update(digests)
        if self.failure:
            raise self.failure
        return [PICTURES[digest].data if digest in PICTURES else None for digest in digests]


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def cache(vision: Vision, source: Source) -> Iterator[FeatureCache]:
    made = FeatureCache(vision, source, ROOM)
    yield made
    made.close()


def calls(cache: FeatureCache, digest: str) -> int:
    """Function calls that asking for an image takes in this thread."""
    found = 0

    def count(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        cache.get([digest])
    finally:
        sys.setprofile(None)
    return found


def test_what_is_begun_ahead_and_asked_for_often_is_processed_once(
    cache: FeatureCache, vision: Vision, source: Source
) -> None:
    cache.prefetch(NAMES[:2])
    found = [cache.get(NAMES[:2]), cache.get([NAMES[0]])]
    assert source.asked == {NAMES[0]: 1, NAMES[1]: 1}
    expected = vision.features(ImageFile(PICTURES[NAMES[0]].data))
    for features in (one[NAMES[0]] for one in found):
        assert np.array_equal(features.token_ids, expected.token_ids)
        assert features.tensors["pixel_values"].equal(expected.tensors["pixel_values"])


def test_those_that_wait_are_fetched_together_a_few_at_a_time(vision: Vision) -> None:
    fetched = list[int]()
    first = Event()
    go = Event()

    def fetch(digests: Sequence[str]) -> list[bytes | None]:
        first.set()
        assert go.wait(LONGEST_S)
        fetched.append(len(digests))
        return [PICTURES[digest].data for digest in digests]

    cache = FeatureCache(vision, fetch, ROOM)
    cache.prefetch(NAMES[:1])
    assert first.wait(LONGEST_S)
    cache.prefetch(NAMES[1 : 3 + FETCHED_AT_ONCE])
    go.set()
    cache.get(NAMES[: 3 + FETCHED_AT_ONCE])
    assert fetched == [1, FETCHED_AT_ONCE, 2]
    cache.close()


def test_beyond_keep_bytes_the_least_recently_used_goes_first(
    vision: Vision, source: Source
) -> None:
    first, second, third = NAMES[:3]
    size = vision.features(PICTURES[first]).size_bytes
    cache = FeatureCache(vision, source, keep_bytes=2 * size)
    for digest in (first, second, first, third):
        cache.get([digest])
    cache.get([first, third])
    assert source.asked == {first: 1, second: 1, third: 1}
    cache.get([second])
    cache.get([first])
    assert source.asked == {first: 2, second: 2, third: 1}, (
        "the second was gone, and in its place went the first"
    )
    cache.close()


def test_all_that_is_asked_for_at_once_is_there_even_where_nothing_is_kept(
    vision: Vision, source: Source
) -> None:
    cache = FeatureCache(vision, source, keep_bytes=0)
    assert list(cache.get(NAMES[:3])) == NAMES[:3]
    cache.get(NAMES[:1])
    assert source.asked[NAMES[0]] == 2
    cache.close()


def test_asking_for_an_image_costs_the_same_however_many_are_kept(cache: FeatureCache) -> None:
    cache.get(NAMES[:2])
    among_two = calls(cache, NAMES[0])
    cache.get(NAMES)
    assert calls(cache, NAMES[0]) == among_two


def test_an_image_that_is_gone_or_could_not_be_fetched_is_asked_for_again(
    cache: FeatureCache, source: Source
) -> None:
    with pytest.raises(MissingImage, match="the image cat is gone"):
        cache.get(["cat"])
    PICTURES["cat"] = PICTURES[NAMES[0]]
    assert cache.get(["cat"])
    del PICTURES["cat"]
    source.failure = ConnectionError("away")
    with pytest.raises(ConnectionError, match="away"):
        cache.get([NAMES[0]])
    source.failure = None
    assert cache.get([NAMES[0]])
