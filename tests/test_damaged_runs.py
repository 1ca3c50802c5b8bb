"""Run folders whose files are damaged or foreign: every command ends in one line, and nothing is silently wrong."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from qfast.cli import main
from qfast.data.processors import RobustZScoreNorm
from qfast.errors import CheckpointError, DataError
from qfast.models import GRU
from qfast.tensor_files import read_metadata, require_intact
from qfast.training.checkpoint import write_tensors
from qfast.workflow.folder import RunFolder
from qfast.workflow.run import run
from qfast.workflow.saved_model import load_facts
from qfast.workflow.saved_run import load
from support.hostile import damaged_versions, json_versions
from support.workflows import write_case

pytestmark = pytest.mark.usefixtures("undrawn_plots")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, undrawn_plots) -> Path:
    """A finished run, whose data is in the file factors.csv next to it. Tests copy it."""
    base = tmp_path_factory.mktemp("damaged")
    config, data = write_case(base)
    return run(config, data, ["task.model.kwargs.n_epochs=2"], output=base / "run", seed=3).path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


# ---------------------------------------------------------------- weights
@pytest.mark.parametrize("name", ["best.safetensors", "processors.safetensors"])
def test_a_flipped_bit_is_an_error(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-5] ^= 4  # in the last array
    (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: the SHA-256 of its content is"):
        load(copy)


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
def test_weight_files_detect_any_flipped_bit(tmp_path: Path, suffix: str) -> None:
    model = GRU(d_feat=3, hidden_size=4, seed=0)
    file = tmp_path / f"w{suffix}"
    model.save_weights(file)
    expected, content = model.network.state_dict(), file.read_bytes()
    for position in random.Random(0).sample(range(len(content)), 60):
        damaged = bytearray(content)
        damaged[position] ^= 16
        file.write_bytes(damaged)
        try:
            model.load_weights(file)
        except CheckpointError as error:
            assert str(file) in str(error)  # noqa: PT017 - or the content is unchanged
        else:
            assert all(torch.equal(value, expected[key]) for key, value in model.network.state_dict().items())


CHECKED_FILES = ("best.safetensors", "last.safetensors", "processors.safetensors")


def remove_entries(file: Path, *entries: str) -> None:
    """Rewrite a safetensors file without some entries of its metadata."""
    with safetensors.safe_open(file, framework="pt") as content:
        metadata = {k: v for k, v in (content.metadata() or {}).items() if k not in entries}
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata or None)


def test_files_without_a_checksum_still_load(finished: Path, copy: Path) -> None:
    """Earlier versions wrote the checksum alone, or none, as other programs do."""
    expected = load(finished).predict()
    for name in CHECKED_FILES:
        remove_entries(copy / name, "qfast.sha256", "qfast.checksum")
    assert load(copy).predict().equals(expected)
    assert main(["run", "--resume", str(copy), "-q"]) == 0


@pytest.mark.parametrize("name", CHECKED_FILES)
def test_a_missing_checksum_is_reported(copy: Path, name: str) -> None:
    remove_entries(copy / name, "qfast.sha256")
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: its checksum, the entry 'qfast.sha256'"):
        require_intact(copy / name)
    if name != "last.safetensors":
        with pytest.raises(CheckpointError, match="is missing"):
            load(copy)


def test_files_of_equal_content_are_equal(tmp_path: Path) -> None:
    weights = {"w": torch.arange(3.0)}
    for number in range(8):
        write_tensors(tmp_path / str(number), weights, {"naïve": "ü\n", "other": "2", "third": "3"})
    assert len({(tmp_path / str(number)).read_bytes() for number in range(8)}) == 1
    assert read_metadata(tmp_path / "0")["naïve"] == "ü\n"


def test_the_checksum_is_of_the_content(finished: Path) -> None:
    """Two runs with equal weights have equal files."""
    model = load(finished).model
    model.save_weights(finished.parent / "again.safetensors")
    assert (finished.parent / "again.safetensors").read_bytes() == (finished / "best.safetensors").read_bytes()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(copy: Path, value: float) -> None:
    state = safetensors.torch.load_file(copy / "best.safetensors")
    state["fc_out.weight"][0, 0] = value
    safetensors.torch.save_file(state, copy / "best.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in fc_out.weight, so every result would be NaN"):
        load(copy)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_of_another_kind_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = GRU(d_feat=3, hidden_size=4, seed=0)
    state = {key: value.to(dtype) for key, value in model.network.state_dict().items()}
    torch.save(state, tmp_path / "w.pkl")
    with pytest.raises(CheckpointError, match=r"weights of another type: .*: file torch\.\w+, network torch.float32"):
        model.load_weights(tmp_path / "w.pkl")


def test_weights_of_another_precision_are_converted(tmp_path: Path) -> None:
    model = GRU(d_feat=3, hidden_size=4, seed=0)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    torch.save({key: value.double() for key, value in before.items()}, tmp_path / "w.pkl")
    model.load_weights(tmp_path / "w.pkl")
    assert all(torch.equal(before[key], value) for key, value in model.network.state_dict().items())


# ---------------------------------------------------------------- processors
STATES = {
    "no columns": ({"positions": np.empty(0, int), "shift": np.empty(0), "scale": np.empty(0)}, "at least one"),
    "a negative column": ({"positions": np.array([-1]), "shift": np.ones(1), "scale": np.ones(1)}, "ascending column"),
    "columns as floats": ({"positions": np.array([0.5]), "shift": np.ones(1), "scale": np.ones(1)}, "ascending column"),
    "an integer shift": ({"positions": np.array([0]), "shift": np.ones(1, int), "scale": np.ones(1)}, "saved shift"),
    "a complex scale": ({"positions": np.array([0]), "shift": np.ones(1), "scale": np.ones(1, complex)}, "saved scale"),
}


@pytest.mark.parametrize(("state", "match"), STATES.values(), ids=STATES.keys())
def test_saved_statistics_are_checked(state: dict, match: str) -> None:
    with pytest.raises(DataError, match=match):
        RobustZScoreNorm(None, None).load_state({f"feature.{name}": value for name, value in state.items()})


# ---------------------------------------------------------------- any damage
FILES = ("manifest.json", "config.yaml", "model.json", "processors.safetensors", "best.safetensors", "last.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_end_in_one_line(finished: Path, copy: Path, name: str, capfd: pytest.CaptureFixture) -> None:
    content = (finished / name).read_bytes()
    versions = damaged_versions(content, len(name))
    if name.endswith(".json"):
        versions += json_versions(content.decode())
    commands = [["info", str(copy)]]
    if name not in ("last.safetensors", "config.yaml"):
        commands.append(["predict", str(copy), "-q", "--out", str(copy / "scores.csv")])
    if name in ("manifest.json", "config.yaml", "last.safetensors"):
        commands.append(["run", "--resume", str(copy), "-q", "--data", str(copy / "no-such-file.csv")])
    for version in versions:
        (copy / name).write_bytes(version)
        for command in commands:
            status = main(command)  # any other exception fails the test
            errors = [line for line in capfd.readouterr().err.splitlines() if "WARNING" not in line]
            assert status in (0, 2), (command, version[:200])
            assert status == 0 or (len(errors) >= 1 and errors[0].startswith("qfast: ")), (command, errors)


def test_a_damaged_checkpoint_is_not_resumed(copy: Path, finished: Path, capfd: pytest.CaptureFixture) -> None:
    """With the right data, so the training state is read."""
    with safetensors.safe_open(finished / "last.safetensors", framework="pt") as content:
        metadata = dict(content.metadata())
    tensors = safetensors.torch.load_file(finished / "last.safetensors")
    facts = json.loads(metadata["qfast"])
    before = (copy / "manifest.json").read_bytes()
    changed = [{k: v for k, v in facts.items() if k != key} for key in facts if key not in ("model_facts", "origin")]
    changed += [{**facts, key: value} for key in ("numpy", "params", "data") for value in (None, 3, [1])]
    for version in changed:
        safetensors.torch.save_file(tensors, copy / "last.safetensors", {"qfast": json.dumps(version)})
        assert main(["run", "--resume", str(copy), "-q"]) == 2, version
        (error,) = capfd.readouterr().err.splitlines()
        assert "last.safetensors" in error
    first_of = {key.split(".")[0]: key for key in reversed(tensors)}
    for key in [*first_of.values(), "optimizer.0.exp_avg", "rng.numpy"]:
        fewer = {name: value for name, value in tensors.items() if name != key}
        safetensors.torch.save_file(fewer, copy / "last.safetensors", {"qfast": metadata["qfast"]})
        assert main(["run", "--resume", str(copy), "-q"]) == 2, key
        assert "last.safetensors" in capfd.readouterr().err
    assert (copy / "manifest.json").read_bytes() == before


# ---------------------------------------------------------------- paths in model.json
def test_paths_in_model_json_have_no_effect(copy: Path, tmp_path: Path) -> None:
    facts = json.loads((copy / "model.json").read_text())
    foreign = tmp_path / "foreign"
    for key in ("cache", "scratch", "data", "provider_uri", "source", "memory_limit"):
        facts["handler"].setdefault("kwargs", {})[key] = str(foreign)
    facts["model"]["kwargs"]["model_path"] = str(foreign)
    (copy / "model.json").write_text(json.dumps(facts))
    assert not {"cache", "scratch", "source"} & set(load_facts(RunFolder.open(copy))["handler"]["kwargs"])
    assert len(load(copy).predict())
    assert not foreign.exists()
