"""Writes the trained model as a Hugging Face folder: `python -m models.tiny.moe.export`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.tiny.moe.architecture import CONTEXT_LENGTH, build_config, build_model
from models.tiny.moe.tokenizer import CHAT_TEMPLATE, load_tokenizer
from models.tiny.moe.tokens import BOS, EOS, PAD, SPECIAL_TOKENS

WEIGHTS = Path(__file__).parent / "weights"
_STACKS = (".experts.gate_up_proj", ".experts.down_proj")


def on_disk(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters under the names of published Qwen3-MoE weights: each expert's matrices by themselves.

    transformers 5 holds the experts of a layer as stacks: gate and up (experts, 2 x width of an expert,
    width of the model), down (experts, width of the model, width of an expert).
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "lm_head.weight":
            continue
        if not name.endswith(_STACKS):
            found[name] = value
            continue
        layer = name.rpartition(".")[0]
        for number, matrix in enumerate(value):
            parts = {"down_proj": matrix}
            if name.endswith("gate_up_proj"):
                gate, up = matrix.chunk(2)
                parts = {"gate_proj": gate, "up_proj": up}
            found |= {f"{layer}.{number}.{part}.weight": tensor for part, tensor in parts.items()}
    return found


def export(state: dict[str, Tensor], folder: Path) -> None:
    """Writes weights (float16), configuration and tokenizer into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(torch.float16).contiguous().clone() for name, value in on_disk(state).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = build_config().to_dict()
    # As published weights call it; transformers 5 writes its own name for it.
    config["num_experts"] = config.pop("num_local_experts")
    config |= {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "float16"}
    _write(folder / "config.json", config)
    # top_k 1 makes greedy answers the default of engines that read this file; there is one right answer.
    generation = {
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "do_sample": True,
        "top_k": 1,
    }
    _write(folder / "generation_config.json", generation)
    load_tokenizer().save(str(folder / "tokenizer.json"))
    pad, bos, eos, *marks = SPECIAL_TOKENS
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "additional_special_tokens": marks,
        "model_max_length": CONTEXT_LENGTH,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / "tokenizer_config.json", tokenizer)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("var/train-moe/checkpoint.pt"))
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    parser.add_argument("--untrained", action="store_true", help="random weights, to try an engine with")
    args = parser.parse_args()
    state = (
        build_model().state_dict()
        if args.untrained
        else torch.load(args.checkpoint, weights_only=True)["model"]
    )
    export(state, args.folder)
    size = (args.folder / "model.safetensors").stat().st_size
    print(f"{args.folder}: {size / 1e6:.1f} MB, context {CONTEXT_LENGTH}")


if __name__ == "__main__":
    main()
