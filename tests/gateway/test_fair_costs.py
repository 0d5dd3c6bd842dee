"""What requests are estimated to cost, and what is learnt of them."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.gateway.body import json_head
from engine.gateway.fair.costs import Ask, Costs

anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())
CATEGORIES = ["chat", "code", "vision", "embedding", "image", "audio", "detection"]


def test_a_body_tells_its_ask() -> None:
    body = {"model": "m", "max_tokens": 5, "n": 2, "size": "64x32", "steps": 7, "service_tier": "flex"}
    assert json_head(json.dumps(body).encode()).ask == Ask(5, 2, "64x32", 7, True)
    newer = {"model": "m", "max_tokens": 5, "max_completion_tokens": 9, "num_inference_steps": 3}
    assert json_head(json.dumps(newer).encode()).ask == Ask(9, None, None, 3, False)


@given(
    st.sampled_from(CATEGORIES),
    st.integers(1, 1 << 30),
    st.builds(Ask, anything, anything, anything, anything),
    st.none() | st.integers(0, 1 << 40),
    st.none() | st.integers(0, 1 << 40),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
)
def test_a_cost_is_a_positive_number_whatever_is_asked_or_told(
    category: str,
    bytes: int,
    ask: Ask,
    prompt: int | None,
    completion: int | None,
    seconds: float,
    others_read: float,
) -> None:
    costs = Costs(category, 4096, 8)
    for _ in range(3):
        cost = costs.estimate(bytes, ask)
        assert 0 < cost.total < math.inf
        actual = costs.learn(
            cost,
            prompt_tokens=prompt,
            completion_tokens=completion,
            seconds=seconds,
            others_read=others_read,
        )
        assert 0 < actual < math.inf
        assert 0 < costs.by_time(cost, seconds) < math.inf


def teach(costs: Costs, bytes: int, ask: Ask, *, prompt: int, completion: int, seconds: float) -> float:
    """What an answer that tells its tokens is found to have cost."""
    cost = costs.estimate(bytes, ask)
    return costs.learn(cost, prompt_tokens=prompt, completion_tokens=completion, seconds=seconds)


def test_tokens_a_byte_are_learnt_from_what_answers_tell() -> None:
    costs = Costs("chat", None)
    assert costs.estimate(4000, Ask()).read == 1000
    for _ in range(60):
        teach(costs, 4000, Ask(), prompt=2000, completion=1, seconds=1.0)
    assert costs.estimate(4000, Ask()).read == pytest.approx(2000, rel=0.01)
    # Of lengths that have not been seen the nearest tells.
    assert costs.estimate(400, Ask()).read == pytest.approx(200, rel=0.01)


def test_a_picture_in_the_body_is_not_a_long_text() -> None:
    costs = Costs("vision", None)
    for _ in range(60):
        for bytes, tokens in ((2_000, 500), (2_000_000, 800)):
            teach(costs, bytes, Ask(), prompt=tokens, completion=1, seconds=1.0)
    assert costs.estimate(2_000, Ask()).read == pytest.approx(500, rel=0.02)
    assert costs.estimate(2_000_000, Ask()).read == pytest.approx(800, rel=0.02)


def test_the_answers_length_is_learnt_and_bounded_by_what_is_asked() -> None:
    costs = Costs("chat", None)
    for _ in range(60):
        teach(costs, 4, Ask(), prompt=1, completion=50, seconds=1.0)
    assert costs.estimate(4, Ask()).write == pytest.approx(50, rel=0.05)
    assert costs.estimate(4, Ask(max_tokens=4096)).write == pytest.approx(50, rel=0.05)
    assert costs.estimate(4, Ask(max_tokens=10)).write == 10
    assert costs.estimate(4, Ask(n=3)).total == pytest.approx(3 * costs.estimate(4, Ask()).total, rel=0.01)


def test_no_prompt_is_longer_than_the_model_reads() -> None:
    assert Costs("chat", 1000).estimate(10_000_000, Ask()).read == 1000


def test_what_reading_and_writing_take_is_learnt_in_company_too() -> None:
    """0.2 ms a token read, by whomever; 30 ms a token written: from answers whose times are made so."""
    costs, chance = Costs("chat", None, 8), random.Random(3)
    for _ in range(400):
        prompt, completion, others = (
            chance.choice((50, 4000)),
            chance.choice((1, 100)),
            chance.choice((0, 9000)),
        )
        seconds = 0.0002 * (prompt + others) + 0.03 * completion
        cost = costs.estimate(prompt * 4, Ask(max_tokens=completion))
        costs.learn(
            cost,
            prompt_tokens=prompt,
            completion_tokens=completion,
            seconds=seconds,
            others_read=others,
        )
    long = teach(costs, 16_000, Ask(max_tokens=1), prompt=4000, completion=1, seconds=0.83)
    short = teach(costs, 200, Ask(max_tokens=100), prompt=50, completion=100, seconds=3.01)
    assert long == pytest.approx(0.8 + 0.03 / 8, rel=0.15)
    assert short == pytest.approx(0.01 + 3.0 / 8, rel=0.15)


def test_pictures_to_paint_cost_by_their_number_size_and_steps() -> None:
    costs = Costs("image", None)
    plain = costs.estimate(100, Ask(size="512x512", steps=20)).total
    assert costs.estimate(100, Ask(size="1024x1024", steps=20)).total == pytest.approx(4 * plain)
    assert costs.estimate(100, Ask(size="512x512", steps=40)).total == pytest.approx(2 * plain)
    assert costs.estimate(100, Ask(size="512x512", steps=20, n=3)).total == pytest.approx(3 * plain)
    assert costs.estimate(5000, Ask()).total == pytest.approx(plain)


def test_where_no_tokens_are_told_time_tells() -> None:
    """Two recordings of one length in bytes, one of which takes four times as long."""
    costs = Costs("audio", None, 2)
    for _ in range(60):
        cost = costs.estimate(100_000, Ask())
        costs.learn(cost, prompt_tokens=None, completion_tokens=None, seconds=2.0)
    cost = costs.estimate(100_000, Ask())
    assert cost.total == pytest.approx(1.0, rel=0.01)
    assert costs.by_time(cost, 2.0) == pytest.approx(1.0, rel=0.01)
    assert costs.by_time(cost, 8.0) == pytest.approx(4.0, rel=0.01)
    # The company at the replica tells too, so no more than so much is believed.
    assert costs.by_time(cost, 2000.0) == pytest.approx(8.0, rel=0.01)
