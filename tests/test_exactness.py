"""What must be exact: parity with stock CLIP, where gradients go, repeatability."""
import copy
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image

from ptmrec.backbones import BACKBONES
from ptmrec.clip_prompting import Clip, DeepPrompts, ItemEncoder, encode_image, encode_text, frozen_features, load_clip
from ptmrec.data import INTERPOLATIONS, RESIZE_MODES, DataError, find_dataset, load_data, load_image
from ptmrec.graphs import knn_graph
from ptmrec.peft import attach
from ptmrec.ranking import METRICS, check_metric, metric_names, paired_test, register_metric, stable_topk, user_metrics
from ptmrec.settings import SettingError
from ptmrec.stage1 import build_backbone, run_stage1
from ptmrec.stage2 import Stage2

SMALL_VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
CLIPS = {
    "plain": lambda: open_clip.CLIP(32, SMALL_VISION, SMALL_TEXT),
    "quickgelu": lambda: open_clip.CLIP(32, SMALL_VISION, SMALL_TEXT, quick_gelu=True),
    "custom text": lambda: open_clip.CustomTextCLIP(32, SMALL_VISION, SMALL_TEXT | {"proj_type": "linear"}),
    "average pool": lambda: open_clip.CLIP(32, SMALL_VISION | {"pool_type": "avg", "final_ln_after_pool": True}, SMALL_TEXT),
    "ViT-B-32": lambda: open_clip.create_model("ViT-B-32", pretrained=None),
    "ViT-B-32-quickgelu": lambda: open_clip.create_model("ViT-B-32-quickgelu", pretrained=None),
}


def make_clip(name):
    torch.manual_seed(0)
    model = CLIPS[name]().eval().requires_grad_(False)
    size = model.visual.image_size
    return Clip(name, model, open_clip.get_tokenizer("ViT-B-32"), size[0] if isinstance(size, tuple) else size,
                torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD))


@pytest.mark.parametrize("grad", [False, True])  # torch's attention computes in another order where gradients are wanted
@pytest.mark.parametrize("name", CLIPS)
def test_no_prompts_equal_the_stock_clip(name, grad):
    with torch.set_grad_enabled(grad):
        check_no_prompts(make_clip(name))


def check_no_prompts(clip):
    images = torch.randn(3, 3, clip.image_size, clip.image_size)
    tokens = clip.tokenize(["a red mug", "words " * 100, ""])
    for prompts in (None, DeepPrompts(clip, n_ctx=0)):
        assert (encode_image(clip, images, prompts) - clip.model.encode_image(images)).abs().max() == 0
        assert (encode_text(clip, tokens, prompts) - clip.model.encode_text(tokens)).abs().max() == 0
    short = clip.tokenize(["a red mug", "a hat"])
    assert torch.allclose(encode_text(clip, short), clip.model.encode_text(short), atol=1e-5)


@torch.no_grad()
def test_prompts_do_not_depend_on_the_batch():
    clip = make_clip("plain")
    prompts = DeepPrompts(clip, n_ctx=3, prompt_depth=2)
    tokens = clip.tokenize(["a red mug", "a very long title of a very ordinary hat"])
    together = encode_text(clip, tokens, prompts)
    assert torch.allclose(together[:1], encode_text(clip, tokens[:1], prompts), atol=1e-6)


def test_towers_that_take_no_prompts_are_refused_by_name():
    model = open_clip.create_model("RN50", pretrained=None)
    clip = Clip("RN50", model, None, 224, torch.zeros(3), torch.ones(3))
    with pytest.raises(DataError, match="RN50.*ModifiedResNet"):
        DeepPrompts(clip)
    with pytest.raises(DataError, match="prompt_depth=9.*3 layers"):
        DeepPrompts(make_clip("plain"), prompt_depth=9)


@pytest.fixture(scope="module")
def sample():
    data, clip = load_data("sample"), load_clip()
    return data, clip, frozen_features(data, clip)


def stage2_model(sample, name, **changes):
    data, clip, features = sample
    torch.manual_seed(0)
    backbone = build_backbone(name, data.inter, features, {})
    model = Stage2(backbone, ItemEncoder(clip, data, attach(clip, n_ctx=2, prompt_depth=2)), **changes)
    user, item = (torch.as_tensor(x[:64]) for x in data.inter.part("train"))
    return model, (user, item, torch.randint(data.inter.n_items, (64,)))


@pytest.mark.parametrize("name", [n for n, cls in BACKBONES.items() if cls.uses_features])
def test_only_prompts_and_projections_learn_from_kt(sample, name):
    model, batch = stage2_model(sample, name, tune_backbone=True)  # even where embeddings could move
    sum(model.losses(*batch).values()).backward()
    moved = {n for n, q in model.named_parameters() if q.grad is not None and q.grad.abs().sum() > 0}
    assert moved == {"encoder.tuning.prompts.image", "encoder.tuning.prompts.text"} | {
        f"backbone.project.{m}.{q}" for m in ("image", "text") for q in ("weight", "bias")}
    assert model.backbone.user_emb.grad is None and model.backbone.item_emb.grad is None


def test_task_loss_reaches_prompts_through_the_batch(sample):
    model, batch = stage2_model(sample, "vbpr", kt_weight=0.0, task_weight=1.0)
    sum(model.losses(*batch).values()).backward()
    assert all(q.grad.abs().sum() > 0 for q in model.encoder.tuning.parameters())


def test_same_seed_same_metrics_bit_for_bit(runs):
    def once():
        run, = run_stage1(epochs=3, n_seeds=1)
        return run.metrics(), run.load_weights("backbone")

    (metrics, weights), (metrics_again, weights_again) = once(), once()
    assert metrics == metrics_again
    assert all(torch.equal(w, weights_again[n]) for n, w in weights.items())
    assert run_stage1(epochs=3, n_seeds=1, seed=1)[0].metrics() != metrics


@pytest.mark.parametrize("tag, activation", [("openai", QuickGELU), ("laion2b_s34b_b79k", torch.nn.GELU)])
def test_a_tag_brings_the_activation_it_was_trained_with(monkeypatch, tag, activation):
    create = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda name, weights, **how: create(name, pretrained=None, **how))
    monkeypatch.setattr("ptmrec.clip_prompting.find_weights", lambda name, pretrained: pretrained)
    clip = load_clip("ViT-B-32", tag)
    for tower in (clip.model.visual, clip.model):
        assert type(tower.transformer.resblocks[0].mlp.gelu) is activation


@pytest.mark.parametrize("size", [(90, 71), (64, 200), (31, 31)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_images_are_prepared_as_open_clip_does(tmp_path, resize_mode, interpolation, size):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "i.png")
    how = {"resize_mode": resize_mode, "interpolation": interpolation}
    wanted = open_clip.image_transform(48, False, mean=(0, 0, 0), std=(1, 1, 1), **how)(Image.fromarray(pixels))
    found = load_image(tmp_path / "i.png", 48, **how)
    assert np.array_equal(found, (255 * wanted).round().permute(1, 2, 0).numpy().astype(np.uint8))


def test_preparation_and_activation_are_part_of_a_clips_name(sample):
    _, clip, _ = sample
    other = copy.deepcopy(clip.model)
    other.visual.transformer.resblocks[0].mlp.gelu = QuickGELU()
    keys = [clip.fingerprint(), replace(clip, resize_mode="squash").fingerprint(),
            replace(clip, interpolation="bilinear").fingerprint(), replace(clip, model=other).fingerprint()]
    assert len(set(keys)) == 4


GIVEN = [("image", "text"), ("image",), ("text",)]


@pytest.mark.parametrize("given", GIVEN)
@torch.no_grad()
def test_freedom_equals_a_dense_reference(sample, given):
    data, _, features = sample
    features = {m: features[m] for m in given}
    torch.manual_seed(0)
    settings = {"n_layers": 2, "knn_k": 10, "image_weight": 0.1, "n_item_layers": 1}
    model = build_backbone("freedom", data.inter, features, settings).eval()
    U, I = data.inter.n_users, data.inter.n_items  # noqa: E741
    A = torch.zeros(U + I, U + I)
    user, item = data.inter.part("train")
    A[user, U + item] = A[U + item, user] = 1
    degree = A.sum(1).clamp(min=1)
    A_hat = A / (degree[:, None] * degree[None]).sqrt()
    ego = torch.cat([model.user_emb, model.item_emb])
    out = (ego + A_hat @ ego + A_hat @ A_hat @ ego) / 3
    S = torch.zeros(I, I)
    for m in given:
        weight = 1 if len(given) == 1 else {"image": 0.1, "text": 0.9}[m]
        unit = torch.nn.functional.normalize(features[m], dim=1)
        nearest = (unit @ unit.T).topk(10).indices
        S += weight * torch.zeros(I, I).scatter_(1, nearest, 1 / 10)
    users, items = model()
    assert torch.allclose(users, out[:U], atol=1e-5)
    assert torch.allclose(items, out[U:] + S @ model.item_emb, atol=1e-5)


def dense_views(backbone, features):
    "Normalised graphs and the ID path of a `MultiView` backbone, dense and written out as in the papers."
    n_users, n_items = backbone.n_users, backbone.n_items
    R = torch.zeros(n_users, n_items)
    R[backbone.user, backbone.item] = 1
    A = torch.cat([torch.cat([torch.zeros(n_users, n_users), R], 1), torch.cat([R.T, torch.zeros(n_items, n_items)], 1)])
    degree = A.sum(1).clamp(min=1)
    A = A / (degree[:, None] * degree[None]).sqrt()
    layer = torch.cat([backbone.user_emb, backbone.item_emb])
    layers = [layer]
    for _ in range(backbone.n_layers):
        layer = A @ layer
        layers.append(layer)

    def item_graph(f, k):
        unit = f / f.norm(dim=1, keepdim=True)
        S = unit @ unit.T
        S = S * (S >= S.sort(1, descending=True).values[:, k - 1 : k])
        return S / (S.sum(1)[:, None] * S.sum(1)[None]).sqrt()

    return A[:n_users, n_users:], sum(layers) / len(layers), item_graph


@pytest.fixture(params=GIVEN)
def views_shop(request):
    torch.manual_seed(1)
    pairs = (torch.rand(20, 15) < 0.3).nonzero()
    features = {"image": torch.rand(15, 12), "text": torch.rand(15, 7)}
    features = {m: features[m] for m in request.param}
    return (*pairs.T, 20, 15, {m: f.shape[1] for m, f in features.items()}), features


@torch.no_grad()
def test_mgcn_equals_a_dense_reference(views_shop):
    shop, features = views_shop
    b = BACKBONES["mgcn"](*shop, emb_size=8, knn_k=4, fusion="paper")
    b.set_features(features)
    R, e_id, item_graph = dense_views(b, features)
    views = []
    for m, f in features.items():
        gated = b.item_emb * torch.sigmoid((f @ b.project[m].weight.T + b.project[m].bias) @ b.gate[m][0].weight.T
                                           + b.gate[m][0].bias)
        smooth = item_graph(f, 4) @ gated
        views.append(torch.cat([R @ smooth, smooth]))
    logit = [torch.tanh(v @ b.attention[0].weight.T + b.attention[0].bias) @ b.attention[2].weight.T for v in views]
    alpha = [x.exp() / sum(y.exp() for y in logit) for x in logit]
    shared = sum(a * v for a, v in zip(alpha, views))
    side = shared.clone()
    for m, v in zip(features, views):
        side += torch.sigmoid(e_id @ b.preference[m][0].weight.T + b.preference[m][0].bias) * (v - shared) / len(views)
    assert torch.allclose(torch.cat(b.eval()()), e_id + side, atol=1e-5)


@torch.no_grad()
def test_smore_equals_a_dense_reference(views_shop):
    "The filters as circular convolutions, term by term."
    shop, features = views_shop
    d = 8
    b = BACKBONES["smore"](*shop, emb_size=d, knn_k_image=5, knn_k_text=3)
    b.set_features(features)
    R, e_id, item_graph = dense_views(b, features)
    x = {m: f @ b.project[m].weight.T + b.project[m].bias for m, f in features.items()}

    def convolve(a, c):
        return torch.stack([sum(a[..., j] * c[..., (k - j) % d] for j in range(d)) for k in range(d)], -1)

    kernel = {m: torch.fft.irfft(torch.view_as_complex(w), n=d, norm="backward") for m, w in b.filter.items()}
    x["fused"] = convolve(x["image"], x["text"]) / d**0.5 if len(x) == 2 else next(iter(x.values()))
    S = {m: item_graph(f, {"image": 5, "text": 3}[m]) for m, f in features.items()}
    S["fused"] = torch.stack(list(S.values())).max(0).values
    view = {}
    for m in x:
        gate = torch.sigmoid(convolve(x[m], kernel[m]) @ b.gate[m][0].weight.T + b.gate[m][0].bias)
        smooth = S[m] @ (b.item_emb * gate)
        view[m] = torch.cat([R @ smooth, smooth])
    side = 0
    for m in x:
        part = view[m]
        if m != "fused":
            q = b.attention[m]
            part = part * torch.softmax(torch.tanh(view["fused"] @ q[0].weight.T + q[0].bias) @ q[2].weight.T, 1)
        side = side + part * torch.sigmoid(e_id @ b.preference[m][0].weight.T + b.preference[m][0].bias) / len(x)
    assert torch.allclose(torch.cat(b.eval()()), e_id + side, atol=1e-5)


@torch.no_grad()
def test_vbpr_equals_its_scores_written_out(views_shop):
    shop, features = views_shop
    b = BACKBONES["vbpr"](*shop, emb_size=8)
    b.set_features(features)
    users, items = b.eval()()
    for u in range(20):
        for i in range(15):
            seen = sum(f[i] @ b.project[m].weight.T + b.project[m].bias for m, f in features.items())
            assert torch.isclose(users[u] @ items[i], b.user_emb[u] @ b.item_emb[i] + b.modal_emb[u] @ seen, atol=1e-5)


def bpr_by_pair(user, pos, neg):
    return sum(-torch.log(torch.sigmoid(u @ p - u @ n)) for u, p, n in zip(user, pos, neg)) / len(user)


def info_nce_by_row(a, b, tau):
    a, b, total = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True), 0
    for n in range(len(a)):
        alike = [torch.exp(a[n] @ other / tau) for other in b]
        total -= torch.log(alike[n] / sum(alike))
    return total / len(a)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_losses_are_those_of_the_papers(views_shop, name):
    "Written out pair by pair, from the embeddings that the tests above check."
    shop, features = views_shop
    changes = {"knn_k": 4, "knn_k_image": 5, "knn_k_text": 4, "edge_dropout": 0.0, "aux_weight": 0.3, "cl_weight": 0.5,
               "cl_tau": 0.7, "reg_weight": 0.2, "reg_norm": "squared"}
    settings = {k: v for k, v in changes.items() if k in BACKBONES[name].Settings.model_fields}
    b = BACKBONES[name](*shop, emb_size=8, **settings).eval()
    if b.uses_features:
        b.set_features(features)
    user, pos, neg = torch.tensor([3, 3, 19, 0]), torch.tensor([2, 14, 2, 7]), torch.tensor([5, 2, 0, 1])
    users, items = b()
    batch = users[user], items[pos], items[neg]
    wanted = {"bpr": bpr_by_pair(*batch)}
    if name in ("bpr", "lightgcn"):
        batch = b.user_emb[user], b.item_emb[pos], b.item_emb[neg]
    if name == "freedom":
        for m, f in features.items():
            seen = f @ b.project[m].weight.T + b.project[m].bias
            wanted[f"aux_{m}"] = 0.3 * bpr_by_pair(users[user], seen[pos], seen[neg])
    else:
        wanted["reg"] = 0.2 * sum((row**2).sum() for e in batch for row in e) / (2 * len(user))
    if name in ("mgcn", "smore"):
        _, e_id, _ = dense_views(b, features)
        side, rows = torch.cat([users, items]) - e_id, (user, 20 + pos)
        wanted["cl"] = 0.5 * sum(info_nce_by_row(side[r], e_id[r], 0.7) for r in rows)
    found = b.loss(user, pos, neg)
    assert found.keys() == wanted.keys()
    for term, value in wanted.items():
        assert value > 0 and torch.isclose(found[term], value, rtol=1e-4), term


@pytest.mark.parametrize("name", [n for n, cls in BACKBONES.items() if cls.uses_features])
def test_feature_tables_learn_only_where_asked(views_shop, name):
    shop, features = views_shop
    settings = {k: 4 for k in BACKBONES[name].Settings.model_fields if k.startswith("knn_k")}
    user, item = shop[:2]
    for train_features in (False, True):
        b = BACKBONES[name](*shop, train_features=train_features, **settings)
        b.set_features(features)
        sum(b.loss(user, item, item.flip(0)).values()).backward()
        tables = {n: q for n, q in b.named_parameters() if n.startswith("features.")}
        assert set(tables) == ({f"features.{m}" for m in features} if train_features else set())
        assert all(q.grad.abs().sum() > 0 for q in tables.values())
        assert all(torch.equal(b.features[m], f) for m, f in features.items())
        given = {m: f.clone() for m, f in features.items()}
        torch.optim.Adam(b.parameters(), 0.1).step()  # a backbone learns tables of its own
        assert all(torch.equal(f, given[m]) for m, f in features.items())
        assert all(torch.equal(b.features[m], f) == (not train_features) for m, f in features.items())


@pytest.mark.parametrize("given, size", [(GIVEN[0], 40), (GIVEN[0], 4), (GIVEN[1], 4), (GIVEN[2], 4)])
@pytest.mark.parametrize("train_features", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_batch_equals_its_rows_of_the_whole(name, train_features, given, size, monkeypatch):
    "Value and gradients of a small and of a large batch are those of computing all and taking rows."
    torch.manual_seed(0)
    features = {m: f for m, f in {"image": torch.rand(50, 12), "text": torch.rand(50, 7)}.items() if m in given}
    shop = *(torch.rand(60, 50) < 0.1).nonzero().T, 60, 50, {m: f.shape[1] for m, f in features.items()}
    changes = {"knn_k": 4, "knn_k_image": 5, "knn_k_text": 4, "dropout": 0.0}
    settings = {k: v for k, v in changes.items() if k in BACKBONES[name].Settings.model_fields}
    backbone = BACKBONES[name](*shop, emb_size=8, train_features=train_features, **settings)
    if backbone.uses_features:
        backbone.set_features(features)
    user, pos, neg = torch.randint(60, (size,)), torch.randint(50, (size,)), torch.randint(50, (size,))
    found = torch.autograd.grad(sum(backbone.loss(user, pos, neg).values()), list(backbone.parameters()), allow_unused=True)

    def whole(graph, user_emb, item_emb, n_layers, user=None, item=None):
        layers = [(user_emb, item_emb)]
        for _ in range(n_layers):
            layers.append((graph.to_dense() @ layers[-1][1], graph.to_dense().T @ layers[-1][0]))
        users, items = (sum(side) / len(layers) for side in zip(*layers))
        return (users, items) if user is None else (users[user], items[item])

    monkeypatch.setattr("ptmrec.backbones.propagate", whole)
    monkeypatch.setattr("ptmrec.backbones.smooth", lambda graph, item_emb, n_layers, item=None: (
        torch.linalg.matrix_power(graph.to_dense(), n_layers) @ item_emb)[slice(None) if item is None else item])
    monkeypatch.setattr("ptmrec.backbones.rows_of", lambda table, rows: table if rows is None else table[rows])
    wanted = torch.autograd.grad(sum(backbone.loss(user, pos, neg).values()), list(backbone.parameters()), allow_unused=True)
    for a, b in zip(found, wanted):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))


def test_an_approximate_item_graph_finds_nearly_all_neighbours(monkeypatch):
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    centres = torch.randn(60, 16).repeat_interleave(50, 0)
    features = centres + 0.3 * torch.randn_like(centres)
    exact = knn_graph(features, 5).to_dense() > 0
    monkeypatch.setattr("ptmrec.graphs.EXACT_ITEMS", 1000)
    approximate = knn_graph(features, 5).to_dense() > 0
    assert (approximate.sum(1) == 5).all()
    assert 0.95 < (exact & approximate).sum() / exact.sum()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="3,000 items.*faiss"):
        assert torch.equal(knn_graph(features, 5).to_dense() > 0, exact)


@pytest.mark.parametrize("bad, message", [
    (("ViT-B32", "openai"), "clip_model='ViT-B32' is not known. Did you mean ViT-B-32?"),
    (("ViT-B-32", "openia"), "pretrained='openia' is neither a weights file nor a tag .* Did you mean openai?"),
    (("ViT-B-32", "sample"), "pretrained='sample' is neither a weights file nor a tag")])
def test_a_clip_that_is_not_there_is_one_sentence(bad, message):
    with pytest.raises(SettingError, match=message):
        load_clip(*bad)


def test_weights_are_found_from_the_working_directory(tmp_path, monkeypatch):
    shutil.copy(find_dataset("sample") / "tiny.safetensors", tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    assert load_clip("tiny", "mine.safetensors").name == "tiny/mine.safetensors"


def test_representations_are_one_line(sample):
    data, clip, _ = sample
    assert repr(clip) == "Clip('tiny/sample': 4.7M parameters, images 64 px, features 128-d)"
    with attach(clip, n_ctx=2) as tuning:
        assert repr(ItemEncoder(clip, data, tuning)) == (
            "ItemEncoder(1,486 items of 'sample', image and text, by 'tiny/sample', tuning Prompt(image 768 + text 384 "
            "parameters))")


def test_nothing_slow_is_imported_before_it_is_used():
    slow = ("open_clip", "timm", "torchvision", "huggingface_hub")
    code = f"import sys, ptmrec.peft, ptmrec.prefix, ptmrec.memory; print([m for m in {slow} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def metrics_in_one_go(hits, n_pos, cutoffs):
    "The metrics written as one function, as they were before each had its own."
    hits, n_pos = np.asarray(hits, np.float64), np.asarray(n_pos, np.float64)
    rank = np.arange(1, hits.shape[1] + 1)
    discount = 1 / np.log2(rank + 1)
    n_hits, gain, ideal = hits.cumsum(1), (hits * discount).cumsum(1), discount.cumsum()
    average = (hits * n_hits / rank).cumsum(1)
    table = {}
    for k in cutoffs:
        last = min(k, hits.shape[1]) - 1
        best = np.minimum(n_pos, last + 1).astype(int) - 1
        table[f"recall@{k}"] = n_hits[:, last] / n_pos
        table[f"ndcg@{k}"] = gain[:, last] / ideal[best]
        table[f"precision@{k}"] = n_hits[:, last] / k
        table[f"map@{k}"] = average[:, last] / n_pos
        table[f"hit@{k}"] = (n_hits[:, last] > 0).astype(float)
    return pd.DataFrame(table)


@pytest.mark.parametrize("n, length", [(400, 50), (30, 7), (30, 3)])  # also lists shorter than the cut-offs
def test_metrics_are_the_same_bit_for_bit(n, length):
    rng = np.random.default_rng(0)
    hits, n_pos = torch.from_numpy(rng.random((n, length)) < 0.1), torch.from_numpy(rng.integers(1, 80, n))
    wanted = metrics_in_one_go(hits, n_pos, (5, 10, 20, 50))
    pd.testing.assert_frame_equal(user_metrics(hits, n_pos), wanted, check_exact=True)


def test_a_metric_of_ones_own_is_in_every_table(monkeypatch):
    monkeypatch.setattr("ptmrec.ranking.METRICS", dict(METRICS))
    register_metric("mrr")(lambda hits, n_pos, k: hits[:, :k].max(1) / (hits[:, :k].argmax(1) + 1))
    table = user_metrics([[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]], [2, 1])
    assert list(table) == metric_names()
    assert table["mrr@5"].tolist() == [1 / 2, 0] and table["mrr@10"].tolist() == [1 / 2, 1 / 6]
    assert check_metric("mrr@20") == "mrr@20"


@pytest.mark.parametrize("wrong, hint", [("recal@20", "Did you mean recall@20?"), ("recall@21", "Did you mean recall@20?"),
                                         ("NDCG", ""), ("", "")])
def test_a_metric_that_nobody_knows_is_one_sentence(wrong, hint):
    with pytest.raises(SettingError, match="Allowed: recall, ndcg, precision, map, hit, each followed by @ and") as error:
        check_metric(wrong)
    assert str(error.value).startswith(f"metric='{wrong}' is not known.") and hint in str(error.value)


@pytest.mark.parametrize("n_items", [30, 700, 7050])
@pytest.mark.parametrize("levels", [2, 500, 10**6])  # full of ties, and few
def test_top_k_equals_a_stable_sort(n_items, levels):
    torch.manual_seed(0)
    scores = torch.randint(0, levels, (60, n_items)).float()
    scores[:20, : n_items - 3] = -torch.inf
    wanted = scores.sort(descending=True, stable=True).indices
    for k in (1, 7, 50):
        k = min(k, n_items)
        assert torch.equal(stable_topk(scores, k), wanted[:, :k])


def test_runs_that_do_not_differ_have_p_1():
    a = pd.Series([0.1, 0.5, 0.25], index=[3, 5, 8])
    with np.errstate(all="raise"):
        equal = paired_test([a, a], [a, a])
    assert equal == {"before": a.mean(), "after": a.mean(), "difference": 0, "low": 0, "high": 0, "p": 1, "users": 3}
    assert paired_test([a], [a + [0.1, 0.1, 0.2]])["p"] < 0.1
