"""Modes against slow twins, marks of several tokens, minima, strings in turn, whole characters."""

import codecs
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s1book.budget import (
    MODES,
    Force,
    ForceError,
    Trace,
    budget_force,
    cut,
    fit,
    make_force,
    rounds,
    sweep,
    up_to,
    whole_answer,
)
from s1book.config import load_preset
from s1book.engine import Sampling, ScriptedEngine, TransformersEngine
from s1book.forcing import spellings, token_bytes, whole_characters
from s1book.format import Delimiters
from test_budget import dice  # its ids of marks and line break are those below
from test_engine import sharp_model

# A small language whose texts can be cut into tokens in one way only: "." stands never alone.
TEXTS = {
    1: "<|im_start|>",
    2: "<|im_end|>",
    3: "\n",
    4: "Wait",
    5: "answer",
    6: "Final Answer:",
    7: "a",
    8: "b",
    9: ".\n",
    10: "c",
    11: "d",
    12: "think",
    13: "Hmm",
}
START, END, NEWLINE, WAIT, HMM = 1, 2, 3, 4, 13
FORCE = Force(
    max_thinking=20,
    max_answer=6,
    stop_ids=frozenset({START, END}),
    answer_stops=frozenset({END}),
    open_answer=(START, 5, NEWLINE),
    final_answer=(6,),
    newline=(NEWLINE,),
    line_ends=frozenset({NEWLINE, 9}),
    wait_ids=(WAIT,),
)
PROMPT = [7, 8, START, 12, NEWLINE]


def decode(ids):
    return "".join(TEXTS[i] for i in ids)


def encode(text):
    ids = []
    while text:
        found = max((i for i in TEXTS if text.startswith(TEXTS[i])), key=lambda i: len(TEXTS[i]))
        ids.append(found)
        text = text[len(TEXTS[found]) :]
    return ids


# ---------------------------------------------------------------- slow twins of the reference


class Output:
    """What a server says of a request: ids with the stop, text without it, and why it ended."""

    def __init__(self, model, text, max_tokens, stops, min_tokens=0):
        self.ids, self.reason = [], "length"
        assert max_tokens > 0, "a server refuses this"
        while len(self.ids) < max_tokens and self.reason == "length":
            early = len(self.ids) < min_tokens
            self.ids.append(
                next(t for t in model(encode(text) + self.ids) if not (early and t in stops))
            )
            self.reason = "stop" if self.ids[-1] in stops else "length"
        self.text = decode(self.ids[:-1] if self.reason == "stop" else self.ids)


def harness(model, prompt, maximum, n, waits, answer):
    """The evaluation code on texts (s1_facts 7.2): every round gets everything, then we cut."""
    text, ids = "", []
    for number in range(n + 1):
        out = Output(model, prompt + decode(ids), maximum, {START, END}, min(n, 1))
        text += out.text
        ids += [i for i in out.ids if out.reason == "length" or i not in (START, END)]
        if out.reason == "length" or number == n:
            break
        ids += encode(waits[number % len(waits)])
        text += waits[number % len(waits)]
    ids = ids[:maximum]
    close = "<|im_start|>answer"
    if out.reason == "length":
        close = ("" if text[-1] == "\n" else "\n") + close + "\nFinal Answer:"
    final = Output(model, prompt + decode(ids) + close, answer, {END})
    return decode(ids), close, final.text


def readme(model, prompt, maximum, n, waits, answer):
    """The snippet of the README on texts (7.3): what it counts, it counts with the stop."""
    start, left = prompt, maximum
    out = Output(model, prompt, left, {START, END})
    for number in range(n):
        left -= len(out.ids)
        if left > 0:
            prompt += out.text + waits[number % len(waits)]
            out = Output(model, prompt, left, {START, END}, 1)
    prompt += out.text
    return prompt[len(start) :], "", Output(model, prompt, answer, {END}).text


models = st.builds(dice, st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]))
words = st.lists(st.sampled_from(["Wait", "Hmm", "\n", "a\nb", ""]), min_size=1, max_size=3)


@pytest.mark.parametrize("mode, twin", [("paper-eval", harness), ("readme", readme)])
@settings(max_examples=300, deadline=None)
@given(models, words, st.integers(1, 30), st.integers(0, 5))
def test_a_mode_of_the_reference_is_what_its_texts_say(mode, twin, model, words, maximum, n):
    ids = [tuple(encode(word)) for word in words]
    force = replace(
        FORCE,
        mode=mode,
        max_thinking=maximum,
        ignore_end=n,
        wait_ids=ids[0],
        more_waits=tuple(ids[1:]),
    )
    [result] = ScriptedEngine(model).run([budget_force(PROMPT, force)])
    mine = tuple(map(decode, (result.trace.ids, result.closing, result.answer_ids)))
    assert mine == twin(model, decode(PROMPT[:-1]), maximum, n, words, FORCE.max_answer)
    assert (result.trace.end_reason == "maximum") or not result.trace.dropped


def test_the_three_modes_differ_where_they_must():
    """A trace of five tokens that ends, a Wait, five more and an end; a maximum of eight."""
    script = {
        tuple(PROMPT[:-1]): [NEWLINE, 7, 8, 7, 8, 7, START],
        (WAIT,): [7, 8, 7, 8, 7, START],
        tuple(PROMPT): [7, 8, 7, 8, 7, START],
        (START, 5): [7, END],
        (6,): [8, END],
        (START, 5, NEWLINE): [7, END],
        (8, START): [END],
        (7, START): [END],
    }
    runs = {
        mode: ScriptedEngine(script).run(
            [budget_force(PROMPT, replace(FORCE, mode=mode, ignore_end=1, max_thinking=8))]
        )[0]
        for mode in MODES
    }
    assert decode(runs["exact"].trace.ids) == "ababaWaitab"
    assert runs["exact"].closing == (NEWLINE, START, 5, NEWLINE, 6)
    assert decode(runs["readme"].trace.ids) == "\nababaWaita" and runs["readme"].closing == ()
    assert decode(runs["paper-eval"].trace.ids) == "\nababaWaita"
    assert runs["paper-eval"].closing == (START, 5) and len(runs["paper-eval"].trace.dropped) == 4
    assert [run.trace.ended for run in runs.values()] == [False, False, True]
    assert {run.trace.end_reason for run in runs.values()} == {"maximum"}


def test_a_grader_reads_behind_the_mark_that_the_model_wrote():
    force = replace(FORCE, mode="readme")
    result = ScriptedEngine(
        {(7, 8): [1], tuple(PROMPT[:-1]): [7, START], (7,): [START, 5, NEWLINE, 8, END]}
    ).run([budget_force(PROMPT, force)])[0]
    assert result.closing == () and whole_answer(force, result) == [NEWLINE, 8]


# ---------------------------------------------------------------- the exact mode, slowly


def slowly(model, prompt, force):
    """One token at a time, with marks of any length; knows nothing of requests."""
    marks = [*force.long_ends, *((i,) for i in force.stop_ids)]
    beyond, kept, waits, since, banned = max(map(len, marks)) - 1, [], 0, 0, set()
    while len(kept) < force.max_thinking + beyond:
        need = max(since + (waits > 0), force.min_thinking)
        firsts = {mark[0] for mark in marks} if len(kept) in banned else set()
        wish = next(t for t in model(prompt + kept) if t not in firsts)
        kept.append(wish)
        ends = [m for m in marks if tuple(kept[since:][-len(m) :]) == m]
        if not ends:
            continue
        start = len(kept) - len(max(ends, key=len))
        if start < need:
            del kept[start:]
            banned = {place for place in banned if place < start} | {start}  # the rest followed another text
            continue
        if start >= force.max_thinking:
            return kept[: force.max_thinking], waits, False
        del kept[start:]
        wait = force.wait(waits)
        if waits == force.ignore_end or force.max_thinking - start <= len(wait):
            return kept, waits, True
        kept += wait
        waits, since = waits + 1, len(kept)
        banned = set()
    return kept[: force.max_thinking], waits, False


def make(maximum, minimum, n, cycle, long_ends):
    short = frozenset({END}) if long_ends else FORCE.stop_ids
    return replace(
        FORCE,
        max_thinking=maximum,
        min_thinking=min(minimum, maximum),
        ignore_end=n,
        wait_ids=cycle[0],
        more_waits=cycle[1:],
        long_ends=long_ends,
        stop_ids=short,
    )


ENDS = [(), ((10, 11),), ((10, 11), (10, 7)), ((8, 8, 10),), ((7, 7),)]
forces = st.builds(
    make,
    st.integers(0, 30),
    st.integers(0, 12),
    st.integers(0, 4),
    st.sampled_from([((),), ((WAIT,),), ((WAIT,), (HMM, 7)), ((WAIT, 7, 8), (), (HMM,))]),
    st.sampled_from(ENDS),
)


@settings(max_examples=500, deadline=None)
@given(models, forces)
@example(dice(151, 0.7), make(7, 7, 0, ((),), ((10, 11), (10, 7))))
@example(dice(654, 0.3), make(3, 3, 0, ((),), ((10, 11),)))
def test_exact_is_what_one_token_at_a_time_gives(model, force):
    engine = ScriptedEngine(model)
    [result] = engine.run([budget_force(PROMPT, force)])
    trace = result.trace
    assert (trace.ids, trace.waits, trace.ended) == slowly(model, PROMPT, force)
    assert len(trace.ids) <= force.max_thinking and not trace.dropped
    assert not trace.ended or len(trace.ids) >= force.min_thinking
    assert trace.parts[1::2] == tuple(force.wait(n) for n in range(trace.waits))
    assert trace.forced_tokens == sum(len(force.wait(n)) for n in range(trace.waits))
    assert all(trace.parts[2::2]) and all(ask.max_new_tokens > 0 for ask, _ in engine.log)


@settings(max_examples=200, deadline=None)
@given(models, forces, st.lists(st.integers(0, 30), max_size=4), st.integers(0, 4))
def test_every_maximum_is_a_beginning_of_the_longest_trace(model, force, maxima, n):
    """What the recording of a run relies on: cut gives what a separate run would, with Waits too."""
    engine, force = ScriptedEngine(model), replace(force, ignore_end=n)
    [longest] = engine.run([budget_force(PROMPT, force)])
    for b in maxima:
        if force.min_thinking <= b <= force.max_thinking:
            [own] = engine.run([budget_force(PROMPT, replace(force, max_thinking=b))])
            assert cut(force, longest.trace, b) == own.trace
    for w in range(n + 1):
        [own] = engine.run([budget_force(PROMPT, replace(force, ignore_end=w))])
        assert up_to(longest.trace, w) == own.trace


@settings(max_examples=100, deadline=None)
@given(models, forces.filter(lambda f: not f.long_ends), st.integers(1, 3))
def test_rounds_give_the_same_with_minima_and_strings_in_turn(model, force, n):
    prompts = [[7 + i, *PROMPT] for i in range(n)]
    engine = ScriptedEngine(model)
    assert rounds(lambda asks: [engine.write(ask) for ask in asks], prompts, force) == engine.run(
        [budget_force(p, force) for p in prompts]
    )


@pytest.mark.parametrize("mode", ["readme", "paper-eval"])
def test_a_sweep_in_another_mode_is_separate_runs(mode):
    engine, force = ScriptedEngine(dice(3)), replace(FORCE, mode=mode)
    [swept] = engine.run([sweep(PROMPT, force, [1, 5, 20], [0, 2])])
    apart = [replace(force, max_thinking=b) for b in (1, 5, 20)] + [
        force,
        replace(force, ignore_end=2),
    ]
    assert list(swept) == ["max=1", "max=5", "max=20", "natural", "wait=2"]
    assert list(swept.values()) == engine.run([budget_force(PROMPT, f) for f in apart])


@pytest.mark.parametrize(
    "change",
    [
        {"min_thinking": 15},
        {"ignore_end": 3, "more_waits": ((50, 51), ())},
        {
            "ignore_end": 2,
            "long_ends": ((33, 34), (35, 36)),
            "min_thinking": 9,
            "answer_temperature": 0.0,
        },
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_decides_how_fast_and_never_what(change, temperature):
    stops = frozenset(range(37, 40)) if "long_ends" in change else frozenset(range(30, 38))
    force = replace(
        FORCE,
        max_thinking=60,
        stop_ids=stops,
        answer_stops=stops,
        sampling=Sampling(temperature, 7),
        **change,
    )
    prompts = [[40 + i, 41, 42] for i in range(5)]
    model = sharp_model(dtype="float64")
    runs = [
        TransformersEngine(model, slots).run([budget_force(p, force) for p in prompts])
        for slots in (1, 3, 64)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert all(len(r.trace.ids) >= force.min_thinking for r in runs[0])


def test_the_answer_may_have_a_temperature_of_its_own():
    engine = ScriptedEngine({tuple(PROMPT): [7, START], (5, NEWLINE): [8, END]})
    engine.run(
        [budget_force(PROMPT, replace(FORCE, sampling=Sampling(1.0, 3), answer_temperature=0.2))]
    )
    assert [ask.sampling.temperature for ask, _ in engine.log] == [1.0, 0.2]


# ---------------------------------------------------------------- whole characters


def byte_tokenizer(marks):
    """A real byte-level tokenizer with few merges: most characters take several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        ["Wait, the answer is é; think 思考 🙂"] * 3,
        trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=marks,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=marks[-1])


@pytest.fixture(scope="module")
def bytewise():
    return byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("aé思🙂ß\n考"), min_size=1, max_size=12), data=st.data())
def test_a_cut_never_breaks_a_character(bytewise, text, data):
    force = make_force(bytewise, load_preset("tiny").budget)
    ids = bytewise(text).input_ids
    maximum = data.draw(st.integers(0, len(ids)))
    engine = ScriptedEngine(lambda known: [*(ids[len(known) - 1 :][:1]), 2])
    [result] = engine.run([budget_force([5], replace(force, max_thinking=maximum, max_answer=1))])
    shown = bytewise.decode(result.trace.ids)
    assert text.startswith(shown) and maximum - 3 <= len(result.trace.ids) <= maximum
    whole = [n for n in range(maximum + 1) if text.startswith(bytewise.decode(ids[:n]))]
    assert len(result.trace.ids) == max(whole)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=3), max_size=8))
def test_whole_characters_drops_only_what_is_unfinished(parts):
    ids = range(len(parts))
    broken = tuple((i, part) for i, part in enumerate(parts) if not valid(part))
    kept = whole_characters(ids, broken)
    assert list(kept) == list(ids)[: len(kept)]
    run = b"".join(dict(broken).get(i, b"a") for i in kept)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(run)
    assert not decoder.getstate()[0]
    assert len(kept) == len(parts) or not valid(parts[len(kept)]), "what is whole is never dropped"


def valid(part):
    try:
        return bool(part.decode() + "x")
    except UnicodeDecodeError:
        return False


def test_bytes_of_a_token():
    assert token_bytes("Ġé") == " ".encode() + bytes([0xE9]) and token_bytes("<0xE6>") == b"\xe6"


# ---------------------------------------------------------------- words, limits, sentences


def test_a_mark_without_a_control_token_is_looked_for_whole(bytewise):
    own = Delimiters("<think>\n", "\n</think>\n")
    force = make_force(bytewise, load_preset("tiny").budget, own)
    assert len(force.long_ends[0]) > 1 and bytewise.decode(force.long_ends[0]) == "</think>"
    assert force.stop_ids == {2}
    script = bytewise("so\n</think>\n").input_ids
    engine = ScriptedEngine(lambda known: [*(script[len(known) - 1 :][:1]), 2])
    [result] = engine.run([budget_force([5], replace(force, max_answer=1))])
    assert bytewise.decode(result.trace.ids) == "so\n" and result.trace.ended
    assert bytewise.decode(result.closing) == "</think>\n"


class Merging:
    """A tokenizer that writes a line break and a mark's first sign with one token."""

    unk_token_id = None
    table = {"\n": [1], "\n<": [2], "<": [3], "end>": [4], ">\n": [5]}

    def __call__(self, text, **options):
        ids, rest = [], text
        while rest:
            piece = max((p for p in self.table if rest.startswith(p)), key=len)
            ids += self.table[piece]
            rest = rest[len(piece) :]
        return type("Coded", (), {"input_ids": ids})


def test_a_tokenizer_that_merges_the_mark_is_refused():
    with pytest.raises(ForceError, match="merges the mark '<end>' with the line break"):
        spellings(Merging(), "<end>")


def test_a_merge_behind_the_mark_is_one_more_spelling():
    class Behind(Merging):
        table = {"\n": [1], "<": [3], "end": [4], ">": [6], ">\n": [5]}

    assert spellings(Behind(), "<end>") == {(3, 4, 6), (3, 4, 5)}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"min_thinking": 21}, "that long and that short"),
        ({"min_thinking": -1}, "wanted 0 to"),
        ({"mode": "paper"}, "wanted one of exact, readme, paper-eval"),
        ({"mode": "readme", "max_thinking": 0}, "wanted at least 1, 1 and 0"),
    ],
)
def test_a_force_that_cannot_be_is_refused_in_a_sentence(change, words):
    with pytest.raises(ForceError, match=words):
        replace(FORCE, **change)


@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 9))
def test_what_fits_fits_and_no_token_more(prompt, context, minimum):
    force = replace(FORCE, max_thinking=1000, min_thinking=minimum)
    kept = prompt + 1 + 3 + 1 + FORCE.max_answer
    try:
        assert fit(force, [7] * prompt, context).max_thinking + kept == context
    except ForceError as error:
        assert kept + max(1, minimum) > context and "context" in str(error)


def test_a_sweep_refuses_a_maximum_below_the_minimum():
    with pytest.raises(ForceError, match="wanted 4 to 20 each"):
        ScriptedEngine(dice(0)).run([sweep(PROMPT, replace(FORCE, min_thinking=4), [3])])


def test_a_trace_says_who_ended_it():
    assert Trace(((7,),), True).end_reason == "natural"
    assert Trace(((7,),), True, (8,)).end_reason == "maximum" == Trace(((7,),), False).end_reason
