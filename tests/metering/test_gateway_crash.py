"""A short run of the kill test with gateways; the long one is `python -m benchmarks.ledger_crash`."""

from __future__ import annotations

import pytest

from benchmarks.crash.rounds import Wanted, run


@pytest.mark.parametrize(("kind", "machines", "workers"), [("sqlite", 1, 2), ("postgresql", 2, 1)])
async def test_killed_gateways_schedulers_and_databases_lose_and_double_nothing(
    kind: str, machines: int, workers: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "postgresql":
        # The server's package keeps its lock where it was first imported: in the session's folder.
        request.getfixturevalue("postgresql")
        # The run's own server sets it for itself.
        monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    figures = await run(
        Wanted(
            kind,
            rounds=4,
            machines=machines,
            workers=workers,
            seed=1,
            clients=16,
            pace_s=0.01,
            between_s=(0.3, 0.5),
            requests_a_round=40,
            victims=("gateway", "database", "scheduler", "gateway"),
        )
    )
    assert figures.faults.good, figures.faults.examples
    assert figures.left_processes == 0
    assert figures.killed["gateway"] >= 2 and figures.killed["scheduler"] == 1
    assert sum(figures.killed.values()) >= 4 and figures.killed["database"] == (kind == "postgresql")
    # Limits were reached, and requests under them answered.
    assert figures.refused["429 insufficient_quota"] and figures.refused["429 rate_limit_exceeded"]
    assert figures.answered + figures.unanswered == figures.rows > 40
