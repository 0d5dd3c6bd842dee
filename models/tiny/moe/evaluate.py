"""Scores the model on held-out questions: `python -m models.tiny.moe.evaluate [--base-url URL --model NAME]`.

With a base URL the questions go to a running OpenAI-format endpoint, so that what is scored is the model as
it is served; without one the folder's weights answer in this process. An answer is right when it equals the
expected text. Held out are questions that training never draws: see `questions.Question.held_out`.
"""

from __future__ import annotations

import argparse
import json
import random
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from models.tiny.vision import plain_torch  # noqa: F401  (first: it makes the next import work)

from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM  # isort: skip

from models.tiny.moe.architecture import EXPERTS, EXPERTS_PER_TOKEN, LAYERS
from models.tiny.moe.export import WEIGHTS
from models.tiny.moe.questions import KINDS, Question, sample_question
from models.tiny.moe.tokens import EOS, PAD

Answerer = Callable[[Sequence[Question]], list[str]]
_BATCH = 100
_LONGEST_ANSWER = 48
_EXAM_SEED = 20_261


def exam(each: int, kinds: Sequence[str] = KINDS) -> list[Question]:
    """So many held-out questions of each kind, the same ones each time.

    Of a kind that has fewer (what is learnt by heart), some are asked twice.
    """
    rng = random.Random(_EXAM_SEED)
    return [sample_question(rng, kind, held_out=True) for kind in kinds for _ in range(each)]


def answer_here(folder: Path) -> tuple[Answerer, Callable[[], list[list[float]]]]:
    """Answers with the folder's weights, in this process, greedily; and what share of the tokens so far went
    to each expert, by layer."""
    model: Any = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    counts = torch.zeros(LAYERS, EXPERTS)

    def answer(questions: Sequence[Question]) -> list[str]:
        prompts = [f"<s><user>{question.text}<assistant>" for question in questions]
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        with torch.inference_mode():
            seen = model(**inputs, output_router_logits=True)
            for layer, logits in enumerate(seen.router_logits):
                chosen = logits[inputs["attention_mask"].reshape(-1) > 0].topk(EXPERTS_PER_TOKEN).indices
                counts[layer] += torch.bincount(chosen.reshape(-1), minlength=EXPERTS)
            rows = model.generate(
                **inputs,
                max_new_tokens=_LONGEST_ANSWER,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=PAD,
            )
        texts: list[str] = tokenizer.batch_decode(
            rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return texts

    def shares() -> list[list[float]]:
        return [[round(share, 4) for share in row] for row in (counts / counts.sum(1, keepdim=True)).tolist()]

    return answer, shares


def answer_by(base_url: str, api_key: str, model: str) -> Answerer:
    """Answers by a running endpoint's `/chat/completions`; `base_url` ends in `/v1`."""

    def ask(question: Question) -> str:
        body = {
            "model": model,
            "temperature": 0,
            "max_tokens": _LONGEST_ANSWER,
            "messages": [{"role": "user", "content": question.text}],
        }
        request = urllib.request.Request(
            base_url.rstrip("/") + "/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            text: str = json.load(response)["choices"][0]["message"]["content"]
        return text

    def answer(questions: Sequence[Question]) -> list[str]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(ask, questions))

    return answer


def score(questions: list[Question], answerer: Answerer, mistakes: int = 0) -> dict[str, float]:
    """The right answers' share by kind, and "all"; prints so many mistakes of each kind."""
    results: dict[str, list[bool]] = defaultdict(list)
    shown: dict[str, int] = defaultdict(int)
    for start in track(range(0, len(questions), _BATCH), description="answering"):
        batch = questions[start : start + _BATCH]
        for question, said in zip(batch, answerer(batch), strict=True):
            right = said.strip() == question.answer
            results[question.kind].append(right)
            if not right and shown[question.kind] < mistakes:
                shown[question.kind] += 1
                print(f"{question.kind}: {question.text!r} -> {said!r}, expected {question.answer!r}")
    scores = {kind: round(sum(right) / len(right), 4) for kind, right in results.items()}
    every = [one for right in results.values() for one in right]
    scores["all"] = round(sum(every) / len(every), 4)
    return scores


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=100, help="questions of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    parser.add_argument("--base-url")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", default="tiny-moe")
    parser.add_argument("--mistakes", type=int, default=0, help="show so many wrong answers of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="write the scores there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"each": args.each}
    if args.base_url is None:
        answerer, shares = answer_here(args.folder)
        report["answered_by"] = "transformers"
    else:
        answerer, shares = answer_by(args.base_url, args.api_key, args.model), None
        report["answered_by"] = "endpoint"
    report["right"] = score(exam(args.each, args.kinds), answerer, args.mistakes)
    for kind, share in report["right"].items():
        print(f"{kind:12} {100 * share:6.2f} %")
    if shares is not None:
        report["expert_shares"] = shares()
        for layer, row in enumerate(report["expert_shares"]):
            print(
                f"layer {layer}: an expert gets {100 * min(row):.1f} to {100 * max(row):.1f} % of the tokens"
            )
    if args.write:
        args.write.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
