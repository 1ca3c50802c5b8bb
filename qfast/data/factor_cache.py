"""A cache of computed factors on disk, which a second run maps into memory.

Each combination of prices, rows and expressions has one panel folder (`qfast.data.panel_folder`), named by a digest of
all three. Other prices, rows or expressions use another folder, so folders never become outdated. They are written
atomically and instrument by instrument, so factors may exceed memory, and neither an interrupted run nor two runs at
the same time can damage them. All processes that use the same factors share one copy in memory. A damaged folder is
logged and its factors are computed again. If the disk is full, the factors are not cached and the run continues.

Checksums detect damage but not forgery. Factors are therefore read only from folders that no other user can change.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import qfast
from qfast.data.expression import Call, parse, walk
from qfast.data.expression_functions import FUNCTIONS
from qfast.data.panel import Panel
from qfast.data.panel_folder import HEADER, create_panel, open_panel
from qfast.data.prices import Prices
from qfast.data.trusted_folder import remove_abandoned, require_trusted, without_other_writers
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError, QfastError, shown

__all__ = ["FactorCache"]

log = logging.getLogger("qfast.data")

FORMAT = 4  # version of the folder's format and of the meaning of expressions; part of the digest
GROUP = "feature"


class FactorCache:
    """A folder of computed factors.

    Parameters
    ----------
    folder : path
        Created when the first factors are written.

    Raises
    ------
    ConfigError
        The path is not a folder.

    Examples
    --------
    >>> import tempfile
    >>> from qfast.data import load_prices, synthetic
    >>> prices = load_prices(synthetic.prices(2, 5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = FactorCache(folder)
    ...     written = cache.write("some-key", ["$close"], prices, lambda out: out.fill(3))
    ...     bool((cache.read("some-key", ["$close"], prices.n_rows) == 3).all())
    True
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise ConfigError(f"cache must be the path of a folder or None, got {shown(folder)}.")
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"cache must be a folder, but {str(self.folder)!r} is a file. Remedy: another path.")

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
        if compat is not None:  # the digest of factors without it does not contain it
            digest.update(f"\x1ecompat={compat}".encode())
        for name, (panel, extents) in [("", prices), *sorted(others.items())]:
            digest.update(f"\x1e{name}\x1e{panel.content_hash()}".encode())
            for field in sorted(extents):
                digest.update(field.encode())
                digest.update(np.ascontiguousarray(extents[field], dtype=np.int64).data)
        digest.update(np.ascontiguousarray(rows, dtype=np.int64).data)
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """The panel folder of a key."""
        return self.folder / f"factors-{key}"

    def read(self, key: str | None, texts: Sequence[str], n_rows: int) -> np.ndarray | None:
        """The factors of a key, as a read-only memory map. All values are compared with their checksums once.

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
            None if the folder does not exist, is damaged, or can be changed by other users. All but the first are
            logged.
        """
        if key is None or not self.path(key).exists():
            return None
        folder = self.path(key)
        try:
            require_trusted(folder)
            panel = open_panel(folder)
            if panel.n_rows != n_rows or list(panel.blocks) != [GROUP] or panel.columns(GROUP) != _columns(texts):
                raise DataError(f"it contains other factors: {panel.n_rows} rows, {list(panel.blocks)}")
            values = panel.values(GROUP)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, QfastError) as error:
            log.warning("cannot read cached factors from %s (%s); computing them again", folder, error)
            return None
        log.info("mapped factors from %s", folder)
        return values

    def write(
        self, key: str | None, texts: Sequence[str], keys: Panel, compute: Callable[[np.ndarray], object]
    ) -> np.ndarray | None:
        """Compute factors into a new folder of the cache.

        Parameters
        ----------
        key : str or None
            From `key`.
        texts : sequence of str
            C expressions.
        keys : Panel
            Keys of the M rows; its columns are not stored.
        compute : callable
            `compute(out)` writes the factors to `out`, float32 [M, C].

        Returns
        -------
        float32 [M, C] or None
            The factors, as a read-only memory map. None if they cannot be stored, which is logged, or if `key` is None.
        """
        if key is None:
            return None
        try:
            if not self.folder.exists():
                self.folder.mkdir(parents=True)
                without_other_writers(self.folder)
            for abandoned in remove_abandoned(self.folder, self.path("*").name, HEADER):
                log.info("removed %s, which a killed run has left behind", abandoned)
            with create_panel(keys.only(()), self.path(key), {GROUP: _columns(texts)}) as values, _apart():
                compute(values[GROUP])
            without_other_writers(self.path(key))
            return open_panel(self.path(key), verify=False).values(GROUP)
        except ComputationError as error:
            raise error.original from None
        except (OSError, QfastError) as error:
            log.warning("factors are not cached: %s", error)
            return None


class ComputationError(Exception):
    """An error of the factors themselves, which is not an error of the disk."""

    def __init__(self, original: Exception) -> None:
        super().__init__(str(original))
        self.original = original


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Distinguish errors of the computation from those of the disk."""
    try:
        yield
    except Exception as error:
        raise ComputationError(error) from error


def _columns(texts: Sequence[str]) -> tuple[str, ...]:
    """Names of the columns: position and expression, because an expression may occur twice."""
    return tuple(f"{place}: {text}" for place, text in enumerate(texts))
