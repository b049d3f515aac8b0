"""The package is light to import, and its wheel is complete."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HEAVY = ["torch", "transformers", "trl", "vllm", "accelerate", "nbdev", "fastcore", "execnb", "IPython",
         "jupyter_core", "jupyter_client", "nbconvert", "papermill", "matplotlib", "sklearn"]
MODULES = sorted(p.stem for p in Path("s1book").glob("*.py") if not p.name.startswith("_"))


def loaded_by(code, **options):
    """Which heavy packages a fresh Python has loaded after running this code."""
    program = f"import sys\n{code}\nimport json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("code", [
    "import s1book", "import s1book.config", "import s1book.cli",
    "from s1book.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "from s1book.config import Run; print(Run.open('tiny'))",
])
def test_the_front_door_is_light(code):
    assert loaded_by(code) == []


@pytest.mark.parametrize("name", MODULES)
def test_no_module_loads_torch_when_imported(name):
    loaded = loaded_by(f"import s1book.{name}")
    assert not set(loaded) & {"torch", "transformers", "trl", "vllm", "nbdev", "fastcore", "IPython", "papermill"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    shutil.copytree("s1book", copy / "s1book", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, copy)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", str(folder), str(copy)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_and_preset(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"s1book/{name}.py" for name in MODULES} <= names
    assert {"s1book/presets/tiny.yaml", "s1book/presets/h100.yaml"} <= names
    assert not [n for n in names if n.startswith(("nbs/", "tests/", "data/")) or n.endswith(".ipynb")]
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = ("import s1book; from s1book.config import load_preset, project_root\n"
            "assert 'site' in s1book.__file__, s1book.__file__\n"
            "assert load_preset('h100').steps == 315\n"
            "from s1book.cli import main\ntry: main(['presets'])\nexcept SystemExit as e: assert e.code == 0")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("S1BOOK")}
    loaded = loaded_by(code, cwd=tmp_path, env=environment | {"PYTHONPATH": str(tmp_path / "site")})
    assert loaded == []


def test_versions_agree(wheel):
    import s1book
    settings = Path("settings.ini").read_text()
    assert f"version = {s1book.__version__}" in settings and f"s1book-{s1book.__version__}-" in wheel.name
