"""Fixed: one vector per layer that no query changes, against hooks by hand and an ATV whose generator is constant."""

import json

import pytest
import torch
from conftest import byte_level_tokenizer, make_generator, make_llm, toy_task
from refusals import refused
from torch import nn

from atv.config import ATVConfig, TrainConfig
from atv.doctor import check_wiring
from atv.generator import CONSTANT
from atv.lm.hooks import decoder_layers
from atv.methods import METHODS
from atv.methods.fixed import Fixed, FixedConfig, FixedModel
from atv.model import ATVModel
from atv.training.loop import train

QUERIES = ["the kettle leaks", "a quiet harbour"]
PROMPTS = ["the kettle leaks\nA:", "a quiet harbour before the first boats came in\nA:"]


def made(dtype=torch.float64, **options):
    model = FixedModel(make_llm(dtype=dtype), FixedConfig(**options), tokenizer=byte_level_tokenizer()).to(dtype)
    return model.eval()


def moved(model):
    torch.manual_seed(4)
    with torch.no_grad():
        model.expansion.common.normal_()
        model.expansion.sizes.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return model


def test_it_learns_one_vector_per_layer_from_zero_and_nothing_else():
    model = made()
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(3, 32)]
    assert torch.equal(model.task_vectors(QUERIES), torch.zeros(2, 3, 32, dtype=torch.float64))


@pytest.mark.parametrize("positions", ["last", "all"])
def test_steering_equals_vectors_added_by_hand_whatever_the_query(positions):
    model = moved(made(positions=positions, scale=0.3))
    vectors = torch.tensor([[0.5], [1.0], [2.0]]) * model.expansion.common.detach()
    inputs = model.encode_prompts(PROMPTS)

    def by_hand(index):
        def hook(_, __, hidden):
            hidden = hidden.clone()
            hidden[:, slice(None) if positions == "all" else slice(-1, None)] += 0.3 * vectors[index]
            return hidden

        return hook

    with torch.no_grad():
        hooks = [layer.register_forward_hook(by_hand(i)) for i, layer in enumerate(decoder_layers(model.llm))]
        expected = model.llm(**inputs).logits
        for hook in hooks:
            hook.remove()
        for queries in (QUERIES, ["something else", "and another"]):
            with model.steer(queries):
                found = model.llm(**inputs).logits
            torch.testing.assert_close(found[:, -1], expected[:, -1], atol=1e-9, rtol=0)
        assert (expected - model.llm(**inputs).logits).abs().max() > 1e-2


class Same(nn.Module):
    """An encoder of any generator, whose states depend on nothing: the first unit vector, in a wide space."""

    def __init__(self, config):
        super().__init__()
        self.inner = make_generator(config).encoder
        self.config = self.inner.config

    def forward(self, input_ids, attention_mask):
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        output.last_hidden_state = torch.zeros_like(output.last_hidden_state)
        output.last_hidden_state[..., 0] = 1
        return output


class Reference(ATVModel):
    """With parts of one's own in it, which no adapter can hold: it is trained and not saved."""

    def require_savable(self):
        pass

    def save_pretrained(self, path):
        pass

    def load_weights(self, folder):
        pass


def losses(record):
    return [entry[key] for entry in record["history"] for key in ("loss", "eval_loss") if key in entry]


def test_it_trains_as_an_atv_with_a_real_generator_that_says_the_same_of_every_query(tmp_path):
    settings = TrainConfig(epochs=3, batch_size=4, learning_rate=0.5, weight_decay=0.01, adaptive_dropout=0.0)
    config = ATVConfig(scale=0.5, train_generator=False, generator=str(tmp_path / "stub"))
    llm, tokenizer = make_llm(dtype=torch.float32), byte_level_tokenizer()
    atv = Reference(llm, config, tokenizer=tokenizer, generator=make_generator(config))
    atv.generator.encoder = Same(config)
    atv.generator.requires_grad_(False)
    expected = train(atv, [toy_task()], tmp_path / "atv", settings).record
    out = tmp_path / "fixed"
    adapter = Fixed.fit(llm, tokenizer, [toy_task()], out, FixedConfig(scale=0.5), settings)
    found = losses(json.loads((out / "train.json").read_text()))
    assert len(found) == 6
    assert found[-1] < 0.9 * found[0]
    assert found == pytest.approx(losses(expected), abs=1e-5)
    method = Fixed.load(llm, tokenizer, adapter)
    torch.testing.assert_close(method.atv.task_vectors(QUERIES), atv.task_vectors(QUERIES), atol=1e-5, rtol=0)
    assert method.describe()["config"]["generator"] == CONSTANT


def test_the_wiring_is_right_from_the_start():
    failed = [check for check in check_wiring(made(scale=0.5)) if not check.passed]
    assert not failed


def test_a_saved_one_is_the_same_and_is_no_atv(tmp_path):
    model = moved(made(dtype=torch.float32))
    model.save_pretrained(tmp_path / "adapter")
    llm = make_llm(dtype=torch.float32)
    again = FixedModel.from_pretrained(tmp_path, llm, tokenizer=model.tokenizer)
    assert torch.equal(again.task_vectors(QUERIES), model.task_vectors(QUERIES))
    assert isinstance(again, FixedModel)
    with refused("is an adapter of the method fixed", "expected one of the method atv"):
        ATVModel.from_pretrained(tmp_path, llm, tokenizer=model.tokenizer)
    with refused("The method fixed needs an adapter"):
        METHODS["fixed"].load(llm, model.tokenizer, None)


@pytest.mark.parametrize(
    "wrong", [{"generator": "some/model"}, {"train_generator": True}, {"expansion_rank": 2}, {"gate": 0.1}]
)
def test_what_would_make_it_another_method_is_refused(wrong):
    with refused("a fixed vector does not depend on the query", *wrong):
        FixedConfig(**wrong)
