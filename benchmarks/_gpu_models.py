"""The models of the GPU check: prepared ones of the profile, or known shapes with weights that vLLM makes up.

A made-up model is a folder with the published architecture's ``config.json`` and a tokenizer of bytes, but no
weight files: ``--load-format dummy`` fills the tensors, so memory and times are the real model's, and its
words nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.entry import ModelEntry
from models.prepare import fingerprint_of, is_complete, key_of
from models.profile import Profile, ProfileModel

#: The published configurations; the catalog's `facts` name the sources.
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
}
#: By catalog id, in the order in which they are taken.
SHAPES: Mapping[str, dict[str, Any]] = {"qwen3-8b": _QWEN3, "llama-3.1-8b-instruct": _LLAMA}
_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True}
_SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Choice:
    """One model to check, and where its weights are; None = made up."""

    entry: ModelEntry
    weights: Path | None


def choose(
    entries: Mapping[str, ModelEntry], wanted: Sequence[str], weights_dir: Path, count: int = 2
) -> list[Choice]:
    """Which models to take: of those wanted (a profile's) what is prepared, then known shapes.

    Args:
        entries: the catalog.
        wanted: ids, the first first. Only vLLM's chat and code models count.
        weights_dir: where prepared weights stand.
    """
    found: list[Choice] = []
    for name in wanted:
        entry = entries[name]
        folder = weights_dir / key_of(entry)
        suits = entry.engine == "vllm" and entry.category in ("chat", "code")
        if suits and is_complete(folder, fingerprint_of(entry)):
            found.append(Choice(entry, folder))
    taken = {choice.entry.id for choice in found}
    found += [Choice(entries[name], None) for name in SHAPES if name not in taken]
    return found[:count]


def profile_of(choices: Sequence[Choice], context: int, batch: int) -> Profile:
    """A profile of standby models for one GPU, made-up weights where there are none."""
    models = [
        ProfileModel(
            id=choice.entry.id,
            tier="standby",
            context_length=context,
            max_batch=batch,
            options={} if choice.weights else {"args": {"load-format": "dummy"}},
        )
        for choice in choices
    ]
    return Profile.model_validate({"name": "gpu-check", "needs": {"gpus": 1}, "models": models})


def write_model(folder: Path, shape: Mapping[str, Any]) -> Path:
    """Writes a made-up model's files and gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_COMMON, **shape, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "bos_token_id": 256}))
    _write_tokenizer(folder, int(shape["vocab_size"]))
    return folder


def _write_tokenizer(folder: Path, size: int) -> None:
    """A byte a token; the rest of the vocabulary are words that no text has: any output can be read."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *_SPECIAL, *(f"w{number}" for number in range(size - len(letters) - len(_SPECIAL)))]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _SPECIAL[0],
        "bos_token": _SPECIAL[0],
        "pad_token": _SPECIAL[0],
        "chat_template": _TEMPLATE,
        "model_max_length": 1 << 20,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
