"""Grids of notebook runs, their statistics and tables, derived data sets, yardsticks, and the studies made of them."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from scipy import stats
from small import add_sounds, make_shop

import ptmrec.ablations as ablations
import ptmrec.grids as grids
import ptmrec.report as report
import ptmrec.sample as sample
import ptmrec.yardsticks as yardsticks
from ptmrec.ablations import (BEST_YARDSTICK, METHODS, STUDIES, check_study, draw_trials, plot_study, run_study, study,
                              tune_equally, verdicts, write_result)
from ptmrec.backbones import BACKBONES
from ptmrec.clip_prompting import ItemEncoder
from ptmrec.data import MODALITIES, DataError, Modality, RecData, load_data
from ptmrec.derived import derive, miniature, random_features, shuffled, thinned, with_cold_items, without, write_data
from ptmrec.grids import Cell, Watch, grid, plan, run_cells, runs_table, time_left
from ptmrec.processes import run_notebook
from ptmrec.ranking import METRICS, Evaluator
from ptmrec.runs import best_variant, compare, open_run
from ptmrec.settings import SettingError, resolve
from ptmrec.significance import (bootstrap_interval, comparisons, in_words, result_text, save_figure, save_result,
                                 smallest_gain)
from ptmrec.stage1 import run_stage1
from ptmrec.visualisation import item_statistics
from ptmrec.yardsticks import YARDSTICKS, as_embeddings, ease, feature_knn, item_knn, popular, run_yardstick, training_matrix

QUICK = {"epochs": 2, "batch_size": 64, "device": "cpu"}


@pytest.fixture
def shop(tmp_path):
    make_shop(tmp_path / "shop")
    return str(tmp_path / "shop")


@pytest.fixture
def here(monkeypatch):
    "Runs of a grid in this process, one after the other; the parameters of each."
    done = []

    def run(notebook, output, parameters, *more):
        done.append(parameters.get("parameters", parameters))
        try:
            if notebook == "ptmrec.grids.run_cell":
                grids.run_cell(**parameters)
            else:
                grids.NOTEBOOKS[os.path.basename(notebook).removesuffix(".ipynb")](**parameters)
        except FloatingPointError as error:
            return {"seconds": 1.0, "peak_mb": 1.0, "error": f"{type(error).__name__}: {error}"}
        return {"seconds": 1.0, "peak_mb": 1.0, "error": None}

    monkeypatch.setattr(grids, "run_notebook", run)
    return done


# ---------------------------------------------------------------- the engine, with real processes


def test_notebooks_through_papermill_a_failure_and_what_is_there(shop, runs):
    base = {"dataset": shop, "backbone": "bpr", **QUICK}
    table = grid("04_stage1", base, {"eval_items": ["all", "cold"]}, [0], "first", at_once=2)  # there are no cold items
    assert table.status.tolist() == ["finished", "failed"] and not table.reused.any()
    assert "DataError" in table.error[1] and "no positive" in table.error[1] and pd.isna(table.error[0])
    assert all(map(os.path.exists, table.notebook)) and (table.seconds > 0).all() and (table.peak_mb > 50).all()
    run = open_run(table.key[0])
    assert table["test recall@20"][0] == run.metrics()["test"]["recall@20"] and table.eval_items.tolist() == ["all", "cold"]
    executed = json.loads(open(table.notebook[0]).read())
    assert any("injected-parameters" in cell["metadata"].get("tags", []) for cell in executed["cells"])
    pd.testing.assert_frame_equal(pd.read_parquet(runs / "grids" / "first" / "table.parquet"), table)

    again = grid("04_stage1", base, {"eval_items": ["all"]}, [0], "second", at_once=1)
    assert again.reused.tolist() == [True] and again.key[0] == run.key and pd.isna(again.seconds[0])
    everything = runs_table()
    assert run.key in set(everything.key) <= set(table.key) and everything.set_index("key").state[run.key] == "finished"


def alive(pid):
    return os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().rsplit(")")[1].split()[0] != "Z"


def below(pid):
    "All processes below one."
    found = [int(p) for task in os.listdir(f"/proc/{pid}/task")
             for p in open(f"/proc/{pid}/task/{task}/children").read().split()]
    return found + [p for child in found for p in below(child)]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc, as on Linux")
def test_killed_and_called_again(shop, runs):
    "SIGKILL: program and kernel end by themselves; what is finished stays, the rest is run."
    base = {"dataset": shop, "backbone": "bpr", **QUICK, "patience": 400}
    axes = {"epochs": [1, 400]}  # the second is still at it when it is killed, however busy the machine
    code = f"from ptmrec.grids import grid; grid('04_stage1', {base}, {axes}, [0], 'killed', at_once=1)"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(list((runs / "stage1").glob("*/*/run.json"))) < 2:
        assert first.poll() is None, "the grid ended before it could be killed"
        time.sleep(0.05)
    started = below(first.pid)
    first.kill()
    first.wait()
    for _ in range(2400):
        if not any(map(alive, started)):
            break
        time.sleep(0.05)
    assert len(started) >= 2 and not any(map(alive, started))
    done = {path: path.stat().st_mtime_ns for path in (runs / "stage1").rglob("metrics.json")}
    assert len(done) == 1
    table = grid("04_stage1", base, axes, [0], "killed", at_once=1)
    assert table.reused.tolist() == [True, False] and (table.status == "finished").all()
    assert done == {path: path.stat().st_mtime_ns for path in done}


def test_a_run_whose_worker_dies_four_times_has_failed(shop, runs, tmp_path, monkeypatch):
    "The other run of the grid is made all the same."
    distributed = pytest.importorskip("distributed", reason="pip install -e '.[cluster]'")
    deaths, really = tmp_path / "deaths", grids.run_notebook

    def run_notebook(what, output, parameters, *more):
        if parameters["parameters"]["seed"] == 1:
            with deaths.open("a") as file:
                file.write("one\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return really(what, output, parameters, *more)

    monkeypatch.setattr(grids, "run_notebook", run_notebook)
    with distributed.LocalCluster(1, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster, \
            distributed.Client(cluster) as client:
        table = grid("04_stage1", {"dataset": shop, "backbone": "bpr"} | QUICK, {}, [0, 1], client=client, papermill=False)
    assert table.status.tolist() == ["finished", "failed"] and deaths.read_text().count("one") == 4
    assert "KilledWorker" in table.error[1]


def test_two_cells_that_are_one_run_keep_what_it_cost(shop, runs, here):
    base = {"dataset": shop, "backbone": "bpr", **QUICK}
    table, again = (grid("04_stage1", base, {"what": {"defaults": {}, "the same": {"lr": 1e-3}}}, [0], "twice", at_once=1)
                    for _ in range(2))
    assert table.key.nunique() == 1 and again.reused.all() and len(here) == 2  # none by the second call
    assert again.seconds.tolist() == [table.seconds[0]] * 2


def test_a_cluster_whose_worker_dies(shop, runs):
    "Two worker processes; one is killed with its first run, and all runs are there at the end."
    distributed = pytest.importorskip("distributed", reason="pip install -e '.[cluster]'")
    base = {"dataset": shop, "backbone": "bpr", **QUICK, "epochs": 300, "patience": 300}
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster, \
            distributed.Client(cluster) as client, ThreadPoolExecutor(1) as pool:
        table = pool.submit(grid, "04_stage1", base, {"emb_size": [8, 16, 32]}, [0], "cluster", client=client)
        while not list((runs / "stage1").glob("*/*/run.json")):
            assert not table.done(), table.result()
            time.sleep(0.05)
        pids = client.run(os.getpid)
        busy = next(worker for worker, tasks in client.processing().items() if tasks)
        os.kill(pids[busy], signal.SIGKILL)
        table = table.result()
    assert (table.status == "finished").all(), table.error.tolist()
    assert len(pids) == 2 and table.key.nunique() == 3 and not table.reused.any()


STOPPED = """
if __name__ == "__main__":
    import dask.distributed as d
    from ptmrec.grids import grid

    with d.LocalCluster(2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
        with d.Client(cluster) as client:
            grid("04_stage1", {base}, {{"emb_size": [8, 16, 32]}}, [0], "stopped", client=client)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc, as on Linux")
@pytest.mark.parametrize("to_group", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ctrl_c_ends_the_runs_on_a_cluster(shop, runs, here, tmp_path, to_group):
    "To the process alone, as by the Stop button, and to all, as in a terminal: no process is left, and the call goes on."
    pytest.importorskip("distributed", reason="pip install -e '.[cluster]'")
    base = {"dataset": shop, "backbone": "bpr", **QUICK, "epochs": 100_000, "patience": 100_000}
    (tmp_path / "stopped.py").write_text(STOPPED.format(base=base))
    first = subprocess.Popen([sys.executable, tmp_path / "stopped.py"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    while len(list((runs / "stage1").glob("*/*/run.json"))) < 2:
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    started = below(first.pid)
    (os.killpg if to_group else os.kill)(first.pid, signal.SIGINT)
    said, _ = first.communicate(timeout=400)
    for _ in range(2400):
        if not any(map(alive, started)):
            break
        time.sleep(0.05)
    assert not any(map(alive, started)) and first.returncode != 0
    assert "Stopped: 0 of 3 runs are done" in said and "The same call goes on." in said, said
    left = [path.name for path in (runs / "stage1").rglob("*") if path.is_file() and "lock" not in path.name]
    assert set(left) <= {"run.json", "checkpoint.pt"}, left
    table = grid("04_stage1", base | {"epochs": 1}, {"emb_size": [8]}, [0], "stopped", at_once=1)
    assert table.status.tolist() == ["finished"]


def test_a_process_that_dies_says_so(tmp_path):
    outcome = run_notebook(str(tmp_path / "none.ipynb"), str(tmp_path / "out.ipynb"), {})
    assert "ended with status 1" in outcome["error"] and "none.ipynb" in outcome["error"]


def test_a_process_whose_grid_was_killed_leaves_its_output_alone(tmp_path):
    "And no answer that nobody reads any more."
    command = [sys.executable, "-m", "ptmrec.processes", "builtins.print", tmp_path / "out.txt", '{"end": "!"}']
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert said.splitlines()[-1] == '{"error": null}' and os.listdir(tmp_path) == ["out.txt"]


LEFT = """
import os, subprocess, sys, time
if sys.argv[1] == "parent":
    subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[3], sys.argv[2]])
    time.sleep(600)
from ptmrec.processes import exit_with_parent
if sys.argv[1] == "as on Windows":
    parent = os.getppid()
    os.getppid = lambda: parent
exit_with_parent()
print("ready", flush=True)
time.sleep(30)
print("left behind", flush=True)
"""


@pytest.mark.parametrize("where", ["here", "as on Windows"])
def test_a_process_ends_with_its_parent(where):
    "The number of a parent that is gone stays the same on Windows; elsewhere a parent may be gone and not buried."
    command = [sys.executable, "-c", LEFT, "parent", LEFT, where]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    if where == "as on Windows":
        parent.wait()
    assert parent.stdout.read() == ""
    parent.wait()


# ---------------------------------------------------------------- the engine, without


@pytest.mark.parametrize("arguments, message", [
    (("05_stage3", {}, {}, [0]), "cannot be run by a grid. Did you mean 05_stage2"),
    (("05_stage2", {"seed": 3}, {}, [0]), "A grid sets seed itself"),
    (("05_stage2", {}, {"n_ctx": []}, [0]), "n_ctx has no values"),
    (("05_stage2", {}, {"n_ctx": [2]}, []), "seeds has no values"),
    (("05_stage2", {}, {"n_ctx": [2, -1]}, [0]), "Cell 'n_ctx -1': n_ctx=-1 is not allowed"),
    (("05_stage2", {}, {"method": {"LoRA": {"tuning": "lora", "n_ctx": 2}}}, [0]), "Cell 'method LoRA': n_ctx is a setting"),
    (("04_stage1", {"tau": 1.0}, {}, [0]), "run_stage1 has no parameter tau"),
])
def test_wrong_grids_stop_before_anything_starts(runs, here, arguments, message):
    with pytest.raises(SettingError, match=message):
        grid(*arguments)
    assert not here and not runs.exists()


@pytest.mark.parametrize("wrong, message", [
    ({"at_once": -1}, "at_once=-1 is not allowed: it must be a whole number at least 1"),
    ({"at_once": 0}, "at_once=0 is not allowed"), ({"threads": 0}, "threads=0 is not allowed"),
    ({"seeds": 2}, "seeds=2 is not a list of seeds"), ({"seeds": "01"}, "seeds='01' is not a list of seeds"),
    ({"seeds": np.arange(0)}, "seeds has no values"), ({"seeds": [0, 1, 0]}, "seeds has 0 twice")])
def test_wrong_numbers_of_runs_stop_before_anything_starts(shop, runs, here, wrong, message):
    with pytest.raises(SettingError, match=message):
        grid("04_stage1", {"dataset": shop, "backbone": "bpr"}, {}, **wrong)
    assert not here and not runs.exists()


@pytest.mark.parametrize("base, axes, message", [
    ({"seed": 1}, {}, "A grid sets seed itself"), ({}, {"seed": [0, 1]}, "A grid sets seed itself"),
    ({}, {"how": {"anew": {"rerun": True}}}, "A grid sets rerun itself"),
    ({}, {"lr": [1e-3, 1e-2], "how": {"slow": {"lr": 1e-4}}}, "Two axes change lr.")])
def test_an_axis_that_would_change_nothing_is_refused(shop, base, axes, message):
    with pytest.raises(SettingError, match=message):
        plan("04_stage1", {"dataset": shop, "backbone": "bpr"} | base, axes, [0])


def test_what_only_this_process_knows_is_refused_and_other_metrics_do_no_harm(shop, runs, monkeypatch):
    how = {"dataset": shop, "backbone": "bpr", **QUICK}
    monkeypatch.setitem(METRICS, "first", lambda hits, n_pos, k: hits[:, 0])
    table = grid("04_stage1", how, {}, at_once=1, papermill=False)
    assert table.status.tolist() == ["finished"] and "test first@10" not in table
    run, = run_stage1(n_seeds=1, **how)
    assert run.key == table.key[0] and "first@10" in run.metrics()["test"]
    grid("04_stage1", how, {}, at_once=1, papermill=False)
    assert open_run(run.key).finished
    with pytest.raises(SettingError, match="metric=first@20 is your own, and the processes of a grid"):
        plan("04_stage1", how | {"metric": "first@20"}, {}, [0])
    with monkeypatch.context() as patch:
        patch.setitem(BACKBONES, "mine", type("Mine", (BACKBONES["bpr"],), {"__module__": "__main__"}))
        with pytest.raises(SettingError, match="backbone=mine is your own"):
            plan("04_stage1", how | {"backbone": "mine"}, {}, [0])
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "sounds"))
    np.save(Path(shop) / "audio_feat.npy", np.ones((37, 2)))
    with pytest.raises(SettingError, match="The modality audio is your own"):
        grid("04_stage1", how, {})


def test_two_rows_of_one_name_are_refused_before_anything_runs(shop, runs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ablations, "STUDIES", dict(STUDIES))

        @study("What does Stage 2 add to VBPR?")
        def frozen_and_tuned(dataset, base):
            return dict.fromkeys(("04_stage1", "05_stage2"), {"recommender": ablations.backbone_axis("vbpr")})

        with pytest.raises(SettingError, match="The study frozen_and_tuned has two rows 'VBPR'"):
            run_study("frozen_and_tuned", shop, seeds=(0,), base=dict(QUICK))
    assert not runs.exists()


def test_files_of_a_modality_of_ones_own_are_removed_and_dealt_out(tmp_path, monkeypatch):
    make_shop(tmp_path / "shop")
    add_sounds(tmp_path / "shop")
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "sounds", (".raw",), lambda paths: np.ones((len(paths), 2))))
    data = load_data(tmp_path / "shop")
    less = without(data, "audio", share=0.5)
    assert less.texts == data.texts and less.images == data.images and less.files["audio"].count(None) == 18
    dealt = shuffled(data, ["audio"])
    assert dealt.texts == data.texts and dealt.files["audio"] != data.files["audio"]
    assert {*dealt.files["audio"]} == {*data.files["audio"]}
    with pytest.raises(DataError, match="modality='sound' is not one of image, text, audio"):
        without(data, "sound")


def test_numbers_of_numpy_reach_other_processes_as_numbers(shop):
    cells = plan("04_stage1", {"dataset": shop, "backbone": "bpr", "lr": np.float64(0.01)},
                 {"emb_size": np.array([8, 16]), "ours": {"few": {"epochs": np.int64(2)}}}, np.arange(2))
    told = [json.loads(json.dumps(cell.params)) for cell in cells]
    assert [(p["emb_size"], p["seed"]) for p in told] == [(8, 0), (8, 1), (16, 0), (16, 1)]
    assert {(p["epochs"], p["lr"]) for p in told} == {(2, 0.01)} and cells[2].name == "16, few"


def test_cells_that_cannot_be_forecast_do_not_stop_the_others(shop, monkeypatch):
    def forecast(settings):
        if settings.n_ctx == 4:
            raise DataError("nothing to encode")
        return 1.0

    monkeypatch.setattr(grids, "forecast", forecast)
    cells = plan("05_stage2", {"dataset": shop, "device": "cpu"}, {"n_ctx": [4, 2]}, [0])
    assert grids.how_many("05_stage2", cells[:1]) >= 1 and grids.how_many("05_stage2", cells) >= 1


@pytest.mark.parametrize("how", [{}, {"tuning": "lora", "last_layers": 1, "cache_prefix": True}])
def test_a_forecast_encodes_no_more_than_a_batch(shop, monkeypatch, how):
    cell, = plan("05_stage2", {"dataset": shop, "device": "cpu", "stage2_batch_size": 8, "task_weight": 1.0} | how, {}, [0])
    whole, encode, need_of = [], ItemEncoder.encode_all, grids.need_of
    monkeypatch.setattr(grids, "need_of", lambda *how: (torch.manual_seed(0), need_of(*how))[1])  # of the same batch
    monkeypatch.setattr(ItemEncoder, "encode_all", lambda self, n: (whole.append(n), encode(self, n))[1])
    found = grids.forecast(cell.settings)
    assert not whole
    inputs = grids.load_inputs(cell.settings)
    encoder = grids.make_encoder(cell.settings, inputs)
    with encoder.tuning:
        model = grids.new_model(cell.settings, grids.new_backbone(cell.settings, inputs), encoder)
        assert whole and found == grids.need_of(model, "items", 8).total()


def test_cells_that_make_the_same_run_wait(shop):
    cells = plan("05_stage2", {"dataset": shop}, {"kt_weight": [1.0, 2.0]}, [0, 1])
    running, most = set(), 0

    def submit(cell):
        nonlocal most
        assert cell.params["seed"] not in {c.params["seed"] for c in running} or stage1 >= {cell.params["seed"]}
        running.add(cell)
        most = max(most, len(running))

        def work():
            if cell.params["seed"] not in stage1:
                side_by_side.wait(timeout=60)  # the first cell of each seed
            running.discard(cell), stage1.add(cell.params["seed"])
            return {"error": None}

        return pool.submit(work)

    stage1, side_by_side = set(), threading.Barrier(2)
    with ThreadPoolExecutor(4) as pool:
        run_cells(cells, submit, lambda cell: grids.claims("05_stage2", True, cell), at_once=4)
    assert {cell.status for cell in cells} == {"finished"} and most == 2


@pytest.mark.parametrize("gpus, most", [(["cuda:0"] * 3, 1), (["cuda:0", "cuda:1", "cuda:0"], 2), ([None] * 3, 3)])
def test_a_gpu_has_one_run_at_a_time(gpus, most):
    cells, running, seen, full = [Cell({}, {}, None) for _ in gpus], [], [], threading.Event()

    def submit(cell):
        running.append(cell)
        seen.append(len(running))
        if len(running) == most:
            full.set()

        def work():
            full.wait(60)
            time.sleep(0.05)  # one more would come now
            running.remove(cell)
            return {"error": None}

        return pool.submit(work)

    with ThreadPoolExecutor(3) as pool:
        run_cells(cells, submit, lambda cell: set(), at_once=3, alone_on=lambda cell: gpus[cells.index(cell)])
    assert max(seen) == most and {cell.status for cell in cells} == {"finished"}


@pytest.mark.parametrize("resources, n_gpus, device, asked", [
    ({"GPU": 1.0}, 1, "auto", {"GPU": 1}), ({}, 0, "auto", {}), ({}, 2, "cpu", {}), ({}, 2, "auto", None)])
def test_workers_say_how_many_gpus_they_have(resources, n_gpus, device, asked):
    client = SimpleNamespace(scheduler_info=lambda n_workers: {"workers": {"a": {"resources": resources}}},
                             run=lambda function: {"a": n_gpus})
    cells = [Cell({}, {}, SimpleNamespace(device=device))]
    if asked is None:
        with pytest.raises(SettingError, match="--resources 'GPU=1'"):
            grids.gpu_per_run(client, cells)
    else:
        assert grids.gpu_per_run(client, cells) == asked


def test_a_failed_maker_leaves_the_run_to_the_next():
    cells, order = [Cell({}, {}, None) for _ in range(3)], []

    def submit(cell):
        order.append(cells.index(cell))
        return pool.submit(lambda: {"error": "x" if len(order) == 1 else None})

    with ThreadPoolExecutor(3) as pool:
        run_cells(cells, submit, lambda cell: {"the same"}, at_once=3)
    assert order == [0, 1, 2] and [c.status for c in cells] == ["failed", "finished", "finished"]


def test_time_left_is_said_after_the_first_two(shop, capsys):
    cells = plan("04_stage1", {"dataset": shop, "backbone": "bpr"}, {}, range(6))
    assert time_left(cells, 2) == "0 of 6 runs are done."
    for cell in cells[:2]:
        cell.status, cell.outcome = "finished", {"seconds": 300.0}
    assert time_left(cells, 2) == "2 of 6 runs are done; about 10 min left."
    watch = Watch(cells, 2, "recall@20")
    watch.show(), watch.show()
    assert capsys.readouterr().out == "2 of 6 runs are done; about 10 min left.\n"


def test_a_run_that_is_there_counts_whoever_made_it(shop, runs, here):
    run, = run_stage1(dataset=shop, backbone="bpr", n_seeds=1, **QUICK)
    table = grid("04_stage1", {"dataset": shop, "backbone": "bpr", **QUICK}, {}, [0, 1], at_once=1)
    assert table.reused.tolist() == [True, False] and table.key[0] == run.key and [p["seed"] for p in here] == [1]


@pytest.mark.parametrize("name, test", [("metrics.json", True), ("per_user.parquet", True), ("history.csv", False)])
def test_the_same_grid_makes_a_damaged_run_anew(shop, runs, here, name, test):
    how = ("04_stage1", {"dataset": shop, "backbone": "bpr", **QUICK}, {}, [0])
    before = open_run(grid(*how, at_once=1, test=test).key[0])
    (before.folder / name).unlink()
    (before.folder / name).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=f"{name} .* is damaged"):
        table = grid(*how, at_once=1, test=test)
    assert table.status.tolist() == ["finished"] and not table.reused[0] and len(here) == 2
    assert open_run(table.key[0]).state == ("finished" if test else "trained")
    assert grid(*how, at_once=1, test=test).reused[0]


def test_a_damaged_run_is_listed_among_the_others(shop, runs):
    one, two = run_stage1(dataset=shop, backbone="bpr", n_seeds=2, **QUICK)
    (two.folder / "parameters.csv").write_bytes(b"")
    assert runs_table().set_index("key").state.to_dict() == {one.key: "finished", two.key: "damaged"}


# ---------------------------------------------------------------- statistics


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    users = pd.RangeIndex(80, name="user")
    level = rng.beta(1, 3, 80)
    return {name: ([pd.Series(level + rng.normal(0, 0.1, 80), users) for _ in range(3)],
                   [pd.Series(level + gain + rng.normal(0, 0.1, 80), users) for _ in range(3)])
            for name, gain in {"much": 0.1, "a little": 0.02, "nothing": 0.0}.items()}


def test_tests_are_scipys_and_holm_is_statsmodels(pairs):
    from statsmodels.stats.multitest import multipletests

    table = comparisons(pairs)
    for name, (before, after) in pairs.items():
        a, b = (pd.concat(seeds, axis=1).mean(axis=1) for seeds in (before, after))
        assert np.isclose(table.p[name], stats.ttest_rel(b, a).pvalue)
        assert np.isclose(table.p_wilcoxon[name], stats.wilcoxon(b - a).pvalue)
        assert np.isclose(table.difference[name], (b - a).mean()) and table.users[name] == 80 and table.seeds[name] == 3
    by_hand = np.maximum.accumulate(np.sort(table.p.astype(float)) * [3, 2, 1]).clip(max=1)
    assert np.allclose(np.sort(table.p_holm.astype(float)), by_hand)
    assert np.allclose(table.p_holm.astype(float), multipletests(table.p.astype(float), method="holm")[1])
    undecided = (table.p_holm >= 0.05).sum()
    assert 0 < undecided < 3  # Holm holds them against 0.05 divided by how many they are
    before, after = pairs["nothing"]
    d = pd.concat([b - a for a, b in zip(before, after)], axis=1).mean(axis=1)
    assert np.isclose(table.smallest["nothing"], smallest_gain(d, level=0.05 / undecided))


def test_the_bootstrap_covers_and_seeds_widen_it():
    rng = np.random.default_rng(1)
    covered = {"users": 0, "both": 0}
    for _ in range(100):
        table = rng.normal(0, 1, (60, 1)) + rng.normal(0, 0.4, (1, 5)) + rng.normal(0, 0.5, (60, 5))
        for name, values in (("users", table.mean(1, keepdims=True)), ("both", table)):
            low, high = bootstrap_interval(values, draws=400)
            covered[name] += low <= 0 <= high
    assert covered["users"] < 85 <= covered["both"]  # by users alone, the seeds' part of the error is missing
    one = rng.normal(0.2, 1, (200, 1))
    reference = stats.bootstrap((one[:, 0],), np.mean, method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert np.allclose(bootstrap_interval(one, draws=4000), reference, atol=0.02)


@pytest.mark.parametrize("n, level, known", [(50, 0.05, True), (1500, 0.05, True),  # there statsmodels answers with an array
                                             (20, 0.05 / 60, True), (5, 0.05 / 60, False), (3, 0.05 / 60, False)])
def test_the_smallest_gain_has_its_power_or_is_not_known(n, level, known):
    "Against the noncentral t distribution; statsmodels misses it for a few users and says nothing."
    difference = np.random.default_rng(2).normal(0, 0.3, n)
    effect = smallest_gain(difference, level=level) / difference.std(ddof=1)
    critical = stats.t.ppf(1 - level / 2, n - 1)
    power = stats.nct.sf(critical, n - 1, effect * n**0.5) + stats.nct.cdf(-critical, n - 1, effect * n**0.5)
    assert abs(power - 0.8) < 1e-3 if known else np.isnan(power)
    assert np.isnan(smallest_gain(np.zeros(50)))


def test_verdicts_in_words(pairs):
    table = comparisons(pairs | {"itself": (pairs["much"][0], pairs["much"][0])})
    words = {name: in_words(name, row, "Recall@10", "Stage 1") for name, row in table.iterrows()}
    assert words["much"].endswith(" after Holm: better.")
    worse = comparisons({"much": pairs["much"][::-1]}).loc["much"]
    assert in_words("much", worse, "Recall@10", "Stage 1").endswith(" after Holm: worse.")
    assert f"cannot tell with 80 users; the smallest gain that this data could show is {table.smallest['nothing']:.4f}" in \
        words["nothing"]
    assert words["itself"].endswith("cannot tell with 80 users; all are equal.")
    with pytest.raises(DataError, match="3 and 2 seeds cannot be paired"):
        comparisons({"x": (pairs["much"][0], pairs["much"][1][:2])})


def test_all_of_a_comparison_is_over_the_users_that_every_run_has():
    few, many = pd.Series([0.3, 0.3, 0.5]), pd.Series([0.1, 0.2, 0.3, 0.9])
    row = comparisons({"x": ([many], [few])}).loc["x"]
    assert row.users == 3 and row.before == pytest.approx(0.2) and row.after - row.before == pytest.approx(row.difference)
    row = comparisons({"x": ([many] * 2, [many + 0.1, few])}).loc["x"]
    assert row.users == 3 and row.difference == pytest.approx((0.1 + 0.5 / 3) / 2) and row.low <= row.difference <= row.high


def test_tables_and_figures_in_all_formats(tmp_path):
    values = {"a_1": {"R@10 %": [0.1, 0.3]}, "b & c": {"R@10 %": [0.4, 0.2], "N": [0.5]}}
    assert result_text(values).loc["b & c"].tolist() == ["0.3000 ± 0.1414", "0.5000"] and result_text(values).N["a_1"] == ""
    saved = save_result(tmp_path / "sub" / "result.v1", values, [("b & c", "R@10 %")], "x|y")
    files = {path.suffix: path.read_text() for path in saved}
    assert r"b \& c & \textbf{0.3000 $\pm$ 0.1414}$^*$ & \textbf{0.5000} \\" in files[".tex"]
    assert r"a\_1 & 0.2000 $\pm$ 0.1414 &  \\" in files[".tex"]
    assert r"R@10 \%" in files[".tex"] and r"\toprule" in files[".tex"]
    assert files[".md"].splitlines()[0] == "| x\\|y | R@10 % | N |" and "**0.3000 ± 0.1414***" in files[".md"]
    assert not [path for path in save_result(tmp_path / "plain", values, bold=False) if "**" in path.read_text()
                or "textbf" in path.read_text()]
    table = pd.read_csv(tmp_path / "sub" / "result.v1.csv")
    assert table.value.tolist() == [0.1, 0.3, 0.4, 0.2, 0.5]
    assert table.significant.tolist() == [False, False, True, True, False]
    figure, ax = ablations.plt.subplots()
    starts = [path.read_bytes()[:5] for path in save_figure(tmp_path / "figure", figure)]
    ablations.plt.close(figure)
    assert starts[0][1:4] == b"PNG" and starts[1] == b"<?xml" and starts[2] == b"%PDF-"


# ---------------------------------------------------------------- derived data sets


def test_derived_data_sets_change_one_thing(shop, tmp_path):
    data = load_data(shop)
    n_train, held_out = len(data.inter.part("train")[0]), (data.inter.split > 0).sum()
    half = thinned(data, 0.5)
    assert abs(len(half.inter.part("train")[0]) - n_train / 2) < 0.1 * n_train and (half.inter.split > 0).sum() == held_out
    assert len(np.unique(half.inter.item)) == data.inter.n_items and half.texts == data.texts

    cold = with_cold_items(data, 0.2)
    assert cold.inter.cold("item").sum() == round(0.2 * data.inter.n_items) and (cold.inter.split > 0).sum() == held_out
    with pytest.raises(DataError, match="items have a validation and a test interaction. Take a share"):
        with_cold_items(data, 0.99)

    null = shuffled(data, ("image",))
    assert null.images != data.images and null.texts == data.texts and set(null.images) == set(data.images)
    both = shuffled(data)
    assert {*zip(both.images, both.texts)} == {*zip(data.images, data.texts)} and both.texts != data.texts

    gone = without(data, "text", 1.0)
    assert not any(gone.texts) and gone.images == data.images
    for name, each in {"half": half, "cold": cold, "both": both, "gone": gone, "small": miniature(data, 20)}.items():
        assert load_data(write_data(each, tmp_path / name)).fingerprint() == each.fingerprint(), name


def test_a_miniature_has_the_rows_of_its_own_items(shop, monkeypatch):
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "songs", endings=(".raw",), encode=len))
    Path(shop, "audio").mkdir()
    for item in range(0, 37, 2):
        Path(shop, "audio", f"{item}.raw").touch()
    data = load_data(shop)
    small = miniature(data, 2)
    ids = small.inter.item_ids
    assert len(ids) < 37 and small.items.index.tolist() == [str(item) for item in ids]
    assert [path and path.stem for path in small.files["audio"]] == [None if item % 2 else str(item) for item in ids]
    titles = item_statistics(small).title
    assert titles.str.strip().tolist() == [text.strip() for text in small.texts] and titles.str.strip().any()


def test_an_item_without_a_picture_finds_no_other(tmp_path):
    "Items are numbered as pictures are, so that an item could find the picture of another by its own number."
    half = without(load_data("sample"), "image", 0.5)
    again = load_data(write_data(half, tmp_path / "half"))
    assert [path is None for path in again.images] == [path is None for path in half.images]
    assert again.fingerprint() == half.fingerprint()


@pytest.mark.parametrize("target", [lambda path: os.path.join("..", "photos", path.name), Path.absolute])
def test_pictures_that_are_links_are_kept(shop, tmp_path, target):
    Path(shop, "images").rename(Path(shop, "photos"))
    Path(shop, "images").mkdir()
    for picture in Path(shop, "photos").iterdir():
        Path(shop, "images", picture.name).symlink_to(target(picture))
    data = load_data(shop)
    again = load_data(write_data(data, tmp_path / "again"))
    assert sum(p is not None for p in again.images) == 36 and again.fingerprint() == data.fingerprint()


def test_data_are_written_to_a_folder_of_their_own(tmp_path):
    "Once more is no harm, other data would mix: a picture of theirs would be taken for one of these."
    data = miniature(load_data("sample"), 20)
    folder = write_data(data, tmp_path / "mine")
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_data(data, folder) == folder and {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    for there in (folder, tmp_path):
        with pytest.raises(DataError, match=f"{there} is not empty, and has other files than those of 'sample'"):
            write_data(shuffled(data), there)
    assert load_data(folder).fingerprint() == data.fingerprint()


@pytest.mark.parametrize("kind", [str, int, "a{}".format])
def test_ids_and_texts_are_written_as_they_are(tmp_path, kind):
    "Numbers as text sort as text, so as numbers they would be other data; a title may look like nothing."
    ids = [kind(n) for n in range(12)]
    pairs = pd.MultiIndex.from_product([ids, ids], names=["user", "item"]).to_frame(index=False)
    data = RecData.from_frames(pairs, pd.DataFrame({"item": ids[:3], "title": ["nan", " NaN", "007"]}))
    folder = write_data(data, tmp_path / "mine")
    again = load_data(folder)
    assert again.texts == data.texts and again.inter.item_ids.tolist() == data.inter.item_ids.tolist()
    assert again.fingerprint() == data.fingerprint() and write_data(data, folder) == folder


def test_what_a_killed_process_left_of_a_derived_data_set_is_not_used(runs):
    folder = derive("sample", miniature, n_users=20)
    right, picture = load_data(folder).fingerprint(), next((folder / "pictures").iterdir())
    (folder / "interactions.parquet").unlink()  # the last file to be written
    picture.unlink()
    picture.write_bytes(b"of another item")
    assert derive("sample", miniature, n_users=20) == folder and load_data(folder).fingerprint() == right


def test_ready_made_features_are_derived_too(shop, tmp_path):
    data = random_features(load_data(shop), {"image": 8, "text": 4})
    again = load_data(write_data(data, tmp_path / "random"))
    assert {m: f.shape[1] for m, f in again.features.items()} == {"image": 8, "text": 4}
    assert all(np.array_equal(again.features[m], f) for m, f in data.features.items())
    null, gone = shuffled(data, ("text",)), without(data, "image", 0.5)
    assert np.array_equal(null.features["image"], data.features["image"])
    assert not np.array_equal(null.features["text"], data.features["text"])
    changed = (gone.features["image"] != data.features["image"]).any(1)
    assert changed.sum() == round(0.5 * data.inter.n_items) and len(np.unique(gone.features["image"][changed], axis=0)) == 1


def test_pictures_beside_features_of_a_third_modality_are_derived(shop, monkeypatch):
    "Such features do not put them aside in training either."
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "songs"))
    np.save(f"{shop}/audio_feat.npy", np.random.default_rng(0).normal(size=(37, 4)).astype(np.float32))
    data = load_data(shop)
    null, gone = shuffled(data, ("image",)), without(data, "image")
    assert null.images != data.images and set(null.images) == set(data.images) and null.texts == data.texts
    assert not any(gone.images) and all(np.array_equal(d.features["audio"], data.features["audio"]) for d in (null, gone))
    songs = shuffled(data, ("audio",))
    assert songs.texts == data.texts and not np.array_equal(songs.features["audio"], data.features["audio"])


def test_random_features_take_the_place_of_files(shop, tmp_path, monkeypatch):
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "songs", endings=(".raw",), encode=len))
    Path(shop, "audio").mkdir()
    Path(shop, "audio", "0.raw").touch()
    data = random_features(load_data(shop), {"image": 4, "audio": 4})
    assert load_data(write_data(data, tmp_path / "random")).fingerprint() == data.fingerprint()


def test_controls_run_on_items_whose_ids_are_text(shop, runs):
    "Ready-made features have a row per item number, and an Amazon item has none."
    for name in ("interactions", "items"):
        table = pd.read_csv(f"{shop}/{name}.csv")
        table.assign(item="B" + table.item.astype(str)).to_csv(f"{shop}/{name}.csv", index=False)
    for picture in list(Path(shop, "images").iterdir()):
        picture.rename(picture.with_name(f"B{picture.name}"))
    control = STUDIES["controls"].axes(shop, QUICK)["04_stage1"]["control"]["Stage 1, random features"]
    before, after = load_data(shop).inter, load_data(control["dataset"]).inter
    assert before.item_ids[0] == "B0" and after.item_ids.tolist() == list(range(37))
    assert all(np.array_equal(getattr(before, part), getattr(after, part)) for part in ("user", "item", "split", "user_ids"))
    assert run_stage1(backbone="vbpr", **QUICK | control)[0].finished


def test_studies_derive_from_the_data_as_the_runs_read_it(shop):
    "A study with a k-core takes things away from that core, and a run does not cut the derived data set once more."
    axes = STUDIES["sparsity"].axes(str(shop), {"core": 7, "split": "random", "split_seed": 3})["05_stage2"]["training data"]
    core = load_data(shop, core=7, split="random", split_seed=3).inter
    assert core.n_users < load_data(shop).inter.n_users
    changes = axes["50% of them"]
    thin = load_data(changes["dataset"], **{name: changes[name] for name in ("core", "split", "split_seed")}).inter
    assert list(thin.user_ids) == list(core.user_ids) and list(thin.item_ids) == list(core.item_ids)
    for split in ("valid", "test"):
        assert all(np.array_equal(a, b) for a, b in zip(thin.part(split), core.part(split)))
    assert abs(len(thin.part("train")[0]) - len(core.part("train")[0]) / 2) < 0.1 * len(core.part("train")[0])


# ---------------------------------------------------------------- yardsticks


@pytest.fixture
def R(shop):
    return training_matrix(load_data(shop).inter)


def test_yardsticks_are_their_dense_formulas(R):
    dense = R.toarray().astype(float)
    assert np.array_equal(popular(R, {}), dense.sum(0))

    B = ease(R, {}, l2=7.0)  # column j: ridge regression of item j on all others
    for j in (0, 5, 20):
        others = np.arange(dense.shape[1]) != j
        X = dense[:, others]
        w = np.linalg.solve(X.T @ X + 7.0 * np.eye(X.shape[1]), X.T @ dense[:, j])
        assert np.allclose(B[others, j], w, atol=1e-5) and B[j, j] == 0

    knn = item_knn(R, {}, k=4, shrink=2.0)
    for i in (0, 7):
        lengths = np.linalg.norm(dense, axis=0)
        cosine = np.array([dense[:, i] @ dense[:, j] / (lengths[i] * lengths[j] + 2.0) for j in range(dense.shape[1])])
        cosine[i] = -1
        assert np.allclose(np.sort(knn[i])[-4:], np.sort(cosine)[-4:], atol=1e-6)
        assert (knn[i] != 0).sum() <= 4 and knn[i, i] == 0

    f = {m: torch.randn(R.shape[1], 6, generator=torch.Generator().manual_seed(n)) for n, m in enumerate(("image", "text"))}
    near = feature_knn(R, f, k=3)
    cosine = sum(torch.nn.functional.cosine_similarity(x[2], x) for x in f.values()) / 2
    cosine[2] = -9
    assert set(near[2].nonzero()[0]) == set(cosine.topk(3).indices.tolist())
    assert np.allclose(near[2][near[2].nonzero()], cosine[near[2].nonzero()[0]], atol=1e-6)


def test_scores_are_rows_times_matrix(shop, R):
    inter, B = load_data(shop).inter, ease(R, {}, l2=7.0)
    per_user, lists = Evaluator(inter)("test", *as_embeddings(R, B))
    scores = R.toarray() @ B
    scores[R.toarray() > 0] = -np.inf
    for place, user in enumerate(per_user.index[:20]):
        best = scores[user][lists[place, :5]]
        assert np.allclose(best, np.sort(scores[user])[::-1][:5], atol=1e-5)


def test_a_yardstick_is_a_run(shop, runs, monkeypatch):
    run = run_yardstick("item_knn", dataset=shop)
    trials = run.load_table("trials.csv")
    assert len(trials) == 20 and trials["valid recall@20"][0] == run.metrics()["valid"]["recall@20"]
    stage1, = run_stage1(dataset=shop, backbone="bpr", n_seeds=1, **QUICK)
    assert compare(stage1, run)["users"] == 60
    monkeypatch.setattr("ptmrec.yardsticks.score_yardstick", lambda *_: pytest.fail("made once more"))
    assert run_yardstick("item_knn", dataset=shop).key == run.key
    with pytest.raises(SettingError, match="Yardstick 'easy' is not known. Did you mean ease"):
        run_yardstick("easy", dataset=shop)
    assert {name for name in runs_table("yardstick").backbone} == {"item_knn"}


def test_yardsticks_ask_nothing_of_data_that_only_training_needs(tmp_path, runs):
    "A user with all items in training, and fewer items than an item graph has neighbours."
    rows = [(0, item, 0) for item in range(8)]
    rows += [(user, (user + n) % 8, label) for user in range(1, 10) for n, label in enumerate((0, 0, 0, 1, 2))]
    (tmp_path / "few").mkdir()
    pd.DataFrame(rows, columns=["user", "item", "x_label"]).to_csv(tmp_path / "few" / "interactions.csv", index=False)
    np.save(tmp_path / "few" / "text_feat.npy", np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
    for name in YARDSTICKS:
        assert run_yardstick(name, dataset=tmp_path / "few").metrics()["test"]["recall@5"] > 0
    with pytest.raises(DataError, match="User '0' has all 8 items"):
        run_stage1(dataset=tmp_path / "few", backbone="bpr", **QUICK)


def test_a_damaged_yardstick_is_made_anew_by_one_process_at_a_time(shop, runs, monkeypatch):
    made, score = [], yardsticks.score_yardstick

    def alone(run, *more):
        made.append(run.target.with_name(f"{run.key}.lock").exists())
        return score(run, *more)

    monkeypatch.setattr(yardsticks, "score_yardstick", alone)
    run = run_yardstick("popular", dataset=shop)
    (run.folder / "per_user.parquet").unlink()
    (run.folder / "per_user.parquet").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="per_user.parquet .* is damaged"):
        again = run_yardstick("popular", dataset=shop)
    assert len(again.load_table("per_user.parquet")) == 60 and made == [True, True]


def test_a_yardstick_is_made_anew_by_rerun_and_for_another_encoder(tmp_path, runs, monkeypatch):
    make_shop(tmp_path / "shop")
    add_sounds(tmp_path / "shop")
    encoders = {"first": lambda paths: [[*map(float, path.read_bytes())] for path in paths],
                "second": lambda paths: [[float(path.read_bytes()[1])] * 2 for path in paths]}
    made = {}
    for name, encode in encoders.items():
        monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "sounds", (".raw",), encode))
        made[name] = run_yardstick("feature_knn", dataset=tmp_path / "shop")
        stage1, = run_stage1(dataset=tmp_path / "shop", n_seeds=1, **QUICK)
    assert made["first"].key != made["second"].key and len(stage1.item_features()["audio"]) == 37
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "sounds", (".raw",), encoders["first"]))
    with pytest.raises(DataError, match="The encoder of 'audio' has changed since run"):
        stage1.item_features()
    before = (made["first"].folder / "metrics.json").stat().st_mtime_ns
    for rerun in (False, True):
        again = run_yardstick("feature_knn", dataset=tmp_path / "shop", rerun=rerun)
        assert again.key == made["first"].key and ((again.folder / "metrics.json").stat().st_mtime_ns > before) == rerun


def test_a_yardstick_knows_its_data_and_encoder_and_says_that_it_keeps_no_embeddings(shop, runs):
    run = open_run(run_yardstick("feature_knn", dataset=shop, core=2).key)
    assert run.data().fingerprint() == load_data(shop, core=2).fingerprint()
    assert run.encoder().text("a mug").ndim == 1
    with pytest.raises(DataError, match="is a yardstick's, and those keep no embeddings. Its lists of 20"):
        run.recommend()


def test_yardsticks_are_ranked_where_the_evaluator_is(R, monkeypatch):
    asked = []

    def evaluator(split, user_emb, item_emb):
        asked.append((str(user_emb.device), item_emb.device.type))
        return pd.DataFrame({"recall@20": [0.5]}), None

    evaluator.masked = {"valid": SimpleNamespace(item=torch.empty(0, device="meta"))}
    yardsticks.choose_yardstick("popular", R, {}, evaluator, "recall@20")
    assert asked == [("meta", "meta")]
    given = []
    monkeypatch.setattr(ablations, "run_yardstick", lambda name, **how: given.append(how))
    ablations.yardstick_rows("sample", {"device": "cpu", "mask_valid": True, "core": 5, "tau": 0.1, "lr": 0.01})
    assert given == [{"dataset": "sample", "device": "cpu", "mask_valid": True, "core": 5}] * len(YARDSTICKS)


# ---------------------------------------------------------------- studies


def test_every_study_asks_for_what_the_experiments_take(shop, runs):
    "On the sample, or photographs: all settings of all cells are right, and references are rows."
    base = {"epochs": 2, "stage2_epochs": 1, "batch_size": 64}
    for name, it in STUDIES.items():
        data = shop if name == "another_domain" else "sample"
        asked = it.axes(data, base)
        if it.tuned:
            asked = {n: {"trial": {t: c for t, (_, c) in draw_trials(axes, 12).items()}} for n, axes in asked.items()}
        given = {"05_stage2": base, "04_stage1": ablations.stage1_settings(base)}
        planned = [cell for notebook, axes in asked.items()
                   for cell in plan(notebook, given[notebook] | {"dataset": data}, axes, [0])]
        names = {cell.name for cell in planned} | {*(METHODS if it.tuned else ())}
        names |= {BEST_YARDSTICK} if it.yardsticks else set()
        assert len(planned) >= 2 and (it.reference is None or it.reference in names), name


def test_wrong_studies():
    with pytest.raises(SettingError, match="experiment='promts' is not known. Did you mean prompts"):
        check_study("promts", "recall@10")
    with pytest.raises(DataError, match="No data set 'sampel'"):
        run_study("prompts", "sampel")


@pytest.mark.parametrize("base, message", [
    ({"epoch": 2}, "base sets epoch, which neither stage has. Did you mean epochs"),
    ({"dataset": "baby"}, "base sets dataset, which a study sets itself"), ({"seed": 1}, "base sets seed, which a study"),
    ({"n_seeds": 2}, "base sets n_seeds"), ({"rerun": True}, "base sets rerun")])
@pytest.mark.parametrize("name", ["yardsticks", "knowledge_transfer"])
def test_a_wrong_base_stops_every_study(shop, runs, here, name, base, message):
    with pytest.raises(SettingError, match=message):
        run_study(name, shop, [0], QUICK | base, at_once=1)
    assert not here and not runs.exists()


@pytest.mark.parametrize("name, base, cell, settings", [
    ("knowledge_transfer", {"task_weight": 1.0}, "transfer alone", {"kt_weight": 1.0, "task_weight": 0.0}),
    ("knowledge_transfer", {"kt_weight": 0.0}, "task loss and transfer", {"kt_weight": 1.0, "task_weight": 1.0}),
    ("knowledge_transfer", {"kt_weight": 0.5}, "task loss and transfer", {"kt_weight": 0.5, "task_weight": 1.0}),
    ("main_table", {"training": "joint"}, "VBPR", {"training": "two_stage"}),
    ("joint_training", {"stage2_epochs": 3, "tau": 0.1}, "VBPR", {"training": "joint", "tau": 0.05}),
    ("cold_items", {"candidates": "warm", "eval_items": "warm", "negatives": "all"}, "VBPR",
     {"eval_items": "cold", "candidates": "cold", "negatives": "warm"}),
    ("batch_size", {"batch_by": "interactions"}, "32 items", {"batch_by": "items", "stage2_batch_size": 32}),
    ("controls", {"tuning": "lora"}, "prompts", {"tuning": "prompt"}),
    ("controls", {"rounds": 2}, "Stage 1", {"rounds": 1})])
def test_a_row_is_what_its_label_says_whatever_the_base(shop, runs, name, base, cell, settings):
    found = {c.name: c.settings for notebook, axes in STUDIES[name].axes(shop, base).items()
             for c in plan(notebook, (base if notebook == "05_stage2" else ablations.stage1_settings(base)) |
                           {"dataset": shop}, axes, [0])}
    assert {setting: getattr(found[cell], setting) for setting in settings} == settings


@pytest.mark.parametrize("missing, names, gone, wrong", [
    ("images", "pictures", "half of the texts gone", "the wrong texts"),
    ("items.csv", "texts", "half of the pictures gone", "the wrong pictures")])
def test_content_that_is_not_there_is_not_taken_away(shop, runs, missing, names, gone, wrong):
    "Such a row has the same data as the row beside it, or none at all, and would be read as an answer."
    path = Path(shop, missing)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, row in (("missing_modality", gone), ("null_content", wrong)):
        with pytest.warns(UserWarning, match=f"'shop' has no {names}, so rows that need some are left out: .*(all|wrong)"):
            rows = STUDIES[name].axes(shop, {"core": 2})["05_stage2"]["content"]
        assert list(rows) == ["as it is", row]


def test_a_study_of_content_wants_some(shop, runs):
    shutil.rmtree(f"{shop}/images")
    os.remove(f"{shop}/items.csv")
    for name in ("missing_modality", "null_content"):
        with pytest.raises(DataError, match="'shop' has no pictures and no texts, so this study has no rows"):
            STUDIES[name].axes(shop, {})


def test_yardsticks_that_know_interactions_alone_are_left_out_where_cold_items_are_ranked(shop, runs):
    cold = {"eval_items": "cold", "candidates": "cold"}
    with pytest.raises(SettingError, match="'popular' ranks by training interactions, .* Take feature_knn"):
        run_yardstick("popular", dataset=shop, **cold)
    table = pd.read_csv(f"{shop}/interactions.csv")
    table[(table.item >= 6) | (table.x_label > 0)].to_csv(f"{shop}/interactions.csv", index=False)
    rows = ablations.yardstick_rows(shop, cold)
    assert list(rows) == [yardsticks.YARDSTICK_NAMES["feature_knn"]] and rows.popitem()[1].values("recall@5")[0] > 0


def test_the_smallest_batches_by_items_and_by_interactions():
    rows = {"8 items": (0.2, 0.1), "16 items": (0.01, -0.1), "256 items": (0.01, 0.1), "32 interactions": (0.01, 0.1),
            "128 interactions": (0.01, 0.1)}
    table = pd.DataFrame(rows, ["p_holm", "difference"]).T
    says = ablations.smallest_that_works
    assert says(table) == "The smallest batch with a gain over Stage 1: 256 items, and 32 interactions."
    assert says(table[:3]).endswith(": 256 items.") and says(table[:1]).startswith("No batch has a significant gain")


def test_a_study_without_a_result_says_why(shop, runs, monkeypatch):
    outcome = {"seconds": 1.0, "peak_mb": 1.0, "error": "OSError: no space left"}
    monkeypatch.setattr(grids, "run_notebook", lambda *_: outcome.copy())
    with pytest.raises(DataError, match="None of the 3 runs has finished. The first error: OSError: no space left"):
        run_study("knowledge_transfer", shop, [0], QUICK, at_once=1)


def test_equal_budgets_choose_on_validation_and_hide_the_test(shop, runs, here):
    spaces = {"BPR": ({"backbone": "bpr"}, {"lr": [1e-5, 1e-3, 1e-1]}),
              "LightGCN": ({"backbone": "lightgcn"}, {"lr": [1e-4, 1e-2], "n_layers": [1, 2]})}
    base = {"dataset": shop, **{k: v for k, v in QUICK.items()}}
    trials, table = tune_equally("04_stage1", base, spaces, 3, [0, 1], "tuned", at_once=1)
    assert trials.method.value_counts().to_dict() == {"BPR": 3, "LightGCN": 3}
    kept = pd.read_parquet(runs / "grids" / "tuned-trials" / "table.parquet")
    assert not [c for c in (*trials, *kept) if "test" in c] and "valid recall@20" in kept
    states = trials.assign(state=[open_run(key).state for key in trials.key]).groupby("method").state
    assert states.value_counts().to_dict() == {(m, s): n for m in spaces for s, n in (("finished", 1), ("trained", 2))}
    for method, rows in trials.groupby("method"):
        winner = rows.loc[rows["valid recall@20"].idxmax()]
        assert (table[table.cell == method].lr == winner.lr).all()
    assert len(table) == 4 and len(here) == 6 + 4 and "test recall@20" in table  # two winners are trained already
    with pytest.raises(SettingError, match="budget=4 is more than the 3 cells in the space of BPR"):
        draw_trials(spaces, 4)


@pytest.fixture
def pretend(monkeypatch, runs):
    "Grids without runs: the set of labels that fail, {label: error}; the others have more and more on validation."
    fails = {}

    def made_up(notebook, base, axes, seeds, name, **how):
        (axis, changes), = axes.items()
        rows = [{"cell": told, axis: told, "seed": seed, "status": "failed" if told in fails else "finished",
                 "error": fails.get(told), "notebook": None, "metric": None if told in fails else "recall@20",
                 "valid recall@20": np.nan if told in fails else n / 10}
                for n, told in enumerate(changes, 1) for seed in seeds]
        return pd.DataFrame(rows)

    monkeypatch.setattr(ablations, "grid", made_up)
    return fails


SPACES = {"A": ({"backbone": "bpr"}, {"lr": [1e-3, 1e-2]}), "B": ({"backbone": "lightgcn"}, {"lr": [1e-3, 1e-2]})}


def test_trials_that_fail_hide_nothing(pretend):
    first, *others = draw_trials(SPACES, 2)
    pretend[first] = "OSError: weights missing"
    trials, table = tune_equally("04_stage1", {}, SPACES, 2, range(2), "x")
    assert trials.valid.isna().tolist() == [True, False, False, False]
    assert table.cell.tolist() == ["A", "A", "B", "B"]

    pretend[others[0]] = "OSError: weights missing"  # the whole of a method, which the others are compared with
    trials, table = tune_equally("04_stage1", {}, SPACES, 2, [0], "x")
    it = ablations.Study("Q?", None, "A", tuned=True)
    result = ablations.StudyResult(it, "shop", None, table, {"B": None}, trials)
    assert result.failed().cell.tolist() == [first, others[0]] and set(result.failed().error) == {pretend[first]}
    assert verdicts(result, comparisons({})) == "'A' has no finished run, so nothing is compared with it."

    pretend |= dict.fromkeys(others, "OSError: no space left")
    with pytest.raises(DataError, match="None of the 4 trials has finished. The first error: OSError: weights missing"):
        tune_equally("04_stage1", {}, SPACES, 2, [0], "x")


def test_all_rounds_of_optuna_are_kept(pretend, runs):
    pytest.importorskip("optuna", reason="pip install -e '.[optuna]'")
    pretend["A, trial 2"] = "OSError: no space left"
    trials, _ = tune_equally("04_stage1", {}, SPACES, 3, [0], "x", "optuna")
    kept = pd.read_parquet(runs / "grids" / "x-trials" / "table.parquet")
    assert kept.cell.tolist() == trials.cell.tolist() == [f"{m}, trial {n}" for n in (1, 2, 3) for m in SPACES]
    assert kept.changes.tolist() == trials.changes.tolist() and kept.valid.isna().sum() == 1


@pytest.mark.parametrize("sampler", ablations.SAMPLERS)
@pytest.mark.parametrize("budget", [0, -1, 1.5])
def test_a_budget_is_a_whole_number(pretend, sampler, budget):
    with pytest.raises(SettingError, match=f"budget={budget} is not allowed: it must be a whole number at least 1"):
        tune_equally("04_stage1", {}, SPACES, budget, [0], "x", sampler)


def test_a_space_may_have_values_that_are_no_numbers():
    space = {"similarity": ["cosine", "dot"], "micro_batch": [None, 4], "tune_backbone": [True, False]}
    drawn = draw_trials({"A": ({}, space)}, 8)
    assert len(drawn) == 8 and "A: similarity dot, micro_batch None, tune_backbone True" in drawn
    optuna = pytest.importorskip("optuna", reason="pip install -e '.[optuna]'")
    for _, cell in drawn.values():
        assert ablations.suggest(optuna.trial.FixedTrial(cell), space) == cell


def toy_row(*seeds):
    "A row with a run per seed, of 30 users."
    users = pd.DataFrame({"user": range(30), "recall@10": np.linspace(0, 1, 30)})
    return ablations.Row([SimpleNamespace(load_table=lambda name: users, metrics=dict, params={"seed": seed},
                                          about={"data": "toy"}) for seed in seeds], "")


def test_rows_without_a_common_seed_are_left_out_and_said():
    rows = {"A": toy_row(0, 1), "B": toy_row(1, 2), "C": toy_row(2)}
    against = ablations.compared(rows, "A", "recall@10")
    assert against.index.tolist() == ["B"] and against.seeds["B"] == 1
    result = ablations.StudyResult(ablations.Study("Q?", None, "A"), "shop", None, None, rows)
    assert verdicts(result, against).endswith("\n\n'C' has no seed in common with 'A', so they are not compared.")


@pytest.mark.parametrize("setting, value", [("eval_items", "cold"), ("eval_users", "warm"), ("mask_valid", True),
                                            ("candidates", "cold")])
def test_rows_that_were_evaluated_differently_are_not_compared(setting, value):
    rows = {"A": toy_row(0), "B": toy_row(0)}
    rows["B"].runs[0].params[setting] = value
    with pytest.raises(DataError, match=f"'B' and 'A' cannot be compared user by user: {setting} is {value!r} in the first"):
        ablations.compared(rows, "A", "recall@10")
    rows["A"].runs[0].params[setting] = value
    assert ablations.compared(rows, "A", "recall@10").index.tolist() == ["B"]


def fewer_users(data):
    "The data set without its first ten users, so that numbers are of others."
    kept = data.inter.user >= 10
    inter = ablations.replace(data.inter, user=data.inter.user[kept] - 10, item=data.inter.item[kept],
                              split=data.inter.split[kept], user_ids=data.inter.user_ids[10:])
    return ablations.replace(data, inter=inter)


@pytest.mark.parametrize("ids", [lambda user: user, lambda user: user.map("{:03d}".format), lambda user: user / 4])
def test_rows_are_compared_on_the_same_users_alone(shop, runs, here, monkeypatch, ids):
    "Whose numbers other data may give to other users."
    table = pd.read_csv(f"{shop}/interactions.csv", dtype={"item": "int"})
    table.assign(user=ids(table.user)).to_csv(f"{shop}/interactions.csv", index=False)
    same = {"all": {}, "half the training": {"dataset": str(derive(shop, thinned, share=0.5))}}
    other = {"without ten users": {"dataset": str(derive(shop, fewer_users))}}
    monkeypatch.setitem(STUDIES, "mine", ablations.Study("Which?", lambda *_: {"04_stage1": {"data": changes}}, "all"))
    base, changes = QUICK | {"backbone": "bpr"}, same
    against = write_result(run_study("mine", shop, [0], base, at_once=1))
    assert against.index.tolist() == ["half the training"] and against.users.tolist() == [60]

    changes = same | other
    result = run_study("mine", shop, [0], base, at_once=1)
    (result.folder / "result.md").write_text("earlier")
    with pytest.raises(DataError, match="'without ten users' and 'all' cannot be compared user by user: their data sets "
                                        "have different users. Leave out the row, or the study's reference"):
        write_result(result)
    assert (result.folder / "result.md").read_text() == "earlier"


def test_random_features_are_compared_with_those_of_the_same_users(shop, runs, here, monkeypatch):
    "As in the study of controls, whose data are not the same."
    axes = {"04_stage1": STUDIES["controls"].axes(shop, QUICK)["04_stage1"]}
    monkeypatch.setitem(STUDIES, "mine", ablations.Study("Which?", lambda *_: axes, STUDIES["controls"].reference))
    rows = run_study("mine", shop, [0], QUICK | {"backbone": "vbpr"}, at_once=1).rows
    assert len({row.runs[0].about["data"] for row in rows.values()}) == 2
    assert "Stage 1, random features" in ablations.compared(rows, "Stage 1", "recall@10").index


def test_the_reference_is_the_yardstick_that_is_best_on_validation(shop, runs, here, monkeypatch):
    axes = {"04_stage1": {"backbone": ["bpr"]}}
    monkeypatch.setitem(STUDIES, "mine", ablations.Study("Which?", lambda *_: axes, BEST_YARDSTICK, yardsticks=True))
    result = run_study("mine", shop, [0], QUICK, at_once=1)
    valid = {name: row.runs[0].metrics()["valid"]["recall@10"] for name, row in result.rows.items() if name != "bpr"}
    assert len(valid) == 4 and result.study.reference == max(valid, key=valid.get)
    against = ablations.compared(result.rows, result.study.reference, "recall@10")
    assert set(against.index) == set(result.rows) - {result.study.reference}
    monkeypatch.setattr(ablations, "yardstick_rows", lambda *_: {})  # none fits into memory
    result = run_study("mine", shop, [0], QUICK, at_once=1)
    against = ablations.compared(result.rows, result.study.reference, "recall@10")
    assert against.empty
    assert f"'{BEST_YARDSTICK}' has no finished run, so nothing is compared" in verdicts(result, against)


def test_at_once_is_checked_before_anything_is_made(shop, runs, here):
    with pytest.raises(SettingError, match="at_once=0 is not allowed"):
        run_study("sparsity", shop, [0], QUICK, at_once=0)
    assert not here and not runs.exists()


def test_a_study_of_stage1_with_yardsticks(shop, runs, here, monkeypatch):
    monkeypatch.setitem(STUDIES, "mine", None)
    study("Which?", yardsticks=True, reference="bpr")(lambda dataset, base: {"04_stage1": {"backbone": ["bpr", "lightgcn"]}})
    STUDIES["mine"] = STUDIES.pop("<lambda>")
    result = run_study("mine", shop, [0, 1], QUICK | {"tau": 0.1}, at_once=1)
    against = write_result(result)
    assert list(result.rows) == [*(ablations.YARDSTICK_NAMES[y] for y in YARDSTICKS), "bpr", "lightgcn"]
    assert set(against.index) == set(result.rows) - {"bpr"} and (against.seeds == 2).all() and not len(result.failed())
    by_hand = compare(result.rows["bpr"].runs, result.rows["EASE"].runs, "recall@10")
    assert np.isclose(against.difference["EASE"], by_hand["difference"]) and np.isclose(against.p["EASE"], by_hand["p"])
    assert "'EASE' against 'bpr', test Recall@10" in verdicts(result, against)
    written = {path.name for path in result.folder.iterdir()}
    assert {"result.md", "result.tex", "result.csv", "runs.parquet", "comparisons.csv"} <= written


def test_a_yardstick_that_does_not_fit_into_memory_is_no_row_and_says_so(shop, runs, monkeypatch):
    monkeypatch.setattr(yardsticks, "free_bytes", lambda device: 1000.0)
    with pytest.warns(UserWarning) as said:
        assert list(ablations.yardstick_rows(shop, QUICK)) == ["most popular"]
    words = [str(w.message) for w in said if "is no row of this study" in str(w.message)]
    assert len(words) == 3 and words[-1].startswith("EASE is no row of this study: EASE takes up to 0 GB for ")
    assert set(runs_table("yardstick").backbone) == {"popular"}


def test_stage2_through_papermill_in_a_study(shop, runs, monkeypatch):
    "The whole way: the notebook of Stage 2, its table, comparison with Stage 1, and figure."
    monkeypatch.setitem(STUDIES, "one", ablations.Study("One?", lambda dataset, base: {"05_stage2": {"n_ctx": [2]}}))
    result = run_study("one", shop, [0], QUICK | {"stage2_epochs": 1, "validate_every": 1, "prompt_depth": 2})
    assert result.table.status.tolist() == ["finished"], result.table.error.tolist()
    row = result.table.iloc[0]
    assert row.tuned_parameters > 0 and row["stage 1 test recall@20"] >= 0 and row.n_ctx == 2
    against = write_result(result)
    run = open_run(row.key)
    assert np.isclose(against.difference["2"], compare(run, run, "recall@10", ("stage1", None))["difference"])
    assert (result.folder / "result.md").read_text().count("\n| ") == 3  # a line, Stage 1, the row
    figure = plot_study(result)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["2"]
    ablations.plt.close(figure)
    assert resolve(grids.run_stage2.experiment, {"dataset": shop}).n_ctx == 8


@pytest.mark.parametrize("low, seeds, starts", [(0.2, 3, True), (0.0, 3, False), (0.2, 1, True)])
def test_a_figure_has_an_axis_around_the_data_and_seeds_below_their_mean(low, seeds, starts):
    values = pd.DataFrame([{"row": "a", "kind": kind, "value": low + 0.01 * s, "half": 0.005}
                           for kind in ("the Stage 1 it starts from", "tuned, best variant") for s in range(seeds)])
    figure = ablations.plot_values(values, "A question?", "recall@10")
    ax, = figure.axes
    assert ax.get_xlim()[0] == (pytest.approx(low, abs=0.02) if starts else 0) and ax.get_ylim()[0] > ax.get_ylim()[1]
    assert ("does not start at 0" in ax.get_xlabel()) == starts and ("seeds" in ax.get_xlabel()) == (seeds > 1)
    means, dots = ([line for line in ax.lines if line.get_marker() == marker] for marker in "o.")
    assert len(means) == 2 and [len(line.get_xdata()) for line in dots] == ([seeds] * 2 if seeds > 1 else [])
    heights = [line.get_ydata()[0] for pair in zip(means, dots) for line in pair]
    assert all(a < b for a, b in zip(heights, heights[1:]))
    ablations.plt.close(figure)


# ---------------------------------------------------------------- trials, samplers, buckets, encoders


def test_a_trial_of_stage2_scores_nothing_on_test_and_damage_is_made_anew(shop, runs, monkeypatch):
    seen = []
    ranks = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda self, split, *more: seen.append(split) or ranks(self, split, *more))
    how = {"dataset": shop, **QUICK, "stage2_epochs": 1, "n_ctx": 2, "prompt_depth": 2}
    tried = grids.run_cell("05_stage2", how, test=False)
    assert set(seen) == {"valid"} and tried.state == "trained" and not list(runs.rglob("metrics.json"))
    assert not [path for path in runs.rglob("*") if path.name in ("per_user.parquet", "topk.parquet")]
    best = best_variant([tried])
    weights = {side: w.clone() for side, w in tried.load_weights(f"embeddings_{best}").items()}

    (tried.folder / f"embeddings_{best}.safetensors").unlink()
    (tried.folder / f"embeddings_{best}.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=f"embeddings_{best}.safetensors .* is damaged"):
        again = grids.run_cell("05_stage2", how, test=False)
    assert all(torch.equal(w, weights[side]) for side, w in again.load_weights(f"embeddings_{best}").items())

    seconds = again.on_disk()["seconds"]
    won = grids.run_cell("05_stage2", how)
    assert won.state == "finished" and won.about["seconds"] > seconds and "test" in seen
    assert {v: m["valid"] for v, m in won.metrics().items() if v != "stage1"} == grids.validation(again)


def test_optuna_chooses_between_the_values_and_repeats_itself(shop, runs, here, monkeypatch):
    pytest.importorskip("optuna", reason="pip install -e '.[optuna]'")
    spaces = {"BPR": ({"backbone": "bpr"}, {"lr": [1e-4, 1e-1]}),
              "LightGCN": ({"backbone": "lightgcn"}, {"lr": [1e-4, 1e-2], "n_layers": [1, 4]})}
    trials, table = tune_equally("04_stage1", {"dataset": shop, **QUICK}, spaces, 3, [0], "tpe", "optuna", at_once=1)
    assert trials.method.value_counts().to_dict() == {"BPR": 3, "LightGCN": 3} and (table.status == "finished").all()
    for changes in map(json.loads, trials.changes):
        assert 1e-4 <= changes["lr"] <= 1e-1 and f"{changes['lr']:.3g}" == f"{changes['lr']:.10g}"
        assert changes.get("n_layers", 1) in (1, 2, 3, 4)
    n_runs = len(here)
    again, _ = tune_equally("04_stage1", {"dataset": shop, **QUICK}, spaces, 3, [0], "tpe", "optuna", at_once=1)
    assert again.changes.tolist() == trials.changes.tolist() and again.reused.all() and len(here) == n_runs
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SettingError, match="needs the package optuna: pip install"):
        tune_equally("04_stage1", {"dataset": shop, **QUICK}, spaces, 3, [0], "tpe", "optuna", at_once=1)


def test_values_among_some_items_are_those_of_a_dense_count(shop, runs):
    run, = run_stage1(dataset=shop, backbone="bpr", n_seeds=1, **QUICK)
    inter, lists = load_data(shop).inter, run.load_table("topk.parquet")
    items = np.arange(inter.n_items) % 3 == 0
    found = ablations.values_among(run, inter, items, "", "recall@10")
    expected = {}
    for user, item in zip(*inter.part("test")):
        if items[item]:
            shown = lists[(lists.user == inter.user_ids[user]) & (lists["rank"] <= 10)].item.tolist()
            expected.setdefault(user, []).append(inter.item_ids[item] in shown)
    assert found.to_dict() == {user: np.mean(hits) for user, hits in expected.items()} and 0 < found.mean() < 1
    parts = ablations.by_popularity({"BPR": ablations.Row([run], "")})
    assert len(parts) == 3 and (sum(row.among[1].astype(int) for row in parts.values()) == 1).all()


def test_values_among_items_count_what_the_run_counts(shop, runs):
    "Cold users and cold items, whom the run leaves out."
    table = pd.read_csv(f"{shop}/interactions.csv")
    cold = (table.user < 20) | (table.item < 5)
    table[~cold | (table.x_label > 0)].to_csv(f"{shop}/interactions.csv", index=False)
    run, = run_stage1(dataset=shop, backbone="bpr", n_seeds=1, eval_users="warm", eval_items="warm", **QUICK)
    inter = run.data().inter
    row = ablations.Row([run], "", (inter, np.ones(inter.n_items, bool)))
    for metric in ("recall@10", "ndcg@20"):
        pd.testing.assert_series_equal(row.per_user(metric)[0], ablations.Row([run], "").per_user(metric)[0])
    assert 0 < len(row.per_user("recall@10")[0]) < 40
    assert not any("up to 0 " in name for name in ablations.by_popularity({"BPR": ablations.Row([run], "")}))
    for call in (lambda: row.per_user("recall@50"), lambda: check_study("long_tail", "ndcg@50")):
        with pytest.raises(SettingError, match="@50' is not allowed here: .* lists of 20. Take a cut-off of at most 20"):
            call()


def test_a_batch_of_interactions_has_fewer_items(shop, runs):
    how = {"dataset": shop, **QUICK, "stage2_epochs": 1, "n_ctx": 2, "prompt_depth": 2, "stage2_batch_size": 16}
    counts = {by: ablations.items_per_batch(grids.run_cell("05_stage2", how | {"batch_by": by}, test=False))
              for by in ("items", "interactions")}
    n_items = len(np.unique(load_data(shop).inter.part("train")[1]))
    assert counts["items"] == pytest.approx(n_items / np.ceil(n_items / 16)) and 8 < counts["interactions"] < 16


def test_an_encoder_without_weights_is_one_sentence(shop, runs, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="The weights 'laion2b_s34b_b79k' of ViT-B-32 are not on this machine") as error:
        run_study("generative", shop, [0], QUICK, at_once=1)
    assert "\n" not in str(error.value) and not (runs / "stage1").exists()


def test_another_domain_wants_photographs(runs):
    with pytest.raises(DataError, match="is drawn, and this study wants photographs. Take other data, or set clip_"):
        run_study("another_domain", "sample", [0], QUICK)
    assert STUDIES["another_domain"].axes("sample", {"clip_model": "ViT-B-32"})["05_stage2"]["recommender"].keys() == {
        "VBPR", "FREEDOM"}


def test_a_generative_encoder_passes_through_both_stages(shop, runs):
    "The tiny CoCa, with prompts in both towers."
    run = grids.run_cell("05_stage2", {"dataset": shop, **QUICK, "clip_model": "tiny_coca", "pretrained": "sample",
                                       "stage2_epochs": 1, "n_ctx": 2, "prompt_depth": 2})
    assert run.state == "finished" and {"stage1", "as_is", "continued", "fresh"} == set(run.metrics())
    tuned = run.load_weights("tuning")
    assert all(any(tower in name for name in tuned) for tower in ("image", "text"))
    assert all(w.isfinite().all() for w in tuned.values())


def test_the_loss_of_the_tiny_coca_is_open_clips_over_the_words_of_a_batch(tmp_path):
    "All tokens that are in no caption are as unlikely as can be: then the whole vocabulary gives the same loss."
    import open_clip

    images, tokens = sample.draw_pairs(8, seed=3)
    torch.manual_seed(0)
    model = sample.new_coca().eval()
    short = tokens[:, :sample.COCA_LENGTH]
    with torch.no_grad():
        out = model(sample.normalise(images), short)
        logits = torch.full_like(out["logits"], -1e9)
        words = short.unique()
        logits[..., words] = out["logits"][..., words]
        reference = open_clip.CoCaLoss(2.0, 1.0, pad_id=0)(out["image_features"], out["text_features"], logits,
                                                           out["labels"], out["logit_scale"], output_dict=True)
        assert torch.isclose(sample._coca_loss(model, images, tokens), sum(reference.values()), atol=1e-4)


# ---------------------------------------------------------------- the report


def test_a_report_in_two_formats(shop, runs, here, monkeypatch):
    base = {"epochs": 2, "batch_size": 64, "device": "cpu", "stage2_epochs": 1, "validate_every": 1, "prompt_depth": 2}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = report.paper([shop], ["yardsticks", "knowledge_transfer", "generative"], n_seeds=2, base=base, at_once=1)
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for said in ("Do the backbones beat the simple method that is best on validation?",
                 "What does knowledge transfer add?", "torch", "task loss alone",
                 "`generative` was not run: The weights", "What differs from the paper", '"stage2_epochs": 1', "2 seeds"):
        assert said in text, said
    assert "cannot tell with" in text or ": better" in text
    pictures = [folder / name for name in re.findall(r"!\[.*?\]\((.*?)\)", text)]
    assert len(pictures) == 2 and all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures)
    assert page.count("data:image/png;base64,") == 2 and "<table>" in page and "**" not in page
    against = pd.read_csv(folder / "verdicts.csv")
    assert set(against.study) == {"yardsticks", "knowledge_transfer"} and against.p_holm.between(0, 1).all()
    n_runs = len(here)
    report.paper([shop], ["yardsticks", "knowledge_transfer"], n_seeds=2, base=base, at_once=1)
    assert text.count("Failed: SMORE") == 2 and "knn_k" in text  # it wants 40 neighbours of 37 items
    assert len(here) == n_runs + 2  # they are tried again; what was there is used


def test_the_papers_numbers_are_beside_ours():
    row = SimpleNamespace(values=lambda metric: [0.05, 0.07])
    result = SimpleNamespace(rows={"FREEDOM": row, "task loss alone": row, "task loss and transfer": row})
    table = report.beside_the_paper("baby", {"yardsticks": result})
    assert table.loc["Recall@10 of FREEDOM on frozen features"].tolist() == ["0.064", "FREEDOM 0.0600"]
    assert report.beside_the_paper("sports", {"knowledge_transfer": result}).ours.tolist() == ["+0.0%"]
    assert not len(report.beside_the_paper("mine", {"yardsticks": result}))


def test_a_wrong_report_is_one_sentence():
    with pytest.raises(SystemExit, match="'method' is no study. Did you mean methods"):
        report.main(["sample", "--studies", "method"])
    with pytest.raises(SettingError, match="sampler='optima' is not known. Did you mean optuna"):
        check_study("methods", "recall@10", "optima")
