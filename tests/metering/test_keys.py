"""Keys: kept as digests, found again, never lost by a write or a broken file."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest

from engine.metering.keys import KeyRing, KeysError, add_key, digest_of, make_key, read_keys


def test_made_keys_differ_and_are_long() -> None:
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("hearth-") and len(key) == 50 for key in keys)


def test_a_file_holds_no_key_and_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "keys.json"
    key = make_key()
    added = add_key(file, key, name="first")
    text = file.read_text()
    assert key not in text and digest_of(key) in text
    assert added.prefix == key[:11] and added.name == "first"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert set(json.loads(text)[0]) == {"id", "prefix", "sha256", "created", "name"}


def test_a_short_key_shows_no_prefix(tmp_path: Path) -> None:
    assert add_key(tmp_path / "keys.json", "short").prefix == ""


def test_adding_a_key_again_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    first = add_key(file, "same-key")
    assert add_key(file, "same-key") == first
    assert len(read_keys(file)) == 1


@pytest.mark.parametrize("bad", ["", "has space", "new\nline", "ümlaut"])
def test_a_key_that_no_header_can_carry_is_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        add_key(tmp_path / "keys.json", bad)


def test_keys_added_at_once_are_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    threads = [threading.Thread(target=add_key, args=(file, f"key-{i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.sha256 for key in read_keys(file)} == {digest_of(f"key-{i}") for i in range(8)}
    assert not list(tmp_path.glob(".keys.json.*"))


def test_no_file_is_no_keys_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    assert read_keys(file) == []
    file.write_text("{}")
    with pytest.raises(KeysError, match=r"keys\.json is no list of keys"):
        read_keys(file)
    with pytest.raises(KeysError):
        add_key(file, "another")
    assert file.read_text() == "{}"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_ring_reads_the_file_again_a_second_later(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    clock = Clock()
    ring = KeyRing(file, clock=clock)
    assert ring.find("one") is None
    one = add_key(file, "one")
    assert ring.find("one") is None
    clock.now = 1.0
    assert ring.find("one") == one
    assert ring.find("on") is None and ring.find("") is None and ring.find(one.sha256) is None
    file.unlink()
    clock.now = 2.0
    assert ring.find("one") is None and len(ring) == 0


def test_a_ring_keeps_its_keys_when_the_file_breaks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.json"
    clock = Clock()
    one = add_key(file, "one")
    ring = KeyRing(file, clock=clock)
    assert ring.find("one") == one
    file.write_text("[{]")
    clock.now = 1.0
    assert ring.find("one") == one
    assert "stay in use" in caplog.text
