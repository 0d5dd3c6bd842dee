"""`hearth keys`, `tenants` and `plans`: on a fresh folder, told for people and as JSON, clear when wrong."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool
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
        (["plans", "create", "x", "--price", "1e3"], "price is '1e3': amounts are whole numbers"),
        (["plans", "create", "x", "--price", "none"], "price is 'none': amounts are whole numbers"),
        (["plans", "create", "x", "--price", "9" * 5000], "9999…': amounts are whole numbers"),
        (["plans", "create", "x", "--price", "9" * 30], "could not be added up"),
        (["plans", "create", "x", "--budget", "1_000"], "budget is '1_000'"),
        (["plans", "create", "x", "--budget", "-1"], "budget.limit is -1: it must be at least 0"),
        (["plans", "create", "x", "--budget", "9" * 14], "could not be added up"),
        (["plans", "create", "x", "--budget", "5", "--budget-of", "tokens"], "'tokens': write one of"),
        (["plans", "create", "x", "--model", "a=-5"], "models.a is -5"),
        (["plans", "create", "x", "--model", " =5"], "is no model's name"),
        (["plans", "create", "x", "--period", "week"], "'week': write one of"),
        (["plans", "create", "x", "--weight", "0"], "weight is 0"),
        (["plans", "create", " "], "1 to 200 printable"),
        (["plans", "set", "x", "--price", "1"], "There is no plan 'x'"),
        (["plans", "show", "x"], "There is no plan 'x'"),
        (["plans", "show", "\udcff"], "There is no plan '"),
        (["keys", "show", "\udcff\udcfe"], "There is no key '"),
        (["keys", "show", "x" * 5000], "There is no key 'xxxxxxxxxxx…'"),
        (["keys", "create", "\udcff"], "1 to 200 printable"),
        (["keys", "create", "--model", ""], "models: '' is no model's name"),
        (["keys", "create", "--expires", "9999-12-31T23:59:59.999"], "the last time that can be kept"),
        (["keys", "create", "--plan", "gold"], "There is no plan 'gold'"),
        (["tenants", "set-plan", "default", "none"], "There is no plan 'none'"),
        (["tenants", "show", "\udcff"], "There is no tenant '"),
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


@pytest.fixture
def pragma() -> Iterator[Callable[[str], None]]:
    """Gives every SQLite connection from now on a setting."""
    listeners = []

    def give(setting: str) -> None:
        def connect(connection: Any, _record: object) -> None:
            connection.cursor().execute(f"PRAGMA {setting}")

        event.listen(Pool, "connect", connect)
        listeners.append(connect)

    yield give
    for listener in listeners:
        event.remove(Pool, "connect", listener)


CHANGES = [
    ("keys", "create"),
    ("keys", "rotate", "app"),
    ("keys", "revoke", "app"),
    ("tenants", "create", "acme"),
    ("tenants", "close", "default"),
    ("plans", "create", "gold"),
    ("plans", "set", "old", "--price", "3"),
    ("plans", "delete", "old"),
]


def test_a_read_only_database_is_read_and_each_change_told_in_words(
    hearth: Hearth, pragma: Callable[[str], None]
) -> None:
    made = hearth.json("keys", "create", "app")
    hearth.json("plans", "create", "old")
    # The file's mode would not hold the root user back; this holds anybody, with the same failure.
    pragma("query_only = ON")
    for change in CHANGES:
        code, text = hearth(*change)
        assert code == 1 and "readonly database" in text and "nothing was written" in text, change
        assert "Traceback" not in text
    assert [key["id"] for key in hearth.json("keys", "list")] == [made["id"]]
    assert hearth.json("tenants", "show", "default")["closed_at"] is None


def test_a_full_database_is_told_in_words_and_takes_the_rest_later(
    hearth: Hearth, pragma: Callable[[str], None]
) -> None:
    hearth.json("keys", "create", "app")
    with contextlib.closing(sqlite3.connect(hearth.folder / "hearth.db")) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        kept = connection.execute("SELECT count(*) FROM plans").fetchone()[0]
    pragma(f"max_page_count = {pages}")
    models = [word for number in range(60) for word in ("--model", f"{number:0150}=1")]
    code, text = hearth("plans", "create", "large", *models)
    assert code == 1 and "is full" in text and "Free some disk space; nothing was written" in text
    assert "Traceback" not in text
    assert len(hearth.json("plans", "list")) == kept
    pragma("max_page_count = 1000000")
    code, text = hearth("plans", "create", "large", *models)
    assert code == 0 and len(hearth.json("plans", "list")) == kept + 1


def test_a_newer_schema_is_told_in_words_by_every_command(hearth: Hearth) -> None:
    hearth.json("keys", "create", "app")
    with contextlib.closing(sqlite3.connect(hearth.folder / "hearth.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    for command in (*CHANGES, ("keys", "list"), ("tenants", "list"), ("plans", "list")):
        code, text = hearth(*command)
        assert code == 1 and "newer than this Hearth knows" in text and "Run the newer Hearth" in text
        assert "Traceback" not in text


def test_a_database_server_that_is_away_is_told_in_words_without_its_password(
    hearth: Hearth, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "postgresql://hearth:secret@127.0.0.1:1/hearth"
    monkeypatch.setenv("HEARTH_METERING__DATABASE_URL", url)
    code, text = hearth("keys", "list")
    assert code == 1 and "cannot be reached" in text and "metering.database_url" in text
    assert "secret" not in text and "Traceback" not in text


def test_other_commands_do_not_pay_for_the_database() -> None:
    code = "import engine.cli.app, sys; print([m for m in ('sqlalchemy', 'alembic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
