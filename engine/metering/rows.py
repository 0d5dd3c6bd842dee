"""One answered request, as the ledger keeps it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import msgspec

#: More bytes than any row takes in the journal: what one answered request may need there.
MOST_ROW_BYTES = 8 * 1024

#: The largest charge of one row: a signed 64-bit integer holds the sum of a thousand of them.
MOST_CHARGE = 2**53

#: Longest text of each column.
_LONGEST = {
    "request_id": 64,
    "key_id": 64,
    "tenant_id": 64,
    "plan_id": 64,
    "model": 200,
    "category": 32,
    "unit": 16,
    "status": 16,
    "worker": 64,
    "period": 16,
}


class LedgerRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is written once for a request that was answered.

    charge: in `unit` ("credits", or minor units of the currency that is named); never negative.
    included: it used one of its plan's included requests.
    at: Unix milliseconds. period: what the budget is counted in, for instance "2026-11".
    worker: the life of the worker that answered (`new_life`); a restarted worker has another.
    status: "answered", or "left" where the client went away after the first byte.

    Raises:
        ValueError: a text that no column of either database takes, or a charge out of range.
    """

    request_id: str
    key_id: str
    tenant_id: str
    model: str
    category: str
    charge: int
    at: int
    period: str
    worker: str
    plan_id: str | None = None
    unit: str = "credits"
    included: bool = False
    status: str = "answered"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    work: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, longest in _LONGEST.items():
            text: str = getattr(self, name) or ""
            if len(text) > longest or "\0" in text:
                raise ValueError(
                    f"{name} of a ledger row is a text of at most {longest} characters: {text!r}"
                )
        if not self.request_id:
            raise ValueError("a ledger row needs a request id.")
        if not 0 <= self.charge <= MOST_CHARGE:
            raise ValueError(f"a charge lies between 0 and {MOST_CHARGE}; this one is {self.charge}.")
        if not 0 <= self.at < 2**63:
            raise ValueError(f"`at` is a time in Unix milliseconds; this one is {self.at}.")
        for tokens in (self.prompt_tokens, self.completion_tokens):
            if tokens is not None and not 0 <= tokens < 2**63:
                raise ValueError(f"a number of tokens is a positive 64-bit integer; this one is {tokens}.")


#: The columns of a row, in the order of `encode`'s values.
COLUMNS = tuple(LedgerRow.__struct_fields__)

_pack = msgspec.msgpack.Encoder().encode
_unpack: Callable[[bytes], list[Any]] = msgspec.msgpack.Decoder(list[Any]).decode
_WORK = COLUMNS.index("work")


def encode(row: LedgerRow) -> bytes:
    """A row as the journal keeps it: its columns' values in order, `work` as JSON text.

    Raises:
        ValueError: it takes more than MOST_ROW_BYTES, or `work` is no JSON.
    """
    values = msgspec.structs.astuple(row)
    if row.work is not None:
        values = (*values[:_WORK], _json(row.work), *values[_WORK + 1 :])
    data = _pack(values)
    if len(data) > MOST_ROW_BYTES:
        raise ValueError(
            f"the row of request {row.request_id} takes {len(data)} bytes, more than {MOST_ROW_BYTES}: "
            "keep `work` short."
        )
    return data


def values(data: bytes) -> list[Any]:
    """What `encode` wrote, as the columns of the ledger take it.

    Raises:
        msgspec.DecodeError: these bytes are no row.
    """
    found = _unpack(data)
    if len(found) != len(COLUMNS):
        raise msgspec.DecodeError(f"a row has {len(COLUMNS)} values, not {len(found)}.")
    return found


def decode(data: bytes) -> LedgerRow:
    """The row that `encode` wrote.

    Raises:
        msgspec.DecodeError: these bytes are no row.
    """
    fields = dict(zip(COLUMNS, values(data), strict=True))
    if fields["work"] is not None:
        fields["work"] = msgspec.json.decode(fields["work"])
    return msgspec.convert(fields, LedgerRow)


def _json(work: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(work).decode()
    except (TypeError, UnicodeError) as error:
        raise ValueError(f"`work` of a ledger row is JSON-able: {error}") from error


def new_life() -> str:
    """A name for one life of a worker: what it leases and writes is told apart from all other lives."""
    return f"w-{secrets.token_hex(8)}"
