"""Adapters on one tiny LLM, the sequential loop that a served answer must equal."""

import json
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import torch
from conftest import PAPER_FORM, byte_level_tokenizer, make_generator, make_llm, toy_task
from transformers import set_seed

from atv.config import ATVConfig
from atv.data import Example, Rendering
from atv.data.collate import edit_mask
from atv.data.render import Prompt, encode_text
from atv.data.rendering import chat_template_digest
from atv.evaluation.predict import Predictor
from atv.methods.atv import ATVMethod
from atv.model import ATVModel
from atv.serving.predict import EngineAnswers

TEXTS = (
    *("The harbour was quiet before the first boats came in.", "Is this opinion positive or negative?", "yes"),
    *("Question: the kettle leaks and the lid sticks, yes or no?", "one two three four five six.", "no no no"),
    *("The harbour was quiet before the last boats came in.", "The harbour was quiet before the first boats came in."),
)


def adapters(name="llama", dtype=torch.float64, **options):
    """Adapters with different layers, positions and strengths on one LLM, by name."""
    llm, tokenizer = make_llm(name, dtype), byte_level_tokenizer()
    path = getattr(llm, "layer_path", None)
    found = {}
    for number, (positions, layers, scale) in enumerate(
        [("last", "all", 0.5), ("answer", "top", 0.7), ("last:3", "0,2", 0.4), ("all", "bottom", 0.3)]
    ):
        config = ATVConfig(
            **(PAPER_FORM | {"positions": positions, "layers": layers, "scale": scale, "layer_path": path} | options)
        )
        set_seed(10 + number)
        model = ATVModel(llm, config, tokenizer=tokenizer, generator=make_generator(config)).to(dtype).eval()
        found[positions] = model
    return llm, tokenizer, found


def prompt(tokenizer, text, query=None):
    """The prompt that says a text."""
    return Prompt(encode_text(tokenizer, text), query or text)


@torch.no_grad()
def sequential(llm, row, ends, limit, scale=None):
    """Greedy tokens and their logits of one prompt read alone, whole at every step, with hooks written by hand."""
    model = row.model
    ids = list(row.prompt.ids)
    found = []
    for _ in range(limit):
        text = torch.tensor([ids])
        handles = []
        if model is not None:
            vectors = model.task_vectors([row.prompt.query])[0] * (model.config.scale if scale is None else scale)
            where = torch.zeros(len(ids), dtype=torch.bool)
            length = len(row.prompt.ids)
            where[:length] = edit_mask(torch.ones(1, length), model.positions)[0]
            where[length:] = model.positions.answer
            for layer, vector in zip(model.layers, vectors, strict=True):

                def add(_, __, output, vector=vector, where=where):
                    hidden = output[0] if isinstance(output, tuple) else output
                    hidden = hidden + where[None, :, None] * vector
                    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

                handles.append(layer.register_forward_hook(add))
        logits = llm(text).logits[0, -1]
        for handle in handles:
            handle.remove()
        token = int(logits.argmax())
        found.append((token, logits))
        if token in ends:
            break
        ids.append(token)
    return found


def saved(llm, tokenizer, folder, positions, seed, template=None, prepare=None, **options):
    """An adapter, changed by `prepare`, written to a folder and read again."""
    config = ATVConfig(**(PAPER_FORM | {"positions": positions, "scale": 0.6} | options))
    set_seed(seed)
    generator = None if config.generator == "self" else make_generator(config)
    model = ATVModel(llm, config, tokenizer=tokenizer, generator=generator)
    task = toy_task()
    if template is None:
        task = replace(task, renderer=Rendering("chat"), templates=("{input}",), answer_prefixes=(None,))
    model.training_summary = {
        "tasks": {task.name: task.asking()},
        "chat_template": chat_template_digest(tokenizer),
    }
    if prepare is not None:
        prepare(model)
    model.save_pretrained(folder)
    return ATVModel.from_pretrained(folder, llm, tokenizer=tokenizer)


def post(world, path, key=None, **body):
    """The JSON that a server at a port of this machine answers."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    asked = urllib.request.Request(f"http://127.0.0.1:{world.port}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        error.msg = error.read().decode()
        raise


OPTIONS = ["yes", "no", "yes no", "no no no", "one two three", "one two four"]
"""Options that share tokens, and of which some continue others."""


def same_predictions(engine, adapter, model):
    """Compare the answers to rows from an engine with those of the transformers model: scored options, and texts."""
    task = toy_task()
    summary = {"tasks": {task.name: task.asking()}, "chat_template": chat_template_digest(model.tokenizer)}
    long = ["quiet " * 400] if engine.context == model.llm.config.max_position_embeddings else []
    rows = [Example(text, "") for text in (*(text[:20] for text in TEXTS[:5]), " ", *long)]
    for about in ({"options": OPTIONS, "temperature": 1.7}, {"options": None, "answer_tokens": 3}):
        training = summary | {"tasks": {name: asked | about for name, asked in summary["tasks"].items()}}
        own = Predictor(ATVMethod(model), training, batch_size=3)
        expected = {index: answer for batch in own.answers(rows) for index, answer in batch}
        engines = EngineAnswers(engine, adapter, training, batch_size=4)
        found = {index: answer for batch in engines.answers(rows) for index, answer in batch}
        assert sorted(found) == list(range(len(rows)))
        if long:  # an engine's cut is a token shorter
            assert expected.pop(6).problem == found[6].problem == ""
            assert [index for index, answer in found.items() if answer.cut] == [6]
        for index, answer in expected.items():
            # a server leaves out special tokens, an evaluation only end tokens
            text = answer.text.replace("<unk>", "").replace("<s>", "").replace("<pad>", "").strip()
            assert (found[index].text, found[index].problem) == (text, answer.problem)
            chances = answer.probabilities
            assert found[index].probabilities == (None if chances is None else pytest.approx(chances, rel=2e-3))
        assert len({answer.text for answer in expected.values()}) > 2 or about["options"]
