"""Statistics against scipy and statsmodels, against published values, and by simulation."""
import gzip
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar as sm_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_confint, proportion_effectsize

from s1book.config import S1Error
from s1book.stats import (
    Interval, accuracy_table, cluster_bootstrap, flips, holm, mcnemar, paired_bootstrap, paper_table,
    published, questions_paired, questions_unpaired, recorded, resampled_means, score_matrix, setting_key, wilson,
)


@given(st.integers(1, 2000), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_statsmodels(n, data, level):
    correct = data.draw(st.integers(0, n))
    ours = wilson(correct, n, level)
    assert np.allclose([ours.low, ours.high], proportion_confint(correct, n, 1 - level, "wilson"), atol=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_wilson_takes_arrays_and_refuses_nothing():
    both = wilson(np.array([15, 17]), 30)
    assert np.allclose(both.high, [wilson(15, 30).high, wilson(17, 30).high])
    with pytest.raises(S1Error, match="n = 0"):
        wilson(0, 0)


def test_wilson_coverage():
    counts, truths = np.arange(31), np.linspace(0.02, 0.98, 97)
    ends = wilson(counts, 30)
    inside = (ends.low[:, None] <= truths) & (truths <= ends.high[:, None])
    coverage = (scipy_stats.binom.pmf(counts[:, None], 30, truths) * inside).sum(0)
    assert abs(coverage.mean() - 0.95) < 0.01 and coverage.min() > 0.9


def test_cluster_bootstrap_is_scipys():
    values_QK = np.random.default_rng(0).random((60, 4))
    ours = cluster_bootstrap(values_QK, 20_000)
    theirs = scipy_stats.bootstrap((values_QK.mean(1),), np.mean, method="percentile", n_resamples=20_000, rng=1)
    assert np.allclose([ours.low, ours.high], theirs.confidence_interval, atol=0.004)
    assert ours.value == pytest.approx(values_QK.mean())


def test_cluster_bootstrap_covers_where_the_naive_count_does_not():
    rng, hits, naive_hits, runs = np.random.default_rng(0), 0, 0, 300
    for seed in range(runs):
        samples = rng.random((100, 8)) < rng.beta(0.5, 0.5, size=100)[:, None]
        ours, naive = cluster_bootstrap(samples, 1000, seed), wilson(samples.sum(), samples.size)
        hits += ours.low <= 0.5 <= ours.high
        naive_hits += naive.low <= 0.5 <= naive.high
    assert hits / runs > 0.9 and naive_hits / runs < 0.75


def test_bootstrap_is_seeded_and_missing_samples_are_left_out():
    values = np.array([[1.0, np.nan], [0.0, 0.0], [1.0, 0.0]])
    assert cluster_bootstrap(values, 100, seed=3) == cluster_bootstrap(values, 100, seed=3)
    assert cluster_bootstrap(values, 100, seed=3) != cluster_bootstrap(values, 100, seed=4)
    assert cluster_bootstrap(values).value == pytest.approx(0.5)
    with pytest.raises(S1Error, match="shape"):
        cluster_bootstrap(np.ones(3))


def test_blocks_change_nothing():
    values = np.random.default_rng(0).random(2500)
    whole = np.random.default_rng(5).integers(2500, size=(900, 2500), dtype=np.int32)
    assert np.allclose(resampled_means(values, 900, 5), values[whole].mean(axis=1))


def test_paired_bootstrap_uses_the_pairs():
    rng = np.random.default_rng(0)
    difficulty = rng.random(200)
    before = (rng.random(200) < difficulty).astype(float)[:, None]
    after = np.maximum(before, (rng.random(200) < 0.1)[:, None])
    change, apart = paired_bootstrap(before, after), paired_bootstrap(before, rng.permutation(after))
    assert change.value == pytest.approx(apart.value) and change.low > 0
    assert change.high - change.low < 0.6 * (apart.high - apart.low)
    with pytest.raises(S1Error, match="same questions"):
        paired_bootstrap(before, after[1:])


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_statsmodels(spoiled, repaired):
    theirs = sm_mcnemar([[0, spoiled], [repaired, 0]], exact=True).pvalue if spoiled + repaired else 1.0
    assert mcnemar(spoiled, repaired) == pytest.approx(min(theirs, 1.0))


def test_the_headline():
    """50.0 to 56.7 on 30 questions: p is a half at best; six repaired and none spoiled are needed."""
    assert mcnemar(0, 2) == 0.5 and mcnemar(1, 3) > 0.5
    assert mcnemar(0, 5) > 0.05 > mcnemar(0, 6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=30)
def test_holm_is_statsmodels(p_values):
    assert np.allclose(holm(p_values), multipletests(p_values, method="holm")[1])


@pytest.mark.parametrize("first, second, power", [(0.5, 17 / 30, 0.8), (0.9, 0.93, 0.9), (0.1, 0.3, 0.8)])
def test_unpaired_power_is_statsmodels(first, second, power):
    theirs = NormalIndPower().solve_power(proportion_effectsize(first, second), alpha=0.05, power=power)
    assert questions_unpaired(first, second, power) == np.ceil(theirs)


@pytest.mark.parametrize("repaired, spoiled", [(0.1, 0.02), (0.2, 0.1)])
def test_paired_power_holds_in_simulation(repaired, spoiled):
    n = questions_paired(repaired, spoiled)
    draws = np.random.default_rng(0).multinomial(n, [repaired, spoiled, 1 - repaired - spoiled], size=2000)
    assert 0.72 < np.mean([mcnemar(b, a) < 0.05 for a, b, _ in draws]) < 0.86
    assert n < questions_unpaired(0.5, 0.5 + repaired - spoiled)


def test_paired_power_by_hand():
    """(1.959964 sqrt(0.5) + 0.841621 sqrt(0.5 - 0.09))^2 / 0.09 = 41.2"""
    assert questions_paired(0.4, 0.1) == 42


def record(i, setting, correct, **more):
    return {"benchmark": "b", "id": f"b-{i}", "model": "sft", "setting": setting, "thinking_tokens": 10 * i,
            "end_reason": "natural", "extracted": "3", "correct": correct} | more


def test_accuracy_table():
    records = [record(i, "wait=1", i < 3) for i in range(4)]
    records += [record(i, "max=8", i < 1, end_reason="maximum", extracted=None) for i in range(4)]
    records += [record(i, "max=16", i < 2, seconds=0.5) for i in range(4)]
    table = accuracy_table(records)
    assert list(table.setting) == ["max=8", "max=16", "wait=1"] and list(table.n) == [4, 4, 4]
    assert list(table.accuracy) == [0.25, 0.5, 0.75] and list(table.thinking_tokens) == [15, 15, 15]
    assert list(table.no_answer) == [1, 0, 0] == list(table.cap_hit) and table.seconds[1] == 2
    assert np.allclose(table.low, [wilson(k, 4).low for k in (1, 2, 3)])


def test_accuracy_table_takes_samples_as_clusters():
    records = [record(i, "natural", i < 15, sample=k) for i in range(30) for k in range(16)]
    row = accuracy_table(records).iloc[0]
    assert row.n == 30 and row.correct == 15 and row.high - row.low > 0.3
    with pytest.raises(S1Error, match="chapter 14"):
        accuracy_table([])


@given(st.permutations(["base", "max=0", "max=8", "max=16", "natural", "newline=1", "wait=1", "wait=2", "wait=10", "x"]))
@settings(max_examples=20)
def test_settings_have_one_order(names):
    wanted = ["base", "max=0", "max=8", "max=16", "natural", "newline=1", "wait=1", "wait=2", "wait=10", "x"]
    assert sorted(names, key=setting_key) == wanted


def test_flips():
    before, after = [True, True, False, False, False], [True, False, True, True, False]
    records = [record(i, "natural", c) for i, c in enumerate(before)] + [record(i, "wait=1", c) for i, c in enumerate(after)]
    row = flips(records[::-1], "natural", "wait=1").iloc[0]
    assert (row.wrong_to_right, row.right_to_wrong, row.n) == (2, 1, 5)
    assert row.difference == pytest.approx(0.2) and row.p == 1.0 and row.low < 0 < row.high
    with pytest.raises(S1Error, match="'wait=1' lacks 1 of the 5"):
        flips(records[:-1], "natural", "wait=1")
    with pytest.raises(S1Error, match="no setting 'wait=9'"):
        flips(records, "natural", "wait=9")


def test_score_matrix_keeps_questions_together():
    frame = pd.DataFrame([record(1, "natural", True), record(0, "natural", False), record(0, "max=8", True), record(1, "max=8", False)])
    table = score_matrix(frame)
    assert list(table.columns) == ["max=8", "natural"] and table.loc["b-1"].tolist() == [0, 1]
    assert score_matrix(frame, "thinking_tokens").loc["b-1"].tolist() == [10, 10]


def test_paper_table_and_counts_of_s1():
    table = paper_table("table1").set_index("model")
    assert 100 * 17 / 30 == pytest.approx(table.aime24["s1-32B"], abs=0.05)
    with pytest.raises(S1Error, match="data/paper/nothing.csv"):
        paper_table("nothing")


def test_published_numbers_get_their_intervals():
    rows = published(paper_table("table1")).set_index(["model", "benchmark"])
    best = rows.loc[("s1-32B", "aime24")]
    assert (best.n, best.correct, best.shown) == (30, 17, "56.7 [39.2, 72.6]") and best.whole
    assert not rows.whole[("o1-preview", "aime24")]  # 44.6 is an average of runs
    low, high = proportion_confint(0.446 * 30, 30, method="wilson")
    assert np.allclose(rows.loc[("o1-preview", "aime24"), ["low", "high"]].astype(float), [100 * low, 100 * high])
    assert ("Gemini 2.0 Flash Thinking", "math500") not in rows.index  # the paper gives none
    assert ((rows.low <= rows.accuracy) & (rows.accuracy <= rows.high)).all()
    long = published(paper_table("table8"))  # one column of benchmarks
    assert len(long) == 6 and long.n.tolist() == [30, 500, 198] * 2


def test_how_many_questions_tell_50_from_57():
    """The question of the issue: different questions for each setting, and the same ones."""
    assert questions_unpaired(0.5, 17 / 30) == 878
    assert questions_paired(2 / 30, 0) == 116 and questions_paired(4 / 30, 2 / 30) == 351


def test_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("S1BOOK_ROOT", str(tmp_path))
    assert recorded("accuracy.csv").empty and "make reference" in capsys.readouterr().out
    for seed in (10, 2):
        folder = tmp_path / "data" / "reference" / "seeds" / str(seed)
        folder.mkdir(parents=True)
        pd.DataFrame({"benchmark": ["b"], "accuracy": [0.5]}).to_csv(folder / "accuracy.csv", index=False)
        with gzip.open(folder / "records.jsonl.gz", "wt") as file:
            file.write(json.dumps(record(0, "natural", True, extracted="007")) + "\n")
    assert recorded("accuracy.csv").run_seed.tolist() == [2, 10]
    assert recorded("records.jsonl.gz").extracted.tolist() == ["007", "007"]
    assert recorded("accuracy.csv", "h100").empty


def test_interval_reads_well():
    assert str(Interval(17 / 30, 0.392, 0.726)) == "56.7 % [39.2, 72.6]"
