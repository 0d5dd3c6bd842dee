"""The catalog and its profiles, as shipped and as broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.runners.spec import RUNNER_MODULES, RunnerSpec
from engine.runners.vllm_arguments import kv_cache_bytes
from models.catalog import (
    Catalog,
    CatalogError,
    choose_profile,
    load_catalog,
    load_profile,
    load_profiles,
    merge_options,
    profile_names,
)
from models.entry import ModelEntry, PackageSource
from models.profile import Needs, Profile, ProfileModel

CATEGORIES = ["chat", "code", "vision", "image", "audio", "embedding", "detection"]
GIB = 2**30


def entry(name: str, *aliases: str) -> ModelEntry:
    source = {"kind": "local", "path": "x"}
    return ModelEntry.model_validate(
        {"id": name, "aliases": aliases, "category": "chat", "engine": "vllm", "sources": [source]}
    )


def profile(name: str, gpus: int = 0, gpu_gib: int = 0, host_gib: int = 8) -> Profile:
    needs = Needs(gpus=gpus, gpu_memory_bytes=gpu_gib * GIB, memory_bytes=host_gib * GIB)
    return Profile(name=name, needs=needs, models=[ProfileModel(id="a")])


def test_tiny_serves_every_category_once_under_its_alias() -> None:
    catalog = load_catalog()
    entries = [catalog.find(model.id) for model in load_profile("tiny").models]
    assert [e.category for e in entries] == CATEGORIES
    assert [catalog.find(f"tiny-{category}").id for category in CATEGORIES] == [e.id for e in entries]
    assert all(e.engine in RUNNER_MODULES for e in catalog.entries.values())


def test_tiny_fits_its_memory_budget() -> None:
    catalog, tiny = load_catalog(), load_profile("tiny")
    needed = sum(m.memory_bytes or catalog.find(m.id).memory_bytes for m in tiny.models)
    assert 0 < needed <= tiny.needs.memory_bytes == 12 * GIB


def test_chat_and_code_share_one_preparation() -> None:
    catalog = load_catalog()
    chat, code = catalog.find("tiny-chat"), catalog.find("tiny-code")
    assert (
        chat.weights_key == code.weights_key and chat.sources == code.sources and chat.convert == code.convert
    )


def test_every_packaged_file_is_pinned_by_its_sha256() -> None:
    for model in load_catalog().entries.values():
        for source in model.sources:
            if isinstance(source, PackageSource):
                for part in (source, *source.extra):
                    assert any(len(digest) == 64 for digest in part.files.values()), (model.id, part.package)
                    assert all(m.endswith("/") or len(d) == 64 for m, d in part.files.items()), model.id


def test_every_profile_names_known_models_only() -> None:
    catalog = load_catalog()
    assert "tiny" in profile_names()
    for each in load_profiles():
        assert [catalog.find(model.id).id for model in each.models] == [model.id for model in each.models]


#: Published weights (GiB) and KV cache of one token (bytes) of the GPU profiles' vLLM models: from their own
#: configurations, not from the catalog.
FACTS = {
    "qwen3-0.6b": (1.40, 114688),
    "gpt-oss-20b": (12.8, 49152),
    "qwen2.5-coder-1.5b": (2.88, 28672),
    "qwen2.5-coder-7b": (14.19, 57344),
    "qwen3-vl-2b": (3.96, 114688),
    "qwen3-vl-8b": (16.33, 147456),
}
#: Those for any GPU of a size; those for certain machines are in tests/planner and tests/scheduler.
GPU_PROFILES = [p for p in load_profiles() if p.needs.gpus and not p.needs.nodes]


@pytest.mark.parametrize("gpu", GPU_PROFILES, ids=lambda p: p.name)
def test_a_gpu_profile_serves_every_category_within_its_gpus(gpu: Profile) -> None:
    catalog = load_catalog()
    entries = [catalog.find(model.id) for model in gpu.models]
    assert [entry.category for entry in entries] == CATEGORIES
    budgets = [
        model.memory_bytes or entry.memory_bytes for model, entry in zip(gpu.models, entries, strict=True)
    ]
    assert sum(budgets) <= gpu.needs.gpus * gpu.needs.gpu_memory_bytes
    assert not any(entry.gated or "non-commercial" in entry.licence for entry in entries)


@pytest.mark.parametrize("gpu", GPU_PROFILES, ids=lambda p: p.name)
def test_each_vllm_budget_leaves_a_cache_for_the_longest_context(gpu: Profile) -> None:
    catalog = load_catalog()
    for model in gpu.models:
        entry = catalog.find(model.id)
        if entry.engine != "vllm":
            continue
        gib, token = FACTS[model.id]
        spec = RunnerSpec(
            model=entry.id,
            category=entry.category,
            engine=entry.engine,
            model_dir=Path("/x"),
            socket=Path("/x.sock"),
            device="cuda:0",
            memory_bytes=model.memory_bytes or entry.memory_bytes,
            options=merge_options(entry.options, model.options),
        )
        assert model.context_length is not None and model.context_length <= (entry.context_length or 0)
        assert kv_cache_bytes(spec, int(gib * GIB)) >= token * model.context_length, model.id


def test_a_24_gb_and_an_80_gb_card_get_their_profiles() -> None:
    profiles = load_profiles()
    host = 256 * GIB
    # As nvidia-smi reports them, MiB: L4, RTX 4090, H100, two H100, and none.
    assert choose_profile(profiles, [23034 << 20], host) == "gpu-24g"
    assert choose_profile(profiles, [24564 << 20], host) == "gpu-24g"
    assert choose_profile(profiles, [81559 << 20], host) == "gpu-80g"
    assert choose_profile(profiles, [81559 << 20] * 2, host) == "gpu-80g"
    assert choose_profile(profiles, [], 16 * GIB) == "tiny"
    # The smaller tiny-moe is taken by its name only.
    with pytest.raises(CatalogError, match="the smallest, 'tiny', asks for 12"):
        choose_profile(profiles, [], 8 * GIB)


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(CatalogError, match=r"no model 'tiny-chatt'.*Did you mean tiny-chat"):
        load_catalog().find("tiny-chatt")
    with pytest.raises(CatalogError, match=r"no profile 'tinny'.*Did you mean tiny"):
        load_profile("tinny")


def test_two_entries_may_not_share_a_name() -> None:
    with pytest.raises(CatalogError, match=r"'b' names both a and b"):
        Catalog([entry("a", "b"), entry("b")])


def test_wrong_files_are_named_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("not = = toml")
    with pytest.raises(CatalogError, match=r"x.toml is not valid TOML"):
        load_catalog(tmp_path)
    file.write_text(
        '[[model]]\nid = "a"\ncategory = "chat"\nengine = "vllm"\nsources = []\nlicense = "mit"\n'
    )
    with pytest.raises(CatalogError, match=r"a: unknown key 'license'; did you mean 'licence'") as error:
        load_catalog(tmp_path)
    assert "sources" in str(error.value)
    file.write_text('[[models]]\nid = "a"\n')
    with pytest.raises(CatalogError, match=r"unknown table 'models'"):
        load_catalog(tmp_path)
    file.unlink()
    with pytest.raises(CatalogError, match=r"no model entries"):
        load_catalog(tmp_path)


def test_a_profile_must_carry_its_files_name_and_no_model_twice(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "b"\n[[models]]\nid = "x"\n')
    with pytest.raises(CatalogError, match=r"differs from the file's name"):
        load_profile("a", tmp_path)
    (tmp_path / "a.toml").write_text('name = "a"\n[[models]]\nid = "x"\n[[models]]\nid = "x"\n')
    with pytest.raises(CatalogError, match=r"x listed twice"):
        load_profile("a", tmp_path)


@pytest.mark.parametrize(
    ("gpus", "host_gib", "expected"),
    [
        ([], 64, "cpu"),
        ([24], 64, "small"),
        ([79, 79], 64, "small"),
        ([80], 64, "large"),
        ([80, 24], 64, "large"),
        ([24, 24], 64, "pair"),
        ([80, 80], 64, "large"),
        ([80], 16, "small"),
        ([8], 64, "cpu"),
    ],
)
def test_the_largest_fitting_profile_is_chosen(gpus: list[int], host_gib: int, expected: str) -> None:
    profiles = [profile("cpu"), profile("small", 1, 24, 16), profile("large", 1, 80, 32)]
    if expected == "pair":
        profiles.append(profile("pair", 2, 24, 32))
    memory = [size * GIB for size in gpus]
    assert choose_profile(profiles, memory, host_gib * GIB) == expected


def test_a_machine_too_small_for_all_is_told_what_the_smallest_asks_for() -> None:
    with pytest.raises(CatalogError, match=r"with 4.0 GiB of memory: the smallest, 'cpu', asks for 8.0 GiB"):
        choose_profile([profile("cpu"), profile("big", 1, 24)], [], 4 * GIB)


def test_options_merge_table_by_table() -> None:
    base = {"args": {"a": 1, "b": 2}, "kv": 1}
    assert merge_options(base, {"args": {"b": 3}}, {"kv": 2}) == {"args": {"a": 1, "b": 3}, "kv": 2}
    assert base == {"args": {"a": 1, "b": 2}, "kv": 1}
