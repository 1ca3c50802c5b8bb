"""Classes of the user in workflow files: `--allow-code PATH` permits importing them from a file or folder.

A workflow file is data. It names a class and a module path, but only the caller decides whether code is imported, and
from where. The run folder records the path and the hashes of the imported files. `resume`, `predict` and `load` of such
a run require the permission again.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from qfast.errors import ConfigError, suggest
from qfast.files import file_hash
from qfast.registry import Registry, user_classes

__all__ = ["MANIFEST_KEY", "AllowCode", "AllowedCode", "allowed_code", "option_text", "require_permission"]

log = logging.getLogger("qfast")

AllowCode: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None"
"""Files or folders from which classes may be imported; None: nothing may be imported."""

MANIFEST_KEY = "code"  # of the manifest of a run
_loaded: dict[str, tuple[Path, int]] = {}  # module -> its file and the file's time when it was imported


@dataclass(frozen=True)
class AllowedCode:
    """Files and folders from which classes may be imported.

    Attributes
    ----------
    paths : tuple of Path
        Absolute paths.
    """

    paths: tuple[Path, ...]

    def find(self, kind: Registry, name: str, module: str | None) -> type | None:
        """Import the class `name` of the module path `module`; None if no allowed path contains the module.

        Parameters
        ----------
        kind : Registry
            The class must derive from `kind.base`.
        name : str
        module : str or None
            A dotted name relative to an allowed folder, or the path of a .py file. None: an allowed file.

        Raises
        ------
        ConfigError
            The module cannot be imported, its name belongs to another module, it does not contain the class, or the
            class has another base.
        """
        for path in self.paths:
            located = _locate(path, module)
            if located is not None:
                found = _class_of(_import(*located), name, kind)
                if found is not None or module is not None:
                    return found or _no_class(_import(*located), name)
        return None

    def facts(self) -> list[dict[str, Any]]:
        """For each path: "path", and the SHA-256 hash of each imported "files" by its name relative to the path."""
        return [{"path": str(path), "files": self._hashes(path)} for path in self.paths]

    def _hashes(self, path: Path) -> dict[str, str]:
        files = sorted({file for file, _ in _loaded.values() if file == path or path in file.parents})
        return {_relative(file, path): file_hash(file) for file in files if file.is_file()}


@contextlib.contextmanager
def allowed_code(paths: AllowCode) -> Iterator[AllowedCode | None]:
    """Permit importing classes from `paths` inside the block.

    Parameters
    ----------
    paths : path, sequence of paths, or None
        Python files, or folders that contain modules. None: nothing changes.

    Yields
    ------
    AllowedCode or None

    Raises
    ------
    ConfigError
        A path does not exist, or is a file that is not a Python file.

    Examples
    --------
    >>> import tempfile
    >>> from qfast.registry import HANDLERS
    >>> from qfast.workflow import classes
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = Path(folder.name, "my_factors.py")
    >>> _ = file.write_text("from qfast.data import Alpha158\\nclass MyFactors(Alpha158):\\n    pass\\n")
    >>> with allowed_code(file):
    ...     HANDLERS.resolve({"class": "MyFactors", "module_path": "my_factors"})[0].__name__
    'MyFactors'
    """
    if paths is None:
        yield None
        return
    listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not listed:
        yield None
        return
    allowed = AllowedCode(tuple(_checked(Path(path)) for path in listed))
    with user_classes(allowed.find):
        yield allowed


def require_permission(manifest: Mapping[str, Any], allowed: AllowedCode | None, run: object) -> None:
    """Refuse a run that uses classes of the user unless the caller permits code. Log files that have changed.

    Parameters
    ----------
    manifest : mapping
        The manifest of the run.
    allowed : AllowedCode or None
    run : path
        For messages.

    Raises
    ------
    ConfigError
        The run uses such classes and `allowed` is None.
    """
    recorded = manifest.get(MANIFEST_KEY) or []
    if not recorded:
        return
    if allowed is None:
        listed = ", ".join(repr(item["path"]) for item in recorded)
        raise ConfigError(
            f"the run {str(run)!r} uses classes from {listed}, and qfast imports code only with permission. Remedy: "
            f"{option_text(manifest)} (in Python: allow_code=...)."
        )
    hashes = {name: value for item in recorded for name, value in item["files"].items()}
    for name, before in hashes.items():
        files = [path if path.is_file() else path / name for path in allowed.paths]
        present = [file for file in files if file.is_file() and file.name == Path(name).name]
        if not any(file_hash(file) == before for file in present):
            log.warning("%s of the run %s %s", name, run, "has changed since the run" if present else "is missing")


def option_text(manifest: Mapping[str, Any]) -> str:
    """The `--allow-code` options that a run requires, as shell text; empty if it uses no classes of the user."""
    recorded = manifest.get(MANIFEST_KEY) or []
    return " ".join(f"--allow-code {shlex.quote(item['path'])}" for item in recorded)


# ---------------------------------------------------------------- locating a module
def _checked(path: Path) -> Path:
    path = path.expanduser()
    if not path.exists():
        raise ConfigError(f"--allow-code {str(path)!r} does not exist (looked in {Path.cwd()}).")
    if path.is_file() and path.suffix != ".py":
        raise ConfigError(f"--allow-code {str(path)!r} must be a Python file (.py) or a folder of Python files.")
    return path.resolve()


def _locate(path: Path, module: str | None) -> tuple[str, Path] | None:
    """The dotted name of a module and the folder that it is relative to; None if `path` does not contain it."""
    if module is None:
        return (path.stem, path.parent) if path.is_file() else None
    is_file_path = module.endswith(".py")
    if path.is_file():
        last = Path(module).name if is_file_path else f"{module.rpartition('.')[2]}.py"
        return (path.stem, path.parent) if last == path.name else None
    relative = _relative_file(path, module) if is_file_path else _relative_module(path, module)
    if relative is None:
        return None
    if (path / "__init__.py").is_file():  # the folder is a package, whose modules may use relative imports
        return f"{path.name}.{relative}" if relative else path.name, path.parent
    return relative, path


def _relative_file(folder: Path, module: str) -> str | None:
    """The dotted name in `folder` of the file that `module` names; None if the file is not inside `folder`."""
    for base in (folder, folder.parent, Path.cwd()):
        file = (base / Path(module).expanduser()).resolve()
        if file.is_file() and folder in file.parents:
            return ".".join(file.relative_to(folder).with_suffix("").parts)
    return None


def _relative_module(folder: Path, module: str) -> str | None:
    parts = module.split(".")
    candidates = [parts, parts[1:]] if parts[0] == folder.name else [parts]
    for candidate in candidates:
        if not all(part.isidentifier() for part in candidate):
            continue
        target = folder.joinpath(*candidate)
        if target.with_suffix(".py").is_file() or (target / "__init__.py").is_file():
            return ".".join(candidate)
    return None


# ---------------------------------------------------------------- importing
def _import(name: str, root: Path) -> ModuleType:
    """Import a module from `root`, whatever other modules of that name sys.path contains."""
    if str(root) not in sys.path:
        sys.path.append(str(root))  # for imports between the user's own files
    locations, full, module = [str(root)], "", ModuleType("")
    for part in name.split("."):
        parent, full = (module, f"{full}.{part}") if full else (None, part)
        module = _import_part(full, locations)
        if parent is not None:
            setattr(parent, part, module)
        locations = list(getattr(module, "__path__", []))
    return module


def _import_part(full: str, locations: list[str]) -> ModuleType:
    spec = importlib.machinery.PathFinder.find_spec(full, locations)
    if spec is None:
        raise ConfigError(f"--allow-code: there is no module {full!r} in {locations}.")
    file = Path(spec.origin).resolve() if spec.origin is not None and spec.has_location else None
    version = None if file is None else (file, file.stat().st_mtime_ns)
    module = sys.modules.get(full)
    if module is not None and full not in _loaded:
        other = getattr(module, "__file__", None)
        if file is None or other is None or Path(other).resolve() != file:
            raise ConfigError(
                f"--allow-code: the module name {full!r} of {file or locations} already belongs to {other or module}. "
                "Remedy: rename your file."
            )
    elif module is not None and _loaded[full] != version:  # another file of this name, or an edited one
        for name in [name for name in sys.modules if name == full or name.startswith(f"{full}.")]:
            del sys.modules[name]
            _loaded.pop(name, None)
        module = None
    if module is None:
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        if spec.loader is not None and file is not None:
            _execute(spec.loader, module, full, file)
    if version is not None:
        _loaded[full] = version
    return module


def _execute(loader: Any, module: ModuleType, full: str, file: Path) -> None:
    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[full]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else (lines or [None])[-1]
        place = f"{file}, line {line}" if line else str(file)
        hint = ""
        if isinstance(error, ImportError) and str(getattr(error, "name", "")).split(".")[0] == "qlib":
            hint = " Remedy: import the base class from qfast.data (or qfast), or use --engine qlib."
        raise ConfigError(f"--allow-code: {place}: {type(error).__name__}: {error}.{hint}") from error


def _class_of(module: ModuleType, name: str, kind: Registry) -> type | None:
    """The class of the module, whose base is checked; None if the module does not contain it."""
    value = getattr(module, name, None)
    if value is None:
        return None
    base = kind.base
    if isinstance(value, type) and base is not None and issubclass(value, base):
        return value
    described = "a class" if not isinstance(value, type) else f"derived from {base and base.__name__}"
    qlib_base = isinstance(value, type) and any(c.__module__.split(".")[0] == "qlib" for c in value.__mro__)
    raise ConfigError(
        f"{module.__file__}: {name} must be {described} to be used as a {kind.what}, got {value!r}. Remedy: derive it "
        f"from {base and f'{base.__module__}.{base.__name__}'}"
        + (", or use --engine qlib, which accepts classes derived from Qlib's." if qlib_base else ".")
    )


def _no_class(module: ModuleType, name: str) -> type:
    classes = sorted(n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__)
    raise ConfigError(f"{module.__file__} has no class {name!r}, only {classes}." + suggest(name, classes))


def _relative(file: Path, path: Path) -> str:
    return file.name if file == path else file.relative_to(path).as_posix()
