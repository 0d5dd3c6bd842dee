"""OpenAI's Whisper checkpoints into CTranslate2: small random ones, loaded by faster-whisper."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch
from faster_whisper import WhisperModel
from hypothesis import given, settings
from hypothesis import strategies as st

from models.convert import ConversionError
from models.convert.whisper import alignment_heads, convert
from models.convert.whisper_tokenizer import merges_of, special_tokens, tokenizer_of

PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
WIDTH = 64


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    lines = (f"{base64.b64encode(token).decode() or '='} {rank}" for rank, token in enumerate(tokens))
    path.write_text("\n".join(lines) + "\n")
    return path


def alphabet(size: int) -> list[bytes]:
    """All bytes, then made-up words."""
    singles = [bytes([byte]) for byte in range(256)]
    made_up = (bytes(word) for word in itertools.product(b"abcdefghijklmnopqrstuvwxyz", repeat=4))
    return [*singles, *itertools.islice(made_up, size - 256)]


def checkpoint(vocabulary: int) -> dict[str, Any]:
    """A random Whisper with OpenAI's names: two layers of width 64."""
    numbers = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=numbers) * 0.1).half()

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": tensor(rows, columns)} | ({f"{name}.bias": tensor(rows)} if bias else {})

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(WIDTH).half(), f"{name}.bias": tensor(WIDTH)}

    def attention(name: str) -> dict[str, torch.Tensor]:
        parts = {"query": True, "key": False, "value": True, "out": True}
        state = {
            key: value
            for part, bias in parts.items()
            for key, value in linear(f"{name}.{part}", WIDTH, WIDTH, bias).items()
        }
        return state | norm(f"{name}_ln")

    dims = {
        "n_mels": 80,
        "n_audio_ctx": 1500,
        "n_audio_state": WIDTH,
        "n_audio_head": 2,
        "n_audio_layer": 2,
        "n_vocab": vocabulary,
        "n_text_ctx": 448,
        "n_text_state": WIDTH,
        "n_text_head": 2,
        "n_text_layer": 2,
    }
    state = {
        "encoder.conv1.weight": tensor(WIDTH, 80, 3),
        "encoder.conv1.bias": tensor(WIDTH),
        "encoder.conv2.weight": tensor(WIDTH, WIDTH, 3),
        "encoder.conv2.bias": tensor(WIDTH),
        "encoder.positional_embedding": tensor(1500, WIDTH),
        "decoder.token_embedding.weight": tensor(vocabulary, WIDTH),
        "decoder.positional_embedding": tensor(448, WIDTH),
        **norm("encoder.ln_post"),
        **norm("decoder.ln"),
    }
    for side, layer in itertools.product(("encoder", "decoder"), range(2)):
        block = f"{side}.blocks.{layer}"
        state |= attention(f"{block}.attn") | norm(f"{block}.mlp_ln")
        state |= linear(f"{block}.mlp.0", 4 * WIDTH, WIDTH) | linear(f"{block}.mlp.2", WIDTH, 4 * WIDTH)
        if side == "decoder":
            state |= attention(f"{block}.cross_attn")
    return {"dims": dims, "model_state_dict": state}


def converted(folder: Path, name: str, vocabulary: int, ranks: str, size: int) -> Path:
    source, target = folder / f"{name}.pt", folder / "target"
    torch.save(checkpoint(vocabulary), source)
    target.mkdir()
    said: list[float] = []
    tokens = alphabet(size)
    if ranks == "multilingual.tiktoken":
        # The real one ends with an empty token; CTranslate2 takes that for the mark of a multilingual model.
        tokens[-1] = b""
    archives = {source.name: source, ranks: write_ranks(folder / ranks, tokens)}
    convert(archives, target, lambda _, share: said.append(share))
    assert said == sorted(said) and said[0] == 0 and said[-1] == 1
    return target


def test_a_multilingual_checkpoint_transcribes_detects_and_translates(tmp_path: Path) -> None:
    folder = converted(tmp_path, "mine", 51865, "multilingual.tiktoken", 50257)
    model = WhisperModel(str(folder), device="cpu", compute_type="int8", local_files_only=True)
    assert model.model.is_multilingual and model.model.n_mels == 80
    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    for task in ("transcribe", "translate"):
        segments, info = model.transcribe(noise, task=task, beam_size=1, temperature=0, max_new_tokens=5)
        list(segments)
        assert len(info.all_language_probs or []) == 99
    # Nothing is left of silence once the voice detector has been there; a language is still named.
    segments, info = model.transcribe(np.zeros(32000, np.float32), vad_filter=True)
    assert list(segments) == [] and info.language
    assert model.hf_tokenizer.token_to_id("<|translate|>") == 50358
    assert model.hf_tokenizer.token_to_id("<|30.00|>") == 51864


def test_an_english_checkpoint(tmp_path: Path) -> None:
    folder = converted(tmp_path, "mine.en", 51864, "gpt2.tiktoken", 50256)
    model = WhisperModel(str(folder), device="cpu", compute_type="int8", local_files_only=True)
    assert not model.model.is_multilingual and model.supported_languages == ["en"]
    assert model.hf_tokenizer.token_to_id("<|notimestamps|>") == 50362


def test_the_encoder_computes_what_the_checkpoint_says(tmp_path: Path) -> None:
    """Against OpenAI's encoder written out in torch; int8 leaves a small difference."""
    folder = converted(tmp_path, "mine.en", 51864, "gpt2.tiktoken", 50256)
    model = WhisperModel(str(folder), device="cpu", compute_type="int8", local_files_only=True)
    mel = np.random.default_rng(1).standard_normal((80, 3000)).astype(np.float32)
    found = np.array(model.encode(mel))[0]
    wanted = reference_encoder(checkpoint(51864)["model_state_dict"], torch.from_numpy(mel)).numpy()
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.999


def reference_encoder(state: dict[str, torch.Tensor], mel: torch.Tensor) -> torch.Tensor:
    w = {name: value.float() for name, value in state.items()}
    functional = torch.nn.functional

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = functional.gelu(
        functional.conv1d(mel[None], w["encoder.conv1.weight"], w["encoder.conv1.bias"], padding=1)
    )
    x = functional.gelu(
        functional.conv1d(x, w["encoder.conv2.weight"], w["encoder.conv2.bias"], stride=2, padding=1)
    )
    x = x[0].T + w["encoder.positional_embedding"]
    for layer in range(2):
        block = f"encoder.blocks.{layer}"
        inner = norm(x, f"{block}.attn_ln")
        heads = [
            linear(inner, f"{block}.attn.{part}").view(1500, 2, WIDTH // 2).transpose(0, 1)
            for part in ("query", "key", "value")
        ]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(0, 1).reshape(1500, WIDTH)
        x = x + linear(mixed, f"{block}.attn.out")
        inner = norm(x, f"{block}.mlp_ln")
        x = x + linear(functional.gelu(linear(inner, f"{block}.mlp.0")), f"{block}.mlp.2")
    return norm(x, "encoder.ln_post")


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    source = tmp_path / "mine.en.pt"
    torch.save(checkpoint(51864), source)
    target = tmp_path / "target"
    target.mkdir()

    def say(_: str, __: float) -> None: ...

    with pytest.raises(ConversionError, match=r"needs gpt2\.tiktoken"):
        convert({source.name: source}, target, say)
    with pytest.raises(ConversionError, match="exactly one"):
        convert({}, target, say)
    short = write_ranks(tmp_path / "gpt2.tiktoken", alphabet(5000))
    with pytest.raises(ConversionError, match="has 51864"):
        convert({source.name: source, short.name: short}, target, say)
    torch.save({"weights": 1}, source)
    with pytest.raises(ConversionError, match="not an OpenAI Whisper checkpoint"):
        convert({source.name: source}, target, say)
    assert list(target.iterdir()) == []


def test_alignment_heads() -> None:
    tiny = {"n_text_layer": 4, "n_text_head": 6}
    assert alignment_heads("tiny.en", tiny) == [
        (1, 0),
        (2, 0),
        (2, 5),
        (3, 0),
        (3, 1),
        (3, 2),
        (3, 3),
        (3, 4),
    ]
    assert alignment_heads("unknown", tiny) == [(layer, head) for layer in (2, 3) for head in range(6)]
    with pytest.raises(ConversionError, match="4 x 6"):
        alignment_heads("large-v3", tiny)


@pytest.mark.parametrize(
    ("vocabulary", "multilingual", "languages"), [(51864, False, 99), (51865, True, 99), (51866, True, 100)]
)
def test_special_tokens(vocabulary: int, multilingual: bool, languages: int) -> None:
    tokens = special_tokens(vocabulary, multilingual=multilingual)
    assert len(tokens) == len(set(tokens)) == vocabulary - (50257 if multilingual else 50256)
    assert tokens[languages + 2 :][:2] == ["<|translate|>", "<|transcribe|>"]
    with pytest.raises(ConversionError, match="languages"):
        special_tokens(60000, multilingual=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[tiktoken.Encoding, tokenizers.Tokenizer]:
    """The same trained alphabet in tiktoken and in ours, with merges upon merges."""
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    source = tokenizers.Tokenizer(tokenizers.models.BPE())
    source.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    source.train_from_iterator([Path(__file__).read_text()], trainer)
    letters = {letter: bytes([byte]) for byte, letter in _letters().items()}
    order = sorted(source.get_vocab().items(), key=lambda pair: pair[1])
    pieces = [b"".join(letters[letter] for letter in token) for token, _ in order]
    singles = [bytes([byte]) for byte in range(256)]
    tokens = [*singles, *(piece for piece in pieces if len(piece) > 1)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    reference = tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    path = write_ranks(tmp_path_factory.mktemp("ranks") / "ranks", tokens)
    return reference, tokenizer_of(path, ["<|endoftext|>"])


def _letters() -> dict[int, str]:
    from models.convert.whisper_tokenizer import _byte_letters

    return _byte_letters()


def test_every_byte_has_a_letter_of_its_own() -> None:
    assert sorted(_letters().values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="abcdefnorst .,'\n_=()", max_size=200)))
def test_tokens_are_those_of_tiktoken(
    trained: tuple[tiktoken.Encoding, tokenizers.Tokenizer], text: str
) -> None:
    reference, ours = trained
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == reference.encode_ordinary(text)
    assert ours.decode(ids) == text


def test_a_token_that_nothing_makes_has_no_merge() -> None:
    ranks = {b"a": 0, b"b": 1, b"ab": 2, b"aba": 3, b"xyz": 4}
    assert merges_of(ranks) == [(b"a", b"b"), (b"ab", b"a")]
