"""The engine that runs the LLM, as a command's options choose it."""

import json
from typing import TYPE_CHECKING, Any

from atv.cli.loading import frozen_llm
from atv.cli.options import Engines, Loading
from atv.errors import ATVError
from atv.processes import world_size

if TYPE_CHECKING:
    from atv.serving.requests import Limits, Serving


def start_engine(name: str, given: Engines, loading: Loading, limits: "Limits") -> "Serving":
    """Load an LLM into the chosen engine; `check_engine` must have accepted the options."""
    if given.engine == "transformers":
        from atv.serving.engine import Engine

        return Engine(*frozen_llm(name, loading).load(), limits)
    options: dict[str, Any] = {
        "revision": loading.revision,
        "trust_remote_code": loading.trust_remote_code,
        "options": engine_options(given),
    }
    if given.gguf is not None:
        from atv.serving.llamacpp import LlamaCppEngine

        return LlamaCppEngine(given.gguf, name, limits, **options)
    from atv.lm.load import parse_dtype
    from atv.serving.vllm import VLLMEngine

    return VLLMEngine(name, limits, dtype=str(parse_dtype(loading.dtype)).removeprefix("torch."), **options)


def check_engine(given: Engines, loading: Loading) -> None:
    """Raise ATVError for options that the chosen engine does not have."""
    if (given.gguf is None) == (given.engine == "llamacpp"):
        raise ATVError(
            "--engine llamacpp needs the LLM's GGUF file: --gguf FILE."
            if given.gguf is None
            else "--gguf is for --engine llamacpp; leave it out."
        )
    engine_options(given)
    if given.engine != "transformers" and world_size() > 1:
        raise ATVError(
            f"A launcher started {world_size()} processes, each of which would start --engine {given.engine} for "
            "itself; start one process, or one for each part of the file."
        )
    others = {
        "--engine-options": (given.engine_options is not None, ("vllm", "llamacpp")),
        "--device": (loading.device is not None, ("transformers",)),
        "--quantization": (loading.quantization is not None, ("transformers",)),
        "--dtype": (loading.dtype != Loading().dtype, ("transformers", "vllm")),
    }
    for option, (differs, engines) in others.items():
        if differs and given.engine not in engines:
            raise ATVError(f"{option} is for --engine {' and '.join(engines)}; leave it out.")


def engine_options(given: Engines) -> dict[str, Any]:
    """Return the engine's own options; ATVError if they are not a JSON object."""
    text = given.engine_options or "{}"
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ATVError(f"--engine-options is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ATVError(f'--engine-options is {text}; expected an object, such as {{"max_model_len": 4096}}.')
    return found
