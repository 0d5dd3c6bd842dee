"""Which size a picture is painted at, and which size the client gets: pure.

Most models paint the size that is asked for. A small one (``native_side``) paints a small picture of the same
aspect, which is then scaled up to exactly the size asked for; the answer names the painted size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import ApiError, bad_request


@dataclass(frozen=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        return self.width * self.height


@dataclass(frozen=True)
class Limits:
    """What sizes a model can give.

    Args:
        default: of a request that names no size or "auto".
        multiple_of: width and height of a painted picture are multiples of this.
        min_side, max_side: of an asked width or height, pixels.
        max_pixels: of an asked picture in all.
        max_aspect: longer side by shorter side.
        native_side: shorter side of what is painted, pixels; None = the size that is asked for.
    """

    default: Size
    multiple_of: int = 8
    min_side: int = 64
    max_side: int = 2048
    max_pixels: int = 2048 * 2048
    max_aspect: float = 3.0
    native_side: int | None = None


@dataclass(frozen=True)
class Plan:
    """What the client gets, and what the model paints."""

    asked: Size
    painted: Size


def parse_size(text: str) -> Size:
    """ "WIDTHxHEIGHT" in pixels.

    Raises:
        ApiError: 400, code ``invalid_size``.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    if not match:
        raise _refused(f"Size '{text[:40]}' is neither 'auto' nor WIDTHxHEIGHT in pixels, as in '512x512'.")
    return Size(int(match[1]), int(match[2]))


def plan_size(asked: str | None, limits: Limits) -> Plan:
    """The sizes for a request's ``size``.

    Raises:
        ApiError: 400, code ``invalid_size``, saying what the model can do.
    """
    size = limits.default if asked is None or asked == "auto" else parse_size(asked)
    short, long = sorted((size.width, size.height))
    if short < limits.min_side or long > limits.max_side:
        raise _refused(
            f"Size {size} is out of range: each side may be {limits.min_side} to {limits.max_side} pixels."
        )
    if size.pixels > limits.max_pixels:
        raise _refused(f"Size {size} is {size.pixels} pixels; this model gives at most {limits.max_pixels}.")
    if long > short * limits.max_aspect:
        raise _refused(
            f"Size {size} is too narrow: one side may be {limits.max_aspect:g} times the other at most."
        )
    if limits.native_side is not None:
        return Plan(size, _native(size, limits.native_side, limits.multiple_of))
    step = limits.multiple_of
    if size.width % step or size.height % step:
        close = Size(_rounded(size.width, step), _rounded(size.height, step))
        raise _refused(
            f"Size {size} is not possible: width and height must be multiples of {step}. Try {close}."
        )
    return Plan(size, size)


def _native(size: Size, side: int, step: int) -> Size:
    scale = side / min(size.width, size.height)
    return Size(_rounded(size.width * scale, step), _rounded(size.height * scale, step))


def _rounded(length: float, step: int) -> int:
    return max(step, round(length / step) * step)


def _refused(message: str) -> ApiError:
    return bad_request(message, param="size", code="invalid_size")
