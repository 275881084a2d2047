"""Damaged, cut-short, mixed-up and missing files of runs: named, never loaded, and made anew where that loses nothing."""
import json
import shutil
import warnings

import pandas as pd
import pytest
import torch
from small import SHORT, make_shop

import ptmrec.stage1 as stage1
import ptmrec.stage2 as stage2
from ptmrec.data import DataError
from ptmrec.runs import Run, checksum, compare, list_runs, open_run, read_json
from ptmrec.search import search
from ptmrec.settings import SettingError
from ptmrec.stage1 import run_stage1
from ptmrec.stage2 import run_stage2

STAGE1 = {"dataset": "shop", "backbone": "vbpr", "epochs": 2, "n_seeds": 1}
STAGE2 = {"dataset": "shop", "backbone": "vbpr"} | SHORT


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with a data set and finished runs of both stages, and what is in them."
    folder = tmp_path_factory.mktemp("made")
    make_shop(folder / "shop")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("PTMREC_DATA", str(folder)), patch.setenv("PTMREC_RUNS", str(folder / "runs"))
        run_stage1(**STAGE1)
        run_stage2(**STAGE2)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    "A copy of `made` that a test may damage."
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path)), monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "runs"))
    return tmp_path


def finished(place, experiment, epochs):
    "The folder of the run of an experiment with so many epochs of Stage 1."
    found = [p.parent for p in (place / "runs" / experiment).rglob("run.json")]
    return next(p for p in found if json.loads((p / "run.json").read_text())["parameters"]["epochs"] == epochs)


def content(folder):
    "What is in a run: tensors and tables, without times."
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = checksum(path)
        elif path.suffix in (".csv", ".parquet") and path.name != "memory.csv":
            read = pd.read_csv if path.suffix == ".csv" else pd.read_parquet
            found[path.name] = read(path).drop(columns="seconds", errors="ignore").to_csv()
    return found | {"metrics": (folder / "metrics.json").read_text()}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {"half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
          "empty": lambda path: path.write_bytes(b""), "garbled": lambda path: path.write_bytes(b"\xff\x00{[" * 50),
          "a flipped bit": flip, "gone": lambda path: path.unlink(),
          "of another kind": lambda path: path.write_text('{"a": [1, 2]}')}
FILES = ["run.json", "metrics.json", "history.csv", "per_user.parquet", "topk.parquet", "backbone.safetensors",
         "embeddings.safetensors"]


@pytest.mark.parametrize("name, damage", [(name, damage) for name in FILES for damage in DAMAGE if (name, damage) != (
    "metrics.json", "gone")])  # as if the process had died before it wrote them
def test_a_damaged_file_of_stage1_is_named_and_made_anew(place, name, damage):
    folder = finished(place, "stage1", 2)
    before = content(folder)
    DAMAGE[damage](folder / name)
    said = rf"{name} \(.*\) is damaged, gone, or of another run: run {folder.name} is made anew"
    with pytest.warns(UserWarning, match=said):
        run, = run_stage1(**STAGE1)
    assert content(run.folder) == before and run.folder == folder
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?!The tiny CLIP)")
        assert run_stage1(**STAGE1)[0].finished


@pytest.mark.parametrize("name", ["history.csv", "topk.parquet", "metrics.json", "embeddings.safetensors"])
def test_a_run_whose_weights_are_whole_is_only_scored_again(place, monkeypatch, name):
    folder, trained = finished(place, "stage1", 2), []
    monkeypatch.setattr(stage1, "train_with", lambda *args: trained.append(1) or pytest.skip("trained"))
    (folder / name).write_text("damaged")
    with pytest.warns(UserWarning, match=name):
        if name == "history.csv":
            with pytest.raises(pytest.skip.Exception):
                run_stage1(**STAGE1)
        else:
            run_stage1(**STAGE1)
    assert trained == [1] * (name == "history.csv")


@pytest.mark.parametrize("damage", ["half", "a flipped bit", "gone"])
@pytest.mark.parametrize("name", ["metrics.json", "run.json", "per_user.parquet", "tuning.safetensors",
                                  "features.safetensors", "embeddings_fresh.safetensors"])
def test_a_damaged_file_of_an_opened_run_is_one_sentence(place, name, damage):
    folder = finished(place, "stage2", 3)
    other = open_run(folder)
    DAMAGE[damage](folder / name)
    said = []
    for use in (lambda run: run.metrics(), lambda run: run.recommend(variant="fresh"), lambda run: run.item_features(),
                lambda run: run.encoder(), lambda run: compare(run, run)):
        try:
            use(open_run(folder) if name == "run.json" and damage != "gone" else other)
        except DataError as error:
            said.append(str(error))
    assert said or name == "run.json" and damage == "gone"
    unfinished = (name, damage) == ("metrics.json", "gone")  # as if the process had died before it was written
    assert all("\n" not in text and (name in text and "anew" in text or unfinished) for text in said), said
    assert "damaged" in set(list_runs().state) or damage == "gone" or name not in ("run.json", "metrics.json")


def test_a_damaged_run_of_stage2_is_made_anew(place):
    folder = finished(place, "stage2", 3)
    before = content(folder)
    flip(folder / "embeddings_as_is.safetensors")
    with pytest.warns(UserWarning, match="embeddings_as_is.safetensors .final embeddings. is damaged"):
        run, = run_stage2(**STAGE2)
    assert content(run.folder) == before


@pytest.mark.parametrize("gone", ["its files", "its folder", "everything of Stage 1"])
def test_stage1_is_trained_once_more_if_it_is_gone(place, gone):
    tuned, folder = finished(place, "stage2", 3), finished(place, "stage1", 3)
    before, opened = content(tuned), open_run(tuned)
    lists = opened.recommend(variant="stage1")
    if gone == "its files":
        for path in folder.iterdir():
            path.unlink() if path.name != "metrics.json" else None
    else:
        shutil.rmtree(folder if gone == "its folder" else place / "runs" / "stage1")
    assert opened.recommend(variant="stage1").equals(lists)  # a run of Stage 2 has all that it needs
    (tuned / "metrics.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, = run_stage2(**STAGE2)
    assert content(run.folder) == before and folder.exists()


def test_a_run_that_was_moved_is_whole(place):
    tuned = finished(place, "stage2", 3)
    lists = open_run(tuned).recommend(variant="stage1")
    moved = tuned.rename(place / "kept")
    assert open_run(moved).recommend(variant="stage1").equals(lists) and open_run(moved).encoder() is not None


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_runs_folder_is_deleted_during_a_training(place, monkeypatch, stage):
    module, function = (stage1, "train_with") if stage == "stage1" else (stage2, "tune_with")
    experiment, settings = (run_stage1, STAGE1) if stage == "stage1" else (run_stage2, STAGE2)
    folder = finished(place, stage, settings["epochs"])
    before, original = content(folder), getattr(module, function)

    def deletes(*args):
        history = original(*args)
        shutil.rmtree(folder)
        return history

    (folder / "metrics.json").unlink(), shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, deletes)
        run, = experiment(**settings)
    assert content(folder) == before and run.finished and read_json(folder / "run.json")["versions"]


def test_files_that_disappear_while_a_run_is_scored(place, monkeypatch):
    folder, score = finished(place, "stage1", 2), stage1.score_stage1
    shutil.rmtree(folder)

    def deletes(run, *args):
        (run.folder / "backbone.safetensors").unlink()
        return score(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(stage1, "score_stage1", deletes)
        with pytest.raises(DataError, match="backbone.safetensors .weights of the backbone. disappeared from .* anew"):
            run_stage1(**STAGE1)
    with pytest.warns(UserWarning, match="backbone.safetensors .* is damaged, gone"):
        assert run_stage1(**STAGE1)[0].finished


def test_a_whole_folder_of_another_run_is_not_this_one(place):
    folder = finished(place, "stage1", 2)
    before = content(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other, = run_stage1(**STAGE1 | {"seed": 5})
    shutil.rmtree(folder)
    shutil.copytree(other.folder, folder)
    with pytest.warns(UserWarning, match="run.json .settings. is damaged, gone, or of another run"):
        run, = run_stage1(**STAGE1)
    assert content(run.folder) == before and run.on_disk()["parameters"]["seed"] == 0


def test_a_search_with_damaged_trials(place):
    grid = {"reg_weight": [1e-1, 1e-3]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table, (winner,) = search("bpr", "shop", grid, epochs=2)
    path, = (place / "runs" / "search").rglob("trials.csv")
    path.write_text("garbled")
    with pytest.raises(DataError, match="trials.csv .table of trials. cannot be used: it has changed"):
        open_run(path.parent).load_table("trials.csv")
    loser = next(p.parent for p in (place / "runs" / "stage1").rglob("history.csv") if p.parent != winner.folder
                 and json.loads((p.parent / "run.json").read_text())["parameters"]["backbone"] == "bpr")
    (loser / "history.csv").write_text("epoch,valid recall@20,seconds\n1,9.0,0.1\n")  # would win
    with pytest.warns(UserWarning, match="history.csv"):
        again, _ = search("bpr", "shop", grid, epochs=2)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), table.drop(columns="seconds"))
    assert open_run(path.parent).load_table("trials.csv").reg_weight.tolist() == table.reg_weight.tolist()


def test_files_that_are_added_to_a_run_are_nobodys_business(place):
    folder = finished(place, "stage1", 2)
    (folder / "results.png").write_bytes(b"a picture")
    (folder / "notes").mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?!The tiny CLIP)")
        assert run_stage1(**STAGE1)[0].folder == folder


def test_comparisons_that_mean_nothing_are_refused(place):
    tuned, plain = open_run(finished(place, "stage2", 3)), open_run(finished(place, "stage1", 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masked, = run_stage1(**STAGE1 | {"mask_valid": True})
        seed, = run_stage1(**STAGE1 | {"seed": 1})
    assert compare([plain, seed], tuned)["users"] == 60
    for wrong, message in [((plain, masked), "evaluated differently: mask_valid is False in run .*, and True in run"),
                           (([plain, masked], tuned), "differ in mask_valid, and runs of one list may differ in their seed"),
                           (([plain, tuned], plain), "differ in .*, and runs of one list"),
                           (([], plain), r"\[\] is not a run"), ((plain.key, plain), "is not a run, or a list of runs")]:
        with pytest.raises(DataError, match=message):
            compare(*wrong)
    for wrong in (("fresh",), "fresh", (None, None, None)):
        with pytest.raises(SettingError, match="variants=.* is not allowed: it must be two names"):
            compare(plain, tuned, variants=wrong)
    for metric in ("user", "variant", None, 3):
        with pytest.raises(SettingError, match=f"metric={metric!r} is not known"):
            compare(plain, plain, metric)


@pytest.mark.parametrize("k", [0, -1, 2.5, "10", None, True, [5]], ids=str)
def test_odd_lengths_of_lists(place, k):
    with pytest.raises(SettingError, match="k=.* is not allowed: it must be a whole number at least 1"):
        open_run(finished(place, "stage1", 2)).recommend(k=k)


def test_odd_users(place):
    run = open_run(finished(place, "stage1", 2))
    for users in ("3", 3, {"a": 1}):
        with pytest.raises(DataError, match=r"users=.* is not a list of user ids, such as"):
            run.recommend(users)
    for users in (["3"], [None], [2.0], [[1]], [10**30], [float("nan")], [True, "x"]):
        with pytest.raises(DataError, match="There is no user"):
            run.recommend(users)
    assert len(run.recommend([])) == 0 and len(run.recommend([3, 3], k=10**9)) > 60


def test_a_run_without_features_says_so(place):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, = run_stage1(**STAGE1 | {"backbone": "bpr"})
    with pytest.raises(DataError, match=f"Run {run.key} used no features: its backbone is bpr"):
        run.item_features()


def test_list_runs_shows_what_is_damaged(place):
    (finished(place, "stage1", 2) / "run.json").write_text("{")
    (finished(place, "stage2", 3) / "metrics.json").write_text("{}")
    table = list_runs()
    assert table.state.tolist().count("damaged") == 2 and set(table.experiment) == {"stage1", "stage2"}


def test_nothing_is_loaded_with_holes(place):
    "torch's strict=False would take part of the weights."
    run, linear = open_run(finished(place, "stage1", 2)), torch.nn.Linear(2, 2)
    from ptmrec.runs import load_parameters

    with pytest.raises(DataError, match="does not fit this Linear"):
        load_parameters(linear, run.load_weights("backbone"), "x")
    assert isinstance(run, Run)
