"""The tiny world at work: held-out questions, a pool, a fallible teacher, and what the shipped base can do."""

import hashlib
import json
import re

from s1book.config import project_root, read_jsonl
from s1book.pretraining import make_tokenizer, vocabulary
from s1book.tiny import (
    TeacherError, benchmarks, held_out, line_skill, plain_answer, questions, teach,
)
from s1book.world import HEADERS, from_row, spell

SHIPPED = project_root() / "data" / "tiny"
IDS = {word: i for i, word in enumerate(vocabulary())}


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


def test_the_teacher_errs_waits_and_repeats_itself_for_the_same_seed():
    rows = [r for r in questions(1500, 0) if r["answer"] and len(from_row(r).values) > 5]
    told, silent = [], 0
    for i, row in enumerate(rows):
        try:
            told.append((row, *teach(row, i)))
            assert teach(row, i) == told[-1][1:]
        except TeacherError:
            silent += 1
    right = sum(a.split()[-1] == r["answer"] for r, _, a in told) / len(told)
    assert silent and 0.35 < right < 0.75
    assert 0.3 < sum("Wait" in t for _, t, _ in told) / len(told) < 0.95
    assert any(a.startswith("Final Answer: ") for _, _, a in told)
    assert all(re.fullmatch("[A-D]", a.split()[-1]) for r, _, a in told if r["cot_type"] == "choice")


def test_plain_answer_takes_the_last():
    assert plain_answer("So 3\nAnswer: 3 <|endoftext|>") == "3"
    assert plain_answer("Answer: 1\nones:\nSo 2\nAnswer: 2") == "2" and plain_answer("So 2") is None


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
