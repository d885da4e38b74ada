"""The prefix store: what is kept is what was read, in memory, on disk or not at all, and its budgets hold."""

import errno
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, make_atv, toy_task
from hypothesis import given
from hypothesis import strategies as st
from rendering import row_of
from safetensors.torch import load_file
from training_runs import quick, tiny, weights

from atv.data.collate import left_padded
from atv.lm import prefix_tree
from atv.lm.prefix import counts_positions, read_prefix
from atv.lm.prefix_store import PrefixStore
from atv.training.loop import train

TEXTS = ["the harbour was quiet", "is it? yes or no, six", "two", "the kettle leaks and the lid sticks"]
BIG = 1 << 30
BUDGETS = {"memory": (BIG, 0), "disk": (0, BIG), "both": (30_000, BIG), "some": (30_000, 0), "none": (0, 0)}


def prefixes_of(atv, texts=TEXTS):
    return [atv.tokenizer(text)["input_ids"][:-1] for text in texts]


def filled(atv, budgets, folder, prefixes=None):
    store = PrefixStore(*budgets)
    store.fill(atv.llm, prefixes or prefixes_of(atv), lambda count: None, folder)
    return store


def count_reads(monkeypatch):
    """How many rows the LLM has read, call by call."""
    rows = []

    def counting(llm, input_ids, *rest, **named):
        rows.append(len(input_ids))
        return read_prefix(llm, input_ids, *rest, **named)

    monkeypatch.setattr("atv.lm.prefix_store.read_prefix", counting)
    return rows


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("budgets", BUDGETS.values(), ids=BUDGETS)
def test_loss_and_gradients_are_those_without_a_store(name, budgets, tmp_path):
    atv = make_atv(name, positions="last:2")
    rows = [atv.encode_row(row_of(text, (f"{text}\nA:", f"Question: {text} so?"), "no it is")) for text in TEXTS]
    batch, parameters = atv.collator()(rows), list(atv.parameters())
    plain = torch.autograd.grad(atv(**batch).loss, parameters)
    prompts = [prompt[:-2] for row in rows for prompt, _ in row.pairs]
    atv.read_prefix = filled(atv, budgets, tmp_path, prompts).read
    for ours, theirs in zip(torch.autograd.grad(atv(**batch).loss, parameters), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["memory", "disk", "both"])
def test_what_is_kept_is_bit_for_bit_what_was_read(kind, dtype, tmp_path, monkeypatch):
    atv = make_atv(dtype=dtype)
    prefixes = sorted(prefixes_of(atv), key=len)
    inputs = left_padded(prefixes, 0)  # the batch that the store reads: the shortest prefix first
    fresh = read_prefix(atv.llm, **inputs)
    store = filled(atv, BUDGETS[kind], tmp_path, prefixes)
    calls = count_reads(monkeypatch)
    kept = store.read(atv.llm, **inputs)
    assert calls == []
    attended = inputs["attention_mask"].bool()
    for ours, theirs in zip(kept.layers, fresh.layers, strict=True):
        assert ours.keys.dtype == dtype
        for side in ("keys", "values"):
            read, original = getattr(ours, side).transpose(1, 2), getattr(theirs, side).transpose(1, 2)
            assert torch.equal(read[attended], original[attended])
            assert not read[~attended].any()


def test_only_rows_that_are_not_kept_are_read(tmp_path, monkeypatch):
    atv = make_atv()
    short, long = prefixes_of(atv)[2], prefixes_of(atv)[3]
    store = filled(atv, (BIG, 0), None, [short])
    calls = count_reads(monkeypatch)
    ours = store.read(atv.llm, **left_padded([short, long, short], 0))
    assert calls == [1]
    theirs = read_prefix(atv.llm, **left_padded([short, long, short], 0))
    attended = left_padded([short, long, short], 0)["attention_mask"].bool()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(a.keys.transpose(1, 2)[attended], b.keys.transpose(1, 2)[attended])


TEMPLATES = ("{}\nyes or no? A:", "{}\nIs it so? Answer:", "System: be brief. {}\nA:", "System: be brief. {}")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("budgets", BUDGETS.values(), ids=BUDGETS)
def test_prompts_that_begin_alike_are_kept_as_if_each_was_read_alone(name, budgets, tmp_path, monkeypatch):
    atv = make_atv(name)  # float64
    if not counts_positions(atv.llm):
        atv.llm.config.sliding_window = 500  # in which all prompts fit, with the padding beside them
    prefixes = [atv.tokenizer(template.format(text))["input_ids"] for text in TEXTS for template in TEMPLATES]
    monkeypatch.setattr("atv.lm.prefix_store.READ_TOKENS", 60)  # several batches
    store = filled(atv, budgets, tmp_path, prefixes)
    calls = count_reads(monkeypatch)
    for size in (1, 3):
        for start in range(0, len(prefixes), size):
            inputs = left_padded(prefixes[start : start + size], 0)
            attended = inputs["attention_mask"].bool()
            calls.clear()
            ours = store.read(atv.llm, **inputs)
            assert budgets[1] == 0 or budgets == BUDGETS["none"] or not calls
            for kept, fresh in zip(ours.layers, read_prefix(atv.llm, **inputs).layers, strict=True):
                for side in ("keys", "values"):
                    sides = [getattr(layer, side).transpose(1, 2)[attended] for layer in (kept, fresh)]
                    torch.testing.assert_close(*sides, atol=1e-9, rtol=0)


def test_a_shared_beginning_is_read_and_kept_once():
    atv = make_atv(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    system, *own = [torch.randint(4, 380, (size,), generator=generator).tolist() for size in (200, *[12] * 50)]
    store = filled(atv, (BIG, 0), None, [system + ids for ids in own])
    apart = filled(atv, (BIG, 0), None, own)
    assert store.tokens_read == 200 + 50 * 12
    assert store.memory_used - apart.memory_used == apart.memory_used / (50 * 12) * 200
    assert store.left_out == 0


def test_the_seconds_of_prompts_are_those_of_their_batches(monkeypatch):
    """Each batch takes a second by this clock. A shared beginning counts once, and a second reading changes nothing."""
    clock = SimpleNamespace(perf_counter=map(float, count()).__next__)
    monkeypatch.setattr("atv.lm.prefix_store.time", clock)
    calls, atv = count_reads(monkeypatch), make_atv(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    system, *own = [torch.randint(4, 380, (size,), generator=generator).tolist() for size in (200, *[12] * 50)]
    prompts = [system + ids for ids in own]
    store = filled(atv, (BIG, 0), None, prompts)
    assert store.seconds_of(prompts) == pytest.approx(len(calls))
    assert store.seconds_of(prompts[:1]) in [pytest.approx(1 + 1 / rows) for rows in calls[1:]]
    store.fill(atv.llm, prompts, lambda _: None)
    assert store.seconds_of(prompts) == pytest.approx(len(calls))
    assert store.seconds_of([[1, 2, 3]]) == 0


def test_a_beginning_that_does_not_fit_leaves_out_what_follows_it():
    atv = make_atv(dtype=torch.float32)
    system = list(range(4, 104))
    prefixes = [[*system, 10 + number, 7] for number in range(9)]
    store = filled(atv, (1000, 0), None, prefixes)
    assert (store.left_out, store.memory_used, store._pieces) == (9, 0, {})


PROMPTS = st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=30)


@given(prompts=PROMPTS, least=st.integers(1, 5), tokens=st.integers(1, 40))
def test_every_prompt_is_made_of_pieces_that_are_read_in_order(prompts, least, tokens):
    starts = prefix_tree.tree(prompts, least)
    for prompt in prompts:
        pieces = prefix_tree.pieces_of(prompt, starts)
        assert pieces[-1] == prompt
        assert [starts[piece] for piece in pieces] == [0, *map(len, pieces[:-1])]
        assert all(prompt[: len(piece)] == piece for piece in pieces)
    for ids, start in starts.items():
        followed = [piece for piece in starts if starts[piece] == len(ids) and piece[: len(ids)] == ids]
        assert ids in prompts or (len(followed) > 1 and len(ids) - start >= least)
    read = set()
    for batch in prefix_tree.batches(starts, tokens):
        new = [len(ids) - starts[ids] for ids in batch]
        assert len(batch) == 1 or len(batch) * max(new) <= tokens
        assert not read & set(batch)
        assert all(starts[ids] == 0 or ids[: starts[ids]] in read for ids in batch)
        read |= set(batch)
    assert read == starts.keys()
    assert sum(len(ids) - start for ids, start in starts.items()) <= sum(map(len, prompts))


@given(prompts=PROMPTS)
def test_with_one_shared_token_worth_a_piece_every_token_is_read_once(prompts):
    starts = prefix_tree.tree(prompts, 1)
    nodes = {prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}
    assert sum(len(ids) - start for ids, start in starts.items()) == len(nodes)


@pytest.fixture(scope="module")
def trained_without_a_store(tmp_path_factory):
    """Weights after a training that reads every prompt again each time."""
    return trained_with(PrefixStore(0, 0), tmp_path_factory.mktemp("plain"))


def trained_with(store, folder):
    torch.manual_seed(5)
    train(tiny(), [toy_task(rows=12)], folder, quick(templates_per_row=3), store=store)
    return weights(folder)


@pytest.mark.parametrize("kind", [kind for kind in BUDGETS if kind != "none"])
def test_a_training_is_bit_for_bit_the_one_without_a_store(kind, tmp_path, trained_without_a_store, monkeypatch):
    """Equal batches: every prompt of equal length, all of them in each batch, read so by the store as well."""
    monkeypatch.setattr(prefix_tree, "LEAST", 10**6)  # a beginning that is read on its own is rounded otherwise
    store = PrefixStore(*BUDGETS[kind])
    stored = trained_with(store, tmp_path)
    assert (store.memory_used > 0, store.disk_used > 0) == (BUDGETS[kind][0] > 0, BUDGETS[kind][1] > 0)
    assert stored.keys() == trained_without_a_store.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in trained_without_a_store.items())


def test_memory_and_disk_stay_within_a_budget_of_a_few_megabytes(tmp_path):
    atv = make_atv(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    prefixes = [torch.randint(4, 380, (40 + i % 60,), generator=generator).tolist() for i in range(300)]
    budgets = (2_000_000, 3_000_000)
    store = filled(atv, budgets, tmp_path, prefixes)
    files = list(tmp_path.iterdir())
    on_disk = {key for file in files for key in load_file(file)}
    in_memory = sum(tensor.nbytes for key, tensor in store._kept.items() if key not in on_disk)
    assert 0.9 * budgets[0] < in_memory == store.memory_used <= budgets[0]
    assert 0.5 * budgets[1] < sum(file.stat().st_size for file in files) == store.disk_used <= budgets[1]
    assert store.left_out == len(prefixes) - len(store._kept) > 0


def test_a_full_disk_is_said_and_training_goes_on(tmp_path, monkeypatch, capfd):
    def no_space(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("atv.lm.prefix_store.write_bytes", no_space)
    result = train(tiny(), [toy_task()], tmp_path / "out", quick(), store=PrefixStore(0))
    said = " ".join(capfd.readouterr().err.split())
    assert "No space left on device" in said
    assert "are read again each time" in said
    assert result.record["finished"]
    assert not (tmp_path / "out" / "prefixes").exists()


def test_files_of_an_interrupted_training_are_used_again(tmp_path, monkeypatch):
    atv, calls = make_atv(), count_reads(monkeypatch)
    monkeypatch.setattr("atv.lm.prefix_store.READ_TOKENS", 20)
    first = filled(atv, (0, BIG), tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(calls) > 1
    calls.clear()
    again = filled(atv, (0, BIG), tmp_path)
    assert calls == []
    assert again._kept.keys() == first._kept.keys()
    assert all(torch.equal(again._kept[key], first._kept[key]) for key in first._kept)
    files[0].write_bytes(files[0].read_bytes()[:-40])  # as a broken disk leaves it
    mended = filled(atv, (0, BIG), tmp_path)
    assert len(calls) == 1
    assert mended._kept.keys() == first._kept.keys()
    calls.clear()
    other = make_atv("qwen2")
    filled(other, (0, BIG), tmp_path)
    assert len(calls) == len(files)
