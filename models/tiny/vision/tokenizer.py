"""The tokenizer: byte-level, so that any text can be read and any JSON written, with words of the task
as one token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.tiny.vision.questions import sample_question
from models.tiny.vision.records import sample_record
from models.tiny.vision.scenes import sample_scene
from models.tiny.vision.tokens import SPECIAL_TOKENS, VOCABULARY
from models.tiny.vision.wording import NO_IMAGE_ANSWER, OFF_TOPIC, OFF_TOPIC_ANSWER, SYSTEMS

_SEED = 7
_COMMITTED = Path(__file__).parent / "weights" / "tokenizer.json"
# Words with the space before them; every digit, mark and further space alone, so that a grammar can cut
# anywhere.
_PIECES = Regex(r" ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s")

# The system's text joins the first question; pictures come first in their turn, wherever the request put
# them.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set parts = [{'type': 'text', 'text': message['content']}] -%}
{%- else -%}{%- set parts = message['content'] or [] -%}{%- endif -%}
{%- set found = namespace(image='', text='') -%}
{%- for part in parts -%}
{%- if part['type'] in ('image', 'image_url', 'input_image') -%}{%- set found.image = found.image + '<image>' -%}
{%- elif part['text'] is defined -%}
{%- set found.text = found.text + ('\\n' if found.text else '') + part['text'] | trim -%}
{%- endif -%}
{%- endfor -%}
{%- if message['role'] in ('system', 'developer') -%}{%- set ns.system = ns.system + found.text + '\\n' -%}
{%- elif message['role'] == 'assistant' -%}{{- '<assistant>' + found.text + eos_token -}}
{%- else -%}{{- '<user>' + found.image + ns.system + found.text -}}{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}
"""  # noqa: E501


def load_tokenizer() -> Any:
    """The `tokenizers.Tokenizer` of the committed weights, which later wordings must not change; else a
    new one."""
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
    rng = np.random.default_rng(_SEED)
    yield from (*SYSTEMS, *OFF_TOPIC, OFF_TOPIC_ANSWER, NO_IMAGE_ANSWER)
    for _ in range(4000):
        scene = sample_scene(rng)
        question = sample_question(rng, scene)
        record = sample_record(rng, scene)
        yield from (question.text, question.answer, record.text, record.answer)
