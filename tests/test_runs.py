"""Runs are assets: used again, never lost to a rerun, whole when they are opened, and comparable."""
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError
from small import SHORT, make_shop

import ptmrec.runs
import ptmrec.stage1 as stage1
import ptmrec.stage2 as stage2
import ptmrec.training as training
from ptmrec.backbones import BACKBONES
from ptmrec.data import MODALITIES, DataError, Modality, load_data
from ptmrec.ranking import METRICS, paired_test
from ptmrec.runs import check_seeds, code_of, compare, list_runs, new_run, open_run, per_user_values
from ptmrec.settings import SettingError, resolve
from ptmrec.stage1 import evaluate, load_backbone, load_inputs, make_evaluator, run_stage1
from ptmrec.stage2 import run_stage2

QUICK = {"epochs": 3, "stage2_epochs": 1, "n_seeds": 1}
KNN = {"freedom": {"knn_k": 5}, "mgcn": {"knn_k": 5}, "smore": {"knn_k_image": 5, "knn_k_text": 5}, "vbpr": {}}


@pytest.fixture
def small(tmp_path, monkeypatch, runs):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    make_shop(tmp_path / "shop")
    return tmp_path / "shop"


def test_vbpr_and_the_papers_batches(small):
    "The other backbone with features, interactions in batches with accumulation, the task loss, and one tower tuned."
    run, = run_stage2("shop", backbone="vbpr", task_weight=1.0, tune_backbone=True, batch_by="interactions", accumulate=12,
                      tuning="lora", last_layers=1, tuned_towers="text", cache_prefix=True, **QUICK)
    metrics = run.metrics()
    assert metrics["as_is"] != metrics["stage1"]
    assert {"tuning.safetensors", "parameters.csv", "features.safetensors", "history.csv", "per_user.parquet",
            "topk.parquet", "run.json"} <= {p.name for p in run.folder.iterdir()}
    about = run.about
    assert about["seed"] == 0 and about["parameters"]["accumulate"] == 12 and about["versions"]["torch"] and about["data"]


def test_full_tuning(small):
    "Names of CLIP's weights, such as positional_embedding, are not taken for the recommender's embeddings."
    run, = run_stage2("shop", tuning="full", knn_k=5, **QUICK)
    metrics = run.metrics()
    assert metrics["as_is"] != metrics["stage1"]


def test_runs_are_listed_by_a_name_with_brackets(runs):
    for name in ("set[1]", "set1"):
        new_run("stage1", name, {}).begin()
    assert list_runs("stage1", "set[1]").dataset.tolist() == ["set[1]"] and len(list_runs(dataset="set*")) == 2


def test_a_finished_run_is_used_again_and_said(small, monkeypatch, capsys):
    first, = run_stage2("shop", **SHORT, backbone="vbpr")
    monkeypatch.setattr(stage1, "train_backbone", lambda *args, **how: pytest.fail("Stage 1 was trained again"))
    monkeypatch.setattr(stage2, "tune", lambda *args, **how: pytest.fail("Stage 2 was trained again"))
    capsys.readouterr()
    again, = run_stage2("shop", **SHORT, backbone="vbpr")
    assert again.folder == first.folder and "is used again (rerun=True makes it anew)" in capsys.readouterr().out
    path, = run_stage2(small, **SHORT, backbone="vbpr")  # the same content by another name
    assert path.folder == first.folder


def test_a_metric_that_is_registered_or_changed_later_is_scored_without_training(small, monkeypatch, capsys):
    "Stage 1 in Stage 2 too; what a run keeps of its training stays, and a metric that is not registered now does no harm."
    how = SHORT | {"backbone": "vbpr"}
    first, = run_stage2("shop", **how)
    made, seconds = first.about["created"], first.on_disk()["seconds"]
    monkeypatch.setattr(stage1, "train_backbone", lambda *args, **how: pytest.fail("Stage 1 was trained again"))
    monkeypatch.setattr(stage2, "tune", lambda *args, **how: pytest.fail("Stage 2 was trained again"))
    for share in (0.25, 0.5):
        monkeypatch.setitem(METRICS, "share", lambda hits, n_pos, k, share=share: share + 0 * n_pos)
        capsys.readouterr()
        run, = run_stage2("shop", **how)
        assert capsys.readouterr().out.count("is scored anew: the metric share was registered or changed since") == 2
        assert run.key == first.key and run.about["created"] == made and run.about["seconds"] >= seconds
        found = [run.metrics()[variant][split] for variant in run.metrics() for split in ("valid", "test")]
        assert {values["share@10"] for values in found} == {share}
        assert set(run.load_table("per_user.parquet")["share@20"]) == {share}
    monkeypatch.delitem(METRICS, "share")
    assert run_stage2("shop", **how)[0].metrics() == run.metrics()


@pytest.mark.parametrize("raised, said", [
    (OSError("image file is truncated (3 bytes\nnot processed)."), r"\(OSError: image file is truncated \(3 bytes not proc"),
    (SafetensorError("Error while deserializing header"), "SafetensorError: Error while deserializing header"),
    (DataError("Song 3 is silent."), r"^Song 3 is silent\.$")], ids=["OSError", "SafetensorError", "DataError"])
def test_an_encoder_that_fails_is_no_full_disk(small, monkeypatch, raised, said):
    def encode(files):
        raise raised

    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "sounds", (".raw",), encode))
    with pytest.raises(DataError, match=said) as caught:
        ptmrec.runs._encoded("audio", [small / "interactions.csv"])
    if not isinstance(raised, DataError):
        assert str(caught.value).startswith("The encoder of the modality 'audio' failed (")
        assert caught.value.__cause__ is raised


def test_one_more_round_is_the_control(monkeypatch):
    monkeypatch.setattr(stage2, "run_stage1", lambda **how: how["rounds"])
    monkeypatch.setattr(stage2, "run_stage2", lambda **how: how["tuning"])
    monkeypatch.setattr(stage2, "stage1_settings", dict)
    assert stage2.controls_of({}) == {"Stage 1, two rounds": 2, "projections alone": "none"}
    assert stage2.controls_of({"rounds": 2, "training": "joint"}) == {"Stage 1, 3 rounds": 3}
    tuned = {"tuning": "lora", "last_layers": 1, "cache_prefix": True, "precision": "bf16", "tau": 0.1}
    assert stage2.without_tuning(tuned) == {"tuning": "none", "tau": 0.1}


@pytest.mark.parametrize("kind", [float, str, lambda n: f"{n}".encode()])
def test_users_are_named_by_the_ids_of_the_data(tmp_path, runs, kind):
    rng = np.random.default_rng(0)
    rows = [(kind(u), i) for u in range(20) for i in rng.choice(30, 8, replace=False)]
    (tmp_path / "shop").mkdir()
    pd.DataFrame(rows, columns=["user", "item"]).to_parquet(tmp_path / "shop" / "interactions.parquet")
    run, = run_stage1(tmp_path / "shop", backbone="bpr", epochs=1, n_seeds=1)
    assert run.recommend(k=3).equals(run.recommend(users=[kind(u) for u in range(20)], k=3).sort_values(
        "user", kind="stable", ignore_index=True))
    for unknown in ([kind(99)], [True] * 20, [[1]]):
        with pytest.raises(DataError, match="There is no user .*; the first one is "):
            run.recommend(users=unknown)


@pytest.mark.parametrize("experiment, module, function", [(run_stage1, stage1, "train_backbone"),
                                                          (run_stage2, stage2, "tune")])
def test_a_stopped_rerun_leaves_the_finished_run(small, monkeypatch, experiment, module, function):
    settings = SHORT | {"backbone": "vbpr"} if experiment is run_stage2 else {"epochs": 2, "backbone": "vbpr", "n_seeds": 1}
    first, = experiment("shop", **settings)
    before, real = first.metrics(), getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args, **how: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        experiment("shop", **settings, rerun=True)
    assert first.finished and first.metrics() == before and open_run(first.key).metrics() == before
    calls = []
    monkeypatch.setattr(module, function, lambda *args, **how: (calls.append(1), real(*args, **how))[1])
    again, = experiment("shop", **settings, rerun=True)
    assert calls and again.folder == first.folder and again.metrics() == before  # the same seed
    assert [p.name for p in first.folder.parent.iterdir()] == [first.key]


@pytest.mark.parametrize("moment", ["before the swap", "between the renames", "before the old one is gone"])
def test_a_rerun_that_dies_in_its_last_moment_heals(small, moment):
    run, = run_stage1("shop", backbone="bpr", epochs=1, n_seeds=1)
    anew, old = (run.folder.with_name(f"{run.key}.{end}") for end in ("rerun", "old"))
    shutil.copytree(run.folder, old if moment == "before the old one is gone" else anew)
    if moment == "between the renames":
        run.folder.rename(old)
    again, = run_stage1("shop", backbone="bpr", epochs=1, n_seeds=1, rerun=True)
    assert again.finished and [p.name for p in run.folder.parent.iterdir()] == [run.key]


def test_one_damaged_run_stops_nothing(small):
    run, = run_stage1("shop", backbone="bpr", epochs=1, n_seeds=1)
    (run.folder / "run.json").write_text("{}")
    assert list_runs().state.tolist() == ["damaged"]
    other, = run_stage1("shop", backbone="bpr", epochs=2, n_seeds=1)
    with pytest.raises(DataError, match="is not a run's"):
        open_run(run.folder)
    (other.folder / "metrics.json").unlink()
    with pytest.raises(DataError, match="is not finished .trained.. The call that began it goes on with it"):
        other.recommend()


def in_copy(folder, code="from ptmrec.stage1 import run_stage1; run_stage1('shop', backbone='bpr', epochs=2, n_seeds=1)"):
    "What a program prints that uses the copy of the package in `folder`."
    env = os.environ | {"PYTHONPATH": str(folder), "PTMREC_RUNS": str(folder / "runs"), "PTMREC_DATA": str(folder),
                        "TQDM_DISABLE": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout, sorted(p.parent.name for p in (folder / "runs" / "stage1").rglob("metrics.json"))


def test_remarks_change_no_key_and_a_changed_loss_does_and_says_why(tmp_path):
    shutil.copytree(ROOT / "ptmrec", tmp_path / "ptmrec", ignore=shutil.ignore_patterns("__pycache__"))
    make_shop(tmp_path / "shop")
    _, first = in_copy(tmp_path)
    for name, old, new in [("ranking", "def rank_items(", "# a remark\ndef rank_items("),
                           ("amazon", "\nimport", "\n# a remark\nimport"),
                           ("losses", '"Bayesian', '"A new docstring. Bayesian'),
                           ("amazon", "def find_or_prepare(", "def another():\n    return 1\n\n\ndef find_or_prepare(")]:
        path = tmp_path / "ptmrec" / f"{name}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    said, after = in_copy(tmp_path)
    assert after == first and "is used again" in said
    losses = tmp_path / "ptmrec" / "losses.py"
    losses.write_text(losses.read_text().replace("F.softplus((user * (neg - pos)).sum(1)).mean()",
                                                 "F.softplus((user * (neg - pos)).sum(1)).mean() * 1.0"))
    said, after = in_copy(tmp_path)
    assert len(after) == 2 and f"Run {first[0]} has the same settings and is not used: its code (losses.bpr_loss)" in said
    with (tmp_path / "shop" / "interactions.csv").open("a") as file:
        file.write("0,1,0\n")
    said, after = in_copy(tmp_path)
    assert len(after) == 3 and "is not used: its data changed" in said


@pytest.mark.parametrize("clip_model, warned", [("tiny", True), ("minilm-efficientnet", False)])
def test_only_the_tiny_clips_are_said_to_have_seen_nothing_but_drawings(small, clip_model, warned, recwarn):
    shutil.rmtree(small / "images")  # texts alone
    settings = resolve(run_stage1.experiment, {"dataset": "shop", "clip_model": clip_model})
    stage1._warn_of_unused(settings, load_data("shop"))
    assert any("have only seen the sample's drawings" in str(w.message) for w in recwarn) == warned


@pytest.fixture
def copied(tmp_path, monkeypatch):
    "A copy of the package whose code is read in place of the package's."
    shutil.copytree(ROOT / "ptmrec", tmp_path / "ptmrec", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(ptmrec.runs, "PACKAGE", tmp_path / "ptmrec")
    for cache in (ptmrec.runs.definitions, ptmrec.runs.code_of):
        cache.cache_clear()
    yield tmp_path / "ptmrec"
    for cache in (ptmrec.runs.definitions, ptmrec.runs.code_of):
        cache.cache_clear()


def test_the_key_has_the_code_of_a_class_and_of_the_methods_assigned_to_it_later(copied):
    before, training = code_of("stage1.train_stage1"), copied / "training.py"
    text = training.read_text()
    for old, new, changed in (("while len(self.history) < self.epochs", "while len(self.history) + 0 < self.epochs", "Loop"),
                              ("if step and loop.asked:", "if loop.asked and step:", "_steps")):
        assert text.count(old) == 1, old
        training.write_text(text.replace(old, new))  # one change at a time
        ptmrec.runs.definitions.cache_clear(), code_of.cache_clear()
        after = code_of("stage1.train_stage1")
        assert [name for name in before if before[name] != after[name]] == [f"training.{changed}"]


def test_the_seconds_of_a_run_are_its_own(small):
    run = new_run("stage1", "shop", {"seed": 1})
    run.start -= 1000  # it waited for the seed before it
    run.begin().seal()
    assert run.on_disk()["seconds"] < 500


@pytest.mark.parametrize("backbone", KNN)
def test_opened_variants_recommend_what_was_stored(small, backbone):
    run, = run_stage2("shop", **SHORT, backbone=backbone, **KNN[backbone])
    stored, opened = run.load_table("topk.parquet"), open_run(run.folder)
    assert set(stored.variant) == {"stage1", "as_is", "continued", "fresh"}
    for variant, lists in stored.groupby("variant"):
        found = opened.recommend(lists.user.unique(), k=20, variant=variant)
        pd.testing.assert_frame_equal(found, lists.drop(columns="variant").reset_index(drop=True))
    with pytest.raises(DataError, match="has no variant 'fresher'. It has: stage1, as_is, continued, fresh"):
        opened.recommend(variant="fresher")


@pytest.mark.parametrize("split", ["random", "random_lattice", "leave_last_out", "user_time", "global_time"])
@pytest.mark.parametrize("mask_valid", [False, True])
def test_every_split_rule_recommends_what_was_stored(small, split, mask_valid):
    table = pd.read_csv(small / "interactions.csv").drop(columns="x_label")
    table.assign(timestamp=np.random.default_rng(0).permutation(len(table))).to_csv(small / "interactions.csv", index=False)
    run, = run_stage1("shop", backbone="lightgcn", epochs=2, n_seeds=1, split=split, mask_valid=mask_valid)
    stored = run.load_table("topk.parquet")
    pd.testing.assert_frame_equal(open_run(run.key[:8]).recommend(stored.user.unique(), k=20), stored)


def test_cold_items_ranked_among_themselves_and_spared_as_negatives(small, monkeypatch):
    table = pd.read_csv(small / "interactions.csv")
    table[(table.item >= 6) | (table.x_label > 0)].to_csv(small / "interactions.csv", index=False)
    drawn, draw = [], training.TripleSampler.negatives
    monkeypatch.setattr(training.TripleSampler, "negatives", lambda *a: (drawn.append(draw(*a)), drawn[-1])[1])
    how = {"eval_items": "cold", "candidates": "cold", "negatives": "warm"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run, = run_stage2("shop", **SHORT, **KNN["freedom"], **how, backbone="freedom", task_weight=1.0)
    assert not any("underfits" in str(w.message) for w in caught)  # nobody bought what is ranked
    inter = run.data().inter
    assert inter.cold("item").sum() == 6 and not inter.cold("item")[torch.cat(drawn).numpy()].any()
    stored = run.load_table("topk.parquet")
    assert set(stored["item"]) == set(inter.item_ids[inter.cold("item")])
    for variant, lists in stored.groupby("variant"):
        found = open_run(run.folder).recommend(lists.user.unique(), k=20, variant=variant)
        pd.testing.assert_frame_equal(found, lists.drop(columns="variant").reset_index(drop=True))


def test_runs_that_are_older_than_a_setting_of_evaluation_have_its_default(small):
    old, = run_stage1("shop", backbone="bpr", epochs=1, n_seeds=1)
    new, = run_stage1("shop", backbone="bpr", epochs=2, n_seeds=1)
    before = compare(old, new), old.recommend()
    del old.params["candidates"]
    assert compare(old, new) == before[0]
    pd.testing.assert_frame_equal(old.recommend(), before[1])
    old.params["candidates"] = "cold"
    with pytest.raises(DataError, match="evaluated differently: candidates is 'cold' in run .*, and 'all' in run"):
        compare(old, new)


def test_what_is_opened_is_whole_or_refused(small):
    run, = run_stage1("shop", backbone="bpr", epochs=1, n_seeds=1)
    with pytest.raises(DataError, match="There is no user 'nobody' in shop; the first one is"):
        run.recommend(["nobody"])
    with (small / "interactions.csv").open("a") as file:
        file.write("0,1,0\n")
    with pytest.raises(DataError, match="has changed since run"):
        open_run(run.folder).recommend()
    (run.folder / "run.json").write_text('{"experiment"')
    with pytest.raises(DataError, match="run.json cannot be read"):
        open_run(run.folder)
    with pytest.raises(DataError, match="There is no run 'nowhere'"):
        open_run("nowhere")


@pytest.mark.parametrize("other", [{"seed": 1}, {"lr": 0.5}, {"backbone": "bpr"}], ids=str)
def test_weights_of_another_run_are_never_used(small, other):
    "Of another seed, of another rate, of another backbone: Stage 2 says so, and trains Stage 1 once more."
    settings = {"dataset": "shop", "backbone": "vbpr", "epochs": 1, "n_seeds": 1}
    run, = run_stage1(**settings)
    before = {name: w.clone() for name, w in run.load_weights("backbone").items()}  # not of the file, which is overwritten
    wrong, = run_stage1(**settings | other)
    shutil.copy(wrong.folder / "backbone.safetensors", run.folder)
    with pytest.raises(DataError, match="backbone.safetensors .weights of the backbone. cannot be used: it has changed"):
        open_run(run.key).load_weights("backbone")
    with pytest.warns(UserWarning, match=f"backbone.safetensors .* of another run: run {run.key} is made anew"):
        run_stage2(**settings | SHORT | {"epochs": 1})
    assert all(torch.equal(before[n], w) for n, w in run.load_weights("backbone").items())


def test_two_runs_are_compared_as_inside_one(small):
    run, = run_stage2("shop", **SHORT, backbone="vbpr")
    plain, = run_stage1("shop", backbone="vbpr", epochs=SHORT["epochs"], n_seeds=1)
    inside = paired_test(*(per_user_values([run], variant, "recall@20") for variant in ("stage1", "fresh")))
    assert compare(plain, run, variants=(None, "fresh")) == inside == compare(run, run, variants=("stage1", "fresh"))
    make_shop(small.parent / "other")
    with (small.parent / "other" / "interactions.csv").open("a") as file:
        file.write("0,1,0\n")
    other, = run_stage1("other", backbone="vbpr", epochs=1, n_seeds=1)
    with pytest.raises(DataError, match="of different data"):
        compare(plain, other)
    with pytest.raises(SettingError, match="metric='recal@20' is not known. Did you mean recall@20"):
        compare(run, run, "recal@20")
    table = list_runs()
    assert set(table.experiment) == {"stage1", "stage2"} and table.state.eq("finished").all() and run.key in set(table.key)


def test_one_experiment_with_several_seeds_has_each_seed_once_and_is_of_one_kind(runs):
    def made(seed, data="d", encoder=None, code="now", created="2026-01-02", **params):
        params = {"seed": seed, "stage1": f"of {seed}", "lr": 0.1} | params
        run = new_run("stage2", "shop", params, data, encoder, {"f": code})
        run.about["created"] = created
        return run

    a, b, c = (made(seed) for seed in range(3))
    assert check_seeds([a, b, c]) == [a, b, c] and check_seeds([b]) == [b]
    for twice in ([a, a], [a, b, made(0)]):
        with pytest.raises(DataError, match=f"Runs {a.key} and {a.key} have the same seed, 0. Leave one of them out"):
            check_seeds(twice)
    for how, words in (({"code": "old"}, "code"), ({"encoder": "e"}, "encoder"), ({"data": "x"}, "data"),
                       ({"code": "old", "data": "x"}, "code and data")):
        old = made(1, **how, created="2026-01-01")
        for mixed in ([a, old], [old, a]):
            with pytest.raises(DataError, match=f"made with different {words}, and runs of one list may differ in their seed"
                                                f" alone. Leave out {old.key}, the older one, or call .* with seed 1 for"):
                check_seeds(mixed)
            with pytest.raises(DataError, match=f"made with different {words}"):
                compare(mixed, c)
    with pytest.raises(DataError, match="differ in lr, and runs of one list"):
        check_seeds([a, made(1, lr=0.2)])


@pytest.mark.parametrize("tuning", ["prompt", "lora", "adapter", "full", "none"])
def test_the_encoder_of_a_run_makes_its_features(small, tuning):
    settings = {k: v for k, v in SHORT.items() if tuning == "prompt" or k not in ("n_ctx", "prompt_depth")}
    run, = run_stage2("shop", **settings, tuning=tuning, backbone="vbpr")
    features, encoder = open_run(run.key).item_features(), open_run(run.key).encoder()
    item = features["image"].index[3]
    data = run.data()
    number = list(data.inter.item_ids).index(item)
    for found, name in ((encoder.image(data.images[number]), "image"), (encoder.text(data.texts[number]), "text")):
        assert torch.allclose(found, torch.tensor(features[name].loc[item].to_numpy()), atol=1e-5)


def test_reprs_are_one_readable_line(small):
    run, = run_stage1("shop", backbone="bpr", epochs=1, n_seeds=1)
    for thing in (run, run.data(), run.data().inter):
        assert "\n" not in repr(thing) and len(repr(thing)) < 300
    assert "bpr" in repr(run) and "finished" in repr(run)


@pytest.mark.parametrize("pair, words", [
    (([0.1, 0.4, 0.2], [0.1, 0.4, 0.2]), r"0.2333 -> 0.2333 \(\+0.0%\): no difference for any of 3 users\.$"),
    (([0.1], [0.3]), r"0.1000 -> 0.3000 \(\+200.0%\): too few users for a test \(1\)\.$"),
    (([0.1, 0.4, 0.2], [0.3, 0.4, 0.3]), r"paired t-test over 3 users p = 0\.23: no significant difference\.$")])
def test_a_verdict_says_in_words_what_a_test_cannot(monkeypatch, pair, words):
    users = [[pd.Series(values, range(len(values)))] for values in pair]
    monkeypatch.setattr(stage2, "best_variant", lambda runs: "fresh")
    monkeypatch.setattr(stage2, "compare", lambda *arguments: paired_test(*users))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = stage2.verdict(["a run"])
    assert re.search(words, said) and "nan" not in said, said


def test_a_backbone_with_running_means_keeps_those_of_its_best_epoch(small, monkeypatch):
    "They rank as parameters do: in the stored metrics, in a run that is loaded, and in what starts from it."
    class Normed(BACKBONES["vbpr"]):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.norm = torch.nn.BatchNorm1d(self.item_emb.shape[1])

        def forward(self, *asked):
            user_emb, item_emb = super().forward(*asked)
            half = self.norm.num_features
            return user_emb, torch.cat([self.norm(item_emb[:, :half]), item_emb[:, half:]], 1)

    monkeypatch.setitem(BACKBONES, "normed", Normed)
    how = {"dataset": "shop", "backbone": "normed", "epochs": 12, "patience": 3, "lr": 0.05, "batch_size": 64, "n_seeds": 1}
    run, = run_stage1(**how)
    valid = run.load_table("history.csv")["valid recall@20"]
    assert valid.idxmax() < len(valid) - 1 and run.metrics()["valid"]["recall@20"] == pytest.approx(valid.max(), abs=1e-12)
    assert {"norm.running_mean", "norm.running_var"} <= run.load_weights("backbone").keys()
    settings = resolve(run_stage1.experiment, how)
    inputs = load_inputs(settings)
    per_user, _ = evaluate(load_backbone(run, settings, inputs), make_evaluator(settings, inputs), "test")
    assert per_user["recall@20"].mean() == pytest.approx(run.metrics()["test"]["recall@20"], abs=1e-12)
    tuned, = run_stage2(**how | {"stage2_epochs": 1, "tuning": "none"})
    assert tuned.metrics()["stage1"] == run.metrics() and "norm.running_mean" in tuned.load_weights("backbone_fresh")
