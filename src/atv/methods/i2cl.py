"""I2CL, implicit in-context learning (arXiv 2405.14660): demonstrations as activations instead of tokens.

In its own paper, for layer l and a module (attention or MLP) whose output enters the residual stream:

- Context vectors ("Context Vectorization"): c_l = the mean over a task's demonstrations of the module's output at the
  demonstration's last token. Each demonstration (a prompt with its answer) is read separately.
- Injection ("Context Injection"): at every token the module's output a becomes beta_l * a + lambda_l * c_l. Initially
  lambda is 0.1 and beta is 1.
- Learning ("Noisy Self-calibration"): only lambda and beta are trained, two numbers per layer and module, with the loss
  of the answers. In training, normal noise of 0.001 times its norm is added to the injected output at each token.

As adapted by the ATV paper: lambda and beta are shared by all tasks, but each task has its own context vectors. A query
of a task that was not trained on gets those of the task with the most similar training query (cosine). The paper does
not say how queries are embedded. Here the frozen LLM does it: its last layer's state at the last token of the bare
query is compared with those of the demonstrations' queries. This call counts toward the query's seconds. (With
SmolLM2-135M and 15 queries of each of the paper's 20 tasks, 88% of test queries are nearest to a query of their own
task. The mean of a query's input embeddings would be cheaper, but is right for only 72%, even with 90 queries per
task.)

The optimiser is the same as for all methods here; I2CL's code uses AdamW with warm-up and a cosine schedule.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atv import artifact
from atv.config import Checked, Positions, TrainConfig
from atv.data import Example, Prompt, Task, Template
from atv.data.collate import left_padded, pad_id
from atv.data.render import INPUT, fitting
from atv.errors import ATVError
from atv.lm import identity
from atv.lm.adapter_model import AdapterModel, AnswerLoss, plain_loss
from atv.lm.hooks import (
    attention_and_mlp,
    capture_outputs,
    decoder_layers,
    edit_outputs,
    input_device,
    text_config,
    unregistered,
)
from atv.lm.prefix import call_llm
from atv.lm.spans import Known, Span
from atv.methods.base import Method
from atv.methods.learn_once import at_least_one
from atv.progress import bar
from atv.steer import steer
from atv.training.batches import training_rows

WEIGHTS_FILE = "i2cl.safetensors"
READ_TOGETHER = 16
"""Demonstrations or queries per call of the LLM."""


@dataclass
class I2CLConfig(Checked):
    """How context vectors are made and injected. The defaults are those of I2CL's code, except `demonstrations`."""

    demonstrations: int = 16
    """Training rows per task, averaged into its context vectors: as many as ICL shows (I2CL's code: 5 per class)."""
    initial_context: float = 0.1
    """Initial lambda: the weight of a context vector."""
    initial_module: float = 1.0
    """Initial beta: the weight of a module's own output."""
    noise: float = 0.001
    """Size of the noise in training, relative to the norm of what it is added to."""

    def __post_init__(self) -> None:
        """Raise ATVError for a value that is not allowed."""
        at_least_one(self, "demonstrations")
        for name in ("initial_context", "initial_module", "noise"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not abs(value) < float("inf"):
                raise ATVError(f"{name} is {value!r}; expected a finite number, such as 0.1.")


class I2CLModel(AdapterModel):
    """Context vectors of several tasks and the coefficients that they share.

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not, in any dtype.
        config: how context vectors are made and injected.
        tokenizer: the LLM's.
    """

    contexts: Tensor
    """(tasks, layers, 2, hidden) float32: for attention and MLP."""
    queries: Tensor
    """(shown, hidden) float32: states with which queries of unknown tasks are compared, normalised to length 1."""
    owners: Tensor
    """(shown,): the task of each of these states."""

    def __init__(self, llm: nn.Module, config: I2CLConfig, tokenizer: Any = None) -> None:
        super().__init__(llm, tokenizer)
        self.config = config
        modules = attention_and_mlp(llm)
        unregistered(self, edited_modules=[module for pair in modules for module in pair])
        start = torch.tensor([config.initial_context, config.initial_module])
        self.coefficients = nn.Parameter(start.repeat(len(modules), 2, 1))
        """(layers, 2, 2) float32: attention and MLP; lambda and beta."""
        self.tasks: list[str] = []
        """Names of the tasks with context vectors."""
        self.to(input_device(llm))

    edited_modules: list[nn.Module]

    def describe(self) -> dict[str, Any]:
        """The configuration."""
        return {"method": I2CL.name, **self.config.to_dict()}

    # ---- context vectors ----

    def read(self, tasks: Sequence[Task], seed: int) -> Self:
        """Make the context vectors of tasks from demonstrations drawn with `seed`, the same as ICL shows.

        The demonstrations alternate between the task's templates, since the coefficients serve all templates.
        """
        self.tasks = [task.name for task in tasks]
        contexts, queries = {}, {}
        with bar("read demonstrations", len(tasks)) as progress:
            for task in tasks:
                rows = training_rows(task)
                shown = random.Random(f"{seed} {task.name}").sample(rows, min(self.config.demonstrations, len(rows)))
                pairs = [self.encode_row(row).pairs for row in shown]
                read = [of_row[index % len(of_row)] for index, of_row in enumerate(pairs)]
                contexts[task.name] = self._context([prompt + answer for prompt, answer in read])
                queries[task.name] = self._states([row.example.input for row in shown])
                progress.advance()
        return self.hold(contexts, queries)

    def hold(self, contexts: Mapping[str, Tensor], queries: Mapping[str, Tensor]) -> Self:
        """Set the given context vectors (layers, 2, hidden) and states of queries (shown, hidden) of each task."""
        self.tasks = list(contexts)
        shown = torch.tensor([len(queries[name]) for name in self.tasks])
        for name, value in (
            ("contexts", torch.stack([contexts[name] for name in self.tasks])),
            ("queries", torch.cat([queries[name] for name in self.tasks])),
            ("owners", torch.arange(len(shown)).repeat_interleave(shown)),
        ):
            self.register_buffer(name, value.to(self.coefficients.device), persistent=False)  # not trained
        return self

    @torch.no_grad()
    def _context(self, demonstrations: Sequence[list[int]]) -> Tensor:
        """Mean outputs (layers, 2, hidden) of the modules at the last token of each demonstration."""
        total = torch.zeros(len(self.edited_modules), text_config(self.llm).hidden_size, dtype=torch.float64)
        for start in range(0, len(demonstrations), READ_TOGETHER):
            inputs = left_padded(demonstrations[start : start + READ_TOGETHER], pad_id(self.tokenizer))
            rows = len(inputs["input_ids"])

            def add(index: int, hidden: Tensor, rows: int = rows) -> Tensor:
                last = hidden.reshape(rows, -1, hidden.shape[-1])[:, -1]  # (rows, hidden)
                total[index] += last.double().sum(0).cpu()
                return hidden

            device = input_device(self.llm)
            with edit_outputs(self.edited_modules, add):
                call_llm(self.llm, keep=1, use_cache=False, **{name: ids.to(device) for name, ids in inputs.items()})
        return (total / len(demonstrations)).float().reshape(-1, 2, total.shape[1])

    @torch.no_grad()
    def _states(self, queries: Sequence[str]) -> Tensor:
        """The states by which queries, cut to the LLM's context, are compared: (queries, hidden), each of length 1."""
        bare, states = Template(INPUT), []
        prompts = [fitting(bare, self.tokenizer, Example(query, ""), self.context) for query in queries]
        for start in range(0, len(prompts), READ_TOGETHER):
            inputs = self.encode_prompts(prompts[start : start + READ_TOGETHER])
            with capture_outputs(decoder_layers(self.llm)[-1:]) as captured:
                call_llm(self.llm, keep=1, use_cache=False, **inputs)
            states.append(captured[0][:, -1].float().to(self.coefficients.device))
        return nn.functional.normalize(torch.cat(states), dim=-1)

    def tasks_of(self, prompts: Sequence[Prompt]) -> Tensor:
        """The tasks whose context vectors prompts use, (prompts,): their own, or the most similar if it has none."""
        found = torch.tensor([self.tasks.index(p.task) if p.task in self.tasks else -1 for p in prompts])
        found = found.to(self.owners.device)
        if (found < 0).any():
            states = self._states([p.query for p in prompts if p.task not in self.tasks])
            found[found < 0] = self.owners[(states @ self.queries.T).argmax(1)]
        return found

    # ---- injection ----

    def edit(self, tasks: Tensor) -> "MixContext":
        """An edit that mixes the context vectors of `tasks`, (rows,), into attention and MLP outputs at every token."""
        return MixContext(self, tasks)

    def encode_query(self, query: str, task: str) -> list[int]:
        """The index of the task."""
        del query
        return [self.tasks.index(task)]

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
        """The loss of the answers, whose tokens are edited too; see `AdapterModel.forward`."""
        del query_attention_mask
        tasks = query_input_ids[:, 0].repeat_interleave(len(input_ids) // len(query_input_ids))  # (batch,)
        with steer(self.llm, self.edit(tasks), Known(edit_mask)):
            return plain_loss(self.llm, input_ids, attention_mask, position_ids, labels)

    # ---- the artifact ----

    def save_pretrained(self, path: str | Path) -> None:
        """Write coefficients, context vectors and states of queries to a folder, atomically."""
        tensors = {"coefficients": self.coefficients.detach()}
        for index, name in enumerate(self.tasks):
            tensors[f"context/{name}"] = self.contexts[index]
            tensors[f"queries/{name}"] = self.queries[self.owners == index]

        def write(part: Path) -> None:
            kept = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            save_file(kept, part / WEIGHTS_FILE, metadata={"format": "pt"})

        llm = identity.describe_llm(self.llm)
        artifact.save(Path(path), I2CL.name, llm, self.config.to_dict(), self.training_summary, write)

    def load_weights(self, folder: Path) -> None:
        """Load coefficients, context vectors and states of queries of an adapter."""
        saved = artifact.read(folder, I2CL.name)
        artifact.check_llm(saved, self.llm, folder)
        try:
            tensors = load_file(folder / WEIGHTS_FILE)
            self.load_state_dict({"coefficients": tensors.pop("coefficients")})
            found = {name.split("/", 1)[1] for name in tensors}
            names = self.tasks if found == set(self.tasks) else sorted(found)
            self.hold(*({name: tensors[f"{kind}/{name}"] for name in names} for kind in ("context", "queries")))
        except (SafetensorError, RuntimeError, OSError, KeyError, IndexError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ATVError(f"{folder} is not an I2CL adapter for this LLM: {reason}. Train it again.") from error
        self.training_summary = saved.training

    @classmethod
    def from_pretrained(cls, llm: nn.Module, path: str | Path, *, tokenizer: Any = None) -> Self:
        """Load what `save_pretrained` wrote, onto the same LLM."""
        folder, saved = artifact.read_for(path, I2CL.name, llm)
        try:
            config = I2CLConfig.from_dict(saved.config)
        except TypeError as error:
            raise ATVError(f"{folder} is not an I2CL adapter for this LLM: {error}. Train it again.") from error
        model = cls(llm, config, tokenizer)
        model.load_weights(folder)
        return model.eval()


class MixContext:
    """I2CL's `Edit`: `lambda * context + beta * own` at every token, for attention and MLP of each layer.

    Args:
        model: the context vectors and coefficients.
        tasks: (rows,), the task whose context vectors each row uses.
    """

    positions = Positions.parse("all")

    def __init__(self, model: I2CLModel, tasks: Tensor) -> None:
        self.model, self.tasks = model, tasks
        self.sites = model.edited_modules

    def __call__(self, site: int, hidden: Tensor, span: Span) -> Tensor:
        """Mix the context into a module's output, (rows, seq, hidden); some LLMs flatten rows and tokens."""
        del span  # all tokens, even padding, which is masked
        model, (layer, module) = self.model, divmod(site, 2)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        own = hidden.reshape(len(self.tasks), -1, hidden.shape[-1]).to(dtype)
        context = model.contexts[self.tasks, layer, module].to(own)[:, None]  # (rows, 1, hidden)
        of_context, of_own = model.coefficients[layer, module].to(own)
        mixed: Tensor = of_own * own + of_context * context  # (rows, seq, hidden)
        if model.training:
            size = model.config.noise * mixed.detach().norm(dim=-1, keepdim=True)
            mixed = mixed + size * torch.randn_like(mixed)
        return mixed.to(hidden.dtype).reshape(hidden.shape)


class I2CL(Method):
    """The plain prompt, with a task's context vectors mixed into the LLM's attention and MLP outputs."""

    name = "i2cl"
    config_class = I2CLConfig
    train_defaults: ClassVar[dict[str, Any] | None] = {"learning_rate": 1e-2}
    search: ClassVar[dict[str, tuple[Any, ...]]] = {
        "learning_rate": (1e-2, 3e-3, 3e-2),
        "initial_context": (0.1, 0.03, 0.3),
    }

    def __init__(self, model: I2CLModel) -> None:
        super().__init__(model.llm, model.tokenizer)
        self.model = model.eval()

    @classmethod
    def untrained(
        cls, llm: nn.Module, tokenizer: Any, tasks: Sequence[Task], config: I2CLConfig, train: TrainConfig
    ) -> I2CLModel:
        """Context vectors, and coefficients, which are trained. Every token changes: no prefix can be cached."""
        return I2CLModel(llm, config, tokenizer).read(tasks, train.seed)

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """Load the adapter onto the LLM."""
        del seed
        cls.wanted_shots(shots)
        return cls(I2CLModel.from_pretrained(llm, cls.wanted_adapter(adapter), tokenizer=tokenizer))

    def describe(self) -> dict[str, Any]:
        """The configuration and how the coefficients were trained."""
        return {"config": self.model.config.to_dict(), "training": self.model.training_summary}

    def edit(self, prompts: Sequence[Prompt]) -> MixContext:
        """The context vectors of each prompt's task, or, if it was not trained on, of the task chosen by the query."""
        return self.model.edit(self.model.tasks_of(prompts))
