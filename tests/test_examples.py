"""The examples: their data load as the pages say, and their commands run to the end on tiny models."""

import json
import runpy
import sys

import pytest
from chat_templates import chat_tokenizer
from conftest import SIZES
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from atv.cli import main
from atv.data import load_tasks
from examples import house_style


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A tiny LLM with a chat template, in a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "llm", chat_tokenizer("chatml")
    set_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_replies_in_the_house_style_name_the_product_and_the_step(tmp_path, monkeypatch):
    file = tmp_path / "chats.jsonl"
    monkeypatch.setattr(sys, "argv", ["examples.house_style", str(file)])
    runpy.run_module("examples.house_style", run_name="__main__")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == house_style.rows()
    assert len({row["messages"][1]["content"] for row in rows}) == len(rows) == 480
    for row in rows:
        _, request, answer = (message["content"] for message in row["messages"])
        (product,) = [name for name in house_style.PRODUCTS if f" {name}" in request]
        assert f"your {product}" in answer
        assert answer.endswith(house_style.ENDING)
        assert sum(step in answer for step in house_style.STEPS.values()) == 1
    (task,) = load_tasks(data=file)
    assert (len(task.train), len(task.valid), len(task.test)) == (346, 38, 96)
    assert not task.chooses


def test_the_commands_of_the_page_run(llm, tmp_path, monkeypatch):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in house_style.rows()))
    out = tmp_path / "runs"
    small = ["--train-rows", "8", "--valid-rows", "2", "--epochs", "1", "--dtype", "float32", "--llm", str(llm)]
    commands = [
        ["train", "--data", file, "--positions", "answer", "--method", "fixed", "--out", out / "style", *small],
        ["eval", "--data", file, "--adapter", out / "style", "--test-rows", 2, "--metric", "token_f1", "--dtype",
         "float32", "--llm", llm, "--out", out / "style" / "eval"],
        ["report", out],
    ]  # fmt: skip
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["atv", *map(str, command)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
