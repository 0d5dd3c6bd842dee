"""Pictures in request bodies: found, checked, fetched, inlined, and nothing else touched."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import struct
import threading
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine.config import FetchConfig
from engine.errors import ApiError, bad_request
from engine.gateway.fetch import RemoteFetcher
from engine.gateway.images import ImageFetcher
from engine.gateway.images_body import Body, may_hold_pictures

WHERE = "messages.[0].content.[1].image_url.url"


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 6), mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = random.Random(7).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def as_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def opened(url: str) -> Image.Image:
    head, payload = url.split(",", 1)
    image = Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))
    assert image.format is not None
    assert head == f"data:image/{image.format.lower()};base64"
    return image


def chat(*urls: Any) -> bytes:
    parts = [
        {"type": "image_url", "image_url": url if not isinstance(url, str) else {"url": url}} for url in urls
    ]
    content = [{"type": "text", "text": "What is this?"}, *parts]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()


def urls_of(body: bytes) -> list[str]:
    parts = json.loads(body)["messages"][0]["content"]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def bomb(side: int = 8_000) -> bytes:
    """A one-bit PNG of side x side pixels in few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(1 + (side + 7) // 8)) for _ in range(side)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


class FakeRemote(RemoteFetcher):
    """Pictures of a network that is not there."""

    def __init__(self, pages: dict[str, bytes]) -> None:
        super().__init__(FetchConfig())
        self.pages = pages
        self.asked: list[str] = []
        self.gate: asyncio.Event | None = None
        self.running = self.cancelled = 0
        self.begun: asyncio.Queue[str] = asyncio.Queue()

    async def all_running(self, count: int) -> None:
        for _ in range(count):
            await self.begun.get()
        assert self.running == count

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def fetch(self, url: str, *, param: str) -> bytes:
        self.asked.append(url)
        self.running += 1
        self.begun.put_nowait(url)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(0)
            if url not in self.pages:
                raise bad_request("no such picture", param=param, code="image_fetch_failed")
            return self.pages[url]
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


class Desk:
    """An image fetcher with a fake network."""

    def __init__(self) -> None:
        self.remote = FakeRemote({})
        self.images = ImageFetcher(FetchConfig(), remote=self.remote)

    async def limit(self, **limits: Any) -> None:
        await self.images.close()
        self.images = ImageFetcher(FetchConfig(**limits), remote=self.remote)

    async def chat(self, body: bytes) -> bytes:
        return await self.images.settle(body, "chat")

    async def detect(self, image: Any) -> bytes:
        return await self.images.settle(json.dumps({"model": "m", "image": image}).encode(), "detections")

    async def refusal(self, body: bytes, endpoint: Any = "chat") -> ApiError:
        with pytest.raises(ApiError) as caught:
            await self.images.settle(body, endpoint)
        assert caught.value.status == 400
        return caught.value


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    await desk.images.start()
    yield desk
    await desk.images.close()


async def test_a_body_without_pictures_is_given_back_itself(desk: Desk) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 5_000_000}]}).encode()
    before = threading.active_count()
    assert await desk.chat(body) is body
    assert threading.active_count() == before, "a text body needs no thread"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
async def test_a_sound_data_url_changes_nothing(desk: Desk, kind: str) -> None:
    body = chat(as_url(picture(kind), kind.lower()))
    assert await desk.chat(body) is body


async def test_a_large_body_goes_the_same_way(desk: Desk) -> None:
    body = chat(as_url(picture(size=(300, 300))))
    assert len(body) > 64 * 1024
    assert await desk.chat(body) is body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
async def test_a_remote_picture_is_inlined_with_its_own_bytes(desk: Desk, kind: str) -> None:
    desk.remote.pages["https://a.example/p"] = data = picture(kind)
    (url,) = urls_of(await desk.chat(chat("https://a.example/p")))
    assert url == as_url(data, kind.lower())


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "CMYK"])
async def test_a_format_that_engines_may_lack_becomes_png(desk: Desk, mode: str) -> None:
    desk.remote.pages["https://a.example/p"] = data = picture("TIFF", mode=mode)
    (url,) = urls_of(await desk.chat(chat("https://a.example/p")))
    image = opened(url)
    assert image.format == "PNG" and image.size == (8, 6)
    assert image.convert("RGB").tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    (inlined,) = urls_of(await desk.chat(chat(as_url(data, "tiff"))))
    assert opened(inlined).format == "PNG"


async def test_an_animation_stays_one(desk: Desk) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    body = chat(as_url(buffer.getvalue(), "gif"))
    assert await desk.chat(body) is body


async def test_everything_but_the_picture_stays_as_written(desk: Desk) -> None:
    desk.remote.pages["https://a.example/p"] = data = picture()
    body = (
        b'{"model":"m","seed":123456789012345678901234567890,"temperature":1e-7,"x":"\\ud83d\\ude00\\u00e9",'
        b'"messages":[{"role":"system","content":"be brief"},{"role":"user","name":"n","content":['
        b'{"type":"text","text":"a\\u0062"},'
        b'{"type":"image_url","image_url":{"url":"https://a.example/p","detail":"low","n":1.0}}]},'
        b'{"role":"assistant","content":null,"tool_calls":[{"id":"1"}]}],"stream":true}'
    )
    expected = body.replace(b"https://a.example/p", as_url(data).encode())
    assert await desk.chat(body) == expected


async def test_other_shapes_of_a_picture_part(desk: Desk) -> None:
    desk.remote.pages["http://a.example/p"] = data = picture()
    parts = [
        {"type": "image_url", "image_url": "http://a.example/p"},
        {"image_url": "http://a.example/p"},
        {"type": "input_image", "image_url": "http://a.example/p"},
        {"type": "image_url", "uuid": "u", "image_url": {"url": "http://a.example/p"}},
        {"type": "image_url", "uuid": "u", "image_url": None},
    ]
    messages = [{"role": "user", "content": "hello"}, {"role": "tool", "content": parts}]
    settled = json.loads(await desk.chat(json.dumps({"messages": messages}).encode()))["messages"][1][
        "content"
    ]
    assert [part["image_url"] for part in settled[:3]] == [as_url(data)] * 3
    assert settled[3]["image_url"] == {"url": as_url(data)}
    assert settled[4] == parts[4]


async def test_a_key_hidden_by_escapes_is_found(desk: Desk) -> None:
    desk.remote.pages["http://a.example/p"] = picture()
    for hidden in (
        b"image\\u005furl",
        b"image\\u005Furl",
        b"image_\\u0075rl",
        b"image_ur\\u006c",
        b"image_u\\u0072l",
    ):
        body = chat("http://a.example/p").replace(b"image_url", hidden)
        assert b"http://a.example" not in await desk.chat(body)


async def test_the_last_of_two_equal_keys_counts_as_in_the_engine(desk: Desk) -> None:
    body = (
        b'{"messages":[{"content":[{"type":"image_url","image_url":{"url":"'
        + as_url(picture()).encode()
        + b'","url":"file:///etc/passwd"}}]}]}'
    )
    assert (await desk.refusal(body)).code == "invalid_image_url"


@pytest.mark.parametrize("key", ["audio_url", "video_url"])
async def test_no_engine_is_handed_another_address_to_fetch(desk: Desk, key: str) -> None:
    for media in ({"url": "http://10.0.0.1/a"}, "http://10.0.0.1/a", {"url": "file:///etc/passwd"}):
        body = json.dumps({"messages": [{"content": [{"type": key, key: media}]}]}).encode()
        error = await desk.refusal(body)
        assert error.code == f"invalid_{key}"
        assert error.param is not None and error.param.startswith(f"messages.[0].content.[0].{key}")
    body = json.dumps(
        {"messages": [{"content": [{"type": key, key: {"url": "data:a/b;base64,AA=="}}]}]}
    ).encode()
    assert await desk.chat(body) is body


async def test_one_url_is_fetched_once_and_different_ones_together(desk: Desk) -> None:
    desk.remote.pages = {f"http://a.example/{i}": picture(size=(i + 1, 1)) for i in range(3)}
    desk.remote.gate = asyncio.Event()
    urls = ["http://a.example/0", "http://a.example/1", "http://a.example/0", "http://a.example/2"]
    settling = asyncio.create_task(desk.chat(chat(*urls)))
    await desk.remote.all_running(3)
    desk.remote.gate.set()
    widths = [opened(url).size[0] for url in urls_of(await settling)]
    assert widths == [1, 2, 1, 3]
    assert sorted(desk.remote.asked) == sorted(set(urls))


async def test_a_client_that_leaves_ends_its_fetches(desk: Desk) -> None:
    desk.remote.gate = asyncio.Event()
    settling = asyncio.create_task(desk.chat(chat("http://a.example/1", "http://a.example/2")))
    await desk.remote.all_running(2)
    settling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await settling
    assert (desk.remote.running, desk.remote.cancelled) == (0, 2)


async def test_the_first_fault_in_order_is_told_and_the_rest_ended(desk: Desk) -> None:
    body = chat("http://a.example/missing", as_url(b"no picture"))
    error = await desk.refusal(body)
    assert (error.code, error.param) == ("image_fetch_failed", WHERE)
    assert desk.remote.running == 0


async def test_too_many_pictures(desk: Desk) -> None:
    await desk.limit(max_images=2)
    url = as_url(picture())
    body = chat(url, url)
    assert await desk.chat(body) is body
    error = await desk.refusal(chat(url, url, url))
    assert (error.code, error.param) == ("too_many_images", "messages.[0].content.[3].image_url.url")


async def test_too_many_bytes_together(desk: Desk) -> None:
    data = picture()
    desk.remote.pages = {"http://a.example/1": data, "http://a.example/2": data}
    await desk.limit(max_total_bytes=2 * len(data))
    assert len(urls_of(await desk.chat(chat(*desk.remote.pages)))) == 2
    await desk.limit(max_total_bytes=2 * len(data) - 1)
    assert (await desk.refusal(chat(*desk.remote.pages))).code == "image_too_large"


TRUNCATED = [
    picture(kind, (64, 64))[: len(picture(kind, (64, 64))) // 2]
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")
]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_image"),
        (b"\x89PNG\r\n\x1a\n", "invalid_image"),
        (b"hello, I am text", "invalid_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "invalid_image"),
        *[(data, "invalid_image") for data in TRUNCATED],
        (picture()[:-20] + os.urandom(8) + picture()[-12:], "invalid_image"),
        (bomb(), "image_too_large"),
    ],
)
async def test_what_is_no_picture(desk: Desk, data: bytes, code: str) -> None:
    desk.remote.pages["http://a.example/p"] = data
    for url in ("http://a.example/p", as_url(data)):
        error = await desk.refusal(chat(url))
        assert (error.code, error.param) == (code, WHERE)
    with pytest.raises(ApiError) as caught:
        await desk.images.raw_image(data, param="image")
    assert (caught.value.code, caught.value.param) == (code, "image")


async def test_a_sound_upload_passes(desk: Desk) -> None:
    await desk.images.raw_image(picture("JPEG"), param="image")


async def test_pixels_are_bounded_by_configuration(desk: Desk) -> None:
    body = chat(as_url(picture(size=(10, 10))))
    await desk.limit(max_pixels=99)
    error = await desk.refusal(body)
    assert error.code == "image_too_large" and "99" in error.message
    await desk.limit(max_pixels=100)
    assert await desk.chat(body) is body


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64",
        "data:image/png;base64,$$$$",
        "data:image/png;base64,AAAAA",
        "file:///etc/passwd",
        "ftp://a.example/p.png",
        "a.example/p.png",
        "",
        base64.b64encode(picture()).decode(),
    ],
)
async def test_urls_that_are_none(desk: Desk, url: str) -> None:
    error = await desk.refusal(chat(url))
    assert (error.code, error.param) == ("invalid_image_url", WHERE)


def _loose(data: bytes) -> list[str]:
    text = base64.b64encode(data).decode()
    return [
        "data:;base64," + text,
        "DATA:image/png;base64," + text,
        "data:image/PNG;charset=utf-8;base64," + text,
        "data:image/png;base64," + "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        "data:image/png;base64," + text.rstrip("="),
        "data:image/png;base64," + base64.urlsafe_b64encode(data).decode(),
        "data:application/octet-stream;base64," + text,
    ]


@pytest.mark.parametrize("url", _loose(picture(size=(9, 9))))
async def test_loose_data_urls_are_rewritten_plainly(desk: Desk, url: str) -> None:
    (settled,) = urls_of(await desk.chat(chat(url)))
    assert settled == as_url(picture(size=(9, 9)))


async def test_detection_takes_urls_data_urls_and_bare_base64(desk: Desk) -> None:
    data = picture("JPEG")
    desk.remote.pages["http://a.example/p"] = data
    for image in ("http://a.example/p", base64.b64encode(data).decode()):
        assert json.loads(await desk.detect(image)) == {"model": "m", "image": as_url(data, "jpeg")}
    body = json.dumps({"image": as_url(data, "jpeg")}).encode()
    assert await desk.images.settle(body, "detections") is body


@pytest.mark.parametrize(
    ("image", "code"),
    [
        ("", "empty_image"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("/etc/passwd", "invalid_image"),
        ("not base64!", "invalid_image_url"),
        ("http://a.example/missing", "image_fetch_failed"),
    ],
)
async def test_detection_refuses_by_the_name_of_its_field(desk: Desk, image: str, code: str) -> None:
    error = await desk.refusal(json.dumps({"image": image}).encode(), "detections")
    assert (error.code, error.param) == (code, "image")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b'"image_url"', b'{"a":nan}', b'{"image_url":1}}', b'\xff_url"']
)
@pytest.mark.parametrize("endpoint", ["chat", "detections"])
async def test_what_is_no_json_object(desk: Desk, body: bytes, endpoint: Any) -> None:
    if not may_hold_pictures(body, endpoint):
        assert await desk.images.settle(body, endpoint) is body, "left to the parser that reads the model"
        return
    assert (await desk.refusal(body, endpoint)).code == "invalid_json"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "content", "image_url", "url", "type", "image"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["messages", "content", "image_url", "image"]), _JSON, max_size=4))
def test_unexpected_shapes_are_left_to_the_engine(value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    for endpoint in ("chat", "detections"):
        parsed = Body(data, endpoint)
        assert json.loads(parsed.encode()) == value
        for place in parsed.places:
            place.put("data:,")
        json.loads(parsed.encode())
