"""Standby models for real: four engines that never fit together, woken by requests, under load and kills."""

from __future__ import annotations

import base64
import io
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from tests.e2e.conftest import KEY, ROOT, Hearth, leavings, members, start
from tests.e2e.test_audio import WORDS, words

AUDIO, EMBEDDING, IMAGE, DETECTION = "whisper-tiny-en", "all-minilm-l6-v2", "tiny-image", "yolov8s-world"
MODELS = (AUDIO, EMBEDDING, IMAGE, DETECTION)
MIB = 2**20
#: What all keep asleep (2600 MiB by the plan's constants) and room for the largest to wake, little more.
ROOM = 3700 * MIB
SETTINGS = f"""
profile = "tiny"
[tiers]
cpu_memory_bytes = {ROOM}
min_residence_s = 1.0
wake_wait_s = 100.0
[models.smollm2-135m-instruct]
enabled = false
[models.smollm2-135m-code]
enabled = false
[models.tiny-vision]
enabled = false
""" + "".join(
    f'[models.{model}]\ntier = "standby"\nmemory_bytes = {1200 * MIB}\nmax_batch = 2\n' for model in MODELS
)


def embedded(client: openai.OpenAI) -> bool:
    texts = ["a cat", "a kitten", "a car crash"]
    cat, kitten, crash = (
        np.asarray(row.embedding) for row in client.embeddings.create(model=EMBEDDING, input=texts).data
    )
    return bool(cat @ kitten > 0.6 > 0.3 > cat @ crash)


def heard(client: openai.OpenAI) -> bool:
    with (ROOT / "tests" / "data" / "jfk.flac").open("rb") as sound:
        return words(client.audio.transcriptions.create(model=AUDIO, file=sound).text) == WORDS


def drawn(client: openai.OpenAI) -> bool:
    answer = client.images.generate(
        model=IMAGE, prompt="a red circle on a blue background", size="64x64", extra_body={"seed": 3}
    )
    assert answer.data
    picture = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).convert("RGB")
    middle, corner = np.asarray(picture).astype(int)[[32, 2], [32, 2]]
    return bool(middle[0] > 140 > middle[2] and corner[2] > 140 > corner[0])


def detected(client: openai.OpenAI) -> bool:
    from importlib.util import find_spec

    spec = find_spec("ultralytics")
    assert spec and spec.submodule_search_locations
    picture = Path(spec.submodule_search_locations[0], "assets", "bus.jpg").read_bytes()
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    answer = client.post("/detections", body={"model": DETECTION, "image": url}, cast_to=dict[str, Any])
    return "bus" in str(answer)


ASKS: dict[str, Callable[[openai.OpenAI], bool]] = {
    EMBEDDING: embedded,
    AUDIO: heard,
    IMAGE: drawn,
    DETECTION: detected,
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hearth]:
    folder = tmp_path_factory.mktemp("tiers")
    (folder / "hearth.toml").write_text(SETTINGS)
    running = start(folder, "--config", str(folder / "hearth.toml"))
    groups: set[int] = set()
    try:
        running.wait_ready(300)
        groups = running.groups()
        yield running
        groups |= running.groups()
    finally:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGINT)
            running.process.wait(90)
        else:  # a test has failed between two schedulers
            running.command("stop", "--now", check=False)
    assert not members(groups), "processes outlived Ctrl-C"
    assert not leavings(folder)


@pytest.fixture
def caller(house: Hearth) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=house.base_url, api_key=KEY, max_retries=4, timeout=150) as made:
        yield made


def states(house: Hearth) -> dict[str, str]:
    return {model["id"]: model["state"] for model in house.status()["models"]}


def within_room(status: dict[str, Any]) -> bool:
    return all(device["held_bytes"] <= device["room_bytes"] for device in status["devices"])


def test_each_sleeps_after_its_first_answer_and_wakes_when_asked(
    house: Hearth, caller: openai.OpenAI
) -> None:
    assert set(states(house).values()) == {"asleep"}
    pids = {model["id"]: model["pid"] for model in house.status()["models"]}
    for model, ask in ASKS.items():
        assert ask(caller), model
        status = house.status()
        assert within_room(status)
        assert next(m["state"] for m in status["models"] if m["id"] == model) == "ready"
    # They did not fit together, so some sleep again; and nothing was started anew for it.
    assert "asleep" in states(house).values()
    assert pids == {model["id"]: model["pid"] for model in house.status()["models"]}


def test_waking_and_sleeping_under_load_with_kills(house: Hearth) -> None:
    """Every request is answered rightly in the end, and the room is kept, though runners are killed."""
    ends = time.monotonic() + 25
    answered: Counter[str] = Counter()
    wrong: list[str] = []
    over: list[dict[str, Any]] = []
    seed = random.Random(7)

    def ask_on(model: str) -> None:
        with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=150) as client:
            while time.monotonic() < ends:
                try:
                    if not ASKS[model](client):
                        wrong.append(f"{model}: a wrong answer")
                    answered[model] += 1
                except openai.APIStatusError as error:
                    # A killed runner's requests are refused with a reason and a time, never lost or garbled.
                    known = error.status_code in (502, 503) and isinstance(error.body, dict)
                    if not known:
                        wrong.append(f"{model}: {error!r}")
                    time.sleep(0.2)
                except openai.APIConnectionError as error:
                    wrong.append(f"{model}: {error!r}")
                time.sleep(seed.uniform(0.0, 1.0))

    def look_on() -> None:
        while time.monotonic() < ends:
            status = house.status()
            if not within_room(status):
                over.append(status["devices"])
            time.sleep(0.3)

    base_url = house.base_url
    threads = [threading.Thread(target=ask_on, args=(model,)) for model in MODELS]
    threads.append(threading.Thread(target=look_on))
    for thread in threads:
        thread.start()
    for wanted in ("asleep", "ready"):
        time.sleep(6)
        _kill_one(house, wanted)
    for thread in threads:
        thread.join(200)
    assert not wrong, wrong[:5]
    assert not over, over[:1]
    with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=8, timeout=150) as client:
        for model, ask in ASKS.items():
            assert ask(client), model
    assert all(answered[model] for model in MODELS), answered


def test_a_killed_scheduler_leaves_the_sleepers_asleep_for_the_next(house: Hearth) -> None:
    before = {m["id"]: (m["pid"], m["state"]) for m in house.status()["models"]}
    os.kill(house.process.pid, signal.SIGKILL)
    house.process.wait(10)
    again = start(house.state_dir, "--config", str(house.state_dir / "hearth.toml"))
    house.process, house.output = again.process, again.output
    house.wait_ready(60)
    after = {m["id"]: (m["pid"], m["state"]) for m in house.status()["models"]}
    assert {name: pid for name, (pid, _) in after.items()} == {n: pid for n, (pid, _) in before.items()}
    assert "asleep" in {state for _, state in after.values()}
    with openai.OpenAI(base_url=house.base_url, api_key=KEY, max_retries=4, timeout=150) as client:
        for model, ask in ASKS.items():
            assert ask(client), model


def _kill_one(house: Hearth, state: str) -> None:
    found = [m["pid"] for m in house.status()["models"] if m["state"] == state and m["pid"]]
    if found:
        os.killpg(os.getpgid(found[0]), signal.SIGKILL)
