"""A recording holds every budget as a run of its own gives it, and the page shows just that."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from s1book.budget import Force, budget_force, make_force
from s1book.config import S1Error, load_preset, project_root
from s1book.engine import open_engine
from s1book.format import prompt_ids
from s1book.replay import (
    added_texts,
    phases,
    positions,
    record,
    replay_html,
    shown_html,
    text_parts,
)

QUESTION = "How many r in 1r 2a 3s 4p 5b 6e 7r 8r 9y ?"
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture(scope="module")
def world():
    preset = load_preset("tiny")
    engine, tokenizer = open_engine(preset, project_root() / "data" / "reference" / "sft")
    force = make_force(tokenizer, preset.budget)
    prompt = prompt_ids(tokenizer, QUESTION)
    [recording] = engine.run([record(tokenizer, QUESTION, prompt, force, [2, 0, 1])])
    return engine, tokenizer, force, prompt, recording


def expected(world, waits, budget):
    engine, tokenizer, force, prompt, _ = world
    [run] = engine.run(
        [budget_force(prompt, replace(force, ignore_end=waits, max_thinking=budget))]
    )
    return run, text_parts(tokenizer, run)


def states(recording):
    n, last = len(recording["waits"]), len(recording["budgets"]) - 1
    return [
        (w, k) for w in range(n) for k in {0, 1, 7, last // 3, last // 2, last - 2, last - 1, last}
    ]


def test_every_budget_is_what_a_run_of_its_own_gives(world):
    recording = world[-1]
    assert recording["waits"] == [0, 1, 2] and recording["budgets"][0] == 0
    for w, k in states(recording):
        outcome = recording["outcomes"][recording["at"][w][k]]
        run, parts = expected(world, recording["waits"][w], recording["budgets"][k])
        tokens = recording["tokens"][: outcome["shown"]]
        assert "".join(text for text, _ in tokens) == "".join(p["text"] for p in parts[:-2])
        assert sum(ours for _, ours in tokens) == run.trace.forced_tokens == outcome["forced"]
        assert (outcome["closing"], outcome["answer"]) == tuple(p["text"] for p in parts[-2:])
        assert (outcome["end"], outcome["waits"]) == (run.trace.end_reason, run.trace.waits)
    assert len({o["waits"] for o in recording["outcomes"]}) == 3


def test_it_is_one_decode_and_plain_data(world):
    engine, tokenizer, force, prompt, recording = world
    assert json.loads(json.dumps(recording)) == recording
    asked = []

    def spied(strategy):
        asks = next(strategy)
        while True:
            asked.append(len(asks))
            try:
                asks = strategy.send((yield asks))
            except StopIteration as end:
                return end.value

    [again] = engine.run([spied(record(tokenizer, QUESTION, prompt, force, [0, 1, 2]))])
    assert again == recording and asked[:-1] == [1, 1, 1, 1]
    assert asked[-1] + 1 == len(recording["outcomes"])


def test_few_positions_are_spread_from_the_least_to_the_longest():
    force = Force(
        max_thinking=500,
        max_answer=1,
        stop_ids=frozenset(),
        answer_stops=frozenset(),
        open_answer=(),
        final_answer=(),
        newline=(),
        line_ends=frozenset(),
        min_thinking=3,
    )
    assert positions(9, 400, force) == list(range(3, 10)) and positions(103, 3, force) == [
        3,
        53,
        103,
    ]
    assert positions(900, 5, force)[-1] == 500 and positions(3, 9, force) == [3]


def test_only_the_exact_mode_can_be_replayed(world):
    engine, tokenizer, force, prompt, _ = world
    with pytest.raises(S1Error, match="wanted exact"):
        engine.run([record(tokenizer, QUESTION, prompt, replace(force, mode="readme"))])


def test_texts_of_parts_add_up(world):
    engine, tokenizer, force, prompt, _ = world
    [run] = engine.run([budget_force(prompt, replace(force, ignore_end=1))])
    ids = [i for _, part in phases(run) for i in part]
    assert "".join(p["text"] for p in text_parts(tokenizer, run)) == tokenizer.decode(ids)
    assert len(added_texts(tokenizer, ids)) == len(ids)
    assert [p["phase"] for p in text_parts(tokenizer, run)] == [
        "thinking",
        "forced",
        "thinking",
        "forced",
        "answer",
    ]


def test_a_model_cannot_close_the_script(world):
    evil = {**world[-1], "question": "</script><img src=x>", "tokens": [["</script>", 0]]}
    page = replay_html(evil)
    assert page.count("</script>") == 2 and "<img" not in page
    assert "&lt;i&gt;" in shown_html([("thinking", "<i>")])


def test_without_a_script_the_longest_trace_is_there(world):
    text = re.sub(r"<script.*?</script>", "", replay_html(world[-1]), flags=re.S)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    assert "<mark>[Wait]</mark>" in text and "fours:\n0 1r 2a" in text and "Answer: 3" in text


def test_the_page_is_the_same_bytes_each_time(world):
    assert replay_html(world[-1]) == replay_html(json.loads(json.dumps(world[-1])))


DRIVER = """<script>
window.onerror = function (m) { document.title = "ERROR " + m; };
var seen = [], steps = %s;
document.querySelectorAll("[id^=s1-replay]").forEach(function (page) {
  var at = function (n) { return page.querySelector("[data-part=" + n + "]"); };
  steps.forEach(function (s) {
    at("waits").value = s[0]; at("waits").dispatchEvent(new Event("change"));
    at("budget").value = s[1]; at("budget").dispatchEvent(new Event("input"));
    seen.push([at("trace").textContent, at("says").textContent, at("maximum").textContent,
               at("trace").querySelectorAll("mark").length, at("controls").hidden]);
  });
});
at = document.querySelector("[data-part=budget]"); at.value = +at.max - 1;
document.querySelector("[data-part=play]").click();
setTimeout(function () {
  seen.push([at.value === at.max, document.querySelector("[data-part=play]").textContent]);
  document.body.innerHTML = ""; document.body.textContent = "SEEN" + JSON.stringify(seen) + "NEES";
}, 400);
</script>"""


def browse(folder, body):
    """What a headless browser makes of a page."""
    (folder / "page.html").write_text(f"<!doctype html><meta charset=utf-8><body>{body}")
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder}/profile",
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"file://{folder}/page.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search("SEEN(.*)NEES", done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-500:]
    text = found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(text.replace("&nbsp;", "\xa0"))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_replays_every_budget(world, tmp_path):
    recording = world[-1]
    steps = states(recording)
    page = replay_html(recording)
    *seen, played = browse(tmp_path, page + page + DRIVER % json.dumps(steps))
    assert played == [True, "Replay"] and len(seen) == 2 * len(steps)
    assert (
        seen[: len(steps)] == seen[len(steps) :]
    ), "two copies in one page do not disturb each other"
    for (w, k), (text, says, maximum, marks, hidden) in zip(steps, seen):
        outcome = recording["outcomes"][recording["at"][w][k]]
        _, parts = expected(world, recording["waits"][w], recording["budgets"][k])
        shown = "".join(
            f"[{p['text']}]" if p["phase"] == "forced" else p["text"] for p in parts if p["text"]
        )
        assert text == shown and maximum == str(recording["budgets"][k]) and not hidden
        assert marks == outcome["waits"] + 1
        assert says.startswith(
            f"{outcome['shown']} thinking tokens, {outcome['forced']} of them ours"
        )
        assert says.endswith(f"it says: {outcome['answer']}")
