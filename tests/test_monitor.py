"""The training monitor: a stop by hand is a finished run that says so for ever; watching changes nothing."""
import gc
import json
import random
import threading
import weakref
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from small import SHORT, make_shop

import ptmrec.monitor as monitor
import ptmrec.stage1 as stage1
import ptmrec.stage2 as stage2
from ptmrec.grids import grid
from ptmrec.monitor import Monitor, curves, patience_ends, summary, watch
from ptmrec.runs import list_runs, open_run, stopped_by_hand
from ptmrec.search import search
from ptmrec.settings import SettingError
from ptmrec.stage1 import run_stage1
from ptmrec.stage2 import controls_of, report, run_stage2
from ptmrec.training import Callback, Checkpoint, KeepBest, Loop, Progress, Stopped, how_it_ended

TITLES = {"loss": "training loss", "score": "validation score"}


class Clicked(Monitor):
    "A monitor whose Stop button is clicked in epoch `at`, from another thread."

    at = 2

    def before(self, loop):
        super().before(loop)
        train = loop.train_epoch

        def train_epoch(epoch):
            if epoch == self.at:
                thread = threading.Thread(target=self.stop.click)
                thread.start(), thread.join()
            return train(epoch)

        loop.train_epoch = train_epoch


def loop_of(scores, *callbacks, patience=100, train_epoch=lambda epoch: {"loss": 1 / epoch}):
    "A loop whose model is set to the number of the epoch, and whose score of an epoch is given; None: not validated."
    model = torch.nn.Linear(1, 1)

    def train(epoch):
        model.weight.data.fill_(epoch)
        return train_epoch(epoch)

    def validate(epoch):
        return {} if scores[epoch - 1] is None else {"score": scores[epoch - 1]}

    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    return Loop(model, optimiser, train, validate, [*callbacks, KeepBest("score", patience)])


@pytest.mark.parametrize("first", [True, False], ids=["before KeepBest", "after it"])
def test_a_click_ends_the_training_after_the_epoch_and_keeps_the_best(first):
    watcher = Clicked("Toy", TITLES)
    watcher.at = 4
    loop = loop_of([0.1, 0.5, 0.2, 0.3] + [0.9] * 20, *[watcher] * first)
    loop.callbacks += [watcher] * (not first)
    assert len(loop.run(24)) == 4 and loop.module.weight.item() == 2
    assert how_it_ended(loop) == "stopped by hand at epoch 4, best 2"


def test_a_click_ends_an_epoch_in_the_middle(tmp_path):
    seen = []

    def train_epoch(epoch):
        for batch in loop.steps(range(50)):
            seen.append((epoch, batch))
            if (epoch, batch) == (3, 11):
                watcher.stop.click()
        return {"loss": 1.0}

    watcher = Monitor("Toy", TITLES)
    loop = loop_of([0.1, 0.5, 0.2], watcher, Checkpoint(tmp_path / "c.pt"), train_epoch=train_epoch)
    history = loop.run(3)
    assert seen[-1] == (3, 11) and len(seen) == 112 and history.steps.tolist()[2] == 12 and history.score.tolist()[2] == 0.2
    assert how_it_ended(loop) == "stopped by hand at epoch 3, step 12, best 2" and loop.module.weight.item() == 2
    again = loop_of([0.1, 0.5, 0.2], Progress("Toy", TITLES), Checkpoint(tmp_path / "c.pt"))
    assert again.run(3).equals(history) and how_it_ended(again) == how_it_ended(loop)


def test_the_time_to_go_is_told_once_an_epoch_was_timed():
    loop = SimpleNamespace(history=[{"epoch": n} for n in range(1, 6)], epochs=10, callbacks=[], asked=False)
    assert monitor.words(loop, "Toy", 0.0, 1.0, False).endswith("epoch 5 of 10, 1 s so far.")
    assert "; 10 s to go." in monitor.words(loop, "Toy", 2.0, 1.0, False)


def test_a_click_in_the_last_epoch_is_no_stop():
    watcher = Clicked("Toy", TITLES)
    watcher.at = 3
    loop = loop_of([0.1, 0.2, 0.3], watcher)
    loop.run(3)
    assert how_it_ended(loop) == "ran all 3 epochs, best 3"


@pytest.mark.parametrize("every", [1, 3])
def test_patience_is_foreseen_as_it_comes(every):
    draw = random.Random(0)
    for _ in range(50):
        scores = [round(draw.random(), 1) if n % every == 0 else None for n in range(1, 61)]
        loop = loop_of(scores, patience=draw.randint(1, 6))
        n = len(loop.run(60))
        keep = loop.callbacks[0]
        best = keep.state["epoch"]
        assert all(patience_ends(loop.history[:seen], keep, 60) == n for seen in range(best, n + 1))
        assert all(patience_ends(loop.history[:seen], keep, 60) <= n for seen in range(every, best))


def test_a_stop_by_hand_survives_the_process(tmp_path):
    def once_more(*callbacks):
        loop = loop_of([0.1, 0.3, 0.2, 0.9], *callbacks)
        loop.callbacks += [Checkpoint(tmp_path / "c.pt", seconds=1000)]
        return loop.run(4), how_it_ended(loop)

    first, ended = once_more(Clicked("Toy", TITLES))
    again, still = once_more(Progress("Toy", TITLES))  # say, in a terminal
    assert again.equals(first) and len(again) == 2
    assert still == ended == "stopped by hand at epoch 2, best 2"


class Places:
    "Stands for what IPython shows: `shown` in the end, and all that was shown."

    def __init__(self):
        self.shown = []

    def __call__(self, thing, display_id):
        self.shown.append(thing)
        return Mock(update=self.shown.append)


@pytest.fixture
def places(monkeypatch):
    monkeypatch.setattr("IPython.display.display", places := Places())
    return places


@pytest.mark.parametrize("error, words", [(KeyboardInterrupt, "interrupted during epoch 3"),
                                          (ValueError, "failed in epoch 3")])
def test_what_ends_otherwise_leaves_a_picture_too(places, error, words):
    def train_epoch(epoch):
        if epoch == 3:
            raise error
        return {"loss": 1.0}

    watcher = Monitor("Toy", TITLES)
    with pytest.raises(Stopped if error is KeyboardInterrupt else error):
        loop_of([0.1] * 9, watcher, train_epoch=train_epoch).run(9)
    assert len(places.shown) == 2 and repr(places.shown[-1]) == f"Toy, {words}"
    assert words in places.shown[-1]._repr_svg_() and watcher.stop.disabled


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_a_training_that_is_over_is_let_go(error):
    "ipywidgets keeps open widgets as long as the kernel lives; the model and the optimiser are not to stay with them."
    def train_epoch(epoch):
        if epoch == 2 and error:
            raise error
        return {"loss": 1.0}

    def over():
        loop = loop_of([0.1, 0.2, 0.3], watcher, train_epoch=train_epoch)
        with suppress(Stopped, ValueError):
            loop.run(3)
        return weakref.ref(loop), weakref.ref(loop.module)

    watcher = Monitor("Toy", TITLES)
    gone = over()
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    watcher.stop.click()  # a front end may keep a click until the cell is done


def test_an_error_before_the_first_epoch_is_the_one_that_is_seen():
    class Fails(Callback):
        def before(self, loop):
            raise ValueError("at once")

    for watcher in Monitor("Toy", TITLES), Progress("Toy", TITLES):
        with pytest.raises(ValueError, match="at once"):
            loop_of([1], Fails(), watcher).run(1)


@pytest.mark.parametrize("ended", ["stopped", "stopped by hand at epoch 1234, step 13, best 1200"])
def test_the_curve_of_a_summary_begins_after_its_words(ended):
    loop = loop_of([0.1, 0.2])
    loop.history = [{"epoch": n, "loss": n, "score": n} for n in (1, 2)]
    tree = ElementTree.fromstring(summary(loop, "name", TITLES, ended, 1.0))
    words = next(e for e in tree.iter() if e.text == ended)
    line = next(e for e in tree.iter() if e.tag.endswith("polyline"))
    first = float(line.get("points").split(",")[0])
    assert first > float(words.get("x")) + 7.5 * len(ended) and first < float(tree.get("width"))


def test_pictures_are_whole_whatever_there_is_to_show():
    for scores in ([], [None, None], [0.5], [0.2, 0.2], [0.1, float("-inf"), 0.3], [0.1] * 5000):
        loop = loop_of(scores or [1])
        loop.epochs, loop.history = 9000, []
        for n, score in enumerate(scores, 1):
            loop.history.append({"epoch": n, "loss": 1 / n} | ({} if score is None else {"score": score}))
        pictures = curves(loop, TITLES | {"other": "<b>&"}), summary(loop, "a <b> & c" * 9, TITLES, "ended", 1.0)
        for picture in pictures:
            ElementTree.fromstring(picture)
            assert len(picture) < 20_000 and "nan" not in picture and "<b>" not in picture


def test_the_bar_stays_where_nobody_looks(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    lab = Mock(get_parent=lambda: {"metadata": {"cellId": "1", "deletedCells": [], "recordTiming": False}})
    for shell, kind in ((None, Progress), (Mock(get_parent=lambda: {"metadata": {}}), Progress), (lab, Monitor)):
        monkeypatch.setattr(monitor, "shell", lambda shell=shell: shell)
        assert type(watch("Toy", TITLES)) is kind
    monkeypatch.setattr(monitor, "rank", lambda: 1)
    assert type(watch("Toy", TITLES)) is Progress
    monkeypatch.setattr(monitor, "rank", lambda: 0)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert type(watch("Toy", TITLES)) is Progress


@pytest.fixture
def small(tmp_path, monkeypatch, runs):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    make_shop(tmp_path / "shop")


STAGE1 = dict(backbone="vbpr", epochs=30, n_seeds=1, device="cpu")


def test_watching_changes_no_number(small, monkeypatch):
    plain, = run_stage1("shop", **STAGE1)
    before = {p.name: p.read_bytes() for p in plain.folder.glob("*.safetensors")}
    monkeypatch.setattr(stage1, "watch", Monitor)
    watched, = run_stage1("shop", **STAGE1, rerun=True)
    assert watched.key == plain.key and watched.ended == {"Stage 1": plain.ended["Stage 1"]}
    assert {p.name: p.read_bytes() for p in watched.folder.glob("*.safetensors")} == before
    assert "by hand" not in repr(watched) and stopped_by_hand([watched]) == ""


def test_a_run_stopped_by_hand_is_finished_and_says_so(small, monkeypatch, capsys):
    whole, = run_stage1("shop", **STAGE1)
    history = whole.load_table("history.csv")
    monkeypatch.setattr(stage1, "watch", Clicked)
    run, = run_stage1("shop", **STAGE1, rerun=True)
    best = 1 + int(history["valid recall@20"][1] > history["valid recall@20"][0])
    words = f"Stage 1 stopped by hand at epoch 2, best {best}"
    assert run.finished and run.load_table("history.csv").drop(columns="seconds").equals(
        history[:2].drop(columns="seconds"))
    assert json.loads((run.folder / "run.json").read_text())["ended"] == {"Stage 1": words.removeprefix("Stage 1 ")}
    assert f": finished, {words}, " in repr(run) and words in repr(open_run(run.key)) and words in run._repr_html_()
    assert list_runs().by_hand.tolist() == [words] and list_runs().state.tolist() == ["finished"]
    assert stopped_by_hand([run]) == f"vbpr, seed 0: {words}."
    capsys.readouterr()
    run_stage1("shop", **STAGE1)
    assert f"the finished run {run.key} is used again ({words}; rerun=True makes it anew)." in capsys.readouterr().out
    monkeypatch.setattr(stage1, "watch", Progress)
    anew, = run_stage1("shop", **STAGE1, rerun=True)
    assert anew.by_hand == "" and len(anew.load_table("history.csv")) == len(history)


def test_a_second_round_and_a_grid_say_that_stage_1_was_stopped_by_hand(small, monkeypatch, recwarn):
    with monkeypatch.context() as patch:
        patch.setattr(stage1, "watch", Clicked)
        run_stage1("shop", **STAGE1)
    again, = run_stage1("shop", **STAGE1, rounds=2)
    assert again.by_hand.startswith("Stage 1 stopped by hand at epoch 2") and "Stage 1, round 2" in again.ended
    how = {"dataset": "shop"} | {k: v for k, v in STAGE1.items() if k != "n_seeds"}
    recwarn.clear()
    table = grid("04_stage1", how, {}, [0], papermill=False)
    assert table.reused.all() and table.by_hand[0].startswith("Stage 1 stopped by hand")
    assert "Runs of this grid were stopped by hand, and may fall short; run_stage1 or run_stage2 with these settings and " \
           f"rerun=True makes them anew:\nvbpr, seed 0: {table.by_hand[0]}." in [str(w.message) for w in recwarn]
    with pytest.raises(SettingError, match="A grid sets rerun itself"):
        grid("04_stage1", how | {"rerun": True}, {}, [0], papermill=False)
    anew, = run_stage1(**how, n_seeds=1, rerun=True)  # as the warning says
    assert anew.by_hand == "" and not grid("04_stage1", how, {}, [0], papermill=False).by_hand[0]


def test_every_training_of_stage_2_is_named(small, monkeypatch):
    how = SHORT | dict(dataset="shop", backbone="vbpr", epochs=30, stage2_epochs=9, validate_every=5)
    for module in stage1, stage2:
        monkeypatch.setattr(module, "watch", Clicked)
    runs, controls = run_stage2(**how), controls_of(how)
    run, = runs
    assert list(run.ended) == ["Stage 1", "Stage 2", "continued", "fresh"] and run.by_hand.count("by hand at epoch 2") == 4
    assert run.load_table("history.csv")["valid recall@20"].notna().tolist() == [False, True]  # the last one is validated
    assert "Stage 2 stopped by hand at epoch 2, step 1, best 2" in run.by_hand  # of five
    assert run.load_table("history.csv").steps.tolist()[1] == 1
    text = report(runs, controls)
    assert f"vbpr + prompt, seed 0: {run.by_hand}." in text and "vbpr + none, seed 0: Stage 1 stopped by hand" in text


def test_a_stage_2_killed_after_a_stop_by_hand_goes_on_with_what_is_left(small, monkeypatch):
    how = SHORT | dict(dataset="shop", backbone="vbpr", epochs=30, stage2_epochs=9)
    def only_continued(name, shown):
        return (Clicked if name.startswith("continued") else Monitor)(name, shown)

    with monkeypatch.context() as patch:
        patch.setattr(stage2, "watch", Clicked)
        patch.setattr(stage1, "watch", only_continued)
        patch.setattr(stage2, "new_backbone", lambda *args: 1 / 0)  # of 'fresh'
        with pytest.raises(ZeroDivisionError):
            run_stage2(**how)
    run, = run_stage2(**how)
    assert {name: "by hand at epoch 2" in words for name, words in run.ended.items()} == {
        "Stage 1": False, "Stage 2": True, "continued": True, "fresh": False}


def test_a_search_says_which_trial_was_stopped_by_hand(small, monkeypatch):
    how = dict(grid={"lr": [1e-3, 1e-2]}, epochs=5, device="cpu")
    table, _ = search("bpr", "shop", **how)
    assert "by_hand" not in table
    with monkeypatch.context() as patch:
        patch.setattr(stage1, "watch", Clicked)
        table, winners = search("bpr", "shop", **how, batch_size=64)
    assert table.by_hand.str.startswith("Stage 1 stopped by hand at epoch 2").all() and (table.epochs == 2).all()
    assert winners[0].by_hand
