"""avg@k, pass@k, maj@k against enumeration, chapter 13's votes, and published noise of AIME24."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from s1book.config import S1Error
from s1book.parallel import credit, leaders, tally
from s1book.repeats import drawn_sets, maj_at_k, pass_at_k, repeats_table
from s1book.stats import ErrorParts, cluster_bootstrap, error_parts

SAMPLES = st.integers(1, 7).flatmap(
    lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=5)
)
ANSWERS = st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=6)


@given(SAMPLES, st.data())
def test_pass_at_k_is_every_set_of_k(rows, data):
    k = data.draw(st.integers(1, len(rows[0])))
    slow = [
        np.mean([any(row[i] for i in c) for c in combinations(range(len(row)), k)]) for row in rows
    ]
    assert np.allclose(pass_at_k(rows, k), slow)


def test_pass_at_k_is_the_published_formula_where_factorials_overflow():
    right = np.zeros((2, 2000))
    right[:, :3], right[1, 3:] = 1, 1
    assert pass_at_k(right, 64)[0] == pytest.approx(1 - comb(1997, 64) / comb(2000, 64), rel=1e-9)
    assert pass_at_k(right, 64)[1] == 1 and pass_at_k(right, 1)[0] == pytest.approx(3 / 2000)


def test_pass_at_1_is_not_divided_by_the_samples_again():
    """lighteval 771: pass@1 of 64 samples is the share of right ones, divided by 64 only once."""
    right = np.arange(64) < 35
    assert pass_at_k(right[None], 1)[0] == pytest.approx(35 / 64)


@given(ANSWERS, st.data())
def test_maj_at_k_is_chapter_13_on_every_set(answers, data):
    k, gold = data.draw(st.integers(1, len(answers))), {"1"}
    right = [a in gold for a in answers]
    slow = np.mean(
        [
            credit(leaders(tally([answers[i] for i in c])), gold)
            for c in combinations(range(len(answers)), k)
        ]
    )
    assert maj_at_k([answers], [right], k)[0] == pytest.approx(slow)


def test_maj_at_k_draws_where_the_sets_are_too_many():
    answers, right = ["1"] * 9 + ["2"] * 7, [True] * 9 + [False] * 7
    exact = np.mean(
        [credit(leaders(tally([answers[i] for i in c])), {"1"}) for c in combinations(range(16), 5)]
    )
    assert maj_at_k([answers] * 20, [right] * 20, 5, draws=500).mean() == pytest.approx(
        exact, abs=0.02
    )
    assert (maj_at_k([answers], [right], 5) == maj_at_k([answers], [right], 5)).all()
    sets = drawn_sets(16, 5, 500, np.random.default_rng(0))
    assert sets.shape == (500, 5) and all(len(set(row)) == 5 for row in sets.tolist())


def test_two_spellings_of_the_right_answer_share_a_tie():
    assert maj_at_k([["1/2", "0.5", "3"]], [[True, True, False]], 3)[0] == pytest.approx(2 / 3)
    assert maj_at_k([[None, None]], [[False, False]], 2)[0] == 0


def test_more_samples_than_there_are_is_refused():
    for k in (0, 5):
        with pytest.raises(S1Error, match="found 4, wanted at least"):
            pass_at_k(np.ones((2, 4)), k)


def test_error_parts_in_simulation():
    """Within: the same questions sampled again. Over: other questions too."""
    rng, q, k = np.random.default_rng(0), 40, 6
    chance = rng.beta(0.6, 0.6, q)
    same = (rng.random((4000, q, k)) < chance[:, None]).mean((1, 2))
    other = (rng.random((4000, q, k)) < rng.beta(0.6, 0.6, (4000, q, 1))).mean((1, 2))
    parts = [error_parts(rng.random((q, k)) < chance[:, None]) for _ in range(300)]
    assert np.sqrt(np.mean([p.within**2 for p in parts])) == pytest.approx(same.std(), rel=0.05)
    anew = [error_parts(rng.random((q, k)) < rng.beta(0.6, 0.6, (q, 1))) for _ in range(300)]
    assert np.sqrt(np.mean([p.over**2 for p in anew])) == pytest.approx(other.std(), rel=0.05)


def test_the_error_over_questions_is_scipys_and_the_bootstraps():
    values = np.random.default_rng(1).random((60, 5))
    parts, found = error_parts(values), cluster_bootstrap(values)
    assert parts.over == pytest.approx(scipy_stats.sem(values.mean(1)))
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(parts.over, rel=0.05)
    ragged = np.where(np.arange(5) < 3, values, np.nan)
    assert error_parts(ragged).within == pytest.approx(error_parts(values[:, :3]).within)


def test_the_published_noise_of_aime24():
    """lighteval's issue 661: standard error 0.0596 with 64 samples; 6.1 points for one sample."""
    measured = ErrorParts(within=0.061 / 8, over=0.0596, samples=64)
    within, over = zip(*[(100 * e.within, 100 * e.over) for e in map(measured.at, (1, 4, 16, 64))])
    assert np.allclose(within, [6.1, 3.0, 1.5, 0.8], atol=0.06)
    assert np.allclose(over, [8.5, 6.7, 6.2, 6.0], atol=0.1)


@given(st.floats(0.001, 0.2), st.floats(0.0, 0.2), st.integers(1, 64), st.integers(1, 64))
@settings(max_examples=50)
def test_forecasts_go_there_and_back(within, between, now, then):
    parts = ErrorParts(within, float(np.hypot(within, between)), now)
    back = parts.at(then).at(now)
    assert back.within == pytest.approx(parts.within) and back.over == pytest.approx(parts.over)
    assert (parts.at(then).over <= parts.over) == (then >= now) or then == now


def test_one_sample_has_no_parts():
    with pytest.raises(S1Error, match=r"shape \(30, 1\)"):
        error_parts(np.ones((30, 1)))


def record(question, sample, said, setting="natural"):
    return {
        "benchmark": "b",
        "id": question,
        "setting": setting,
        "sample": sample,
        "extracted": said,
        "correct": said == "1",
    }


def test_repeats_table():
    said = [["1", "1", "1", "2"], ["2", "2", "1", None], ["1", None, "3", "3"]]
    records = [record(q, s, text) for q, row in enumerate(said) for s, text in enumerate(row)]
    row = repeats_table(records, ks=(1, 4, 16)).iloc[0]
    assert (row.n, row.samples) == (3, 4) and row.avg == pytest.approx(5 / 12)
    assert row["pass@4"] == 1 and row["maj@4"] == pytest.approx(1 / 3) and row["pass@1"] == row.avg
    assert row.avg_low <= row.avg <= row.avg_high and "pass@16" not in row and row.within > 0
    with pytest.raises(S1Error, match="fewer samples than others"):
        repeats_table(records[:-1])


def test_greedy_records_have_no_parts_and_nothing_to_vote_on():
    row = repeats_table([record(q, 0, "1") for q in range(3)]).iloc[0]
    assert "within" not in row and row["maj@1"] == row.avg == 1
