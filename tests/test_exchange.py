"""Sample files of the harness and the authors' results; two evaluations compared in words."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.cli import main
from s1book.config import S1Error, project_root
from s1book.diff import card_differences, compare, differences, read_evaluation
from s1book.exchange import (
    COUNTED,
    halves,
    read_results,
    read_samples,
    setting_of,
    task_of,
    write_samples,
)
from s1book.pool import question_hash
from s1book.stats import accuracy_table, mcnemar

SEEDS = project_root() / "data" / "reference" / "seeds"
TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"),
    max_size=40,
)


def line(i, texts, target="3", right=1, **doc):
    """A line as the harness logs it."""
    return {
        "doc_id": i,
        "doc": {"problem": f"Made-up problem {i}", **doc},
        "target": target,
        "arguments": [[f"Made-up problem {i}", {"max_gen_toks": 32768}]],
        "resps": [texts],
        "filtered_resps": texts,
        "doc_hash": "0",
        "prompt_hash": "0",
        "target_hash": "0",
        "exact_match": right,
    }


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def said(answer, thinking="so", capped=False):
    label = "Final Answer: " if capped else "Answer: "
    return f"<|im_start|>think\n{thinking}\n<|im_start|>answer\n{label}{answer}"


def test_a_harness_file_becomes_records(tmp_path):
    path = write(
        tmp_path / "samples_aime24_nofigures_2025-02-01T10-00-00.123.jsonl",
        [line(0, [said("3"), said("4", capped=True)]), line(1, ["no delimiter at all"], right=0)],
    )
    records = read_samples(path, "natural", count=lambda text: len(text.split()))
    assert [r["sample"] for r in records] == [0, 1, 0] and {r["benchmark"] for r in records} == {
        "aime24"
    }
    assert [r["correct"] for r in records] == [True, False, False]
    assert [r["end_reason"] for r in records] == ["natural", "maximum", None]
    assert [r["harness_correct"] for r in records] == [True, None, False]
    assert (
        records[0]["id"] == f"aime24-{question_hash('Made-up problem 0')}"
        and records[0]["thinking_tokens"] == 1
    )
    assert (
        accuracy_table(records).accuracy[0] == 0.25
    )  # one of two samples right, and one wrong question


def test_tokens_are_not_guessed(tmp_path):
    [record] = read_samples(write(tmp_path / "samples_x.jsonl", [line(0, [said("3")])]))
    assert record["thinking_tokens"] is None


def test_newer_nesting_and_a_choice(tmp_path):
    asked = {"gen_args_0": {"arg_0": "Which?\n\nA) 1\nB) 2\nC) 3\nD) 4"}}
    lines = [line(0, said("B"), target="(B)") | {"arguments": asked}]
    [record] = read_samples(write(tmp_path / "samples_gpqa_diamond_openai.jsonl", lines))
    assert (record["benchmark"], record["extracted"], record["correct"]) == (
        "gpqa_diamond",
        "B",
        True,
    )


@given(st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_there_and_back(tmp_path_factory, answers):
    folder = tmp_path_factory.mktemp("there")
    rows = [
        {"id": f"q{i}", "question": f"question {i}", "answer": "3"} for i in range(len(answers))
    ]
    given_ = [
        {
            "id": f"q{i}",
            "setting": "natural",
            "text": thinking.strip("\n").replace("<|im_start|>", ""),
            "answer_text": (
                f"{a.replace('<|', '').lstrip(chr(10))}Answer: 3" if right else "Answer: 4"
            ),
            "correct": right,
        }
        for i, (thinking, a, right) in enumerate(answers)
    ]
    back = read_samples(
        write_samples(folder / "samples_toy.jsonl", rows, given_, "natural"), "natural"
    )
    for sent, got in zip(given_, back, strict=True):
        assert (sent["text"], sent["answer_text"]) == (got["text"], got["answer_text"])
        assert sent["correct"] == got["harness_correct"] == got["correct"]


COUNTS = st.fixed_dictionaries({name: st.integers(0, 40_000) for name in COUNTED})


@given(st.lists(st.lists(COUNTS, min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_token_counts_come_back_as_they_went(tmp_path_factory, counts):
    """One set of counts for each sample, also where a question has several."""
    folder, rows = tmp_path_factory.mktemp("counts"), []
    for i in range(len(counts)):
        rows.append({"id": f"q{i}", "question": f"question {i}", "answer": "3"})
    sent = [
        {"id": f"q{i}", "setting": "wait=1", "text": "so", "answer_text": "Answer: 3"}
        | {"correct": True, **each}
        for i, samples in enumerate(counts)
        for each in samples
    ]
    path = write_samples(folder / "samples_toy.jsonl", rows, sent, "wait=1")
    back = read_samples(path, "wait=1", count=lambda text: -1)  # a count in the file is better
    assert [[r[name] for name in COUNTED] for r in back] == [
        [r[name] for name in COUNTED] for r in sent
    ]
    old = [{k: v for k, v in json.loads(x).items() if k != "token_counts"} for x in path.open()]
    assert {r["thinking_tokens"] for r in read_samples(write(path, old))} == {None}


@pytest.mark.parametrize(
    "counts", [[{}, {}], [{"thinking_tokens": -1}], [{"thinking_tokens": "7"}], [{"x": 1}], 3]
)
def test_counts_that_do_not_fit_are_refused(tmp_path, counts):
    bad = line(0, [said("3")]) | {"token_counts": counts}
    with pytest.raises(S1Error, match="line 1: found token_counts that do not fit 1 samples"):
        read_samples(write(tmp_path / "samples_x.jsonl", [bad]))


def test_what_cannot_be_read_or_written_is_refused(tmp_path):
    broken = line(0, [said("3")])
    del broken["resps"]
    with pytest.raises(S1Error, match="samples_x.jsonl, line 1: found no resps"):
        read_samples(write(tmp_path / "samples_x.jsonl", [broken]))
    with pytest.raises(S1Error, match="no question in doc"):
        read_samples(write(tmp_path / "samples_x.jsonl", [line(0, [said("3")], problem="")]))
    with pytest.raises(S1Error, match="no record of setting 'wait=9'"):
        write_samples(
            tmp_path / "samples_y.jsonl",
            [{"id": "a", "question": "q", "answer": "3"}],
            [],
            "wait=9",
        )
    assert not (tmp_path / "samples_y.jsonl").exists()


@pytest.mark.parametrize(
    "folder, setting",
    [
        ("nottc", "free"),
        ("forcingauto", "natural"),
        ("forcing2k", "max=2000"),
        ("forcing500", "max=500"),
        ("forcingignore2wait", "wait=2"),
        ("s1.1forcingignore4wait", "wait=4"),
        ("s1.1nottc", "free"),
        ("other", "other"),
    ],
)
def test_the_authors_folders(folder, setting):
    assert setting_of(folder) == setting


def test_task_names():
    from pathlib import Path

    names = {
        "samples_openai_math_2025-02-01T10-00-00.jsonl": "math500",
        "samples_aime24_nofigures_agg64.jsonl": "aime24",
        "samples_gsm8k.jsonl": "gsm8k",
    }
    assert {name: task_of(Path(name)) for name in names} == names


def test_the_delimiter_inside_the_thinking_does_not_split_early():
    found = halves(said("3", thinking="a\n<|im_start|>answer\nb"))
    assert found["answer_text"] == "Answer: 3" and found["text"].endswith("b")


def author_results(root, share=0.5):
    """A copy in small of the authors' results: setting, model, scores and samples."""
    for setting in ("forcingauto", "forcingignore2wait"):
        folder = root / setting / "qfq__1k_qr_bt_dm_po"
        write(
            folder / "samples_aime24_nofigures_2025-02-01T10-00-00.jsonl",
            [line(i, [said("3" if i % 2 else "5")], right=i % 2) for i in range(30)],
        )
        scores = {
            "results": {
                "aime24_nofigures": {
                    "alias": "aime24_nofigures",
                    "exact_match,none": share,
                    "exact_match_stderr,none": "N/A",
                }
            }
        }
        (folder / "results_2025-02-01T10-00-00.json").write_text(json.dumps(scores))
    return root


def test_the_authors_results_load_and_must_fit_their_scores(tmp_path):
    records = read_results(author_results(tmp_path / "results"))
    assert len(records) == 60 and {r["setting"] for r in records} == {"natural", "wait=2"}
    assert {r["model"] for r in records} == {"qfq__1k_qr_bt_dm_po"} and sum(
        r["correct"] for r in records
    ) == 30
    with pytest.raises(S1Error, match="found 50.0 % right in the samples, wanted the 56.7 %"):
        read_results(author_results(tmp_path / "other", share=17 / 30))
    with pytest.raises(S1Error, match="no samples_"):
        read_results(tmp_path / "other" / "nothing")


# ---------------------------------------------------------------- diff


def evaluation(folder, right, setting="natural", card=None, name="b", **more):
    """A run's folder with records that are right where they are told to be."""
    write(
        folder / "records.jsonl",
        [
            {
                "benchmark": name,
                "id": i,
                "setting": setting,
                "correct": bool(r),
                "extracted": "3" if r else None,
                "answer_text": f"said {r}",
                "gold": "3",
                "end_reason": "natural",
            }
            | more
            for i, r in enumerate(right)
        ],
    )
    if card is not None:
        (folder / "run_card.json").write_text(json.dumps(card))
    return read_evaluation(folder)


def test_two_questions_of_thirty_could_be_noise(tmp_path):
    a = evaluation(tmp_path / "a", [1] * 15 + [0] * 15)
    b = evaluation(tmp_path / "b", [1] * 17 + [0] * 13)
    text = compare(a, b)
    assert (
        "50.0 % [33.3, 66.7] against 56.7 %" in text and "Became right: 2, became wrong: 0" in text
    )
    assert "could be noise" in text and "0 of 1 differences" in text and "no run card" in text


def test_a_real_difference_is_called_one(tmp_path):
    text = compare(
        evaluation(tmp_path / "a", [0] * 30), evaluation(tmp_path / "b", [1] * 20 + [0] * 10)
    )
    assert "1 of 1 differences are more than noise" in text


def test_looking_many_times_is_paid_for(tmp_path):
    """Six repaired and none spoiled is p = 0.03 alone, and nothing among ten settings."""
    sides = []
    for name, first in (("a", 0), ("b", 6)):
        rows = [
            {"benchmark": "b", "id": i, "setting": f"max={k}", "correct": k == 0 and i < first}
            for k in range(10)
            for i in range(30)
        ]
        sides.append(read_evaluation(write(tmp_path / name / "records.jsonl", rows)))
    assert "0 of 10 differences" in compare(*sides)
    for side in sides:
        object.__setattr__(side, "records", side.records[side.records.setting == "max=0"])
    assert "1 of 1 differences" in compare(*sides)


def test_equal_runs_are_equal(tmp_path):
    card = {"seed": 0, "engine": {"dtype": "float32"}, "seconds": {"b": 1.0}}
    a = evaluation(tmp_path / "a", [1, 0, 1], card=card)
    b = evaluation(tmp_path / "b", [1, 0, 1], card=card | {"seconds": {"b": 99.0}})
    text = compare(a, b)
    assert (
        "There is no difference." in text and "agree in everything that decides an answer" in text
    )


def test_the_grader_is_told_from_the_model(tmp_path):
    a = evaluation(tmp_path / "a", [1] * 40, answer_text="So 3")
    b = evaluation(tmp_path / "b", [0] * 20 + [1] * 20, answer_text="So 3")
    assert "20 equal answers are judged differently: the grader" in compare(a, b)


def test_another_benchmark_is_told_from_another_model(tmp_path):
    a = evaluation(tmp_path / "a", [1] * 30, gold="3")
    b = evaluation(tmp_path / "b", [0] * 30, gold="4")
    assert "30 questions have another reference answer" in compare(a, b)


def test_a_cap_is_named(tmp_path):
    a = evaluation(tmp_path / "a", [1] * 30)
    b = evaluation(tmp_path / "b", [1] * 10 + [0] * 20, end_reason="maximum")
    assert "In 0.0% against 100.0% of the answers a limit ended the thinking." in compare(a, b)


def test_cards_are_compared_entry_by_entry():
    first = {
        "engine": {"dtype": "float32", "slots": 128},
        "versions": {"torch": "2.13.0"},
        "seed": 0,
        "cap_hit": {"a": 1},
    }
    second = {
        "engine": {"dtype": "bfloat16", "slots": 128},
        "versions": {"torch": "2.14.0", "vllm": "0.32.0"},
        "seed": 0,
    }
    found = card_differences(first, second)
    assert [text.split(":")[0] for text in found] == [
        "engine.dtype",
        "versions.torch",
        "versions.vllm",
    ]
    assert "float32 and bfloat16 (other precision" in found[0] and "unknown and 0.32.0" in found[2]


def test_other_questions_are_not_paired(tmp_path):
    a = evaluation(tmp_path / "a", [1] * 40)
    path = write(
        tmp_path / "b" / "records.jsonl",
        [
            {"benchmark": "b", "id": 100 + i, "setting": "natural", "correct": i < 4}
            for i in range(40)
        ],
    )
    text = compare(a, read_evaluation(path))
    assert "share no question" in text and "more than noise" in text


def test_the_statistics_are_chapter_15s():
    [a, b] = [read_evaluation(SEEDS / str(seed)) for seed in (0, 1)]
    found = {(d.benchmark, d.setting): d for d in differences(a, b)}
    d = found["tiny_mixed", "wait=1"]
    table = accuracy_table(a.records.to_dict("records")).set_index(["benchmark", "setting"])
    assert d.accuracy[0].value == pytest.approx(table.accuracy["tiny_mixed", "wait=1"])
    assert d.p == mcnemar(d.spoiled, d.repaired) and d.shared == 500
    assert np.isclose(d.change.value, (d.repaired - d.spoiled) / 500) and d.other_gold == 0


def test_the_command(tmp_path, capsys):
    evaluation(tmp_path / "a", [1, 0] * 15)
    write(tmp_path / "samples_b.jsonl", [line(i, [said("3")]) for i in range(3)])
    with pytest.raises(SystemExit) as end:
        main(["diff", str(tmp_path / "a"), str(tmp_path / "samples_b.jsonl")])
    assert end.value.code == 1 and "no benchmark and setting in common" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["diff", str(tmp_path / "a"), str(tmp_path / "a")])
    assert not end.value.code and "There is no difference." in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["diff", str(tmp_path / "nothing"), str(tmp_path / "a")])
    assert end.value.code == 1 and "nothing: found no records" in capsys.readouterr().err
