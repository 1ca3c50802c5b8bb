"""Transformer and Localformer estimators: what they have beyond the training loop that all share."""

from __future__ import annotations

import pytest
from test_estimator import SMALL, flat, rolling, same, weights

from qfast.errors import ConfigError
from qfast.models import LocalformerModel, TransformerModel, ts

KINDS = [TransformerModel, LocalformerModel, ts.TransformerModel, ts.LocalformerModel]
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__.split('.')[-1]}.{kind.__name__}")
SIZES = {name: value for name, value in SMALL.items() if name != "hidden_size"} | {"d_model": 8, "num_layers": 1}


def data(kind: type):
    return flat() if kind in KINDS[:2] else rolling()


@all_kinds
def test_get_params_rebuild_the_model(kind):
    model = kind(**SIZES, reg=0.01, dropout=0.1)
    again = kind(**model.get_params())
    assert again.get_params() == model.get_params()
    assert again.reg == 0.01
    assert same(weights(again), weights(model))
    assert again.model is again.network


@all_kinds
def test_the_decay_goes_into_the_optimiser_and_leaves_unused_weights_alone(kind):
    model = kind(**SIZES, reg=0.5)
    assert [group["weight_decay"] for group in model.train_optimizer.param_groups] == [0.5]
    before = weights(model)
    model.fit(data(kind))
    after = weights(model)
    unused = [key for key in before if key.startswith(("encoder_layer.", "pos_encoder."))]
    assert len(unused) == 13
    assert all(before[key].equal(after[key]) for key in unused)
    assert not before["decoder_layer.weight"].equal(after["decoder_layer.weight"])
    assert not same(after, weights(kind(**SIZES, reg=0.0).fit(data(kind))))


@all_kinds
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 7}, "d_model must be even.* got 7"),
        ({"nhead": 3}, r"nhead must divide d_model=64, got 3\. Remedy: one of"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout must lie in \[0, 1\], got 1.5"),
        ({"reg": -1}, "reg must be a number of at least 0, got -1"),
        ({"weight_decay": 0.1}, "has no argument 'weight_decay': its name here is 'reg'"),
        ({"hidden_size": 8}, "has no argument 'hidden_size'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(kind, arguments, message):
    with pytest.raises(ConfigError, match=message):
        kind(**arguments)
