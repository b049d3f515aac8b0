"""The runner on real notebooks: what it skips, what it repeats, and what survives a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import nbformat
import pytest

from s1book.config import Run, S1Error, read_jsonl
from s1book.runner import (
    Chapter, ChapterFailed, Stamp, adopt_outputs, all_needs, badge, clean_output, cores, digest,
    digest_path, environment, expected_seconds, find_chapter, find_chapters, imported_modules, inputs, load_stamp, locked, needs,
    package_digest, prepare, read_notebook, readme, refresh_badges, run_course, with_badge, with_outputs,
)
from bad_server import BadServer
from small_course import write_chapter

FIRST = 'run.write("numbers.txt").write_text(f"{run.preset.seed} 2 3")'
SECOND = 'text = run.read("numbers.txt").read_text()\nrun.write("total.txt").write_text(text + "!")\nlen(text)'
SLOW = """
import os, time
path = run.write("records.jsonl")
done = {r["i"] for r in read_jsonl(path)} if path.exists() else set()
for i in (i for i in range(30) if i not in done):
    append_jsonl(path, {"i": i, "pid": os.getpid()})
    time.sleep(0.1)
"""


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A project with two chapters; calling it runs the course and returns the progress text."""
    monkeypatch.setenv("S1BOOK_ROOT", str(tmp_path))
    monkeypatch.delenv("S1BOOK_RUN", raising=False)
    write_chapter(tmp_path, "00_first", FIRST)
    write_chapter(tmp_path, "01_second", SECOND)

    def run(overrides=(), **options):
        said = []
        try:
            run_course("tiny", overrides, say=lambda *text, **_: said.extend(text), **options)
        finally:
            run.said = "".join(said)
        return run.said

    run.root, run.dir = tmp_path, tmp_path / "runs" / "tiny"
    return run


def test_a_second_run_skips_everything(course):
    assert course().count("done in") == 2
    assert course().count("up to date") == 2
    assert set(json.loads((course.dir / "timings.json").read_text())) == {"00_first", "01_second"}
    assert (course.dir / "notebooks" / "01_second.ipynb").exists()
    assert "outputs" in nbformat.read(course.dir / "notebooks" / "01_second.ipynb", 4).cells[-1]
    assert not any(c.get("outputs") for c in nbformat.read(course.root / "nbs" / "01_second.ipynb", 4).cells)


def test_prose_and_outputs_do_not_count_code_does(course):
    course()
    write_chapter(course.root, "00_first", FIRST, prose="# Another title")
    assert course().count("up to date") == 2
    write_chapter(course.root, "01_second", SECOND + "  # changed")
    said = course()
    assert "up to date" in said and "notebook changed" in said


def test_the_same_artefact_again_does_not_run_later_chapters(course):
    course()
    write_chapter(course.root, "00_first", FIRST + "\n1")
    assert "01_second          up to date" in course()


def test_a_changed_artefact_runs_the_chapters_that_read_it(course):
    course()
    write_chapter(course.root, "00_first", FIRST.replace("3", "4"))
    said = course()
    assert "notebook changed" in said and "numbers.txt changed" in said
    assert (course.dir / "total.txt").read_text() == "0 2 4!"


@pytest.mark.parametrize("harm", ["delete", "change"])
def test_a_deleted_or_altered_artefact_is_made_again(course, harm):
    course()
    path = course.dir / "numbers.txt"
    path.unlink() if harm == "delete" else path.write_text("0 2 9")
    assert "numbers.txt is not what this chapter wrote" in course()
    assert path.read_text() == "0 2 3"
    assert course().count("up to date") == 2


def test_another_preset_runs_again_and_sets_the_old_artefacts_aside(course):
    course()
    assert course(["seed=1"]).count("preset changed") == 2
    assert (course.dir / "numbers.txt").read_text() == "1 2 3"
    assert (course.dir / ".stale" / "00_first" / "numbers.txt").read_text() == "0 2 3"


def test_force_from_and_to(course):
    course()
    assert course(force=True, start="second").count("forced") == 1
    assert "00_first" in course(stop="00", force=True) and "01_second" not in course.said
    with pytest.raises(S1Error, match="wanted the earlier chapter first"):
        course(start="01", stop="00")
    with pytest.raises(S1Error, match="did you mean 01_second?"):
        course(start="secnd")


def test_a_failing_chapter_stops_the_run_and_the_next_run_continues(course):
    write_chapter(course.root, "01_second", 'x = 1\nraise ValueError("first line\\nno such number")')
    write_chapter(course.root, "02_third", "1")
    with pytest.raises(ChapterFailed) as error:
        course()
    text = str(error.value)
    assert "Chapter 01_second failed in cell 4 of 4: ValueError: no such number" in text
    assert "runs/tiny/notebooks/01_second.ipynb" in text and str(course.root) not in text
    assert (course.dir / "notebooks" / "01_second.ipynb").exists()
    assert "02_third" not in course.said
    write_chapter(course.root, "01_second", SECOND)
    said = course()
    assert said.count("up to date") == 1 and said.count("done in") == 2


def test_a_dying_kernel_is_reported(course):
    write_chapter(course.root, "01_second", "import os\nos._exit(1)")
    with pytest.raises(ChapterFailed, match="01_second failed .*DeadKernelError"):
        course()


def test_a_notebook_without_parameters_is_refused(course):
    path = course.root / "nbs" / "00_first.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(S1Error, match="found 0 cells tagged parameters, wanted exactly 1"):
        course()


def test_a_broken_notebook_is_refused(course):
    (course.root / "nbs" / "01_second.ipynb").write_text('{"cells": [')
    with pytest.raises(S1Error, match="nbs/01_second.ipynb is not a notebook"):
        course()


def test_a_damaged_stamp_only_costs_a_run(course):
    course()
    (course.dir / ".runner" / "00_first.stamp.json").write_text('{"noteb')
    assert course().count("done in") == 1


def start_process(course, *arguments):
    """`s1book run` as a process of its own."""
    command = [sys.executable, "-c", "from s1book.cli import main; main()", "run", "--no-checks", *arguments]
    # A shell starts background jobs with SIGINT ignored, and children inherit that: listen again.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"S1BOOK_ROOT": str(course.root)}, preexec_fn=listen)


def wait_for(condition, seconds=60):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def size(path):
    """Bytes of a file that may be missing."""
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_continues_where_it_was(course, how):
    write_chapter(course.root, "01_second", SLOW)
    records = course.dir / "records.jsonl"
    process = start_process(course, "--jobs", "1")
    wait_for(lambda: size(records) > 60)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), err
    if how != signal.SIGKILL:
        assert "the same command continues" in err and "Traceback" not in err
    before = -1
    while before != size(records):  # an orphaned kernel notices within seconds that it is alone
        before = size(records)
        time.sleep(1.5)
    pids = {r["pid"] for r in read_jsonl(records)}
    assert len(pids) == 1 and len(read_jsonl(records)) < 30
    said = course()
    rows = read_jsonl(records)
    assert "00_first           up to date" in said and "unfinished" in said
    assert [r["i"] for r in rows] == list(range(30)) and len({r["pid"] for r in rows}) == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_two_chapters_that_are_killed_together_continue_together(course, how):
    for name in ("00_first", "01_second"):
        write_chapter(course.root, name, SLOW.replace("records", name))
    records = [course.dir / "00_first.jsonl", course.dir / "01_second.jsonl"]
    process = start_process(course, "--jobs", "2")
    wait_for(lambda: all(size(path) > 60 for path in records))
    process.send_signal(how)
    process.communicate(timeout=60)
    before = []
    while before != (before := [size(path) for path in records]):
        time.sleep(1.5)
    assert course(jobs=2).count("unfinished") == 2
    for rows in map(read_jsonl, records):
        assert [r["i"] for r in rows] == list(range(30)) and len({r["pid"] for r in rows}) == 2


MEETS = """
import time
run.write("{mine}").write_text("here")
end = time.monotonic() + 30
while not (run.dir / "{other}").exists():
    assert time.monotonic() < end, "alone"
    time.sleep(0.05)
"""


def test_chapters_that_do_not_read_each_other_run_at_the_same_time(course):
    write_chapter(course.root, "00_first", MEETS.format(mine="a.txt", other="b.txt"))
    write_chapter(course.root, "01_second", MEETS.format(mine="b.txt", other="a.txt"))
    assert course(jobs=2).count("done in") == 2
    assert course(jobs=2).count("up to date") == 2


def test_a_chapter_waits_for_those_whose_work_it_reads_and_for_no_other(course):
    """02 makes a pool, 03 reads it while 01 waits for what 03 leaves."""
    write_chapter(course.root, "01_second", MEETS.format(mine="a.txt", other="leaks.jsonl"))
    slow = "import time; time.sleep(2)\n"
    write_chapter(course.root, "02_pool", slow + 'run.write("pool.parquet").write_text("PAR1 x PAR1")')
    read = 'text = (run.dir / "pool.parquet").read_text()\nrun.write("leaks.jsonl").write_text(text)'
    write_chapter(course.root, "03_leaks", "if False:\n    run.read('pool.parquet')\n" + read)
    assert course(jobs=2).count("done in") == 4
    assert (course.dir / "leaks.jsonl").read_text() == "PAR1 x PAR1"
    place = [course.said.index(f"{name:<18} {what}") for name, what in (
        ("01_second", "new"), ("02_pool", "done in"), ("03_leaks", "new"), ("01_second", "done in"))]
    assert place == sorted(place) and place[1] < course.said.index(f"{'03_leaks':<18} done in")


def test_what_a_chapter_needs_is_read_from_its_code():
    chapters = find_chapters()
    needed = {name[:2]: {c.name[:2] for c in before} for name, before in all_needs(chapters).items()}
    assert not needed["00"] | needed["01"] | needed["02"] and needed["03"] == {"02"}
    assert needed["09"] == {"01", "02", "03", "04", "05", "06", "07", "08"}
    assert "12" not in needed["13"] and "09" in needed["13"]
    assert needed["15"] == needed["14"] | {"14"}


@pytest.mark.parametrize("code, wanted", [
    ("run.read('pool.parquet')", ["02_pool"]), ('run.read(\n    f"benchmarks/{name}.jsonl")', ["02_pool"]),
    ("run.model('small')", ["01_world"]), ("run.write('pool.parquet')", []), ("other.run.read('x')", ...),
    ("run.read(name)", ...), ("run.read('nobody.txt')", ...), ("1", []),
])
def test_an_artefact_whose_maker_is_unknown_means_everything_before(tmp_path, code, wanted):
    earlier = [Chapter(write_chapter(tmp_path, name, "1")) for name in ("00_a", "01_world", "02_pool")]
    chapter = Chapter(write_chapter(tmp_path, "03_b", code))
    assert needs(chapter, earlier) == [c for c in earlier if wanted is ... or c.name in wanted]


def test_what_others_wait_for_begins_first(course):
    """02 takes longest, but 03 and through it 04 rest on 01; one after the other keeps the order."""
    write_chapter(course.root, "00_first", "1")
    write_chapter(course.root, "01_second", 'run.write("base.txt")\nrun.write("small").write_text("x")')
    write_chapter(course.root, "02_pool", "2")
    write_chapter(course.root, "03_leaks", 'run.read("small")\nrun.write("leaks.jsonl").write_text("{}")')
    write_chapter(course.root, "04_traces", 'run.read("leaks.jsonl")')
    course.dir.mkdir(parents=True, exist_ok=True)
    times = {"00_first": 5, "01_second": 1, "02_pool": 30, "03_leaks": 20, "04_traces": 20}
    (course.dir / "timings.json").write_text(json.dumps({n: {"seconds": s} for n, s in times.items()}))
    course(jobs=2)
    begun = re.findall(r"(\d\d)_\w+ +new;", course.said)
    assert begun[:3] == ["01", "02", "00"] or begun[:3] == ["01", "02", "03"]
    course(force=True)
    assert re.findall(r"(\d\d)_\w+ +forced;", course.said) == ["00", "01", "02", "03", "04"]


def test_reading_what_no_cell_names_is_refused(course):
    write_chapter(course.root, "02_pool", 'run.write("pool.parquet").write_text("PAR1 x PAR1")')
    write_chapter(course.root, "03_leaks", 'ask = run.read\nask("pool.parquet")')
    with pytest.raises(S1Error, match=r"03_leaks read pool.parquet, which chapter 02 makes, but no cell"):
        course()
    assert "03_leaks           failed" in course.said


def test_each_chapter_is_looked_at_once(course, monkeypatch):
    """Looking means hashing what it reads, and a large model is read by many chapters."""
    looked = []
    monkeypatch.setattr("s1book.runner.prepare", lambda *a: looked.append(a[1].name) or prepare(*a))
    for name in ("00_first", "01_second", "02_third"):
        write_chapter(course.root, name, "1")
    assert course().count("done in") == 3 and sorted(looked) == ["00_first", "01_second", "02_third"]


def test_when_one_fails_the_other_goes_on_to_its_end_and_nothing_new_begins(course):
    write_chapter(course.root, "00_first", MEETS.format(mine="a.txt", other="b.txt") + "raise ValueError('no')")
    write_chapter(course.root, "01_second", MEETS.format(mine="b.txt", other="a.txt") + "time.sleep(3)")
    write_chapter(course.root, "02_third", "1")
    with pytest.raises(ChapterFailed, match="Chapter 00_first failed in cell 4 of 4: ValueError: no"):
        course(jobs=2)
    assert "01_second          done in" in course.said and "02_third" not in course.said


def test_chapters_that_run_together_share_the_cores(course):
    show = 'import os\nrun.write("{0}").write_text(os.environ["OMP_NUM_THREADS"])'
    write_chapter(course.root, "00_first", show.format("a.txt"))
    write_chapter(course.root, "01_second", show.format("b.txt"))
    with environment({"OMP_NUM_THREADS": ""}):
        del os.environ["OMP_NUM_THREADS"]
        course(jobs=2)
    share = {(course.dir / name).read_text() for name in ("a.txt", "b.txt")}
    assert share == {str(max(1, cores() // 2))}


def test_an_interrupted_chapter_with_another_seed_starts_over(course):
    body = 'import json\nappend_jsonl(run.write("log.jsonl"), {"seed": run.preset.seed})\n'
    write_chapter(course.root, "01_second", body + "raise ValueError")
    for overrides in ([], [], ["seed=1"]):
        with pytest.raises(ChapterFailed):
            course(overrides)
    assert [r["seed"] for r in read_jsonl(course.dir / "log.jsonl")] == [1]
    assert [r["seed"] for r in read_jsonl(course.dir / ".stale" / "01_second" / "log.jsonl")] == [0, 0]


def test_records_that_say_what_they_belong_to_are_never_set_aside_unless_forced(course):
    """Somebody who raises the cap on a bill, or mends the notebook, does not pay again for what is there."""
    body = ('import json\npath = run.write("log.jsonl", keyed=True)\n'
            'append_jsonl(path, {"seed": run.preset.seed})\nrun.write("sum.txt").write_text("x")\n')
    seeds = lambda: [r["seed"] for r in read_jsonl(course.dir / "log.jsonl")]
    write_chapter(course.root, "01_second", body + "raise ValueError")
    for overrides in ([], ["seed=1"]):  # interrupted, and then under another preset
        with pytest.raises(ChapterFailed):
            course(overrides)
    assert (course.dir / ".stale" / "01_second" / "sum.txt").exists()
    write_chapter(course.root, "01_second", body)  # the notebook changes
    course(["seed=1"])
    course(["seed=2"])  # finished, and then under another preset
    assert seeds() == [0, 1, 1, 2] and course(["seed=2"]).count("up to date") == 2
    (course.dir / "log.jsonl").write_text('{"seed": 0}\n')  # damaged afterwards
    assert "log.jsonl is not what this chapter wrote" in course(["seed=2"]) and seeds() == [0, 2]
    course(["seed=2"], force=True)
    assert seeds() == [2]


def test_two_runners_do_not_share_a_folder(course):
    with locked(Run.open("tiny")), pytest.raises(S1Error, match="runs/tiny is in use"):
        course()


def test_the_parameters_reach_the_notebook(course):
    write_chapter(course.root, "00_first", 'run.write("seen.txt").write_text(f"{preset} {overrides}")')
    write_chapter(course.root, "01_second", "1")
    course(["seed=7", "select.size=900"])
    assert (course.dir / "seen.txt").read_text() == "tiny ['seed=7', 'select.size=900']"


def test_a_preset_file_reaches_the_notebook_as_a_relative_path(course, tmp_path):
    (tmp_path / "mine.yaml").write_text(open("s1book/presets/tiny.yaml").read().replace("seed: 0", "seed: 5"))
    write_chapter(course.root, "00_first", 'run.write("seen.txt").write_text(f"{preset} {run.preset.seed}")')
    run_course(str(tmp_path / "mine.yaml"), stop="00", say=lambda *_, **__: None)
    assert (tmp_path / "runs" / "mine" / "seen.txt").read_text() == "../mine.yaml 5"


def test_a_run_made_for_a_demonstration_is_not_traced(course):
    body = ('import tempfile; from pathlib import Path\nother = Run("x", run.preset, Path(tempfile.mkdtemp()))\n'
            'other.write("total.txt").write_text("1")\n' + FIRST)
    write_chapter(course.root, "00_first", body)
    course()
    stamp = load_stamp(Run.open("tiny"), Chapter(course.root / "nbs" / "00_first.ipynb"))
    assert set(stamp.writes) == {"numbers.txt"} and course().count("up to date") == 2


def test_chapters_are_found_by_number_name_and_stage(course):
    write_chapter(course.root, "10_engines", "1")
    write_chapter(course.root, "runner", "1")
    chapters = find_chapters()
    assert [c.name for c in chapters] == ["00_first", "01_second", "10_engines"]
    for i, words in enumerate([("00", "0", "first"), ("1", "01_second"), ("10", "engines", "10_engines.ipynb")]):
        assert {find_chapter(chapters, word) for word in words} == {i}


def test_hashes_tell_contents_apart(tmp_path):
    assert digest("ab", "c") != digest("a", "bc")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a").write_text("1")
    one = digest_path(tmp_path / "m")
    (tmp_path / "m" / ".b.unfinished").write_text("2")
    assert digest_path(tmp_path / "m") == one
    (tmp_path / "m" / "a").rename(tmp_path / "m" / "b")
    assert digest_path(tmp_path / "m") != one and digest_path(tmp_path / "none") == "missing"


def test_a_chapter_depends_on_the_modules_it_uses(tmp_path):
    (tmp_path / "a.py").write_text("# %% ../nbs/00_a.ipynb #1f2e\nfrom .b import x\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "c.py").write_text("y = 1\n")
    assert imported_modules("from s1book.a import z", tmp_path) == {"a", "b"}
    assert imported_modules("from s1book import c, a", tmp_path) == {"a", "b", "c"}
    assert imported_modules("print(1)", tmp_path) == set()
    old = package_digest("import s1book.a", tmp_path)
    (tmp_path / "c.py").write_text("y = 2\n")
    (tmp_path / "a.py").write_text("# %% ../nbs/00_a.ipynb #9999\nfrom .b import x\n")
    assert package_digest("import s1book.a", tmp_path) == old
    (tmp_path / "b.py").write_text("x = 2\n")
    assert package_digest("import s1book.a", tmp_path) != old


def test_package_source_counts(course):
    course()
    stamp = load_stamp(Run.open("tiny"), Chapter(course.root / "nbs" / "01_second.ipynb"))
    path = course.dir / ".runner" / "01_second.stamp.json"
    path.write_text(json.dumps(vars(replace(stamp, package="other"))))
    assert "package changed" in course()
    now = inputs(Run.open("tiny"), Chapter(course.root / "nbs" / "01_second.ipynb"), {})
    assert isinstance(now, Stamp) and now.package == stamp.package


def test_outputs_come_back_clean(course):
    body = ('import sys\nprint("10 %\\r100 %")\nprint("a warning", file=sys.stderr)\nprint("two")\n'
            'from IPython.display import SVG\n41 + 1')
    write_chapter(course.root, "01_second", body)
    course()
    assert adopt_outputs(Run.open("tiny")) == ["00_first", "01_second"]
    adopted = json.loads((course.root / "nbs" / "01_second.ipynb").read_text())
    assert [c["cell_type"] for c in adopted["cells"]] == ["markdown", "code", "code", "code"]
    stream, result = adopted["cells"][-1]["outputs"]
    assert stream["text"] == ["100 %\n", "two\n"] and stream["name"] == "stdout"
    assert result["data"] == {"text/plain": ["42"]} and result["execution_count"] is None
    assert adopted["cells"][-1]["execution_count"] is None
    assert course().count("up to date") == 2
    before = (course.root / "nbs" / "01_second.ipynb").read_bytes()
    adopt_outputs(Run.open("tiny"))
    assert (course.root / "nbs" / "01_second.ipynb").read_bytes() == before


def test_nbdev_clean_has_nothing_to_do_after_adopting(course):
    pytest.importorskip("nbdev")
    from execnb.nbio import nb2str, read_nb
    from nbdev.clean import clean_nb
    body = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\n_ = plt.title('x')"
    path = write_chapter(course.root, "01_second", body)
    cells = json.loads(path.read_text())
    course()
    adopt_outputs(Run.open("tiny"))
    notebook = read_nb(path)
    clean_nb(notebook, allowed_cell_metadata_keys=["tags"])
    cleaned = json.loads(nb2str(notebook))
    now = json.loads(path.read_text())
    assert cleaned["cells"] == now["cells"] and "image/png" in str(now["cells"][-1]["outputs"])
    assert len(cells["cells"]) == len(now["cells"])


def test_an_absolute_path_in_an_output_is_refused_and_nothing_is_written(course):
    write_chapter(course.root, "01_second", 'print("saved in /" + "home/ada/x.csv")')
    course()
    before = (course.root / "nbs" / "00_first.ipynb").read_bytes()
    with pytest.raises(S1Error, match="01_second, cell 4: found an absolute path"):
        adopt_outputs(Run.open("tiny"))
    assert (course.root / "nbs" / "00_first.ipynb").read_bytes() == before


@pytest.mark.parametrize("text, bad", [
    ("/" + "home/ada/x", True), ("'/" + "tmp/x'", True), ("C:\\\\Users\\ada", True), ("https://a.org/home/x", False),
    ("runs/tiny/home/x", False), ("3/4", False),
])
def test_what_an_absolute_path_is(text, bad):
    output = dict(output_type="stream", name="stdout", text=text)
    if bad:
        with pytest.raises(S1Error):
            clean_output(output, "here")
    else:
        assert clean_output(output, "here")["text"] == text


def test_a_widget_is_dropped_and_the_text_beside_it_stays():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    output = dict(output_type="display_data", metadata={"a": 1}, data=view | {"text/plain": "8/8"})
    assert clean_output(output, "here") == dict(output_type="display_data", metadata={}, data={"text/plain": "8/8"})
    assert clean_output(output | {"data": view}, "here") is None


def test_outputs_of_an_old_run_are_refused(course):
    course()
    write_chapter(course.root, "01_second", SECOND + "\n2")
    with pytest.raises(S1Error, match="01_second: found no finished run of this notebook"):
        adopt_outputs(Run.open("tiny"))
    cell = dict(cell_type="code", source=["1"], metadata={})
    with pytest.raises(S1Error, match="is not this notebook"):
        with_outputs({"cells": [cell], "metadata": {}}, {"cells": []}, "x")


def test_outputs_are_adopted_after_prose_has_changed(course):
    course()
    path = write_chapter(course.root, "01_second", SECOND, prose="# Better title\n\n> Better promise.")
    adopt_outputs(Run.open("tiny"))
    text = path.read_text()
    assert "Better promise" in text and json.loads(text)["cells"][-1]["outputs"]


def test_memory_is_that_of_the_chapter_and_of_no_earlier_one(course):
    write_chapter(course.root, "00_first", 'import time\nblock = b"x" * 400_000_000\ntime.sleep(1)')
    write_chapter(course.root, "01_second", "import time\ntime.sleep(1)")
    course()
    timings = json.loads((course.dir / "timings.json").read_text())
    big, small = (timings[name]["gigabytes"] for name in ("00_first", "01_second"))
    assert 0.4 < big < 2 and 0.02 < small < big - 0.3
    assert expected_seconds(Run.open("tiny"))["00_first"] == timings["00_first"]["seconds"]


def test_badges_follow_the_recorded_run(course):
    assert refresh_badges() == ["00_first", "01_second"]
    path = course.root / "nbs" / "00_first.ipynb"
    first = "".join(read_notebook(path)["cells"][0]["source"])
    assert first == "# Title\n\n> Promise.\n\n**Recorded.** `tiny`: no run yet. `h100`: no run yet."
    recorded = course.root / "data" / "reference"
    (recorded / "h100").mkdir(parents=True)
    (recorded / "timings.json").write_text('{"00_first": {"seconds": 18.8, "gigabytes": null}}')
    (recorded / "h100" / "timings.json").write_text('{"00_first": {"seconds": 600, "gigabytes": 61.25}}')
    assert refresh_badges() == ["00_first"] and refresh_badges() == []
    assert "".join(read_notebook(path)["cells"][0]["source"]).endswith(
        "**Recorded.** `tiny`: 19 s, memory not measured. `h100`: 10.0 min, 61.2 GB of memory.")


def test_a_badge_replaces_the_old_one_and_nothing_else():
    prose = "# Title\n\n> A promise\n> of two lines.\n\nText.\n\n> **Box.** Stays."
    code = dict(cell_type="code", source=["# Recorded."], metadata={})
    notebook = {"cells": [code, dict(cell_type="markdown", source=prose.splitlines(keepends=True), metadata={})]}
    line = badge("x", {"tiny": {"x": {"seconds": 119, "gigabytes": 0.5}}})
    once = with_badge(notebook, line)
    text = "".join(once["cells"][1]["source"])
    assert text == prose.replace("lines.", f"lines.\n\n{line}") and once["cells"][0] == code
    assert with_badge(once, line) == once
    assert "".join(with_badge(once, "**Recorded.** new")["cells"][1]["source"]).count("Recorded") == 1
    assert with_badge({"cells": [code]}, line) == {"cells": [code]}


def test_the_readme_keeps_outputs_and_drops_hidden_code(tmp_path):
    hidden = nbformat.v4.new_code_cell("#| hide\nimport secret")
    silent = nbformat.v4.new_code_cell("#| echo: false\nsilent()")
    silent.outputs = [nbformat.v4.new_output("display_data", {"text/markdown": "| a |\n|---|"})]
    title = nbformat.v4.new_markdown_cell("# Title\n\n[pool](02_pool.ipynb) and [paper](../data/x.csv)")
    nbformat.write(nbformat.v4.new_notebook(cells=[title, hidden, silent]), tmp_path / "index.ipynb")
    text = readme(tmp_path / "index.ipynb")
    assert "| a |\n|---|" in text and "secret" not in text and "silent" not in text
    assert "[pool](nbs/02_pool.ipynb) and [paper](data/x.csv)" in text


ASKING = """
from s1book.config import Server
from s1book.asking import ask_server
from s1book.store import live_line
server = Server(like="vllm", url=URL, concurrency=2, usd_in=1.0, usd_out=10.0)
jobs = {str(i): [{"role": "user", "content": f"question {i}"}] for i in range(14)}
ask_server(jobs, server, "m", run.write("asked.jsonl"), show=live_line())
"""


def test_the_progress_of_a_long_stage_reaches_whoever_runs_the_course(course, monkeypatch):
    """Fourteen questions to a slow server: how far, what it cost, how long still."""
    monkeypatch.setattr("s1book.runner.LOOK", 0.2)
    with BadServer(think=0.5) as server:
        write_chapter(course.root, "01_second", ASKING.replace("URL", repr(server.url)))
        said = course()
    told = re.findall(r"01_second: (\d+) of 14 asked, 0 failed, 0\.\d\d US dollars, about [\d,]+ \w+ left\n?", said)
    assert len(told) >= 2 and told == sorted(set(told), key=int)
    assert "done in" in said.rstrip().splitlines()[-1]
