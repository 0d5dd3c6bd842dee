"""Scores the model on held-out scenes: `python -m models.tiny.vision.evaluate [--base-url URL --model NAME]`.

With a base URL the questions go to a running OpenAI-format endpoint (the pictures as data URLs), so that
what is scored is the model as it is served; without one the folder's weights answer in this process. An
answer is right when
it equals the expected text; for JSON, when the parsed objects are equal.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from models.tiny.vision import plain_torch  # noqa: F401  (first: it makes the next import work)

from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast  # isort: skip

from models.tiny.vision.architecture import IMAGE_TOKENS, to_input
from models.tiny.vision.drawing import to_pixels
from models.tiny.vision.exam import EXAM_KINDS, Task, sample_tasks
from models.tiny.vision.export import WEIGHTS
from models.tiny.vision.tokens import EOS, PAD

Answerer = Callable[[Sequence[Task]], list[str]]
_BATCH = 100
_LONGEST_ANSWER = 64


def answer_here(folder: Path) -> Answerer:
    """Answers with the folder's weights, in this process, greedily."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)

    def answer(tasks: Sequence[Task]) -> list[str]:
        prompts = [f"<s><user>{'<image>' * IMAGE_TOKENS}{task.text}<assistant>" for task in tasks]
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        pixels = torch.from_numpy(np.stack([to_pixels(task.picture) for task in tasks]))
        with torch.inference_mode():
            rows = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                pixel_values=to_input(pixels),
                max_new_tokens=_LONGEST_ANSWER,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=PAD,
            )
        texts: list[str] = tokenizer.batch_decode(
            rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return texts

    return answer


def answer_by(base_url: str, api_key: str, model: str) -> Answerer:
    """Answers by a running endpoint's `/chat/completions`; `base_url` ends in `/v1`."""

    def ask(task: Task) -> str:
        png = io.BytesIO()
        task.picture.save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [{"type": "text", "text": task.text}, {"type": "image_url", "image_url": {"url": url}}]
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        request = urllib.request.Request(
            base_url.rstrip("/") + "/chat/completions",
            json.dumps(body | {"max_tokens": _LONGEST_ANSWER}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            text: str = json.load(response)["choices"][0]["message"]["content"]
        return text

    def answer(tasks: Sequence[Task]) -> list[str]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(ask, tasks))

    return answer


def is_right(task: Task, said: str) -> bool:
    """Whether the answer says what was expected."""
    if task.kind != "json":
        return said.strip() == task.answer
    try:
        return bool(json.loads(said) == json.loads(task.answer))
    except ValueError:
        return False


def score(tasks: list[Task], answerer: Answerer, mistakes: int = 0) -> dict[str, float]:
    """The right answers' share by kind, and "all"; prints so many mistakes of each kind."""
    results: dict[str, list[bool]] = defaultdict(list)
    shown: dict[str, int] = defaultdict(int)
    for start in track(range(0, len(tasks), _BATCH), description="answering"):
        batch = tasks[start : start + _BATCH]
        for task, said in zip(batch, answerer(batch), strict=True):
            right = is_right(task, said)
            results[task.kind].append(right)
            if not right and shown[task.kind] < mistakes:
                shown[task.kind] += 1
                print(f"{task.kind}: {task.text!r} -> {said!r}, expected {task.answer!r}")
    scores = {kind: round(float(np.mean(right)), 4) for kind, right in results.items()}
    scores["all"] = round(float(np.mean([one for right in results.values() for one in right])), 4)
    return scores


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--kinds", nargs="+", default=list(EXAM_KINDS), choices=EXAM_KINDS)
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    parser.add_argument("--base-url")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", default="tiny-vision")
    parser.add_argument("--mistakes", type=int, default=0, help="show so many wrong answers of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="write the scores there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    served = args.base_url is not None
    answerer = answer_by(args.base_url, args.api_key, args.model) if served else answer_here(args.folder)
    scores = score(sample_tasks(args.scenes, tuple(args.kinds)), answerer, args.mistakes)
    for kind, share in scores.items():
        print(f"{kind:12} {100 * share:6.2f} %")
    if args.write:
        report = {
            "scenes": args.scenes,
            "answered_by": "endpoint" if served else "transformers",
            "right": scores,
        }
        args.write.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
