"""The chapters keep to the style of the house (design, section 6), and modules to their order."""

import ast
import asyncio
import inspect
import json
import re
from pathlib import Path
from statistics import median

import pytest

from s1book.runner import (
    badge, chapter_title, code_cells, find_chapters, imported_modules, read_notebook, recorded_timings, with_badge,
)

CHAPTERS = find_chapters(Path("nbs"))
NOTEBOOKS = sorted(Path("nbs").glob("*.ipynb"))
FOUNDATION = ["files", "sections", "settings", "style"]  # below every chapter; config hands their names on
REFERENCE = {  # chapter -> what lies right below it: machinery, or what to look things up in
    "tiny": ["world", "pretraining"], "decontaminate": ["sources", "plain"], "traces": ["client", "store"],
    "grade": ["asking", "verifier", "columns", "choices"], "features": ["judge", "rubric"],
    "sft": ["packing", "adapters", "training_files", "forgetting"], "engine": ["backends", "textserver"], "budget": ["forcing"],
    "controls": ["replay", "simulate", "methods"], "parallel": ["reward"], "evaluate": ["benchmarks", "exchange", "runcard"],
    "scaling": ["repeats", "honest"], "ablations": ["contrasts"],
    "cost": ["launch"], "serve": ["streaming", "ask", "wire"]}
MACHINERY = ["preflight", "leaks", "card", "figures", "diff", "runner", "pages", "inspector", "tables", "report", "cli"]  # above every chapter
MODULES = sorted(p for p in Path("s1book").glob("*.py") if not p.name.startswith("_"))
ABSOLUTE = re.compile(r"(?<![\w:/.~-])/(?:home|root|tmp|usr|Users|work|var|opt|mnt|private|srv)/|[A-Z]:\\+Users")

each_chapter = pytest.mark.parametrize("path", [c.path for c in CHAPTERS], ids=lambda p: p.stem)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


def module_of(path):
    """The module that a notebook exports, or None."""
    text = "\n".join(source for source, _ in code_cells(read_notebook(path)))
    found = re.search(r"^#\| ?default_exp (\w+)", text, re.M)
    return found.group(1) if found else None


def trees(path):
    """The code cells of a notebook, parsed; a magic or a shell command does not parse."""
    for i, (source, _) in enumerate(code_cells(read_notebook(path)), 1):
        try:
            yield ast.parse(source)
        except SyntaxError as error:
            raise AssertionError(f"{path.stem}, code cell {i}: {error}") from None


def texts(outputs):
    """Every text of a cell's outputs."""
    for output in outputs:
        yield "".join(output.get("text", ""))
        yield from ("".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))


@each_chapter
def test_one_parameters_cell_with_the_two_parameters(path):
    tagged = [source for source, tags in code_cells(read_notebook(path)) if "parameters" in tags.split(",")]
    assert len(tagged) == 1 and "#|" not in tagged[0]
    names = [t.id for n in ast.parse(tagged[0]).body for t in n.targets]
    assert {"preset", "overrides"} <= set(names) and len(names) <= 5
    values = {t.id: ast.literal_eval(n.value) for n in ast.parse(tagged[0]).body for t in n.targets}
    assert values["preset"] == "tiny" and values["overrides"] == []


@each_chapter
def test_title_promise_and_module(path):
    title, promise = chapter_title(read_notebook(path))
    assert title and promise, "the first cell is `# Title` and `> promise`"
    assert module_of(path) and (Path("s1book") / f"{module_of(path)}.py").exists()


@each_chapter
def test_the_form_of_a_chapter(path):
    """The design's section 6: 20 to 40 code cells, half of them of at most 6 lines, 1,500 to 2,800 words."""
    notebook = read_notebook(path)
    lines = [len(source.splitlines()) for source, _ in code_cells(notebook)]
    prose = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    words = len(re.sub(r"```.*?```", "", prose, flags=re.S).split())
    found = {"number of code cells": (len(lines), 20 <= len(lines) <= 40),
             "median code cell": (median(lines), median(lines) <= 6),
             "longest code cell": (max(lines), max(lines) <= 35),
             "words": (words, 1500 <= words <= 2800)}
    broken = {what: value for what, (value, fine) in found.items() if not fine}
    assert not broken, broken


@each_chapter
def test_the_badge_is_what_was_recorded(path):
    notebook, line = read_notebook(path), badge(path.stem, recorded_timings())
    assert with_badge(notebook, line) == notebook, f"run: s1book outputs; wanted {line}"


@each_chapter
def test_chapters_assert_what_they_show(path):
    asserts = sum(isinstance(n, ast.Assert) for tree in trees(path) for n in ast.walk(tree))
    assert asserts >= 5, f"{asserts} asserts"


@each_notebook
def test_cells_are_short(path):
    long = [len(s.splitlines()) for s, _ in code_cells(read_notebook(path)) if len(s.splitlines()) > 35]
    assert not long


@each_notebook
def test_plain_python_and_explicit_imports(path):
    for tree in trees(path):
        wild = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
        assert not wild
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "get_ipython"]


@each_notebook
def test_import_cells_hold_imports_only(path):
    for i, tree in enumerate(trees(path), 1):
        top = [isinstance(n, (ast.Import, ast.ImportFrom)) or "TYPE_CHECKING" in ast.unparse(n)
               for n in tree.body]
        assert all(top) or not any(top), f"code cell {i} mixes imports and code"


@each_notebook
def test_small_clean_and_without_absolute_paths(path):
    notebook = read_notebook(path)
    assert path.stat().st_size <= 300_000
    assert set(notebook["metadata"]) <= {"kernelspec"} and notebook["metadata"]["kernelspec"]["name"] == "python3"
    for i, cell in enumerate(notebook["cells"], 1):
        assert set(cell["metadata"]) <= {"tags"} and not cell.get("execution_count"), f"cell {i}"
        outputs = cell.get("outputs", [])
        assert not any(o.get("name") == "stderr" or o["output_type"] == "error" for o in outputs), f"cell {i}"
        for text in [*texts(outputs), "".join(cell["source"])]:
            found = ABSOLUTE.search(text)
            assert not found, f"cell {i}: {text[max(0, found.start() - 20):found.end() + 20]}"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != "00_presets"], ids=lambda p: p.stem)
def test_no_bare_aime_number(path):
    """Thirty questions: an accuracy on AIME is shown with its interval, or it is not shown."""
    for i, cell in enumerate(read_notebook(path)["cells"], 1):
        for text in texts(cell.get("outputs", [])):
            if re.search("aime", text, re.I) and re.search(r"\b\d{1,2}\.\d\b", text):
                assert re.search(r"\[-?\d+\.\d, -?\d+\.\d\]|\blow\b", text), f"cell {i}: {text[:300]}"


@each_notebook
def test_figures_have_words(path):
    cells = read_notebook(path)["cells"]
    for i, cell in enumerate(cells):
        images = [o for o in cell.get("outputs", []) if any(k.startswith("image/") for k in o.get("data", {}))]
        after = "".join(cells[i + 1]["source"]) if i + 1 < len(cells) else ""
        assert not images or (cells[i + 1]["cell_type"] == "markdown" and len(after.split()) >= 10), f"cell {i + 1}"


@each_notebook
def test_links_lead_somewhere(path):
    cells = read_notebook(path)["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", prose)
    assert not [t for t in targets if not (path.parent / t).exists()]


def test_modules_import_only_earlier_ones():
    chapters = [name for c in CHAPTERS for name in (*REFERENCE.get(module_of(c.path), ()), module_of(c.path))]
    order = FOUNDATION + chapters + MACHINERY
    for i, name in enumerate(order):
        text = (Path("s1book") / f"{name}.py").read_text()
        used = {m for m in imported_modules(text) if m != name}
        unknown = used - set(order)
        assert not unknown, f"{name} imports {unknown}, which no chapter makes"
        allowed = set(order[:i]) if name in MACHINERY else set(order[:i]) - set(MACHINERY)
        assert used <= allowed, f"{name} imports {used - allowed}, which come later"


@pytest.mark.parametrize("name", [*(name for names in REFERENCE.values() for name in names), "leaks", "figures",
                                  "diff", "pages", "inspector", "tables"])
def test_reference_notebooks_run(name):
    """Their worked examples hold; no runner executes them, and so a test does."""
    names = {"__name__": "__main__"}
    for source, _ in code_cells(read_notebook(Path(f"nbs/{name}.ipynb"))):
        waits = eval(compile(source, f"nbs/{name}.ipynb", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        if inspect.iscoroutine(waits):   # a notebook may await at its top level
            asyncio.run(waits)


def test_foundations_have_one_door():
    """Whatever lies below config is imported from config, so that there is one way to import it."""
    for path in MODULES:
        used = set(re.findall(r"^from (?:s1book)?\.(\w+) import", path.read_text(), re.M)) & set(FOUNDATION)
        assert not used or path.stem in ["config", *FOUNDATION], f"{path.stem} imports {used}"
    import s1book.config
    for name in FOUNDATION:
        public = __import__(f"s1book.{name}", fromlist=["__all__"]).__all__
        ours = {n for n in public if hasattr(s1book.config, n)}
        assert ours - {"damage", "read_settings"} <= set(s1book.config.__all__)


def functions(path):
    """Every function and method of a module, with its length in lines."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, node.end_lineno - node.lineno + 1


def test_functions_are_short():
    lengths = sorted(length for path in MODULES for _, length in functions(path))
    longest = [(p.name, n.name, length) for p in MODULES for n, length in functions(p) if length > 40]
    assert not longest
    assert lengths[len(lengths) // 2] <= 15
    assert sum(length <= 30 for length in lengths) >= 0.9 * len(lengths)


@each_module
def test_public_functions_are_typed_and_documented(path):
    tree = ast.parse(path.read_text())
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    assert not [n.name for n in public if not ast.get_docstring(n)]
    for node in (n for n in public if isinstance(n, ast.FunctionDef)):
        arguments = node.args.args + node.args.kwonlyargs
        assert all(a.annotation for a in arguments) and node.returns, f"{node.name} is not typed"


@each_module
def test_lines_are_at_most_100_wide(path):
    # nbdev writes the module's docstring and __all__ itself, on lines as long as it likes.
    text = re.sub(r"^__all__ = \[.*?\]\n|\A.*?^# %% auto", "", path.read_text(), flags=re.S | re.M)
    assert not [line for line in text.splitlines() if len(line) > 100]


def test_no_stale_modules():
    made = {module_of(p) for p in NOTEBOOKS} - {None}
    assert {p.stem for p in MODULES} == made


def test_settings_and_pyproject_agree():
    import configparser
    import tomllib
    settings = configparser.ConfigParser()
    settings.read("settings.ini")
    ours, project = settings["DEFAULT"], tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert ours["lib_name"] == project["name"] and ours["allowed_cell_metadata_keys"] == "tags"
    assert project["requires-python"].startswith(f">={ours['min_python']}")
    assert project["description"] == ours["description"]


def test_notebooks_are_json_as_nbdev_writes_it():
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        again = json.dumps(json.loads(text), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        assert text == again, path.name
