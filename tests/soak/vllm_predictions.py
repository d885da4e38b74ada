"""Predictions on vLLM against those of the transformers model: scored options and generated texts, tiny random LLM.

    python tests/soak/vllm_predictions.py

Needs the environment of docs/serve-vllm.md, with hypothesis and pytest. Not part of the gate, where a stand-in is
compared.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import PAPER_FORM, SIZES, byte_level_tokenizer, make_generator
from serving import same_predictions

from atv.config import ATVConfig
from atv.model import ATVModel
from atv.serving import predict
from atv.serving.requests import Limits
from atv.serving.vllm import VLLMEngine


def main():
    """Compare, and print the worker's counts."""
    folder = Path(tempfile.mkdtemp())
    set_seed(1)
    sizes = SIZES | {"hidden_size": 128, "num_key_value_heads": 2, "intermediate_size": 256, "initializer_range": 0.2}
    llm = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).float().eval()
    tokenizer = byte_level_tokenizer()
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    llm.name_or_path = llm.config._name_or_path = str(folder / "llm")
    models = {}
    for number, positions in enumerate(("last", "last:3", "answer", "all")):
        config = ATVConfig(**PAPER_FORM | {"positions": positions, "scale": 0.5})
        set_seed(10 + number)
        models[positions] = ATVModel(llm, config, tokenizer=tokenizer, generator=make_generator(config)).eval()
        models[positions].save_pretrained(folder / positions)
    options = {"max_model_len": 200, "block_size": 32, "kv_cache_memory_bytes": 2**28, "enforce_eager": True}
    engine = VLLMEngine(str(folder / "llm"), Limits(rows=8, waiting=64), dtype="float32", options=options)
    runner = asyncio.Runner()
    predict.asyncio.Runner = lambda: runner  # vLLM belongs to one event loop
    try:
        for positions, model in models.items():
            same_predictions(engine, engine.load(folder / positions), model)
            print(f"{positions}: equal; the worker counts {runner.run(engine.worker_counts())}", flush=True)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
