"""Public sets from raw to ready: layouts as documented, made small by the tests; servers on this machine only."""
import errno
import gzip
import io
import json
import os
import random
import subprocess
import sys
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pandas as pd
import pytest
from conftest import ROOT, SHARED
from PIL import Image

from ptmrec.amazon import prepare
from ptmrec.data import DataError, has_interactions, load_data
from ptmrec.files import _host
from ptmrec.sources import (
    PUBLIC_SETS,
    SOURCES,
    Source,
    find_or_prepare,
    list_sources,
    prepare_source,
    source_files,
    unpack,
)

USERS, ITEMS = range(1, 7), range(1, 6)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty data folder, and nobody on the network: every address of a source is that of a closed port."
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    nobody = {name: (source, ("http://127.0.0.1:9/",) if source.addresses else ()) for name, source in SOURCES.items()}
    for name, (source, addresses) in nobody.items():
        fields = {f: getattr(source, f) for f in source.__dataclass_fields__} | {"addresses": addresses}
        monkeypatch.setitem(SOURCES, name, Source(**fields))
    return tmp_path


class Files(BaseHTTPRequestHandler):
    "Serves `content` {path: bytes} with ranges; breaks off after 1,000 bytes as often as `cuts` says."

    def do_GET(self):
        server = self.server
        body, begin = server.content.get(self.path), int((self.headers.get("Range") or "bytes=0-")[6:-1])
        server.asked.append((self.path, begin))
        if body is None:
            self.send_error(404)
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        server.cuts, cut = server.cuts - 1, server.cuts > 0
        self.wfile.write(body[begin : begin + 1000] if cut else body[begin:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.content, server.asked, server.cuts = {}, [], 0
    server.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def picture(kind="JPEG", size=(40, 60)):
    Image.new("RGB", size, "navy").save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def zipped(files):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def prepared(name, **arguments):
    "The data of a prepared source, and the warnings other than that of the counts."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = prepare_source(name, **arguments)
        data = load_data(folder)
    said = [str(w.message) for w in caught]
    return data, [s for s in said if "as published" not in s]


def rows(form):
    return "".join(form.format(u=u, i=i, r=1 + (u + i) % 5, t=978_300_000 + 10 * u + i) for u in USERS for i in ITEMS)


COVERS = {f"{i}.jpg": picture() for i in ITEMS}
ML = {"ratings.dat": rows("{u}::{i}::{r}::{t}\n"),
      "movies.dat": "".join(f"{i}::Léon {i}, The (1995)::Crime|Drama\n" for i in ITEMS).encode("latin-1")}
BX = '"User-ID";"ISBN";"Book-Rating"\n'
LAYOUTS = {  # name: (files in the raw folder, the first text, pictures found)
    "movielens-1m": ({f"ml-1m/{n}": c for n, c in ML.items()}, "Léon 1, The (1995). Crime Drama", 0),
    "movielens-10m": ({f"ml-10M100K/{n}": c for n, c in ML.items()} | {f"posters/{n}": c for n, c in COVERS.items()},
                      "Léon 1, The (1995). Crime Drama", 5),
    "movielens-32m": ({
        "ml-32m/ratings.csv": "userId,movieId,rating,timestamp\n" + rows("{u},{i},{r}.0,{t}\n"),
        "ml-32m/movies.csv": "movieId,title,genres\n" + "".join(f'{i},"Film {i}, The (1995)",Drama\n' for i in ITEMS),
        "ml-32m/links.csv": "movieId,imdbId,tmdbId\n1,0114709,862\n"}, "Film 1, The (1995). Drama", 0),
    "microlens-100k": ({
        "MicroLens-100k_pairs.csv": "user,item,timestamp\n" + rows("{u},{i},{t}123\n"),
        "MicroLens-100k_title_en.csv": "".join(f"{i},Cats, dogs and {i}\n" for i in ITEMS).encode("utf-8-sig")}
        | {f"MicroLens-100k_covers/{n}": c for n, c in COVERS.items()}, "Cats, dogs and 1", 5),
    "h-and-m": ({
        "transactions_train.csv": "t_dat,customer_id,article_id,price,sales_channel_id\n" + rows(
            "2018-09-2{i},c{u:064},01{i:08},.5,2\n"),
        "articles.csv": "article_id,product_code,prod_name,product_type_name,detail_desc\n" + "".join(
            f'01{i:08},1,Strap top,Vest top,"Jersey top, {i}."\n' for i in ITEMS),
        "customers.csv": "customer_id,age\nc1,40\n"}
        | {f"images/010/01{i:08}.jpg": picture() for i in ITEMS}, "Strap top. Vest top. Jersey top, 1.", 5),
    "goodbooks-10k": ({
        "ratings.csv": "user_id,book_id,rating\n" + rows("{u},{i},{r}\n"),
        "books.csv": "id,book_id,best_book_id,work_id,isbn,authors,original_title,title,image_url\n" + "".join(
            f"{i},276705{i},1,2,439023483,S. Collins,O,Games {i},\n" for i in ITEMS)}, "Games 1. S. Collins", 0),
    "bookcrossing": ({
        "BX-Book-Ratings.csv": (BX + rows('"{u}";"034545{i}04X";"{r}"\n')).encode("latin-1"),
        "BX-Books.csv": ('"ISBN";"Book-Title";"Book-Author";"Image-URL-S";"Image-URL-M";"Image-URL-L"\n' + "".join(
            f'"034545{i}04X";"Flüchtig &amp; \\"neu\\"; {i}";"M. B.";"";"";""\n' for i in ITEMS)).encode("latin-1")},
        'Flüchtig & "neu"; 1. M. B.', 0),
    "pixelrec-50k": ({
        "Interaction/Pixel50K.csv": "item_id,user_id,timestamp\n" + rows("v{i},{u},{t}\n"),
        "Item Information/Pixel50K.csv": "item_id,view_number,title_en,title,description,tag\n" + "".join(
            f"v{i},9,Cat,猫 {i},,宠物\n" for i in ITEMS)}
        | {f"cover/v{n}": c for n, c in COVERS.items()}, "猫 1. 宠物", 5),
    "ninerec-qb": ({
        "QB_pair.csv": rows("u{u},v{i}\n"),
        "QB_item.csv": "".join(f'v{i},韩国电影，{i},"Korean Movie, {i}"\n' for i in ITEMS)}
        | {f"QB_cover/v{n}": c for n, c in COVERS.items()}, "Korean Movie, 1. 韩国电影，1", 5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYOUTS)
def test_files_placed_by_hand_become_a_data_set(home, name):
    files, text, n_pictures = LAYOUTS[name]
    put(home / name / "raw", files)
    data, _ = prepared(name)
    assert (data.inter.n_users, data.inter.n_items, len(data.inter)) == (6, 5, 30)
    assert data.texts[0] == text and sum(p is not None for p in data.images) == n_pictures
    assert find_or_prepare(name) == home / name and load_data(name).fingerprint() == data.fingerprint()
    assert json.loads((home / name / "source.json").read_text())["found"] == [6, 5, 30]
    assert list_sources().loc[name, "found here"] == "6 / 5 / 30"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["movielens-1m", "h-and-m", "microlens-100k"])
def test_archives_placed_by_hand_are_unpacked(home, name):
    files, text, n_pictures = LAYOUTS[name]
    archives = {a: zipped(files) for a in SOURCES[name].archives if a.endswith(".zip")}
    if name == "microlens-100k":  # its pictures are at the top of the archive
        archives = {"MicroLens-100k_covers.zip": zipped(COVERS)} | {n: c for n, c in files.items() if "covers" not in n}
    put(home / name / "raw", archives)
    data, _ = prepared(name)
    assert data.texts[0] == text and sum(p is not None for p in data.images) == n_pictures


@pytest.mark.filterwarnings("ignore")
def test_packed_files_are_found(home):
    files, text, _ = LAYOUTS["movielens-32m"]
    put(home / "movielens-32m" / "raw", {f"{n}.gz": gzip.compress(c.encode()) for n, c in files.items()})
    assert prepared("movielens-32m")[0].texts[0] == text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ninerec-qb", "microlens-100k"])
def test_packed_files_without_a_header_are_found(home, name):
    files, text, n_pictures = LAYOUTS[name]
    tables = {n: c if isinstance(c, bytes) else c.encode() for n, c in files.items() if n.endswith(".csv")}
    packed = {f"{n}.gz": gzip.compress(c) for n, c in tables.items()}
    put(home / name / "raw", packed | {n: c for n, c in files.items() if n not in tables})
    data, _ = prepared(name)
    assert data.texts[0] == text and sum(p is not None for p in data.images) == n_pictures


@pytest.mark.filterwarnings("ignore")
def test_linked_folders_of_raw_files_are_searched_and_loops_are_not_followed(home):
    raw, posters = home / "movielens-1m" / "raw", {f"posters/{n}": c for n, c in COVERS.items()}
    put(home / "disk", ML | posters)
    raw.mkdir(parents=True)
    (raw / "films").symlink_to(home / "disk")
    (home / "disk" / "posters" / "again").symlink_to(home / "disk" / "posters")
    files = source_files(SOURCES["movielens-1m"], raw)
    assert files["interactions"] == [raw / "films" / "ratings.dat"] and files["pictures"] == [raw / "films" / "posters"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("raw", ["elsewhere", "inside", "by the other name"])
def test_pictures_are_found_where_the_data_folder_is_a_link(home, monkeypatch, raw):
    "A path that leads out of the folder by `..` goes on from where the link leads."
    (disk := home / "far" / "away" / "disk").mkdir(parents=True)
    (home / "data").symlink_to(disk)
    folder = {"elsewhere": home / "mine", "inside": home / "data" / "ninerec-qb" / "raw",
              "by the other name": disk / "ninerec-qb" / "raw"}[raw]
    put(folder, LAYOUTS["ninerec-qb"][0])
    monkeypatch.setenv("PTMREC_DATA", str(home / "data"))
    monkeypatch.setenv("PTMREC_IMAGES", str(folder))
    data, _ = prepared("ninerec-qb", raw=folder)
    assert all(data.images)
    named = pd.read_parquet(disk / "ninerec-qb" / "items.parquet").image
    assert named.tolist() == [f"{folder if raw == 'elsewhere' else 'raw'}/QB_cover/v{i}.jpg" for i in ITEMS]


def test_rows_that_a_quote_swallows_in_a_table_without_a_header_are_said(home):
    files = LAYOUTS["microlens-100k"][0]
    titles = '1,Cats\n2,"Odd, and\n3,Dogs, cats\n4,Birds\n5,Last\n'
    put(home / "microlens-100k" / "raw", files | {"MicroLens-100k_title_en.csv": titles})
    said = prepared("microlens-100k")[1]
    assert any("3 lines are inside a field of another row and not read (first in line 5)" in s for s in said)
    put(home / "microlens-100k" / "raw", files)
    assert not any("inside a field" in s for s in prepared("microlens-100k")[1])


@pytest.mark.filterwarnings("ignore")
def test_raw_files_in_the_users_home(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home / "me"))
    put(home / "me" / "films", ML)
    assert len(prepared("movielens-1m", raw="~/films")[0].inter) == 30


@pytest.mark.parametrize("name", LAYOUTS)
def test_offline_one_sentence_says_what_to_put_where(home, name):
    with pytest.raises(DataError) as e:
        find_or_prepare(name)
    message = str(e.value)
    assert f"into {home / name / 'raw'}." in message and SOURCES[name].home in message and "\n" not in message
    assert ("does not answer" in message) == bool(SOURCES[name].addresses)
    assert not has_interactions(home / name)


def test_a_set_that_moved_is_found_at_another_address_and_goes_on_where_it_broke(home, server):
    archive = zipped({f"ml-1m/{n}": c for n, c in ML.items()} | {"ml-1m/noise": random.Random(0).randbytes(3000)})
    server.content, server.cuts = {"/new/ml-1m.zip": archive}, 1
    data, _ = prepared("movielens-1m", addresses=[f"{server.address}/old", f"{server.address}/new/"])
    assert len(data.inter) == 30
    assert server.asked == [("/old/ml-1m.zip", 0), ("/new/ml-1m.zip", 0), ("/new/ml-1m.zip", 1000)]
    (home / "movielens-1m" / "interactions.parquet").unlink()
    prepared("movielens-1m", addresses=[f"{server.address}/new"])  # nothing is downloaded again
    assert len(server.asked) == 3


def test_a_web_page_instead_of_an_archive_is_named(home, server):
    server.content = {"/ml-1m.zip": b"<!doctype html><html>log in first</html>"}
    with pytest.raises(DataError, match="ml-1m.zip is not a complete zip file"):
        prepare_source("movielens-1m", addresses=[server.address])
    assert not list((home / "movielens-1m" / "raw").iterdir())


def test_a_web_page_at_one_address_is_no_reason_to_stop(home, server):
    "Mirrors that are gone answer with a page, and a status that says all is well."
    archive = zipped({f"ml-1m/{n}": c for n, c in ML.items()})
    server.content = {"/gone/ml-1m.zip": b"<!doctype html><html>Sorry</html>", "/new/ml-1m.zip": archive}
    addresses = ["mirror.example", f"{server.address}/gone", f"{server.address}/new"]
    data, _ = prepared("movielens-1m", addresses=addresses)
    assert len(data.inter) == 30 and [path for path, _ in server.asked] == ["/gone/ml-1m.zip", "/new/ml-1m.zip"]


def test_a_full_disk_ends_a_download_at_the_first_address(home, server, monkeypatch):
    server.content = {f"/{n}/ml-1m.zip": zipped(ML) for n in "ab"}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("httpx2.Response.iter_raw", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device.*Make room"):
        prepare_source("movielens-1m", addresses=[f"{server.address}/{n}" for n in "ab"])
    assert [path for path, _ in server.asked] == ["/a/ml-1m.zip"]


def test_a_replaced_archive_is_unpacked(home):
    source, raw = SOURCES["movielens-1m"], home / "movielens-1m" / "raw"
    ratings, note = raw / "ml-1m" / "ml-1m" / "ratings.dat", raw / ".ml-1m.zip.unpacked"
    for images, content in ((True, "1::2::5::0\n"), (True, "1::3::5::0\n"), (False, "1::4::5::0\n"), (True, "1::4::4::0\n")):
        put(raw, {"ml-1m.zip": zipped({"ml-1m/ratings.dat": content})})
        unpack(source, raw, images)
        assert ratings.read_text() == content
    ratings.write_text("edited")
    note.write_text("")  # as older versions left it
    unpack(source, raw)
    assert ratings.read_text() == "edited"


def test_a_set_that_is_there_and_cannot_be_used_is_not_prepared(home, monkeypatch):
    monkeypatch.setattr("ptmrec.sources.prepare_source", None)
    put(home / "movielens-1m", {f"{n}.train.inter": "user\titem\n1\t2\n" for n in "ab"})
    with pytest.raises(DataError, match="movielens-1m has several data sets: a.train, b.train"):
        find_or_prepare("movielens-1m")


def test_damaged_archives_are_named(home):
    put(home / "movielens-1m" / "raw", {"ml-1m.zip": zipped(ML)[:-40]})
    with pytest.raises(DataError, match="ml-1m.zip cannot be unpacked"):
        prepare_source("movielens-1m")


def test_an_archive_that_is_broken_inside_packed_otherwise_or_too_large_is_told_apart(home, monkeypatch):
    raw, whole = home / "movielens-1m" / "raw", zipped({"ml-1m/ratings.dat": "1::2::5::978300000\n" * 2000})
    broken, by_windows = bytearray(whole), bytearray(whole)
    broken[60:75] = b"\xff" * 15
    by_windows[8] = by_windows[whole.find(b"PK\x01\x02") + 10] = 9  # Deflate64
    for content, message in ((broken, "cannot be unpacked .*Delete it"), (by_windows, "cannot be unpacked here .*move it")):
        put(raw, {"ml-1m.zip": bytes(content)})
        with pytest.raises(DataError, match=f"ml-1m.zip {message}"):
            unpack(SOURCES["movielens-1m"], raw)
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # the first raises an OSError without a number
        with zipfile.ZipFile(raw / "ml-1m.zip", "w", kind) as archive:
            archive.writestr("ml-1m/ratings.dat", "1::2::5::978300000\n" * 2000)
        broken = bytearray((raw / "ml-1m.zip").read_bytes())
        broken[60:75] = b"\xff" * 15
        put(raw, {"ml-1m.zip": bytes(broken)})
        with pytest.raises(DataError, match="ml-1m.zip cannot be unpacked .*Delete it"):
            unpack(SOURCES["movielens-1m"], raw)
    put(raw, {"ml-1m.zip": whole})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="ml-1m cannot be written: No space.*Make room"):
        patch.setattr("zipfile.ZipFile.extractall", full)
        unpack(SOURCES["movielens-1m"], raw)
    unpack(SOURCES["movielens-1m"], raw)
    assert (raw / "ml-1m" / "ml-1m" / "ratings.dat").exists()


@pytest.mark.filterwarnings("ignore")
def test_pictures_stay_packed_until_they_are_wanted(home):
    raw = home / "movielens-1m" / "raw"
    put(raw, {"ml-1m.zip": zipped(LAYOUTS["movielens-1m"][0] | {f"ml-1m/posters/{n}": c for n, c in COVERS.items()})})
    for images, n in ((False, 0), (False, 0), (True, 5), (False, 5)):
        data, _ = prepared("movielens-1m", images=images)
        assert sum(map(bool, data.images)) == len(list(raw.rglob("*.jpg"))) == n
    ratings = raw / "ml-1m" / "ml-1m" / "ratings.dat"
    before = ratings.stat().st_mtime_ns
    for images in (True, False):
        unpack(SOURCES["movielens-1m"], raw, images)
    assert ratings.stat().st_mtime_ns == before


def test_no_archive_writes_outside(home):
    archive = zipped(ML | {"../../../movies.dat": "x", "/tmp/ptmrec_ratings.dat": "x"})
    put(home / "movielens-1m" / "raw", {"ml-1m.zip": archive})
    source_files(SOURCES["movielens-1m"], home / "movielens-1m" / "raw")
    outside = [p for p in home.rglob("*.dat") if home / "movielens-1m" / "raw" / "ml-1m" not in p.parents]
    assert not outside


def test_posters_from_a_table_of_addresses(home, server):
    server.content = {f"/p/{i}.jpg": picture() for i in (1, 2)} | {"/p/3.jpg": b"<html>gone</html>"}
    posters = "movieId,image_url\n" + "".join(f"{i},http://posters.example/p/{i}.jpg\n" for i in (1, 2, 3, 4, 99))
    put(home / "movielens-1m" / "raw", ML | {"posters.csv": posters})
    data, said = prepared("movielens-1m", image_base=server.address, wait=0.01)
    assert [p and p.name for p in data.images] == ["1.jpg", "2.jpg", None, None, None]
    assert any("2 of 4 images are missing: 1 " in s and "HTML page" in s and "HTTP 404" in s for s in said)
    manifest = pd.read_parquet(home / "movielens-1m" / "manifest.parquet")
    assert manifest.set_index("item").error.dropna().to_dict() == {"3": "HTML page", "4": "HTTP 404"}
    assert not any("/p/99" in path for path, _ in server.asked)  # nobody rated it


def test_covers_of_books_by_address(home, server):
    server.content = {f"/c/{i}.jpg": picture() for i in ITEMS}
    files, _, _ = LAYOUTS["goodbooks-10k"]
    books = files["books.csv"].replace(",\n", ",http://covers.example/c/1.jpg\n")
    put(home / "goodbooks-10k" / "raw", files | {"books.csv": books})
    data, _ = prepared("goodbooks-10k", image_base=server.address, wait=0.01)
    assert all(data.images) and data.images[0].parent == home / "goodbooks-10k" / "images"
    (home / "goodbooks-10k" / "images" / "2.jpg").unlink()
    assert all(prepared("goodbooks-10k", image_base=server.address, wait=0.01)[0].images)


def test_pictures_that_are_there_and_addresses_of_the_others(home, server):
    "The file wins over the address; addresses that lead nowhere, and an item with neither, stop nothing."
    files, _, _ = LAYOUTS["goodbooks-10k"]
    books = files["books.csv"]
    for i in (1, 2, 3):
        books = books.replace(f"Games {i},", f"Games {i},http://covers.example/c/{i}.jpg")
    put(home / "goodbooks-10k" / "raw", files | {"books.csv": books, "covers/1.jpg": picture(size=(50, 70))})
    for pages, there in (({}, [1]), ({f"/c/{i}.jpg": picture() for i in ITEMS}, [1, 2, 3])):
        server.content, server.asked[:] = pages, []
        data, said = prepared("goodbooks-10k", image_base=server.address, wait=0.01, retry_refused=True)
        assert [i for i, path in zip(ITEMS, data.images) if path] == there and {p for p, _ in server.asked} == {
            "/c/2.jpg", "/c/3.jpg"}
        assert any("2 of 5 items have no picture in" in s and "no address of one (the first without: 4)" in s for s in said)
        assert any("2 of 2 images are missing: 2 HTTP 404" in s for s in said) == (not pages)
    assert Image.open(data.images[0]).size == (50, 70)
    (home / "goodbooks-10k" / "raw" / "covers" / "4.jpg").write_bytes(picture())
    _, said = prepared("goodbooks-10k", images=False)
    assert any("3 of 5 items have no picture in" in s and "covers (the first without: 2)" in s for s in said)


@pytest.mark.filterwarnings("ignore")
def test_packed_pictures_are_no_table_and_are_said(home):
    raw = home / "movielens-1m" / "raw"
    put(raw, ML | {"posters.zip": zipped(COVERS)})
    said = prepared("movielens-1m")[1]
    assert f"{raw / 'posters.zip'} is not read. Unpack it into {raw / 'posters'}/, if it has the pictures." in said
    put(raw / "posters", COVERS)
    data, said = prepared("movielens-1m")
    assert all(data.images) and not any("posters.zip" in s for s in said)


def test_books_in_both_layouts_join_by_the_id_of_the_ratings(home):
    files, text, _ = LAYOUTS["goodbooks-10k"]
    new = "book_id,goodreads_book_id,best_book_id,work_id,isbn,authors,original_title,title,image_url\n" + "".join(
        f"{i},276705{i},1,2,439023483,S. Collins,O,Games {i},\n" for i in ITEMS)
    put(home / "goodbooks-10k" / "raw", files | {"books.csv": new})
    assert prepared("goodbooks-10k")[0].texts[0] == text


def test_missing_covers_are_asked_for_unless_images_are_not_wanted(home):
    files, _, _ = LAYOUTS["microlens-100k"]
    put(home / "microlens-100k" / "raw", {n: c for n, c in files.items() if "covers" not in n})
    with pytest.raises(DataError, match="MicroLens-100k_covers cannot be downloaded"):
        prepare_source("microlens-100k")
    data, _ = prepared("microlens-100k", images=False)
    assert not any(data.images) and data.texts[1] == "Cats, dogs and 2"


def test_items_without_a_picture_are_counted(home):
    files, _, _ = LAYOUTS["ninerec-qb"]
    put(home / "ninerec-qb" / "raw", {n: c for n, c in files.items() if "v1.jpg" not in n})
    assert any("1 of 5 items have no picture in" in s and "QB_cover" in s for s in prepared("ninerec-qb")[1])


@pytest.mark.parametrize("content, message", [
    ("", "is empty, or has no commas: expected lines of user, item, timestamp"), ("u1\nu2\n", "has no commas"),
    ("u1,v1,1000\nu2,v2,yesterday\n", "cannot be read as a table: .*yesterday")])
def test_a_table_without_a_header_that_cannot_be_read_is_named(home, content, message):
    put(home / "ninerec-qb" / "raw", LAYOUTS["ninerec-qb"][0] | {"QB_pair.csv": content})
    with pytest.raises(DataError, match=f"QB_pair.csv .*{message}"):
        prepare_source("ninerec-qb")


def test_counts_are_compared_with_the_published(home):
    put(home / "movielens-1m" / "raw", ML)
    with pytest.warns(UserWarning, match=r"6 / 5 / 30 users / items / interactions here, but 6,040 / 3,900 / 1,000,209"):
        prepare_source("movielens-1m")


def test_zeros_of_bookcrossing_are_said(home):
    files, _, _ = LAYOUTS["bookcrossing"]
    zero = files["BX-Book-Ratings.csv"].decode("latin-1").replace('"1"\n', '"0"\n')
    put(home / "bookcrossing" / "raw", files | {"BX-Book-Ratings.csv": zero.encode("latin-1")})
    assert any("6 of 30 ratings are 0. Where 0 means that there is no rating" in s for s in prepared("bookcrossing")[1])


def test_names(home):
    with pytest.raises(DataError, match="Did you mean movielens-32m"):
        find_or_prepare("movielens-32")
    with pytest.raises(DataError, match="No public set 'x'. Known: movielens-1m, "):
        prepare_source("x")
    assert set(list_sources().index) >= set(PUBLIC_SETS) and not (list_sources() == "").any(axis=None)
    assert find_or_prepare("sample").name == "sample"


# Amazon 2023, from files made after its documentation

def test_amazon_2023_from_files(home):
    reviews = [{"rating": 5.0, "title": "Good", "text": "x", "images": [], "asin": f"B{u:09}",
                "parent_asin": f"000000000{i}", "user_id": f"U{u}", "timestamp": 1_588_687_728_923 + u + i,
                "helpful_vote": 0, "verified_purchase": True} for u in USERS for i in ITEMS]
    meta = [{"main_category": "Baby", "title": f"Bottle &amp; cap {i}", "average_rating": 4.8, "rating_number": 10,
             "features": [], "description": ["Soft"], "price": "6.99", "images": [], "videos": [], "store": "Zelta",
             "categories": ["Baby", "Feeding"], "details": {}, "parent_asin": f"000000000{i}", "bought_together": None}
            for i in ITEMS]
    put(home / "baby-2023" / "raw", {
        "Baby_Products.jsonl.gz": gzip.compress("".join(json.dumps(r) + "\n" for r in reviews).encode()),
        "meta_Baby_Products.jsonl": "".join(json.dumps(m) + "\n" for m in meta)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="None of 5 images .* images=False"):
            find_or_prepare("baby-2023")
        assert prepare("baby", release=2023, images=False) == home / "baby-2023" == find_or_prepare("baby-2023")
        data = load_data("baby-2023")
        assert data.texts[0] == "Bottle & cap 1. Zelta. Baby Feeding. Soft" and data.inter.item_ids[0] == "0000000001"
        put(home / "reviews", {"ratings.jsonl": "".join(json.dumps(r) + "\n" for r in reviews)})
        table = load_data("reviews")  # the reviews are a table, too: parent_asin is the item
    assert table.inter.item_ids.tolist() == data.inter.item_ids.tolist()


# Folders that are read as they are, on real files

def test_lattice_and_recbole_layouts_of_real_interactions_equal_the_mmrec_folder(home):
    folder = SHARED / "amazon" / "baby"
    if not folder.is_dir():
        pytest.skip(f"the Amazon interactions are not at {folder} (set PTMREC_SHARED)")
    expected = load_data(folder).inter
    parts = {s: expected.part(s) for s in ("train", "valid", "test")}
    for (name, (user, item)), file in zip(parts.items(), ("train", "val", "test")):
        lists = pd.Series(expected.item_ids[item]).groupby(expected.user_ids[user]).agg(list)
        put(home / "lattice", {f"5-core/{file}.json": json.dumps({str(u): i for u, i in lists.items()})})
        table = pd.DataFrame({"user_id:token": expected.user_ids[user], "item_id:token": expected.item_ids[item]})
        put(home / "recbole", {f"baby.{name}.inter": table.to_csv(sep="\t", index=False)})
    for name in ("lattice", "recbole"):
        inter = load_data(name).inter
        for s in parts:
            assert set(zip(*inter.part(s))) == set(zip(*parts[s]))
        assert (inter.user_ids == expected.user_ids).all() and (inter.item_ids == expected.item_ids).all()


@pytest.mark.filterwarnings("ignore")
def test_movielens_of_posters_as_a_public_set(movielens, home, monkeypatch):
    "The real files of MovieLens, in the layout of 32M."
    monkeypatch.setenv("PTMREC_IMAGES", str(movielens))
    raw = home / "movielens-32m" / "raw"
    raw.mkdir(parents=True)
    for name in ("ratings.csv", "movies.csv", "posters"):
        (raw / name).symlink_to(movielens / name)
    data, said = prepared("movielens-32m")
    expected = load_data(movielens)
    assert len(data.inter) == 100_836 and sum(map(bool, data.images)) == sum(map(bool, expected.images)) == 3627
    assert any("6,097 of 9,724 items have no picture" in s for s in said)


TWICE = """
import sys
from ptmrec.sources import prepare_source
prepare_source("movielens-1m")
"""


def test_two_that_prepare_the_same_set_end_as_one(home):
    "What two processes at once leave is what one leaves; half-made files of a killed one are gone."
    archive, found = zipped(LAYOUTS["movielens-1m"][0]), {}
    for name, n in (("alone", 1), ("both", 2)):
        put(home / name / "movielens-1m" / "raw", {"ml-1m.zip": archive})
        (left := home / name / "movielens-1m" / f".tmp-{_host()}-99999999-ab").mkdir()
        environment = os.environ | {"PTMREC_DATA": str(home / name), "PYTHONPATH": str(ROOT)}
        both = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", TWICE], env=environment) for _ in range(n)]
        assert [process.wait(400) for process in both] == [0] * n and not left.exists()
        found[name] = {p.relative_to(home / name): p.read_bytes() for p in (home / name).rglob("*") if p.is_file()}
    assert found["both"] == found["alone"] and len(found["alone"]) == 7


def test_every_set_has_published_counts_and_finds_its_own_files(home):
    assert all(None not in s.published for s in SOURCES.values())
    for name in ("KU", "Bili_Food"):
        files = {f"{name}/{name}_pair.csv": "".join(f"u{u},v{i},{u * 9 + i}\n" for u in range(5) for i in range(5)),
                 f"{name}/{name}_item.csv": "".join(f"v{i},食,Food {i}\n" for i in range(5))}
        put(home / f"ninerec-{name.lower().replace('_', '-')}" / "raw", files)
        data, _ = prepared(f"ninerec-{name.lower().replace('_', '-')}")
        assert data.inter.n_items == 5 and data.texts[0].startswith("Food 0") and data.inter.time is not None
