"""What is learned: v_l = r_l (b_l + a (c_l + s W_l z)). Each part against a formula or a loop written by hand."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_llm, toy_task
from hypothesis import given, settings
from hypothesis import strategies as st
from rendering import encode_pair, prompt_text

from atv.config import ATVConfig, TrainConfig
from atv.data import Example, Task
from atv.evaluation.run import steered
from atv.expansion import Expansion
from atv.gate import STRENGTHS, Gate
from atv.methods.atv import ATVMethod
from atv.model import ATVModel
from atv.training import calibration
from atv.training.batches import training_rows
from atv.training.loop import train


def calibrated(name: str = "llama", **options: object) -> ATVModel:
    """A calibrated ATV with random weights in b and W."""
    atv = make_atv(name, parametrisation="calibrated", scale=0.3, **options)
    torch.manual_seed(4)
    with torch.no_grad():
        for p in atv.expansion.parameters():
            p.normal_()
    return atv


def rows_of(atv: ATVModel, count: int = 8) -> list:
    return [atv.encode_row(row) for row in training_rows(toy_task(rows=3 * count))]


def test_the_vectors_are_the_formula():
    torch.manual_seed(0)
    expansion = Expansion(5, 3, 4)
    for p in expansion.parameters():
        torch.nn.init.normal_(p)
    states, sizes = torch.randn(9, 5) * 3 + 1, torch.tensor([0.5, 2.0, 7.0])
    expansion.calibrate([states], sizes)
    state, share = torch.randn(2, 5), torch.tensor([1.0, 0.25])
    found = expansion(state, None, share).detach().numpy()
    W, b = expansion.map.weight.detach().numpy().reshape(3, 4, 5), expansion.common.detach().numpy()
    mean, deviation = states.numpy().mean(0), states.numpy().std(0)
    for row in range(2):
        z = (state[row].numpy() - mean) / deviation
        for layer in range(3):
            expected = sizes[layer].item() * (b[layer] + share[row].item() * (W[layer] @ z))
            np.testing.assert_allclose(found[row, layer], expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 2**16))
def test_with_several_tasks_each_has_its_part_and_its_own_mean(counts, seed):
    torch.manual_seed(seed)
    expansion = Expansion(6, 2, 3)
    states = [torch.randn(count, 6, dtype=torch.float64) + 4 * torch.randn(6) for count in counts]
    expansion.double().calibrate(states, torch.tensor([1.0, 3.0]))
    for p in expansion.parameters():
        torch.nn.init.normal_(p)
    asked, openness, strength = torch.randn(5, 6).double(), torch.rand(5).double(), torch.rand(5).double()
    found = expansion(asked, None, openness, strength).detach().numpy()
    W, b = expansion.map.weight.detach().numpy().reshape(2, 3, 6), expansion.common.detach().numpy()
    means = [of_task.numpy().mean(0) for of_task in states]
    within = np.concatenate([of_task.numpy() - mean for of_task, mean in zip(states, means, strict=True)])
    deviation = np.sqrt((within**2).mean(0))
    deviation = np.maximum(deviation, 0.1 * deviation.mean()) if deviation.any() else np.ones(6)
    for row, state in enumerate(asked.numpy()):
        cosines = [state @ mean / np.linalg.norm(state) / np.linalg.norm(mean) for mean in means]
        task = int(np.argmax(cosines))
        own = strength[row].item() * (W @ ((state - means[task]) / deviation))
        rest = openness[row].item() * (expansion.task_parts[task].detach().numpy() + own)
        np.testing.assert_allclose(found[row], np.array([[1.0], [3.0]]) * (b + rest), rtol=1e-6, atol=1e-8)


def test_a_dimension_that_hardly_varies_is_not_blown_up():
    expansion = Expansion(3, 1, 2)
    only = torch.zeros(1, dtype=torch.long)
    expansion.calibrate([torch.tensor([[1.0, 5.0, 2.0], [-1.0, 5.0, 2.0]])], torch.ones(1))
    assert expansion.standardised(torch.tensor([[0.0, 5.1, 2.0]]), only).abs().max() < 5
    expansion.calibrate([torch.ones(4, 3)], torch.ones(1))  # queries that are all alike
    assert expansion.standardised(torch.ones(1, 3), only).abs().max() == 0


def test_an_untrained_atv_is_the_plain_llm_bit_for_bit():
    atv = make_atv(parametrisation="calibrated")
    inputs = atv.encode_prompts(["the kettle leaks\nA:", "quiet\nA:"])
    plain = atv.llm(**inputs).logits
    with atv.steer(["the kettle leaks", "quiet"]):
        assert torch.equal(atv.llm(**inputs).logits, plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("positions", ["last", "last:3", "all"])
def test_sizes_are_those_of_the_residual_stream_at_the_prompts_end(name, positions):
    atv = make_atv(name, parametrisation="calibrated", positions=positions)
    rows = rows_of(atv)
    atv.calibrate(rows)
    sizes = []
    for row in rows:
        ids = torch.tensor([row.pairs[0][0]])
        hidden = make_llm(name)(ids, output_hidden_states=True).hidden_states
        sizes.append([hidden[layer + 1][0, -1].pow(2).mean().sqrt().item() for layer in range(2)])  # the last is normed
    assert atv.expansion.sizes[:2].tolist() == pytest.approx(np.mean(sizes, axis=0).tolist(), rel=1e-6)


def test_states_of_the_training_queries_are_standardised():
    atv = make_atv(parametrisation="calibrated")
    rows = rows_of(atv)
    atv.calibrate(rows)
    states = torch.stack([atv.generator(torch.tensor([row.query]), torch.ones(1, len(row.query)))[0] for row in rows])
    z = atv.expansion.standardised(states, torch.zeros(len(states), dtype=torch.long))
    assert z.mean(0).abs().max() < 1e-6
    assert z.std(0, correction=0).max().item() == pytest.approx(1)


def test_in_training_a_share_of_the_queries_has_the_common_vector_alone():
    atv = calibrated()
    states = torch.randn(400, 24, dtype=torch.float64)
    alone = atv.expansion(states, None, torch.zeros(400))
    atv.atv.adaptive_dropout = 0.3
    assert not (atv.atv.expand(states) == alone).all(-1).all(-1).any()  # in use it is off
    atv.train()
    torch.manual_seed(0)
    dropped = (atv.atv.expand(states) == alone).all(-1).all(-1)
    assert 0.2 < dropped.double().mean() < 0.4


# ---- the gate ----


def test_the_gate_is_what_a_loop_over_neighbours_says():
    torch.manual_seed(0)
    gate, known, asked = Gate(6), torch.randn(20, 6), torch.randn(7, 6)
    gate.fit([known], 0.1, [valid := torch.randn(4, 6)])

    def near(state: np.ndarray, others: list) -> float:
        cosines = [float(state @ o / np.linalg.norm(state) / np.linalg.norm(o)) for o in others]
        return float(np.mean(sorted(cosines)[-3:]))

    rows = [row.numpy() for row in known]
    own = [near(row, rows[:i] + rows[i + 1 :]) for i, row in enumerate(rows)]
    start, median = np.quantile(own, 0.1), np.quantile(own, 0.5, method="lower")
    assert gate.validated.tolist() == pytest.approx([near(row.numpy(), rows) for row in valid], abs=1e-6)
    for state, found in zip(asked, gate.openness(asked, torch.zeros(7, dtype=torch.long)), strict=True):
        expected = (near(state.numpy(), rows) - (start - (median - start))) / (median - start)
        assert found.item() == pytest.approx(min(1, max(0, expected)), abs=1e-4)


def test_the_gate_is_open_among_the_training_queries_and_closed_far_from_them():
    torch.manual_seed(0)
    gate, centre = Gate(16), torch.randn(16)
    gate.fit([centre + 0.3 * torch.randn(50, 16)], 0.05, [torch.randn(4, 16)])
    only = torch.zeros(50, dtype=torch.long)
    assert gate.openness(centre + 0.3 * torch.randn(50, 16), only).mean() > 0.8
    assert gate.openness(-centre + 0.3 * torch.randn(50, 16), only).max() == 0


def test_each_task_has_a_gate_of_its_own():
    """As if the other tasks did not exist, also for a task with fewer queries than neighbours."""
    torch.manual_seed(0)
    tasks = [torch.randn(30, 8), torch.ones(8) + 0.1 * torch.randn(20, 8), torch.randn(2, 8), torch.randn(1, 8)]
    asked, valid = torch.randn(12, 8) + 0.5, [torch.randn(5, 8) for _ in tasks]
    together = Gate(8)
    together.fit(tasks, 0.1, valid)
    for number, states in enumerate(tasks):
        alone = Gate(8)
        alone.fit([states], 0.1, [valid[number]])
        only, of_it = torch.zeros(12, dtype=torch.long), torch.full((12,), number)
        assert torch.allclose(together.openness(asked, of_it), alone.openness(asked, only), atol=1e-6)
        own = together.validated_tasks == number
        assert torch.allclose(together.validated[own], alone.validated, atol=1e-6)
    assert (together.limits[1] > together.limits[0] + 0.2).all()


def test_of_too_many_training_queries_only_the_large_tasks_are_thinned_out(monkeypatch):
    monkeypatch.setattr("atv.gate.MOST", 100)
    torch.manual_seed(0)
    tasks = [torch.randn(400, 8), torch.ones(8) + torch.randn(12, 8), torch.randn(28, 8), torch.randn(200, 8)]
    asked, valid = torch.randn(12, 8) + 0.5, [torch.randn(5, 8) for _ in tasks]
    together = Gate(8)
    together.fit(tasks, 0.1, valid)
    kept = together.reference_tasks.bincount().tolist()
    assert kept == [30, 12, 28, 30]  # (100 - 12 - 28) / 2
    for number in (1, 2):
        alone = Gate(8)
        alone.fit([tasks[number]], 0.1, [valid[number]])
        found = together.openness(asked, torch.full((12,), number))
        assert torch.allclose(found, alone.openness(asked, torch.zeros(12, dtype=torch.long)), atol=1e-6)


def test_the_strength_of_a_task_is_that_with_the_likeliest_answers_on_its_validation_rows():
    """Beside a loop that reads each validation prompt alone."""
    atv = calibrated(dtype=torch.float32).eval()
    names = ("even", "odd")
    rows = [replace(row, task=names[i % 2]) for i, row in enumerate(rows_of(atv, 20))]
    atv.calibrate(rows)
    torch.manual_seed(0)
    with torch.no_grad():  # so strong that full strength is not best
        atv.expansion.map.weight.copy_(3 * torch.randn_like(atv.expansion.map.weight))
        atv.expansion.task_parts.normal_()
    atv.set_gate(rows[:12], valid := rows[12:])
    found = {name: dict.fromkeys(STRENGTHS, 0.0) for name in names}
    for share in STRENGTHS:
        for row in valid:
            read = atv.generator(torch.tensor([row.query]), torch.ones(1, len(row.query), dtype=torch.long))
            vectors = atv.expansion(read, torch.tensor([names.index(row.task)]), None, torch.tensor([share]))
            (prompt, answer) = row.pairs[0]
            with torch.no_grad():
                with atv.steer([""], vectors=vectors):
                    read_prompt = atv.llm(torch.tensor([prompt]), use_cache=True)
                logits = [read_prompt.logits[0, -1:]]
                if answer[1:]:
                    cached = read_prompt.past_key_values
                    logits.append(atv.llm(torch.tensor([answer[:-1]]), past_key_values=cached).logits[0])
            at = torch.cat(logits).double().log_softmax(-1)
            found[row.task][share] += at[range(len(answer)), answer].mean().exp().item()
    best = {name: max(of, key=of.get) for name, of in found.items()}
    assert atv.expansion.gate.strengths.tolist() == [best[name] for name in names]
    assert min(best.values()) < max(best.values())


def test_the_same_query_twice_in_training_does_not_make_the_gate_strict():
    torch.manual_seed(0)
    once, twice, states = Gate(8), Gate(8), torch.randn(30, 8)
    once.fit([states], 0.05, [states])
    twice.fit([states.repeat(4, 1)], 0.05, [states])
    only = torch.zeros(30, dtype=torch.long)
    assert torch.allclose(once.openness(states + 0.1, only), twice.openness(states + 0.1, only), atol=1e-6)


def test_before_it_knows_anything_and_switched_off_the_gate_changes_nothing():
    atv = calibrated()
    queries = ["quiet", "the lid sticks"]
    before = atv.task_vectors(queries)
    atv.calibrate(rows := rows_of(atv))
    opened = atv.task_vectors(queries)
    assert not torch.equal(before, opened)
    atv.set_gate(rows, rows)
    atv.expansion.gate.limits += 2  # as if all training queries were nearly alike
    assert not torch.equal(atv.task_vectors(queries), opened)
    atv.config.gate = 0.0
    assert torch.equal(atv.task_vectors(queries), opened)


def test_a_closed_gate_leaves_the_common_vector():
    atv = calibrated()
    atv.calibrate(rows := rows_of(atv))
    atv.set_gate(rows, rows)
    atv.expansion.gate.limits = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    expected = atv.expansion.sizes[:, None] * atv.expansion.common
    assert torch.allclose(atv.task_vectors(["whatever"])[0], expected)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("options", [{}, {"expansion_rank": 3}, {"gate": 0.0}])
def test_an_adapter_holds_calibration_and_gate(tmp_path, options, tasks):
    atv = calibrated(dtype=torch.float32, **options)
    atv.calibrate(rows := [replace(row, task=str(i % tasks)) for i, row in enumerate(rows_of(atv))])
    if tasks > 1:
        torch.nn.init.normal_(atv.expansion.task_parts)
    atv.set_gate(rows, rows)
    atv.save_pretrained(tmp_path / "a")
    loaded = ATVModel.from_pretrained(tmp_path / "a", make_llm(dtype=torch.float32), tokenizer=atv.tokenizer)
    queries = ["the harbour quiet 3", "something else"]
    assert torch.allclose(loaded.task_vectors(queries), atv.task_vectors(queries), atol=1e-6)
    for kept in ("references", "reference_tasks", "limits", "validated", "validated_tasks", "strengths"):
        assert torch.equal(getattr(loaded.expansion.gate, kept), getattr(atv.expansion.gate, kept))
    other = make_atv(dtype=torch.float32, parametrisation="calibrated", **options)
    other.load_weights(tmp_path / "a")
    assert torch.allclose(other.task_vectors(queries), atv.task_vectors(queries), atol=1e-6)


def test_in_training_the_task_of_a_row_is_known_and_in_use_it_is_the_nearest(tmp_path):
    """Two tasks; the generator, which is trained, says nothing of the task at first, as its weights are random."""
    other = Task("other", ("What of {input}",), *(
        tuple(Example(f"boats before opinion {row.input}", row.output) for row in split)
        for split in (toy_task().train, toy_task().valid, toy_task().test)
    ))  # fmt: skip
    atv = make_atv(parametrisation="calibrated", dtype=torch.float32, reads="prompt", train_generator=True)
    train(atv, [toy_task(), other], tmp_path / "out", TrainConfig(epochs=3, batch_size=8, generator_start=0.0))
    rows = [atv.encode_row(row) for task in (toy_task(), other) for row in training_rows(task, reads="prompt")]
    batch = atv.collator()(rows)
    assert batch["query_tasks"].tolist() == [0] * 8 + [1] * 8
    states = atv.atv.states([row.query for row in rows])
    means = [states[:8].mean(0), states[8:].mean(0)]  # of the trained generator, not of that before training
    assert torch.allclose(atv.expansion.centres, torch.stack([m / m.norm() for m in means]), atol=1e-5)
    assert not torch.allclose(atv.expansion.means, torch.stack(means), atol=1e-5)
    assert (atv.expansion.task_parts[0] - atv.expansion.task_parts[1]).abs().max() > 0.1
    atv.config.gate = 0.0
    cosines = torch.nn.functional.cosine_similarity(states[:, None], torch.stack(means)[None], dim=-1)
    assert torch.equal(atv.atv.expand(states), atv.atv.expand(states, cosines.argmax(1)))
    assert not torch.equal(atv.atv.expand(states), atv.atv.expand(states, cosines.argmin(1)))


def test_what_was_trained_on_one_task_can_be_trained_on_several():
    """The gate of the one task says nothing of the others."""
    atv = calibrated()
    rows = rows_of(atv)
    atv.calibrate(rows)
    atv.set_gate(rows, rows)
    several = [replace(row, task=str(i % 3)) for i, row in enumerate(rows)]
    atv.calibrate(several)
    batch = atv.collator()(several)
    assert batch["query_tasks"].max() == 2
    assert atv(**batch).loss.isfinite()
    atv.set_gate(several, several)
    assert len(atv.expansion.gate.strengths) == len(atv.expansion.gate.limits) == 3


def test_a_second_training_chooses_its_epoch_without_the_gate_of_the_first(tmp_path):
    """Beside the same weights with a gate that knows nothing."""
    first, losses = calibrated(train_generator=False), []
    rows = rows_of(first)
    first.calibrate(rows)
    first.set_gate(rows, rows)
    with torch.no_grad():
        first.expansion.gate.strengths.zero_()
    fresh = calibrated(train_generator=False)
    fresh.load_state_dict(first.state_dict())
    fresh.expansion.gate = Gate(fresh.expansion.means.shape[1]).to(fresh.expansion.common)
    for name, model in (("first", first), ("fresh", fresh)):
        how = TrainConfig(epochs=1, batch_size=4, learning_rate=1e-6)
        losses.append(train(model, [toy_task()], tmp_path / name, how).record["best_eval_loss"])
    assert losses[0] == losses[1]


def test_self_is_calibrated_on_prompts():
    config = ATVConfig(generator="self")
    atv = ATVModel(make_llm(), config, tokenizer=make_atv().tokenizer).double()
    rows = rows_of(atv)
    atv.calibrate(rows)
    prompts = [prompt for row in rows for prompt, _ in row.pairs]
    states = [make_llm()(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1] for ids in prompts]
    assert torch.allclose(atv.expansion.means[0], torch.stack(states).mean(0), atol=1e-6)


@pytest.mark.parametrize("reads", ["query", "prompt"])
def test_in_use_the_generator_reads_what_it_read_in_training(reads):
    task, atv = toy_task(), calibrated(reads=reads)
    row, example = training_rows(task, reads=atv.reads)[0], task.train[0]
    method = ATVMethod(atv)
    prompts = method.prompts(task, [example], task.renderers("all", method.reads)[2, "Answer:"])
    text = example.input if reads == "query" else f"{example.input}\nyes or no?\nA:"
    assert atv.encode_row(row).query == atv.generator.encode([text])[0]
    with steered(method, prompts):
        found = atv.llm(**atv.encode_prompts(["quiet\nA:"])).logits
    with atv.steer([text]):
        assert torch.equal(atv.llm(**atv.encode_prompts(["quiet\nA:"])).logits, found)


# ---- the defaults ----


def word_task(rows: int = 150) -> Task:
    """Which of two words is somewhere among others decides the answer."""
    draw = random.Random(0)
    others = [
        "harbour",
        "before",
        "first",
        "boats",
        "opinion",
        "question",
        "kettle",
        "lid",
        "one",
        "two",
        "four",
        "six",
    ]

    def example(index: int) -> Example:
        words = [draw.choice(others) for _ in range(draw.randint(3, 6))]
        words.insert(draw.randint(0, len(words)), ("quiet", "leaks")[index % 2])
        return Example(" ".join(words), ("yes", "no")[index % 2])

    unique = list(dict.fromkeys(example(index) for index in range(4 * rows)))[: 3 * rows]
    parts = unique[:rows], unique[rows : rows + 40], unique[2 * rows :]
    return Task("words", ("{input}\nyes or no?", "Question: {input}", "Is it so? {input}"), *map(tuple, parts))


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("qwen2", "gpt2"))])
def test_with_the_defaults_alone_it_learns_on_any_llm(name, tmp_path):
    """Random weights, which answer with any token at first."""
    task, atv = word_task(), ATVModel(make_llm(name, torch.float32), tokenizer=byte_level_tokenizer())
    train(atv, [task], tmp_path / "out")
    right = 0
    for row in task.test:
        prompt = prompt_text(task, row.input)
        with torch.no_grad(), atv.steer([prompt]):  # what the generator reads in training
            token = atv.llm(**atv.encode_prompts([prompt])).logits[0, -1].argmax()
        right += int(token == encode_pair(atv.tokenizer, prompt, row.output)[1][0])
    assert right >= 0.95 * len(task.test)


@pytest.mark.parametrize(("first", "second", "trained"), [(250, 150, True), (250, 149, False), (30, 30, False)])
def test_the_generator_is_trained_where_there_are_rows_enough(first, second, trained):
    """200 rows per task, on average."""

    def task(name: str, count: int) -> Task:
        rows = [Example(f"{name} {i}", "ab"[i % 2]) for i in range(count + 4)]
        return Task(name, ("{input}",), tuple(rows[4:]), tuple(rows[:2]), tuple(rows[2:4]))

    tasks = [task("one", first), task("two", second)]
    atv = make_atv(parametrisation="calibrated", train_generator=None)
    assert not any(p.requires_grad for p in atv.generator.parameters())
    atv.settle(tasks)
    assert atv.config.train_generator is trained
    assert all(p.requires_grad == trained for p in atv.generator.parameters())
    atv.settle([task("three", 30 if trained else 300)])  # decided once
    assert atv.config.train_generator is trained


def test_what_the_user_says_of_the_generator_is_not_decided_anew():
    for said in (False, True):
        atv = make_atv(parametrisation="calibrated", train_generator=said)
        atv.settle([toy_task()])
        assert atv.config.train_generator is said


def test_the_decision_is_saved_and_a_finished_training_recognised(tmp_path, capsys):
    for _ in range(2):
        atv = make_atv(parametrisation="calibrated", train_generator=None, dtype=torch.float32)
        result = train(atv, [toy_task()], tmp_path / "out", TrainConfig(epochs=1))
        assert result.record["settings"]["config"]["train_generator"] is False
    assert "holds this training already" in capsys.readouterr().err


def test_the_temperature_is_fitted_on_rows_of_every_answer_of_a_sorted_table(monkeypatch):
    examples = tuple(Example(f"the harbour {n}", "no" if n < 250 else "yes") for n in range(500))
    task, model, read = replace(toy_task(), valid=examples), calibrated(), []

    def scores(model, task, rows):
        read.append([row.answer for row in rows])
        return torch.zeros(len(rows), 2, dtype=torch.float64)

    monkeypatch.setattr(calibration, "option_scores", scores)
    encoded = [model.encode_row(row) for row in training_rows(task, "valid")]
    for rows in (encoded, encoded, encoded[:200]):
        calibration.temperature_of(model, task, rows)
    first, again, few = read
    assert len(first) == calibration.ROWS
    assert 75 <= first.count("yes") <= 125  # 100 are expected, and the standard deviation is below 6
    assert first == again
    assert few == ["no"] * 200
