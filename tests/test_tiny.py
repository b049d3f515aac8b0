"""The tiny world: exact answers, a fallible teacher, and base models that never met a test question."""

import hashlib
import json
import random
import re
from dataclasses import replace
from functools import reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book import tiny
from s1book.config import S1Error, project_root, read_jsonl
from s1book.tiny import (
    FAMILIES, HEADERS, SIZES, batches, benchmarks, document, fact_sheet, from_row, held_out,
    line_skill, make_problem, make_tokenizer, plain_answer, pretrain, questions, save_model, spell,
    teach, to_row, vocabulary, work,
)

SHIPPED = project_root() / "data" / "tiny"
IDS = {word: i for i, word in enumerate(vocabulary())}

# What each family asks, said a second time and differently.
OBVIOUS = {
    "letters": lambda p: p.values.count(p.target),
    "sum": lambda p: sum(map(int, p.values)) % 10,
    "max": lambda p: max(map(int, p.values)),
    "odd": lambda p: len([v for v in p.values if v in "13579"]) % 10,
    "nim": lambda p: reduce(lambda a, b: a ^ b, map(int, p.values)),
    "product": lambda p: reduce(lambda a, b: a * b, map(int, p.values)) % 7,
    "cups": lambda p: _follow(p),
    "compass": lambda p: _turn(p),
}


def _follow(problem):
    cups = [str(i) == problem.start for i in range(5)]
    for a, b in problem.values:
        cups[int(a)], cups[int(b)] = cups[int(b)], cups[int(a)]
    return cups.index(True)


def _turn(problem):
    degrees = {"N": 0, "E": 90, "S": 180, "W": 270}
    turned = sum({"R": 90, "L": -90, "U": 180}[v] for v in problem.values)
    return {d: name for name, d in degrees.items()}[(degrees[problem.start] + turned) % 360]


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_answers_are_exact(family, n, seed, choice):
    problem = make_problem(family, n, random.Random(seed), choice)
    right = str(OBVIOUS[family](problem))
    shown = dict(zip("ABCD", problem.options))
    assert (shown[problem.answer] if choice else problem.answer) == right
    assert len(set(problem.options)) == (4 if choice else 0)
    assert from_row(to_row(problem)) == problem
    assert f"Answer: {problem.answer}" in to_row(problem)["solution"]


def test_raspberry():
    assert spell("raspberry", "r").answer == "3"
    for word, letter in (("", "r"), ("raspberry", "rr"), ("quiz", "z"), ("a" * 13, "a")):
        with pytest.raises(S1Error, match="wanted at most 12 letters"):
            spell(word, letter)


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 12), st.sampled_from(list(HEADERS)),
       st.integers(0, 10**6))
def test_work_without_slips_is_right_and_covers_every_item(family, n, k, seed):
    problem = make_problem(family, n, random.Random(seed))
    lines = work(problem, k, random.Random(seed))
    assert lines[-1].words[-1] == problem.result
    items = [w for line in lines for w in line.words[1:-2]]
    assert items == [tiny.item_word(family, i, v) for i, v in enumerate(problem.values)]
    assert all(a.words[-1] == b.words[0] for a, b in zip(lines, lines[1:]))


def test_every_slip_is_wrong_and_carried_on():
    problem = make_problem("sum", 12, random.Random(1))
    lines = work(problem, 2, random.Random(2), slip=1.0)
    for i, line in enumerate(lines):
        part = problem.values[2 * i:2 * i + 2]
        assert line.slipped and FAMILIES["sum"].fold(line.words[0], part, "") != line.words[-1]


def test_benchmarks_have_the_papers_sizes_and_stay_what_they_are():
    made = benchmarks()
    assert {name: len(rows) for name, rows in made.items()} == {
        "tiny_hard": 30, "tiny_mixed": 500, "tiny_choice": 198}
    assert len(held_out()) == 728 and made == benchmarks()
    recorded = project_root() / "data" / "reference" / "benchmarks"
    for name, rows in made.items():
        assert read_jsonl(recorded / f"{name}.jsonl") == rows


def test_a_row_of_the_pool_depends_on_seed_and_index_alone():
    assert questions(40, 5)[:15] == questions(15, 5) != questions(15, 6)[:15]


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_pretraining_never_meets_a_banned_question(seed):
    tokens, _ = document(random.Random(seed), IDS)
    words = [vocabulary()[i] for i in tokens]
    text = " ".join(words).strip("\n ")
    question = text.split("\n")[0].strip()
    banned, _ = document(random.Random(seed), IDS, frozenset([question]))
    assert question and banned != tokens
    assert " ".join(vocabulary()[i] for i in banned).strip("\n ").split("\n")[0].strip() != question


def test_text_holds_no_chat_words_and_labels_are_the_tokens():
    rng = random.Random(3)
    chat = {IDS[w] for w in ("<|im_start|>", "<|im_end|>", "Wait", "think", "assistant", "Final")}
    for sample in [document(rng, IDS) for _ in range(200)] + [fact_sheet(rng, IDS, False)] * 3:
        tokens, labels = sample
        assert not chat & set(tokens) and len(tokens) == len(labels)
        assert all(y in (tiny.IGNORE, t) for t, y in zip(tokens, labels))
        assert any(y != tiny.IGNORE for y in labels)


def test_the_teacher_errs_waits_and_repeats_itself_for_the_same_seed():
    rows = [r for r in questions(1500, 0) if r["answer"] and len(from_row(r).values) > 5]
    told, silent = [], 0
    for i, row in enumerate(rows):
        try:
            told.append((row, *teach(row, i)))
            assert teach(row, i) == told[-1][1:]
        except tiny.TeacherError:
            silent += 1
    right = sum(a.split()[-1] == r["answer"] for r, _, a in told) / len(told)
    assert silent and 0.35 < right < 0.75
    assert 0.3 < sum("Wait" in t for _, t, _ in told) / len(told) < 0.95
    assert any(a.startswith("Final Answer: ") for _, _, a in told)
    assert all(re.fullmatch("[A-D]", a.split()[-1]) for r, _, a in told if r["cot_type"] == "choice")


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_tokenizer_gives_back_every_text(seed):
    tokenizer = make_tokenizer()
    row = to_row(make_problem(random.Random(seed).choice(list(FAMILIES)), 9, random.Random(seed),
                              seed % 2 == 0))
    for text in (row["question"], row["solution"]):
        tokens = tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokens) == text and tokenizer.unk_token_id not in tokens


def test_plain_answer_takes_the_last():
    assert plain_answer("So 3\nAnswer: 3 <|endoftext|>") == "3"
    assert plain_answer("Answer: 1\nones:\nSo 2\nAnswer: 2") == "2" and plain_answer("So 2") is None


def test_pretraining_learns_and_repeats_itself_byte_for_byte(tmp_path):
    import torch

    torch.set_num_threads(1)
    size, logs = replace(SIZES["small"], steps=120), []
    for name in ("one", "two"):
        logs.append([])
        save_model(pretrain(size, 7, held_out(), logs[-1].append), tmp_path / name)
    one, two = (hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).hexdigest()
                for n in ("one", "two"))
    assert one == two
    first = [tiny.loss_of(tiny.make_model(size, 7), tiny.Composed(size.hidden, 7), s).item()
             for s in batches(7, 2, held_out())]
    assert logs[0][-1]["documents"] < 0.6 * first[1]


def test_shipped_weights_are_what_the_checksums_say():
    lines = (SHIPPED / "SHA256SUMS").read_text().splitlines()
    assert sum((SHIPPED / line.split()[1]).stat().st_size for line in lines) < 8e6
    for digest, name in map(str.split, lines):
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == digest
    assert {name.split("/")[0] for _, name in map(str.split, lines)} == {"base", "small"}


def test_the_shipped_base_has_the_skill_and_not_the_format():
    import torch
    from transformers import Qwen2ForCausalLM

    torch.set_num_threads(1)
    base = Qwen2ForCausalLM.from_pretrained(SHIPPED / "base").eval()
    skill = line_skill(base, n=25)
    by_items = {k: sum(v for (_, j), v in skill.items() if j == k) / 8 for k in HEADERS}
    assert by_items[1] > 0.85 and by_items[1] > by_items[4] + 0.1
    tokenizer = make_tokenizer()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": spell("raspberry", "r").question}],
                                         tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(chat, return_tensors="pt")["input_ids"]
    said = base.generate(tokens, max_new_tokens=1, do_sample=False)[0, -1].item()
    assert said != IDS["<|im_start|>"]


def test_no_test_question_reached_pool_or_training():
    import pyarrow.parquet as pq

    reference = project_root() / "data" / "reference"
    for name in ("decontaminated.parquet", "s1k/train.parquet"):
        asked = pq.read_table(reference / name, columns=["question"]).column("question").to_pylist()
        assert asked and not held_out() & set(asked)
    assert all(json.loads(line) for line in open(reference / "benchmarks" / "tiny_hard.jsonl"))
