"""The page of traces: positions, flips, filters in a browser, and texts that try to break it."""

import html
import json
import re
import shutil
import subprocess
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.cli import main
from s1book.config import S1Error, project_root
from s1book.diff import read_evaluation
from s1book.inspector import inspector_page, pieces, threads, write_inspector
from s1book.stats import flips

SEED = project_root() / "data" / "reference" / "seeds" / "0"
BROWSER = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "headless_shell"))
    ),
    None,
)


def record(setting, text, answer, gold="3", **more):
    kind = setting.partition("=")[0]
    return {
        "benchmark": "toy",
        "id": "q",
        "model": "sft",
        "setting": setting,
        "text": text,
        "answer_text": f"Answer: {answer}",
        "extracted": answer,
        "gold": gold,
        "correct": answer == gold,
        "thinking_tokens": len(text),
        "answer_tokens": 2,
        "end_reason": "maximum" if kind == "max" else "natural",
        "waits": int(setting[5:]) if kind == "wait" else 0,
        "forced_tokens": int(setting[5:]) if kind == "wait" else 0,
    } | more


CHAIN = [
    record("max=0", "", "1"),
    record("max=8", "one two", "3"),
    record("natural", "one two Wait three\n", "4"),
    record("newline=1", "one two Wait three\n\nfour", "3"),
    record("wait=1", "one two Wait three\nWait four\n", "3"),
    record("wait=2", "one two Wait three\nWait four\nWait five", "5"),
]


def test_forced_words_are_told_from_the_models_own():
    [thread] = threads(CHAIN[::-1])
    assert [s.setting for s in thread.steps] == [
        "max=0",
        "max=8",
        "natural",
        "newline=1",
        "wait=1",
        "wait=2",
    ]
    assert [a for a, b in thread.forced] == [19, 29] and thread.unplaced == 0  # not the Wait at 8
    assert {thread.text[a:b] for a, b in thread.forced} == {"Wait"}
    assert [s.change for s in thread.steps] == [
        "",
        "repaired",
        "spoiled",
        "repaired",
        "repaired",
        "spoiled",
    ]
    kinds = pieces(thread)
    assert "".join(text for kind, text in kinds if kind in ("thinking", "forced")) == thread.text
    assert [text for kind, text in kinds if kind == "forced"] == ["Wait", "Wait"]
    assert [text for kind, text in kinds if kind == "cut"] == ["max=8: 3, right"] and kinds[-1][
        1
    ] == "Answer: 5"


def test_a_missing_number_of_waits_leaves_places_unknown():
    [thread] = threads(
        [CHAIN[2], CHAIN[4], record("wait=4", CHAIN[5]["text"] + "Wait six\nWait seven", "3")]
    )
    assert len(thread.forced) == 2 and thread.unplaced == 2
    assert "2 more\nwere forced at places" in inspector_page([thread], "x")


def test_after_a_gap_in_the_row_nothing_is_marked():
    """Without wait=2 nobody knows where its trace ended, so a Wait after wait=3 is not placed."""
    late = record("wait=3", CHAIN[5]["text"] + "\nWait six\n", "3")
    later = record("wait=4", late["text"] + "Wait seven", "3")
    [thread] = threads([CHAIN[2], CHAIN[4], late, later])
    assert [a for a, b in thread.forced] == [19, 29] and thread.unplaced == 2


def test_traces_that_are_no_beginnings_are_not_marked():
    [thread] = threads(
        [
            record("natural", "another text", "3"),
            record("wait=1", "a longer text, Wait, really", "4"),
        ]
    )
    assert thread.forced == () and thread.steps[0].reach is None and thread.unplaced == 1


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_pieces_lose_nothing(parts):
    chain, text = [], ""
    for i, part in enumerate(parts):
        text += ("Wait" if i else "") + part
        chain.append(record(f"wait={i}" if i else "natural", text, "3"))
    [thread] = threads(chain)
    assert (
        "".join(t for kind, t in pieces(thread) if kind in ("thinking", "forced"))
        == text
        == thread.text
    )
    assert all(thread.text[a:b] == "Wait" for a, b in thread.forced)


@pytest.fixture(scope="module")
def recorded():
    return read_evaluation(SEED).records


def test_every_recorded_thread_agrees_with_the_records(recorded):
    found = [t for t in threads(recorded.to_dict("records")) if t.model == "sft"]
    assert len(found) == 728 and all(
        len(t.forced) == 3 and t.unplaced == 1 for t in found
    )  # 1, 2 and 4 Waits
    unknown = {s.setting for t in found for s in t.steps if s.reach is None}
    assert unknown == {"newline=1"}  # it has a decode of its own
    repaired = sum(s.change == "repaired" for t in found for s in t.steps if s.setting == "wait=1")
    assert repaired == flips(recorded.to_dict("records"), "natural", "wait=1").wrong_to_right.sum()


def test_nothing_in_a_record_becomes_part_of_the_page():
    bad = "</pre><script>alert(1)</script>\"'<img src=x onerror=alert(1)>"
    page = inspector_page(threads([record("natural", bad, bad, id=bad, gold=bad, model=bad)]), bad)
    assert (
        page.count("<script>") == 1
        and "<img" not in page
        and html.escape("<script>alert(1)") in page
    )


def test_samples_and_models_have_threads_of_their_own():
    rows = [
        record("natural", "a", "3", sample=i, model=m) for i in range(3) for m in ("sft", "base")
    ]
    found = threads(rows)
    assert len(found) == 6 and found[2].name == "toy q, sample 1"


def test_records_without_counts_are_shown_too(tmp_path):
    line = {
        "doc": {"problem": "p"},
        "target": "3",
        "resps": [["<|im_start|>think\nso\n<|im_start|>answer\nAnswer: 3"]],
    }
    (tmp_path / "samples_toy.jsonl").write_text(json.dumps(line) + "\n")
    text = write_inspector(tmp_path / "samples_toy.jsonl", tmp_path / "page.html").read_text()
    assert "imported: 3 ✓" in text and "<pre>so\n" in text
    with pytest.raises(S1Error, match="found no records"):
        write_inspector(tmp_path / "nothing", tmp_path / "page2.html")
    assert not (tmp_path / "page2.html").exists()


def test_the_command_and_its_limit(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(SEED), "--out", str(tmp_path / "p.html"), "--limit", "5"])
    assert not end.value.code and "Traces: " in capsys.readouterr().out
    text = (tmp_path / "p.html").read_text()
    assert text.count('class="thread"') == 3 * 5 * 2  # three benchmarks, two models
    assert not re.findall(r"(?:src|href)=\"(?!#)", text)  # nothing from outside


def shown(path, **asked):
    """How many cards a browser shows for a choice in the menu, and their names."""
    url = f"{path.as_uri()}#{urlencode(asked)}"
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={path.parent / 'profile'}",
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    count = int(re.search(r'id="shown">(\d+)<', done.stdout)[1])
    cards = re.findall(r'<details class="thread"[^>]*>', done.stdout)
    assert sum("hidden" not in card for card in cards) == count
    return count


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_a_browser_filters_as_the_records_say(tmp_path, recorded):
    path = write_inspector(SEED, tmp_path / "page.html", limit=40)
    for benchmark, setting in (("tiny_hard", "wait=1"), ("tiny_mixed", "max=16")):
        part = recorded[(recorded.benchmark == benchmark) & (recorded.setting == setting)].head(40)
        assert (
            shown(path, wanted="right", setting=setting, benchmark=benchmark) == part.correct.sum()
        )
    capped = (
        recorded[(recorded.benchmark == "tiny_hard") & (recorded.setting == "max=64")].end_reason
        == "maximum"
    )
    assert shown(path, wanted="capped", setting="max=64", benchmark="tiny_hard") == capped.sum()
    change = (
        flips(recorded.to_dict("records"), "natural", "wait=1")
        .set_index("benchmark")
        .loc["tiny_hard"]
    )
    assert (
        shown(path, wanted="repaired", setting="wait=1", benchmark="tiny_hard")
        == change.wrong_to_right
    )
    assert (
        shown(path, wanted="spoiled", setting="wait=1", benchmark="tiny_hard")
        == change.right_to_wrong
    )
