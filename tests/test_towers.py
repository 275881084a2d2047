"""One tower of a CLIP tuned alone: the other's features stay those of Stage 1, and it is not encoded."""
import json

import pytest
import torch
from small import SHORT, make_shop

from ptmrec import clip_prompting, prefix
from ptmrec.clip_prompting import ItemEncoder, frozen_features, load_clip
from ptmrec.data import load_data
from ptmrec.peft import TUNINGS, attach
from ptmrec.runs import open_run
from ptmrec.settings import SettingError
from ptmrec.stage1 import build_backbone
from ptmrec.stage2 import Stage2, run_stage2

METHODS = {"prompt": {"n_ctx": 2, "prompt_depth": 2}, "coupled_prompt": {"n_ctx": 2, "prompt_depth": 2},
           "adapter": {"adapter_size": 2}, "lora": {"lora_rank": 2}, "full": {},
           "prompt+lora": {"n_ctx": 2, "prompt_depth": 2, "lora_rank": 2}}
FEW = {k: v for k, v in SHORT.items() if k not in ("n_ctx", "prompt_depth")} | {"epochs": 1, "stage2_epochs": 1, "knn_k": 5}
OTHER = {"image": "text", "text": "image"}


@pytest.fixture
def shop(tmp_path, monkeypatch, runs):
    monkeypatch.setenv("PTMREC_DATA", str(tmp_path))
    make_shop(tmp_path / "shop")
    return tmp_path / "shop"


def never(*arguments):
    raise AssertionError("the tower that is not tuned was encoded")


def not_encoded(monkeypatch, tower):
    "From now on, encoding by this tower fails; Stage 1's features have to be there."
    monkeypatch.setattr(clip_prompting, f"encode_{tower}", never)
    monkeypatch.setattr(prefix, f"{tower}_features", never)


def test_every_method_is_tried():
    assert {name for method in METHODS for name in method.split("+")} == TUNINGS.keys() - {"none"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tower", OTHER)
def test_the_other_tower_stays_and_is_not_encoded(shop, monkeypatch, tower, method):
    plain, = run_stage2("shop", tuning="none", **FEW)
    not_encoded(monkeypatch, OTHER[tower])
    run, = run_stage2("shop", tuning=method, tuned_towers=tower, **FEW, **METHODS[method])
    stock, tuned = plain.load_weights("features"), run.load_weights("features")
    assert torch.equal(tuned[OTHER[tower]], stock[OTHER[tower]])
    assert not torch.equal(tuned[tower], stock[tower])
    assert all(tower in name.split(".") for name in run.load_weights("tuning"))
    before = run.stage1.load_weights("backbone")
    for m in OTHER:  # both projections learn
        assert not torch.equal(run.load_weights("backbone_as_is")[f"project.{m}.weight"], before[f"project.{m}.weight"])


def test_parameters_are_counted_by_tower(shop):
    tables = {}
    for towers in ("image+text", "text"):
        run, = run_stage2("shop", tuning="full", tuned_towers=towers, **FEW)
        tables[towers] = run.load_table("parameters.csv").set_index("group").T.to_dict()
    both, text = tables["image+text"], tables["text"]
    image = both["tuning, image"]["trained"]
    assert image > 0 and text == {k: v for k, v in both.items() if k != "tuning, image"} | {
        "CLIP, image tower": {"trained": 0, "frozen": image}}


def test_gradients_are_those_of_both_towers(shop):
    data, clip = load_data("shop"), load_clip()
    features = frozen_features(data, clip)
    user, pos = (torch.as_tensor(x) for x in data.inter.part("train"))
    found = {}
    for towers in (("image", "text"), ("text",)):
        torch.manual_seed(0)
        backbone = build_backbone("vbpr", data.inter, features)
        with attach(clip, "adapter", towers, adapter_size=3) as tuning:
            torch.manual_seed(1)
            for q in tuning.groups()["text"].values():
                q.data = torch.randn_like(q) / 9
            model = Stage2(backbone, ItemEncoder(clip, data, tuning, modalities=towers), task_weight=1.0)
            terms = model.losses(user, pos, pos.roll(1))
            sum(terms.values()).backward()
            learnt = {n: q.grad for n, q in model.named_parameters() if q.grad is not None and "image" not in n}
            found[towers] = terms | learnt
    one, both = found[("text",)], found[("image", "text")]
    assert one.keys() == both.keys() and any("tuning.text" in name for name in one)
    for name in one:
        assert torch.allclose(one[name], both[name], atol=1e-6), name


def test_a_run_opens_with_the_towers_that_it_tuned(shop):
    both, one = (run_stage2("shop", tuning="lora", tuned_towers=towers, **FEW)[0] for towers in ("image+text", "text"))
    stock, encoder = both.stage1.encoder(), open_run(one.folder).encoder()
    picture = next((shop / "images").glob("7.png"))
    assert torch.equal(encoder.image(picture), stock.image(picture))
    assert not torch.equal(encoder.text("red mug 0"), stock.text("red mug 0"))
    assert both.key != one.key and json.loads((one.folder / "run.json").read_text())["arguments"]["towers"] == ["text"]


def test_frozen_layers_are_kept_for_one_tower(shop, monkeypatch):
    last = {"prompt_position": "last", "n_ctx": 2, "prompt_depth": 1, "tuned_towers": "text"}
    plain, = run_stage2("shop", **FEW, **last)
    not_encoded(monkeypatch, "image")
    kept, = run_stage2("shop", cache_prefix=True, **FEW, **last)
    for name, w in plain.load_weights("features").items():
        assert torch.allclose(w, kept.load_weights("features")[name], atol=1e-5), name


def test_joint_training_of_one_tower(shop, monkeypatch):
    run, = run_stage2("shop", tuning="lora", tuned_towers="image", training="joint", epochs=1, n_seeds=1, knn_k=5,
                      device="cpu")
    stock = run.stage1.item_features()
    assert (run.item_features()["text"] == stock["text"]).all(axis=None)
    assert not (run.item_features()["image"] == stock["image"]).all(axis=None)


def test_what_cannot_be_tuned_is_refused(shop):
    with pytest.raises(SettingError, match="tuning='none' tunes no tower, and tuned_towers='text' was given"):
        run_stage2("shop", tuning="none", tuned_towers="text", **FEW)
    with pytest.raises(SettingError, match="tuned_towers='pictures' is not known.*image, text, or several joined by"):
        run_stage2("shop", tuned_towers="pictures", **FEW)
    for picture in (shop / "images").iterdir():
        picture.unlink()
    with pytest.raises(SettingError, match="tuned_towers='image', and the items of 'shop' have nothing for it.*Take text"):
        run_stage2("shop", tuned_towers="image", **FEW)


def test_the_direction_of_the_divergence_reaches_the_loss(shop):
    few = FEW | {"n_ctx": 2, "prompt_depth": 2}
    forward, same, reverse = (run_stage2("shop", **few, **how)[0] for how in (
        {}, {"kl_direction": "forward"}, {"kl_direction": "reverse"}))
    assert forward.key == same.key != reverse.key
    losses = [run.load_table("history.csv").loc[0, ["kt_image", "kt_text"]] for run in (forward, reverse)]
    assert (losses[0] != losses[1]).all() and (losses[1] > 0).all()
