"""Sizes of pictures: what is asked for, what is painted, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ApiError
from engine.runners.image_size import Limits, Size, parse_size, plan_size

FULL = Limits(default=Size(1024, 1024), multiple_of=16)
SMALL = Limits(default=Size(512, 512), multiple_of=16, native_side=64)


@pytest.mark.parametrize(
    ("asked", "painted"),
    [
        (None, "64x64"),
        ("auto", "64x64"),
        ("64x64", "64x64"),
        ("256x256", "64x64"),
        ("1024x1024", "64x64"),
        ("1536x1024", "96x64"),
        ("1024x1536", "64x96"),
        ("1792x1024", "112x64"),
        ("1024x1792", "64x112"),
    ],
)
def test_a_small_model_paints_the_aspect_asked_for(asked: str | None, painted: str) -> None:
    plan = plan_size(asked, SMALL)
    assert str(plan.painted) == painted
    assert str(plan.asked) == ("512x512" if asked in (None, "auto") else asked)


def test_a_full_model_paints_what_is_asked_for() -> None:
    plan = plan_size("1536x1024", FULL)
    assert plan.asked == plan.painted == Size(1536, 1024)
    assert plan_size("auto", FULL).painted == FULL.default


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("big", "WIDTHxHEIGHT"),
        ("", "WIDTHxHEIGHT"),
        ("512", "WIDTHxHEIGHT"),
        ("512x", "WIDTHxHEIGHT"),
        ("-512x512", "WIDTHxHEIGHT"),
        ("512x512x512", "WIDTHxHEIGHT"),
        ("0x0", "64 to 2048"),
        ("63x512", "64 to 2048"),
        ("4096x1024", "64 to 2048"),
        ("2000x100", "3 times the other"),
        ("1000x1000", "multiples of 16. Try 992x992"),
    ],
)
def test_what_cannot_be_painted_is_refused_with_the_reason(asked: str, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        plan_size(asked, FULL)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "size", "invalid_size")


def test_too_many_pixels_are_refused() -> None:
    with pytest.raises(ApiError, match="at most 1000000"):
        plan_size("1024x1024", Limits(default=Size(512, 512), max_pixels=1_000_000))


@given(st.integers(64, 2048), st.integers(64, 2048))
def test_a_painted_size_is_small_and_of_nearly_the_same_aspect(width: int, height: int) -> None:
    if max(width, height) > 3 * min(width, height):
        return
    plan = plan_size(f"{width}x{height}", SMALL)
    painted = plan.painted
    assert min(painted.width, painted.height) == 64
    assert painted.width % 16 == painted.height % 16 == 0
    assert painted.width / painted.height == pytest.approx(width / height, rel=0.15)


def test_size_reads_either_case() -> None:
    assert parse_size(" 512X256 ") == Size(512, 256)
