"""Who is next: properties of the line, without a clock or a loop of its own."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.gateway.fair.flows import Entry
from engine.gateway.fair.line import Line, Rules


@dataclass
class Server:
    """A pool whose every request takes as many seconds as it costs, on a made-up clock."""

    line: Line
    now: float = 0.0
    #: When each of those that run ends.
    ends: dict[Entry, float] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    order: list[Entry] = field(default_factory=list)

    def send(self, subject: str, cost: float = 1.0, **more: object) -> Entry:
        entry = Entry(subject, cost, **more)  # type: ignore[arg-type]  # whatever Entry takes
        if self.line.enter(entry, self.now) is None:
            self._began(entry)
        return entry

    def _began(self, entry: Entry) -> None:
        self.ends[entry] = self.now + entry.cost
        self.order.append(entry)

    def step(self) -> Entry:
        """The next request ends."""
        entry = min(self.ends, key=lambda each: self.ends[each])
        self.now = self.ends.pop(entry)
        self.done[entry.subject] += entry.cost  # type: ignore[assignment]  # a sum of seconds
        for begun in self.line.end(entry, entry.cost, self.now):
            self._began(begun)
        return entry


weights = st.sampled_from([1.0, 2.0, 3.0, 5.0])
costs = st.floats(min_value=0.1, max_value=50.0)


@given(
    window=st.integers(1, 6),
    flows=st.lists(st.tuples(weights, costs, costs), min_size=2, max_size=5),
)
@settings(deadline=None)
def test_backlogged_flows_share_the_work_by_their_weights(
    window: int, flows: list[tuple[float, float, float]]
) -> None:
    """SFQ's bound, for a window: of two flows that wait all the time, the work by weight differs by no more
    than what may be under way."""
    server = Server(Line(Rules(most_waiting=1 << 20, active_s=math.inf), window))
    largest = {str(i): max(low, high) for i, (_, low, high) in enumerate(flows)}
    by_weight = {str(i): weight for i, (weight, _, _) in enumerate(flows)}
    chance = random.Random(1)
    begun: Counter[str] = Counter()

    def more(subject: str) -> None:
        weight, low, high = flows[int(subject)]
        server.send(subject, chance.choice((low, high)), weight=weight)

    for subject in largest:
        for _ in range(4):
            more(subject)
    held = set()
    for _ in range(150):
        before = len(server.order)
        subject = server.step().subject
        more(subject)
        for entry in server.order[before:]:
            begun[entry.subject] += entry.cost  # type: ignore[assignment]  # a sum of seconds
        for flow in server.line.flows:
            if flow.waiting and not server.line._has_room(flow, flow.waiting[0].cost, server.now):
                held.add(flow.key[0])
    for one in largest:
        for other in largest:
            # A share holds back whoever has all of it under way; the others are bound to each other by tags.
            if window == 1 or not held & {one, other}:
                gap = begun[one] / by_weight[one] - begun[other] / by_weight[other]
                bound = (window + 1) * (largest[one] / by_weight[one] + largest[other] / by_weight[other])
                assert gap <= bound + 1e-6


@pytest.mark.parametrize("window", [1, 4, 8])
def test_weights_of_1_and_3_get_1_and_3_parts_of_the_work(window: int) -> None:
    server = Server(Line(Rules(most_waiting=1000), window))
    for _ in range(400):
        server.send("small", 1.0, weight=1.0)
        server.send("large", 1.0, weight=3.0)
    for _ in range(400):
        server.step()
    assert server.done["large"] / server.done["small"] == pytest.approx(3.0, rel=0.05)


def test_keys_of_one_weight_get_the_same_work_whatever_the_size_of_their_requests() -> None:
    server = Server(Line(Rules(most_waiting=5000), 1))
    for _ in range(2000):
        server.send("short", 1.0)
    for _ in range(40):
        server.send("long", 50.0)
    for _ in range(1000):
        server.step()
    assert server.done["long"] == pytest.approx(server.done["short"], abs=100)


def test_what_was_estimated_too_low_is_made_up_for() -> None:
    """A flow whose requests cost four times what they seem to gets a quarter of the requests."""
    line, now = Line(Rules(most_waiting=1000), 1), 0.0
    begun: Counter[str] = Counter()
    entries = [Entry(name, 1.0) for _ in range(200) for name in ("honest", "sly")]
    for entry in entries:
        line.enter(entry, now)
    running = entries[0]
    for _ in range(200):
        actual = 4.0 if running.subject == "sly" else 1.0
        now += actual
        begun[running.subject] += 1
        (running,) = line.end(running, actual, now)
    assert begun["honest"] == pytest.approx(4 * begun["sly"], abs=4)


def test_a_key_that_comes_to_a_full_line_waits_behind_one_request_not_behind_the_flood() -> None:
    server = Server(Line(Rules(), 1))
    for _ in range(100):
        server.send("flood", 10.0)
    guest = server.send("guest", 1.0)
    server.step()
    assert guest.state == "running"


def test_a_key_alone_may_fill_the_window() -> None:
    server = Server(Line(Rules(), 8))
    assert [server.send("one").state for _ in range(9)] == ["running"] * 8 + ["waiting"]


def test_among_active_keys_each_has_its_share_of_the_window_and_always_one() -> None:
    server = Server(Line(Rules(active_s=10), 4))
    for i in range(9):
        server.send(f"guest{i}", 0.01)
        server.step()
    assert [server.send("flood", 0.01).state for _ in range(4)] == ["running"] + ["waiting"] * 3
    assert server.send("guest0", 0.01).state == "running"


def test_what_the_others_do_not_need_may_be_used_but_each_finds_its_place_when_it_comes() -> None:
    server = Server(Line(Rules(active_s=10), 8))
    for i in range(4):
        server.send(f"guest{i}", 0.1)
        server.step()
    assert [server.send("flood", 0.1).state for _ in range(6)] == ["running"] * 4 + ["waiting"] * 2
    assert [server.send(f"guest{i}", 0.1).state for i in range(4)] == ["running"] * 4


def test_a_share_is_of_work_too() -> None:
    """Who sends requests a hundred times the other's has not half of the window's places."""
    server = Server(Line(Rules(), 8))
    for _ in range(3):
        server.send("short", 1.0)
    states = [server.send("long", 1.9).state for _ in range(4)]
    assert states == ["running", "running", "waiting", "waiting"]


def test_a_large_request_waits_until_its_flow_is_within_its_share_of_the_time() -> None:
    """Of ten active keys, one with requests of 5 s gets one of them in 50 s, however much room there is."""
    server = Server(Line(Rules(active_s=math.inf), 100))
    for i in range(9):
        server.send(f"guest{i}", 0.5)
    for _ in range(200):
        server.send("flood", 5.0)
    while server.now < 1000:
        subject = server.step().subject
        if subject != "flood":
            server.send(subject, 0.5)
    assert server.done["flood"] == pytest.approx(100, abs=10)


def test_a_large_request_runs_where_there_is_nothing_else_to_do() -> None:
    server = Server(Line(Rules(active_s=math.inf), 100))
    for i in range(9):
        server.send(f"guest{i}", 0.5)
    for _ in range(200):
        server.send("flood", 5.0)
    while server.now < 500:
        server.step()
    assert server.done["flood"] == pytest.approx(500, abs=20)


def test_when_the_others_have_gone_a_key_has_the_whole_window_again() -> None:
    server = Server(Line(Rules(active_s=10), 4))
    server.send("guest", 1.0)
    flood = [server.send("flood", 1.0) for _ in range(5)]
    # One place is kept for the guest, who has had no more than one at once.
    assert [entry.state for entry in flood].count("running") == 3
    server.step()
    server.now += 11
    for entry in [entry for entry in flood if entry.state == "running"]:
        server.ends[entry] = server.now
    server.step()
    assert [entry.state for entry in flood].count("running") == 4


def test_batch_waits_while_interactive_requests_do() -> None:
    server = Server(Line(Rules(), 1))
    server.send("a")
    batch = [server.send("b", batch=True) for _ in range(3)]
    late = [server.send("a") for _ in range(3)]
    for _ in range(6):
        server.step()
    assert server.order[1:4] == late
    assert server.order[4:] == batch


def test_batch_leaves_half_the_window_while_others_are_active() -> None:
    server = Server(Line(Rules(active_s=10), 4))
    server.send("a", 0.1)
    server.step()
    states = [server.send(f"b{i}", batch=True).state for i in range(4)]
    assert states == ["running", "running", "waiting", "waiting"]
    assert [server.send("a").state for _ in range(2)] == ["running", "running"]


def test_a_full_line_refuses_the_newest_of_the_one_who_fills_it() -> None:
    server = Server(Line(Rules(most_waiting=3), 1))
    server.send("flood", 5.0)
    flood = [server.send("flood", 5.0) for _ in range(3)]
    guest = server.send("guest", 1.0)
    assert [entry.state for entry in flood] == ["waiting", "waiting", "evicted"]
    assert guest.state == "waiting"
    assert server.send("flood", 5.0).state == "evicted"


def test_of_equals_the_newcomer_is_refused() -> None:
    server = Server(Line(Rules(most_waiting=2), 1))
    states = [server.send(name).state for name in ("a", "b", "c", "d")]
    assert states == ["running", "waiting", "waiting", "evicted"]


def test_batch_gives_way_first() -> None:
    server = Server(Line(Rules(most_waiting=2), 1))
    server.send("a")
    batch = [server.send("b", batch=True) for _ in range(2)]
    server.send("a", 100.0)
    assert [entry.state for entry in batch] == ["waiting", "evicted"]


def test_the_outlook_is_true_of_a_steady_line() -> None:
    """A flow is told how long until what it has waiting is let in; so long it takes, within a fifth."""
    server = Server(Line(Rules(most_waiting=1000), 2))
    mine = [server.send("mine", 2.0) for _ in range(30)]
    for _ in range(60):
        server.send("other", 1.0)
    for _ in range(15):
        server.step()
    asked = server.now
    outlook_s = server.line.outlook_s("mine", False, server.now)
    while any(entry.state == "waiting" for entry in mine):
        server.step()
    assert outlook_s == pytest.approx(server.now - asked, rel=0.2)


class Lines(RuleBasedStateMachine):
    """Any order of coming, ending, leaving, resizing: no place is lost, given twice or beyond the window."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line(Rules(most_waiting=6, active_s=5.0), 3)
        self.now = 0.0
        self.all: list[Entry] = []

    def _of(self, state: str) -> list[Entry]:
        return [entry for entry in self.all if entry.state == state]

    def _check_begun(self, begun: list[Entry], before: list[Entry]) -> None:
        assert len(set(map(id, begun))) == len(begun)
        assert set(begun) == set(before) - set(self._of("waiting"))
        assert all(entry.state == "running" for entry in begun)

    @rule(
        subject=st.sampled_from("abcd"),
        cost=costs,
        weight=weights,
        batch=st.booleans(),
        past=st.floats(0.0, 3.0),
    )
    def enter(self, subject: str, cost: float, weight: float, batch: bool, past: float) -> None:
        self.now += past
        room = self.line.window is None or self.line.running < self.line.window
        entry = Entry(subject, cost, weight=weight, batch=batch)
        evicted = self.line.enter(entry, self.now)
        self.all.append(entry)
        if evicted is None:
            assert room and entry.state == "running"
        else:
            assert all(each.state == "evicted" for each in evicted)
            assert entry.state in ("waiting", "evicted")

    @precondition(lambda self: self._of("running"))
    @rule(data=st.data(), factor=st.none() | st.floats(0.0, 10.0), past=st.floats(0.0, 8.0))
    def end(self, data: st.DataObject, factor: float | None, past: float) -> None:
        self.now += past
        entry = data.draw(st.sampled_from(self._of("running")))
        before = self._of("waiting")
        self._check_begun(
            self.line.end(entry, None if factor is None else factor * entry.cost, self.now), before
        )

    @precondition(lambda self: self._of("waiting"))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self._of("waiting")))
        self.line.withdraw(entry)
        assert entry.state == "out"

    @rule(window=st.none() | st.integers(1, 5))
    def resize(self, window: int | None) -> None:
        before = self._of("waiting")
        self._check_begun(self.line.resize(window, self.now), before)

    @rule(subject=st.sampled_from("abcd"), batch=st.booleans())
    def look(self, subject: str, batch: bool) -> None:
        assert 0 <= self.line.outlook_s(subject, batch, self.now) < math.inf

    @invariant()
    def counts_are_true(self) -> None:
        line, running, waiting = self.line, self._of("running"), self._of("waiting")
        assert line.running == len(running)
        assert line.waiting == len(waiting) <= line.rules.most_waiting
        assert line.queued == pytest.approx(sum(entry.cost for entry in waiting), abs=1e-6)
        assert line._batch_running == sum(entry.batch for entry in running)
        flows = line.flows
        assert line.flows.weights == pytest.approx(sum(flow.weight for flow in flows))
        assert line.flows.interactive == pytest.approx(sum(flow.weight for flow in flows if not flow.batch))
        assert line.flows.peaks == sum(flow.peak for flow in flows)
        assert line.flows.interactive_peaks == sum(flow.peak for flow in flows if not flow.batch)
        assert line.flows.means == pytest.approx(sum(flow.mean for flow in flows), abs=1e-6)
        for flow in flows:
            mine = [entry for entry in running if entry.flow is flow]
            assert flow.running == len(mine)
            assert flow.work == pytest.approx(sum(entry.cost for entry in mine), abs=1e-6)

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """Someone who runs will end, and that lets a waiting one in sooner or later."""
        if self.line.waiting:
            assert self.line.running

    @invariant()
    def the_window_is_kept(self) -> None:
        window = self.line.window
        if window is not None and self.line.waiting and self.line.running < window:
            # A free place beside a waiting request: each of those has its share already, or is a large one
            # of a flow that has had more than its share.
            for entry in self._of("waiting"):
                flow = entry.flow
                assert flow is not None and (flow.running or flow.batch or flow.debt > 0)

    def teardown(self) -> None:
        for _ in range(10_000):
            running = self._of("running")
            if not running:
                break
            self.now += 0.1
            self.line.end(running[0], running[0].cost, self.now)
        assert not self._of("waiting") and not self._of("running")
        assert self.line.is_idle and self.line.queued == 0.0


TestLines = Lines.TestCase
TestLines.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
