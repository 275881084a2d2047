"""From raw Amazon files to a folder, against a real server that misbehaves: every item ends named, nothing is lost."""
import gzip
import hashlib
import io
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import tomllib
import warnings
import zipfile
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from types import SimpleNamespace

import httpx2
import numpy as np
import pandas as pd
import pytest
from conftest import SHARED
from PIL import Image

from ptmrec.amazon import (
    PATIENCE,
    back_off,
    check_published,
    PUBLISHED,
    PUBLISHED_SETTINGS,
    check_image,
    download_images,
    fetch_file,
    find_or_prepare,
    prepare,
    read_image_features,
    read_manifest,
    read_meta,
    read_reviews,
)
from ptmrec.data import DataError, load_data


def picture(kind, size=(48, 32)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def bomb():
    "The start of a PNG of 200 megapixels: its header, and data to come."
    header = b"IHDR" + struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + check + b"\0\0\xff\xffIDAT"


GOOD = {kind: picture(kind) for kind in ("JPEG", "PNG", "GIF")}
BODY = GOOD | {"page": b"<!doctype html><html>Sorry</html>", "pixel": picture("PNG", (1, 1)), "cut": GOOD["JPEG"][:-300],
               "bomb": bomb(), "empty": b"", "flood": GOOD["JPEG"] + bytes(100_000)}
REASON = {"page": "HTML page", "pixel": "placeholder", "cut": "truncated image", "bomb": "too many pixels",
          "empty": "not an image", "gone": "HTTP 404", "file": "redirect to another scheme",
          "ftp": "redirect to another scheme", "loop": "too many redirects", "flood": "too many bytes",
          "busy": "HTTP 503", "reset": "connection broke", "stall": "timeout"}
PASSING = ("busy", "reset", "stall")  # failed, not refused: may work another time
WAYS = [*GOOD, *BODY, *REASON, "busy once", "error once"]
WAYS = [way for way in dict.fromkeys(WAYS) if way != "stall"]


def way_of(path):
    "How the server answers for a path: by its hash, half of them well."
    number = zlib.crc32(path.encode())
    return "stall" if number % 1999 == 7 else "JPEG" if number % 2 else WAYS[number // 2 % len(WAYS)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        with server.lock:
            server.asked[self.path] += 1
            count, total = server.asked[self.path], server.asked.total()
        if server.stop_at and total >= server.stop_at:
            server.stopped.set()
            server.go_on.wait()
        way = server.way_of(self.path)
        headers, status = {}, 200
        if way == "gone":
            status = 404
        elif way == "busy" or way == "busy once" and count == 1:
            status, headers = 503, {} if way == "busy" else {"Retry-After": "1"}
        elif way == "error once" and count == 1:
            status = 500
        elif way in ("file", "ftp", "loop"):
            status, headers = 302, {"Location": {"file": "file:///etc/passwd", "ftp": "ftp://127.0.0.1/x.jpg",
                                                 "loop": self.path}[way]}
        elif way == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        body = BODY.get(way, GOOD["JPEG"]) if status == 200 else b""
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if way == "stall":
            self.wfile.write(body[:20])
            select.select([self.connection], [], [], 60)  # until the client hangs up
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size, daemon_threads = 256, True

    def handle_error(self, *args):  # clients may hang up
        pass


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.lock, server.way_of, server.stop_at = Counter(), Lock(), way_of, 0
    server.stopped, server.go_on = Event(), Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def files(tmp_path):
    "A server of files that cuts its first answers; `ranges` are those it was asked for."
    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            ranges, content = self.server.ranges, self.server.content.get(self.path)
            ranges.append(self.headers.get("Range"))
            if content is None:
                return self.send_error(404)
            begin = int(ranges[-1][6:-1]) if ranges[-1] else 0
            if begin >= len(content):
                return self.send_error(416)
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            end = begin + 1000 if len(ranges) <= self.server.cuts else len(content)
            self.wfile.write(content[begin:end])

        def log_message(self, *args):
            pass

    server = Server(("127.0.0.1", 0), Files)
    server.ranges, server.content, server.cuts = [], {}, 0
    server.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    return tmp_path


def some_items(n):
    return pd.DataFrame({"item": [f"B{i:09}" for i in range(n)],
                         "image_url": [f"http://images.example/I/{i}.jpg" for i in range(n)]})


def whole(folder, manifest):
    "Every ok row has its file, byte for byte, and there is nothing else."
    files = {p.stem: p for p in (folder / "images").iterdir()}
    ok = manifest[manifest.status == "ok"]
    assert set(files) == set(ok["item"])
    for row in ok.itertuples():
        assert hashlib.sha256(files[row.item].read_bytes()).hexdigest() == row.sha256
    assert not [p for p in folder.rglob(".*")]


@pytest.mark.slow
def test_every_image_of_baby_ends_with_a_name(server, tmp_path):
    path = SHARED / "amazon" / "baby" / "items.tsv"
    if not path.exists():
        pytest.skip(f"the Amazon ids are not at {path} (set PTMREC_SHARED)")
    table = pd.read_csv(path, sep="\t", dtype=str)
    items = pd.DataFrame({"item": table.asin, "image_url": table.imUrl})
    limits = dict(image_base=server.address, wait=0.01, concurrency=64, attempts=3, timeout=4, max_bytes=50_000)
    manifest = download_images(items, tmp_path, **limits)
    expected = []
    for url in items.image_url:
        path = url.removeprefix("http://").partition("/")[2] if isinstance(url, str) else None
        expected.append("no address" if path is None else "placeholder" if "/no-img" in path
                        else REASON.get(way_of(f"/{path}")))
    reasons = [e if isinstance(e, str) else None for e in manifest.error]
    assert manifest["item"].tolist() == items["item"].tolist() and reasons == expected
    assert reasons.count("no address") == 13 and set(REASON.values()) <= set(reasons)
    assert all((s == "ok") == (r is None) for s, r in zip(manifest.status, reasons))
    whole(tmp_path, manifest)
    server.asked.clear()
    assert download_images(items, tmp_path, **limits).equals(manifest)
    assert {way_of(path) for path in server.asked} == set(PASSING)


def test_a_kill_in_the_middle_loses_nothing(server, tmp_path):
    server.way_of = lambda path: "page" if path.endswith("7.jpg") else "JPEG"
    items = some_items(300)
    items.to_parquet(tmp_path / "items.parquet")
    code = ("import sys, pandas as pd; from ptmrec.amazon import download_images; "
            "download_images(pd.read_parquet(sys.argv[1]), sys.argv[2], image_base=sys.argv[3])")
    for stop_at in (90, 100):  # twice
        server.asked.clear()
        server.stop_at = stop_at
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "items.parquet", tmp_path / "shop",
                                    server.address])
        assert server.stopped.wait(400)
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.stop_at = 0
        server.go_on.set()
        server.stopped, server.go_on = Event(), Event()
    done = read_manifest(tmp_path / "shop")
    assert 100 < len(done) < 300
    server.asked.clear()
    manifest = download_images(items, tmp_path / "shop", image_base=server.address)
    have = {f"/I/{int(item[1:])}.jpg" for item in done["item"]}
    assert len(have & set(server.asked)) <= 32  # named in the journal, killed before the file had its name
    whole(tmp_path / "shop", manifest)
    assert manifest.equals(download_images(items, tmp_path / "other", image_base=server.address))


def test_files_put_there_or_changed_by_hand(server, tmp_path):
    server.way_of = lambda path: "JPEG"
    images = tmp_path / "images"
    images.mkdir()
    (images / "B000000000.PNG").write_bytes(GOOD["PNG"])
    (images / "B000000001.jpg").write_text("<html>no</html>")
    items, limits = some_items(4), dict(image_base=server.address, wait=0.01)
    with pytest.warns(UserWarning, match="1 files that were put .*the first: B000000001.jpg.refused, HTML page"):
        manifest = download_images(items, tmp_path, **limits)
    (images / "B000000001.jpg.refused").unlink()
    assert (manifest.status == "ok").all() and manifest.url.isna().tolist() == [True, False, False, False]
    assert "/I/0.jpg" not in server.asked and (images / "B000000000.PNG").read_bytes() == GOOD["PNG"]
    whole(tmp_path, manifest)
    (images / "B000000002.jpg").write_bytes(b"rotten")
    server.way_of = lambda path: "gone"
    server.asked.clear()
    with pytest.warns(UserWarning, match="1 files in .* are not as they were downloaded.*the first: B000000002.jpg.refused"):
        manifest = download_images(items, tmp_path, **limits)
    assert set(server.asked) == {"/I/2.jpg"} and manifest.error[2] == "HTTP 404"
    (images / "B000000002.jpg.refused").unlink()
    whole(tmp_path, manifest)
    (images / "B000000002.png").write_bytes(GOOD["PNG"])  # the refused one is found elsewhere
    assert (download_images(items, tmp_path, **limits).status == "ok").all()


@pytest.mark.parametrize("why", ["address", "content"])
def test_a_picture_stays_until_another_one_arrives_or_the_server_refuses_it(server, tmp_path, why):
    "Downloaded before, and asked for again: the items have another address for it, or somebody has retouched it."
    server.way_of = lambda path: "JPEG"
    items, limits, images = some_items(3), dict(image_base=server.address, wait=0.01, attempts=1), tmp_path / "images"
    first = download_images(items, tmp_path, **limits)
    retouched = GOOD["PNG"] if why == "content" else GOOD["JPEG"]
    if why == "content":
        for item in items["item"]:
            (images / f"{item}.jpg").write_bytes(retouched)
    else:
        items = items.assign(image_url=items.image_url.str.replace("/I/", "/new/"))
    server.way_of = lambda path: "busy"
    for _ in range(2):  # what stays is no picture of one's own in the next call
        with pytest.warns(UserWarning) as caught:
            manifest = download_images(items, tmp_path, **limits)
        said, = (str(w.message) for w in caught)
        assert said.startswith(f"3 pictures could not be downloaded anew; those of an earlier download stay in {images}")
        assert "HTTP 503" in said and manifest.equals(first)
        assert {p.name: p.read_bytes() for p in images.iterdir()} == {f"{item}.jpg": retouched for item in items["item"]}
    ways = {"0": "gone", "1": "GIF", "2": "JPEG"}
    server.way_of = lambda path: ways[path[-5]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manifest = download_images(items, tmp_path, **limits)
    assert [str(w.message).split(" in ")[0] for w in caught] == ["3 files"] * (why == "content")
    aside = {f"{item}.jpg.refused": retouched for item in items["item"] if why == "content"}
    kept = {p.name: p.read_bytes() for p in images.iterdir()}
    assert aside.items() <= kept.items() and kept.keys() - aside.keys() == {"B000000001.png", "B000000002.jpg"}
    assert manifest.status.tolist() == ["refused", "ok", "ok"] and kept["B000000002.jpg"] == GOOD["JPEG"]


@pytest.mark.parametrize("good, bad", [("png", "jpg"), ("jpg", "png")])
def test_of_two_files_of_ones_own_the_good_one_counts(server, tmp_path, good, bad):
    (images := tmp_path / "images").mkdir()
    items = some_items(10)  # in whatever order the folder lists their files
    for item in items["item"]:
        (images / f"{item}.{good}").write_bytes(GOOD["PNG"])
        (images / f"{item}.{bad}").write_bytes(b"an AVIF")
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            manifest = download_images(items, tmp_path, image_base=server.address)
        assert (manifest.status == "ok").all() and manifest.url.isna().all() and not server.asked
        assert all((images / f"{item}.{good}").read_bytes() == GOOD["PNG"] for item in items["item"])
    assert sorted(p.read_bytes() for p in images.iterdir()) == 10 * [b"an AVIF"] + 10 * [GOOD["PNG"]]


def test_a_file_of_ones_own_beside_a_downloaded_one_stays(server, tmp_path):
    server.way_of = lambda path: "JPEG"
    items, images = some_items(10), tmp_path / "images"
    manifest = download_images(items, tmp_path, image_base=server.address)
    for item in items["item"]:
        (images / f"{item}.png").write_bytes(GOOD["PNG"])
    server.asked.clear()
    assert download_images(items, tmp_path, image_base=server.address).equals(manifest) and not server.asked
    assert {p.name for p in images.iterdir()} == {f"{item}.{ending}" for item in items["item"] for ending in ("jpg", "png")}


def test_a_refused_picture_of_ones_own_is_renamed_and_said(server, tmp_path):
    "The user's files stay, whatever becomes of the download, and no other file is overwritten."
    server.way_of = lambda path: "gone" if path.endswith("0.jpg") else "JPEG"
    (images := tmp_path / "images").mkdir()
    own = {"B000000000.jpg": bomb(), "B000000001.png": b"an AVIF", "B000000001.png.refused": b"of last week"}
    for name, content in own.items():
        (images / name).write_bytes(content)
    with pytest.warns(UserWarning) as caught:
        manifest = download_images(some_items(2), tmp_path, image_base=server.address, wait=0.01)
    said, = (str(w.message) for w in caught)
    assert said.startswith(f"2 files that were put into {images} cannot be used, and are renamed to end in .refused (")
    assert "B000000000.jpg.refused, too many pixels" in said or "B000000001.png.refused.refused, not an image" in said
    assert manifest.error.tolist()[:1] == ["HTTP 404"] and manifest.status.tolist() == ["refused", "ok"]
    assert {p.name: p.read_bytes() for p in images.iterdir()} == {
        "B000000000.jpg.refused": own["B000000000.jpg"], "B000000001.png.refused": b"of last week",
        "B000000001.png.refused.refused": b"an AVIF", "B000000001.jpg": GOOD["JPEG"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert download_images(some_items(2), tmp_path, image_base=server.address, wait=0.01).equals(manifest)


def test_a_bitmap_put_there_is_kept_and_one_from_a_server_becomes_a_png(server, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "B000000000.bmp").write_bytes(picture("BMP"))
    monkeypatch.setitem(BODY, "bitmap", picture("BMP"))
    server.way_of = lambda path: "bitmap"
    manifest = download_images(some_items(2), tmp_path, image_base=server.address, wait=0.01)
    assert (manifest.status == "ok").all() and server.asked.keys() == {"/I/1.jpg"}
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["B000000000.bmp", "B000000001.png"]


def test_a_file_waits_as_long_as_its_server_asks():
    request = httpx2.Request("GET", "http://server.example/a.gz")

    def pause(**headers):
        error = httpx2.HTTPStatusError("busy", request=request, response=httpx2.Response(503, headers=headers))
        return back_off(0.01)(SimpleNamespace(outcome=SimpleNamespace(exception=lambda: error), attempt_number=1))

    assert pause() < 1 and pause(**{"Retry-After": "7"}) == 7 and pause(**{"Retry-After": "9999"}) == PATIENCE


def test_no_image_server(tmp_path):
    with pytest.raises(DataError, match="do not answer any more; 0 of 300.*Run again"):
        download_images(some_items(300), tmp_path, image_base=closed_port(), wait=0.01)


def test_download_goes_on_where_it_broke(files, tmp_path):
    content = gzip.compress(random.Random(0).randbytes(5000))
    files.content, files.cuts = {"/a.gz": content, "/b.gz": b"<html>log in first</html>"}, 2
    assert fetch_file(f"{files.address}/a.gz", tmp_path / "a.gz", wait=0.01).read_bytes() == content
    assert files.ranges == [None, "bytes=1000-", "bytes=2000-"]
    (tmp_path / "c.gz.part").write_bytes(content)  # killed before it got its name: the server answers 416
    assert fetch_file(f"{files.address}/a.gz", tmp_path / "c.gz", wait=0.01).read_bytes() == content
    with pytest.raises(DataError, match="b.gz is not a complete gzip file"):
        fetch_file(f"{files.address}/b.gz", tmp_path / "b.gz", wait=0.01)
    assert sorted(os.listdir(tmp_path)) == ["a.gz", "c.gz"]


@pytest.mark.parametrize("kind", ["Deflate64", "encrypted"])
def test_a_whole_zip_that_python_cannot_unpack_is_no_damaged_one(files, tmp_path, kind):
    "Who unpacks it says what to do; see test_sources."
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(5000))
    content = bytearray(buffer.getvalue())
    entry = content.find(b"PK\x01\x02")
    place, value = (2, 9) if kind == "Deflate64" else (0, 1)  # in the local header from 6, in the directory from 8
    content[6 + place] = content[entry + 8 + place] = value
    files.content = {"/a.zip": bytes(content), "/b.zip": bytes(content[:-9])}
    assert fetch_file(f"{files.address}/a.zip", tmp_path / "a.zip").read_bytes() == content
    with pytest.raises(DataError, match="b.zip is not a complete zip file"):
        fetch_file(f"{files.address}/b.zip", tmp_path / "b.zip")


def packed(records, write=json.dumps):
    return gzip.compress("".join(f"{write(r)}\n" for r in records).encode(), 1)


SPLIT_SIZES = {"baby": [118551, 20559, 21682], "sports": [218409, 37899, 40029], "clothing": [197338, 40150, 41189]}


@pytest.mark.parametrize("name, official", [("baby", "Baby"), ("sports", "Sports_and_Outdoors"),
                                            ("clothing", "Clothing_Shoes_and_Jewelry")])
def test_published_statistics(files, home, name, official):
    source = SHARED / "amazon" / name
    if not source.is_dir():
        pytest.skip(f"the Amazon interactions are not at {source} (set PTMREC_SHARED)")
    inter, items = pd.read_csv(source / f"{name}.inter", sep="\t"), source / "items.tsv"
    asin = (pd.read_csv(items, sep="\t", dtype=str).asin.tolist() if items.exists()
            else [f"B{i:09}" for i in range(inter.itemID.max() + 1)])
    reviews = [{"reviewerID": f"A{u}", "asin": asin[i], "overall": 5.0, "unixReviewTime": 1}
               for u, i in zip(inter.userID.tolist(), inter.itemID.tolist())]
    files.content = {f"/reviews_{official}_5.json.gz": packed(reviews),
                     f"/meta_{official}.json.gz": packed([{"asin": a, "title": "t", "brand": "b", "categories": [["c"]],
                                                           "description": "d", "imUrl": "http://x/1"} for a in asin], str)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_data(prepare(name, base_url=files.address, images=False))
    assert (data.inter.n_users, data.inter.n_items, len(data.inter)) == PUBLISHED[name]
    assert np.bincount(data.inter.split).tolist() == SPLIT_SIZES[name]  # as in MMRec
    assert set(data.inter.item_ids) == set(asin)
    if name == "baby":
        (home / "baby" / "raw" / "reviews_Baby_5.json.gz").write_bytes(packed(reviews[5000:]))
        with pytest.warns(UserWarning, match="baby has .* here, but 19,445 / 7,050 / 160,792 as published"):
            prepare(name, images=False)


def toys(raw, release=2014, meta=None):
    "Raw files of a category of six users, five items in the 5-core and one outside."
    raw.mkdir(parents=True, exist_ok=True)
    user, item, rating, time = (("reviewerID", "asin", "overall", "unixReviewTime") if release == 2014
                                else ("user_id", "parent_asin", "rating", "timestamp"))
    pairs = [(u, i) for u in range(6) for i in range(5)] + [(0, 5)]
    reviews = [{user: f"U{u}", item: f"000000000{i}", rating: 5.0, time: 1_400_000_000_000 + u} for u, i in pairs]
    meta = meta or [{item: f"000000000{i}", "title": f"Salt &amp; pepper {i}"} for i in range(6)]
    names = ("reviews_Toys_5.json.gz", "meta_Toys.json.gz") if release == 2014 else ("Toys.jsonl.gz", "meta_Toys.jsonl.gz")
    for name, records, write in zip(names, (reviews, meta), (json.dumps, str if release == 2014 else json.dumps)):
        (raw / name).write_bytes(packed(records, write))


@pytest.mark.filterwarnings("ignore:.*have no")
def test_ids_and_texts_survive(home):
    toys(home / "Toys" / "raw")
    data = load_data(prepare("Toys", images=False))
    assert data.inter.item_ids.tolist() == [f"000000000{i}" for i in range(5)] and data.texts[1] == "Salt & pepper 1"


@pytest.mark.parametrize("line, field", [("{'not': 'json'}", ""), ("[1]", ""), ('{"reviewerID": "U", "asin": "x"}', "asin"),
    ('{"reviewerID": "U", "asin": "0000000000", "overall": NaN, "unixReviewTime": 1}', "overall")])
def test_bad_review_line_is_named(tmp_path, line, field):
    good = {"reviewerID": "U", "asin": "0000000000", "overall": 1, "unixReviewTime": 1}
    (tmp_path / "r.json").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(DataError, match=f"r.json, line 2.*{field}"):
        read_reviews(tmp_path / "r.json")


@pytest.mark.parametrize("value", ["__import__('pathlib').Path('{}').touch()", "open('{}', 'w')", "'cut"])
def test_bad_meta_line_is_named_and_code_never_runs(tmp_path, value):
    line = "{'asin': '0000000000', 'title': " + value.format(tmp_path / "ran") + "}"
    (tmp_path / "m.json").write_text(f"{{'asin': '0000000001'}}\n{line}\n")
    with pytest.raises(DataError, match="m.json, line 2: cannot be read"):
        read_meta(tmp_path / "m.json", ["0000000000"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:.*have no")
@pytest.mark.parametrize("images", [{"large": ["http://x/1"]}, ["http://x/1"], "http://x/1", [], None])
def test_images_of_another_shape_are_missing(tmp_path, images):
    (tmp_path / "m.jsonl").write_text(json.dumps({"parent_asin": "0000000000", "images": images}))
    assert read_meta(tmp_path / "m.jsonl", ["0000000000"], 2023).image_url.isna().all()


def test_without_network_one_sentence_at_once(home, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(DataError, match="reviews_Baby_5.json.gz and meta_Baby.json.gz cannot be down.*put into .*baby/raw"):
        prepare("baby", base_url=closed_port())
    with pytest.raises(DataError, match="Toys.jsonl.gz and meta_Toys.jsonl.gz are not there.*put into"):
        prepare("Toys", release=2023)


@pytest.mark.filterwarnings("ignore:.*have no", "ignore:.*as published")
@pytest.mark.parametrize("name, official", [("sports", "Sports_and_Outdoors"), ("clothing", "Clothing_Shoes_and_Jewelry"),
                                            ("baby", "Baby"), ("Toys", "Toys")])
def test_published_settings_go_into_the_folder_and_never_over_ones_own(home, name, official):
    toys(raw := home / name / "raw")
    for path in list(raw.iterdir()):
        path.rename(path.with_name(path.name.replace("Toys", official)))
    (raw / f"image_features_{official}.b").write_bytes(b"0000000001" + bytes(4 * 4096) + b"0000000002" + bytes(4 * 4096))
    with pytest.warns(UserWarning, match="lacks 3 of 5"):
        prepare(name, images=False)
    files = [home / folder / "defaults.toml" for folder in (name, f"{name}-release")]
    if name not in ("sports", "clothing"):
        assert not any(f.exists() for f in files)
        return
    assert [tomllib.loads(f.read_text()) for f in files] == [PUBLISHED_SETTINGS[name]] * 2
    files[0].write_text(own := "lr = 1e-2\n")
    with pytest.warns(UserWarning, match="lacks 3 of 5"):
        prepare(name, images=False)
    assert files[0].read_text() == own and not list(home.rglob(".*-defaults.toml"))


@pytest.mark.filterwarnings("ignore:.*have no")
def test_release_2023(home):
    meta = [{"parent_asin": f"000000000{i}", "title": "Cup", "store": "Acme", "categories": ["A", "B"], "price": "None",
             "description": ["one", "two"], "images": [{"thumb": "http://x/t", "large": f"http://x/{i}"}]} for i in range(6)]
    toys(home / "hand", 2023, meta)
    folder = prepare("Toys", release=2023, raw=home / "hand", images=False)
    items, inter = (pd.read_parquet(folder / f"{name}.parquet") for name in ("items", "interactions"))
    assert len(inter) == 30 and inter.timestamp.max() == 1_400_000_000 and items.image_url[3] == "http://x/3"
    assert load_data(folder).texts[0] == "Cup. Acme. A B. one two" and folder.name == "Toys-2023"


@pytest.mark.filterwarnings("ignore:.*have no")
def test_raw_files_in_the_users_home(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home / "me"))
    toys(home / "me" / "amazon")
    assert len(load_data(prepare("Toys", raw="~/amazon", images=False)).inter) == 30


def test_a_release_and_text_fields_that_are_not_known(home):
    with pytest.raises(DataError, match="^release=2018 is not known. Allowed: 2014, 2023.$"):
        prepare("baby", release=2018)
    with pytest.raises(DataError, match="^text_fields: 'colour' is not known. Allowed: title, brand, categories, desc"):
        prepare("baby", text_fields=["title", "colour"])


@pytest.mark.filterwarnings("ignore:.*have no", "ignore:.*lacks 1 of 5 items")
def test_release_features(home):
    raw = home / "Toys" / "raw"
    toys(raw)
    order = [3, 0, 5, 1, 4]  # item 2 is not there, 5 is of no interest
    path = raw / "image_features_Toys.b"
    path.write_bytes(b"".join(f"000000000{i}".encode() + np.full(4096, i + 1, "<f4").tobytes() for i in order))
    prepare("Toys", images=False)
    data = load_data("Toys-release")
    assert data.inter.item_ids.tolist() == list(range(5))
    assert data.features["image"][:, 7].tolist() == [1, 2, 3, 4, 5]  # 2 has the mean of the others
    assert not list(home.rglob("Toys-release/.*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="image_features_Toys.b has .* not a multiple of 16,394"):
        read_image_features(path, ["0000000000"])


@pytest.mark.filterwarnings("ignore:.*have no")
def test_half_made_folder_is_not_ready(home, monkeypatch):
    toys(home / "baby" / "raw")
    for path in list((home / "baby" / "raw").iterdir()):
        path.rename(path.with_name(path.name.replace("Toys", "Baby")))
    meta = [{"asin": f"000000000{i}", "imUrl": f"http://x/{i}"} for i in range(5)]
    (home / "baby" / "raw" / "meta_Baby.json.gz").write_bytes(packed(meta, str))
    with pytest.warns(UserWarning, match="as published"), pytest.raises(DataError, match="None of 5|do not answer"):
        prepare("baby", image_base=closed_port(), wait=0.01)
    assert (home / "baby" / "items.parquet").exists()
    monkeypatch.setattr("ptmrec.amazon.prepare", lambda name: f"prepared {name}")
    assert find_or_prepare("baby") == "prepared baby"


def test_check_image_names_what_it_keeps():
    assert [check_image(GOOD[kind])[0] for kind in GOOD] == [".jpg", ".png", ".png"]


@pytest.mark.parametrize("where", ["the data", "a redirect"])
def test_no_address_leads_inside(server, tmp_path, monkeypatch, where):
    "The server is 127.0.0.1, which the data do not name as a mirror; a redirect leads to it by another name."
    own = server.address.replace("127.0.0.1", "localhost")
    items = some_items(1).assign(image_url=f"{own}/I/secret.jpg")
    monkeypatch.setitem(BODY, "inside", GOOD["JPEG"])
    server.way_of = lambda path: "JPEG" if "secret" in path else "inside"
    if where == "a redirect":
        items["image_url"] = "http://images.example/I/0.jpg"
        monkeypatch.setattr(Handler, "do_GET", lambda self: redirect(self, f"{own}/I/secret.jpg"))
    manifest = download_images(items, tmp_path, wait=0.01, image_base=server.address if where == "a redirect" else None)
    assert manifest.error.tolist() == ["private address"] and "/I/secret.jpg" not in server.asked
    whole(tmp_path, manifest)


def redirect(handler, to):
    handler.server.asked[handler.path] += 1
    handler.send_response(302)
    for header in (("Location", to), ("Content-Length", "0")):
        handler.send_header(*header)
    handler.end_headers()


@pytest.mark.parametrize("to, said", [("http://localhost:9/a.gz", "redirects to localhost, an address of this machine"),
                                      ("http://169.254.169.254/a.gz", "redirects to 169.254.169.254"),
                                      ("file:///etc/passwd", "cannot be downloaded: .*UnsupportedProtocol")])
def test_raw_files_come_from_the_web(server, home, monkeypatch, to, said):
    monkeypatch.setattr(Handler, "do_GET", lambda self: redirect(self, to))
    with pytest.raises(DataError, match=said):
        prepare("Toys", base_url=server.address)
    assert not list(home.rglob("*.gz"))


@pytest.mark.parametrize("address", ["snap.stanford.edu/data", "http://[::1/data", "ftp://files.example", "http:///data",
                                     "http://files.example:port", "http://files.example/a\x01b"])
def test_an_address_that_is_none_is_one_sentence(home, address):
    with pytest.raises(DataError, match="cannot be downloaded: .* is no address. Download from") as e:
        prepare("Toys", base_url=address)
    assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="is no address. Give one that begins with http:// or https://"):
        download_images(some_items(1), home / "Toys", image_base=address)
    assert not list(home.rglob("*.*"))


def test_an_archive_of_lzma_that_is_damaged_is_one_sentence(files, tmp_path):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("ratings.csv", "1,2,3\n" * 1000)
    broken = bytearray(buffer.getvalue())
    broken[60:75] = b"\xff" * 15
    files.content = {"/a.zip": bytes(broken)}
    with pytest.raises(DataError, match="a.zip is not a complete zip file"):
        fetch_file(f"{files.address}/a.zip", tmp_path / "a.zip")


def test_a_folder_that_is_there_and_cannot_be_used_is_not_prepared(home, monkeypatch):
    "The user's own folder of that name has a fault, which is what to hear of; nothing is downloaded into it."
    monkeypatch.setattr("ptmrec.amazon.prepare", None)
    (home / "baby").mkdir()
    for name in ("a.train.inter", "b.train.inter"):
        (home / "baby" / name).write_text("user\titem\n1\t2\n")
    with pytest.raises(DataError, match="baby has several data sets: a.train, b.train. Give each its own folder"):
        find_or_prepare("baby")


@pytest.mark.parametrize("category", ["../../x", "/tmp/x", "a/b", "..", "", "a\0b", "CON:", "x" * 10 + "\n"])
def test_a_category_names_no_other_folder(home, category):
    with pytest.raises(DataError, match="is no category: a name has letters, digits and _"):
        prepare(category)
    assert not list(home.iterdir())


@pytest.mark.parametrize("item", ["../x", "a/b", "a\0b", "x" * 300])
def test_ids_that_name_no_file(tmp_path, item):
    with pytest.raises(DataError, match="cannot be the name of a file"):
        download_images(pd.DataFrame({"item": [item], "image_url": ["http://x/1.jpg"]}), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>", random.Random(0).randbytes(3000), "another table", "cut"])
def test_a_damaged_manifest_is_made_anew(server, tmp_path, content):
    server.way_of = lambda path: "page" if path.endswith("7.jpg") else "JPEG"
    items, path = some_items(20), tmp_path / "manifest.parquet"
    before = download_images(items, tmp_path, image_base=server.address)
    (tmp_path / ".manifest.jsonl").write_bytes(b'{"item": 5}\n\xff\n[]\nnull\n{"item": "B", "bytes": 1e999}\n')
    if content == "another table":
        pd.DataFrame({"a": [1]}).to_parquet(path)
    else:
        path.write_bytes(path.read_bytes()[:-9] if content == "cut" else content)
    server.asked.clear()
    with pytest.warns(UserWarning, match="manifest.parquet is damaged and is made anew"), \
            pytest.warns(UserWarning, match="5 damaged lines are left out"):
        after = download_images(items, tmp_path, image_base=server.address)
    assert after[["item", "status", "sha256", "error"]].equals(before[["item", "status", "sha256", "error"]])
    assert set(server.asked) == {"/I/7.jpg", "/I/17.jpg"}  # the others are there
    whole(tmp_path, after)


PREPARE = ("import sys; from ptmrec.amazon import prepare\n"
           "prepare('Toys', base_url=sys.argv[1], image_base=sys.argv[2], wait=0.01)")


def test_two_prepare_at_once_end_as_one(server, files, tmp_path):
    "Each of four pairs starts with nothing; what they leave is what one process alone leaves."
    server.way_of = lambda path: "page" if path.endswith("3.jpg") else "JPEG"
    toys(tmp_path / "raw", meta=[{"asin": f"000000000{i}", "title": f"toy {i}", "imUrl": f"http://images.example/{i}.jpg"}
                                 for i in range(6)])
    files.content = {f"/{p.name}": p.read_bytes() for p in (tmp_path / "raw").iterdir()}

    def folder_after(name, n):
        home = tmp_path / name
        environment = os.environ | {"PTMREC_DATA": str(home), "TQDM_DISABLE": "1"}
        processes = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", PREPARE, files.address, server.address],
                                      env=environment, stdout=subprocess.PIPE, text=True) for _ in range(n)]
        said = [p.communicate(timeout=400)[0] for p in processes]
        assert [p.returncode for p in processes] == [0] * n
        assert n == 1 or sum("Another process is at it (data set Toys)" in out for out in said) <= n - 1
        return {p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()}

    alone = folder_after("alone", 1)
    assert len(alone) == 9  # two raw files, two tables, the manifest, four images
    for pair in range(4):
        assert folder_after(f"pair{pair}", 2) == alone


def test_counts_of_2023_are_compared_as_they_are_rounded():
    pairs = pd.DataFrame({"user": [0], "item": [0]})
    with pytest.warns(UserWarning, match="baby-2023 has 1 / 1 / 1 users .* but 150.8K / 36.0K / 1.2M as published"):
        check_published("baby-2023", pairs)
    users, items, n = 150_777, 36_013, 1_241_083  # what others count in that 5-core
    numbers = np.arange(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_published("baby-2023", pd.DataFrame({"user": numbers % users, "item": numbers % items}))
