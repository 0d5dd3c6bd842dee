"""The shipped catalog: which models it has, and that the figures of each agree with one another."""

# ruff: noqa: RUF001 - DeepSeek's tokens have fullwidth bars.
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from engine.gateway.fim import write_prompt
from engine.runners.spec import Category
from models.catalog import ROOT, CatalogError, load_catalog
from models.entry import FillInTheMiddle, HubSource, LocalSource, ModelEntry, PackageSource
from models.facts import Experts, KvCache, SlidingLayers

CATALOG = load_catalog()
ENTRIES = list(CATALOG.entries.values())
#: Those of the tiny profile: their weights are made or measured here, not looked up.
TINY = {CATALOG.find(f"tiny-{category}").id for category in get_args(Category)}
BIG = [entry for entry in ENTRIES if entry.id not in TINY]
GUIDE = (ROOT / "docs" / "models.md").read_text()
GIB = 2**30


def by_id(entry: ModelEntry) -> str:
    return entry.id


def make(**fields: Any) -> ModelEntry:
    source = {"kind": "local", "path": "x"}
    return ModelEntry.model_validate(
        {"id": "a", "category": "chat", "engine": "vllm", "sources": [source], **fields}
    )


def test_it_has_sixty_models_and_more_over_all_seven_categories() -> None:
    counts = Counter(entry.category for entry in ENTRIES)
    assert len(ENTRIES) >= 60
    assert set(counts) == set(get_args(Category))
    assert min(counts.values()) >= 5


@pytest.mark.parametrize(
    ("name", "category", "repo"),
    [
        ("deepseek-r1", "chat", "deepseek-ai/DeepSeek-R1"),
        ("deepseek-v4-flash", "chat", "deepseek-ai/DeepSeek-V4-Flash"),
        ("kimi-k2-6", "chat", "moonshotai/Kimi-K2.6"),
        ("kimi-k2.6", "chat", "moonshotai/Kimi-K2.6"),
        ("glm-5", "chat", "zai-org/GLM-5-FP8"),
        ("gpt-oss-120b", "chat", "openai/gpt-oss-120b"),
        ("gpt-oss-20b", "chat", "openai/gpt-oss-20b"),
        ("llama-3.3-70b", "chat", "meta-llama/Llama-3.3-70B-Instruct"),
        ("llama-3-3-70b-instruct", "chat", "meta-llama/Llama-3.3-70B-Instruct"),
        ("qwen3-32b", "chat", "Qwen/Qwen3-32B"),
        ("kimi-vl-a3b", "vision", "moonshotai/Kimi-VL-A3B-Instruct"),
        ("gemma-3-27b-it", "vision", "google/gemma-3-27b-it"),
        ("whisper-large-v3", "audio", "Systran/faster-whisper-large-v3"),
        ("whisper-large-v3-turbo", "audio", "mobiuslabsgmbh/faster-whisper-large-v3-turbo"),
        ("flux.1-dev", "image", "black-forest-labs/FLUX.1-dev"),
        ("flux-1-schnell", "image", "black-forest-labs/FLUX.1-schnell"),
        ("bge-large", "embedding", "BAAI/bge-large-en-v1.5"),
        ("qwen2.5-coder-32b", "code", "Qwen/Qwen2.5-Coder-32B-Instruct"),
        ("codestral-22b", "code", "mistralai/Codestral-22B-v0.1"),
        ("starcoder2-15b", "code", "bigcode/starcoder2-15b"),
    ],
)
def test_a_known_model_is_found_by_the_name_people_write(name: str, category: str, repo: str) -> None:
    entry = CATALOG.find(name)
    assert entry.category == category
    assert [source.repo for source in entry.sources if isinstance(source, HubSource)] == [repo]


@pytest.mark.parametrize("family", ["yolo11", "yolo26"])
def test_a_yolo_family_is_there_in_all_sizes_from_a_local_file_or_the_hub(family: str) -> None:
    for letter in "nsmlx":
        entry = CATALOG.find(family + letter)
        local, hub = entry.sources
        assert isinstance(local, LocalSource) and local.path.endswith(f"{entry.id}.pt")
        assert isinstance(hub, HubSource) and hub.files == [f"{entry.id}.pt"]


def test_image_pro_is_the_largest_image_model_that_is_open_and_not_gated() -> None:
    chosen = CATALOG.find("image-pro")
    openly = [
        entry
        for entry in ENTRIES
        if entry.category == "image" and entry.licence in ("apache-2.0", "mit") and entry.gated is False
    ]
    assert chosen == max(openly, key=lambda entry: entry.parameters or 0)


@pytest.mark.parametrize("entry", ENTRIES, ids=by_id)
def test_every_model_can_be_planned_and_says_what_it_is(entry: ModelEntry) -> None:
    assert entry.memory_bytes > 0 and entry.least_bytes
    assert entry.title and entry.capabilities and entry.licence
    assert len(set(entry.capabilities)) == len(entry.capabilities)
    assert ("fim" in entry.capabilities) == (entry.fim is not None)
    assert ("tools" in entry.capabilities) == (entry.tool_parser is not None)
    if entry.reasoning_parser:
        assert "reasoning" in entry.capabilities
    if entry.engine == "vllm" and entry.category != "code":
        assert "chat" in entry.capabilities
    assert ("vision" in entry.capabilities) or entry.category != "vision"


@pytest.mark.parametrize("entry", BIG, ids=by_id)
def test_every_looked_up_model_has_its_figures_and_their_source(entry: ModelEntry) -> None:
    assert entry.architecture and entry.facts and entry.parameters and entry.weights_bytes
    assert set(entry.unverified) <= ModelEntry.model_fields.keys() | {
        name for name in entry.unverified if name.startswith("options.")
    }
    if entry.engine == "vllm":
        assert entry.kv is not None and entry.context_length
    # From half a byte to four bytes a parameter: anything else is a slip of the pen.
    assert 0.45 <= entry.weights_bytes / entry.parameters <= 4.2


@pytest.mark.parametrize("entry", BIG, ids=by_id)
def test_a_hub_source_fetches_no_second_copy_and_code_only_where_it_is_run(entry: ModelEntry) -> None:
    runs_code = entry.options.get("args", {}).get("trust-remote-code", False)
    for source in entry.sources:
        assert not isinstance(source, PackageSource)
        if isinstance(source, HubSource) and entry.engine in ("vllm", "diffusers"):
            assert source.files and "*" not in source.files
            assert ("*.py" in source.files) == runs_code


def test_a_chat_template_named_by_an_entry_is_there() -> None:
    named = [e.options["chat_template"] for e in ENTRIES if "chat_template" in e.options]
    assert named and all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("qwen2.5-coder-7b", "<|fim_prefix|>A<|fim_suffix|>B<|fim_middle|>"),
        ("qwen2.5-coder-32b", "<|fim_prefix|>A<|fim_suffix|>B<|fim_middle|>"),
        ("starcoder2-3b", "<fim_prefix>A<fim_suffix>B<fim_middle>"),
        ("codestral-22b", "[SUFFIX]B[PREFIX]A"),
        ("deepseek-coder-v2-lite", "<｜fim▁begin｜>A<｜fim▁hole｜>B<｜fim▁end｜>"),
    ],
)
def test_each_code_model_fills_in_by_its_own_template(name: str, prompt: str) -> None:
    fim = CATALOG.find(name).fim
    assert fim is not None and fim.stop
    assert write_prompt(fim.template, "A", "B") == prompt


#: Published: vLLM's and its recipes' figures for these, and what a GPU of each size holds at 0.92.
H100, H200 = 80 * GIB, round(140.4 * GIB)


@pytest.mark.parametrize(
    ("name", "gpu", "fits"),
    [
        ("deepseek-r1", H200, False),
        ("llama-3.3-70b", H200, False),
        ("gpt-oss-120b", H100, True),
        ("qwen3-32b", H100, True),
        ("gemma-3-27b-it", H100, True),
        ("gemma-3-27b-it", 24 * GIB, False),
        ("flux.2-dev", H100, False),
        ("flux.2-dev", H200, True),
        ("llama-3.1-8b", 24 * GIB, True),
        ("yolo11n", 2 * GIB, True),
    ],
)
def test_what_fits_one_gpu(name: str, gpu: int, fits: bool) -> None:
    assert CATALOG.find(name).fits(gpu) is fits


def test_the_kv_cache_of_published_models() -> None:
    kimi, flash = CATALOG.find("kimi-k2-6").kv, CATALOG.find("deepseek-v4-flash").kv
    assert kimi is not None and flash is not None and flash.fp8_bytes_per_token is not None
    # vLLM's recipe: 715 072 tokens for Kimi K2 under TP8 on H200, where some 47 GiB a GPU are left.
    assert 715_072 * kimi.bytes_per_token == pytest.approx(46.8 * GIB, rel=0.01)
    # One million tokens of DeepSeek V4 Flash in an fp8 cache.
    assert 2**20 * flash.fp8_bytes_per_token == pytest.approx(3.8 * GIB, rel=0.02)


def test_kv_terms_that_contradict_their_product_are_refused() -> None:
    assert KvCache(bytes_per_token=327680, layers=80, kv_heads=8, head_dim=128).reckoned == 327680
    with pytest.raises(ValidationError, match="bytes_per_token is 1000, but its terms give 327680"):
        KvCache(bytes_per_token=1000, layers=80, kv_heads=8, head_dim=128)
    with pytest.raises(ValidationError, match="per_token is 9, of 8 experts"):
        Experts(count=8, per_token=9)


def test_windows_and_indexers_count_beside_the_growing_layers() -> None:
    window = SlidingLayers(layers=52, window=1024, kv_heads=16, head_dim=128)
    kv = KvCache(bytes_per_token=81920, indexer_bytes_per_token=80, sliding=window)
    assert window.bytes_per_sequence == 52 * 1024 * 2 * 16 * 128 * 2
    assert kv.bytes_of(100, sequences=3) == 100 * 82000 + 3 * window.bytes_per_sequence
    assert kv.reckoned is None and not kv.is_mla


def test_memory_is_reckoned_where_it_is_not_given() -> None:
    kv = {"bytes_per_token": 1000}
    small = make(weights_bytes=GIB, kv=kv, context_length=20000)
    assert small.memory_bytes == GIB + 3 * GIB + 20000 * 1000
    assert small.least_bytes == GIB + 3 * GIB + 8192 * 1000
    assert make(weights_bytes=GIB, options={"reserve_bytes": 5}).memory_bytes == GIB + 5
    assert make(weights_bytes=GIB, memory_bytes=7).memory_bytes == 7
    assert make().least_bytes is None and not make().fits(10**15)
    assert make(memory_bytes=92).fits(100) and not make(memory_bytes=93).fits(100)


def test_a_parser_may_be_given_as_a_field_or_an_option_but_not_twice_differently() -> None:
    field = make(tool_parser="hermes", reasoning_parser="qwen3", options={"args": {"dtype": "auto"}})
    args = {"enable-auto-tool-choice": True, "tool-call-parser": "hermes", "reasoning-parser": "qwen3"}
    assert field.options["args"] == {"dtype": "auto", **args}
    assert make(options={"args": {"tool-call-parser": "mistral"}}).tool_parser == "mistral"
    # What is written down as JSON for the preparation reads back the same.
    assert ModelEntry.model_validate_json(field.model_dump_json()) == field
    with pytest.raises(
        ValidationError, match=r"tool_parser is 'a', but options.args.tool-call-parser is 'b'"
    ):
        make(tool_parser="a", options={"args": {"tool-call-parser": "b"}})


def fields_of(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


@pytest.mark.parametrize(
    "model",
    [ModelEntry, KvCache, SlidingLayers, Experts, FillInTheMiddle, LocalSource, HubSource, PackageSource],
)
def test_the_guide_describes_every_field(model: type[BaseModel]) -> None:
    documented = set(re.findall(r"^\| `([a-z0-9_]+)`", GUIDE, flags=re.MULTILINE))
    assert set(fields_of(model)) <= documented


def test_the_guide_names_every_capability_and_every_model_left_out_is_not_there() -> None:
    for entry in ENTRIES:
        assert all(f"`{capability}`" in GUIDE for capability in entry.capabilities), entry.id
    with pytest.raises(CatalogError):
        CATALOG.find("qwen3-tts-1.7b")


def test_the_guides_example_is_a_valid_entry(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(\[\[model\]\].*?)```", GUIDE, flags=re.DOTALL)
    assert example is not None
    (tmp_path / "x.toml").write_text(example[1])
    [entry] = load_catalog(tmp_path).entries.values()
    assert entry.tool_parser and entry.kv is not None
