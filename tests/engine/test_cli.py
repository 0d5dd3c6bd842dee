"""The command line: what it prints and its exit status, without any engine."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from engine.cli import doctor, tables
from engine.cli.app import app
from engine.cli.examples import curl_lines
from engine.cli.serve import Screen, first_key, look_into_database
from engine.config import Config
from engine.metering.database import DatabaseAwayError
from engine.metering.keys import digest_of, list_keys, revoke
from engine.metering.lookup import AccessError
from engine.metering.opening import opened
from engine.scheduler.status import ModelStatus, ProgressStatus, SchedulerStatus, Status


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.output


def status(state: str = "ready", **more: object) -> Status:
    model = ModelStatus.model_validate(
        {
            "id": "tiny",
            "category": "embedding",
            "engine": "sentence-transformers",
            "device": "cpu:0",
            "state": state,
            "since_s": 3.0,
            "memory_bytes": 3 * 1024**3,
            **more,
        }
    )
    return Status(
        scheduler=SchedulerStatus(pid=1, started=0.0),
        profile="p",
        base_url="http://127.0.0.1:1/v1",
        ready=state == "ready",
        models=[model],
    )


def printed(thing: object) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(thing)
    return out.getvalue()


def test_help_names_every_command() -> None:
    code, text = run("--help")
    assert code == 0
    for command in ("serve", "status", "stop", "logs", "doctor", "version", "keys"):
        assert command in text


def test_version_names_the_engines() -> None:
    code, text = run("version")
    assert code == 0
    assert "hearth 0.1.0" in text and "vllm 0.32.0" in text


def test_status_when_nothing_runs(tmp_path: Path) -> None:
    code, text = run("status", "--state-dir", str(tmp_path))
    assert code == 1 and "make serve" in text
    code, text = run("status", "--json", "--state-dir", str(tmp_path))
    assert code == 1 and json.loads(text)["running"] is False


def test_stop_when_nothing_runs(tmp_path: Path) -> None:
    code, text = run("stop", "--state-dir", str(tmp_path))
    assert code == 0 and "did not run" in text


def test_logs_of_an_unknown_model_name_the_nearest(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "whisper-tiny-en-0.log").write_text("one\ntwo\nthree\n")
    assert run("logs", "whisper-tiny-en", "-n", "2", "--state-dir", str(tmp_path)) == (0, "two\nthree\n")
    code, text = run("logs", "whisper-tiny", "--state-dir", str(tmp_path))
    assert code == 0 and "three" in text
    code, text = run("logs", "wisper-tiny-em-0", "--state-dir", str(tmp_path))
    assert code == 1 and "Did you mean whisper-tiny-en-0" in text


def test_a_bad_configuration_ends_with_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    file.write_text("prot = 1\n")
    code, text = run("serve", "--config", str(file))
    assert code == 1 and "Did you mean 'port'?" in text and "Traceback" not in text
    code, text = run("serve", "--profile", "tinny", "--state-dir", str(tmp_path))
    assert code == 1 and "Did you mean tiny" in text


def test_keys_are_shown_once_and_kept_hashed(tmp_path: Path) -> None:
    code, text = run("keys", "create", "for a test", "--state-dir", str(tmp_path))
    key = text.strip().splitlines()[-1]
    assert code == 0 and key.startswith("hearth-")
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert digest_of(key).encode() in files["hearth.db"]
    assert not any(key.encode() in content for content in files.values())
    code, text = run("keys", "list", "--state-dir", str(tmp_path))
    assert "for a test" in text and key not in text


async def test_the_first_key(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path)
    key = await first_key(config)
    assert key is not None and await first_key(config) is None
    given = Config(state_dir=tmp_path, api_key="my-own-key")
    assert await first_key(given) == "my-own-key" == await first_key(given)
    async with opened(config) as database:
        assert len(await list_keys(database)) == 2
        await revoke(database, "my-own-key")
    with pytest.raises(AccessError, match="is revoked"):
        await first_key(given)


async def test_serving_begins_while_the_database_is_away_if_keys_are_known(tmp_path: Path) -> None:
    away = Config(state_dir=tmp_path, metering={"database_url": "postgresql://nobody@127.0.0.1:9/nothing"})
    with pytest.raises(DatabaseAwayError):
        await look_into_database(away)
    away.keys_snapshot.write_text("{}")
    key, (told,) = await look_into_database(away)
    assert key is None
    assert "the keys that were known before" in told


@pytest.mark.parametrize(
    ("state", "more", "expected"),
    [
        ("starting", {"reason": "loading the model", "eta_s": 12.0}, "loading the model; about 12 s left"),
        ("backoff", {"reason": "exit status 1", "restarts": 2}, "exit status 1; 2 restarts"),
        ("ready", {}, "3.0 GiB"),
    ],
)
def test_the_table_says_why(state: str, more: dict[str, object], expected: str) -> None:
    assert expected in printed(tables.models(status(state, **more)))


def test_the_table_shows_progress() -> None:
    progress = ProgressStatus(stage="download", done=5 * 1024**2, total=10 * 1024**2, unit="bytes")
    assert "download 5 MiB of 10 MiB" in printed(tables.models(status("preparing", progress=progress)))


def test_plain_lines_tell_each_change_once_and_then_how_to_use_it() -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=200), "hearth-key", live=False)
    for state in ("starting", "starting", "warming", "ready", "ready", "backoff", "ready"):
        screen.show(status(state))
    text = out.getvalue()
    assert text.count("tiny: starting") == 1
    assert text.count("Every model is warm") == 1
    assert "http://127.0.0.1:1/v1" in text and "hearth-key" in text
    assert "\x1b" not in text
    assert text.index("Every model is warm") < text.index("tiny: backoff")


def test_a_curl_line_for_every_category() -> None:
    categories = ("chat", "code", "vision", "image", "audio", "embedding", "detection")
    lines = curl_lines([(category, category) for category in categories], "http://h/v1", "k")
    assert [category for category, _ in lines] == list(categories)
    assert all(line.startswith("curl -s http://h/v1/") and "Bearer k" in line for _, line in lines)


def test_a_new_key_is_shown_even_when_nothing_became_ready() -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=200), "hearth-key", live=False)
    screen.show(status("starting"))
    screen.part()
    assert "hearth-key" in out.getvalue()
    given = io.StringIO()
    Screen(Console(file=given, width=200), "my-key", live=False, given=True).part()
    assert given.getvalue() == ""


def test_doctor_looks_at_what_would_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.cli.profile.find_gpus", list)
    off = {"enabled": False}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    config = Config.model_validate(
        {
            "state_dir": tmp_path,
            "profile": "tiny",
            "models": {
                "whisper-tiny-en": off,
                "yolov8s-world": off,
                "all-minilm-l6-v2": {"path": tmp_path / "own"},
            },
        }
    )
    found = {check.name: check for check in doctor.examine(config)}
    assert "(5 models)" in found["profile"].found
    waiting = found["weights"].found
    assert "smollm2-135m-instruct" in waiting
    # Left out, given as a folder, and lying in the repository: none of them is to be fetched.
    for name in ("whisper-tiny-en", "all-minilm-l6-v2", "tiny-vision"):
        assert name not in waiting


def test_doctor_says_why_a_profile_cannot_stand_here(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path, profile="tinny")
    check = next(check for check in doctor.examine(config) if check.name == "profile")
    assert check.state == "missing" and "Did you mean tiny" in check.found and check.next_step
