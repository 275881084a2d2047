"""Figures of finished runs: what they show, odd titles, missing pictures, other towers."""
import itertools
import shutil
import sys
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from small import SHORT, TEXT, VISION, hugging_face_clips, make_shop, small_clips

from ptmrec import visualisation as vis
from ptmrec.clip_prompting import Clip, DeepPrompts, encode_image
from ptmrec.data import DataError, Interactions, RecData, load_data
from ptmrec.ranking import Evaluator
from ptmrec.settings import SettingError
from ptmrec.stage1 import run_stage1
from ptmrec.stage2 import plot_results, run_stage2

ODD = ["Mug for $5, not $9", "a_b^c $\\frac$ {x}", "猫の形をした青いマグカップ", "كوب أزرق كبير", "Gift box 🎁🫠",
       "tab\tand\nnew line", "Supercalifragilisticexpialidocious and more",
       "<b>bold</b> & \\LaTeX", "   "]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A small shop with odd titles, of which one is missing, and an item without a picture."
    folder = tmp_path_factory.mktemp("shop") / "shop"
    make_shop(folder)
    items = pd.read_csv(folder / "items.csv")
    items.loc[: len(ODD) - 1, "title"] = ODD
    items["price"] = np.arange(len(items)) / 7
    items.to_csv(folder / "items.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTMREC_RUNS", str(folder.parent / "runs"))
        patch.setenv("PTMREC_DATA", str(folder.parent / "data"))
        yield folder


@pytest.fixture(scope="module")
def tuned(shop):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_stage2(dataset=str(shop), **SHORT)[0]


@pytest.fixture(scope="module")
def first(shop, tuned):
    return tuned.stage1


def written(figure):
    "All texts of a figure."
    return [text.get_text() for text in figure.findobj(plt.Text)]


def map_of(run, **how):
    tables = vis.item_tables(run)
    return vis.embedding_map(tables["frozen image"], tables["tuned image"], vis.view(run).catalogue, **how)


FIGURES = {"neighbours": lambda run: vis.neighbour_sheet(run, 3), "lists": lambda run: vis.recommendation_sheet(run, 1),
           "changes": vis.show_what_changed, "curves": vis.training_curves, "gap": vis.domain_gap,
           "attention": vis.attention_maps, "prompts": vis.prompt_norms, "gains": vis.who_gains,
           "map by number": lambda run: map_of(run, color="price"), "map by title": lambda run: map_of(run, color="title"),
           "map by truth": lambda run: map_of(run, color="cold")}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_figures_are_drawn_saved_and_leave_no_trace(tuned, draw, tmp_path):
    before, others = plt.rcParams.copy(), plt.get_fignums()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Some titles have characters that no installed font has")
        figure = draw(tuned)
        files = vis.save(figure, tmp_path / "figure")
    assert [f.suffix for f in files] == [".png", ".svg", ".pdf"] and all(f.stat().st_size > 1000 for f in files)
    assert figure.get_figwidth() == vis.COLUMN and plt.rcParams == before and plt.get_fignums() == others


def test_hits_are_those_of_the_stored_lists(tuned):
    seen, stored = vis.view(tuned), tuned.load_table("topk.parquet")
    inter, marked = seen.data.inter, 0
    users, items = inter.part("test")
    for user in np.unique(users)[:20]:
        figure = vis.recommendation_sheet(tuned, inter.user_ids[user], ("stage1", "fresh"), k=10)
        hits = []
        for variant in ("stage1", "fresh"):
            top = stored[(stored.variant == variant) & (stored.user == inter.user_ids[user]) & (stored["rank"] <= 10)]
            hits.append(int(top["item"].isin(inter.item_ids[items[users == user]]).sum()))
        assert written(figure).count("✓") == sum(hits)
        assert f"Stage 1: {hits[0]} of 1 found in the first 10" in written(figure)
        marked += sum(hits)
    assert marked > 0


def test_the_latest_items_come_first(tuned):
    seen = vis.RunView(tuned)
    inter = seen.data.inter
    inter.time = np.random.default_rng(0).permutation(len(inter))
    mine = pd.Series(inter.time, inter.item)[(inter.user == 1) & (inter.split == 0)]
    row = vis._lists(seen, 1, [], 10)[0]
    assert row.name == "training items, latest first: 5 of 5"
    assert row.items == mine.sort_values(ascending=False).index.tolist()


def test_items_that_a_run_does_not_count_are_not_to_be_found(tuned):
    seen = vis.RunView(tuned)
    inter, found = seen.data.inter, {}
    for group in ("warm", "cold"):
        seen.evaluator = Evaluator(inter, "cpu", group)
        rows = [vis._lists(seen, user, ["fresh"], 10)[1:] for user in np.unique(inter.part("test")[0])]
        found[group] = [test.name for test, _ in rows]
        assert all(("of 0 found" in listed.name) == test.name.endswith("0 of 0") for test, listed in rows)
    assert {*found["warm"]} == {"test items: 1 of 1"} and {*found["cold"]} == {"test items: 0 of 0"}


def test_unknown_names_are_told(tuned):
    with pytest.raises(DataError, match="no user 'nobody'"):
        vis.recommendation_sheet(tuned, "nobody")
    with pytest.raises(DataError, match="no variant 'frsh'"):
        vis.recommendation_sheet(tuned, 1, ["frsh"])
    with pytest.raises(SettingError, match="color='prise'.*Did you mean price"):
        map_of(tuned, color="prise")
    with pytest.raises(SettingError, match="method='tsn'.*Did you mean tsne"):
        map_of(tuned, method="tsn")


def test_runs_of_stage_1(first):
    assert list(vis.item_tables(first)) == ["ID", "frozen image", "frozen text"]
    vis.neighbour_sheet(first, 3), vis.recommendation_sheet(first, 1), vis.domain_gap(first), vis.attention_maps(first)
    assert "Stage 1" in written(vis.training_curves(first)) and "Stage 2" not in written(vis.training_curves(first))
    with pytest.raises(DataError, match="learnt no prompts"):
        vis.prompt_norms(first)


@pytest.mark.parametrize("kept", ["pictures", "titles"])
def test_what_changed_is_shown_with_pictures_or_titles_alone(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "runs"))
    make_shop(tmp_path / "shop")
    if kept == "pictures":
        (tmp_path / "shop" / "items.csv").unlink()
    else:
        shutil.rmtree(tmp_path / "shop" / "images")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = vis.show_what_changed(run_stage2(dataset=str(tmp_path / "shop"), **SHORT)[0])
    texts = written(figure)
    assert bool(figure.axes[0].images) == (kept == "pictures")
    assert any("mug" in text for text in texts) == (kept == "titles")
    assert kept == "titles" or any(text.isdigit() for text in texts), "ids"
    modality = {"pictures": "image", "titles": "text"}[kept]
    assert sum(text.endswith(f"{when} {modality} features") for text in texts for when in ("frozen", "tuned")) == 2


def test_recommender_without_features(shop):
    run = run_stage1(dataset=str(shop), backbone="bpr", epochs=2, device="cpu")[0]
    assert list(vis.item_tables(run)) == ["ID"]
    vis.neighbour_sheet(run, 3), vis.recommendation_sheet(run, 1)
    with pytest.raises(DataError, match="encoded no pictures"):
        vis.attention_maps(run)


@pytest.mark.parametrize("titles", [ODD, [""] * len(ODD)])
def test_data_without_pictures(titles):
    n = len(titles)
    inter = Interactions(np.arange(n), np.arange(n), np.zeros(n, np.int8), np.arange(n), np.arange(100, 100 + n))
    catalogue = vis.Catalogue(RecData("bare", inter, titles, [None] * n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = vis.sheet(catalogue, [vis.SheetRow("all", range(n))])
    texts = written(figure)
    assert not figure.axes[0].images and "108" in texts  # the last title is blank
    assert sum(str(i) in texts for i in range(100, 108)) == (0 if any(titles) else 8)


def test_pictures_that_cannot_be_read(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.new("RGB", (300, 100), "navy").save(whole)
    files = {"gone": tmp_path / "gone.jpg", "text": tmp_path / "text.jpg", "cut": tmp_path / "cut.jpg"}
    files["text"].write_text("no picture")
    files["cut"].write_bytes(whole.read_bytes()[:400])
    inter = Interactions(*np.zeros((3, 1), int), np.arange(1), np.arange(5))
    catalogue = vis.Catalogue(RecData("odd", inter, [""] * 5, [None, *files.values(), whole]))
    assert [catalogue.picture(i, 60) is None for i in range(5)] == [True] * 4 + [False]
    picture = catalogue.picture(4, 60)
    assert picture.shape == (60, 60, 3) and (picture[:20] == 255).all() and (picture[22:38, :, 2] > 100).all()
    assert len(vis.sheet(catalogue, [vis.SheetRow("all", range(5))]).axes[0].images) == 1


def test_transparent_and_turned_pictures(tmp_path):
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (vis.letterbox(tmp_path / "clear.png", 20) == 255).all()
    turned = Image.new("RGB", (80, 20), "navy")
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    picture = vis.letterbox(tmp_path / "turned.jpg", 40)
    assert (picture[20, 0] == 255).all() and (picture[1, 20] < 200).any()


@pytest.mark.parametrize("title", ODD[:-1])
@pytest.mark.parametrize("width", [2, 9, 13, 40])
@pytest.mark.parametrize("lines", [1, 2])
def test_titles_fit(title, width, lines):
    title = " ".join(title.split())
    shown = vis.cut(title, width, lines)
    assert shown and len(shown.split("\n")) <= lines and all(len(row) <= width for row in shown.split("\n"))
    if shown.endswith("…"):
        kept = shown[:-1].split("\n")[-1].split(" ")[-1]
        assert kept in title and len(shown) <= len(title) + lines
    else:
        assert shown.replace("\n", "").replace(" ", "") == title.replace(" ", "")


def test_dollars_are_no_formula():
    figure = plt.figure()
    for title in ODD[:2]:
        text = figure.text(0, 0, vis.printable(title))
        shown, is_math = text._preprocess_math(text.get_text())
        assert shown == title and not is_math
    plt.close(figure)


def test_what_no_font_has_is_said_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        shown = [vis.printable(f"A \U000f0000\U000f0001 of {n} kinds") for n in range(3)]  # private use: in no font
    assert shown == [f"A � of {n} kinds" for n in range(3)] and len(said) == 1


@pytest.mark.parametrize("script, title", [("Chinese", "蓝色陶瓷马克杯"), ("Japanese", "青いマグ"), ("Korean", "머그컵"),
                                           ("Arabic", "كوب أزرق"), ("emoji", "🎁🎂")])
def test_a_script_is_written_where_a_font_has_it(script, title, caplog):
    "With Debian's fonts-noto-cjk and fonts-symbola, which CI installs, in bold too."
    known = set().union(*vis.installed_fonts().values())
    if any(ord(c) not in known for c in title):
        pytest.skip(f"no font with {script} is installed (fonts-noto-cjk, fonts-symbola)")
    data = RecData.from_frames(pd.DataFrame({"user": [0] * 5, "item": range(5), "split": [0, 0, 0, 1, 2]}),
                               pd.DataFrame({"item": range(5), "title": title}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = vis.sheet(vis.Catalogue(data), [vis.SheetRow(title, range(5))])
        figure.canvas.draw()
    assert not caplog.records and not any("�" in text for text in written(figure))
    assert sum(title[:2] in text for text in written(figure)) >= 5


def test_a_font_that_was_installed_since_is_found(monkeypatch):
    "matplotlib remembers the fonts that it found once."
    fonts = vis.font_manager.fontManager
    new = next(font for font in fonts.ttflist if font.name == "cmr10")
    monkeypatch.setattr(fonts, "ttflist", [font for font in fonts.ttflist if font.name != "cmr10"])
    monkeypatch.setattr(vis.font_manager, "findSystemFonts", lambda: [new.fname, "/no/such/font.ttf"])
    monkeypatch.setattr(vis, "FONTS", ("DejaVu Sans", "cmr10"))
    assert set(vis.installed_fonts.__wrapped__()) == {"DejaVu Sans", "cmr10"}


def test_neighbours_are_the_nearest():
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    cosine = F.cosine_similarity(table[7:8], table)
    items, values = vis.neighbours(table, 7, 5)
    assert items.tolist() == cosine.argsort(descending=True)[1:6].tolist() and torch.allclose(values, cosine[items])
    assert len(vis.neighbours(table, 7, 1000)[0]) == 49


def test_maps_are_aligned():
    table = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2, 1, 1, 1, 1])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    before, after = vis.aligned_maps(table, table @ turn)
    assert torch.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("method, library", [("tsne", "openTSNE"), pytest.param("umap", "umap", marks=pytest.mark.slow)])
def test_maps_with_extra_libraries(method, library, monkeypatch):
    table = torch.cat([torch.randn(40, 5) + 4, torch.randn(40, 5) - 4])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, library, None)
        with pytest.raises(SettingError, match=rf"needs {library}.*\.\[maps\]"):
            vis.aligned_maps(table, table, method)
    pytest.importorskip(library, reason=f"{library} is not installed (extra maps)")
    for layout in vis.aligned_maps(table, table, method):
        apart = (layout[:40].mean(0) - layout[40:].mean(0)).norm()
        assert apart > layout[:40].std(0).norm()


def test_colours_by_most_frequent_values():
    values = pd.Series(["b", "a", "b", None, "c", "", "b", "a", "d"])
    shown = vis.most_frequent(values, most=2).tolist()
    assert shown == ["b", "a", "b", "(none)", "other (2 more)", "(none)", "b", "a", "other (2 more)"]
    assert set(vis.most_frequent(values, most=3)) == {"a", "b", "c", "d", "(none)"}
    assert vis.most_frequent(pd.Series(["none", None, "none"])).tolist() == ["none", "(none)", "none"]


def test_missing_numbers_are_grey_and_counted(tuned):
    catalogue = vis.Catalogue(vis.view(tuned).data)  # the last item has no price
    tables = vis.item_tables(tuned)
    figure = vis.embedding_map(tables["frozen text"], tables["tuned text"], catalogue, "price")
    assert "price (grey: 1 items without)" in written(figure)
    assert sum(len(points.get_offsets()) for points in figure.axes[0].collections) == len(catalogue)


def as_clip(model, name="small"):
    return Clip(name, model.eval().requires_grad_(False), None, 32, torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("n_ctx", [0, 3])
def test_attention_is_what_the_block_computes(n_ctx):
    torch.manual_seed(0)
    clip = as_clip(small_clips()["plain"]())
    pixels = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)
    prompts = DeepPrompts(clip, n_ctx, 2, towers=["image"]) if n_ctx else None
    stock = encode_image(clip, clip.normalise(pixels), prompts)
    weights = vis.class_attention(clip, pixels, prompts)
    assert torch.equal(encode_image(clip, clip.normalise(pixels), prompts), stock)  # nothing is left attached

    block, inputs = clip.model.visual.transformer.resblocks[-1], []
    hook = block.ln_1.register_forward_hook(lambda module, args, output: inputs.append(output))
    encode_image(clip, clip.normalise(pixels), prompts)
    hook.remove()
    q, k, _ = F.linear(inputs[0], block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    q, k = (x.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for x in (q, k))
    expected = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0]
    assert expected.shape[1] == 17 + n_ctx
    assert torch.allclose(weights.flatten(1), expected[:, 1:17], atol=1e-6)


@pytest.mark.parametrize("vision", [VISION | {"pool_type": "avg"}, VISION | {"attentional_pool": True}, None])
def test_towers_without_class_token_are_refused(vision):
    if vision is None:
        model = open_clip.CLIP(16, {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}, TEXT)
    else:
        model = open_clip.CLIP(16, vision, TEXT)
    with pytest.raises(DataError, match="small: its image tower has no class token.*such as ViT-B-32"):
        vis.class_attention(as_clip(model), torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def test_pareto_front():
    cost, quality = np.random.default_rng(0).integers(0, 8, (2, 40))
    expected = [not any((c <= cost[n] and q >= quality[n]) and (c < cost[n] or q > quality[n])
                        for c, q in zip(cost, quality)) for n in range(40)]
    assert vis.on_front(cost, quality).tolist() == expected


def test_gains_add_up(tuned):
    metrics, found = tuned.metrics(), vis.hits_by_popularity(tuned, ("stage1", "fresh"))
    per_user = found.groupby("user")[["before", "after"]].mean().mean()
    assert np.allclose(per_user, [metrics[v]["test"]["recall@20"] for v in ("stage1", "fresh")])
    gains = vis.user_gains(tuned, "recall@20", ("stage1", "fresh"))
    assert np.isclose(gains.mean(), per_user.after - per_user.before)
    with pytest.raises(SettingError, match="k=50 is not allowed here: runs keep lists of 20"):
        vis.who_gains(tuned, k=50)
    train = np.bincount(vis.view(tuned).data.inter.part("train")[1], minlength=1000)
    assert ((found.group == "cold") == (train[found["item"]] == 0)).all()


def test_posters(movielens, tmp_path, monkeypatch):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    catalogue = vis.Catalogue(load_data(movielens, min_rating=4, core=5))
    assert "genres" in catalogue.table or "categories" in catalogue.table
    assert catalogue.table.picture.mean() > 0.95 and catalogue.picture(0, 64).shape == (64, 64, 3)
    assert catalogue.title(0, 15) == "Toy Story…"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(vis.shown_title(catalogue, i, 13, 2) for i in range(len(catalogue)))
        assert len(vis.sheet(catalogue, [vis.SheetRow("first", range(10))]).axes[0].images) == 10


def test_items_without_a_picture_have_and_are_no_visual_neighbours(tuned):
    "They share the mean feature; the shop has one of them, and another is made here."
    seen = vis.RunView(tuned)
    features = seen.inputs.features["image"].clone()
    lost = int(vis.without_content(features).nonzero())
    others = torch.ones(len(features), dtype=torch.bool).index_fill(0, torch.tensor([lost, 8]), False)
    features[[lost, 8]] = features[others].mean(0)
    assert [len(vis.neighbours(features, item, 4)[0]) for item in (lost, 8)] == [0, 0]
    assert not {lost, 8} & {i for item in range(len(features)) for i in vis.neighbours(features, item, 36)[0].tolist()}
    assert written(vis.neighbour_sheet(tuned, lost, spaces=["frozen image"]))[0] == "the item"


def test_only_what_was_tuned_is_shown_as_tuned(shop):
    text_alone = run_stage2(dataset=str(shop), **SHORT, tuned_towers="text")[0]
    texts = written(vis.show_what_changed(text_alone))
    assert [kind in " ".join(texts) for kind in ("tuned text features", "image features")] == [True, False]
    assert list(vis.attention_shares(text_alone, vis.item_pixels(text_alone, [0]))) == ["frozen"]
    untuned = run_stage2(dataset=str(shop), **{k: v for k, v in SHORT.items() if not k.startswith(("n_ctx", "prompt"))},
                         tuning="none")[0]
    assert "features" not in " ".join(written(vis.show_what_changed(untuned)))
    assert list(vis.attention_shares(untuned, vis.item_pixels(untuned, [0]))) == ["frozen"]


def test_the_gap_of_runs_that_have_none_is_one_sentence(shop):
    others = plt.get_fignums()
    joint = run_stage2(dataset=str(shop), training="joint", tuning="prompt", n_ctx=2, prompt_depth=2, epochs=1, n_seeds=1,
                       device="cpu")[0]
    with pytest.raises(DataError, match="was trained jointly"):
        vis.domain_gap(joint)
    with pytest.raises(DataError, match="used no features"):
        vis.domain_gap(run_stage1(dataset=str(shop), backbone="bpr", epochs=1, n_seeds=1, device="cpu")[0])
    assert plt.get_fignums() == others


def test_a_gap_in_nats_is_a_number_where_probabilities_are_none(tuned):
    seen = vis.RunView(tuned)
    seen.settings.tau = 1e-4
    assert not [text for text in written(vis.domain_gap(seen)) if "nan" in text or "inf" in text]


def test_a_loss_is_drawn_as_far_out_as_a_gain():
    heights = {}
    for gain in (0.05, 0.25, 0.75, 1.0):
        figure, ax = plt.subplots()
        vis._gain_histogram(ax, pd.Series([gain, -gain]), "recall@10")
        heights[gain] = np.array([bar.get_height() for bar in ax.patches])
        plt.close(figure)
    assert all((found == found[::-1]).all() and found.sum() == 2 for found in heights.values())


def test_wrong_layers_and_spaces_are_one_sentence(tuned):
    with pytest.raises(DataError, match="layer=9 is not in the image tower of tiny"):
        vis.attention_maps(tuned, layer=9)
    with pytest.raises(SettingError, match="'tuned images'.*Did you mean tuned image"):
        vis.neighbour_sheet(tuned, 3, spaces=["tuned images"])


def test_attention_leaves_out_pictures_that_cannot_be_read(tuned):
    seen = vis.RunView(tuned)
    seen.catalogue.picture = lambda item, size=96: None if item == 0 else np.zeros((size, size, 3), np.uint8)
    titles = written(vis.attention_maps(seen))
    assert vis.shown_title(seen.catalogue, 1, 14, 3) in titles and vis.shown_title(seen.catalogue, 0, 14, 3) not in titles


def test_tokens_that_are_no_text_have_numbers():
    decoded = {1: "mug ", 2: "🤣🤣", 3: "\ufffd", 4: "", 5: "\U000f0000", 6: "(", 7: "\u1c5b"}  # the last is in few fonts
    words = [vis._token_text(text, n) for n, text in decoded.items()]
    assert words == ["mug", "#2", "#3", "#4", "#5", "(", "\u1c5b"]
    figure, ax = plt.subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of titles
        vis._token_list(ax, pd.DataFrame({"prompt": 1, "id": decoded.keys(), "token": words}))
    assert ax.texts[0].get_text() in ("1: mug, #2, #3, #4, #5, (, #7", "1: mug, #2, #3, #4, #5, (, \u1c5b")
    plt.close(figure)


@pytest.mark.parametrize("table", ["methods.csv", "a crowd"])
def test_names_of_points_cover_nothing(table):
    if table == "a crowd":
        rows = pd.DataFrame({"run": [f"method {n}" for n in range(9)], "cost": np.linspace(1e5, 1.3e5, 9),
                             "recall@10": 0.2 + np.arange(9) % 2 / 1000})
    else:
        rows = pd.read_csv(ROOT / "nbs/results" / table).rename(columns={"trained in CLIP": "cost"})
        rows = rows[rows.variant == "fresh"].groupby("run", as_index=False)[["cost", "recall@10"]].mean()
    figure = vis.cost_against_quality(rows, "cost", "recall@10", "run")
    ax = figure.axes[0]
    names = {text.get_text(): text.get_window_extent() for text in ax.texts if text.get_text()}
    assert len(names) == len(rows)
    for a, b in itertools.combinations(names.values(), 2):
        assert not a.overlaps(b)
    for corner in ax.lines[0].get_path().interpolated(50).vertices:
        assert not any(box.contains(*ax.transData.transform(corner)) for box in names.values())
    assert ("logarithmic" in ax.get_xlabel()) == (ax.get_xscale() == "symlog") == (table == "methods.csv")


def test_what_moved_most_is_shown(tuned, monkeypatch):
    tables = vis.item_tables(tuned)
    for modality in ("image", "text"):
        turned = torch.randn(tables[f"tuned {modality}"].shape, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(vis, "item_tables", lambda run, moved={f"tuned {modality}": turned}: tables | moved)
        assert vis.features_moved(tuned).index[0] == modality
        shown = " ".join(written(vis.show_what_changed(tuned)))
        assert [f"tuned {m} features" in shown for m in ("image", "text")] == [modality == "image", modality == "text"]


def test_tokens_near_prompts_of_a_hugging_face_text_tower():
    clip = Clip("small", hugging_face_clips()["bert"](), lambda texts: None, 32, torch.zeros(3), torch.ones(3))
    clip.tokenize.decode = lambda tokens: f"word {tokens[0]}"
    table = clip.model.text.transformer.get_input_embeddings().weight
    assert vis.nearest_tokens(clip, table[[7, 9]], 1).token.tolist() == ["word 7", "word 9"]


def test_a_second_round_is_named(shop):
    run = run_stage1(dataset=str(shop), epochs=2, rounds=2, n_seeds=1, device="cpu")[0]
    assert "Stage 1, round 2" in written(vis.training_curves(run))


def test_results_of_one_metric(tuned):
    assert [ax.get_title() for ax in plot_results([tuned], metrics=("ndcg@20",)).axes] == ["test NDCG@20"]
    plt.close()
