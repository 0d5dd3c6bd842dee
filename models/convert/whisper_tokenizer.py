"""A ``tokenizer.json`` from the ranks of a byte-level alphabet and Whisper's special tokens."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.runners.audio_languages import LANGUAGES
from models.convert import ConversionError

#: Timestamps run from 0.00 to 30.00 seconds in steps of 0.02.
_TIMESTAMPS = 1501
#: Special tokens besides languages and timestamps.
_OTHERS = 8
#: Ordinary tokens of the two alphabets.
_RANKS = {"multilingual": 50257, "gpt2": 50256}


def special_tokens(vocabulary_size: int, *, multilingual: bool) -> list[str]:
    """Whisper's special tokens in the order of their ids (OpenAI's ``whisper/tokenizer.py``).

    Raises:
        ConversionError: no number of languages makes ``vocabulary_size``.
    """
    ranks = _RANKS["multilingual" if multilingual else "gpt2"]
    languages = vocabulary_size - ranks - _OTHERS - _TIMESTAMPS
    if not 0 < languages <= len(LANGUAGES):
        raise ConversionError(
            f"a Whisper vocabulary of {vocabulary_size} tokens would have {languages} languages"
        )
    return [
        "<|endoftext|>",
        "<|startoftranscript|>",
        *(f"<|{code}|>" for code in list(LANGUAGES)[:languages]),
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
        *(f"<|{i * 0.02:.2f}|>" for i in range(_TIMESTAMPS)),
    ]


def tokenizer_of(ranks_file: Path, specials: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer: the tokens of ``ranks_file`` (tiktoken's format), then ``specials``."""
    ranks = read_ranks(ranks_file)
    letters = _byte_letters()

    def written(piece: bytes) -> str:
        return "".join(letters[byte] for byte in piece)

    vocabulary = {written(piece): rank for piece, rank in ranks.items()}
    merges = [(written(left), written(right)) for left, right in merges_of(ranks)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """tiktoken's file: one token a line, base64, then its rank."""
    pairs = (line.split() for line in path.read_text().splitlines() if line.strip())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of more than one byte, in the order of the ranks.

    A token's last merge joins the two parts that remain when its bytes are merged by lower ranks only.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(token) < 2:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            best, i = min(joined)
            if best >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable Latin-1 stands for itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(0x100 + len(letters) - len(printable))
    return letters
