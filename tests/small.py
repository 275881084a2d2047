"""A small shop and small CLIPs with random weights, for tests that need their own."""
import tempfile
from functools import partial

import numpy as np
import open_clip
import pandas as pd
import torch
from PIL import Image

N_ITEMS = 37  # odd, so that shares are unequal
SHORT = dict(epochs=3, stage2_epochs=2, validate_every=1, stage2_batch_size=9, n_seeds=1, n_ctx=2, prompt_depth=2,
             device="cpu")
VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 20, "vocab_size": 100, "width": 32, "heads": 2, "layers": 3}


def make_shop(folder):
    "60 users in two groups, 37 items; one item has no image and one no title."
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = [(u, (2 * i + u % 2) % N_ITEMS, [0, 0, 0, 0, 0, 1, 2][n]) for u in range(60)
            for n, i in enumerate(rng.choice((N_ITEMS + 1) // 2, 7, replace=False))]
    pd.DataFrame(rows, columns=["user", "item", "x_label"]).to_csv(folder / "interactions.csv", index=False)
    titles = [f"{['red', 'blue', 'green'][i % 3]} {['mug', 'hat'][i % 2]} {i} " * (1 + i % 4) for i in range(N_ITEMS - 1)]
    pd.DataFrame({"item": range(N_ITEMS - 1), "title": titles}).to_csv(folder / "items.csv", index=False)
    for i in range(N_ITEMS):
        if i != 5:
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / "images" / f"{i}.png")


def add_sounds(folder):
    "A file of two bytes for each item of a shop, in `audio/`; their modality is to be registered."
    (folder / "audio").mkdir()
    for item in range(N_ITEMS):
        (folder / "audio" / f"{item}.raw").write_bytes(bytes([item, item % 5]))


def small_clips(vocab_size=TEXT["vocab_size"]):
    "open_clip's own kinds of CLIP: {name: function that makes one}."
    text = TEXT | {"vocab_size": vocab_size}

    def coca():
        heads, out = {"attn_pooler_heads": 2}, {"output_tokens": True}
        vision = VISION | heads | out | {"attentional_pool": True, "attn_pooler_queries": 8}
        model = open_clip.CoCa(32, text | heads, text | out | {"embed_cls": True}, vision)
        torch.nn.init.normal_(model.text_decoder.text_projection)  # open_clip leaves it as memory was, perhaps no number
        return model

    return {"plain": lambda: open_clip.CLIP(16, VISION, text),
            "custom text": lambda: open_clip.CustomTextCLIP(16, VISION, text | {"proj_bias": True}, quick_gelu=True),
            "coca": coca}


def hugging_face_clips(vocab_size=TEXT["vocab_size"]):
    "CLIPs with a Hugging Face text tower, of every kind that open_clip builds: {name: function that makes one}."
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    kinds = {
        "bert": size | {"max_position_embeddings": 24}, "xlm-roberta": size | {"max_position_embeddings": 25},
        "m2m_100": encoder | {"max_position_embeddings": 24},
        "mt5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}}

    def make(kind, pooler):
        from transformers import AutoConfig

        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model(kind, vocab_size=vocab_size, pad_token_id=0, **kinds[kind]).save_pretrained(folder)
            text = {"hf_model_name": folder, "hf_model_pretrained": False, "hf_pooler_type": pooler}
            return open_clip.CustomTextCLIP(16, VISION, text | {"hf_proj_type": "linear"})

    return {kind: partial(make, kind, "cls_pooler" if kind == "bert" else "mean_pooler") for kind in kinds}
