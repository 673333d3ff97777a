"""Images are read whole and within limits, or refused with the reason."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import socket
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from threading import Event, Thread
from typing import Any

import pytest
from PIL import Image

from onstream.pipeline.images import ImageError, ImageFile, ImageLimits, read_image

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1 << 16)


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
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})]
)
def test_png_jpeg_and_webp_are_read(form: str, options: dict[str, Any]) -> None:
    data = file_of(RED, form, **options)
    picture = read_image(url_of(data, f"image/{form.lower()}"), LIMITS)
    assert picture.data == data
    assert picture.decoded().size == (20, 10)
    assert picture.data_url == url_of(data, f"image/{form.lower()}")


def test_the_digest_names_the_bytes() -> None:
    first = read_image(url_of(file_of(RED)), LIMITS)
    second = read_image(url_of(file_of(RED)), LIMITS)
    other = read_image(url_of(file_of(Image.new("RGB", (20, 10), "blue"))), LIMITS)
    assert first.digest == second.digest != other.digest


def test_what_is_transparent_is_shown_on_white() -> None:
    clear = ImageFile(file_of(Image.new("RGBA", (2, 2), (0, 0, 0, 0))))
    assert clear.decoded().getpixel((0, 0)) == (255, 255, 255)


NOISE = Image.effect_noise((64, 64), 50)
ANIMATION = {"save_all": True, "append_images": [RED.rotate(90)]}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        pytest.param("data:image/png;base64,@@@@", "not base64", id="no base64"),
        pytest.param(
            "data:text/plain;base64,AAAA",
            "no data URL of an image; expected data:image/png",
            id="another type",
        ),
        pytest.param(
            "data:image/png,AAAA", "no data URL of an image", id="data that is not in base64"
        ),
        pytest.param(
            url_of(b""), "0 bytes, which begin with b'', are no whole image", id="nothing"
        ),
        pytest.param(
            url_of(b"GIF89a" + b"\0" * 100),
            "begin with b'GIF89a.*expected one of PNG, JPEG, WEBP. Convert it",
            id="a GIF's head",
        ),
        pytest.param(
            url_of(file_of(RED, "GIF"), "image/gif"),
            "no whole image of a format that is read",
            id="GIF",
        ),
        pytest.param(url_of(file_of(RED, "GIF")), "begin with b'GIF8", id="GIF under another name"),
        pytest.param(url_of(file_of(RED, "BMP")), "begin with b'BM", id="BMP"),
        pytest.param(
            url_of(file_of(RED, "TIFF")), "no whole image of a format that is read", id="TIFF"
        ),
        pytest.param(
            url_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
            "begin with b'<svg",
            id="SVG",
        ),
        pytest.param(
            url_of(file_of(NOISE)[:-800]), "the image is broken.*Replace it", id="PNG cut off"
        ),
        pytest.param(
            url_of(file_of(NOISE)[:30]),
            "begin with .*no whole image of a format that is read",
            id="PNG cut off in its header",
        ),
        pytest.param(
            url_of(file_of(NOISE, "JPEG")[:-800]),
            "the image is broken: .*truncated",
            id="JPEG cut off",
        ),
        pytest.param(
            url_of(file_of(NOISE, "JPEG")[:30]),
            "the image is broken: Truncated",
            id="JPEG cut off in its header",
        ),
        pytest.param(
            url_of(file_of(NOISE, "WEBP")[:-800]), "the image is broken", id="WebP cut off"
        ),
        pytest.param(
            url_of(b"\x89PNG\r\n\x1a\n" + b"\7" * 200),
            "begin with .*no whole image of a format that is read",
            id="PNG that holds anything",
        ),
        pytest.param(
            url_of(bomb(300, 300)),
            "300 × 300 = 90000 pixels; images.max_pixels is 65536. It was not decoded",
            id="too many pixels",
        ),
        pytest.param(
            url_of(bomb(60_000, 60_000)),
            "refused before decoding.*images.max_pixels is 65536",
            id="a bomb",
        ),
        pytest.param(
            url_of(bomb(0, 10)),
            "begin with .*no whole image of a format that is read",
            id="no pixels",
        ),
        pytest.param(
            url_of(bomb(1005, 5)),
            "1005 × 5 pixels; expected sides of at most 200 to 1. Crop it",
            id="a line",
        ),
        pytest.param(
            url_of(b"\0" * (1 << 21)), "images.max_bytes is 1048576. Shrink it", id="too many bytes"
        ),
        pytest.param(
            url_of(file_of(RED, "WEBP", **ANIMATION)),
            "an animation of 2 frames",
            id="animated WebP",
        ),
        pytest.param(
            url_of(file_of(RED, "PNG", **ANIMATION)), "an animation of 2 frames", id="animated PNG"
        ),
        pytest.param(
            "https://example.org/cat.png",
            "images.allowed_hosts: none. Put images into the prompt as data:",
            id="https",
        ),
        pytest.param(
            "http://127.0.0.1@example.org/cat.png",
            "on another host",
            id="a host that only seems to be allowed",
        ),
        pytest.param("file:///etc/passwd", "neither a data URL nor http", id="file"),
        pytest.param("ftp://127.0.0.1/cat.png", "neither a data URL nor http", id="ftp"),
        pytest.param("cat.png", "neither a data URL nor http", id="a path"),
        pytest.param(
            "image:" + "0" * 64, "neither a data URL nor http", id="a reference of our own"
        ),
        pytest.param("http://[bad", "on another host", id="half an address"),
        pytest.param("http://127.0.0.1:port/", "cannot be fetched: InvalidURL", id="no port"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(url: str, reason: str) -> None:
    limits = replace(
        LIMITS, hosts=[] if "example.org/" in url and "@" not in url else ["127.0.0.1"]
    )
    with pytest.raises(ImageError, match=reason.replace("(", r"\(")):
        read_image(url, limits)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_was_damaged_anywhere_is_refused_or_read_and_nothing_else(form: str) -> None:
    whole = file_of(NOISE, form)
    random = Random(form)
    read = 0
    for _ in range(300):
        data = bytearray(whole[: random.randrange(len(whole))] if random.random() < 0.3 else whole)
        for _ in range(random.randrange(1, 4)):
            data[random.randrange(max(1, min(len(data), 80)))] = random.randrange(256)
        try:
            picture = read_image(url_of(bytes(data)), LIMITS)
        except ImageError:
            continue
        assert picture.decoded().mode == "RGB"
        read += 1
    assert read < 300


def test_a_type_that_was_declared_wrongly_does_no_harm() -> None:
    """The bytes decide, since data sets often declare one type for all; what is sent on declares
    the right one.
    """
    data = file_of(RED, "JPEG")
    assert read_image(url_of(data, "image/png"), LIMITS).data_url == url_of(data, "image/jpeg")


def test_a_photo_is_shown_the_right_way_up() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert read_image(url_of(file_of(RED, "JPEG", exif=exif)), LIMITS).decoded().size == (10, 20)


def test_a_jpeg_that_holds_another_one_is_shown_by_its_first() -> None:
    """Phones write such files, for depth or brightness."""
    picture = read_image(
        url_of(file_of(RED, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])), LIMITS
    )
    assert picture.decoded().size == (20, 10)
    assert picture.data_url.startswith("data:image/jpeg;")


@pytest.fixture
def host() -> Iterator[str]:
    """A server with one picture, one that is too large, one that unfolds to that, one that comes in
    drops, and redirects.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            large = b"\0" * (1 << 21)
            body = {
                "/red.png": file_of(RED),
                "/large.png": large,
                "/folded.png": gzip.compress(large),
            }.get(self.path, b"")
            self.send_response(
                302
                if self.path == "/moved.png"
                else 200
                if body or self.path == "/slow.png"
                else 404
            )
            self.send_header("Location", "http://example.org/red.png")
            if self.path == "/folded.png":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            try:
                self.wfile.write(body)
                while self.path == "/slow.png" and not ended.wait(0.05):
                    self.wfile.write(b"x")
            except ConnectionError:
                self.close_connection = True  # the reader had enough

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    ended = Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    ended.set()
    server.shutdown()
    server.server_close()


FETCHED = ImageLimits(max_bytes=1 << 20, max_pixels=1 << 16, hosts=["127.0.0.1"])
IMPATIENT = replace(FETCHED, fetch_timeout_s=0.5)


def test_an_allowed_host_is_fetched_from(host: str) -> None:
    assert read_image(f"{host}/red.png", FETCHED).data == file_of(RED)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("large.png", "images.max_bytes is 1048576"),
        ("folded.png", "no whole image of a format that is read"),
        ("gone.png", "status 404; expected 200"),
        (
            "moved.png",
            "status 302 .to 'http://example.org/red.png'; redirects are not followed.; expected "
            "200",
        ),
        ("slow.png", "took longer than images.fetch_timeout, 0.5 s"),
    ],
)
def test_what_a_host_does_not_give_within_the_limits_is_refused(
    host: str, path: str, reason: str
) -> None:
    with pytest.raises(ImageError, match=reason):
        read_image(f"{host}/{path}", IMPATIENT if path == "slow.png" else FETCHED)


def test_a_host_that_drips_headers_is_given_up() -> None:
    ended = Event()

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not ended.wait(0.05):
                connection.sendall(b"X-More: x\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=drip, args=(server,))
        thread.start()
        with pytest.raises(ImageError, match=r"took longer than images.fetch_timeout, 0.5 s"):
            read_image(f"http://127.0.0.1:{server.getsockname()[1]}/red.png", IMPATIENT)
        ended.set()
        thread.join()


def test_a_host_that_does_not_answer_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(
            ImageError,
            match=r"took longer than images.fetch_timeout, 0.5 s\. Put it into the prompt",
        ):
            read_image(f"http://127.0.0.1:{port}/red.png", IMPATIENT)
    with pytest.raises(ImageError, match="cannot be fetched: ConnectError"):
        read_image(f"http://127.0.0.1:{port}/red.png", FETCHED)
