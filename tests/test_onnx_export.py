"""qfast export --onnx: the scores of ONNX Runtime, the embedded specification, and errors."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch

import qfast
from qfast import cli
from qfast.errors import ConfigError
from qfast.workflow import onnx_export
from support.workflows import write_case

MODELS = {
    "LSTM": {},
    "GATs": {"batch_size": None},
    "TCN": {"hidden_size": None, "n_chans": 4, "num_layers": 1, "kernel_size": 2},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("onnx"))


def trained(case, folder, name: str):
    config, data = case
    text = config.read_text().replace("LSTM", name).replace("pytorch_lstm", f"pytorch_{name.lower()}")
    own = {"hidden_size": 4, "num_layers": 1, "batch_size": 64, **MODELS[name]}
    kept = ", ".join(f"{key}: {value}" for key, value in own.items() if value is not None)
    text = text.replace("hidden_size: 4, num_layers: 1, n_epochs: 3, batch_size: 64", f"{kept}, n_epochs: 1")
    (folder / "workflow.yaml").write_text(text)
    return qfast.run(folder / "workflow.yaml", data, output=folder / "run", seed=0).path


@pytest.mark.parametrize("name", MODELS)
def test_scores_of_onnx_runtime(case, tmp_path, name: str) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    run = trained(case, tmp_path, name)
    file = tmp_path / "files" / "model.onnx"
    assert cli.main(["export", str(run), "--onnx", str(file)]) == 0
    saved = qfast.load(run, device="cpu")
    dataset = saved.dataset(start="2020-02-21")
    windows = dataset.windows("new", "infer", with_label=False)
    days = windows.days
    day = torch.arange(len(windows)) if name != "GATs" else days.order[: int(days.bounds[1])]
    batch = windows.batch(day)
    session = runtime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    scores = session.run(None, {"windows": batch.numpy()})[0]
    expected = saved.model.predict(dataset, "new").to_numpy()[day.numpy()]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    properties = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    specification = json.loads(properties["qfast"])
    assert specification["columns"] == list(windows.columns)
    assert specification["model"]["class"] == name
    assert [processor["class"] for processor in specification["processors"]["infer"]] == ["RobustZScoreNorm", "Fillna"]


def test_a_missing_extra_is_reported(tmp_path, monkeypatch, capsys) -> None:
    def without_onnx(name: str):
        if name == "onnx":
            raise ImportError("No module named 'onnx'")
        return importlib.import_module(name)

    monkeypatch.setattr(onnx_export.importlib, "import_module", without_onnx)
    assert cli.main(["export", str(tmp_path), "--onnx", str(tmp_path / "x.onnx")]) == 2
    assert "pip install 'qfast-models[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()


def test_other_scores_are_refused() -> None:
    runtime_module = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    assert runtime_module
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    network = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0)).eval()
    example = torch.randn(7, 3)
    content = onnx_export._exported(network, example).SerializeToString()
    onnx_export._compare_with_runtime(content, network, example)
    with torch.no_grad():
        network[0].bias += 1e-3
    with pytest.raises(ConfigError, match="does not compute the same scores"):
        onnx_export._compare_with_runtime(content, network, example)


def test_out_and_onnx_together(tmp_path, capsys) -> None:
    assert cli.main(["export", str(tmp_path), "--onnx", "x.onnx", "--out", "y"]) == 2
    assert "--out" in capsys.readouterr().err
