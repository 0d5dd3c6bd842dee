"""The configuration: defaults, file, environment, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import example
from engine.config import ROOT, Config, ConfigError, load


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("HEARTH_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "hearth.toml"
    file.write_text(text)
    return file


def test_defaults() -> None:
    config = load()
    assert (config.host, config.port, config.gateway.workers) == ("127.0.0.1", 8000, 1)


def test_the_example_file_is_current_and_says_the_defaults() -> None:
    file = ROOT / "hearth.example.toml"
    assert file.read_text() == example.render(), "run `python -m engine.example > hearth.example.toml`"
    assert load(file) == Config()


def test_file_then_override_then_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "port = 1\nhost = 'a'\n[gateway]\nworkers = 2\ndrain_s = 7\n")
    assert load(file, host="b").host == "b"
    assert load(file, host=None).host == "a"
    monkeypatch.setenv("HEARTH_PORT", "3")
    monkeypatch.setenv("HEARTH_GATEWAY__WORKERS", "5")
    monkeypatch.setenv("HEARTH_API_KEY", "secret")
    config = load(file, port=2)
    assert config.port == 3
    assert (config.gateway.workers, config.gateway.drain_s) == (5, 7)
    assert config.api_key is not None and "secret" not in repr(config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot = 1", "Did you mean 'port'?"),
        ("[gateway]\nworker = 2", "'gateway.worker'. Did you mean 'workers'?"),
        ("[models.x]\nreplica = 2", "'models.x.replica'. Did you mean 'replicas'?"),
        ("[scedule]\nx = 1", "Did you mean 'scheduler'?"),
        ("port = 'x'", "port: Input should be a valid integer"),
        ("port = 70000", "less than or equal to 65535"),
        ("port = ", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_next_step(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + expected.replace("?", r"\?").replace(".", r"\.")):
        load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("HEARTH_PROT", "Did you mean HEARTH_PORT"),
        ("HEARTH_GATEWAY__WORKER", "Did you mean HEARTH_GATEWAY__WORKERS"),
    ],
)
def test_an_unknown_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, expected: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError, match=expected):
        load()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        load(tmp_path / "nowhere.toml")


def test_state_folders_have_short_sockets_of_their_own(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    one, other = load(state_dir=deep), load(state_dir=tmp_path)
    assert len(str(one.control_socket)) < 107
    assert one.runtime_dir != other.runtime_dir
