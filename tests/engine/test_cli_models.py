"""`hearth models`: what it lists, shows and pulls, without a hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from engine.cli.app import app
from models import prepare_profile
from models.catalog import CATALOG_DIR, load_catalog
from models.entry import ModelEntry
from models.prepare import MARKER, Marker, fingerprint_of, key_of


@pytest.fixture
def hearth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in a folder without a configuration, with a state folder and no token of its own."""
    for name in ("HF_ENDPOINT", "HEARTH_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["models", *words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    monkeypatch.setenv("HEARTH_STATE_DIR", str(tmp_path / "state"))
    return run


@pytest.fixture
def pulled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of what was prepared instead of being downloaded."""
    ids: list[str] = []

    def prepare(entries: Iterable[ModelEntry], weights_dir: Path, offline: bool, endpoint: str) -> int:
        assert not offline
        for entry in entries:
            ids.append(entry.id)
            put(entry, weights_dir)
        return 0

    monkeypatch.setattr(prepare_profile, "prepare_entries", prepare)
    return ids


def put(entry: ModelEntry, weights_dir: Path) -> None:
    folder = weights_dir / key_of(entry)
    folder.mkdir(parents=True)
    marker = Marker(fingerprint=fingerprint_of(entry), source="test")
    (folder / MARKER).write_text(marker.model_dump_json())


def test_the_list_has_every_model_in_the_order_of_its_category(hearth: Any) -> None:
    code, text = hearth()
    ids = [line.split()[0] for line in text.splitlines()[1:] if line]
    entries = load_catalog().entries
    assert code == 0 and [name for name in ids if name in entries] and set(entries) <= set(ids)
    assert f"{len(entries)} of {len(entries)} models." in text
    assert ids.index("deepseek-r1") < ids.index("codestral-22b") < ids.index("gemma-3-27b-it")
    row = next(line for line in text.splitlines() if line.startswith("llama-3.3-70b-instruct"))
    assert row.split() == ["llama-3.3-70b-instruct", "chat", "70.5B", "128K", "136.9", "GiB", "*llama3.3"]


def test_filters_narrow_the_list(hearth: Any) -> None:
    _, text = hearth("--category", "vision", "--fits", "80GiB", "--json")
    found = {model["id"] for model in json.loads(text)}
    assert {"gemma-3-27b-it", "kimi-vl-a3b", "tiny-vision"} <= found
    assert not found & {"qwen3-vl-235b-a22b", "deepseek-r1"}
    _, text = hearth("--capability", "fim", "--capability", "tools", "--json")
    both = json.loads(text)
    assert both and all({"fim", "tools"} <= set(model["capabilities"]) for model in both)
    _, text = hearth("--fits", "24GB", "--category", "image", "--category", "audio", "--json")
    assert {model["category"] for model in json.loads(text)} == {"image", "audio"}
    assert "flux.1-dev" not in text


def test_json_tells_every_field_and_what_is_here(hearth: Any, tmp_path: Path) -> None:
    put(load_catalog().find("bge-large"), tmp_path / "state" / "weights")
    _, text = hearth("--json")
    models = {model["id"]: model for model in json.loads(text)}
    bge, r1 = models["bge-large-en-v1.5"], models["deepseek-r1"]
    assert bge["prepared"] and not r1["prepared"]
    assert ModelEntry.model_fields.keys() | {"least_bytes", "prepared"} == r1.keys()
    assert (r1["category"], r1["licence"], r1["gated"]) == ("chat", "mit", False)
    assert (r1["context_length"], r1["weights_bytes"]) == (163840, 688590631731)
    assert r1["kv"]["bytes_per_token"] == 70272 and r1["experts"] == {"count": 256, "per_token": 8}


def test_show_tells_one_model_whole(hearth: Any) -> None:
    code, text = hearth("show", "codestral-22b-v0.1")
    assert code == 0
    for part in (
        "codestral-22b",
        "mnpl-0.1, gated",
        "MistralForCausalLM",
        "41.4 GiB",
        "229376 bytes a token",
    ):
        assert part in text
    assert "[SUFFIX]{suffix}[PREFIX]{prefix}" in text
    assert "hearth models pull codestral-22b" in text.replace("\n", " ")
    _, text = hearth("show", "tiny-vision", "--json")
    assert json.loads(text)["prepared"] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "deepseek-r2"), "no model 'deepseek-r2' in models/catalog/. Did you mean deepseek-r1"),
        (("pull", "qwen3-32"), "no model 'qwen3-32' in models/catalog/. Did you mean qwen3-32b"),
        (("--category", "vison"), "no category 'vison'. Did you mean vision?"),
        (("--capability", "tool"), "no capability 'tool'. Did you mean tools?"),
        (("--category", "x"), "There are: audio, chat, code, detection, embedding, image, vision."),
        (("--fits", "eighty"), "'eighty' is no size. Write a number with a unit, for instance 80GiB"),
        (("--config", "none.toml"), "none.toml"),
    ],
)
def test_a_wrong_word_gets_the_right_ones(hearth: Any, words: tuple[str, ...], said: str) -> None:
    code, text = hearth(*words)
    assert code == 1 and said in text


def test_pull_prepares_what_is_missing_and_says_where_all_of_it_is(
    hearth: Any, tmp_path: Path, pulled: list[str]
) -> None:
    weights = tmp_path / "state" / "weights"
    put(load_catalog().find("bge-large"), weights)
    code, text = hearth("pull", "bge-large", "yolo11n", "tiny-vision")
    assert (code, pulled) == (0, ["yolo11n"])
    assert f"bge-large-en-v1.5: {weights / 'bge-large-en-v1.5'}\n" in text
    assert f"yolo11n: {weights / 'yolo11n'}\n" in text
    assert "tiny-vision: " in text


def test_a_gated_model_without_a_token_says_how_to_get_access_and_the_others_are_pulled(
    hearth: Any, pulled: list[str]
) -> None:
    code, text = hearth("pull", "gemma-3-27b", "yolo26n")
    assert (code, pulled) == (1, ["yolo26n"])
    assert "gemma-3-27b-it is gated (licence gemma) and there is no token here." in text
    assert "https://huggingface.co/google/gemma-3-27b-it\n" in text
    assert "HF_TOKEN=hf_… hearth models pull gemma-3-27b-it" in text


@pytest.mark.parametrize("way", ["token", "mirror", "prepared"])
def test_a_gated_model_is_pulled_with_a_token_from_a_mirror_or_not_at_all(
    hearth: Any, tmp_path: Path, pulled: list[str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "token":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    elif way == "mirror":
        monkeypatch.setenv("HEARTH_WEIGHTS__HUB_ENDPOINT", "http://mirror")
    else:
        put(load_catalog().find("embeddinggemma-300m"), tmp_path / "state" / "weights")
    code, _ = hearth("pull", "embeddinggemma-300m")
    assert (code, pulled) == (0, [] if way == "prepared" else ["embeddinggemma-300m"])


def test_a_disk_too_small_is_said_before_anything_is_fetched(
    hearth: Any, pulled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=600 * 2**30))
    code, text = hearth("pull", "deepseek-r1")
    assert (code, pulled) == (1, [])
    assert "take at least 641.3 GiB" in text and "600.0 GiB free" in text
    assert hearth("pull", "kimi-k2-6") == (0, text_of_pull("kimi-k2-6"))


def text_of_pull(name: str) -> str:
    return f"{name}: {Path.cwd() / 'state' / 'weights' / name}\n"


def test_an_offline_configuration_forbids_pulling(
    hearth: Any, pulled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEARTH_WEIGHTS__OFFLINE", "true")
    code, text = hearth("pull", "yolo11n")
    assert (code, pulled) == (1, []) and "weights.offline = true forbids downloads" in text


def test_an_interrupted_pull_says_that_it_goes_on(hearth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_profile, "prepare_entries", interrupted)
    code, text = hearth("pull", "yolo11n")
    assert code == 130 and "the same command goes on from there" in text


def test_entries_of_one_preparation_are_prepared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def prepare(entry: ModelEntry, weights_dir: Path, *_: object) -> Path:
        done.append(entry.id)
        return weights_dir / key_of(entry)

    monkeypatch.setattr(prepare_profile, "prepare", prepare)
    catalog = load_catalog(CATALOG_DIR)
    entries = [catalog.find(name) for name in ("tiny-chat", "tiny-code", "yolo11n")]
    assert prepare_profile.prepare_entries(entries, tmp_path, False) == 0
    assert done == ["smollm2-135m-instruct", "yolo11n"]
