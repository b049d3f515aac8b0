"""The protocol and its engines: nobody waits, nothing is computed twice, no token changes."""

import importlib.util
import os.path
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.config import S1Error, load_preset
from s1book.engine import (
    Books, Continuation, Continued, ProtocolError, Sampling, ScriptedEngine, TransformersEngine, follow,
    give, open_engine, shared, take,
)

STOPS = frozenset({1, 2})


def sharp_model(vocab_size=90, kv_heads=2, dtype="float32", seed=0):
    """A random Qwen2 whose greedy text is long, varied and far from ties."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=kv_heads, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=None))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model.eval().to(getattr(torch, dtype))


@pytest.fixture(scope="module")
def model():
    return sharp_model()


def alone(model, ask):
    """The oracle: one request with transformers' generate."""
    import torch

    context = torch.tensor([ask.ids])
    out = model.generate(
        context, attention_mask=torch.ones_like(context), max_new_tokens=ask.max_new_tokens,
        min_new_tokens=ask.min_new_tokens or None, do_sample=False,
        eos_token_id=sorted(ask.stop_ids) or None, pad_token_id=0)
    new = out[0, len(ask.ids):].tolist()
    return Continued(new[:-1], new[-1]) if new[-1] in ask.stop_ids else Continued(new, None)


def drive(model, strategy):
    """Run one strategy with the oracle."""
    replies = None
    try:
        while True:
            replies = [alone(model, ask) for ask in strategy.send(replies)]
    except StopIteration as end:
        return end.value


def rambling(seed, widest=4):
    """A strategy of several turns: forced ids, several requests at once, cuts, all by its own dice."""
    rng = random.Random(seed)
    ids = [rng.randrange(3, 90) for _ in range(rng.choice([1, 2, 9, 30]))]
    stops = frozenset(rng.sample(range(90), rng.choice([1, 4, 12])))
    said = []
    for turn in range(rng.randint(1, 4)):
        asks = []
        for _ in range(rng.randint(1, widest)):
            forced = [rng.randrange(90) for _ in range(rng.choice([0, 1, 3, 12]))]
            start = ids[:rng.randint(1, len(ids))] if rng.random() < 0.3 else ids
            asks.append(Continuation(start + forced, rng.randint(1, 25), stops,
                                     min_new_tokens=rng.choice([0, 0, 1])))
        replies = yield asks
        said += [(r.new_ids, r.stop_id) for r in replies]
        ids = asks[-1].ids + replies[-1].new_ids
    return said


def once(ask):
    return (yield [ask])[0]


# ---------------------------------------------------------------- the protocol

@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_shared_is_the_common_prefix(a, b):
    assert shared(a, b) == len(os.path.commonprefix([a, b])) == shared(b, a)


@pytest.mark.parametrize("ids, limit", [([], 1), ([1], 0), ([1], -3)])
def test_a_request_for_nothing_cannot_be_made(ids, limit):
    with pytest.raises(ProtocolError, match="at least one of each"):
        Continuation(ids, limit, STOPS)


@pytest.mark.parametrize("asked", [Continuation([1], 1, STOPS), [], [1], None, (Continuation([1], 1, STOPS),)])
def test_a_strategy_must_yield_a_list_of_continuations(asked):
    def wrong():
        yield asked

    with pytest.raises(ProtocolError, match="Strategy 0 yielded .*wanted a list of continuations"):
        ScriptedEngine(lambda ids: 1).run([wrong()])


def test_results_come_in_order_and_are_told_at_once():
    def length(n):
        yield [Continuation([5], 1, STOPS)] * n
        return n

    told, progress = [], []
    engine = ScriptedEngine(lambda ids: 7)
    assert engine.run([length(3), length(1), length(2)], lambda i, r: told.append((i, r)), progress.append) == [3, 1, 2]
    assert sorted(told) == [(0, 3), (1, 1), (2, 2)]
    assert [(p.done, p.total) for p in progress] == [(1, 3), (2, 3), (3, 3)]
    assert "1 of 3" in str(progress[0])


def test_a_strategy_without_requests_returns_its_value():
    def nothing():
        return 5
        yield

    assert ScriptedEngine(lambda ids: 1).run([nothing(), nothing()]) == [5, 5]


def test_replies_reach_a_strategy_in_the_order_of_its_requests():
    def two():
        return (yield [Continuation([1], 1, STOPS), Continuation([2], 1, STOPS)])

    books = Books([two()])
    jobs = [take(books), take(books)]
    for job in reversed(jobs):
        give(books, job, Continued(job.ask.ids, None))
    assert [r.new_ids for r in books.results[0]] == [[1], [2]]


def test_strategies_under_way_go_before_new_ones(model):
    started = []

    def two_turns(i):
        started.append(i)
        yield [Continuation([5 + i], 3, frozenset())]
        assert len(started) == i + 1, "a new strategy started although this one was under way"
        yield [Continuation([5 + i, 6], 3, frozenset())]

    engine = TransformersEngine(model, slots=1)
    engine.run(two_turns(i) for i in range(3))
    assert started == [0, 1, 2] and engine.stats.busy == [1] * engine.stats.steps


# ---------------------------------------------------------------- scripts

def test_a_script_follows_the_key_that_ends_latest():
    script = {(1,): [5, 6, 7], (5, 6): [9], (3, 1): [8]}
    assert follow(script, [1]) == 5 and follow(script, [1, 5]) == 6
    assert follow(script, [1, 5, 6]) == 9, "a later key wins"
    assert follow(script, [3, 1]) == 8, "among equals the longer key wins"
    with pytest.raises(ProtocolError, match="does not say"):
        follow(script, [4])


def test_a_script_may_rank_ids_and_must_go_on_when_told():
    ask = Continuation([3], 4, STOPS, min_new_tokens=2)
    [reply] = ScriptedEngine(lambda ids: [1, 9]).run([once(ask)])
    assert reply == Continued([9, 9], 1)
    with pytest.raises(ProtocolError, match="stops too early"):
        ScriptedEngine(lambda ids: 1).run([once(ask)])


def test_the_limit_comes_before_a_stop_that_was_not_seen():
    two_then_stop = {(3,): [8, 8, 1]}
    assert ScriptedEngine(two_then_stop).run([once(Continuation([3], 2, STOPS))]) == [Continued([8, 8], None)]
    assert ScriptedEngine(two_then_stop).run([once(Continuation([3], 3, STOPS))]) == [Continued([8, 8], 1)]


# ---------------------------------------------------------------- transformers

@pytest.mark.parametrize("slots", [1, 3, 64])
def test_greedy_tokens_are_those_of_generate(model, slots):
    seeds = range(24)
    expected = [drive(model, rambling(seed)) for seed in seeds]
    engine = TransformersEngine(model, slots=slots)
    assert engine.run([rambling(seed) for seed in seeds]) == expected
    assert len({len(said) for said in expected}) > 3, "the strategies should differ"
    assert max(engine.stats.busy) == min(slots, max(engine.stats.busy))


def test_grouped_query_heads():
    model = sharp_model(kv_heads=1)
    assert TransformersEngine(model, 5).run([rambling(s) for s in range(6)]) == [drive(model, rambling(s)) for s in range(6)]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=6), st.integers(2, 9))
def test_no_slot_count_changes_a_token(seeds, slots):
    model = test_no_slot_count_changes_a_token.model
    one = [TransformersEngine(model, 1).run([rambling(seed)])[0] for seed in seeds]
    assert TransformersEngine(model, slots).run([rambling(seed) for seed in seeds]) == one


test_no_slot_count_changes_a_token.model = sharp_model(dtype="float64")  # no near ties in double


def test_the_cache_grows(model):
    ask = Continuation([5] * 100, 200, frozenset())
    assert TransformersEngine(model, 2).run([once(ask), rambling(3)]) == [alone(model, ask), drive(model, rambling(3))]


def test_nothing_is_computed_twice(model):
    def turns():
        [a] = yield [Continuation(list(range(10, 40)), 20, frozenset())]
        kept = list(range(10, 40)) + a.new_ids
        yield [Continuation(kept + [3, 4], 5, frozenset())]
        yield [Continuation(kept[:cut] + [3, 4, 5], 2, frozenset()) for cut in (35, 50, 33)]

    engine = TransformersEngine(model, slots=1)
    engine.run([turns()])
    # A request's last id gives its first logits and does not count. After the 30 of the prompt only
    # what is new is fed: the last generated id, which nobody has read yet, and the forced ones; of
    # the three requests the longest goes first and finds even its 3 and 4.
    assert engine.stats.generated == 20 + 5 + 3 * 2
    assert engine.stats.fed == (30 - 1) + (1 + 2 - 1) + (1 - 1) + 2 * (3 - 1)
    assert engine.stats.reused == 49 + 52 + 35 + 33


def test_a_slot_goes_first_to_the_strategy_whose_tokens_it_holds(model):
    def turns(i):
        [a] = yield [Continuation([10 + i] * 20, 20, frozenset())]
        yield [Continuation([10 + i] * 20 + a.new_ids + [3, k], 3, frozenset()) for k in (4, 5, 6)]

    engine = TransformersEngine(model, slots=2)
    engine.run([turns(i) for i in range(6)])
    assert engine.stats.fed == 6 * (19 + 2 + 0 + 0), "a beginning was lost and computed again"


def test_a_repeated_request_finds_everything_but_its_last_id(model):
    def twice():
        ask = Continuation([5, 6, 7], 4, frozenset())
        first = yield [ask]
        return first == (yield [ask, ask, ask])[:1]

    assert TransformersEngine(model, 2).run([twice(), twice()]) == [True, True]


def test_there_is_no_barrier(model):
    def turns(n):
        ids = [5]
        for _ in range(n):
            ids = ids + (yield [Continuation(ids, 10, frozenset())])[0].new_ids

    engine = TransformersEngine(model, slots=3)
    engine.run([turns(n) for n in (6, 1, 1, 1, 1, 1, 1)])
    assert engine.stats.steps == 60 and engine.stats.busy[:30] == [3] * 30


def test_sampling_depends_on_nothing_but_the_request(model):
    def draw(seed, temperature=1.0):
        [a] = yield [Continuation([9, 8, 7], 12, STOPS, Sampling(temperature, seed))]
        kept = [9, 8, 7] + a.new_ids + [5]  # with many slots the two go side by side, with one in turn
        b, c = yield [Continuation(kept + [i, 4, 4], 12, STOPS, Sampling(temperature, seed + i)) for i in (5, 6)]
        return a.new_ids, b.new_ids, c.new_ids

    alone_, mixed = (TransformersEngine(model, s) for s in (1, 5))
    many = mixed.run([draw(s) for s in range(12)] + [rambling(s) for s in range(4)])[:12]
    assert many == alone_.run([draw(s) for s in range(12)])
    assert len({str(m) for m in many}) > 8
    assert mixed.run([draw(0, 0.0)]) == mixed.run([draw(5, 0.0)])


def test_draws_follow_the_softmax(model):
    import torch

    def draw(seed):
        [a] = yield [Continuation([9, 8, 7], 1, frozenset(), Sampling(2.0, seed))]
        return a.new_ids[0]

    n, counts = 3000, torch.zeros(90)
    for token in TransformersEngine(model, 64).run([draw(s) for s in range(n)]):
        counts[token] += 1
    with torch.inference_mode():
        wanted = (model(input_ids=torch.tensor([[9, 8, 7]])).logits[0, -1] / 2.0).softmax(-1) * n
    big = wanted > 5
    chi2 = ((counts - wanted)[big] ** 2 / wanted[big]).sum().item()
    assert chi2 < big.sum().item() + 5 * (2 * big.sum().item()) ** 0.5


def test_ids_beyond_the_tokenizer_are_never_written(model):
    asks = [Continuation([i], 40, frozenset(), Sampling(5.0, i)) for i in range(5)]
    replies = TransformersEngine(model, 5, vocabulary=20).run([once(a) for a in asks])
    assert max(max(r.new_ids) for r in replies) < 20


@pytest.mark.parametrize("ask, words", [
    (Continuation([1] * 500, 20, STOPS), "found 520 tokens, wanted at most 512"),
    (Continuation([3, 90], 1, STOPS), "another tokenizer"),
    (Continuation([-1], 1, STOPS), "another tokenizer"),
])
def test_impossible_requests_are_refused(model, ask, words):
    engine = TransformersEngine(model, 2)
    with pytest.raises(ProtocolError, match=words):
        engine.run([once(ask)])
    assert engine.run([rambling(1)]) == [drive(model, rambling(1))], "the engine still works"


def test_an_error_in_a_strategy_is_not_swallowed(model):
    def broken():
        yield [Continuation([5], 2, STOPS)]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        TransformersEngine(model, 2).run([rambling(1), broken()])


# ---------------------------------------------------------------- opening

def test_open_engine(tiny_folder):
    engine, tokenizer = open_engine(load_preset("tiny"), tiny_folder)
    assert engine.vocabulary == len(tokenizer) and engine.context == 512 and engine.slots == 128
    assert tokenizer.decode(tokenizer("How many r", add_special_tokens=False).input_ids) == "How many r"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_a_sentence_says_what_to_do(tiny_folder):
    with pytest.raises(S1Error, match="vllm, which is not installed.*make test-vllm"):
        open_engine(load_preset("h100"), tiny_folder)


def test_importing_loads_no_torch():
    code = "import sys, s1book.engine, s1book.budget; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- adapters

@pytest.fixture
def adapted(tmp_path, tiny_folder):
    """The folder of a LoRA adapter that changes much, and its base with the adapter added to the weights."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="float64"), config)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.merge_and_unload().eval()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_adapter_thinks_and_answers_as_its_merged_weights_do(adapted, tiny_folder, temperature):
    from dataclasses import replace

    from s1book.budget import budget_force, make_force

    folder, merged = adapted
    preset = load_preset("tiny", ["engine.slots=3"])
    preset = preset.model_copy(update={"engine": preset.engine.model_copy(update={"dtype": "float64"})})
    engine, tokenizer = open_engine(preset, folder)
    assert any("lora" in name for name, _ in engine.model.named_parameters()), "the adapter is apart from the weights"
    base, _ = open_engine(preset, tiny_folder)
    force = replace(make_force(tokenizer, preset.budget), max_thinking=40, ignore_end=2, min_thinking=20)

    def run(engine):
        return engine.run([budget_force([30 + i, 40, 50], replace(force, sampling=Sampling(temperature, i))) for i in range(7)])

    found = run(engine)
    assert found == run(TransformersEngine(merged, 3, len(tokenizer)))
    assert found == run(TransformersEngine(engine.model, 1, len(tokenizer))), "one at a time"
    assert all(a.trace != b.trace for a, b in zip(found, run(base))), "the adapter works while thinking"
    if not temperature:
        assert [drive(merged, budget_force([30 + i, 40, 50], force)) for i in range(2)] == found[:2]


def test_neighbours_in_a_batch_share_no_noise(model):
    """Two requests for the same token, side by side: they agree as often as independent draws, with whatever seeds."""
    import torch

    def pair(seeds):
        return [r.new_ids[0] for r in (yield [Continuation([9, 8, 7], 1, frozenset(), Sampling(2.0, s)) for s in seeds])]

    n, engine = 1500, TransformersEngine(model, 64)
    with torch.inference_mode():
        p = (model(input_ids=torch.tensor([[9, 8, 7]])).logits[0, -1] / 2.0).softmax(-1)
    agree = (p ** 2).sum().item()
    found = engine.run([pair((i, i + 10 ** 6)) for i in range(n)])
    same = sum(a == b for a, b in found)
    assert abs(same - n * agree) < 5 * (n * agree * (1 - agree)) ** 0.5 + 1
    assert all(a == b for a, b in engine.run([pair((i, i)) for i in range(50)])), "the same seed is the same draw"
    later = [a for a, _ in found[1:]] + [found[0][0]]
    moved = sum(a == b for (_, a), b in zip(found, later))
    assert abs(moved - n * agree) < 5 * (n * agree * (1 - agree)) ** 0.5 + 1
