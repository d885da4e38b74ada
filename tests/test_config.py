"""Configurations: the paper's defaults, what is refused and how it is named, how positions and layers are read."""

import json
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusals import refused

from atv.config import ATVConfig, Positions, TrainConfig

THIRDS = ("bottom", "middle", "top")


def test_the_shape_of_the_paper():
    assert ATVConfig.paper().to_dict() == {
        "generator": "openai-community/gpt2",
        "generator_revision": None,
        "generator_layer": None,
        "pooling": "last",
        "train_generator": True,
        "reads": "query",
        "query_template": "Q: {query}\nA:",
        "expansion_rank": None,
        "layers": "all",
        "layer_path": None,
        "site": "layer",
        "edit": "add",
        "positions": "last",
        "parametrisation": "paper",
        "scale": 0.001,
        "gate": 0.0,
    }


def test_the_training_of_the_paper():
    assert TrainConfig.paper().to_dict() == {
        "epochs": 15,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.0005,
        "generator_learning_rate": 0.0005,
        "generator_start": 0.0,
        "lr_schedule": "constant",
        "optimizer": "adam",
        "weight_decay": 0.00001,
        "max_grad_norm": None,
        "adaptive_dropout": 0.0,
        "state_dropout": 0.0,
        "best_epoch": "loss",
        "patience": 15,
        "bf16": False,
        "templates_per_row": 3,
        "class_weights": "none",
        "seed": 42,
        "report_to": "none",
    }


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("pooling", "maen", ("pooling 'maen'", "cls, last, mean", "Did you mean 'mean'?")),
        ("pooling", None, ("pooling None", "cls, last, mean")),
        ("reads", "text", ("reads 'text'", "prompt, query")),
        ("parametrisation", "papers", ("parametrisation 'papers'", "Did you mean 'paper'?")),
        ("gate", 0.5, ("gate is 0.5", "a share from 0 to less than 0.5, such as 0.05")),
        ("gate", math.nan, ("gate is nan",)),
        ("positions", "first", ("positions 'first'", "all, answer, last, last:K", "as in last:4")),
        ("positions", 4, ("positions 4", "last:K")),
        ("layers", "botom", ("layer region 'botom'", "Did you mean 'bottom'?", "Or give indices, as in 0,1,2 or 0-9.")),
        ("layers", None, ("layers is None", "all, bottom, middle, top, or whole numbers from 0")),
        ("layers", ["0"], ("layers is ['0']", "whole numbers from 0, as in 0,1,2 or 0-9")),
        ("layers", [0, -1], ("layers is [0, -1]", "whole numbers from 0, as in 0,1,2 or 0-9")),
        ("layers", [1.5], ("layers is [1.5]", "whole numbers from 0, as in 0,1,2 or 0-9")),
        ("layers", [True], ("layers is [True]", "whole numbers from 0, as in 0,1,2 or 0-9")),
        ("layers", "9-0", ("layer region '9-0'", "as in 0,1,2 or 0-9")),
        ("layers", "1-2-3", ("layer region '1-2-3'", "as in 0,1,2 or 0-9")),
        ("layers", "0,,1", ("layer region '0,,1'", "as in 0,1,2 or 0-9")),
        ("layers", "²", ("layer region '²'", "as in 0,1,2 or 0-9")),
        ("layers", 3, ("layers is 3", "whole numbers from 0, as in 0,1,2 or 0-9")),
        ("scale", math.nan, ("scale is nan", "expected a finite number, such as 0.05")),
        ("scale", math.inf, ("scale is inf", "expected a finite number")),
        ("scale", "0.1", ("scale is '0.1'", "expected a finite number")),
        ("scale", True, ("scale is True", "expected a finite number")),
        ("scale", None, ("scale is None", "expected a finite number")),
        ("query_template", "Q: {input}", ("query template 'Q: {input}'", "no {query}", "put {query} where")),
        ("query_template", None, ("query template None", "put {query} where")),
        ("expansion_rank", 0, ("expansion_rank is 0", "a whole number from 1, or none")),
        ("expansion_rank", -3, ("expansion_rank is -3", "a whole number from 1, or none")),
        ("expansion_rank", 1.5, ("expansion_rank is 1.5", "a whole number from 1, or none")),
        ("expansion_rank", True, ("expansion_rank is True", "a whole number from 1, or none")),
        ("expansion_rank", "8", ("expansion_rank is '8'", "a whole number from 1, or none")),
    ],
)
def test_a_wrong_shape_is_refused_and_the_message_names_it(name, value, parts):
    with refused(*parts):
        ATVConfig(**{name: value})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "templates_per_row"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True])
def test_a_count_of_the_training_that_is_no_whole_number_from_one_is_refused(name, value):
    with refused(f"{name} is {value!r};", "expected a whole number from 1"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("value", [-1, 0.5, "42", None, 2**32])
def test_a_seed_that_is_no_whole_number_from_zero_is_refused(value):
    with refused(f"seed is {value!r};", "expected a whole number from 0"):
        TrainConfig(seed=value)


@pytest.mark.parametrize("name", ["learning_rate", "generator_learning_rate", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, "1e-3", True])
def test_a_rate_that_is_no_finite_number_from_zero_is_refused(name, value):
    with refused(f"{name} is {value!r};", "expected a finite number that is not negative"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_rate_that_training_cannot_do_without_is_refused_as_none(name):
    with refused(f"{name} is None;", "expected a finite number"):
        TrainConfig(**{name: None})


@pytest.mark.parametrize("name", ["adaptive_dropout", "state_dropout", "generator_start"])
@pytest.mark.parametrize("value", [-0.1, 1, math.nan, "0.3", None])
def test_a_share_that_is_none_is_refused(name, value):
    with refused(f"{name} is {value!r};", "a share from 0 to less than 1"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("rows", "least", "epochs"),
    [(10, 0, 100), (90, 3200, 71), (200, 0, 32), (450, 0, 14), (450, 16_000, 36), (1600, 0, 4), (100_000, 64_000, 4)],
)
def test_by_default_6400_rows_are_read_or_as_many_as_the_tasks_need(rows, least, epochs):
    assert TrainConfig().epochs_of(rows, least) == epochs
    assert TrainConfig(epochs=3).epochs_of(rows, least) == 3


@pytest.mark.parametrize("value", [0, 1, 0.0])
def test_zero_and_whole_numbers_are_rates(value):
    assert TrainConfig(learning_rate=value, weight_decay=value).learning_rate == value


@pytest.mark.parametrize(
    ("kind", "key", "parts"),
    [
        (ATVConfig, "poolings", ("option 'poolings'", "Did you mean 'pooling'?", "query_template")),
        (ATVConfig, "lambda", ("option 'lambda'", "known: edit, expansion_rank, gate, generator", "scale")),
        (
            TrainConfig,
            "lr",
            ("option 'lr'", "known: adaptive_dropout, batch_size, best_epoch, bf16, class_weights", "weight_decay"),
        ),
        (TrainConfig, "epoch", ("option 'epoch'", "Did you mean 'epochs'?")),
    ],
)
def test_a_dictionary_with_a_key_that_is_no_option_is_refused(kind, key, parts):
    with refused(*parts):
        kind.from_dict({key: 1})


def test_a_dictionary_is_checked_like_the_arguments_and_its_gaps_are_defaults():
    assert ATVConfig.from_dict({"scale": 0.5}) == ATVConfig(scale=0.5)
    with refused("scale is nan"):
        ATVConfig.from_dict({"scale": math.nan})


FINITE = st.floats(allow_nan=False, allow_infinity=False)
RATE = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
COUNT = st.integers(1, 10**6)


@settings(max_examples=40)
@given(
    st.builds(
        ATVConfig,
        generator=st.text(),
        generator_revision=st.none() | st.text(),
        pooling=st.sampled_from(["last", "mean", "cls"]),
        train_generator=st.booleans(),
        query_template=st.text().map(lambda text: text + "{query}"),
        expansion_rank=st.none() | COUNT,
        layers=st.sampled_from(["all", *THIRDS]) | st.lists(st.integers(0, 200)),
        layer_path=st.none() | st.text(),
        positions=st.sampled_from(["last", "all", "answer"]) | COUNT.map("last:{}".format),
        scale=FINITE | st.integers(-10, 10),
    )
    | st.builds(
        TrainConfig,
        epochs=COUNT,
        batch_size=COUNT,
        learning_rate=RATE,
        generator_learning_rate=st.none() | RATE,
        weight_decay=RATE,
        max_grad_norm=st.none() | RATE,
        templates_per_row=COUNT,
        seed=st.integers(0, 2**32 - 1),
    )
)
def test_a_configuration_comes_back_from_json_as_it_was(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "prompt_tokens", "answer"),
    [("last", 1, False), ("last:1", 1, False), ("last:40", 40, False), ("answer", 1, True), ("all", None, True)],
)
def test_positions_are_read_as_documented(name, prompt_tokens, answer):
    assert Positions.parse(name) == Positions(prompt_tokens=prompt_tokens, answer=answer)


@given(st.integers(1, 10**9))
def test_the_last_k_tokens_can_be_asked_for_with_any_k_from_one(count):
    assert Positions.parse(f"last:{count}") == (count, False)


def _is_positions(text: str) -> bool:
    head, colon, count = text.partition(":")
    if not colon:
        return head in ("last", "answer", "all")
    return head == "last" and count != "" and all("0" <= digit <= "9" for digit in count) and count[0] != "0"


@given(st.text("last:0123456789 -+\n٣", max_size=9) | st.text("0123456789 -+.e\n٣", max_size=5).map("last:{}".format))
@example("last:1٣")
@example("last:01")
@example("last:4\n")
def test_positions_that_are_none_of_the_four_forms_are_refused(text):
    if _is_positions(text):
        assert Positions.parse(text).prompt_tokens == (None if text == "all" else int(text.partition(":")[2] or 1))
    else:
        with refused(f"Unknown positions {text!r}", "all, answer, last, last:K", "K is a whole number from 1"):
            Positions.parse(text)


@given(st.integers(3, 300))
def test_the_thirds_hold_every_layer_exactly_once_and_are_equal_up_to_one(count):
    thirds = [ATVConfig(layers=region).layer_indices(count) for region in THIRDS]
    assert [*thirds[0], *thirds[1], *thirds[2]] == ATVConfig(layers="all").layer_indices(count) == list(range(count))
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 1


@pytest.mark.parametrize(
    ("count", "bottom", "middle", "top"),
    [(12, (0, 3), (4, 7), (8, 11)), (30, (0, 9), (10, 19), (20, 29)), (32, (0, 10), (11, 20), (21, 31))],
)
def test_the_thirds_of_common_depths_are_those_counted_by_hand(count, bottom, middle, top):
    for region, (first, last) in zip(THIRDS, (bottom, middle, top), strict=True):
        found = ATVConfig(layers=region).layer_indices(count)
        assert (found[0], found[-1]) == (first, last)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("all", "all"),
        ("top", "top"),
        ("7", [7]),
        ("0,2", [0, 2]),
        ("0, 2 ", [0, 2]),
        ("0-9", list(range(10))),
        ("0 - 3,7", [0, 1, 2, 3, 7]),
        (range(10), list(range(10))),
        (range(9, 0, -3), [9, 6, 3]),
        ((4, 2), [4, 2]),
        (np.arange(3), [0, 1, 2]),
    ],
)
def test_layers_are_read_as_a_region_or_indices_and_kept_as_json_has_them(given, kept):
    config = ATVConfig(layers=given)
    assert config.layers == kept
    assert json.loads(json.dumps(config.to_dict()))["layers"] == kept


@pytest.mark.parametrize(("region", "count"), [("bottom", 1), ("top", 1), ("middle", 2)])
def test_a_third_that_a_shallow_llm_does_not_have_is_refused(region, count):
    with refused(f"layers is {region!r}", f"layers 0 to {count - 1}", "name at least one of them"):
        ATVConfig(layers=region).layer_indices(count)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 40))
def test_a_list_of_layers_is_sorted_without_repeats_or_refused_if_one_is_not_there(layers, count):
    config = ATVConfig(layers=layers)
    if layers and all(index < count for index in layers):
        assert config.layer_indices(count) == [index for index in range(count) if index in layers]
    else:
        with refused(f"layers is {layers}", f"layers 0 to {count - 1}", "name at least one"):
            config.layer_indices(count)
