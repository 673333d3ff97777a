"""Messages keep the order of text and images, whatever the images' URLs become."""

from __future__ import annotations

from typing import Any

import pytest

from onstream.pipeline.images import for_template, image_urls, reference_of, referred, with_urls


def shows(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


CHAT = [
    {"role": "system", "content": "Name what you see."},
    {
        "role": "user",
        "content": [shows("data:a"), {"type": "text", "text": "and"}, shows("data:b")],
    },
    {"role": "assistant", "content": "cat, dog"},
    {"role": "user", "content": [{"type": "text", "text": "again"}, shows("data:a")]},
]


def test_the_images_come_in_the_order_in_which_they_are_shown() -> None:
    assert image_urls(CHAT) == ["data:a", "data:b", "data:a"]


def test_references_there_and_back_change_nothing() -> None:
    urls = {"data:a": reference_of("1"), "data:b": reference_of("2")}
    travelling = with_urls(CHAT, urls)
    assert referred(travelling) == ["1", "2", "1"]
    assert "data:" not in str(travelling)
    assert with_urls(travelling, {reference: url for url, reference in urls.items()}) == CHAT


def test_messages_without_images_are_left_as_they_are() -> None:
    assert with_urls(CHAT[:1], {})[0] is CHAT[0]
    assert referred(CHAT[:1]) == []


def test_templates_get_parts_alone_where_any_is_an_image() -> None:
    assert for_template(CHAT) == [
        {"role": "system", "content": [{"type": "text", "text": "Name what you see."}]},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "cat, dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "again"}, {"type": "image"}]},
    ]
    assert for_template(CHAT[:1]) == CHAT[:1], "a template that knows texts alone gets texts"
    calls = [{"role": "assistant", "content": "", "tool_calls": [{}]}]
    assert for_template([*CHAT[1:2], *calls])[1:] == calls


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url"},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": {"url": ""}},
    ],
)
def test_an_image_without_a_url_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no URL"):
        image_urls([{"role": "user", "content": [part]}])
