"""A cache of computed factors on disk, which a second run reads.

Each combination of prices, rows and expressions has one Parquet file, named by a digest of all three. Other prices,
rows or expressions use another file, so files never become outdated. Files are written atomically: neither an
interrupted run nor two runs at the same time can damage them. A file that cannot be read is logged and its factors are
computed again. If the disk is full, the factors are not cached and the run continues.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qfast
from qfast.data.expression import Call, parse, walk
from qfast.data.expression_functions import FUNCTIONS
from qfast.data.prices import Prices
from qfast.dates import DateLike
from qfast.errors import ConfigError, QfastError, shown
from qfast.files import atomic_write

__all__ = ["FactorCache"]

log = logging.getLogger("qfast.data")

FORMAT = 3  # version of the file format and of the meaning of expressions; part of the digest
ROW_GROUP = 1 << 15  # rows that are transposed at a time


class FactorCache:
    """A folder of computed factors.

    Parameters
    ----------
    folder : path
        Created when the first file is written.

    Raises
    ------
    ConfigError
        The path is not a folder, or pyarrow is not installed.

    Examples
    --------
    >>> import tempfile
    >>> values = np.array([[1.0, 2.0], [3.0, np.nan]], dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = FactorCache(folder)
    ...     cache.write("some-key", ["$close", "$open"], values)
    ...     cache.read("some-key", ["$close", "$open"], 2).tolist()
    [[1.0, 2.0], [3.0, nan]]
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise ConfigError(f"cache must be the path of a folder or None, got {shown(folder)}.")
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"cache must be a folder, but {str(self.folder)!r} is a file. Remedy: another path.")
        if importlib.util.find_spec("pyarrow") is None:
            raise ConfigError(
                f"cache={str(self.folder)!r} needs pyarrow, which is not installed. "
                "Remedy: pip install 'qfast-models[parquet]', or remove the argument cache."
            )

    def key(
        self,
        texts: Sequence[str],
        prices: Prices,
        rows: np.ndarray,
        start_time: DateLike | None,
        others: Mapping[str, Prices],
        compat: str | None = None,
    ) -> str | None:
        """Digest of everything the factors depend on.

        Parameters
        ----------
        texts : sequence of str
            Expressions.
        prices : Prices
        rows : int64 [M]
            Panel rows to compute.
        start_time : date-like or None
            As in `qfast.data.factors.evaluate_all`.
        others : mapping
            Prices of instruments that `Mask` names, by instrument.
        compat : str or None
            As in `qfast.data.factors.evaluate_all`.

        Returns
        -------
        str or None
            None if an expression calls a registered function, whose code the digest cannot cover.
        """
        calls = {node.function for text in texts for node in walk(parse(text)) if isinstance(node, Call)}
        registered = sorted(name for name in calls if FUNCTIONS[name].form == "user")
        if registered:
            log.info("factors that call the registered functions %s are not cached", registered)
            return None
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{FORMAT} {qfast.__version__} {start_time}\x1e".encode())
        digest.update("\x1f".join(texts).encode())
        if compat is not None:  # digests of files without it stay valid
            digest.update(f"\x1ecompat={compat}".encode())
        for name, (panel, extents) in [("", prices), *sorted(others.items())]:
            digest.update(f"\x1e{name}\x1e{panel.content_hash()}".encode())
            for field in sorted(extents):
                digest.update(field.encode())
                digest.update(np.ascontiguousarray(extents[field], dtype=np.int64).data)
        digest.update(np.ascontiguousarray(rows, dtype=np.int64).data)
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"factors-{key}.parquet"

    def read(self, key: str | None, texts: Sequence[str], n_rows: int) -> np.ndarray | None:
        """The factors of a key.

        Parameters
        ----------
        key : str or None
            From `key`; None is never cached.
        texts : sequence of str
            C expressions, in the order of the columns.
        n_rows : int
            M.

        Returns
        -------
        float32 [M, C] or None
            None if the file does not exist or cannot be read; an unreadable file is logged.
        """
        if key is None or not self.path(key).is_file():
            return None
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.path(key)
        try:
            with pq.ParquetFile(file, memory_map=True, page_checksum_verification=True) as parquet:
                # Checksums cover the pages only; the number and names of the columns are checked here.
                if parquet.metadata.num_rows != n_rows or not parquet.schema_arrow.equals(_schema(texts)):
                    raise ValueError(f"{parquet.metadata.num_rows} rows of {parquet.metadata.num_columns} columns")
                out = np.empty((n_rows, len(texts)), dtype=np.float32)
                start = 0
                for group in range(parquet.num_row_groups):
                    table = parquet.read_row_group(group, use_threads=False)
                    columns = np.stack([column.to_numpy() for column in table.columns])
                    out[start : start + table.num_rows] = columns.T
                    start += table.num_rows
        except (OSError, ValueError, pa.ArrowException) as error:
            log.warning("cannot read cached factors from %s (%s); computing them again", file, error)
            return None
        log.info("read factors from %s", file)
        return out

    def write(self, key: str | None, texts: Sequence[str], values: np.ndarray) -> None:
        """Store `values` under `key`. A failure is logged and does not raise.

        Parameters
        ----------
        key : str or None
            None: nothing is stored.
        texts : sequence of str
            C expressions.
        values : float32 [M, C]
        """
        if key is None:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _schema(texts)

        def fill(file: Path) -> None:
            plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
            with pq.ParquetWriter(file, schema, write_page_checksum=True, **plain) as to:
                for start in range(0, len(values), ROW_GROUP):
                    columns = np.ascontiguousarray(values[start : start + ROW_GROUP].T)
                    to.write_table(pa.Table.from_arrays([pa.array(column) for column in columns], schema=schema))

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path(key), fill)
        except (OSError, QfastError) as error:
            log.warning("factors are not cached: %s", error)


def _schema(texts: Sequence[str]) -> Any:
    """Schema of a file: float32 columns, named by position and expression."""
    import pyarrow as pa

    return pa.schema([(f"{place}: {text}", pa.float32()) for place, text in enumerate(texts)])
