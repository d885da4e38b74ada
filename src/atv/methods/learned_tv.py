"""Learned task vector (arXiv 2509.24169): one trained vector, added at one decoder layer of the frozen LLM.

In its paper, the vector is trained directly with the loss of the answers instead of being taken from states; it works
at any layer, at the last token of the prompt or at several. Here one vector serves all tasks, like every method's
adapter. The optimiser and the initialisation at zero are those of `fixed`. A vector is trained at each of a few layers,
evenly spread over the LLM's depth, and the one that gets the most validation rows right is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from atv.config import Checked, Positions, TrainConfig
from atv.data import Task
from atv.files import read_json
from atv.lm.prefix_store import PrefixStore
from atv.methods.fixed import Fixed, FixedConfig, FixedModel
from atv.methods.learn_once import BEST, at_least_one, layers_to_try, learn_once, note_few, number_or_best
from atv.processes import barrier, is_main
from atv.progress import log


@dataclass
class LearnedTVConfig(Checked):
    """Where the vector is added."""

    layer: int | str = BEST
    """Index of the decoder layer, or best: the best of `candidates` layers on validation rows."""
    candidates: int = 4
    """Number of layers to try, evenly spread over the LLM's depth."""
    positions: str = "last"
    """Tokens that receive the vector: last, last:K (the paper has both last and last:5), answer or all."""

    def __post_init__(self) -> None:
        """Raise ATVError for a value that is not allowed."""
        number_or_best("layer", self.layer, whole=True)
        Positions.parse(self.positions)
        at_least_one(self, "candidates")


class LearnedTVModel(FixedModel):
    """A fixed vector at one layer."""

    method = "learned-tv"


class LearnedTV(Fixed):
    """A trained vector at one layer."""

    name = "learned-tv"
    config_class: ClassVar[type[Checked] | None] = LearnedTVConfig  # type: ignore[assignment]
    model_class = LearnedTVModel
    search: ClassVar[dict[str, tuple[Any, ...]]] = {
        "positions": ("last", "last:5"),
        "learning_rate": Fixed.search["learning_rate"],
    }

    @classmethod
    def fit(
        cls,
        llm: nn.Module,
        tokenizer: Any,
        tasks: Sequence[Task],
        out: Path,
        config: Any,
        train: TrainConfig,
        *,
        force: bool = False,
        store: PrefixStore | None = None,
    ) -> Path:
        """Train a vector at each candidate layer, as `fixed` does, and keep the best."""
        layers = layers_to_try(config.layer, config.candidates, llm)
        train_fixed = super().fit

        def learn(folder: Path, parts: Path, keep: Callable[..., None]) -> None:
            shared = store or PrefixStore()
            found: dict[int, dict[str, Any]] = {}
            for layer in layers:
                at = FixedConfig(layers=[layer], positions=config.positions)
                train_fixed(llm, tokenizer, tasks, parts / str(layer), at, train, store=shared)
                found[layer] = read_json(parts / str(layer) / "train.json", "the record of a training")
                keep()
            scores = {layer: (of["best_eval_accuracy"], -of["best_eval_loss"]) for layer, of in found.items()}
            best = max(scores, key=lambda layer: scores[layer])
            if len(layers) > 1:
                note_few(cls.name, tasks, len(layers))
                log.info(f"{cls.name}: layer {best} of {', '.join(map(str, layers))} has the best validation accuracy")
            if is_main():
                model = cls.model_class.from_pretrained(parts / str(best) / "adapter", llm, tokenizer=tokenizer)
                model.training_summary["layers"] = {
                    str(layer): {"valid_accuracy": right, "valid_loss": -loss}
                    for layer, (right, loss) in scores.items()
                }
                model.save_pretrained(folder)
            barrier()
            keep(layer=best, **{key: found[best].get(key) for key in ("history", "trainable_parameters")})

        return learn_once(llm, tokenizer, tasks, out, config, train.learned_with(), learn, force=force, together=True)
