"""One answered request, as the ledger keeps it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

#: More bytes than any row takes in the journal: what one answered request may need there.
MOST_ROW_BYTES = 8 * 1024

#: The largest charge of one row: a signed 64-bit integer holds the sum of a thousand of them.
MOST_CHARGE = 2**53

#: Longest text of each column, characters.
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


class LedgerRow(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What is written once for a request that was answered.

    charge: in `unit` ("credits", or minor units of the currency that is named); never negative.
    included: it used one of its plan's included requests.
    at: Unix milliseconds. period: what the budget is counted in, for instance "2026-11".
    worker: the life of the worker that answered (`new_life`); a restarted worker has another.
    status: "answered", or "left" where the client went away after the first byte.

    Raises:
        ValueError: a text that no column of either database takes, or a charge out of range.
    """

    # Those of one request first, then those that many have in common: see `Form`.
    request_id: str
    status: str = "answered"
    charge: int
    included: bool = False
    at: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    work: dict[str, Any] | None = None
    key_id: str
    tenant_id: str
    plan_id: str | None = None
    model: str
    category: str
    unit: str = "credits"
    period: str
    worker: str

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

_encode = msgspec.json.Encoder().encode
_decode: Callable[[bytes], LedgerRow] = msgspec.json.Decoder(LedgerRow).decode
#: An older Hearth journaled its rows as MessagePack, in this order and with `work` as JSON text.
_unpack_old: Callable[[bytes], list[Any]] = msgspec.msgpack.Decoder(list[Any]).decode
_OLD_COLUMNS = (
    *("request_id", "key_id", "tenant_id", "model", "category", "charge", "at", "period", "worker"),
    *("plan_id", "unit", "included", "status", "prompt_tokens", "completion_tokens", "work"),
)


def encode(row: LedgerRow) -> bytes:
    """A row as the journal keeps it: a JSON array of its columns' values in their order.

    Raises:
        ValueError: it takes more than MOST_ROW_BYTES, or `work` is no JSON.
    """
    try:
        data = _encode(row)
    except TypeError as error:
        raise ValueError(f"`work` of a ledger row is JSON-able: {error}") from error
    if len(data) > MOST_ROW_BYTES:
        raise ValueError(
            f"the row of request {row.request_id} takes {len(data)} bytes, more than {MOST_ROW_BYTES}: "
            "keep `work` short."
        )
    return data


def decode(data: bytes) -> LedgerRow:
    """The row that `encode` wrote, also that of an older Hearth.

    Raises:
        msgspec.DecodeError: these bytes are no row.
    """
    if data.startswith(b"["):
        return _decode(data)
    fields = dict(zip(_OLD_COLUMNS, _unpack_old(data), strict=False))
    if fields.get("work") is not None:
        fields["work"] = msgspec.json.decode(fields["work"])
    return msgspec.convert([fields.get(name) for name in COLUMNS], LedgerRow)


def joined(records: Sequence[bytes]) -> str:
    """Rows as `encode` wrote them, together as one JSON array.

    Raises:
        msgspec.DecodeError: one is of an older Hearth, and no row.
    """
    arrays = [record if record.startswith(b"[") else encode(decode(record)) for record in records]
    return f"[{b','.join(arrays).decode()}]"


class Form:
    """What many rows have in common: a caller's requests to one model. Encodes their rows quickly."""

    __slots__ = ("_common",)

    def __init__(
        self,
        *,
        key_id: str,
        tenant_id: str,
        plan_id: str | None,
        model: str,
        category: str,
        unit: str,
        period: str,
        worker: str,
    ) -> None:
        """
        Raises:
            ValueError: as `LedgerRow`.
        """
        row = LedgerRow(
            request_id="-",
            charge=0,
            at=0,
            key_id=key_id,
            tenant_id=tenant_id,
            plan_id=plan_id,
            model=model,
            category=category,
            unit=unit,
            period=period,
            worker=worker,
        )
        self._common = _encode(msgspec.structs.astuple(row)[COLUMNS.index("key_id") :]).decode()[1:]

    def encode(
        self,
        request_id: str,
        charge: int,
        included: bool,
        at: int,
        prompt_tokens: int | None,
        completion_tokens: int | None,
        *,
        bytes_in: int,
        ms: int,
        status: str = "answered",
    ) -> bytes:
        """The row of one request, as `encode` would write it.

        Raises:
            ValueError: the request's id is none of this server's.
        """
        if not request_id.isidentifier() or len(request_id) > 64:
            raise ValueError(f"{request_id!r} is no request's id.")
        prompt = "null" if prompt_tokens is None else prompt_tokens
        completion = "null" if completion_tokens is None else completion_tokens
        is_included = "true" if included else "false"
        return (
            f'["{request_id}","{status}",{charge},{is_included},{at},{prompt},{completion},'
            f'{{"bytes_in":{bytes_in},"ms":{ms}}},{self._common}'
        ).encode()


def new_life() -> str:
    """A name for one life of a worker: what it leases and writes is told apart from all other lives."""
    return f"w-{secrets.token_hex(8)}"
