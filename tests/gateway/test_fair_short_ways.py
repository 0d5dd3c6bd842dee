"""The short ways through the line and the estimates lead where the long ones do."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine.gateway.fair.costs import Ask, Costs
from engine.gateway.fair.flows import Entry, Someone
from engine.gateway.fair.line import Line, Rules

_CALLERS = [Someone("a"), Someone("a"), Someone("a", 2.0), Someone("b", 3.0), Someone("c")]
_OF_FLOWS = ("tag", "running", "work", "mean", "debt", "peak", "peak_at", "last", "queued", "let_in")
_OF_LINES = ("running", "waiting", "read", "queued", "_virtual", "_stay_s", "_batch_running")


class LongLine(Line):
    """Takes no short way."""

    def enter(self, entry: Entry, now: float) -> list[Entry] | None:
        return self._enter(entry, now)

    def end(self, entry: Entry, actual: float | None, now: float) -> list[Entry]:
        return self._end(entry, entry.flow, actual, now)


def state(line: Line) -> list[Any]:
    found = [getattr(line, name) for name in _OF_LINES]
    found += [line.flows.weights, line.flows.peaks, line.flows.means]
    for flow in line.flows:
        found += [getattr(flow, name) for name in _OF_FLOWS]
    return found


@pytest.mark.parametrize("seed", range(12))
def test_a_flow_that_has_the_line_to_itself_leaves_it_as_any_flow_does(seed: int) -> None:
    chance, now, short_ways = random.Random(seed), 0.0, 0
    window = chance.choice([None, 4, 16])
    lines = (
        Line(Rules(most_waiting=6, active_s=3.0), window),
        LongLine(Rules(most_waiting=6, active_s=3.0), window),
    )
    open_: list[tuple[Entry, Entry]] = []
    for _ in range(600):
        now += chance.choice([0.0, 0.01, 0.1, 0.3])
        running = [pair for pair in open_ if pair[0].state == "running"]
        if chance.random() < 0.01:
            # The others are forgotten.
            now += 4.0
        if chance.random() < 0.005:
            for line in lines:
                line.resize(window, now)
        if not running or chance.random() < 0.5:
            who = _CALLERS[0] if chance.random() < 0.97 else chance.choice(_CALLERS)
            cost, batch = chance.uniform(0.1, 2.0), chance.random() < 0.01
            pair = (
                Entry(who.subject, cost, read=9, batch=batch),
                Entry(who.subject, cost, read=9, batch=batch),
            )
            pair[0].who = pair[1].who = who
            short_ways += lines[0]._alone is not None
            came = [line.enter(entry, now) for line, entry in zip(lines, pair, strict=True)]
            assert (came[0] is None) == (came[1] is None)
            open_.append(pair)
        else:
            pair = chance.choice(running)
            actual = None if chance.random() < 0.05 else pair[0].cost * chance.uniform(0.3, 3.0)
            begun = [line.end(entry, actual, now) for line, entry in zip(lines, pair, strict=True)]
            assert len(begun[0]) == len(begun[1])
        assert all(one.state == other.state and one.mark == other.mark for one, other in open_)
        assert [flow.key for flow in lines[0].flows] == [flow.key for flow in lines[1].flows]
        assert state(lines[0]) == pytest.approx(state(lines[1]))
        open_ = [pair for pair in open_ if pair[0].state in ("running", "waiting")]
    assert short_ways


def test_a_settled_estimate_learns_as_a_young_one_does() -> None:
    chance = random.Random(5)
    short, long = Costs("chat", 4096, 8), Costs("chat", 4096, 8)
    for i in range(500):
        bytes, ask = chance.choice((1000, 1100, 60_000)), Ask(n=chance.choice((None, None, 2)))
        prompt, completion = chance.choice((250, 250, 4000, 0)), chance.choice((5, 100, 100, None))
        seconds, others = (
            chance.choice((0.0, 1e-9, 0.5, 3.0, 1e9 if i > 490 else 3.0)),
            chance.choice((0, 9000)),
        )
        cost = short.estimate(bytes, ask)
        assert cost.total == pytest.approx(long.estimate(bytes, ask).total)
        actual = short.learn(
            cost,
            prompt_tokens=prompt,
            completion_tokens=completion,
            seconds=seconds,
            others_read=others,
        )
        assert actual == pytest.approx(long._learn(cost, prompt, completion, seconds, others))
    assert not short._few
    for name in ("_reading", "_writing", "_completion"):
        assert getattr(short, name) == pytest.approx(getattr(long, name))
    assert dict(short._per_byte) == pytest.approx(dict(long._per_byte))
