"""The planner's benchmark: its instances, and its solver where it is installed."""

from __future__ import annotations

import importlib

import pytest

from benchmarks import planner
from engine.planner.fleet import Fleet
from engine.planner.layout import Policy
from tests.planner.support import catalog


def test_instances_are_the_same_each_time_and_neither_trivial_nor_hopeless() -> None:
    some = planner.instances(catalog(), 5)
    assert some == planner.instances(catalog(), 5)
    for instance in some:
        room = Fleet(instance.nodes, 0.92).free_bytes
        assert len(instance.items) >= 4 and 0.85 < instance.wanted / room < 1.4


def test_search_places_no_less_than_greed_and_no_more_than_is_wanted() -> None:
    for instance in planner.instances(catalog(), 10):
        greedy, _ = planner.placed_by_planner(instance, 0)
        searched, _ = planner.placed_by_planner(instance, Policy().search_steps)
        assert 0 < greedy <= searched <= instance.wanted


def test_models_are_made_up_to_any_number() -> None:
    many = planner.many_models(catalog(), 250)
    assert len(many) == 250 and all(name == needs.id for name, needs in many.items())


def test_without_the_solver_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit, match="pip install ortools"):
        planner.solver_module()
