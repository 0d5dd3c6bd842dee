"""A request for pictures, checked; and its answers in OpenAI's shapes: pure, but for the time of day."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from engine.errors import bad_request
from engine.runners.endpoints import validated
from engine.runners.image_size import Limits, Plan, Size, plan_size

Format = Literal["png", "jpeg", "webp"]


class GenerationBody(BaseModel):
    """``POST /v1/images/generations``; fields that this list lacks are ignored, null is as good as absent.

    ``quality``, ``style``, ``user`` and ``moderation`` are taken for compatibility and change nothing.
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: str = Field(min_length=1, max_length=32_000)
    n: int = Field(default=1, ge=1, le=10)
    size: str | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Format = "png"
    output_compression: int = Field(default=100, ge=0, le=100)
    background: Literal["auto", "opaque", "transparent"] = "auto"
    quality: str | None = None
    style: str | None = None
    user: str | None = None
    moderation: str | None = None
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)
    # What others have added to OpenAI's API.
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    num_inference_steps: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    negative_prompt: str | None = Field(default=None, max_length=32_000)


@dataclass(frozen=True)
class Abilities:
    """What a loaded model can do and does unless told otherwise."""

    limits: Limits
    steps: int
    max_steps: int
    guidance: float | None
    takes_guidance: bool = True
    takes_negative: bool = True


@dataclass(frozen=True)
class Asked:
    """A checked request."""

    prompt: str
    negative: str | None
    n: int
    plan: Plan
    steps: int
    guidance: float | None
    seed: int | None
    format: Format
    compression: int
    as_url: bool
    stream: bool
    partial_images: int


def parse(data: dict[str, Any], can: Abilities) -> Asked:
    """Checks a request's JSON body.

    Raises:
        ApiError: 400 with ``param``: code ``missing_field``, ``invalid_value``, ``invalid_size`` or
            ``unsupported_parameter``.
    """
    body = validated(GenerationBody, {key: value for key, value in data.items() if value is not None})
    if not body.prompt.strip():
        raise bad_request(
            "The prompt is blank; say what the picture shall show.", param="prompt", code="invalid_value"
        )
    if body.background == "transparent":
        raise _unsupported("This model paints opaque pictures only.", "background")
    if body.steps is not None and body.num_inference_steps not in (None, body.steps):
        raise bad_request(
            "'steps' and 'num_inference_steps' are two names of one thing and differ here. Send one of them.",
            param="steps",
            code="invalid_value",
        )
    given = "num_inference_steps" if body.num_inference_steps is not None else "steps"
    steps = body.num_inference_steps or body.steps or can.steps
    if steps > can.max_steps:
        raise bad_request(
            f"{steps} steps are too many: this model takes at most {can.max_steps}.",
            param=given,
            code="invalid_value",
        )
    if body.guidance_scale is not None and not can.takes_guidance:
        raise _unsupported("This model takes no guidance scale.", "guidance_scale")
    if body.negative_prompt and not can.takes_negative:
        raise _unsupported("This model takes no negative prompt.", "negative_prompt")
    if body.stream and body.n > 1:
        raise bad_request(
            "A streamed request is for one picture. Send n = 1, or leave stream out.",
            param="n",
            code="invalid_value",
        )
    return Asked(
        prompt=body.prompt,
        negative=body.negative_prompt or None,
        n=body.n,
        plan=plan_size(body.size, can.limits),
        steps=steps,
        guidance=can.guidance if body.guidance_scale is None else body.guidance_scale,
        seed=body.seed,
        format=body.output_format,
        compression=body.output_compression,
        as_url=body.response_format == "url",
        stream=body.stream,
        partial_images=body.partial_images,
    )


def encode(picture: Image.Image, asked: Asked) -> str:
    """The picture at the size asked for, in the format asked for, as base64. CPU work."""
    size = asked.plan.asked
    picture = picture.convert("RGB")
    if picture.size != (size.width, size.height):
        picture = picture.resize((size.width, size.height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if asked.format == "png":
        picture.save(out, "PNG")
    else:
        picture.save(out, asked.format.upper(), quality=asked.compression)
    return base64.b64encode(out.getvalue()).decode()


def usage(text_tokens: int, painted: Size, n: int, pixels_a_token: int) -> dict[str, Any]:
    """OpenAI's usage: input tokens are the prompt's, output tokens the positions of the latents painted."""
    made = n * painted.pixels // pixels_a_token
    return {
        "input_tokens": text_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": 0},
        "output_tokens": made,
        "total_tokens": text_tokens + made,
    }


def answer(asked: Asked, pictures: list[str], seeds: list[int], used: dict[str, Any]) -> dict[str, Any]:
    """The whole answer of a request that is not streamed.

    Beside OpenAI's fields: ``seed`` of each picture, and ``painted_size`` where it was scaled up.
    """
    rows = [{**_picture(asked, data), "seed": seed} for data, seed in zip(pictures, seeds, strict=True)]
    return {"created": int(time.time()), "data": rows, **_facts(asked), "usage": used}


def partial_event(asked: Asked, picture: str, index: int) -> dict[str, Any]:
    """``image_generation.partial_image``."""
    return {
        "type": "image_generation.partial_image",
        "b64_json": picture,
        "partial_image_index": index,
        "created_at": int(time.time()),
        **_facts(asked),
    }


def completed_event(asked: Asked, picture: str, seed: int, used: dict[str, Any]) -> dict[str, Any]:
    """``image_generation.completed``."""
    return {
        "type": "image_generation.completed",
        "b64_json": picture,
        "created_at": int(time.time()),
        "seed": seed,
        **_facts(asked),
        "usage": used,
    }


def _picture(asked: Asked, data: str) -> dict[str, str]:
    if asked.as_url:
        return {"url": f"data:image/{asked.format};base64,{data}"}
    return {"b64_json": data}


def _facts(asked: Asked) -> dict[str, Any]:
    facts = {
        "background": "opaque",
        "output_format": asked.format,
        "quality": "auto",
        "size": str(asked.plan.asked),
    }
    if asked.plan.painted != asked.plan.asked:
        facts["painted_size"] = str(asked.plan.painted)
    return facts


def _unsupported(message: str, param: str) -> Exception:
    return bad_request(message, param=param, code="unsupported_parameter")
