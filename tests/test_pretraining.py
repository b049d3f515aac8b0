"""How a base model is made: text without a test question, exact tokens, and the same weights for the same seed."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.config import load_preset
from s1book.pretraining import (
    IGNORE, SIZES, Composed, batches, document, fact_sheet, loss_of, make_model, make_tokenizer,
    pretrain, save_model, train_side_by_side, untrained_ids, vocabulary,
)
from s1book.tiny import held_out
from s1book.world import FAMILIES, make_problem, to_row

IDS = {word: i for i, word in enumerate(vocabulary())}
TOKENIZER = make_tokenizer()


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
        assert all(y in (IGNORE, t) for t, y in zip(tokens, labels))
        assert any(y != IGNORE for y in labels)


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_tokenizer_gives_back_every_text(seed):
    row = to_row(make_problem(random.Random(seed).choice(list(FAMILIES)), 9, random.Random(seed),
                              seed % 2 == 0))
    for text in (row["question"], row["solution"]):
        tokens = TOKENIZER(text)["input_ids"]
        assert TOKENIZER.decode(tokens) == text and TOKENIZER.unk_token_id not in tokens


def test_pretraining_learns_and_repeats_itself_byte_for_byte(tmp_path):
    import torch

    torch.set_num_threads(1)
    size, logs = replace(SIZES["small"], steps=240), []
    for name in ("one", "two"):
        logs.append([])
        save_model(pretrain(size, 7, held_out(), logs[-1].append), tmp_path / name)
    one, two = (hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).hexdigest()
                for n in ("one", "two"))
    assert one == two
    first = [loss_of(make_model(size, 7), Composed(size.hidden, 7), s).item()
             for s in batches(7, 2, held_out())]
    assert logs[0][-1]["documents"] < 0.6 * first[1]


def test_models_trained_side_by_side_are_those_trained_alone_and_are_kept(tmp_path):
    import torch

    sizes = {name: replace(size, steps=60) for name, size in SIZES.items()}
    (tmp_path / "alone").mkdir()
    logs = train_side_by_side(tmp_path, 7, held_out(), sizes)
    torch.set_num_threads(1)
    for name, size in sizes.items():
        save_model(pretrain(size, 7, held_out()), tmp_path / "alone" / name)
        one, other = ((folder / name / "model.safetensors") for folder in (tmp_path, tmp_path / "alone"))
        assert one.read_bytes() == other.read_bytes()
    (tmp_path / "small/model.safetensors").write_bytes(b"kept")
    again = train_side_by_side(tmp_path, 8, held_out(), sizes)   # another seed would give other logs
    assert [[row["documents"] for row in again[n]] for n in sizes] == [[row["documents"] for row in logs[n]] for n in sizes]
    assert (tmp_path / "small/model.safetensors").read_bytes() == b"kept"


PARENT = """
import pathlib
from dataclasses import replace
from s1book.pretraining import SIZES, train_side_by_side
if __name__ == "__main__":
    train_side_by_side(pathlib.Path("."), 7, sizes={n: replace(s, steps=240) for n, s in SIZES.items()})
"""


def test_models_whose_parent_was_killed_are_finished_and_nobody_lingers(tmp_path):
    """Whoever runs the chapter again finds them; no process waits for a parent that is gone."""
    import psutil

    (tmp_path / "parent.py").write_text(PARENT)
    paths = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, env=paths)
    deadline, found = time.monotonic() + 120, []
    while len([c for c in found if c.cpu_times().user > 4]) < 2:   # both have begun
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
        found = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not psutil.wait_procs(found, timeout=180)[1]
    assert all((tmp_path / f"{name}_log.csv").exists() for name in SIZES)


def test_the_preset_states_the_shape_of_the_model():
    shape, size = load_preset("tiny").model.shape, SIZES["base"]
    assert (shape.vocabulary, shape.layers, shape.hidden, shape.head_dim) == (
        len(vocabulary()), size.layers, size.hidden, size.head_dim)


def test_untrained_words_start_where_the_line_break_is():
    import torch

    model = make_model(SIZES["small"], 0)
    Composed(SIZES["small"].hidden, 0).write(model)
    vectors = model.model.embed_tokens.weight
    assert IDS["<|im_start|>"] in untrained_ids() and IDS["a7"] not in untrained_ids()
    far = (vectors[untrained_ids()] - vectors[IDS["\n"]]).norm(dim=1).max()
    assert far < 0.25 * torch.cdist(vectors[[IDS["a7"]]], vectors[[IDS["\n"]]])
