"""Every measuring function runs on a miniature and has the columns of its stored table. No time is asserted."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from small import TEXT, VISION

from ptmrec import benchmarks
from ptmrec.backbones import BACKBONES, FREEDOM, LightGCN
from ptmrec.benchmarks import (
    VERSIONS,
    AllRowsFREEDOM,
    AllRowsLightGCN,
    PlainFREEDOM,
    alternate,
    clever_row,
    compare_horner,
    compare_kept,
    compare_rows,
    compare_step,
    draw_features,
    draw_interactions,
    drawn_backbone,
    large_steps,
    measure_data,
    measure_fresh,
    plain_evaluation,
    propagation_and_ranking,
    results_path,
    stage1_epochs,
    training_step,
)
from ptmrec.ranking import Evaluator
from ptmrec.tuning_cost import tuning_cost, write_items

SIZE = dict(users=60, items=80, pairs=500)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before():
    "Measuring in this process leaves the number of threads as it was."
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def stored(name, *added):
    "Columns of a stored table, less those that the notebook adds."
    return set(pd.read_csv(results_path(name)).columns) - set(added)


def columns(rows):
    return set(pd.DataFrame(rows).columns)


def test_data_steps():
    table = measure_data(3_000, 150, "csv")
    assert columns(table) == stored("data_scale")
    known = pd.read_csv(results_path("data_scale")).step.unique()
    assert set(known) <= set(table.step) and (table.rows_kept <= table.rows).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_stage1_epochs(backbone):
    rows = stage1_epochs(**SIZE, backbone=backbone, dims={"image": 8, "text": 8}, epochs=1, device="cpu")
    assert columns(rows) == stored("stage1_speed", "data", "date") == stored("stage1_growth", "varied", "value", "date")
    assert {row["phase"] for row in rows} == set(pd.read_csv(results_path("stage1_speed")).phase)
    assert {row["epoch"] for row in rows} == {0, 1}


def test_settings_reach_the_backbone():
    for plain in (False, True):
        rows = stage1_epochs(**SIZE, dims={"text": 8}, plain=plain, train_features=True, epochs=1, knn_k=3, device="cpu")
        assert {row["version"] for row in rows} == {"plain" if plain else "ours"} and rows[0]["train_features"]
    backbone = drawn_backbone("freedom", draw_interactions(**SIZE), draw_features(80, {"text": 8}, CPU), CPU, knn_k=3)
    assert backbone.item_graph.csr.values().numel() == 3 * 80


@pytest.mark.parametrize("train_features", [False, True])
def test_plain_freedom_equals_ours_in_loss_gradient_and_ranking(train_features):
    torch.manual_seed(0)
    inter = draw_interactions(**SIZE)
    features = draw_features(80, {"image": 8, "text": 8}, CPU)
    ours = drawn_backbone("freedom", inter, features, CPU, train_features)
    plain, results = PlainFREEDOM(ours, features), []
    batch = ours.user[:100], ours.item[:100], torch.randint(80, (100,))
    for model in (plain, ours):
        torch.manual_seed(1)  # the same edges
        ours.zero_grad()
        model.train().start_epoch()
        terms = model.loss(*batch)
        sum(terms.values()).backward()
        gradients = {n: q.grad.clone() for n, q in ours.named_parameters()}
        results.append(({k: v.item() for k, v in terms.items()}, gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1].keys() == results[1][1].keys() >= {"user_emb", "item_emb"}
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], atol=1e-6), name
    plain.adjacency = PlainFREEDOM(ours, features).adjacency  # all edges again
    evaluator = Evaluator(inter)
    with torch.no_grad():
        found, _ = evaluator("test", *ours.eval()())
        pd.testing.assert_frame_equal(plain_evaluation(plain, evaluator, "test"), found.reset_index(drop=True))


def test_bounds_launches_and_large_data():
    rows = propagation_and_ranking({"miniature": list(SIZE.values())}, 8, copied=1000, multiplied=32, device="cpu")
    assert columns(rows) == stored("stage1_bounds", "date") and len(rows) == 3
    rows = [training_step(version, **SIZE, device="cpu") for version in VERSIONS[:2]]
    assert columns(rows) == stored("stage1_launch", "data", "date")
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)
    rows = [row for backbone in ("bpr", "lightgcn", "freedom")
            for row in large_steps(backbone, **SIZE, dim=8, batches=[32, 64], device="cpu")]
    assert columns(rows) == stored("stage1_large", "cpus", "date")
    assert next(row["seconds"] for row in rows if row["what"] == "recall of the item graph") == 1


@pytest.mark.parametrize("compare", [compare_horner, compare_rows])
def test_clever_against_plain(compare):
    turns = compare(SIZE, times=2, device="cpu")
    assert len(turns) == 2 and columns(turns) == {"plain", "clever"}
    assert clever_row("a", "b", turns).keys() == stored("clever", "device", "date")


@pytest.mark.parametrize("backbone", ["lightgcn", "freedom"])
def test_clever_steps_against_plain(backbone):
    turns = compare_step(SIZE, backbone, times=2, batch_size=8, device="cpu")
    assert len(turns) == 2 and columns(turns) == {"plain", "clever"}


@pytest.mark.parametrize(("ours", "all_rows"), [(LightGCN, AllRowsLightGCN), (FREEDOM, AllRowsFREEDOM)])
def test_all_rows_change_no_loss_and_no_gradient(ours, all_rows):
    inter, features, found = draw_interactions(**SIZE), draw_features(80, {"text": 8}, CPU), []
    for cls in (ours, all_rows):
        torch.manual_seed(0)
        model = drawn_backbone(cls, inter, features, CPU)
        terms = model.loss(model.user[:9], model.item[:9], torch.arange(9))
        sum(terms.values()).backward()
        found.append((terms["bpr"].item(), model.user_emb.grad, model.item_emb.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6) and torch.allclose(found[0][2], found[1][2], atol=1e-6)


def test_clever_against_plain_in_fresh_processes(monkeypatch):
    asked = []
    monkeypatch.setattr(benchmarks, "measure_fresh", lambda name, **arguments: asked.append(arguments) or getattr(
        benchmarks, name)(**arguments | {"keep": False}))
    turns = compare_kept(SIZE, times=1, epochs=1, dim=8, device="cpu")
    assert columns(turns) == {"plain", "clever"} and [a["keep"] for a in asked] == [True, False]


def test_turns_change_their_order_and_a_row_has_medians():
    seconds = {"plain": iter([9, 1, 2, 30]), "clever": iter([9, 1, 1, 2])}
    order = []
    turns = alternate({name: lambda name=name: order.append(name) or next(seconds[name]) for name in seconds}, 3)
    assert order == ["plain", "clever"] + ["clever", "plain"] + ["plain", "clever"] + ["clever", "plain"]
    row = clever_row("a", "b", turns)
    assert row["plain seconds"] == 2 and row["clever seconds"] == 1 and row["ratio"] == 2 and row["turns"] == 3


@pytest.fixture
def tiny_task(tmp_path):
    "Arguments of `tuning_cost`: a CLIP and data that take a moment."
    write_items(tmp_path, n=8, side=40)
    clip = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT | {"context_length": 77, "vocab_size": 49408}}
    return dict(folder=str(tmp_path), clip=clip, shape=[50, 20, 200], items=8, steps=1, device="cpu")


def test_tuning_cost_in_a_fresh_process(tiny_task):
    row = measure_fresh("tuning_cost.tuning_cost", **tiny_task, memory=True)
    assert stored("tuning_speed", "recipe", "date") <= row.keys() >= stored("tuning_memory", "method")
    assert stored("tuning_methods", "method", "date") <= row.keys() | row["parameters"].keys()
    assert row["encodings per epoch"] == 20


def test_tuning_options_change_no_loss(tiny_task):
    task = tiny_task | {"batch_by": "interactions",
                        "settings": {"prompt_position": "last", "prompt_depth": 1}}
    expected = tuning_cost(**task)
    options = {"distinct": False, "cut_texts": False, "image_map": False, "cache_prefix": True, "micro_batch": 3}
    for option, value in options.items():
        row = tuning_cost(**task | {option: value})
        for what in ("loss", "squared gradient"):
            assert np.isclose(row[what], expected[what], rtol=1e-3), (option, what)
        if option == "distinct":
            assert row["encodings per epoch"] == 200 > expected["encodings per epoch"]


def test_the_error_of_a_measurement_is_shown():
    with pytest.raises(RuntimeError, match="The measurement stage1_epochs failed:\n(.|\n)*no_such_setting"):
        measure_fresh("stage1_epochs", **SIZE, no_such_setting=1)


def test_on_the_command_line(monkeypatch, capsys):
    arguments = json.dumps(SIZE | {"version": VERSIONS[0], "device": "cpu"})
    monkeypatch.setattr("sys.argv", ["benchmarks", "training_step", "--json", arguments])
    benchmarks.main()
    assert json.loads(capsys.readouterr().out)["version"] == VERSIONS[0]
    monkeypatch.setattr("sys.argv", ["benchmarks", "no_such_function"])
    with pytest.raises(AttributeError, match="no_such_function"):
        benchmarks.main()
