"""What must be exact: parity with stock CLIP, where gradients go, repeatability."""
import open_clip
import pytest
import torch

from ptmrec.backbones import BACKBONES, backbone_settings
from ptmrec.clip_prompting import Clip, DeepPrompts, ItemEncoder, encode_image, encode_text, frozen_features, load_clip
from ptmrec.data import DataError, load_data
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


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_no_prompts_equal_the_stock_clip(name):
    clip = make_clip(name)
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
    backbone = build_backbone(name, data.inter, features, backbone_settings(name, "sample"))
    model = Stage2(backbone, ItemEncoder(clip, data, DeepPrompts(clip, 2, 2)), **changes)
    user, item = (torch.as_tensor(x[:64]) for x in data.inter.part("train"))
    return model, (user, item, torch.randint(data.inter.n_items, (64,)))


@pytest.mark.parametrize("name", [n for n, cls in BACKBONES.items() if cls.uses_features])
def test_only_prompts_and_projections_learn_from_kt(sample, name):
    model, batch = stage2_model(sample, name, tune_backbone=True)  # even where embeddings could move
    sum(model.losses(*batch).values()).backward()
    moved = {n for n, q in model.named_parameters() if q.grad is not None and q.grad.abs().sum() > 0}
    assert moved == {"encoder.prompts.image", "encoder.prompts.text"} | {
        f"backbone.project.{m}.{q}" for m in ("image", "text") for q in ("weight", "bias")}
    assert model.backbone.user_emb.grad is None and model.backbone.item_emb.grad is None


def test_task_loss_reaches_prompts_through_the_batch(sample):
    model, batch = stage2_model(sample, "vbpr", kt_weight=0.0, task_weight=1.0)
    sum(model.losses(*batch).values()).backward()
    assert all(q.grad.abs().sum() > 0 for q in model.encoder.prompts.parameters())


def test_same_seed_same_metrics_bit_for_bit(runs):
    def once():
        run, = run_stage1(epochs=3, n_seeds=1)
        return run.metrics(), run.load_weights("backbone")

    (metrics, weights), (metrics_again, weights_again) = once(), once()
    assert metrics == metrics_again
    assert all(torch.equal(w, weights_again[n]) for n, w in weights.items())
    assert run_stage1(epochs=3, n_seeds=1, seed=1)[0].metrics() != metrics


@torch.no_grad()
def test_freedom_equals_a_dense_reference(sample):
    data, _, features = sample
    torch.manual_seed(0)
    settings = backbone_settings("freedom", "sample", n_layers=2, knn_k=10, image_weight=0.1, n_item_layers=1)
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
    for m, weight in (("image", 0.1), ("text", 0.9)):
        unit = torch.nn.functional.normalize(features[m], dim=1)
        nearest = (unit @ unit.T).topk(10).indices
        S += weight * torch.zeros(I, I).scatter_(1, nearest, 1 / 10)
    users, items = model()
    assert torch.allclose(users, out[:U], atol=1e-5)
    assert torch.allclose(items, out[U:] + S @ model.item_emb, atol=1e-5)
