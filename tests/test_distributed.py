"""Two processes do what one does: the same losses, gradients, features and files, to rounding; killed, they go on."""
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from small import N_ITEMS, SHORT, hugging_face_clips, make_shop

import ptmrec.clip_prompting
import ptmrec.distributed
import ptmrec.runs
import ptmrec.stage1
import ptmrec.stage2
import ptmrec.training
from ptmrec.clip_prompting import Clip, ItemEncoder, encode_in_blocks, frozen_features, load_clip
from ptmrec.data import cache_dir, load_data
from ptmrec.distributed import RankLost, all_reduce, init_distributed, rank, sum_gradients, together, world_size
from ptmrec.peft import attach
from ptmrec.ranking import Evaluator
from ptmrec.runs import new_run, set_seed
from ptmrec.settings import SettingError
from ptmrec.stage1 import build_backbone, run_stage1
from ptmrec.stage2 import Stage2, run_stage2, tune

BATCHES = {
    "items": dict(user=range(40), item=[n % 9 for n in range(40)]),
    "interactions": dict(user=range(31), item=[n % 30 for n in range(31)]),  # item 0 in both halves
    "one item": dict(user=[3], item=[5]),  # the other rank has neither a user nor an item of its own
}
SETTINGS = {"kt": dict(), "task": dict(task_weight=1.0, tune_backbone=True), "lora": dict(tuning="lora"),
            "parts": dict(micro_batch=3, task_weight=1.0), "bf16": dict(precision="bf16"), "bert": dict()}


def make_model(data, clip, tuning="prompt", precision="float32", **settings):
    set_seed(0)
    features = frozen_features(data, clip)
    backbone = build_backbone("vbpr", data.inter, features, {})
    few = {"n_ctx": 2, "prompt_depth": 2} if "prompt" in tuning else {}
    return Stage2(backbone, ItemEncoder(clip, data, attach(clip, tuning, **few), precision), **settings)


def joint_batch(data, clip, batch, settings):
    "Losses and gradients of a joint batch, on this rank, after summing."
    model = make_model(data, bert() if settings == "bert" else clip, **SETTINGS[settings])
    user, item = (torch.tensor(list(BATCHES[batch][side])) for side in ("user", "item"))
    terms = model.losses(user, item, (item + 7) % N_ITEMS)
    sum(terms.values()).backward()
    sum_gradients(model.parameters())
    gradients = {n: q.grad for n, q in model.named_parameters() if q.grad is not None}
    model.encoder.tuning.detach()
    return {"terms": all_reduce({k: v.item() for k, v in terms.items()}), "gradients": gradients, "bank": model.bank}


def bert():
    "A CLIP with a text tower by Hugging Face."
    torch.manual_seed(0)
    model = hugging_face_clips(vocab_size=49408)["bert"]().eval().requires_grad_(False)
    return Clip("bert", model, open_clip.SimpleTokenizer(context_length=20), 32, torch.zeros(3), torch.ones(3))


def whole_training(data, clip, folder, disagree):
    "Two epochs of batches by items; what was encoded live in each, and the history. `disagree`: ranks see other metrics."
    model = make_model(data, clip)
    real, live = ptmrec.stage2.evaluate, []
    forward = model.encoder.forward
    model.encoder.forward = lambda items: (live.extend(items.tolist() if torch.is_grad_enabled() else []), forward(items))[1]

    def evaluate(*args):
        per_user, lists = real(*args)
        return (per_user + rank() * len(live) if disagree else per_user), lists

    ptmrec.stage2.evaluate = evaluate
    own = folder / f"training of {world_size()}{' disagreeing' * disagree}"
    own.mkdir(exist_ok=True)
    history = tune(model, Evaluator(data.inter), batch_size=9, accumulate=2, epochs=2, validate_every=1,
                   checkpoint=own / "checkpoint.pt")
    ptmrec.stage2.evaluate = real
    kept = {n: q.detach() for n, q in model.named_parameters() if q.requires_grad}
    return {"live": live, "history": history.to_dict("list"), "kept": kept}


def everything(folder):
    "All that is compared, on this rank; also the files that it wrote outside the cache."
    written = []
    for module in (ptmrec.runs, ptmrec.training):
        write = module.write_atomically
        module.write_atomically = lambda path, how, write=write: (written.append(Path(path).name), write(path, how))
    data, clip = load_data(folder / "shop"), load_clip()
    done = {"rank": rank(), "world": world_size(), "features": frozen_features(data, clip)}
    encoder = ItemEncoder(clip, data)
    done["blocks"] = encode_in_blocks(encoder, folder / f"blocks{world_size()}", block=8)
    done["all"] = encoder.encode_all(batch_size=8)
    done |= {f"{b}, {s}": joint_batch(data, clip, b, s) for b in BATCHES for s in SETTINGS}
    done["training"] = whole_training(data, clip, folder, disagree=False)
    done["disagreeing"] = whole_training(data, clip, folder, disagree=True)
    new_run(f"files{world_size()}", "shop", {"seed": 0}).begin().save_weights("prompts", {"image": torch.ones(1)})
    return done | {"written": written}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(folder, **more):
    return os.environ | {"PTMREC_DATA": str(folder / "data"), "PTMREC_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1",
                         "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"} | more


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What each of two ranks, and this process alone, get from `everything`."
    folder = tmp_path_factory.mktemp("two")
    make_shop(folder / "shop")
    ranks = [subprocess.Popen([sys.executable, __file__, folder], stderr=subprocess.PIPE, text=True, env=environment(
        folder, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=r, LOCAL_RANK=r))
        for port in [free_port()] for r in "01"]
    errors = [p.communicate(timeout=300)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(errors)[-4000:]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTMREC_DATA", str(folder / "alone"))
        patch.setenv("PTMREC_RUNS", str(folder / "runs"))
        for module in (ptmrec.runs, ptmrec.training):
            patch.setattr(module, "write_atomically", module.write_atomically)
        torch.set_num_threads(1)
        alone = everything(folder)
        torch.set_num_threads(threads)
    ranks = [torch.load(folder / f"{r}.pt", weights_only=True) for r in (0, 1)]
    return SimpleNamespace(folder=folder, alone=alone, ranks=ranks)


def close(a, b, relative=1e-4):
    "Every tensor of `b` {name: tensor} equals that of `a`, within `relative` of the largest value of `a`."
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= relative * a[name].abs().max(), name


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch", BATCHES)
def test_losses_and_gradients_are_those_of_the_joint_batch(two, batch, settings):
    one, *both = (done[f"{batch}, {settings}"] for done in (two.alone, *two.ranks))
    tuned = [n for n in one["gradients"] if n.startswith("encoder.tuning.") and not n.endswith(".A")]
    assert tuned and "backbone.project.image.weight" in one["gradients"]
    if batch != "one item":  # its softmax is 1 and teaches nothing
        assert all(one["gradients"][name].abs().max() > 1e-4 for name in tuned), tuned
        assert one["terms"]["kt_image"] > 0.01
    # a share of a batch is another matrix product, and rounds differently; features of a random BERT are alike and cancel
    rounding = {"bf16": 300, "bert": 5}.get(settings, 1)
    for mine in both:
        assert mine["terms"] == pytest.approx(one["terms"], rel=rounding * 1e-4, abs=1e-6)
        close(one["gradients"], mine["gradients"], rounding * 1e-4)
        close(one["bank"], mine["bank"], 2**-8 if settings == "bf16" else rounding * 1e-5)  # one step of a number in bf16
    same(both[0]["gradients"], both[1]["gradients"])  # so all take the same step


def test_features_are_shared_out(two):
    for mine in two.ranks:
        same(two.alone["features"], mine["features"])  # blocks are the same, whoever encodes them
        same(two.alone["blocks"], mine["blocks"])
        close(two.alone["all"], mine["all"], 1e-5)
    assert not list((two.folder / "data" / ".cache").glob("*.blocks"))


def test_every_item_is_encoded_once_per_epoch(two):
    alone = Counter(two.alone["training"]["live"])
    first, second = (Counter(mine["training"]["live"]) for mine in two.ranks)
    assert set(alone.values()) == {2} and alone.keys() == (first | second).keys()  # two epochs
    n_batches = 2 * -(-len(alone) // 9)
    assert first.total() == second.total()
    assert alone.total() <= (first + second).total() <= alone.total() + n_batches  # one more where a share is short


def test_a_training_is_the_same_and_ranks_agree(two):
    one, *both = (done["training"] for done in (two.alone, *two.ranks))
    for mine in both:
        assert mine["history"].keys() == one["history"].keys() and mine["history"] == both[0]["history"]
        for name, values in one["history"].items():
            assert mine["history"][name] == pytest.approx(values, rel=1e-5), name
        close(one["kept"], mine["kept"])
        same(both[0]["kept"], mine["kept"])
    agreeing, disagreeing = two.ranks[0]["training"], [mine["disagreeing"] for mine in two.ranks]
    assert disagreeing[0]["history"] == disagreeing[1]["history"] == agreeing["history"]
    same(disagreeing[0]["kept"], disagreeing[1]["kept"])


def test_only_the_first_writes(two):
    assert [(mine["rank"], mine["world"]) for mine in two.ranks] == [(0, 2), (1, 2)]
    assert two.ranks[0]["written"] == two.alone["written"] and "prompts.safetensors" in two.alone["written"]
    assert two.ranks[1]["written"] == []


LAUNCHERS = {"torchrun": "torch.distributed.run --nproc-per-node 2 --master-addr 127.0.0.1 --master-port",
             "accelerate": "accelerate.commands.accelerate_cli launch --cpu --num_processes 2 --num_machines 1 "
                           "--mixed_precision no --dynamo_backend no --main_process_port"}


def launch(launcher, folder, *program, **env):
    "A program of two processes."
    return subprocess.run([sys.executable, "-m", *LAUNCHERS[launcher].split(), str(free_port()), *program], cwd=folder,
                          capture_output=True, text=True, env=environment(folder, **env))


DIES = """
import os, signal
import ptmrec.training
from ptmrec.distributed import rank
from ptmrec.stage2 import main

class Dies(ptmrec.training.Checkpoint):
    def after_epoch(self, loop):
        super().after_epoch(loop)
        if rank() == int(os.environ["DIES"]) and len(loop.history) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

ptmrec.stage2.Checkpoint = Dies
main()
"""


@pytest.mark.parametrize("dies, launcher", [("no", "torchrun"), ("0", "accelerate"), ("1", "torchrun")])
def test_two_processes_on_the_command_line(tmp_path, monkeypatch, dies, launcher):
    "The whole experiment as README has it, and the same by a function call; also after SIGKILL of a rank in Stage 2."
    make_shop(tmp_path / "data" / "shop")
    program = ["--dataset", "shop", *(x for name, value in SHORT.items() for x in (f"--{name}", str(value)))]
    if dies != "no":
        (tmp_path / "dies.py").write_text(DIES)
        assert launch(launcher, tmp_path, "dies.py", *program, DIES=dies).returncode
        folder, = (path for path in (tmp_path / "runs" / "stage2" / "shop").iterdir() if path.is_dir())
        assert (folder / "checkpoint.pt").exists() and not (folder / "metrics.json").exists()
    result = launch(launcher, tmp_path, "-m", "ptmrec.stage2", *program)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("paired t-test") == 1
    for name, value in environment(tmp_path, PTMREC_RUNS=str(tmp_path / "alone")).items():
        monkeypatch.setenv(name, value)
    run, = run_stage2("shop", **SHORT)
    folder, = (tmp_path / "runs" / "stage2" / "shop").iterdir()
    assert folder.name == run.folder.name and not list((tmp_path / "runs").rglob(".*"))
    assert sorted(f.name for f in folder.iterdir()) == sorted(f.name for f in run.folder.iterdir())
    for weights in ("tuning", "features"):
        close(run.load_weights(weights), load_file(folder / f"{weights}.safetensors"), 1e-3)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["stage1"] == run.metrics()["stage1"]
    for variant in metrics:
        for name, value in run.metrics()[variant]["test"].items():  # one user's hit, where an item graph had a near tie
            assert metrics[variant]["test"][name] == pytest.approx(value, abs=0.02), (variant, name)
    history = pd.read_csv(folder / "history.csv")
    assert np.allclose(history.loss, run.load_table("history.csv").loss, rtol=1e-3)


WAITS = """
import os, signal, sys, time
import ptmrec.distributed as d
from ptmrec.training import exits_when_stopped
watch, how = d.watch_ranks, sys.argv[1]
d.watch_ranks = lambda: watch(every=0.5, limit=10)
try:
    with exits_when_stopped():
        d.init_distributed("cpu")
        d.barrier()
        print("together", flush=True)
        if d.rank() == int(sys.argv[2]):
            os.kill(os.getpid(), getattr(signal, how)) if how else time.sleep(600)
        d.barrier()
except d.RankLost as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("how, gone, code, said", [
    ("SIGKILL", 1, 1, "Process 1 of 2 ends: the connection to another process broke (.*). Look for the error of the proc"),
    ("SIGSTOP", 1, 1, "Process 1 of 2 ends: process 2 has shown no sign of life for 10 seconds. Look"),  # as without power
    ("SIGSTOP", 0, 1, "Process 2 of 2 ends: process 1 has shown no sign of life for 10 seconds. Look for"),
    ("", 1, 143, r"Stopped\.")], ids=["killed", "silent", "the one with the store is silent", "asked to stop"])
def test_a_rank_that_waits_for_another_ends_with_a_sentence(tmp_path, how, gone, code, said):
    "Two processes without a launcher that would end both; one waits in torch for the one that is `gone`."
    port = free_port()
    both = [subprocess.Popen([sys.executable, "-c", WAITS, how, str(gone)], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=environment(
        tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=r, LOCAL_RANK=r))
        for r in "01"]
    waits = both[1 - gone]
    try:
        assert waits.stdout.readline() == "together\n"
        if not how:
            waits.terminate()
        _, errors = waits.communicate(timeout=300)
        assert waits.returncode == code and "Traceback" not in errors, errors
        assert len(re.findall(f"^{said}", errors, re.M)) == 1, errors
    finally:
        both[gone].kill(), both[gone].communicate()


@pytest.mark.parametrize("device, n, gpus, said", [
    ("cuda:0", 2, 2, r"^device='cuda:0' gives the 2 processes of this machine one GPU\. Leave device out"),
    ("auto", 2, 1, r"^2 processes on this machine need 2 GPUs, and it has 1\. Start 1, or set device='cpu'\.$"),
    ("cuda", 4, 2, "^4 processes on this machine need 4 GPUs, and it has 2"),
    ("auto", 2, 2, None), ("cpu", 2, 1, None), ("auto", 2, 0, None), ("cuda:1", 1, 2, None)])  # the last one of two machines
def test_processes_that_would_share_a_gpu_are_refused_before_they_join(monkeypatch, device, n, gpus, said):
    class Joins(Exception):
        pass

    def join(**how):
        raise Joins

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("accelerate.PartialState", join)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SettingError if said else Joins, match=said):
        init_distributed(device)
    if gpus == 1 and device == "auto":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as a launcher does that shows each process its own GPU
        with pytest.raises(Joins):
            init_distributed(device)


def test_a_fault_of_a_ranks_own_gpu_is_no_lost_neighbour(monkeypatch):
    "A GPU reports it late: when the block begins, it is raised as it is; in the block, it is the cause of what is raised."
    def synchronize():
        if faults.pop(0):
            raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    faults = [True]
    with pytest.raises(RuntimeError, match="^CUDA error") as fault, together():
        pytest.fail("the block has begun")
    assert type(fault.value) is RuntimeError and not faults
    faults = [False, True]
    with pytest.raises(RankLost, match="CUDA error: device-side") as lost, together():
        pass
    assert str(lost.value.__cause__).startswith("CUDA error") and ptmrec.distributed._waiting_since is None


ENDS = """
import ptmrec.distributed as d
watch = d.watch_ranks
d.watch_ranks = lambda: watch(every=0.001)  # so that one is under way when the interpreter ends
d.init_distributed("cpu")
d.barrier()
"""


def test_signs_of_life_end_before_the_interpreter(tmp_path):
    port = free_port()
    both = [subprocess.Popen([sys.executable, "-c", ENDS], text=True, stderr=subprocess.PIPE, env=environment(
        tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=r, LOCAL_RANK=r))
        for r in "01"]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said


@pytest.mark.parametrize("main, experiment", [(ptmrec.stage1.main, run_stage1), (ptmrec.stage2.main, run_stage2)])
def test_command_line_has_the_notebooks_parameters(capsys, main, experiment):
    with pytest.raises(SystemExit) as end:
        main(["--learning_rate", "0.1"])
    assert end.value.code == 2 and f"{experiment.__name__} has no parameter learning_rate" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="No data set 'no-such-shop'"):
        main(["--dataset", "no-such-shop"])
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M)) == set(inspect.signature(experiment).parameters)


def test_stage1_as_a_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "runs"))
    ptmrec.stage1.main(["--dataset", "sample", "--backbone", "bpr", "--epochs", "1", "--n_seeds", "1"])
    out, run = capsys.readouterr().out, next((tmp_path / "runs" / "stage1" / "sample").glob("*/metrics.json")).parent
    table = json.loads((run / "metrics.json").read_text())
    assert f"{table['test']['recall@10']:.4f}" in out and run.name in out and "validation" in out
    command = [sys.executable, "-m", "ptmrec.stage1", "--epoch", "1"]
    called = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert called.returncode == 2 and "run_stage1 has no parameter epoch. Did you mean epochs" in called.stderr


def test_mixed_precision_is_close(tmp_path, monkeypatch):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    make_shop(tmp_path / "shop")
    data, clip = load_data("shop"), load_clip()
    torch.manual_seed(0)
    tuning, done = attach(clip, n_ctx=2, prompt_depth=2), {}
    for precision in ("float32", "bf16"):
        features = ItemEncoder(clip, data, tuning, precision)(torch.arange(5))
        sum(f[:, ::2].sum() for f in features.values()).backward()
        done[precision] = features, [q.grad.clone() for q in tuning.parameters()]
        tuning.zero_grad()
    for m, f in done["float32"][0].items():
        g = done["bf16"][0][m]
        assert g.dtype == torch.float32 and 0 < (f - g).abs().max() < 0.05
        assert torch.cosine_similarity(f, g).min() > 0.999
    for a, b in zip(done["float32"][1], done["bf16"][1]):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98


KILLED = """
import os, signal
from pathlib import Path
import ptmrec.clip_prompting as cp
from ptmrec.data import load_data
from ptmrec.distributed import rank, init_distributed

init_distributed("cpu")
save, saved = cp.save_file, []
def die_in_the_second(features, path):
    save(features, path)
    saved.append(path)
    if rank() == int(os.environ["DIES"]) and len(saved) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

cp.save_file = die_in_the_second
cp.frozen_features(load_data("sample"), cp.load_clip())
"""


@pytest.mark.parametrize("dies, n_ranks", [("0", 1), ("1", 2)])
def test_a_killed_extraction_goes_on(tmp_path, monkeypatch, dies, n_ranks):
    "SIGKILL in the middle of writing a second one of six blocks, alone, or one of two ranks; then one process goes on."
    (tmp_path / "killed.py").write_text(KILLED)
    env = environment(tmp_path, DIES=dies)
    if n_ranks == 1:
        assert subprocess.run([sys.executable, "killed.py"], cwd=tmp_path, env=env).returncode == -signal.SIGKILL
    else:
        assert launch("torchrun", tmp_path, "killed.py", DIES=dies).returncode
    for name in ("PTMREC_DATA", "TQDM_DISABLE"):
        monkeypatch.setenv(name, env[name])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data, clip = load_data("sample"), load_clip()
    blocks, = cache_dir().glob("*.blocks")
    done = [int(path.name.split("-")[0]) for path in blocks.glob("[0-9]*-*.safetensors")]
    assert 1 <= len(done) <= 5 and list(blocks.glob(".*"))
    encoded = []
    forward = ItemEncoder.forward
    monkeypatch.setattr(ItemEncoder, "forward", lambda self, items: (encoded.append(int(items[0])), forward(self, items))[1])
    frozen_features(data, clip)
    assert encoded == [n for n in range(0, 1500, 256) if n not in done] and not blocks.exists()
    path, = cache_dir().glob("features-*.safetensors")
    resumed = path.read_bytes()
    path.unlink()
    frozen_features(data, clip)
    torch.set_num_threads(threads)
    assert path.read_bytes() == resumed and len(encoded) == 12 - len(done)


if __name__ == "__main__":
    init_distributed("cpu")
    torch.save(everything(Path(sys.argv[1])), Path(sys.argv[1]) / f"{rank()}.pt")
