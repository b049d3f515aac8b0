"""Parallel scaling: votes that no order changes, widths that add up, searches that end, true bills."""

import math
import random
import shutil
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from s1book.budget import budget_force, make_force, seeded
from s1book.config import Run, load_preset, project_root
from s1book.engine import Sampling, ScriptedEngine
from s1book.parallel import (
    ParallelError, Scorer, balanced, best_of, credit, judged, leaders, metered, open_reward, rebase, reward_loss, sampled, samples,
    searched, tally, train_reward, widths,
)
from s1book.packing import PER_SAMPLE
from s1book.reward import one_pass
from s1book.world import make_problem, to_row

from test_budget import FORCE, PROMPT
from test_controls import DiceEngine, WARM, small_model, tokenizer  # noqa: F401 (fixtures)

ballots = st.lists(st.tuples(st.sampled_from(["1", "2", "3", None]), st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0])), max_size=12)
engines = st.builds(DiceEngine, st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]))


@given(ballots, st.randoms())
def test_no_order_changes_a_vote(cast, rng):
    mixed = rng.sample(cast, len(cast))
    for winners in (lambda c: leaders(tally([a for a, _ in c])), lambda c: leaders(tally(*map(list, zip(*c)))) if c else [],
                    lambda c: best_of([a for a, _ in c], [s for _, s in c])):
        assert winners(cast) == winners(mixed)
        assert None not in winners(cast) and winners(cast) == sorted(set(winners(cast)))


@given(ballots)
def test_votes_against_counting_by_hand(cast):
    answers = [a for a, _ in cast]
    counts = {a: answers.count(a) for a in answers if a is not None}
    most = max(counts.values(), default=0)
    tied = leaders(tally(answers))
    assert set(tied) == {a for a, c in counts.items() if c == most}
    draws = [float(a == "1") for a in tied] or [0.0]
    assert credit(tied, {"1"}) == pytest.approx(sum(draws) / len(draws))


def test_a_vote_of_two_is_worth_one_sample():
    assert credit(leaders(tally(["1", "2"])), {"1"}) == 0.5 and credit(leaders(tally(["1", "1"])), {"1"}) == 1.0
    assert leaders(tally(["1", None])) == ["1"] and best_of([None, "2"], [0.9, 0.1]) == ["2"] and best_of([], []) == []
    with pytest.raises(ParallelError, match="2 answers and 1 weights"):
        tally(["1", "2"], [1.0])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.integers(0, 64), st.sampled_from([1e-3, 0.05, 0.2, 1.0, 50.0]))
def test_widths_add_up_and_follow_the_reward(scores, width, temperature):
    shares = widths(scores, width, temperature)
    assert sum(shares) == width and min(shares) >= 0 and len(shares) == len(scores)
    top = max(scores)
    if width:
        assert shares[scores.index(top)] >= math.ceil(width / len(scores)), "the best has at least a fair share"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 20))
def test_widths_are_the_references_formula(scores, width):
    """The reference's loop, with its sum over what remains (eval/rebase), as a slow twin."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    left, twin, rest = width, [0] * len(scores), order[:]
    while rest:
        total = sum(math.exp(scores[i] / 0.2) for i in rest)
        share = left * math.exp(scores[rest[0]] / 0.2) / total
        if abs(share - round(share)) < 1e-6:   # rounding up at a whole number: either way is right
            return
        twin[rest[0]] = min(left, math.ceil(share))
        left -= twin[rest.pop(0)]
    assert widths(scores, width) == twin


@pytest.mark.parametrize("scores, width, temperature", [([], 1, 0.2), ([1.0], -1, 0.2), ([1.0], 1, 0.0)])
def test_impossible_widths_are_refused(scores, width, temperature):
    with pytest.raises(ParallelError, match="wanted scores"):
        widths(scores, width, temperature)


@settings(max_examples=150, deadline=None)
@given(engines, st.integers(1, 6), st.integers(1, 15))
def test_samples_are_runs_of_budget_forcing(engine, n, maximum):
    force = replace(WARM, max_thinking=maximum)
    [found] = engine.run([samples(PROMPT, force, n)])
    assert len(found) == n and len({ask.sampling.seed for ask, _ in engine.log}) == 2 * n, "no seed twice"
    for i, result in enumerate(found):
        assert len(result.trace.ids) <= maximum and result.trace.forced_tokens == 0
        assert seeded(seeded(force.sampling, f"sample {i}"), "answer") in [ask.sampling for ask, _ in engine.log]
    [fewer] = DiceEngine(engine.seed, engine.stop).run([samples(PROMPT, force, max(1, n - 1))])
    assert fewer == found[:len(fewer)], "sample i does not depend on n"


@settings(max_examples=200, deadline=None)
@given(engines, st.integers(1, 8), st.integers(1, 25), st.integers(0, 1000))
def test_a_search_ends_with_as_many_leaves_as_its_width(engine, width, maximum, luck):
    force, asked = replace(WARM, max_thinking=maximum), []

    def score(texts):
        asked.append(len(texts))
        return [random.Random(hash((luck, *t))).random() for t in texts]

    [found] = engine.run([rebase(PROMPT, force, width, score)])
    assert len(found) == width and asked[-1] == width
    assert all(a >= b for a, b in zip(asked[:-1], asked[1:-1])), "leaves take their branch with them"
    thinking, answers = engine.log[:-width], engine.log[-width:]
    assert len({ask.sampling.seed for ask, _ in thinking}) == len(thinking), "no seed twice"
    for (result, _), (ask, _) in zip(found, answers):
        assert len(result.trace.ids) <= maximum and (result.trace.ended or len(result.trace.ids) == maximum)
        assert ask.ids == PROMPT + result.trace.ids + list(result.closing)
        assert not force.stop_ids & set(result.trace.ids)
    for ask, _ in thinking:
        assert len(ask.ids) + ask.max_new_tokens == len(PROMPT) + maximum


def test_a_search_grows_what_the_judge_likes():
    """Lines are 7 or 8 and a line break; the judge likes 8, and no leaf has a 7 behind the first line."""
    from s1book.engine import Continued

    class Lines(ScriptedEngine):
        def write(self, ask):
            return Continued([7 + ask.sampling.seed % 2], 3)

    force = replace(WARM, max_thinking=8)
    [found] = Lines(None).run([rebase(PROMPT, force, 16, lambda texts: [float(7 not in t[len(PROMPT):]) for t in texts], 0.01)])
    assert all(7 not in result.trace.ids[:-2] for result, _ in found)


@settings(max_examples=150, deadline=None)
@given(engines, st.integers(1, 5), st.integers(1, 20), st.booleans())
def test_the_bill_is_what_the_engine_wrote(engine, width, maximum, search):
    force, spent = replace(WARM, max_thinking=maximum), {}
    strategy = rebase(PROMPT, force, width, lambda t: [0.5] * len(t)) if search else samples(PROMPT, force, width)
    [billed] = engine.run([metered(strategy, spent)])
    assert spent["sent"] == sum(len(ask.ids) for ask, _ in engine.log)
    assert spent["generated"] == sum(len(r.new_ids) + (r.stop_id is not None) for _, r in engine.log)
    strategy = rebase(PROMPT, force, width, lambda t: [0.5] * len(t)) if search else samples(PROMPT, force, width)
    assert DiceEngine(engine.seed, engine.stop).run([strategy]) == [billed], "watching changes nothing"


@pytest.mark.parametrize("bad", [dict(n=0), dict(force=FORCE), dict(force=replace(WARM, max_thinking=0))])
def test_pointless_parallelism_is_refused(bad):
    n, force = bad.get("n", 2), bad.get("force", WARM)
    for strategy in (samples(PROMPT, force, n), rebase(PROMPT, force, n, len)):
        with pytest.raises(ParallelError, match="wanted all above 0"):
            next(strategy)


@pytest.fixture
def world(tmp_path, small_model, tokenizer):
    """A run, an untrained model in a folder, and graded traces that differ in one word."""
    folder = tmp_path / "model"
    small_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = Run("tiny", load_preset("tiny", ["budget.max_thinking_tokens=12", "budget.maxima=[]", "engine.slots=8"]), tmp_path / "run")
    rows = [to_row(make_problem("sum", 4, random.Random(i))) | {"trace": f"fours:\nSo {i % 2}", "correct": i % 2 == 1, "id": f"q{i}"}
            for i in range(320)]
    return run, folder, rows


def test_a_reward_model_learns_is_kept_and_reads_equal_texts_once(world, tokenizer):
    run, folder, rows = world
    force = make_force(tokenizer, run.preset.budget)
    data = judged(tokenizer, balanced(rows, 320, 0))
    assert sum(j.right for j in data) == len(data) / 2
    losses = train_reward(run, folder, data, force.line_ends)
    assert len(losses) == 10 and losses[-1] < losses[0]
    file = run.dir / "parallel/reward/model.safetensors"
    before = file.stat().st_mtime_ns
    assert train_reward(run, folder, data, force.line_ends) == losses and file.stat().st_mtime_ns == before
    assert len(train_reward(run, folder, data[:64], force.line_ends)) == 2, "other data, another model"
    score = Scorer(open_reward(run.dir / "parallel/reward"))
    texts = [data[0].ids, data[1].ids[:5], data[0].ids]
    together, read = score(texts), score.read
    assert read == len(data[0].ids) + 5 and together[0] == together[2]
    assert together == pytest.approx([score([t])[0] for t in texts], abs=1e-5), "padding changes nothing"
    last = score.model(input_ids=torch.tensor([data[0].ids])).logits[0, -1, 0].sigmoid().item()
    assert together[0] == pytest.approx(last, abs=1e-5), "a text is judged at its last token"


def test_another_seed_or_base_is_another_model(world, tokenizer):
    run, folder, rows = world
    data, ends = judged(tokenizer, balanced(rows, 64, 0)), make_force(tokenizer, run.preset.budget).line_ends
    another = shutil.copytree(folder, folder.with_name("another"))
    weights = load_file(another / "model.safetensors")
    save_file({name: 1.1 * w for name, w in weights.items()}, another / "model.safetensors", {"format": "pt"})
    seeded_1 = replace(run, preset=run.preset.model_copy(update={"seed": 1}))
    file, kept = run.dir / "parallel/reward/model.safetensors", set()
    for who, base in (run, folder), (run, another), (seeded_1, another):
        train_reward(who, base, data, ends)
        kept.add(file.read_bytes())
    assert len(kept) == 3


def test_the_loss_of_packed_rows_is_that_of_every_sample_alone(world, tokenizer):
    run, folder, rows = world
    ends = make_force(tokenizer, run.preset.budget).line_ends
    longer = [r | {"trace": "fours:\nSo 1\n" * (1 + k % 3)} for k, r in enumerate(rows[:7])]
    batch, terms = judged(tokenizer, longer), []
    torch.manual_seed(0)
    model = open_reward(folder, PER_SAMPLE)
    plain = open_reward(folder)
    plain.load_state_dict(model.state_dict())
    for j in batch:
        logits = plain(input_ids=torch.tensor([j.ids])).logits[0, :, 0]
        for t, i in enumerate(j.ids):
            if t >= j.start and i in ends:
                p = logits[t].sigmoid().item()
                terms.append(-math.log(p if j.right else 1 - p))
    assert reward_loss(model, batch, ends).item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_one_pass_is_the_plain_loop(world, tokenizer):
    """Gradients anew for every batch, their norm clipped to 1, a rate that falls linearly to 0."""
    run, folder, rows = world
    ends = make_force(tokenizer, run.preset.budget).line_ends
    data = judged(tokenizer, balanced(rows, 96, 0))
    torch.manual_seed(0)
    model = open_reward(folder, PER_SAMPLE)
    with torch.no_grad():
        model.score.weight.mul_(100)  # steep, so that clipping matters
    twin = deepcopy(model)
    losses = one_pass(model, data, ends, 0.01)
    weights, norms = list(twin.parameters()), []
    optimiser = torch.optim.AdamW(weights)
    for k, rate in enumerate((0.01, 0.02 / 3, 0.01 / 3)):
        loss = reward_loss(twin, data[32 * k:32 * k + 32], ends)
        assert loss.item() == pytest.approx(losses[k], rel=1e-4)
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        norms.append(sum((g ** 2).sum() for g in slopes if g is not None).sqrt().item())
        for weight, slope in zip(weights, slopes):
            weight.grad = None if slope is None else slope / max(1, norms[-1])
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
    assert len(losses) == 3 and max(norms) > 2 * min(norms) and max(norms) > 1
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), weights))


def test_balanced_takes_no_more_than_there_are():
    rows = [{"correct": True}] * 5 + [{"correct": False}] * 2
    assert sorted(r["correct"] for r in balanced(rows, 100, 0)) == [False] * 2 + [True] * 2
    many = [{"correct": i % 2 == 0, "i": i} for i in range(40)]
    assert balanced(many, 8, 1) == balanced(many, 8, 1) != balanced(many, 8, 2)
    assert sum(r["correct"] for r in balanced(many, 8, 1)) == 4
    assert {r["i"] for r in balanced(many, 8, 1)} != {r["i"] for r in balanced(many, 8, 2)}, "drawn, not the first"


def test_a_trace_that_is_judged_ends_with_one_line_break(tokenizer):
    rows = [to_row(make_problem("sum", 4, random.Random(0))) | {"trace": t, "correct": True} for t in ("So 1", "\nSo 1\n\n")]
    one, other = judged(tokenizer, rows)
    assert one == other and tokenizer.decode(one.ids[one.start:]) == "So 1\n"


def test_records_of_samples_and_searches(world, small_model, tokenizer):
    from s1book.engine import TransformersEngine

    run, folder, rows = world
    force = replace(make_force(tokenizer, run.preset.budget), sampling=Sampling(1.0, 3))
    score = Scorer(open_reward(folder))
    engine = TransformersEngine(small_model, 8, len(tokenizer))
    found = engine.run([sampled(tokenizer, force, 3, score, rows[0]), searched(tokenizer, force, 3, score, rows[0])])
    records = [found[0]["samples"], found[1]["search"]]
    assert engine.stats.generated == sum(r["generated"] for r in records)
    assert score.read == sum(r["read"] for r in records)
    assert all(len(r["answers"]) == len(r["scores"]) == 3 and set(r["right"]) <= {a for a in r["answers"] if a} for r in records)
    assert all(len(r["thinking"]) == len(r["ends"]) == 3 and max(r["thinking"]) <= force.max_thinking for r in records)


# ---------------------------------------------------------------- the recorded table

RECORDED = sorted((project_root() / "data" / "reference" / "seeds").glob("*/parallel/runs.parquet"))
each_seed = pytest.mark.parametrize("file", RECORDED, ids=lambda p: f"seed {p.parts[-3]}")


def worth(rule, answers, scores, right):
    """What a vote is worth, by hand: a tie is a fair draw among the leaders."""
    cast = Counter()
    for answer, score in zip(answers, scores):
        if answer is not None:
            if rule == "best-of-n":
                cast[answer] = max(cast[answer], score)
            else:
                cast[answer] += 1 if rule == "majority" else score
    tied = [a for a in cast if cast[a] >= max(cast.values()) - 1e-9]
    return sum(a in right for a in tied) / len(tied) if tied else 0.0


def source_of(method, k):
    """A line of the table -> run, size of a vote (None: all), rule."""
    if method == "budget forcing":
        return f"wait {k}", None, "majority"
    if method.startswith("REBASE"):
        return f"search {k}", None, method.split(", ")[1]
    rule, temperature = method.split(", ")
    return f"samples {temperature}", k, rule


def test_votes_are_recorded():
    assert RECORDED, "no seed has recorded its votes"
    assert all(file.stat().st_size < 100_000 for file in RECORDED)


@each_seed
def test_the_recorded_table_follows_from_the_recorded_votes(file):
    runs, table = pd.read_parquet(file), pd.read_csv(file.with_name("table.csv"))
    assert {source_of(m, k)[0] for m, k in zip(table.method, table.k)} == set(runs.run) and (table.seconds > 0).all()
    for line in table.itertuples():
        run, size, rule = source_of(line.method, line.k)
        values, costs = [], []
        for r in runs[runs.run == run].to_dict("records"):
            whole, right = len(r["answers"]), set(r["right"])
            size_now = size or whole
            parts = [worth(rule, r["answers"][i:i + size_now], r["scores"][i:i + size_now], right) for i in range(0, whole, size_now)]
            values.append(sum(parts) / len(parts))
            read = 0 if rule == "majority" and run.startswith("samples") else r["read"]
            costs.append([c * size_now / whole for c in (r["generated"], r["sent"], read)])
        n, mean = len(values), sum(values) / len(values)
        half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / n / n)
        means = [sum(c) / n for c in zip(*costs)]
        assert [line.n, line.generated, line.sent, line.read, line.accuracy, line.half] == pytest.approx([n, *means, mean, half], abs=1e-4)


@each_seed
def test_every_recorded_vote_is_whole(file):
    runs = pd.read_parquet(file)
    assert not runs.duplicated(["run", "id"]).any() and runs.groupby("run").id.nunique().eq(runs.id.nunique()).all()
    for r in runs.to_dict("records"):
        sizes = {len(r[c]) for c in ("answers", "scores", "thinking", "ends")}
        assert len(sizes) == 1 and set(r["right"]) <= set(r["answers"]) and set(r["ends"]) <= {"natural", "maximum"}
        assert r["generated"] >= sum(r["thinking"]) - 16 * 8 or not r["run"].startswith("samples")
