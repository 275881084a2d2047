"""Every method of tuning through the same table of checks, and each against an independent reference."""
import copy
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small import TEXT, hugging_face_clips, small_clips

from ptmrec.clip_prompting import Clip, ItemEncoder, encode_image, encode_text, frozen_features, text_module
from ptmrec.data import DataError, load_data
from ptmrec.peft import TOWERS, TUNINGS, Tuning, attach, sublayers
from ptmrec.settings import SettingError, Settings, setting
from ptmrec.stage2 import run_stage2


def timm_clip(name):
    vision = {"image_size": 224, "timm_model_name": name, "timm_model_pretrained": False}
    return shorter(open_clip.CustomTextCLIP(16, vision, TEXT))


def shorter(model):
    "With three blocks of timm's twelve."
    if hasattr(model.visual.trunk, "pos_embed"):
        model.visual.trunk.blocks = model.visual.trunk.blocks[:3]
    return model


def siglip():
    text = TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    vision = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False,
              "timm_pool": "map", "timm_proj": "none"}
    return shorter(open_clip.CustomTextCLIP(192, vision, text))


CLIPS = small_clips() | {
    "siglip": siglip,
    "eva02": lambda: timm_clip("eva02_tiny_patch14_224"),
    "mobileclip": lambda: timm_clip("fastvit_t8"),
    "convnext": lambda: timm_clip("convnext_atto"),
    "efficientnet": lambda: timm_clip("tf_efficientnet_lite0"),
} | hugging_face_clips()
TAKES_PROMPTS = ("plain", "custom text", "coca", "siglip", "bert", "xlm-roberta")
NO_PROMPTS = {"eva02": "Eva", "mobileclip": "FastVit", "convnext": "ConvNeXt", "efficientnet": "EfficientNet"}
METHODS = {
    "prompt": {"n_ctx": 3, "prompt_depth": 2}, "prompt last": {"n_ctx": 3, "prompt_depth": 2, "prompt_position": "last"},
    "coupled_prompt": {"n_ctx": 3, "prompt_depth": 2}, "adapter": {"adapter_size": 4}, "lora": {"lora_rank": 2},
    "lora attention": {"lora_rank": 2, "lora_targets": "attention", "last_layers": 1},
    "prompt+lora+adapter": {"n_ctx": 3, "prompt_depth": 2, "lora_rank": 2, "adapter_size": 4, "last_layers": 2}, "full": {},
}
ZERO = {"prompt": {"n_ctx": 0}, "prompt last": {"n_ctx": 0, "prompt_position": "last"}, "coupled_prompt": {"n_ctx": 0},
        "adapter": {"adapter_size": 0}, "lora": {"lora_rank": 0}, "none": {}}
NO_ATTENTION = ("mobileclip", "convnext", "efficientnet")
PAIRS = [(c, m) for c in CLIPS for m in METHODS
         if ("prompt" not in m or c in TAKES_PROMPTS) and ("attention" not in m or c not in NO_ATTENTION)]
_made = {}


def make(name):
    "A small CLIP with random weights, a batch of images and one of token ids whose last is the highest."
    if name not in _made:
        torch.manual_seed(0)
        model = CLIPS[name]().eval().requires_grad_(False)
        with torch.no_grad():
            for q in model.parameters():  # random inits make many towers blind: all images alike
                q += 0.05 * torch.randn_like(q)
        size = model.visual.image_size
        clip = Clip(name, model, None, size[0] if isinstance(size, tuple) else size, torch.zeros(3), torch.ones(3))
        tokens = torch.randint(1, 90, (4, 20))
        for row, end in enumerate((5, 9, 12, 19)):
            tokens[row, end], tokens[row, end + 1 :] = 99, 0
        _made[name] = clip, (torch.randn(4, 3, clip.image_size, clip.image_size), tokens)
    return _made[name]


def both(clip, batch, prompts=None):
    return torch.cat([F.normalize(encode_image(clip, batch[0], prompts), dim=1),
                      F.normalize(encode_text(clip, batch[1], prompts), dim=1)])


def start(clip, method, **changes):
    torch.manual_seed(1)
    return attach(clip, method.split()[0], **METHODS.get(method, {}) | changes)


@torch.no_grad()
def jolt(tuning):
    for q in tuning.parameters():
        q += 0.05 * torch.randn_like(q)


@pytest.fixture(params=CLIPS)
def stocked(request):
    clip, batch = make(request.param)
    with torch.no_grad():
        return clip, batch, both(clip, batch)


@torch.no_grad()
def test_stock_features_are_open_clips(stocked):
    clip, batch, features = stocked
    raw = torch.cat([clip.model.encode_image(batch[0]), clip.model.encode_text(batch[1])])
    assert torch.allclose(features, F.normalize(raw, dim=1), atol=1e-6)  # CoCa's are of unit length twice
    assert features[:4].std(0).max() > 1e-3 and features[4:].std(0).max() > 1e-3


@pytest.mark.parametrize("method", ZERO)
@torch.no_grad()
def test_nothing_added_changes_nothing(stocked, method):
    clip, batch, features = stocked
    if "prompt" in method and clip.name not in TAKES_PROMPTS:
        pytest.skip("takes no prompts")
    with attach(clip, method.split()[0], **ZERO[method]) as tuning:
        assert torch.equal(both(clip, batch, tuning.prompts), features)
        if method != "coupled_prompt":  # the maps have a bias, which no prompt carries
            assert sum(q.numel() for q in tuning.parameters()) == 0


@pytest.mark.parametrize("name, method", PAIRS)
def test_it_learns_and_is_taken_off_without_a_trace(name, method):
    clip, batch = make(name)
    before = {n: w.clone() for n, w in clip.model.state_dict().items()}
    with torch.no_grad():
        features = both(clip, batch)
    target = F.normalize(torch.randn(8, features.shape[1], generator=torch.Generator().manual_seed(0)), dim=1)
    with start(clip, method) as tuning:
        if "prompt" not in method:
            with torch.no_grad():
                assert torch.equal(both(clip, batch), features), "a method starts from the stock CLIP"
        mine = {id(q) for q in tuning.parameters()}
        optimiser = torch.optim.Adam([g | {"lr": 5e-3} for g in tuning.param_groups()])
        losses = []
        for _ in range(4):
            loss = (1 - (both(clip, batch, tuning.prompts) * target).sum(1)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        learning = {n: q.grad for n, q in tuning.named_parameters() if q.grad is not None and q.grad.abs().sum() > 0}
        assert {"image", "text"} == {t for t in TOWERS for n in learning if t in n.split(".")} or method == "coupled_prompt"
        if method != "full":  # a whole tower has weights that this loss cannot reach
            assert set(learning) == {n for n, _ in tuning.named_parameters()}
        assert not [n for n, q in clip.model.named_parameters() if q.grad is not None and id(q) not in mine]
        assert losses[-1] < losses[0]
    after = clip.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(w, after[n]) for n, w in before.items())
    assert not any(q.requires_grad for q in clip.model.parameters())
    with torch.no_grad():
        assert torch.equal(both(clip, batch), features)


@pytest.mark.parametrize("name, method", PAIRS)
@torch.no_grad()
def test_saved_and_loaded(name, method, tmp_path):
    clip, batch = make(name)
    with start(clip, method) as tuning:
        jolt(tuning)
        tuning.save(tmp_path / "tuning.safetensors")
        features, counted = both(clip, batch, tuning.prompts), sum(q.numel() for q in tuning.parameters())
    assert (tmp_path / "tuning.safetensors").stat().st_size < 4 * counted + 200 * len(list(tuning.parameters())) + 200
    with start(clip, method) as tuning:
        assert not torch.allclose(both(clip, batch, tuning.prompts), features, atol=1e-4)
        assert torch.equal(both(clip, batch, tuning.load(tmp_path / "tuning.safetensors").prompts), features)
    with attach(clip, "adapter", adapter_size=5) as other, pytest.raises(DataError, match="not those of this Adapter"):
        other.load(tmp_path / "tuning.safetensors")


@pytest.mark.parametrize("name, method", PAIRS)
def test_bf16_autocast_is_near_float32_and_learns(name, method):
    clip, batch = make(name)
    with start(clip, method) as tuning:
        optimiser = torch.optim.Adam([g | {"lr": 5e-3} for g in tuning.param_groups()])
        with torch.no_grad():
            exact, losses = both(clip, batch, tuning.prompts), []
        target = F.normalize(torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)), dim=1)
        for step in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                rough = both(clip, batch, tuning.prompts).float()
            if not step:
                assert (exact * rough).sum(1).min() > 0.98
            loss = (1 - (rough * target).sum(1)).mean()
            optimiser.zero_grad()
            loss.backward()
            assert all(q.grad.isfinite().all() for q in tuning.parameters() if q.grad is not None)
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("name, method", [
    ("ViT-B-16", "prompt"), ("coca_ViT-B-32", "coupled_prompt"), ("ViT-B-16-SigLIP", "prompt+lora"), ("EVA02-B-16", "lora"),
    ("MobileCLIP-S1", "adapter"), ("convnext_base", "full")])
def test_configurations_as_open_clip_has_them(name, method):
    "Whole architectures, with random weights, and one item."
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None).eval().requires_grad_(False)
    size = model.visual.image_size
    clip = Clip(name, model, None, size[0] if isinstance(size, tuple) else size, torch.zeros(3), torch.ones(3))
    text = text_module(clip)
    tokens = torch.zeros(1, text.context_length, dtype=torch.long)
    tokens[0, :6] = torch.tensor([1, 5, 9, 7, 3, text.vocab_size - 1])
    with attach(clip, method) as tuning:
        (both(clip, (torch.randn(1, 3, clip.image_size, clip.image_size), tokens), tuning.prompts)[:, ::3].sum()).backward()
        learning = [n for n, q in tuning.named_parameters() if q.grad is not None and q.grad.abs().sum() > 0]
        assert {"image", "text"} == {t for t in TOWERS for n in learning if t in n.split(".")} or method == "coupled_prompt"


@pytest.mark.parametrize("name", NO_PROMPTS)
def test_towers_without_room_for_prompts_are_refused_by_name(name):
    for method in ("prompt", "coupled_prompt"):
        message = f"{name}: its image tower is of type {NO_PROMPTS[name]}.*tuning = full, or lora or adapter"
        with pytest.raises(DataError, match=message):
            attach(make(name)[0], method)
    clip, batch = make(name)
    with torch.no_grad(), attach(clip, "prompt", ["text"]) as tuning:  # its text tower has room
        features, stock = both(clip, batch, tuning.prompts), both(clip, batch)
        assert torch.equal(features[:4], stock[:4]) and not torch.equal(features[4:], stock[4:])


@pytest.mark.parametrize("wrong, message", [
    ({"lora_targets": "attn"}, "lora_targets='attn' is not known. Did you mean attention"),
    ({"lora_rank": -1}, "lora_rank=-1 is not allowed: it must be a whole number at least 0 and at most 1,024"),
    ({"lora_rank": 65}, "lora_rank=65 is larger than a weight it would change: set it to at most 64")])
def test_what_fails_to_attach_leaves_nothing_behind(wrong, message):
    clip, batch = make("plain")
    stock, keys = both(clip, batch), list(clip.model.state_dict())
    with pytest.raises(SettingError, match=message):
        attach(clip, "adapter+lora", ["image"], **wrong)
    assert list(clip.model.state_dict()) == keys and torch.equal(both(clip, batch), stock)
    assert not any(m._forward_hooks for m in clip.model.modules())


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_last_layers_are_counted(method):
    clip, _ = make("plain")
    trained = []
    for last_layers in (1, 2, 3, None):
        with attach(clip, method, last_layers=last_layers) as tuning:
            trained.append(sum(q.numel() for q in tuning.parameters()))
    one = trained[0]
    assert one and trained == [one, 2 * one, 3 * one, 3 * one]
    with pytest.raises(SettingError, match="last_layers=0 is not allowed: it must be a whole number at least 1 and at most"):
        attach(clip, method, last_layers=0)
    with pytest.raises(DataError, match="last_layers=4: the image tower of .* has 3 layers. Set last_layers to 1 ... 3"):
        attach(clip, method, last_layers=4)


def test_clips_of_the_same_weights_are_told_apart():
    clip, _ = make("plain")
    others = [replace(clip, name="plain-quickgelu"), replace(clip, mean=torch.ones(3)), replace(clip, image_size=16)]
    assert len({c.fingerprint() for c in (clip, replace(clip), *others)}) == 4


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_towers_without_attention_are_refused_where_it_is_meant(name):
    with pytest.raises(DataError, match=f"{name}: no attention layers are known in its image tower.*tuning = full"):
        start(make(name)[0], "lora attention")


@pytest.mark.parametrize("wrong, message", [
    ("prefix", "tuning='prefix' is not known. Allowed"), ("promt", "Did you mean prompt?"), ("lora+", "is not known"),
    ("full+lora", "none and full are used alone"), ("none+prompt", "none and full are used alone"),
    ("prompt+coupled_prompt", "One kind of prompts, adapter and lora can be joined by")])
def test_names_that_mean_nothing(wrong, message):
    with pytest.raises(SettingError, match=message):
        attach(make("plain")[0], wrong)


@pytest.mark.parametrize("tuning, settings, message", [
    ("lora", {"n_ctx": 2}, "tuning='lora' has no setting n_ctx. It belongs to prompt, coupled_prompt. It has: "),
    ("prompt", {"prompt_dept": 2}, "has no setting prompt_dept. Did you mean prompt_depth?"),
    ("none", {"full_lr": 0.1}, "It belongs to full. It has: none."),
    ("prompt", {"n_ctx": 2.5}, "n_ctx=2.5 is not allowed: it must be a whole number at least 0"),
    ("prompt", {"prompt_position": "frist"}, "Did you mean first?"), ("prompt", {"prompt_lr": 0.0}, "a number above 0"),
    ("full", {"full_lr": float("nan")}, "full_lr=nan is not allowed"), ("adapter", {"adapter_size": True}, "a whole number"),
    ("lora", {"lora_targets": "mlp+attn"}, "lora_targets='mlp.attn' is not known")])
def test_settings_that_cannot_be(tuning, settings, message):
    with pytest.raises(SettingError, match=message):
        attach(make("plain")[0], tuning, **settings)


def test_shared_settings_mean_the_same():
    for owners in TUNINGS.settings().values():
        assert len({(str(f.annotation), f.description, str(f.metadata)) for f in owners.values()}) == 1
    assert set(TUNINGS.settings()["last_layers"]) == {"adapter", "lora"}


def test_a_method_of_ones_own_takes_one_class():
    @TUNINGS.register("scale")
    class Scale(Tuning):
        "A factor on the image features."

        class Settings(Settings):
            scale_start: float = setting(1.0, "factor at the start", gt=0)
            scale_lr: float = setting(0.1, "its learning rate", gt=0)

        def __init__(self, clip, towers, scale_start, scale_lr):
            super().__init__(scale_lr)
            self.image = torch.nn.Parameter(torch.tensor(scale_start))
            self.hook = clip.model.visual.register_forward_hook(lambda module, args, output: self.image * output)

        def detach(self):
            self.hook.remove()

    clip, (images, _) = make("plain")
    try:
        stock = encode_image(clip, images)
        with attach(clip, "scale+lora", scale_start=2.0, lora_rank=2) as tuning:
            assert torch.allclose(encode_image(clip, images), 2 * stock, atol=1e-5)
            assert [group["lr"] for group in tuning.param_groups()] == [2e-3, 0.1]
        assert torch.equal(encode_image(clip, images), stock)
    finally:
        del TUNINGS["scale"]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_one_tower_alone(method, tower):
    "The text tower of a plain CLIP bears a name that the image tower's ends with: only one of them may change."
    clip, batch = make("plain")
    features = both(clip, batch)
    with start(clip, method, towers=[tower]) as tuning:
        jolt(tuning)
        assert list(tuning.groups()) == [tower]
        same = [torch.equal(a, b) for a, b in zip(both(clip, batch, tuning.prompts).split(4), features.split(4))]
    assert same == [tower != "image", tower != "text"]


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_lora_equals_changed_weights(name):
    "W + alpha / r B A written into a copy of the model, weight by weight."
    clip, batch = make(name)
    other = copy.deepcopy(clip)
    with start(clip, "lora", lora_alpha=3) as tuning:
        jolt(tuning)
        features = both(clip, batch)
        weights = {t: iter(getattr(tuning, t)) for t in TOWERS}
        for tower in TOWERS:
            for module in (m for sub in sublayers(other, tower).values() for m in sub.modules):
                attention = isinstance(module, torch.nn.MultiheadAttention)
                inner = [m for m in module.modules() if isinstance(m, torch.nn.Linear) or isinstance(m, torch.nn.Conv2d)
                         and m.weight.shape[2:] == (1, 1) and m.groups == 1]
                for w in ([module.in_proj_weight] if attention else []) + [m.weight for m in inner]:
                    change = next(weights[tower])
                    w += 3 / 2 * (change.B @ change.A).view_as(w)
        assert not any([*weights[t]] for t in TOWERS)
    assert torch.allclose(features, both(other, batch), atol=2e-5)


@torch.no_grad()
def test_adapters_equal_a_forward_written_out():
    clip, (images, _) = make("plain")
    visual = clip.model.visual
    with start(clip, "adapter") as tuning:
        jolt(tuning)
        found = encode_image(clip, images)
        x = visual._embeds(images)
        boxes = iter(tuning.image)
    for block in visual.transformer.resblocks:
        for part in (lambda h: block.attn(h, h, h)[0], block.mlp):  # noqa: B023
            norm, box = (block.ln_2 if part is block.mlp else block.ln_1), next(boxes)
            h = part(norm(x))
            x = x + h + F.gelu(h @ box.down.weight.T + box.down.bias) @ box.up.weight.T + box.up.bias
    assert torch.allclose(found, visual.ln_post(x)[:, 0] @ visual.proj, atol=1e-5)


def attend(block, x, mask):
    "A pre-norm block, head by head, with a boolean mask of what may be seen."
    h, attn = block.ln_1(x), block.attn
    q, k, v = (h @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, -1)
    d, heads = x.shape[1] // attn.num_heads, []
    for n in range(attn.num_heads):
        s = slice(n * d, (n + 1) * d)
        logits = (q[:, s] @ k[:, s].T / d**0.5).masked_fill(~mask, -torch.inf)
        heads.append(logits.softmax(1) @ v[:, s])
    x = x + torch.cat(heads, 1) @ attn.out_proj.weight.T + attn.out_proj.bias
    return x + block.mlp(block.ln_2(x))


@pytest.mark.parametrize("position", ["first", "last"])
@torch.no_grad()
def test_coupled_prompts_equal_a_slow_forward(position):
    "One item at a time, token by token: text prompts and their linear maps, as MaPLe has them."
    clip, (images, tokens) = make("plain")
    tokens = tokens.clone()
    tokens[3, 16], tokens[3, 17:] = 99, 0  # with three prompts it just fits
    model, n = clip.model, 3
    tuning = start(clip, "coupled_prompt", prompt_position=position)
    jolt(tuning)
    text, maps = tuning.prompts.text, tuning.prompts.coupling["image"]
    image = [text[depth] @ maps[depth].weight.T + maps[depth].bias for depth in range(2)]
    at = {0: 0, 1: 1} if position == "first" else {1: 0, 2: 1}  # layer: number of its prompts
    found = both(clip, (images, tokens), tuning.prompts)
    for row in range(4):
        x = model.visual._embeds(images[row : row + 1])[0]
        patches = len(x)
        for layer, block in enumerate(model.visual.transformer.resblocks):
            if layer in at:
                x = torch.cat([x[:patches], image[at[layer]]])
            x = attend(block, x, torch.ones(len(x), len(x), dtype=torch.bool))
        pooled = model.visual.ln_post(x[:1]) @ model.visual.proj
        assert torch.allclose(F.normalize(pooled, dim=1)[0], found[row], atol=1e-5)

        words = model.token_embedding(tokens[row, : tokens[row].argmax() + 1])
        if position == "first":
            x = torch.cat([words[:1], text[0], words[1:]])
            x, inside = x + model.positional_embedding[: len(x)], n
            text_at = {1: 1}
        else:
            x, inside, text_at = words + model.positional_embedding[: len(words)], 0, at
        for layer, block in enumerate(model.transformer.resblocks):
            if layer in text_at:
                x = torch.cat([x[:1], text[text_at[layer]], x[1 + inside :]])
                inside = n
            x = attend(block, x, torch.ones(len(x), len(x), dtype=torch.bool).tril())
        pooled = model.ln_final(x[-1:]) @ model.text_projection
        assert torch.allclose(F.normalize(pooled, dim=1)[0], found[4 + row], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TAKES_PROMPTS if name != "xlm-roberta"])  # its mean leaves prompts out
@torch.no_grad()
def test_text_prompts_that_are_words_act_as_words(name):
    "Captioner's class token, padding and pooling included: three words as prompts, or written into the text."
    clip, (_, tokens) = make(name)
    tokens, words = tokens[:3], torch.tensor([7, 8, 9])
    prompts = attach(clip, "prompt", n_ctx=3, prompt_depth=1).prompts
    embedding = getattr(text_module(clip), "token_embedding", None) or text_module(clip).transformer.get_input_embeddings()
    prompts.text[0] = embedding(words)
    written = torch.cat([tokens[:, :1], words.expand(3, -1), tokens[:, 1:-3]], 1)
    assert torch.allclose(encode_text(clip, tokens, prompts), encode_text(clip, written), atol=1e-5)
    assert not torch.allclose(encode_text(clip, tokens), encode_text(clip, written), atol=1e-3)


@torch.no_grad()
def test_what_stands_before_the_last_layers_does_not_see_their_prompts():
    clip, (images, tokens) = make("plain")
    seen = {}
    hooks = [blocks[1].register_forward_hook(lambda m, a, out, n=n: seen.setdefault(n, []).append(out))
             for n, blocks in enumerate((clip.model.visual.transformer.resblocks, clip.model.transformer.resblocks))]
    for _ in range(2):
        tuning = attach(clip, "prompt", n_ctx=2, prompt_depth=1, prompt_position="last")
        both(clip, (images, tokens), tuning.prompts)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in seen.values())


def test_vit_b_32_counts():
    clip = Clip("ViT-B-32", open_clip.create_model("ViT-B-32", pretrained=None).requires_grad_(False), None, 224,
                torch.zeros(3), torch.ones(3))
    count = {m: sum(q.numel() for q in attach(clip, m).parameters()) for m in ("prompt", "coupled_prompt")}
    assert count["prompt"] == 3 * 8 * (768 + 512)
    assert count["coupled_prompt"] == 3 * 8 * 512 + 3 * (512 + 1) * 768
    with attach(clip, "adapter") as tuning:
        assert sum(q.numel() for q in tuning.parameters()) == 24 * sum(2 * 16 * w + w + 16 for w in (768, 512))
    with attach(clip, "lora") as tuning:
        assert sum(q.numel() for q in tuning.parameters()) == 12 * 8 * sum(4 * w + 2 * w + 5 * w + 5 * w for w in (768, 512))
    with attach(clip, "full") as tuning:
        assert sum(q.numel() for q in tuning.parameters()) == sum(q.numel() for q in clip.model.parameters()) - 1


@pytest.mark.parametrize("content", ["texts", "images"])
def test_shops_with_texts_or_images_alone(content, tmp_path, monkeypatch, runs):
    rng = np.random.default_rng(0)
    folder = tmp_path / "shop"
    (folder / "images").mkdir(parents=True)
    pairs = sorted({(u, (u + d) % 24) for u in range(24) for d in rng.choice(24, 6, replace=False)})
    (folder / "interactions.csv").write_text("userID,itemID\n" + "".join(f"u{u},i{i:02}\n" for u, i in pairs))
    if content == "texts":
        (folder / "items.csv").write_text("itemID,title\n" + "".join(f"i{i:02},thing {i}\n" for i in range(24)))
    for i in range(24 if content == "images" else 0):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "images" / f"i{i:02}.png")
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    for method in set(TUNINGS) - {"none"}:
        with pytest.warns(UserWarning):
            run, = run_stage2("shop", backbone="vbpr", tuning=method, epochs=1, stage2_epochs=1, n_seeds=1)
        table = run.load_table("parameters.csv").set_index("group")
        assert [g for g in table.index if g.startswith("tuning")] == [f"tuning, {content[:-1]}"]
        assert set(run.metrics()) == {"stage1", "as_is", "continued", "fresh"}


def test_the_clip_is_the_stock_one_after_a_failed_run(monkeypatch, runs):
    "An error in the middle of Stage 2 may not leave a method attached."
    import ptmrec.stage2 as stage2

    attached = []
    monkeypatch.setattr(stage2, "tune", lambda model, *args: attached.append(model.encoder) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_stage2(tuning="lora", epochs=1, n_seeds=1)
    encoder, = attached
    data = load_data("sample")
    assert not any("parametrizations" in n for n, _ in encoder.clip.model.named_parameters())
    items = torch.arange(8)
    with torch.no_grad():
        live, frozen = ItemEncoder(encoder.clip, data)(items), frozen_features(data, encoder.clip)
    assert all(torch.allclose(live[m], frozen[m][:8], atol=1e-5) for m in live)


@pytest.mark.parametrize("tuning", list(TUNINGS))
def test_towers_are_named_as_they_are_called(tuning):
    clip = Clip("plain", small_clips()["plain"](), None, 32, torch.zeros(3), torch.ones(3))
    for wrong in (["images"], ["imgae", "text"], ["text", "text"], "images"):
        with pytest.raises(SettingError, match="is not allowed. Name each of image and text at most once"):
            attach(clip, tuning, wrong)
    if tuning == "lora":
        tuned = attach(clip, tuning, "image")
        assert set(tuned.groups()) == {"image"}
        tuned.detach()
