"""Registries of the classes that a configuration may build. Unregistered names are never imported.

`user_classes` adds classes of the caller for the duration of a block. A configuration alone cannot add any.

A specification is an object of an accepted type, a mapping
``{"class": "Alpha360", "module_path": "qlib.contrib.data.handler", "kwargs": {...}}``, or a string ``"Name"`` or
``"a.b.Name"``. Classes are registered under Qlib's module paths as well as under qfast's, so Qlib's workflow files
build qfast's classes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from qfast.errors import ConfigError, shown, suggest

__all__ = [
    "DATASETS",
    "HANDLERS",
    "MODELS",
    "PROCESSORS",
    "RECORDS",
    "REWEIGHTERS",
    "FindClass",
    "Registry",
    "user_classes",
]

SPEC_KEYS = ("class", "module_path", "kwargs")
USER_CLASS_REMEDY = "For a class of your own: --allow-code with its file or folder (in Python: allow_code=...)."
QLIB_CLASS_REMEDY = "For another class of Qlib: --engine qlib."


@dataclass(frozen=True)
class _Entry:
    factory: Callable[..., Any] | None
    modules: tuple[str, ...]
    unavailable: str = ""


class FindClass(Protocol):
    """Finds classes that are not registered."""

    def __call__(self, kind: Registry, name: str, module: str | None, /) -> type | None:
        """The class `name` of the module path `module`; None if there is none.

        Raises
        ------
        ConfigError
            The class is not of the kind.
        """


_find_user_class: ContextVar[FindClass | None] = ContextVar("find_user_class", default=None)


@contextlib.contextmanager
def user_classes(find: FindClass | None) -> Iterator[None]:
    """Let the registries build the classes that `find` returns for names that are not registered.

    The block inside applies to the current thread or task. None: no change.

    Examples
    --------
    >>> shapes = Registry("shape", base=dict)
    >>> class Square(dict): pass
    >>> with user_classes(lambda kind, name, module: Square if name == "Square" else None):
    ...     shapes.build({"class": "Square", "kwargs": {"side": 4}})
    {'side': 4}
    """
    token = _find_user_class.set(_find_user_class.get() if find is None else find)
    try:
        yield
    finally:
        _find_user_class.reset(token)


class Registry:
    """Classes of one kind ("processor", "handler", "model", ...) by name and module path.

    Parameters
    ----------
    what : str
        The kind, for error messages.
    accepts : type or tuple of types
        `build` returns objects of these types and of registered classes unchanged.
    base : type, optional
        Class from which the classes of a caller (`user_classes`) must derive. None: the kind has no such classes.

    Examples
    --------
    >>> shapes = Registry("shape")
    >>> shapes.add(dict, "Dict", modules=("some.shapes",))
    >>> shapes.build({"class": "Dict", "module_path": "some.shapes", "kwargs": {"sides": 4}})
    {'sides': 4}
    """

    def __init__(self, what: str, accepts: type | tuple[type, ...] = (), base: type | None = None) -> None:
        self.what = what
        self.base = base
        self._accepts: tuple[type, ...] = accepts if isinstance(accepts, tuple) else (accepts,)
        self._entries: dict[str, list[_Entry]] = {}

    # ---------------------------------------------------------------- registration
    def add(self, factory: Callable[..., Any], *names: str, modules: Iterable[str] = ()) -> None:
        """Register a class or factory under `names` (default: its `__name__`) and the module paths `modules`.

        If several classes have one name, the module path of a specification selects one of them. A specification
        without a module path selects the class that was registered first.
        """
        for name in names or (factory.__name__,):
            self._entries.setdefault(name, []).append(_Entry(factory, tuple(modules)))
        if isinstance(factory, type) and not issubclass(factory, (str, Mapping)):
            self.accept(factory)

    def accept(self, *types: type) -> None:
        """Make `build` return objects of these types unchanged."""
        self._accepts += tuple(t for t in types if t not in self._accepts)

    def unavailable(self, name: str, message: str, modules: Iterable[str] = ()) -> None:
        """Register a name that exists in Qlib but not in qfast. Building it raises a ConfigError with `message`."""
        self._entries.setdefault(name, []).append(_Entry(None, tuple(modules), message))

    def names(self) -> list[str]:
        """Sorted names that can be built."""
        return sorted(n for n, entries in self._entries.items() if any(e.factory for e in entries))

    def modules(self, name: str) -> list[str]:
        """Module paths under which `name` is registered."""
        return [m for entry in self._entries.get(name, ()) for m in entry.modules]

    # ---------------------------------------------------------------- lookup and building
    def is_instance(self, spec: object) -> bool:
        """True if `build` returns `spec` unchanged."""
        return bool(self._accepts) and isinstance(spec, self._accepts)

    def resolve(self, spec: object, path: str = "") -> tuple[Callable[..., Any], dict[str, Any]]:
        """Return the factory that a specification names and a copy of its keyword arguments, whose names are checked.

        Parameters
        ----------
        spec : mapping, str or registered class
        path : str
            Path of the specification in the configuration ("task.model"), for error messages.

        Raises
        ------
        ConfigError
            Unknown class, module path, key or keyword argument.
        """
        name, module, kwargs = self._split(spec, path)
        factory = name if callable(name) else self._find(name, module, path)
        check_arguments(factory, kwargs, _where(path) + _display(factory))
        return factory, kwargs

    def build(self, spec: object, *, path: str = "", **extra: object) -> Any:
        """Build the object that `spec` describes. Mappings of the caller are not modified.

        Parameters
        ----------
        spec : object, mapping or str
            An object of an accepted type is returned unchanged.
        path : str
            Path of the specification in the configuration, for error messages.
        **extra
            Default arguments. Names that the factory does not accept are ignored.

        Raises
        ------
        ConfigError
            Unknown class, module path, key or keyword argument; a missing required argument.
        """
        if self.is_instance(spec):
            return spec
        factory, kwargs = self.resolve(spec, path)
        accepted = parameters(factory)
        return self.create(factory, {**{k: v for k, v in extra.items() if k in accepted}, **kwargs}, path)

    @staticmethod
    def create(factory: Callable[..., Any], kwargs: Mapping[str, Any], path: str = "") -> Any:
        """Call a factory that `resolve` has returned.

        Raises
        ------
        ConfigError
            A required argument is missing.
        """
        accepted = parameters(factory)
        missing = [
            n
            for n, p in accepted.items()
            if p.default is p.empty and n not in kwargs and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if missing:
            raise ConfigError(
                f"{_where(path)}{_display(factory)} requires the argument(s) {missing}, got {list(kwargs)}. "
                "Remedy: add them to 'kwargs'."
            )
        return factory(**kwargs)

    def _split(self, spec: object, path: str) -> tuple[Any, str | None, dict[str, Any]]:
        if isinstance(spec, str):
            return spec.strip().rpartition(".")[2], spec.strip().rpartition(".")[0] or None, {}
        if isinstance(spec, type) and self._registered(spec):
            return spec, None, {}
        if not isinstance(spec, Mapping):
            raise ConfigError(
                f"{_where(path)}a {self.what} must be a {self.what} object, a name, or a mapping with the keys "
                f"{list(SPEC_KEYS)}; got {type(spec).__name__}: {shown(spec)}"
            )
        unknown = [k for k in spec if k not in SPEC_KEYS]
        if unknown:
            raise ConfigError(
                f"{_where(path)}unknown key {unknown[0]!r} in the description of a {self.what}; "
                f"allowed: {list(SPEC_KEYS)}." + suggest(unknown[0], SPEC_KEYS)
            )
        name, module = spec.get("class"), spec.get("module_path")
        if not (isinstance(name, str) and name) and not (isinstance(name, type) and self._registered(name)):
            raise ConfigError(
                f"{_where(path)}the description of a {self.what} requires the key 'class' with a class name; "
                f"got class={shown(name)}. Known: {self.names()}."
            )
        if isinstance(name, str) and "." in name:
            module, _, name = name.rpartition(".")
        kwargs = spec.get("kwargs")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ConfigError(f"{_where(path)}'kwargs' of {name} must be a mapping, got {shown(kwargs)}")
        return name, module, dict(kwargs or {})

    def _registered(self, factory: object) -> bool:
        return any(e.factory is factory for entries in self._entries.values() for e in entries)

    def _remedy(self) -> str:
        """How a class that is not registered can be used."""
        if self.base is None:
            return ""
        # Qlib's engine replaces the model by qfast's, so it has no further models.
        return f" {USER_CLASS_REMEDY}" + ("" if self.what == "model" else f" {QLIB_CLASS_REMEDY}")

    def _find(self, name: str, module: str | None, path: str) -> Callable[..., Any]:
        entries = self._entries.get(name, [])
        for entry in entries:
            if module is None or module in entry.modules:
                if entry.factory is None:
                    raise ConfigError(f"{_where(path)}{entry.unavailable}")
                return entry.factory
        find = _find_user_class.get()
        factory = None if find is None or self.base is None else find(self, name, module)
        if factory is not None:
            return factory
        if not entries:
            raise ConfigError(
                f"{_where(path)}unknown {self.what} class {name!r}; known: {self.names()}."
                + suggest(name, self.names())
                + self._remedy()
            )
        known = self.modules(name)
        raise ConfigError(
            f"{_where(path)}{self.what} {name!r} is not registered under the module path {module!r}; known: {known}."
            + suggest(module, known)
            + " Only registered classes are built; nothing is imported by name."
            + self._remedy()
        )


def parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a class or function by name, without self."""
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # builtins without a signature accept any arguments
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def all_parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Like `parameters`, but with the parameters of the base classes to which `**kwargs` of a class is passed on."""
    accepted = parameters(factory)
    if not isinstance(factory, type):
        return accepted
    for base in factory.__mro__[1:]:
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()) or base is object:
            break
        if "__init__" in vars(base):
            passed = {n: p for n, p in accepted.items() if p.kind is not p.VAR_KEYWORD}
            accepted = {**parameters(base), **passed}
    return accepted


def check_arguments(factory: Callable[..., Any], kwargs: Mapping[str, Any], what: str) -> None:
    """Check the names of keyword arguments against the signature of `factory`.

    Raises
    ------
    ConfigError
        `factory` has no such argument. The message shows `what`, the argument, the allowed names and the most similar
        one.
    """
    accepted = parameters(factory)
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return
    allowed = [n for n, p in accepted.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in kwargs:
        if name not in allowed:
            raise ConfigError(f"{what} has no argument {name!r}; allowed: {allowed}." + suggest(name, allowed))


def _display(factory: Callable[..., Any]) -> str:
    return getattr(factory, "__name__", str(factory))


def _where(path: str) -> str:
    return f"{path}: " if path else ""


PROCESSORS = Registry("processor")
HANDLERS = Registry("handler")
DATASETS = Registry("dataset")
MODELS = Registry("model")
RECORDS = Registry("record")
REWEIGHTERS = Registry("reweighter")
