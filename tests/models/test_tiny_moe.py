"""The tiny mixture of experts: its questions are sound, its batches fair, its folder loads and answers."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.tiny.moe.architecture import EXPERTS, LAYERS, balance_loss, build_config, build_model
from models.tiny.moe.batches import ROW, draw_batch, step_rng
from models.tiny.moe.evaluate import answer_here, exam, score
from models.tiny.moe.export import on_disk
from models.tiny.moe.facts import TABLES, WORDS
from models.tiny.moe.optimizer import Optimizer, orthogonal
from models.tiny.moe.questions import HELD_OUT_SHARE, KINDS, Question, carelessly, sample_question
from models.tiny.moe.tokenizer import load_tokenizer, train_tokenizer
from models.tiny.moe.tokens import ASSISTANT, BOS, EOS, USER, VOCABULARY
from models.tiny.moe.train import learning_rate

WEIGHTS = Path("models/tiny/moe/weights")


def questions(kind: str, count: int = 200) -> list[Question]:
    rng = random.Random(kind)
    return [sample_question(rng, kind) for _ in range(count)]


def test_sums_differences_and_comparisons_are_right() -> None:
    for question in questions("add") + questions("subtract"):
        left, right = question.answer.split(" = ")
        a, sign, b = left.split()
        assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
        assert sorted(re.findall(r"\d+", question.text)) == sorted([a, b])
    for question in questions("compare"):
        numbers = [int(n) for n in re.findall(r"\d+", question.text)]
        chosen = int(question.answer.split()[0])
        assert chosen == (max(numbers) if "larger" in question.answer else min(numbers))


def test_lists_are_sorted_turned_counted_and_picked_from() -> None:
    for question in questions("sort"):
        numbers = [int(n) for n in re.findall(r"\d+", question.text)]
        assert question.answer == ", ".join(map(str, sorted(numbers)))
    for kind in ("alphabet", "reverse", "count", "length", "pick"):
        for question in questions(kind):
            items = [word for word in re.findall(r"[a-z]+", question.key) if word in WORDS]
            if kind == "alphabet":
                assert question.answer == ", ".join(sorted(items))
            elif kind == "reverse":
                assert question.answer == ", ".join(reversed(items))
            elif kind == "length":
                assert f" {len(items)} " in question.answer
            elif kind == "count":
                wanted, *rest = items
                assert re.findall(r"\d+", question.answer) == [str(rest.count(wanted))]
            else:
                assert question.answer.rstrip(".").split()[-1] in items


def test_no_fact_has_two_answers() -> None:
    for table in TABLES:
        said: dict[str, str] = {}
        for a, b in table.pairs:
            assert a and b and said.setdefault(a, b) == b
    wordings: dict[str, str] = {}
    for kind in KINDS:
        for question in questions(kind, 400):
            assert wordings.setdefault(question.text, question.answer) == question.answer


def test_training_never_draws_what_the_exam_asks() -> None:
    asked = exam(20)
    assert Counter(question.kind for question in asked) == dict.fromkeys(KINDS, 20)
    assert all(question.held_out for question in asked) and asked == exam(20)
    rng = random.Random(0)
    drawn = [sample_question(rng) for _ in range(5000)]
    assert not any(question.held_out for question in drawn)
    assert {(q.kind, q.key) for q in drawn}.isdisjoint((q.kind, q.key) for q in asked)
    sums = [Question("add", f"{a} {b}", "", "") for a in range(100) for b in range(100)]
    assert sum(q.held_out for q in sums) / len(sums) == pytest.approx(1 / HELD_OUT_SHARE, abs=0.01)


def test_careless_typing_keeps_the_words() -> None:
    rng = random.Random(0)
    for kind in KINDS:
        for question in questions(kind, 20):
            typed = carelessly(rng, question.text).lower().removeprefix("please ")
            assert typed.rstrip("?.!") == question.text.lower().rstrip("?.!")


def test_the_committed_tokenizer_reads_any_text_and_keeps_digits_apart() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.get_vocab_size() == VOCABULARY == train_tokenizer().get_vocab_size()
    for text in ("What is 17 + 25?", "naïve 東京 {}\n\t\x00", "  two  blanks"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("2025").tokens == ["2", "0", "2", "5"]
    assert all(len(tokenizer.encode(f" {word}").ids) == 1 for word in WORDS)


def test_a_batch_asks_for_the_answers_alone_and_conversations_do_not_see_each_other() -> None:
    tokenizer = load_tokenizer()
    batch = draw_batch(step_rng(3, 1), tokenizer, 4)
    again = draw_batch(step_rng(3, 1), tokenizer, 4)
    assert torch.equal(batch.tokens, again.tokens) and batch.tokens.shape == (4, ROW)
    assert not torch.equal(batch.tokens, draw_batch(step_rng(4, 1), tokenizer, 4).tokens)
    following = torch.roll(batch.tokens, -1, 1)
    assert torch.equal(following[batch.wanted], batch.targets)
    # As many answers end as questions are asked, and each follows the assistant's mark.
    assert (batch.targets == EOS).sum() == (batch.tokens == USER).sum() == (batch.tokens == ASSISTANT).sum()
    assert not (batch.targets == USER).any()
    starts = (batch.tokens == BOS).long().cumsum(1)
    looks, seen = batch.mask[:, 0], batch.real[:, :, None] & batch.real[:, None, :]
    assert not (looks & seen & (starts[:, :, None] != starts[:, None, :])).any()
    assert not looks.triu(1).any() and looks.diagonal(dim1=1, dim2=2).all()
    assert ((batch.positions == 0) & batch.real).sum() == (batch.tokens == BOS).sum()


def test_one_kind_can_be_asked_more_of() -> None:
    tokenizer = load_tokenizer()
    mark = tokenizer.token_to_id("Ġappears")
    usual, more = (
        (draw_batch(step_rng(1, 1), tokenizer, 16, kind).tokens == mark).sum().item()
        for kind in (None, "count")
    )
    assert more > 2 * usual > 0


def test_the_balance_loss_is_one_when_even_and_grows_as_experts_fall_idle() -> None:
    tokens = 8 * EXPERTS
    rows = torch.arange(tokens)
    even = torch.zeros(tokens, EXPERTS)
    even[rows, rows % EXPERTS] = even[rows, (rows + 1) % EXPERTS] = 9.0
    real = torch.ones(1, tokens, dtype=torch.bool)
    loss, shares = balance_loss([even], real)
    assert loss.item() == pytest.approx(1.0, abs=1e-3)
    assert torch.allclose(shares, torch.full((1, EXPERTS), 1 / EXPERTS))
    idle = torch.zeros(tokens, EXPERTS)
    idle[:, :2] = 9.0
    loss, shares = balance_loss([idle, even], real)
    assert loss.item() > 4 and shares[0].tolist()[:2] == [0.5, 0.5]
    # Padding counts for nothing.
    half = real.clone()
    half[:, tokens // 2 :] = False
    mixed = torch.cat([even[: tokens // 2], idle[tokens // 2 :]])
    assert balance_loss([mixed], half)[0].item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4), (3, 6, 4)])
def test_an_orthogonal_part_has_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonal(100 * matrices))
    assert values.min() > 0.3 and values.max() < 1.5
    together = orthogonal(matrices)
    if len(shape) == 3:
        assert torch.allclose(together[1], orthogonal(matrices[1]), atol=1e-5)


def test_the_optimizer_gives_the_experts_to_muon_and_learns() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(6, 6, bias=False)])})
    named = [(f"model.{name}", parameter) for name, parameter in model.named_parameters()]
    stack = torch.nn.Parameter(torch.zeros(2, 6, 6))
    gate = torch.nn.Parameter(torch.zeros(2, 6))
    optimizer = Optimizer([*named, ("m.layers.0.experts.down_proj", stack), ("m.layers.0.gate.weight", gate)])
    assert len(optimizer.state_dict()["momenta"]) == 2
    aim = torch.eye(6).expand(2, 6, 6)
    losses = []
    for _ in range(60):
        loss = ((stack - aim) ** 2).sum() + ((gate - 1) ** 2).sum() + sum((p**2).sum() for _, p in named)
        losses.append(loss.item())
        torch.autograd.backward(loss)
        optimizer.step(0.05)
    assert losses[-1] < 0.1 * losses[0] and stack.grad is None


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    rates = [learning_rate(step, 1000) for step in range(1001)]
    assert rates[0] < rates[49] == max(rates) and rates[1000] == 0 == learning_rate(100, 1000, 0.0)
    assert rates[399] == max(rates) > rates[600] > rates[900]


def test_weights_on_disk_have_the_names_of_published_ones() -> None:
    torch.manual_seed(0)
    state = build_model().state_dict()
    tensors = on_disk(state)
    prefix = "model.layers.1.mlp.experts"
    stack = state[f"{prefix}.gate_up_proj"]
    assert torch.equal(tensors[f"{prefix}.5.gate_proj.weight"], stack[5].chunk(2)[0])
    assert torch.equal(tensors[f"{prefix}.5.up_proj.weight"], stack[5].chunk(2)[1])
    assert torch.equal(tensors[f"{prefix}.5.down_proj.weight"], state[f"{prefix}.down_proj"][5])
    assert sum("experts." in name for name in tensors) == 3 * LAYERS * EXPERTS
    committed = load_file(WEIGHTS / "model.safetensors")
    assert {name: value.shape for name, value in committed.items()} == {
        name: value.shape for name, value in tensors.items()
    }
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert config["num_experts"] == build_config().num_experts and config["vocab_size"] == VOCABULARY


def test_the_committed_weights_answer_in_transformers_and_use_every_expert() -> None:
    answerer, shares = answer_here(WEIGHTS)
    scores = score(exam(4), answerer)
    assert scores["all"] >= 0.9 and scores["add"] == scores["capital"] == 1.0
    found = torch.tensor(shares())
    assert found.shape == (LAYERS, EXPERTS)
    assert found.min() > 0 and found.max() < 4 / EXPERTS


def test_the_chat_template_writes_what_training_saw() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(WEIGHTS)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi!"}]},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is 1 + 2?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><user>Be brief.\nHi!<assistant>Hello!</s><user>What is 1 + 2?<assistant>"
