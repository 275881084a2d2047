"""JupyterLab in headless Chromium, for tests that use notebooks as a person does.

    with jupyter_lab(tmp_path) as lab, lab.open(copy_notebook("07a_explorers", lab.folder)) as notebook:
        notebook.run_all()
        notebook.page.get_by_role("button", name="Next").click()
        notebook.settle()
        assert notebook.complaints() == ""
"""
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
OPTIONS = ["--no-browser", "--ip=127.0.0.1", "--allow-root", "--LabApp.expose_app_in_browser=True",
           "--ServerApp.terminals_enabled=False", "--LabApp.news_url=None"]
SETTINGS = {"notebook-extension/tracker": '{"windowingMode": "none"}',  # all cells are in the page
            "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}'}
BEGIN = "() => { window.finished = null; window.jupyterapp.commands.execute('notebook:run-all-cells')" \
        ".then(() => { window.finished = true }) }"
PANEL = "window.jupyterapp.shell.currentWidget"
LISTEN = f"""() => {{ window.heard = []; {PANEL}.sessionContext.session.kernel.iopubMessage.connect((_, message) => {{
    if (message.header.msg_type === 'error') window.heard.push(message.content.traceback.join('\\n'))
    if (message.header.msg_type === 'stream' && message.content.name === 'stderr') window.heard.push(message.content.text)
}}) }}"""
IDLE = f"() => {PANEL}.sessionContext?.session?.kernel?.status === 'idle'"
needs_browser = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


def copy_notebook(name: str, folder: Path, **parameters) -> Path:
    "A notebook of nbs/ in `folder`, without outputs; `parameters` are set by a cell after the one tagged so, or at the top."
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    at = [n for n, c in enumerate(notebook.cells, 1) if "parameters" in c.metadata.get("tags", [])]
    if parameters:
        source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        notebook.cells.insert(at[0] if at else 0, nbformat.v4.new_code_cell(source))
    shutil.copytree(ROOT / "nbs" / "images", folder / "images", dirs_exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _environment(home, more):
    "Of a user who has just installed: a fresh home. matplotlib's list of fonts is kept, for it takes long to make."
    import matplotlib.font_manager

    paths = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    return os.environ | paths | {"HOME": str(home), "MPLCONFIGDIR": matplotlib.get_cachedir(), "TQDM_DISABLE": "1",
                                 "PYTHONPATH": str(ROOT)} | more


class Lab:
    "A running JupyterLab: notebooks lie in `folder`; `log` is what the server and its kernels write to stderr."

    def __init__(self, folder, url, token, log, browser):
        self.folder, self.url, self.token, self.log, self.browser = folder, url, token, log, browser

    @contextmanager
    def open(self, path: Path, width: int = 1400, height: int = 1000):
        "Open a notebook of the folder in a new window, its kernel ready: a `Notebook`."
        context = self.browser.new_context(viewport={"width": width, "height": height})
        notebook = Notebook(context.new_page(), self.log)
        try:
            notebook.load(f"{self.url}/lab/tree/{path.relative_to(self.folder)}?reset&token={self.token}")
            yield notebook
        finally:
            context.close()


class Notebook:
    "A notebook open in the browser: `page` is playwright's, `console` are the lines of the browser's console."

    def __init__(self, page, log):
        self.page, self.log, self.console = page, log, []
        page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.console.append(f"error: {error}"))

    def load(self, url):
        self.page.goto(url)
        self.page.wait_for_function("() => window.jupyterapp !== undefined", timeout=60_000)
        self.page.wait_for_function(f"() => {PANEL}?.sessionContext?.isReady", timeout=60_000)
        self.page.wait_for_function(IDLE, timeout=60_000)
        self.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
        self.page.evaluate(LISTEN)
        self.logged = len(self.log.read_text())

    def start(self):
        "Run all cells, and return at once."
        self.page.evaluate(BEGIN)

    def wait(self, seconds: float = 240):
        "Until all cells have run."
        self.page.wait_for_function("() => window.finished", timeout=seconds * 1000)
        self.settle()

    def run_all(self, seconds: float = 240):
        "Run all cells and wait for them; no output may be an error."
        self.start()
        self.wait(seconds)
        errors = [f"{o['ename']}: {o['evalue']}" for o in self.outputs() if o["output_type"] == "error"]
        assert not errors, errors

    def settle(self, seconds: float = 30):
        "Until the kernel has answered and the page has drawn it."
        self.page.wait_for_timeout(100)  # for a click to reach the kernel
        self.page.wait_for_function(IDLE, timeout=seconds * 1000)
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def outputs(self) -> list[dict]:
        "Outputs of all cells, as they would be saved."
        cells = self.page.evaluate(f"() => {PANEL}.content.model.toJSON().cells")
        return [output for cell in cells for output in cell.get("outputs", [])]

    def stderr(self) -> str:
        "What the kernel sent to stderr, errors of a widget's handlers too, and warnings that server and kernel logged."
        logged = self.log.read_text()[self.logged:].splitlines()
        lines = [x for text in self.page.evaluate("() => window.heard") for x in text.splitlines()]
        lines += [x for x in logged if not re.match(r"\[[ID] ", x)]
        # a page asks a busy kernel for its widgets, and takes the question back after four seconds
        return "\n".join(x for x in lines if x.strip() and not x.startswith("No such comm"))

    def complaints(self) -> str:
        "All that should not be there: errors in the browser's console, and stderr; \"\" where all is well."
        return "\n".join([line for line in self.console if line.startswith("error")] + [self.stderr()]).strip()


@contextmanager
def jupyter_lab(folder: Path, options=(), **environment: str):
    "JupyterLab on 127.0.0.1 over `folder`/notebooks, and a browser for it: a `Lab`. `environment` is set for its kernels."
    from playwright.sync_api import sync_playwright

    home, notebooks, token = folder / "home", folder / "notebooks", secrets.token_hex(16)
    notebooks.mkdir(parents=True, exist_ok=True)
    for name, text in SETTINGS.items():
        path = home / "jupyter_config_dir" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    port, log = _free_port(), folder / "server.log"
    command = [Path(sys.executable).parent / "jupyter", "lab", *OPTIONS, f"--port={port}", "--port-retries=0",
               f"--IdentityProvider.token={token}", f"--notebook-dir={notebooks}", *options]
    with log.open("w") as stderr:
        server = subprocess.Popen(command, cwd=notebooks, env=_environment(home, environment), stdout=stderr, stderr=stderr)
    try:
        url = f"http://127.0.0.1:{port}"
        _until_it_answers(f"{url}/api?token={token}", server, log)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            yield Lab(notebooks, url, token, log, browser)
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def _until_it_answers(url, server, log, seconds=60):
    for _ in range(seconds * 5):
        try:
            return urllib.request.urlopen(url, timeout=5).read()
        except OSError:
            assert server.poll() is None, f"JupyterLab did not start:\n{log.read_text()[-3000:]}"
            time.sleep(0.2)
    raise TimeoutError(f"JupyterLab did not answer:\n{log.read_text()[-3000:]}")
