"""Makes every picture of a request one that a runner can decode: fetched, checked and inlined.

Runners fetch nothing and get nothing that their decoders choke on. Work is done in threads of its own (PIL
lets go of the interpreter lock while it decodes), so a large picture does not hold up other requests.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

from PIL import Image

from engine.config import FetchConfig
from engine.errors import bad_request
from engine.gateway.fetch import RemoteFetcher, parse_url
from engine.gateway.images_body import Body, Endpoint, Place, may_hold_pictures
from engine.runners.media import FORMATS, data_url, decode_base64, decode_image

P = ParamSpec("P")
T = TypeVar("T")

#: Formats whose bytes go to the engines as they are; others are re-encoded as PNG.
_KEPT: Final = {
    "PNG": "png",
    "JPEG": "jpeg",
    "MPO": "jpeg",  # a JPEG with more pictures behind it, as telephones write
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
}
_PNG_MODES: Final = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

#: The one spelling of a data URL that every engine reads; others are rewritten.
_PLAIN: Final = re.compile(r"data:image/(?:png|jpeg|jpg|webp|gif|bmp);base64,")

#: Bodies above this size are parsed in a thread.
_INLINE_BYTES: Final = 64 * 1024


class ImageFetcher:
    """The gateway's one place for the pictures of requests.

    Args:
        config: bounds of fetches and pictures.
        remote: fetches over the network; made from ``config`` unless a test hands in another.
    """

    def __init__(self, config: FetchConfig, *, remote: RemoteFetcher | None = None) -> None:
        self._config = config
        self._remote = remote or RemoteFetcher(config)
        self._threads = ThreadPoolExecutor(
            max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="hearth-pictures"
        )

    async def start(self) -> None:
        """Called once by the gateway, inside its event loop, before the first :meth:`settle`."""
        await self._remote.start()

    async def close(self) -> None:
        """Ends fetches in flight; decodes that already run finish on their own."""
        await self._remote.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def settle(self, body: bytes, endpoint: Endpoint) -> bytes:
        """A body whose pictures are all checked data URLs; the very same object when nothing had to change.

        Args:
            body: the JSON of a chat completion (``image_url`` parts) or of a detection (``image``: a URL, a
                data URL or bare base64).
            endpoint: which of the two.

        Raises:
            ApiError: 400 with ``param`` naming the part and a code: ``invalid_json``, ``too_many_images``,
                ``invalid_image_url``, ``address_not_allowed``, ``image_fetch_failed``, ``image_too_large``,
                ``empty_image``, ``invalid_image``.
        """
        if not may_hold_pictures(body, endpoint):
            return body
        parsed = Body(body, endpoint) if len(body) <= _INLINE_BYTES else await self._off(Body, body, endpoint)
        count, most = len(parsed.places), self._config.max_images
        if count > most:
            raise bad_request(
                f"The request holds {count} pictures; at most {most} are taken. Send fewer.",
                param=parsed.places[most].param,
                code="too_many_images",
            )
        if not await self._settle_all(parsed.by_url(), endpoint):
            return body
        return await self._off(parsed.encode)

    async def raw_image(self, data: bytes, *, param: str) -> None:
        """Checks an uploaded picture.

        Raises:
            ApiError: 400 with code ``empty_image``, ``invalid_image`` or ``image_too_large``.
        """
        await self._off(_checked, data, self._config.max_pixels, param)

    async def _settle_all(self, groups: list[list[Place]], endpoint: Endpoint) -> bool:
        """Puts the new URLs; whether there are any. The first picture at fault, in order, gives the error."""
        budget = _Budget(self._config.max_total_bytes)
        tasks = [asyncio.create_task(self._settled(group[0], endpoint, budget)) for group in groups]
        try:
            changed = False
            for group, task in zip(groups, tasks, strict=True):
                url = await task
                if url is None:
                    continue
                changed = True
                for place in group:
                    place.put(url)
            return changed
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _settled(self, place: Place, endpoint: Endpoint, budget: _Budget) -> str | None:
        """The URL to put in place of the given one; None keeps it."""
        url, param, most = place.url, place.param, self._config.max_pixels
        if url[:5].lower() == "data:":
            return await self._off(_settled_data_url, url, most, param)
        if endpoint == "detections" and ":" not in url[:16]:
            return await self._off(_settled_base64, url, most, param)
        parse_url(url, param=param)
        data = await self._remote.fetch(url, param=param)
        budget.take(len(data), param)
        return await self._off(_inlined, data, most, param)

    async def _off(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        assert not kwargs, "positional arguments only"
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)


class _Budget:
    """Bytes that the fetched pictures of one request may still take together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    def take(self, size: int, param: str) -> None:
        self._taken += size
        if self._taken > self._most:
            raise bad_request(
                f"The pictures of this request have more than {self._most} bytes together, the most that is "
                "fetched for one request. Send fewer or smaller ones.",
                param=param,
                code="image_too_large",
            )


def _settled_data_url(url: str, max_pixels: int, param: str) -> str | None:
    if (plain := _PLAIN.match(url)) is not None:
        try:
            data = binascii.a2b_base64(url[plain.end() :], strict_mode=True)
        except ValueError:
            pass  # line breaks, another alphabet, no padding: read leniently below, and rewritten
        else:
            kept = _checked(data, max_pixels, param) in _KEPT
            return None if kept else _inlined(data, max_pixels, param)
    return _inlined(data_url("data:" + url[5:], param=param), max_pixels, param)


def _settled_base64(text: str, max_pixels: int, param: str) -> str:
    return _inlined(decode_base64(text, param=param), max_pixels, param)


def _checked(data: bytes, max_pixels: int, param: str) -> str:
    """The format's name, after the picture (of an animation its first frame) has been decoded wholly."""
    decode_image(data, max_pixels=max_pixels, param=param)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.format or ""


def _inlined(data: bytes, max_pixels: int, param: str) -> str:
    """The picture as a plain data URL."""
    kind = _KEPT.get(_checked(data, max_pixels, param))
    if kind is None:
        image = decode_image(data, max_pixels=max_pixels, param=param)
        if image.mode not in _PNG_MODES:
            image = image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        kind, data = "png", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
