"""Forms of workflow files and arguments that users write: default(...), unquoted codes, {}, folders, sys paths."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pandas as pd
import pytest

from qfast.data import Alpha158, Alpha360, DataHandlerLP, FactorHandler, load_prices, synthetic
from qfast.errors import ConfigError
from qfast.integrations.qlib import _extend_module_path
from qfast.models.ts import LSTM
from qfast.workflow.config import load_config
from qfast.workflow.validation import _argument_types, check_workflow
from support.frames import rolling
from support.workflows import write_case

HANDLER = "task.dataset.kwargs.handler.kwargs"


def test_variables_with_a_default_are_not_missing(tmp_path, monkeypatch, caplog):
    file = tmp_path / "a.yaml"
    file.write_text(
        "one: {{ ONE_X | default('1', true) }}\ntwo: {{ TWO_X | d(2) }}\nthree: {{ THREE_X | default(3) }}"
        "\nalso: '{{ THREE_X }}'\nfour: '{{ FOUR_X }}'"
    )
    for name in ("ONE_X", "THREE_X", "FOUR_X"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TWO_X", "22")
    with caplog.at_level(logging.WARNING, "qfast"):
        values = load_config(file).values
    assert values == {"one": 1, "two": 22, "three": 3, "also": "", "four": ""}
    assert "['FOUR_X', 'THREE_X'] are not set" in caplog.text


def test_unquoted_codes(tmp_path):
    config, _ = write_case(tmp_path)
    with pytest.raises(ConfigError, match=r"handler\.kwargs.*unquoted code as the int 1\. Quote the codes.*'000001'"):
        check_workflow(load_config(config, [f"{HANDLER}.instruments=[000001, 600519]"]).values)
    quoted = check_workflow(load_config(config, [f"{HANDLER}.instruments=['000001', '600519']"]).values)
    assert quoted.task.dataset.kwargs.handler.description()["kwargs"]["instruments"] == ["000001", "600519"]


@pytest.mark.parametrize("kind", [Alpha158, Alpha360, DataHandlerLP, FactorHandler])
def test_plain_arguments_of_handlers_are_checked(kind):
    checks = _argument_types(kind)
    assert checks["drop_raw"].validate_python("no") is False
    assert {"drop_raw", "process_type", "vwap"} <= set(checks)


def test_an_empty_mapping_of_processors(tmp_path):
    config, _ = write_case(tmp_path)
    workflow = check_workflow(load_config(config, [f"{HANDLER}.infer_processors={{}}"]).values)
    assert workflow.task.dataset.kwargs.handler.kwargs.infer_processors == []


def test_a_save_path_that_is_a_folder_fails_before_training(tmp_path):
    model = LSTM(d_feat=3, hidden_size=4, n_epochs=1, seed=0)
    with pytest.raises(ConfigError, match=r"save_path .* is a folder"):
        model.fit(rolling(), save_path=tmp_path)
    assert not model.fitted
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"save_path: the folder .* cannot be created"):
        model.fit(rolling(), save_path=tmp_path / "file" / "best")


def test_index_levels_that_are_also_columns():
    prices = synthetic.prices(3, 20)
    repeated = prices.reset_index().set_index(["datetime", "instrument"], drop=False)
    pd.testing.assert_frame_equal(load_prices(repeated).to_frame(), load_prices(prices).to_frame())


def test_the_module_path_of_a_workflow(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", ["first"])
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "configs" / "a.yaml"
    _extend_module_path(None, config)
    assert sys.path == ["first"]
    _extend_module_path({"path": "code", "rel_path": ["more", "more"]}, config)
    assert sys.path == ["first", str(tmp_path / "code"), str(tmp_path / "configs" / "more")]
    with pytest.raises(ConfigError, match="sys must be a mapping with path and rel_path"):
        _extend_module_path({"paths": "x"}, Path("a.yaml"))
