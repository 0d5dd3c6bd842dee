"""Pictures: what is taken, what is refused, and how it is said."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine.errors import ApiError
from engine.runners.media import data_url, decode_base64, decode_image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(data: bytes, max_pixels: int = 1_000_000) -> str | None:
    with pytest.raises(ApiError) as caught:
        decode_image(data, max_pixels=max_pixels, param="image")
    assert (caught.value.status, caught.value.param) == (400, "image")
    return caught.value.code


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_usual_formats_are_decoded(kind: str) -> None:
    image = decode_image(encoded(Image.new("RGB", (20, 10), "red"), kind), max_pixels=200, param="image")
    assert image.size == (20, 10)
    red, green, blue = image.convert("RGB").getpixel((5, 5))
    assert red > 250 and green < 5 and blue < 5


def test_an_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (30, 10), "blue")
    image.paste("red", (0, 0, 10, 10))  # at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees clockwise: the left comes to the top
    turned = decode_image(encoded(image, "PNG", exif=exif), max_pixels=300, param="image")
    assert turned.size == (10, 30)
    assert turned.getpixel((5, 3)) == (255, 0, 0)
    assert turned.getpixel((5, 25)) == (0, 0, 255)


def test_what_is_no_picture_is_refused() -> None:
    assert refusal(b"") == "empty_image"
    assert refusal(b"hello") == "invalid_image"
    assert refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "invalid_image"
    assert refusal(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "invalid_image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_pictures_are_refused(kind: str) -> None:
    noise = Image.frombytes("RGB", (64, 64), bytes(i * 7919 % 251 for i in range(64 * 64 * 3)))
    data = encoded(noise, kind)
    for share in (0.1, 0.5, 0.9):
        assert refusal(data[: int(len(data) * share)]) == "invalid_image"


@given(st.data())
def test_damage_is_never_anything_but_a_picture_or_a_400(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    whole = bytearray(encoded(Image.new("RGB", (16, 16), "red"), kind))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8)):
        whole[place] = data.draw(st.integers(0, 255))
    try:
        decode_image(bytes(whole), max_pixels=100_000, param="image")
    except ApiError as error:
        assert error.status == 400


def test_a_bomb_is_refused_by_its_header_alone() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    assert refusal(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b""))) == "image_too_large"
    assert refusal(encoded(Image.new("1", (101, 100)), "PNG"), max_pixels=10_000) == "image_too_large"
    assert decode_image(encoded(Image.new("1", (100, 100)), "PNG"), max_pixels=10_000, param="i").size


@given(st.binary(min_size=1))
def test_data_urls_give_their_bytes(data: bytes) -> None:
    text = base64.b64encode(data).decode()
    assert data_url(f"data:image/png;base64,{text}", param="image") == data
    assert data_url(f"data:;base64,{text.rstrip('=')}", param="image") == data
    assert decode_base64(base64.urlsafe_b64encode(data).decode(), param="image") == data
    assert decode_base64("\n".join(text), param="image") == data


def test_percent_encoded_data_urls_work() -> None:
    assert data_url("data:image/png,%89PNG", param="image") == b"\x89PNG"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.com/a.png", "fetches nothing"),
        ("file:///etc/passwd", "must be a data URL"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,a", "base64"),
        ("data:image/png;base64,????", "base64"),
        ("", "must be a data URL"),
    ],
)
def test_other_urls_are_refused(url: str, reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as caught:
        data_url(url, param="image_url")
    assert (caught.value.status, caught.value.param, caught.value.code) == (
        400,
        "image_url",
        "invalid_image_url",
    )
