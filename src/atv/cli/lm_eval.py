"""`atv lm-eval`."""

import json
import sys
from dataclasses import asdict
from importlib.util import find_spec

from atv import artifact
from atv.cli.options import LMEval
from atv.errors import ATVError


def run_lm_eval(given: LMEval) -> None:
    """Run lm-eval's own command with the adapter as its model."""
    rest = given.arguments or []
    if find_spec("lm_eval") is None:
        raise ATVError(
            "atv lm-eval needs the package lm-eval, which is not installed. Install it with: "
            "pip install 'adaptive-task-vectors[lm-eval]'"
        )
    if model := next((word for word in rest if word.partition("=")[0] in ("--model", "-M")), None):
        raise ATVError(f"atv lm-eval evaluates an adapter, and its model is always atv; found {model}: leave it out.")
    saved = artifact.read(artifact.locate(given.adapter))
    about = {
        "adapter": given.adapter,
        "pretrained": given.llm or saved.base_llm["name"],  # lm-eval names the folder of its results after it
        "query_field": given.query_field,
        "training_task": given.training_task,
        "scale": given.scale,
        **(asdict(given.loading) | {"device": None}),
    }
    model_args = json.dumps({name: value for name, value in about.items() if value is not None})
    import torch
    from lm_eval.__main__ import cli_evaluate

    import atv.integrations.lm_eval  # noqa: F401  (registers the model)

    device = given.loading.device or ("cuda" if torch.cuda.is_available() else "cpu")  # lm-eval's default is cuda:0
    own = sys.argv
    sys.argv = ["lm-eval", "run", "--model", "atv", "--model_args", model_args, "--device", device, *rest]
    try:
        cli_evaluate()
    except ATVError:
        raise
    except (ValueError, KeyError, OSError) as error:
        raise ATVError(f"lm-eval stopped with {type(error).__name__}: {error}") from error
    finally:
        sys.argv = own
