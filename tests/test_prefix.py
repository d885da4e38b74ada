"""What prompts share is read once, and nothing that comes out of the LLM changes."""

import pytest
import torch
from conftest import ARCHITECTURES, make_atv, make_llm, toy_task
from shared_prompts import INSTRUCTION, PROMPTS, encoded, logits
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atv.data import Task
from atv.data.collate import left_padded, pad_id
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.lm.prefix import SharedPrefix, call_llm
from atv.methods.atv import ATVMethod
from atv.methods.zero_shot import ZeroShot

WINDOWED = {"mistral", "gemma3"}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["last", "last:3", "answer", "all"])
def test_steered_and_plain_logits_are_those_of_the_plain_read(name, positions):
    atv = make_atv(name, positions=positions)
    ids = encoded(atv)
    shared = SharedPrefix(atv.llm, ids, atv.positions.prompt_tokens)
    assert (shared.length > 8) == (positions != "all" and name not in WINDOWED)
    for scale in (0.0, 0.3):
        with atv.steer(PROMPTS, scale=scale), torch.no_grad():
            theirs = call_llm(atv.llm, keep=1, **left_padded(ids, 0)).logits
            for once in (True, False):  # and a second batch finds what is shared as the first did
                torch.testing.assert_close(logits(atv.llm, shared, ids, once), theirs, atol=1e-9, rtol=0)


def test_the_own_tokens_of_a_prompt_are_never_shared():
    llm = make_llm()
    same = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]] * 3
    assert SharedPrefix(llm, same, 0).length == 9  # the last token is read for its logits
    assert SharedPrefix(llm, same, 2).length == 8
    assert SharedPrefix(llm, same, 3).length == 0  # too little to be worth a call
    assert SharedPrefix(llm, same, None).length == 0
    assert SharedPrefix(llm, same[:1], 0).length == 0


@pytest.mark.parametrize("method", ["zero-shot", "atv"])
def test_an_evaluation_reads_an_instruction_once_and_its_rows_are_the_same(method, tmp_path, monkeypatch):
    plain = toy_task(rows=30)
    templates = tuple(INSTRUCTION + template for template in plain.templates)
    task = Task(plain.name, templates, plain.train, plain.valid, plain.test)
    atv = make_atv(positions="last:2")
    read, rows, switched = [], [], []

    def note(_, args, kwargs):
        read.append(kwargs["input_ids"].numel())
        several = len(kwargs["input_ids"]) > 1
        switched.append((several and least == 8, ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward))

    hook = atv.llm.register_forward_pre_hook(note, with_kwargs=True)
    for folder, least in (("plain", 10_000), ("shared", 8)):
        monkeypatch.setattr(SharedPrefix.__init__, "__defaults__", (least,))
        run = RunWriter(tmp_path / folder, {})
        made = ATVMethod(atv) if method == "atv" else ZeroShot(atv.llm, atv.tokenizer)
        evaluate(made, [task], ["first_token"], run, batch_size=4)
        rows.append([{key: value for key, value in row.items() if key != "seconds"} for row in run.rows])
        read.append(0)
    hook.remove()
    assert rows[0] == rows[1]
    end = read.index(0)
    assert sum(read[end:]) < 0.5 * sum(read[:end])
    # Attention to what is shared is switched on for the batches that share it, and not where it is read.
    assert set(switched) == {(False, False), (True, True)}


def test_generate_goes_on_from_a_shared_prefix():
    atv = make_atv(positions="last:2")
    shared = SharedPrefix(atv.llm, encoded(atv), 2)
    inputs, past = shared.inputs(encoded(atv), pad_id(atv.tokenizer))
    width = inputs.pop("position_ids").shape[1]
    with atv.steer(PROMPTS):
        ours = atv.llm.generate(**inputs, past_key_values=past, max_new_tokens=6, do_sample=False, pad_token_id=0)
    texts = atv.tokenizer.batch_decode(ours[:, width:], skip_special_tokens=True)
    assert texts == atv.generate(PROMPTS, max_new_tokens=6, do_sample=False)
