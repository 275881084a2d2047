"""Odd tables and data-set folders, drawn by hypothesis: they are read, or refused in one documented sentence.

400 inputs in all here; `pytest -m slow` draws 10,000.
"""
import csv
import gzip
import io
import json
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from test_fuzz_files import VALUES, damaged, drawn, saved

from ptmrec.data import DataError, describe, load_data
from ptmrec.tables import column_names, location, read_table

MANY = pytest.mark.parametrize("n", [200, pytest.param(5000, marks=pytest.mark.slow)])
IDS = ["1", "2", "007", "a b", "../x", "a\0b", "x" * 300, "é", "e\u0301", "nan", "None", "", "12", "1\u0662", "=1+1", "-1",
       "1e5", "9" * 30, "NULL", "\ufeff1", '"', "'", "$_$", "<b>", "\u202e", "\ud800"]
CELLS = st.sampled_from(IDS) | st.integers(-3, 20).map(str) | st.text(st.characters(exclude_categories=[]), max_size=6)
HEADERS = ["user", "item", "rating", "timestamp", "x_label", "title", "image", "userID", "user_id:token", "", "a", "\ud800"]


def text(rows, separator=","):
    "Rows as a text table, without care for quotes."
    return "\n".join(separator.join(row) for row in rows).encode("utf-8", "surrogatepass")


def quoted(rows):
    "Rows as a CSV file."
    csv.writer(file := io.StringIO()).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


@st.composite
def odd_rows(draw, headers=tuple(HEADERS)):
    "A header and rows, most of them as long as it."
    header = draw(st.sampled_from([["user", "item"], ["user", "item", "rating", "timestamp"], ["item", "title", "image"]])
                  | st.lists(st.sampled_from(headers), max_size=5))
    width = st.just(len(header)) if draw(st.integers(0, 3)) else st.integers(0, 6)
    rows = [draw(st.lists(CELLS, min_size=(n := draw(width)), max_size=n)) for _ in range(draw(st.integers(0, 8)))]
    return [header, *rows]


def columns(values):
    "What a Parquet file may hold: columns of one kind."
    kinds = [[1, 2, 3], [1.5, np.nan, 3], ["a", None, "b"], [b"a", b"\xff", b""], [[1], [2], []], [{"a": 1}] * 3, [True] * 3,
             pd.to_datetime(["2020", "2021", None]), pd.Categorical(["a", "b", "a"]), [None] * 3, [1, 1, 1],
             pd.to_timedelta([1, 2, 3]), np.array([1, 2, 3], "u8") + 2**63, [10**18] * 3]
    return {name: kinds[k % len(kinds)] for name, k in values.items()}


PARQUET = st.dictionaries(st.sampled_from([h for h in HEADERS if h.isascii()]), st.integers(0, 13), min_size=1,
                          max_size=4).map(lambda values: saved(pd.DataFrame(columns(values)).to_parquet))
ROWS = [["user", "item", "rating"], *([str(u), str(i), "4"] for u in range(4) for i in range(3))]
WHOLE = [text(ROWS, separator) for separator in ",\t;|"]
PACKED = saved(pd.DataFrame({"user": [1, 1, 2], "item": ["a", "b", "a"]}).to_parquet)
RECORDS = st.lists(st.dictionaries(st.sampled_from(["user", "item", "title", "a"]), VALUES, max_size=3) | VALUES, max_size=4)
LINES = RECORDS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()) | RECORDS.map(lambda r: json.dumps(r).encode())
DEEP = st.sampled_from([100, 500, 5000]).map(lambda n: b'{"user": ' + b"[" * n + b"]" * n + b"}")
TEXT = odd_rows().map(text) | odd_rows().map(lambda r: text(r, "\t")) | damaged(WHOLE) | st.binary(max_size=60) | st.just(
    b"user,item\n1,long\n1,")
CONTENT = {".csv": TEXT, ".tsv": TEXT, ".inter": TEXT, ".dat": TEXT, ".json": LINES | DEEP | damaged([b'[{"user": 1}]']),
           ".jsonl": LINES | DEEP | TEXT, ".parquet": PARQUET | damaged([PACKED]) | st.binary(max_size=30)}
FILES = st.sampled_from(sorted(CONTENT)).flatmap(lambda ending: st.tuples(st.just(ending), CONTENT[ending]))


def put(path, content, packed):
    "Write a file: as it is, packed, packed and cut, or as if it were packed."
    path = path.with_name(path.name + ".gz" * (packed != "no"))
    content = content.replace(b"long", b"x" * 200_000)  # more than a field of Python's csv may have
    content = {"no": content, "yes": gzip.compress(content, mtime=0), "cut": gzip.compress(content, mtime=0)[:-9],
               "never": content}[packed]
    path.write_bytes(content)
    return path


PACKED_HOW = st.sampled_from(["no", "no", "no", "yes", "cut", "never"])


@MANY
def test_tables(tmp_path, n):
    kept = {"read": 0, "refused": 0}

    @drawn(n, file=FILES, packed=PACKED_HOW)
    def check(file, packed):
        path = put(tmp_path / f"table{file[0]}", file[1], packed if file[0] != ".parquet" else "no")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for read in (read_table, column_names, lambda p: location(p, 2)):
                try:
                    found = read(path)
                    kept["read"] += read is read_table and isinstance(found, pd.DataFrame)
                except DataError as error:
                    assert path.name in str(error) and len(str(error)) < 1000
                    kept["refused"] += read is read_table
        path.unlink()

    assert min(kept.values()) > n / 20


@MANY
def test_folders(tmp_path, monkeypatch, n):
    "A data set of an odd table of interactions and, perhaps, one of items."
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    kept, folder = {"read": 0, "refused": 0}, tmp_path / "set"
    usual = [(str(u), str((u + i) % 9)) for u in range(9) for i in range(5)]
    nearly = st.lists(st.tuples(CELLS, CELLS), max_size=4).map(
        lambda odd: (".csv", quoted([("user", "item"), *usual, *odd])))
    items = st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=6).map(lambda r: quoted([("item", "title", "image"), *r]))

    odd_items = st.lists(st.fixed_dictionaries({"item": st.integers(0, 9) | VALUES, "title": VALUES}), max_size=5).map(
        lambda rows: (".jsonl", "\n".join(map(json.dumps, rows)).encode()))

    @drawn(n, file=nearly | nearly | FILES, items=st.none() | st.tuples(st.just(".csv"), items | TEXT) | odd_items,
           split=st.sampled_from([None, "random", "user_time"]))
    def check(file, items, split):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / f"interactions{file[0]}").write_bytes(file[1])
        if items is not None:
            (folder / f"items{items[0]}").write_bytes(items[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                data = load_data(folder, split=split)
                assert len(data.inter.user_ids) == data.inter.n_users and len(data.fingerprint()) == 16
                describe(data)
                kept["read"] += 1
            except DataError as error:
                assert str(error) and len(str(error)) < 1000
                kept["refused"] += 1

    assert min(kept.values()) > n / 50
