"""Rows as the journal keeps them, and as both databases take them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from engine.metering import schema
from engine.metering.database import Database
from engine.metering.inserting import write_encoded
from engine.metering.rows import Form, LedgerRow, decode, encode, joined

#: Texts that a careless writer of JSON or SQL would stumble over.
ODD = [
    'a "quoted" name',
    "back\\slash",
    "new\nline\ttab\x01",
    "Ω 漢字 🔥",
    "'; DROP TABLE ledger; --",
    "[1,2]",
]

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=16)
counts = st.none() | st.integers(0, 2**63 - 1)
commons = st.fixed_dictionaries(
    dict.fromkeys(("key_id", "tenant_id", "model", "category", "unit", "period", "worker"), texts)
    | {"plan_id": st.none() | texts}
)
singles = st.fixed_dictionaries(
    {
        "request_id": st.from_regex(r"req_[0-9a-f]{24}", fullmatch=True),
        "charge": st.integers(0, 2**53),
        "included": st.booleans(),
        "at": st.integers(0, 2**63 - 1),
        "prompt_tokens": counts,
        "completion_tokens": counts,
        "status": st.sampled_from(["answered", "left"]),
    }
)


def row(**changes: Any) -> LedgerRow:
    return LedgerRow(
        **{
            "request_id": "req_1",
            "key_id": "key-1",
            "tenant_id": "ten-1",
            "model": "tiny",
            "category": "chat",
            "charge": 3,
            "at": 1_790_000_000_000,
            "period": "2026-11",
            "worker": "w-1",
            **changes,
        }
    )


@given(commons, singles, st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_form_writes_what_the_row_itself_would_be(
    common: dict[str, Any], single: dict[str, Any], bytes_in: int, ms: int
) -> None:
    whole = LedgerRow(**common, **single, work={"bytes_in": bytes_in, "ms": ms})
    data = Form(**common).encode(**single, bytes_in=bytes_in, ms=ms)
    assert data == encode(whole)
    assert decode(data) == whole


@pytest.mark.parametrize("id", ["", 'req_"', "req-1", "r" * 65, "a\0b"])
def test_a_form_takes_no_strange_id(id: str) -> None:
    form = Form(
        key_id="k",
        tenant_id="t",
        plan_id=None,
        model="m",
        category="chat",
        unit="EUR",
        period="2026-11",
        worker="w",
    )
    with pytest.raises(ValueError, match="no request's id"):
        form.encode(id, 1, False, 1, None, None, bytes_in=1, ms=1)


def old_record(row: LedgerRow) -> bytes:
    """As it was journaled before rows were JSON."""
    work = None if row.work is None else msgspec.json.encode(row.work).decode()
    names = (
        *("request_id", "key_id", "tenant_id", "model", "category", "charge", "at", "period", "worker"),
        *("plan_id", "unit", "included", "status", "prompt_tokens", "completion_tokens"),
    )
    return msgspec.msgpack.encode([*(getattr(row, name) for name in names), work])


def test_what_an_older_hearth_journaled_is_read() -> None:
    rows = [
        row(request_id="req_1", work={"ms": 4}, included=True, plan_id="p", prompt_tokens=7),
        row(request_id="req_2", unit="EUR", status="left"),
    ]
    records = [old_record(each) for each in rows]
    assert [decode(each) for each in records] == rows
    assert joined([*records, encode(rows[0])]) == joined([encode(each) for each in [*rows, rows[0]]])
    with pytest.raises(msgspec.DecodeError):
        joined([b"\xffnonsense"])


async def test_odd_texts_come_back_as_they_went_in(database: Database) -> None:
    rows = [
        row(request_id=f"req_{n}", model=text, work={text: [text, None, 1.5]}) for n, text in enumerate(ODD)
    ]
    rows.append(row(request_id="req_none", work=None, charge=2**53, prompt_tokens=2**63 - 1))
    records = [encode(each) for each in rows]
    old = row(request_id="req_old", work={"ms": 1})
    await write_encoded(database, [*records, old_record(old), records[0]])
    await write_encoded(database, [])
    async with database.reading() as connection:
        wanted = select(schema.ledger).order_by(schema.ledger.c.request_id)
        found = [dict(each) for each in (await connection.execute(wanted)).mappings()]
    expected = [*rows, old]
    expected.sort(key=lambda each: each.request_id)
    assert [LedgerRow(**each) for each in found] == expected
