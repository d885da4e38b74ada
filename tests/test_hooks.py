"""Finding decoder layers and editing their outputs."""

import pytest
import torch
from conftest import ARCHITECTURES, make_llm
from torch import nn

from atv.errors import ATVError
from atv.lm.hooks import base_llm, capture_outputs, decoder_layers, edit_outputs, flat_head


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoder_layers_are_found_by_structure(name):
    llm = make_llm(name)
    if name == "tuple":  # two lists of the same length: nothing to choose by
        with pytest.raises(ATVError, match="has 2 ModuleLists of 3 layers .*model.layers, tuple_layers.*layer_path"):
            decoder_layers(llm)
    layers = decoder_layers(llm, getattr(llm, "layer_path", None))
    assert len(layers) == 3
    assert len({type(layer) for layer in layers}) == 1


def test_a_list_inside_a_layer_is_not_the_list_of_layers():
    llm = make_llm()
    llm.model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert decoder_layers(llm) == list(llm.model.layers)


def test_no_list_of_the_right_length_names_the_candidates():
    llm = make_llm()
    llm.config.num_hidden_layers = 7
    with pytest.raises(ATVError, match=r"0 ModuleLists of 7 layers \(none\).*candidates: model.layers \(3\)"):
        decoder_layers(llm)
    with pytest.raises(ATVError, match="no ModuleList named 'nothing'; it has: model.layers"):
        decoder_layers(llm, "nothing")


class Layer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return {"tensor": x, "tuple": (x, "cache"), "list": [x, "cache"], "other": {"states": x}}[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list"])
def test_tensors_and_tuples_are_edited_alike_and_out_of_place(kind):
    layer, x = Layer(kind), torch.ones(1, 2, 3)
    with edit_outputs([layer], lambda index, hidden: hidden + index + 1), capture_outputs([layer]) as seen:
        out = layer(x)
    edited = out if kind == "tensor" else out[0]
    assert torch.equal(edited, torch.full((1, 2, 3), 2.0))
    assert torch.equal(seen[0], edited)
    assert torch.equal(x, torch.ones(1, 2, 3))
    assert kind == "tensor" or (type(out).__name__, out[1]) == (kind, "cache")
    assert layer(x) is x or layer(x)[0] is x


def test_an_output_without_hidden_states_is_refused():
    layer = Layer("other")
    with (
        pytest.raises(ATVError, match="Layer returned dict; expected hidden states"),
        edit_outputs([layer], lambda _, hidden: hidden),
    ):
        layer(torch.ones(1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt", "peft"])
def test_a_flat_head_changes_no_logit_and_never_multiplies_batchwise(name):
    llm = make_llm(name)
    ids = torch.arange(12).view(3, 4)
    with torch.no_grad():
        plain = llm(ids).logits
        with flat_head(llm):
            assert torch.equal(llm(ids).logits, plain)
    head = base_llm(llm).get_output_embeddings()
    assert not head._forward_hooks
    shapes = []
    handle = head.register_forward_hook(lambda _, args, __: shapes.append(args[0].dim()))
    with torch.no_grad(), flat_head(llm):
        llm(ids)
    handle.remove()
    assert shapes == [2]
