"""Evaluation: every question under every setting, once, whatever kills the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import make_model

from s1book.config import MissingArtefact, PresetError, Run, append_jsonl, read_jsonl
from s1book.engine import Continued, TransformersEngine
from s1book.evaluate import (
    EvaluateError,
    check_rows,
    evaluate,
    in_order,
    inputs_of,
    key_of,
    load_benchmarks,
    make_record,
    open_questions,
    passes,
    shares,
    verdict,
)
from s1book.format import FormatError, load_tokenizer
from s1book.pool import Collected, write_account
from s1book.runcard import judged_twice, measured_card

SMALL = ["budget.maxima=[0, 3, 6]", "budget.waits=[0, 1, 2]", "budget.max_thinking_tokens=24",
         "budget.max_answer_tokens=4", "evaluate.benchmarks=[few, some]", "engine.slots=4"]
SETTINGS = ["max=0", "max=3", "max=6", "natural", "wait=1", "wait=2", "newline=1", "base",
            "base-plain"]


def question(benchmark, i):
    """A question in words of the fixtures' tokenizer."""
    items = " ".join(f"{j}{letter}" for j, letter in enumerate("rasp"[: 1 + i % 4], 1))
    return {"id": f"{benchmark}-{i}", "benchmark": benchmark, "domain": "count",
            "question": f"How many r in : {items} ?", "answer": str(i % 3), "cot_type": "open"}


@pytest.fixture
def folder(tmp_path, tiny_tokenizer, tiny_model, monkeypatch):
    """A run's folder with two random models and two benchmarks."""
    monkeypatch.setenv("S1BOOK_RUN", str(tmp_path / "run"))
    for name, model in (("sft", tiny_model), ("base", make_model(len(tiny_tokenizer), seed=1))):
        tiny_tokenizer.save_pretrained(tmp_path / "run" / name)
        model.save_pretrained(tmp_path / "run" / name)
    for name, n in (("few", 3), ("some", 9)):
        for i in range(n):
            (tmp_path / "run" / "benchmarks").mkdir(exist_ok=True)
            append_jsonl(tmp_path / "run" / "benchmarks" / f"{name}.jsonl", question(name, i))
    return tmp_path / "run"


def stripped(records):
    """Records without the one field that depends on the clock."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def counting(monkeypatch):
    """How many strategies the engine is given from now on."""
    given, real = [], TransformersEngine.run

    def run(self, strategies, *rest):
        strategies = list(strategies)
        given.append(len(strategies))
        return real(self, strategies, *rest)

    monkeypatch.setattr(TransformersEngine, "run", run)
    return given


def test_every_question_has_every_setting_within_its_budget(folder):
    records = evaluate(Run.open("tiny", SMALL))
    assert len(records) == 12 * len(SETTINGS) == len({key_of(r) for r in records})
    assert [r["setting"] for r in records[: len(SETTINGS)]] == SETTINGS
    assert records == read_jsonl(folder / "records.jsonl")
    for r in records:
        kind, _, value = r["setting"].partition("=")
        assert r["thinking_tokens"] <= (int(value) if kind == "max" else 24)
        assert r["waits"] <= (int(value) if kind in ("wait", "newline") else 0)
        assert r["model"] == ("base" if kind.startswith("base") else "sft")
        assert r["correct"] in (True, False) and r["end_reason"] in ("natural", "maximum")
    assert {r["answer_text"][:13] for r in records if r["setting"] == "max=0"} == {"Final Answer:"}


def test_the_control_writes_a_line_break_and_wait_writes_wait(folder):
    """The replies are ours: one token of thinking, an end, an answer."""
    tokenizer = load_tokenizer(folder / "sft")
    sweep, control = passes(Run.open("tiny", SMALL).preset)[:2]
    for plan, setting, word in ((sweep, "wait=1", "Wait"), (control, "newline=1", "\n")):
        found = finish(plan.prepare(tokenizer)(question("few", 0)), tokenizer)
        assert found[setting]["waits"] == 1 and found[setting]["forced_tokens"] == 1
        assert found[setting]["text"] == tokenizer.decode(
            tokenizer.encode(f"So{word}So" if word == "\n" else f"So {word} So"))


def finish(strategy, tokenizer):
    """Drive a strategy by hand: 'So' and an end while thinking, '2' and an end as answer."""
    so, two = tokenizer.encode("So")[0], tokenizer.encode("2")[0]
    replies = None
    while True:
        try:
            asks = strategy.send(replies)
        except StopIteration as end:
            return end.value
        replies = [Continued([two if a.max_new_tokens == 4 else so], min(a.stop_ids)) for a in asks]


def test_several_samples_have_records_of_their_own(folder, monkeypatch):
    more = [*SMALL, "evaluate.samples=3", "evaluate.temperature=1.0", "evaluate.benchmarks=[few]"]
    records = evaluate(Run.open("tiny", more))
    assert len(records) == 3 * 3 * len(SETTINGS) == len({key_of(r) for r in records})
    frame = pd.DataFrame(records)
    texts = frame[frame.setting == "natural"].groupby("id").text.nunique()
    assert texts.max() > 1  # a sample has random numbers of its own
    again = frame.pivot(index=["id", "sample"], columns="setting", values="text")
    assert all(whole.startswith(part.rstrip(" \n")) for part, whole in zip(again["max=3"], again["natural"]))
    path = folder / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["sample"] != 1 or json.loads(line)["setting"] != "base"]
    path.write_bytes(b"".join(kept))
    given = counting(monkeypatch)
    assert stripped(evaluate(Run.open("tiny", more))) == stripped(records) and given == [3]  # only those samples


def test_samples_need_a_temperature():
    with pytest.raises(PresetError, match="evaluate.temperature: found 0.0, wanted a temperature above 0"):
        Run.open("tiny", ["evaluate.samples=4"])


def test_one_sample_keeps_the_fingerprint_of_older_runs(folder):
    """Runs from before there were samples go on: the preset's fingerprint has not changed."""
    old = Run.open("tiny", SMALL).preset.model_dump(include={"seed", "engine", "budget", "evaluate", "device"})
    assert set(old["evaluate"]) > {"benchmarks"}
    inputs = inputs_of(Run.open("tiny", SMALL))
    assert inputs["preset"] != inputs_of(Run.open("tiny", [*SMALL, "evaluate.samples=2", "evaluate.temperature=1.0"]))["preset"]
    assert inputs["preset"] == inputs_of(Run.open("tiny", [*SMALL, "evaluate.samples=1"]))["preset"]
    assert inputs["preset"] != inputs_of(Run.open("tiny", [*SMALL, "evaluate.temperature=1.0"]))["preset"]


def test_both_graders_are_in_the_record_and_their_disagreement_on_the_card(folder):
    records = evaluate(Run.open("tiny", SMALL))
    card = json.loads((folder / "run_card.json").read_text())
    for r in records:
        assert r["math_verify"] in (True, False, None) and (r["extracted"] is not None or r["math_verify"] is False)
    rate = sum(r["math_verify"] != r["correct"] for r in records if r["benchmark"] == "few") / (3 * len(SETTINGS))
    assert card["grader_disagreement"]["few"] == pytest.approx(rate, abs=1e-4)


def test_disagreement_is_counted_and_not_resolved():
    """math-verify reads "x=3" as 3; our rules have not, and the card says how often that happens."""
    rows = [{"benchmark": "b", "setting": "s", "end_reason": "natural", "seconds": 0.0, "gold": "3",
             "extracted": a, "correct": c} for a, c in (("3", True), ("x=3", False), (None, False))]
    twice = judged_twice(rows)
    assert [r["math_verify"] for r in twice] == [True, True, False]
    assert measured_card(twice)["grader_disagreement"] == {"b": 0.3333}


def test_a_finished_evaluation_asks_nothing(folder, monkeypatch):
    first = evaluate(Run.open("tiny", SMALL))
    given = counting(monkeypatch)
    assert evaluate(Run.open("tiny", SMALL)) == first and given == []


def test_only_what_is_missing_is_asked_again(folder, monkeypatch):
    first = evaluate(Run.open("tiny", SMALL))
    path = folder / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: -len(SETTINGS)]) + lines[-len(SETTINGS)][:30])  # torn
    given = counting(monkeypatch)
    assert stripped(evaluate(Run.open("tiny", SMALL))) == stripped(first)
    assert given == [1, 1, 1, 1]  # one question, in each of the four passes


SLOW = """
import sys, time
from s1book import evaluate as module
from s1book.config import Run
real = module.append_jsonl
def slowly(path, record):
    real(path, record)
    time.sleep(0.01)
module.append_jsonl = slowly
module.evaluate(Run.open("tiny", sys.argv[1:]))
"""


def start(folder):
    """An evaluation in a process of its own, slow enough to be killed."""
    env = os.environ | {"S1BOOK_RUN": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SLOW, *SMALL], env=env)


def lines_of(path):
    """Complete lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_sigkill_loses_nothing_and_pays_nothing_twice(folder, monkeypatch):
    path = folder / "records.jsonl"
    for at_least in (8, 45):  # twice: the second process goes on where the first was killed
        process, began = start(folder), time.monotonic()
        while lines_of(path) < at_least and time.monotonic() - began < 60:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    kept = read_jsonl(path)
    assert 45 <= len(kept) < 12 * len(SETTINGS) and len({key_of(r) for r in kept}) == len(kept)
    given = counting(monkeypatch)
    resumed = evaluate(Run.open("tiny", SMALL))
    full = [q for q in {r["id"] for r in kept}
            if sum(r["id"] == q and r["setting"] in SETTINGS[:6] for r in kept) == 6]
    assert sum(given) <= 12 * 4 - len(full)
    by_key = {key_of(r): r for r in resumed}
    assert all(by_key[key_of(r)].items() >= r.items() for r in kept)  # not even the seconds changed
    path.unlink()
    assert stripped(evaluate(Run.open("tiny", SMALL))) == stripped(resumed)


def test_records_of_another_model_are_refused(folder, tiny_tokenizer):
    evaluate(Run.open("tiny", SMALL))
    make_model(len(tiny_tokenizer), seed=7).save_pretrained(folder / "sft")
    with pytest.raises(EvaluateError, match="another sft"):
        evaluate(Run.open("tiny", SMALL))
    (folder / "records.jsonl").unlink()
    evaluate(Run.open("tiny", SMALL))


def test_records_of_another_budget_are_refused(folder):
    evaluate(Run.open("tiny", SMALL))
    with pytest.raises(EvaluateError, match="another preset"):
        evaluate(Run.open("tiny", [*SMALL, "budget.max_answer_tokens=5"]))


def test_records_outlive_the_port_of_a_server(folder):
    where = lambda port: inputs_of(Run.open("tiny", [*SMALL, f"engine.server={{like: vllm, url: http://127.0.0.1:{port}/v1}}"]))
    assert where(1) == where(2) == inputs_of(Run.open("tiny", SMALL))
    assert where(1) != inputs_of(Run.open("tiny", [*SMALL, "engine.dtype=bfloat16"]))


def test_run_card(folder):
    records = evaluate(Run.open("tiny", SMALL))
    text = (folder / "run_card.json").read_text()
    card = json.loads(text)
    assert set(card["inputs"]) == {"sft", "base", "benchmarks/few", "benchmarks/some", "preset"}
    assert set(card["engines"]) == {"sweep", "control", "chat", "plain"}
    assert card["records"] == len(records) and set(card["no_answer"]) == set(SETTINGS)
    total = sum(r["seconds"] for r in records)
    assert sum(card["seconds"].values()) == pytest.approx(total, abs=1e-3)
    assert card["cap_hit"]["max=0"] == 1.0 and set(card["versions"]) >= {"python", "torch", "math-verify"}
    assert {"preset", "seed", "samples", "temperature", "device", "hardware", "engine", "prompt"} <= set(card)
    assert card["prompt"]["text"].count("{question}") == 1 and "<|im_start|>think" in card["prompt"]["text"]
    assert card["engine"]["slots"] == 4 and card["engine"]["dtype"] == "float32"
    assert str(folder) not in text and str(Path.home()) not in text


def test_the_run_card_names_the_sources_that_the_pool_goes_without(folder):
    found = Collected([], [{"source": name, "refused": said} for name, said in (("a", ""), ("b", "source b: gone"))], [])
    write_account(found, folder / "pool_ledger.csv", folder / "near_duplicates.csv")
    evaluate(Run.open("tiny", SMALL))
    assert json.loads((folder / "run_card.json").read_text())["sources_left_out"] == ["source b: gone"]


def test_a_benchmark_with_a_fault_is_refused():
    rows = [question("few", i) for i in range(3)]
    assert check_rows("few", rows) == rows
    for bad, said in (({"answer": None}, "no answer"), ({"id": "few-0"}, "a second time"),
                      ({"benchmark": "some"}, "benchmark 'some'"), ({"question": " "}, "no question")):
        with pytest.raises(EvaluateError, match=f"row 3: found .*{said}"):
            check_rows("few", [*rows[:2], rows[2] | bad])


def test_an_unknown_benchmark_is_refused(folder):
    with pytest.raises(MissingArtefact, match="chapter 02"):
        evaluate(Run.open("tiny", [*SMALL, "evaluate.benchmarks=[fwe]"]))
    assert not (folder / "records.jsonl").exists()


def test_a_published_benchmark_that_is_missing_names_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("S1BOOK_RUN", str(tmp_path))
    with pytest.raises(MissingArtefact, match="bring it with: s1book benchmarks --preset h100"):
        load_benchmarks(Run.open("h100"))


def test_a_model_of_another_vocabulary_is_refused(folder):
    append_jsonl(folder / "benchmarks" / "few.jsonl",
                 question("few", 9) | {"question": "Compute the determinant"})
    with pytest.raises(FormatError, match="'Compute'"):
        evaluate(Run.open("tiny", SMALL))


def test_verdict_looks_only_behind_the_mark():
    row = question("few", 2)
    cases = {"Answer: 2": True, "Final Answer: 2": True, "2": True, "So 2 r": False, "": False,
             "Answer: 3": False, "Answer: 3\nAnswer: 2": True}
    assert {text: verdict(row, "natural", text)["correct"] for text in cases} == cases
    assert verdict(row, "base-plain", "So 1\nAnswer: 2 Wait")["extracted"] == "2"
    assert verdict(row, "base-plain", "2") == {"extracted": None, "gold": "2", "correct": False}


def test_shares_and_order():
    measured = {"a": {"thinking_tokens": 9, "answer_tokens": 0},
                "b": {"thinking_tokens": 0, "answer_tokens": 0}}
    assert shares(11.0, measured) == {"a": 10.0, "b": 1.0}
    rows, fields = [question("few", i) for i in range(2)], {"answer_text": "2"}
    records = [make_record(r, "sft", s, fields, 0, 0.0) for s in "ab" for r in rows]
    assert [r["setting"] for r in in_order(records, rows, ["a", "b"])] == ["a", "b", "a", "b"]
    assert open_questions(rows, ("a", "c"), {key_of(r) for r in records}) == rows
    with pytest.raises(EvaluateError, match="1 missing"):
        in_order(records[1:], rows, ["a", "b"])
    with pytest.raises(EvaluateError, match="2 records that do not belong"):
        in_order(records, rows, ["a"])


def test_only_the_tiny_world_has_a_plain_pass():
    names = [p.name for p in passes(Run.open("h100", []).preset)]
    assert names == ["sweep", "control", "chat"]
