"""The files that people have: each kind read right, or refused in one sentence."""
import csv
import gzip
import io
import json
import sys
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from PIL import Image

from ptmrec.clip_prompting import cut_texts, load_clip, warn_of_cut_texts
from ptmrec.data import RecData, describe, load_data, show_items
from ptmrec.derived import write_data
from ptmrec.settings import SettingError, resolve
from ptmrec.stage1 import run_stage1
from ptmrec.tables import OTHER_SPELLINGS, SPELLINGS, DataError, find_encoding, read_table, standard_columns

ROWS = [(u, f"{i:04}", (u + i) % 3 + 3, 1_400_000_000 + 10 * u + i) for u in (7, 12) for i in range(4)]
TABLE = pd.DataFrame(ROWS, columns=["user", "item", "rating", "timestamp"])


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty data folder."
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    return tmp_path


def folder_of(home, files, name="shop"):
    "A data-set folder; `files`: {path: text, bytes or table}."
    for file, content in files.items():
        path = home / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pd.DataFrame):
            content.to_parquet(path) if path.suffix == ".parquet" else content.to_excel(path, index=False)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return home / name


def load(folder, **arguments):
    "The data of a folder, and the warnings."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_data(folder, **arguments)
    return data, [str(w.message) for w in caught]


def pairs_of(data):
    inter = data.inter
    return sorted(zip(inter.user_ids[inter.user].tolist(), inter.item_ids[inter.item].tolist(), inter.time.tolist()))


EXPECTED = sorted((u, i, t) for u, i, _, t in ROWS)


def text(table, separator, headers=TABLE.columns):
    return table.set_axis(list(headers), axis=1).to_csv(sep=separator, index=False)


def lines(table):
    return "".join(json.dumps(row) + "\n" for row in table.to_dict("records"))


def books(table):
    "BookCrossing's way: semicolons, all quoted."
    return '"User-ID";"ISBN";"Book-Rating";"Date"\n' + "".join(f'"{u}";"{i}";"{r}";"{t}"\n' for u, i, r, t in table.values)


def movielens(table):
    return "".join("::".join(map(str, row)) + "\n" for row in table.values)


YELP = ["user_id", "business_id", "stars", "timestamp"]
FORMATS = {  # the files of a table
    "semicolons": lambda t: {"interactions.csv": text(t, ";")},
    "BookCrossing": lambda t: {"ratings.csv": books(t)},
    "spaces": lambda t: {"interactions.txt": text(t, " ")},
    "pipes": lambda t: {"ratings.csv": text(t, "|", ["user_id", "video_id", "stars", "date"])},
    "tabs in a csv": lambda t: {"ratings.csv": text(t, "\t", ["customer_id", "article_id", "rating", "t_dat"])},
    "commas in a tsv": lambda t: {"ratings.tsv": text(t, ",")},
    "a mark at the begin": lambda t: {"ratings.csv": b"\xef\xbb\xbf" + text(t, ",").encode()},
    "lines of Windows": lambda t: {"ratings.csv": text(t, ";").replace("\n", "\r\n")},
    "MovieLens 1M": lambda t: {"ratings.dat": movielens(t)},
    "csv.gz": lambda t: {"interactions.csv.gz": gzip.compress(text(t, ",").encode())},
    "tsv.gz": lambda t: {"ratings.tsv.gz": gzip.compress(text(t, "\t").encode())},
    "inter.gz": lambda t: {"ratings.inter.gz": gzip.compress(text(t, "\t").encode())},
    "jsonl": lambda t: {"interactions.jsonl": lines(t)},
    "jsonl.gz": lambda t: {"interactions.jsonl.gz": gzip.compress(lines(t).encode())},
    "lines in a json": lambda t: {"ratings.json": lines(t.set_axis(YELP, axis=1).assign(review_id="x"))},
    "an object over lines": lambda t: {"interactions.json": json.dumps(dict(enumerate(t.to_dict("records"))), indent=1)},
    "a list in a json": lambda t: {"interactions.json": json.dumps(t.to_dict("records"))},
    "Excel": lambda t: {"interactions.xlsx": t},
    "UTF-16": lambda t: {"interactions.csv": text(t, ",").encode("utf-16")},
    "parts of Hugging Face": lambda t: {f"ratings-0000{n}-of-00002.parquet": t[4 * n : 4 * n + 4] for n in range(2)},
    "parts of Spark": lambda t: {f"interactions.parquet/part-0000{n}-x.parquet": t[4 * n : 4 * n + 4] for n in range(2)},
    "parts in CSV": lambda t: {f"ratings.part{n}.csv": text(t[4 * n : 4 * n + 4], ",") for n in range(2)},
}


@pytest.fixture(params=FORMATS)
def files_of(request):
    "A format: the files that hold a table."
    if request.param == "Excel":
        pytest.importorskip("openpyxl")
    return FORMATS[request.param]


def test_every_format_gives_the_same_interactions(home, files_of):
    data, _ = load(folder_of(home, files_of(TABLE)))
    assert pairs_of(data) == EXPECTED and data.inter.user_ids.dtype == np.int64


def test_an_error_names_the_place_in_every_format(home, files_of):
    files = files_of(TABLE.assign(rating=TABLE.rating.map(str).where(TABLE.index != 5, "good")))
    with pytest.raises(DataError, match=r"(line [2367]|row [267]), column 'rating': good is not a number \(1 such rows\)"):
        load(folder_of(home, files))


def test_integer_ids_are_those_of_all_parts(home):
    parts = FORMATS["parts in CSV"](TABLE)
    parts["ratings.part1.csv"] += "007,0001,5,1\n"
    assert load(folder_of(home, parts))[0].inter.user_ids.tolist() == ["007", "12", "7"]


def test_a_missing_part_is_an_error(home):
    files = FORMATS["parts of Hugging Face"](TABLE)
    with pytest.raises(DataError, match="has 1 of 2 parts like ratings-00001-of-00002.parquet"):
        load(folder_of(home, dict(list(files.items())[1:])))


# Splits in files

@pytest.mark.parametrize("names", [
    ["b.train.inter", "b.valid.inter", "b.test.inter"], ["train.csv", "valid.csv", "test.csv"],
    ["train.tsv.gz", "val.tsv.gz", "test.tsv.gz"], ["5-core/train.json", "5-core/val.json", "5-core/test.json"],
    [f"{s}-00000-of-00001.parquet" for s in ("train", "validation", "test")]], ids=lambda names: names[0])
def test_a_split_in_three_files_is_kept(home, names):
    parts = [TABLE[TABLE["item"] < "0002"], TABLE[TABLE["item"] == "0002"], TABLE[TABLE["item"] > "0002"]]
    typed = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    files = {}
    for name, part in zip(names, parts):
        if name.endswith(".json"):
            part = json.dumps({str(u): [int(i) for i in g["item"]] for u, g in part.groupby("user")})
        elif "parquet" not in name:
            part = text(part, "," if "csv" in name else "\t", typed)
            part = gzip.compress(part.encode()) if name.endswith(".gz") else part
        files[name] = part
    inter = load(folder_of(home, files | {"b.item": "item_id:token\ttitle:token_seq\n0000\tA mug\n0\tA mug\n"}))[0].inter
    assert inter.split[np.lexsort((inter.item, inter.user))].tolist() == [0, 0, 1, 2] * 2
    again = load(home / "shop", split="random")[0].inter
    assert sorted(np.bincount(again.split)) == [2, 2, 4]


def test_sequences_of_recbole_keep_what_came_first(home):
    head = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    files = {"b.train.inter": head + "7\t1\t2\n7\t1 2\t3\n8\t4\t1\n", "b.valid.inter": head + "7\t1 2 3\t4\n",
             "b.test.inter": head + "7\t1 2 3 4\t5\n8\t4 1\t2\n"}
    data, said = load(folder_of(home, files))
    inter = data.inter
    got = {s: sorted(zip(inter.user_ids[u].tolist(), inter.item_ids[i].tolist())) for s in ("train", "valid", "test")
           for u, i in [inter.part(s)]}
    assert got == {"train": [(7, 1), (7, 2), (7, 3), (8, 1), (8, 4)], "valid": [(7, 4)], "test": [(7, 5), (8, 2)]}
    assert not said


def test_further_sheets_are_said(home):
    pytest.importorskip("openpyxl")
    folder = folder_of(home, {"x": ""})
    with pd.ExcelWriter(folder / "ratings.xlsx") as book:
        TABLE.to_excel(book, sheet_name="mine", index=False)
        TABLE.to_excel(book, sheet_name="other", index=False)
    assert any("ratings.xlsx has 2 sheets; the first, 'mine', is read" in s for s in load(folder)[1])


def test_excel_without_its_extra_is_one_sentence(home, monkeypatch):
    pytest.importorskip("openpyxl")
    folder = folder_of(home, FORMATS["Excel"](TABLE))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"xlsx needs openpyxl: pip install -e '.\[excel\]', or save the sheet"):
        load(folder)


def test_train_alone_is_everything(home):
    inter = load(folder_of(home, {"train-00000-of-00001.parquet": TABLE}))[0].inter
    assert len(inter) == 8 and np.bincount(inter.split).tolist() == [4, 2, 2]


def test_a_pair_in_two_splits_is_kept_where_it_was_trained_on(home):
    files = {"train.csv": "user,item\n1,1\n1,2\n", "valid.csv": "user,item\n1,3\n", "test.csv": "user,item\n1,4\n1,1\n"}
    data, said = load(folder_of(home, files))
    assert data.inter.split.tolist() == [0, 0, 1, 2] and data.left_out == {"repeated pairs": 0, "pairs in two splits": 1}
    assert "1 repeated user-item pairs" in said[0] and "1 of them in two splits" in said[0]
    table = pd.DataFrame({"user": [1] * 5, "item": [4, 1, 3, 2, 1], "x_label": [2, 2, 1, 0, 0]})
    shuffled, _ = load(folder_of(home, {"interactions.parquet": table}, "other"))
    assert shuffled.inter.split[np.argsort(shuffled.inter.item)].tolist() == [0, 0, 1, 2]


def test_files_that_are_not_read_are_named(home):
    files = {"interactions.csv": text(TABLE, ","), "ratings.dat": movielens(TABLE), "b.inter": text(TABLE, "\t")}
    _, said = load(folder_of(home, files))
    assert any("Read: interactions.csv. Not read: ratings.dat, b.inter." in note for note in said)
    with pytest.raises(DataError, match="several data sets: a.train, b.train"):
        load(folder_of(home, {f"{d}.{s}.inter": text(TABLE, "\t") for d in "ab" for s in ("train", "test")}, "two"))


# Headers

@pytest.mark.parametrize("headers, item, user", [
    ("rating,title,text,asin,parent_asin,user_id,timestamp", "parent_asin", "user_id"),
    ("t_dat,customer_id,article_id,price", "article_id", "customer_id"), ("User-ID,ISBN,Book-Rating", "ISBN", "User-ID"),
    ("user_id,book_id,rating", "book_id", "user_id"),
    ("review_id,user_id,business_id,stars,date,text", "business_id", "user_id"),
    ("user_id,video_id,watch_ratio", "video_id", "user_id"), ("visitorid,event,itemid,timestamp", "itemid", "visitorid"),
    ("reviewerID,asin,overall,unixReviewTime", "asin", "reviewerID"), ("user,item,asin", "item", "user"),
])
def test_the_headers_of_public_sets(headers, item, user):
    headers = headers.split(",")
    columns = dict(zip(standard_columns(pd.DataFrame(columns=headers)).columns, headers))
    assert columns["item"] == item and columns["user"] == user


def test_titles_and_descriptions_of_public_sets(home):
    files = {"interactions.csv": "customer_id,article_id\n" + "".join(f"c,{i:010}\n" for i in range(3)),
             "items.csv": "article_id,product_code,prod_name,product_type_name,detail_desc\n"
                          "0000000000,1,Strap top,Vest,Soft\n0000000001,1,Bra,Bra,Lace\n"}
    data, _ = load(folder_of(home, files))
    assert data.texts == ["Strap top. Vest. Soft", "Bra. Bra. Lace", ""]
    assert data.inter.item_ids.tolist() == ["0000000000", "0000000001", "0000000002"]


def test_no_spelling_means_two_things():
    spellings = [s for names in (SPELLINGS, OTHER_SPELLINGS) for words in names.values() for s in words.split()]
    assert len(spellings) == len(set(spellings))


def test_a_table_without_a_header_is_one_sentence(home):
    message = "has no user column; its columns, as they are read, are 7, 0000, .* must have a name like user"
    with pytest.raises(DataError, match=message):
        load(folder_of(home, {"ratings.csv": TABLE.to_csv(index=False, header=False)}))


@pytest.mark.parametrize("name", ["orders.csv", "reviews.jsonl.gz"])
def test_a_table_of_another_name_is_named(home, name):
    with pytest.raises(DataError, match=rf"no interactions file \(it has {name}\). Name a table with the columns user and"):
        load(folder_of(home, {name: text(TABLE, ",") if name.endswith("csv") else gzip.compress(lines(TABLE).encode())}))


def test_items_of_another_name_are_said_to_be_unread(home):
    folder = folder_of(home, {"interactions.csv": text(TABLE, ","), "products.csv": "item,title\n0000,Mug\n"})
    data, said = load(folder)
    assert len(said) == 1 and "products.csv is not read. A table of items is called items, movies or plots" in said[0]
    (folder / "products.csv").rename(folder / "items.csv")
    assert load(folder)[0].texts[0] == "Mug" and not any("is not read" in note for note in load(folder)[1])


@pytest.mark.parametrize("separator", [";", "\t"])
def test_decimal_commas_are_read_and_said(home, separator):
    table = TABLE.assign(rating=[f"{3 + n / 4:g}".replace(".", ",") for n in range(len(TABLE))])
    data, said = load(folder_of(home, {"interactions.csv": text(table, separator)}), min_rating=3.25)
    assert len(data.inter) == len(TABLE) - 1 and "6 ratings have a decimal comma; 3,25 is read as 3.25" in said[0]


def test_what_is_no_folder_is_one_sentence(home):
    folder = folder_of(home, {"interactions.csv": text(TABLE, ",")})
    with pytest.raises(DataError, match=f"interactions.csv is a file. Give the folder that it is in: {folder}"):
        load_data(folder / "interactions.csv")
    with pytest.raises(DataError, match="not as DataFrame. RecData.from_frames makes one"):
        load_data(TABLE)


def test_frames_become_a_folder_that_experiments_take(home):
    data = RecData.from_frames(TABLE, pd.DataFrame({"item": ["0000", "0002"], "title": ["Mug", "Hat"]}))
    folder = write_data(data, str(home / "mine"))
    assert load(folder)[0].fingerprint() == data.fingerprint()
    resolve(run_stage1.experiment, {"dataset": str(folder)})
    with pytest.raises(SettingError, match=r"a name or a folder \(derived.write_data makes one\)"):
        run_stage1(dataset=data)


# Encodings and texts

def items_of(home, titles, encoding="utf-8", mark=""):
    content = f"{mark}item,title\n" + "".join(f"{n:04},{t}\n" for n, t in enumerate(titles))
    return load(folder_of(home, {"interactions.csv": text(TABLE, ","), "items.csv": content.encode(encoding)}))


@pytest.mark.parametrize("encoding, name", [
    ("utf-8", None), ("utf-8-sig", None), ("latin-1", "Latin-1"), ("utf-16", "UTF-16"), ("utf-16-be", "UTF-16"),
    ("cp1252", "Windows-1252")])
def test_encodings_that_are_clear_are_read_and_named(home, encoding, name):
    titles = ["Amélie", "Léon", "Mañana", "It’s" if encoding == "cp1252" else "Plain"]
    data, said = items_of(home, titles, encoding, mark="\ufeff" if encoding == "utf-16-be" else "")
    assert data.texts == titles
    assert len(said) == bool(name) and (not name or f"items.csv is not UTF-8; it is read as {name}" in said[0])


@pytest.mark.parametrize("title, encoding", [
    ("天使爱美丽", "gb18030"), ("Амели с Монмартра", "cp1251"), ("アメリ", "shift_jis")])
def test_encodings_that_are_not_clear_say_how_to_convert(home, title, encoding):
    with pytest.raises(DataError, match="items.csv is not UTF-8.* iconv -f .* -t UTF-8"):
        items_of(home, [title] * 4, encoding)


def test_latin_1_of_western_languages_is_found():
    words = "Ça été créée où? Größe, Übergrößen; ¿Cuántos años? Søster på øen; naïve fiancée £5 – no".replace("–", "-")
    assert find_encoding((words + "\n").encode("latin-1") * 50) == "latin-1"
    assert find_encoding(b"plain") == "utf-8" == find_encoding(words.encode())


def test_movies_of_movielens(home):
    titles = {0: "Toy Story (1995)::Animation|Children's", 1: "City of Lost Children, The: \"Cité\" (1995)::Adventure"}
    movies = "".join(f"{n}::{t}\n" for n, t in titles.items())
    table = TABLE.assign(item=TABLE["item"].astype(int))
    files = {"ratings.dat": movielens(table), "movies.dat": movies.encode("latin-1"), "users.dat": "7::F::1::10::48067\n"}
    data, said = load(folder_of(home, files))
    assert data.texts[0] == "Toy Story (1995). Animation Children's" and data.inter.item_ids.tolist() == [0, 1, 2, 3]
    assert data.texts[1] == 'City of Lost Children, The: "Cité" (1995). Adventure'
    assert any("movies.dat is not UTF-8; it is read as Latin-1" in note for note in said)


def test_entities_become_characters_and_are_counted(home):
    data, said = items_of(home, ["Salt &amp; pepper", "10&quot; pan &#233;", "AT&T R&D; Lock&notch", "plain"])
    assert data.texts == ["Salt & pepper", '10" pan é', "AT&T R&D; Lock&notch", "plain"]
    assert said == ["2 of 4 texts have HTML entities (&amp; for one), which are read as characters."]
    assert " ".join(describe(data)["shop"].tolist()).endswith(said[0]) and describe(data)["shop"].str.len().max() <= 50


def test_cut_texts_are_counted(home):
    clip = load_clip("tiny", "sample")
    data, _ = items_of(home, ["mug " * 75, "mug " * 76, "a hat", "an étui " * 60])
    assert cut_texts(clip, data.texts).tolist() == [1, 3]
    with pytest.warns(UserWarning, match="2 of 4 texts are longer than the 77 tokens .* item 0001"):
        warn_of_cut_texts(clip, data)


def test_escaped_quotes_of_bookcrossing(home):
    books = '"ISBN";"Book-Title";"Book-Author"\n"0000";"Say \\"hi\\"; then \\"go\\"";"B. C."\n"0001";"Two";"D"\n'
    data, _ = load(folder_of(home, {"interactions.csv": text(TABLE, ","), "items.csv": books}))
    assert data.texts[:2] == ['Say "hi"; then "go". B. C.', "Two. D"]


@pytest.mark.parametrize("file, content, message", [
    ("interactions.csv.gz", gzip.compress(b"user,item\n1,2\n", mtime=0)[:-3], "is damaged or cut"),
    ("interactions.jsonl", '{"user": 1, "item": 2}\n{"user": \n', "line 2, cannot be read as JSON"),
    ("interactions.json", "[1, 2]", "record 1: expected {name: value}"),
    ("interactions.json", "[{", "cannot be read as JSON"),
    ("interactions.json", "", "cannot be read as JSON"),
    ("interactions.xlsx", "no sheet", "cannot be read as Excel"),
    ("ratings.dat", "1::2::3::4\n1::2::3::4::5\n", "cannot be read as a table"),
    ("interactions.csv", "user,item\n1,2\n1,2,3,4\n", "a table: line 3 has 4 fields, and those before it 2. Every line"),
    ("interactions.csv", b"\0\1\2\xff" * 9, "is not UTF-8"),
])
def test_damaged_files_are_one_sentence(home, file, content, message):
    if file.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    with pytest.raises(DataError, match=f"{file}.*{message}"):
        load(folder_of(home, {file: content}))


# Pictures and item tables that match in part

def test_pictures_in_folders_within_folders(home):
    folder = folder_of(home, {"interactions.csv": text(TABLE, ",")})
    for name in "000/0000.jpg", "000/0001.PNG", "0002.jpg", "001/0002.jpg", "001/.0003.jpg":
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "images" / name, "PNG")
    data, said = load(folder)
    assert [p and p.relative_to(folder / "images").as_posix() for p in data.images] == [
        "000/0000.jpg", "000/0001.PNG", "0002.jpg", None]
    assert len(said) == 1 and "1 files are named after an item that has another file" in said[0]


def test_a_linked_folder_of_pictures_is_read_and_an_empty_one_is_said(home, tmp_path, monkeypatch):
    folder = folder_of(home, {"interactions.csv": text(TABLE, ",")})
    (folder / "images").mkdir()
    assert any("images has no file that is read (.jpg, .jpeg, .png, .webp, .gif, .bmp)" in s for s in load(folder)[1])
    (tmp_path / "disk").mkdir()
    for n in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / "disk" / f"{n:04}.jpg")
    (folder / "images" / "010").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("PTMREC_IMAGES", str(tmp_path / "disk"))
    data, said = load(folder)
    assert all(data.images) and not said


def test_few_matches_are_shown_with_an_example(home):
    items = "item,title\n0000,A mug\n1,A hat\n2,A shoe\n"
    folder = folder_of(home, {"interactions.csv": text(TABLE, ","), "items.csv": items})
    for name in "0.jpg", "1.jpg", "0003.jpg":
        (folder / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "images" / name)
    _, said = load(folder)
    few = "{} (the first without: {}), and 2 of its 3 belong to no item (the first: {})."
    assert few.format("items.csv: 1 of 4 items have a row", "0001", "1") in said[0]
    assert few.format("shop: 1 of 4 items have a picture", "0000", "0") in said[1]


# Tables in memory

class Elsewhere:
    "A table of another library."

    def __init__(self, frame):
        self.to_pandas = lambda: frame


ITEMS = pd.DataFrame({"item_id": [f"{n:04}" for n in range(4)], "title": ["A", "B", "C", "D"]})


@pytest.mark.parametrize("kind", [lambda t: t, Elsewhere, lambda t: t.set_index(np.arange(len(t)) + 9),
                                  lambda t: t.astype({t.columns[0]: "category"})])
def test_frames_equal_files(home, kind):
    folder = folder_of(home, {"interactions.parquet": TABLE, "items.parquet": ITEMS})
    for arguments in ({}, {"min_rating": 2}, {"core": 2, "split": "user_time"}, {"split": "random", "split_seed": 3}):
        data = RecData.from_frames(kind(TABLE), kind(ITEMS), name="x", **arguments)
        assert data.fingerprint() == load_data(folder, **arguments).fingerprint() and data.name == "x"


def test_frames_of_a_split_and_with_pictures(home, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    parts = {"train": TABLE[TABLE["item"] < "0002"], "validation": TABLE[TABLE["item"] == "0002"],
             "test": TABLE[TABLE["item"] > "0002"]}
    data = RecData.from_frames(parts, ITEMS.assign(image=[str(tmp_path / "a.png"), "b.png", None, "http://x.example/d.png"]))
    assert np.bincount(data.inter.split).tolist() == [4, 2, 2] and data.images == [tmp_path / "a.png", None, None, None]
    assert len(RecData.from_frames({"train": TABLE}).inter) == 8


@pytest.mark.parametrize("interactions, items, message", [
    ([1, 2], None, "interactions: expected a DataFrame, .* not list"),
    ({"train": TABLE, "extra": TABLE}, None, "tables of a split are called .* not extra"), ({}, None, "not nothing"),
    (TABLE.assign(rating="good"), None, "interactions, row 1, column 'rating': good is not a number"),
    (TABLE.drop(columns="user"), None, "interactions has no user column"),
    (TABLE, ITEMS.assign(item_id="x"), "items, column 'item': none of its ids occurs"),
    (TABLE[:2], None, "no user has three"),
])
def test_frames_that_cannot_be_used(home, interactions, items, message):
    with pytest.raises(DataError, match=message):
        RecData.from_frames(interactions, items)


def test_a_frame_is_not_changed(home):
    before = TABLE.copy()
    RecData.from_frames(TABLE, ITEMS)
    assert TABLE.equals(before) and ITEMS.columns[0] == "item_id"


# What is odd

def test_odd_values_are_notes(home):
    table = TABLE.assign(rating=[0, 0, 3, 4, 5, 5, 5, 5], user=["3.91E+16"] * 4 + ["b"] * 4)
    table.loc[0, "timestamp"], table.loc[1, "timestamp"] = -5, 1_400_000_000_000
    data, said = load(folder_of(home, {"interactions.csv": text(table, ",")}))
    notes = " ".join(describe(data)["shop"].astype(str))
    for note in ("4 rows have a rounded user id such as 3.91E+16", "2 of 8 ratings are 0", "1 of 8 times are negative",
                 "Times have several units (1 in milliseconds, 7 in seconds)"):
        assert note in notes and note in " ".join(said)
    milliseconds, _ = load(folder_of(home, {"interactions.csv": text(table.assign(timestamp=1.5e12), ",")}, "ms"))
    assert any("All 8 times are in milliseconds" in note for note in milliseconds.notes)


def test_clean_data_have_no_notes(home):
    data, said = load("sample")
    assert not said and not data.notes


# Clean input is read as ever: every stored run is named after these

FINGERPRINTS = {"sample": "afc0c6b98c12b224", "amazon/baby": "4b8dff84df7c4300", "amazon/sports": "5451b6b9bd3577f4",
                "amazon/clothing": "ebd2126199ef12ac"}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_stay(name, home):
    folder = name if name == "sample" else SHARED / name
    if name != "sample" and not folder.is_dir():
        pytest.skip(f"{name} is not at {folder} (set PTMREC_SHARED)")
    assert load(folder)[0].fingerprint() == FINGERPRINTS[name]


def test_entities_of_movielens(movielens, home):
    data, said = load(movielens)
    assert "6 of 9,724 texts have HTML entities (&frac12; for one)" in " ".join(said)
    assert "3,627 of 9,724 items have a picture" in " ".join(said)
    assert any("watching 8½ (1963)" in t for t in data.texts) and not any("&amp;" in t for t in data.texts)


def test_read_table_keeps_what_it_does_not_know(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("item;title;price\n0012;A mug;3\n")
    assert read_table(path).to_dict("list") == {"item": ["0012"], "title": ["A mug"], "price": [3]}


# sizes, and ids that are nearly the same

def packed_lines(path, size):
    "A .csv.gz of so many bytes, in lines."
    with gzip.open(path, "wb", 1) as file:
        file.write(b"user,item\n")
        for _ in range(size // 1_000_000):
            file.write(b"1,2\n" * 250_000)


def sheet_bomb(path, size):
    "An Excel file with a member of so many zeros."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("xl/workbook.xml", bytes(size))


def parquet_bomb(path, size):
    "A Parquet file of so many bytes of zeros."
    pd.DataFrame(np.zeros((size // 16, 2), int), columns=["user", "item"]).to_parquet(path)


def parquet_texts(path, size):
    "A Parquet file that has a long text once, and unpacks to so many bytes of it."
    texts = pa.DictionaryArray.from_arrays(np.zeros(size // 10_000, np.int8), ["u" * 10_000])
    pq.write_table(pa.table({"item": np.arange(len(texts)), "user": texts}), path)


@pytest.mark.parametrize("name, write, said", [
    ("interactions.csv.gz", packed_lines, "half of the memory that is free"),
    ("interactions.csv.gz", lambda path, size: packed_lines(path, size // 10), "half of the memory that is free"),
    ("interactions.jsonl.gz", lambda path, size: path.write_bytes(gzip.compress(b"[[]]\n" * (size // 100), 1)), "half of"),
    ("interactions.parquet", parquet_bomb, "half of the memory that is free"),
    ("interactions.parquet", parquet_texts, "half of the memory that is free"),
    ("interactions.xlsx", sheet_bomb, "half of the memory that is free"),
    ("interactions.json.gz", lambda path, size: path.write_bytes(gzip.compress(b"[" + b" " * size, 1)), "half of the mem"),
    ("interactions.csv", lambda path, size: path.write_bytes(b"user,item\n1," + b"x" * size), "a line of more than 50 MB")
], ids=["csv.gz", "short lines", "short values", "parquet", "one text in parquet", "xlsx", "json.gz", "one field"])
def test_tables_that_are_too_large_are_refused_before_they_are_read(home, monkeypatch, name, write, said):
    "60 MB, or what is parsed to as much, where 100 MB are free, or in one field; of the packed ones the files are small."
    monkeypatch.setattr("ptmrec.tables.psutil.virtual_memory", lambda: SimpleNamespace(
        available=10**12 if name.endswith(".csv") else 10**8))
    for reader in ("read_csv", "read_parquet", "ExcelFile"):
        monkeypatch.setattr(pd, reader, lambda *args, **more: pytest.fail("it is read"))
    path = home / "shop" / name
    path.parent.mkdir()
    write(path, 60_000_000)
    assert path.stat().st_size < 2_000_000 or name.endswith(".csv")
    with pytest.raises(DataError, match=f"{name} .*{said}"):
        load_data("shop")


@pytest.mark.parametrize("file", ["interactions.csv", "interactions.xlsx"])
def test_two_columns_of_one_name_are_refused(home, file):
    rows = [["user", "item", "item"], *([u, (u + i) % 9, i] for u in range(9) for i in range(4))]
    (home / "shop").mkdir()
    pd.DataFrame(rows).to_csv(home / "shop" / "interactions.csv", index=False, header=False)
    if file.endswith("xlsx"):
        pytest.importorskip("openpyxl")
        (home / "shop" / "interactions.csv").unlink()
        pd.DataFrame(rows).to_excel(home / "shop" / file, index=False, header=False)
    with pytest.raises(DataError, match=r"columns \['item', 'item.1'\] all mean 'item'. Keep one of them."):
        load_data("shop")


ODD_IDS = ["12", "1\u0662", "\u00e9", "e\u0301", "None", "NULL", "true", "a\0b", "a", "x" * 300, "../x", "/etc/passwd",
           "1e5", "-0", "007", "$_$", "<b>", "=1+1", "9" * 30]


def test_ids_that_are_nearly_the_same_stay_apart(home):
    "Digits of other scripts, characters in one piece and in two, paths, NUL, words for nothing."
    rows = [(u, ODD_IDS[(u + i) % len(ODD_IDS)]) for u in range(30) for i in range(6)]
    csv.writer(file := io.StringIO()).writerows([("user", "item"), *rows])
    items = io.StringIO()
    csv.writer(items).writerows([("item", "title"), *((i, f"title of {n}") for n, i in enumerate(ODD_IDS))])
    data, _ = load(folder_of(home, {"interactions.csv": file.getvalue(), "items.csv": items.getvalue()}))
    assert sorted(data.inter.item_ids) == sorted(ODD_IDS) and len(data.inter.item) == len(set(rows))
    place = {item: n for n, item in enumerate(data.inter.item_ids)}
    assert [data.texts[place[item]] for item in ODD_IDS] == [f"title of {n}" for n in range(len(ODD_IDS))]
    with pytest.raises(DataError, match="line 32, column 'item': a missing value is not an id"):
        load_data(folder_of(home, {"interactions.csv": "user,item\n" + "1,2\n" * 30 + "3,nan\n"}, "other"))


def test_titles_that_look_like_formulas_are_shown(home):
    rows = "".join(f"{u},{(u + i) % 9}\n" for u in range(9) for i in range(5))
    titles = ["$_$", "$\\frac{$", "<script>alert(1)</script>"]
    data, _ = load(folder_of(home, {"interactions.csv": "user,item\n" + rows, "items.csv": "item,title\n" + "".join(
        f"{n},{title}\n" for n, title in enumerate(titles))}))
    figure = show_items(data, range(3))
    figure.savefig(io.BytesIO(), format="png")
    assert [ax.get_title() for ax in figure.axes[:3]] == [title[:26] for title in titles]


def test_values_of_json_that_no_table_can_hold(home):
    "Half a character, numbers, lists, records, nothing: text that can be stored, or none."
    titles = ["\ud800 mug", None, 5, {"a": 1}, ["a", ["b"]], True, "\0", "x" * 100_000]
    data, _ = load(folder_of(home, {
        "interactions.csv": "user,item\n" + "".join(f"{u},{(u + i) % 9}\n" for u in range(9) for i in range(5)),
        "items.jsonl": "\n".join(json.dumps({"item": n, "title": title}) for n, title in enumerate(titles))}))
    assert data.texts[:5] == ["? mug", "", "5", "", "a b"] and data.texts[7] == "x" * 100_000
    assert "\n".join(data.texts).encode() and data.fingerprint()


@pytest.mark.parametrize("form", ["items.jsonl", "items.parquet", "frames"])
def test_lists_of_texts_are_joined_in_every_form(home, form):
    "In Parquet and frames they were read as Python writes them, brackets and all, and an empty one as []."
    items = pd.DataFrame({"item": ["0000", "0001", "0002"], "title": ["Mug", "Hat", ["A", "shoe"]], "sizes": [[1], [], []],
                          "genre": [["Home", "Kitchen"], None, []], "description": [[], [["Warm"] * 2, "Soft"], None]})
    if form == "frames":
        data = RecData.from_frames(TABLE, items)
    else:
        items = items.assign(title=["Mug", "Hat", "A shoe"], description=[[], ["Warm", "Warm", "Soft"], None])
        content = items.to_json(orient="records", lines=True).encode() if form == "items.jsonl" else items
        data, _ = load(folder_of(home, {"interactions.csv": text(TABLE, ","), form: content}))
    assert data.texts == ["Mug. Home Kitchen", "Hat. Warm Soft", "A shoe", ""]


def test_a_history_may_be_a_list(home):
    table = pd.DataFrame({"user_id": [1, 1, 2], "item_id_list": [["a", "b"], ["a", "b"], []], "item_id": list("cda")})
    inter = load(folder_of(home, {"interactions.parquet": table}))[0].inter
    assert inter.item_ids.tolist() == ["a", "b", "c", "d"] and len(inter) == 5


@pytest.mark.parametrize("write", [
    lambda t: t.to_json(), lambda t: t.to_json(orient="split"), lambda t: t.to_json(orient="index"),
    lambda t: t.to_json(orient="table"), lambda t: json.dumps(t.to_dict("list"))], ids=[
    "columns", "split", "index", "table", "lists"])
def test_tables_that_pandas_wrote_as_json(home, write):
    "`orient=split` was read as three users called columns, index and data; the default was refused."
    table = TABLE.assign(item=[f"i{i}" for i in TABLE["item"]])
    data, _ = load(folder_of(home, {"interactions.json": write(table)}))
    assert len(data.inter) == len(TABLE) and sorted(data.inter.item_ids) == sorted(set(table["item"]))


@pytest.mark.parametrize("content, message", [
    ({"1": [[7, 5.0], [8, 3.0]]}, "an item is a list"), ([{"user": 1, "item": [7, 8]}], "record 1: 'item' is a list")])
def test_lists_of_ids_are_not_joined_to_one(home, content, message):
    with pytest.raises(DataError, match=message):
        load(folder_of(home, {"interactions.json": json.dumps(content)}))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark(home, encoding):
    data, said = load(folder_of(home, {"interactions.csv": text(TABLE, ",").encode(encoding)}))
    assert len(data.inter) == len(TABLE) and any("read as UTF-16" in note for note in said)


def test_blanks_around_ids_are_no_part_of_them(home):
    padded = text(TABLE, ",").replace(",", ", ")
    data, said = load(folder_of(home, {"interactions.csv": padded, "items.csv": "item,title\n0000,Mug\n"}))
    assert sorted(data.inter.item_ids) == sorted(set(map(str, TABLE["item"]))) and "Mug" in data.texts
    assert any("8 item ids have blanks around them" in note for note in said)


def test_rows_that_a_quote_swallows_are_said(home):
    "Legal CSV, so that no parser complains: two of four items are inside the title of another."
    items = 'item_id:token\ttitle:token_seq\n0000\tA 5" nail\n0001\t"Odd\n0002\tA hat\n0003\tLast"\n'
    _, said = load(folder_of(home, {"interactions.csv": text(TABLE, ","), "x.item": items}))
    assert any("2 lines are inside a field of another row and not read (first in line 5)" in note for note in said)
    lines = 'item,title\n0000,"A hat\nwarm, soft\nof wool"\n0001,b\n0002,c\n0003,d\n'
    assert not any("inside a field" in note for note in load(folder_of(home, {
        "interactions.csv": text(TABLE, ","), "items.csv": lines}, "legal"))[1])


def test_upper_case_in_names_of_files_makes_no_difference(home):
    folder = folder_of(home, {"Interactions.CSV": text(TABLE, ","), "Items.csv": "item,title\n0000,Mug\n"})
    (folder / "Images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "Images" / "0000.JPG", "JPEG")
    data, _ = load(folder)
    assert "Mug" in data.texts and any(data.images)


def test_a_split_beside_the_whole_is_said(home):
    part = {f"train.{e}": text(TABLE, "\t") for e in ("inter",)} | {"test.inter": text(TABLE, "\t")}
    items = {"items.csv": "item,title\n0000,Mug\n"}
    _, said = load(folder_of(home, {"interactions.csv": text(TABLE, ",")} | part | items))
    assert any("Read: interactions.csv. Not read: test.inter, train.inter." in note for note in said)
    b = {f"b.{s}.inter": text(TABLE.iloc[rows], "\t") for s, rows in (
        ("train", slice(0, 4)), ("valid", slice(4, 6)), ("test", slice(6, 8)))}
    data, said = load(folder_of(home, {"b.inter": text(TABLE, "\t")} | b | items, "b"))
    assert np.bincount(data.inter.split).tolist() == [4, 2, 2]
    assert any("Read: b.train.inter, b.valid.inter, b.test.inter. Not read: b.inter." in note for note in said)


def test_a_gap_in_numbered_parts_is_said(home):
    parts = {f"interactions_{n}.parquet": TABLE.iloc[4 * k:4 * k + 4] for k, n in enumerate((0, 2))}
    data, said = load(folder_of(home, parts))
    assert len(data.inter) == 8 and any("none with the number 1" in note for note in said)


@pytest.mark.parametrize("form", ["frames", "interactions.json", "interactions.parquet"])
def test_times_may_be_numbers_as_text(home, form):
    table = TABLE.assign(timestamp=(1_393_545_600 + TABLE.timestamp).astype(str))
    content = table if "parquet" in form else table.to_json(orient="records")
    data = RecData.from_frames(table, split="user_time") if form == "frames" else load(
        folder_of(home, {form: content}), split="user_time")[0]
    same = RecData.from_frames(TABLE, split="user_time").inter
    assert np.array_equal(data.inter.time - 1_393_545_600, same.time) and np.array_equal(data.inter.split, same.split)
    odd = RecData.from_frames(TABLE.assign(timestamp=["1400000000000"] * 8))
    assert odd.inter.time is not None and any("All 8 times are in milliseconds" in note for note in odd.notes)


@pytest.mark.parametrize("times, message", [
    (["1393545600", "noon"], "row 2, column 'time': noon is neither a number nor a date"),
    (["1393545600", "2014-07-23"], "row 1, column 'time': 1393545600 is a number, and others are dates"),
    (["1393545600", "inf"], "row 2, column 'time': inf is neither a number nor a date")])
def test_a_wrong_time_among_numbers_is_the_one_named(times, message):
    with pytest.raises(DataError, match=message):
        RecData.from_frames(TABLE.assign(timestamp=times * 4), split="user_time")


def test_times_that_are_not_used_are_said(home):
    dates = TABLE.assign(timestamp=["31/12/2019"] * 8)
    data, said = load(folder_of(home, {"interactions.csv": text(dates, ",")}))
    assert data.inter.time is None and any("Times are not used: 31/12/2019" in note for note in said)
    mixed = TABLE.assign(timestamp=[1_400_000_000_000_000] + [1_400_000_000] * 7)
    _, said = load(folder_of(home, {"interactions.csv": text(mixed, ",")}, "mixed"))
    assert any("1 in microseconds, 7 in seconds" in note for note in said)


def test_minus_one_for_no_rating_is_said(home):
    for name, least, expected in (("anime", [-1, -1], True), ("jester", [-1, -9], False)):
        ratings = [*least, 3, 4, 5, 5, 5, 5]
        _, said = load(folder_of(home, {"interactions.csv": text(TABLE.assign(rating=ratings), ",")}, name))
        assert any("2 of 8 ratings are -1" in note and "min_rating=0" in note for note in said) == expected


def test_names_of_splits_are_labels(home):
    table = TABLE.assign(split=["train", "Train", "training", "train", "val", "valid", "test", "test"])
    data, _ = load(folder_of(home, {"interactions.csv": table.to_csv(index=False)}))
    assert np.bincount(data.inter.split).tolist() == [4, 2, 2]


def test_frames_with_ids_as_index_and_of_two_types():
    table = TABLE.assign(item=[str(i) if n % 2 else i for n, i in enumerate(TABLE["item"])]).set_index("user")
    items = pd.DataFrame({"title": ["Mug"]}, pd.Index(TABLE["item"][:1], name="item"))
    data = RecData.from_frames(table, items)
    assert data.inter.n_items == TABLE["item"].nunique() and data.texts.count("Mug") == 1
    with pytest.raises(DataError, match="column 'item': .* is not one id"):
        RecData.from_frames(pd.DataFrame({"user": [1], "item": [[1, 2]]}))


def test_pictures_that_are_named_and_not_there_are_said(home):
    items = "item,title,image\n" + "".join(f"{i},t,pics/{i}.jpg\n" for i in sorted(set(TABLE["item"])))
    folder = folder_of(home, {"interactions.csv": text(TABLE, ","), "items.csv": items})
    assert any("4 of 4 pictures that the items name are not there" in note for note in load(folder)[1])
    (folder / "images" / "pics").mkdir(parents=True)
    for i in set(TABLE["item"]):
        Image.new("RGB", (8, 8)).save(folder / "images" / "pics" / f"{i}.jpg")
    data, said = load(folder)
    assert all(data.images) and not any("not there" in note for note in said)


@pytest.mark.parametrize("stray", ["covers/0000.jpg", "0000.png", "images.zip"])
def test_pictures_in_a_place_that_is_not_read_are_said(home, stray):
    folder = folder_of(home, {"interactions.csv": text(TABLE, ",")})
    (folder / stray).parent.mkdir(exist_ok=True)
    (folder / stray).touch()
    assert any(f"{stray} is not read. Pictures are read from the folder images" in note for note in load(folder)[1])


def test_no_interactions_but_what_is_nearby(home):
    folder = folder_of(home, {"ml-1m.zip": "x"})
    (folder / "ml-1m").mkdir()
    (folder / "ml-1m" / "ratings.csv").write_text(text(TABLE, ","))
    with pytest.raises(DataError, match=r"it has ml-1m.zip, ml-1m/ratings.csv"):
        load(folder)



def test_two_item_tables_with_the_same_column_are_said(home):
    both = {"items.csv": "item,title\n0000,Mug\n", "movies.csv": "item,title,genres\n0000,Cup,Home\n"}
    data, said = load(folder_of(home, {"interactions.csv": text(TABLE, ",")} | both))
    assert "Cup. Home" in data.texts
    assert any("'title' is in items.csv, movies.csv; that of movies.csv counts" in note for note in said)


def test_item_tables_without_texts_are_said(home):
    data, said = load(folder_of(home, {"interactions.csv": text(TABLE, ","), "items.csv": "item,colour\n0000,red\n"}))
    assert not any(data.texts)
    assert any("no column of the item tables is a text or a picture (they are colour)" in note for note in said)


def test_entities_within_entities(home):
    data, _ = load(folder_of(home, {"interactions.csv": text(TABLE, ","), "items.csv": "item,title\n0000,R&amp;amp;B\n"}))
    assert "R&B" in data.texts


def test_invisible_characters_around_ids(home):
    hidden = TABLE.assign(item=[f"{i}\u200b" if n % 2 else f"\ufeff{i}" for n, i in enumerate(TABLE["item"])])
    data, said = load(folder_of(home, {"interactions.csv": text(hidden, ",")}))
    assert sorted(data.inter.item_ids) == sorted(set(TABLE["item"]))
    assert any("8 item ids have blanks" in note for note in said)


def test_tables_of_a_split_that_differ_are_said(home):
    parts = {"train.csv": slice(0, 4), "valid.csv": slice(4, 6), "test.csv": slice(6, 8)}
    tables = {name: TABLE.iloc[rows].assign(x_label=1) for name, rows in parts.items()}
    tables["test.csv"] = tables["test.csv"].drop(columns="rating")
    data, said = load(folder_of(home, {name: table.to_csv(index=False) for name, table in tables.items()}))
    assert np.bincount(data.inter.split).tolist() == [4, 2, 2]
    assert any("test.csv has no column 'rating', which the other tables have" in note for note in said)
    assert sum("has split labels of its own, which are not used" in note for note in said) == 2  # valid.csv agrees
