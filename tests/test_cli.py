"""The command line as a person meets it: help, one-sentence errors, exit codes, the report."""

import json
import os
import re
import subprocess
import sys

import pytest

from s1book.cli import main
from s1book.config import Run, S1Error
from s1book.report import build_report
from small_course import write_chapter


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command in an empty project; returns exit code, stdout and stderr."""
    monkeypatch.setenv("S1BOOK_ROOT", str(tmp_path))
    monkeypatch.delenv("S1BOOK_RUN", raising=False)
    write_chapter(tmp_path, "00_first", 'run.write("funnel.csv").write_text("stage,rule,rows_in,rows_out\\na,b,4,2\\n")')

    def call(*arguments):
        before = dict(os.environ)
        with pytest.raises(SystemExit) as ending:
            main(list(arguments))
        os.environ.clear()
        os.environ.update(before)
        out = capsys.readouterr()
        return ending.value.code, out.out, out.err

    call.root = tmp_path
    return call


def test_help_explains_the_commands(command):
    code, out, _ = command("--help")
    out = " ".join(out.split())
    assert code == 0 and all(word in out for word in ("run", "doctor", "presets", "report", "Start with: s1book run"))
    assert "outputs" not in out and "readme" not in out
    code, out, _ = command("run", "--help")
    assert code == 0 and all(word in out for word in ("--preset", "--from", "--to", "--set", "--force"))


@pytest.mark.parametrize("arguments, code, words", [
    (["run", "--preset", "tyni"], 2, "did you mean tiny?"),
    (["run", "--set", "sft.lr=1"], 2, "unknown key"),
    (["run", "--set", "seed"], 2, "no key=value pair"),
    (["presets", "nothing"], 2, "wanted one of h100, tiny"),
    (["run", "--no-checks", "--from", "nowhere"], 1, "wanted one of 00_first"),
    (["run", "--frm", "1"], 2, "No such option"),
    (["dance"], 2, "No such command"),
])
def test_an_error_is_one_sentence_on_stderr(command, arguments, code, words):
    got, out, err = command(*arguments)
    assert got == code and words in err and "Traceback" not in err
    assert not out or code == 1
    if words != "No such option" and words != "No such command":
        assert err.startswith("s1book: ") and err.count("\n") == 1


def test_a_machine_without_gpus_is_refused_before_any_work(command):
    import torch
    if torch.cuda.device_count() >= 8:
        pytest.skip("this machine has eight GPUs")
    code, out, err = command("run", "--preset", "h100")
    assert code == 1 and "cannot run here: device: found" in err
    assert not (command.root / "runs").exists()


def test_a_run_ends_with_the_path_of_its_report(command):
    code, out, err = command("run", "--no-checks")
    assert code == 0, err
    assert "[ 1/1] 00_first" in out and "done in" in out
    assert out.strip().splitlines()[-1] == "Report: runs/tiny/report/index.html"
    assert (command.root / "runs" / "tiny" / "report" / "00_first.html").exists()
    code, out, err = command("run", "--no-checks", "--folder", str(command.root / "elsewhere"))
    assert code == 0 and (command.root / "elsewhere" / "report" / "index.html").exists()


def test_a_failing_chapter_exits_with_1(command):
    write_chapter(command.root, "01_second", "1 / 0")
    code, out, err = command("run", "--no-checks")
    assert code == 1 and "Chapter 01_second failed in cell 4 of 4: ZeroDivisionError" in err
    assert "Traceback" not in err and "01_second          failed" in out
    code, out, _ = command("report")
    assert code == 0 and "stopped half-way" in (command.root / "runs/tiny/report/index.html").read_text()


def test_a_folder_that_cannot_be_written(command):
    (command.root / "runs").write_text("a file where the folder should be")
    code, _, err = command("run", "--no-checks")
    assert code == 1 and err.startswith("s1book: ") and "Traceback" not in err and str(command.root) not in err


def test_presets_show_values_with_their_meaning(command):
    code, out, _ = command("presets")
    assert code == 0 and out.count("\n") == 2 and "tiny:" in out and "h100:" in out
    code, out, _ = command("presets", "h100", "--set", "seed=3")
    lines = dict(re.match(r"(\S+) = .*?  +(.+)", line).groups() for line in out.splitlines())
    assert lines["sft.batch_size"].startswith("examples per optimiser step") and "seed = 3 " in out


def test_the_doctor_says_what_is_missing(command):
    code, out, _ = command("doctor")
    assert code == 0 and "ok  python" in out and "NO  tiny weights" in out and "training memory" in out
    code, out, _ = command("doctor", "--set", "model.train=false")
    assert code == 1, "without shipped weights and without training there is no model"


def test_version(command):
    import s1book
    assert command("--version") == (0, f"{s1book.__version__}\n", "")


def test_the_installed_command_answers():
    done = subprocess.run([sys.executable, "-c", "from s1book.cli import main; main()", "--help"],
                          capture_output=True, text=True, check=True)
    assert "Usage: s1book" in done.stdout


# -- the report --

ACCURACY = ("benchmark,setting,n,correct,accuracy,low,high,thinking_tokens,seconds\n"
            "tiny_hard,base,30,3,0.1,0.035,0.256,0,1.5\ntiny_hard,wait=1,30,24,0.8,0.627,0.905,120.5,2.5\n")


@pytest.fixture
def finished(command):
    """A run that has every artefact of the report."""
    run = Run.open("tiny")
    segments = [dict(phase="thinking", text="In fours\n"), dict(phase="forced", text="Wait\n"),
                dict(phase="answer", text="Answer: <3>")]
    trace = dict(question="How many r & s", gold="3", segments=segments, setting="wait=1", correct=True)
    files = {
        "funnel.csv": "stage,rule,rows_in,rows_out\npool,all,24000,24000\nquality,whole,24000,21000\n",
        "sft_log.csv": "step,loss,learning_rate,grad_norm\n1,2.5,0.001,1\n315,0.25,0,1\n",
        "accuracy.csv": ACCURACY, "example_traces.jsonl": json.dumps(trace) + "\n",
        "honest.csv": "series,label,n,tokens,accuracy,low,high\nvote,k=1,30,70.0,55.5,40.1,70.2\n",
        "critics.csv": "claim,on,n,measured,limit,here\n<most>,toy,30,\"81.0 [75.7, 86.5]\",> 50,yes\nother,why,0,,,no data\n",
        "honest.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>",
        "curve.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>", "run_card.json": json.dumps({"seed": 0, "a": {"b": 1}}),
    }
    for name, text in files.items():
        run.write(name).write_text(text)
    return run


def test_the_report_shows_the_files(finished):
    text = build_report(finished).read_text()
    assert '<html lang="en">' in text and "has not been made" not in text
    assert "80.0" in text and "62.7 to 90.5" in text and "120.5" in text and "21000" in text
    assert "tiny_hard from 10% (base) to 80% (wait=1)" in text
    assert "from 2.50 at step 1 to 0.25 at step 315" in text
    assert "<mark" in text and "Answer: &lt;3&gt;" in text and "r &amp; s" in text
    assert "<th scope=\"row\">a.b</th><td>1</td>" in text
    assert "55.5 % [40.1, 70.2] at 70 tokens (k=1)" in text and "&lt;most&gt;" in text and ">no data<" in text and "nan" not in text
    assert not re.findall(r'(?:src|href)="(?!data:|#|\w+\.html)', text), "the page must not fetch anything"
    assert all(alt for alt in re.findall(r'<img [^>]*alt="([^"]*)"', text))
    assert re.findall(r"<h(\d)", text) == sorted(re.findall(r"<h(\d)", text)[:1]) + re.findall(r"<h(\d)", text)[1:]
    assert str(finished.dir) not in text


def test_the_report_of_nothing_names_the_chapters(command):
    text = build_report(Run.open("tiny")).read_text()
    assert text.count("has not been made") == 7 and "not executed" in text


@pytest.mark.parametrize("name, content, words", [
    ("accuracy.csv", "benchmark,setting\na,b\n", "found no column n, accuracy"),
    ("accuracy.csv", "", "found no readable table"),
    ("example_traces.jsonl", '{"question": "x"}\n', "found no column gold"),
    ("run_card.json", "{", "found broken JSON"),
])
def test_a_bad_artefact_is_refused_and_the_old_report_stays(finished, name, content, words):
    index = build_report(finished)
    before = index.read_bytes()
    (finished.dir / name).write_text(content)
    with pytest.raises(S1Error, match=words):
        build_report(finished)
    assert index.read_bytes() == before


def test_figures_of_a_chapter_are_inside_its_page(command):
    write_chapter(command.root, "00_first", "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])",
                  prose="# Title\n\n> Promise.\n\nA [link](01_second.ipynb).")
    assert command("run", "--no-checks")[0] == 0
    text = (command.root / "runs/tiny/report/00_first.html").read_text()
    assert 'src="data:image/png;base64,' in text and "<title>Title</title>" in text and "highlight" in text
    assert not re.findall(r"<(?:script|link)[^>]*http", text)
    assert 'href="01_second.html"' in text
