"""The catalog and its profiles, as shipped and as broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.runners.spec import RUNNER_MODULES
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
