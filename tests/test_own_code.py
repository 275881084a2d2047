"""Runs of one's own backbones: whatever of one's own code, constants or modules can change a result changes the key."""
import functools
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from ptmrec.runs import own_code

LAYERS = """
WIDTH = 3

def mix(x):
    return WIDTH * x

class Mixer:
    def forward(self, x):
        return mix(x)
"""
OWN = """
import functools
import numpy as np
import own_layers
from own_layers import Mixer
from ptmrec.backbones import BPRMF

SCALE, RATES, NOISE, UNUSED = 2, {"a": 1.0}, np.ones(3), 5
CONFIG = type("Config", (), {"__module__": __name__})()
CONFIG.depth = 1

def logged(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args) + 0
    return call

def raised(x, power=2):
    return x ** power

@functools.lru_cache
def cached(x):
    return x + 1

def default(x=SCALE):
    return x

halved = functools.partial(raised, power=0.5)

class Own(BPRMF):
    act = staticmethod(lambda x: x + 1)
    layer = Mixer
    table = [1, 2]

    @logged
    def loss(self, user, pos, neg, features=None):
        def inner():
            return [SCALE * x for x in RATES]
        return inner() + [NOISE, CONFIG, halved(1), cached(2), default(), own_layers.mix(3)]

    @functools.cached_property
    def late(self):
        return 1
"""
CHANGES = {
    "a constant": ("SCALE, RATES, NOISE, UNUSED = 2,", "SCALE, RATES, NOISE, UNUSED = 3,"),
    "a dict": ('"a": 1.0', '"a": 2.0'),
    "an array": ("np.ones(3)", "np.zeros(3)"), "an object": ("CONFIG.depth = 1", "CONFIG.depth = 2"),
    "a decorator": ("function(*args) + 0", "function(*args) + 1"), "which decorator": ("    @logged\n", ""),
    "a partial": ("power=0.5", "power=0.25"), "what is partial": ("x ** power", "x * power"),
    "a cached function": ("x + 1\n\ndef", "x\n\ndef"), "a default": ("x=SCALE", "x=SCALE + 1"),
    "a lambda": ("lambda x: x + 1", "lambda x: x - 1"), "a list": ("[1, 2]", "[2, 1]"),
    "a cached property": ("return 1\n", "return 2\n"), "a base": ("class Own(BPRMF)", "class Own(BPRMF.__base__)")}
IN_MODULE = {"a constant of a module": ("WIDTH = 3", "WIDTH = 4"), "a function of a module": ("WIDTH * x", "x * WIDTH"),
             "a layer of a module": ("return mix(x)", "return mix(x) + 1")}
NO_CHANGES = {"a remark": ("SCALE, RATES", "# a remark\nSCALE, RATES"),
              "a docstring": ("        def inner():\n", '        def inner():\n            "Inner."\n'),
              "a constant that is not used": ("np.ones(3), 5", "np.ones(3), 6")}


@pytest.fixture
def code(tmp_path, monkeypatch):
    "A function that returns the `own_code` of `Own` with these sources."
    monkeypatch.syspath_prepend(tmp_path)
    names = ("own_1", "own_2")
    left = iter(names)

    def read(own=OWN, layers=LAYERS):
        name = next(left)
        (tmp_path / "own_layers.py").write_text(layers)
        (tmp_path / f"{name}.py").write_text(own)
        sys.modules.pop("own_layers", None)
        importlib.invalidate_caches()
        return {k.replace(name, "own"): v for k, v in own_code(importlib.import_module(name).Own).items()}

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield read
    for name in ("own_layers", *names):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("what", CHANGES | IN_MODULE)
def test_what_can_change_a_result_changes_the_key(code, what):
    old, new = (CHANGES | IN_MODULE)[what]
    source = OWN if what in CHANGES else LAYERS
    assert old in source
    changed = source.replace(old, new, 1)
    assert code() != (code(own=changed) if what in CHANGES else code(layers=changed))


@pytest.mark.parametrize("what", NO_CHANGES)
def test_what_cannot_does_not(code, what):
    old, new = NO_CHANGES[what]
    assert old in OWN and code() == code(own=OWN.replace(old, new, 1))


def test_a_global_name_that_is_local_or_an_attribute_does_not_count(code):
    one, two = (OWN.replace("CONFIG.depth = 1", f"CONFIG.depth = 1\nuser = {n}\nmix = {n}\npower = {n}") for n in "12")
    assert code(own=one) == code(own=two)


def test_a_partial_is_taken_apart():
    codes = [own_code(functools.partial(np.mean if n else np.sum, axis=n)) for n in range(3)]
    assert len({str(code) for code in codes}) == 3


def test_the_key_is_the_same_in_another_process(tmp_path):
    (tmp_path / "own_layers.py").write_text(LAYERS)
    (tmp_path / "own.py").write_text(OWN)
    program = "import json, own; from ptmrec.runs import own_code; print(json.dumps(own_code(own.Own)))"
    found = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env=(
        os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed})).stdout for seed in ("1", "2")]
    assert found[0] == found[1] and {"Own.loss", "own.SCALE", "mix"} <= set(json.loads(found[0]))
