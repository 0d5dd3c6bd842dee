"""The experts' loads on a runner's /metrics: the files read, the text made, the engine's own page kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Gauge, make_asgi_app
from prometheus_client.parser import text_string_to_metric_families

from engine.runners import expert_log
from engine.runners.expert_load import (
    MOST_SERIES,
    metrics_text,
    path_of,
    ranks_of,
    read_counts,
    read_reported,
    reported_file,
)
from engine.runners.expert_metrics import ExpertMetrics
from engine.runners.spec import RunnerSpec


def write(path: Path, rank: int, counts: Any) -> None:
    table = np.array(counts, dtype="<i8")
    file = path.with_name(f"{path.name}.{rank}")
    file.write_bytes(np.array(table.shape, dtype="<i8").tobytes() + table.tobytes())


def samples(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def spec(device: str = "cpu:0", **args: object) -> RunnerSpec:
    return RunnerSpec(
        model="m",
        category="chat",
        engine="vllm",
        model_dir=Path("/m"),
        socket=Path("/run/m-0.sock"),
        device=device,
        options={"args": args},
    )


def test_ranks_that_see_all_tokens_count_once(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    assert read_counts(path) is None
    write(path, 0, [[4, 2], [3, 3]])
    write(path, 1, [[4, 2], [2, 2]])  # a step behind
    counts = read_counts(path)
    assert counts is not None and counts.tolist() == [[4, 2], [3, 3]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        np.array([1, 4], dtype="<i8").tobytes() + b"\0" * 24,
        np.array([-1, 4], dtype="<i8").tobytes() + b"\0" * 64,
        np.array([2**40, 2**40], dtype="<i8").tobytes() + b"\0" * 64,
    ],
)
def test_a_file_that_is_not_whole_is_not_there(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "experts"
    (tmp_path / "experts.0").write_bytes(content)
    (tmp_path / "experts.old").write_bytes(b"x" * 100)
    assert read_counts(path) is None
    assert metrics_text(path, 1) == b""
    write(path, 1, [[1, 2, 3, 4]])
    counts = read_counts(path)
    assert counts is not None and counts.tolist() == [[1, 2, 3, 4]]


def test_ranks_of_different_shapes_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    write(path, 0, [[1, 2]])
    write(path, 1, [[1, 2, 3, 4]])
    assert read_counts(path) is None


def test_the_text_tells_balance_over_experts_and_ranks(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    write(path, 0, [[6, 2, 4, 4], [8, 0, 0, 0]])
    found = samples(metrics_text(path, 2))
    assert found["hearth_expert_balancedness", ("0", "experts")] == pytest.approx(4 / 6)
    assert found["hearth_expert_balancedness", ("0", "ranks")] == 1.0
    assert found["hearth_expert_balancedness", ("1", "ranks")] == 0.5
    assert found["hearth_expert_balancedness_overall", ("ranks",)] == pytest.approx(12 / 16)
    assert found["hearth_expert_balancedness_overall", ("experts",)] == pytest.approx(6 / 14)
    assert found["hearth_expert_tokens_total", ("0", "1")] == 8  # expert, layer
    assert len([key for key in found if key[0] == "hearth_expert_tokens_total"]) == 8
    alone = samples(metrics_text(path, 1))
    assert ("hearth_expert_balancedness_overall", ("ranks",)) not in alone


def test_large_models_do_not_flood_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    write(path, 0, np.ones((58, 256)))
    found = samples(metrics_text(path, 8))
    assert MOST_SERIES < 58 * 256
    assert len(found) == 2 * 58 + 2
    assert set(found.values()) == {1.0}


def test_before_the_first_token_there_is_no_overall_figure(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    write(path, 0, np.zeros((1, 4)))
    found = samples(metrics_text(path, 1))
    assert ("hearth_expert_balancedness_overall", ("experts",)) not in found
    assert found["hearth_expert_tokens_total", ("3", "0")] == 0


@pytest.mark.parametrize(
    ("device", "args", "ranks"),
    [
        ("cpu:0", {}, 1),
        ("cpu:0", {"tensor-parallel-size": 2}, 1),
        ("cpu:0", {"tensor-parallel-size": 2, "enable-expert-parallel": True}, 2),
        ("cpu:0", {"tensor_parallel_size": 2, "enable_expert_parallel": True}, 2),
        ("cuda:0,1,2,3", {"enable-expert-parallel": True}, 4),
        (
            "cuda:0,1,2,3",
            {"enable-expert-parallel": True, "data-parallel-size": 4, "tensor-parallel-size": 1},
            4,
        ),
        ("cpu:0", {"data-parallel-size": 2}, 1),
    ],
)
def test_how_a_runner_shares_its_experts(device: str, args: dict[str, Any], ranks: int) -> None:
    assert ranks_of(spec(device, **args)) == ranks


def test_the_files_stand_in_the_runners_own_folder() -> None:
    path = path_of(Path("/run/m-0.sock"))
    assert path.parent.parent == Path("/run") and path.parent != path_of(Path("/run/m-1.sock")).parent


# What vLLM's balancer logs.

LINE = (
    "EPLB step: {step} for model {model}: avg_tokens=512.50, max_tokens=1025, balancedness=0.5000, "
    "steps until the next rearrangement: 2900"
)


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[logging.Logger]:
    monkeypatch.setenv("HEARTH_EXPERT_LOAD", str(tmp_path / "experts"))
    logger = logging.getLogger(expert_log.LOGGER)
    logger.setLevel(logging.INFO)
    expert_log.install()
    expert_log.install()  # plugins may be loaded again
    yield logger
    logger.setLevel(logging.NOTSET)
    for handler in list(logger.handlers):
        if isinstance(handler, expert_log.KeepBalancedness):
            logger.removeHandler(handler)


def test_the_engines_own_figure_is_told(logger: logging.Logger, tmp_path: Path) -> None:
    path = tmp_path / "experts"
    assert len(logger.handlers) == 1
    logger.info("Rearranging experts...")
    assert read_reported(path) is None
    logger.info(LINE.format(step=100, model="/weights/deepseek r1"))
    logger.info(LINE.format(step=100, model="draft").replace("0.5000", "0.9000"))
    assert read_reported(path) == 0.5
    assert json.loads(reported_file(path).read_text())["step"] == 100
    found = samples(metrics_text(path, 8))
    assert found == {("hearth_expert_balancedness_overall", ("ranks",)): 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["experts.reported"]


def test_a_step_without_tokens_is_no_imbalance() -> None:
    idle = LINE.format(step=1, model="m").replace("1025", "0").replace("0.5000", "0.0000")
    assert expert_log.parse(idle) is None


def test_the_line_is_as_the_installed_vllm_writes_it() -> None:
    """The logger's name and the words come from vLLM's source, which may change with a version."""
    import vllm

    source = Path(vllm.__file__).parent / "distributed" / "eplb" / "eplb_state.py"
    assert expert_log.LOGGER == "vllm.distributed.eplb.eplb_state"
    joined = source.read_text().replace('"\n', "").replace('                        "', "")
    assert (
        "EPLB step: %d for model %s: avg_tokens=%.2f, max_tokens=%d, balancedness=%.4f, "
        "steps until the next rearrangement: %d"
    ) in joined


def test_outside_of_hearth_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEARTH_EXPERT_LOAD", raising=False)
    expert_log.install()
    assert not logging.getLogger(expert_log.LOGGER).handlers


# The page.


def page(text: bytes) -> httpx.ASGITransport:
    registry = CollectorRegistry()
    Gauge("engine_own", "The engine's.", registry=registry).set(7)
    inner = make_asgi_app(registry)

    async def app(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == "/other":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})
            return
        await inner(scope, receive, send)

    return httpx.ASGITransport(app=ExpertMetrics(app, lambda: text))  # type: ignore[arg-type]  # same shape


async def test_the_engines_page_is_kept_and_ours_follows(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    write(path, 0, [[3, 1]])
    async with httpx.AsyncClient(transport=page(metrics_text(path, 1)), base_url="http://r") as client:
        for headers in ({}, {"accept": "application/openmetrics-text;version=1.0.0"}):
            answer = await client.get("/metrics", headers={"accept-encoding": "gzip", **headers})
            assert "content-encoding" not in answer.headers
            found = samples(answer.content)
            assert found["engine_own", ()] == 7
            assert found["hearth_expert_balancedness", ("0", "experts")] == pytest.approx(2 / 3)
            assert int(answer.headers.get("content-length", len(answer.content))) == len(answer.content)
        assert (await client.get("/other")).content == b"ok"


async def test_without_counts_the_page_is_the_engines() -> None:
    async with httpx.AsyncClient(transport=page(b""), base_url="http://r") as client:
        answer = await client.get("/metrics/")
        assert samples(answer.content) == {("engine_own", ()): 7}
