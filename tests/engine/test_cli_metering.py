"""`hearth keys`, `tenants` and `plans`: on a fresh folder, told for people and as JSON, clear when wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.cli.app import app


class Hearth:
    """The command on one state folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*arguments, "--state-dir", str(self.folder)])
        return result.exit_code, result.output

    def json(self, *arguments: str) -> Any:
        code, text = self(*arguments, "--json")
        assert code == 0, text
        return json.loads(text)


@pytest.fixture
def hearth(tmp_path: Path) -> Hearth:
    return Hearth(tmp_path / "state")


def test_a_key_is_made_shown_rotated_and_revoked(hearth: Hearth) -> None:
    made = hearth.json(
        *("keys", "create", "app", "--expires", "30d", "--admin", "--model", "smollm2-135m-instruct"),
        *("--category", "chat", "--address", "10.0.0.0/8"),
    )
    assert made["key"].startswith("hearth-") and made["admin"] and "sha256" not in made
    assert made["allowed"] == {
        "models": ["smollm2-135m-instruct"],
        "categories": ["chat"],
        "addresses": ["10.0.0.0/8"],
    }
    assert abs(made["expires_at"] / 1000 - time.time() - 30 * 86_400) < 60
    shown = hearth.json("keys", "show", "app")
    assert shown["id"] == made["id"] and shown["state"] == "valid" and "key" not in shown
    code, text = hearth("keys", "show", "app")
    assert code == 0 and "models: smollm2-135m-instruct" in text and made["key"] not in text
    new = hearth.json("keys", "rotate", "app", "--keep", "0s")
    assert new["key"] != made["key"] and new["replaces"]["state"] == "revoked"
    code, text = hearth("keys", "revoke", "app")
    assert code == 0 and f"{new['id']} (app) is revoked." in text
    assert [key["state"] for key in hearth.json("keys", "list")] == ["revoked", "revoked"]


def test_rotating_shows_the_new_key_and_when_the_old_one_ends(hearth: Hearth) -> None:
    old = hearth.json("keys", "create", "app")
    code, text = hearth("keys", "rotate", "app")
    assert code == 0 and f"{old['id']} ends 20" in text
    assert text.strip().splitlines()[-1].startswith("hearth-")


def test_a_tenant_gets_a_plan_keys_and_is_closed(hearth: Hearth) -> None:
    plan = hearth.json("plans", "create", "gold", "--price", "5")
    tenant = hearth.json("tenants", "create", "acme", "--plan", "gold")
    assert tenant["plan_id"] == plan["id"]
    assert hearth.json("keys", "create", "--tenant", "acme")["tenant_id"] == tenant["id"]
    assert len(hearth.json("keys", "list", "--tenant", "acme")) == 1
    assert hearth.json("tenants", "set-plan", "acme", "--none")["plan_id"] is None
    assert hearth.json("tenants", "close", "acme")["closed_at"] > 0
    code, text = hearth("keys", "create", "--tenant", "acme")
    assert code == 1 and "hearth tenants open acme" in text
    assert hearth.json("tenants", "open", "acme")["closed_at"] is None
    code, text = hearth("tenants", "list")
    assert code == 0 and "default" in text and "acme" in text
    code, text = hearth("tenants", "set-plan", "acme")
    assert code == 1 and "--none" in text


def test_a_plan_is_made_changed_shown_and_removed(hearth: Hearth) -> None:
    made = hearth.json(
        *("plans", "create", "team", "--currency", "EUR", "--price", "2", "--category", "image=10"),
        *("--model", "sd-turbo=25", "--included", "100", "--budget", "5000", "--soft"),
        *("--requests-per-minute", "60", "--counts", "tenant", "--weight", "3"),
    )
    spec = made["spec"]
    assert (made["unit"], made["currency"]) == ("minor", "EUR")
    assert (spec["price"], spec["categories"], spec["included"]) == (2, {"image": 10}, 100)
    assert spec["budget"] == {"limit": 5000, "of": "charge", "hard": False}
    changed = hearth.json(
        *("plans", "set", "team", "--price", "3", "--category", "image=none", "--category", "audio=1"),
        *("--requests-per-minute", "none", "--hard"),
    )["spec"]
    assert (changed["price"], changed["categories"]) == (3, {"audio": 1})
    assert changed["models"] == spec["models"] and changed["included"] == 100 and changed["weight"] == 3
    assert changed["requests_per_minute"] is None
    assert changed["budget"] == {"limit": 5000, "of": "charge", "hard": True}
    code, text = hearth("plans", "show", "team")
    assert code == 0 and "0.03 EUR" in text and "50.00 EUR a month" in text and "audio models" in text
    code, text = hearth("plans", "list")
    assert code == 0 and "100 a month" in text
    assert hearth.json("plans", "set", "team", "--budget", "none")["spec"]["budget"] is None
    code, text = hearth("plans", "delete", "team")
    assert code == 0 and hearth.json("plans", "list") == []


def test_a_models_alias_is_kept_by_the_models_own_name(hearth: Hearth) -> None:
    code, text = hearth("plans", "create", "a", "--model", "no-such-model=3", "--json")
    assert code == 0 and "Kept as written" in text
    from models.catalog import load_catalog

    entry = next(entry for entry in load_catalog().entries.values() if entry.aliases)
    made = hearth.json("plans", "create", "b", "--model", f"{entry.aliases[0]}=3")
    assert made["spec"]["models"] == {entry.id: 3}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plans", "create", "x", "--price", "-1"], "price is -1: it must be at least 0"),
        (["plans", "create", "x", "--price", str(2**70)], "could not be added up"),
        (["plans", "create", "x", "--category", "image"], "write NAME=AMOUNT"),
        (["plans", "create", "x", "--category", "image=1.5"], "whole numbers"),
        (["plans", "create", "x", "--category", "pictures=1"], "'pictures': write one of"),
        (["plans", "create", "x", "--currency", "euro"], "no ISO 4217 code"),
        (["plans", "create", "x", "--soft"], "give --budget too"),
        (["plans", "create", "x", "--requests-per-day", "0"], "at least 1"),
        (["plans", "show", "x"], "There is no plan 'x'"),
        (["keys", "create", "--expires", "yesterday"], "is no time"),
        (["keys", "create", "--expires", "2020-01-01"], "yet to come"),
        (["keys", "create", "--expires", "999999999999w"], "is no duration"),
        (["keys", "create", "--address", "300.0.0.1"], "300.0.0.1"),
        (["keys", "create", "--category", "pictures"], "categories"),
        (["keys", "create", "--tenant", "nobody"], "There is no tenant 'nobody'"),
        (["keys", "revoke", "nobody"], "There is no key 'nobody'"),
        (["tenants", "create", "default"], "There is a tenant 'default' already"),
    ],
)
def test_what_cannot_be_is_told_in_words(hearth: Hearth, arguments: list[str], told: str) -> None:
    code, text = hearth(*arguments)
    assert code == 1 and told in " ".join(text.split()) and "Traceback" not in text


def test_a_damaged_database_is_told_in_words(hearth: Hearth) -> None:
    hearth.folder.mkdir()
    (hearth.folder / "hearth.db").write_bytes(b"x" * 4096)
    code, text = hearth("keys", "list")
    assert code == 1 and "not a database" in text and "Traceback" not in text


def test_other_commands_do_not_pay_for_the_database() -> None:
    code = "import engine.cli.app, sys; print([m for m in ('sqlalchemy', 'alembic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
