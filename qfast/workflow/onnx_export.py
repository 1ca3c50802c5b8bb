"""Export of a run's network to ONNX, with the description of its input in the file's metadata."""

from __future__ import annotations

import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qfast.errors import ConfigError
from qfast.files import atomic_write, require_file_target
from qfast.nn import TCNModel
from qfast.nn.plain import PlainTorch
from qfast.workflow.folder import RunFolder, versions
from qfast.workflow.saved_model import load_facts, time_steps
from qfast.workflow.saved_run import load
from qfast.workflow.user_code import AllowCode

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["METADATA", "TOLERANCE", "export_onnx"]

log = logging.getLogger("qfast")

METADATA = "qfast"  # key of the file's metadata
FORMAT = 1
TOLERANCE = 1e-5  # between scores of torch and of ONNX Runtime, relative to the largest score
EXAMPLE_ROWS = 7  # a number that is unlikely to be the size of another axis


def export_onnx(
    run: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    allow_code: AllowCode = None,
) -> Path:
    """Write the network of a run, with its best weights, as an ONNX file.

    The network is exported with torch's own operations. If ONNX Runtime is installed, its scores for random windows are
    compared with torch's before the file is written.

    The input is named "windows": float32 [B, T, F], for TCN [B, F, T], and [B, columns] for datasets of single rows. B
    may be any number; for GATs, the rows are all stocks of one day. The output "scores" is float32 [B]. The entry
    "qfast" of the file's metadata is a JSON text with the model, the dataset, the handler, the processors and the names
    of the columns. The file does not process raw prices: the fitted statistics are in the run folder.

    Parameters
    ----------
    run : path
        A run folder.
    file : path
        The ONNX file, which appears complete or not at all.
    weights, allow_code
        As in `qfast.predict`.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConfigError
        `run` is not a run folder, onnx or onnxscript is not installed, or torch cannot export the network.
    CheckpointError
        A file of the run is missing or damaged.

    Source
    ------
    torch.onnx.export with dynamo=True; the format is described at https://onnx.ai/onnx/repo-docs/IR.html.
    """
    onnx = _imported("onnx")
    _imported("onnxscript")
    target = Path(file)
    require_file_target(target, "--onnx")
    saved = load(run, device="cpu", allow_code=allow_code, weights=weights)
    facts = load_facts(RunFolder.open(run))
    steps, columns = time_steps(facts["dataset"]), len(facts["columns"])
    plain = _plain_network(saved.model.network)
    shape = (columns,) if steps == 0 else (columns, steps) if isinstance(plain, TCNModel) else (steps, columns)
    example = torch.randn(EXAMPLE_ROWS, *shape, generator=torch.Generator().manual_seed(0))
    model = _exported(plain, example)
    specification = {
        "format": FORMAT,
        "run": saved.path.name,
        "input": {"name": "windows", "shape": ["batch", *shape], "dtype": "float32"},
        **{key: facts[key] for key in ("model", "dataset", "handler", "processors", "columns")},
        "versions": versions(),
    }
    onnx.helper.set_model_props(model, {METADATA: json.dumps(specification)})
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    _compare_with_runtime(content, saved.model.network.eval(), example)
    atomic_write(target, lambda path: path.write_bytes(content))
    return target


def _imported(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"--onnx needs the package {package}, which cannot be imported ({error}). Remedy: pip install "
            "'qfast-models[onnx]'"
        ) from None


def _plain_network(network: nn.Module) -> nn.Module:
    """A copy of the network that uses torch's operations only, in float32 and without gradients."""
    plain = network.to_reference() if isinstance(network, PlainTorch) else network
    return plain.float().eval().requires_grad_(False)


def _exported(network: nn.Module, example: Tensor) -> Any:
    """The network as an ONNX model with any number of rows."""
    rows = torch.export.Dim("batch", min=1, max=1 << 24)
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                (example,),
                input_names=["windows"],
                output_names=["scores"],
                dynamic_shapes=({0: rows},),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many types, for example for a network of the user
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no details"
        raise ConfigError(
            f"torch cannot export {type(network).__name__} to ONNX ({type(error).__name__}: {first_line}). Remedy: a "
            "network whose forward uses torch's operations only."
        ) from error
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about packages that it could use and about torch's own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", "The tensor attributes", UserWarning)  # of torch's recurrent layers
            yield
    finally:
        logger.setLevel(level)


def _compare_with_runtime(content: bytes, network: nn.Module, example: Tensor) -> None:
    """Compare the scores of ONNX Runtime with those of the network, for several numbers of rows."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        log.info("onnxruntime is not installed, so the scores of the file have not been compared with torch's")
        return
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    dtype = next(network.parameters()).dtype
    for rows in (len(example), 1, 3):
        windows = example[:rows]
        with torch.no_grad():
            expected = network(windows.to(dtype)).float().numpy()
        scores = session.run(None, {"windows": windows.numpy()})[0]
        scale = max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(scores - expected).max())
        if scores.shape != expected.shape or not difference <= TOLERANCE * scale:
            raise ConfigError(
                f"the exported network does not compute the same scores: for {rows} rows they differ by "
                f"{difference:.2g}, allowed {TOLERANCE * scale:.2g}. The file has not been written."
            )
