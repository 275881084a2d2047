"""What training tells about the test, against slow references and on real data."""
import warnings
from dataclasses import replace

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from ptmrec import leaks
from ptmrec.data import Interactions, RecData, load_data
from ptmrec.leaks import (
    check_leaks,
    duplicate_groups,
    items_under_two_ids,
    leak_line,
    older_than_training,
    only_in_test,
    pairs_in_two_splits,
)
from ptmrec.settings import resolve
from ptmrec.stage1 import load_inputs, run_stage1

PAIRS, TWINS, OWN, ANY, NEW = (
    "interactions repeat a pair of another split", "test items are in training under another id",
    "test interactions are older than their user's last training one",
    "test interactions are older than anybody's last training one", "items are only in test")


def drawn(seed):
    "Interactions with repeated pairs, and items of which some have equal texts and pictures."
    rng = np.random.default_rng(seed)
    user, item, split, time = (rng.integers(0, high, 90) for high in (12, 20, 3, 40))
    inter = Interactions(user, item, split, np.arange(12), np.arange(20), time)
    return RecData("drawn", inter, [f"text {n}" if n else "" for n in rng.integers(0, 9, 20)], [None] * 20)


@pytest.mark.parametrize("seed", range(5))
def test_against_slow_references(seed):
    data = drawn(seed)
    rows = list(zip(*(x.tolist() for x in (data.inter.user, data.inter.item, data.inter.split, data.inter.time))))
    train, test = ([r for r in rows if r[2] == s] for s in (0, 2))
    assert pairs_in_two_splits(data.inter).tolist() == [
        n for n, (u, i, s, _) in enumerate(rows) if any((v, j) == (u, i) and other < s for v, j, other, _ in rows)]
    trained = {i for _, i, *_ in train}
    assert items_under_two_ids(data).tolist() == sorted({i for _, i, *_ in test if data.texts[i] and any(
        j != i and data.texts[j] == data.texts[i] for j in trained)})
    assert only_in_test(data.inter).tolist() == sorted({i for _, i, *_ in test} - {i for _, i, s, _ in rows if s < 2})
    for own in (True, False):
        assert older_than_training(data.inter, own).tolist() == [
            n for n, (u, _, s, t) in enumerate(rows)
            if s == 2 and any(t < w and (v == u or not own) for v, _, _, w in train)]


def test_items_are_the_same_if_text_and_picture_are(tmp_path):
    data = drawn(0)
    for n, colour in enumerate(["red", "red", "blue"]):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{n}.png")
    files = [tmp_path / f"{n}.png" for n in range(3)] + [tmp_path / "missing.png", None]
    some = replace(data, texts=["A mug"] * 5, images=files)
    groups = duplicate_groups(some)
    assert groups[0] == groups[1] != groups[2] and groups[3] == groups[4] != groups[0]
    assert len(set(duplicate_groups(replace(some, texts=["A mug", "A hat", "", "", ""])))) == 5


def test_pairs_that_loading_took_out_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    rows = [(u, i, (0, 0, 1, 2)[i]) for u in range(3) for i in range(4)] + [(0, 0, 2)]
    (tmp_path / "interactions.csv").write_text("user,item,x_label\n" + "".join(f"{u},{i},{s}\n" for u, i, s in rows))
    with pytest.warns(UserWarning, match="in two splits"):
        data = load_data(tmp_path)
    assert check_leaks(data).loc[PAIRS, ["found", "of"]].tolist() == [1, 13] and OWN not in check_leaks(data).index
    assert "1 of 13 interactions repeat a pair" in leak_line(data) and "(times are not known)" in leak_line(data)


def test_splits_by_time_do_not_train_on_a_users_future(movielens, tmp_path, monkeypatch):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for split in ("random", "user_time", "global_time"):
            found[split] = check_leaks(load_data(movielens, core=5, split=split)).found
    assert found["random"][OWN] > 5000 and found["user_time"][OWN] == 0 < found["user_time"][ANY]
    assert found["global_time"][[OWN, ANY]].tolist() == [0, 0] and (found["random"][[PAIRS, TWINS]] == 0).all()


@pytest.mark.parametrize("name", ["baby", "sports", "clothing"])
def test_amazon_has_no_pair_in_two_splits(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    if not (folder := SHARED / "amazon" / name).is_dir():
        pytest.skip(f"the Amazon interactions are not at {folder} (set PTMREC_SHARED)")
    assert check_leaks(load_data(folder)).found[PAIRS] == 0


def test_an_experiment_says_it_once(capsys, monkeypatch):
    monkeypatch.setattr(leaks, "_SAID", set())
    settings = resolve(run_stage1.experiment, {"dataset": "sample", "backbone": "lightgcn", "device": "cpu"})
    for _ in range(2):
        load_inputs(settings)
    line = leak_line(load_data("sample"))
    assert capsys.readouterr().out.count(line) == 1 and "4 of 1,486 items are only in test" in line
