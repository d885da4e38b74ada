"""Steered requests on vLLM or llama.cpp against transformers with hooks, in float32, and the price of steering.

    python tests/soak/engine_equality.py --engine vllm --adapter runs/house --adapter runs/topic
    python tests/soak/engine_equality.py --engine llamacpp

Needs the environment of docs/serve-vllm.md or docs/serve-llamacpp.md. Not part of the gate. Besides the trained
adapters that are named, it uses four with random vectors, of a tenth of the residual stream's size, with different
positions and layers. Checked are the tokens of greedy answers and the log-probabilities of the 20 likeliest tokens at
each of them.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from contextlib import aclosing, nullcontext
from pathlib import Path

import psutil
import torch

from atv import ATVConfig, ATVModel, artifact, load_llm
from atv.data.render import Prompt, encode_text
from atv.lm.ends import end_ids
from atv.lm.hooks import capture_outputs
from atv.lm.load import load_tokenizer
from atv.methods import METHODS
from atv.serving.requests import Limits, Request
from atv.serving.sampling import Sampling

sys.path.insert(0, str(Path(__file__).parents[1]))
from gguf_files import write_gguf

RANDOM = (("last", "all"), ("last:3", "0-2"), ("answer", "top"), ("all", "bottom"))
TEXTS = (
    "The harbour was quiet before the first boats came in, and",
    "Question: the kettle leaks and the lid sticks. Is this opinion positive or negative?\nAnswer:",
    "A list of five rivers in Europe:",
    "Two and two are",
    "The train to the coast leaves at seven. When the guard blew his whistle, the passengers who had stood in the rain "
    "for an hour hurried to the last carriage, which was",
    "def mean(values):\n",
    "Dear Sir or Madam, I am writing to you because the heating in my flat has not worked since",
    "Once upon a time",
)
SHARED = "You are a careful assistant. You answer in short sentences, never guess, and say what you do not know. " * 5


class Checks:
    """Counts answers that equal their reference, by case."""

    def __init__(self, out=None):
        self.found, self._out = {}, out

    def _record(self, case, **about):
        self.found[case] = about
        if self._out is not None:
            self._out.write_text(json.dumps(self.found, indent=1))

    def compare(self, case, answers, expected):
        """Compare answers (tokens and the likeliest tokens of each) with references (tokens and log-probabilities)."""
        equal, worst = 0, 0.0
        for answer, (tokens, logprobs) in zip(answers, expected, strict=True):
            same = [told.token for told in answer] == tokens[: len(answer)] and len(answer) == len(tokens)
            equal += same
            for told, row in zip(answer, logprobs, strict=False):
                worst = max(worst, *(abs(value - float(row[token])) for token, value in told.top))
                if told.token != int(row.argmax()):
                    break
        right = equal == len(answers) and worst < 1e-3
        self._record(case, equal=equal, of=len(answers), worst_logprob_difference=worst, right=right)
        print(f"{case}: {equal} of {len(answers)} equal, worst difference of a log-probability {worst:.1e}", flush=True)

    def require(self, case, right, **about):
        """Record another check."""
        self._record(case, right=bool(right), **about)
        print(f"{case}: {'right' if right else 'WRONG'} {about}", flush=True)


def random_adapters(llm, tokenizer, folder):
    """Save adapters with random vectors and return their folders."""
    with torch.no_grad():
        ids = torch.tensor([encode_text(tokenizer, TEXTS[0])])
        found = []
        for number, (positions, layers) in enumerate(RANDOM):
            torch.manual_seed(number)
            model = ATVModel(llm, ATVConfig(positions=positions, layers=layers, scale=0.1, gate=0), tokenizer=tokenizer)
            with capture_outputs(model.layers) as states:
                llm(ids)
            sizes = torch.stack([states[index][0, -1].pow(2).mean().sqrt() for index in range(len(model.layers))])
            model.expansion.sizes.copy_(sizes)
            model.expansion.common.normal_()
            model.expansion.map.weight.normal_(std=1.0)  # states have length 1, so both parts are of equal size
            model.save_pretrained(folder / str(number))
            found.append(folder / str(number))
    return found


@torch.no_grad()
def reference(llm, model, prompt, count, ends, scale=None):
    """Greedy tokens and their log-probabilities, from transformers with hooks."""
    with nullcontext() if model is None else model.steer([prompt.query], scale=scale):
        ids = torch.tensor([prompt.ids])
        made = llm.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=sorted(ends),
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = made.sequences[0, len(prompt.ids) :].tolist()
    return tokens, [step[0].log_softmax(-1) for step in made.logits]


def trimmed(found, ends):
    """Leave out the end token, which a server does not tell."""
    tokens, logprobs = found
    return (tokens[:-1], logprobs[:-1]) if tokens and tokens[-1] in ends else found


async def answer(engine, request, most=None):
    """Return the likelihoods of an answer's tokens; `most` cancels it after that many pieces."""
    told, pieces = [], 0
    async with aclosing(engine.stream(request)) as stream:
        async for piece in stream:
            if piece.error is not None:
                raise piece.error
            told += piece.tokens
            pieces += 1
            if pieces == most:
                break
    return told


async def text_of(engine, request):
    """Return the text of an answer and the number of its pieces."""
    texts = []
    async with aclosing(engine.stream(request)) as stream:
        async for piece in stream:
            texts.append(piece.text)
    return "".join(texts), len(texts)


class World:
    """Requests and their references, which are computed before the engine is started."""

    def __init__(self, engine, name, folders, folder, quick):
        self.engine, self.name, self.tokenizer = engine, name, load_tokenizer(name)
        llm = load_llm(name, dtype="float32", device="cpu")
        self.gguf = write_gguf(llm, folder / "llm.gguf") if engine == "llamacpp" else None
        self.ends = frozenset(end_ids(llm, self.tokenizer))
        self.folders = [*random_adapters(llm, self.tokenizer, folder), *folders]
        models = [
            METHODS[artifact.read(artifact.locate(each)).method].model_class.from_pretrained(
                each, llm, tokenizer=self.tokenizer
            )
            for each in self.folders
        ]

        def expected(adapter, prompt, count):
            model = None if adapter is None else models[adapter]
            return trimmed(reference(llm, model, prompt, count, self.ends), self.ends)

        adapters = [None, *range(len(models))]
        texts = [self.prompt(text) for text in TEXTS]
        self.mixed = [(adapters[index % len(adapters)], texts[index % len(texts)]) for index in range(16)]
        self.expected = [expected(*each, 16) for each in self.mixed]
        plain = [expected(None, prompt, 1) for _, prompt in self.mixed]
        moved = [
            float((own[1][0] - other[1][0]).abs().max()) if own[1] and other[1] else 0.0
            for own, other, (adapter, _) in zip(self.expected, plain, self.mixed, strict=True)
            if adapter is not None
        ]
        print(f"Steering moves first log-probabilities by {min(moved):.2f} to {max(moved):.2f}", flush=True)
        # A prompt and its continuations. The query is the same in all, so that an adapter's vectors are, too.
        ids = encode_text(self.tokenizer, SHARED)[:128]
        more = [ids, ids + encode_text(self.tokenizer, " Who are you?"), ids[:96]]
        order = [
            (0, 0),
            (None, 0),
            (None, 1),
            (0, 1),
            (2, 0),
            (2, 1),
            (3, 0),
            (3, 1),
            (0, 0),
            (0, 2),
            (None, 2),
            (1, 1),
        ]
        self.shared = [(adapter, Prompt(more[which], "the same query")) for adapter, which in order]
        self.shared_expected = [expected(*each, 8) for each in self.shared]
        long = 40 if quick else 100
        self.long = [(adapters[index % 4], texts[(index // 2) % len(texts)]) for index in range(12)]
        self.long_tokens = long
        self.long_expected = [expected(*each, long) for each in self.long]

    def prompt(self, text):
        return Prompt(encode_text(self.tokenizer, text), text)


def start(world, **options):
    began = time.monotonic()
    limits = Limits(rows=32, waiting=512, kept=2**26)
    if world.engine == "llamacpp":
        from atv.serving.llamacpp import LlamaCppEngine

        engine = LlamaCppEngine(world.gguf, world.name, limits, options={"cache_type": "f32"} | options)
    else:
        from atv.serving.vllm import VLLMEngine

        given = {"max_model_len": 512, "block_size": 32, "kv_cache_memory_bytes": 2**29} | options
        engine = VLLMEngine(world.name, limits, dtype="float32", options=given)
    print(f"{world.engine} started in {time.monotonic() - began:.0f} s with {options}", flush=True)
    return engine, [engine.load(artifact.locate(folder)) for folder in world.folders]


def request(adapters, adapter, prompt, count, **options):
    settings = {"max_tokens": count, "temperature": 0.0, "logprobs": 20} | options
    return Request(prompt, None if adapter is None else adapters[adapter], None, Sampling(**settings))


async def everything(world, checks, quick, load):
    """The engine as it is started by default, prefix caching on."""
    engine, adapters = start(world)
    try:
        every = [request(adapters, *each, 16) for each in world.mixed]
        found = await asyncio.gather(*(answer(engine, each) for each in every))
        checks.compare("16 mixed requests in one batch", found, world.expected)
        found = [await answer(engine, each) for each in every[:8]]
        checks.compare("one at a time", found, world.expected[:8])
        for run in ("first", "second"):
            found = [await answer(engine, request(adapters, *each, 8)) for each in world.shared]
            checks.compare(f"shared prompts and prefix caching, {run} time", found, world.shared_expected)
        found = await asyncio.gather(*(answer(engine, request(adapters, *each, 8)) for each in world.shared))
        checks.compare("shared prompts together", found, world.shared_expected)

        # Cancelled in the middle: every second request, after its third token.
        found = await asyncio.gather(
            *(answer(engine, each, 3 if index % 2 else None) for index, each in enumerate(every))
        )
        checks.compare("the other half is cancelled", found[::2], world.expected[::2])
        cut = [(tokens[:3], rows[:3]) for tokens, rows in world.expected[1::2]]
        checks.compare("cancelled after 3 tokens", [told[:3] for told in found[1::2]], cut)
        await asyncio.sleep(0.5)
        numbers = engine.numbers()
        checks.require("nothing is left", numbers["running"] == 0, cancelled=numbers["cancelled"])

        text, pieces = await text_of(engine, request(adapters, 0, world.mixed[1][1], 16))
        tokens = world.expected[1][0]
        whole = world.tokenizer.decode(tokens, skip_special_tokens=True)
        checks.require("streamed text", text == whole and pieces >= len(tokens), pieces=pieces)
        stop = whole[len(whole) // 2 :][:3]
        text, _ = await text_of(engine, request(adapters, 0, world.mixed[1][1], 16, stop=(stop,)))
        checks.require("stop sequence", text == whole[: whole.find(stop)])
        drawn = [request(adapters, *each, 16, temperature=1.0, seed=7) for each in world.mixed[:6]]
        alone = [[told.token for told in await answer(engine, each)] for each in drawn]
        together = await asyncio.gather(*(answer(engine, each) for each in drawn + every))
        same = [[told.token for told in found] for found in together[:6]] == alone
        checks.require("a seed gives the same answer alone and in a batch", same)
        if world.engine == "vllm":
            counts = await engine.worker_counts()
            checks.require("no request was dropped", counts["dropped"] == 0, **counts)
        if load:
            await price(world, engine, adapters, checks, quick)
    finally:
        engine.close()


async def chunked(world, checks):
    """Prompts read in pieces of at most 32 tokens."""
    engine, adapters = start(world, n_ubatch=32)
    try:
        found = await asyncio.gather(*(answer(engine, request(adapters, *each, 16)) for each in world.mixed))
        checks.compare("chunked prefill", found, world.expected)
        some = [request(adapters, *each, world.long_tokens) for each in world.long]
        found = await asyncio.gather(*(answer(engine, each) for each in some))
        checks.compare("longer answers", found, world.long_expected)
    finally:
        engine.close()


async def pressed(world, checks):
    """Prompts read in pieces of at most 32 tokens, and too few blocks for all answers at once."""
    engine, adapters = start(world, max_num_batched_tokens=32, num_gpu_blocks_override=17, enforce_eager=True)
    try:
        found = await asyncio.gather(*(answer(engine, request(adapters, *each, 16)) for each in world.mixed))
        checks.compare("chunked prefill", found, world.expected)
        before = await engine.worker_counts()
        some = [request(adapters, *each, world.long_tokens) for each in world.long]
        found = await asyncio.gather(*(answer(engine, each) for each in some))
        checks.compare("preemption", found, world.long_expected)
        rows = (await engine.worker_counts())["rows"] - before["rows"]
        least = sum(
            {"last": 1, "last:3": 3, "answer": len(tokens)}[RANDOM[adapter][0]]
            for (adapter, _), (tokens, _) in zip(world.long, world.long_expected, strict=True)
            if adapter is not None
        )
        checks.require("requests were preempted and steered once more", rows > least, rows=rows, without=least)
    finally:
        engine.close()


def cpu_seconds():
    """CPU time so far of this process and of the engine's."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in times)


async def price(world, engine, adapters, checks, quick):
    """Requests per second and CPU time, steered and not, in turns of one run."""
    draw = random.Random(3)
    words = [word for text in TEXTS for word in text.split()]
    found = {}
    for count in (1, 16):
        for turn in range(3 if quick else 8):
            kinds = ("plain", "steered", "vectors cached")
            for kind in kinds[turn % 3 :] + kinds[: turn % 3]:
                texts = [" ".join(draw.choices(words, k=90)) for _ in range(16)]
                prompts = [Prompt(encode_text(world.tokenizer, text)[:110], text) for text in texts]
                if kind == "vectors cached":
                    for prompt in prompts:
                        adapters[0].steerings([prompt.query])
                some = [
                    request(adapters, None if kind == "plain" else 0, prompt, count, logprobs=None)
                    for prompt in prompts
                ]
                began, used = time.monotonic(), cpu_seconds()
                await asyncio.gather(*(answer(engine, each) for each in some))
                seconds, used = time.monotonic() - began, cpu_seconds() - used
                found.setdefault(f"{kind}, {count} tokens", []).append((len(some) / seconds, used / len(some)))
    for name, turns in found.items():
        rates, used = zip(*turns, strict=True)
        checks.require(
            f"load: {name}",
            True,
            requests_per_second=round(statistics.median(rates), 2),
            cpu_milliseconds_per_request=round(1000 * statistics.median(used)),
            turns=[(round(rate, 2), round(1000 * each)) for rate, each in turns],
        )


def main():
    """Compare, print, and return 1 if anything was wrong."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--engine", choices=("vllm", "llamacpp"), required=True)
    options.add_argument("--llm", default="embedded:smollm2-135m")
    options.add_argument("--adapter", type=Path, action="append", default=[])
    options.add_argument("--out", type=Path)
    options.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    options.add_argument("--no-load", action="store_true", help="no measurement of requests per second")
    chosen = options.parse_args()
    checks = Checks(chosen.out)
    with tempfile.TemporaryDirectory() as folder:
        world = World(chosen.engine, chosen.llm, chosen.adapter, Path(folder), chosen.quick)
        asyncio.run(everything(world, checks, chosen.quick, not chosen.no_load))
        asyncio.run((pressed if chosen.engine == "vllm" else chunked)(world, checks))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = round(sum(each.ru_utime + each.ru_stime for each in used))
    wrong = [case for case, about in checks.found.items() if not about.get("right", True)]
    print(f"{len(checks.found)} checks, wrong: {wrong or 'none'}; {seconds} seconds of CPU time")
    return int(bool(wrong))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
