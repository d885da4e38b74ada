"""ICL and ATV together: neither changes the other, and demonstrations are still read once."""

import json

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_llm, toy_task
from refusals import refused

from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.methods import METHODS


def load(tmp_path, method="icl+atv", shots=3, seed=42, **options):
    folder = tmp_path / "adapter"
    if not folder.exists():
        make_atv(dtype=torch.float32, scale=5.0, **options).save_pretrained(folder)
    adapter = None if method == "icl" else folder
    llm = make_llm(dtype=torch.float32)
    shots = None if method == "atv" else shots
    return METHODS[method].load(llm, byte_level_tokenizer(), adapter, shots=shots, seed=seed)


def asked(method, folder):
    """Predictions, and how many tokens the LLM read."""
    read, task = [], toy_task()
    hook = method.llm.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    run = RunWriter(folder, {})
    evaluate(method, [task], ["first_token"], run, variants="first", batch_size=4)
    hook.remove()
    return [row["outputs"]["first_token"] for row in run.rows], sum(read)


@pytest.mark.parametrize("positions", ["last", "last:3", "all"])
def test_predictions_are_those_of_a_prompt_written_by_hand_with_the_vectors_of_the_query_alone(tmp_path, positions):
    method, task = load(tmp_path, positions=positions), toy_task()
    icl = load(tmp_path, "icl")
    predictions, _ = asked(method, tmp_path / "run")
    shown = icl.demonstrations(task, task.test)[0]
    text = "".join(f"{row.input}\nyes or no?\nA: {row.output}\n\n" for row in shown)
    atv = load(tmp_path, "atv").atv
    first = {"last": -1, "last:3": -3, "all": 0}[positions]

    def edit(layer, output):
        edited = output.clone()
        edited[:, first:] += 5.0 * vectors[atv.layers.index(layer)]
        return edited

    for layer in atv.layers:
        layer.register_forward_hook(lambda layer, _, output: edit(layer, output))
    for row, prediction in zip(task.test, predictions, strict=True):
        ids = torch.tensor([method.tokenizer(f"{text}{row.input}\nyes or no?\nA:")["input_ids"]])
        vectors = atv.task_vectors([row.input])[0]
        with torch.no_grad():
            assert prediction == method.tokenizer.decode([atv.llm(ids).logits[0, -1].argmax()])


def test_at_scale_zero_it_is_icl_and_with_the_vectors_it_is_not(tmp_path):
    icl, read = asked(load(tmp_path, "icl"), tmp_path / "icl")
    steered, steered_read = asked(load(tmp_path), tmp_path / "steered")
    assert read == steered_read  # demonstrations once for all queries
    assert steered != icl
    config = tmp_path / "adapter" / "atv_config.json"
    written = json.loads(config.read_text())
    written["config"]["scale"] = 0.0
    config.write_text(json.dumps(written))
    assert asked(load(tmp_path), tmp_path / "zero")[0] == icl


def test_it_has_the_options_of_both(tmp_path):
    method, task = load(tmp_path, shots=5, seed=7), toy_task()
    assert method.demonstrations(task, task.test) == load(tmp_path, "icl", 5, 7).demonstrations(task, task.test)
    assert method.describe() == load(tmp_path, "atv").describe() | {"shots": 5}
    assert method.edited_tokens == 1
    assert load(tmp_path, shots=None).shots == 16
    with refused("icl+atv needs an adapter"):
        METHODS["icl+atv"].load(make_llm(), byte_level_tokenizer(), None)
