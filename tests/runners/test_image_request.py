"""Requests for pictures: what is taken, what is refused and how, and the shape of answers."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.errors import ApiError
from engine.runners import image_request
from engine.runners.image_request import Abilities, encode, parse
from engine.runners.image_size import Limits, Size

CAN = Abilities(
    limits=Limits(default=Size(512, 512), multiple_of=16, native_side=64),
    steps=12,
    max_steps=50,
    guidance=4.0,
)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-image", "prompt": "a red circle", **fields}


def test_defaults_come_from_the_model() -> None:
    asked = parse(body(), CAN)
    assert (asked.n, asked.steps, asked.guidance, asked.seed) == (1, 12, 4.0, None)
    assert (asked.format, asked.as_url, asked.stream) == ("png", False, False)
    assert (str(asked.plan.asked), str(asked.plan.painted)) == ("512x512", "64x64")


def test_null_is_as_good_as_absent() -> None:
    fields = dict.fromkeys(image_request.GenerationBody.model_fields)
    assert parse(fields | {"prompt": "a red circle"}, CAN) == parse(body(), CAN)


def test_everything_that_openai_clients_send_is_taken() -> None:
    asked = parse(
        body(
            n=10,
            size="1024x1024",
            quality="hd",
            style="vivid",
            user="u",
            background="opaque",
            moderation="low",
            response_format="url",
            output_format="webp",
            output_compression=50,
            seed=7,
            num_inference_steps=20,
            guidance_scale=2,
            negative_prompt="blue",
            something_new=1,
        ),
        CAN,
    )
    assert (asked.n, asked.as_url, asked.format, asked.compression) == (10, True, "webp", 50)
    assert (asked.seed, asked.steps, asked.guidance, asked.negative) == (7, 20, 2.0, "blue")


def test_steps_has_two_names() -> None:
    assert parse(body(steps=5), CAN).steps == parse(body(num_inference_steps=5), CAN).steps == 5
    assert parse(body(steps=5, num_inference_steps=5), CAN).steps == 5


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", "missing_field"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "  \n"}, "prompt", "invalid_value"),
        ({"prompt": ["a", "b"]}, "prompt", "invalid_value"),
        ({"prompt": "a" * 32_001}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"size": "huge"}, "size", "invalid_size"),
        ({"size": "10x10"}, "size", "invalid_size"),
        ({"size": 512}, "size", "invalid_value"),
        ({"response_format": "png"}, "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"background": "transparent"}, "background", "unsupported_parameter"),
        ({"background": "pink"}, "background", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"steps": 0}, "steps", "invalid_value"),
        ({"steps": 51}, "steps", "invalid_value"),
        ({"num_inference_steps": 51}, "num_inference_steps", "invalid_value"),
        ({"steps": 5, "num_inference_steps": 6}, "steps", "invalid_value"),
        ({"guidance_scale": -1}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": "4"}, "guidance_scale", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream": True, "n": 2}, "n", "invalid_value"),
        ({"partial_images": 4}, "partial_images", "invalid_value"),
        ({"quality": 3}, "quality", "invalid_value"),
    ],
)
def test_a_bad_value_names_its_field(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body(**fields), CAN)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


def test_what_a_model_lacks_is_refused() -> None:
    plain = replace(CAN, takes_guidance=False, takes_negative=False)
    for field in ({"guidance_scale": 3.0}, {"negative_prompt": "blue"}):
        with pytest.raises(ApiError) as caught:
            parse(body(**field), plain)
        assert (caught.value.param, caught.value.code) == (next(iter(field)), "unsupported_parameter")


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_an_encoded_picture_has_the_format_and_the_size_asked_for(name: str) -> None:
    asked = parse(body(size="256x128", output_format=name), CAN)
    data = base64.b64decode(encode(Image.new("RGB", (128, 64), "red"), asked))
    picture = Image.open(io.BytesIO(data))
    assert (picture.format, picture.size) == (name.upper(), (256, 128))
    red, green, blue = np.asarray(picture.convert("RGB"))[50, 100]
    assert red > 250 and green < 5 and blue < 5


def test_compression_makes_a_smaller_file() -> None:
    noise = Image.effect_noise((256, 256), 80).convert("RGB")
    big, small = (
        encode(noise, parse(body(size="256x256", output_format="jpeg", output_compression=c), CAN))
        for c in (100, 20)
    )
    assert len(small) < len(big) / 2


def test_an_answer_has_openai_s_shape() -> None:
    asked = parse(body(n=2, size="256x256"), CAN)
    used = image_request.usage(5, asked.plan.painted, asked.n, 64)
    answer = image_request.answer(asked, ["QQ==", "Qg=="], [3, 4], used)
    assert answer["data"] == [{"b64_json": "QQ==", "seed": 3}, {"b64_json": "Qg==", "seed": 4}]
    assert (answer["size"], answer["painted_size"], answer["output_format"]) == ("256x256", "64x64", "png")
    assert answer["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"text_tokens": 5, "image_tokens": 0},
        "output_tokens": 128,
        "total_tokens": 133,
    }


def test_a_url_is_a_data_url() -> None:
    asked = parse(body(response_format="url", output_format="jpeg"), CAN)
    answer = image_request.answer(asked, ["QQ=="], [3], {})
    assert answer["data"][0]["url"] == "data:image/jpeg;base64,QQ=="


def test_a_picture_painted_at_its_size_says_nothing_of_scaling() -> None:
    asked = parse(body(size="64x64"), CAN)
    assert "painted_size" not in image_request.answer(asked, ["QQ=="], [3], {})
