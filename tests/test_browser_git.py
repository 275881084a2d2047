"""A notebook that is run and saved in JupyterLab, in a real browser, and what git says of it."""
import subprocess
import sys

from browser import jupyter_lab, needs_browser
from conftest import ROOT

pytestmark = needs_browser


def test_a_notebook_that_was_run_and_saved_is_unchanged_for_git(tmp_path):
    "In a JupyterLab with the configuration of `make lab`."
    checkout = tmp_path / "notebooks"

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True).stdout

    subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
    git("config", "filter.keep-outputs.clean", f"{sys.executable} .ci/keep_outputs.py %f")
    path = checkout / "nbs" / "00h_leaks.ipynb"
    committed = path.read_bytes()
    with (jupyter_lab(tmp_path, [f"--config={checkout}/.ci/jupyter_config.py"], TQDM_DISABLE="1") as lab,
          lab.open(path) as notebook):
        notebook.run_all()
        notebook.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        while path.read_bytes() == committed:
            notebook.page.wait_for_timeout(100)
        notebook.settle()
    assert git("status", "--porcelain") == ""
