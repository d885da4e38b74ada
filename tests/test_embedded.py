"""Models inside packages: their parts are joined once and checked, and what is missing or damaged is said."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import make_llm
from refusals import refused
from rendering import encode_pair

import atv.lm.load as models
from atv.data.render import encode_text
from atv.lm.load import EMBEDDED, cache_folder, load_llm, load_tokenizer, resolve

GEMMA = "embedded:gemma3-270m"
TEXT = b"first second third"


class Loader:
    """Stands for transformers' loaders: what it loads is the joined file, what it saves is what it read."""

    loads = 0

    @classmethod
    def from_pretrained(cls, source, gguf_file, **options):
        cls.loads += 1
        made = cls()
        made.read = (Path(source) / gguf_file).read_bytes()
        return made

    def bfloat16(self):
        return self

    def save_pretrained(self, folder):
        (folder / "config.json").write_text(json.dumps(self.read.decode()))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Three packages that hold the three words of TEXT as Gemma's file; their folder."""
    parts = []
    for index, text in enumerate((b"first ", b"second ", b"third")):
        package = tmp_path / "site" / f"atv_test_part{index}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "words").write_bytes(text)
        parts.append((package.name, "words"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("ATV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        models._LLMS, GEMMA, models._Gguf(tuple(parts), hashlib.sha256(TEXT).hexdigest(), "kept", "pip it", "The terms")
    )
    monkeypatch.setattr(models, "AutoModelForCausalLM", Loader)
    monkeypatch.setattr(models, "AutoTokenizer", Loader)
    monkeypatch.setattr(Loader, "loads", 0)
    return tmp_path / "site"


def test_the_parts_are_joined_in_order_once_and_leave_nothing_else_behind(packages, tmp_path, capsys):
    folder = tmp_path / "cache" / "kept"
    assert resolve(GEMMA) == resolve(GEMMA) == str(folder)
    assert json.loads((folder / "config.json").read_text()).encode() == TEXT
    assert Loader.loads == 2  # the LLM and its tokenizer
    assert "The terms" in (folder / "NOTICE").read_text()
    assert capsys.readouterr().err.count("The terms") == 1
    assert {path.name for path in folder.parent.iterdir()} == {"kept", ".kept.lock"}


def test_a_damaged_or_missing_part_is_refused_and_nothing_is_kept(packages, tmp_path):
    part = packages / "atv_test_part1" / "words"
    part.write_bytes(b"sec0nd ")
    with refused(GEMMA, "SHA-256", hashlib.sha256(TEXT).hexdigest(), "Reinstall it: pip it"):
        resolve(GEMMA)
    part.unlink()
    with refused(GEMMA, part, "missing", "pip it"):
        resolve(GEMMA)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".kept.lock"}
    assert Loader.loads == 0


def test_what_is_not_installed_is_named_with_the_line_that_installs_it(packages, monkeypatch):
    found = models.find_spec
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "gguf" else found(name))
    with refused(GEMMA, "pip install gguf"):
        resolve(GEMMA)
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "atv_test_part2" else found(name))
    with refused(GEMMA, "the package atv-test-part2", "pip it"):
        resolve(GEMMA)


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_embedded_name_says_how_to_install_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ATV_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with refused(name, "not installed", "pip install"):
        resolve(name)
    with refused("Unknown embedded model", *EMBEDDED):
        resolve(f"{name}x")


@pytest.mark.skipif(
    not (cache_folder() / models._LLMS[GEMMA].folder).exists(), reason=f"{GEMMA} is not installed and converted"
)
def test_gemma_reads_and_writes_as_it_should():
    tokenizer, llm = load_tokenizer(GEMMA), load_llm(GEMMA, device="cpu")
    bos = tokenizer.bos_token_id
    assert encode_text(tokenizer, "The capital of France is") == [bos, 818, 5279, 529, 7001, 563]
    question = "Question: What colour is the sky on a clear day?\nAnswer:"
    prompt, answer = encode_pair(tokenizer, question, "Blue")
    assert (prompt[0], prompt.count(bos), tokenizer.decode(answer)) == (bos, 1, " Blue")
    for text in ("two  spaces\n\n\tand 12,345.67% of é漢😀", question):
        assert tokenizer.decode(encode_text(tokenizer, text), skip_special_tokens=True) == text
    english = torch.tensor([encode_text(tokenizer, "It was a bright cold day, and the clocks were striking twelve.")])
    with torch.no_grad():
        assert llm(torch.tensor([prompt])).logits[0, -1].argmax() == answer[0]
        assert llm(english, labels=english).loss < 4.5  # ln(262144) is 12.5


def test_an_llm_that_lacks_weights_is_refused(tmp_path):
    """transformers would draw them at random and say so in a log line."""
    llm = make_llm("gpt2", torch.float32)
    llm.transformer.save_pretrained(tmp_path / "without-head")  # the head is tied to the embeddings: nothing is missing
    assert load_llm(str(tmp_path / "without-head"), device="cpu").lm_head.weight.shape == (400, 32)
    llama = make_llm("llama", torch.float32)
    llama.save_pretrained(tmp_path / "whole")
    weights = llama.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    llama.save_pretrained(tmp_path / "part", state_dict=weights)
    load_llm(str(tmp_path / "whole"), device="cpu")
    with refused(tmp_path / "part", "lacks 1 weights of a LlamaForCausalLM", "model.layers.1.mlp.up_proj.weight"):
        load_llm(str(tmp_path / "part"), device="cpu")
