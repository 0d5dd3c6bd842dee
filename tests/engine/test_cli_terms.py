"""What `hearth keys` and `hearth tenants` say of plans: which applies, its limits, what is used and left."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.cli.app import app
from engine.config import Config
from engine.metering.ledger import write_rows
from engine.metering.opening import opened
from engine.metering.pricing import period_name
from engine.metering.rows import LedgerRow
from tests.engine.test_cli_metering import Hearth

NOW = int(time.time() * 1000)


@pytest.fixture
def hearth(tmp_path: Path) -> Hearth:
    return Hearth(tmp_path / "state")


def answered(hearth: Hearth, key: str, tenant: str, charge: int, count: int = 1) -> None:
    """Writes rows as a gateway would."""

    async def write() -> None:
        async with opened(Config(state_dir=hearth.folder)) as database:
            rows = [
                LedgerRow(
                    request_id=f"{key}-{charge}-{number}",
                    key_id=key,
                    tenant_id=tenant,
                    model="smol",
                    category="chat",
                    charge=charge,
                    unit="EUR",
                    at=NOW,
                    period=period_name("month", NOW),
                    worker="w",
                )
                for number in range(count)
            ]
            await write_rows(database, rows)

    asyncio.run(write())


def words(text: str) -> str:
    return " ".join(text.split())


def test_making_a_key_says_which_plan_applies_beside_the_key(hearth: Hearth) -> None:
    def create(*arguments: str) -> tuple[str, str]:
        command = ["keys", "create", *arguments, "--state-dir", str(hearth.folder)]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0
        return result.stdout, result.stderr

    out, told = create("free")
    assert out.startswith("hearth-") and len(out.split()) == 1, "the key alone goes through a pipe"
    assert "No plan applies to it" in told and "hearth tenants set-plan default PLAN" in told
    hearth.json(
        *("plans", "create", "gold", "--currency", "EUR", "--price", "2", "--included", "100"),
        *("--budget", "5000", "--requests-per-minute", "60", "--concurrent", "4", "--category", "image=9"),
    )
    hearth.json("plans", "create", "own", "--price", "1")
    hearth.json("tenants", "create", "acme", "--plan", "gold")
    out, told = create("app", "--tenant", "acme")
    assert out.startswith("hearth-") and "The plan 'gold' applies to it (that of its tenant 'acme')" in told
    for part in ("0.02 EUR a request", "another price", "100 a month included", "budget 50.00 EUR a month"):
        assert part in told
    assert "at most 60 requests a minute, at most 4 at once." in told
    _, told = create("special", "--tenant", "acme", "--plan", "own")
    assert "The plan 'own' applies to it (its own): 1 credit a request." in told
    assert hearth.json("keys", "create", "--tenant", "acme")["plan"]["name"] == "gold"


def test_a_key_shows_its_limits_and_what_is_left(hearth: Hearth) -> None:
    hearth.json("plans", "create", "gold", "--currency", "EUR", "--price", "2", "--budget", "100")
    acme = hearth.json("tenants", "create", "acme", "--plan", "gold")["id"]
    key = hearth.json("keys", "create", "app", "--tenant", "acme", "--plan", "gold")["id"]
    answered(hearth, key, acme, 2, 3)
    code, text = hearth("keys", "show", "app")
    assert code == 0
    for part in (
        "plan gold (the key's own)",
        "a request 0.02 EUR",
        "requests per minute no limit",
        f"used in {period_name('month', NOW)} 3 requests, 0.06 EUR",
        "budget left 0.94 EUR of 1.00 EUR",
    ):
        assert part in words(text), part
    data = hearth.json("keys", "show", "app")
    assert data["plan"]["spec"]["budget"]["limit"] == 100
    assert (data["standing"]["requests"], data["standing"]["charge"], data["standing"]["budget_left"]) == (
        3,
        6,
        94,
    )
    code, text = hearth("tenants", "show", "acme")
    assert code == 0 and "plan gold" in words(text) and "used counted per key" in words(text)
    assert hearth.json("tenants", "show", "acme")["standing"] is None


def test_a_tenant_shows_what_all_its_keys_used(hearth: Hearth) -> None:
    hearth.json(
        *("plans", "create", "team", "--currency", "EUR", "--price", "2", "--included", "1"),
        *("--counts", "tenant", "--budget", "3", "--budget-of", "requests", "--soft"),
    )
    acme = hearth.json("tenants", "create", "acme", "--plan", "team")["id"]
    for name in ("one", "two"):
        answered(hearth, hearth.json("keys", "create", name, "--tenant", "acme")["id"], acme, 2, 2)
    for shown in (("tenants", "show", "acme"), ("keys", "show", "one")):
        code, text = hearth(*shown)
        assert code == 0
        assert "4 requests, 0.08 EUR" in words(text) and "included left 1 of 1" in words(text)
        assert "budget left 0 requests of 3 requests, over by 1 requests" in words(text)
    assert hearth.json("tenants", "show", "acme")["standing"]["requests"] == 4
    hearth.json("tenants", "close", "acme")
    code, text = hearth("tenants", "show", "acme")
    assert "its keys are refused" in words(text)


def test_without_a_plan_that_is_said(hearth: Hearth) -> None:
    hearth.json("keys", "create", "app")
    for shown in (("keys", "show", "app"), ("tenants", "show", "default")):
        code, text = hearth(*shown)
        assert code == 0 and "none: requests cost nothing and have no limit" in words(text)
    assert hearth.json("keys", "show", "app")["plan"] is None
