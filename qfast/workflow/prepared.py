"""Prepared data: a handler after reading and processing, in a folder that many runs map instead of preparing it again.

The folder contains

    arrays.bin      every array of the handler, raw and aligned: prices, features, labels, row codes
    handler.pickle  the handler without its arrays
    data.pickle     the data of the caller if it was in memory, for the manifests of the runs
    facts.json      the entry of the manifest about the data, and the notes of the readers

An array that several panels share is stored once, which is the reason not to use one `Panel.save` for each panel. All
processes of a machine map `arrays.bin` and share its pages through the page cache. The maps are private: a process that
writes to an array changes its own copy.

The folder belongs to the process that writes it. Reading a pickle can run code, so `PreparedData` contains the hashes
of its files and refuses others. It is not meant to be stored or sent.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qfast.data.protocols import Handler, HandlerDataset
from qfast.data.source_notes import SourceNote, collected_notes
from qfast.errors import CheckpointError, ConfigError
from qfast.files import file_hash
from qfast.read_options import ReadOptions
from qfast.workflow.dataset import DataInput, data_facts, dataset_over, workflow_handler
from qfast.workflow.schema import Workflow

__all__ = ["PreparedData", "data_key"]

ARRAYS, HANDLER, DATA, FACTS = "arrays.bin", "handler.pickle", "data.pickle", "facts.json"
ALIGNMENT = 64  # bytes, the width of a vector register and of a cache line


def data_key(workflow: Workflow) -> str:
    """Digest of the parts of a workflow that its handler depends on. Runs with equal keys share prepared data.

    Examples
    --------
    >>> from qfast.workflow.config import load_config
    >>> from qfast.workflow.demo import DEMO
    >>> from qfast.workflow.validation import check_workflow
    >>> one = check_workflow(load_config(DEMO).values)
    >>> other = check_workflow(load_config(DEMO, ["task.model.kwargs.lr=1e-2"]).values)
    >>> data_key(one) == data_key(other)
    True
    """
    values = workflow.resolved()
    parts = {"handler": values["task"]["dataset"]["kwargs"]["handler"], "init": values.get("qlib_init")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PreparedData:
    """Data that has been read and processed for all workflows with the same `data_key`.

    Attributes
    ----------
    path : Path
        The folder.
    key : str
        The `data_key` of the workflows.
    hashes : mapping
        SHA-256 hash of each small file.

    Examples
    --------
    >>> import tempfile
    >>> from qfast.workflow.config import load_config
    >>> from qfast.workflow.demo import DEMO, demo_prices
    >>> from qfast.workflow.validation import check_workflow
    >>> workflow = check_workflow(load_config(DEMO).values)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     prepared = PreparedData.write(Path(folder, "p"), workflow, demo_prices(20, 560))
    ...     prepared.dataset(workflow).handler.panel("infer").n_rows > 9000
    True
    """

    path: Path
    key: str
    hashes: Mapping[str, str] = field(repr=False)

    @classmethod
    def write(
        cls, path: Path, workflow: Workflow, data: DataInput | None, read_options: ReadOptions | None = None
    ) -> PreparedData:
        """Read and process the data of a workflow, and write the result to a new folder.

        Parameters
        ----------
        path : Path
            Created. It must not exist.
        workflow, data, read_options
            As in `qfast.workflow.dataset.build_dataset`.

        Raises
        ------
        ConfigError, DataError
            As in `build_dataset`.
        """
        options = ReadOptions() if read_options is None else read_options
        with collected_notes() as notes:
            handler = workflow_handler(workflow, data, options)
        facts = {
            "facts": data_facts(handler, data, workflow, options),
            "notes": [list(note) for note in notes],
            "in_memory": data is not None and not isinstance(data, (str, Path)),
        }
        path.mkdir(parents=True)
        offsets = _write_pickle(path / HANDLER, path / ARRAYS, handler)
        if facts["in_memory"]:
            (path / DATA).write_bytes(pickle.dumps(data, protocol=5))
        (path / FACTS).write_text(json.dumps({**facts, "offsets": offsets}), encoding="utf-8")
        small = [name for name in (HANDLER, DATA, FACTS) if (path / name).exists()]
        return cls(path, data_key(workflow), {name: file_hash(path / name) for name in small})

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> PreparedData:
        """The object that `description` describes."""
        return cls(Path(description["path"]), description["key"], dict(description["hashes"]))

    def description(self) -> dict[str, Any]:
        """Path, key and hashes as plain data, for another process."""
        return {**asdict(self), "path": str(self.path)}

    def dataset(self, workflow: Workflow) -> HandlerDataset:
        """A dataset over the prepared data. Each call maps the arrays anew.

        Parameters
        ----------
        workflow : Workflow
            Its segments and its class of datasets apply.

        Raises
        ------
        ConfigError
            The workflow needs other data.
        CheckpointError
            A file is missing or has changed.
        """
        if data_key(workflow) != self.key:
            raise ConfigError(
                f"the prepared data in {str(self.path)!r} belongs to a workflow with another handler or qlib_init (key "
                f"{self.key}, this workflow has {data_key(workflow)}). Remedy: prepare the data of this workflow."
            )
        return dataset_over(workflow, self.handler())

    def handler(self) -> Handler:
        """The handler. Classes of the user must have been imported, see `qfast.workflow.user_code`."""
        with (self.path / ARRAYS).open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        buffers = [mapped[start : start + size] for start, size in self._content["offsets"]]
        handler: Handler = pickle.loads(self._checked(HANDLER), buffers=buffers)
        return handler

    @cached_property
    def data(self) -> DataInput | None:
        """The data of the caller, if it was in memory."""
        if not self._content["in_memory"]:
            return None
        data: DataInput = pickle.loads(self._checked(DATA))
        return data

    @property
    def facts(self) -> dict[str, Any]:
        """The entry of a run's manifest about the data."""
        return dict(self._content["facts"])

    @property
    def notes(self) -> list[SourceNote]:
        """What the readers have noticed about the source."""
        return [SourceNote(*note) for note in self._content["notes"]]

    @cached_property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._checked(FACTS))
        return content

    def _checked(self, name: str) -> bytes:
        """The content of a file whose hash is the recorded one."""
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"prepared data {str(self.path / name)!r} cannot be read: {error}.") from None
        if hashlib.sha256(content).hexdigest() != self.hashes[name]:
            raise CheckpointError(
                f"{str(self.path / name)!r} has changed since the data was prepared. Remedy: prepare it again."
            )
        return content


class _Pickler(pickle.Pickler):
    """Stores tensors as arrays, whose memory pickle can leave out."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, torch.Tensor) and type(value) is torch.Tensor and value.device.type == "cpu":
            return torch.from_numpy, (value.detach().contiguous().numpy(),)
        return NotImplemented


def _write_pickle(target: Path, arrays: Path, value: object) -> list[tuple[int, int]]:
    """Pickle a value to `target` and its arrays to the file `arrays`; return (offset, bytes) of each array."""
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    pickler = _Pickler(stream, protocol=5, buffer_callback=buffers.append)
    pickler.dump(value)
    target.write_bytes(stream.getvalue())
    offsets, position = [], 0
    with arrays.open("xb") as file:
        for buffer in buffers:
            content = buffer.raw()
            file.write(b"\0" * (-position % ALIGNMENT))
            position += -position % ALIGNMENT
            offsets.append((position, content.nbytes))
            file.write(content)
            position += content.nbytes
        file.write(b"\0")  # an empty file cannot be mapped
    return offsets
