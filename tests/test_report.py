"""The page for a colleague: it opens with its result, and leads to figures and traces, offline."""

import gzip
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pandas as pd
import pytest

from s1book.config import MissingArtefact, Run, project_root
from s1book.honest import critics, honest_figure, honest_points, read_votes, same_questions
from s1book.pages import image, page
from s1book.report import INSPECTED, build_report, own, result
from s1book.stats import accuracy_table, flips

REFERENCE = project_root() / "data" / "reference"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "headless_shell"))), None)


class Page(HTMLParser):
    """Links, images and their texts."""

    def __init__(self, text):
        super().__init__()
        self.links, self.sources, self.alts, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs["href"]] if "href" in attrs else []
        self.sources += [attrs["src"]] if "src" in attrs else []
        self.alts += [attrs.get("alt", "")] if tag == "img" else []
        self.ids += [attrs["id"]] if "id" in attrs else []


@pytest.fixture(scope="module")
def records():
    lines = gzip.open(REFERENCE / "seeds" / "0" / "records.jsonl.gz", "rt")
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory, records):
    """A finished run, put together from what is recorded."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    for name in ("accuracy.csv", "curve.svg", "example_traces.jsonl", "funnel.csv", "sft_log.csv", "run_card.json",
                 "sft_tokens.parquet"):
        shutil.copy(REFERENCE / name, folder)
    for name in ("s1k", "seeds/0/parallel"):
        shutil.copytree(REFERENCE / name, folder / name.rpartition("/")[2])
    with open(folder / "records.jsonl", "w") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    frame, votes = same_questions(records, read_votes(folder / "parallel" / "runs.parquet"), 16)
    points = honest_points(frame, votes)
    points.to_csv(folder / "honest.csv", index=False)
    samples = pd.DataFrame([{"id": v["id"], "sample": k, "setting": s, "extracted": a, "correct": a in v["right"]}
                            for v in votes for s in ("natural", "wait=1") for k, a in enumerate(v["answers"])])
    critics(records, frame, votes, samples).to_csv(folder / "critics.csv", index=False)
    honest_figure(points, "tiny", "tiny_mixed").savefig(folder / "honest.svg")
    return Run("tiny", Run.open("tiny").preset, folder)


@pytest.fixture(scope="module")
def index(run):
    return build_report(run)


def test_it_opens_with_the_result(index, records):
    """The sentence is computed again from the records, by other means."""
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", index.read_text()))
    table = accuracy_table(records).set_index(["benchmark", "setting"]).loc["tiny_mixed"]
    for setting in ("base", "natural", "wait=1"):
        row = table.loc[setting]
        assert f"{100 * row.accuracy:.1f} % [{100 * row.low:.1f}, {100 * row.high:.1f}]" in text
    change = flips(records, "natural", "wait=1").set_index("benchmark").loc["tiny_mixed"]
    assert f"{change.wrong_to_right} answers repaired and {change.right_to_wrong} spoiled" in text
    assert text.index("Result.") < text.index("Accuracy against thinking tokens") < text.index("Training loss")


def test_the_result_names_the_largest_benchmark_and_the_first_wait(run):
    rows = [{"benchmark": b, "setting": s, "n": n, "accuracy": 0.5, "low": 0.4, "high": 0.6}
            for b, n in (("small", 30), ("large", 500)) for s in ("base", "natural", "wait=4", "wait=2")]
    bare = Run("tiny", run.preset, run.dir / "nowhere")
    assert "500 questions of large" in result(bare, rows) and "(×2)" in result(bare, rows)
    assert "difference" not in result(bare, rows)  # without records there is no paired interval
    assert result(bare, rows[:1]) == result(bare, None) == ""


def test_every_link_leads_somewhere_and_nothing_is_fetched(index):
    """Relative links only, from every page, so that the folder can be copied anywhere."""
    pages = [p for p in index.parent.rglob("*.html")]
    assert {p.relative_to(index.parent).as_posix() for p in pages} >= {"index.html", "figures/index.html", "traces.html"}
    for path in pages:
        page = Page(path.read_text())
        for link in page.links + page.sources:
            if link.startswith("#"):
                assert link[1:] in page.ids
            elif not link.startswith("data:"):
                assert re.match(r"[\w./-]+$", link) and not link.startswith("/")
                assert (path.parent / unquote(link)).is_file(), (path, link)
        assert all(len(alt.split()) > 5 for alt in page.alts)
        assert str(index.parent.parent) not in path.read_text()
    reached = Page(index.read_text()).links
    assert "figures/index.html" in reached and "traces.html" in reached and "#card" in reached


def test_the_pages_lead_back(index):
    assert "../index.html" in Page((index.parent / "figures" / "index.html").read_text()).links
    assert "index.html" in Page((index.parent / "traces.html").read_text()).links


def test_traces_are_the_first_questions(index, records):
    text = (index.parent / "traces.html").read_text()
    models = {(r["benchmark"], r["model"]) for r in records}
    assert text.count('class="thread"') == len(models) * INSPECTED
    assert f"first {INSPECTED} questions of each benchmark" in re.sub(r"\s+", " ", index.read_text())
    size = sum(p.stat().st_size for p in index.parent.rglob("*") if p.is_file())
    assert size < 8_000_000


def test_nothing_recorded_stands_in_for_the_run(tmp_path, run):
    """Without its own tables a run has no figures of ours: the recorded ones are another run's."""
    empty = Run("tiny", run.preset, tmp_path)
    assert empty.read("accuracy.csv").is_file()  # a chapter opened alone reads the recorded one
    with pytest.raises(MissingArtefact):
        own(empty).read("accuracy.csv")
    index = build_report(empty)
    assert not (index.parent / "figures").exists() and "figures/index.html" not in index.read_text()
    shutil.copy(REFERENCE / "accuracy.csv", tmp_path)
    text = (build_report(empty).parent / "figures" / "index.html").read_text()
    assert "None of ours" in text and "No panel of ours" in text


def dumped(path, *more):
    """The page after a browser has read it."""
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
                           f"--user-data-dir={path.parent / 'profile'}", *more, path.as_uri()],
                          capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_a_browser_shows_every_picture(index):
    """Every image has a size once it is loaded, and the page does not scroll sideways."""
    probe = index.parent / "probe.html"
    script = """<script>addEventListener('load', () => { const all = [...document.images];
        document.title = JSON.stringify([all.length, all.filter(i => i.naturalWidth > 50).length,
        document.documentElement.scrollWidth <= innerWidth]); });</script>"""
    probe.write_text(index.read_text().replace("</body>", script + "</body>"))
    found = json.loads(re.search(r"<title>(.*?)</title>", dumped(probe, "--dump-dom", "--window-size=1200,900"))[1])
    probe.unlink()
    assert found[0] == found[1] == len(Page(index.read_text()).alts) >= 4 and found[2]


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_a_browser_shows_result_and_curve_on_the_first_screen(index):
    probe = index.parent / "probe.html"
    script = """<script>addEventListener('load', () => { document.title = JSON.stringify(
        ['h1', '.result', '#curve', 'figure img'].map(s => document.querySelector(s).getBoundingClientRect().top));
        });</script>"""
    probe.write_text(index.read_text().replace("</body>", script + "</body>"))
    tops = json.loads(re.search(r"<title>(.*?)</title>", dumped(probe, "--dump-dom", "--window-size=1200,900"))[1])
    probe.unlink()
    assert tops == sorted(tops) and tops[-1] < 700


def test_the_table_of_critics_is_on_the_page(index, run):
    table = pd.read_csv(run.dir / "critics.csv")
    text = index.read_text()
    assert text.count("no data") == (table.here == "no data").sum() and f"({len(table)} rows)" in text


def test_texts_of_a_page_and_an_image_stay_texts():
    """Whatever a title or a description says, it opens no tag and closes no attribute."""
    words = 'Tom & "Jerry" <script>alert(1)</script>'
    shown = Page(image(b"x", "png", words))
    assert shown.alts == [words] and shown.sources == ["data:image/png;base64,eA=="]
    text = page(words, "<p>body</p>", "<nav></nav>", "b { }")
    assert "<script" not in text and "Tom &amp; " in text and "<p>body</p>" in text
    assert text.index("<nav>") < text.index('<main id="main">') < text.index("<p>body</p>")
    assert text.startswith("<!doctype html>\n<html lang=\"en\">") and "b { }" in text and "main" in Page(text).ids
