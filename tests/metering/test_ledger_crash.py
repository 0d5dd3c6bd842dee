"""A short run of the kill test; the long one is `python -m benchmarks.ledger_crash --writers 8`."""

from __future__ import annotations

import pytest

from benchmarks.crash.writers import run


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_killed_writers_and_databases_lose_and_double_nothing(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "postgresql":
        # The server's package keeps its lock where it was first imported: in the session's folder.
        request.getfixturevalue("postgresql")
    # The benchmark's server sets it for itself.
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    figures = run(kind, rounds=4, writers=2, limit=800, seed=1, between_s=(0.5, 0.9))
    # On a fast machine the budget can be used up before the last kill.
    assert figures.killed_writers >= 1
    assert figures.killed_databases == (kind == "postgresql")
    assert figures.missing == figures.twice == figures.over == figures.lost_budget == 0
    assert figures.used == figures.rows == 800
    assert figures.rows - figures.unanswered == figures.answered
