"""Views of prices in panel folders: the prices and constants of a `PriceWindows`, without its columns.

An entry of the header contains the arrays of the view (`qfast.data.array_files`) and its later maps by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qfast.data.array_files import open_array, write_array
from qfast.data.column_maps import ColumnMap, Fill, Normalize, ShiftedTanh
from qfast.data.panel import shared_tensor
from qfast.data.price_windows import LaterMap, PriceWindows, StoredRows
from qfast.errors import DataError

__all__ = ["open_windows", "write_windows"]

TENSORS = ("series", "ends", "divisors", "divisor_of", "stages")


def write_windows(windows: PriceWindows, contents: Path, stem: str) -> dict[str, Any]:
    """Write the arrays of a view to files whose names begin with `stem`, and return the entry for `open_windows`."""
    arrays = {name: getattr(windows, name).numpy() for name in TENSORS}
    if windows.selected is not None:
        arrays["selected"] = windows.selected.numpy()
    if windows.stored is not None:
        arrays |= {"stored_rows": windows.stored.rows.numpy(), "stored_values": windows.stored.values.numpy()}
    later = []
    for number, change in enumerate(windows.later):
        constants, values = _map_entry(change.function)
        arrays |= {f"later_{number}_{name}": array for name, array in {**values, "columns": change.positions}.items()}
        later.append(constants)
    return {
        "window": windows.window,
        "required": windows.required,
        "later": later,
        "arrays": {name: write_array(array, contents, f"{stem}-{name}") for name, array in arrays.items()},
    }


def open_windows(entry: Mapping[str, Any], contents: Path, verify: bool) -> PriceWindows:
    """The view of an entry, over memory maps."""
    arrays = {name: open_array(array, contents, verify) for name, array in entry["arrays"].items()}
    tensors: dict[str, torch.Tensor] = {name: shared_tensor(arrays[name]) for name in TENSORS}
    selected = shared_tensor(arrays["selected"]) if "selected" in arrays else None
    stored = None
    if "stored_rows" in arrays:
        stored = StoredRows(shared_tensor(arrays["stored_rows"]), shared_tensor(arrays["stored_values"]))
    later = tuple(
        LaterMap(_map_of(constants, arrays, f"later_{number}_"), arrays[f"later_{number}_columns"])
        for number, constants in enumerate(entry["later"])
    )
    return PriceWindows(
        **tensors,
        window=entry["window"],
        required=entry["required"],
        later=later,
        selected=selected,
        stored=stored,
    )


def _map_entry(function: ColumnMap) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The constants of a map for the header, and its arrays."""
    if type(function) is Normalize:
        limit = None if np.isinf(function.limit) else function.limit
        return {"map": "Normalize", "limit": limit}, {"shift": function.shift, "scale": function.scale}
    if type(function) is Fill:
        return {"map": "Fill"}, {"value": np.array([function.value], dtype=np.float64)}
    if type(function) is ShiftedTanh:
        return {"map": "ShiftedTanh"}, {}
    raise DataError(
        f"a view with the map {type(function).__name__} cannot be saved. Remedy: windows='columns' of the handler."
    )


def _map_of(constants: Mapping[str, Any], arrays: Mapping[str, np.ndarray], prefix: str) -> ColumnMap:
    """The map that `_map_entry` has described."""
    if constants["map"] == "Normalize":
        limit = np.inf if constants["limit"] is None else constants["limit"]
        return Normalize(arrays[f"{prefix}shift"], arrays[f"{prefix}scale"], limit)
    if constants["map"] == "Fill":
        return Fill(float(arrays[f"{prefix}value"][0]))
    return ShiftedTanh()
