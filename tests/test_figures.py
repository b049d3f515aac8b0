"""The paper's figures and tables: every number is there, with its interval, errors are marked."""

import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from s1book.cli import main
from s1book.config import MissingArtefact, Run, S1Error, project_root
from s1book.contrasts import read_answers, save_answers
from s1book.figures import (
    COLUMNS,
    Drawing,
    Panel,
    described,
    domain_bars,
    draw,
    drawings,
    figure_2,
    figure_4,
    our_rejection,
    ours,
    paper_points,
    save,
)
from s1book.scaling import curve_points
from s1book.stats import paper_table, wilson
from s1book.tables import NAMED_BY, TITLES, our_side, paper_side, statement_table, statements, tables_html


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has made nothing, so that the recorded figures are read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S1BOOK_RUN", str(tmp_path_factory.mktemp("run")))
        yield Run.open("tiny")


@pytest.fixture(scope="module")
def all_drawings(run):
    return {drawing.name: drawing for drawing in drawings(run)}


def test_every_published_point_is_drawn(all_drawings):
    drawn = pd.concat(
        [
            p.points
            for d in all_drawings.values()
            for p in d.panels
            if p.whose == "paper" and p.kind == "lines"
        ]
    )
    table = paper_table("figure_points")
    assert len(drawn) == len(table) == 47
    assert sorted(drawn.y.round(2)) == sorted(table.accuracy.round(2))
    assert sorted(all_drawings) == ["figure-1", "figure-2", "figure-4", "figure-6", "figure-7"]


def test_every_point_has_an_interval_around_it(all_drawings):
    for drawing in all_drawings.values():
        for panel in (p for p in drawing.panels if p.kind != "bars"):
            assert list(panel.points) == COLUMNS
            assert (panel.points.low <= panel.points.y).all() and (
                panel.points.y <= panel.points.high
            ).all()
            assert (panel.points.high - panel.points.low > 1).all()


def test_known_errors_are_ringed_and_said(all_drawings):
    assert all_drawings["figure-1"].errata == ["Table 1 gives 93.0"]
    assert any("30 questions instead of 198" in text for text in all_drawings["figure-4"].errata)
    assert all_drawings["figure-6"].errata == ["the caption leaves out limit 6000"]
    assert any("says 51" in note for note in all_drawings["figure-2"].notes)
    figure = draw(all_drawings["figure-4"])
    rings = [
        line
        for line in figure.axes[1].lines
        if line.get_fillstyle() == "none" and len(line.get_xdata()) == 1
    ]
    assert len(rings) == 9 and "30 questions" in figure._supxlabel.get_text()


def test_figure_4b_is_corrected_to_figure_1(all_drawings):
    """Per question, its abscissa is that of Figure 1; printed totals are 6.6 times too small."""
    panel = all_drawings["figure-4"].panels[1]
    sequential = panel.points[panel.points.series == "BF"].x.to_numpy()
    assert np.allclose(sequential, paper_points("1", "gpqa_diamond").x.to_numpy()[-3:], rtol=0.01)


def test_ours_are_the_recorded_accuracies(all_drawings):
    table = curve_points(pd.read_csv(project_root() / "data" / "reference" / "accuracy.csv"))
    mine = next(
        p for p in all_drawings["figure-1"].panels if p.title == "tiny_hard"
    ).points.set_index("label")
    theirs = table[table.benchmark == "tiny_hard"].set_index("setting")
    assert (
        mine.y.equals(theirs.accuracy[mine.index])
        and "base" not in mine.index
        and "wait=1" in mine.index
    )


def test_rejection_points_by_hand(tmp_path, monkeypatch):
    """Tokens of what was accepted; accuracy over all questions."""
    monkeypatch.setenv("S1BOOK_RUN", str(tmp_path))
    (tmp_path / "controls").mkdir()
    rows = [
        {"id": i, "method": "RS", "setting": "8", "thinking_tokens": 4 + i, "correct": i == 0}
        | {"accepted": i < 2}
        for i in range(3)
    ]
    rows.append(rows[0] | {"method": "RS+BF", "thinking_tokens": 9, "correct": True})
    pd.DataFrame(rows).to_parquet(tmp_path / "controls" / "runs.parquet")
    [row] = our_rejection(Run.open("tiny")).itertuples()
    assert (row.x, row.label) == (4.5, "limit 8, 2 of 3 accepted")
    assert row.low == pytest.approx(100 * wilson(1, 3).low)


def test_figure_6_has_a_side_of_ours(all_drawings):
    ours_ = [p for p in all_drawings["figure-6"].panels if p.whose != "paper"]
    assert len(ours_) == 1 and len(ours_[0].points) == 6
    assert any("accepted" in note for note in all_drawings["figure-6"].notes)


def test_what_is_missing_is_said(run):
    def absent(run):
        return pd.read_csv(run.read("controls/nothing.csv"))

    panel, [note] = ours(run, "rejection", absent)
    assert panel == [] and "chapter 12 makes it" in note
    assert ours(None, "x", our_rejection) == ([], [])
    assert {p.whose for d in drawings() for p in d.panels} == {"paper"}  # the paper alone
    with pytest.raises(S1Error, match="no point of figure 9"):
        paper_points("9")


def test_words_say_every_accuracy_with_its_interval(all_drawings):
    for drawing in all_drawings.values():
        words = described(drawing)
        assert len(words.split()) > 20
        for text in re.findall(r"\d+\.\d %(.{0,3})", words):
            assert text.startswith(" ["), words
    assert "0.0 % [0.0, 11.4] at 500" in described(all_drawings["figure-1"])


def test_files_are_the_same_twice_and_hold_the_words(tmp_path):
    from PIL import Image

    drawing = figure_4(None)
    first = [path.read_bytes() for path in save(drawing, tmp_path)]
    png, svg = save(drawing, tmp_path)
    assert [png.read_bytes(), svg.read_bytes()] == first
    assert Image.open(png).info["Description"] == described(drawing)
    assert (
        "Figure 4: thinking on, and voting" in svg.read_text()
        and "majority of Qwen2.5" in svg.read_text()
    )


def test_domains_add_up():
    counts = pd.Series({chr(ord("a") + i): i + 1 for i in range(20)})
    bars = domain_bars(counts, 300, 25, most=5)
    assert bars.x.sum() == 300 and bars.label.tolist() == ["t", "s", "r", "q", "p", "20 others"]
    assert domain_bars(counts[:3], 6, 3).label.tolist() == ["c", "b", "a"]
    paper = next(drawings()), list(drawings())[1]
    assert paper[1].panels[0].points.x.sum() == 1000


@pytest.mark.parametrize("number", NAMED_BY)
def test_tables_hold_every_number(number):
    printed, shown = paper_table(f"table{number}"), paper_side(number)
    text = shown.to_csv()
    columns = [
        c for c in ("aime24", "aime25", "math500", "gpqa_diamond", "accuracy") if c in printed
    ]
    for value in printed[columns].stack().dropna():
        assert f"{value:.1f} [" in text, value
    wrong = {part for part in printed.get("erratum", pd.Series(dtype=object)).dropna()}
    assert all(any(error in said for said in shown["known error"]) for error in wrong)
    accuracies = [cell for c in columns if c in shown for cell in shown[c] if cell]
    assert all(re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\].*", cell) for cell in accuracies)


def test_table_3_names_the_two_rows():
    table = paper_side(3).set_index("method")
    assert (
        table.index[table.disagrees != ""].tolist() == ["BF", "RS"]
        and table["known error"].notna().all()
    )
    assert table["Performance, recomputed"]["BF"] == "56.7 [39.2, 72.6]"


def test_our_tables(run):
    first = our_side(1, run)
    assert first.shape == (4, 4) and all(
        "[" in cell for cell in first.iloc[:, 1:].to_numpy().ravel()
    )
    assert "tiny_hard, n = 30" in first and our_side(3, run).method.tolist()[0] == "BF"
    assert our_side(5, run).setting.tolist()[0] == "fine-tuned, no Wait"
    assert our_side(5, run).setting.tolist()[-1] == "4 x Wait"


def test_cut_traces_are_counted_and_trained_on(run):
    """Table 8: the same share as in the paper is cut; its answers are the recorded ones, and say so."""
    table = our_side(8, run)
    tokens = pd.read_parquet(project_root() / "data" / "reference" / "sft_tokens.parquet")
    lengths = tokens.input_ids.map(len).to_numpy()
    for row in table.itertuples():
        assert row.cut == (lengths > row[1]).sum()
        assert row.samples == len(lengths)
    assert abs(table.cut[0] / len(lengths) - 0.74) < 0.04 and table.cut[1] == 0
    assert table["training length"][1] == run.preset.sft.max_length
    assert table["trained by"].tolist() == ["recorded run, seed 0", "this run"]
    answers = read_answers(project_root() / "data/reference/seeds/0/ablations/answers.parquet")
    for place, arm in enumerate(("cut", "selected")):
        own = answers[(answers.arm == arm) & (answers.setting == "natural") & (answers.benchmark == "tiny_mixed")]
        found = wilson(own.correct.sum(), len(own))
        assert table["tiny_mixed, n = 500"][place] == (
            f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]; "
            f"{own.thinking_tokens.mean():,.0f} tokens")


def test_a_run_that_has_trained_on_cut_traces_shows_its_own(run, tmp_path):
    recorded = read_answers(project_root() / "data/reference/seeds/0/ablations/answers.parquet")
    own = Run("tiny", run.preset, tmp_path)
    save_answers(recorded[recorded.arm == "cut"].assign(correct=False), own.write("ablations/answers.parquet"))
    table = our_side(8, own)
    assert table["trained by"].tolist() == ["this run", "this run"]
    assert table["tiny_hard, n = 30"][0].startswith("0.0 [0.0, 11.4]; ")
    save_answers(recorded[recorded.arm != "cut"], own.write("ablations/answers.parquet"))
    assert our_side(8, own)["trained by"].tolist() == ["recorded run, seed 0", "this run"]
    other = Run("mine", run.preset, tmp_path / "mine")   # of another preset nothing is recorded
    for name in ("accuracy.csv", "sft_tokens.parquet"):
        shutil.copy(project_root() / "data" / "reference" / name, other.write(name))
    assert our_side(8, other).filter(like="n = ").iloc[0].tolist() == ["not trained"] * 3


def test_table_8_marks_what_tables_1_and_4_contradict():
    """The same training has three accuracies in the paper."""
    one = paper_table("table1").set_index("model").loc["s1 w/o BF"]
    four = paper_table("table4").query("times == 0").iloc[0]
    for row in paper_table("table8").query("training_length == 32768").itertuples():
        same = row.accuracy == one[row.benchmark] == four[row.benchmark]
        assert same == pd.isna(row.erratum)
        assert same or (f"{one[row.benchmark]} and" in row.erratum and f"{four[row.benchmark]} for" in row.erratum)


def test_our_table_3_is_chapter_12s(run):
    """Every accuracy with its interval and n; the unit of the slope is said."""
    shown = our_side(3, run).set_index("method")
    table = pd.read_csv(project_root() / "data/reference/controls/table.csv").set_index("method")
    assert list(shown) == ["Control, %", "Scaling, per doubling", "Performance", "runs", "questions"]
    for name, row in table.iterrows():
        assert shown.Performance[name] == f"{row.performance:.1f} [{row.low:.1f}, {row.high:.1f}]"
        assert shown["Scaling, per doubling"][name] == round(row.scaling, 1) and shown.questions[name] == row.n


def test_errors_of_a_whole_table_or_figure_are_said(run, tmp_path, all_drawings):
    page = " ".join(tables_html(run, tmp_path))
    assert "to 2021 by the paper, to 2022 by its code" in page and "points per doubling" in page
    said = {name: " ".join(drawing.notes) for name, drawing in all_drawings.items()}
    assert "outside Diamond" in said["figure-1"] and "whole budget anew" in said["figure-4"]
    assert "cut by 0.5" in said["figure-6"] and "12 of 30 answers exceed" in said["figure-7"]


def test_examples_of_ours_are_the_sets_that_were_trained_on(all_drawings, run):
    """Figure 2, right: the selected set, and the full pool at the same number of steps."""
    points = all_drawings["figure-2"].panels[-1].points
    assert points.label.tolist() == ["selected, 5 passes", "full pool, each once"]
    assert points.x.tolist() == [1000, run.preset.steps * 16]
    table = pd.read_csv(project_root() / "data/reference/ablations/table.csv")
    full = table[(table.arm == "full") & (table.benchmark == "tiny_mixed")].iloc[0]
    assert points.y.tolist() == pytest.approx([100 * full.accuracy_before, 100 * full.accuracy])


def test_a_missing_full_pool_is_said(all_drawings, run, monkeypatch):
    def missing(path):
        raise MissingArtefact("nobody has asked")

    said = "chapter 17 has not trained on it"
    assert said not in " ".join(all_drawings["figure-2"].notes)
    monkeypatch.setattr("s1book.figures.read_answers", missing)
    drawing = figure_2(run)
    assert said in " ".join(drawing.notes) and len(drawing.panels[-1].points) == 1


@pytest.mark.parametrize("number, key, row, to", [
    (2, "set", "full", "selected"), (4, "string", "2 x Hmm", "natural")])
def test_tables_of_chapter_17_are_shown_once_they_are_there(tmp_path, monkeypatch, number, key, row, to):
    """Only contrasts with the natural end of the selected set, and only the family of the table."""
    lines = ["family,before,arm,setting,benchmark,n,accuracy_before,accuracy,difference,low,high",
             "data,selected natural,full,natural,tiny_hard,30,0.6,0.5,-0.1,-0.2,0.1",
             "data,selected 2 x Wait,longest,natural,tiny_hard,30,0.8,0.9,0.1,-0.2,0.1",
             "strings,selected natural,selected,2 x Hmm,tiny_hard,30,0.6,0.5,-0.1,-0.2,0.1",
             "length,selected natural,cut,natural,tiny_hard,30,0.6,0.2,-0.4,-0.5,-0.3"]
    monkeypatch.setenv("S1BOOK_RUN", str(tmp_path))
    (tmp_path / "ablations").mkdir()
    (tmp_path / "ablations" / "table.csv").write_text("\n".join(lines) + "\n")
    shown = our_side(number, Run.open("tiny"))
    assert shown.to_dict("list") == {
        key: [to, row], "tiny_hard, n = 30": [
            "60.0 [42.3, 75.4]", f"50.0 [33.2, 66.8]; difference to {to} -10.0 [-20.0, +10.0]"]}


def test_a_run_without_a_curve_has_no_statements(run):
    from s1book.report import own

    assert set(statement_table(own(run)).whose) == {"paper"}
    assert set(statement_table(run).whose) == {"paper", "tiny"}


def test_the_three_statements_hold_of_the_paper_and_are_not_assumed():
    table = statement_table()
    assert table.holds.all() and table.clear.tolist() == [True, False, True]
    assert "0.0 [0.0, 11.4] at 500" in table["first"][1]
    flat = paper_points("1", "math500").assign(y=50.0, low=45.0, high=55.0)
    assert not any(s.holds or s.clear for s in statements(flat, flat, flat))
    wide = flat.assign(y=92.0, low=88.0, high=95.0)
    assert [(s.holds, s.clear) for s in statements(wide, flat, flat)][0] == (True, False)


class Page(HTMLParser):
    """Addresses and alternative texts."""

    def __init__(self):
        super().__init__()
        self.sources, self.alts, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs["src"]] if "src" in attrs else []
        self.alts += [attrs["alt"]] if tag == "img" else []
        self.links += [attrs["href"]] if "href" in attrs else []


def test_the_command_writes_a_page_that_needs_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("S1BOOK_RUN", str(tmp_path))
    main_code = None
    try:
        main(["figures"])
    except SystemExit as end:
        main_code = end.code
    assert not main_code and "Figures: " in capsys.readouterr().out
    folder = tmp_path / "figures"
    text = (folder / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert len(page.alts) == 5 and all(len(alt.split()) > 20 for alt in page.alts)
    assert all(source.startswith("data:") for source in page.sources) and "<script" not in text
    assert all((folder / link).is_file() for link in page.links if not link.startswith("#"))
    assert {p.name for p in folder.glob("table-*.csv")} == {f"table-{n}.csv" for n in TITLES}
    shutil.rmtree(folder)


def test_texts_on_the_page_are_escaped():
    from s1book.tables import table_html

    assert "<script" not in table_html(pd.DataFrame({"a": ["<script>"]}), "x")


def test_a_panel_of_one_series_has_no_legend():
    points = paper_points("6")
    figure = draw(Drawing("x", "x", (Panel("a", "paper", points),)))
    assert figure.axes[0].get_legend() is None and figure.axes[0].get_xscale() == "linear"
