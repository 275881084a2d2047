"""Bad input and bad luck: clear errors, nothing half-written."""
import importlib
import math
import shutil
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SHARED
from PIL import Image
from small import SHORT, make_shop

from ptmrec.clip_prompting import ItemEncoder, frozen_features, load_clip
from ptmrec.data import DataError, cache_dir, image_map, load_data
from ptmrec.graphs import without_content
from ptmrec.memory import container_free
from ptmrec.settings import resolve
from ptmrec.stage1 import run_stage1
from ptmrec.stage2 import run_stage2


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A shop of 12 users and 12 items in a data folder of its own; one image and text are missing, one image is none."
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    folder = tmp_path / "shop"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    pairs = sorted({(u, (u + d) % 12) for u in range(12) for d in rng.choice(12, 6, replace=False)})
    (folder / "interactions.csv").write_text("userID,itemID\n" + "".join(f"u{u},i{i:02}\n" for u, i in pairs))
    (folder / "items.csv").write_text("itemID,title\n" + "".join(f"i{i:02},thing {i}\n" for i in range(11)))
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), np.uint8)).save(folder / "images" / f"i{i:02}.jpg")
    (folder / "images" / "i10.jpg").write_text("<html>404</html>")
    return folder


def test_missing_and_broken_content_is_counted(shop):
    data, clip = load_data("shop"), load_clip()
    with pytest.warns(UserWarning, match="1 unreadable images.*i10.jpg"):
        pixels, seen = image_map(data, clip.image_size)
    assert seen.tolist() == [True] * 10 + [False] * 2
    features = frozen_features(data, clip)
    encoder = ItemEncoder(clip, data)
    everything = encoder.encode_all()
    for m, n in {"image": 10, "text": 11}.items():  # the last item has no text either
        assert torch.allclose(features[m][n:], features[m][:n].mean(0), atol=1e-6)
        assert torch.allclose(encoder(torch.arange(12))[m], everything[m], atol=1e-6)
        assert torch.equal(without_content(features[m]), torch.arange(12) >= n)


def test_replaced_content_never_meets_an_old_cache(shop):
    clip = load_clip()
    with pytest.warns(UserWarning):
        before = frozen_features(load_data("shop"), clip)
    Image.new("RGB", (64, 64), "navy").save(shop / "images" / "i00.jpg")
    with pytest.warns(UserWarning):
        after = frozen_features(load_data("shop"), clip)
    assert not torch.allclose(before["image"][0], after["image"][0]) and torch.equal(before["text"], after["text"])
    items = shop / "items.csv"
    items.write_text(items.read_text().replace("thing 0", "red mug"))  # as long, so it is encoded beside the same others
    renamed = frozen_features(load_data("shop"), clip)
    assert not torch.allclose(after["text"][0], renamed["text"][0])
    assert torch.equal(after["text"][1:11], renamed["text"][1:11])  # the last has the mean
    assert not [p for p in cache_dir().iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("content, message", [
    ("a,b\n1,2\n", "has no user column; its columns, as they are read, are a, b"),
    ("user,item\n1,2\n,3\n", "line 3, column 'user': a missing value is not an id"),
    ("user,item,rating\n1,2,good\n", "line 2, column 'rating'"),
    ("user,item,x_label\n1,2,7\n", "line 2, column 'split': .*7.* is not 0 \\(train\\), 1 \\(valid\\) or 2"),
    ("user,userID,item\n1,1,2\n", "columns \\['user', 'userID'\\] all mean 'user'"),
])
def test_bad_interactions_name_line_and_column(shop, content, message):
    (shop / "interactions.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        load_data("shop")


def test_items_that_join_nothing(shop):
    (shop / "items.csv").write_text("itemID,title\n1,a\n2,b\n")
    with pytest.raises(DataError, match="none of its ids occurs in the interactions"):
        load_data("shop")


def test_ready_made_features_run_stage1_and_are_refused_by_stage2(tmp_path, monkeypatch, runs):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    folder = tmp_path / "ready"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [(u, i, [0, 0, 0, 0, 1, 2][n]) for u in range(30) for n, i in enumerate(rng.choice(20, 6, replace=False))]
    (folder / "ready.inter").write_text("userID\titemID\tx_label\n" + "".join(f"{u}\t{i}\t{x}\n" for u, i, x in rows))
    np.save(folder / "image_feat.npy", rng.normal(size=(20, 16)).astype(np.float32))
    np.save(folder / "text_feat.npy", rng.normal(size=(20, 8)).astype(np.float16))
    run, = run_stage1("ready", epochs=2, n_seeds=1)
    assert 0 <= run.metrics()["test"]["recall@20"] <= 1
    with pytest.raises(DataError, match="ready-made features, .* no images or texts of its own"):
        run_stage2("ready", n_seeds=1)
    (folder / "items.csv").write_text("item,title\n" + "".join(f"{i},thing {i}\n" for i in range(20)))
    with pytest.raises(DataError, match="Move its .npy files away, and the CLIP"):
        run_stage2("ready", n_seeds=1)
    (folder / "text_feat.npy").unlink()
    with pytest.warns(UserWarning, match="ready-made features .image., .* not its own text"):
        run_stage1("ready", epochs=1, n_seeds=1)
    np.save(folder / "image_feat.npy", np.zeros((5, 16), np.float32))
    with pytest.raises(DataError, match="image_feat.npy has 5 rows"):
        load_data("ready")


def test_hub_weights_without_a_network_fail_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    start = time.time()
    with pytest.raises(DataError, match="model hub does not answer. Connect to the network once, or give a weights file"):
        load_clip("ViT-B-32", "openai")
    assert time.time() - start < 20


def test_a_killed_run_is_not_a_finished_one_and_resumes(runs, monkeypatch):
    import ptmrec.stage1 as stage1

    whole, = run_stage1(epochs=25, patience=25, n_seeds=1)
    expected = whole.metrics()
    shutil.rmtree(whole.folder)
    evaluate, calls = stage1.evaluate, []
    monkeypatch.setattr(stage1, "Checkpoint", partial(stage1.Checkpoint, seconds=0, share=1))

    def dies(*args):
        calls.append(1)
        if len(calls) == 23:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(stage1, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        run_stage1(epochs=25, patience=25, n_seeds=1)
    assert not whole.finished and (whole.folder / "checkpoint.pt").exists()
    monkeypatch.setattr(stage1, "evaluate", evaluate)
    resumed, = run_stage1(epochs=25, patience=25, n_seeds=1)
    assert resumed.metrics() == expected and not (whole.folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_seeds_that_are_done_stay_done_after_a_kill(tmp_path, monkeypatch, stage):
    "The third call finds all seeds finished and uses them again; a rerun that is killed goes on as well."
    module = importlib.import_module(f"ptmrec.{stage}")
    experiment, train = (run_stage1, "train_backbone") if stage == "stage1" else (run_stage2, "tune")
    trained, original = [], getattr(module, train)
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    make_shop(tmp_path / "shop")
    settings = ({"epochs": 1, "backbone": "vbpr"} if stage == "stage1" else SHORT) | {"n_seeds": 3}

    def dies(*args, **more):
        trained.append(int(next(a for a in args if isinstance(a, str) and "seed" in a)[-1]))
        if len(trained) in (2, 6):
            raise KeyboardInterrupt
        return original(*args, **more)

    monkeypatch.setattr(module, train, dies)
    shop = tmp_path / "shop"
    with pytest.raises(KeyboardInterrupt):
        experiment(shop, **settings)
    first = experiment(shop, **settings)
    assert trained == [0, 1, 1, 2]
    again = experiment(shop, **settings)
    with pytest.raises(KeyboardInterrupt):
        experiment(shop, **settings, rerun=True)
    anew = experiment(shop, **settings, rerun=True)
    more = experiment(shop, **settings | {"n_seeds": 4})
    assert trained == [0, 1, 1, 2, 0, 1, 1, 2, 3]
    assert all([run.metrics() for run in first] == [run.metrics() for run in runs[:3]] for runs in (again, anew, more))


JOINT = {"task_weight": 1.0, "tune_backbone": True}


@pytest.mark.parametrize("backbone, settings", [("freedom", JOINT), ("mgcn", JOINT), ("freedom", {}), ("vbpr", JOINT)])
def test_a_killed_stage2_resumes(tmp_path, monkeypatch, backbone, settings):
    """Two epochs before and two after; item graphs, missing images and optimiser are as if nothing had happened.

    Nor does it matter to a training by the task loss how often it is validated.
    """
    import ptmrec.stage2 as stage2

    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    make_shop(tmp_path / "shop")
    settings = SHORT | settings | {"dataset": "shop", "backbone": backbone, "stage2_epochs": 4, "validate_every": 3}

    def history(where, **changes):
        monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / where))
        run, = run_stage2(**settings | changes)
        assert not (run.folder / "checkpoint.pt").exists()
        return run.load_table("history.csv")

    whole = history("whole")
    if "task_weight" in settings:
        assert whole.loss.equals(history("often", validate_every=1).loss)

    class Dies(stage2.Checkpoint):
        def after_epoch(self, loop):
            super().after_epoch(loop)
            if len(loop.history) == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage2, "Checkpoint", Dies)
        history("killed")
    pd.testing.assert_frame_equal(history("killed"), whole)


@pytest.mark.parametrize("function, asked", [("keep_variants", 1), ("score_variants", 0)])  # 1: for the memory it takes
def test_what_stage2_has_trained_survives_a_kill_in_its_evaluation(tmp_path, monkeypatch, runs, function, asked):
    import ptmrec.stage2 as stage2

    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    make_shop(tmp_path / "shop")
    losses, calls = stage2.Stage2.losses, []
    monkeypatch.setattr(stage2.Stage2, "losses", lambda self, *args: (calls.append(1), losses(self, *args))[1])

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage2, function, dies)
        run_stage2("shop", **SHORT)
    trained = len(calls)
    run, = run_stage2("shop", **SHORT)
    assert len(calls) == trained + asked and run.finished and len(run.load_table("history.csv")) == SHORT["stage2_epochs"]


@pytest.mark.parametrize("name, users, items, pairs", [
    ("baby", 19445, 7050, 160792), ("sports", 35598, 18357, 296337), ("clothing", 39387, 23033, 278677)])
def test_published_interactions_are_read_whole(name, users, items, pairs):
    folder = SHARED / "amazon" / name
    if not folder.is_dir():
        pytest.skip(f"the Amazon interactions are not at {folder} (set PTMREC_SHARED)")
    if name == "sports":  # its feature table has a row per item
        assert load_data(folder).features["text"].shape == (18357, 384)
    inter = load_data(folder).inter
    assert (inter.n_users, inter.n_items, len(inter)) == (users, items, pairs)


@pytest.fixture
def small(tmp_path, monkeypatch, runs):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    make_shop(tmp_path / "shop")
    return tmp_path / "shop"


def test_pictures_none_of_which_can_be_read_are_no_modality(small):
    for path in (small / "images").iterdir():
        path.write_text("<html>404</html>")
    with pytest.warns(UserWarning, match="36 unreadable images"):
        assert set(frozen_features(load_data("shop"), load_clip())) == {"text"}
    (small / "items.csv").unlink()
    with pytest.raises(DataError, match="'shop': none of its images can be read, and it has no texts"):
        frozen_features(load_data("shop"), load_clip())


def test_numbers_in_texts_stay_as_written(small):
    (small / "items.csv").write_text("item,title,brand\n0,first,007\n1,second,\n2,1984,7\n")
    assert load_data("shop").texts[:3] == ["first. 007", "second", "1984. 7"]


def test_no_training_interaction(small):
    table = pd.read_csv(small / "interactions.csv")
    table[table.x_label > 0].to_csv(small / "interactions.csv", index=False)
    with pytest.raises(DataError, match="no training interaction"):
        run_stage1("shop", backbone="bpr", n_seeds=1)


@pytest.mark.parametrize("changes, message", [
    ({"epochs": 0}, "epochs=0 is not allowed"), ({"stage2_epochs": 0}, "stage2_epochs=0 is not allowed"),
    ({"tuning": "lora", "lora_targets": "mpl", "n_ctx": None, "prompt_depth": None},
     "Did you mean mlp"), ({"cache_prefix": True}, "trained from its first layer on"),
    ({"prompt_depth": 9}, "prompt_depth|layers"), ({"backbone": "smore"}, "knn_k_image=40 neighbours need as many items")])
def test_what_cannot_work_is_refused_before_anything_is_trained(small, monkeypatch, changes, message):
    monkeypatch.setattr("ptmrec.stage1.train_backbone", lambda *args, **how: pytest.fail("Stage 1 has begun"))
    with pytest.raises((ValueError, DataError), match=message):
        run_stage2(**SHORT | {"dataset": "shop", "backbone": "vbpr"} | changes)


def test_a_backbone_without_features_needs_no_clip(small, monkeypatch):
    monkeypatch.setattr("ptmrec.stage1.load_clip", lambda *args: pytest.fail("a CLIP was loaded"))
    run, = run_stage1("shop", backbone="lightgcn", clip_model="no such", epochs=1, n_seeds=1)
    assert run.finished


def test_the_sample_by_name_or_by_folder_has_the_same_defaults():
    by = [resolve(run_stage1.experiment, {"dataset": name}) for name in ("sample", ROOT / "data" / "sample")]
    assert [(p.n_seeds, p.lr, p.batch_size, p.image_weight) for p in by] == [(3, 5e-3, 512, 0.5)] * 2


def test_what_a_container_may_use(tmp_path):
    assert container_free(tmp_path) == math.inf
    for name, content in {"max": "1000", "current": "700", "stat": "anon 600\ninactive_file 80\n"}.items():
        (tmp_path / f"memory.{name}").write_text(content)
    assert container_free(tmp_path) == 380
    (tmp_path / "memory.max").write_text("max\n")
    assert container_free(tmp_path) == math.inf
