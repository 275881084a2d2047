"""Hours in one process: hundreds of epochs and dozens of evaluations leave memory and open files as they were."""
import psutil
import pytest
from small import SHORT, make_shop

from ptmrec.settings import resolve
from ptmrec.stage1 import evaluate, load_backbone, load_inputs, make_evaluator, run_stage1
from ptmrec.stage2 import run_stage2
from ptmrec.training import Callback


class Gauge(Callback):
    "Notes MB in memory and open files after each epoch."

    def __init__(self):
        self.mb, self.files = [], []

    def after_epoch(self, loop=None):
        process = psutil.Process()
        self.mb.append(process.memory_info().rss / 1e6), self.files.append(process.num_fds())

    def check(self, what):
        "Nothing has grown since the first third."
        warm = len(self.mb) // 3
        before, after = self.mb[warm], self.mb[-1]
        print(f"{len(self.mb)} {what}: {before:.1f} MB after {warm}, {after:.1f} MB in the end ({after / before - 1:+.2%}), "
              f"{self.files[warm]} and {self.files[-1]} open files")
        assert after <= 1.03 * before and self.files[-1] <= self.files[warm]


@pytest.mark.parametrize("epochs, evaluations", [(12, 6), pytest.param(200, 50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dataset", ["shop", pytest.param("sample", marks=pytest.mark.slow)])
def test_memory_and_open_files_stay(tmp_path, monkeypatch, runs, dataset, epochs, evaluations):
    "Both stages, with a checkpoint and a validation in each epoch of Stage 2; then evaluations on test."
    if dataset == "shop":
        monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
        make_shop(tmp_path / "shop")
    first, second, tests = Gauge(), Gauge(), Gauge()
    with monkeypatch.context() as patch:
        patch.setattr("ptmrec.stage1.watch", lambda *args: first)
        given = {"dataset": dataset, "backbone": "freedom", "knn_k": 5, "epochs": epochs, "patience": epochs, "n_seeds": 1}
        run, = run_stage1(**given)
    monkeypatch.setattr("ptmrec.stage2.watch", lambda *args: second)
    run_stage2(**SHORT | given | {"stage2_epochs": epochs, "stage2_batch_size": 128})
    settings = resolve(run_stage1.experiment, given)
    inputs = load_inputs(settings)
    backbone, evaluator = load_backbone(run, settings, inputs), make_evaluator(settings, inputs)
    for _ in range(evaluations):
        evaluate(backbone, evaluator, "test")
        tests.after_epoch()
    assert [len(g.mb) for g in (first, second, tests)] == [epochs, epochs, evaluations]
    first.check("epochs of Stage 1"), second.check("epochs of Stage 2"), tests.check("evaluations")
