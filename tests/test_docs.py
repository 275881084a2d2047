"""README, CONTRIBUTING, CITATION and the index: links lead somewhere, tables agree, examples work."""
import ast
import re

import nbformat
import pytest
import torch
from conftest import ROOT

from ptmrec.backbones import BACKBONES
from ptmrec.clip_prompting import encode_image, load_clip
from ptmrec.data import MODALITIES
from ptmrec.peft import TUNINGS, attach
from ptmrec.ranking import METRICS, metric_names

README, CONTRIBUTING = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
INDEX = nbformat.read(ROOT / "nbs" / "index.ipynb", 4).cells
PROSE = {"README.md": README, "CONTRIBUTING.md": CONTRIBUTING,
         "nbs/index.ipynb": "\n\n".join(c.source for c in INDEX if c.cell_type == "markdown")}


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def table(text, header):
    "The Markdown table that begins with `header`, links as seen from nbs/."
    return re.search(rf"^{re.escape(header)}.*?(?=\n\n|\Z)", text, re.S | re.M)[0].strip().replace("](nbs/", "](")


@pytest.mark.parametrize("name", PROSE)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", PROSE[name]) if "://" not in link]
    missing = sorted({link for link in links if link and not (folder / link).exists()})
    assert links and not missing


def test_links_to_sections():
    for section in re.findall(r"\]\(README\.md#([^)]+)\)", CONTRIBUTING):
        assert section in [h.lower().replace(" ", "-").replace(",", "") for h in re.findall(r"^#+ (.*)$", README, re.M)]


def test_status_in_readme_is_that_of_the_index():
    made = [o.data["text/markdown"] for c in INDEX for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    status = next(text for text in made if "reproduced?" in text)
    assert table(README, "| the paper |") == status, "copy the table that nbs/index.ipynb makes into README.md"


def test_questions_in_readme_are_those_of_the_index():
    questions = table(PROSE["nbs/index.ipynb"], "| question |")
    assert table(README, "| question |") == questions
    listed = set(re.findall(r"\]\((\w+)\.ipynb\)", questions))
    notebooks = {p.stem for p in (ROOT / "nbs").glob("*.ipynb")} - {"index"}
    assert listed == notebooks, "give each notebook a line in the table of questions, in nbs/index.ipynb and README.md"


@pytest.mark.parametrize("name", PROSE)
def test_python_blocks_compile(name):
    for block in python_blocks(PROSE[name]):
        ast.parse(block)


@pytest.fixture
def contributed():
    "The examples of CONTRIBUTING.md, registered, and unregistered at the end."
    names, examples = {}, {"toy": BACKBONES, "bitfit": TUNINGS, "mrr": METRICS, "audio": MODALITIES}
    try:
        for block in python_blocks(CONTRIBUTING):
            if "load_data(" not in block:
                exec(block, names)
        assert all(name in known for name, known in examples.items())
        yield
    finally:
        for name, known in examples.items():
            if name in known:
                del known[name]


@pytest.mark.usefixtures("contributed")
def test_examples_work():
    user, item = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 3])
    backbone = BACKBONES["toy"](user, item, 3, 5, {"audio": 8}, emb_size=4, feature_weight=0.3)
    backbone.set_features({"audio": torch.randn(5, 8)})
    sum(backbone.loss(user, item, item.flip(0)).values()).backward()
    assert backbone.project["audio"].weight.grad.abs().sum() > 0
    assert "mrr@20" in metric_names()

    clip = load_clip("tiny", "sample")
    images = torch.randn(2, 3, clip.image_size, clip.image_size)
    stock = encode_image(clip, images)
    with attach(clip, "bitfit", bias_lr=0.1) as tuning:
        encode_image(clip, images).square().mean().backward()
        torch.optim.Adam(tuning.param_groups()).step()
        assert not torch.equal(encode_image(clip, images), stock)
    assert torch.equal(encode_image(clip, images), stock)


def test_citation():
    "The fields that CFF 1.2.0 asks for, of the software and of what it cites; the version is the package's."
    yaml = pytest.importorskip("yaml")
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= cff.keys()
    assert all({"type", "title", "authors"} <= reference.keys() for reference in cff["references"])
    assert f"version = {cff['version']}\n" in (ROOT / "settings.ini").read_text()


MODULES = {module.stem: module.read_text(encoding="utf-8") for module in sorted((ROOT / "ptmrec").glob("[a-z]*.py"))}
CLASSES = {c.name: c for source in MODULES.values() for c in ast.parse(source).body if isinstance(c, ast.ClassDef)}
CLEAR = {"seed", "rng", "device", "n_users", "n_items", "optimiser", "epochs", "title", "figure", "url", "path"}


def lineage(cls):
    "A class and those of the package that it is made of."
    return [cls, *(c for b in cls.bases if getattr(b, "id", "") in CLASSES for c in lineage(CLASSES[b.id]))] if cls else []


@pytest.mark.parametrize("module", MODULES)
def test_arguments_are_explained(module):
    "Each of three or more: by a comment beside it or by name in a docstring, unless its name or its class says it all."
    lines, body = MODULES[module].split("\n"), [(n, None) for n in ast.parse(MODULES[module]).body]
    body += [(m, c) for c, _ in body if isinstance(c, ast.ClassDef) and c.name[0] != "_" for m in c.body]
    for function, cls in ((n, c) for n, c in body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"):
        family = lineage(cls)
        overrides = any(getattr(m, "name", "") == function.name for c in family[1:] for m in c.body)
        told = "\n".join(ast.get_docstring(n) or "" for n in (function, *family))
        named = set(re.findall(r"\w+", " ".join(re.findall("`([^`]+)`", told))))
        arguments = [a for a in function.args.args + function.args.kwonlyargs if a.arg not in ("self", "cls")]
        for argument in arguments if len(arguments) > 2 and not overrides else []:
            ours = CLASSES.keys() & set(re.findall(r"\w+", ast.unparse(argument.annotation)))
            beside = "  # " in lines[argument.annotation.end_lineno - 1]
            assert argument.arg in CLEAR | named or ours or beside, (
                f"{module}.{function.name}: say in a comment beside {argument.arg} what it is")
