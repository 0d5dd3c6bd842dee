"""Conversions by name, and what SmolLM2's asks for; its outcome is tried by the engines tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from models import convert
from models.convert import CONVERSIONS, ConversionError, find


def test_every_conversion_has_its_function() -> None:
    assert [callable(find(name)) for name in CONVERSIONS] == [True] * len(CONVERSIONS)
    with pytest.raises(ConversionError, match=r"no conversion 'none'. Known: smollm2, whisper"):
        find("none")


def test_smollm2_wants_one_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"expected one .gguf file, got \['a.bin'\]"):
        find("smollm2")({"a.bin": tmp_path / "a.bin"}, tmp_path, lambda message, share: None)


def test_a_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = find("smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match=r"needs the package gguf; run `pip install gguf`"):
        run({"a.gguf": tmp_path / "a.gguf"}, tmp_path, lambda message, share: None)


def test_versions_are_whole_numbers_that_can_be_raised() -> None:
    assert all(isinstance(version, int) and version >= 1 for version in convert.CONVERSIONS.values())
