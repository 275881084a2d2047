"""Paths, and the real data that some tests run on when they are there."""
import gc
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # with more threads than cores, torch is several times slower
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(workers)))
signal.signal(signal.SIGINT, signal.default_int_handler)  # programs under test get it, also if a shell ignores Ctrl-C
SHARED = Path(os.environ.get("PTMREC_SHARED", ROOT.parent / "shared" / "data"))


SLOWEST = ("test_notebooks", "test_papermill", "test_browser", "test_ablations")


def pytest_collection_modifyitems(items):
    "The files that take longest first, so that both workers end at about the same time."
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


def pytest_collection_finish():
    "What has been imported by now is never garbage: statsmodels and others collect often, and need not look through it."
    gc.freeze()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "An empty folder that experiments write to."
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def movielens():
    folder = SHARED / "movielens-posters"
    if not folder.is_dir():
        pytest.skip(f"the MovieLens posters are not at {folder} (set PTMREC_SHARED)")
    return folder
