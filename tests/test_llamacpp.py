"""The engine on llama.cpp: on a stand-in for its library, and on llama.cpp itself where it is installed."""

import random
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import GROUPED, byte_level_tokenizer, make_llm
from gguf_files import changed, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_library import Library
from refusals import refused
from serving import TEXTS, post, prompt, same_predictions, saved, sequential
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from atv.config import Positions
from atv.data.render import Prompt
from atv.errors import ATVError, Unavailable
from atv.lm.load import load_outline
from atv.serving import llamacpp, llamacpp_context
from atv.serving.app import make_app
from atv.serving.batch import Row
from atv.serving.gguf import check_gguf
from atv.serving.llamacpp import LlamaCppEngine
from atv.serving.llamacpp_context import LlamaCpp, Options, Reading, _calls, edits
from atv.serving.models import Models
from atv.serving.requests import Limits, Request
from atv.serving.sampling import Sampling
from atv.serving.steers import Part, Steering, edited_rows
from benchmarks.serving import running

POSITIONS = {"last": "all", "last:3": "0,2", "answer": "1,2", "all": "all"}
LIMITS = Limits(rows=6, tokens=2048, answer=16, seconds=60, kept=2**17)
EXACT = {"cache_type": "f32", "n_ubatch": 24, "n_threads": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny LLM in a folder and in a GGUF file, and adapters for it."""
    folder = tmp_path_factory.mktemp("llama")
    llm, tokenizer = make_llm("llama", torch.float32), byte_level_tokenizer()
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    models = {
        positions: saved(llm, tokenizer, folder / positions, positions, seed, template="{input}", layers=layers)
        for seed, (positions, layers) in enumerate(POSITIONS.items())
    }
    file = write_gguf(llm, folder / "llm.gguf")
    return SimpleNamespace(folder=folder, llm=llm, tokenizer=tokenizer, models=models, file=file)


def stand_in(monkeypatch, library):
    for module in (llamacpp, llamacpp_context):
        monkeypatch.setattr(module, "libraries", lambda: (library, library, []))


@pytest.fixture(params=["stand-in", "llama.cpp"])
def engine(request, world, monkeypatch):
    if request.param == "llama.cpp":
        pytest.importorskip("llama_cpp")
    else:
        stand_in(monkeypatch, Library(make_llm("llama", torch.float32)))
    engine = LlamaCppEngine(world.file, str(world.folder / "llm"), LIMITS, options=EXACT)
    yield engine
    engine.close()
    engine.close()


def compare(world, engine, asked):
    """Ask all at the same time, and compare answers with those of each prompt alone."""
    adapters = {name: engine.load(world.folder / name) for name in POSITIONS}
    found = {}

    def ask(number):
        text, name, scale, limit = asked[number]
        sampling = Sampling(max_tokens=limit, temperature=0.0, logprobs=2)
        request = Request(prompt(world.tokenizer, text), adapters.get(name), scale, sampling)
        found[number] = engine.answer(request)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (text, name, scale, limit) in enumerate(asked):
        row = Row(prompt(world.tokenizer, text), world.models.get(name))
        expected = sequential(world.llm, row, engine._ends, limit, scale)
        told = [token for piece in found[number] for token in piece.tokens]
        assert found[number][-1].error is None
        assert [each.token for each in told] == [token for token, _ in expected if token not in engine._ends]
        for each, (token, logits) in zip(told, expected, strict=False):
            assert each.logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-3)
            assert [one for one, _ in each.top] == logits.topk(2).indices.tolist()
    assert engine.numbers()["running"] == engine.numbers()["waiting"] == 0


def test_mixed_requests_equal_each_alone(world, engine):
    draw = random.Random(5)
    names = [None, *POSITIONS]
    asked = [
        (draw.choice(TEXTS), names[number % 5], draw.choice([None, 0.2]), draw.randint(1, 9)) for number in range(24)
    ]
    compare(world, engine, asked)
    assert len(engine._llm._free) == llamacpp.sequences(LIMITS.rows) - len(engine._beginnings._kept)


def test_prompts_with_a_shared_beginning_equal_each_alone(world, engine):
    shared = TEXTS[0] * 3
    asked = [
        (shared + text, name, None, 3) for text in TEXTS[1:5] for name in ("last", "answer", None, "last:3", "all")
    ]
    for _ in range(2):
        compare(world, engine, asked)
    assert engine.numbers()["reused_tokens"] > 20 * len(prompt(world.tokenizer, shared).ids)
    assert 0 < engine.numbers()["kept_bytes"] <= LIMITS.kept


@pytest.mark.parametrize("positions", ["last", "answer", "all"])
def test_predictions_equal_those_of_the_model(world, engine, positions):
    same_predictions(engine, engine.load(world.folder / positions), world.models[positions])


def test_a_cancelled_request_leaves_the_others_as_they_are(world, engine, monkeypatch):
    monkeypatch.setattr(engine, "_ends", frozenset())
    steers = engine.load(world.folder / "answer")
    long = Request(prompt(world.tokenizer, TEXTS[1]), steers, None, Sampling(max_tokens=16, temperature=0.0))
    pieces = []
    cancel = engine.submit(long, lambda piece: (pieces.append(piece), cancel()))
    compare(world, engine, [(TEXTS[0], "last", None, 6), (TEXTS[2], None, None, 6)])
    assert pieces[-1].finish == "cancelled"


def test_a_failing_call_ends_its_requests_and_frees_their_sequences(world, monkeypatch):
    library = Library(make_llm("llama", torch.float32))
    stand_in(monkeypatch, library)
    engine = LlamaCppEngine(world.file, str(world.folder / "llm"), LIMITS, options=EXACT)
    library.code = 1
    request = Request(prompt(world.tokenizer, TEXTS[0]), None, None, Sampling(max_tokens=3, temperature=0.0))
    error = engine.answer(request)[-1].error
    assert isinstance(error, Unavailable)
    assert "code 1" in str(error)
    monkeypatch.setattr(Steering, "dense", lambda *_: 1 / 0)  # fails while llama.cpp's call is prepared
    library.code = 0
    steered = Request(request.prompt, engine.load(world.folder / "last"), None, request.sampling)
    assert isinstance(engine.answer(steered)[-1].error, ZeroDivisionError)
    monkeypatch.undo()
    monkeypatch.setattr(llamacpp_context.Edits, "at", lambda *_: 1 / 0)  # fails inside of the call
    assert isinstance(engine.answer(steered)[-1].error, ZeroDivisionError)
    monkeypatch.undo()
    assert len(engine._llm._free) == llamacpp.sequences(LIMITS.rows)
    compare(world, engine, [(TEXTS[0], "last", None, 3)])
    engine.close()


@pytest.mark.parametrize("kind", ["stand-in", "without lengths", "llama.cpp"])
@pytest.mark.parametrize("width", [8, 24])
def test_the_memory_of_a_token_is_that_of_its_keys_and_values(kind, width, tmp_path, monkeypatch):
    set_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**GROUPED, head_dim=width)).eval()
    ids = torch.tensor([[5, 6]])
    expected = sum(
        side[:, :, :1].nbytes for layer in llm(ids).past_key_values.layers for side in (layer.keys, layer.values)
    )
    library = Library(llm)
    if kind == "llama.cpp":
        pytest.importorskip("llama_cpp")
    else:
        stand_in(monkeypatch, library)
    if kind == "without lengths":  # files of LLMs whose heads have the LLM's width together
        library.metadata = {}
        expected = expected * 8 // width
    context = LlamaCpp(write_gguf(llm, tmp_path / "llm.gguf"), LIMITS, Options.of(EXACT))
    assert context.cell_bytes == expected
    if kind == "llama.cpp":
        sizes, sequence = [], context.take()
        for done in (0, 100):
            context.read([Reading([5] * 100, sequence, done, 200)])
            sizes.append(context._cpp.llama_state_seq_get_size(context._context, sequence))
        assert expected <= (sizes[1] - sizes[0]) / 100 <= expected + 32  # with places and numbers of sequences
    context.close()


def test_a_token_that_the_llm_does_not_have_is_refused(world, engine):
    with refused("token id 400", "0 to 399"):
        engine.submit(Request(Prompt([5, 400], "a"), sampling=Sampling(max_tokens=3)), print)


def test_an_llm_whose_layers_have_other_outputs_is_refused(world, monkeypatch):
    stand_in(monkeypatch, Library(make_llm("llama", torch.float32), "ffn_out"))
    with refused("computed no output named l_out of the layers"):
        LlamaCppEngine(world.file, str(world.folder / "llm"), LIMITS)


def test_recurrent_llms_and_failures_are_refused(world, monkeypatch):
    for function, value, message in (
        ("llama_model_is_hybrid", True, "recurrent"),
        ("llama_model_load_from_file", None, "cannot load"),
        ("llama_init_from_model", None, "--tokens"),
    ):
        library = Library(make_llm("llama", torch.float32))
        setattr(library, function, lambda *_, value=value: value)
        stand_in(monkeypatch, library)
        with refused(message):
            LlamaCppEngine(world.file, str(world.folder / "llm"), LIMITS)


# ---- what is added where ----


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_edits_of_a_call_are_those_of_its_tokens(seed):
    draw = random.Random(seed)
    layers, width = 3, 4
    parts, outputs, row = [], [], 0
    by_hand = {}  # by layer and row
    for _ in range(draw.randint(1, 5)):
        new, done, length = draw.randint(1, 4), draw.randint(0, 5), draw.randint(1, 8)
        part = Part(row, new, done, length)
        steering = None
        if draw.random() < 0.7:
            chosen = tuple(sorted(draw.sample(range(layers), draw.randint(1, layers))))
            where = Positions.parse(draw.choice(tuple(POSITIONS)))
            steering = Steering(torch.randn(len(chosen), width), chosen, where)
            for place in edited_rows(part, where):
                for vector, layer in zip(steering.vectors, chosen, strict=True):
                    by_hand[layer, place] = vector
        parts.append((part, steering))
        row += new
        if draw.random() < 0.7:
            outputs.append(row - 1)
    found = edits(parts, layers, outputs)
    if found is None:
        assert not by_hand
        return
    assert found.layers == {layer for part, s in parts if s and edited_rows(part, s.positions) for layer in s.layers}
    for layer in range(layers):
        for rows in {row, len(outputs)}:
            where, vectors = found.at(layer, rows)
            kept = range(row) if rows == row else outputs
            added = torch.zeros(rows, width).index_add(0, where, vectors)
            expected = [by_hand.get((layer, each), torch.zeros(width)) for each in kept]
            assert torch.equal(added, torch.stack(expected) if expected else torch.zeros(0, width))
    with pytest.raises(ATVError, match="returned"):
        found.at(0, row + 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 8))
def test_calls_have_at_most_so_many_tokens_and_all_of_them(lengths, most):
    readings = [Reading(list(range(length)), number, 7, length) for number, length in enumerate(lengths)]
    calls = list(_calls(readings, most))
    assert all(0 < sum(len(part.ids) for part in call) <= most for call in calls)
    for number, length in enumerate(lengths):
        parts = [part for call in calls for part in call if part.sequence == number]
        assert [token for part in parts for token in part.ids] == list(range(length))
        assert [part.wanted for part in parts] == [False] * (len(parts) - 1) + [True]
        assert [part.done for part in parts] == [7 + part.ids[0] for part in parts]


# ---- the file ----


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_a_file_of_the_same_llm_is_accepted_and_another_training_of_it_is_not(name, tmp_path):
    llm = make_llm(name, torch.float32)
    llm.save_pretrained(tmp_path / "llm")
    outline = load_outline(str(tmp_path / "llm"))
    check_gguf(write_gguf(llm.bfloat16().float(), tmp_path / "same.gguf"), outline)
    for weight, factor in {
        "model.layers.1.input_layernorm.weight": 1.05,
        "model.norm.weight": 0.9,
        "model.embed_tokens.weight": 1.5,
    }.items():
        other = make_llm(name, torch.float32)
        with torch.no_grad():
            other.get_parameter(weight).add_(0.1)
        with refused("contains another LLM"):
            check_gguf(write_gguf(changed(other, weight, factor), tmp_path / "other.gguf"), outline)
    other = make_llm(name, torch.float32)
    other.config.rms_norm_eps *= 3
    with refused("epsilon differs"):
        check_gguf(write_gguf(other, tmp_path / "other.gguf"), outline)


def test_files_that_are_not_the_llm_are_refused(world, tmp_path):
    outline = load_outline(str(world.folder / "llm"))
    with refused("does not exist"):
        check_gguf(tmp_path / "none.gguf", outline)
    whole = world.file.read_bytes()
    for content in (b"", b"GGUF", b"not a model", whole[:200], whole[: len(whole) // 2]):
        (tmp_path / "damaged.gguf").write_bytes(content)
        with refused("damaged.gguf"):
            check_gguf(tmp_path / "damaged.gguf", outline)
    with refused("2 layers of width 32"):
        make = make_llm("llama", torch.float32)
        make.model.layers = make.model.layers[:2]
        make.config.num_hidden_layers = 2
        check_gguf(write_gguf(make, tmp_path / "short.gguf"), outline)


# ---- options ----


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_ctx": 5}, "n_ctx"),
        ({"n_threads": "two"}, "n_threads"),
        ({"n_threads": True}, "n_threads"),
        ({"flash_attn": 1}, "flash_attn"),
        ({"cache_type": "q4_0"}, "q4_0"),
        ({"n_ubatch": 0}, "n_ubatch"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with refused(message):
        Options.of(wrong)


def test_a_missing_or_untested_llama_cpp_is_refused(world, monkeypatch):
    for found, message in ((None, "not installed"), ("0.1.0", "0.1.0")):

        def version(_, found=found):
            if found is None:
                raise llamacpp_context.PackageNotFoundError
            return found

        monkeypatch.setattr(llamacpp_context, "version", version)
        llamacpp_context.libraries.cache_clear()
        with refused(message):
            LlamaCppEngine(world.file, str(world.folder / "llm"))


def test_the_server_answers_and_explains_with_it(world, engine):
    models = Models("base", world.tokenizer, engine.load)
    models.add("style", str(world.folder / "answer"))
    with running(make_app(engine, models)) as port:
        server = SimpleNamespace(port=port)
        for name, model in (("base", None), ("style", world.models["answer"])):
            asked = {"model": name, "prompt": TEXTS[0], "temperature": 0, "max_tokens": 4}
            found = post(server, "/v1/completions", **asked | ({"query": TEXTS[0]} if model else {}))
            row = Row(prompt(world.tokenizer, TEXTS[0]), model)
            tokens = [token for token, _ in sequential(world.llm, row, engine._ends, 4) if token not in engine._ends]
            assert found["choices"][0]["text"] == world.tokenizer.decode(tokens, skip_special_tokens=True)
        why = post(server, "/v1/steer", model="style", query=TEXTS[0])
        (vectors,) = world.models["answer"].task_vectors([TEXTS[0]]) * world.models["answer"].config.scale
        assert [layer["layer"] for layer in why["layers"]] == [1, 2]
        assert [layer["norm"] for layer in why["layers"]] == pytest.approx(vectors.norm(dim=-1).tolist(), rel=1e-3)
