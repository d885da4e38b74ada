"""Long queries and long answers: cut by a stated rule, and read in parts that need little memory."""

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, toy_task
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from rendering import Letters

from atv import Example, TrainConfig, train
from atv.data import Task, Template
from atv.data.collate import Row, split_by_length
from atv.data.render import TooLong, fitting
from atv.training import trainer
from atv.training.batches import training_rows
from atv.training.calibration import temperature_of


@given(st.text(min_size=1, max_size=60).filter(str.strip), st.integers(1, 80))
def test_a_query_is_cut_at_its_end_and_no_more_than_needed(query, room):
    render = Template("<{input}>", "A:")
    around = len("<>\nA:")
    if room <= around:
        with pytest.raises(TooLong, match=f"room for {room}"):
            fitting(render, Letters(), Example(query, ""), min(room, around))
        return
    try:
        read = Letters.text(fitting(render, Letters(), Example(query, ""), room).ids)
    except TooLong:
        assert not query[: room - around].strip()
        return
    said = read[1 : -len(">\nA:")]
    assert len(read) <= room
    assert query.startswith(said)
    if len(query) + around <= room:
        assert said == query
    else:
        assert query[: room - around].startswith(said)
        assert said == query[: len(said)].rstrip()


def long_rows(atv, answers):
    """Encoded rows with answers of these numbers of words."""
    render = Template("{input}", "A:")
    return [
        atv.encode_row(Row(Example("the harbour " * (1 + n % 3), " ".join(["leaks"] * n)), (render, render)))
        for n in answers
    ]


@pytest.mark.parametrize("positions", ["last", "answer"])
@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_parts_have_the_loss_and_gradient_of_the_batch(positions, tokens):
    atv = make_atv(positions=positions)  # float64
    batch = atv.collator()(long_rows(atv, [1, 12, 3, 12, 2]))
    whole = atv(**batch)
    expected = torch.autograd.grad(whole.loss, list(atv.parameters()))
    parts = split_by_length(batch, tokens)
    assert len(parts) == {1: 5, 10_000: 1}.get(tokens, len(parts))
    assert sum(share for share, _ in parts) == pytest.approx(1)
    assert all(part["labels"].numel() <= tokens or len(part["query_input_ids"]) == 1 for _, part in parts)
    loss = sum(share * atv(**part).loss for share, part in parts)
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for found, right in zip(torch.autograd.grad(loss, list(atv.parameters())), expected, strict=True):
        assert torch.allclose(found, right, rtol=1e-8, atol=1e-12)


def test_training_in_parts_learns_the_same(tmp_path, monkeypatch):
    learned = []
    for tokens in (10_000, 3):
        monkeypatch.setattr(trainer, "ANSWER_TOKENS", tokens)
        atv = make_atv(dtype=torch.float64, train_generator=False)  # without dropout
        config = TrainConfig.paper(epochs=2, batch_size=4, learning_rate=1e-3)
        train(atv, [toy_task()], tmp_path / str(tokens), config)
        learned.append(torch.cat([p.detach().flatten() for p in atv.parameters()]))
    assert torch.allclose(*learned, rtol=1e-6, atol=1e-9)


def test_over_long_training_rows_are_cut_or_left_out_and_counted(tmp_path, capsys):
    import dataclasses

    task = toy_task()
    rows = (Example("harbour " * 300, "yes"), Example("a long answer", "leaks " * 300), *task.train)
    atv = make_atv(dtype=torch.float32)
    train(atv, [dataclasses.replace(task, train=rows, options=())], tmp_path, TrainConfig(epochs=1, batch_size=4))
    said = " ".join(capsys.readouterr().err.split())
    assert "train: the queries of 1 of 10 rows are cut" in said
    assert "train: 1 of 10 rows are left out" in said
    with refused("All 1 train rows are too long"):
        alone = dataclasses.replace(task, train=rows[1:2], options=())
        train(atv, [alone], tmp_path / "alone", TrainConfig(epochs=1))


def test_the_temperature_is_that_of_the_rows_with_room_for_every_option():
    """A query that is cut leaves room for its own answer; GPT-2 has no positions for a longer one."""
    atv, (yes, no) = make_atv("gpt2", dtype=torch.float32), ("yes", "no, not at all, nor at any other time")
    examples = [Example(f"the harbour {n}", (yes, no)[n % 2]) for n in range(24)]
    split = {"train": examples[:8], "valid": examples[8:16], "test": examples[16:]}
    task = Task("long", ("{input}",), **{name: tuple(rows) for name, rows in split.items()})
    cut = atv.encode_row(Row(Example("leaks " * 400, yes), task.training_renderers(), "long"))
    rows = [atv.encode_row(row) for row in training_rows(task, "valid")]
    assert cut.cut
    with torch.no_grad():
        assert temperature_of(atv, task, [cut, *rows]) == temperature_of(atv, task, rows)
        assert temperature_of(atv, task, [cut]) is None


def test_a_prompt_of_evaluation_is_that_of_training():
    atv, tokenizer = make_atv(dtype=torch.float32), byte_level_tokenizer()
    (encoded,) = long_rows(atv, [1])
    assert encoded.pairs[0][0] == Template("{input}", "A:").prompt(tokenizer, Example("the harbour " * 2, "")).ids
