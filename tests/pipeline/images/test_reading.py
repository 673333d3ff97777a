"""Images are read whole and within limits, or refused with the reason."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from PIL import Image

from pipeline.images import ImageError, Limits, Picture, read_picture

LIMITS = Limits(max_bytes=1 << 20, max_pixels=1 << 16)


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def url_of(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


RED = Image.new("RGB", (20, 10), "red")


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises width × height pixels, of which none is there."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_png_jpeg_and_webp_are_read(form: str, options: dict[str, Any]) -> None:
    data = file_of(RED, form, **options)
    picture = read_picture(url_of(data, f"image/{form.lower()}"), LIMITS)
    assert picture.data == data
    assert picture.decoded().size == (20, 10)
    assert picture.data_url == url_of(data, f"image/{form.lower()}")


def test_the_digest_names_the_bytes() -> None:
    first, second = read_picture(url_of(file_of(RED)), LIMITS), read_picture(url_of(file_of(RED)), LIMITS)
    other = read_picture(url_of(file_of(Image.new("RGB", (20, 10), "blue"))), LIMITS)
    assert first.digest == second.digest != other.digest


def test_what_is_transparent_is_shown_on_white() -> None:
    clear = Picture(file_of(Image.new("RGBA", (2, 2), (0, 0, 0, 0))))
    assert clear.decoded().getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,@@@@", "not base64"),
        ("data:text/plain;base64,AAAA", "no data URL of an image"),
        ("data:image/png,AAAA", "no data URL of an image"),
        (url_of(b"GIF89a" + b"\0" * 100), "no image of a format that is read; expected one of PNG, JPEG, WEBP"),
        (url_of(file_of(RED, "GIF")), "no image of a format that is read"),
        (url_of(file_of(Image.effect_noise((64, 64), 50))[:-800]), "the image is broken"),
        (url_of(bomb(300, 300)), "300 × 300 = 90000 pixels; images.max_pixels is 65536. It was not decoded"),
        (url_of(bomb(60_000, 60_000)), "refused before decoding"),
        (url_of(b"\0" * (1 << 21)), "images.max_bytes is 1048576"),
        ("https://example.org/cat.png", "images.allowed_hosts: none"),
        ("file:///etc/passwd", "neither a data URL nor http"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason.replace("(", r"\(")):
        read_picture(url, LIMITS)


@pytest.fixture
def host() -> Iterator[str]:
    """A server with one picture, one that is too large, and a redirect to it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = {"/red.png": file_of(RED), "/large.png": b"\0" * (1 << 21)}.get(self.path, b"")
            self.send_response(302 if self.path == "/moved.png" else 200 if body else 404)
            self.send_header("Location", "/red.png")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body)
            except ConnectionError:
                self.close_connection = True  # the reader had enough

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_allowed_host_is_fetched_from_within_the_limits(host: str) -> None:
    limits = Limits(max_bytes=1 << 20, max_pixels=1 << 16, hosts=["127.0.0.1"])
    assert read_picture(f"{host}/red.png", limits).data == file_of(RED)
    for path, reason in (("large.png", "images.max_bytes"), ("gone.png", "status 404"), ("moved.png", "status 302")):
        with pytest.raises(ImageError, match=reason):
            read_picture(f"{host}/{path}", limits)
