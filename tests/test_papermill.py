"""Notebooks as experiments, the way README.md tells people to run them."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import ROOT
from small import make_shop

from ptmrec.training import read_snapshot

BIN = Path(sys.executable).parent
SHORT = {"epochs": 3, "stage2_epochs": 1, "n_seeds": 1}


def papermill(notebook, output, cwd=ROOT, **parameters):
    flags = [x for name, value in parameters.items() for x in ("-p", name, str(value))]
    return subprocess.run([BIN / "papermill", notebook, output, *flags], cwd=cwd, capture_output=True, text=True)


def tuned_runs(runs, dataset):
    "Folders and metrics of the Stage 2 runs that tuned a CLIP (the notebook's control does not)."
    folders = [f.parent for f in (runs / "stage2" / dataset).glob("*/metrics.json")]
    tuned = [f for f in folders if json.loads((f / "run.json").read_text())["parameters"]["tuning"] != "none"]
    assert tuned
    return [(f, json.loads((f / "metrics.json").read_text())) for f in tuned]


def test_short_form_as_written(runs, tmp_path):
    "In nbs/, without an output path, with stdout redirected."
    with (tmp_path / "out.ipynb").open("w") as out:  # nbdev_test trains to the end
        command = f"{BIN}/papermill 05_stage2.ipynb -p dataset sample -p n_seeds 1 -p epochs 3 -p stage2_epochs 1"
        result = subprocess.run(command.split(), cwd=ROOT / "nbs", stdout=out, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    executed = json.loads((tmp_path / "out.ipynb").read_text())
    text = "".join("".join(o.get("text", "")) for c in executed["cells"] for o in c.get("outputs", []))
    assert "paired t-test" in text
    (_, metrics), = tuned_runs(runs, "sample")
    assert set(metrics) == {"stage1", "as_is", "continued", "fresh"}
    for variant in metrics.values():
        assert {"recall@10", "recall@20", "ndcg@10", "ndcg@20"} < variant["valid"].keys() == variant["test"].keys()


@pytest.mark.slow
def test_a_study_whose_rows_are_parts_of_runs(runs, tmp_path, monkeypatch):
    "The name that the notebook checks is known by then, and no costs are drawn of parts."
    monkeypatch.setenv("IN_TEST", "1")  # a miniature
    result = papermill("nbs/06_ablations.ipynb", tmp_path / "out.ipynb", experiment="long_tail")
    assert result.returncode == 0, result.stderr[-3000:]
    made = {path.name for path in next((runs / "grids").glob("long_tail-*")).iterdir()}
    assert {"result.md", "figure.png"} <= made and "costs.png" not in made


def test_joint_training_in_the_papers_words(runs, tmp_path):
    "Tuning and recommender from nothing, beside Stage 1, through the notebook as it is; with a CLIP that takes no prompts."
    make_shop(tmp_path / "mine")
    table = pd.read_csv(tmp_path / "mine" / "interactions.csv")
    table[table.user < 12].to_csv(tmp_path / "mine" / "interactions.csv", index=False)  # the naive way encodes every pair
    result = papermill("nbs/05_stage2.ipynb", tmp_path / "out.ipynb", dataset=tmp_path / "mine", training="joint",
                       clip_model="minilm-efficientnet", tuning="lora", last_layers=1, knn_k=5, epochs=2, patience=5,
                       n_seeds=1)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder, metrics), = tuned_runs(runs, "mine")
    assert set(metrics) == {"stage1", "joint"} and metrics["joint"] != metrics["stage1"]
    about = json.loads((folder / "run.json").read_text())["parameters"]
    assert about["kt_weight"] == 0 and about["task_weight"] == 1 and about["tune_backbone"]
    assert about["project_lr"] == about["lr"]


def test_progress_and_result_reach_a_terminal_and_nothing_is_said_of_the_sample(runs, tmp_path):
    "As README has it: bars, results and folder on stdout, warnings on stderr; outputs are of this data set alone."
    make_shop(tmp_path / "mine")
    (tmp_path / "mine" / "defaults.toml").write_text("[freedom]\nknn_k = 5\n")
    command = [BIN / "papermill", "nbs/05_stage2.ipynb", tmp_path / "out.ipynb", "-p", "dataset", tmp_path / "mine",
               *(x for name, value in SHORT.items() for x in ("-p", name, str(value))), "--stdout-file", "/dev/stdout",
               "--stderr-file", "/dev/stderr", "--no-progress-bar"]
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    for said in ("Stage 1, seed 0, ran all 3 epochs, best", "100%", "bpr ", "valid recall@20", "projections alone",
                 "paired t-test over", str(runs / "stage2" / "mine")):
        assert said in result.stdout, said
    assert "The tiny CLIP and the tiny CoCa have only seen" in result.stderr and "Leave" not in result.stdout
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    texts = ["".join(o.get("text", "")) + json.dumps(o.get("data", {})) for c in cells for o in c.get("outputs", [])
             if o.get("name") != "stderr"]
    assert not [text for text in texts if re.search(r"\b[Tt]he sample\b", text)]


@pytest.mark.slow
def test_real_posters(runs, tmp_path, movielens):
    "Stage 1 on MovieLens posters, from the folder as it is; test_browser has both stages."
    result = papermill("nbs/04_stage1.ipynb", tmp_path / "out.ipynb", dataset=movielens, min_rating=4, core=5, epochs=3,
                       n_seeds=1)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics, = (json.loads(path.read_text()) for path in (runs / "stage1" / "movielens-posters").glob("*/metrics.json"))
    popular_by_chance = 10 / 2500
    assert metrics["test"]["recall@10"] > 3 * popular_by_chance


def endless(folder):
    "papermill with a training that never ends, and writes its first checkpoint after a second instead of ten."
    make_shop(folder / "mine")
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "checkpoints.py").write_text("import ptmrec.training as t\nt.Checkpoint.__init__.__defaults__ = 1, 0.05\n")
    command = [BIN / "papermill", "nbs/04_stage1.ipynb", folder / "out.ipynb", "--no-progress-bar",
               *(x for name, value in {"dataset": folder / "mine", "backbone": "bpr", "epochs": 10**6, "patience": 10**6}
                 .items() for x in ("-p", name, str(value)))]
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}  # ipykernel asks for it
    env |= {"PTMREC_RUNS": str(folder), "IPYTHONDIR": str(folder / "ipython")}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def until_checkpoint(process, folder):
    "Wait until a training has written one."
    while not list((folder / "stage1").glob("*/*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)


def test_ctrl_c_and_sigterm_stop_papermill(tmp_path):
    """Ctrl-C, which a terminal sends to papermill and its kernel, shows the training's one line.

    SIGTERM, of a cluster that wants its machine back, ends papermill with the signal's code; its kernel follows. Both
    leave a checkpoint.
    """
    line = re.compile(r"^Stage 1, seed 0: stopped during epoch \d+\. Kept: the first \d+ epochs", re.M)
    terminated = endless(tmp_path / "b")
    try:
        for place in ("a", "a2", "a3"):
            interrupted = endless(tmp_path / place)
            until_checkpoint(interrupted, tmp_path / place)
            os.killpg(interrupted.pid, signal.SIGINT)
            said = "".join(interrupted.communicate(timeout=300))
            assert interrupted.returncode not in (0, -signal.SIGTERM)
            if line.search(said) or "ZMQError" not in said:  # pyzmq may fail as papermill ends, and take the kernel along
                break
        assert line.search(said), said
        until_checkpoint(terminated, tmp_path / "b")
        kernels = psutil.Process(terminated.pid).children(recursive=True)
        terminated.terminate()
        terminated.communicate(timeout=300)
        assert terminated.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
        assert kernels and not psutil.wait_procs(kernels, timeout=300)[1]
    finally:
        for process in (interrupted, terminated):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    kept = [next((tmp_path / where).rglob("checkpoint.pt")) for where in (place, "b")]
    assert all(len(read_snapshot(path)["history"]) > 1 for path in kept)
