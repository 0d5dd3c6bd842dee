"""A diffusers pipeline as the image runner uses it: loading, painting a batch, previews.

torch and diffusers are imported while loading only: parsing requests must not wait for them.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import nearest
from engine.runners.image_request import Abilities
from engine.runners.image_size import Limits, Size, parse_size
from engine.runners.spec import RunnerSpec

if TYPE_CHECKING:
    from engine.runners.parked_weights import ParkedWeights

log = logging.getLogger("hearth.runner")

#: A model whose own size is smaller than this paints small and is scaled up.
SMALL_SIDE = 256


class ImageOptions(BaseModel):
    """``options`` of a diffusers model in the catalog; what is not given comes from the pipeline itself."""

    model_config = ConfigDict(extra="forbid")

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="Of the weights in memory; auto = float32 on a CPU, bfloat16 on a GPU."
    )
    variant: str | None = Field(default=None, description="File variant to load, e.g. 'fp16'.")
    offload: Literal["none", "model"] = Field(
        default="none", description="'model': parts that do not run wait in host memory (GPU only)."
    )
    default_size: str | None = Field(default=None, description="WIDTHxHEIGHT of a request without a size.")
    min_side: int = Field(default=64, ge=1, description="Pixels.")
    max_side: int = Field(default=2048, ge=1, description="Pixels.")
    max_pixels: int = Field(default=2048 * 2048, ge=1, description="Width times height.")
    max_aspect: float = Field(default=3.0, ge=1, description="Longer side by shorter side.")
    multiple_of: int | None = Field(default=None, ge=1, description="Of width and height, pixels.")
    native_side: int | None = Field(
        default=None,
        ge=8,
        description="Shorter side that is painted, before scaling up to the size asked for, pixels. Default: "
        f"the model's own where that is below {SMALL_SIDE}; else pictures are painted at the size asked for.",
    )
    steps: int | None = Field(
        default=None, ge=1, description="Denoising steps of a request without a number."
    )
    max_steps: int = Field(default=100, ge=1, description="Most steps that a request may ask for.")
    guidance_scale: float | None = Field(default=None, ge=0, description="Of a request without one.")


@dataclass(frozen=True)
class Picture:
    """One picture to paint."""

    prompt: str
    negative: str | None
    seed: int


@dataclass(frozen=True)
class Manner:
    """What all pictures of one batch share."""

    size: Size
    steps: int
    guidance: float | None
    with_negative: bool


#: Called after each step with its number (from 0) and a function that gives the pictures as they stand, or
#: None where the pipeline cannot tell; may raise to stop.
OnStep = Callable[[int, Callable[[], list[Image.Image] | None]], None]


class Painter:
    """A loaded text-to-image pipeline; ``folder`` holds the weights that it comes back from after a sleep."""

    def __init__(self, pipeline: Any, options: ImageOptions, folder: Path = Path()) -> None:
        self._pipeline = pipeline
        self._folder = folder
        self._weights: ParkedWeights | None = None
        self._parameters = inspect.signature(pipeline.__call__).parameters
        self._factor = int(getattr(pipeline, "vae_scale_factor", 8))
        self.abilities = self._abilities(options)

    @property
    def pixels_a_token(self) -> int:
        """Pixels of the picture that one position of the latents stands for."""
        return self._factor**2

    def count_tokens(self, prompt: str) -> int:
        """Tokens of the prompt for the model's (first) tokenizer; words where it has none."""
        tokenizer = getattr(self._pipeline, "tokenizer", None)
        if tokenizer is None:
            return len(prompt.split())
        return len(tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    def paint(self, pictures: Sequence[Picture], manner: Manner, on_step: OnStep) -> list[Image.Image]:
        """Paints a batch. Each picture has a generator of its own, so company does not change it.

        Equal seeds give equal pictures up to the rounding of floating-point sums, which may differ with the
        number of pictures that run together (by one of 255 in a channel).
        """
        from torch import Generator

        def after(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step, lambda: self._preview(tensors["latents"]))
            return {}

        asked: dict[str, Any] = {
            "prompt": [picture.prompt for picture in pictures],
            "width": manner.size.width,
            "height": manner.size.height,
            "num_inference_steps": manner.steps,
            # On the CPU on every device: a seed then means the same picture on each.
            "generator": [Generator().manual_seed(picture.seed) for picture in pictures],
        }
        if manner.guidance is not None:
            asked["guidance_scale"] = manner.guidance
        if manner.with_negative:
            asked["negative_prompt"] = [picture.negative or "" for picture in pictures]
        if "callback_on_step_end" in self._parameters:
            asked["callback_on_step_end"] = after
        painted: list[Image.Image] = self._pipeline(**asked).images
        return painted

    def sleep(self) -> None:
        """Gives the memory of all parts' weights back; tokenizers and schedulers stay."""
        from torch.nn import Module

        from engine.runners.parked_weights import ParkedWeights

        if self._weights is None:
            parts = [part for part in self._pipeline.components.values() if isinstance(part, Module)]
            self._weights = ParkedWeights(parts, self._folder)
        self._weights.put_away()

    def wake(self) -> None:
        """Takes the weights back, see :class:`ParkedWeights` for what may go wrong."""
        if self._weights is not None:
            self._weights.take_back()

    def _preview(self, latents: Any) -> list[Image.Image] | None:
        """The pictures in the middle of painting; None for pipelines that pack their latents."""
        from torch import no_grad

        pipeline = self._pipeline
        vae, processor = getattr(pipeline, "vae", None), getattr(pipeline, "image_processor", None)
        if vae is None or processor is None or latents.ndim != 4 or not hasattr(vae.config, "scaling_factor"):
            return None
        # DPM-Solver++ keeps what it takes for the finished picture; other schedulers only the noisy one.
        guesses = getattr(pipeline.scheduler, "model_outputs", None) or []
        if (
            getattr(pipeline.scheduler.config, "algorithm_type", "") == "dpmsolver++"
            and guesses[-1] is not None
        ):
            latents = guesses[-1].to(latents.dtype)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with no_grad():
            decoded = vae.decode(latents / vae.config.scaling_factor + shift, return_dict=False)[0]
        previews: list[Image.Image] = processor.postprocess(decoded, output_type="pil")
        return previews

    def _abilities(self, options: ImageOptions) -> Abilities:
        pipeline = self._pipeline
        unet = getattr(pipeline, "unet", None)
        sample = getattr(pipeline, "default_sample_size", None) or getattr(
            getattr(unet, "config", None), "sample_size", None
        )
        own = int(sample) * self._factor if isinstance(sample, int) else 1024
        native = options.native_side or (own if own < SMALL_SIDE else None)
        default = options.default_size or (f"{own}x{own}" if native is None else "512x512")
        # A transformer joins two by two latents to one token; a UNet halves its latents at least once.
        step = options.multiple_of or (2 * self._factor if unet is None or native else self._factor)
        return Abilities(
            limits=Limits(
                default=parse_size(default),
                multiple_of=step,
                min_side=options.min_side,
                max_side=options.max_side,
                max_pixels=options.max_pixels,
                max_aspect=options.max_aspect,
                native_side=native,
            ),
            steps=options.steps or self._default_of("num_inference_steps") or 30,
            max_steps=options.max_steps,
            guidance=options.guidance_scale,
            takes_guidance="guidance_scale" in self._parameters,
            takes_negative="negative_prompt" in self._parameters,
        )

    def _default_of(self, name: str) -> Any:
        parameter = self._parameters.get(name)
        return None if parameter is None or parameter.default is parameter.empty else parameter.default


def read_options(spec: RunnerSpec) -> ImageOptions:
    """The model's options.

    Raises:
        ValueError: an unknown option, with the nearest right name, or a wrong value.
    """
    try:
        return ImageOptions.model_validate(spec.options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        close = nearest(name, ImageOptions.model_fields) if first["type"] == "extra_forbidden" else []
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"option '{name}' of {spec.model}: {first['msg']}.{hint}") from error


def load_painter(spec: RunnerSpec) -> Painter:
    """Loads the pipeline of ``spec.model_dir``: any folder with a ``model_index.json``.

    Raises:
        ValueError: wrong options.
        FileNotFoundError: no pipeline in the folder.
    """
    options = read_options(spec)
    folder: Path = spec.model_dir
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no diffusers pipeline (no model_index.json). Prepare the weights again, or name "
            "a pipeline's folder as `path` of the model."
        )
    import torch
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    torch.set_num_threads(spec.threads)
    on_gpu = spec.device.startswith("cuda")
    dtype = options.dtype if options.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    several = on_gpu and "," in spec.device
    facts: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True}
    facts |= {"variant": options.variant} if options.variant else {}
    facts |= {"device_map": "balanced"} if several else {}
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(folder, **facts)
    except ValueError as error:
        # It knows a list of classes; a folder of any other class says itself what it is.
        if "AutoPipeline can't find" not in str(error):
            raise
        pipeline = DiffusionPipeline.from_pretrained(folder, **facts)
    pipeline.set_progress_bar_config(disable=True)
    if on_gpu and options.offload == "model" and not several:
        pipeline.enable_model_cpu_offload()
    elif on_gpu and not several:
        pipeline.to("cuda")  # CUDA_VISIBLE_DEVICES leaves this process no other
    return Painter(pipeline, options, folder)
