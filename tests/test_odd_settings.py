"""Every setting, set to what nobody should set it to: one sentence, at once, that names it and says what is allowed."""
import math
import os
import signal
import subprocess
import sys
import time
import typing

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from small import SHORT, make_shop

from ptmrec.backbones import BACKBONES, BPRMF, Backbone
from ptmrec.clip_prompting import find_weights
from ptmrec.data import DataError
from ptmrec.peft import TUNINGS
from ptmrec.runs import command_line, option_parser
from ptmrec.search import search
from ptmrec.settings import LIMIT_NAMES, SettingError, Settings, resolve, setting, shown
from ptmrec.stage1 import check_tables, load_inputs, run_stage1
from ptmrec.stage2 import Stage2Settings, run_stage2

ODD = [math.nan, math.inf, -math.inf, "false", "no", "", b"1", [1], (1, 2), {"a": 1}, np.arange(3), np.array([[0.5]]),
       torch.ones(2), pd.Series([1, 2]), 10**23, 10**5000, 1j, object(), int, print]


def all_fields():
    "{name: (field, what has to be chosen so that it is used)} of all settings."
    found = {name: (field, {}) for name, field in Stage2Settings.model_fields.items()}
    for chooser, registry in (("backbone", BACKBONES), ("tuning", TUNINGS)):
        for name, owners in registry.settings().items():
            usable = [owner for owner in owners if owner in TUNINGS or BACKBONES[owner].uses_features]
            found[name] = owners[usable[0]], {chooser: usable[0]}
    return found


def numbers_beyond(field):
    "Numbers just outside the limits of a field."
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    limits = [(kind, getattr(m, kind)) for part in kinds for f in getattr(part, "__metadata__", ())
              for m in f.metadata for kind in LIMIT_NAMES if hasattr(m, kind)]
    limits += [(kind, getattr(m, kind)) for m in field.metadata for kind in LIMIT_NAMES if hasattr(m, kind)]
    step = 1 if int in kinds else 1e-9
    return [{"gt": x, "lt": x, "ge": x - step, "le": x + step * max(1, abs(x))}[kind] for kind, x in limits]


FIELDS = all_fields()


def odd_values(name):
    "What the setting `name` has to refuse."
    field = FIELDS[name][0]
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    if bool in kinds:
        return [*ODD, 1, 0, 2.5, None]
    if str in kinds:
        texts = ["nonsense", "a+b"] if field.json_schema_extra["choices"] else []
        huge = [] if name == "dataset" else [10**23, 10**5000, 3]  # a whole number may be a data set's name
        return [v for v in ODD if not isinstance(v, int) and not (isinstance(v, str) and v)] + [True, 2.5, *texts, *huge]
    return [*ODD, True, *numbers_beyond(field)] + [2.5] * (float not in kinds)


def refused(call, *args, **given):
    "The sentence that a call is refused with."
    with pytest.raises(SettingError) as error:
        call(*args, **given)
    said = str(error.value)
    assert "\n" not in said and "\r" not in said and len(said) < 1500 and said.endswith("."), said
    return said


@pytest.fixture(autouse=True)
def nothing_is_loaded(request, monkeypatch):
    if "small" not in request.fixturenames:
        for module in ("stage1", "stage2", "search"):
            monkeypatch.setattr(f"ptmrec.{module}.load_inputs", lambda settings: pytest.fail("something was loaded"))


@pytest.mark.parametrize("name", FIELDS)
def test_an_odd_value_of_any_setting_is_one_sentence(runs, name):
    for value in odd_values(name):
        said = refused(run_stage2, **FIELDS[name][1] | {name: value})
        assert said.startswith(f"{name}={shown(value)} "), said
        assert "it must be " in said or "Allowed: " in said or "Name it once" in said, said
    assert not runs.exists()


def test_there_are_many_of_them():
    assert sum(len(odd_values(name)) for name in FIELDS) > 1000 and len(FIELDS) > 50


def test_every_number_has_limits_on_both_sides():
    "Or memory is the limit, and the machine finds out."
    for name, (field, _) in FIELDS.items():
        kinds = typing.get_args(field.annotation) or (field.annotation,)
        if {int, float} & set(kinds) or name == "micro_batch":
            assert len(numbers_beyond(field)) == 2, name


def test_scalars_of_numpy_and_torch_are_numbers():
    given = {"epochs": np.int64(3), "lr": np.float32(0.5), "mask_valid": np.bool_(True), "emb_size": torch.tensor(8),
             "knn_k": np.array(5), "tau": np.float64(0.5)}
    settings = resolve(run_stage2.experiment, given)
    assert (settings.epochs, settings.lr, settings.mask_valid, settings.emb_size, settings.knn_k) == (3, 0.5, True, 8, 5)


NAMES = [("\0", "NUL"), ("~nouser/x", "no user"), ("a" * 300, "too long"), ("/" + "ab/" * 3000, "too long in all"),
         ("\ud800", "a lone surrogate"), ("  ", "blank"), ("no/such/folder", "nowhere"), ("../../no/such/file", "elsewhere")]


@pytest.mark.parametrize("value", [v for v, _ in NAMES], ids=[what for _, what in NAMES])
@pytest.mark.parametrize("name", ["dataset", "pretrained"])
def test_what_cannot_be_a_path(runs, name, value):
    with pytest.raises(DataError) as error:
        run_stage1(dataset=value) if name == "dataset" else find_weights("tiny", value)
    assert "\n" not in str(error.value) and not runs.exists()


@pytest.mark.parametrize("device", ["meta", "hpu", "gpu", "cuda:x", "cuda:-1", "cuda:99999", "cpu ", "CPU", "mps", "cpu\n"])
def test_devices(device):
    assert "must be auto, cpu, cuda" in refused(run_stage2, device=device)


@pytest.mark.parametrize("given, message", [
    ({"tuning": "prompt+prompt"}, "names prompt twice"), ({"tuning": "prompt+"}, "is not known"),
    ({"tuning": "+"}, "is not known"), ({"tuning": "none+lora"}, "cannot be joined"),
    ({"tuning": "lora", "lora_targets": "mlp+mlp"}, "names mlp twice"),
    ({"training": "joint", "kt_weight": 0.5}, "training='joint' sets kt_weight to 0.0 itself, and kt_weight=0.5 was given"),
    ({"training": "joint", "stage2_epochs": 7}, "sets stage2_epochs to 1000 itself"),
    ({"training": "joint", "project_lr": 0.5}, "sets project_lr to"),
    ({"training": "joint", "tau": 0.5}, "does not use tau"),
    ({"training": "joint", "kt_source": "output"}, "does not use kt_source"),
    ({"training": "joint", "similarity": "dot"}, "does not use similarity"),
    ({"tune_backbone": True}, "task_weight=0 leaves that out"),
    ({"train_features": True}, "train_features=True is for Stage 1 alone"),
    ({"candidates": "cold"}, "candidates='cold' ranks the cold items alone, and eval_items='all' counts others. Set both"),
    ({"candidates": "cold", "eval_items": "warm"}, "eval_items='warm' counts others"),
])
def test_settings_that_do_not_go_together(runs, given, message):
    assert message in refused(run_stage2, **given)


def test_joint_training_takes_what_it_decides_itself():
    same = {"kt_weight": 0.0, "task_weight": 1.0, "tune_backbone": True, "lr": 0.005, "project_lr": 0.005}
    resolve(run_stage2.experiment, {"training": "joint"} | same)


def test_arguments_by_place_and_by_name():
    assert "got dataset twice: 'sample' by its place and 'baby' by its name" in refused(run_stage1, "sample", dataset="baby")
    assert "arguments, and got 400 without a name" in refused(run_stage1, *range(400))


TOML = [("[freedm]\nknn_k = 3", r"\[freedm\] is not a component. Did you mean freedom"),
        ("[lr]\nvalue = 3", r"\[lr\] is a setting: write lr = "), ('[""]\nlr = 0.1', r"\[\] is not a component"),
        ("lr = [1.0]", r"lr=\[1.0\] is not allowed"), ("lr = 2026-01-01", "lr=datetime.date"), ("lr = nan", "lr=nan"),
        ("n_seeds = true", "n_seeds=True"), ("epochs = 3", "epochs cannot have a default there"),
        ("lr = 0.1\nlr = 0.2", "TOML"), ("a = " + "[" * 2000, "TOML"), ("\0", "TOML"), ("lr = " + "9" * 5000, "TOML|lr="),
        ("[prompt]\nn_ctx = -1", "n_ctx=-1"),
        ("[[freedom]]\nknn_k = 3", "freedom cannot have a default there"), ("lr", "TOML")]


@pytest.mark.parametrize("text, message", TOML, ids=[message for _, message in TOML])
def test_defaults_of_a_data_set(small, text, message):
    (small / "defaults.toml").write_text(text)
    with pytest.raises(SettingError, match=message) as error:
        run_stage1(small)
    assert "\n" not in str(error.value) and "defaults.toml" in str(error.value)


def test_defaults_that_cannot_be_read(small):
    (small / "defaults.toml").write_bytes(b"\xff\xfe")
    assert "defaults.toml cannot be read as TOML" in refused(run_stage1, small)
    (small / "defaults.toml").unlink()
    (small / "defaults.toml").mkdir()
    assert "defaults.toml cannot be read as TOML" in refused(run_stage1, small)


def test_tables_of_other_stages_are_known(small):
    (small / "defaults.toml").write_text("[prompt]\nn_ctx = 3\n[vbpr]\nreg_weight = 0.5\n")
    assert resolve(run_stage1.experiment, {"dataset": small, "backbone": "vbpr"}).reg_weight == 0.5
    assert resolve(run_stage2.experiment, {"dataset": small, "backbone": "vbpr"}).n_ctx == 3


def own(**fields):
    types = {name: type(field.default if hasattr(field, "default") else field) for name, field in fields.items()}
    return type("Mine", (Backbone,), {"__doc__": "Mine.", "Settings": type("Settings", (Settings,), {
        "__annotations__": types, **fields})})


@pytest.mark.parametrize("name, cls, message", [
    ("a+b", own(), "cannot be called 'a\\+b'"), ("", own(), "cannot be called ''"), (None, own(), "cannot be called None"),
    ("a b", own(), "letters, digits"), ("mine", type("Mine", (), {}), "has no settings. Give it a class Settings"),
    ("mine", type("Mine", (), {"Settings": dict}), "has no settings"),
    ("mine", own(width=3), "width is a plain field. Write width: <type> = setting"),
    ("mine", own(components=setting(3, "some")), "a setting cannot be called components"),
    ("mine", own(key_parameters=setting(3, "some")), "cannot be called key_parameters"),
    ("mine", own(width=setting(0, "millimetres", ge=1)), "width=0 is not allowed: it must be a whole number at least 1"),
    ("mine", own(dataset=setting("a", "something else")), "both claim the setting dataset")])
def test_components_that_cannot_become_arguments(name, cls, message):
    with pytest.raises(SettingError, match=message):
        BACKBONES.register(name)(cls)
    assert name not in BACKBONES


@pytest.mark.parametrize("given, message", [
    ({"rerun": True}, "A search has no rerun"), ({"rerun": False}, "A search has no rerun"),
    ({"grid": {"lr": [0.1, 0.2, 0.1]}}, "The grid has lr=0.1 twice"), ({"grid": {"patience": [1, 1]}}, "patience=1 twice"),
    ({"grid": {"lr": [np.arange(2)]}}, r"lr=array\(\[0, 1\]\) is not allowed"),
    ({"grid": [1]}, r"grid=\[1\] is not allowed"),
    ({"grid": {"lr": 0.1}}, "needs a list of values for lr"), ({"grid": {"emb_size": [10**9]}}, "emb_size=1000000000"),
    ({"grid": {"lr": ["fast"]}}, "lr='fast' is not allowed"),
    ({"n_trials": True}, "n_trials=True"), ({"n_trials": 0}, "n_trials=0"),
    ({"processes": None}, "processes=None"), ({"processes": 1.5}, "processes=1.5"), ({"n_seeds": "all"}, "n_seeds='all'")])
def test_odd_searches(runs, given, message):
    with pytest.raises(SettingError, match=message):
        search(**{"backbone": "bpr", "dataset": "sample"} | given)
    assert not runs.exists()


@pytest.mark.parametrize("text, message", [
    ("--epochs 3 --epochs 4", "--epochs is given twice, as 3 and 4."), ("--epochs", "expected one argument"),
    ("--epoch 3", "has no parameter epoch. Did you mean epochs"), ("3", "'3' is not an option"), ("--lr nan", "lr=nan"),
    ("--lr=-1", "lr=-1 is not allowed"), ("--mask_valid false", "mask_valid='false'"),
    ("--n_ctx " + "9" * 5000, "n_ctx=inf")])
def test_odd_options_of_the_program(capsys, text, message):
    with pytest.raises(SystemExit) as end:
        command_line(run_stage2, text.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.count("\n") == 1, said


def test_the_name_of_a_data_set_is_text():
    given = vars(option_parser(run_stage1).parse_args(["--dataset", "007", "--epochs", "07", "--core", "None"]))
    assert given == {"dataset": "007", "epochs": 7, "core": None}


def test_a_training_that_diverges_ends_the_program_with_one_sentence(small, capsys, monkeypatch):
    loss = BPRMF.loss
    monkeypatch.setattr(BPRMF, "loss", lambda *args: {k: v * math.inf for k, v in loss(*args).items()})
    with pytest.raises(SystemExit) as end:
        command_line(run_stage1, ["--dataset", str(small), "--backbone", "bpr", "--epochs", "3"])
    assert end.value.code == "Stage 1, seed 0, epoch 1, batch 1 of 1: the loss bpr is inf. Lower lr."  # exit status 1
    assert sys.exc_info() == (None, None, None)


@pytest.fixture
def small(tmp_path, monkeypatch, runs):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    make_shop(tmp_path / "shop")
    return tmp_path / "shop"


AFTER_LOADING = [
    ({"backbone": "freedom", "knn_k": 38}, "knn_k=38 neighbours need as many items, and 'shop' has 37. Set knn_k to at"),
    ({"backbone": "smore"}, "knn_k_image=40 neighbours"), ({"n_ctx": 500}, "n_ctx=500: a text has .* tokens in tiny"),
    ({"prompt_depth": 50}, "prompt_depth=50: the image tower of .* layers"),
    ({"tuning": "adapter", "last_layers": 50}, "last_layers=50: the image tower of .* layers. Set last_layers to 1 ..."),
    ({"tuning": "lora", "lora_rank": 1000}, "lora_rank=1000 is larger than a weight"),
    ({"eval_users": "cold"}, "The valid split has no positive among cold users"),
    ({"clip_model": "ViT-Z"}, "ViT-Z' is not known"),
    ({"pretrained": "nowhere"}, "pretrained='nowhere' is neither"), ({"core": 1000}, "no interactions are left"),
    ({"split": "user_time"}, "time")]


@pytest.mark.parametrize("given, message", AFTER_LOADING, ids=[str(given) for given, _ in AFTER_LOADING])
def test_what_depends_on_data_or_model_is_said_before_anything_is_trained(small, monkeypatch, given, message):
    monkeypatch.setattr("ptmrec.stage1.train_with", lambda *args: pytest.fail("the training has begun"))
    prompts = {k: v for k, v in SHORT.items() if "tuning" not in given or k not in ("n_ctx", "prompt_depth")}
    with pytest.raises(DataError, match=message) as error:
        run_stage2(small, **{"backbone": "vbpr"} | prompts | given)
    assert "\n" not in str(error.value)


def test_embeddings_that_do_not_fit_into_memory(small, monkeypatch):
    monkeypatch.setattr("ptmrec.stage1.free_bytes", lambda device: 1e6)
    monkeypatch.setattr("ptmrec.stage1.train_with", lambda *args: pytest.fail("the training has begun"))
    said = refused(run_stage1, small, backbone="bpr", emb_size=8192)
    assert "emb_size=8192 takes 0.013 GB for 60 users and 37 items" in said
    assert "knn_k=38" in refused(search, "freedom", small, {"knn_k": [5, 38]})


def test_a_user_who_has_every_item_is_named(small):
    table = pd.read_csv(small / "interactions.csv")
    hoarder = pd.DataFrame({"user": 777, "item": range(37), "x_label": 0})
    pd.concat([table, hoarder]).to_csv(small / "interactions.csv", index=False)
    with pytest.raises(DataError, match="User .777. has all 37 items of 'shop' in training that.*Leave this user out"):
        run_stage1(small, backbone="bpr")
    some = pd.concat([table, hoarder])
    some[(some.item >= 6) | (some.x_label > 0)].to_csv(small / "interactions.csv", index=False)
    with pytest.raises(DataError, match="User .777. has all 31 items of 'shop' in training that negatives are drawn from"):
        run_stage1(small, backbone="bpr", negatives="warm")


@pytest.mark.parametrize("table, message", [
    (np.zeros((37, 4)), "same for all 37 items"), (np.full((37, 4), 0.3), "same for all 37 items"),
    (np.zeros((37, 0)), "no columns"), (np.full((37, 4), 1e30), "values up to 1e\\+30")])
def test_features_that_teach_nothing(small, table, message):
    np.save(small / "text_feat.npy", table.astype(np.float32))
    with pytest.raises(DataError, match=f"text features of 'shop'.*{message}") as error:
        run_stage1(small, backbone="vbpr", epochs=1)
    assert "\n" not in str(error.value)


def test_items_whose_features_are_zero_are_counted(small):
    table = np.random.default_rng(0).normal(size=(37, 4)).astype(np.float32)
    table[:5] = 0
    inputs = load_inputs(resolve(run_stage1.experiment, {"dataset": small, "backbone": "bpr"}))
    with pytest.warns(UserWarning, match="are 0 for 5 of 37 items"):
        check_tables(inputs.data, {"text": torch.from_numpy(table)})


def test_a_program_that_is_stopped_while_it_starts_says_one_line(tmp_path):
    "At several moments of its imports; later, the house's own line."
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PTMREC_RUNS": str(tmp_path)}
    for seconds in (0.7, 1.5, 2.5):
        program = subprocess.Popen([sys.executable, "-m", "ptmrec.stage2", "--help"], env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(seconds)
        program.send_signal(signal.SIGTERM)
        _, said = program.communicate(timeout=300)
        assert program.returncode in (143, 0, -15), program.returncode  # -15: before Python ran a line of it
        assert said in ("", "Stopped while starting.\n", "Stopped.\n"), said  # the last: it had started by then


@pytest.mark.parametrize("name", ["\n", "a\nb", "", "x y" * 10_000, "--", "\ud800"], ids=ascii)
def test_odd_names_are_one_sentence(name):
    assert "run_stage2 has no parameter '" in refused(resolve, run_stage2.experiment, {name: 1})


def test_a_batch_of_one_item_has_nothing_to_compare_it_with():
    for how in ({}, {"batch_by": "interactions", "accumulate": 4}):
        assert "so the KL loss is 0" in refused(resolve, run_stage2.experiment, how | {"stage2_batch_size": 1})
    resolve(run_stage2.experiment, {"stage2_batch_size": 1, "task_weight": 1.0})


def test_feature_tables_cannot_learn_where_there_are_none():
    for backbone in ("bpr", "lightgcn"):
        assert f"backbone='{backbone}' has none" in refused(resolve, run_stage1.experiment,
                                                           {"backbone": backbone, "train_features": True})
