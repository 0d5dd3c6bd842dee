"""What the painter asks of a diffusers pipeline, with a stand-in for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from engine.runners.image_pipeline import ImageOptions, Manner, Painter, Picture, load_painter, read_options
from engine.runners.image_size import Size
from engine.runners.spec import RunnerSpec
from models.catalog import load_catalog


class Pipeline:
    """Has the signature of a diffusers pipeline; remembers how it was called."""

    vae_scale_factor = 8

    def __init__(self, sample_size: int = 128) -> None:
        self.unet = SimpleNamespace(config=SimpleNamespace(sample_size=sample_size))
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        prompt: list[str],
        height: int,
        width: int,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        negative_prompt: list[str] | None = None,
        generator: Any = None,
        callback_on_step_end: Any = None,
    ) -> Any:
        self.calls.append({key: value for key, value in locals().items() if key != "self"})
        for step in range(num_inference_steps):
            callback_on_step_end(self, step, 1000 - step, {"latents": SimpleNamespace(ndim=3)})
        return SimpleNamespace(images=[Image.new("RGB", (width, height)) for _ in prompt])


class Plain:
    """A pipeline that takes little: no guidance, no negative prompt, no callback."""

    vae_scale_factor = 8
    default_sample_size = 128

    def __call__(
        self, prompt: list[str], height: int, width: int, num_inference_steps: int, generator: Any
    ) -> Any:
        return SimpleNamespace(images=[Image.new("RGB", (width, height)) for _ in prompt])


def spec(folder: Path, **options: Any) -> RunnerSpec:
    return RunnerSpec(
        model="p",
        category="image",
        engine="diffusers",
        model_dir=folder,
        socket=folder / "s",
        options=options,
    )


def test_a_batch_is_one_call_with_a_generator_for_each_picture() -> None:
    pipeline = Pipeline()
    steps: list[int] = []
    painted = Painter(pipeline, ImageOptions()).paint(
        [Picture("a", None, 3), Picture("b", "c", 4)],
        Manner(Size(96, 64), 7, 2.5, with_negative=True),
        lambda step, preview: steps.append(step) if preview() is None else None,
    )
    (call,) = pipeline.calls
    assert (call["prompt"], call["negative_prompt"]) == (["a", "b"], ["", "c"])
    assert (call["width"], call["height"]) == (96, 64)
    assert (call["num_inference_steps"], call["guidance_scale"]) == (7, 2.5)
    assert [generator.initial_seed() for generator in call["generator"]] == [3, 4]
    assert [picture.size for picture in painted] == [(96, 64)] * 2
    assert steps == list(range(7))


def test_what_is_not_asked_for_is_the_pipeline_s_own() -> None:
    pipeline = Pipeline()
    painter = Painter(pipeline, ImageOptions())
    painter.paint(
        [Picture("a", None, 1)], Manner(Size(64, 64), 1, None, with_negative=False), lambda *_: None
    )
    assert (pipeline.calls[0]["guidance_scale"], pipeline.calls[0]["negative_prompt"]) == (5.0, None)
    assert (painter.abilities.steps, painter.abilities.guidance) == (25, None)


def test_a_full_size_model_paints_at_the_size_asked_for() -> None:
    limits = Painter(Pipeline(128), ImageOptions()).abilities.limits
    assert (limits.default, limits.native_side, limits.multiple_of) == (Size(1024, 1024), None, 8)


def test_a_small_model_is_scaled_up() -> None:
    limits = Painter(Pipeline(8), ImageOptions()).abilities.limits
    assert (limits.default, limits.native_side, limits.multiple_of) == (Size(512, 512), 64, 16)


def test_options_win_over_the_pipeline() -> None:
    options = ImageOptions(
        default_size="768x512", native_side=128, steps=4, guidance_scale=1.0, multiple_of=32
    )
    can = Painter(Pipeline(), options).abilities
    assert (can.limits.default, can.limits.native_side, can.limits.multiple_of) == (Size(768, 512), 128, 32)
    assert (can.steps, can.guidance) == (4, 1.0)


def test_a_plain_pipeline_says_what_it_does_not_take() -> None:
    painter = Painter(Plain(), ImageOptions())
    assert not painter.abilities.takes_guidance
    assert not painter.abilities.takes_negative
    assert painter.abilities.limits.multiple_of == 16
    manner = Manner(Size(64, 64), 1, None, with_negative=False)
    assert len(painter.paint([Picture("a", None, 1)], manner, lambda *_: None)) == 1
    assert painter.count_tokens("a red circle") == 3


def test_an_exception_of_the_step_stops_the_pipeline() -> None:
    class StopError(Exception):
        pass

    def stop(step: int, _: Any) -> None:
        if step == 2:
            raise StopError

    with pytest.raises(StopError):
        Painter(Pipeline(), ImageOptions()).paint(
            [Picture("a", None, 1)], Manner(Size(64, 64), 9, None, with_negative=False), stop
        )


def test_an_unknown_option_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'guidance_scal'.*Did you mean 'guidance_scale'\?"):
        read_options(spec(tmp_path, guidance_scal=2))
    with pytest.raises(ValueError, match="'steps'"):
        read_options(spec(tmp_path, steps=0))


def test_a_folder_without_a_pipeline_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_index\.json.*Prepare the weights again"):
        load_painter(spec(tmp_path))


def test_the_options_of_every_catalog_model_are_known(tmp_path: Path) -> None:
    entries = [entry for entry in load_catalog().entries.values() if entry.engine == "diffusers"]
    assert "tiny-image" in {entry.id for entry in entries}
    for entry in entries:
        read_options(spec(tmp_path, **entry.options))
