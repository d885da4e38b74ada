"""Encoder: the generator's model alone, fine-tuned with a linear head. Tests whether the LLM contributes anything.

It reads the bare query (mean pooling). One head serves all tasks, with one column for every answer in their training
and validation rows. In training and at inference, a row is classified among the answers of its own task; a query of a
task that was not trained on, among all answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from atv import artifact
from atv.adapter import GENERATOR_FOLDER, load_generator_weights, saved_generator
from atv.config import EMBEDDED_GENERATOR, ATVConfig, Checked, Positions, TrainConfig
from atv.data import Example, Renderer, Task
from atv.data.collate import Collator, EncodedRow, Row, pad_id
from atv.errors import ATVError
from atv.generator import Generator
from atv.lm import identity
from atv.lm.adapter_model import AdapterModel, AnswerLoss, answer_loss
from atv.lm.hooks import input_device
from atv.lm.prefix import ReadPrefix
from atv.lm.scoring import training_options
from atv.methods.answers import choices
from atv.methods.base import Choice, Method
from atv.methods.retriever import check_encoder, read_queries

HEAD_FILE = "head.safetensors"


@dataclass
class EncoderConfig(Checked):
    """The encoder to fine-tune."""

    generator: str = EMBEDDED_GENERATOR
    """Hugging Face id or folder of the model that reads the query (any encoder or decoder), with mean pooling."""

    def __post_init__(self) -> None:
        """Raise ATVError for a value that is not allowed."""
        check_encoder(self.generator)

    def generator_config(self) -> ATVConfig:
        """The configuration for `Generator`."""
        return ATVConfig(generator=self.generator, pooling="mean", query_template="{query}", train_generator=True)


class EncoderModel(AdapterModel):
    """An encoder and a head. The LLM is kept but not used.

    The training loop expects rows to be prompts with answers for an LLM. Here a row's single answer token is the index
    of its answer, and its query tokens are preceded by the index of its task.

    Args:
        llm: the LLM of the other methods; the adapter is saved for it.
        config: the encoder.
        tokenizer: the LLM's.
        answers: the answers of each training task.
        judged: the maximum number of tokens by which the LLM tells a task's answers apart, over all tasks.
        generator: a loaded generator; by default, the one in `config` is loaded.
    """

    known: Tensor
    """(tasks, answers) bool: the answer is one of the task's."""

    def __init__(
        self,
        llm: nn.Module,
        config: EncoderConfig,
        tokenizer: Any,
        answers: Mapping[str, Sequence[str]],
        judged: int = 1,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(llm, tokenizer)
        self.config, self.judged = config, judged
        self.answers = {name: list(some) for name, some in answers.items()}
        self.all_answers = sorted({answer for some in answers.values() for answer in some})
        self.tasks = list(answers)
        self.generator = generator or Generator.load(config.generator_config())
        self.head = nn.Linear(self.generator.hidden_size, len(self.all_answers))
        known = [[answer in some for answer in self.all_answers] for some in self.answers.values()]
        self.register_buffer("known", torch.tensor(known), persistent=False)
        self.to(input_device(llm))

    writes = False

    @classmethod
    def of(cls, llm: nn.Module, config: EncoderConfig, tokenizer: Any, tasks: Sequence[Task]) -> Self:
        """An untrained model for the answers of the tasks."""
        answers = {task.name: sorted({row.output for row in (*task.train, *task.valid)}) for task in tasks}
        judged = max(max(training_options(tokenizer, task).judged.values()) for task in tasks)
        return cls(llm, config, tokenizer, answers, judged)

    def describe(self) -> dict[str, Any]:
        """The configuration."""
        return {"method": Encoder.name, **self.config.to_dict()}

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The head at `learning_rate`, the encoder at `generator_learning_rate` if given."""
        rate = config.generator_learning_rate
        return [
            {"params": list(self.head.parameters()), "lr": config.learning_rate},
            {"params": list(self.generator.parameters()), "lr": config.learning_rate if rate is None else rate},
        ]

    @contextmanager
    def in_training(self, config: TrainConfig, read: ReadPrefix, rows: Sequence[EncodedRow]) -> Iterator[None]:
        """As for every `AdapterModel`, but with the encoder in bfloat16 if `config` says so."""
        self.generator.bf16 = config.bf16
        try:
            with super().in_training(config, read, rows):
                yield
        finally:
            self.generator.bf16 = False

    # ---- texts to tensors ----

    def encode_query(self, query: str, task: str) -> list[int]:
        """The index of the task, then the query's tokens."""
        return [self.tasks.index(task), *self.generator.encode([query])[0]]

    def encode_row(self, row: Row) -> EncodedRow:
        """A row with its query's length and the index of its answer; there is no prompt."""
        query = self.encode_query(row.example.input, row.task)
        pairs = [([0] * len(query), [self.all_answers.index(row.example.output)])]
        return EncodedRow(query, pairs, task=row.task, answer=row.example.output)

    def collator(self) -> Collator:
        """A collator that makes `forward`'s batches from `encode_row`'s rows."""
        return Collator(Positions.parse("all"), 0, pad_id(self.generator.tokenizer))

    # ---- the path of a query ----

    def forward(
        self,
        query_input_ids: Tensor,
        query_attention_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        edit_mask: Tensor,
        labels: Tensor,
    ) -> AnswerLoss:
        """The cross-entropy of each row's answer among the answers of its task; see `AdapterModel.forward`."""
        del input_ids, attention_mask, position_ids, edit_mask
        scores = self.head(self.generator(query_input_ids[:, 1:], query_attention_mask[:, 1:]))
        scores = scores.masked_fill(~self.known[query_input_ids[:, 0]], float("-inf"))
        found = answer_loss(scores[:, None], labels)  # (queries, 1, answers), (queries, 1)
        assert found.right is not None
        found.right = found.right.expand(-1, self.judged)  # an answer is right or wrong as a whole
        return found

    @torch.no_grad()
    def scores(self, queries: Sequence[str]) -> Tensor:
        """Scores of all answers, (queries, answers), on the CPU."""
        found: Tensor = self.head(read_queries(self.generator, queries))
        return found.cpu()

    # ---- the artifact ----

    def save_pretrained(self, path: str | Path) -> None:
        """Write the encoder, the head and the names of the answers to a folder, atomically."""

        def write(part: Path) -> None:
            self.generator.save(part / GENERATOR_FOLDER)
            head = {name: tensor.detach().contiguous().cpu() for name, tensor in self.head.state_dict().items()}
            save_file(head, part / HEAD_FILE, metadata={"format": "pt"})

        llm, config = identity.describe_llm(self.llm), self.config.to_dict()
        about = {"name": self.generator.name_or_path, "revision": self.generator.revision}
        artifact.save(
            Path(path),
            Encoder.name,
            llm,
            config,
            self.training_summary,
            write,
            {"answers": self.answers, "generator": about},
        )

    def load_weights(self, folder: Path) -> None:
        """Load the encoder and the head of an adapter for the same answers."""
        saved = artifact.read(folder, Encoder.name)
        artifact.check_llm(saved, self.llm, folder)
        if artifact.answers_of(saved, folder) != self.answers:
            raise ATVError(f"{folder} was trained for other answers than these tasks have. Train it again.")
        load_generator_weights(self.generator, saved, self.config.generator_config(), folder)
        self.head.load_state_dict(artifact.load_tensors(folder / HEAD_FILE, self.head.state_dict()))
        self.training_summary = saved.training

    @classmethod
    def from_pretrained(cls, llm: nn.Module, path: str | Path, *, tokenizer: Any = None) -> Self:
        """Load what `save_pretrained` wrote, for the same LLM."""
        folder, saved = artifact.read_for(path, Encoder.name, llm)
        config = EncoderConfig.from_dict(saved.config)
        generator = saved_generator(config.generator_config(), folder)
        model = cls(llm, config, tokenizer, artifact.answers_of(saved, folder), generator=generator)
        model.load_weights(folder)
        return model.eval()


class Encoder(Method):
    """Answers without calling the LLM."""

    name = "encoder"
    config_class: ClassVar[type[Checked] | None] = EncoderConfig
    train_defaults: ClassVar[dict[str, Any] | None] = {"learning_rate": 1e-3, "generator_learning_rate": 1e-4}
    generator_options: ClassVar[frozenset[str]] = frozenset(("generator_learning_rate", "bf16"))
    search: ClassVar[dict[str, tuple[Any, ...]]] = {
        "generator_learning_rate": (1e-4, 5e-5, 2e-4),
        "learning_rate": (1e-3, 3e-3),
    }

    def __init__(self, model: EncoderModel) -> None:
        super().__init__(model.llm, model.tokenizer)
        self.model = model.eval()

    @classmethod
    def untrained(
        cls, llm: nn.Module, tokenizer: Any, tasks: Sequence[Task], config: EncoderConfig, train: TrainConfig
    ) -> EncoderModel:
        """Encoder and head, which are trained together."""
        del train
        return EncoderModel.of(llm, config, tokenizer, tasks)

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """Load the encoder and the head."""
        cls.wanted_shots(shots)
        method = cls(EncoderModel.from_pretrained(llm, cls.wanted_adapter(adapter), tokenizer=tokenizer))
        method.seed = seed
        return method

    def describe(self) -> dict[str, Any]:
        """The configuration and how the model was trained."""
        return {"config": self.model.config.to_dict(), "training": self.model.training_summary}

    def choose(self, task: Task, examples: Sequence[Example], render: Renderer) -> list[Choice]:
        """The best of the task's answers if it was trained on, else the best of all answers."""
        del render
        scores, answers = self.model.scores([example.input for example in examples]), self.model.all_answers
        if task.name in self.model.answers:
            own = self.model.answers[task.name]
            scores, answers = scores[:, [answers.index(answer) for answer in own]], own
        return choices(scores, answers)
