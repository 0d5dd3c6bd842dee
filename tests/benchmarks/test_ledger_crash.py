"""How the kill test's pieces are added up."""

from __future__ import annotations

from benchmarks.ledger_crash import sums


def test_two_pieces_are_added_up() -> None:
    one = {
        "machine": {"cores": 2},
        "database": "sqlite",
        "workers": 4,
        "rounds": 100,
        "killed": {"gateway": 60, "scheduler": 5},
        "faults": {"missing": 0, "examples": ["a"]},
        "settled_s": 2.5,
        "good": True,
    }
    other = {
        "database": "sqlite",
        "workers": 4,
        "rounds": 50,
        "killed": {"gateway": 30, "database": 2},
        "faults": {"missing": 1, "examples": []},
        "settled_s": 1.0,
        "good": False,
    }
    assert sums(one, other) == {
        "machine": {"cores": 2},
        "database": "sqlite",
        "workers": 4,
        "rounds": 150,
        "killed": {"gateway": 90, "scheduler": 5, "database": 2},
        "faults": {"missing": 1, "examples": ["a"]},
        "settled_s": 2.5,
        "good": False,
    }
