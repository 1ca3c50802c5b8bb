"""Check a workflow file: its structure, its classes and their arguments.

One error reports all problems of a file, each with the path of its key and, for an unknown name, the most similar known
one. Classes are looked up in `qfast.registry`; nothing is imported by name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from qfast import registry
from qfast.dates import starts_after
from qfast.errors import ConfigError, nearest, shown, suggest
from qfast.workflow.schema import Spec, Workflow, as_list

__all__ = ["check_model", "check_workflow", "register_all"]

log = logging.getLogger("qfast")
PROCESSOR_LISTS = ("shared_processors", "infer_processors", "learn_processors")
NETWORK_ARGUMENTS = ("d_feat", "hidden_size", "num_layers")  # a base model has those of its model
PLAIN_TYPES = (int, float, str, bool, type(None))


def check_workflow(values: Mapping[str, Any], source: str = "configuration") -> Workflow:
    """Check plain data against the structure of a workflow and the signatures of the classes that it names.

    Parameters
    ----------
    values : mapping
        The `values` of `qfast.workflow.config.load_config`. Not modified.
    source : str
        Name of the file, for the error message.

    Returns
    -------
    Workflow
        Arguments have the types that their classes declare: the string "1e-3" becomes 0.001.

    Raises
    ------
    ConfigError
        One message with all problems, each with the path of its key.

    Examples
    --------
    >>> check_workflow({"taks": {}})
    Traceback (most recent call last):
    ...
    qfast.errors.ConfigError: configuration: 1 problem.
      task: is missing. Did you mean to write it instead of 'taks'?
    """
    problems: dict[str, str] = {}  # by path, because a key may fail several checks
    workflow: Workflow | None = None
    try:
        workflow = Workflow.model_validate(dict(values))
    except ValidationError as error:
        for item in error.errors():
            path, message = _explain(item, values)
            problems.setdefault(path, message)
    for path, message in (*_class_problems(values), *_pretrain_problems(values), *_origin_problems(values)):
        problems.setdefault(path, message)
    if workflow is not None:
        for path, message in _segment_problems(workflow):
            problems.setdefault(path, message)
    if workflow is None or problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"  {path}: {message}" for path, message in problems.items()]
        raise ConfigError("\n".join([f"{source}: {count}.", *lines]))
    _coerce(workflow)
    _log_ignored(workflow)
    return workflow


def check_model(spec: object) -> dict[str, Any]:
    """Check the description of a model alone and return its arguments with the types that its class declares.

    Raises
    ------
    ConfigError
        The model is unknown, or an argument is unknown or has another type.
    """
    register_all()
    problems = list(_class_problems({"task": {"model": spec}}))
    if problems or not isinstance(spec, Mapping):
        lines = [f"  {path}: {message}" for path, message in problems] or [
            f"  task.model: expected a mapping, got {shown(spec)}."
        ]
        raise ConfigError("\n".join(["the model cannot be built.", *lines]))
    return _coerced(_model_class(spec), spec.get("kwargs") or {})


def _explain(item: ErrorDetails, values: Mapping[str, Any]) -> tuple[str, str]:
    """Path and message of one pydantic error."""
    location = [part for part in item["loc"] if part != "class_"]
    path = ".".join(str(part) for part in location) or "the file"
    kind, value = item["type"], item["input"]
    if kind == "missing":
        parent = _item(values, location[:-1])
        similar = suggest(location[-1], parent) if isinstance(parent, dict) else ""
        hint = similar.replace("Did you mean", "Did you mean to write it instead of")
        return path, f"is missing.{hint}"
    if kind == "extra_forbidden":
        allowed = ["class", "module_path", "kwargs"]
        return path, f"unknown key; allowed here: {allowed}.{suggest(location[-1], allowed)}"
    if kind == "value_error":
        return path, f"{item['ctx']['error']}."
    if kind in ("model_type", "dict_type"):
        return path, f"expected a mapping, got {shown(value)}."
    text = item["msg"].replace("Input should be", "expected")
    return path, f"{text[:1].lower()}{text[1:]}, got {shown(value)}."


def _segment_problems(workflow: Workflow) -> Iterator[tuple[str, str]]:
    segments = workflow.task.dataset.kwargs.segments
    if "train" not in segments:
        similar = nearest("train", segments)
        hint = "" if similar is None else f" Rename {similar!r}."
        yield "task.dataset.kwargs.segments", f"there is no 'train', only {list(segments)}.{hint}"
    metric = workflow.task.model.kwargs.get("metric")
    if "valid" not in segments and isinstance(metric, str) and metric in ("ic", "rank_ic"):
        yield (
            "task.model.kwargs.metric",
            f"{metric!r} selects the epoch by the segment 'valid', but there are only {list(segments)}. Remedy: add "
            "the segment, or use the metric 'loss'.",
        )


def _objects(values: Mapping[str, Any]) -> Iterator[tuple[registry.Registry, Any, str]]:
    """Yield (registry, description, path) of every object in the file whose parents are well formed."""
    register_all()
    task = values.get("task")
    if not isinstance(task, Mapping):
        return
    for key, kind in (
        ("model", registry.MODELS),
        ("dataset", registry.DATASETS),
        ("reweighter", registry.REWEIGHTERS),
    ):
        if task.get(key) is not None:
            yield kind, task[key], f"task.{key}"
    handler = _item(task, ["dataset", "kwargs", "handler"])
    if handler is not None:
        path = "task.dataset.kwargs.handler"
        yield registry.HANDLERS, handler, path
        for name in PROCESSOR_LISTS:
            listed = _item(handler, ["kwargs", name])
            for position, spec in enumerate(listed if isinstance(listed, list) else []):
                yield registry.PROCESSORS, spec, f"{path}.kwargs.{name}.{position}"
    records = as_list(task.get("record"))
    for position, spec in enumerate(records if isinstance(records, list) else []):
        suffix = f".{position}" if isinstance(task.get("record"), list) else ""
        yield registry.RECORDS, spec, f"task.record{suffix}"


def register_all() -> None:
    """Fill the registries. This imports torch and every model, so it is done as late as possible."""
    import qfast.workflow.classes  # noqa: F401


def _class_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for kind, spec, path in _objects(values):
        if isinstance(spec, str):
            spec = {"class": spec}
        if not isinstance(spec, Mapping) or not isinstance(spec.get("class"), str):
            continue  # reported by the structure check
        bare = {key: spec[key] for key in ("class", "module_path") if isinstance(spec.get(key), str)}
        try:
            factory, _ = kind.resolve(bare)
        except ConfigError as error:
            yield f"{path}.class", str(error)
            try:  # check the arguments despite a wrong module path
                factory, _ = kind.resolve({"class": spec["class"]})
            except ConfigError:
                continue
        kwargs = spec.get("kwargs")
        if isinstance(kwargs, Mapping):
            problems = list(_argument_problems(factory, kwargs, f"{path}.kwargs"))
            yield from problems
            check = getattr(factory, "check_arguments", None)
            if check is not None and not problems:
                try:
                    check(_coerced(factory, kwargs))
                except ConfigError as error:
                    yield f"{path}.kwargs", str(error)


def _argument_names(factory: Callable[..., Any]) -> tuple[str, ...] | None:
    """Names of the arguments of a class, including the options of all estimators; None if it accepts any name."""
    accepted = registry.all_parameters(factory)
    named = tuple(n for n, p in accepted.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return named
    options = getattr(factory, "options", None)
    if options is None:
        return None
    internal = {"network", "extra"} - set(registry.parameters(factory))  # subclasses of Estimator set them
    return tuple(name for name in dict.fromkeys((*named, *options)) if name not in internal)


def _argument_problems(
    factory: Callable[..., Any], kwargs: Mapping[str, Any], path: str, without: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    checks = _argument_types(factory)
    allowed = _argument_names(factory)
    if allowed is not None:
        allowed = tuple(name for name in allowed if name not in without)
    for name, value in kwargs.items():
        if name in without:
            yield (
                f"{path}.{name}",
                f"the base has the value of the model, got {value!r}. Remedy: set task.model.kwargs.{name}.",
            )
        elif allowed is not None and name not in allowed:
            title = getattr(factory, "__name__", "it")
            hint = suggest(name, allowed)
            yield f"{path}.{name}", f"{title} has no argument {name!r}; allowed: {list(allowed)}.{hint}"
        elif name in checks and not _is_placeholder(value):
            problem = _type_problem(checks[name], value)
            if problem:
                yield f"{path}.{name}", problem


def _pretrain_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Problems of `task.pretrain`: a model without a base, an additional weight file, invalid arguments."""
    block, spec = _item(values, ["task", "pretrain"]), _item(values, ["task", "model"])
    factory = _model_class(spec)
    if not isinstance(block, Mapping) or factory is None:
        return
    title = getattr(factory, "__name__", "the model")
    if not hasattr(factory, "pretrain"):
        able = [name for name in registry.MODELS.names() if hasattr(_model_class({"class": name}), "pretrain")]
        yield "task.pretrain", f"{title} has no base model to pre-train, only {able} have. Remedy: remove the block."
        return
    file = _item(spec, ["kwargs", "model_path"])
    if file is not None:
        yield (
            "task.pretrain",
            f"cannot be combined with task.model.kwargs.model_path {file!r}: the base is either loaded or trained. "
            "Remedy: --set task.model.kwargs.model_path=null, or --set task.pretrain=false.",
        )
    base = _base_class(factory, spec)
    if base is not None:
        yield from _argument_problems(base, block, "task.pretrain", without=NETWORK_ARGUMENTS)


def _origin_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Problems of `task.init_from`: another source of initial weights."""
    origin = _item(values, ["task", "init_from"])
    others = {
        "task.pretrain": (_item(values, ["task", "pretrain"]), "false"),
        "task.model.kwargs.model_path": (_item(values, ["task", "model", "kwargs", "model_path"]), "null"),
    }
    for key, (value, none) in others.items():
        if origin is not None and value not in (None, False):
            yield (
                "task.init_from",
                f"{shown(origin)} cannot be combined with {key} {shown(value)}: the weights come from one of them. "
                f"Remedy: --set {key}={none}, or --set task.init_from=null.",
            )


def _model_class(spec: Any) -> Any:
    """The class that the description of a model names; None if it names no registered class."""
    try:
        bare = {"class": spec} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "kwargs"}
        return registry.MODELS.resolve(bare)[0]
    except (ConfigError, AttributeError):
        return None


def _base_class(factory: Any, spec: object) -> Any:
    """The estimator that `pretrain` of a model trains; None for an unknown `base_model`."""
    name = _item(spec, ["kwargs", "base_model"]) or registry.parameters(factory)["base_model"].default
    return factory.base_estimators.get(name) if isinstance(name, str) else None


def _type_problem(check: TypeAdapter[Any], value: object) -> str:
    try:
        check.validate_python(value)
    except ValidationError as error:
        text = error.errors()[0]["msg"].replace("Input should be", "expected")
        return f"{text[:1].lower()}{text[1:]}, got {shown(value)}."
    return ""


def _argument_types(factory: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """Type checks of the arguments that are numbers, strings, booleans, None, literals, or unions of them."""
    target = factory.__init__ if inspect.isclass(factory) else factory
    hints: dict[str, Any] = {}
    for name, annotation in getattr(target, "__annotations__", {}).items():
        one = types.SimpleNamespace(__annotations__={name: annotation})
        # Some annotations exist only for the type checker, and must not disable the checks of the other arguments.
        with contextlib.suppress(NameError, TypeError, AttributeError):
            hints |= typing.get_type_hints(one, getattr(target, "__globals__", None))
    unchecked = ("return", "GPU")  # as in Qlib, GPU has no effect next to an explicit device, whatever its value
    plain = {name: _without_functions(hint) for name, hint in hints.items() if name not in unchecked}
    return {name: TypeAdapter(hint) for name, hint in plain.items() if _is_plain(hint)}


def _without_functions(hint: Any) -> Any:
    """A union without its functions, which a file cannot contain."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    return functools.reduce(operator.or_, (p for p in typing.get_args(hint) if typing.get_origin(p) is not Callable))


def _is_plain(hint: object) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return True
    if origin in (typing.Union, types.UnionType):
        return all(_is_plain(part) for part in typing.get_args(hint))
    return hint in PLAIN_TYPES


def _coerce(workflow: Workflow) -> None:
    """Convert arguments to the types that their classes declare: the string "1e-3" becomes 0.001."""
    task = workflow.task
    handler = task.dataset.kwargs.handler
    _coerce_object(registry.DATASETS, task.dataset)
    _coerce_object(registry.HANDLERS, handler)
    for record in task.record:
        _coerce_object(registry.RECORDS, record)
    spec = task.model.model_dump(by_alias=True)
    factory = _model_class(spec)
    task.model.kwargs = _coerced(factory, task.model.kwargs)
    if isinstance(task.pretrain, dict):
        base = _base_class(factory, spec)
        task.pretrain = task.pretrain if base is None else _coerced(base, task.pretrain)


def _coerce_object(kind: registry.Registry, spec: Spec) -> None:
    factory, _ = kind.resolve(spec.model_dump(by_alias=True, include={"class_", "module_path"}))
    # Some arguments of a handler and of a dataset are fields of the schema and already have their types.
    kwargs = spec.kwargs if isinstance(spec.kwargs, dict) else spec.kwargs.model_extra or {}
    kwargs.update(_coerced(factory, kwargs))


def _coerced(factory: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    checks = _argument_types(factory)
    return {
        name: checks[name].validate_python(value) if name in checks and not _is_placeholder(value) else value
        for name, value in kwargs.items()
    }


def _is_placeholder(value: object) -> bool:
    return isinstance(value, str) and value.startswith("<")


def _log_ignored(workflow: Workflow) -> None:
    extra = workflow.model_extra or {}
    if extra.get("sys"):
        log.warning(
            "sys: %s is not added to the module search path: only registered classes are built, nothing is "
            "imported by name. Remedy for classes of your own: --allow-code PATH, or --engine qlib",
            extra["sys"],
        )
    ignored = sorted(workflow.qlib_init.model_extra or {})
    if ignored:
        log.info("qlib_init: %s have no effect in qfast and are ignored", ignored)
    train_end = workflow.task.dataset.kwargs.segments["train"][1]
    fit_end = workflow.task.dataset.kwargs.handler.kwargs.fit_end_time
    if train_end and fit_end and starts_after(fit_end, train_end):
        log.warning(
            "fit_end_time %s is after the end of the train segment %s: the processors are fitted on data that the "
            "model is evaluated on",
            fit_end,
            train_end,
        )


def _item(values: Any, path: Sequence[str | int]) -> Any:
    """The item at a path of plain data; None if there is none."""
    try:
        for key in path:
            values = values[key]
    except (KeyError, IndexError, TypeError):
        return None
    return values
