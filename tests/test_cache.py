"""The cache of task vectors: what it saves, what it keeps, and that no change to a weight is ever missed."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_atv, make_llm, toy_task

from atv.config import TrainConfig
from atv.errors import ATVError
from atv.model import ATVModel
from atv.training.loop import train
from atv.vector_cache import VectorCache

QUERIES = ["the kettle leaks", "quiet", "one two three"]
BYTES = 3 * 32 * 4  # of one query's vectors: layers x hidden, float32


@torch.no_grad()
def made(atv, queries=QUERIES):
    """Vectors as the weights are now, each query alone, past the cache."""
    ids = [torch.tensor([type(atv.generator).encode(atv.generator, [query])[0]]) for query in queries]
    return torch.cat([atv.atv(each, torch.ones_like(each)) for each in ids])


@pytest.fixture
def atv():
    return make_atv(dtype=torch.float32)


@pytest.fixture
def read(atv, monkeypatch):
    """The queries that the generator has read, call by call."""
    calls = []
    encode = type(atv.generator).encode
    monkeypatch.setattr(
        atv.generator, "encode", lambda queries: calls.append(list(queries)) or encode(atv.generator, queries)
    )
    return calls


def test_only_missing_queries_are_read_and_each_once(atv, read):
    a, b, c = QUERIES
    first = atv.task_vectors([a, b, a])
    second = atv.task_vectors([c, a, c, b])
    assert read == [[a, b], [c]]
    torch.testing.assert_close(first, made(atv, [a, b, a]))
    torch.testing.assert_close(second, made(atv, [c, a, c, b]))
    atv.generate(["x", "y"], [a, c], max_new_tokens=1)
    with atv.steer([b]):
        pass
    assert read == [[a, b], [c]]


def test_any_dtype_of_the_weights_is_hashed(atv):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        atv.to(dtype)
        found = atv.task_vectors(QUERIES)
        assert found.dtype == dtype
        assert torch.equal(atv.task_vectors(QUERIES), found)
    assert len(atv.vector_cache) == 9


def test_what_was_not_asked_for_longest_makes_room(atv, read):
    a, b, c = QUERIES
    atv.atv.vector_cache = VectorCache(limit=2 * BYTES + 5)
    for query in (a, b, a, c, a, b):
        atv.task_vectors([query])
        assert atv.vector_cache.used <= 2 * BYTES
    assert [queries[0] for queries in read] == [a, b, c, b]
    assert len(atv.vector_cache) == 2
    atv.vector_cache.limit = BYTES - 1  # too little for one
    torch.testing.assert_close(atv.task_vectors(QUERIES * 2), made(atv, QUERIES * 2))
    assert atv.vector_cache.used == 0


def test_off_with_limit_0_and_in_training_mode(atv, read):
    atv.vector_cache.limit = 0
    atv.task_vectors(QUERIES)
    atv.vector_cache.limit = 10**6
    atv.train()
    atv.task_vectors(QUERIES)
    assert atv.training
    assert read == [QUERIES, QUERIES]
    assert len(atv.vector_cache) == 0
    assert atv.atv._hash._known is None  # nothing was hashed


def test_a_callers_own_edit_does_not_reach_the_cache(atv):
    expected = made(atv)
    for _ in range(3):
        found = atv.task_vectors(QUERIES)
        torch.testing.assert_close(found, expected)
        found.zero_()
    with torch.inference_mode():
        atv.task_vectors(["another"])
    torch.testing.assert_close(atv.task_vectors(["another"]), made(atv, ["another"]))


def fused_adam(atv):
    optimizer = torch.optim.Adam(atv.parameters(), lr=1e-3, fused=True)
    for p in atv.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def sgd(atv):
    for p in atv.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.SGD(atv.parameters(), lr=1e-2).step()


def load(atv):
    atv.load_state_dict({name: 1.1 * value for name, value in atv.state_dict().items()})


@torch.no_grad()
def one_element(atv):
    atv.expansion.map.bias[5] += 1


def through_data(atv):
    weight = atv.expansion.map.weight
    weight.data.copy_(torch.randn_like(weight))


def new_data(atv):
    bias = atv.expansion.map.bias
    bias.data = torch.randn_like(bias)


def new_parameter(atv):
    for _ in range(4):  # the last may well lie where the first one lay
        atv.expansion.map.bias = torch.nn.Parameter(torch.randn(96))


def swapped_rows(atv):
    table = next(p for p in atv.generator.parameters() if p.shape == (400, 24))
    table.data.copy_(table.flip(0))


def pooling(atv):
    atv.generator.pooling = "cls"


@pytest.mark.parametrize(
    "change",
    [fused_adam, sgd, load, one_element, through_data, new_data, new_parameter, swapped_rows, pooling],
)  # fmt: skip
def test_no_stale_vectors_after_a_change(atv, change):
    before = atv.task_vectors(QUERIES)
    torch.manual_seed(4)
    change(atv)
    after = atv.task_vectors(QUERIES)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, made(atv))


def test_the_weights_are_hashed_only_after_a_change_and_the_same_weights_find_their_vectors_again(
    atv, read, monkeypatch
):
    import atv.vector_cache as cache

    hashed = []
    real = cache._hash
    monkeypatch.setattr(cache, "_hash", lambda *args: hashed.append(1) or real(*args))
    for _ in range(3):
        atv.task_vectors(QUERIES)
    assert len(hashed) == 1
    weights = copy.deepcopy(atv.state_dict())
    one_element(atv)
    atv.task_vectors(QUERIES)
    atv.load_state_dict(weights)
    atv.task_vectors(QUERIES)
    assert len(hashed) == 3
    assert len(read) == 2


def test_two_adapters_may_share_a_cache(atv):
    other = make_atv(dtype=torch.float32)
    one_element(other)
    other.atv.vector_cache = atv.vector_cache
    for _ in range(2):
        torch.testing.assert_close(atv.task_vectors(QUERIES), made(atv))
        torch.testing.assert_close(other.task_vectors(QUERIES), made(other))
    assert len(atv.vector_cache) == 6
    atv.vector_cache.clear()
    assert atv.vector_cache.used == len(atv.vector_cache) == 0


def test_vectors_after_a_training_are_those_of_the_trained_weights(atv, tmp_path):
    before = atv.task_vectors(QUERIES)
    train(atv, [toy_task()], tmp_path / "out", TrainConfig(epochs=1, learning_rate=1e-2))
    after = atv.eval().task_vectors(QUERIES)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, made(atv))


@pytest.mark.parametrize("queries", [[], ["a", " "], [["a"]], [None]])
def test_wrong_queries_are_refused_with_and_without_a_cache(atv, queries):
    for limit in (0, 10**6):
        atv.vector_cache.limit = limit
        with pytest.raises(ATVError, match="query"):
            atv.task_vectors(queries)


@pytest.mark.parametrize("built_inside", [True, False])
@pytest.mark.parametrize("used_inside", [True, False])
def test_inference_mode_around_loading_and_use_changes_nothing(atv, tmp_path, built_inside, used_inside):
    expected = made(atv)
    text = atv.generate(["the kettle leaks\nA:"], max_new_tokens=3, do_sample=False)
    atv.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode(built_inside):
        llm = make_llm(dtype=torch.float32)
        again = ATVModel.from_pretrained(tmp_path / "adapter", llm, tokenizer=atv.tokenizer)
    with torch.inference_mode(used_inside):
        for _ in range(2):
            torch.testing.assert_close(again.task_vectors(QUERIES), expected)
        assert again.generate(["the kettle leaks\nA:"], max_new_tokens=3, do_sample=False) == text
        again.load_weights(tmp_path / "adapter")
    one_element(again)
    torch.testing.assert_close(again.task_vectors(QUERIES), made(again))
    assert not any(p.is_inference() for p in again.parameters())


def test_a_generator_built_in_inference_mode_is_used(atv):
    with torch.inference_mode():
        inside = make_atv(dtype=torch.float32)
    torch.testing.assert_close(inside.task_vectors(QUERIES), atv.task_vectors(QUERIES))
    torch.testing.assert_close(inside.task_vectors(QUERIES), atv.task_vectors(QUERIES))


@pytest.mark.parametrize("limit", [0, 2 * BYTES + 5, 10**6])
@pytest.mark.parametrize("training", [False, True])
def test_threads_get_the_vectors_of_their_queries_without_dropout(atv, limit, training):
    """With room for two of six queries every thread takes vectors away that another one is about to read."""
    queries = [f"{first} {second}" for first in ("kettle", "harbour") for second in ("one", "two", "three")]
    expected = made(atv, queries)
    atv.train(training)
    atv.vector_cache.limit = limit
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            order = [[(turn + step) % 6 for step in range(1 + turn % 4)] for turn in range(120)]
            found = list(pool.map(lambda rows: atv.task_vectors([queries[row] for row in rows]), order))
    finally:
        sys.setswitchinterval(interval)
    for rows, vectors in zip(order, found, strict=True):
        torch.testing.assert_close(vectors, expected[rows])
    assert atv.training == training
    kept = atv.vector_cache._kept.values()
    assert atv.vector_cache.used == sum(vectors.nbytes for vectors in kept) <= max(limit, 0)


def test_a_copy_of_a_model_is_a_model(atv):
    again = pickle.loads(pickle.dumps(copy.deepcopy(atv.vector_cache)))
    assert again.limit == atv.vector_cache.limit
    assert torch.equal(copy.deepcopy(atv).task_vectors(QUERIES), atv.task_vectors(QUERIES))
