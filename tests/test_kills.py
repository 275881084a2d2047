"""Small runs are killed at random moments, again and again, and end bit for bit as an undisturbed one."""
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import time
import warnings
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pandas as pd
import pytest
from PIL import Image
from small import SHORT, make_shop

from ptmrec.runs import checksum

KINDS = {"stage1": {"backbone": "vbpr", "epochs": 40, "patience": 40, "n_seeds": 2},
         "stage2": SHORT | {"backbone": "freedom", "knn_k": 5, "epochs": 6, "stage2_epochs": 4, "task_weight": 1.0},
         "search": {"backbone": "bpr", "epochs": 15, "patience": 15, "grid": {"reg_weight": [1e-1, 1e-3, 1e-5]}},
         "features": {}, "downloads": {},
         "grid": {"backbone": "bpr", "epochs": 10, "patience": 10}}


def encode(dataset):
    "Images and texts of a data set as features, in blocks of five items; some of that again by others."
    import ptmrec.clip_prompting as clip_prompting
    from ptmrec.data import load_data

    clip_prompting.encode_in_blocks = partial(clip_prompting.encode_in_blocks, block=5)
    clip_prompting.frozen_features(load_data(dataset), clip_prompting.load_clip())


def download(dataset):
    "An Amazon category with pictures, and an archive of another set, from the server whose address is in a file."
    from ptmrec.amazon import prepare
    from ptmrec.sources import SOURCES, Source, prepare_source

    address = (dataset.parent / "address").read_text()
    prepare("Toys", base_url=address, image_base=address, wait=0.01, concurrency=3)
    SOURCES["games"] = Source("Games", ("ratings.csv",), ("games.csv",), ("covers",), archives=("games.zip",),
                              addresses=(address,), home=address)
    prepare_source("games")


def make_grid(dataset, **base):
    from ptmrec.grids import grid

    grid("04_stage1", base | {"dataset": str(dataset)}, {"emb_size": [8, 16]}, [0], "killed", at_once=1)


def work(kind, folder, runs):
    "Do the runs of a kind, with a checkpoint after every epoch; `runs` is also where data are derived and downloaded to."
    import torch

    import ptmrec.stage1 as stage1
    import ptmrec.stage2 as stage2
    from ptmrec.search import search

    torch.set_num_threads(1)
    place = runs if kind in ("features", "downloads") else folder.parent
    os.environ |= {"PTMREC_RUNS": str(runs), "PTMREC_DATA": str(place), "TQDM_DISABLE": "1"}
    warnings.simplefilter("ignore")
    stage1.Checkpoint = stage2.Checkpoint = partial(stage1.Checkpoint, seconds=0, share=1)
    {"stage1": stage1.run_stage1, "stage2": stage2.run_stage2, "search": search, "features": encode, "downloads": download,
     "grid": make_grid}[kind](dataset=folder, **KINDS[kind])


@pytest.fixture(scope="module")
def start():
    "A function that starts `work` in a process, from a server that has imported everything already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ptmrec.search", "ptmrec.stage2", "ptmrec.sources", "ptmrec.grids", "open_clip"])

    def process(*arguments):
        made = context.Process(target=work, args=arguments)
        made.start()
        return made

    return process


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(tmp_path):
    "A server on this machine with what `download` wants; its address goes into a file."
    folder = tmp_path / "web"
    folder.mkdir()
    Image.effect_noise((40, 40), 50).convert("RGB").save(picture := io.BytesIO(), "JPEG")
    ids = [f"{i:010}" for i in range(20)]
    reviews = [{"reviewerID": f"U{u}", "asin": i, "overall": 5.0, "unixReviewTime": u} for u in range(6) for i in ids]
    meta = [str({"asin": i, "title": f"toy {i}", "imUrl": f"http://images.example/{i}.jpg"}) for i in ids]
    for name, lines in (("reviews_Toys_5.json.gz", map(json.dumps, reviews)), ("meta_Toys.json.gz", meta)):
        (folder / name).write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    for i in ids[:-2]:  # two are gone
        (folder / f"{i}.jpg").write_bytes(picture.getvalue())
    with zipfile.ZipFile(folder / "games.zip", "w") as archive:
        archive.writestr("ratings.csv", "user,item\n" + "".join(f"{u},{i}\n" for u in range(6) for i in range(20)))
        archive.writestr("games.csv", "item,title\n" + "".join(f"{i},game {i}\n" for i in range(20)))
        for i in range(20):
            archive.writestr(f"covers/{i}.jpg", picture.getvalue())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "address").write_text(f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown(), server.server_close()


def content(runs):
    "What is kept of all runs, without times and places: {file: content}."
    found = {}
    for path in sorted(p for p in runs.rglob("*") if p.is_file() and p.suffix not in (".lock", ".ipynb")):
        name = str(path.relative_to(runs))
        if path.name in ("run.json", "memory.csv"):
            about = json.loads(path.read_text()) if path.suffix == ".json" else {}
            kept = [about.get(k) for k in ("key", "experiment", "dataset", "parameters", "data", "encoder", "code")]
        elif path.suffix in (".csv", ".parquet") and not name.startswith("games/raw"):
            read = pd.read_csv if path.suffix == ".csv" else pd.read_parquet
            of_this_time = ["seconds", "run_seconds", "peak_mb", "reused", "notebook"]
            kept = read(path).drop(columns=of_this_time, errors="ignore").to_csv()
        else:
            kept = checksum(path)
        found[name] = kept
    return found


def killed(kind, start, tmp_path, kills, seed):
    "Kill the runs of a kind so many times; each time that they end, they must have what undisturbed ones have."
    make_shop(tmp_path / "shop")
    whole, runs, draw = tmp_path / "whole", tmp_path / "runs", random.Random(seed)
    start(kind, tmp_path / "shop", whole).join()
    shutil.rmtree(whole)  # the data's features are cached now
    begun = time.monotonic()
    start(kind, tmp_path / "shop", whole).join()
    seconds, expected, done, ended = time.monotonic() - begun, content(whole), 0, 0
    assert len(expected) > 3 and not [name for name in expected if "/." in name and not name.startswith((".cache", "games"))]
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
    print(f"{kind}: {done} kills, {ended} complete in between")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grid"])  # a grid: see test_ablations.py
def test_two_kills(kind, start, web, tmp_path):
    killed(kind, start, tmp_path, 2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_kills(kind, start, web, tmp_path):
    killed(kind, start, tmp_path, 8 if kind == "grid" else 20, seed=1)
