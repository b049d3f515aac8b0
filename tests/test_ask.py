"""One question on the command line: the same run as unwatched, every token shown with its author."""

import io
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from conftest import make_model
from s1book.ask import (
    Printer,
    Wish,
    ask,
    find_model,
    marks_for,
    opened_prompt,
    summary,
    tiny_wording,
    wanted,
)
from s1book.backends import Tokens
from s1book.budget import Force, budget_force
from s1book.cli import main
from s1book.config import Run, S1Error, load_preset
from s1book.engine import Sampling, TransformersEngine
from s1book.format import S1
from s1book.streaming import Writer
from test_engine import sharp_model
from test_servers import script
from token_server import TokenServer
from test_forcing import (
    FORCE,
    PROMPT,
    byte_tokenizer,
    bytewise,
    dice,
    forces,
)  # noqa: F401 (a fixture)

PHRASE = "How many r in raspberry"


@pytest.fixture(autouse=True)
def recorded(tmp_path, monkeypatch):
    """The recorded model, whatever this checkout has run."""
    monkeypatch.setenv("S1BOOK_RUN", str(tmp_path / "nothing"))


# ---------------------------------------------------------------- watching


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_watching_changes_nothing_at_any_temperature(temperature):
    sampling = Sampling(temperature, 4)
    force = replace(FORCE, max_thinking=40, stop_ids=frozenset(), answer_stops=frozenset({31}), sampling=sampling)
    engine, seen = TransformersEngine(sharp_model(), 2), []
    [alone] = engine.run([budget_force([40, 41], force)])
    [watched] = engine.run([budget_force([40, 41], force)], on_tokens=seen.append)
    assert watched == alone and len(seen) > 40
    assert len(set(alone.trace.ids)) > 10 or not temperature


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "question",
    [
        "How many r in raspberry?",
        'how many R\'s are there in "raspberry"?',
        "How many r are in Raspberry",
        "How many r's in the word raspberry",
    ],
)
def test_a_word_is_asked_about_in_the_world_s_own_form(question):
    assert tiny_wording(question) == "How many r in 1r 2a 3s 4p 5b 6e 7r 8r 9y ?"


def test_other_questions_stay_as_they_are():
    assert tiny_wording("Largest of a7 b1 ?") == "Largest of a7 b1 ?"
    own = "How many r in 1r 2a 3s ?"
    assert tiny_wording(own) == own


def test_marks_follow_the_vocabulary(tiny_tokenizer, bytewise):
    assert marks_for(tiny_tokenizer) == S1
    later = type(bytewise)(tokenizer_object=bytewise.backend_tokenizer, eos_token="<|im_end|>")
    later.add_tokens(["<think>", "</think>"])
    assert marks_for(later).answer == "\n</think>\n\n" and marks_for(later).end == "<|im_end|>"


@pytest.mark.parametrize("opens", ["", "<think>\n", "<think>"])
def test_a_thinking_that_the_template_opens_is_not_opened_twice(bytewise, opens):
    own = type(bytewise)(tokenizer_object=bytewise.backend_tokenizer, eos_token="<|im_end|>")
    own.add_tokens(["<think>", "</think>"])
    own.chat_template = "{{ messages[0]['content'] }}\n" + opens.replace("\n", "{{ '\\n' }}")
    text = own.decode(opened_prompt(own, "Wait", marks_for(own)))
    assert text.count("<think>") == 1 and text.endswith("<think>\n")


# ---------------------------------------------------------------- the whole


def asked(question=PHRASE, wish=Wish(), console=None, **more):
    out = io.StringIO()
    result = ask(Run.open("tiny"), question, wish, console or Console(file=out), **more)
    return result, out.getvalue()


def test_the_tiny_model_answers_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result, text = asked(wish=Wish(wait=2, max_thinking=400))
    assert (
        result.trace.waits == 2
        and text.count("[Wait]") == 2
        and "[<|im_start|>answer\n]Answer: 3" in text
    )
    assert summary(result) in text and "2 of them ours (2 Waits); ended by the model" in text


def test_every_wish_arrives():
    wish = Wish(
        max_thinking=40,
        min_thinking=30,
        wait=3,
        wait_texts=("Wait", "So", "pairs:"),
        max_answer=1,
        final_answer="Answer:",
        mode="exact",
    )
    result, text = asked(wish=wish)
    assert 30 <= len(result.trace.ids) <= 40 and result.trace.end_reason == "maximum"
    assert "answer\n][Answer:]" in text and len(result.answer_ids) == 1 and "cut at its limit" in text
    longer, text = asked(wish=replace(wish, max_thinking=300))
    assert [longer.trace.parts[k] for k in (1, 3, 5)] and text.index("[Wait]") < text.index(
        "[So]"
    ) < text.index("[pairs:]")
    assert asked(wish=Wish(mode="readme", max_thinking=8))[0].closing == ()


def test_colours_on_a_terminal_and_brackets_everywhere():
    out = io.StringIO()
    asked(
        wish=Wish(wait=1), console=Console(file=out, force_terminal=True, color_system="truecolor")
    )
    assert re.search(r"\x1b\[[\d;]*m\[Wait\]\x1b\[0m", out.getvalue())
    assert "\x1b" not in asked(wish=Wish(wait=1))[1]


def test_an_unfinished_character_is_held_back(bytewise):
    out, ids = io.StringIO(), bytewise("a思🙂!").input_ids
    printer, shown = Printer(Console(file=out), Writer(bytewise, FORCE)), []
    for at, i in enumerate(ids):
        printer(Tokens(0, 0, at, [i], "thinking"))
        shown.append(out.getvalue())
    assert shown[-1] == "a思🙂" and "\ufffd" not in "".join(shown)  # the last token waits for the next


@pytest.fixture
def folder(tmp_path):
    """A model of somebody else: a byte-level tokenizer without marks for thinking."""
    own = byte_tokenizer(["<|endoftext|>"])
    own.chat_template = "{{ messages[0]['content'] }}{{ '\\n' }}"
    own.save_pretrained(tmp_path / "model")
    make_model(len(own)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_any_model_in_a_folder_is_asked_with_marks_of_several_tokens(folder):
    wish = Wish(max_thinking=30, max_answer=9, wait=1)
    result, text = asked("What is a moon?", wish, model=str(folder))
    assert "marks: <think> ... </think>; at most 30" in text and "What is a moon?" in text
    assert len(result.trace.ids) <= 30 and "</think>" in text


def test_a_page_is_written_aside(tmp_path):
    page = tmp_path / "page.html"
    _, text = asked(wish=Wish(wait=1, max_thinking=100), page=page)
    html = page.read_text()
    assert html.startswith("<!doctype html>") and 'data-part="budget"' in html and str(page) in text
    assert list(tmp_path.iterdir()) == [page]


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["ask"], 2, "Missing argument"),
        (["ask", PHRASE, "--wait", "-1"], 2, "'--wait'"),
        (["ask", "What is love"], 1, "ask a larger one with --model"),
        (["ask", "How many r in strawberry"], 1, "letters out of abeprsty"),
        (["ask", ""], 1, "found nothing, wanted text"),
        (["ask", PHRASE, "--max-thinking", "5000"], 1, "wanted at most"),
        (
            ["ask", PHRASE, "--max-thinking", "8", "--min-thinking", "9"],
            1,
            "that long and that short",
        ),
        (["ask", PHRASE, "--wait-text", "Hmmm"], 1, "no token for 'Hmmm'"),
        (["ask", PHRASE, "--mode", "paper"], 1, "wanted one of exact, readme, paper-eval"),
        (
            ["ask", PHRASE, "--page", "p.html", "--temperature", "1"],
            1,
            "--page: found mode exact and temperature 1.0",
        ),
        (["ask", PHRASE, "--page", "no/such/folder/p.html"], 1, "no/such/folder"),
        (["ask", PHRASE, "--preset", "tyni"], 2, "did you mean tiny?"),
        (
            ["ask", PHRASE, "--model", "nowhere/nothing"],
            1,
            "found neither a folder nor a model on the hub",
        ),
        (["ask", PHRASE, "--set", "engine.context=40"], 2, "engine.context"),
        (["ask", "Largest of" + " a2" * 1100 + " ?"], 1, "found a context of 1024, wanted at least"),
        (
            ["ask", PHRASE, "--set", "engine.kind=server", "--set",
             "engine.server={like: transformers, url: 'http://127.0.0.1:9/v1', tries: 1}"],
            1,
            "The engine stopped after 0 of 1 strategies (Transient: Connection error",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(arguments, code, words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    err = capsys.readouterr().err
    assert ending.value.code == code and words in err and "Traceback" not in err
    assert code == 2 or err.startswith("s1book: ") and err.count("\n") == 1


def test_a_tokenizer_that_merges_the_mark_is_refused(tmp_path, capsys):
    """A line break and the first sign of the mark are one token: the end could not be seen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "\u010a<", "<|endoftext|>"])}
    merging = Tokenizer(models.BPE(vocab=vocab, merges=[("\u010a", "<")]))
    merging.pre_tokenizer, merging.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    own = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<|endoftext|>")
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(tmp_path)
    make_model(len(own)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as ending:
        main(["ask", "What is a moon?", "--model", str(tmp_path)])
    err = capsys.readouterr().err
    assert ending.value.code == 1 and "merges the mark '</think>' with the line break before it" in err
    assert err.startswith("s1book: ") and err.count("\n") == 1


def test_a_server_is_asked_too():
    with TokenServer(script, model="sft") as server:
        own = ["engine.kind=server", "engine.server={like: vllm, url: " + server.url + "}"]
        out = io.StringIO()
        result = ask(Run.open("tiny", own), PHRASE, Wish(max_thinking=20, wait=1), Console(file=out))
        assert summary(result) in out.getvalue() and len(result.trace.ids) <= 20
        assert {body["model"] for body in server.bodies} == {"sft"} and len(server.bodies) >= 2


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert find_model(str(tmp_path)) == str(tmp_path)
    with pytest.raises(S1Error, match="found no model that can be opened"):
        asked(model=str(tmp_path))


def test_the_command_prints_a_trace(capsys):
    with pytest.raises(SystemExit) as ending:
        main(["ask", PHRASE, "--wait", "1"])
    assert not ending.value.code and "[Wait]" in capsys.readouterr().out


def test_help_is_for_newcomers(capsys):
    with pytest.raises(SystemExit):
        main(["ask", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(
        w in text
        for w in (
            "The question, in quotation marks",
            "--wait",
            "How often an end",
            "the tiny model of the course, offline",
            "[brackets]",
        )
    )


def test_a_maximum_that_nobody_asked_for_is_what_fits(tiny_tokenizer):
    budget = load_preset("tiny").budget
    prompt = [5] * 40
    force = wanted(tiny_tokenizer, budget, S1, Wish(), prompt, 200)
    assert force.max_thinking + len(prompt) + force.max_answer < 200 and isinstance(force, Force)
    warm = Wish(temperature=0.7, answer_temperature=0.3, seed=5)
    force = wanted(tiny_tokenizer, budget, S1, warm, prompt, 200)
    assert (force.sampling, force.answer_temperature) == (Sampling(0.7, 5), 0.3)
    with pytest.raises(S1Error, match="--max-thinking: found 384, wanted at most"):
        wanted(tiny_tokenizer, budget, S1, Wish(max_thinking=384), prompt, 200)
