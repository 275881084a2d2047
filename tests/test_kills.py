"""Small runs are killed at random moments, again and again, and end bit for bit as an undisturbed one."""
import json
import multiprocessing
import os
import random
import shutil
import time
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from small import SHORT, make_shop

from ptmrec.runs import checksum

KINDS = {"stage1": {"backbone": "vbpr", "epochs": 40, "patience": 40, "n_seeds": 2},
         "stage2": SHORT | {"backbone": "freedom", "knn_k": 5, "epochs": 6, "stage2_epochs": 4, "task_weight": 1.0},
         "search": {"backbone": "bpr", "epochs": 15, "patience": 15, "grid": {"reg_weight": [1e-1, 1e-3, 1e-5]}}}


def work(kind, folder, runs):
    "Do the runs of a kind, with a checkpoint after every epoch."
    import torch

    import ptmrec.stage1 as stage1
    from ptmrec.search import search
    from ptmrec.stage2 import run_stage2

    torch.set_num_threads(1)
    os.environ |= {"PTMREC_RUNS": str(runs), "PTMREC_DATA": str(folder.parent), "TQDM_DISABLE": "1"}
    warnings.simplefilter("ignore")
    stage1.Checkpoint = partial(stage1.Checkpoint, seconds=0)
    {"stage1": stage1.run_stage1, "stage2": run_stage2, "search": search}[kind](dataset=folder, **KINDS[kind])


@pytest.fixture(scope="module")
def start():
    "A function that starts `work` in a process, from a server that has imported everything already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ptmrec.search", "ptmrec.stage2", "open_clip"])

    def process(*arguments):
        made = context.Process(target=work, args=arguments)
        made.start()
        return made

    return process


def content(runs):
    "What is kept of all runs, without times and places: {file: content}."
    found = {}
    for path in sorted(p for p in runs.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if path.name in ("run.json", "memory.csv"):
            about = json.loads(path.read_text()) if path.suffix == ".json" else {}
            kept = [about.get(k) for k in ("key", "experiment", "dataset", "parameters", "data", "encoder", "code")]
        elif path.suffix in (".csv", ".parquet"):
            read = pd.read_csv if path.suffix == ".csv" else pd.read_parquet
            kept = read(path).drop(columns="seconds", errors="ignore").to_csv()
        else:
            kept = checksum(path)
        found[str(path.relative_to(runs))] = kept
    return found


def killed(kind, start, tmp_path, kills, seed):
    "Kill the runs of a kind so many times; each time that they end, they must have what undisturbed ones have."
    make_shop(tmp_path / "shop")
    whole, runs, draw = tmp_path / "whole", tmp_path / "runs", random.Random(seed)
    begun = time.monotonic()
    start(kind, tmp_path / "shop", whole).join()
    shutil.rmtree(whole)  # the data's features are cached now
    begun = time.monotonic()
    start(kind, tmp_path / "shop", whole).join()
    seconds, expected, done, ended = time.monotonic() - begun, content(whole), 0, 0
    assert [name for name in expected if name.endswith("metrics.json")]
    while done < kills:
        process = start(kind, tmp_path / "shop", runs)
        process.join(draw.uniform(0, seconds))
        if process.is_alive():
            process.kill()
            done += 1
        process.join()
        if process.exitcode == 0:
            ended += 1
            assert content(runs) == expected, f"after {done} kills"
            shutil.rmtree(runs)
    last = start(kind, tmp_path / "shop", runs)
    last.join()
    assert last.exitcode == 0 and content(runs) == expected, f"after {done} kills, {ended} complete in between"
    assert not list(Path(runs).rglob("checkpoint*"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_kills(kind, start, tmp_path):
    killed(kind, start, tmp_path, 2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_kills(kind, start, tmp_path):
    killed(kind, start, tmp_path, 40, seed=1)
