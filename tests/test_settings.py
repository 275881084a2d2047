"""Settings are written once: components of one's own take part everywhere, and wrong values are one sentence, at once."""
import json
import os
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from small import SHORT, make_shop

from ptmrec.backbones import BACKBONES, Backbone
from ptmrec.data import MODALITIES, DataError, Modality
from ptmrec.ranking import METRICS, register_metric
from ptmrec.runs import list_runs, open_run
from ptmrec.search import search
from ptmrec.settings import (SettingError, Settings, assigned_names, notebook_parameters, parameters_cell, resolve,
                             setting)
from ptmrec.stage1 import run_stage1
from ptmrec.stage2 import run_stage2

BIN = os.path.dirname(sys.executable)


@pytest.fixture
def small(tmp_path, monkeypatch, runs):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    make_shop(tmp_path / "shop")
    return tmp_path / "shop"


TOY = '''

@BACKBONES.register("toy")
class Toy(Backbone):
    "ID embeddings and one projected modality."

    class Settings(Settings):
        text_scale: float = setting(1.0, "weight of the text", gt=0, grid=[1.0, 2.0])
        n_hops: int = setting(0, "layers of the user-item graph of the toy", ge=0)

    def forward(self, features=None):
        text = self.project["text"]((features or self.features)["text"])
        return self.user_emb, self.item_emb + self.settings.text_scale * text

    def id_path(self, user=None, item=None):
        return self.user_emb, self.item_emb

    def loss(self, user, pos, neg, features=None):
        user_emb, item_emb = self(features)
        return {"bpr": bpr_loss(user_emb[user], item_emb[pos], item_emb[neg])}
'''


SHIFT = '''

@TUNINGS.register("shift")
class Shift(Tuning):
    "Adds a learnt vector to the image features' normalisation."

    combines = False

    class Settings(Settings):
        shift_lr: float = setting(1e-2, "learning rate of the shift", gt=0)
        shift_size: int = setting(3, "channels that are shifted", ge=1, le=3)

    def __init__(self, clip, towers, shift_lr, shift_size):
        super().__init__(shift_lr)
        self.image = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(shift_size))])
        self.hook = clip.model.visual.register_forward_pre_hook(
            lambda module, args: (args[0] + self.image[0][None, :, None, None],))

    def detach(self):
        self.hook.remove()
'''

FIRST = '''

@register_metric("first")
def first_at_k(hits, n_pos, k):
    return hits[:, 0]
'''


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    "A copy of the package with the cells `TOY`, `SHIFT`, `FIRST` in their rooms, and a small data set."
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "ptmrec", folder / "ptmrec", ignore=shutil.ignore_patterns("__pycache__"))
    for name, cell in {"backbones": TOY, "peft": SHIFT, "ranking": FIRST}.items():
        module = folder / "ptmrec" / f"{name}.py"
        module.write_text(module.read_text() + cell)
    make_shop(folder / "shop")
    shutil.copy(ROOT / "settings.ini", folder)
    (folder / "data").symlink_to(ROOT / "data")  # for the tiny CLIP
    return folder


def call(folder, *command):
    env = os.environ | {"PYTHONPATH": str(folder), "PTMREC_RUNS": str(folder / "runs"), "PTMREC_DATA": str(folder),
                        "TQDM_DISABLE": "1"}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def options(**values):
    return [x for name, value in values.items() for x in (f"--{name}", str(value))]


def parameters(**values):
    return [x for name, value in values.items() for x in ("-p", name, str(value))]


def toy_runs(folder, experiment):
    runs = [json.loads(path.read_text())["parameters"] for path in (folder / "runs" / experiment).rglob("run.json")]
    return [p for p in runs if p["backbone"] == "toy"]


def test_a_backbone_of_one_cell_in_python(extended):
    code = ("from ptmrec.stage1 import run_stage1; from ptmrec.search import search; "
            "run_stage1('shop', backbone='toy', text_scale=3.0, epochs=2, n_seeds=1); "
            "print(search('toy', 'shop', epochs=2)[0].text_scale.tolist())")
    assert sorted(json.loads(call(extended, sys.executable, "-c", code).splitlines()[-1])) == [1.0, 2.0]
    assert sorted(p["text_scale"] for p in toy_runs(extended, "stage1")) == [1.0, 2.0, 3.0]


def test_a_backbone_of_one_cell_as_a_program(extended):
    text = call(extended, sys.executable, "-m", "ptmrec.stage2", "--help")
    assert "--text_scale" in text and "weight of the text (toy 1.0)" in " ".join(text.split())
    call(extended, sys.executable, "-m", "ptmrec.stage2",
         *options(dataset="shop", backbone="toy", text_scale=2, **SHORT))
    assert [p["text_scale"] for p in toy_runs(extended, "stage2")] == [2.0]


def test_a_backbone_of_one_cell_through_papermill(extended):
    call(extended, f"{BIN}/papermill", str(ROOT / "nbs" / "04_stage1.ipynb"), str(extended / "out.ipynb"),
         *parameters(dataset="shop", backbone="toy", n_hops=1, epochs=2, n_seeds=1))
    assert 1 in [p["n_hops"] for p in toy_runs(extended, "stage1")]


OWN = {k: v for k, v in SHORT.items() if k not in ("n_ctx", "prompt_depth")} | {
    "dataset": "shop", "backbone": "vbpr", "tuning": "shift", "metric": "first@10"}


def shifted(folder, shift_lr):
    "The run with this rate of the method `shift`, chosen by the metric `first@10`."
    runs = [open_run(path.parent) for path in (folder / "runs" / "stage2").rglob("metrics.json")]
    run, = [run for run in runs if run.params.get("shift_lr") == shift_lr]
    assert run.params["shift_size"] == 3 and run.params["metric"] == "first@10"
    assert "valid first@10" in run.load_table("history.csv") and 0 <= run.metrics()["as_is"]["test"]["first@50"] <= 1
    assert run.load_weights("tuning")["image.0"].abs().max() > 0
    return run


def test_a_tuning_method_and_a_metric_of_one_cell_in_python(extended):
    call(extended, sys.executable, "-c", f"from ptmrec.stage2 import run_stage2; run_stage2(**{OWN!r}, shift_lr=0.1)")
    shifted(extended, 0.1)
    wrong = ("from ptmrec.stage2 import run_stage2\ntry: run_stage2('shop', tuning='shift', shift_lr=0)\n"
             "except ValueError as error: print(error)")
    assert "shift_lr=0 is not allowed: it must be a number above 0" in call(extended, sys.executable, "-c", wrong)


def test_a_tuning_method_and_a_metric_of_one_cell_as_a_program(extended):
    assert "--shift_lr" in call(extended, sys.executable, "-m", "ptmrec.stage2", "--help")
    said = call(extended, sys.executable, "-m", "ptmrec.stage2", *options(**OWN, shift_lr=0.2))
    shifted(extended, 0.2)
    assert "validation first@10" in said


def test_a_tuning_method_and_a_metric_of_one_cell_through_papermill(extended):
    call(extended, f"{BIN}/papermill", str(ROOT / "nbs" / "05_stage2.ipynb"), str(extended / "out5.ipynb"),
         *parameters(**OWN, shift_lr=0.3))
    shifted(extended, 0.3)


def test_a_metric_of_one_cell_stops_and_selects(small):
    @register_metric("first")
    def first_at_k(hits, n_pos, k):
        return hits[:, 0]

    try:
        run, = run_stage1("shop", backbone="bpr", epochs=4, patience=2, n_seeds=1, metric="first@10")
        history = run.load_table("history.csv")
        assert "valid first@10" in history and 0 <= run.metrics()["test"]["first@50"] <= 1
        table, _ = search("bpr", "shop", {"reg_weight": [1e-1, 1e-3]}, epochs=2, metric="first@10")
        assert table["valid first@10"].is_monotonic_decreasing
        assert set(list_runs().metric.dropna()) == {"first@10"}
    finally:
        del METRICS["first"]
    with pytest.raises(SettingError, match="metric='recal@20' is not known. Did you mean recall@20"):
        run_stage1("shop", metric="recal@20")


@pytest.mark.parametrize("backbone", ["vbpr", "freedom", "mgcn", "smore"])
def test_a_third_modality_from_ready_made_features(tmp_path, monkeypatch, runs, backbone):
    make_shop(tmp_path / "shop")
    rng = np.random.default_rng(0)
    for name, size in {"image": 6, "text": 5, "audio": 4}.items():
        np.save(tmp_path / "shop" / f"{name}_feat.npy", rng.normal(size=(37, size)).astype(np.float32))
    knn = {"smore": {"knn_k_image": 5, "knn_k_text": 5}, "vbpr": {}}.get(backbone, {"knn_k": 5})
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "sounds"))
    run, = run_stage1(tmp_path / "shop", backbone=backbone, epochs=2, n_seeds=1, **knn)
    assert run.load_weights("backbone")["project.audio.weight"].shape == (64, 4)


def loudness(files):
    return np.stack([np.frombuffer(file.read_bytes(), np.uint8) / 255 for file in files])


@pytest.fixture
def sounds(small, monkeypatch):
    "The data set with a sound for each item but the last, and the modality registered with `loudness`."
    (small / "audio").mkdir()
    for item in range(36):
        (small / "audio" / f"{item}.raw").write_bytes(np.random.default_rng(item).bytes(8))
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "sounds", (".raw",), loudness))
    return small / "audio"


def test_a_third_modality_from_files_goes_through_both_stages(sounds, capsys):
    tuned, = run_stage2("shop", **SHORT, backbone="freedom", knn_k=5)
    features = tuned.load_weights("features")
    assert features.keys() == {name for m in ("image", "text", "audio") for name in (m, f"projected_{m}")}
    assert np.allclose(features["audio"][:36], loudness([sounds / f"{item}.raw" for item in sorted(range(36))]))
    assert np.allclose(features["audio"][36], features["audio"][:36].mean(0))
    assert {"image", "text", "audio"} == set(open_run(tuned.params["stage1"]).item_features())
    assert {"kt_image", "kt_text", "kt_audio"} < set(tuned.load_table("history.csv"))


def test_files_and_encoder_of_a_modality_are_in_the_keys_of_caches_and_runs(sounds, monkeypatch):
    short = dict(backbone="vbpr", epochs=1, n_seeds=1)
    keys, cached = [], sounds.parent.parent / ".cache"

    def louder(files):
        return 2 * loudness(files)

    for change in (lambda: None, lambda: (sounds / "3.raw").write_bytes(b"12345678"),
                   lambda: monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "sounds", (".raw",), louder))):
        change()
        keys.append((run_stage1("shop", **short)[0].key, len(list(cached.glob("features-audio-*.npy")))))
    assert len({key for key, _ in keys}) == 3 and [n for _, n in keys] == [1, 2, 3]
    monkeypatch.setitem(MODALITIES, "audio", Modality("audio", "sounds", (".raw",), lambda files: loudness(files)[:-1]))
    with pytest.raises(DataError, match="a row for each of the 36 files; it has returned a table of shape \\(35, 8\\)"):
        run_stage1("shop", **short)


def test_a_data_set_called_sample_gets_no_other_defaults(tmp_path, runs, monkeypatch):
    make_shop(tmp_path / "sample")
    monkeypatch.chdir(tmp_path)
    runs = run_stage1(tmp_path / "sample", backbone="bpr", epochs=1)
    assert len(runs) == 1 and (runs[0].params["lr"], runs[0].params["batch_size"]) == (1e-3, 2048)


def test_defaults_of_the_data_set_count_unless_they_are_set(small):
    (small / "defaults.toml").write_text("n_seeds = 2\nlr = 0.01\n[bpr]\nreg_weight = 0.5\n")
    two = run_stage1("shop", backbone="bpr", epochs=1)
    one, = run_stage1("shop", backbone="bpr", epochs=1, n_seeds=1, lr=1e-3, reg_weight=0.25)
    assert [r.params["lr"] for r in two] == [0.01, 0.01] and two[0].params["reg_weight"] == 0.5
    assert (one.params["lr"], one.params["reg_weight"]) == (1e-3, 0.25)
    for wrong, message in {"epochs = 3": "epochs cannot have a default there", "lr = -1": "lr=-1 is not allowed",
                           "[bpr]\nregweight = 1": "no setting regweight. Did you mean reg_weight",
                           "lr = ": "as TOML"}.items():
        (small / "defaults.toml").write_text(wrong)
        with pytest.raises(SettingError, match=f"defaults.toml.*{message}"):
            run_stage1("shop", backbone="bpr", epochs=1)


@pytest.mark.parametrize("owner", ["adapter", "lora"])
def test_a_default_that_parts_of_a_tuning_share_counts_for_all_or_is_refused(small, owner):
    (small / "defaults.toml").write_text(f"[{owner}]\nlast_layers = 1\n")
    how = {"dataset": small, "tuning": "adapter+lora"}
    with pytest.raises(SettingError, match="last_layers is shared by the parts of tuning=.*Set last_layers in"):
        resolve(run_stage2.experiment, how)
    assert resolve(run_stage2.experiment, how | {"last_layers": 2}).components["tuning"]["last_layers"] == 2
    assert resolve(run_stage2.experiment, {"dataset": small, "tuning": owner}).last_layers == 1


WRONG = [
    ({"n_seed": 1}, "has no parameter n_seed. Did you mean n_seeds"),
    ({"tau": 0}, "tau=0 is not allowed: it must be a number at least 0.0001 and at most 10,000"),
    ({"n_seeds": "one"}, "n_seeds='one' is not allowed: it must be a whole number at least 1 and at most 1,000"),
    ({"backbone": "freedm"}, "backbone='freedm' is not known. Did you mean freedom"),
    ({"dataset": "samples"}, "No data set 'samples'.*[Dd]id you mean.*sample"),
    ({"backbone": "vbpr", "knn_k": 5}, "knn_k is a setting of freedom, mgcn, and backbone='vbpr' does not use it"),
    ({"lora_rank": 4}, "lora_rank is a setting of lora, and tuning='prompt' does not use it"),
    ({"batch_size": 0}, "batch_size=0 is not allowed"), ({"tau": float("nan")}, "tau=nan is not allowed"),
    ({"tau": float("inf")}, "tau=inf is not allowed"), ({"tau": -1}, "tau=-1"), ({"kt_weight": -1}, "kt_weight=-1"),
    ({"lr": 0}, "lr=0"), ({"project_lr": -1}, "project_lr=-1"), ({"tuning": "lora", "lora_alpha": 0}, "lora_alpha=0"),
    ({"emb_size": 0}, "emb_size=0"), ({"emb_size": 10**9}, "emb_size=1000000000"), ({"n_layers": -2}, "n_layers=-2"),
    ({"n_item_layers": -1}, "n_item_layers=-1"), ({"image_weight": -5}, "image_weight=-5"),
    ({"edge_dropout": 1.0}, "edge_dropout=1.0"), ({"epochs": 2.5}, "epochs=2.5"),
    ({"patience": float("nan")}, "patience=nan"),
    ({"tuning": "adapter", "last_layers": -1}, "last_layers=-1"), ({"core": -1}, "core=-1"),
    ({"mask_valid": "false"}, "mask_valid='false' is not allowed: it must be True or False"),
    ({"train_features": "no"}, "train_features='no'"), ({"tuning": "lora", "lora_rank": 100000}, "lora_rank=100000"),
    ({"backbone": "bpr"}, "uses no features, so there is nothing to tune. Take one of vbpr, freedom"),
    ({"tuning": "prefix"}, "tuning='prefix' is not known"), ({"kt_weight": 0}, "kt_weight=0 and task_weight=0"),
    ({"micro_batch": "all"}, "it must be a whole number at least 1 and at most 2,147,483,647 or 'auto' or None"),
    ({"device": "gpu"}, "device='gpu' is not allowed"), ({"device": "cuda:987"}, "device='cuda:987' cannot be used"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=lambda x: str(x)[:40])
def test_a_wrong_setting_is_one_sentence_before_anything_is_loaded(runs, monkeypatch, wrong, message):
    monkeypatch.setattr("ptmrec.stage2.load_inputs", lambda p: pytest.fail("something was loaded"))
    with pytest.raises(ValueError, match=message) as error:
        run_stage2(**wrong)
    assert "\n" not in str(error.value) and not runs.exists()


@pytest.mark.parametrize("wrong", [{"n_seed": 1}, {"tau": 0}, {"dataset": "samples"}], ids=str)
@pytest.mark.parametrize("notebook", ["04_stage1", "05_stage2"])
def test_a_wrong_setting_stops_the_notebook_at_its_check(runs, tmp_path, notebook, wrong):
    "No cell after the check is run, and the notebook shows one line for it."
    if notebook == "04_stage1" and "tau" in wrong:
        wrong = {"lr": 0}
    flags = [x for name, value in wrong.items() for x in ("-p", name, str(value))]
    result = subprocess.run([f"{BIN}/papermill", ROOT / "nbs" / f"{notebook}.ipynb", tmp_path / "out.ipynb", *flags],
                            capture_output=True, text=True)
    assert result.returncode == 1, result.stderr[-2000:]
    cells = [c for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if c.cell_type == "code"]
    ran = [c for c in cells if c.execution_count]
    error, = (o for c in cells for o in c.outputs if o.output_type == "error")
    assert "notebook_parameters" in ran[-1].source and len(error.traceback) == 1
    assert not runs.exists()


def test_a_parameters_cell_that_is_run_again_counts_as_it_is_now():
    "Not what an earlier version of it named; and whatever way it assigns."
    first = "# Parameters of run_stage2"
    cells = [f"{first}\nn_seed = 1", f"{first}\nlr, epochs = 1e-3, 5\nn_seeds: int = 2", f"{first}\nlr = = 3"]
    assert sorted(assigned_names(cells)) == ["epochs", "lr", "n_seeds"]
    given = notebook_parameters(run_stage2, {"In": cells, "n_seed": 1, "lr": 1e-3, "epochs": 5, "n_seeds": 2})
    assert given == {"lr": 1e-3, "epochs": 5, "n_seeds": 2}
    assert assigned_names([*cells, "# Parameters\nknn_k = 5"])[-1] == "knn_k"  # papermill's, beside it


def test_parameters_cells_are_generated():
    for notebook, function in {"04_stage1": run_stage1, "05_stage2": run_stage2}.items():
        cells = nbformat.read(ROOT / "nbs" / f"{notebook}.ipynb", 4).cells
        tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
        assert tagged == [parameters_cell(function)], f"{notebook}: run make notebooks"


def test_a_new_components_claim_on_a_taken_name_is_refused():
    for name, field in {"tau": setting(1.0, "something else", gt=0), "knn_k": setting(3, "something else", ge=1)}.items():
        own = type("Settings", (Settings,), {"__annotations__": {name: float if name == "tau" else int}, name: field})
        with pytest.raises(SettingError, match=f"both claim the setting {name}"):
            BACKBONES.register("mine")(type("Mine", (Backbone,), {"Settings": own}))
        assert "mine" not in BACKBONES
