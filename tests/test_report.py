"""Reports, stored tables, and the derived data of studies: what is wrong is said, and nothing old passes for new."""
import inspect
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from small import make_shop

import ptmrec.derived as derived
import ptmrec.report as report
import ptmrec.sources as sources
import ptmrec.stored_studies as stored_studies
from ptmrec.ablations import result_values
from ptmrec.data import DataError, find_dataset, load_data
from ptmrec.derived import derive, random_features, thinned, without, write_data
from ptmrec.settings import SettingError
from ptmrec.significance import comparisons, in_words, save_result
from ptmrec.stored_studies import TABLES, store_studies, verdict


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shop"
    make_shop(folder)
    return str(folder)


# ---------------------------------------------------------------- the report


@pytest.fixture
def earlier(runs):
    "A report of an earlier call."
    path = runs / "paper" / "shop" / "report.md"
    path.parent.mkdir(parents=True)
    path.write_text("earlier")
    return path


@pytest.mark.parametrize("arguments, message", [
    (["--metric", "recal@10"], "metric='recal@10'"), (["--n_seeds", "0"], "n_seeds=0 is not allowed"),
    (["--budget", "0"], "budget=0 is not allowed"), (["--budget", "13"], "budget=13 is more than the 12 cells"),
    (["--base", '{"bakbone": "vbpr"}'], "bakbone"), (["--base", '{"device": "gpu"}'], "device='gpu'"),
    (["--at_once", "0"], "at_once=0 is not allowed"), (["--base", '{"seed": 1}'], "base sets seed"),
    (["--studies", "all", "promts"], "'promts' is no study. Did you mean prompts"),
    (["--studies", "yardsticks", "long_tail", "--metric", "recall@50"], "metric='recall@50'"),
    (["--base", '{"n_ctx": -1}'], "n_ctx=-1"), (["--base", '{"epochs": "x"}'], "epochs='x'")])
def test_wrong_arguments_end_a_report_before_anything_is_made(shop, earlier, monkeypatch, arguments, message):
    monkeypatch.setattr(report, "run_study", None)
    with pytest.raises(SystemExit) as stop:
        report.main([shop, *arguments])
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert earlier.read_text() == "earlier" and [path.name for path in earlier.parents[2].iterdir()] == ["paper"]


def test_one_name_is_a_list_of_one_and_no_name_is_refused(monkeypatch):
    asked = []
    monkeypatch.setattr(report, "check_report", lambda settings, studies, *_: asked.append((*settings, *studies)))
    monkeypatch.setattr(report, "own_names", lambda settings: sys.exit("asked"))
    for names in (("sample", "yardsticks"), (["sample"], ["yardsticks"])):
        with pytest.raises(SystemExit, match="asked"):
            report.paper(*names)
    assert asked == [("sample", "yardsticks")] * 2
    monkeypatch.undo()
    with pytest.raises(SettingError, match="No data set is named. Name at least one, as sample"):
        report.paper([])


@pytest.mark.parametrize("base", ["[1]", "{", "3"])
def test_settings_that_are_no_json_object_are_said(base, capsys):
    with pytest.raises(SystemExit):
        report.main(["sample", "--base", base])
    assert f'{base} is not allowed. Give settings in JSON, as {{"backbone": "vbpr"}}' in capsys.readouterr().err


def test_all_studies_are_all_but_the_long_ones_and_say_so(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(report, "check_report", lambda settings, studies, *_: asked.extend(studies))
    monkeypatch.setattr(report, "own_names", lambda settings: sys.exit("asked"))
    with pytest.raises(SystemExit, match="asked"):
        report.main(["sample", "--studies", "all"])
    assert set(asked) == set(report.STUDIES) - {"joint_training"}
    assert "Left out: joint_training, which takes longest." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="asked"):
        report.paper(["sample"], ["all", "joint_training"])
    assert set(asked) == set(report.STUDIES) and "Left out" not in capsys.readouterr().out


def test_a_report_without_a_study_keeps_the_earlier_one(shop, earlier, monkeypatch, capsys):
    def run_study(*_, **__):
        raise DataError("The weights are not here.")

    monkeypatch.setattr(report, "run_study", run_study)
    with pytest.raises(SystemExit, match="There is nothing to report. `generative` was not run: The weights are not here."):
        report.main([shop, "--studies", "generative", "prompts"])
    assert earlier.read_text() == "earlier" and "`prompts` was not run: The weights are not here." in capsys.readouterr().out


def test_ctrl_c_ends_a_report_with_one_line(monkeypatch, capsys):
    def paper(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "paper", paper)
    monkeypatch.setattr("ptmrec.training._leave", sys.exit)
    with pytest.raises(SystemExit) as stop:
        report.main([])
    assert stop.value.code == 130 and capsys.readouterr().err == "Stopped.\n"


def test_a_report_prepares_a_public_set(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path / "data"))
    asked = []

    def prepare(name):
        make_shop(tmp_path / "data" / name)
        return find_dataset(name)

    def run_study(study, dataset, *_, **__):
        asked.append(load_data(dataset).name)
        raise DataError("enough")

    monkeypatch.setattr(sources, "find_or_prepare_amazon", prepare)
    monkeypatch.setattr(report, "run_study", run_study)
    with pytest.raises(DataError, match="enough"):
        report.paper(["baby"], ["yardsticks"])
    assert asked == ["baby"]


def test_two_folders_of_one_name_are_refused(shop, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "run_study", None)
    shutil.copytree(shop, tmp_path / "b" / "shop")
    with pytest.raises(SettingError, match="Two of the data sets are folders named 'shop'"):
        report.paper([shop, tmp_path / "b" / "shop"], ["yardsticks"])
    assert not runs.exists()


def stub_run(encoder="a fingerprint", arguments=None, **params):
    "A run as far as a report is about it."
    return SimpleNamespace(params=params, about={"encoder": encoder, "arguments": arguments or {}}, folder=None)


@pytest.fixture
def opened(monkeypatch):
    "Runs that are made up have versions."
    monkeypatch.setattr(report, "open_run", lambda folder: SimpleNamespace(about={"versions": {"torch": "2"}}))


def about(shop, *runs):
    how = {"n_seeds": 1, "budget": 6, "sampler": "random", "metric": "ndcg@20"}
    return report._about("shop", runs, (shop, {"core": 7}), **how).content.value


def test_a_report_is_about_the_data_and_the_device_of_the_runs(shop, opened):
    told = about(shop, stub_run(None), stub_run(None, device="cuda"))
    assert told["data set"] == f"shop, {load_data(shop, core=7).fingerprint()}" and told["device"] == "cuda"
    assert told["compared by"] == "test NDCG@20"


def test_a_report_names_the_clips_that_were_used_and_no_other(shop, opened):
    tiny, vit = ({"clip_model": model, "pretrained": weights} for model, weights in (("tiny", "sample"), ("ViT-B-32", "x")))
    ready_made, popular = stub_run(None, tiny, **tiny), stub_run(None, tiny)
    assert about(shop, ready_made, popular)["CLIP"] == "none"
    feature_knn = stub_run(arguments=vit)  # a yardstick has its CLIP as an argument alone
    assert about(shop, ready_made, feature_knn)["CLIP"] == "ViT-B-32, x"
    packaged, coca = (stub_run(clip_model=model, pretrained="sample") for model in ("minilm-efficientnet", "tiny_coca"))
    assert about(shop, feature_knn, packaged, coca)["CLIP"] == (
        "ViT-B-32, x; minilm-efficientnet; tiny_coca, of the sample: it has seen drawings alone")


@pytest.fixture
def stub_studies(monkeypatch, opened, runs):
    "A report whose studies are made up: {study: its CLIP}; those without one fail. Returns what each has written so far."
    clips, written = {}, []

    def run_study(name, *_, **__):
        if name not in clips:
            raise DataError("The weights are not here.")
        row = SimpleNamespace(runs=[stub_run(clip_model=clips[name], pretrained="x")])
        return SimpleNamespace(rows={name: row})

    def write(blocks, folder):
        written.append("\n".join(report.as_markdown(block, folder) for block in blocks))
        return write_report(blocks, folder)

    write_report = report.write_report
    monkeypatch.setattr(report, "run_study", run_study)
    monkeypatch.setattr(report, "write_result", lambda *_: pd.DataFrame({"p": [0.5]}, ["a row"]))
    monkeypatch.setattr(report, "study_blocks", lambda name, *_: [report.Block("text", f"The study {name}.")])
    monkeypatch.setattr(report, "beside_the_paper", lambda *_: [])
    monkeypatch.setattr(report, "write_report", write)
    return clips, written


def test_a_report_is_about_the_runs_of_all_its_studies(shop, stub_studies, capsys):
    clips, written = stub_studies
    clips |= {"yardsticks": "A", "generative": "B"}
    folder = report.paper([shop], ["prompts", "yardsticks", "generative"])
    first, _, last = written
    assert "| CLIP | A, x |" in first and "| CLIP | A, x; B, x |" in last and last.count("| CLIP |") == 1
    assert (folder / "report.md").read_text() == last
    places = [last.index(text) for text in ("## shop", "| made with |", "`prompts` was not run", "study yardsticks.",
                                            "study generative.", "## What differs")]
    assert places == sorted(places)


@pytest.mark.parametrize("changed", [
    {"metric": "ndcg@20"}, {"n_seeds": 1}, {"budget": 12}, {"sampler": "optuna"}, {"base": {"epochs": 3}},
    {"studies": ["yardsticks", "methods"]}])
def test_a_report_of_other_settings_keeps_the_earlier_one(shop, earlier, stub_studies, changed):
    stub_studies[0].update(dict.fromkeys(report.FIRST, "A"))
    other = report.paper([shop], **changed)
    assert other != earlier.parent and other.name.startswith("shop+") and earlier.read_text() == "earlier"
    assert report.paper([shop], **changed) == other
    assert report.paper([shop], base={}) == earlier.parent and earlier.read_text() != "earlier"  # the defaults


def test_the_name_of_a_report_is_of_the_settings_that_count(stub_studies, monkeypatch):
    monkeypatch.setattr(report, "_about", lambda *_: report.Block("text", "made"))
    stub_studies[0].update(dict.fromkeys(report.FIRST, "A"))
    short, long, other, turned, one = (report.paper(["sample"], base=base).name for base in (
        None, {}, {"epochs": 3, "lr": 0.1}, {"lr": 0.1, "epochs": 3}, {"epochs": 3}))
    assert short == "sample" and other == turned and len({short, long, other, one}) == 4
    assert report.paper([str(find_dataset("sample"))]).name == long  # its folder has no short trainings
    parameters = inspect.signature(report.paper).parameters
    assert {name: parameters[name].default for name in report.DEFAULTS} == report.DEFAULTS


def test_claims_without_their_rows_are_a_dash(monkeypatch):
    monkeypatch.setattr(report, "cost_table", lambda result: pd.DataFrame({"seconds": [], "tuned parameters in CLIP": []}))
    result = SimpleNamespace(rows={"transfer alone": None})
    studies = dict.fromkeys(("yardsticks", "methods", "knowledge_transfer", "main_table"), result)
    ours = [report.beside_the_paper(name, studies).ours for name in ("baby", "sports")]
    assert [len(column) for column in ours] == [5, 2] and all(column.str.endswith("-").all() for column in ours)


def test_the_gain_of_two_stages_is_of_the_backbones():
    values = {"VBPR": 0.11, "FREEDOM": 0.13, "EASE": 9.0}
    rows = {name: SimpleNamespace(values=lambda m, v=None, x=value: [0.1 if v else x]) for name, value in values.items()}
    assert report._two_stages(SimpleNamespace(rows=rows)) == "+20.0% on this data set"


@pytest.mark.parametrize("bold", [True, False])
def test_a_report_explains_bold_only_where_there_is_some(tmp_path, monkeypatch, bold):
    save_result(tmp_path / "result", {"a": {"R": [0.1]}, "b": {"R": [0.2]}}, bold=bold)
    monkeypatch.setattr(report, "plot_study", lambda *_: report.plt.figure())
    monkeypatch.setattr(report, "verdicts", lambda *_: "cannot tell")
    monkeypatch.setattr(report, "cost_table", lambda _: pd.DataFrame())
    result = SimpleNamespace(rows={"a": SimpleNamespace(runs=[0])}, study=SimpleNamespace(question="Q?", tuned=False),
                             folder=tmp_path, failed=pd.DataFrame)
    text = report.study_blocks("mine", result, None, tmp_path, "recall@10")[2].content
    assert ("bold" in text) == bold and text.endswith("a star: p < 0.05 after Holm's correction.")


def test_pictures_are_linked_from_folders_with_spaces(tmp_path):
    linked = report.as_markdown(report.Block("figure", tmp_path / "my shop é" / "a (1).png"), tmp_path)
    assert linked == "![a (1)](my%20shop%20%C3%A9/a%20%281%29.png)\n"


# ---------------------------------------------------------------- stored tables


@pytest.fixture
def stored(monkeypatch, tmp_path):
    "Files of an earlier call, and a study whose runs are made up."
    for ending in TABLES:
        (tmp_path / f"studies{ending}.csv").write_text("earlier")
    failed = pd.DataFrame({"cell": ["LoRA", "LoRA", "full"], "seed": [0, 1, 0], "error": ["no room", "later", "nan"]})
    trials = pd.DataFrame({"method": ["LoRA"], "changes": ["{}"], "metric": ["recall@20"], "valid": [0.25], "seed": [0]})
    result = SimpleNamespace(study=SimpleNamespace(note=None, reference="full"), rows={}, trials=trials,
                             failed=lambda: failed)
    monkeypatch.setattr(stored_studies, "run_study", lambda *_, **__: result)
    monkeypatch.setattr(stored_studies, "SHOWN", ["recall@10"])
    monkeypatch.setattr(stored_studies, "study_values", lambda *_: pd.DataFrame({"value": [0.12345678, 1.0]}))
    monkeypatch.setattr(stored_studies, "compared", lambda *_: pd.DataFrame({"p": [1e-9]}, ["LoRA"]))
    costs = pd.DataFrame({"tuned parameters in CLIP": [4682432.0, np.nan], "seconds": [25.293604, 3.0]}, ["full", "none"])
    monkeypatch.setattr(stored_studies, "cost_table", lambda _: costs)
    return tmp_path / "studies"


def test_stored_tables_keep_whole_numbers_and_failures_are_said(stored, capsys):
    store_studies({"methods": ({}, range(3))}, stored, "sample")
    written = [stored.with_name(f"studies{ending}.csv").read_text().splitlines()[1:] for ending in TABLES]
    assert written == [["0.123457,recall@10,methods", "1,recall@10,methods"], ["LoRA,1e-09,full,methods"],
                       ["full,4682432,25.2936,methods", "none,,3,methods"], ["LoRA,{},recall@20,0.25,methods"]]
    said = capsys.readouterr().out
    assert "methods: LoRA failed in 2 of 3 runs. The first error: no room" in said and "full failed in 1 of 3 runs" in said


def test_stored_tables_are_left_alone_aloud_where_no_study_can_run(stored, monkeypatch, capsys):
    def run_study(*_, **__):
        raise DataError("no weights")

    monkeypatch.setattr(stored_studies, "run_study", run_study)
    with pytest.raises(DataError, match="None of the studies could run, for the reasons above; .*csv are as they were"):
        store_studies({"generative": ({}, [0])}, stored, "sample")
    assert "generative was not run: no weights" in capsys.readouterr().out
    assert all(stored.with_name(f"studies{ending}.csv").read_text() == "earlier" for ending in TABLES)


def test_a_table_of_comparisons_says_over_how_many_p_is_corrected(tmp_path, capsys, monkeypatch):
    users = np.random.default_rng(0).random((4, 30))
    pairs = {name: ([pd.Series(users[0])], [pd.Series(after)]) for name, after in zip("abc", users[1:])}
    seen = []
    monkeypatch.setattr(stored_studies, "display", seen.append)
    for n in (1, 3):
        tests = comparisons({name: pairs[name] for name in "abc"[:n]})
        assert tests.p_holm.min() == pytest.approx(n * tests.p.min()) or tests.p_holm.min() == 1
        stored_studies.show_tests(stored_studies.to_read(tests))
    assert [len(table) for table in seen] == [1, 3]
    one, three = capsys.readouterr().out.splitlines()
    assert "for the 1 comparison of this table" in one and "for the 3 comparisons of this table" in three


def test_a_gain_over_nothing_is_left_empty():
    tests = pd.DataFrame({"before": [0.0, 0.0, 0.2], "after": [0.1, 0.0, 0.21], "difference": 0.1, "low": 0.0, "high": 0.2,
                          "p_holm": 0.5, "smallest": 0.1, "seeds": 3}, ["from 0", "0 to 0", "a gain"])
    assert stored_studies.to_read(tests).gain.tolist() == ["", "", "+5.0%"]


@pytest.mark.parametrize("seeds, low, words", [(1, 0.001, ", in one run of each"), (1, -0.001, ", in one run of each"),
                                               (3, 0.001, ""), (3, -0.001, ", on these seeds")])
def test_a_verdict_on_one_seed_says_so_as_the_sentence_does(seeds, low, words):
    "Its interval is over users alone."
    row = pd.Series({"p_holm": 0.03, "difference": 0.01, "low": low, "high": 0.02, "smallest": 0.02, "seeds": seeds})
    assert verdict(row) == f"better{words}"
    worse = {"difference": -0.01, "low": -0.02, "high": -low}
    assert verdict(pd.Series(dict(row) | worse)) == f"worse{words}"
    sentence = in_words("a", dict(row) | {"before": 0.2, "after": 0.21, "users": 80}, "R", "b")
    assert sentence.split(" after Holm: ")[1].startswith(f"better{words}".replace(",", ""))
    assert verdict(pd.Series(dict(row) | {"p_holm": 0.5})) == "cannot tell (a gain of 0.0200 would show)"


@pytest.mark.parametrize("n", [1, 2])
def test_a_stored_figure_counts_its_seeds(tmp_path, monkeypatch, n):
    values = pd.DataFrame([{"row": "a", "kind": "not tuned", "value": 0.1, "half": 0.01, "metric": "recall@10",
                            "study": "yardsticks"}] * n)
    tests = pd.DataFrame([{"row": "a", "study": "yardsticks", "reference": "b"}])
    values.to_csv(tmp_path / "s.csv"), tests.to_csv(tmp_path / "s_tests.csv"), tests.to_csv(tmp_path / "s_costs.csv")
    titles = []
    monkeypatch.setattr(stored_studies, "plot_values", lambda values, title, *_: titles.append(title))
    monkeypatch.setattr(stored_studies, "show_tests", lambda _: None)
    monkeypatch.setattr(stored_studies, "to_read", lambda tests: tests)
    stored_studies.StoredStudies(tmp_path / "s", "shop").show("yardsticks")
    assert titles[0].endswith(["shop, 1 seed", "shop, 2 seeds"][n - 1])


# ---------------------------------------------------------------- words and tables


def test_few_users_are_not_called_equal():
    table = comparisons({name: ([pd.Series(a)], [pd.Series(b)]) for name, a, b in (
        ("differ", [0.1, 0.2], [0.3, 0.2]), ("equal", [0.1, 0.2], [0.1, 0.2]))})
    words = {name: in_words(name, row, "R", "S") for name, row in table.iterrows()}
    assert words["differ"].endswith("cannot tell with 2 users; they are too few.")
    assert words["equal"].endswith("all are equal.")
    assert verdict(table.loc["differ"]) == "cannot tell"


def test_a_result_says_which_seed_a_value_is_of(tmp_path):
    def row(*seeds):
        runs = [SimpleNamespace(params={} if seed is None else {"seed": seed}) for seed in seeds]
        return SimpleNamespace(runs=runs, tuned=False, items=None, values=lambda *_: [0.1] * len(runs))

    save_result(tmp_path / "result", result_values({"a": row(5, 6), "b": row(6), "EASE": row(None)}))
    lines = (tmp_path / "result.csv").read_text().splitlines()
    seeds = [line.split(",")[:4:2] for line in lines if "Recall@10" in line]
    assert seeds == [["a", "5"], ["a", "6"], ["b", "6"], ["EASE", ""]]
    assert "| b | **0.1000** |" in (tmp_path / "result.md").read_text()


# ---------------------------------------------------------------- derived data


def test_derived_data_follow_the_code_that_makes_them(shop, runs):
    def halve(data, n=1):
        return thinned(data, 0.5)

    first, other = derive(shop, halve), derive(shop, halve, n=-1)
    assert derive(shop, halve) == first and derive(shop, halve, n=1) != other

    def halve(data, n=1):
        return thinned(data, 0.1)

    again = derive(shop, halve)
    assert len(load_data(again).inter) == len(thinned(load_data(shop), 0.1).inter) < len(load_data(first).inter)
    for nameless in (lambda data: thinned(data, 0.9), partial(thinned, share=0.3)):
        with pytest.raises(SettingError, match="has no name of its own to keep its data set under. Give a function"):
            derive(shop, nameless)


def test_derived_data_follow_the_defaults_of_their_folder(shop, runs, tmp_path):
    shutil.copytree(shop, tmp_path / "shop")
    first = derive(tmp_path / "shop", thinned, share=0.5)
    (tmp_path / "shop" / "defaults.toml").write_text("lr = 0.01")
    again = derive(tmp_path / "shop", thinned, share=0.5)
    assert again != first and (again / "defaults.toml").read_text() == "lr = 0.01"


def test_derived_data_are_made_by_one_process_alone(shop, runs, tmp_path, monkeypatch):
    made = tmp_path / "made"  # a file: a list would count as changed code once it has something in it

    def slowly(*arguments):
        with made.open("a") as file:
            file.write("once ")
        time.sleep(0.3)
        return write_data(*arguments)

    monkeypatch.setattr(derived, "write_data", slowly)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: derive(shop, thinned, share=0.5), range(2)))
    assert folders[0] == folders[1] and made.read_text() == "once "


@pytest.mark.parametrize("ids, message", [(lambda ids: ids + 10**12, "ids go up to 1000000000036. Number the items from 0"),
                                          (lambda ids: ids - 3, "whole numbers from 0, and shop has -3"),
                                          (lambda ids: ids.astype(str), "whole numbers from 0, and shop has '0'")])
def test_features_want_item_ids_that_are_rows(shop, tmp_path, ids, message):
    data = random_features(load_data(shop), {"image": 4})
    with pytest.raises(DataError, match=message):
        write_data(replace(data, inter=replace(data.inter, item_ids=ids(data.inter.item_ids))), tmp_path / "far")


def test_derived_data_that_cannot_be_written_are_one_sentence(shop, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.warns(UserWarning, match="cannot be locked"), pytest.raises(DataError, match="cannot be written: Not a dir"):
        derive(shop, thinned, share=0.5)


@pytest.mark.parametrize("change", [thinned, partial(without, modality="text")])
@pytest.mark.parametrize("share", [-0.5, 50, float("nan")])
def test_shares_are_from_0_to_1(shop, change, share):
    with pytest.raises(SettingError, match=f"share={share} is not allowed: it must be a number from 0 to 1"):
        change(load_data(shop), share=share)


# ---------------------------------------------------------------- make


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_takes_folders_with_spaces_and_a_slash(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "papermill").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    os.chmod(tmp_path / "papermill", 0o755)
    command = ["make", "-C", str(tmp_path), "-o", ".venv/installed", "stage2", "dataset=data/my shop/", f"bin={tmp_path}"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "runs/stage2-my shop.ipynb" in told and told[told.index("dataset") + 1] == "data/my shop/"
