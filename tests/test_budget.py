"""Budget forcing: never too many tokens, never a Wait for nothing, one decode equal to many."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.budget import Force, ForceError, Forced, Trace, budget_force, closing, cut, make_force, rounds, sweep, up_to, whole_answer
from s1book.config import load_preset
from s1book.engine import Continuation, Sampling, ScriptedEngine, TransformersEngine
from s1book.format import Delimiters

from test_engine import sharp_model

START, END, NEWLINE, WAIT, OPEN, FINAL = 1, 2, 3, 4, 5, 6
FORCE = Force(max_thinking=20, max_answer=3, stop_ids=frozenset({START, END}), answer_stops=frozenset({END}),
              open_answer=(START, OPEN, NEWLINE), final_answer=(FINAL,), newline=(NEWLINE,),
              line_ends=frozenset({NEWLINE, 9}), wait_ids=(WAIT,))
PROMPT = [20, 21]


def dice(seed, stop=0.15):
    """A model: any ids lead to a fixed, random-looking ranking of next ids; sometimes a stop is first."""
    def next_ids(ids):
        rng = random.Random(hash((seed, *ids)))
        ranked = rng.sample([NEWLINE, 7, 8, 9, 10, 11], 6)
        return [rng.choice([START, END]), *ranked] if rng.random() < stop else ranked

    return next_ids


def token_by_token(next_ids, prompt, force):
    """A second implementation without requests or segments: one token at a time."""
    thinking, ours, waits, ended, fresh = [], [], 0, False, False
    while len(thinking) < force.max_thinking and not ended:
        wish = [t for t in next_ids(prompt + thinking) if not (fresh and t in force.stop_ids)][0]
        if wish not in force.stop_ids:
            thinking.append(wish)
            ours.append(False)
            fresh = False
        elif waits < force.ignore_end and force.max_thinking - len(thinking) > len(force.wait_ids):
            thinking += force.wait_ids
            ours += [True] * len(force.wait_ids)
            waits, fresh = waits + 1, True
        else:
            ended = True
    return thinking, ours, waits, ended


forces = st.builds(lambda m, n, w, a: replace(FORCE, max_thinking=m, ignore_end=n, wait_ids=w, max_answer=a),
                   st.integers(0, 30), st.integers(0, 5), st.sampled_from([(), (WAIT,), (NEWLINE,), (WAIT, 7, 8)]),
                   st.integers(1, 4))
models = st.builds(dice, st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]))


@settings(max_examples=300, deadline=None)
@given(models, forces)
def test_a_budget_is_kept_and_every_token_is_accounted_for(model, force):
    engine = ScriptedEngine(model)
    [result] = engine.run([budget_force(PROMPT, force)])
    trace = result.trace
    assert len(trace.ids) <= force.max_thinking and trace.waits <= force.ignore_end
    assert trace.forced_tokens == trace.waits * len(force.wait_ids)
    assert all(part == force.wait_ids for part in trace.parts[1::2])
    assert len(trace.parts) % 2 == (force.max_thinking > 0), "the last word is the model's"
    assert all(trace.parts[2::2]), "something follows every Wait"
    assert not force.stop_ids & {i for part in trace.parts[::2] for i in part}
    assert trace.ended or len(trace.ids) == force.max_thinking
    assert len(result.answer_ids) <= force.max_answer
    assert result.answer_ended or len(result.answer_ids) == force.max_answer
    for ask, _ in engine.log:
        assert ask.ids[:len(PROMPT)] == PROMPT and ask.max_new_tokens > 0
    assert len(engine.log) == trace.waits + 1 + (force.max_thinking > 0)
    assert engine.log[-1][0].ids == PROMPT + trace.ids + list(result.closing)


@settings(max_examples=300, deadline=None)
@given(models, forces)
def test_it_is_what_one_token_at_a_time_gives(model, force):
    [result] = ScriptedEngine(model).run([budget_force(PROMPT, force)])
    thinking, ours, waits, ended = token_by_token(model, PROMPT, force)
    mine = [bool(place % 2) for place, part in enumerate(result.trace.parts) for _ in part]
    assert (result.trace.ids, mine, result.trace.waits, result.trace.ended) == (thinking, ours, waits, ended)


@settings(max_examples=200, deadline=None)
@given(models, forces, st.lists(st.integers(0, 30), max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_a_sweep_gives_what_separate_runs_give(model, force, maxima, waits):
    maxima = [m for m in maxima if m <= force.max_thinking]
    engine = ScriptedEngine(model)
    [swept] = engine.run([sweep(PROMPT, force, maxima, waits)])
    asked, distinct = len(engine.log), {r.trace for r in swept.values()}
    apart = {f"max={m}": replace(force, max_thinking=m, ignore_end=0) for m in maxima}
    apart |= {f"wait={n}" if n else "natural": replace(force, ignore_end=n) for n in waits}
    assert swept == dict(zip(apart, engine.run([budget_force(PROMPT, f) for f in apart.values()])))
    most = swept[f"wait={max(waits)}" if max(waits) else "natural"].trace
    assert asked == most.waits + (force.max_thinking > 0) + len(distinct), "one answer per distinct trace"


@settings(max_examples=100, deadline=None)
@given(models, forces, st.integers(1, 4))
def test_rounds_give_the_same(model, force, n):
    prompts = [[20 + i, 21] for i in range(n)]

    def generate(asks):
        return [ScriptedEngine(model).write(ask) for ask in asks]

    assert rounds(generate, prompts, force) == ScriptedEngine(model).run([budget_force(p, force) for p in prompts])


@pytest.mark.parametrize("budget, parts, ended", [
    (0, (), False), (1, ((7,),), False), (2, ((7, 8),), False), (3, ((7, 8),), True),
    (4, ((7, 8), (WAIT,), (7,)), False), (5, ((7, 8), (WAIT,), (7, 8)), False), (6, ((7, 8), (WAIT,), (7, 8)), True),
])
def test_the_edges_of_a_budget(budget, parts, ended):
    script = {tuple(PROMPT): [7, 8, START], (WAIT,): [7, 8, END], (NEWLINE,): [10, END], (FINAL,): [10, END]}
    [result] = ScriptedEngine(script).run([budget_force(PROMPT, replace(FORCE, max_thinking=budget, ignore_end=1))])
    assert result.trace == Trace(parts, ended) and result.answer_ids == (10,) and result.answer_ended


def test_a_model_may_choose_not_to_think():
    script = {tuple(PROMPT): [END], (NEWLINE,): [10, END]}
    [result] = ScriptedEngine(script).run([budget_force(PROMPT, FORCE)])
    assert result.trace == Trace(((),), True) and result.closing == FORCE.open_answer


def test_an_end_at_the_first_token_gets_its_wait():
    engine = ScriptedEngine(lambda ids: [END, 7])
    [result] = engine.run([budget_force(PROMPT, replace(FORCE, ignore_end=2))])
    assert result.trace.parts == ((), (WAIT,), (7,), (WAIT,), (7,)) and result.trace.ended
    assert [ask.min_new_tokens for ask, _ in engine.log] == [0, 1, 1, 0]


@pytest.mark.parametrize("trace, expected", [
    (Trace(((7,),), True), (START, OPEN, NEWLINE)),
    (Trace(((7,),), False), (NEWLINE, START, OPEN, NEWLINE, FINAL)),
    (Trace(((7, NEWLINE),), False), (START, OPEN, NEWLINE, FINAL)),
    (Trace(((7, 9),), False), (START, OPEN, NEWLINE, FINAL)),  # 9 stands for a token such as ".\n\n"
    (Trace((), False), (START, OPEN, NEWLINE, FINAL)),  # the prompt ends with a line break
])
def test_final_answer_is_written_only_after_a_maximum(trace, expected):
    assert closing(FORCE, trace) == expected


def test_cut_and_up_to():
    trace = Trace(((7, 8), (WAIT,), (9,)), False)
    assert cut(FORCE, trace, 1) == Trace(((7,),), False) and cut(FORCE, trace, 0) == Trace((), False)
    assert cut(FORCE, trace, 2) == Trace(((7, 8),), False) and cut(FORCE, trace, 3) == Trace(((7, 8),), True) == up_to(trace, 0)
    assert up_to(trace, 1) == up_to(trace, 7) == trace


@pytest.mark.parametrize("change", [{"max_thinking": -1}, {"max_answer": 0}, {"ignore_end": -1}])
def test_limits_that_mean_nothing_are_refused(change):
    with pytest.raises(ForceError, match="wanted at least"):
        replace(FORCE, **change)


def test_a_maximum_beyond_the_run_is_refused():
    with pytest.raises(ForceError, match=r"wanted 0 to 20"):
        ScriptedEngine(dice(0)).run([sweep(PROMPT, FORCE, [21])])


# ---------------------------------------------------------------- on a model

@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 4, 64])
def test_a_sweep_on_a_model_is_many_runs(temperature, slots):
    engine = TransformersEngine(sharp_model(dtype="float64"), slots)
    stops = frozenset(range(30, 38))
    force = replace(FORCE, max_thinking=60, stop_ids=stops, answer_stops=stops, sampling=Sampling(temperature, 7))
    prompts = [[40 + i, 41, 42] for i in range(5)]
    maxima, waits = [0, 1, 5, 20, 60], [0, 1, 3]
    apart = [replace(force, max_thinking=m) for m in maxima] + [replace(force, ignore_end=n) for n in waits]
    swept = engine.run([sweep(p, force, maxima, waits) for p in prompts])
    cost = engine.stats.generated
    assert [r for result in swept for r in result.values()] == engine.run([budget_force(p, f) for p in prompts for f in apart])
    assert cost < engine.stats.generated
    assert {r.trace.waits for result in swept for r in result.values()} >= {0, 1, 3}


def test_sampled_segments_do_not_repeat_their_random_numbers():
    asked = []

    class Spy(ScriptedEngine):
        def write(self, ask: Continuation):
            asked.append(ask.sampling.seed)
            return super().write(ask)

    Spy(lambda ids: [END, 7]).run([budget_force(PROMPT, replace(FORCE, ignore_end=3, sampling=Sampling(1.0, 5)))])
    assert len(set(asked)) == len(asked) == 5


# ---------------------------------------------------------------- from a tokenizer

def test_make_force(tiny_tokenizer):
    force = make_force(tiny_tokenizer, load_preset("tiny").budget)
    decode = tiny_tokenizer.decode
    assert decode(force.open_answer) == "<|im_start|>answer\n" and decode(force.final_answer) == "Final Answer:"
    assert decode(force.wait_ids) == "Wait" and {decode([i]) for i in force.line_ends} == {"\n"}
    assert {decode([i]) for i in force.stop_ids} == {"<|im_start|>", "<|im_end|>"}
    assert (force.max_thinking, force.max_answer, force.ignore_end) == (384, 16, 0)
    assert "<|endoftext|>" not in {decode([i]) for i in force.stop_ids}


def test_an_answer_must_end_with_one_token(tiny_tokenizer):
    with pytest.raises(ForceError, match="is 2 tokens, wanted one"):
        make_force(tiny_tokenizer, load_preset("tiny").budget, Delimiters(end="So 4"))


def test_an_unknown_wait_is_refused(tiny_tokenizer):
    budget = load_preset("tiny").budget.model_copy(update={"wait": "Hmmm"})
    with pytest.raises(Exception, match="no token for 'Hmmm'"):
        make_force(tiny_tokenizer, budget)


def test_forced_is_plain_data():
    result = Forced(Trace(((7,), (4,), (8,)), True), (1,), (9,), True)
    assert hash(result) and result.trace.end_reason == "natural" and result.trace.ids == [7, 4, 8]
    assert replace(result.trace, ended=False).end_reason == "maximum"


@pytest.mark.parametrize("ended, whole", [(True, [7, 8]), (False, [FINAL, 7, 8])])
def test_a_grader_sees_the_final_answer_that_we_wrote_and_no_other(ended, whole):
    trace = Trace(((9,),), ended)
    assert whole_answer(FORCE, Forced(trace, closing(FORCE, trace), (7, 8), True)) == whole


@settings(max_examples=200, deadline=None)
@given(models, forces)
def test_the_marks_of_all_ends_are_kept(model, force):
    """Which mark the model wrote at each end, suppressed ends too; cuts and shorter runs know their own."""
    engine = ScriptedEngine(model)
    [result] = engine.run([budget_force(PROMPT, force)])
    trace, stops = result.trace, [reply.stop_id for ask, reply in engine.log if ask.phase == "thinking"]
    assert list(trace.marks) == [stop for stop in stops if stop is not None] and set(trace.marks) <= {START, END}
    assert trace.end_mark == (stops[-1] if trace.ended else None)
    for n in range(trace.waits + 1):
        assert up_to(trace, n).marks == trace.marks[:n + 1]
        [alone] = ScriptedEngine(model).run([budget_force(PROMPT, replace(force, ignore_end=n))])
        assert up_to(trace, n).end_mark == alone.trace.end_mark
    for b in range(1, force.max_thinking + 1):
        [alone] = ScriptedEngine(model).run([budget_force(PROMPT, replace(force, max_thinking=b))])
        assert cut(force, trace, b) == alone.trace and cut(force, trace, b).end_mark == alone.trace.end_mark
