"""Tiny random models of real architectures, tokenizers trained in memory, toy tasks. No network."""

import copy
import gc
import itertools
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    set_seed,
)

from atv.config import ATVConfig, Positions
from atv.data import Example, Task
from atv.doctor import require_wiring
from atv.generator import Generator
from atv.lm.spans import Known
from atv.model import ATVModel
from atv.steer import AddVectors, steer

WIRING_TESTED: set[str] = set()
"""Configurations whose wiring self-test has passed in this process."""
torch.set_num_threads(1)  # where torch was imported before


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run what is marked exhaustive too: `make test-all`")


def pytest_configure(config):
    config.addinivalue_line("markers", "exhaustive: left out without --exhaustive, since others cover most of it")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--exhaustive"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def pytest_collection_finish(session):
    """Leave what is imported to the end of the process out of garbage collections: each training makes a full one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _wiring_tested_once_per_configuration(monkeypatch):
    """Each training begins with the wiring self-test, which takes longer than most trainings of these tests."""
    from atv.training import loop

    def once(model):
        key = repr((type(model.llm), model.llm.dtype, model.config))
        if key not in WIRING_TESTED:
            require_wiring(model)
            WIRING_TESTED.add(key)

    monkeypatch.setattr(loop, "require_wiring", once)


def pairwise(first, second, third):
    """Every combination; those that are not needed to have each pair of values once are marked exhaustive.

    The first two axes must be at least as long as the third.
    """
    combinations = []
    for (i, a), (j, b), (k, c) in itertools.product(enumerate(first), enumerate(second), enumerate(third)):
        kept = (i + j) % len(third) == k
        combinations.append(pytest.param(a, b, c, marks=() if kept else pytest.mark.exhaustive))
    return combinations


TEXT = [
    "The harbour was quiet before the first boats came in.",
    "Is this opinion positive or negative? Answer positive or negative.",
    "Question: the kettle leaks and the lid sticks, yes or no?",
    "A: Answer: The answer is True or False; one two three four five six.",
]


def _train(tokenizer: Tokenizer, trainer: object) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama 3's: byte-level BPE, a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=380, show_progress=False, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: a text gets a space of its own in front, spaces are a visible mark."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return _train(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=120, show_progress=False, special_tokens=SPECIAL, unk_token="<unk>", max_piece_length=9
        ),
    )


SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # at 0.02 attention hardly matters, and a wrong cache or position does not show
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}


class TupleLayer(nn.Module):
    """A decoder layer that returns a tuple, as many architectures and older libraries do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, str]:
        output = self.layer(*args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output), "something else"


def _with_tuple_layers(llm: nn.Module) -> nn.Module:
    class Unpack(nn.Module):
        """What a model with tuple layers does in its own forward: takes the first element."""

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
            return self.layer(*args, **kwargs)[0]

    inner = [TupleLayer(layer) for layer in llm.model.layers]
    llm.model.layers = nn.ModuleList(Unpack(layer) for layer in inner)
    llm.tuple_layers = nn.ModuleList(inner)
    llm.layer_path = "tuple_layers"
    return llm


def _with_lora(llm: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return peft.eval()


CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=6),
    "gpt2": GPT2Config(**SIZES, n_inner=48),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6, layer_types=None),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
}
ARCHITECTURES = [*CONFIGS, "peft", "tuple"]


def make_llm(name: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny random LLM of the named architecture."""
    set_seed(1)
    base = "llama" if name in ("peft", "tuple") else name
    llm = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[base])).to(dtype).eval()
    if name == "peft":
        return _with_lora(llm).to(dtype)
    return _with_tuple_layers(llm) if name == "tuple" else llm


def make_generator(config: ATVConfig, kind: str = "bert") -> Generator:
    """A tiny random generator, encoder or decoder."""
    set_seed(2)
    if kind == "bert":
        sizes = {key: SIZES[key] for key in SIZES if key not in ("hidden_size", "bos_token_id", "eos_token_id")}
        encoder: nn.Module = BertModel(BertConfig(**sizes, hidden_size=24))
    else:
        encoder = GPT2Model(GPT2Config(**SIZES | {"hidden_size": 24, "num_hidden_layers": 2}))
    return Generator(
        encoder, byte_level_tokenizer(), config.pooling, config.query_template, bool(config.train_generator)
    )


PAPER_FORM = {"parametrisation": "paper", "train_generator": True, "reads": "query", "scale": 0.3}
"""Random vectors from the start, where the calibrated form begins at zero."""


def make_atv(
    name: str = "llama", dtype: torch.dtype = torch.float64, kind: str = "bert", **options: object
) -> ATVModel:
    """An ATV on a tiny LLM, strong enough to matter."""
    llm = make_llm(name, dtype)
    path = getattr(llm, "layer_path", None)
    config = ATVConfig(**(PAPER_FORM | {"layer_path": path} | options))  # type: ignore[arg-type]
    set_seed(3)
    atv = ATVModel(llm, config, tokenizer=byte_level_tokenizer(), generator=make_generator(config, kind))
    return atv.to(dtype).eval()


def toy_task(name: str = "toy", rows: int = 24) -> Task:
    """Two words decide the answer."""
    words = [("quiet", "yes"), ("leaks", "no")]
    examples = [Example(f"the harbour {words[i % 2][0]} {i}", words[i % 2][1]) for i in range(rows)]
    third = rows // 3
    return Task(
        name,
        ("{input}\nyes or no?", "Question: {input}", "Is it so? {input}"),
        tuple(examples[:third]),
        tuple(examples[third : 2 * third]),
        tuple(examples[2 * third :]),
    )


@pytest.fixture
def atv(monkeypatch, capsys):
    """Run the command: exit code, standard output and standard error."""

    from atv.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["atv", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def task() -> Task:
    return toy_task()


def steer_known(llm, layers, vectors, scale, where):
    """Add vectors at the tokens of a mask, in every call of the LLM inside the context."""
    return steer(llm, AddVectors(layers, vectors, scale, Positions.parse("all")), Known(where))


def failed(checks):
    """Names of the checks of `atv doctor` that failed."""
    return [check.name for check in checks if not check.passed]
