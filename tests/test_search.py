"""Searches: chosen on validation alone, stopped at any moment, in one process or several."""
import importlib
import json
import linecache
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from joblib.externals.loky import get_reusable_executor
from small import add_sounds, make_shop

import ptmrec.stage1 as stage1
from ptmrec.backbones import BACKBONES, grid_of
from ptmrec.data import MODALITIES, Modality
from ptmrec.ranking import METRICS
from ptmrec.runs import open_run, own_code
from ptmrec.search import cells, plot_search, search
from ptmrec.settings import SettingError, resolve

GRID = {"reg_weight": [1e-1, 1e-3, 1e-5]}


@pytest.fixture
def shop(tmp_path):
    "A folder with 60 users and 40 items, two groups of each that keep to themselves, and one split."
    folder = tmp_path / "shop"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [(u, 20 * (u % 2) + i, [0, 0, 0, 0, 1, 2][n]) for u in range(60)
            for n, i in enumerate(rng.choice(20, 6, replace=False))]
    pd.DataFrame(rows, columns=["user", "item", "x_label"]).to_csv(folder / "interactions.csv", index=False)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    "Here and in worker processes, which each test starts anew."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    get_reusable_executor().shutdown(wait=True)


@pytest.fixture
def trained(monkeypatch):
    "The parameters of each training in this process, in order."
    calls, build = [], stage1.train_backbone
    monkeypatch.setattr(stage1, "train_backbone", lambda backbone, *args, **kw: (
        calls.append(backbone.settings.reg_weight), build(backbone, *args, **kw))[1])
    return calls


def scored(runs):
    "Keys of the Stage 1 runs that hold anything of the test split."
    return {f.parent.name for name in ("metrics.json", "per_user.parquet", "topk.parquet")
            for f in (runs / "stage1").rglob(name)}


def kept_table(runs):
    path, = (runs / "search").rglob("trials.csv")
    return pd.read_csv(path, index_col="trial")


def test_losers_never_meet_the_test_split(shop, runs, monkeypatch, trained):
    asked, evaluate = [], stage1.evaluate
    monkeypatch.setattr(stage1, "evaluate", lambda backbone, evaluator, split: (
        asked.append((split, backbone.settings.reg_weight)), evaluate(backbone, evaluator, split))[1])
    table, winners = search("bpr", shop, GRID, epochs=3, n_seeds=2)
    best = table.reg_weight.iloc[0]
    assert [r for s, r in asked if s == "test"] == [best, best] and trained == [*GRID["reg_weight"], best]
    assert [w.params["seed"] for w in winners] == [0, 1] and {w.params["reg_weight"] for w in winners} == {best}
    assert scored(runs) == {w.key for w in winners} and len(list((runs / "stage1").rglob("history.csv"))) == 4
    assert not [c for c in table if "test" in c]
    pd.testing.assert_frame_equal(kept_table(runs), table)


def test_the_winner_is_the_run_that_run_stage1_makes(shop, runs):
    table, (winner,) = search("bpr", shop, GRID, epochs=3)
    assert table["valid recall@20"].is_monotonic_decreasing
    found = winner.metrics()
    assert found["valid"]["recall@20"] == table["valid recall@20"].iloc[0]
    again, = stage1.run_stage1(str(shop), backbone="bpr", epochs=3, n_seeds=1, reg_weight=table.reg_weight.iloc[0])
    assert again.folder == winner.folder and again.metrics() == found


def test_what_is_done_is_not_done_again(shop, runs, trained):
    search("bpr", shop, {"reg_weight": [1e-1, 1e-3]}, epochs=3)
    table, _ = search("bpr", shop, {"reg_weight": [1e-1, 1e-5, 1e-3]}, epochs=3)
    assert trained == [1e-1, 1e-3, 1e-5] and sorted(table.index) == [0, 1, 2]


def test_a_second_round_goes_on_from_the_best_of_the_first(shop, runs, trained):
    first, = stage1.run_stage1(shop, backbone="bpr", epochs=3, n_seeds=1)
    second, = stage1.run_stage1(shop, backbone="bpr", epochs=3, n_seeds=1, rounds=2)
    assert len(trained) == 2 and second.key != first.key and list(second.ended) == ["Stage 1", "Stage 1, round 2"]
    inputs = stage1.load_inputs(settings := resolve(stage1.run_stage1.experiment, dict(
        dataset=shop, backbone="bpr", epochs=3, n_seeds=1)))
    backbone = stage1.load_backbone(first, settings, inputs)
    stage1.set_seed(0, inputs.device)
    stage1.train_with(settings, backbone, stage1.make_evaluator(settings, inputs), "by hand", None)
    for name, weight in second.load_weights("backbone").items():
        assert torch.equal(weight, dict(backbone.named_parameters())[name])
    table, (winner,) = search("bpr", shop, {"rounds": [1, 2]}, epochs=2)
    assert scored(runs) == {first.key, second.key, winner.key}  # losers, and first rounds, never meet the test split


def test_what_killed_searches_left_half_made_is_swept(shop, runs, trained):
    search("bpr", shop, GRID, epochs=2)
    left = [folder / ".tmp-host-1-00000000" for kind in ("stage1", "search") for folder in (runs / kind / "shop").iterdir()]
    for path in left:
        path.mkdir()
        (path / "owner").touch()  # and no process holds it
    search("bpr", shop, GRID, epochs=2)
    assert len(left) == 4 and len(trained) == 3 and not any(path.exists() for path in left)


def test_two_processes_find_the_same_and_a_failure_in_one_is_told(shop, tmp_path, monkeypatch, mine):
    "With a backbone that only this process knows; one cell of the grid fails."
    mine(1)
    tables = []
    for processes, alphas in {1: [1.0, 2.0], 2: [1.0, 2.0, 7.0]}.items():
        monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / f"runs{processes}"))
        if processes == 2:
            with pytest.raises(RuntimeError, match="1 of 3 runs failed.*\nalpha=7.0: OSError: No space"):
                search("mine", shop, {"alpha": alphas}, epochs=3, processes=2)
            assert not scored(tmp_path / "runs2")
        else:
            _, (one,) = search("mine", shop, {"alpha": alphas}, epochs=3)
        tables.append(kept_table(tmp_path / f"runs{processes}").drop(columns="seconds"))
    pd.testing.assert_frame_equal(*tables)
    _, (two,) = search("mine", shop, {"alpha": [1.0, 2.0]}, epochs=3)
    assert two.key == one.key and two.folder != one.folder and two.metrics() == one.metrics()


def test_processes_know_a_modality_and_a_metric_of_ones_own(tmp_path, runs, monkeypatch):
    make_shop(tmp_path / "shop")
    add_sounds(tmp_path / "shop")
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "sounds", (".raw",),
                                                      lambda paths: [[*map(float, path.read_bytes())] for path in paths]))
    monkeypatch.setitem(METRICS, "first", lambda hits, n_pos, k: hits[:, 0])
    tables = []
    for processes in (1, 2):
        monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / f"runs{processes}"))
        table, (winner,) = search("vbpr", tmp_path / "shop", {"lr": [1e-2, 1e-1]}, epochs=2, metric="first@20",
                                  processes=processes, device="cpu")
        assert "project.audio.weight" in winner.load_weights("backbone")
        tables.append(table.drop(columns="seconds"))
    pd.testing.assert_frame_equal(*tables)


def fail_at(reg_weight, monkeypatch):
    "Training with this weight fails."
    train = stage1.train_backbone

    def fails(backbone, *args, **kw):
        if backbone.settings.reg_weight == reg_weight:
            raise OSError("No space left on device.")
        return train(backbone, *args, **kw)

    monkeypatch.setattr(stage1, "train_backbone", fails)


@pytest.mark.parametrize("weights", [[1e-3, 1e-1], [1e-1, 1e-3]])
def test_a_failed_trial_is_named_whenever_it_fails(shop, runs, monkeypatch, weights):
    fail_at(1e-3, monkeypatch)
    with pytest.raises(RuntimeError, match="1 of 2 runs failed.*\nreg_weight=0.001: OSError: No space"):
        search("bpr", shop, {"reg_weight": weights}, epochs=2)
    assert kept_table(runs).reg_weight.tolist() == [1e-1]


def test_a_failed_trial_is_named_and_the_others_are_kept(shop, runs, monkeypatch, trained):
    with monkeypatch.context() as broken:
        fail_at(1e-3, broken)
        with pytest.raises(RuntimeError, match="1 of 3 runs failed.*\nreg_weight=0.001: OSError: No space"):
            search("bpr", shop, GRID, epochs=3)
    assert kept_table(runs).reg_weight.isin([1e-1, 1e-5]).all() and not scored(runs)
    table, _ = search("bpr", shop, GRID, epochs=3)
    assert trained == [1e-1, 1e-5, 1e-3] and len(table) == 3


def alive(pid):
    return os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().rsplit(")")[1].split()[0] != "Z"


def children(pid):
    return [int(p) for task in os.listdir(f"/proc/{pid}/task")
            for p in open(f"/proc/{pid}/task/{task}/children").read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc, as on Linux")
def test_killed_and_called_again(shop, runs, trained):
    "SIGKILL in the middle: the workers end, what was trained stays, and only the rest is trained when called again."
    grid, epochs = {"reg_weight": [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]}, {"epochs": 200, "patience": 200}
    code = f"from ptmrec.search import search; search('bpr', {str(shop)!r}, {grid}, processes=2, **{epochs})"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not list((runs / "stage1").glob("*/*/history.csv")):  # rglob fails where a temporary folder goes as it looks
        assert first.poll() is None, "the search ended before it could be killed"
        time.sleep(0.01)
    workers = children(first.pid)
    first.kill()
    first.wait()
    for _ in range(1200):
        if not any(map(alive, workers)):
            break
        time.sleep(0.05)
    assert len(workers) >= 2 and not any(map(alive, workers))
    done = {path: path.stat().st_mtime_ns for path in (runs / "stage1").rglob("history.csv")
            if open_run(path.parent).trained}
    assert len(done) < 6 and not scored(runs)

    table, (winner,) = search("bpr", shop, grid, **epochs)
    assert len(trained) == len(set(trained)) == 6 - len(done)
    assert done == {path: path.stat().st_mtime_ns for path in done}
    assert sorted(table.reg_weight) == sorted(grid["reg_weight"]) and (table.epochs == 200).all()
    assert scored(runs) == {winner.key}
    half = [path for path in runs.rglob("*") if path.name == "checkpoint.pt"]
    about, = (path for path in (runs / "search").rglob("metrics.json"))
    assert not half and json.loads(about.read_text())["winner"] == {"reg_weight": table.reg_weight.iloc[0]}


@pytest.mark.parametrize("wrong, message", [
    ({"grid": {"layers": [1, 2]}}, "The grid varies layers, .*Did you mean n_layers. It may vary: n_layers, reg_weight, lr"),
    ({"grid": {"n_layers": 3}}, "needs a list of values for n_layers, and has 3"),
    ({"grid": {"n_layers": []}}, "needs a list of values for n_layers"),
    ({"learning_rate": 0.1}, "run_stage1 has no parameter learning_rate"),
    ({"cl_weight": 0.1}, "cl_weight is a setting of mgcn, smore, and backbone='lightgcn' does not use it"),
    ({"backbone": "svd"}, "backbone='svd' is not known"),
])
def test_wrong_searches_stop_before_anything_is_trained(runs, wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        search(**{"backbone": "lightgcn", "dataset": "sample"} | wrong)
    assert not runs.exists()


def test_published_grids_are_of_the_backbones_own_settings(runs):
    for name, backbone in BACKBONES.items():
        assert grid_of(name) and grid_of(name).keys() <= backbone.Settings.model_fields.keys(), name


@pytest.fixture
def mine():
    "A backbone that the user has written; returns a function that registers it with a sign of its loss."
    def write(sign):
        source = SOURCE.format(sign=sign)
        path = f"<cell {sign}>"
        linecache.cache[path] = len(source), None, source.splitlines(True), path
        space = {"__name__": "__main__"}
        exec(compile(source, path, "exec"), space)

    yield write
    del BACKBONES["mine"]


SOURCE = """
from ptmrec.backbones import BACKBONES, BPRMF, shared
from ptmrec.settings import Settings, setting

@BACKBONES.register("mine")
class Mine(BPRMF):
    class Settings(Settings):
        reg_weight: float = shared("reg_weight", 1e-3)
        alpha: float = setting(1.0, "weight of the BPR loss", ge=0, grid=[0.0, 1.0, 5.0])

    def loss(self, user, pos, neg, features=None):
        if self.settings.alpha == 7:
            raise OSError("No space left on device.")
        terms = super().loss(user, pos, neg)
        return {{"bpr": self.settings.alpha * terms["bpr"] ** {sign}, "reg": terms["reg"]}}
"""


def test_a_backbone_of_ones_own_is_searched(shop, runs, trained, mine):
    mine(1)
    table, (winner,) = search("mine", shop, epochs=3)
    assert len(trained) == 3 and table["valid recall@20"].nunique() > 1 and winner.params["alpha"] in (1.0, 5.0)
    pd.testing.assert_frame_equal(search("mine", shop, epochs=3)[0], table)
    assert len(trained) == 3
    mine(-1)  # the same name and settings, another class
    assert search("mine", shop, epochs=3)[0]["valid recall@20"].max() < table["valid recall@20"].max()
    assert len(trained) == 6


def test_a_trial_that_diverges_loses(shop, runs, mine):
    mine(1)
    grid = {"alpha": [1e39, 1.0]}  # the first makes an infinite loss
    table, (winner,) = search("mine", shop, grid, epochs=3)
    assert list(table.alpha) == [1.0, 1e39] and list(table["valid recall@20"].isna()) == [False, True]
    assert winner.params["alpha"] == 1.0 and scored(runs) == {winner.key}
    assert kept_table(runs).alpha.tolist() == table.alpha.tolist()
    with pytest.raises(RuntimeError, match="every trial diverged. Lower lr"):
        search("mine", shop, {"alpha": [1e39]}, epochs=3)


def test_lists_end_where_nothing_is_left(shop, runs):
    "Who has most items in training is recommended the others alone."
    pd.DataFrame([(0, i, 0) for i in range(35)] + [(0, 36, 1), (0, 37, 2)] + [(1, i, i % 3) for i in range(40)],
                 columns=["user", "item", "x_label"]).to_csv(shop / "interactions.csv", index=False)
    run, = stage1.run_stage1(str(shop), backbone="bpr", epochs=1)
    lists = run.load_table("topk.parquet")
    assert sorted(lists[lists.user == 0].item) == list(range(35, 40)) and (lists.user == 1).sum() == 20
    assert list(lists[lists.user == 0]["rank"]) == [1, 2, 3, 4, 5]


def test_a_setting_that_is_given_is_not_varied(shop, runs):
    table, (winner,) = search("lightgcn", shop, n_layers=2, n_trials=3, epochs=2)
    assert list(table.columns[:2]) == ["reg_weight", "seed"] and winner.params["n_layers"] == 2
    assert len(table) == table.reg_weight.nunique() == 3
    figure = plot_search(table)
    assert [ax.get_xlabel() for ax in figure.axes] == ["reg weight"]
    stage1.plt.close(figure)


@pytest.mark.parametrize("values, labels", [
    ([0.01, 0.01], ["0.01"]), (["stop", "lower_lr"], ["lower_lr", "stop"]), ([None, 4], ["4", "None"]),
    ([1e-3, 1e-4], ["0.0001", "0.001"]), ([True, False], ["False", "True"])])
def test_searches_of_any_values_are_drawn(values, labels):
    table = pd.DataFrame({"on_nan": values, "seed": 0, "valid recall@20": [0.2, 0.1]})
    figure = plot_search(table)
    ax, = figure.axes
    assert ax.get_xlabel() == "on nan" and [text.get_text() for text in ax.get_xticklabels()] == labels
    stage1.plt.close(figure)


@pytest.mark.parametrize("n_trials", [0, -1, 2.5])
def test_a_number_of_trials_is_a_whole_number(n_trials):
    with pytest.raises(SettingError, match=f"n_trials={n_trials} is not allowed: it must be a whole number at least 1"):
        cells({"lr": [1e-3, 1e-2]}, n_trials)


OWN = """
from ptmrec.backbones import BACKBONES

@BACKBONES.register("own")
class Own(BACKBONES["bpr"]):
    half = property(lambda self: self.settings.reg_weight / 2)

    @staticmethod
    def double(x):
        return 2 * x

    @classmethod
    def named(cls):
        return cls.__name__
"""


def test_a_backbone_of_a_module_of_ones_own(shop, runs, tmp_path, monkeypatch):
    "Other processes find it, and its runs have the same place there."
    (tmp_path / "own_backbone.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setitem(BACKBONES, "own", BACKBONES["bpr"])  # and away again
    code = own_code(importlib.import_module("own_backbone").Own)
    assert {"Own.half", "Own.double", "Own.named", "backbones.BPRMF"} <= code.keys()
    table, _ = search("own", shop, GRID, epochs=2, processes=2)
    assert len(table) == 3
    monkeypatch.setattr(stage1, "train_backbone", lambda *args, **how: pytest.fail("trained once more"))
    assert search("own", shop, GRID, epochs=2, processes=2)[0].equals(table)
