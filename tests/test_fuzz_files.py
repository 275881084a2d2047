"""Odd bytes in pictures, arrays, Amazon's lines and manifests, drawn by hypothesis: they work or raise documented errors.

500 inputs in all here; `pytest -m slow` draws 25,000.
"""
import gzip
import io
import json
import random
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ptmrec.amazon import (
    ENDINGS,
    MANIFEST,
    ImageRefused,
    check_image,
    read_manifest,
    read_meta,
    read_reviews,
)
from ptmrec.data import RESIZE_MODES, DataError, PictureError, _read_features, load_image

MANY = pytest.mark.parametrize("n", [100, pytest.param(5000, marks=pytest.mark.slow)])


def drawn(n, **arguments):
    "A decorator that runs a check on `n` inputs: the same ones each time if they are few."
    how = settings(max_examples=n, deadline=None, database=None, derandomize=n < 1000,
                   suppress_health_check=list(HealthCheck))
    return lambda check: how(given(**arguments)(check))()


def saved(save, *args, **how):
    save(buffer := io.BytesIO(), *args, **how)
    return buffer.getvalue()


@st.composite
def damaged(draw, wholes):
    "One of `wholes` (bytes) after a few changes: bytes replaced, cut out, put in, doubled, or the end of another."
    content = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(0, min(len(content), draw(st.sampled_from([30, 300, 10**6]))) - 1)))
        how = draw(st.sampled_from(["flip", "set", "cut out", "insert", "end", "splice", "double"]))
        size = draw(st.integers(1, 12))
        if how == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            content[at : at + size] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"9", b"("])) * size
        elif how == "cut out":
            del content[at : at + size * draw(st.sampled_from([1, 50]))]
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=12))
        elif how == "end":
            del content[at:]
        elif how == "splice":
            content[at:] = draw(st.sampled_from(wholes))[at:]
        else:
            content += content[at:]
    return bytes(content)


def pictures():
    "Small pictures in the formats that are read, and in some that are not."
    noise = np.random.default_rng(0).integers(0, 255, (12, 17, 4), np.uint8)
    colour, grey = Image.fromarray(noise[..., :3]), Image.fromarray(noise[..., 0])
    found = [saved(colour.save, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "EPS", "ICO", "PPM", "TGA")]
    found += [saved(colour.save, "JPEG", progressive=True), saved(colour.convert("CMYK").save, "JPEG"),
              saved(Image.fromarray(noise).save, "PNG"), saved(Image.fromarray(noise).save, "WEBP", lossless=True),
              saved(colour.quantize(7).save, "PNG", transparency=3), saved(grey.save, "PNG", transparency=9),
              saved(Image.fromarray(noise.view(np.uint16)[..., 0]).save, "PNG"), saved(grey.convert("1").save, "BMP"),
              saved(colour.save, "GIF", save_all=True, append_images=[colour.rotate(90)], duration=9)]
    turned = colour.copy()
    turned.getexif().update({0x0112: 6, 0x010F: "maker"})
    return [*found, *(saved(turned.save, kind, exif=turned.getexif()) for kind in ("JPEG", "PNG", "WEBP"))]


@MANY
def test_pictures(tmp_path, n):
    kept = {"read": 0, "refused": 0}

    @drawn(n, content=damaged(pictures()) | st.binary(max_size=60), mode=st.sampled_from(RESIZE_MODES))
    def check(content, mode):
        (tmp_path / "0.jpg").write_bytes(content)
        try:
            pixels = load_image(tmp_path / "0.jpg", 8, mode)
            assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
            kept["read"] += 1
        except PictureError as error:
            assert error.reason and "\n" not in str(error)
            kept["refused"] += 1
        try:
            ending, *_ = check_image(content)
            assert ending in ENDINGS.values()
        except ImageRefused:
            pass

    assert min(kept.values()) > n / 50  # both happen often


def arrays():
    "Feature tables in the versions of the .npy format, and what is like them."
    table = np.arange(24, dtype=np.float32).reshape(6, 4)
    found = [saved(np.lib.format.write_array, array, version) for version in ((1, 0), (2, 0), (3, 0))
             for array in (table, table.T, table.astype(">f8"), table.astype(np.int8), np.asfortranarray(table))]
    found += [saved(np.savez, table), saved(np.save, np.array([{}, 1], object)), saved(np.save, np.zeros(6)),
              saved(np.save, np.zeros((6, 2), "f4,U3")), saved(np.save, np.zeros((6, 2), complex)),
              saved(np.save, np.zeros((6, 2), "M8[s]")), saved(np.save, np.full((6, 2), np.nan))]
    return found


def header(text):
    "A .npy file with a header of one's own."
    return b"\x93NUMPY\x02\0" + len(text).to_bytes(4, "little") + text + bytes(96)


HEADERS = st.builds(lambda kind, order, shape: f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}".encode(),
                    st.sampled_from(["'<f4'", "'|O'", "'<f9'", "[('a', '<f4')]", "'<U2'", "'<f4", "{}", "'<f2'", "1"]),
                    st.sampled_from(["False", "True", "0", "None", "()"]),
                    st.sampled_from(["(6, 4)", "(6, -4)", "(6, 2**80)", "(10**12, 10**6)", "(6,)", "()", "6", "(6, 4.0)",
                                     "[6, 4]", "(6, 99999999999999999999)", "(((((" * 90, "(0, 4)", "(6, 0)", "(6, True)"]))


@MANY
def test_arrays(tmp_path, n):
    kept = {"read": 0, "refused": 0}

    @drawn(n, content=damaged(arrays()) | st.builds(header, HEADERS | st.binary(max_size=40)))
    def check(content):
        (tmp_path / "image_feat.npy").write_bytes(content)
        try:
            with np.errstate(all="ignore"):
                found = _read_features(tmp_path / "image_feat.npy", np.array([0, 5]))
            assert len(found) == 2 and found.dtype == np.float32 and np.isfinite(found).all()
            kept["read"] += 1
        except DataError as error:
            assert "image_feat.npy" in str(error)
            kept["refused"] += 1

    assert min(kept.values()) > n / 50


VALUES = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.integers(-(10**400), 10**400)
                      | st.text(st.characters(exclude_categories=[]), max_size=9)
                      | st.sampled_from(["\ud800", "&#xD800;", "nan", "1e999", "0000000000", "http://x/1.jpg", "a\0b"]),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                      max_leaves=6)
DEEP = st.builds(lambda depth: "[" * depth + "]" * depth, st.sampled_from([90, 300, 900, 3000, 100_000]))


def lines(names, key, values):
    "Lines of a release: records with odd values, deep lists, damaged records, and bytes."
    record = st.fixed_dictionaries({key: st.just("0000000000") | VALUES}, optional={name: values for name in names})
    whole = record.map(lambda r: json.dumps(r).encode()) | record.map(lambda r: repr(r).encode("utf-8", "surrogatepass"))
    deep = DEEP.map(lambda d: f'{{"{key}": "0000000000", "{names[0]}": {d}}}'.encode())
    usual = json.dumps({key: "0000000000", **dict.fromkeys(names, "a")}).encode()
    return st.lists(whole | whole | deep | damaged([usual]) | st.binary(max_size=30), min_size=1, max_size=3).map(b"\n".join)


@MANY
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore:.*have no")
def test_metadata(tmp_path, n):
    names = ["title", "brand", "store", "categories", "description", "price", "imUrl", "images"]

    @drawn(n, content=lines(names, "asin", VALUES) | lines(names, "parent_asin", VALUES),
           release=st.sampled_from([2014, 2023]))
    def check(content, release):
        (tmp_path / "meta.json").write_bytes(content)
        try:
            table = read_meta(tmp_path / "meta.json", ["0000000000", "0000000001"], release)
        except DataError as error:
            assert "meta.json, line" in str(error)
            return
        assert table["item"].tolist() == ["0000000000", "0000000001"] and table.price.dtype == float
        table.to_parquet(tmp_path / "items.parquet")


REVIEW_VALUES = st.sampled_from(["U1", "\ud800", "", 5.0, 4, 1_400_000_000, 10**30, -(10**400), True, None, float("nan"), [],
                                 "0000000000"])


@MANY
def test_reviews(tmp_path, n):
    names = ["reviewerID", "overall", "unixReviewTime"]
    good = {"reviewerID": "U1", "asin": "0000000000", "overall": 5.0, "unixReviewTime": 1_400_000_000}
    nearly = st.dictionaries(st.sampled_from(list(good)), REVIEW_VALUES | VALUES, max_size=2).map(
        lambda odd: json.dumps(good | odd).encode())

    @drawn(n, content=lines(names, "asin", REVIEW_VALUES) | nearly | nearly,
           packed=st.sampled_from([False, False, True, None]))
    def check(content, packed):
        path = tmp_path / ("reviews.json" if packed is False else "reviews.json.gz")
        content = gzip.compress(content)[: None if packed else -random.Random(len(content)).randrange(1, 20)] if (
            packed is not False) else content
        path.write_bytes(content)
        try:
            read_reviews(path).to_parquet(tmp_path / "reviews.parquet")
        except DataError as error:
            assert path.name in str(error)


@MANY
def test_manifests(tmp_path, n):
    rows = [dict.fromkeys(MANIFEST) | {"item": f"B{i}", "status": "ok", "bytes": 9, "sha256": "ab"} for i in range(4)]
    table = pd.DataFrame(rows).astype(MANIFEST)
    wholes = [saved(table.to_parquet), saved(pd.DataFrame({"item": [1]}).to_parquet),
              saved(table.assign(bytes="a").to_parquet), saved(table.assign(item=[[1]] * 4).to_parquet)]
    row = st.fixed_dictionaries({"item": st.just("B9") | VALUES}, optional={name: VALUES for name in list(MANIFEST)[1:]})
    journal = st.lists(row.map(lambda r: json.dumps(r).encode()) | DEEP.map(str.encode) | st.binary(max_size=30), max_size=3)

    @drawn(n, manifest=st.sampled_from(wholes) | damaged(wholes) | st.binary(max_size=30), journal=journal)
    def check(manifest, journal):
        (tmp_path / "manifest.parquet").write_bytes(manifest)
        (tmp_path / ".manifest.jsonl").write_bytes(b"".join(line + b"\n" for line in journal))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = read_manifest(tmp_path)
        assert list(found) == list(MANIFEST) and found["item"].is_unique
        found.to_parquet(tmp_path / "again.parquet")
