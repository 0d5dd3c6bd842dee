"""One key floods with long prompts, nine send short ones: the line before an engine with a made-up clock.

The engine is that of benchmarks/fairness.py, whose figures are of real processes; here it takes no time.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import pytest

from benchmarks._engine import Job, Speed, Steps
from engine.gateway.fair.costs import Ask, Cost, Costs
from engine.gateway.fair.flows import Entry
from engine.gateway.fair.line import Line, Rules

#: Counted from here, seconds: the line has learnt what things cost by then.
_COUNTED_S = 10.0
_FLOOD_S = 3.0


@dataclass(frozen=True)
class Sent:
    """A request of one caller, who sends the next one `pause_s` after its answer."""

    subject: str
    prompt: int
    completion: int
    pause_s: float = 0.0


@dataclass
class Result:
    p95_s: float
    flooded_per_s: float


def simulate(flood: list[Sent], *, fair: bool = True, pause_s: float = 0.0, seconds: float = 60.0) -> Result:
    """Nine callers with short prompts beside the flood, in closed loops."""
    speed = Speed()
    line = Line(Rules(), speed.max_batch if fair else None)
    costs = Costs("chat", None, speed.max_batch)
    steps, now, turn = Steps(speed), 0.0, itertools.count()
    coming = [(0.1 * i, next(turn), Sent(f"key{i}", 100, 100, pause_s)) for i in range(9)]
    coming += [(_FLOOD_S, next(turn), sent) for sent in flood]
    heapq.heapify(coming)
    open_: dict[Entry, tuple[Sent, Cost, float]] = {}
    jobs: dict[Job, Entry] = {}
    latencies: list[float] = []
    flooded = 0

    def begin(entry: Entry) -> None:
        sent = open_[entry][0]
        job = Job(sent.prompt, sent.completion)
        jobs[job] = entry
        steps.waiting.append(job)

    while now < seconds:
        while coming and coming[0][0] <= now:
            _, _, sent = heapq.heappop(coming)
            cost = costs.estimate(sent.prompt * 4, Ask(max_tokens=sent.completion))
            entry = Entry(sent.subject, cost.total, read=cost.read)
            open_[entry] = (sent, cost, now)
            if line.enter(entry, now) is None:
                begin(entry)
        if not jobs:
            now = coming[0][0]
            continue
        done, took_s = steps.step()
        now += took_s
        for job in done:
            entry = jobs.pop(job)
            sent, cost, began = open_.pop(entry)
            actual = costs.learn(
                cost,
                prompt_tokens=sent.prompt,
                completion_tokens=sent.completion,
                seconds=now - entry.since,
                others_read=line.read - entry.mark - entry.read,
            )
            for other in line.end(entry, actual, now):
                begin(other)
            if now > _COUNTED_S:
                if sent.subject == "flood":
                    flooded += 1
                else:
                    latencies.append(now - began)
            heapq.heappush(coming, (now + sent.pause_s, next(turn), sent))
    latencies.sort()
    return Result(latencies[int(0.95 * len(latencies))], flooded / (seconds - _COUNTED_S))


FLOODS = {
    "long prompts": [Sent("flood", 8000, 64)] * 16,
    "long prompts, no answers": [Sent("flood", 8000, 1)] * 16,
    "long answers": [Sent("flood", 2000, 512)] * 16,
    "many short ones": [Sent("flood", 100, 100)] * 64,
}


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("pause_s", [0.0, 5.0])
def test_the_nine_hardly_feel_the_flood(flood: str, pause_s: float) -> None:
    alone = simulate([], pause_s=pause_s)
    fair = simulate(FLOODS[flood], pause_s=pause_s)
    assert fair.p95_s <= 1.5 * alone.p95_s
    assert fair.flooded_per_s > 0.05


@pytest.mark.parametrize("flood", ["long prompts", "long prompts, no answers", "long answers"])
def test_without_the_line_they_do(flood: str) -> None:
    assert simulate(FLOODS[flood], fair=False).p95_s > 3 * simulate([]).p95_s


def test_where_the_nine_have_little_to_do_the_flood_has_nearly_all_of_the_engine() -> None:
    free = simulate(FLOODS["long prompts, no answers"], fair=False, pause_s=5.0)
    fair = simulate(FLOODS["long prompts, no answers"], pause_s=5.0)
    assert fair.flooded_per_s > 0.4 * free.flooded_per_s
