"""Every notebook runs, is in step with its module, is clean, and keeps its parameters cell."""
import ast
import importlib
import inspect
import os
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from ptmrec.stage2 import VARIANTS, run_stage2

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
BIN = Path(sys.executable).parent


def nbdev(command, *arguments, cwd=ROOT):
    return subprocess.run([BIN / command, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    "Where the notebooks' experiments go: a folder of their own, so that nothing is there from before."
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def nbdev_test(shared_runs, tmp_path_factory):
    "Runs a notebook as the command does, in its own process, where torch is there already: exit status, what was printed."
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "nbdev_test_server.py"], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True, env=os.environ | {"PTMREC_RUNS": str(shared_runs)})
    said = tmp_path_factory.mktemp("said") / "said.txt"

    def run(notebook):
        print(notebook, said, sep="\t", file=server.stdin, flush=True)
        return server.stdout.readline().strip(), said.read_text()

    with server:
        yield run


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(notebook, nbdev_test):
    status, said = nbdev_test(notebook)
    assert status == "0" and "Success" in said, said[-8000:]


def test_stage2_raises_recall_on_the_sample(shared_runs, monkeypatch):
    "By what `test_runs[05_stage2]` has trained."
    monkeypatch.setenv("PTMREC_RUNS", str(shared_runs))
    metrics = run_stage2(dataset="sample", n_seeds=1)[0].metrics()
    best = max(VARIANTS, key=lambda variant: metrics[variant]["valid"]["recall@20"])
    assert metrics[best]["test"]["recall@10"] > metrics["stage1"]["test"]["recall@10"]


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


@pytest.mark.parametrize("notebook", ["01a_peft", "04a_published", "05a_when_it_helps", "08_benchmarks", "08a_tuning_cost"])
def test_measurements_have_one_parameters_cell(notebook):
    cells = nbformat.read(ROOT / "nbs" / f"{notebook}.ipynb", 4).cells
    tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].startswith("measure = False")


@pytest.mark.parametrize("notebook", ["04_stage1", "05_stage2", "06_ablations"])
def test_experiments_have_one_parameters_cell(notebook):
    cells = nbformat.read(ROOT / "nbs" / f"{notebook}.ipynb", 4).cells
    tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and "\ndataset = " in f"\n{tagged[0]}"


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


@pytest.mark.parametrize("module", sorted((ROOT / "ptmrec").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_public_functions_have_type_hints(module):
    body = ast.parse(module.read_text()).body
    methods = [m for c in body if isinstance(c, ast.ClassDef) and c.name[0] != "_" for m in c.body]
    for function in (n for n in body + methods if isinstance(n, ast.FunctionDef) and n.name[0] != "_"):
        given = [a for a in function.args.args + function.args.kwonlyargs if a.arg not in ("self", "cls")]
        bare = [a.arg for a in given if a.annotation is None] + ["what it returns"] * (function.returns is None)
        assert not bare, f"{module.stem}.{function.name} has no type hint for {', '.join(bare)}"


def exported_lines(notebook):
    "Lines of each exported cell that is not all imports, and the longest run of them without an example between."
    lengths, run, longest = [], 0, 0
    for cell in nbformat.read(notebook, 4).cells:
        lines = [line for line in cell.source.split("\n")[1:] if line.strip()]
        if cell.cell_type != "code":
            continue
        if not cell.source.startswith("#|"):
            run = 0
        elif cell.source.startswith("#| export") and not lines[0].startswith(("import", "from")):
            lengths.append(len(lines))
            run += len(lines)
        longest = max(longest, run)
    return lengths, longest


def test_lessons_come_in_small_steps():
    found = {notebook.stem: exported_lines(notebook) for notebook in NOTEBOOKS}
    too_long = {name: longest for name, (_, longest) in found.items() if longest > 40}
    assert not too_long, f"exported lines in a row with no example between: {too_long}"
    assert statistics.median(n for lengths, _ in found.values() for n in lengths) <= 12


def test_a_notebook_that_was_only_run_is_unchanged_for_git(tmp_path):
    git = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True, text=True)
    for name in (".ci", "nbs"):
        (tmp_path / name).mkdir()
    for name in (".gitattributes", ".ci/keep_outputs.py", "nbs/03_losses.ipynb"):
        shutil.copy(ROOT / name, tmp_path / name)
    git(["git", "init", "-q"])
    git(["git", "config", "filter.keep-outputs.clean", f"{sys.executable} .ci/keep_outputs.py %f"])
    git(["git", "add", "-A"])
    git(["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x"])
    path = tmp_path / "nbs" / "03_losses.ipynb"
    notebook = nbformat.read(path, 4)
    ran = next(c for c in notebook.cells if c.get("outputs"))
    ran.outputs, ran.execution_count, notebook.metadata["ran"] = [], 7, True
    nbformat.write(notebook, path)
    assert git(["git", "diff"]).stdout == ""
    sys.path.insert(0, str(ROOT / ".ci"))
    importlib.import_module("keep_outputs").refresh(path)  # JupyterLab does when it saves
    assert git(["git", "status", "--porcelain"]).stdout == ""
    ran.source += "\n# edited"
    nbformat.write(notebook, path)
    importlib.import_module("keep_outputs").refresh(path)
    assert git(["git", "status", "--porcelain"]).stdout == " M nbs/03_losses.ipynb\n"
