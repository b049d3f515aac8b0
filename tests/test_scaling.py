"""The metrics of section 3.2 against a slow twin, and against Table 3 of the paper."""
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1book.scaling import (
    binomial_bands, bounds, control, curve_figure, curve_points, doublings, drawn_counts, fitted_slope, mean_over_pairs, measure,
    paper_runs, performance, resampled_metrics, scaling_table, table3, thousands,
)
from s1book.stats import accuracy_table, paper_table

CURVES = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 100)), min_size=2, max_size=9)


def slow_scaling(x, y):
    slopes = [(y[b] - y[a]) / (x[b] - x[a]) for a, b in combinations(range(len(x)), 2) if x[a] != x[b]]
    return np.mean(slopes) if slopes else np.nan


@given(CURVES)
def test_scaling_is_its_slow_twin(curve):
    tokens, accuracy = np.array(curve, float).T
    for x in (thousands(tokens), doublings(tokens)):
        assert np.isclose(mean_over_pairs(x, accuracy), slow_scaling(x, accuracy), equal_nan=True)


@given(CURVES, st.randoms(use_true_random=False))
def test_metrics_do_not_depend_on_the_order_of_runs(curve, random):
    frame = pd.DataFrame(curve, columns=["tokens", "accuracy"]).assign(bound_low=0, bound_high=2000)
    order = random.sample(range(len(frame)), len(frame))
    before, after = vars(measure(frame)), vars(measure(frame.iloc[order]))
    assert all(np.isclose(before[name], after[name], equal_nan=True) for name in before)


@given(CURVES)
def test_the_fit_is_polyfit(curve):
    tokens, accuracy = np.array(curve, float).T
    if len(set(tokens)) > 1:
        assert np.isclose(fitted_slope(doublings(tokens), accuracy), np.polyfit(np.log2(tokens), accuracy, 1)[0])


def test_a_straight_line_has_one_slope_in_its_own_unit():
    tokens = np.array([100.0, 200.0, 400.0, 800.0])
    assert np.isclose(mean_over_pairs(doublings(tokens), 7 * np.log2(tokens)), 7)
    assert np.isclose(mean_over_pairs(thousands(tokens), 0.02 * tokens), 20)
    assert np.isclose(fitted_slope(doublings(tokens), 7 * np.log2(tokens)), 7)


def test_runs_without_thinking_and_equal_runs_are_left_out():
    tokens, accuracy = np.array([0.0, 8.0, 16.0, 16.0]), np.array([90.0, 20.0, 30.0, 50.0])
    assert np.isclose(mean_over_pairs(doublings(tokens), accuracy), 20)
    assert np.isclose(fitted_slope(doublings(tokens), accuracy), 20)
    assert np.isnan(mean_over_pairs(doublings(tokens[:2]), accuracy[:2]))
    assert np.isnan(fitted_slope(doublings(tokens[:2]), accuracy[:2]))
    assert np.isfinite(mean_over_pairs(thousands(tokens), accuracy))


def test_control_and_performance():
    assert control(np.array([5, 10, 11]), np.array([6, 0, 0]), np.array([np.inf, 10, 10])) == pytest.approx(100 / 3)
    assert performance(np.array([[1.0, 3.0], [5.0, 2.0]])).tolist() == [3, 5]


def test_table_3():
    """Five rows agree in every number; BF states five runs for seven, RS mixes two sets of runs."""
    table = table3()
    assert dict(table.differs) == {
        "BF": "runs", "TCC": "", "TCC+BF": "", "SCC": "", "SCC+BF": "", "CCC": "", "RS": "scaling, runs"}
    assert (table.scaling_per_doubling.drop("RS").round() == table.printed_scaling.drop("RS")).all()
    # the printed, linear formula gives none of the printed numbers
    assert ((table.scaling_linear - table.printed_scaling).abs() > 2).all()


def test_rejection_sampling_needs_two_sets_of_runs():
    runs = paper_runs()
    rejection = runs[runs.method == "RS"]
    assert len(rejection) == 6
    without = measure(rejection[rejection.run != "limit 3500"])
    assert without.scaling_per_doubling == pytest.approx(-35.5, abs=0.05)
    assert without.performance == pytest.approx(36.7, abs=0.05)  # the printed 40.0 is the run left out


def test_table_3_shows_no_bare_accuracy():
    assert table3().shown["BF"] == "56.7 [39.2, 72.6]" and table3().shown["RS"] == "40.0 [24.6, 57.7]"


def test_bands_of_published_points_are_those_of_a_slow_twin():
    points, draw = paper_runs().query("method == 'BF'"), np.random.default_rng(1)
    scalings = [slow_scaling(np.log2(points.tokens.to_numpy()),
                             [100 * np.mean(draw.random(30) < a / 100) for a in points.accuracy]) for _ in range(2000)]
    ours = binomial_bands(points)
    assert np.allclose([ours["scaling_per_doubling_low"], ours["scaling_per_doubling_high"]],
                       np.quantile(scalings, [0.025, 0.975]), atol=1)
    assert ours == binomial_bands(points) != binomial_bands(points, seed=1)
    more = binomial_bands(points, n=3000)  # a hundred times the questions: a tenth of the width
    width = [b["scaling_fit_high"] - b["scaling_fit_low"] for b in (ours, more)]
    assert width[0] == pytest.approx(10 * width[1], rel=0.1)


def test_only_budget_forcing_has_a_scaling_apart_from_zero():
    apart = {m for m, p in paper_runs().groupby("method") if binomial_bands(p)["scaling_per_doubling_low"] > 0}
    falls = {m for m, p in paper_runs().groupby("method") if binomial_bands(p)["scaling_per_doubling_high"] < 0}
    assert apart == {"BF"} and not falls


def test_paper_data_agree_with_each_other():
    points = paper_table("figure_points")
    four_b = points[(points.figure == "4b") & (points.method == "BF")]
    one = points[(points.figure == "1") & (points.benchmark == "gpqa_diamond")].tokens.to_numpy()
    assert np.allclose(four_b.tokens / 30, one[-3:], rtol=0.01)  # 30 questions, not 198
    assert four_b.erratum.str.contains("30 questions instead of 198").all()
    best = points[(points.figure == "1") & (points.benchmark == "aime24")].accuracy.max()
    assert best == pytest.approx(paper_table("table3").set_index("method").performance["BF"], abs=0.05)
    assert len(points) == 47 and not points[["tokens", "accuracy"]].isna().any(axis=None)


def test_bounds():
    assert bounds("max=16", 50) == (0, 16) and bounds("wait=2", 50) == (50, np.inf)
    assert bounds("natural", 50) == (0, np.inf) == bounds("newline=1", 50)


def synthetic(n=40, benchmark="b"):
    """Records with a known curve: deterministic, only for tests."""
    plan = {"base": (0, 0.1), "max=0": (0, 0.1), "max=8": (8, 0.2), "max=16": (15, 0.4), "natural": (60, 0.7),
            "newline=1": (70, 0.7), "wait=1": (120, 0.9), "wait=2": (180, 0.9)}
    return [{"benchmark": benchmark, "id": i, "setting": name, "thinking_tokens": tokens + i % 2 * (tokens > 16),
             "end_reason": "natural", "extracted": "3", "correct": i < share * n}
            for name, (tokens, share) in plan.items() for i in range(n)]


def test_curve_points():
    points = curve_points(accuracy_table(synthetic())).set_index("setting")
    assert points.accuracy["natural"] == pytest.approx(70) and points.tokens["natural"] == 60.5
    assert points.bound_low["wait=1"] == 60.5 and points.bound_high["max=16"] == 16
    assert points.kind.tolist() == ["base", "max", "max", "max", "natural", "newline", "wait", "wait"]


def test_scaling_table():
    table = scaling_table(synthetic() + synthetic(benchmark="c"), resamples=300).set_index(["method", "benchmark"])
    row = table.loc[("BF", "b")]
    assert row.control == 100 and row.n_points == 6 and row.performance == pytest.approx(90)
    x, y = np.array([8, 15, 60.5, 120.5, 180.5]), np.array([20, 40, 70, 90, 90])
    assert row.scaling_per_doubling == pytest.approx(slow_scaling(np.log2(x), y))
    assert row.scaling_per_doubling_low < row.scaling_per_doubling < row.scaling_per_doubling_high
    assert table.n_points.unstack("benchmark")["c"].to_dict() == {"BF": 6, "BF maxima only": 4, "BF Wait only": 3}
    assert len(table) == 6


def test_control_finds_a_broken_bound():
    records = synthetic()
    for record in records:
        record["thinking_tokens"] += 2 * (record["setting"] == "max=16")
    table = scaling_table(records, resamples=10).set_index("method")
    assert table.control["BF"] == pytest.approx(100 * 5 / 6)


def test_resampled_metrics_are_the_loop():
    rng = np.random.default_rng(0)
    correct, tokens = rng.random((50, 4)) < 0.5, 10.0 * 2 ** np.arange(4) + rng.random((50, 4))
    counts = drawn_counts(50, 20, seed=1)
    assert (counts.sum(axis=1) == 50).all() and (drawn_counts(50, 20, seed=1) == counts).all()
    values = resampled_metrics(correct, tokens, counts)
    for i, row in enumerate(counts):
        chosen = np.repeat(np.arange(50), row)
        x, y = tokens[chosen].mean(0), 100 * correct[chosen].mean(0)
        assert values["scaling_per_doubling"][i] == pytest.approx(slow_scaling(np.log2(x), y))
        assert values["scaling_linear"][i] == pytest.approx(slow_scaling(x / 1000, y))
        assert values["performance"][i] == pytest.approx(y.max())


def test_curve_figure_draws_every_run():
    import matplotlib

    matplotlib.use("Agg")
    points = curve_points(accuracy_table(synthetic() + synthetic(benchmark="c")))
    figure = curve_figure(points, points.assign(run_seed=1), "tiny")
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["b, n = 40", "c, n = 40"]
    drawn = sum(len(line.get_xdata()) for line in panels[0].get_lines() if line.get_marker() in "osD*x")
    assert drawn == 8  # one marker a setting
    markers = {line.get_marker() for line in panels[0].get_lines()} - {"None", "_", "|", "", None}
    assert len(markers) >= 5  # series are told apart without colour
