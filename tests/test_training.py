"""The loop and its callbacks: stopping and going on, damaged checkpoints, and the line that a bar ends with."""
import io
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import redirect_stderr
from inspect import signature
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from small import make_shop

import ptmrec.training
from ptmrec.data import DataError, load_data
from ptmrec.ranking import Evaluator
from ptmrec.stage1 import check_fit, most_bought
from ptmrec.stage2 import check_gain
from ptmrec.training import (Callback, Checkpoint, Diverged, Health, KeepBest, Loop, LowerRate, Stopped, check_features,
                             check_losses, leaves_within, read_snapshot, sigterm_stops, write_snapshot)

TOY = '''
import os, signal, sys, time
import torch
from ptmrec.training import Checkpoint, KeepBest, Loop, Progress, exits_when_stopped

def toy(*callbacks, seed=0, patience=10, best=None, stop_at=None, by=signal.SIGINT):
    """Adds up four numbers; the score rises until epoch `best`."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 1)
    optimiser = torch.optim.Adam(model.parameters(), 0.05)

    def train_epoch(epoch):
        if epoch == stop_at:
            os.kill(os.getpid(), by)
        x = torch.randn(64, 4)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        return {"loss": loss.item()}

    def validate(epoch):
        return {"score": min(epoch, best) - 0.1 * epoch if best else -(model.weight - 1).abs().max().item()}

    return Loop(model, optimiser, train_epoch, validate, [Progress("Toy, seed 0", ["loss", "score"]),
                                                          KeepBest("score", patience), *callbacks])
'''
exec(TOY, namespace := {})
toy = namespace["toy"]


def shown(run):
    "Lines that `run()` writes to stderr, those that a carriage return overwrites included."
    with redirect_stderr(io.StringIO()) as out:
        run()
    return out.getvalue().strip().replace("\r", "\n").split("\n")


def test_the_bar_of_an_early_stopped_training_ends_complete(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    last = shown(lambda: toy(best=4, patience=3).run(100))[-1]
    assert last.startswith("Toy, seed 0, stopped at epoch 7, best 4: 100%|") and " 7/7, loss " in last
    last = shown(lambda: toy().run(6))[-1]
    assert last.startswith("Toy, seed 0, ran all 6 epochs, best 6: 100%|") and " 6/6, loss " in last


def test_a_log_stays_small_and_a_bar_can_be_hidden(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert len(shown(lambda: toy(patience=300).run(300))) < 30
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert shown(lambda: toy().run(3)) == [""]


def test_the_bar_of_a_resumed_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    toy(Checkpoint(tmp_path / "c.pt", seconds=0, share=1)).run(5)
    lines = shown(lambda: toy(Checkpoint(tmp_path / "c.pt", seconds=0, share=1)).run(10))
    assert lines[0].startswith("Toy, seed 0:  50%|") and "10/10" in lines[-1]
    assert "ran all 10 epochs" in shown(lambda: toy(Checkpoint(tmp_path / "c.pt", seconds=0, share=1)).run(10))[-1]


PROGRAM = TOY + '''
path, epochs, stop_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

class Waits(Checkpoint):
    def after_epoch(self, loop):
        super().after_epoch(loop)
        if len(loop.history) == stop_at:
            print("ready", file=sys.stderr, flush=True)
            time.sleep(600)

with exits_when_stopped():
    loop = toy(Waits(path, seconds=0, share=1))
    history = loop.run(epochs)
    torch.save([history.to_dict("list"), loop.module.state_dict()], path + ".end")
'''


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_program_says_one_line_and_goes_on(tmp_path, number, code):
    (tmp_path / "program.py").write_text(PROGRAM)
    env = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}

    def start(path, stop_at=0):
        return subprocess.Popen([sys.executable, tmp_path / "program.py", path, "12", str(stop_at)], env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    path = str(tmp_path / "c.pt")
    stopped = start(path, stop_at=5)
    assert stopped.stderr.readline() == "ready\n"
    stopped.send_signal(number)
    out, err = stopped.communicate(timeout=300)
    best = torch.load(path)["callbacks"][1]
    assert stopped.returncode == code and out == ""
    assert err == (f"Toy, seed 0: stopped during epoch 5. Kept: the first 5 epochs (best so far: epoch 5, score "
                   f"{best['best']:.4f}), in {path}. The same call goes on from there.\n")
    assert start(path).wait(300) == start(path + ".whole").wait(300) == 0
    (history, weights), (whole, wanted) = (torch.load(p + ".end") for p in (path, path + ".whole"))
    assert history == whole and all(torch.equal(weights[n], w) for n, w in wanted.items())
    assert len(whole["loss"]) == 12 and [p.name for p in tmp_path.glob(".*")] == []


def test_a_stopped_program_leaves_within_ten_seconds():
    "By SIGTERM: what its main thread may take to notice, and then what libraries may at exit."
    first, then = (signature(part).parameters["seconds"].default for part in (leaves_within, ptmrec.training._leave))
    assert first + then <= 10


def test_a_stop_before_anything_is_kept_says_so(tmp_path):
    with pytest.raises(Stopped, match=r"^Toy, seed 0: stopped during epoch 3\. Nothing is kept\.$") as stop:
        toy(Checkpoint(tmp_path / "c.pt"), stop_at=3).run(9)
    assert stop.value.signal == signal.SIGINT and isinstance(stop.value, KeyboardInterrupt)
    with pytest.raises(Stopped, match="during epoch 2") as stop:
        toy(stop_at=2, by=signal.SIGTERM).run(9)
    assert stop.value.signal == signal.SIGTERM


def test_a_handler_of_ones_own_is_left_alone():
    called = []
    before = signal.signal(signal.SIGTERM, lambda *args: called.append(1))
    try:
        with sigterm_stops():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [1]


def test_a_loop_runs_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(toy().run(3)))
    thread.start(), thread.join()
    assert len(found[0]) == 3


def test_the_stop_button_shows_one_line(tmp_path):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TOY + f"\ntoy(Checkpoint({str(tmp_path / 'c.pt')!r}, "
                                                                     "seconds=0, share=1), stop_at=4).run(9)")])
    with pytest.raises(CellExecutionError):
        NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    error, = (o for o in book.cells[0].outputs if o.output_type == "error")
    line, = error.traceback
    assert error.ename == "Stopped" and line.startswith("Toy, seed 0: stopped during epoch 4. Kept: the first 3 epochs")


def test_checkpoints_are_written_by_the_clock(tmp_path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr(ptmrec.training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ptmrec.training, "write_atomically", lambda path, write: written.append(now[0]))

    class Clock(ptmrec.training.Callback):
        def after_epoch(self, loop):
            now[0] += 4

    toy(Clock(), Checkpoint(tmp_path / "c.pt", seconds=10)).run(10)
    assert written == [12, 24, 36, 40]  # and at the end


def test_writing_checkpoints_takes_a_twentieth_of_the_time_where_it_is_slow(tmp_path, monkeypatch):
    "As with gigabytes on a network disk: two seconds for a checkpoint, and epochs of four."
    now, written = [0.0], []
    monkeypatch.setattr(ptmrec.training.time, "monotonic", lambda: now[0])

    def write(path, content):
        written.append(now[0])
        now[0] += 2

    monkeypatch.setattr(ptmrec.training, "write_atomically", write)

    class Clock(ptmrec.training.Callback):
        def after_epoch(self, loop):
            now[0] += 4

    toy(Clock(), Checkpoint(tmp_path / "c.pt", seconds=0), patience=1000).run(100)
    *written, last = written
    assert last == now[0] - 2
    pauses = [after - before - 2 for before, after in zip(written, written[1:])]
    assert written[0] == 4 and min(pauses) >= 38 and max(pauses) < 38 + 4
    assert 2 * (len(written) - 1) <= 0.05 * now[0]


def change(path, *without, **changes):
    "Write a checkpoint with other content, and the checksum that belongs to it."
    write_snapshot(path, {k: v for k, v in (read_snapshot(path) | changes).items() if k not in without})


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path)["weights"]["weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "a list": lambda path: torch.save([1, 2], path),
    "no checksum": lambda path: torch.save({k: v for k, v in torch.load(path).items() if k != "checksum"}, path),
    "a flipped bit": flip,
    "another rate": lambda path: torch.save(torch.load(path) | {"stop": True}, path),
    "no optimiser": lambda path: change(path, "optimiser"),
    "a weight is missing": lambda path: change(path, weights={"weight": torch.zeros(1, 4)}),
    "a weight too many": lambda path: change(path, weights=read_snapshot(path)["weights"] | {"more": torch.zeros(1)}),
    "another shape": lambda path: change(path, weights={"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}),
    "another optimiser": lambda path: change(path, optimiser={"state": {}, "param_groups": []}),
    "another callback": lambda path: change(path, callbacks=[{}]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_not_used(tmp_path, damage):
    path = tmp_path / "c.pt"
    whole = toy(Checkpoint(path, seconds=0, share=1)).run(6)
    toy(Checkpoint(path, seconds=0, share=1), seed=1).run(6)
    DAMAGE[damage](path)
    loop = toy(Checkpoint(path, seconds=0, share=1))
    with pytest.warns(UserWarning, match=f"The checkpoint {path} is not used, and the training starts anew: it "):
        assert loop.run(6).equals(whole)
    again = toy(Checkpoint(path, seconds=0, share=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again.run(6).equals(whole) and torch.equal(again.module.weight, loop.module.weight)


def warned(losses):
    loop = Loop(None, None, lambda epoch: {"loss": losses[epoch - 1]}, lambda epoch: {}, [Health("loss", "Lower lr.")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.run(len(losses))
    return [str(w.message) for w in caught]


def test_a_spike_is_a_spike_below_zero_too():
    assert warned([1.0, 0.5, 1.5]) == [] and warned([1.0, 0.5, 1.51, 9.0]) == [
        "Epoch 3: loss has risen to 1.51, and its lowest value was 0.5. Lower lr."]
    assert warned([1.0, -5.9, -6.1, -6.01]) == warned([-1.0, -0.9, -1.2, -1.1]) == warned([0.5, -0.01, 0.1]) == []
    assert len(warned([1.0, -6.0, 9.0])) == len(warned([-1.0, -2.0, 2.5])) == 1


def test_without_the_loss_that_is_watched_the_first_one_is():
    losses = [1.0, 0.5, 9.0]
    loop = Loop(None, None, lambda epoch: {"softmax": losses[epoch - 1]}, lambda epoch: {}, [Health("bpr", "Lower lr.")])
    with pytest.warns(UserWarning, match="Epoch 3: softmax has risen to 9"):
        loop.run(3)


def test_each_callback_has_a_state_of_its_own():
    class Counts(Callback):
        def after_epoch(self, loop):
            self.state["epochs"] = self.state.get("epochs", 0) + 1

    first, second = Counts(), Counts()
    Loop(None, None, lambda epoch: {"loss": 1.0}, lambda epoch: {}, [first]).run(3)
    Loop(None, None, lambda epoch: {"loss": 1.0}, lambda epoch: {}, [second]).run(2)
    assert first.state == {"epochs": 3} and second.state == {"epochs": 2} and Callback.state == {}


def test_a_state_that_a_class_gives_is_copied_for_each_callback():
    class Counts(Callback):
        state = {"epochs": 0, "losses": []}

        def after_epoch(self, loop):
            self.state["epochs"] += 1
            self.state["losses"].append(loop.history[-1]["loss"])

    counts = [Counts(), Counts()]  # as of two seeds
    for callback in counts:
        Loop(None, None, lambda epoch: {"loss": 1.0}, lambda epoch: {}, [callback]).run(2)
    assert [c.state for c in counts] == [{"epochs": 2, "losses": [1.0, 1.0]}] * 2
    assert Counts.state == {"epochs": 0, "losses": []}


def test_callbacks_may_come_from_a_generator():
    keep = KeepBest("score", 9)
    loop = Loop(torch.nn.Linear(1, 1), None, lambda epoch: {}, lambda epoch: {"score": epoch}, (c for c in [keep]))
    loop.run(3)
    assert keep.state["epoch"] == 3


class Remembers(Callback):
    "Remembers something of each epoch."

    def __init__(self, what):
        self.what = what

    def after_epoch(self, loop):
        self.state[len(loop.history)] = self.what


def test_numbers_of_numpy_that_a_callback_remembers_are_kept_by_a_checkpoint(tmp_path):
    what = {"best": np.float64(0.1), "seen": [np.int64(3), (np.bool_(True), None)], np.int64(7): torch.ones(2)}
    toy(Remembers(what), Checkpoint(tmp_path / "c.pt", seconds=0, share=1)).run(2)
    again = Remembers(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy(again, Checkpoint(tmp_path / "c.pt", seconds=0, share=1)).run(3)
    first, _, third = again.state.values()
    assert torch.equal(first.pop(7), torch.ones(2)) and first == {"best": 0.1, "seen": [3, (True, None)]} and third is None
    assert type(first["best"]) is float


@pytest.mark.parametrize("what", [np.ones(3), {1, 2}, [signal]])
def test_what_a_checkpoint_cannot_hold_is_refused_when_it_is_written(tmp_path, what):
    kind = type(what[0] if isinstance(what, list) else what).__name__
    with pytest.raises(DataError, match=f"^The `state` of a callback holds the type {kind}, and a checkpoint cannot"):
        toy(Remembers(what), Checkpoint(tmp_path / "c.pt", seconds=0, share=1)).run(2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_disk_or_a_machine_that_fails_is_no_damaged_checkpoint(tmp_path, monkeypatch, error):
    "The file may be whole, so the training does not start anew."
    toy(Checkpoint(tmp_path / "c.pt", seconds=0, share=1)).run(3)
    before = (tmp_path / "c.pt").read_bytes()

    def load(*args, **how):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(torch, "load", load)
        toy(Checkpoint(tmp_path / "c.pt", seconds=0, share=1)).run(6)
    assert (tmp_path / "c.pt").read_bytes() == before


def test_numbers_of_numpy_and_torch_are_kept_by_a_checkpoint(tmp_path):
    model = torch.nn.Linear(1, 1)

    def loop():
        return Loop(model, torch.optim.SGD(model.parameters(), 0.1), lambda epoch: {"loss": torch.tensor(1 / epoch)},
                    lambda epoch: {"score": np.float64(epoch)}, [KeepBest("score", 9), Checkpoint(tmp_path / "c.pt", 0, 1)])

    loop().run(2)
    again = loop()
    assert again.run(4).score.tolist() == [1, 2, 3, 4] and again.history[1]["loss"] == 0.5


def test_a_checkpoint_of_another_run_or_another_training_is_not_used(tmp_path):
    "Of another seed, whose folder is another one; or the one of `continued` in the place of `fresh`."
    whole = toy().run(6)
    for written, read in [("b/c.pt", "a/c.pt"), ("a/continued.pt", "a/fresh.pt")]:
        toy(Checkpoint(tmp_path / written, seconds=0, share=1), seed=1).run(3)
        (tmp_path / read).parent.mkdir(exist_ok=True)
        (tmp_path / written).rename(tmp_path / read)
        with pytest.warns(UserWarning, match=f"{read} is not used, .* it belongs to another run, {written}"):
            assert toy(Checkpoint(tmp_path / read)).run(6).equals(whole)


def test_checks_of_losses_find_the_batch_and_the_term():
    losses = [{"bpr": torch.tensor(1.0), "reg": torch.tensor(x)} for x in (0.1, float("inf"), float("nan"))]
    with pytest.raises(Diverged, match="^batch 2 of 3: the loss reg is inf$"):
        check_losses(losses, {"bpr": 1.0, "reg": float("nan")})
    with pytest.raises(Diverged, match="add up to more than a number can hold .bpr."):
        check_losses(losses, {"bpr": float("inf"), "reg": 0.1})
    check_losses(losses, {"bpr": 1.0, "reg": 0.1})


def falling(on_nan, fails=(), weights_too=(), lr=0.05):
    "A toy that is not a number in the epochs `fails` unless the rate is below 1/50; returns the loop and its `LowerRate`."
    rate, tried = LowerRate("Lower lr.", on_nan), []
    loop = toy(rate, patience=100)
    train_epoch = loop.train_epoch

    def train(epoch):
        tried.append((epoch, rate.factor))
        loop.optimiser.param_groups[0]["lr"] = lr * rate.factor
        row = train_epoch(epoch)
        if epoch in weights_too and lr * rate.factor > 0.02:
            torch.nn.init.constant_(loop.module.bias, float("nan"))
        if epoch in fails and lr * rate.factor > 0.02:
            raise Diverged("batch 1 of 1: the loss bpr is nan")
        return row

    loop.train_epoch = train
    return loop, rate, tried


@pytest.mark.parametrize("how", ["fails", "weights_too"])
def test_a_training_that_diverges_goes_on_from_the_last_good_epoch_if_asked(how):
    with pytest.raises(Diverged, match="^Toy, seed 0, epoch 4, (batch 1 of 1: the loss bpr|.*bias) .*nan. Lower lr.$"):
        falling("stop", **{how: (4,)})[0].run(8)
    loop, rate, tried = falling("lower_lr", **{how: (4,)})
    with pytest.warns(UserWarning, match="Going on from epoch 3 with 0.1 times the learning rate"):
        history = loop.run(8)
    assert [epoch for epoch, _ in tried] == [1, 2, 3, 4, 4, 5, 6, 7, 8] and rate.factor == 0.1
    untroubled = falling("stop")[0].run(3)
    assert history.iloc[:3].equals(untroubled) and history.notna().all(axis=None) and len(history) == 8
    assert loop.callbacks[1].state["epoch"] == 8  # the best epoch so far was not forgotten


def test_a_lowered_rate_is_lowered_three_times_at_most():
    loop, rate, tried = falling("lower_lr", fails=(2,), lr=1e6)
    with pytest.warns(UserWarning), pytest.raises(Diverged, match="epoch 2, batch 1 of 1: .* Lower lr."):
        loop.run(5)
    assert [factor for _, factor in tried] == pytest.approx([1, 1, 0.1, 0.01, 0.001])


def test_a_training_that_diverges_has_failed_and_was_not_interrupted():
    told = []

    class Told(Callback):
        def interrupted(self, loop):
            told.append("interrupted")

        def failed(self, loop):
            told.append("failed")

    loop = falling("stop", fails=(2,))[0]
    loop.callbacks.append(Told())
    with pytest.raises(Diverged):
        loop.run(5)
    assert told == ["failed"]


def test_a_lowered_rate_survives_a_stop(tmp_path):
    def start(stops):
        loop, rate, _ = falling("lower_lr", fails=(3,))
        loop.callbacks.append(Checkpoint(tmp_path / ("stopped" if stops else "whole") / "c.pt", seconds=0, share=1))
        train_epoch = loop.train_epoch
        loop.train_epoch = lambda epoch: train_epoch(epoch) if epoch != stops else (_ for _ in ()).throw(KeyboardInterrupt)
        return loop, rate

    with pytest.warns(UserWarning, match="Going on"):
        whole = start(None)[0].run(8)
    with pytest.warns(UserWarning, match="Going on"), pytest.raises(Stopped):
        start(6)[0].run(8)
    loop, rate = start(None)
    assert loop.run(8).equals(whole) and rate.factor == 0.1


def test_two_warnings_that_are_equal_are_one_plain_line(tmp_path):
    "In a program, whatever the filters of libraries are."
    (tmp_path / "program.py").write_text("""
import warnings
import torch
from ptmrec.training import check_features
for n in range(3):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        check_features({"text": torch.ones(5, 3) + torch.eye(5, 3) / 1000})
    warnings.warn("mine")
""")
    result = subprocess.run([sys.executable, tmp_path / "program.py"], env=os.environ | {"PYTHONPATH": str(ROOT)},
                            capture_output=True, text=True)
    lines = result.stderr.splitlines()
    assert [line for line in lines if "collapsed" in line] == [lines[0]] and lines[0].startswith("Warning: The text")
    assert "program.py" in lines[1] and "mine" in lines[1]  # those of others are left alone


def test_poor_results_are_warnings_with_their_numbers(tmp_path):
    "Collapsed features, underfitting, and a tuned CLIP that is no better than a control; none where all is well."
    make_shop(tmp_path / "shop")
    inter = load_data(tmp_path / "shop").inter
    evaluator = Evaluator(inter)
    popular = most_bought(inter, evaluator)["recall@20"].mean()

    def said(check, *arguments):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check(*arguments)
        return [str(w.message) for w in caught]

    metric = {"metric": "recall@20"}

    def runs(value, tuning="lora"):
        "A run of Stage 2 with this validation metric."
        return [SimpleNamespace(finished=True, params=metric | {"tuning": tuning},
                                metrics=lambda: {"as_is": {"valid": {"recall@20": value}}})]

    def stage1(value):
        return [SimpleNamespace(finished=True, params=metric, metrics=lambda: {"valid": {"recall@20": value}, "test": {}})]

    good, alike = torch.randn(30, 8), torch.ones(30, 8) + torch.randn(30, 8) / 1000
    line, = said(check_features, {"image": good, "text": alike})
    assert re.match(r"The text features have collapsed \(mean cosine 1\.000, effective rank \d\.\d\): items look", line)
    assert line.endswith("rate of the tuning (prompt_lr, lora_lr, ...) or stage2_epochs; in two stages, raise tau.")
    history = pd.DataFrame({"valid recall@20": [0.0, popular / 2]})
    line, = said(check_fit, history, inter, evaluator)
    assert f"recall@20 is {popular / 2:.4f}, and showing everybody the most bought items has {popular:.4f}" in line
    assert not said(check_fit, history * 3, inter, evaluator)
    controls = {"Stage 1, two rounds": stage1(0.11), "projections alone": runs(0.12)}
    line, = said(check_gain, runs(0.115), controls)
    assert "nothing to learn here: the best validation recall@20 is 0.1150 with a tuned CLIP, and 0.1200 with proj" in line
    assert line.endswith("Change the settings of the tuning, its learning rate first, or take another one.")
    same = runs(0.12, "none")  # projections alone are their own control
    assert not said(check_gain, same, {"Stage 1, two rounds": stage1(0.11), "projections alone": same})
    line, = said(check_gain, runs(0.1), {"Stage 1, two rounds": stage1(0.11)})
    assert "no more than longer training does: the best validation recall@20 is 0.1000 after it, and 0.1100 after" in line
    assert not said(check_gain, runs(0.13), controls)
    line, = said(check_gain, runs(0.1), {"Stage 1, 3 rounds": stage1(0.11)})
    assert line.endswith("0.1100 after 3 rounds of Stage 1 on frozen features.")
