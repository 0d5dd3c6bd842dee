"""Counting tokens per expert into a file, as the runner's metrics read it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.runners.expert_load import read_counts
from kernels.moe import load
from kernels.moe.load import ExpertCounter


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> load._Recorder:
    """This process's recorder, as new."""
    fresh = load._Recorder()
    monkeypatch.setattr(load, "_recorder", fresh)
    return fresh


Batches = list[tuple[str, list[int]]]
batches = st.lists(st.tuples(st.sampled_from("abcd"), st.lists(st.integers(0, 6), max_size=20)), max_size=12)


@given(batches)
def test_the_file_has_the_counts_by_order_of_appearance(
    tmp_path_factory: pytest.TempPathFactory, batches: Batches
) -> None:
    path = tmp_path_factory.mktemp("load") / "experts.0"
    counter = ExpertCounter(path)
    wanted: dict[str, list[int]] = {}
    for layer, ids in batches:
        counter.add(layer, np.array(ids, dtype=np.int32), 7)
        row = wanted.setdefault(layer, [0] * 7)
        for expert in ids:
            row[expert] += 1
    numbers = np.fromfile(path, dtype="<i8")
    assert numbers[:2].tolist() == ([len(wanted), 7] if wanted else [0, 0])
    assert numbers[2:].tolist() == [count for row in wanted.values() for count in row]


def test_the_runner_reads_what_was_counted_so_far(tmp_path: Path) -> None:
    counter = ExpertCounter(tmp_path / "experts.0")
    assert read_counts(tmp_path / "experts") is None, "no layer ran yet"
    counter.add("first", np.array([[0, 2], [2, 1]]), 3)
    counter.add("second", np.array([[1, 1]]), 3)
    counter.add("first", np.array([2]), 3)
    counts = read_counts(tmp_path / "experts")
    assert counts is not None
    assert counts.tolist() == [[1, 1, 3], [0, 2, 0]]


def test_a_new_process_begins_a_new_file_and_harms_no_reader(tmp_path: Path) -> None:
    path = tmp_path / "experts.0"
    ExpertCounter(path).add("layer", np.zeros(5, dtype=np.int32), 100_000)
    mapped = np.memmap(path, dtype=np.int64, mode="r")
    ExpertCounter(path).add("layer", np.ones(2, dtype=np.int32), 4)
    assert mapped[2] == 5, "the old file is still whole for who has it mapped"
    assert int(mapped[-1]) == 0
    counts = read_counts(tmp_path / "experts")
    assert counts is not None
    assert counts.tolist() == [[0, 2, 0, 0]]


def test_a_reader_never_sees_a_half_made_layer(tmp_path: Path) -> None:
    """While layers appear, each read is a whole matrix."""
    counter = ExpertCounter(tmp_path / "experts.0")
    done = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not done.is_set():
            counts = read_counts(tmp_path / "experts")
            seen.append(0 if counts is None else len(counts))

    reader = threading.Thread(target=look)
    reader.start()
    for layer in range(200):
        counter.add(str(layer), np.arange(64), 64)
    done.set()
    reader.join()
    assert seen == sorted(seen)
    counts = read_counts(tmp_path / "experts")
    assert counts is not None
    assert counts.shape == (200, 64)
    assert (counts == 1).all()


def test_a_layer_of_another_width_is_refused(tmp_path: Path) -> None:
    counter = ExpertCounter(tmp_path / "experts.0")
    counter.add("first", np.array([0]), 8)
    with pytest.raises(
        ValueError, match=r"second has 4 experts and the layers before it 8.*HEARTH_EXPERT_LOAD"
    ):
        counter.add("second", np.array([0]), 4)


def test_record_counts_into_the_file_of_this_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: load._Recorder
) -> None:
    monkeypatch.delenv(load.VARIABLE, raising=False)
    assert not load.counting()
    monkeypatch.setenv(load.VARIABLE, str(tmp_path / "experts"))
    assert load.counting()
    load.record("layer", torch.tensor([[1, 3]], dtype=torch.int32), 4)
    load.record("layer", torch.tensor([[3, 0]]), 4)
    counts = read_counts(tmp_path / "experts")
    assert counts is not None
    assert counts.tolist() == [[1, 1, 0, 2]]
    assert (tmp_path / "experts.0").exists(), "one process alone is rank 0"


def test_a_file_that_cannot_be_written_ends_the_counting_and_no_more(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorder: load._Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(load.VARIABLE, str(tmp_path / "absent" / "experts"))
    # vLLM's logger, once configured, hands nothing on to the root.
    monkeypatch.setattr(load, "logger", logging.getLogger("test.hearth_moe"))
    for _ in range(2):
        load.record("layer", torch.tensor([0]), 4)
    assert len(caplog.records) == 1
    assert "counts no experts from here on" in caplog.text
    assert "absent" in caplog.text
