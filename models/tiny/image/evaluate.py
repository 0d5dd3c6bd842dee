"""Score the exported pipeline on held-out prompts by looking at the pictures' pixels.

    python -m models.tiny.image.evaluate [--prompts 200] [--steps 12] [--guidance 4] [--write scores.json]

Half of the prompts are of scenes that training never shows, in plain wordings; half are in wordings that
training never uses, of any scene. The judge is ``pixels.py``, which knows nothing of how scenes are drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.tiny.image import export
from models.tiny.image.exam import Question, questions, share
from models.tiny.image.pixels import look


def paint(
    pipeline: Any, asked: list[Question], *, steps: int, guidance: float, batch: int = 20
) -> Iterator[tuple[Question, Image.Image]]:
    """Each question with its picture; question i is painted with seed i."""
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        pictures = pipeline(
            [q.prompt for q in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=seeds,
            height=64,
            width=64,
        ).images
        yield from zip(part, pictures, strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", type=Path, default=export.WEIGHTS)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--mistakes", type=int, default=0, help="print so many of them")
    parser.add_argument("--sheet", type=Path, help="save the first 40 pictures here as one")
    parser.add_argument("--write", type=Path, help="save the scores here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = export.load(options.weights)
    parts: dict[str, list[bool]] = {"all": [], "shape": [], "colour": [], "background": []}
    sheet = Image.new("RGB", (8 * 64, 5 * 64), "grey")
    asked = questions(options.prompts)
    for number, (question, picture) in enumerate(
        paint(pipeline, asked, steps=options.steps, guidance=options.guidance)
    ):
        seen, wanted = look(np.asarray(picture)), question.scene
        parts["all"].append(question.right(seen))
        parts.setdefault(question.part, []).append(question.right(seen))
        for name in ("shape", "colour", "background"):
            parts[name].append(getattr(seen, name) == getattr(wanted, name))
        if not question.right(seen) and options.mistakes > 0:
            options.mistakes -= 1
            print(f"{question.prompt!r} (seed {number}): {seen}")
        if number < 40:
            sheet.paste(picture, (number % 8 * 64, number // 8 * 64))
    scores = {
        "prompts": len(asked),
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "right": {name: share(answers) for name, answers in parts.items()},
    }
    print(json.dumps(scores, indent=2))
    if options.sheet:
        sheet.resize((1024, 640), Image.Resampling.NEAREST).save(options.sheet)
    if options.write:
        options.write.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
