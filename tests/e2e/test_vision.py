"""Vision: drawn scenes named rightly, by data URL and http URL, in words and in JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest

from models.tiny.vision.evaluate import answer_by, score
from models.tiny.vision.exam import sample_tasks
from tests.e2e.conftest import KEY
from tests.e2e.pictures import blue_circles, data_url, red_square

MODEL = "tiny-vision"


def ask(client: openai.OpenAI, text: str, url: str, **options: Any) -> str:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": text},
                    {"type": "image_url", "image_url": {"url": url}},
                ],
            }
        ],
        temperature=0,
        max_tokens=64,
        **options,
    )
    return answer.choices[0].message.content or ""


@pytest.fixture(scope="module")
def picture_server() -> Iterator[str]:
    """A web server with one picture and a redirect to it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that http.server calls
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("location", "/red.png")
                self.end_headers()
                return
            data = red_square()
            self.send_response(200 if self.path == "/red.png" else 404)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_red_square_by_data_url(client: openai.OpenAI) -> None:
    said = ask(client, "What shape and colour is in this image?", data_url(red_square()))
    assert "red" in said and "square" in said


def test_how_many_circles(client: openai.OpenAI) -> None:
    said = ask(client, "How many circles are there?", data_url(blue_circles(3))).lower()
    assert "3" in said or "three" in said


@pytest.mark.parametrize("path", ["/red.png", "/moved"])
def test_a_picture_by_http_url(client: openai.OpenAI, picture_server: str, path: str) -> None:
    said = ask(client, "What shape and colour is in this image?", picture_server + path)
    assert "red" in said and "square" in said


def test_a_url_that_cannot_be_fetched(client: openai.OpenAI, picture_server: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "What is this?", picture_server + "/nothing.png")
    assert caught.value.param == "messages.[0].content.[1].image_url.url"


def test_the_seed_program_of_a_vision_assistant(client: openai.OpenAI) -> None:
    """Seed program (b): text and image_url with a JSON object as the answer's form."""
    said = ask(
        client,
        "Describe the picture as JSON with the keys shape, color and count.",
        data_url(red_square()),
        response_format={"type": "json_object"},
    )
    found = json.loads(said)
    assert found["shape"].rstrip("s") == "square" and found["color"] == "red"


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "shape": {"type": "string"},
            "color": {"type": "string"},
            "count": {"type": "integer"},
        },
        "required": ["shape", "color", "count"],
        "additionalProperties": False,
    }
    said = ask(
        client,
        "What is in the picture?",
        data_url(red_square()),
        response_format={"type": "json_schema", "json_schema": {"name": "scene", "schema": schema}},
    )
    assert json.loads(said) == {"shape": "square", "color": "red", "count": 1}


def test_a_schema_with_a_list_ends(client: openai.OpenAI) -> None:
    item = {
        "type": "object",
        "properties": {"shape": {"type": "string"}, "color": {"type": "string"}},
        "required": ["shape", "color"],
        "additionalProperties": False,
    }
    schema = {
        "type": "object",
        "properties": {"objects": {"type": "array", "items": item}},
        "required": ["objects"],
        "additionalProperties": False,
    }
    said = ask(
        client,
        "List the objects in the picture.",
        data_url(red_square()),
        response_format={"type": "json_schema", "json_schema": {"name": "list", "schema": schema}},
    )
    assert {"shape": "square", "color": "red"} in json.loads(said)["objects"]


def test_any_prompt_is_readable(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Grüße, 世界! 🙂"}], max_tokens=32
    )
    assert answer.choices[0].message.content


def test_held_out_scenes_as_served(base_url: str) -> None:
    """A sample of the exam; all 500 scenes are scored by models/tiny/vision/evaluate.py."""
    kinds = ("what", "count_some", "describe")
    scores = score(sample_tasks(60, kinds), answer_by(base_url, KEY, MODEL))
    assert scores["all"] >= 0.9, scores
