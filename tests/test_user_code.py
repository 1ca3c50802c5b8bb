"""Classes of the user: imported only with permission, recorded in the run folder, required again by later commands."""

from __future__ import annotations

import json
import logging
import sys

import pandas as pd
import pytest

from qfast import check, load, predict, run
from qfast.cli import main
from qfast.data import DataHandlerLP, synthetic
from qfast.errors import ConfigError
from qfast.registry import HANDLERS, MODELS, PROCESSORS
from qfast.workflow.user_code import allowed_code
from qfast.workflow.validation import register_all
from support.workflows import write_case

HANDLER_TEXT = """
from qfast.data import Alpha158


class Momentum(Alpha158):
    def __init__(self, scale=1.0, **kwargs):
        self.scale = scale
        super().__init__(**kwargs)

    def get_feature_config(self):
        return ["$close / Ref($close, 5) - 1", "$close / $open - 1"], ["MOM5", "DAY"]


class Plain:
    pass
"""
PROCESSOR_TEXT = """
import numpy as np
from qfast.data.processors import Processor


class Halve(Processor):
    def __init__(self, fields_group="feature"):
        self.fields_group = fields_group

    def _apply(self, panel, space):
        return panel.replace(self.fields_group, panel.values(self.fields_group) * np.float32(0.5))
"""
WORKFLOW = """
experiment_name: own
task:
  model:
    class: GRU
    module_path: qlib.contrib.model.pytorch_gru_ts
    kwargs: {d_feat: 2, hidden_size: 4, num_layers: 1, n_epochs: 2, batch_size: 32, seed: 1, GPU: -1}
  dataset:
    class: TSDatasetH
    kwargs:
      handler:
        class: Momentum
        module_path: my_code.handlers
        kwargs:
          scale: 2.0
          infer_processors:
            - {class: Halve, module_path: my_code.steps}
            - {class: Fillna, kwargs: {fields_group: feature}}
          learn_processors: [DropnaLabel]
      segments: {train: [2020-01-01, 2020-02-15], valid: [2020-02-16, 2020-03-10], test: [2020-03-11, 2020-04-30]}
      step_len: 3
  record: []
"""


@pytest.fixture
def own(tmp_path):
    """A workflow that names classes of a package, the package, and prices."""
    package = tmp_path / "my_code"
    package.mkdir()
    (package / "handlers.py").write_text(HANDLER_TEXT)
    (package / "steps.py").write_text(PROCESSOR_TEXT)
    config = tmp_path / "own.yaml"
    config.write_text(WORKFLOW)
    return config, package, synthetic.prices(4, 100, start="2020-01-01", freq="D")


def test_nothing_is_imported_without_permission(own):
    config, _, prices = own
    with pytest.raises(ConfigError, match=r"unknown handler class 'Momentum'.*--allow-code"):
        run(config, prices)
    with pytest.raises(ConfigError, match="--allow-code"):
        check(config, prices)
    assert not [name for name in sys.modules if name.startswith("my_code")]


def test_permission_ends_with_the_block(own):
    _, package, _ = own
    register_all()
    spec = {"class": "Momentum", "module_path": "handlers"}
    with allowed_code(package):
        assert issubclass(HANDLERS.resolve(spec)[0], DataHandlerLP)
    with pytest.raises(ConfigError, match="unknown handler class"):
        HANDLERS.resolve(spec)


def test_a_run_with_own_classes_resumes_and_predicts(own, tmp_path, capsys, caplog):
    config, package, prices = own
    assert check(config, prices, allow_code=package).ok
    result = run(config, prices, output=tmp_path / "run", allow_code=[package])
    assert type(result.dataset.handler).__name__ == "Momentum"
    assert result.dataset.handler.scale == 2.0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (recorded,) = manifest["code"]
    assert recorded["path"] == str(package)
    assert sorted(recorded["files"]) == ["handlers.py", "steps.py"]
    with pytest.raises(ConfigError, match=rf"uses classes from '{package}'.*--allow-code {package}"):
        predict(tmp_path / "run", prices)
    with pytest.raises(ConfigError, match="only with permission"):
        run(resume=tmp_path / "run", data=prices)
    scores = predict(tmp_path / "run", prices, start="2020-03-11", allow_code=package)
    expected = result.model.predict(result.dataset, "test").rename("score").sort_index()
    assert scores.reindex(expected.index).equals(expected)
    assert main(["info", str(tmp_path / "run")]) == 0
    assert f"predict and resume need --allow-code {package}" in capsys.readouterr().out
    (package / "steps.py").write_text(PROCESSOR_TEXT.replace("0.5", "0.25"))
    with caplog.at_level(logging.WARNING, "qfast"):
        changed = predict(tmp_path / "run", prices, start="2020-03-11", allow_code=package)
    assert "steps.py of the run" in caplog.text
    assert "has changed since the run" in caplog.text
    assert not changed.equals(scores)  # the edited file is imported again


def test_a_single_file_and_a_path_as_module(own):
    _, package, _ = own
    register_all()
    for spec in (
        {"class": "Momentum"},
        {"class": "Momentum", "module_path": "project.handlers"},
        {"class": "Momentum", "module_path": "my_code/handlers.py"},
    ):
        with allowed_code(package / "handlers.py"):
            assert HANDLERS.resolve(spec)[0].__name__ == "Momentum"
        with allowed_code(package / "handlers.py"), pytest.raises(ConfigError):
            PROCESSORS.resolve({"class": "Halve", "module_path": "steps"})
    with allowed_code(package):
        assert HANDLERS.resolve({"class": "Momentum", "module_path": "my_code/handlers.py"})[0].__name__ == "Momentum"


@pytest.mark.parametrize("module", ["../outside.py", "os", "outside", "..outside"])
def test_modules_outside_the_path_are_not_imported(own, module):
    _, package, _ = own
    (package.parent / "outside.py").write_text("raise SystemExit('imported')")
    register_all()
    with allowed_code(package), pytest.raises(ConfigError, match="unknown handler class 'X'"):
        HANDLERS.resolve({"class": "X", "module_path": module})


def test_registered_classes_take_precedence(own):
    _, package, _ = own
    (package / "handlers.py").write_text(
        "from qfast.data import Alpha158 as Base\nclass Alpha158(Base):\n    own = 1\n"
    )
    register_all()
    with allowed_code(package):
        assert not hasattr(HANDLERS.resolve({"class": "Alpha158"})[0], "own")
        assert hasattr(HANDLERS.resolve({"class": "Alpha158", "module_path": "handlers"})[0], "own")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Other:\n    pass", r"has no class 'Mine', only \['Other'\]"),
        ("class Mine:\n    pass", r"Mine must be derived from DataHandlerLP to be used as a handler"),
        ("Mine = 3", r"Mine must be a class to be used as a handler, got 3"),
        ("x = 1\nraise KeyError('x')", r"mine\.py, line 2: KeyError"),
        ("def f(:", r"mine\.py, line 1: SyntaxError"),
        ("from qlib.nothing import x", r"import the base class from qfast\.data"),
    ],
)
def test_errors_name_the_file(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    register_all()
    with allowed_code(tmp_path), pytest.raises(ConfigError, match=message):
        HANDLERS.resolve({"class": "Mine", "module_path": "mine"})


def test_module_names_that_are_taken(tmp_path):
    (tmp_path / "json.py").write_text("")
    register_all()
    with allowed_code(tmp_path), pytest.raises(ConfigError, match=r"module name 'json'.*already belongs to"):
        MODELS.resolve({"class": "Mine", "module_path": "json"})


def test_two_folders_with_the_same_module_name(tmp_path):
    register_all()
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.py").write_text(
            f"from qfast.data import Alpha158\nclass Mine(Alpha158):\n    name = {name!r}\n"
        )
        with allowed_code(folder):
            assert HANDLERS.resolve({"class": "Mine", "module_path": "mine"})[0].name == name


def test_packages_with_relative_imports(tmp_path):
    package = tmp_path / "alphas"
    package.mkdir()
    (package / "__init__.py").write_text("from .a import Mine")
    (package / "a.py").write_text("from .b import Base\nclass Mine(Base):\n    pass\n")
    (package / "b.py").write_text("from qfast.data import Alpha158 as Base\n")
    register_all()
    with allowed_code(package):
        for module in ("a", "alphas.a", "alphas", "alphas/a.py"):
            assert HANDLERS.resolve({"class": "Mine", "module_path": module})[0].__name__ == "Mine"


@pytest.mark.parametrize("name", ["missing", "data.csv"])
def test_paths_that_are_not_code(tmp_path, name):
    (tmp_path / "data.csv").write_text("")
    with pytest.raises(ConfigError, match=r"does not exist|must be a Python file"), allowed_code(tmp_path / name):
        pass


def test_the_command_line(own, tmp_path, capsys):
    config, package, prices = own
    prices.reset_index().to_csv(tmp_path / "prices.csv", index=False)
    data = ["--data", str(tmp_path / "prices.csv")]
    output = ["--output", str(tmp_path / "run")]
    assert main(["run", str(config), *data, *output]) == 2
    assert "--allow-code" in capsys.readouterr().err
    assert main(["run", str(config), *data, *output, "--allow-code", str(package), "-q"]) == 0
    assert main(["predict", str(tmp_path / "run"), *data]) == 2
    assert main(["predict", str(tmp_path / "run"), *data, "--allow-code", str(package)]) == 0


QLIB_STYLE = """
from qfast.data.handlers import DataHandlerLP, check_transform_proc


class MyAlpha(DataHandlerLP):
    def __init__(self, instruments="csi500", start_time=None, end_time=None, freq="day", infer_processors=[],
                 learn_processors=[], fit_start_time=None, fit_end_time=None, filter_pipe=None, inst_processors=None,
                 **kwargs):
        infer_processors = check_transform_proc(infer_processors, fit_start_time, fit_end_time)
        learn_processors = check_transform_proc(learn_processors, fit_start_time, fit_end_time)
        data_loader = {
            "class": "QlibDataLoader",
            "kwargs": {
                "config": {"feature": self.get_feature_config(), "label": kwargs.pop("label", self.get_label_config())},
                "filter_pipe": filter_pipe,
                "freq": freq,
                "inst_processors": inst_processors,
            },
        }
        super().__init__(instruments=instruments, start_time=start_time, end_time=end_time, data_loader=data_loader,
                         infer_processors=infer_processors, learn_processors=learn_processors, **kwargs)

    def get_label_config(self):
        return ["Ref($close, -2)/Ref($close, -1) - 1"], ["LABEL0"]

    def get_feature_config(self):
        return ["$close / Ref($close, 5) - 1", "$close / $open - 1"], ["MOM5", "DAY"]
"""


def test_a_handler_in_the_style_of_qlib(own, tmp_path):
    config, package, prices = own
    (package / "handlers.py").write_text(QLIB_STYLE)
    fit = "fit_start_time: 2020-01-01, fit_end_time: 2020-02-15"
    norm = "{class: RobustZScoreNorm, kwargs: {fields_group: feature}}"
    text = WORKFLOW.replace("Momentum", "MyAlpha").replace("scale: 2.0", fit.replace(", ", "\n          "))
    config.write_text(text.replace("{class: Halve, module_path: my_code.steps}", norm))
    assert check(config, prices, allow_code=package).ok
    result = run(config, prices, output=tmp_path / "run", allow_code=package)
    assert result.dataset.handler.get_cols("feature") == ["MOM5", "DAY"]
    scores = predict(tmp_path / "run", prices, start="2020-03-11", allow_code=package)
    expected = result.model.predict(result.dataset, "test").rename("score").sort_index()
    assert scores.reindex(expected.index).equals(expected)


def test_runs_without_own_classes_need_no_permission(tmp_path):
    config, data = write_case(tmp_path)
    run(config, data, output=tmp_path / "run", sets=["task.model.kwargs.n_epochs=1"])
    assert "code" not in json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert len(predict(tmp_path / "run", data, start="2020-02-21"))


MODEL_TEXT = """
from qfast.models import LSTM


class Wide(LSTM):
    def __init__(self, factor=2, hidden_size=4, **kwargs):
        super().__init__(hidden_size=factor * hidden_size, **kwargs)
        self.factor = factor
        self._params = {**self._params, "factor": factor, "hidden_size": hidden_size}
"""


def test_a_model_of_the_user_is_loaded_resumed_and_scored_with_permission_only(tmp_path):
    config, data = write_case(tmp_path)
    (tmp_path / "wide.py").write_text(MODEL_TEXT)
    text = config.read_text().replace("class: LSTM", "class: Wide")
    config.write_text(text.replace("module_path: qlib.contrib.model.pytorch_lstm\n", "module_path: wide\n"))
    code = tmp_path / "wide.py"
    sets = ["task.model.kwargs.n_epochs=1"]
    path = run(config, data, sets, output=tmp_path / "run", seed=0, allow_code=code).path
    saved = load(path, allow_code=code)
    assert type(saved.model).__name__ == "Wide"
    assert saved.model.network.rnn.hidden_size == 8
    pd.testing.assert_series_equal(saved.predict(date="latest"), predict(path, date="latest", allow_code=code))
    assert len(run(resume=path, sets=["task.model.kwargs.n_epochs=2"], allow_code=code).model.history_) == 2
    for refused in (lambda: load(path), lambda: predict(path), lambda: run(resume=path)):
        with pytest.raises(ConfigError, match=r"imports code only with permission.*--allow-code .*wide\.py"):
            refused()
