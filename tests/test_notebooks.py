"""The notebooks of examples/ run from top to bottom on tiny models, draw what they promise, and store no outputs."""

import ast
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import GROUPED, byte_level_tokenizer, make_generator
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from atv import ATVConfig

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIGURES = {"quickstart": 2, "look_inside": 4}


def cells(path, kind):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny LLM and a tiny generator, in folders."""
    folder = tmp_path_factory.mktemp("models")
    set_seed(1)
    LlamaForCausalLM(LlamaConfig(**GROUPED | {"max_position_embeddings": 1024})).to(torch.float32).save_pretrained(
        folder / "llm"
    )
    byte_level_tokenizer().save_pretrained(folder / "llm")
    make_generator(ATVConfig()).save(folder / "generator")
    return {
        "LLM": str(folder / "llm"),
        "GENERATOR": str(folder / "generator"),
        "TRAIN_ROWS": 8,
        "TEST_ROWS": 6,
        "EPOCHS": 1,
    }


def test_there_are_two():
    assert {path.stem for path in NOTEBOOKS} == set(FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, models, tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda file: None)
    drawn = []

    def show():
        for number in plt.get_fignums():
            axes = plt.figure(number).axes
            assert all(each.lines or each.collections or each.patches for each in axes)
            drawn.append([each.get_xlabel() for each in axes])
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    first, *others = cells(path, "code")
    names = {"__name__": "__main__"}
    exec(source(first), names)
    assert set(models) <= set(names), "the test replaces what the cell of parameters sets"
    names |= models
    for number, cell in enumerate(others, start=2):
        exec(compile(source(cell), f"{path.name} code cell {number}", "exec"), names)
    assert len(drawn) == FIGURES[path.stem]
    assert all(label for labels in drawn for label in labels)
    said = capsys.readouterr().out
    assert ("trainable params" if path.stem == "quickstart" else "The 3 nearest of 8 training queries") in said
    assert list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_plain(path):
    """Format 4.5 without outputs; parameters alone in the first code cell; explained; imports the package as `atv`."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    code = cells(path, "code")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert code[0]["metadata"] == {"tags": ["parameters"]}
    assert all(isinstance(node, ast.Assign) for node in ast.parse(source(code[0])).body)
    assert 'LLM = "embedded:smollm2-135m"' in source(code[0])
    assert whole["cells"][0]["cell_type"] == "markdown"
    assert source(whole["cells"][0]).startswith("# ")
    assert any("import atv\n" in source(cell) for cell in code)
