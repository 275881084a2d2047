"""Every notebook runs, is in step with its module, is clean, and keeps its parameters cell."""
import ast
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from ptmrec.backbones import BACKBONES
from ptmrec.peft import TUNINGS
from ptmrec.stage1 import run_stage1
from ptmrec.stage2 import run_stage2

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
EXPERIMENTS = {"04_stage1": "run_stage1", "05_stage2": "run_stage2"}
BIN = Path(sys.executable).parent


def nbdev(command, *arguments, cwd=ROOT):
    return subprocess.run([BIN / command, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(notebook):
    result = nbdev("nbdev_test", "--path", notebook, "--n_workers", "0")
    assert result.returncode == 0 and "Success" in result.stdout, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev works on, so that a check never changes the checkout."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("nbs", "ptmrec"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    return folder


def test_modules_are_in_step(copy):
    assert nbdev("nbdev_export", cwd=copy).returncode == 0
    for module in (ROOT / "ptmrec").glob("*.py"):
        assert (copy / "ptmrec" / module.name).read_text() == module.read_text(), f"run nbdev_export: {module.name}"


def test_notebooks_are_clean(copy):
    assert nbdev("nbdev_clean", cwd=copy).returncode == 0
    for notebook in NOTEBOOKS:
        assert (copy / "nbs" / notebook.name).read_text() == notebook.read_text(), f"run nbdev_clean: {notebook.name}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_stored_in_order(notebook):
    cells = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code" and c.source.strip()]
    assert any(c.outputs for c in cells), "readers on the web see neither table nor figure: run make notebooks"
    assert not any(o.output_type == "error" for c in cells for o in c.outputs)


@pytest.mark.parametrize("notebook", EXPERIMENTS)
def test_parameters_cell_equals_the_function(notebook):
    cells = nbformat.read(ROOT / "nbs" / f"{notebook}.ipynb", 4).cells
    tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    cell = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(tagged[0]).body}
    function = getattr(importlib.import_module(f"ptmrec.{notebook[3:]}"), EXPERIMENTS[notebook])
    assert cell == {name: q.default for name, q in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("notebook", ["01a_peft", "04a_published", "05a_when_it_helps", "08_benchmarks", "08a_tuning_cost"])
def test_measurements_have_one_parameters_cell(notebook):
    cells = nbformat.read(ROOT / "nbs" / f"{notebook}.ipynb", 4).cells
    tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].startswith("measure = False")


def test_every_setting_is_a_parameter():
    stage1, stage2 = (inspect.signature(f).parameters for f in (run_stage1, run_stage2))
    assert BACKBONES.settings().keys() <= stage1.keys()
    assert TUNINGS.settings().keys() <= stage2.keys()


def test_package_needs_no_development_tools():
    tools = ("nbdev", "fastcore", "execnb", "jupyter", "IPython")
    code = f"import sys, ptmrec.stage2; print([m for m in {tools} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("module", [p.stem for p in (ROOT / "ptmrec").glob("[a-z]*.py")])
def test_public_names_are_documented(module):
    module = importlib.import_module(f"ptmrec.{module}")
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, f"{module.__name__}.{name} has no docstring"
