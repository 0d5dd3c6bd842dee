"""The GPU check: what it measures, judges and writes, with fakes; and the whole of it on two CPU runners."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from benchmarks import gpu_check
from benchmarks._gpu_models import SHAPES, choose, write_model
from benchmarks._gpu_report import Record, Turn, answers_changed, missed, relative_error, show
from benchmarks._gpu_stage import Answer, Subject, measure, spoken
from engine.runners.spec import RunnerSpec
from engine.scheduler.devices import Device
from engine.scheduler.warmup import Ask
from models.catalog import load_catalog
from models.prepare import MARKER, fingerprint_of, key_of

GIB = 2**30
H100 = Device("cuda:0", 84_825_604_096, "NVIDIA H100 80GB HBM3", (9, 0), nvlink=True)
HOST = Device("cpu:0", 128 * GIB)


def subject(name: str, planned: int = 10) -> Subject:
    spec = RunnerSpec(
        model=name, category="chat", engine="vllm", model_dir=Path("/m"), socket=Path(f"/s/{name}.sock")
    )
    return Subject(spec, Ask("/v1", "application/json", b"", lambda _: ""), "dummy", planned, 1)


class FakeStage:
    """Runners that are numbers: 10 bytes awake and 1 asleep each; the first answer is slow."""

    def __init__(self, changes: str = "") -> None:
        self.log: list[str] = []
        self.bytes: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        self.changes = changes

    async def start(self, subject: Subject) -> float:
        self.log.append(f"start {subject.name}")
        self.bytes[subject.name] = 10
        return 30.0

    async def ask(self, subject: Subject) -> Answer:
        name = subject.name
        assert self.bytes[name] == 10, "asked while asleep"
        count = self.asked[name] = self.asked.get(name, 0) + 1
        woken = any(line == f"wake {name}" for line in self.log)
        return Answer(
            3.0 if count == 1 else 0.5 if count == 2 else 0.25, "x" if woken and self.changes == name else "a"
        )

    async def sleep(self, subject: Subject) -> float:
        self.log.append(f"sleep {subject.name}")
        self.bytes[subject.name] = 1
        return 2.0

    async def wake(self, subject: Subject) -> float:
        self.log.append(f"wake {subject.name}")
        assert set(self.bytes.values()) == {1}, "another is awake"
        self.bytes[subject.name] = 10
        return 1.5

    async def used(self) -> int:
        return 100 + sum(self.bytes.values())


async def test_they_take_turns_and_each_thing_is_measured() -> None:
    stage = FakeStage()
    first, second = await measure(stage, [subject("a"), subject("b")], rounds=2, steady=3)
    turn = ["wake a", "sleep a", "wake b", "sleep b"]
    assert stage.log == ["start a", "sleep a", "start b", "sleep b", *turn, *turn]
    assert (second.used_bytes, second.used_asleep_bytes) == (10, 1)
    assert (first.start_s, first.cold_first_s, first.ready_first_s, first.steady_s) == (30, 3, 0.5, 0.25)
    assert (first.ready_ratio, first.wake_s, first.sleep_s, first.woken_first_s) == (2, 1.5, 2, 0.25)
    assert [turn.used_bytes for turn in first.turns] == [111, 111]
    assert missed([first, second]) == []
    assert json.loads(json.dumps(first.document()))["memory_error"] == 0.0


async def test_an_answer_that_sleeping_changed_is_told() -> None:
    records = await measure(FakeStage(changes="b"), [subject("a"), subject("b")], rounds=2, steady=1)
    (fault,) = missed(records)
    assert fault.startswith("b: after waking (round 1, 2)")


def test_just_over_and_just_under_the_budget() -> None:
    def fault(planned: int) -> list[str]:
        return missed([Record("m", "dummy", planned, 1, used_bytes=1000)])

    assert fault(1050) == [] and fault(950) == []
    assert "+5.1%" in fault(1051)[0] and "-5.1%" in fault(949)[0]
    assert "+inf%" in missed([Record("m", "dummy", 1, 1)])[0]
    assert relative_error(1000, 800) == 0.25 and answers_changed(Record("m", "dummy", 1, 1)) == []


def test_the_words_of_a_stream_without_its_ids() -> None:
    one = b'data: {"id":"1","choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    two = b'data: {"id":"1","choices":[{"delta":{"content":"Hi"}}]}\n\ndata: [DONE]\n\n'
    assert spoken(one + two) == b"Hi" == spoken((one + two).replace(b'"1"', b'"2"'))
    assert spoken(two.replace(b'"content"', b'"reasoning"')) == b"Hi"
    assert spoken(b'{"data": []}') == b'{"data": []}'
    ask = gpu_check.chat_ask(subject("a").spec)
    assert ask.fault(200, one + two) == "" and ask.fault(200, one) == "the stream has no end"
    assert ask.fault(500, b"") == "status 500"
    assert "no word" in ask.fault(200, one + b"data: [DONE]\n\n")


def test_prepared_models_of_the_profile_come_first(tmp_path: Path) -> None:
    entries = load_catalog().entries
    nothing = choose(entries, ["gpt-oss-20b", "whisper-large-v3"], tmp_path)
    assert [(c.entry.id, c.weights) for c in nothing] == [("qwen3-8b", None), ("llama-3.1-8b-instruct", None)]
    entry = entries["gpt-oss-20b"]
    folder = tmp_path / key_of(entry)
    folder.mkdir()
    (folder / MARKER).write_text(json.dumps({"fingerprint": fingerprint_of(entry), "source": "x"}))
    found = choose(entries, ["whisper-large-v3", "gpt-oss-20b"], tmp_path)
    assert [(c.entry.id, c.weights) for c in found] == [("gpt-oss-20b", folder), ("qwen3-8b", None)]


@pytest.mark.parametrize("name", SHAPES)
def test_made_up_weights_are_as_large_as_the_published_ones(name: str) -> None:
    """Parameters counted from the shape, two bytes each, against the catalog's weights."""
    s = SHAPES[name]
    hidden, heads, kv, width = (
        s["hidden_size"],
        s["num_attention_heads"],
        s["num_key_value_heads"],
        s["head_dim"],
    )
    attention = hidden * width * (2 * heads + 2 * kv)
    layer = attention + 3 * hidden * s["intermediate_size"] + 2 * hidden
    total = 2 * (s["num_hidden_layers"] * layer + 2 * s["vocab_size"] * hidden)
    entry = load_catalog().entries[name]
    assert entry.weights_bytes == pytest.approx(total, rel=0.002)
    assert entry.architecture == s["architectures"][0]
    assert entry.kv is not None and entry.kv.layers == s["num_hidden_layers"]
    assert entry.context_length == s["max_position_embeddings"]


def test_two_made_up_models_are_planned_on_one_gpu_in_turns(tmp_path: Path) -> None:
    config = gpu_check.own_config(tmp_path, tmp_path / "weights")
    subjects = gpu_check.gpu_subjects(config, load_catalog(), [HOST, H100, H100], tmp_path)
    assert [s.name for s in subjects] == ["qwen3-8b", "llama-3.1-8b-instruct"]
    for one in subjects:
        assert one.spec.can_sleep and one.spec.device == "cuda:0" and one.weights == "dummy"
        assert one.spec.options["args"]["load-format"] == "dummy"
        assert (one.spec.model_dir / "config.json").is_file()
        assert one.planned_bytes > 16 * GIB > 4 * GIB > one.planned_asleep_bytes > 0
    assert gpu_check.wanted_models(H100, HOST.memory_bytes) and gpu_check.result_name(H100) == "gpu-h100"
    smaller = Device("cuda:0", 25_757_220_864, "NVIDIA GeForce RTX 4090", (8, 9))
    assert len(gpu_check.gpu_subjects(config, load_catalog(), [HOST, smaller], tmp_path)) == 2
    odd = Device("cuda:0", 8 * GIB, "NVIDIA Odd (Ti) 8/GB")
    assert gpu_check.result_name(odd) == "gpu-odd-ti-8-gb"


def test_the_made_up_tokenizer_reads_and_writes(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = write_model(tmp_path / "m", {**SHAPES["qwen3-8b"], "vocab_size": 1000})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 1000 == AutoConfig.from_pretrained(folder).vocab_size
    ids = tokenizer.encode("Grüße", add_special_tokens=False)
    assert len(ids) == 7 and tokenizer.decode(ids) == "Grüße"
    assert tokenizer.decode([999]) and tokenizer.eos_token_id == 256
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert said == "<|user|>Hi<|end|><|assistant|>"


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "find_devices", lambda: [HOST])
    assert gpu_check.main([]) == 2
    assert "No NVIDIA GPU is to be seen here" in capsys.readouterr().out.replace("\n", " ")


def test_the_results_file_tells_card_command_and_versions() -> None:
    record = Record("m", "dummy", 10, 1, steady_first_s=[1.0], used_bytes=10, turns=[Turn(1, 1, 1, 1, True)])
    told = gpu_check.document(H100, [record], "python -m benchmarks.gpu_check", ["x"])
    assert told["gpu"] == {"kind": "H100", "product": H100.product, "memory_bytes": H100.memory_bytes}
    assert told["versions"]["torch"] and told["command"] and told["missed"] == ["x"]
    assert json.loads(json.dumps(told))["models"][0]["model"] == "m"
    screen = Console(file=io.StringIO(), width=120)
    show([record], screen, judged=True)
    assert isinstance(screen.file, io.StringIO) and "+0.0%" in screen.file.getvalue()


@pytest.mark.engines
def test_the_measurement_runs_on_cpu_runners(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The same code with real processes; nothing of them is left, and no results file is written."""
    monkeypatch.setattr(gpu_check, "write_result", lambda *_: pytest.fail("a rehearsal writes no results"))
    assert gpu_check.main(["--rehearse", "--rounds", "2", "--steady", "3"]) == 0
    told = capsys.readouterr().out
    assert "all-minilm-l6-v2" in told and "whisper-tiny-en" in told
    assert not [
        child for child in psutil.Process().children() if "engine.runners" in " ".join(child.cmdline())
    ]
