"""What breaks budget forcing elsewhere must not break it here: one test for each known pitfall, on every engine.

The pitfalls are those that issues of vLLM, SGLang, llama.cpp, lm-eval and s1 report; the numbers are our list's.

 1  state lost or counted twice when a request is preempted   test_scarce_memory_changes_no_token
 2  placeholders of async scheduling read as tokens           test_what_is_watched_is_what_is_returned
 3  speculative decoding skips the budget                     cannot occur: engines decide after a token is chosen
 4  a fast path for greedy requests skips the limit           test_the_limit_is_exact_for_greedy_and_for_drawn_tokens
 5  an end that is longer than the natural one is put twice   test_the_end_is_written_once
 6  thinking that is opened again has no budget               test_a_budget_is_one_budget (the budget counts tokens, not marks)
 7  quadratic scans of long traces                            test_a_continuation_feeds_what_is_new (nothing is scanned)
 8  ids written into the code                                 test_every_engine_writes_the_oracle_s_tokens (any stops)
 9  an end within the prompt counts as the end                test_stops_within_the_prompt_stop_nothing
10  the model opens its own thinking, which has no budget     as 6
11  UTF-8 split at a cut                                      tests/test_budget.py: engines cut nothing
12  delimiters of one token only                              tests/test_budget.py: engines know stop ids alone
13  a minimum does not hold back stops, or kills the engine   test_a_minimum_holds_back_stops_and_nothing_else
14  stop strings of a task fire while thinking                test_nothing_stops_but_the_request_s_own_stops
15  ids beyond the tokenizer                                  test_ids_beyond_the_tokenizer_are_refused, tests/test_vllm.py
16  a budget of zero or less, nobody left to ask              test_nothing_to_do_is_no_error, test_impossible_requests_...
17  every round gets the whole budget                         test_a_budget_is_one_budget
18  one limit for the whole batch                             test_the_limit_is_exact_for_greedy_and_for_drawn_tokens
19  the thinking is not opened                                tests/test_format.py: the prompt opens it
20  forced tokens cannot be told from the model's             test_what_is_watched_is_what_is_returned
21  a grammar masks everything                                cannot occur: no engine has a grammar
22  defaults of a model folder or server win                  all: the model's folder has hostile defaults, see engines.py
23  text is split into tokens again between rounds            test_every_engine_writes_the_oracle_s_tokens (ids without a text)
24  a continuation computes its beginning again               test_a_continuation_feeds_what_is_new
"""

import random
from dataclasses import replace
from functools import cache

import pytest

from s1book.backends import EngineStopped
from s1book.budget import budget_force, make_force
from s1book.config import load_preset
from s1book.engine import Continuation, ProtocolError, Sampling, ScriptedEngine
from s1book.format import load_tokenizer, prompt_ids, text_ids

from engines import CONTEXT, HOSTILE, NAMES, VOCABULARY, folder, make, oracle, script

each_engine = pytest.mark.parametrize("name", NAMES)
drawing = pytest.mark.parametrize("name", [n for n in NAMES if n not in ("scripted", "server")])  # these two only rank


def rambling(seed):
    """Several turns with forced ids, cuts, several requests at once and stops of their own, all by its own dice."""
    rng = random.Random(seed)
    ids = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 9, 40]))]
    stops = frozenset(rng.sample(range(VOCABULARY), rng.choice([1, 8, 60])))
    said = []
    for _ in range(rng.randint(1, 3)):
        asks = []
        for _ in range(rng.choice([1, 1, 3])):
            start = ids[:rng.randint(1, len(ids))] if rng.random() < 0.3 else ids
            forced = [rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 1, 3, 12]))]
            asks.append(Continuation(start + forced, rng.randint(1, 25), stops, min_new_tokens=rng.choice([0, 0, 1, 3])))
        replies = yield asks
        said += [(r.new_ids, r.stop_id) for r in replies]
        ids = asks[-1].ids + replies[-1].new_ids
    return said


@cache
def rambled(count):
    return oracle(rambling(seed) for seed in range(count))


def once(ask):
    return (yield [ask])[0]


@cache
def tokenizer():
    return load_tokenizer(folder())


def prompt(seed):
    rng = random.Random(seed)
    letters = "".join(f" {i}{rng.choice('abepry')}" for i in range(1, 10))
    return prompt_ids(tokenizer(), f"How many r in{letters} ?")


def forced(**changes):
    return replace(make_force(tokenizer(), load_preset("tiny").budget), **{"max_thinking": 40, "max_answer": 8} | changes)


@each_engine
def test_every_engine_writes_the_oracle_s_tokens(name):
    assert make(name).run(rambling(seed) for seed in range(12)) == rambled(12)


@each_engine
def test_budget_forcing_is_the_oracle_s(name):
    settings = [forced(), forced(ignore_end=2), forced(max_thinking=7, ignore_end=1), forced(max_thinking=0), forced(ignore_end=1, wait_ids=())]
    def run(engine):
        return engine([budget_force(prompt(i), settings[i % len(settings)]) for i in range(10)])
    assert run(make(name).run) == run(oracle)


@pytest.mark.parametrize("name", [n for n in NAMES if "tight" in n])
def test_scarce_memory_changes_no_token(name):
    def long(i):
        [a] = yield [Continuation(prompt(i), 60, frozenset({1}))]
        [b] = yield [Continuation(prompt(i) + a.new_ids + [5, 6], 60, frozenset({1}), min_new_tokens=1)]
        return a, b
    assert make(name).run(long(i) for i in range(9)) == oracle(long(i) for i in range(9))


@each_engine
def test_what_is_watched_is_what_is_returned(name):
    def two(i):
        [a] = yield [Continuation(prompt(i), 12, frozenset({4}), phase="thinking")]
        [b] = yield [Continuation(prompt(i) + a.new_ids[:8] + [9, 9], 5, frozenset({4}), phase="answer")]
        return a, b
    rows, phases, results = {}, {}, make(name).run([two(0), two(1)])
    def watch(t):
        rows.setdefault(t.strategy, [])[t.at:] = t.ids
        phases.setdefault(t.strategy, [])[t.at:] = [t.phase] * len(t.ids)
    assert make(name).run([two(0), two(1)], on_tokens=watch) == results
    for i, (a, b) in enumerate(results):
        kept = a.new_ids[:8]
        assert rows[i] == prompt(i) + kept + [9, 9] + b.new_ids
        wanted = ["prompt"] * len(prompt(i)) + ["thinking"] * len(kept) + ["forced"] * 2 + ["answer"] * len(b.new_ids)
        assert phases[i] == wanted


@each_engine
def test_the_limit_is_exact_for_greedy_and_for_drawn_tokens(name):
    limits = [1, 2, 3, 7, 20]
    warm = [Sampling(), Sampling(1.0, 5)] if name not in ("scripted", "server") else [Sampling()]
    asks = [Continuation(prompt(0), n, frozenset(), sampling) for n in limits for sampling in warm]
    replies = make(name).run(once(ask) for ask in asks)
    assert [(len(r.new_ids), r.stop_id) for r in replies] == [(a.max_new_tokens, None) for a in asks]


@each_engine
def test_a_stop_at_the_limit_is_a_stop(name):
    [free] = make(name).run([once(Continuation(prompt(0), 9, frozenset()))])
    k = next(k for k, t in enumerate(free.new_ids) if k > 2 and t not in free.new_ids[:k])
    stop = frozenset({free.new_ids[k]})
    at, before = make(name).run(once(Continuation(prompt(0), n, stop)) for n in (k + 1, k))
    assert (at.new_ids, at.stop_id) == (free.new_ids[:k], free.new_ids[k])
    assert (before.new_ids, before.stop_id) == (free.new_ids[:k], None)


@each_engine
def test_the_end_is_written_once(name):
    for result in make(name).run(budget_force(prompt(i), forced(max_thinking=n)) for i, n in enumerate((5, 40, 40))):
        row = result.trace.ids + list(result.closing) + list(result.answer_ids)
        start = text_ids(tokenizer(), "<|im_start|>")[0]
        assert row.count(start) == 1 and start not in result.trace.ids


@each_engine
def test_a_budget_is_one_budget(name):
    for result in make(name).run(budget_force(prompt(i), forced(max_thinking=25, ignore_end=4)) for i in range(6)):
        assert len(result.trace.ids) <= 25 and len(result.answer_ids) <= 8


@each_engine
def test_stops_within_the_prompt_stop_nothing(name):
    [free] = make(name).run([once(Continuation([5, 9, 7], 6, frozenset()))])
    stop = next(t for t in range(3, 90) if t not in free.new_ids and t not in (5, 9, 7))
    [without] = make(name).run([once(Continuation([5, stop, 7], 6, frozenset()))])
    if stop not in without.new_ids:
        assert make(name).run([once(Continuation([5, stop, 7], 6, frozenset({stop})))]) == [without]
    assert make(name).run([once(Continuation([stop, 5, 9, stop], 1, frozenset({stop}), min_new_tokens=1))])[0].stop_id is None


@each_engine
@pytest.mark.parametrize("stray", [frozenset(), frozenset({VOCABULARY + 7, 10 ** 6})])
def test_a_minimum_holds_back_stops_and_nothing_else(name, stray):
    # vLLM's server holds back its own ends, too, which are those of the model's folder.
    own = frozenset(HOSTILE["eos_token_id"] if name == "vllm server" else ())
    stops = frozenset(script(prompt(0))[:60]) | stray | own
    asks = [Continuation(prompt(0), 6, stops, min_new_tokens=n) for n in (0, 1, 4, 9)]
    replies = make(name).run(once(ask) for ask in asks)
    assert replies == oracle(once(ask) for ask in asks)
    assert replies[0].new_ids == [] and [len(r.new_ids) >= n for r, n in zip(replies[1:], (1, 4, 6))] == [True] * 3


@each_engine
def test_nothing_stops_but_the_request_s_own_stops(name):
    [none] = make(name).run([once(Continuation(prompt(0), 150, frozenset()))])
    assert len(none.new_ids) == 150 and none == oracle([once(Continuation(prompt(0), 150, frozenset()))])[0]
    assert set(HOSTILE["eos_token_id"]) & set(none.new_ids), "the text should hold ends that nobody asked to stop at"


@each_engine
def test_ids_beyond_the_tokenizer_are_refused(name):
    if name != "scripted":
        with pytest.raises(ProtocolError, match="another tokenizer"):
            make(name).run([once(Continuation([5, VOCABULARY], 1, frozenset()))])


@each_engine
def test_nothing_to_do_is_no_error(name):
    def silent():
        return 3
        yield
    assert make(name).run([]) == [] and make(name).run([silent(), silent()]) == [3, 3]


@each_engine
def test_impossible_requests_are_refused_and_the_engine_goes_on(name):
    if name != "scripted":
        with pytest.raises(ProtocolError, match=f"wanted at most {CONTEXT}, the context of this engine"):
            make(name).run([rambling(1), once(Continuation(prompt(0), CONTEXT, frozenset()))])
    with pytest.raises(ProtocolError, match="wanted a list"):
        make(name).run([rambling(1), (ask for ask in [Continuation([5], 1, frozenset())])])
    assert make(name).run([rambling(1)]) == [rambled(12)[1]]


@each_engine
def test_an_error_of_a_strategy_is_passed_on_as_it_is(name):
    def broken():
        yield [Continuation([5], 2, frozenset())]
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"):
        make(name).run([broken(), rambling(1)])
    assert make(name).run([rambling(1)]) == [rambled(12)[1]]


@drawing
def test_draws_belong_to_the_request(name):
    def two(seed):
        [a] = yield [Continuation(prompt(0), 12, frozenset(), Sampling(1.0, seed))]
        [b] = yield [Continuation(prompt(0) + a.new_ids + [5], 12, frozenset(), Sampling(1.0, seed + 2 ** 62))]
        return a.new_ids, b.new_ids
    many = make(name).run([two(seed) for seed in range(6)] + [rambling(1)])[:6]
    assert [make(name).run([two(seed)])[0] for seed in (0, 5)] == [many[0], many[5]]
    assert len({str(m) for m in many}) == 6 and many[0][0] != many[0][1]


@each_engine
def test_a_continuation_feeds_what_is_new(name):
    def turns():
        kept = prompt(0) * 3
        for _ in range(4):
            [a] = yield [Continuation(kept, 20, frozenset())]
            kept = kept + a.new_ids + [5, 6]
    engine = make(name)
    engine.run([turns()])
    if "server" in name or name == "scripted":
        return  # a server does not say what it computed, a script computes nothing
    block = 32 if "vllm" in name else 1
    assert engine.stats.generated == 80
    assert engine.stats.fed <= 3 * len(prompt(0)) + 3 * (2 + 1 + block)


@each_engine
def test_there_is_no_barrier(name):
    def chain(turns):
        kept = prompt(0)
        for _ in range(turns):
            [a] = yield [Continuation(kept, 8, frozenset())]
            kept = kept + a.new_ids
    def staggered(i):
        [a] = yield [Continuation(prompt(i), 20 * (i + 1), frozenset())]
        yield [Continuation(prompt(i) + a.new_ids, 20 * (4 - i), frozenset())]
    if name in ("transformers", "vllm"):
        make(name).run(staggered(i) for i in range(4))
        assert make(name).stats.steps < 125, "100 for each; 160 if all waited for the slowest twice"


class Dies:
    """Makes an engine fail once, after a number of calls of its model."""

    def __init__(self, monkeypatch, name, after):
        self.left = after
        engine = make(name)
        if "transformers" in name:
            self.wrap(monkeypatch, "s1book.engine.step")
        elif name == "scripted":
            self.wrap(monkeypatch, engine, "write")
        else:
            self.wrap(monkeypatch, engine.backend, "step")

    def wrap(self, monkeypatch, *target):
        owner, attribute = target if len(target) == 2 else (__import__("s1book.engine", fromlist=["step"]), "step")
        real = getattr(owner, attribute)

        def failing(*arguments):
            self.left -= 1
            if not self.left:
                raise RuntimeError("out of memory\nand much more")
            return real(*arguments)

        monkeypatch.setattr(owner, attribute, failing)


@each_engine
@pytest.mark.parametrize("after", [1, 9])
def test_an_engine_that_dies_loses_nothing(name, after, monkeypatch):
    told = []
    Dies(monkeypatch, name, after)
    with pytest.raises(EngineStopped, match=r"stopped after \d+ of 12 .*RuntimeError: out of memory\)") as caught:
        make(name).run([rambling(seed) for seed in range(12)], lambda i, result: told.append((i, result)))
    assert [result == rambled(12)[i] for i, result in told] == [True] * caught.value.books.done
    assert make(name).run(caught.value.books) == rambled(12), "the same engine, alive again, goes on"
    assert sorted(told) == list(enumerate(rambled(12))), "every result is told once"


def test_another_engine_goes_on_where_one_died(monkeypatch):
    Dies(monkeypatch, "transformers", 20)
    with pytest.raises(EngineStopped) as caught:
        make("transformers").run([rambling(seed) for seed in range(12)])
    assert ScriptedEngine(script).run(caught.value.books) == rambled(12)
