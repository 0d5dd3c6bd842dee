"""Pictures as clients send them: bytes or data URLs, checked before anything large is allocated."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import warnings
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps, UnidentifiedImageError

from engine.errors import ApiError, bad_request

#: What is opened. Not "all that PIL knows": some of its formats call other programs (EPS) or are rare and
#: brittle.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

# PIL warns of large pictures, for which max_pixels is our own bound, and of odd metadata, which is the
# client's affair. Once for the process: warnings.catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_TRANSPOSED_ALPHABET = str.maketrans("-_", "+/")


def decode_image(data: bytes, *, max_pixels: int, param: str) -> Image.Image:
    """Decodes a picture wholly; of an animation the first frame.

    The picture is turned as its EXIF orientation says, so width, height and all coordinates are those of the
    picture as a viewer shows it. The mode is the file's own; convert as needed. CPU work: call it off the
    event loop.

    Raises:
        ApiError: 400 with code ``empty_image``, ``invalid_image`` or ``image_too_large``.
    """
    if not data:
        raise bad_request("The image is empty (0 bytes).", param=param, code="empty_image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise _too_large(f"{width} x {height}", max_pixels, param)
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise bad_request(
            f"The image is in no format known here. Send one of {', '.join(FORMATS)}.",
            param=param,
            code="invalid_image",
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large("far larger", max_pixels, param) from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, struct.error) as error:
        # What PIL's decoders raise for broken files, by their own documentation and code.
        raise bad_request(
            f"The image is damaged or truncated ({error}). Send it again in whole.",
            param=param,
            code="invalid_image",
        ) from error


def data_url(url: str, *, param: str) -> bytes:
    """The bytes inside a ``data:`` URL (base64 or percent-encoded).

    Raises:
        ApiError: 400 with code ``invalid_image_url``; for http(s) too: the gateway fetches those beforehand.
    """
    if not url.startswith("data:"):
        scheme = url.split(":", 1)[0][:20]
        reason = (
            "a runner fetches nothing; send it through the gateway, or as a data URL"
            if scheme in ("http", "https")
            else "it must be a data URL (data:image/png;base64,...) or an http(s) URL"
        )
        raise bad_request(
            f"The image URL cannot be used here: {reason}.", param=param, code="invalid_image_url"
        )
    head, comma, payload = url.partition(",")
    if not comma:
        raise bad_request("The data URL has no comma before its data.", param=param, code="invalid_image_url")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    return decode_base64(payload, param=param)


def decode_base64(text: str, *, param: str) -> bytes:
    """Base64 in either alphabet, with or without padding and line breaks.

    Raises:
        ApiError: 400 with code ``invalid_image_url``.
    """
    compact = "".join(text.split()).translate(_TRANSPOSED_ALPHABET).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(
            f"The image is not valid base64 ({error}).", param=param, code="invalid_image_url"
        ) from error


def _too_large(what: str, max_pixels: int, param: str) -> ApiError:
    return bad_request(
        f"The image is too large: {what} pixels; the most is {max_pixels} in all. Send it smaller.",
        param=param,
        code="image_too_large",
    )
