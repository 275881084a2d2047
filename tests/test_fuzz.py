"""Odd settings and odd bytes in the files of a run, drawn by hypothesis: they work or raise a documented error."""
import math
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import SHORT, make_shop

from ptmrec.data import DataError
from ptmrec.runs import compare, heal, list_runs, new_run, open_run
from ptmrec.settings import resolve
from ptmrec.stage2 import run_stage2
from ptmrec.training import read_snapshot, take_snapshot, write_snapshot

COMMON = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
NAMES = sorted(run_stage2.experiment.defaults())
NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(0, 40), st.floats(0, 1), st.sampled_from([10**23, 10**400]))
KNOWN = ["prompt+lora", "vbpr", "smore", "auto", "joint", "cuda:0", "\0", "~x/", "."]
TEXTS = st.text(max_size=20) | st.sampled_from(KNOWN)
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.binary(max_size=8), st.complex_numbers()),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2), max_leaves=4)


def check_settings_of(values):
    "Settings that are drawn are resolved, all of them to numbers, or refused in one sentence."
    try:
        resolved = resolve(run_stage2.experiment, values)
    except DataError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert not [v for v in vars(resolved).values() if isinstance(v, float) and not math.isfinite(v)]


SETTINGS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5) | st.dictionaries(TEXTS, VALUES, max_size=2)


@settings(max_examples=140, **COMMON)
@given(SETTINGS)
def test_settings(values):
    check_settings_of(values)


@pytest.mark.slow
@settings(max_examples=10_000, **COMMON)
@given(SETTINGS)
def test_many_settings(values):
    check_settings_of(values)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with a data set and finished runs of both stages."
    folder = tmp_path_factory.mktemp("made")
    make_shop(folder / "shop")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("PTMREC_DATA", str(folder)), patch.setenv("PTMREC_RUNS", str(folder / "runs"))
        run_stage2("shop", backbone="vbpr", **SHORT)
        shutil.copytree(folder / "runs", folder / "whole")
        yield folder


A_RUN = b'{"experiment": "a", "dataset": "b", "parameters": {}, "data": "c", "code": {}}'
BYTES = st.binary(max_size=200) | st.sampled_from([b"", b"{}", b"[]", b"null", b"PAR1", b"1", b"[" * 5000, A_RUN])
FILES = ["run.json", "metrics.json", "history.csv", "per_user.parquet", "topk.parquet", "embeddings.safetensors",
         "backbone.safetensors", "tuning.safetensors", "features.safetensors", "embeddings_fresh.safetensors"]


@st.composite
def damages(draw):
    "Which stage's run, which of its files, and what becomes of its content."
    how = draw(st.sampled_from(["replaced", "cut", "flipped", "inserted"]))
    share, new = draw(st.floats(0, 0.999)), draw(BYTES)
    name, stage = draw(st.sampled_from(FILES)), draw(st.sampled_from(["stage1", "stage2"]))

    def change(content):
        at = int(share * len(content))
        flipped = bytes([content[at] ^ 255]) if content else b""
        return {"replaced": new, "cut": content[:at], "flipped": content[:at] + flipped + content[at + 1 :],
                "inserted": content[:at] + new + content[at:]}[how]
    return stage, name, change


def check_run_folder(folder, damage):
    "A damaged run can be opened or is refused; nothing else is raised; and it is noticed before it is used again."
    stage, name, change = damage
    path = next((folder / "whole" / stage).rglob("run.json")).with_name(name)
    if not path.exists():
        return
    damaged = folder / "runs" / path.relative_to(folder / "whole")
    before = path.read_bytes()
    damaged.write_bytes(after := change(before))
    uses = [lambda run: run.metrics(), repr, lambda run: run._repr_html_(), lambda run: run.recommend(k=3),
            lambda run: run.item_features(), lambda run: run.load_table("history.csv"), lambda run: compare(run, run)]
    try:
        for use in uses:
            try:
                use(open_run(damaged.parent))
            except DataError as error:
                assert str(error) and "\n" not in str(error)
        assert len(list_runs()) == 2
        about = open_run(path.parent).about
        same = new_run(about["experiment"], about["dataset"], about["parameters"], about["data"], about["encoder"],
                       about["code"])
        assert same.folder == damaged.parent and heal(same).finished == (after == before)
    finally:
        shutil.rmtree(damaged.parent)
        shutil.copytree(path.parent, damaged.parent)


@settings(max_examples=60, **COMMON)
@given(damage=damages())
def test_run_folders(made, damage):
    check_run_folder(made, damage)


def test_a_run_that_does_not_say_what_it_was_made_from(made):
    check_run_folder(made, ("stage1", "run.json", lambda content: A_RUN))


@pytest.mark.slow
@settings(max_examples=3_000, **COMMON)
@given(damage=damages())
def test_many_run_folders(made, damage):
    check_run_folder(made, damage)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A checkpoint file, and its content."
    import torch

    from ptmrec.training import Loop

    model = torch.nn.Linear(3, 1)
    path = Path(tmp_path_factory.mktemp("checkpoint"), "checkpoint.pt")
    write_snapshot(path, take_snapshot(Loop(model, torch.optim.Adam(model.parameters()), None, None)))
    return path, path.read_bytes()


@settings(max_examples=60, **COMMON)
@given(damage=damages())
def test_checkpoints(checkpoint, damage):
    path, content = checkpoint
    path.write_bytes(damage[2](content))
    try:
        saved = read_snapshot(path)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        path.write_bytes(content)
        assert repr(saved) == repr(read_snapshot(path))  # a changed byte that no content depends on
