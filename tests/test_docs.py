"""The documentation: every block of it runs or is accepted, every link leads somewhere, nothing in it is stale."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import GROUPED, SIZES, byte_level_tokenizer
from documents import COMMANDS, ROOT, blocks, pages, run_page, wrong_links, wrong_mentions
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, Qwen2Config, set_seed

from atv import __all__ as public
from atv import doctor
from atv.config import ATVConfig, TrainConfig
from atv.data import builtin_task
from atv.evaluation.measure import measure
from atv.generator import Generator
from atv.methods import METHODS
from atv.model import ATVModel
from atv.training.loop import train

LLM, GENERATOR = "embedded:smollm2-135m", "embedded:minilm-l6"
FOLLOWED = ("README.md", "docs/index.md", "docs/quickstart.md", "docs/add-a-task.md", "docs/add-an-llm.md")
"""Pages whose commands a reader types one after the other: those that are cheap are run. Of other pages, which record
what was run on data that is not here, the options are read. Python is run on every page."""
MARKED_AS_NOT_RUN = 6
SOFT = {"max_position_embeddings": 2048, "initializer_range": 0.05}
"""Room for real prompts; and what is right is tested elsewhere, so rounding may be small."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny random models under the names that the pages use, an adapter as the demo leaves it, and no other file."""
    folder = tmp_path_factory.mktemp("world")
    for name, config in (("llm", LlamaConfig(**GROUPED | SOFT)), ("Qwen/Qwen2.5-0.5B", Qwen2Config(**GROUPED | SOFT))):
        set_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        byte_level_tokenizer().save_pretrained(folder / name)
    sizes = {key: SIZES[key] for key in SIZES if key not in ("hidden_size", "bos_token_id", "eos_token_id")}
    encoder = BertModel(BertConfig(**sizes | SOFT, hidden_size=24))
    for name in ("generator", "openai-community/gpt2"):
        Generator(encoder, byte_level_tokenizer(), "mean", "{query}").save(folder / name)
    return folder


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """The current folder of a page: what `make demo` leaves, and the models where their names lead."""
    for part in ("Qwen", "openai-community"):
        (tmp_path / part).symlink_to(world / part)
    monkeypatch.chdir(tmp_path)
    embedded = {LLM: str(world / "llm"), GENERATOR: str(world / "generator")}
    monkeypatch.setattr("atv.lm.load.resolve", lambda name: embedded.get(name, name))
    monkeypatch.setattr("atv.data.folder.builtin_task", lambda name: builtin_task(name).drawn(6, 2, 42, test=4))
    monkeypatch.setattr("atv.training.loop.train", one_epoch)
    monkeypatch.setattr("os.fsync", lambda file: None)  # nobody pulls the plug here, and disks take their time
    before = set(METHODS)  # a page may add one, for itself
    atv = ATVModel(
        AutoModelForCausalLM.from_pretrained(world / "llm", dtype=torch.float32),
        ATVConfig(generator=GENERATOR, parametrisation="paper", scale=0.1),
        generator=None,
    )
    atv.training_summary = {"tasks": {"sentiment": builtin_task("sentiment").asking()}}
    atv.save_pretrained("runs/demo/train/adapter")
    yield tmp_path
    for name in set(METHODS) - before:
        del METHODS[name]
    measure.__globals__["_load"].cache_clear()


def one_epoch(model, tasks, out, config=None, *more):
    """`train`, but for its length: more epochs take longer and show nothing more of an example."""
    return train(model, tasks, out, replace(config or TrainConfig(), epochs=1), *more)


def read(path):
    return path.read_text(encoding="utf-8")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [path for path in pages() if blocks(path.name, read(path))], ids=name_of)
def test_every_block_of_a_page_runs_or_is_accepted(path, place, monkeypatch, capsys):
    if path.name == "README.md":  # which shows the first lines of a table
        rows = [f"ticket {number},{('billing', 'bug')[number % 2]}" for number in range(20)]
        Path("tickets.csv").write_text("\n".join(["body,team", *rows]))
    if path.name == "any-job.md":  # which uses what it trains on files that are not here
        atv = ATVModel.from_pretrained("runs/demo/train", LLM)
        asked = builtin_task("sentiment").asking() | {"options": ["billing", "bug"]}
        atv.training_summary = {"tasks": {"tickets": asked}}
        for name in ("tickets", "chat"):
            atv.save_pretrained(f"runs/{name}/adapter")
    run_page(blocks(name_of(path), read(path)), name_of(path) in FOLLOWED, monkeypatch)


def test_blocks_that_are_not_run_are_counted():
    assert sum(not block.run for path in pages() for block in blocks(path.name, read(path))) == MARKED_AS_NOT_RUN


@pytest.mark.parametrize("path", pages(), ids=name_of)
def test_links_lead_somewhere_and_names_are_those_of_the_code(path):
    assert wrong_links(path, read(path)) == []
    assert wrong_mentions(name_of(path), read(path)) == []


BROKEN = {
    "a name that is not there": "```python\nfrom atv import ATVModle\n```",
    "names of one page alone": "```python\nassert tokenizer\n```",
    "an assertion": "```python\nassert 1 == 2\n```",
    "no language": "```\natv tasks\n```",
    "never closed": "```sh\natv tasks",
    "an unknown option": "```sh\natv train --sale 0.1\n```",
    "an option without its value": "```sh\natv train --scale\n```",
    "a value of another kind": "```sh\natv train --epochs few\n```",
    "an unknown command": "```sh\natv trian\n```",
    "an unknown method": "```sh\natv eval --method lore\n```",
    "an unknown profile": "```sh\natv paper reproduce --profile large\n```",
    "a command that fails": "```sh\natv tasks --data nowhere\n```",
    "behind a pipe": "```sh\necho text | atv train --sale 1\n```",
    "behind a launcher": "```sh\ntorchrun --nproc-per-node 2 -m atv train --sale 1\n```",
    "an unknown target": "```sh\nmake dmeo\n```",
    "an unknown extra": '```sh\npip install -e ".[plots]"\n```',
    "an unknown benchmark": "```sh\npython -m benchmarks.speed\n```",
    "an unknown option of a benchmark": "```sh\npython -m benchmarks.training --round 2\n```",
    "another command": "```sh\ncurl -O file\n```",
    "broken JSON": "```json\n{,}\n```",
    "data that is refused": '```json title="data/toy.json"\n{"train": []}\n```',
    "broken TOML": "```toml\n[train\n```",
    "broken YAML": "```yaml\ntask: [\n```",
    "an unknown option in a file": '```toml title="run.toml"\n[train]\nsale = 1\n```',
    "an unknown setting": '```toml title="settings.toml"\n[atv]\nsale = 1\n```',
}


@pytest.mark.parametrize("markdown", BROKEN.values(), ids=BROKEN)
def test_a_broken_example_is_found(markdown, place, monkeypatch):
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the block raises is a failing test
        run_page(blocks("page.md", markdown), True, monkeypatch)


def test_a_broken_mention_or_link_is_found():
    said = (
        "`atv train --sale 1`, `atv trian`, `make dmeo`, `test_docs.py::test_nothing`; `atv train --scale 1` is right"
    )
    assert len(wrong_mentions("page.md", said)) == 4
    here = ROOT / "docs" / "index.md"
    linked = "[a](nowhere.md) [b](concepts.md#nowhere) [c](concepts.md#words) [d](https://example.org)"
    assert [wrong.partition(": ")[2] for wrong in wrong_links(here, linked)] == ["nowhere.md", "concepts.md#nowhere"]


def test_a_block_that_is_marked_is_not_run(place, monkeypatch):
    marked = blocks("page.md", "<!-- not run: it needs a GPU -->\n```python\nassert False\n```")
    assert [block.run for block in marked] == [False]
    run_page(marked, True, monkeypatch)


def test_the_navigation_holds_every_page_once():
    def leaves(part):
        return [part] if isinstance(part, str) else [leaf for each in part for leaf in leaves(_values(each))]

    def _values(part):
        return list(part.values()) if isinstance(part, dict) else part

    nav = leaves(yaml.safe_load(read(ROOT / "mkdocs.yml"))["nav"])
    assert sorted(nav) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_command_line_is_that_of_the_commands(build):
    page = read(build.PAGE)
    assert page == build.command_line_page(), "docs/command-line.md is stale; write it with: python docs/build.py"
    for name, command in COMMANDS.items():
        section = page.partition(f"\n## atv {name}\n")[2].partition("\n## ")[0]
        assert {
            flag
            for p in command.params
            if p.name != "help"
            for flag in (*p.opts, *p.secondary_opts)
            if flag[:2] == "--"
        } == set(re.findall(r"(?:^\| `|, )(--[\w-]+)(?=[`, ])", section, re.M))


def test_only_what_a_browser_fetches_from_elsewhere_is_foreign(build):
    foreign = [
        '<script src="https://a.org/x.js"></script>',
        "<link rel=stylesheet href=//b.org/x.css>",
        '<img alt="" src="http://c.org/x.png">',
    ]
    own = ['<a href="https://a.org">', '<script src="../assets/x.js"></script>', '<img src="images/idea.svg">']
    assert build.foreign_assets("\n".join(foreign + own)) == [
        "https://a.org/x.js",
        "//b.org/x.css",
        "http://c.org/x.png",
    ]


def test_links_to_source_files_become_pages_of_the_site(build):
    assert build._linked("performance.md", "[a](../benchmarks/reference.py)") == ["benchmarks/reference.py"]
    assert build._linked("results/small.md", "[a](../../benchmarks/reference.py), [b](../build.py)") == [
        "benchmarks/reference.py"
    ]


def test_a_notebook_becomes_a_page_of_its_text_and_code(build):
    assert build._linked("look-inside.md", "[a](../examples/quickstart.ipynb)") == ["examples/quickstart.ipynb"]
    page = build.source_page("examples/quickstart.ipynb")
    assert page.startswith("# Quickstart\n")
    assert "````python\nimport matplotlib.pyplot as plt\n" in page
    assert "](look_inside.ipynb.md)" in page
    assert page.count("````") % 2 == 0


def test_the_reference_names_what_is_there_and_all_that_is_public():
    names = [
        name for path in (ROOT / "docs" / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", read(path), re.M)
    ]
    for name in names:
        module, found = name.split("."), None
        while module and found is None:
            found = importlib.util.find_spec(".".join(module)) if _is_module(module) else module.pop() and None
        if module[1] == "integrations" and importlib.util.find_spec(module[2]) is None:  # of an extra
            (kind,) = name.split(".")[len(module) :]
            assert f"class {kind}(" in read(ROOT.joinpath("src", *module).with_suffix(".py"))
            continue
        here = importlib.import_module(".".join(module))
        for part in name.split(".")[len(module) :]:
            here = getattr(here, part)
        assert here.__doc__, f"{name} has no docstring"
    assert set(public) <= {name.split(".")[-1] for name in names}


def _is_module(parts):
    file = ROOT.joinpath("src", *parts)
    return file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()


def test_what_the_self_test_says_is_what_the_pages_show():
    known = {name for name, _ in doctor.CHECKS}
    shown = [name for path in pages() for name in re.findall(r"^ok     (.+?)  \(", read(path), re.M)]
    assert shown
    assert set(shown) <= known


def test_the_drawing_says_in_words_what_it_shows():
    drawing = read(ROOT / "docs" / "images" / "idea.svg")
    assert "<title" in drawing
    assert "<desc" in drawing
    assert "prefers-color-scheme: dark" in drawing
    for path in pages():
        for alt in re.findall(r"!\[(.*?)\]\(", read(path), re.DOTALL):
            assert alt.strip(), f"{path.name}: a picture without words"
