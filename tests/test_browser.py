"""Notebooks and their explorers in JupyterLab, used with the mouse in a real browser."""
import re

import nbformat
import pytest
from browser import copy_notebook, jupyter_lab, needs_browser
from small import SHORT, make_shop

pytestmark = needs_browser
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    make_shop(folder / "shop")
    with jupyter_lab(folder, PTMREC_RUNS=str(folder / "runs"), OMP_NUM_THREADS="1") as lab:
        yield lab


def written(lab, name, *cells):
    "A notebook of these cells in the folder of the lab."
    path = lab.folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=KERNEL), path)
    return path


def pictures(notebook):
    "What the cards of the explorer in view show: their pictures and texts."
    return notebook.page.evaluate("""() => [...document.querySelectorAll('[class*=ptmrec-]')].filter(e => e.offsetParent)
        .map(e => getComputedStyle(e).backgroundImage + e.innerText)""")


def changed(notebook, act):
    "Do something to an explorer; its pictures must change."
    before = pictures(notebook)
    act()
    notebook.settle()
    after = pictures(notebook)
    assert before != after and any("data:image/jpeg" in card for card in after), "nothing changed"
    return after


def test_what_goes_wrong_is_heard(lab):
    "A failing handler of a widget shows nothing in the notebook; the test bench hears it."
    source = ("import ipywidgets\n"
              "shown, button = ipywidgets.HTML('not yet'), ipywidgets.Button(description='Go')\n"
              "def go(_):\n"
              "    shown.value = f'{6 * 7}'\n"
              "    raise ValueError('a handler failed')\n"
              "button.on_click(go)\n"
              "ipywidgets.VBox([button, shown])")
    with lab.open(written(lab, "button", source)) as notebook:
        notebook.run_all()
        assert notebook.complaints() == "", notebook.console
        notebook.page.get_by_role("button", name="Go").click()
        notebook.settle()
        assert notebook.page.locator(".widget-html").inner_text() == "42"
        assert "a handler failed" in notebook.complaints()
        notebook.page.evaluate("() => console.error('a script failed')")
        assert "a script failed" in notebook.complaints()


@pytest.mark.parametrize("name", ["04_stage1", "05_stage2"])
def test_experiments_run_in_the_page(lab, name):
    "From the first cell to the last, on a small data set, without a word on stderr but the warning about the tiny CLIP."
    settings = {k: v for k, v in SHORT.items() if name == "05_stage2" or k in ("epochs", "n_seeds", "device")}
    path = copy_notebook(name, lab.folder, dataset=str(lab.folder.parent / "shop"), **settings)
    with lab.open(path) as notebook:
        notebook.run_all()
        errors = [line for line in notebook.console if line.startswith("error")]
        assert errors == []
        assert any("image/png" in output.get("data", {}) for output in notebook.outputs())


def test_figures_run_in_the_page(lab):
    with lab.open(copy_notebook("07_visualisation", lab.folder)) as notebook:
        notebook.run_all()
        assert [line for line in notebook.console if line.startswith("error")] == []
        assert sum("image/png" in output.get("data", {}) for output in notebook.outputs()) > 10


RUN = """from ptmrec.explorers import *
from ptmrec.stage2 import run_stage2
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the tiny CLIP has not seen this data set's pictures
    run, = run_stage2(dataset={folder!r}, **{short!r})
"""


@pytest.fixture
def opened(lab, request):
    "The notebook with one explorer in it, all cells run; afterwards there must be nothing to complain of."
    source = RUN.format(folder=str(lab.folder.parent / "shop"), short=SHORT)
    with lab.open(written(lab, request.node.name.replace("[", "-").strip("]"), source, request.param)) as notebook:
        notebook.run_all()
        notebook.page.evaluate("() => document.querySelectorAll('.jp-Cell-inputWrapper').forEach(e => e.remove())")
        yield notebook
        assert notebook.complaints() == "", notebook.console


@pytest.mark.parametrize("opened", ["explore(run.data())"], indirect=True)
def test_data_browser(opened):
    page = opened.page
    words = page.get_by_placeholder("words in id, title or text")
    assert "hat" in "".join(changed(opened, lambda: (words.fill("hat"), words.press("Enter"))))
    changed(opened, lambda: (words.fill(""), words.press("Enter")))
    card = page.locator("button[class*=ptmrec-]").nth(5)
    title = card.get_attribute("title")
    changed(opened, card.click)
    assert page.locator(".widget-html b", has_text=title).count() == 1
    changed(opened, lambda: page.get_by_role("button", name="▶").first.click())
    changed(opened, lambda: page.locator(".widget-dropdown select").nth(1).select_option("fewest interactions first"))


@pytest.mark.parametrize("opened", ["explore(run)"], indirect=True)
def test_user_explorer(opened):
    page = opened.page
    changed(opened, lambda: page.get_by_role("button", name="Next").click())
    changed(opened, lambda: page.locator(".widget-dropdown select").first.select_option("most harmed"))
    changed(opened, lambda: page.locator(".widget-dropdown select").nth(2).select_option(index=0))
    user = page.get_by_label("or user")
    changed(opened, lambda: (user.fill("7"), user.press("Enter")))
    assert page.get_by_text("User 7 has").count() == 1
    user.fill("nobody")
    user.press("Enter")
    page.get_by_text("There is no user 'nobody'").wait_for()


@pytest.mark.parametrize("opened", ["ItemExplorer(run)"], indirect=True)
def test_item_explorer(opened):
    page = opened.page
    changed(opened, lambda: page.locator("button[class*=ptmrec-]").nth(3).click())
    changed(opened, lambda: page.get_by_role("button", name="Back").click())
    changed(opened, lambda: page.get_by_role("button", name="text", exact=True).click())
    for aspect, sign in (("words", "td:has-text('mug')"), ("attention", "img[src^='data:image/jpeg'] >> nth=1")):
        page.get_by_role("button", name=aspect).click()
        page.locator(sign).first.wait_for()


@pytest.mark.parametrize("opened", ["EmbeddingMap(run)"], indirect=True)
def test_embedding_map(opened):
    pytest.importorskip("jscatter", reason="the extra `maps` is not installed")
    page = opened.page
    page.locator("canvas").first.wait_for()
    page.wait_for_timeout(1000)  # for the map to be drawn
    before = page.locator("canvas").first.screenshot()
    page.get_by_role("slider").press("End")
    opened.settle()
    page.wait_for_timeout(500)
    assert page.locator("canvas").first.screenshot() != before, "the points moved"
    box = page.locator("canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.locator("button[title*=asso]").first.click()
    side = [6 * n - 210 for n in range(71)]
    lasso = [(x, -210) for x in side] + [(210, y) for y in side] + [(-x, 210) for x in side] + [(-210, -y) for y in side]
    page.mouse.move(middle[0] - 210, middle[1] - 210)
    page.mouse.down()
    for x, y in lasso:
        page.mouse.move(middle[0] + x, middle[1] + y)
        page.wait_for_timeout(12)  # moves that follow too fast are left out
    page.mouse.up()
    page.get_by_text(re.compile(r"\d\d selected")).wait_for()
    assert any("data:image/jpeg" in card for card in pictures(opened))


@pytest.mark.parametrize("opened", ["explore()"], indirect=True)
def test_run_explorer(opened):
    page = opened.page
    page.locator("td", has_text="stage2").first.click()
    page.locator("td", has_text="stage1").first.click()
    opened.settle()
    page.locator("img[src^='data:image/jpeg']").wait_for()
    page.get_by_role("button", name="Compare two").click()
    page.get_by_text("paired t-test over").wait_for()
    with page.expect_download() as download:
        page.get_by_text("Export as CSV").click()
    assert download.value.path().read_text().startswith("experiment,dataset,key")


def test_real_posters(lab, movielens):
    "The explorers of users and items on MovieLens posters: pictures come and change."
    source = RUN.format(folder=str(movielens), short=SHORT | {"min_rating": 4, "core": 5, "stage2_batch_size": 128})
    with lab.open(written(lab, "posters", source, "explore(run)", "ItemExplorer(run)")) as notebook:
        notebook.run_all()
        changed(notebook, lambda: notebook.page.get_by_role("button", name="Next").click())
        changed(notebook, lambda: notebook.page.get_by_role("button", name="Random item").click())
        assert [line for line in notebook.console if line.startswith("error")] == []
