"""Notebooks and their explorers in JupyterLab, in a real browser."""
import nbformat
import pytest
from browser import jupyter_lab, needs_browser

pytestmark = needs_browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with jupyter_lab(folder, PTMREC_RUNS=str(folder / "runs")) as lab:
        yield lab


def test_what_goes_wrong_is_heard(lab):
    "A failing handler of a widget shows nothing in the notebook; the test bench hears it."
    source = ("import ipywidgets\n"
              "shown, button = ipywidgets.HTML('not yet'), ipywidgets.Button(description='Go')\n"
              "def go(_):\n"
              "    shown.value = f'{6 * 7}'\n"
              "    raise ValueError('a handler failed')\n"
              "button.on_click(go)\n"
              "ipywidgets.VBox([button, shown])")
    path = lab.folder / "button.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=kernel), path)
    with lab.open(path) as notebook:
        notebook.run_all()
        assert notebook.complaints() == "", notebook.console
        notebook.page.get_by_role("button", name="Go").click()
        notebook.settle()
        assert notebook.page.locator(".widget-html").inner_text() == "42"
        assert "a handler failed" in notebook.complaints()
        notebook.page.evaluate("() => console.error('a script failed')")
        assert "a script failed" in notebook.complaints()
