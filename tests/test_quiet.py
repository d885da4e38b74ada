"""Loading a model says nothing of other libraries, and leaves a user's logging as it was."""

import logging
from contextlib import contextmanager

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_llm
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from atv.lm.load import load_encoder, load_llm, load_tokenizer
from atv.lm.quiet import quiet_libraries


@pytest.fixture
def loud():
    """Transformers as a user finds it."""
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.NOTSET)
    yield
    bitsandbytes.setLevel(level)
    transformers_logging.set_verbosity(before[0])
    if not before[1]:
        transformers_logging.disable_progress_bar()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_llm(dtype=torch.float32).save_pretrained(folder / "llm")
    byte_level_tokenizer().save_pretrained(folder / "llm")
    make_atv().generator.save(folder / "generator")  # without its pooler, which is not read
    return folder


def state():
    transformers = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    return *transformers, are_progress_bars_disabled(), logging.getLogger("bitsandbytes").level


@contextmanager
def told_by(name):
    """The records that a logger's handlers are given."""
    told = []
    handler = logging.Handler()
    handler.emit = told.append
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def test_loading_is_silent_and_leaves_the_users_logging_as_it_was(loud, world, capfd):
    before = state()
    with told_by("transformers") as told:
        AutoModelForCausalLM.from_pretrained(world / "llm")
        AutoModel.from_pretrained(world / "generator")
        assert "Loading weights" in capfd.readouterr().err
        assert "newly initialized" in told.pop().getMessage()
        load_llm(str(world / "llm"))
        load_tokenizer(str(world / "llm"))
        load_encoder(str(world / "generator"))
        assert told == []
    assert "".join(capfd.readouterr()) == ""
    assert state() == before


def test_a_user_who_silenced_transformers_finds_it_silent_after_an_error_too(loud):
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    before = state()
    with pytest.raises(RuntimeError), quiet_libraries():
        raise RuntimeError
    assert state() == before


def test_an_import_of_bitsandbytes_tells_of_no_missing_kernel(loud):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with told_by(logger.name) as told:
        with quiet_libraries():
            logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community")
            logger.error("something that matters")
        logger.warning("what the user does is no concern of ours")
    assert [record.levelname for record in told] == ["ERROR", "WARNING"]
