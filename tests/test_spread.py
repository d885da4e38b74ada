"""An LLM whose layers lie on several devices or are offloaded answers and trains as if it were whole.

Without a GPU the spread is over main memory and disk: offloaded weights are on the meta device between their uses.
"""

import copy
import json

import pytest
import torch
from accelerate import dispatch_model
from conftest import byte_level_tokenizer, make_atv, make_generator, make_llm, toy_task
from rendering import row_of
from transformers import Trainer, TrainingArguments

from atv.config import ATVConfig
from atv.doctor import check_wiring
from atv.errors import ATVError
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.lm.hooks import input_device
from atv.lm.identity import describe_llm
from atv.lm.load import load_llm
from atv.methods.atv import ATVMethod
from atv.model import ATVModel

ROWS = [row_of("the kettle leaks", ("the kettle leaks and the lid sticks\nA:", "is it so?\nA:"), "yes no")]
MAPS = {
    "embeddings on disk": {"embed_tokens": "disk", "norm": "disk", "rotary_emb": "cpu", "layers.0": "cpu",
                           "layers.1": "disk", "layers.2": "cpu"},
    "layers on disk": {"embed_tokens": "cpu", "norm": "cpu", "rotary_emb": "cpu", "layers.0": "disk",
                       "layers.1": "disk", "layers.2": "disk"},
}  # fmt: skip


def spread(llm, name, folder):
    llm = copy.deepcopy(llm)
    devices = {f"model.{part}": device for part, device in MAPS[name].items()} | {"lm_head": "disk"}
    return dispatch_model(llm, devices, main_device="cpu", offload_dir=folder, force_hooks=True)


def pair(name, folder, positions="last:2"):
    """The same ATV on an LLM in one piece and on one that is spread."""
    whole = make_atv(dtype=torch.float32, positions=positions)
    llm = spread(whole.llm, name, folder)
    parts = ATVModel(
        llm, whole.config, tokenizer=byte_level_tokenizer(), generator=make_generator(whole.config)
    ).eval()  # fmt: skip
    parts.load_state_dict(whole.state_dict())
    assert any(p.is_meta for p in llm.parameters())
    return whole, parts


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("positions", ["last:2", "all"])
def test_loss_gradient_and_text_are_those_of_the_whole_llm(name, positions, tmp_path):
    whole, parts = pair(name, tmp_path, positions)
    results = []
    for atv in (whole, parts):
        loss = atv(**atv.collator()([atv.encode_row(row) for row in ROWS])).loss
        loss.backward()
        texts = atv.generate(["the kettle leaks\nA:", "x"], max_new_tokens=5, do_sample=False)
        results.append((loss, [p.grad for p in atv.parameters()], texts))
    (loss, gradients, texts), (expected, of_whole, texts_of_whole) = results[1], results[0]
    torch.testing.assert_close(loss, expected)
    assert max(g.abs().max().item() for g in of_whole) > 1e-4
    torch.testing.assert_close(gradients, of_whole)
    assert texts == texts_of_whole


@pytest.mark.parametrize("name", MAPS)
def test_inputs_go_where_the_embeddings_are_used_and_the_wiring_holds(name, tmp_path):
    whole, parts = pair(name, tmp_path)
    assert input_device(parts.llm) == torch.device("cpu")
    assert {p.device.type for p in parts.parameters()} == {"cpu"}
    assert [check.found for check in check_wiring(parts) if not check.passed] == []
    assert describe_llm(parts.llm) == describe_llm(whole.llm)


def test_it_is_evaluated_alike(tmp_path):
    whole, parts = pair("embeddings on disk", tmp_path / "offload")
    task = toy_task(rows=6)
    for atv, folder in ((whole, tmp_path / "whole"), (parts, tmp_path / "parts")):
        evaluate(ATVMethod(atv), [task], ["first_token"], RunWriter(folder, {}))
    rows = {}
    for name in ("whole", "parts"):
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        rows[name] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    assert rows["parts"] == rows["whole"]


def test_the_trainer_copies_no_model_that_is_spread(tmp_path):
    llm = make_llm(dtype=torch.float32)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for devices in (None, {"model": 0, "lm_head": 1}):
        if devices:
            llm.hf_device_map = devices
        config = ATVConfig()
        atv = ATVModel(llm, config, tokenizer=byte_level_tokenizer(), generator=make_generator(config))
        assert Trainer(model=atv, args=arguments).is_model_parallel == bool(devices)


def test_auto_places_an_llm_and_an_unknown_device_is_named(tmp_path):
    make_llm(dtype=torch.float32).save_pretrained(tmp_path)
    llm = load_llm(str(tmp_path), dtype="float32", device="auto")
    ids = torch.arange(4)[None].to(input_device(llm))
    torch.testing.assert_close(llm(ids).logits, load_llm(str(tmp_path), dtype="float32", device="cpu")(ids).logits)
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ATVError, match=f"device '{device}' cannot be used.*or auto"):
            load_llm(str(tmp_path), device=device)
