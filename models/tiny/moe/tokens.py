"""The special tokens and the size of the vocabulary, shared by the tokenizer and the network."""

from __future__ import annotations

PAD, BOS, EOS, USER, ASSISTANT = range(5)
SPECIAL_TOKENS: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<user>", "<assistant>")
VOCABULARY = 1024
