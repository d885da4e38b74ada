"""Encoder: the generator's model alone, fine-tuned with a linear head. Is the LLM worth anything?

It reads the query as it is (mean pooling). One head serves all tasks: it has a column for every answer among their
training and validation rows, and a row is told apart among the answers of its own task, in training and in use. A query
of a task that was not trained on is answered among all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import set_seed  # that of transformers imports peft, which takes seconds
from safetensors.torch import save_file
from torch import Tensor, nn

from atv import artifact
from atv.config import EMBEDDED_GENERATOR, ATVConfig, Checked, Positions, TrainConfig
from atv.data import Example, Renderer, Task
from atv.data.collate import Collator, EncodedRow, Row, pad, pad_id
from atv.errors import ATVError
from atv.generator import Generator
from atv.lm import identity
from atv.lm.adapter_model import AdapterModel, AnswerLoss, answer_loss
from atv.lm.hooks import input_device
from atv.lm.prefix import ReadPrefix
from atv.lm.prefix_store import PrefixStore
from atv.lm.scoring import training_options
from atv.methods.answers import choices
from atv.methods.base import Choice, Method
from atv.methods.retriever import check_encoder

HEAD_FILE = "head.safetensors"
GENERATOR_FOLDER = "generator"
AT_ONCE = 32
"""Queries that are read together in use."""


@dataclass
class EncoderConfig(Checked):
    """Which encoder is fine-tuned."""

    generator: str = EMBEDDED_GENERATOR
    """Hugging Face id or folder of the model that reads the query (any encoder or decoder), with mean pooling."""

    def __post_init__(self) -> None:
        """Raise ATVError for a value that is not allowed."""
        check_encoder(self.generator)

    def generator_config(self) -> ATVConfig:
        """What `Generator` takes."""
        return ATVConfig(generator=self.generator, pooling="mean", query_template="{query}", train_generator=True)


class EncoderModel(AdapterModel):
    """An encoder and a head, beside an LLM that takes no part in it.

    The training loop reads rows as prompts with answers for an LLM; here a row's one answer token is the number of its
    answer, and the number of its task stands before the tokens of its query.

    Args:
        llm: the LLM of the other methods: the adapter is one for it.
        config: which encoder.
        tokenizer: the LLM's.
        answers: those of each task that is trained on.
        judged: as many tokens as the answers of all tasks are told apart by for the LLM, at most.
        generator: a ready one; by default that of `config` is loaded.
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

    @classmethod
    def of(cls, llm: nn.Module, config: EncoderConfig, tokenizer: Any, tasks: Sequence[Task]) -> Self:
        """An untrained one for the answers of tasks."""
        answers = {task.name: sorted({row.output for row in (*task.train, *task.valid)}) for task in tasks}
        judged = max(max(training_options(tokenizer, task).judged.values()) for task in tasks)
        return cls(llm, config, tokenizer, answers, judged)

    def describe(self) -> dict[str, Any]:
        """Its configuration."""
        return {"method": Encoder.name, **self.config.to_dict()}

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The head at `learning_rate`, the encoder at `generator_learning_rate` if that is given."""
        rate = config.generator_learning_rate
        return [
            {"params": list(self.head.parameters()), "lr": config.learning_rate},
            {"params": list(self.generator.parameters()), "lr": config.learning_rate if rate is None else rate},
        ]

    @contextmanager
    def in_training(self, config: TrainConfig, read: ReadPrefix, rows: Sequence[EncodedRow]) -> Iterator[None]:
        """As every `AdapterModel`, the encoder in bfloat16 if `config` says so."""
        self.generator.bf16 = config.bf16
        try:
            with super().in_training(config, read, rows):
                yield
        finally:
            self.generator.bf16 = False

    # ---- texts to tensors ----

    def encode_query(self, query: str, task: str) -> list[int]:
        """The number of its task, and its query's tokens."""
        return [self.tasks.index(task), *self.generator.encode([query])[0]]

    def encode_row(self, row: Row) -> EncodedRow:
        """As long as its query, with the number of its answer: no prompt is read."""
        query = self.encode_query(row.example.input, row.task)
        return EncodedRow(query, [([0] * len(query), [self.all_answers.index(row.example.output)])])

    def collator(self) -> Collator:
        """Makes the batches that `forward` takes from `encode_row`'s rows."""
        return Collator(Positions.parse("all"), 0, pad_id(self.generator.tokenizer))

    # ---- the path of a query ----

    def logits(self, query_input_ids: Tensor, query_attention_mask: Tensor) -> Tensor:
        """Encoded queries (queries, query seq) to scores of all answers (queries, answers), float32."""
        scores: Tensor = self.head(self.generator(query_input_ids, query_attention_mask))
        return scores

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
        """The cross-entropy of each row's answer among those of its task; see `AdapterModel.forward`."""
        del input_ids, attention_mask, position_ids, edit_mask
        scores = self.logits(query_input_ids[:, 1:], query_attention_mask[:, 1:])
        scores = scores.masked_fill(~self.known[query_input_ids[:, 0]], float("-inf"))
        found = answer_loss(scores[:, None], labels)  # (queries, 1, answers), (queries, 1)
        assert found.right is not None
        found.right = found.right.expand(-1, self.judged)  # an answer is right as a whole, or not at all
        return found

    @torch.no_grad()
    def scores(self, queries: Sequence[str]) -> Tensor:
        """Scores of all answers, (queries, answers), on the CPU."""
        encoded, found = self.generator.encode(queries), []
        for start in range(0, len(encoded), AT_ONCE):
            ids, mask = pad(encoded[start : start + AT_ONCE], pad_id(self.generator.tokenizer), "right")
            found.append(self.logits(ids.to(self.head.weight.device), mask.to(self.head.weight.device)).cpu())
        return torch.cat(found)

    # ---- the artifact ----

    def save_pretrained(self, path: str | Path) -> None:
        """Write encoder, head and the names of the answers to a folder, whole or not at all."""

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
        """Take encoder and head from an adapter for the same answers."""
        saved = artifact.read(folder, Encoder.name)
        artifact.check_llm(saved, self.llm, folder)
        if saved.about["answers"] != self.answers:
            raise ATVError(f"{folder} is for other answers than these tasks have. Train it again.")
        read = Generator.load_saved(self.config.generator_config(), folder / GENERATOR_FOLDER)
        try:
            self.generator.encoder.load_state_dict(read.encoder.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ATVError(f"{folder / GENERATOR_FOLDER} does not fit: {reason}") from error
        self.head.load_state_dict(artifact.load_tensors(folder / HEAD_FILE, self.head.state_dict()))
        self.training_summary = saved.training

    @classmethod
    def from_pretrained(cls, llm: nn.Module, path: str | Path, *, tokenizer: Any = None) -> Self:
        """Load what `save_pretrained` wrote, for the LLM that it was made for."""
        folder = artifact.locate(path)
        saved = artifact.read(folder, Encoder.name)
        artifact.check_llm(saved, llm, folder)
        config = EncoderConfig.from_dict(saved.config)
        generator = Generator.load_saved(config.generator_config(), folder / GENERATOR_FOLDER)
        model = cls(llm, config, tokenizer, saved.about["answers"], generator=generator)
        model.load_weights(folder)
        return model.eval()


class Encoder(Method):
    """Answers by itself: the LLM is not called."""

    name = "encoder"
    config_class: ClassVar[type[Checked] | None] = EncoderConfig
    train_defaults: ClassVar[dict[str, Any] | None] = {"learning_rate": 1e-3, "generator_learning_rate": 1e-4}
    search: ClassVar[dict[str, tuple[Any, ...]]] = {
        "generator_learning_rate": (1e-4, 5e-5, 2e-4),
        "learning_rate": (1e-3, 3e-3),
    }

    def __init__(self, model: EncoderModel) -> None:
        super().__init__(model.llm, model.tokenizer)
        self.model = model.eval()

    @classmethod
    def fit(
        cls,
        llm: nn.Module,
        tokenizer: Any,
        tasks: Sequence[Task],
        out: Path,
        config: EncoderConfig,
        train: TrainConfig,
        *,
        force: bool = False,
        store: PrefixStore | None = None,
    ) -> Path:
        """Train encoder and head together."""
        from atv.training import (
            loop as training,  # the Trainer brings peft and bitsandbytes along: seconds that measuring saves
        )

        set_seed(train.seed)
        model = EncoderModel.of(llm, config, tokenizer, tasks)
        return training.train(model, tasks, out, train, force, store).adapter

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """Load encoder and head."""
        cls.wanted_shots(shots)
        method = cls(EncoderModel.from_pretrained(llm, cls.wanted_adapter(adapter), tokenizer=tokenizer))
        method.seed = seed
        return method

    def describe(self) -> dict[str, Any]:
        """Its configuration and how it was trained."""
        return {"config": self.model.config.to_dict(), "training": self.model.training_summary}

    def choose(self, task: Task, examples: Sequence[Example], render: Renderer) -> list[Choice]:
        """Among the answers of a task that was trained on, else among all."""
        del render
        scores, answers = self.model.scores([example.input for example in examples]), self.model.all_answers
        if task.name in self.model.answers:
            own = self.model.answers[task.name]
            scores, answers = scores[:, [answers.index(answer) for answer in own]], own
        return choices(scores, answers)
