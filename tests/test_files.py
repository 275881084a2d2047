"""Files that are hostile, damaged or half-made, disks that are full or read-only, and two processes at once."""
import errno
import hashlib
import io
import json
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps
from small import make_shop

import ptmrec.data
import ptmrec.files
from ptmrec.amazon import ImageRefused, check_image
from ptmrec.clip_prompting import frozen_features, load_clip, token_map
from ptmrec.data import INTERPOLATIONS, RESIZE_MODES, DataError, PictureError, image_map, load_data, load_image
from ptmrec.files import (
    cache_dir,
    cached,
    data_dir,
    empty_cache,
    is_whole,
    list_cache,
    locked,
    runs_dir,
    sweep,
    write_atomically,
)
from ptmrec.prefix import ItemStore


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "runs"))
    make_shop(tmp_path / "data" / "shop")
    return tmp_path / "data" / "shop"


def python(code, *arguments, **options):
    "A process that runs `code` with this package."
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


# folders

def test_folders_of_the_environment_may_be_in_the_users_home(shop, tmp_path, monkeypatch):
    "Outside a shell nobody writes it out: a notebook's %env, a .env file, a list of several folders."
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    pictures = tmp_path / "me" / "pictures"
    pictures.mkdir(parents=True)
    for picture in list((shop / "images").iterdir()):
        picture.rename(pictures / picture.name)
        picture.symlink_to(pictures / picture.name)
    assert not any(load_data(shop).images)
    monkeypatch.setenv("PTMREC_IMAGES", os.pathsep.join([str(tmp_path / "x"), "~/pictures"]))
    assert any(load_data(shop).images)
    monkeypatch.chdir(tmp_path)
    for name, folder in (("PTMREC_DATA", data_dir), ("PTMREC_RUNS", runs_dir)):
        for value, expected in (("~/disk", tmp_path / "me" / "disk"), ("disk", tmp_path / "disk")):
            monkeypatch.setenv(name, value)
            assert folder() == expected


# pictures

PROGRAM = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/ran) (w) file (I ran) writestring\nshowpage\n"


def test_a_picture_that_is_a_program_does_not_run(shop, monkeypatch):
    asked = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript",
                        lambda *args, **more: asked.append(1) or Image.new("RGB", (9, 9)).im)
    for name in ("0.png", "1.png"):
        (shop / "images" / name).write_text(PROGRAM)
    Image.open(shop / "images" / "0.png").load()
    assert asked.pop()  # Pillow alone would run it
    with pytest.warns(UserWarning, match="2 unreadable images .*2 not a JPEG, PNG, WebP, GIF or BMP picture.*0.png"):
        _, seen = image_map(load_data("shop"), 32)
    assert not asked and not seen[:2].any() and seen.sum() == 34


@pytest.fixture
def private(tmp_path):
    path = tmp_path / "private" / "photo.png"
    path.parent.mkdir()
    Image.new("RGB", (30, 30), "navy").save(path)
    return path


@pytest.mark.parametrize("how", ["absolute", "..", "link", "linked folder", "link in images", "kernel messages"])
def test_no_path_leads_out_of_the_data_set(shop, private, monkeypatch, how):
    (shop / "photo.png").symlink_to(private)
    (shop / "photos").symlink_to(private.parent)
    named = {"absolute": private, "..": "../../private/photo.png", "link": "photo.png", "linked folder": "photos/photo.png",
             "kernel messages": "/proc/kmsg"}.get(how)
    if how == "link in images":
        (shop / "images" / "5.png").symlink_to(private)
    else:
        (shop / "items.csv").write_text(f"item,title,image\n5,a hat,{named}\n7,a mug,images/9.png\n")
    with pytest.warns(UserWarning, match="1 files are not used, they lead outside the data set .*PTMREC_IMAGES"):
        images = load_data("shop").images
    assert images[5] is None and images[7].name == ("7.png" if how == "link in images" else "9.png")
    if how != "kernel messages":
        monkeypatch.setenv("PTMREC_IMAGES", str(private.parent))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*files are not used")
            assert os.path.realpath(load_data("shop").images[5]) == str(private)


def test_folders_of_images_may_be_links_and_pipes_are_not_read(shop, tmp_path):
    (shop / "images").rename(tmp_path / "pictures")
    (shop / "images").symlink_to(tmp_path / "pictures")
    os.mkfifo(tmp_path / "pictures" / "5.png")
    (tmp_path / "pictures" / "loop").symlink_to(tmp_path)  # what is below is walked once
    images = load_data("shop").images
    assert images[5] is None and sum(p is not None for p in images) == 36


def test_a_file_too_large_for_a_picture_is_counted(shop):
    with open(shop / "images" / "3.png", "wb") as file:
        file.truncate(10**12)  # a hole; reading it would take an hour
    with pytest.warns(UserWarning, match="1 files are not used, they have more than 100 MB.*3.png"):
        data = load_data("shop")
    assert data.images[3] is None and data.fingerprint()
    with pytest.raises(PictureError, match="not a file of at most 100 MB"):
        load_image(shop / "images" / "3.png", 32)


def png(width, height, *chunks, data=b""):
    "A PNG of grey pixels with further chunks (name, content); `data`: its packed pixels, else black ones."
    data = data or zlib.compress(bytes((width + 1) * height), 1)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(content)) + name + content + struct.pack(
        ">I", zlib.crc32(name + content)) for name, content in parts)


MEASURE = """
import resource, sys
from pathlib import Path
from ptmrec.data import PictureError, load_image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
try:
    print(load_image(Path(sys.argv[1]), 224, sys.argv[2]).shape)
except PictureError as error:
    print(error.reason)
print(peak() - before)
"""


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("name, content, said", [
    ("tall", png(1, 60_000), "(224, 224, 3)"),
    ("wide", png(60_000, 1), "(224, 224, 3)"),
    ("bomb", png(30_000, 30_000, data=b"x"), "more than 50 million pixels"),
    ("huge bomb", png(2**31 - 1, 2**31 - 1, data=b"x"), "more than 50 million pixels"),
    ("text", png(9, 9, (b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))), "damaged or cut"),
    ("profile", png(9, 9, (b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))), "damaged or cut"),
    ("many texts", png(9, 9, *[(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(1_000_000), 9)) for i in range(400)]),
     "damaged or cut")], ids=lambda v: v if isinstance(v, str) else "")
def test_a_picture_takes_bounded_memory(tmp_path, name, content, said, mode):
    (tmp_path / "0.png").write_bytes(content)
    process = python(MEASURE, tmp_path / "0.png", mode)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found, megabytes = out.splitlines()
    assert found == said and int(megabytes) < 250


def many_scans(path, n):
    "A progressive JPEG whose last scan comes `n` times."
    Image.effect_noise((64, 64), 50).save(content := io.BytesIO(), "JPEG", progressive=True)
    content = content.getvalue()
    last = content.rindex(b"\xff\xda")
    path.write_bytes(content[:last] + content[last:-2] * n + content[-2:])


def test_a_jpeg_with_thousands_of_scans_is_not_decoded(tmp_path):
    "Each scan takes the time of the whole picture, and a few bytes in the file."
    many_scans(tmp_path / "few.jpg", 20)
    many_scans(tmp_path / "many.jpg", 2000)
    assert load_image(tmp_path / "few.jpg", 32).shape == (32, 32, 3)
    with pytest.raises(PictureError, match="more than 100 scans"):
        load_image(tmp_path / "many.jpg", 32)
    with pytest.raises(ImageRefused, match="too many scans"):
        check_image((tmp_path / "many.jpg").read_bytes())


def decoded_before(path, size, resize_mode, interpolation):
    "What `load_image` was for pictures without turn, transparency or 16 bits."
    with Image.open(path) as image:
        image = image.convert("RGB")
        width, height = (size if resize_mode == "squash" else int(size * side / min(image.size)) for side in image.size)
        left, top = (round((side - size) / 2) for side in (width, height))
        image = image.resize((width, height), INTERPOLATIONS[interpolation]).crop((left, top, left + size, top + size))
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("size", [(90, 71), (64, 512), (31, 31), (500, 63)])
def test_ordinary_pictures_are_decoded_as_ever(tmp_path, kind, size):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    for mode in ("RGB", "L", "P", "CMYK"):
        if mode == "CMYK" and kind != "JPEG" or mode == "P" and kind not in ("PNG", "GIF", "BMP"):
            continue
        Image.fromarray(pixels).convert(mode).save(tmp_path / "i", kind)
        for how in [(m, i) for m in RESIZE_MODES for i in INTERPOLATIONS]:
            assert np.array_equal(load_image(tmp_path / "i", 48, *how), decoded_before(tmp_path / "i", 48, *how))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cameras_say_how_to_turn(tmp_path, orientation, kind):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8))
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    picture.save(tmp_path / "i", kind, exif=picture.getexif(), **{"lossless": True} if kind == "WEBP" else {})
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "i"))
    upright.save(tmp_path / "upright.png")
    wanted = decoded_before(tmp_path / "upright.png", 30, "shortest", "bicubic")
    assert np.array_equal(load_image(tmp_path / "i", 30), wanted)


def test_damaged_exif_data_in_a_good_picture(tmp_path):
    picture = Image.new("RGB", (30, 30), "navy")
    picture.save(tmp_path / "i.png", exif=b"Exif\0\0MM\0*" + random.Random(0).randbytes(60))
    assert (load_image(tmp_path / "i.png", 30) == np.asarray(picture)).all()


def transparent(mode):
    "A picture with a transparent left and an opaque right half, which is (0, 128, 0); black below what is transparent."
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[:, 20:] = 0, 128, 0, 255
    picture = Image.fromarray(rgba)
    if mode == "RGB":  # one colour means transparent
        return picture.convert("RGB"), {"transparency": (0, 0, 0)}
    if mode == "P":
        picture = picture.convert("RGB").quantize(2)
        return picture, {"transparency": picture.getpixel((0, 0))}
    return picture.convert(mode), {}


@pytest.mark.parametrize("mode, kind", [("RGBA", "PNG"), ("RGBA", "WEBP"), ("P", "PNG"), ("P", "GIF"), ("RGB", "PNG"),
                                        ("LA", "PNG")])
def test_transparent_is_white(tmp_path, mode, kind):
    picture, how = transparent(mode)
    picture.save(tmp_path / "i", kind, **how, **{"lossless": True} if kind == "WEBP" else {})
    found = load_image(tmp_path / "i", 40)
    right = picture.convert("RGB").getpixel((30, 5))
    assert (found[:, :18] == 255).all() and (found[:, 22:] == right).all()


def test_grey_of_16_bits(tmp_path):
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "i.png")
    assert (load_image(tmp_path / "i.png", 8)[..., 0] == values >> 8).all()


def test_what_is_made_of_a_picture_has_a_version(tmp_path):
    "If this fails because `load_image` gives other pixels on purpose, raise `ptmrec.data.PIXELS` and put the new digest."
    noise = np.random.default_rng(0).integers(0, 255, (90, 71, 4), np.uint8)
    digest = hashlib.blake2b(digest_size=8)
    for pixels in (noise, noise[..., :3], noise[..., 0], noise.view(np.uint16)[..., 0], noise[:, :5, :3]):
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "i.png")
        for how in [(m, i) for m in RESIZE_MODES for i in INTERPOLATIONS]:
            digest.update(load_image(tmp_path / "i.png", 48, *how).tobytes())
    assert (ptmrec.data.PIXELS, digest.hexdigest()) == (2, "92f6e182d4db6a9d")


# the cache

def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 8
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip_a_bit,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "garbled": lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
    "a page": lambda path: path.write_text("<html>login</html>"),
    "deleted": lambda path: path.unlink(),
    "companion deleted": lambda path: path.with_name(path.name + ".sum").unlink(),
    "companion garbled": lambda path: path.with_name(path.name + ".sum").write_bytes(b"\xff[1"),
    "another's": lambda path: (path.write_bytes(b"x"), path.with_name(path.name + ".sum").write_text(
        json.dumps({"name": "another", "bytes": 1, "crc32": zlib.crc32(b"x")}))),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["images", "tokens", "split"])
def test_damage_in_the_cache_is_repaired(shop, kind, damage):
    table = (shop / "interactions.csv").read_text().splitlines()
    (shop / "interactions.csv").write_text("\n".join(line.rpartition(",")[0] for line in table))
    clip = load_clip()

    def everything():
        data = load_data("shop")
        return {"images": np.array(image_map(data, 32)[0]), "seen": image_map(data, 32)[1],
                "tokens": np.array(token_map(clip, data.texts)), "split": data.inter.split}

    before = everything()
    path, = cache_dir().glob(f"{kind}-*.npy")
    content = path.read_bytes()
    DAMAGE[damage](path)
    ptmrec.files._checked.clear()  # as a new process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = everything()
    assert all(np.array_equal(before[k], after[k]) for k in before)
    assert [str(w.message) for w in caught] == [f"{path} is damaged, and is made anew."] * (damage != "deleted")
    assert path.read_bytes() == content and is_whole(path)


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty", "garbled", "deleted"])
@pytest.mark.parametrize("what", ["features", "a block of a killed process"])
def test_damaged_features_are_made_anew(shop, monkeypatch, damage, what):
    import ptmrec.clip_prompting as cp

    data, clip = load_data("shop"), load_clip()
    monkeypatch.setattr(cp, "ENCODE_BATCH", 10)
    if what == "features":
        before = {m: f.clone() for m, f in frozen_features(data, clip).items()}
        path, = cache_dir().glob("features-*.safetensors")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(cp.shutil, "rmtree", lambda *args, **more: None)
            before = {m: f.clone() for m, f in frozen_features(data, clip).items()}
        path = next(cache_dir().glob("*.blocks/*.safetensors"))
        next(cache_dir().glob("features-*.safetensors")).unlink()
    DAMAGE[damage](path)
    ptmrec.files._checked.clear()  # as a new process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = frozen_features(data, clip)
    assert all(torch.equal(before[m], after[m]) for m in before)
    assert len(caught) == (damage != "deleted") and not list(cache_dir().glob("*.blocks"))


def test_a_bit_that_flips_between_processes_is_noticed(shop):
    "The check is made once per process; the next process looks anew, whatever the file's times say."
    path = cached("a.npy", lambda p: np.save(p, np.zeros(1000)))
    times = path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    ptmrec.files._checked.clear()
    assert not is_whole(path)


KILLED = """
import os, sys, time
import ptmrec.data as d
load, seen = d.load_image, []
def slow(path, *how):
    seen.append(1)
    if len(seen) == 20:
        print("half", flush=True)
        time.sleep(600)
    return load(path, *how)
d.load_image = slow
d.image_map(d.load_data("shop"), int(sys.argv[1]))
"""


def test_what_a_killed_process_left_is_swept(shop):
    process = python(KILLED, 32)
    assert process.stdout.readline() == "half\n"
    left, = cache_dir().glob(".tmp*")
    assert sweep(cache_dir()) == [] and left.is_dir()  # its owner is alive
    process.kill()
    process.wait()
    (cache_dir() / ".123-images-0-pixels.npy").write_bytes(b"of an older version")
    os.utime(cache_dir() / ".123-images-0-pixels.npy", (1, 1))
    ptmrec.files._sweep_once.cache_clear()
    assert image_map(load_data("shop"), 32)[1].sum() == 36
    assert not [p for p in cache_dir().iterdir() if p.name.startswith(".")]


DIES = """
import os, shutil, signal, sys
from pathlib import Path
import ptmrec.files as f
moment, die = sys.argv[2], lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the lock":
    f.FileLock = die
elif moment == "while it is deleted, the lock first":
    f.shutil.rmtree = lambda path, **more: ((path / "owner").unlink(), die())
elif moment == "while it is deleted, the lock last":
    f.shutil.rmtree = lambda path, **more: ([p.unlink() for p in path.iterdir() if p.name != "owner"], die())
elif moment == "before the new name":
    Path.replace = die
f.write_atomically(sys.argv[1], lambda path: path.write_text("x"))
"""


@pytest.mark.parametrize("moment", ["before the lock", "while it is deleted, the lock first",
                                    "while it is deleted, the lock last", "before the new name"])
def test_whatever_the_moment_of_a_kill_the_next_process_sweeps(tmp_path, moment):
    assert python(DIES, tmp_path / "file", moment).wait(300) == -signal.SIGKILL
    left, = tmp_path.glob(".tmp*")
    assert sweep(tmp_path) == [left.name] and not list(tmp_path.glob(".*"))
    assert (tmp_path / "file").exists() == ("deleted" in moment)


def test_a_folder_between_its_making_and_its_lock_is_not_swept(tmp_path):
    "Its lock is free, but its process lives; after a minute the number is another process's."
    mine = tmp_path / f".tmp-{ptmrec.files._host()}-{os.getpid()}-0"
    mine.mkdir()
    (mine / "owner").touch()
    assert sweep(tmp_path) == []
    os.utime(mine, (time.time() - 100,) * 2)
    assert sweep(tmp_path) == [mine.name]


def test_what_is_a_colleagues_is_left_alone(tmp_path, monkeypatch):
    "In a folder that several people write to, the leftovers of others cannot be deleted."
    left = tmp_path / ".tmp-elsewhere-1-abc"
    left.mkdir()
    os.utime(left, (1, 1))

    def denied(path, **more):
        raise PermissionError(13, "not yours", str(path))

    monkeypatch.setattr("ptmrec.files.shutil.rmtree", denied)
    assert sweep(tmp_path) == [] and left.is_dir()
    monkeypatch.undo()
    assert sweep(tmp_path) == [left.name]


def test_hidden_folders_of_ones_own_are_left_alone(tmp_path):
    "In the folder of a data set, however old they are."
    mine = [".tmpnotes", ".tmp.driveupload", ".tmp-old", ".2024-backup", ".2024-interactions.csv", ".tmp"]
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
        os.utime(tmp_path / name, (1, 1))
    assert sweep(tmp_path) == [] and sorted(os.listdir(tmp_path)) == sorted(mine)


def test_names_of_half_made_files_differ_where_process_numbers_do_not(tmp_path):
    "As of two containers on one volume."
    names = set()
    for _ in range(3):
        write_atomically(tmp_path / "a", lambda path: (names.add(path.parent.name), path.touch()))
    assert len(names) == 3 and all(f"-{os.getpid()}-" in name for name in names)


def test_files_have_the_mode_of_other_files(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    path = write_atomically(tmp_path / "w.safetensors", lambda p: save_file({"a": torch.ones(1)}, p))
    (tmp_path / "other").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda n: (done.append(os.readlink(f"/proc/self/fd/{n}")), fsync(n)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("renamed"), replace(self, to)))
    write_atomically(tmp_path / "a", lambda path: path.write_text("x"))
    assert [Path(d).name for d in done] == ["a", "renamed", tmp_path.name]


def test_files_are_open_for_writing_when_they_go_to_the_disk(tmp_path, monkeypatch):
    "Windows refuses it otherwise, and cannot open folders."
    fcntl, done = pytest.importorskip("fcntl"), []

    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "read-only")
        done.append(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "a", lambda path: path.write_text("x"))
    assert (tmp_path / "a").read_text() == "x" and len(done) == 1


# disks

@pytest.fixture
def disk(tmp_path):
    "A disk of 1 MB; call it with options to mount it again."
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")

    def remount(options=""):
        if options:
            subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
        return folder

    yield remount
    subprocess.run(["umount", "-l", folder], check=True)


FULL = r"cannot be written: No space left on device \([\d.]+ MB free there\)\. Make room, or move"


@pytest.mark.parametrize("what", ["images", "tokens", "features", "prefix"])
def test_a_full_disk_is_one_sentence_and_room_makes_it_go_on(shop, disk, monkeypatch, what):
    data, clip = load_data("shop"), load_clip()
    monkeypatch.setenv("PTMREC_DATA", str(disk()))
    if what == "features":
        image_map(data, clip.image_size), token_map(clip, data.texts)
        used = sum(p.stat().st_blocks for p in cache_dir().iterdir()) // 2
        disk(f"size={used + 12}k")
    make = {"images": lambda: image_map(data, 128)[0], "tokens": lambda: token_map(clip, data.texts * 1000),
            "features": lambda: frozen_features(data, clip)["text"].numpy(),
            "prefix": lambda: ItemStore(1000, 50)(torch.arange(3), None, lambda i: torch.ones(3, 50, 64)).numpy()}
    make = make[what]
    with pytest.raises(DataError, match=FULL):
        make()
    assert not list(disk().rglob(".tmp*"))
    disk("size=200m")
    assert make().any()


def test_a_full_disk_in_a_process_is_no_bus_error(shop, disk):
    code = ("import os, sys; from ptmrec.data import DataError, image_map, load_data\n"
            "data = load_data('shop'); os.environ['PTMREC_DATA'] = sys.argv[1]\n"
            "try: image_map(data, 300)\nexcept DataError as e: print(e)")
    process = python(code, disk())
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "No space left on device" in out, errors


@pytest.mark.parametrize("experiment", ["stage1", "stage2"])
def test_a_run_on_a_full_disk_goes_on_with_room(shop, disk, tmp_path, monkeypatch, experiment):
    from small import SHORT

    from ptmrec.stage1 import run_stage1
    from ptmrec.stage2 import run_stage2

    run, settings = ((run_stage1, {"epochs": 3, "n_seeds": 1}) if experiment == "stage1" else (run_stage2, SHORT))
    whole, = run("shop", **settings)
    monkeypatch.setenv("PTMREC_RUNS", str(disk()))
    for size in ("20k", "60k", "100k", "200k", "500k"):
        disk(f"size={size}")
        try:
            run("shop", **settings)
        except DataError as error:
            assert "cannot be written" in str(error) or "No space left" in str(error)
        assert not list(disk().rglob(".tmp*"))
    disk("size=200m")
    again, = run("shop", **settings)
    assert again.metrics() == whole.metrics()


def test_a_data_folder_that_cannot_be_written(shop, disk, tmp_path, monkeypatch, capsys):
    make_shop(disk("size=20m") / "shop")
    disk("ro")
    monkeypatch.setenv("PTMREC_DATA", str(disk()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    ptmrec.files._say_once.cache_clear()
    for _ in range(2):
        assert image_map(load_data("shop"), 32)[1].sum() == 36
    said = capsys.readouterr().out
    assert said.count("cannot be written, so what is computed from it is kept in") == 1 and str(tmp_path / "own") in said
    assert list((tmp_path / "own" / "ptmrec").glob("images-*.npy"))


def test_a_data_folder_that_cannot_be_written_may_bring_its_cache(shop, disk, tmp_path, monkeypatch):
    make_shop(disk("size=20m") / "shop")
    monkeypatch.setenv("PTMREC_DATA", str(disk()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    image_map(load_data("shop"), 32)
    disk("ro")
    monkeypatch.setattr("ptmrec.data._decode_images", lambda *args: pytest.fail("it is decoded again"))
    assert image_map(load_data("shop"), 32)[1].sum() == 36 and not (tmp_path / "own").exists()


def test_limits_of_the_size_of_files_are_a_sentence_as_well(tmp_path):
    code = """
import resource, sys, torch, numpy as np, pandas as pd
from safetensors.torch import save_file
from ptmrec.files import DataError, new_array, write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
x = torch.rand(100_000)
table = pd.DataFrame({"x": x})
for write in (lambda p: torch.save(x, p), lambda p: save_file({"x": x}, p), lambda p: np.save(p, x), table.to_parquet,
              table.to_csv, lambda p: new_array(p, np.float32, (100_000,))):
    try:
        write_atomically(sys.argv[1] + "/file", write)
    except DataError as e:
        print(e)
"""
    process = python(code, tmp_path)
    out, errors = process.communicate(timeout=300)
    said = ["File too large" in line or "No space left" in line for line in out.splitlines()]
    assert process.returncode == 0 and said == [True] * 6 and not os.listdir(tmp_path), errors + out


def test_the_cache_is_listed_and_emptied(shop):
    image_map(load_data("shop"), 32)
    for n in range(3):
        cached(f"x-{n}.npy", lambda p: np.save(p, np.zeros(500_000)))
        time.sleep(0.01)
    cached("x-0.npy", None)  # used again
    assert list_cache().file[0] == "x-0.npy" and list_cache().MB.sum() > 12
    process = python("from ptmrec.files import main; main()")
    assert "x-2.npy" in process.communicate(timeout=300)[0]
    empty_cache(keep=0.009)
    assert set(list_cache().file) == {"x-0.npy", "x-2.npy"}
    command = [sys.executable, "-m", "ptmrec.files", "--keep", "0"]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    assert "Deleted 2 files, 8.0 MB." in out and "The cache is empty." in out and not list(cache_dir().iterdir())


def test_emptying_the_cache_leaves_what_a_process_is_writing(shop):
    "At the top and in a folder of blocks; what a killed process left there goes, and so does what is whole."
    process = python(KILLED, 32)
    assert process.stdout.readline() == "half\n"
    cached("whole.npy", lambda path: np.save(path, np.zeros(9)))
    blocks = cache_dir() / "features.blocks"
    (left := blocks / f".tmp-{ptmrec.files._host()}-99999999-ab").mkdir(parents=True)
    (left / "0.safetensors").touch()
    writing, = cache_dir().glob(".tmp*")
    half_made = sorted(writing.iterdir())
    assert list_cache().file.tolist() == ["whole.npy"] and len(half_made) > 1
    assert empty_cache().file.tolist() == ["whole.npy"] and not left.exists() and sorted(writing.iterdir()) == half_made
    process.kill()
    process.wait()
    assert empty_cache().empty and not writing.exists()


# two at once

AT_ONCE = """
import sys, time
import numpy as np
import ptmrec.data as d
from ptmrec.clip_prompting import ItemEncoder, frozen_features, load_clip
made, load, forward = [], d.load_image, ItemEncoder.forward
print("ready", flush=True)
sys.stdin.readline()
d.load_image = lambda *args: (made.append("pictures"), time.sleep(0.02), load(*args))[2]
ItemEncoder.forward = lambda self, items: (made.append("features"), forward(self, items))[1]
clip = load_clip()
features = frozen_features(d.load_data("shop"), clip)
print(made.count("pictures"), made.count("features"), d.fingerprint(*[f.numpy() for f in features.values()]))
"""


def test_processes_that_want_the_same_make_it_once(shop):
    processes = [python(AT_ONCE, stdin=subprocess.PIPE) for _ in range(4)]
    assert [p.stdout.readline() for p in processes] == ["ready\n"] * 4  # they have loaded torch; now all at once
    for p in processes:
        p.stdin.write("\n"), p.stdin.flush()
    outs = [p.communicate(timeout=300) for p in processes]
    assert all(p.returncode == 0 for p in processes), outs
    results = [out.split("\n")[-2].split() for out, _ in outs]
    assert sorted(int(r[0]) for r in results) == [0, 0, 0, 36] and sorted(int(r[1]) for r in results) == [0, 0, 0, 1]
    assert len({r[2] for r in results}) == 1
    assert sum("Another process is at it (features of 'shop')" in out for out, _ in outs) >= 1
    assert not list(cache_dir().glob("*.lock"))


def test_a_lock_is_free_when_its_holder_is_killed(shop):
    holder = python(KILLED, load_clip().image_size)
    assert holder.stdout.readline() == "half\n"
    waiting = python(AT_ONCE, stdin=subprocess.DEVNULL)
    assert waiting.stdout.readline() == "ready\n"
    assert "Another process is at it" in waiting.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    out, errors = waiting.communicate(timeout=300)
    assert waiting.returncode == 0 and out.split()[0] == "36", errors


def test_a_file_system_without_locks_works_with_a_warning(tmp_path, monkeypatch):
    def no_locks(*args, **more):
        raise OSError(95, "no locks")

    monkeypatch.setattr("ptmrec.files.FileLock.acquire", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .no locks.; do not start two"), locked(tmp_path / "x"):
        pass
    assert write_atomically(tmp_path / "a", lambda path: path.write_text("x")).read_text() == "x"


# weights

def other_names(weights):
    return {f"vision_model.{name}": w for name, w in weights.items()}


def with_nan(weights):
    return weights | {"visual.proj": weights["visual.proj"] * torch.nan}


WEIGHTS = {
    "page": (lambda path, w: path.write_text("<!DOCTYPE html><HTML><body>Sign in</body>"), "it is a web page"),
    "empty": (lambda path, w: path.touch(), "damaged, cut"),
    "garbled": (lambda path, w: path.write_bytes(random.Random(0).randbytes(10_000)), "damaged, cut"),
    "cut": (lambda path, w: (torch.save(w, path), os.truncate(path, 100_000)), "damaged, cut"),
    "TorchScript": (lambda path, w: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), "a TorchScript archive"),
    "list": (lambda path, w: torch.save(list(w.values()), path), "it holds a list"),
    "nothing": (lambda path, w: torch.save({}, path), "it holds a dict, not weights"),
    "epoch": (lambda path, w: torch.save({"epoch": 3, "state_dict": None}, path), "it holds a NoneType"),
    "code": (lambda path, w: torch.save({"a": load_clip}, path), "damaged, cut, or holds more than tensors"),
    "another size": (lambda path, w: torch.save(w | {"visual.proj": w["visual.proj"][:, :3]}, path),
                     r"another architecture: visual.proj is \(\d+, 3\), not"),
    "another library": (lambda path, w: torch.save(other_names(w), path), r"or library: .* is missing \(\d+ missing, \d+"),
    "not a number": (lambda path, w: torch.save(with_nan(w), path), "visual.proj has values that are not finite numbers"),
    "zero": (lambda path, w: torch.save({n: 0 * x for n, x in w.items()}, path), "all its weights are zero"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_none_say_what_they_are(tmp_path, kind):
    make, said = WEIGHTS[kind]
    path = tmp_path / "weights.pt"
    make(path, load_clip().model.state_dict())
    with pytest.raises(DataError, match=rf"weights.pt.*{said}") as caught:
        load_clip("tiny", str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_cut_safetensors_say_so(tmp_path):
    from ptmrec.clip_prompting import SAMPLE

    content = (SAMPLE / "tiny.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:-100])
    with pytest.raises(DataError, match="w.safetensors cannot be used for tiny: it is damaged, cut"):
        load_clip("tiny", str(tmp_path / "w.safetensors"))


def test_each_fault_in_the_lesson_has_its_test():
    import nbformat

    cells = nbformat.read(ROOT / "nbs" / "00i_files.ipynb", 4).cells
    table, = (c.source for c in cells if "| fault |" in c.source)
    named = re.findall(r"`(test_\w+(?:\.py)?)` \|$", table, re.M)
    rows = [line for line in table.splitlines() if line.startswith("|") and not line.startswith(("| fault |", "|---"))]
    assert len(named) == len(rows) > 50
    everything = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for name in named:
        assert (ROOT / "tests" / name).exists() if name.endswith(".py") else f"def {name}(" in everything, name


RUN = """
import sys, time
import ptmrec.stage1 as stage1
import ptmrec.{stage} as module
from ptmrec.search import search
trained, train = [], stage1.train_backbone
def slow(*args, **more):
    trained.append(1)
    print("training", flush=True)
    time.sleep(1)
    return train(*args, **more)
stage1.train_backbone = slow
{call}
print(len(trained), [run.metrics() for run in found])
"""
CALLS = {
    "stage1": "found = stage1.run_stage1('shop', epochs=3, n_seeds=2)",
    "stage2": "from small import SHORT; found = module.run_stage2('shop', **SHORT)",
    "search": "table, found = search('vbpr', 'shop', {'lr': [1e-2, 1e-3]}, epochs=3, patience=3)",
}


@pytest.mark.parametrize("what", ["stage2", *(pytest.param(what, marks=pytest.mark.slow) for what in ("stage1", "search"))])
def test_two_that_want_the_same_run_train_it_once(shop, tmp_path, monkeypatch, what):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})" + RUN.format(
        stage="stage2" if what == "stage2" else "stage1", call=CALLS[what])
    alone = python(code)
    expected, trained = results_of(alone)
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "both"))
    both = [python(code) for _ in range(2)]
    found = [results_of(process) for process in both]
    assert [metrics for metrics, _ in found] == [expected] * 2
    assert sum(n for _, n in found) == trained
    assert not list((tmp_path / "both").rglob("*.lock")) and not list((tmp_path / "both").rglob(".tmp*"))


def results_of(process):
    "The metrics that a process of `RUN` prints, and how often it has trained."
    out, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    n, _, metrics = out.splitlines()[-1].partition(" ")
    return metrics, int(n)
