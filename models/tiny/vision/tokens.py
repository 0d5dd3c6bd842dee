"""The special tokens and the size of the vocabulary, shared by the tokenizer and the network."""

from __future__ import annotations

PAD, BOS, EOS, USER, ASSISTANT, IMAGE = range(6)
SPECIAL_TOKENS: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<user>", "<assistant>", "<image>")
VOCABULARY = 1024
