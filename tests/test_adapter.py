"""The artifact: round trip, damage refused, another LLM refused, a kill leaves the former or the new one."""

import hashlib
import itertools
import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_atv, make_llm, toy_task
from forks import ended, forked
from huggingface_hub import ModelCard
from refusals import refused
from safetensors.torch import load_file, save_file

from atv import artifact
from atv.config import ATVConfig, TrainConfig
from atv.errors import ATVError
from atv.generator import Generator
from atv.lm import identity
from atv.model import ATVModel
from atv.training.loop import train

QUERIES = ["the kettle leaks", "a quiet harbour"]


def saved(tmp_path, **options):
    atv = make_atv(dtype=torch.float32, **options)
    atv.training_summary = {"tasks": {"toy": toy_task().asking()}}
    atv.save_pretrained(tmp_path / "adapter")
    return atv, tmp_path / "adapter"


def load(path, llm=None):
    return ATVModel.from_pretrained(path, llm or make_llm(dtype=torch.float32), tokenizer=make_atv().tokenizer)


@pytest.mark.parametrize("options", [{}, {"expansion_rank": 3}, {"layers": [0, 2], "positions": "last:2"}])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_loaded_adapter_gives_the_same_vectors_bit_for_bit(tmp_path, options, kind):
    atv, path = saved(tmp_path, kind=kind, **options)
    again = load(path)
    assert torch.equal(again.task_vectors(QUERIES), atv.task_vectors(QUERIES))
    assert again.config == atv.config
    assert again.training_summary == atv.training_summary
    assert not again.training
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt"))
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


def test_a_frozen_generator_is_named_not_copied(tmp_path):
    source = make_atv(dtype=torch.float32).generator
    source.save(tmp_path / "generator")
    config = ATVConfig(scale=0.3, pooling="mean", train_generator=False, generator=str(tmp_path / "generator"))
    atv = ATVModel(make_llm(dtype=torch.float32), config, tokenizer=source.tokenizer).eval()
    path = tmp_path / "adapter"
    atv.save_pretrained(path)
    assert not (path / "generator").exists()
    assert torch.equal(load(path).task_vectors(QUERIES), atv.task_vectors(QUERIES))


def test_the_folder_of_a_training_is_taken_for_its_adapter(tmp_path):
    _, path = saved(tmp_path)
    assert artifact.locate(tmp_path) == path


def other(**changes):
    from conftest import GROUPED
    from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

    set_seed(1)
    return AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED | changes))


@pytest.mark.parametrize(
    ("llm", "named"),
    [
        (lambda: other(num_hidden_layers=4), "num_layers 3 against 4"),
        (lambda: other(hidden_size=64), "hidden_size 32 against 64"),
        (lambda: make_llm("qwen2"), "model_type llama against qwen2"),
        (lambda: other(vocab_size=500), "embeddings, weights"),
        (lambda: other(initializer_range=0.3), "embeddings, weights"),
    ],
)
def test_another_llm_is_refused_and_both_are_named(tmp_path, llm, named):
    _, path = saved(tmp_path)
    with pytest.raises(ATVError, match=f"was made for .* and the LLM given is .*{named}"):
        load(path, llm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_llm_in_another_dtype_is_accepted(tmp_path, dtype):
    from conftest import CONFIGS
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(1)
    llm = AutoModelForCausalLM.from_config(CONFIGS["llama"]).bfloat16()  # as checkpoints are published
    expected = identity.describe_llm(llm)
    assert identity.describe_llm(llm.to(dtype)) == expected


def truncate(path):
    os.truncate(path / "expansion.safetensors", 200)


def alter(path):
    file = path / "generator" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def change(name):
    def apply(path):
        with (path / name).open("a") as file:
            file.write(" ")

    return apply


def edit(**changes):
    def apply(path):
        file = path / "atv_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "expansion.safetensors is altered or truncated"),
        (alter, "model.safetensors is altered or truncated"),
        (lambda path: (path / "expansion.safetensors").unlink(), "expansion.safetensors is missing"),
        (lambda path: (path / "atv_config.json").write_text("{"), "is not valid JSON"),
        (lambda path: (path / "atv_config.json").unlink(), "No adapter at"),
        (lambda path: os.truncate(path / "atv_config.json", 2**25 + 1), "has 33,554,433 bytes; expected at most"),
        (edit(format=99), "has format 99; this version reads format 8"),
        (edit(config={"scale": "strong"}), "is damaged"),
        (edit(sha256={"../../etc/passwd": "0"}), "is not inside the folder"),
        (edit(sha256={"/etc/passwd": "0"}), "is not inside the folder"),
        (edit(sha256={"generator\\..\\..\\x": "0"}), "is not inside the folder"),
        (edit(sha256={"C:x": "0"}), "is not inside the folder"),
        (edit(sha256={"\\x": "0"}), "is not inside the folder"),
        (edit(sha256={"a\0b": "0"}), "names the file 'a"),
        (edit(sha256={"generator/pytorch_model.bin": "0"}), "could run code; expected safetensors"),
        (edit(sha256={}), "lists the weight files"),
        (lambda path: (path / "generator" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (change("generator/tokenizer.json"), "tokenizer.json is altered or truncated"),
        (change("generator/config.json"), "config.json is altered or truncated"),
    ],
)
def test_damage_is_refused_and_named(tmp_path, damage, named):
    _, path = saved(tmp_path)
    damage(path)
    with pytest.raises(ATVError, match=named):
        load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("file", ["expansion.safetensors", "generator/model.safetensors"])
def test_weights_of_a_stranger_that_are_not_finite_are_refused_though_the_digest_fits(tmp_path, file, value):
    _, path = saved(tmp_path)
    tensors = load_file(path / file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path / file, metadata={"format": "pt"})
    written = json.loads((path / "atv_config.json").read_text())
    edit(sha256=written["sha256"] | {file: hashlib.sha256((path / file).read_bytes()).hexdigest()})(path)
    with refused(path / file, name, "NaN or infinite"):
        load(path)


@pytest.mark.parametrize("size", [10**6, 10**12])
@pytest.mark.parametrize("form", ["paper", "calibrated"])
def test_a_stranger_names_no_vectors_that_the_weights_do_not_have(tmp_path, form, size):
    """Before memory is taken for them."""
    _, path = saved(tmp_path, parametrisation=form)
    edit(vectors=[size, size])(path)
    with refused("atv_config.json is damaged", f"vectors is [{size}, {size}]"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_size", 2**20, "(400, 24); expected (400, 1048576)"),
        ("vocab_size", 2**40, "(400, 24); expected (1099511627776, 24)"),
        ("intermediate_size", -3, "cannot be read"),
        ("hidden_size", "x", "cannot be read"),
        ("model_type", "unheard-of", "cannot be read"),
    ],
)
def test_a_stranger_names_no_generator_that_the_weights_do_not_have(tmp_path, key, value, named):
    _, path = saved(tmp_path)
    file = path / "generator" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    written = json.loads((path / "atv_config.json").read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(sha256=written["sha256"] | {"generator/config.json": digest})(path)
    with refused(path / "generator", named, "train again"):
        load(path)


def test_saving_over_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ATVError, match="exists and is not an adapter"):
        make_atv(dtype=torch.float32).save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_kill_at_any_moment_leaves_a_whole_adapter(tmp_path):
    """Killed when it opens, renames or removes a file: the first one, the second one, and so on until none is left."""
    atv, path = saved(tmp_path)

    def save(value, moment):
        events = itertools.count()

        def die(event, _):
            if event.startswith(("open", "os.", "shutil.")) and next(events) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        with torch.no_grad():
            atv.expansion.map.bias.fill_(value)
        sys.addaudithook(die)
        atv.save_pretrained(path)

    def bias():
        return load(path).expansion.map.bias

    former, seen = atv.expansion.map.bias.detach(), set()
    for moment in itertools.count(step=11):
        status = ended(forked(partial(save, float(moment + 1), moment)))
        assert status in (0, -signal.SIGKILL)
        new = torch.full_like(former, moment + 1)
        seen.add(torch.equal(bias(), new))
        assert torch.equal(bias(), former) or torch.equal(bias(), new)
        former = bias().detach()
        if status == 0:
            break
    assert moment > 30
    assert seen == {False, True}


def test_push_uploads_the_saved_folder(tmp_path, monkeypatch):
    import huggingface_hub

    uploaded = {}

    class Api:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, repo_id, **options):
            uploaded["repo"] = repo_id

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            uploaded["files"] = sorted(p.name for p in Path(folder_path).rglob("*") if p.is_file())
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert make_atv(dtype=torch.float32).push_to_hub("me/adapter", token="t") == "address"
    assert uploaded["repo"] == "me/adapter"
    assert {"atv_config.json", "expansion.safetensors", "README.md", "model.safetensors"} <= set(uploaded["files"])


def test_a_hub_id_is_downloaded_without_pickles(tmp_path, monkeypatch):
    import huggingface_hub

    atv, path = saved(tmp_path)
    asked = {}

    def download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = ATVModel.from_pretrained(
        "me/adapter", make_llm(dtype=torch.float32), tokenizer=atv.tokenizer, revision="abc"
    )
    assert torch.equal(model.task_vectors(QUERIES), atv.task_vectors(QUERIES))
    assert asked["name"] == "me/adapter"
    assert asked["revision"] == "abc"
    assert not any(pattern in ("*", "*.bin", "*.pt") for pattern in asked["patterns"])


@pytest.mark.skipif(os.name == "nt", reason="Windows may have no links")
def test_the_hubs_cache_of_links_to_blobs_is_read_and_a_changed_blob_is_not(tmp_path, monkeypatch):
    import huggingface_hub

    atv, path = saved(tmp_path)
    cache = tmp_path / "models--me--adapter"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    for file in [file for file in path.rglob("*") if file.is_file()]:
        blob, link = cache / "blobs" / artifact.sha256(file), snapshot / file.relative_to(path)
        file.rename(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    assert torch.equal(load("me/adapter").task_vectors(QUERIES), atv.task_vectors(QUERIES))
    change("expansion.safetensors")(snapshot)
    with refused("expansion.safetensors is altered"):
        load("me/adapter")


def test_the_model_card_names_llm_generator_and_tasks(tmp_path):
    atv, path = saved(tmp_path)
    for found in ({}, {"best_eval_loss": 0.25, "best_eval_accuracy": 0.75, "train": {"seed": 7}}):
        atv.training_summary |= found
        atv.save_pretrained(path)
        data = ModelCard.load(path / "README.md").data
        assert (data.library_name, data.pipeline_tag) == ("adaptive-task-vectors", "text-generation")
        assert data.metrics == (["accuracy"] if found else None)
        card = (path / "README.md").read_text()
        for word in ("toy", "positions | last", "3 layers of width 32"):
            assert word in card
    for word in ("loss 0.250, accuracy 75.0%", "| seed | 7 |"):
        assert word in card


def test_the_model_card_may_be_edited(tmp_path):
    atv, path = saved(tmp_path)
    change("README.md")(path)
    load(path)
    (path / "README.md").unlink()
    assert torch.equal(load(path).task_vectors(QUERIES), atv.task_vectors(QUERIES))


def test_saving_again_keeps_what_the_user_has_put_there_and_nothing_else(tmp_path):
    atv, path = saved(tmp_path)
    (path / "notes.txt").write_text("mine")
    (path / "figures").mkdir()
    (path / "figures" / "loss.svg").write_text("<svg/>")
    (path / "generator" / "added_tokens.json").write_text("{}")  # a tokenizer would read it
    listed = json.loads((path / "atv_config.json").read_text())
    listed["sha256"]["generator/vocab.txt"] = "0"
    (path / "generator" / "vocab.txt").write_text("from a former generator")
    (path / "atv_config.json").write_text(json.dumps(listed))
    atv.config.scale = 0.7
    atv.save_pretrained(path)
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "figures" / "loss.svg").read_text() == "<svg/>"
    assert not (path / "generator" / "added_tokens.json").exists()
    assert not (path / "generator" / "vocab.txt").exists()
    assert "scale | 0.7" in (path / "README.md").read_text()
    (path / "README.md").write_text("My own card.")
    atv.save_pretrained(path)
    assert (path / "README.md").read_text() == "My own card."
    assert load(path).config.scale == 0.7


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_saving_again_keeps_scripts_executable_and_links_as_links(tmp_path):
    atv, path = saved(tmp_path)
    (path / "run.sh").touch(0o755)
    (path / "broken").symlink_to("nowhere")
    (path / "data").symlink_to(tmp_path, target_is_directory=True)
    atv.save_pretrained(path)
    assert os.access(path / "run.sh", os.X_OK)
    assert ((path / "broken").readlink().name, (path / "data").readlink()) == ("nowhere", tmp_path)


def test_an_adapter_that_diverged_is_not_saved(tmp_path):
    atv = make_atv(dtype=torch.float32)
    with torch.no_grad():
        atv.expansion.map.weight[0, 0] = float("nan")
    with refused("not finite", "Lower the learning rate"):
        atv.save_pretrained(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("base_llm", {}),
        ("base_llm", {"name": 3}),
        ("training", {"tasks": 3}),
        ("training", {"tasks": {"toy": ["{input}"]}}),
        ("training", {"tasks": {"toy": toy_task().asking() | {"renderer": "atv.data.render.Template"}}}),
        ("training", {"tasks": {"toy": toy_task().asking() | {"templates": None}}}),
        ("training", {"tasks": {"toy": toy_task().asking() | {"templates": []}}}),
        ("training", {"tasks": {"toy": toy_task().asking() | {"templates": [None]}}}),
        ("training", {"tasks": {"toy": toy_task().asking() | {"answer_prefixes": []}}}),
        ("training", {"tasks": {"toy": toy_task().asking() | {"answer_prefixes": [{}]}}}),
        ("generator", None),
    ],
)
def test_a_configuration_with_parts_of_another_type_is_named(tmp_path, part, value):
    _, path = saved(tmp_path)
    written = json.loads((path / "atv_config.json").read_text())
    (path / "atv_config.json").write_text(json.dumps(written | {part: value}))
    with refused(f"{path / 'atv_config.json'} is damaged"):
        load(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_every_file_of_an_adapter_has_the_mode_of_a_new_file(tmp_path):
    _, path = saved(tmp_path)
    (tmp_path / "new").touch()
    modes = {file.name: file.stat().st_mode for file in path.rglob("*") if file.is_file()}
    assert set(modes.values()) == {(tmp_path / "new").stat().st_mode}
    assert {"model.safetensors", "expansion.safetensors"} <= modes.keys()


@pytest.mark.parametrize("name", ["/home/me/models/llama", "C:\\models\\llama", "models/llama"])
def test_a_model_card_names_no_local_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    atv = make_atv(dtype=torch.float32)
    atv.llm.name_or_path = atv.generator.name_or_path = name
    atv.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "models" not in card
    assert "base_model" not in card
    assert "base LLM | llama," in card
    assert "A generator (llama)" in card
    atv.llm.name_or_path = "me/llama"
    atv.save_pretrained(tmp_path / "adapter")
    assert "base_model: me/llama" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_missing_tokenizer_is_asked_for_by_the_name_of_the_argument():
    atv = make_atv()
    with refused("no name by which its tokenizer could be loaded", "tokenizer=..."):
        ATVModel(make_llm(), atv.config, generator=atv.generator)


# ---- what could not be read back ----


class Mine(Generator):
    """A generator of one's own."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask) * 2


class Scaled(torch.nn.Module):
    """An expansion in a module of one's own, with the very names of its weights."""

    def __init__(self, expansion):
        super().__init__()
        self.map, self.shape = expansion.map, expansion.shape

    def forward(self, state):
        return 3 * self.map(state).unflatten(-1, self.shape)


def own_generator(atv):
    atv.generator.__class__ = Mine


def own_encoder(atv):
    atv.generator.encoder.encoder.layer[0].output.dense = torch.nn.Sequential(torch.nn.Linear(48, 24))


def scaled_expansion(atv):
    atv.atv.expansion = Scaled(atv.expansion)


def parametrised(atv):
    torch.nn.utils.parametrizations.weight_norm(atv.expansion.map)


def attention_modules(atv):
    atv.layers = [layer.self_attn for layer in atv.layers]


def mlp_modules(atv):
    atv.layers[1] = atv.layers[1].mlp


def fewer_layers(atv):
    atv.layers = atv.layers[:2]


def another_pooling(atv):
    atv.generator.pooling = "last"


def another_template(atv):
    atv.generator.query_template = "About: {query}"


CHANGES = [own_generator, own_encoder, scaled_expansion, parametrised, attention_modules, mlp_modules, fewer_layers,
           another_pooling, another_template]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_could_not_be_read_back_is_neither_saved_nor_trained(tmp_path, change):
    atv = make_atv(dtype=torch.float32)
    change(atv)
    with refused("An adapter of this model would load as a different model", "state_dict()"):
        atv.save_pretrained(tmp_path / "adapter")
    with refused("An adapter of this model would load as a different model"):
        train(atv, [toy_task()], tmp_path / "out", TrainConfig(epochs=1))
    assert not list(tmp_path.iterdir())


def test_a_hook_that_changes_the_vectors_is_found_when_they_are_read_back(tmp_path):
    atv = make_atv(dtype=torch.float32)
    atv.save_pretrained(tmp_path / "adapter")
    before = (tmp_path / "adapter" / "atv_config.json").read_bytes()
    handle = atv.expansion.register_forward_hook(lambda *args: args[2] * 1.1)
    with refused("its vectors would differ (a hook"):
        atv.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "atv_config.json").read_bytes() == before
    handle.remove()
    atv.save_pretrained(tmp_path / "adapter")


def test_a_frozen_generator_that_was_given_ready_is_saved(tmp_path):
    atv, path = saved(tmp_path, train_generator=False)
    assert (path / "generator" / "model.safetensors").exists()
    assert torch.equal(load(path).task_vectors(QUERIES), atv.task_vectors(QUERIES))
    assert not any(p.requires_grad for p in load(path).generator.parameters())
