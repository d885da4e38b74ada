"""A new decoder as generator: the shape that its name says, drawn from the seed, trained and saved whole."""

import pytest
import torch
from conftest import PAPER_FORM, byte_level_tokenizer, make_llm, sentencepiece_tokenizer, toy_task
from losses import batch_of
from refusals import refused
from transformers import LlamaModel, set_seed

from atv.config import ATVConfig, TrainConfig
from atv.doctor import check_wiring, model_summary
from atv.model import ATVModel
from atv.training.loop import train

QUERIES = ["the kettle leaks", "quiet", "a quiet harbour before the first boats came in"]


def made(name="random:2x32", seed=3, tokenizer=None, llm="llama", **options):
    frozen, config = make_llm(llm, torch.float32), ATVConfig(generator=name, **(PAPER_FORM | options))
    set_seed(seed)
    return ATVModel(frozen, config, tokenizer=tokenizer or byte_level_tokenizer()).eval()


@pytest.mark.parametrize(("layers", "width", "heads"), [(1, 16, 1), (2, 64, 1), (3, 192, 3)])
def test_its_shape_is_what_the_name_says(layers, width, heads):
    atv = made(f"random:{layers}x{width}")
    encoder = atv.generator.encoder
    assert type(encoder) is LlamaModel
    attention, mlp = 4 * width * width, 3 * width * 4 * width
    expected = 400 * width + layers * (attention + mlp + 2 * width) + width
    assert sum(p.numel() for p in encoder.parameters()) == expected
    assert encoder.config.num_attention_heads == heads
    assert encoder.config.max_position_embeddings == 256
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert encoder.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert atv.expansion.map.in_features == width
    assert f"generator random:{layers}x{width}, pooling mean" in model_summary(atv)


def test_it_reads_the_llms_tokens_in_the_query_template():
    atv = made(tokenizer=sentencepiece_tokenizer())
    assert atv.generator.encode(QUERIES[:1]) == [atv.tokenizer(QUERIES[0])["input_ids"]]


def test_the_seed_decides_it():
    same, other = made(seed=3), made(seed=4)
    vectors = made(seed=3).task_vectors(QUERIES)
    assert torch.equal(same.task_vectors(QUERIES), vectors)
    assert not torch.allclose(other.task_vectors(QUERIES), vectors)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_query_has_the_same_vectors_alone_and_in_a_padded_batch(pooling):
    together = made(pooling=pooling).task_vectors(QUERIES)
    for index, query in enumerate(QUERIES):
        torch.testing.assert_close(made(pooling=pooling).task_vectors([query])[0], together[index])


@pytest.mark.parametrize("llm", ["llama", "gpt2"])
def test_the_wiring_is_right_and_every_weight_takes_a_gradient(llm):
    atv = made(llm=llm)
    assert [check for check in check_wiring(atv) if not check.passed] == []
    atv.train()(**batch_of(atv)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in atv.parameters())


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_it_is_trained_and_saved_whole(tmp_path, tokenizer):
    atv = made(tokenizer=tokenizer(), llm="gpt2")
    before = {name: p.clone() for name, p in atv.generator.named_parameters()}
    train(atv, [toy_task(rows=12)], tmp_path / "out", TrainConfig.paper(epochs=1, batch_size=4))
    assert all(not torch.equal(p, before[name]) for name, p in atv.generator.named_parameters())
    set_seed(99)
    again = ATVModel.from_pretrained(tmp_path / "out", make_llm("gpt2", torch.float32), tokenizer=tokenizer())
    assert again.config.generator == "random:2x32"
    assert again.generator.name_or_path == "random:2x32"
    assert again.generator.encode(QUERIES) == atv.generator.encode(QUERIES)
    assert torch.equal(again.task_vectors(QUERIES), atv.task_vectors(QUERIES))


@pytest.mark.parametrize(
    "name", ["random:", "random:2", "random:x64", "random:2x", "random:0x64", "random:2x0", "random:2x7", "random:2x96",
             "random:2x64x1", "random:02x64", "random:-1x64", "random: 2x64"],
)  # fmt: skip
def test_a_malformed_name_is_refused(name):
    with refused(f"The generator is {name!r}", "expected random:LAYERSxWIDTH", "as in random:2x128"):
        ATVConfig(generator=name)


def test_it_is_always_trained_and_a_pooling_that_would_leave_it_blind_is_refused():
    assert ATVConfig(generator="random:2x64").train_generator  # it would never learn to read
    with refused("pooling is 'cls'", "random:2x64", "Expected last or mean"):
        ATVConfig(generator="random:2x64", pooling="cls")
