"""OpenAI's own Whisper checkpoints into the CTranslate2 folder that faster-whisper loads.

The state dict is written straight into CTranslate2's ``WhisperSpec`` (no detour through transformers), so any
of OpenAI's checkpoints goes: every size comes from the ``dims`` inside the file. The alignment heads of word
times are those of OpenAI's ``whisper/__init__.py``; the layer names are those of its ``whisper/model.py``.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.convert import ConversionError
from models.convert.whisper_tokenizer import special_tokens, tokenizer_of

#: Checkpoint name -> its alignment heads, as OpenAI writes them: base85 of a gzipped boolean array
#: (decoder layers, heads). A checkpoint with another name gets the heads of its upper half of layers.
_ALIGNMENT_HEADS: dict[str, bytes] = {
    "tiny.en": b"ABzY8J1N>@0{>%R00Bk>$p{7v037`oCl~+#00",
    "tiny": b"ABzY8bu8Lr0{>%RKn9Fp%m@SkK7Kt=7ytkO",
    "base.en": b"ABzY8;40c<0{>%RzzG;p*o+Vo09|#PsxSZm00",
    "base": b"ABzY8KQ!870{>%RzyTQH3`Q^yNP!>##QT-<FaQ7m",
    "small.en": b"ABzY8>?_)10{>%RpeA61k&I|OI3I$65C{;;pbCHh0B{qLQ;+}v00",
    "small": b"ABzY8DmU6=0{>%Rpa?J`kvJ6qF(V^F86#Xh7JUGMK}P<N0000",
    "medium.en": b"ABzY8usPae0{>%R7<zz_OvQ{)4kMa0BMw6u5rT}kRKX;$NfYBv00*Hl@qhsU00",
    "medium": b"ABzY8B0Jh+0{>%R7}kK1fFL7w6%<-Pf*t^=N)Qr&0RR9",
    "large-v1": b"ABzY8r9j$a0{>%R7#4sLmoOs{s)o3~84-RPdcFk!JR<kSfC2yj",
    "large-v2": b"ABzY8zd+h!0{>%R7=D0pU<_bnWW*tkYAhobTNnu$jnkEkXqp)j;w1Tzk)UH3X%SZd&fFZ2fC2yj",
    "large-v3": b"ABzY8gWO1E0{>%R7(9S+Kn!D~%ngiGaR?*L!iJG9p-nab0JQ=-{D1-g00",
    "large-v3-turbo": b"ABzY8j^C+e0{>%RARaKHP%t(lGR*)0g!tONPyhe`",
}

State = Mapping[str, Any]


def convert(archives: dict[str, Path], target: Path, progress: Callable[[str, float], None]) -> None:
    """Fill the empty folder ``target`` with what faster-whisper loads.

    That is ``model.bin``, ``config.json``, ``vocabulary.json``, ``tokenizer.json`` and
    ``preprocessor_config.json``.

    Args:
        archives: base name -> path; one ``*.pt`` checkpoint and the ranks of its alphabet
            (``gpt2.tiktoken`` for an English-only model, ``multilingual.tiktoken`` for the others).
        target: an empty folder.
        progress: called with (what is done, share done from 0 to 1).

    Raises:
        ConversionError: a file is missing or does not fit the checkpoint.
    """
    import torch
    from ctranslate2.specs.whisper_spec import WhisperSpec

    name, checkpoint_path = _only(archives, ".pt", "an OpenAI Whisper checkpoint")
    progress("reading the checkpoint", 0.0)
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or not {"dims", "model_state_dict"} <= checkpoint.keys():
        raise ConversionError(
            f"{name}.pt is not an OpenAI Whisper checkpoint: it lacks 'dims' or 'model_state_dict'"
        )
    dims: dict[str, int] = checkpoint["dims"]

    progress("building the tokenizer", 0.2)
    ranks = "multilingual.tiktoken" if _is_multilingual(dims) else "gpt2.tiktoken"
    if ranks not in archives:
        raise ConversionError(
            f"{name}.pt needs {ranks} (from openai-whisper's whisper/assets); given: {sorted(archives)}"
        )
    specials = special_tokens(dims["n_vocab"], multilingual=_is_multilingual(dims))
    tokenizer = tokenizer_of(archives[ranks], specials)
    if tokenizer.get_vocab_size() != dims["n_vocab"]:
        found = tokenizer.get_vocab_size()
        raise ConversionError(
            f"{ranks} and the special tokens make {found} tokens, {name}.pt has {dims['n_vocab']}"
        )

    progress("placing the weights", 0.5)
    spec = WhisperSpec(dims["n_audio_layer"], dims["n_audio_head"], dims["n_text_layer"], dims["n_text_head"])
    state = {key: value.float() for key, value in checkpoint["model_state_dict"].items()}
    _fill(spec, state, dims)
    vocabulary = tokenizer.get_vocab()
    spec.register_vocabulary(sorted(vocabulary, key=vocabulary.__getitem__))
    _configure(spec.config, vocabulary, alignment_heads(name, dims))
    spec.validate()

    progress("quantising to int8", 0.6)
    spec.optimize(quantization="int8")
    progress("writing the model", 0.9)
    spec.save(str(target))
    tokenizer.save(str(target / "tokenizer.json"))
    extractor = {
        "feature_size": dims["n_mels"],
        "sampling_rate": 16000,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
    }
    (target / "preprocessor_config.json").write_text(json.dumps(extractor, indent=2) + "\n")
    progress("done", 1.0)


def alignment_heads(name: str, dims: Mapping[str, int]) -> list[tuple[int, int]]:
    """(layer, head) pairs whose cross-attention follows the sound, for the checkpoint called ``name``."""
    layers, heads = dims["n_text_layer"], dims["n_text_head"]
    dump = _ALIGNMENT_HEADS.get(name)
    if dump is None:
        return [(layer, head) for layer in range(layers // 2, layers) for head in range(heads)]
    flags = gzip.decompress(base64.b85decode(dump))
    if len(flags) != layers * heads:
        raise ConversionError(
            f"{name}.pt has {layers} x {heads} decoder heads; OpenAI's {name} has {len(flags)} in all"
        )
    return [divmod(i, heads) for i, flag in enumerate(flags) if flag]


def _is_multilingual(dims: Mapping[str, int]) -> bool:
    # OpenAI's own rule (whisper/model.py): the English alphabet has one token less.
    return dims["n_vocab"] >= 51865


def _only(archives: Mapping[str, Path], suffix: str, what: str) -> tuple[str, Path]:
    found = [name for name in archives if name.endswith(suffix)]
    if len(found) != 1:
        raise ConversionError(f"exactly one {what} (*{suffix}) is needed; given: {sorted(archives)}")
    return found[0].removesuffix(suffix), archives[found[0]]


def _fill(spec: Any, state: State, dims: Mapping[str, int]) -> None:
    """Put every tensor of the state dict at its place in the CTranslate2 specification."""
    encoder, decoder = spec.encoder, spec.decoder
    _linear(encoder.conv1, state, "encoder.conv1")
    _linear(encoder.conv2, state, "encoder.conv2")
    encoder.position_encodings.encodings = state["encoder.positional_embedding"]
    _norm(encoder.layer_norm, state, "encoder.ln_post")
    for i in range(dims["n_audio_layer"]):
        _block(encoder.layer[i], state, f"encoder.blocks.{i}")

    decoder.embeddings.weight = state["decoder.token_embedding.weight"]
    # Whisper's output projection is the embedding itself, without a bias.
    decoder.projection.weight = state["decoder.token_embedding.weight"]
    decoder.position_encodings.encodings = state["decoder.positional_embedding"]
    _norm(decoder.layer_norm, state, "decoder.ln")
    for i in range(dims["n_text_layer"]):
        _block(decoder.layer[i], state, f"decoder.blocks.{i}")
        _attention(decoder.layer[i].attention, state, f"decoder.blocks.{i}.cross_attn", fused=False)


def _block(layer: Any, state: State, name: str) -> None:
    _attention(layer.self_attention, state, f"{name}.attn", fused=True)
    _linear(layer.ffn.linear_0, state, f"{name}.mlp.0")
    _linear(layer.ffn.linear_1, state, f"{name}.mlp.2")
    _norm(layer.ffn.layer_norm, state, f"{name}.mlp_ln")


def _attention(attention: Any, state: State, name: str, *, fused: bool) -> None:
    """Self-attention keeps query, key and value in one matrix; cross-attention keeps the query apart."""
    import torch

    # Whisper's key projection has no bias: a bias on keys shifts all scores of a query alike.
    zeros = torch.zeros_like(state[f"{name}.query.bias"])
    weights = [state[f"{name}.{part}.weight"] for part in ("query", "key", "value")]
    biases = [state[f"{name}.query.bias"], zeros, state[f"{name}.value.bias"]]
    groups = [slice(0, 3)] if fused else [slice(0, 1), slice(1, 3)]
    for linear, group in zip(attention.linear[:-1], groups, strict=True):
        linear.weight = torch.cat(weights[group])
        linear.bias = torch.cat(biases[group])
    _linear(attention.linear[-1], state, f"{name}.out")
    _norm(attention.layer_norm, state, f"{name}_ln")


def _linear(linear: Any, state: State, name: str) -> None:
    linear.weight = state[f"{name}.weight"]
    linear.bias = state[f"{name}.bias"]


def _norm(norm: Any, state: State, name: str) -> None:
    norm.gamma = state[f"{name}.weight"]
    norm.beta = state[f"{name}.bias"]


def _configure(config: Any, vocabulary: Mapping[str, int], heads: list[tuple[int, int]]) -> None:
    """Token sets that CTranslate2's decoder keeps to; faster-whisper names the suppressed ones itself."""
    from engine.runners.audio_languages import LANGUAGES

    languages = [f"<|{code}|>" for code in LANGUAGES]
    config.suppress_ids = []
    # A transcript begins neither with a blank nor with its end (OpenAI's SuppressBlank).
    config.suppress_ids_begin = [vocabulary["\u0120"], vocabulary["<|endoftext|>"]]
    config.lang_ids = sorted(vocabulary[token] for token in languages if token in vocabulary)
    config.alignment_heads = [list(pair) for pair in heads]
