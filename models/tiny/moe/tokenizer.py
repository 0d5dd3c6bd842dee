"""The tokenizer: byte-level, so that any text can be read and any JSON written, with words of the task as one
token and every digit alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.tiny.moe.facts import GREETINGS, OFF_TOPIC, SYSTEMS, UNKNOWN, WORDS
from models.tiny.moe.questions import KINDS, sample_question
from models.tiny.moe.tokens import SPECIAL_TOKENS, VOCABULARY

_SEED = 7
_COMMITTED = Path(__file__).parent / "weights" / "tokenizer.json"
# Words with the space before them; every digit, mark and further space alone.
_PIECES = Regex(r" ?\p{L}+| ?\p{N}|[^\s\p{L}\p{N}]|\s")

# The system's text joins the first question.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- set found = namespace(text='') -%}
{%- if message['content'] is string -%}{%- set found.text = message['content'] | trim -%}
{%- else -%}{%- for part in message['content'] or [] -%}
{%- if part['text'] is defined -%}
{%- set found.text = found.text + ('\\n' if found.text else '') + part['text'] | trim -%}
{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- if message['role'] in ('system', 'developer') -%}{%- set ns.system = ns.system + found.text + '\\n' -%}
{%- elif message['role'] == 'assistant' -%}{{- '<assistant>' + found.text + eos_token -}}
{%- else -%}{{- '<user>' + ns.system + found.text -}}{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}
"""


def load_tokenizer() -> Any:
    """The `tokenizers.Tokenizer` of the committed weights, which later wordings must not change; else a new
    one."""
    return Tokenizer.from_file(str(_COMMITTED)) if _COMMITTED.exists() else train_tokenizer()


def train_tokenizer() -> Any:
    """A new `tokenizers.Tokenizer`; the same one each time for the same wordings, in a second or two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample_texts(), trainer)
    return tokenizer


def _sample_texts() -> Iterator[str]:
    rng = random.Random(_SEED)
    yield from (*SYSTEMS, *OFF_TOPIC, UNKNOWN, *(answer for _, answer in GREETINGS))
    yield from (f"{word}, {word}" for word in WORDS for _ in range(3))
    for kind in KINDS:
        for _ in range(1500):
            question = sample_question(rng, kind)
            yield from (question.text, question.answer)
