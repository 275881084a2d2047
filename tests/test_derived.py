"""Derived data sets are those of their arguments and of all that was read, and are written once."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from ptmrec.data import DataError, load_data
from ptmrec.derived import derive, with_interactions, write_data


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A folder with times and item tables, and an empty folder of runs."
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "runs"))
    (folder := tmp_path / "shop").mkdir()
    table = pd.DataFrame([(u, i, 100 * u + i) for u in range(40) for i in range(50)], columns=["user", "item", "timestamp"])
    table.to_csv(folder / "interactions.csv", index=False)
    pd.DataFrame({"item": range(50), "title": "Mug", "price": range(50)}).to_csv(folder / "items.csv", index=False)
    return folder


def where(data, chosen):
    "The interactions that are not 0 in `chosen`, however that is given."
    [values] = chosen.values() if isinstance(chosen, dict) else [chosen]
    values = np.load(values / "mask.npy" if values.is_dir() else values) if hasattr(values, "is_dir") else values
    return with_interactions(data, np.asarray(values).reshape(-1) != 0)


GIVEN = {"array": np.array, "array in a dictionary": lambda m: {"mask": np.array(m)}, "tensor": torch.tensor,
         "table": lambda m: pd.DataFrame({"m": m}),
         "column": pd.Series, "column of text": lambda m: {"m": pd.Series(m).astype(object)}}


@pytest.mark.parametrize("kind", GIVEN)
def test_derived_data_are_those_of_their_arguments(shop, kind):
    "Long arrays print their ends alone, so they cannot be told by that."
    mask = np.ones(2000)
    folders = {}
    for dropped in (700, 1200, 700):
        mask[:] = np.arange(2000) != dropped
        folder = derive("shop", where, chosen=GIVEN[kind](mask.copy()))
        assert folders.setdefault(dropped, folder) == folder
        times = load_data(folder).inter.time
        assert len(times) == 1999 and 100 * (dropped // 50) + dropped % 50 not in times
    assert folders[700] != folders[1200]


@pytest.mark.parametrize("inside", [True, False])
def test_derived_data_follow_the_content_of_files_that_they_are_told_of(shop, tmp_path, inside):
    (path := tmp_path / "masks" / "mask.npy").parent.mkdir()
    for dropped in (700, 1200):
        np.save(path, np.arange(2000) != dropped)
        folder = derive("shop", where, chosen=path.parent if inside else path)
        assert 100 * (dropped // 50) + dropped % 50 not in load_data(folder).inter.time


def prices(data):
    "Only what is sold for less than 10."
    return with_interactions(data, data.items.price.to_numpy()[data.inter.item] < 10)


def first_half(data):
    return with_interactions(data, data.inter.time < 2000)


def test_derived_data_follow_times_and_item_tables(shop):
    "They are no part of the key of a run, and what is made of data may depend on them."
    before = {change: derive("shop", change) for change in (prices, first_half)}
    key = load_data("shop").fingerprint()
    items, table = (pd.read_csv(shop / f"{name}.csv") for name in ("items", "interactions"))
    items.assign(price=items.price - 5).to_csv(shop / "items.csv", index=False)
    table.assign(timestamp=table.timestamp + 1000).to_csv(shop / "interactions.csv", index=False)
    assert load_data("shop").fingerprint() == key
    sizes = {change: [len(load_data(folder).inter) for folder in (before[change], derive("shop", change))]
             for change in before}
    assert sizes == {prices: [400, 600], first_half: [1000, 500]}


@pytest.mark.parametrize("word", ["x" * 500, "é" * 300, "猫" * 200])
def test_long_arguments_make_no_name_that_is_too_long(shop, word):
    def named(data, word):
        return data

    folder = derive("shop", named, word=word)
    assert folder.name.startswith("shop-named-") and len(folder.name.encode()) <= 100
    assert derive("shop", named, word=f"{word}y") != folder and load_data(folder).fingerprint()


def test_the_same_data_with_other_times_are_other_data(shop, tmp_path):
    data = load_data("shop")
    folder = write_data(data, tmp_path / "mine")
    assert write_data(data, folder) == folder
    for time in (data.inter.time + 1, None):
        other = replace(data, inter=replace(data.inter, time=time))
        assert other.fingerprint() == data.fingerprint()
        with pytest.raises(DataError, match="has other files than those of 'shop', or other times. Give a new folder"):
            write_data(other, folder)
    bare = replace(data, inter=replace(data.inter, time=None))
    assert write_data(bare, write_data(bare, tmp_path / "bare")) == tmp_path / "bare"
