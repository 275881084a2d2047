"""Folders in every format, splits, what is wrong in them, and what is derived from them."""
import os
import unicodedata
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED
from PIL import Image

from ptmrec.clip_prompting import frozen_features
from ptmrec.data import (
    MODALITIES,
    SPLIT_RULES,
    DataError,
    Interactions,
    Modality,
    NotFound,
    RecData,
    cache_dir,
    dataset_names,
    describe,
    find_dataset,
    find_path,
    fingerprint,
    k_core,
    load_data,
    make_split,
    random_split,
    read_table,
    repo_root,
    show_items,
    show_statistics,
)
from ptmrec.graphs import knn_graph
from ptmrec.leaks import pairs_in_two_splits
from ptmrec.ranking import CUTOFFS, Evaluator
from ptmrec.stage1 import build_backbone

PUBLISHED = {"baby": (19445, 7050, 160792), "sports": (35598, 18357, 296337), "clothing": (39387, 23033, 278677)}


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty data folder."
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    return tmp_path


def folder_of(home, name="shop", **files):
    "A data-set folder; each keyword is a file, dots written as `__`, its value text, array or table."
    folder = home / name
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        path = folder / file.replace("__", ".")
        if isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, np.ndarray):
            np.save(path, content)
        else:
            content.to_parquet(path)
    return folder


def amazon(name):
    folder = SHARED / "amazon" / name
    if not folder.is_dir():
        pytest.skip(f"the Amazon interactions are not at {folder} (set PTMREC_SHARED)")
    return folder


# Places

def test_a_data_set_is_looked_for_here_first_then_in_the_data_folder_then_in_the_checkout(tmp_path, monkeypatch):
    home, here, user = (tmp_path / name for name in ("home", "here", "user"))
    for folder in (home, here, user):
        folder.mkdir()
    monkeypatch.setenv("PTMREC_DATA", str(home))
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.chdir(here)
    assert find_dataset("sample") == find_dataset("data/sample") == repo_root() / "data" / "sample"
    at_home, at_here, of_user = (folder_of(f, "sample", interactions__csv="user,item\n1,2\n") for f in (home, here, user))
    assert find_dataset("sample") == at_here and find_dataset("~/sample") == of_user
    (at_here / "interactions.csv").unlink()  # a folder of this name that is no data set does not hide one that is
    assert find_dataset("sample") == at_home and find_dataset(at_here) == at_here
    with pytest.raises(DataError, match=f"'simple'. Did you mean sample.*{here}/simple, {home}/simple, .*/data/simple"):
        find_dataset("simple")


def test_a_file_is_looked_for_in_the_same_places(tmp_path, monkeypatch, home):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert find_path("settings.ini") == repo_root() / "settings.ini" and find_path("best.safetensors") is None
    for folder in (home, here):
        (folder / "best.safetensors").touch()
        assert find_path("best.safetensors") == folder / "best.safetensors"


def test_folders_that_cannot_be_read_are_no_data_sets(home, monkeypatch):
    "A disk of one's own has a lost+found, which belongs to the system."
    folder_of(home, interactions__csv=GOOD)
    (home / "lost+found").mkdir()

    def guarded(list_names):
        def names(path="."):
            if "lost+found" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return list_names(path)
        return names

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    with pytest.raises(NotFound, match="No data set 'shp'. Did you mean shop"):
        find_dataset("shp")
    assert "shop" in dataset_names() and "lost+found" not in dataset_names()


def test_objects_show_themselves_in_one_line(home):
    data = load_data("sample")
    assert repr(data) == "RecData('sample': 1,500 users, 1,486 items, 12,000 interactions; images 1,486, texts 1,486)"
    assert len(repr(data.inter)) < 200 and "12,000" in data._repr_html_() and "12,000" in data.inter._repr_html_()


def test_a_registered_modality_is_read(home, monkeypatch):
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "songs"))
    folder_of(home, interactions__csv="user,item\n0,0\n0,1\n0,2\n", audio_feat__npy=np.eye(3, dtype=np.float32))
    data = load_data("shop")
    assert np.array_equal(data.features["audio"], np.eye(3)) and "audio features 3-d" in repr(data)
    monkeypatch.delitem(MODALITIES, "audio")
    assert not load_data("shop").features


# Formats

PAIRS = pd.DataFrame({"user": ["007"] * 3 + ["7", "ann"], "item": [3, 10, 4, 10, 3], "rating": [5.0, 4.0, 3.0, 2.0, 1.0],
                      "time": [30, 10, 20, 10, 20]})


def as_text(table, separator, headers=None):
    table = table if headers is None else table.set_axis(headers, axis=1)
    return table.to_csv(sep=separator, index=False)


@pytest.mark.parametrize("file, content", [
    ("interactions__csv", as_text(PAIRS, ",")),
    ("ratings__tsv", as_text(PAIRS, "\t", ["reviewerID", "asin", "overall", "unixReviewTime"])),
    ("shop__inter", as_text(PAIRS, "\t", ["user_id:token", "item_id:token", "rating:float", "timestamp:float"])),
    ("shop__inter", as_text(PAIRS, "\t", ["userID", "itemID", "rating", "timestamp"])),
    ("interactions__parquet", PAIRS),
])
def test_every_format_gives_the_same_data(home, file, content):
    folder_of(home, **{file: content})
    inter = load_data("shop", min_rating=2).inter
    assert inter.user_ids.tolist() == ["007", "7"] and inter.item_ids.tolist() == [3, 4, 10]
    assert inter.user.tolist() == [0, 0, 0, 1] and inter.item.tolist() == [0, 2, 1, 2]
    assert inter.time.tolist() == [30, 10, 20, 10]


def test_integer_ids_are_numbers_and_join_text_ids(home):
    folder = folder_of(home, interactions__csv="user,item\n2,10\n10,9\n10,10\n10,11\n",
                       shop__item="item_id:token\ttitle:token_seq\n9\tnine\n010\tother\n10\tten\n")
    data = load_data("shop")
    assert data.inter.item_ids.tolist() == [9, 10, 11] and data.inter.user_ids.tolist() == [2, 10]
    assert data.texts == ["nine", "ten", ""] and read_table(folder / "shop.item").item.tolist() == ["9", "010", "10"]


def test_images_are_found_by_column_or_by_name(home):
    folder = folder_of(home, interactions__csv="user,item\n1,a\n1,b\n1,c\n",
                       items__csv="item,image\na,pictures/x.png\nb,https://shop.example/b.jpg\n")
    for place in ("pictures", "images"):
        (folder / place).mkdir()
    for file in ("pictures/x.png", "images/b.jpg"):
        Image.new("RGB", (8, 8)).save(folder / file)
    assert load_data("shop").images == [folder / "pictures/x.png", folder / "images/b.jpg", None]


@pytest.mark.parametrize("of_id, of_file", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_picture_may_spell_its_accents_differently(home, of_id, of_file):
    "macOS writes é as two characters, most tables as one."
    ids = [unicodedata.normalize(of_id, item) for item in ("café", "crème", "mug")]
    folder = folder_of(home, interactions__csv="user,item\n" + "".join(f"1,{item}\n" for item in ids))
    (folder / "images").mkdir()
    files = [folder / "images" / f"{unicodedata.normalize(of_file, item)}.png" for item in ids]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)
    assert load_data("shop").images == files


@pytest.mark.parametrize("of_interactions, of_items", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_table_of_items_may_spell_its_accents_differently(home, of_interactions, of_items):
    ids = [unicodedata.normalize(of_interactions, item) for item in ("café", "crème", "mug")]
    spelt = [unicodedata.normalize(of_items, item) for item in ids]
    pairs = [(u, item) for u in range(3) for item in ids]
    folder_of(home, interactions__parquet=pd.DataFrame(pairs, columns=["user", "item"]),
              items__parquet=pd.DataFrame({"item": spelt, "title": ["A", "B", "C"]}))
    data = load_data("shop")
    assert data.inter.item_ids.tolist() == sorted(ids)
    assert dict(zip(data.inter.item_ids, data.texts)) == dict(zip(ids, "ABC"))
    both = pd.DataFrame({"item": [*spelt[:1], *ids], "title": [*"DABC"]})
    with pytest.warns(UserWarning, match="1 repeated items"):
        data = RecData.from_frames(pd.DataFrame(pairs, columns=["user", "item"]), both)
    assert dict(zip(data.inter.item_ids, data.texts)) == dict(zip(ids, "DBC"))


def test_a_picture_in_two_folders_is_said(home):
    folder = folder_of(home, interactions__csv=GOOD)
    for place, items in (("images", (0, 1, 2)), ("posters", (1, 2, 3))):
        (folder / place).mkdir()
        for item in items:
            Image.new("RGB", (8, 8)).save(folder / place / f"{item}.png")
    with pytest.warns(UserWarning, match=r"2 items have files in several of images, posters \(the first: 1\); those in "):
        data = load_data("shop")
    assert [p.parent.name for p in data.images] == ["images", "posters", "posters", "posters"]


def test_mmrec_folder_row_is_item_id(home):
    features = np.arange(12, dtype=np.float32).reshape(6, 2)
    folder_of(home, interactions__inter="userID\titemID\tx_label\n0\t5\t0\n0\t2\t1\n0\t0\t2\n", image_feat__npy=features)
    data = load_data("shop")
    assert np.array_equal(data.features["image"], features[[0, 2, 5]]) and not data.has_content


def test_a_row_of_zeros_is_an_item_without_content(home):
    features = np.random.default_rng(0).random((40, 16)).astype(np.float32)
    features[[5, 12]] = 0
    folder_of(home, interactions__csv="user,item\n" + "".join(f"{i % 8},{i}\n" for i in range(40)), image_feat__npy=features)
    with pytest.warns(UserWarning, match="image_feat.npy: 2 of 40 items have a row of zeros"):
        data = load_data("shop")
    table = torch.from_numpy(data.features["image"])
    for graph in (knn_graph(table, 5), knn_graph(torch.nn.Linear(16, 8)(table).detach(), 5)):
        linked = graph.to_dense().any(1)
        assert not linked[[5, 12]].any() and linked.sum() == 38 and torch.equal(linked, graph.to_dense().any(0))
    others = np.delete(np.arange(40), [5, 12])
    assert len(data.notes) == 1 and np.array_equal(data.features["image"][others], features[others])


# Splits

SIZES = {  # train, validation, test by random and by random_lattice
    "baby": (118551, 20559, 21682), "sports": (218409, 37899, 40029), "clothing": (197338, 40150, 41189)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_come_out(home, name):
    inter = load_data(amazon(name)).inter
    assert (inter.n_users, inter.n_items, len(inter)) == PUBLISHED[name]
    train, valid, test = SIZES[name]
    given = np.bincount(inter.split).tolist()
    assert given == ([119674, 20559, 20559] if name == "baby" else [train, test, valid])
    for split, sizes in {"random": [train, valid, test], "random_lattice": [train, test, valid]}.items():
        made = load_data(amazon(name), split=split).inter
        assert np.bincount(made.split).tolist() == sizes
    rule = "train" if name == "baby" else "valid"
    per_user = [np.bincount(inter.user[s == 2]) for s in (inter.split, random_split(inter.user, 5, rule))]
    assert np.array_equal(*per_user)


def slow_time_split(rule, rows):
    "Reference: `rows` are (user, item, time) of one user, oldest first."
    n, label = len(rows), [0] * len(rows)
    valid = max(1, n // 10) if n >= 3 else 0
    test = (max(1, n // 10) + (n >= 10 and n // 5 % 2) if n >= 3 else 0)
    valid, test = (valid, test) if rule == "user_time" else (min(valid, 1), min(test, 1))
    return [2 if i >= n - test else 1 if i >= n - test - valid else label[i] for i in range(n)]


@pytest.mark.parametrize("rule", ["leave_last_out", "user_time"])
def test_time_splits_against_a_slow_reference(rule):
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(40), np.arange(1, 41))
    item = np.concatenate([rng.permutation(60)[:n] for n in range(1, 41)])
    time = rng.integers(0, 9, len(user))  # many ties
    label = make_split(rule, user, item, time)
    for u in range(40):
        rows = sorted((time[i], item[i], i) for i in np.flatnonzero(user == u))
        assert [int(label[i]) for *_, i in rows] == slow_time_split(rule, rows)
    shuffled = rng.permutation(len(user))
    assert np.array_equal(make_split(rule, user[shuffled], item[shuffled], time[shuffled]), label[shuffled])


def test_global_time_never_divides_a_moment(movielens, home):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inter = load_data(movielens, split="global_time").inter
    share = np.bincount(inter.split) / len(inter)
    assert np.allclose(share, [0.8, 0.1, 0.1], atol=0.01) and inter.cold("item").sum() > 100
    time = np.repeat([1, 2, 3], [16, 2, 2])
    assert make_split("global_time", time, time, time).tolist() == [0] * 16 + [1] * 2 + [2] * 2
    with pytest.raises(DataError, match="same time"):
        make_split("global_time", time, time, time * 0)


@pytest.mark.parametrize("rule", ["leave_last_out", "user_time", "global_time"])
def test_a_split_by_time_wants_times(home, rule):
    with pytest.raises(DataError, match=f"split='{rule}' needs times, and there are none. Choose split=random, or add"):
        Interactions.from_table(pd.DataFrame({"user": [1] * 9, "item": range(9)}), split=rule)


def test_splits_are_saved_and_found_again(home, monkeypatch):
    rows = [f"{u},{i},{i + 2 * u}\n" for u in range(6) for i in range(15)]
    folder_of(home, interactions__csv="user,item,timestamp\n" + "".join(rows))
    made = {rule: load_data("shop", split=rule) for rule in SPLIT_RULES}
    assert len({d.fingerprint() for d in made.values()}) == len(SPLIT_RULES)
    other = load_data("shop", split="random", split_seed=1)
    monkeypatch.setattr("ptmrec.data.make_split", None)
    for rule, data in made.items():
        assert load_data("shop", split=rule).fingerprint() == data.fingerprint() != other.fingerprint()
    assert len(list(cache_dir().glob("split-*.npy"))) == len(SPLIT_RULES) + 1


def test_own_split_is_kept_unless_a_rule_is_named(home):
    folder_of(home, interactions__csv="user,item,x_label\n" + "".join(f"0,{i},{(2, 1, 0)[min(i, 2)]}\n" for i in range(9)))
    assert load_data("shop").inter.split.tolist() == [2, 1] + [0] * 7
    assert np.bincount(load_data("shop", split="random", split_seed=3).inter.split).tolist() == [7, 1, 1]


def test_dates_are_times(home):
    folder_of(home, interactions__csv="user,item,date\n0,0,2014-07-23\n0,1,2013-07-23T10:00\n0,2,2012-01-01\n")
    assert load_data("shop", split="leave_last_out").inter.split.tolist() == [2, 1, 0]


def slow_core(pairs, k):
    while True:
        left = [(u, i) for u, i in pairs if sum(u == v for v, _ in pairs) >= k and sum(i == j for _, j in pairs) >= k]
        if len(left) == len(pairs):
            return left
        pairs = left


def test_k_core_against_a_slow_reference():
    rng = np.random.default_rng(0)
    pairs = sorted({(int(u), f"i{i}") for u, i in zip(rng.integers(0, 40, 150), rng.integers(0, 40, 150))})
    for k in (2, 3, 4, 30):
        core = k_core(pd.DataFrame(pairs, columns=["user", "item"]), k)
        assert list(zip(core.user, core.item)) == slow_core(pairs, k)


def test_movielens_core(movielens, home):
    with pytest.warns(UserWarning, match="All ratings from 0.5 to 5"):
        data = load_data(movielens, core=5)
    assert (data.inter.n_users, len(data.inter) + data.left_out["outside the 5-core"]) == (610, 100836)
    assert min(np.bincount(data.inter.user).min(), np.bincount(data.inter.item).min()) >= 5
    assert sum(p is not None for p in data.images) == 3627


# Bad input

GOOD = "user,item\n" + "".join(f"{u},{i}\n" for u in range(4) for i in range(4))
CSV, TEXT = "interactions__csv", "text_feat__npy"
BAD = {  # files, load_data's arguments, the error
    "no interactions": ({"items__csv": "item,title\n1,a\n"}, {}, "shop has no interactions file"),
    "missing column": ({CSV: "user,thing\n1,2\n"}, {}, "interactions.csv has no item column; .* user, thing"),
    "empty file": ({CSV: ""}, {}, "interactions.csv is empty"),
    "short of a header": ({CSV: "user,item\n1,2\n1,2,3\n"}, {}, "interactions.csv cannot be read as a table.* line 3"),
    "damaged parquet": ({"interactions__parquet": "PAR1"}, {}, "interactions.parquet cannot be read as Parquet"),
    "no id": ({CSV: "user,item\n1,2\n\n2,\n"}, {}, "interactions.csv, line 4, column 'item': a missing value is not an id"),
    "an id of two lines": ({CSV: 'user,item\n1,"a\nb"\n'}, {}, "column 'item': the id .* has several lines"),
    "no rows": ({CSV: "user,item\n"}, {}, "interactions.csv has no rows"),
    "no id, quoted lines": ({CSV: 'user,item,title\n1,2,"a\nb"\n2,,c\n'}, {}, "line 4, column 'item'"),
    "parquet row": ({"interactions__parquet": pd.DataFrame({"user": [1, 2], "item": ["a", None]})}, {}, "row 2, column"),
    "label": ({CSV: "user,item,x_label\n1,2,0\n1,3,7\n"}, {}, "line 3, column 'split': 7 is not 0"),
    "negative label": ({CSV: "user,item,x_label\n1,2,-1\n"}, {}, "line 2, column 'split': -1 is not 0"),
    "missing label": ({CSV: "user,item,x_label\n1,2,0\n1,3,\n"}, {}, "line 3, column 'split': a missing value is not 0"),
    "rating in words": ({CSV: "user,item,rating\n1,2,good\n"}, {}, "line 2, column 'rating': good is not a number"),
    "rating NaN": ({CSV: "user,item,rating\n1,2,3\n1,3,nan\n"}, {}, "line 3, .* 'rating': a missing value is not a number"),
    "rating infinite": ({CSV: "user,item,rating\n1,2,inf\n"}, {}, "line 2, column 'rating': inf is too large for a rating"),
    "rating huge": ({CSV: "user,item,rating\n1,2,1e30\n"}, {}, "line 2, column 'rating': 1e\\+30 is too large for a rating"),
    "no ratings": ({CSV: GOOD}, {"min_rating": 3}, "min_rating=3 needs a rating column"),
    "nothing left": ({CSV: GOOD}, {"core": 9}, "no interactions are left .*core=9"),
    "no times": ({CSV: GOOD}, {"split": "user_time"}, "interactions.csv has no time column"),
    "bad time": ({CSV: "user,item,time\n1,2,noon\n"}, {"split": "user_time"}, "line 2, column 'time': noon"),
    "missing time": ({CSV: "user,item,time\n1,2,3\n1,3,\n"}, {"split": "global_time"}, "line 3, column 'time'"),
    "time out of range": ({CSV: "user,item,time\n1,2,0001-01-01\n"}, {"split": "user_time"}, "line 2.* years 1678"),
    "histories without times": ({CSV: "user,item,time,item_id_list\n1,2,3,4 5\n"}, {"split": "user_time"},
                                "interactions.csv has lists of earlier items, whose times"),
    "floats in one file": ({"train__parquet": pd.DataFrame({"user": [1.0, 2.0], "item": [1, 2]}),
                            "test__csv": "user,item\n1,2\n"}, {}, "user ids of train.parquet are floats .such as 1.0.*test"),
    "unknown rule": ({CSV: GOOD}, {"split": "by_moon"}, "by_moon' is not a split rule. .*leave_last_out"),
    "two users": ({CSV: "user,userID,item\n1,1,2\n"}, {}, "columns \\['user', 'userID'\\] all mean 'user'"),
    "items join nothing": ({CSV: GOOD, "items__csv": "item,title\nx,a\n"}, {}, "items.csv, column 'item': none"),
    "items without ids": ({CSV: GOOD, "items__csv": "item,title\n1,a\n,b\n"}, {}, "items.csv, line 3, column 'item'"),
    "feature rows": ({CSV: GOOD, TEXT: np.zeros((3, 2))}, {}, "text_feat.npy has 3 rows"),
    "feature NaN": ({CSV: GOOD, TEXT: np.array([[0.0]] * 3 + [[np.nan]])}, {}, "text_feat.npy, row 3"),
    "feature shape": ({CSV: GOOD, TEXT: np.zeros(4)}, {}, "text_feat.npy must hold a table"),
    "feature file": ({CSV: GOOD, TEXT: "no array"}, {}, "text_feat.npy cannot be read"),
    "features of text ids": ({CSV: "user,item\n1,a\n1,b\n1,c\n", TEXT: np.zeros((1, 2))}, {}, "has 1 rows"),
    "single interactions": ({CSV: "user,item\n1,2\n2,3\n3,2\n"}, {}, "no user has three .* left for validation and test"),
    "no validation": ({CSV: "user,item,x_label\n1,2,0\n1,3,2\n"}, {}, "its own split has no validation interaction"),
}


@pytest.mark.parametrize("files, arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_error_that_names_the_place(home, files, arguments, message):
    folder_of(home, **files)
    with pytest.raises(DataError, match=f"(?s){message}"):
        load_data("shop", **arguments)
    assert not cache_dir().exists() or not [p for p in cache_dir().iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("kinds", [("parquet", "text"), ("text", "parquet"), ("csv", "parquet"), ("parquet", "csv")])
def test_ids_of_split_files_are_of_one_type(home, kinds):
    pairs = pd.DataFrame([(u, i) for u in range(4) for i in range(6)], columns=["user", "item"])
    for name, of_split, kind in zip(("train", "valid", "test"), (pairs.item > 1, pairs.item == 0, pairs.item == 1),
                                    (kinds[0], *kinds)):
        part = pairs[of_split]
        folder_of(home, **{f"{name}__csv": part.to_csv(index=False)} if kind == "csv" else
                  {f"{name}__parquet": part.astype(str) if kind == "text" else part})
    inter = load_data("shop").inter
    assert inter.user_ids.tolist() == [*range(4)] and inter.item_ids.tolist() == [*range(6)]
    assert inter.cold("item").tolist() == [True, True, *[False] * 4]


LARGE = 2**60  # as floats, neighbours are the same number


@pytest.mark.parametrize("first, expected", [(LARGE, np.int64), (2**63 - 3, str)])
@pytest.mark.parametrize("way", ["files of a split", "parts", "frames of a split"])
def test_signed_and_unsigned_ids_stay_apart(home, way, first, expected):
    pairs = pd.DataFrame([(first + u, i) for u in range(4) for i in range(6)], columns=["user", "item"])
    kinds = {"train": "int64", "valid": "uint64", "test": "uint64"}
    rows = {"train": pairs.item > 1, "valid": pairs.item == 0, "test": pairs.item == 1}
    if first + 3 > np.iinfo(np.int64).max:
        rows["train"] &= pairs.user <= np.iinfo(np.int64).max
    parts = {name: pairs[rows[name]].astype({"user": kind}) for name, kind in kinds.items()}
    if way == "frames of a split":
        data = RecData.from_frames(parts)
    else:
        names = dict(zip(parts, ("ratings-0", "ratings-1", "ratings-2") if way == "parts" else parts))
        folder_of(home, **{f"{names[name]}__parquet": part for name, part in parts.items()})
        data = load_data("shop")
    assert data.inter.user_ids.tolist() == [expected(n) for n in range(first, first + 4)]
    assert len(data.inter) == sum(map(len, parts.values()))


def test_parts_of_an_item_table_may_have_signed_and_unsigned_ids(home):
    pairs = pd.DataFrame([(u, LARGE + i) for u in range(4) for i in range(4)], columns=["user", "item"])
    items = pd.DataFrame({"item": [LARGE + i for i in range(4)], "title": [*"ABCD"]})
    folder_of(home, interactions__parquet=pairs, **{"items-0__parquet": items[:2].astype({"item": "uint64"}),
                                                    "items-1__parquet": items[2:]})
    assert load_data("shop").texts == [*"ABCD"]


def test_categories_that_are_numbers_may_be_missing():
    pairs = pd.DataFrame([(u, i) for u in range(4) for i in range(4)], columns=["user", "item"])
    items = pd.DataFrame({"item": range(4), "title": "Mug", "year": pd.Categorical([2014, None, 2015, 2014])})
    data = RecData.from_frames(pairs, items)
    assert data.texts == ["Mug"] * 4 and data.items.year.tolist()[::2] == [2014, 2015]
    rated = pairs.assign(rating=pd.Categorical([5, None] * 8))
    with pytest.raises(DataError, match="column 'rating': a missing value is not a number"):
        RecData.from_frames(rated)
    with pytest.raises(DataError, match="column 'item': a missing value is not an id"):
        RecData.from_frames(pairs.assign(item=pd.Categorical([1, None] * 8)))


def test_histories_of_frames_are_read_as_those_of_files(home):
    pairs = pd.DataFrame({"user": [*"aaabbb"], "item": [*"xyzxyz"], "item_id_list": ["v w"] * 6})
    assert len(RecData.from_frames(pairs).inter) == len(pairs) + 4


def test_pictures_inside_a_table_are_counted_and_gifs_are_read(home):
    pairs = pd.DataFrame([(u, i) for u in range(4) for i in range(4)], columns=["user", "item"])
    folder = folder_of(home, interactions__parquet=pairs, items__parquet=pd.DataFrame(
        {"item": range(4), "title": "a", "image": [{"bytes": b"\xff" * 9999, "path": None}] * 3 + [None]}))
    (folder / "images").mkdir()
    for item, ending in enumerate(("jpg", "gif", "bmp")):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{item}.{ending}")
    data = load_data("shop")
    assert [p and p.name for p in data.images] == ["0.jpg", "1.gif", "2.bmp", None]
    assert [note for note in data.notes if "3 values of the column 'image' are not file names (the first is of type dict)" in
            note] and max(map(len, data.notes)) < 300


def test_images_that_join_nothing(home):
    folder = folder_of(home, interactions__csv=GOOD)
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "hat.jpg")
    with pytest.raises(DataError, match="images: none of its 1 files is named after an item .*hat.jpg"):
        load_data("shop")


def test_repeated_rows_are_counted_once(home):
    folder_of(home, interactions__csv=GOOD + "0,0\n1,1\n", items__csv="item,title\n1,a\n1,b\n")
    with pytest.warns(UserWarning) as caught:
        data = load_data("shop")
    assert [str(w.message).split(": ", 1)[1] for w in caught] == [
        "2 repeated user-item pairs (first in line 18); each pair is kept once: its first row.",
        "1 of 4 items have a row (the first without: 0).",
        "1 repeated items (first in line 3), 1 of them with several titles; the first row of each counts."]
    assert data.texts == ["", "a", "", ""] and data.left_out == {"repeated pairs": 2}
    assert data.notes[0].startswith("interactions.csv: 2 repeated") and len(data.notes) == 3
    assert " ".join(describe(data).loc["note 3":, "shop"]) == data.notes[2]
    assert describe(data).loc["left out: repeated pairs", "shop"] == "2"


def test_a_pair_that_was_rated_again_counts_if_one_rating_is_good(home):
    rows = [f"{u},{i},{rating}\n" for u in range(4) for i in range(4) for rating in (1, 5, 5)]
    folder_of(home, interactions__csv="user,item,rating\n" + "".join(rows))
    with pytest.warns(UserWarning, match="16 repeated user-item pairs .first in line 4.; each pair is kept once"):
        data = load_data("shop", min_rating=4)
    assert len(data.inter) == 16 and data.left_out == {"rated under 4": 16, "repeated pairs": 16}
    with pytest.warns(UserWarning, match="All ratings from 1 to 5"):
        assert len(load_data("shop").inter) == 16


def test_pictures_survive_missing_and_unreadable_content(home):
    folder = folder_of(home, interactions__csv=GOOD)
    (folder / "images").mkdir()
    (folder / "images" / "0.jpg").write_text("<html>")
    data = load_data("shop")
    assert len(show_items(data, range(4), columns=2).axes) == 4 and len(show_statistics(data).axes) == 4


# Derived files

def test_replaced_files_rebuild_features_and_graphs(home):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 8, 4)).astype(np.float32)
    rows = [f"{u},{i},{0 if (u + i) % 5 else 1 + i % 2}\n" for u in range(6) for i in range(8)]
    folder = folder_of(home, interactions__csv="user,item,x_label\n" + "".join(rows), image_feat__npy=first)

    def everything():
        data = load_data("shop")
        features = frozen_features(data, None)
        backbone = build_backbone("freedom", data.inter, features, {"knn_k": 2})
        graphs = [graph.csr.to_dense() for graph in (backbone.graph, backbone.item_graph)]
        return data.fingerprint(), features["image"], graphs

    key, features, graphs = everything()
    assert everything()[0] == key
    np.save(folder / "image_feat.npy", second)
    new_key, new_features, new_graphs = everything()
    assert new_key != key and torch.equal(new_features, torch.from_numpy(second)) and not torch.equal(features, new_features)
    assert torch.equal(graphs[0], new_graphs[0]) and not torch.equal(graphs[1], new_graphs[1])
    (folder / "interactions.csv").write_text("user,item,x_label\n" + "".join(rows[:-1]))
    last_key, _, last_graphs = everything()
    assert last_key not in (key, new_key)
    assert not torch.equal(last_graphs[0], new_graphs[0]) and torch.equal(last_graphs[1], new_graphs[1])


def test_fingerprint_tells_whose_image_and_which_table(home):
    folder = folder_of(home, interactions__csv="user,item\n" + "".join(f"{u},{i}\n" for u in range(4) for i in range(6)))
    (folder / "images").mkdir()
    keys = []
    for item in (2, 4):
        for old in (folder / "images").iterdir():
            old.unlink()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "images" / f"{item}.png")
        keys.append(load_data("shop").fingerprint())
    for modality in ("image", "text"):
        np.save(folder / f"{modality}_feat.npy", np.ones((6, 3), np.float32))
        keys.append(load_data("shop").fingerprint())
        (folder / f"{modality}_feat.npy").unlink()
    assert len(set(keys)) == 4


def test_fingerprint_streams_files_and_strided_arrays(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(os.urandom(3_000_001))
    before = fingerprint(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(path) != before
    table = np.arange(12).reshape(3, 4)
    assert fingerprint(table[:, ::2]) == fingerprint(table[:, ::2].copy()) != fingerprint(table)
    assert fingerprint(np.zeros((0, 3))) != fingerprint(np.zeros((3, 0)))


# Cold users and items

def cold_shop(n_users=30, n_items=60):
    rng = np.random.default_rng(0)
    user, item = np.nonzero(rng.random((n_users, n_items)) < 0.3)
    split = rng.choice(3, len(user), p=[0.5, 0.2, 0.3]).astype(np.int8)
    split[(user < 3) | (item < 6)] = rng.integers(1, 3, ((user < 3) | (item < 6)).sum())
    return Interactions(user, item, split, np.arange(n_users), np.arange(n_items))


@pytest.mark.parametrize("users", ["all", "warm", "cold"])
@pytest.mark.parametrize("items", ["all", "warm", "cold"])
@pytest.mark.parametrize("masked", [["train"], ["train", "valid"]], ids="+".join)
@pytest.mark.parametrize("candidates", ["all", "of the items"])
def test_groups_and_masks_against_a_slow_reference(items, users, masked, candidates):
    inter = cold_shop()
    assert np.flatnonzero(inter.cold("user")).tolist() == [0, 1, 2] and inter.cold("item").sum() == 6
    generator = torch.Generator().manual_seed(0)
    user_emb, item_emb = torch.randn(30, 8, generator=generator), torch.randn(60, 8, generator=generator)
    among = items if candidates == "of the items" else "all"
    evaluator = Evaluator(inter, items=items, users=users, mask_valid="valid" in masked, candidates=among)
    table, _ = evaluator("test", user_emb, item_emb)
    pairs = {s: set(zip(*(x.tolist() for x in inter.part(s)))) for s in ("train", "valid", "test")}
    known = {"user": {u for u, _ in pairs["train"]}, "item": {i for _, i in pairs["train"]}}
    belongs = {"all": lambda *_: True, "warm": lambda side, x: x in known[side],
               "cold": lambda side, x: x not in known[side]}
    expected = {}
    for u in range(30):
        wanted = {i for v, i in pairs["test"] if v == u and belongs[users]("user", u) and belongs[items]("item", i)}
        if wanted:
            ranked = (i for i in range(60) if belongs[among]("item", i) and not any((u, i) in pairs[s] for s in masked))
            scores = {i: float(user_emb[u] @ item_emb[i]) for i in ranked}
            ranking = sorted(scores, key=lambda i: -scores[i])
            expected[u] = [len(wanted & set(ranking[:k])) / len(wanted) for k in CUTOFFS]
    assert table.index.tolist() == list(expected)
    assert np.allclose(table[[f"recall@{k}" for k in CUTOFFS]], list(expected.values()))


def test_groups_that_are_empty_or_unknown():
    inter = cold_shop()
    inter.split[:] = 0
    with pytest.raises(DataError, match="test split has no positive among all users and cold items"):
        Evaluator(inter, items="cold")("test", torch.zeros(30, 2), torch.zeros(60, 2))
    with pytest.raises(DataError, match="users='old' is not a group"):
        Evaluator(inter, users="old")


# Benchmarks


def test_small_integers_number_users_and_items_as_large_ones_do():
    "Products of such numbers, which number pairs, would be too large for their type."
    rng = np.random.default_rng(0)
    pairs, split = rng.choice(400 * 300, 5_000, replace=False), rng.choice(3, 5_000, p=[0.8, 0.1, 0.1])
    made = [Interactions((pairs // 300).astype(kind), (pairs % 300).astype(kind), split, np.arange(400), np.arange(300))
            for kind in (np.int64, np.int32, np.int16)]
    graphs = [build_backbone("lightgcn", inter, {}, emb_size=4).graph.csr.to_dense() for inter in made]
    assert all(torch.equal(graph, graphs[0]) for graph in graphs) and graphs[0].count_nonzero() == (split == 0).sum()
    assert all(not len(pairs_in_two_splits(inter)) and len(Evaluator(inter).users("test")) for inter in made)
    with pytest.raises(TypeError, match="Cannot cast"):  # a fraction is no number of a user
        Interactions(pairs / 300, pairs % 300, split, np.arange(400), np.arange(300))
