"""Moments and periods of usage as people write and read them; all in UTC, kept as unix milliseconds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from engine.metering.pricing import period_end_ms, period_name

#: The year 9999 and 1970: what lies outside cannot be shown.
_LAST_MS = 253_402_300_799_000


class MomentError(ValueError):
    """A text is no moment; the message names it and how one is written."""


@dataclass(frozen=True)
class Span:
    """From `since` (included) to `until` (not), unix milliseconds."""

    since: int
    until: int


def parse_moment(text: str) -> int:
    """Unix milliseconds of '2026-11-01' (its beginning), an RFC 3339 time, or unix seconds.

    A time without an offset is UTC.

    Raises:
        MomentError: it is none of these, or lies before 1970 or after 9999.
    """
    # In a query's text a '+' that was not escaped has become a space.
    given = re.sub(r" (\d\d:?\d\d)$", r"+\1", text.strip()) if "T" in text else text.strip()
    if re.fullmatch(r"\d{9,11}(\.\d+)?", given):
        at = round(float(given) * 1000)
    elif re.match(r"\d{4}-\d\d-\d\d", given):
        try:
            when = datetime.fromisoformat(given)
        except ValueError as error:
            raise MomentError(f"'{text[:80]}' is no time: {error}. {_HOW}") from None
        at = round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)
    else:
        raise MomentError(f"'{text[:80]}' is no time. {_HOW}")
    if not 0 <= at <= _LAST_MS:
        raise MomentError(f"'{text[:80]}' is no time between the years 1970 and 9999.")
    return at


_HOW = "Write 2026-11-01, 2026-11-01T08:00:00Z or unix seconds (1793491200)."


def shown_moment(at: int) -> str:
    """A moment in RFC 3339; fractions of a second only where there are any."""
    when = datetime.fromtimestamp(at // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{when}.{at % 1000:03d}Z" if at % 1000 else f"{when}Z"


def period_span(name: str) -> Span:
    """When a period begins and ends, by its name ('2026-11' or '2026-11-24').

    Raises:
        ValueError: it is no period's name.
    """
    end = period_end_ms(name)
    begin = datetime.strptime(name, "%Y-%m" if len(name) == 7 else "%Y-%m-%d").replace(tzinfo=UTC)
    return Span(round(begin.timestamp() * 1000), end)


def span_of(since: int | None, until: int | None, kind: Literal["month", "day"], now: int) -> Span:
    """What is meant where one or both ends were left out.

    Without both: the period (month or day) that `now` lies in. Without `until`: up to the end of that
    period. Without `since`: from the beginning of the period that the last moment before `until` lies in.

    Raises:
        MomentError: `since` is not before `until`.
    """
    last = now if until is None else min(now, until - 1)
    if since is None:
        since = period_span(period_name(kind, max(0, last))).since
    if until is None:
        until = period_span(period_name(kind, now)).until
    if since >= until:
        raise MomentError(f"since ({shown_moment(since)}) is not before until ({shown_moment(until)}).")
    return Span(since, until)
