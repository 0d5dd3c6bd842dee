"""The start benchmark's arithmetic: times of states, and what of the budgets is missed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.startup import Timeline, missed
from engine.scheduler.status import ModelStatus, SchedulerStatus, Status


def status(**states: Any) -> Status:
    models = [
        ModelStatus(id=name, category="chat", engine="vllm", device="cpu:0", state=state, since_s=0)
        for name, state in states.items()
    ]
    return Status(
        scheduler=SchedulerStatus(pid=1, started=0.0), profile="tiny", base_url="", ready=False, models=models
    )


def test_a_timeline_keeps_when_a_state_was_first_seen() -> None:
    timeline = Timeline()
    timeline.note(status(a="preparing", b="starting"), 1.0)
    timeline.note(status(a="preparing", b="warming"), 3.0)
    timeline.note(status(a="starting", b="ready"), 5.0)
    timeline.note(status(a="ready", b="ready"), 9.0)
    assert timeline.seen["a"] == {"preparing": 1.0, "starting": 5.0, "ready": 9.0}
    assert timeline.seen["b"]["ready"] == 5.0
    assert timeline.spent("a", "preparing") == 4.0
    assert timeline.spent("b", "preparing") == 0.0


GOOD: dict[str, Any] = {"ready_s": 150.0, "pss_bytes": 12 * 1024**3, "idle_cores": 0.1, "left": []}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"ready_s": 150.1}, "ready after"),
        ({"pss_bytes": 12 * 1024**3 + 1}, "memory"),
        ({"idle_cores": 0.11}, "rest"),
        ({"left": ["1 x"]}, "left"),
    ],
)
def test_each_missed_budget_is_told(change: dict[str, Any], word: str) -> None:
    assert missed(GOOD) == []
    (fault,) = missed(GOOD | change)
    assert word in fault
