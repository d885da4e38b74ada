"""Models and data: LLMs, generators, and rows with prompts of an exact number of tokens. No external data."""

import random
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from atv.config import EMBEDDED_GENERATOR, EMBEDDED_LLM, SELF, ATVConfig
from atv.data import Task, load_tasks
from atv.data.collate import EncodedRow
from atv.data.render import INPUT, with_prefix
from atv.generator import Generator, load_generator
from atv.lm.load import load_llm, load_tokenizer, parse_dtype
from atv.lm.prefix_store import PrefixStore
from atv.model import ATVModel
from atv.training.batches import training_rows
from benchmarks.common import SEED, Options

GENERATORS = {"minilm": "MiniLM (22.6M)", "gpt2": "GPT-2-sized (124M)"}
TINY: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
}


@cache
def tasks() -> list[Task]:
    """The built-in tasks of one sentence: their prompts have about 37 tokens."""
    return load_tasks(["sentiment", "topic"])


@cache
def memory_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for random weights: byte-level BPE of 1,000 tokens, trained on the built-in tasks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        special_tokens=["<pad>", "<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        [
            with_prefix(template.replace(INPUT, row.input), task.answer_prefixes[0])
            for task in tasks()
            for row in task.train
            for template in task.templates
        ],
        trainer,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def small_llm(options: Options) -> tuple[nn.Module, Any]:
    """SmolLM2-135M in the dtype that is fast here, and its tokenizer; with --tiny a random LLM of three layers."""
    if not options.tiny:
        return load_llm(EMBEDDED_LLM, device=options.device), load_tokenizer(EMBEDDED_LLM)
    return _random_llm(LlamaConfig(**TINY, intermediate_size=48, max_position_embeddings=4096), options, torch.float32)


def small_name(options: Options) -> str:
    """What a record calls the LLM of `small_llm`."""
    dtype = str(parse_dtype("auto", options.device)).removeprefix("torch.")
    return "tiny" if options.tiny else f"SmolLM2-135M, {dtype}"


def large_llm(options: Options) -> tuple[nn.Module, Any]:
    """An LLM of Llama 3 8B's shape with random weights in bfloat16, made on the device; with --tiny the tiny one."""
    if options.tiny:
        return small_llm(options)
    return _random_llm(LlamaConfig(**LLAMA_3_8B), options, torch.bfloat16)


def _random_llm(config: LlamaConfig, options: Options, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    with torch.device(options.device):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    llm.generation_config.pad_token_id = 0
    return llm, memory_tokenizer()


def make_atv(
    options: Options,
    llm: nn.Module,
    tokenizer: Any,
    generator: str = "minilm",
    positions: str = "last",
    **changed: Any,
) -> ATVModel:
    """An ATV in training mode with the generator `minilm`, `self`, or `gpt2`: GPT-2's shape with random weights.

    Its form is the paper's, with a generator that is trained, unless `changed` says otherwise.
    """
    pooling: Any = "mean" if generator == "minilm" else "last"
    form: dict[str, Any] = {"parametrisation": "paper", "train_generator": True} | changed
    config = ATVConfig(generator=generator, pooling=pooling, positions=positions, **form)
    words = tokenizer if tokenizer is memory_tokenizer() else load_tokenizer(EMBEDDED_GENERATOR)
    if generator == "minilm" and not options.tiny:
        config.generator = EMBEDDED_GENERATOR
        made = Generator.load(config)
    elif generator == SELF:
        made = load_generator(config, llm, tokenizer)
    elif generator == "minilm":
        encoder: nn.Module = BertModel(BertConfig(**TINY, intermediate_size=48))
        made = Generator(encoder, words, config.pooling, config.query_template)
    else:
        shape = GPT2Config(vocab_size=1000, n_embd=32, n_layer=2, n_head=4) if options.tiny else GPT2Config()
        made = Generator(GPT2Model(shape), words, config.pooling, config.query_template)
    atv = ATVModel(llm, config, tokenizer=tokenizer, generator=made).train()
    atv.vector_cache.limit = 0  # the same queries occur in every round
    return atv


Pairs = list[tuple[list[int], list[int]]]


def pairs_of(tokenizer: Any, count: int, tokens: int, templates: int = 3) -> list[tuple[str, Pairs]]:
    """Queries of the built-in tasks, each with its prompts of exactly `tokens` tokens and their answers, as token ids.

    Short prompts are extended at the front with other prompts of the tasks, long ones are cut there: the ends, with
    vector and answer, and the queries are real.
    """
    rng = random.Random(SEED)
    rows = [row for task in tasks() for row in training_rows(task)]
    rows = rng.sample(rows, len(rows))
    rows = [rows[index % len(rows)] for index in range(count)]
    found: list[Pairs] = []
    for row in rows:
        prompts = [(render, render.prompt(tokenizer, row.example)) for render in row.renderers[:templates]]
        found.append([(p.ids, render.answer(tokenizer, p, row.example.output)) for render, p in prompts])
    text = [token for pairs in found for prompt, _ in pairs for token in prompt]
    text *= 1 + tokens // len(text)

    def exactly(prompt: list[int]) -> list[int]:
        start = rng.randrange(len(text))
        return ((text[start:] + text[:start])[:tokens] + prompt)[-tokens:]

    return [
        (row.example.input, [(exactly(prompt), answer) for prompt, answer in pairs])
        for row, pairs in zip(rows, found, strict=True)
    ]


def rows_of(atv: ATVModel, count: int, tokens: int, templates: int = 3) -> list[EncodedRow]:
    """The same prompts as training rows of this ATV."""
    found = pairs_of(atv.tokenizer, count, tokens, templates)
    queries = atv.generator.encode([query for query, _ in found])
    return [EncodedRow(query, pairs) for query, (_, pairs) in zip(queries, found, strict=True)]


def fill(atv: ATVModel, rows: list[EncodedRow]) -> PrefixStore:
    """Prefill the tokens before the first edited token of every prompt, as training does before its first epoch."""
    store, edited = PrefixStore(), atv.positions.prompt_tokens
    assert edited is not None
    store.fill(atv.llm, {tuple(prompt[:-edited]) for row in rows for prompt, _ in row.pairs}, lambda _: None)
    atv.read_prefix = store.read
    return store


def mean_query(rows: list[EncodedRow]) -> float:
    """Mean number of tokens that the generator reads."""
    return round(sum(len(row.query) for row in rows) / len(rows), 1)
