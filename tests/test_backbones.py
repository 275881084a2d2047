"""Backbones: settings that are checked, and item features of any modalities."""
import pytest
import torch

from ptmrec.backbones import BACKBONES, NORMS, grid_of
from ptmrec.deviations import DEVIATIONS, IN_MODELS, in_place_of, scored_trials
from ptmrec.graphs import GraphRows, knn_graph, user_item_graph
from ptmrec.search import check_grid
from ptmrec.settings import SettingError, check_claims, check_settings, resolve
from ptmrec.stage1 import run_stage1

DIMS = {"image": 12, "text": 7, "audio": 5}
SMALL = {"knn_k": 4, "knn_k_image": 6, "knn_k_text": 3}


def make(name, modalities, **settings):
    "A backbone on 40 users and 30 items, and its features."
    torch.manual_seed(0)
    user, item = (torch.rand(40, 30) < 0.2).nonzero().T
    features = {m: torch.rand(30, DIMS[m]) for m in modalities}
    cls = BACKBONES[name]
    settings = {k: v for k, v in SMALL.items() if k in cls.Settings.model_fields} | settings
    backbone = cls(user, item, 40, 30, {m: DIMS[m] for m in modalities}, emb_size=8, **settings)
    if cls.uses_features:
        backbone.set_features(features)
    return backbone, features


@pytest.mark.parametrize("modalities", [("image", "text", "audio"), ("audio", "text"), ("audio",)], ids="+".join)
@pytest.mark.parametrize("name", BACKBONES)
def test_any_modalities_train(name, modalities):
    backbone, _ = make(name, modalities)
    optimiser, losses = torch.optim.Adam(backbone.parameters(), 1e-2), []
    negative = torch.randint(30, backbone.item.shape)
    for _ in range(15):
        backbone.train().start_epoch()
        loss = sum(backbone.loss(backbone.user, backbone.item, negative).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if backbone.uses_features:
        assert set(backbone.project) == set(modalities)
        assert all(linear.weight.grad.abs().sum() > 0 for linear in backbone.project.values())
    users, items = backbone.eval()()
    assert len(users) == 40 and len(items) == 30 and users.isfinite().all() and items.isfinite().all()


@pytest.mark.parametrize("modalities, weights", [
    (("image", "text", "audio"), (0.2, 0.4, 0.4)), (("audio", "image"), (0.8, 0.2)), (("text", "audio"), (0.5, 0.5))])
def test_freedoms_other_modalities_share_what_images_leave(modalities, weights):
    backbone, features = make("freedom", modalities, image_weight=0.2)
    wanted = sum(w * knn_graph(f, 4).to_dense() for w, f in zip(weights, features.values()))
    assert torch.allclose(backbone.item_graph.to_dense(), wanted)


def test_smores_text_neighbours_are_those_of_other_modalities():
    backbone, _ = make("smore", DIMS)
    neighbours = {m: int((g.to_dense() > 0).sum(1).max()) for m, g in backbone.item_graphs.items() if m != "fused"}
    assert neighbours == {"image": 6, "text": 3, "audio": 3}


@pytest.mark.parametrize("settings, message", [
    ({"knnk": 3}, "FREEDOM has no setting knnk. Did you mean knn_k. It has: n_layers, n_item_layers, knn_k"),
    ({"knn_k": 0}, "knn_k=0 is not allowed: it must be a whole number at least 1"),
    ({"image_weight": 1.5}, "image_weight=1.5 .* at most 1"), ({"edge_dropout": 1.0}, "edge_dropout=1.0 .* below 1"),
    ({"aux_weight": float("nan")}, "aux_weight=nan is not allowed")])
def test_a_wrong_setting_is_one_sentence(settings, message):
    with pytest.raises(SettingError, match=message) as error:
        make("freedom", ["text"], **settings)
    assert "\n" not in str(error.value)


def test_settings_of_one_name_mean_the_same():
    claims = [(name, cls.Settings.model_fields) for name, cls in BACKBONES.items()]
    for n, (name, fields) in enumerate(claims):
        check_claims(name, fields, claims[:n])


@pytest.mark.parametrize("name", BACKBONES)
def test_all_values_of_a_grid_are_allowed(name):
    assert grid_of(name)
    for setting, values in grid_of(name).items():
        assert all(check_settings(BACKBONES[name].Settings, {setting: v}, name) for v in values)


@pytest.mark.parametrize("n_rows", [5, 60])
def test_rows_of_a_graph_are_rows_of_its_product(n_rows):
    "Few rows are picked, many are taken of the whole product."
    backbone, _ = make("bpr", [])
    graph = user_item_graph(backbone.user, backbone.item, 40, 30)
    index, x, start = torch.randint(40, (n_rows,)), torch.randn(30, 8, requires_grad=True), torch.randn(40, 8)
    rows = GraphRows(graph, index)
    assert (rows.csr is None) == (n_rows == 60)
    assert torch.equal(rows @ x, (graph @ x)[index])
    assert torch.equal(rows.product(x.detach(), start), graph.product(x.detach(), start)[index])
    found, wanted = (torch.autograd.grad(out.square().sum(), x)[0] for out in (rows @ x, graph.to_dense()[index] @ x))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_search_tries_the_weights_that_suit_the_norm():
    plain, squared = (grid_of("vbpr", reg_norm=norm)["reg_weight"] for norm in NORMS)
    assert grid_of("vbpr")["reg_weight"] == plain == [2, 1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    assert max(squared) < 1 and check_settings(BACKBONES["vbpr"].Settings, {"reg_weight": squared[1]}, "vbpr")


@pytest.mark.parametrize("norm", NORMS)
def test_vbprs_norms(norm):
    backbone, _ = make("vbpr", ["image", "text"], reg_norm=norm, reg_weight=0.5)
    batch = backbone.user, backbone.item, backbone.item.roll(1)
    users, items = backbone()
    rows = [users[batch[0]], items[batch[1]], items[batch[2]]]
    wanted = {"plain": lambda e: e.square().sum() ** 0.5, "squared": lambda e: e.square().sum() / 2}[norm]
    reg = 0.5 * sum(wanted(e) for e in rows) / len(batch[0])
    assert torch.isclose(backbone.loss(*batch)["reg"], reg)


@pytest.mark.parametrize("modalities", [("image",), ("image", "text"), ("image", "text", "audio")], ids="+".join)
def test_mgcns_fusions(modalities):
    sides = {}
    for fusion in ("code", "paper"):
        backbone, features = make("mgcn", modalities, fusion=fusion)
        with torch.no_grad():
            id_emb, sides[fusion] = backbone.paths()
            views = torch.stack(list(backbone.views(features).values()))
    common = (backbone.attention(views).softmax(0) * views).sum(0)
    own = sum(backbone.preference[m](id_emb) * (view - common) for m, view in zip(modalities, views))
    assert torch.allclose(sides["paper"], common + own / len(modalities), atol=1e-6)
    assert torch.allclose(sides["code"], (common + own) / (1 + len(modalities)), atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_items_without_a_picture_are_no_hubs(weighted):
    features, lost = torch.randn(60, 16), torch.arange(60) % 4 == 1
    whole = knn_graph(features, 5, weighted).to_dense()
    features[lost] = features[~lost].mean(0)
    graph, others = knn_graph(features, 5, weighted).to_dense(), knn_graph(features[~lost], 5, weighted).to_dense()
    assert torch.equal(graph[~lost][:, ~lost], others) and not graph[lost].any() and not graph[:, lost].any()
    projected = torch.nn.functional.linear(features, torch.randn(8, 16), torch.ones(8))
    assert torch.equal((knn_graph(projected, 5) @ torch.ones(60, 1)).flatten() > 0, ~lost)
    assert whole.count_nonzero() == 300


def test_fewer_pictures_than_neighbours():
    features = torch.randn(1, 6).repeat(20, 1)
    features[:3] = torch.randn(3, 6)
    features[3:] = features[:3].mean(0)
    graph = knn_graph(features, 10).to_dense()
    assert torch.allclose(graph[:3, :3], torch.full((3, 3), 1 / 3)) and graph.count_nonzero() == 9
    assert knn_graph(torch.ones(20, 6), 10).to_dense().count_nonzero() == 200  # nobody has a picture: as it was


@pytest.mark.parametrize("deviation", IN_MODELS, ids=lambda d: f"{d.backbone} {d.name}")
def test_both_sides_of_a_deviation_train(deviation):
    own = BACKBONES[deviation.backbone]
    results = {}
    for side in ("paper", "code"):
        with in_place_of(deviation.backbone, deviation.variant if side == "code" else None):
            backbone, features = make(deviation.backbone, ["image", "text"], **deviation.settings.get(side, {}))
        if deviation.data:  # half of the items have no picture
            features["image"][15:] = features["image"][:15].mean(0)
            backbone.set_features(features)
        batch = backbone.user, backbone.item, backbone.item.roll(1)
        first = backbone.loss(*batch)
        results[side] = [float(t) for t in (*first.values(), *backbone.loss(*[x[:9] for x in batch]).values())]
        sum(first.values()).backward()
        learns = isinstance(backbone.features, torch.nn.ParameterDict)
        assert learns == deviation.settings.get(side, {}).get("train_features", False)
    assert BACKBONES[deviation.backbone] is own
    assert (results["paper"] != results["code"]) == (deviation.name != "feature tables")


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda d: f"{d.backbone} {d.name}")
def test_defaults_are_what_is_said(deviation):
    def settings(**changes):
        return resolve(run_stage1.experiment, {"backbone": deviation.backbone} | changes).key_parameters

    if deviation.settings:
        other = {"paper": "code", "code": "paper"}[deviation.default]
        assert settings(**deviation.settings[deviation.default]) == settings() != settings(**deviation.settings[other])
    for grid in deviation.grids.values():
        check_grid(deviation.backbone, grid)
    if deviation.grids:
        own = grid_of(deviation.backbone, **deviation.settings.get(deviation.default, {}))
        assert deviation.grids[deviation.default].items() <= own.items()
    assert deviation.variant is None or deviation.default == "paper"


def test_a_table_of_trials_varies_what_the_call_leaves_open(monkeypatch):
    asked = []
    monkeypatch.setattr("ptmrec.deviations.run_stage1", lambda **how: asked.append(how["reg_weight"]) or [])
    scored_trials("vbpr", reg_norm="squared")
    assert asked == grid_of("vbpr", reg_norm="squared")["reg_weight"] != grid_of("vbpr")["reg_weight"]
    asked.clear()
    scored_trials("vbpr", reg_weight=0.1)
    assert asked == [0.1]
