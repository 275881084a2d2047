"""The training monitor in JupyterLab, in a real browser: curves move, and Stop leaves a finished run."""
import re

import nbformat
import pytest
from browser import copy_notebook, jupyter_lab, needs_browser
from small import make_shop

from ptmrec.runs import list_runs, open_run

pytestmark = needs_browser
SILENT = "import warnings; warnings.filterwarnings('ignore', message='The tiny CLIP')"
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    make_shop(folder / "shop")
    with jupyter_lab(folder, PTMREC_RUNS=str(folder / "runs"), PTMREC_DATA=str(folder), TQDM_DISABLE="0") as lab:
        yield lab


@pytest.fixture(autouse=True)
def same_folders(lab, monkeypatch):
    monkeypatch.setenv("PTMREC_RUNS", str(lab.folder.parent / "runs"))
    monkeypatch.setenv("PTMREC_DATA", str(lab.folder.parent))


def notebook_of(lab, name, *cells):
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab.folder / name)
    return lab.folder / name


def stop(notebook):
    "The Stop button of the monitor."
    return notebook.page.locator(".widget-button", has_text="Stop")


def wait_until_it_moves(notebook, epochs):
    "Wait for the monitor of a training of `epochs` epochs, and for its curve to change."
    notebook.page.locator(".widget-html", has_text=f"of {epochs}").wait_for(timeout=120_000)
    curve = notebook.page.locator("polyline").first
    curve.wait_for(timeout=60_000)
    before = curve.get_attribute("points")
    notebook.page.wait_for_function("before => document.querySelector('polyline').getAttribute('points') !== before",
                                    arg=before, timeout=60_000)


def saved(notebook):
    "All outputs of a notebook as text, pictures too; none of them is a widget."
    outputs = notebook.outputs()
    assert not [o for o in outputs if VIEW in o.get("data", {})], "a widget is left where a picture should be"
    return "\n".join(str(o.get("data", "")) + str(o.get("text", "")) for o in outputs)


def test_stop_leaves_a_finished_run(lab):
    how = dict(dataset="shop", backbone="bpr", epochs=7777, patience=7777, n_seeds=1)
    with lab.open(copy_notebook("04_stage1", lab.folder, **how)) as notebook:
        notebook.start()
        wait_until_it_moves(notebook, 7777)
        assert "to go" in notebook.page.locator(".widget-html", has_text="of 7777").inner_text()
        stop(notebook).click()
        notebook.wait()
        key, words = next((run.key, run.by_hand) for run in list_runs().itertuples() if run.by_hand)
        assert re.fullmatch(r"Stage 1 stopped by hand at epoch \d+(, step \d+)?, best \d+", words)
        run = open_run(key)
        assert run.finished and len(run.load_table("history.csv")) == int(re.search(r"epoch (\d+)", words)[1]) < 7777
        text = saved(notebook)
        assert f"Stage 1, seed 0, {words.removeprefix('Stage 1 ')}" in text  # the monitor's row
        assert f"finished, {words}" in text and f"bpr, seed 0: {words}." in text  # the run, and below the table
        assert notebook.complaints() == ""
        notebook.run_all()
        assert f"is used again ({words}; rerun=True makes it anew)" in saved(notebook)


def test_stage_2_goes_on_with_its_next_training(lab):
    how = dict(dataset="shop", backbone="vbpr", epochs=40, stage2_epochs=5555, validate_every=1,
               stage2_batch_size=9, n_ctx=2, n_seeds=1, device="cpu")
    path = notebook_of(lab, "two.ipynb", SILENT, "from ptmrec.stage2 import report, run_stage2",
                       f"runs = run_stage2(**{how})", "print(report(runs))")
    with lab.open(path) as notebook:
        notebook.start()
        wait_until_it_moves(notebook, 5555)
        stop(notebook).click()
        notebook.wait()
        run = open_run(list_runs("stage2").key[0])
        assert run.finished and run.by_hand.startswith("Stage 2 stopped by hand") and run.by_hand.count("by hand") == 1
        text = saved(notebook)
        assert f"vbpr + prompt, seed 0: {run.by_hand}." in text
        rows = re.findall(r"'text/plain': \"?'?((?:Stage|continued|fresh)[^'\"]*)", text)
        assert [row.split(",")[0] for row in rows] == ["Stage 1", "Stage 2", "continued", "fresh"]
        assert notebook.complaints() == ""


TOY = '''
import time, torch
from ptmrec.monitor import Monitor
from ptmrec.training import KeepBest, Loop
model = torch.nn.Linear(1, 1)
def epoch(n):
    time.sleep(0.05)
    return {"loss": 1 / n}
loop = Loop(model, torch.optim.SGD(model.parameters(), 0.1), epoch, lambda n: {"score": n % 100},
            [Monitor("My training", {"loss": "loss", "score": "score"}), KeepBest("score", 500)])
history = loop.run(3333)
'''


def test_the_stop_of_the_toolbar_interrupts_as_before(lab):
    with lab.open(notebook_of(lab, "toy.ipynb", TOY)) as notebook:
        notebook.start()
        wait_until_it_moves(notebook, 3333)
        notebook.page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
        notebook.page.wait_for_function("() => window.heard.some(text => text.includes('stopped during epoch'))")
        notebook.settle()
        text = saved(notebook)
        assert "My training, interrupted during epoch" in text
        assert [o["ename"] for o in notebook.outputs() if o["output_type"] == "error"] == ["Stopped"]


@pytest.fixture
def without_subshells(lab):
    "A front end that sends clicks to the shell that runs the cells, as others than JupyterLab do."
    path = next(lab.folder.parent.rglob("apputils-extension")) / "kernels-settings.jupyterlab-settings"
    path.write_text('{"commsOverSubshells": "disabled"}')
    yield
    path.unlink()


def test_where_clicks_do_not_arrive_a_line_says_what_to_do(lab, without_subshells):
    with lab.open(notebook_of(lab, "deaf.ipynb", TOY.replace("3333", "250"))) as notebook:
        notebook.start()
        notebook.page.get_by_text("to stop, interrupt the kernel").wait_for(timeout=60_000)
        assert not stop(notebook).is_visible()
        notebook.wait()
        assert "ran all 250 epochs" in saved(notebook) and notebook.complaints() == ""
