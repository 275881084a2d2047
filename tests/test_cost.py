"""Less memory, less time, and the same results."""

import platform
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import open_clip
import pytest
import torch
from small import N_ITEMS, SHORT, TEXT, VISION, hugging_face_clips, make_shop, small_clips
from torch.profiler import ProfilerActivity, profile

import ptmrec.memory
import ptmrec.stage2
from ptmrec.benchmarks import measure_fresh
from ptmrec.clip_prompting import Clip, ItemEncoder, frozen_features, image_tower, load_clip
from ptmrec.data import DataError, load_data
from ptmrec.memory import encoding_bytes, memory_need, peak_bytes
from ptmrec.peft import attach
from ptmrec.prefix import PrefixEncoder
from ptmrec.stage1 import build_backbone
from ptmrec.stage2 import Stage2, need_of, run_stage2
from ptmrec.tuning_cost import one_group, write_items

CLIPS = small_clips(vocab_size=49408) | {
    name: make for name, make in hugging_face_clips(vocab_size=49408).items() if name in ("bert", "xlm-roberta")} | {
    "efficientnet": lambda: open_clip.CustomTextCLIP(
        16, {"image_size": 32, "timm_model_name": "tf_efficientnet_lite0"}, TEXT | {"vocab_size": 49408})}
METHODS = {"prompt": {"prompt_depth": 2}, "adapter": {}, "lora": {}, "full": {}}
IN_LAST = {"prompt": {"prompt_position": "last", "prompt_depth": 2}, "coupled_prompt": {"prompt_position": "last",
           "prompt_depth": 1}, "adapter": {"last_layers": 1}, "lora": {"last_layers": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "60 users and 37 items, one without image and one without title; also the folder of caches."
    folder = tmp_path_factory.mktemp("cost")
    make_shop(folder / "shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTMREC_DATA", str(folder))
        yield load_data("shop")


def small_clip(name):
    torch.manual_seed(0)
    model = CLIPS[name]().eval().requires_grad_(False)
    return Clip(name, model, open_clip.SimpleTokenizer(context_length=20), 32, torch.zeros(3), torch.ones(3))


def stage2(data, method="prompt", clip=None):
    torch.manual_seed(0)
    clip = clip or load_clip()
    tuning = attach(clip, method, **METHODS[method])
    with torch.no_grad():
        for q in tuning.parameters():
            q += 0.01 * torch.randn_like(q)
    backbone = build_backbone("vbpr", data.inter, frozen_features(data, clip), {})
    return Stage2(backbone, ItemEncoder(clip, data, tuning), task_weight=1.0, tune_backbone=True)


@pytest.mark.parametrize("method", METHODS)
def test_any_micro_batch_gives_the_loss_and_gradients_of_the_batch(data, method):
    model = stage2(data, method)
    user, pos = torch.arange(40), torch.arange(40) % 19

    def losses_and_gradients(micro_batch):
        model.micro_batch = micro_batch
        model.zero_grad()
        terms = model.losses(user, pos, (pos + 7) % 37)
        sum(terms.values()).backward()
        return ({k: v.item() for k, v in terms.items()},
                {n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None})

    terms, gradients = losses_and_gradients(None)
    assert sum("tuning" in n for n, g in gradients.items() if g.abs().max() > 0) >= 2
    for micro_batch in (1, 6, 18):
        same, also = losses_and_gradients(micro_batch)
        assert same == pytest.approx(terms, rel=1e-5) and also.keys() == gradients.keys()
        largest = max(g.abs().max() for g in gradients.values())
        for name, g in gradients.items():
            assert torch.allclose(also[name], g, rtol=1e-3, atol=1e-5 * largest), name


def test_asking_for_memory_changes_nothing(data):
    model = stage2(data)
    state, bank = torch.get_rng_state(), {m: f.clone() for m, f in model.bank.items()}
    need = need_of(model, "items", 16)
    assert need.items == 16 and need.training[1] > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.bank[m], f) for m, f in bank.items())
    assert all(q.grad is None for q in model.parameters())
    model.live = False  # as without a tuning: nothing is encoded
    assert need_of(model, "items", 16).training == need_of(model, "items", 16).frozen == (0, 0)


def test_a_run_that_does_not_fit_says_what_to_change_and_auto_fits_it(data, tmp_path, monkeypatch):
    settings = SHORT | {"dataset": "shop", "backbone": "vbpr"}
    monkeypatch.setattr(ptmrec.memory, "LIBRARIES", 0)  # many times what this CLIP takes
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "plain"))
    plain, = run_stage2(**settings)
    need = plain.load_table("memory.csv").set_index("memory for").MB
    assert 0 < need["in all, with gaps"] < need["free"]
    monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / "short"))
    monkeypatch.setattr(ptmrec.stage2, "free_bytes", lambda device: 0.9e6 * need["in all, with gaps"])
    with pytest.raises(DataError, match="Set micro_batch to [1-8] or less, or to \"auto\""):
        run_stage2(**settings)
    fitted, = run_stage2(**settings, micro_batch="auto")
    table = fitted.load_table("memory.csv").set_index("memory for").MB
    assert table["in all, with gaps"] < 0.8 * table["free"] and "9 items at once" not in str(table.index)
    for name in ("loss", "kt_image"):
        assert np.allclose(fitted.load_table("history.csv")[name], plain.load_table("history.csv")[name], rtol=1e-4)
    with pytest.raises(ValueError, match="micro_batch=0 is not allowed: it must be a whole number at least 1"):
        run_stage2(**settings, micro_batch=0)


@pytest.mark.parametrize("method", IN_LAST)
@pytest.mark.parametrize("name", CLIPS)
def test_prefix_changes_neither_features_nor_gradients(data, name, method):
    if name == "efficientnet" and "prompt" in method:
        pytest.skip("takes no prompts")
    clip = small_clip(name)
    with attach(clip, method, **IN_LAST[method]) as tuning:
        for q in tuning.parameters():
            q.data += 0.05 * torch.randn_like(q)
        plain, cached = (cls(clip, data, tuning) for cls in (ItemEncoder, PrefixEncoder))
        blocks = []
        hook = image_tower(clip).blocks[0].register_forward_hook(lambda *_: blocks.append(1))
        with torch.no_grad():
            cached(torch.tensor([3, 5, 36]))  # without image, without title
        met = len(blocks)
        for items in (torch.arange(8), torch.tensor([36, 3, 3, 20])):
            results = []
            for encoder in (plain, cached):
                features = encoder(items)
                tuning.zero_grad()
                sum(f[:, ::3].sum() for f in features.values()).backward()
                results.append((features, [q.grad.clone() for q in tuning.parameters()]))
            for m, f in results[0][0].items():
                assert torch.allclose(results[1][0][m], f, atol=1e-5)
            assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*(r[1] for r in results)))
        n = len(blocks)
        cached(torch.arange(8))
        hook.remove()
        assert len(blocks) == n > met  # everybody is known by now


@pytest.mark.parametrize("name", CLIPS)
def test_texts_in_groups_of_similar_length_have_the_same_features_and_gradients(data, name, monkeypatch):
    "As those of the whole batch, each as long as its longest."
    clip, results, sizes = small_clip(name), [], []
    with attach(clip, "lora", towers=["text"]) as tuning:
        for q in tuning.parameters():
            q.data += 0.05 * torch.randn_like(q)
        encoder = ItemEncoder(clip, data, tuning, modalities=["text"])
        encode = encoder.encode
        monkeypatch.setattr(encoder, "encode", lambda modality, items: sizes.append(len(items)) or encode(modality, items))
        for how in (nullcontext, one_group):
            with how():
                features = encoder(torch.arange(N_ITEMS).flip(0))["text"]
            tuning.zero_grad()
            features[:, ::3].sum().backward()
            results.append([features, *(q.grad.clone() for q in tuning.parameters())])
    *groups, together = sizes
    assert sum(groups) == together == N_ITEMS - 1  # one has no text
    assert len(groups) == 1 if name == "coca" else len(groups) > 2  # it takes all padding
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*results))


def test_prefix_is_the_same_in_bf16(data):
    clip = load_clip()
    with attach(clip, "prompt", prompt_position="last", prompt_depth=1) as tuning, torch.no_grad():
        for m, f in ItemEncoder(clip, data, tuning, "bf16")(torch.arange(8)).items():
            cached = PrefixEncoder(clip, data, tuning, "bf16")
            for _ in range(2):  # made, and kept
                assert torch.allclose(cached(torch.arange(8))[m], f, atol=1e-6)


def test_a_run_with_prefix_is_the_same_run(data, tmp_path, monkeypatch):
    losses = {}
    for cache_prefix in (False, True):
        monkeypatch.setenv("PTMREC_RUNS", str(tmp_path / str(cache_prefix)))
        run, = run_stage2(**SHORT | {"prompt_depth": 1}, dataset="shop", backbone="vbpr", prompt_position="last",
                          cache_prefix=cache_prefix, micro_batch=4)
        losses[cache_prefix] = run.load_table("history.csv").loss
    assert np.allclose(losses[True], losses[False], rtol=1e-4) and losses[True].iloc[-1] != losses[True].iloc[0]


def test_prefix_refuses_what_starts_at_the_first_layer(data):
    clip = load_clip()
    for method, settings in {"prompt": {}, "full": {}, "lora": {}}.items():
        with attach(clip, method, **settings) as tuning, pytest.raises(DataError, match="prompt_position to last"):
            PrefixEncoder(clip, data, tuning)(torch.arange(3))


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    "A measurement of `tuning_cost` in a fresh process, on drawn items."
    folder = tmp_path_factory.mktemp("items")
    write_items(folder)
    return partial(measure_fresh, "tuning_cost.tuning_cost", folder=str(folder))


def allocated_bytes(run):
    "The most bytes that torch's allocator handed out at a time during `run()`, as the profiler records it."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()


@pytest.mark.parametrize("method", METHODS)
@one_group()  # as if all texts were about as long
def test_bytes_are_those_of_the_allocator(data, method):
    model = stage2(data, method)
    user, pos = torch.arange(40), torch.arange(40) % 19 + 18  # the longest text among them

    def step():
        sum(model.losses(user, pos, (pos + 7) % 37).values()).backward()

    used = allocated_bytes(step)
    model.zero_grad()
    assert peak_bytes(step) == pytest.approx(used, rel=1e-3)
    for accumulate, micro_batch in product((1, 2), (None, 5)):
        model.zero_grad()
        need = memory_need(model, user, pos, accumulate)
        gradients = 4 * sum(q.numel() for q in model.parameters() if q.requires_grad)
        assert need.trained == (3 + accumulate) * gradients
        model.micro_batch = micro_batch
        if accumulate > 1:
            step()  # the earlier batch
        used = allocated_bytes(step)
        model.micro_batch = None
        # at the start of the way back there are no gradients yet, at its end no layers
        assert used < 1.03 * (need.step(micro_batch) + gradients) < 1.1 * used + gradients


def test_groups_of_texts_take_no_more_than_is_foreseen(data):
    "LoRA's changed weights are large beside a short text's layers, and each group has its own."
    torch.manual_seed(0)
    model = open_clip.CLIP(16, VISION, TEXT | {"vocab_size": 49408, "width": 256}).eval().requires_grad_(False)
    clip = Clip("wide", model, open_clip.SimpleTokenizer(context_length=20), 32, torch.zeros(3), torch.ones(3))
    with attach(clip, "lora", towers=["text"]) as tuning:
        encoder = ItemEncoder(clip, data, tuning, modalities=["text"])
        there = torch.from_numpy(encoder.seen["text"].nonzero()[0])
        group = encoder.text_groups(there)
        items = torch.stack([there[group == n][0] for n in group.unique()])  # one of each group
        assert len(items) > 2
        a, b = encoding_bytes(encoder)
        used = allocated_bytes(lambda: encoder(items)["text"].sum().backward())
        assert a / len(items) + len(items) * b < used < a + len(items) * b


@pytest.mark.parametrize("both", [True, False])
def test_pictures_and_texts_of_different_items_are_foreseen(data, both):
    "Where the longest text has no picture, a batch may have such texts and pictures: neither is left out."
    kept = {"texts": ["a red mug"] * 19 + [""] * 18, "images": [None] * 19 + data.images[-18:]}
    if both:
        kept["texts"] = [f"{text} " * 5 for text in kept["texts"][:19]] + ["mug"] * 18
    model = stage2(replace(data, **kept))
    items = torch.tensor([0, 20]).repeat(10)
    need = memory_need(model, items, items)
    used = allocated_bytes(lambda: sum(f.sum() for f in model.encoder(items).values()).backward())
    assert used < 1.03 * (need.training[0] + 10 * need.training[1]) < 1.5 * used


@pytest.mark.parametrize("method, name", [("prompt", "bert"), ("lora", "bert"), ("adapter", "efficientnet")])
@one_group()
def test_bytes_of_other_towers_are_foreseen(data, method, name):
    model = stage2(data, method, small_clip(name))
    user, pos = torch.arange(40), torch.arange(40) % 19 + 18
    used = allocated_bytes(lambda: sum(model.losses(user, pos, (pos + 7) % 37).values()).backward())
    model.zero_grad()
    gradients = 4 * sum(q.numel() for q in model.parameters() if q.requires_grad)
    assert used < 1.03 * (memory_need(model, user, pos).step() + gradients) < 1.2 * used + gradients


def test_encoding_all_items_counts_where_it_takes_more(data):
    model = stage2(data)
    need = memory_need(model, torch.arange(3), torch.arange(3))
    assert need.step(1) < need.step(2) < need.step(3) < need.step() == need.frozen[0] + 37 * need.frozen[1]
    assert allocated_bytes(model.tuned) == pytest.approx(need.step(), rel=0.15)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux' /proc and glibc's settings of malloc")
@pytest.mark.parametrize("task", [{"tuning": "adapter"}, {"tuning": "full", "micro_batch": 8}], ids=lambda t: t["tuning"])
def test_tensors_are_foreseen(measure, task, monkeypatch):
    """Two layers of a ViT-B-32, a batch of 40; the highest resident memory of a fresh process.

    The C library gives freed memory back at once here, so that there are no gaps between tensors. What is left is what
    libraries keep inside operations, which differs between processors.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    clip = {"embed_dim": 512, "vision_cfg": {"image_size": 224, "layers": 2, "width": 768, "patch_size": 32},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 2}}
    row = measure(clip=clip, items=40, memory=True, device="cpu", **task)
    assert row["tensors (MB)"] == pytest.approx(row["used (MB)"], rel=0.25)
