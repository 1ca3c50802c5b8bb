"""The experiments of `qfast check`: does the past move with the future, do scores depend on what is asked for?

What expressions say of themselves is read first: how far they look ahead is known without any data. The experiments
are for the rest, processors, registered functions and the network. They are made on a sample of the
instruments, on the processed features, and on a network with its first weights, so no training is needed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from qfast import registry
from qfast.data.expression import Call, Node, Number, instruments, parse
from qfast.data.expression_functions import FUNCTIONS
from qfast.data.factors import depends_on_the_start
from qfast.data.handlers.prices import PriceHandler
from qfast.data.panel import Panel
from qfast.data.prices import Prices
from qfast.data.rows import restrict_rows, take_rows
from qfast.dates import date_text
from qfast.errors import QfastError, shown, some
from qfast.training.callbacks import Callback
from qfast.workflow.findings import CheckReport
from qfast.workflow.history import days_needed
from qfast.workflow.schema import Workflow

__all__ = ["experiment", "look_at_expressions", "rows_ahead", "scored"]

SAMPLE = 60  # instruments of the experiments, besides those that expressions name
TIMED_BATCHES = 6
CUTS = 4  # the future is changed after 1/4, 2/4 and 3/4 of the days scored
FEWEST_DAYS = 4
NEARBY = 20  # days scored on either side of a cut: a batch of a model that mixes days holds both sides
SAME = 1e-5  # scores of one row, asked for in two ways, differ by less, beside their spread
NEAR = 1e-3  # and by less, where rolling sums that began on another day were rounded another way
HOLES = 0.1  # share of a changed future's rows, cells and volumes that are missing, or 0
STAGES = ("shared", "infer")  # learn processors have no part in scores
OF_THE_SOURCE = ("instruments", "cache", "data", "provider_uri", "source")  # arguments of a handler


# ---------------------------------------------------------------- what expressions say of themselves
def look_at_expressions(report: CheckReport, handler: Any) -> None:
    """Features that look ahead by what they say: known without any data, and whatever the data hides."""
    if not isinstance(handler, PriceHandler):
        return
    texts = _expressions(handler)
    ahead = {name: rows for name, text in texts.items() if (rows := rows_ahead(parse(text))) > 0}
    if ahead:
        listed = some([f"{name} {rows} row(s), {shown(texts[name])}" for name, rows in ahead.items()], most=3)
        report.add(
            "error", "look-ahead",
            f"{len(ahead)} feature(s) look ahead: {listed}. Remedy: Ref(x, n) looks back for positive n; what lies "
            "ahead belongs into the label",
        )  # fmt: skip
    elif texts:
        report.add("ok", "look-ahead", f"none of the {len(texts)} expressions looks beyond its own day")
    elif handler.lookahead > 0:
        report.add(
            "error", "look-ahead",
            f"features of {type(handler).__name__} look {handler.lookahead} row(s) ahead, says its "
            "lookahead",
        )  # fmt: skip


def rows_ahead(node: Node) -> int:
    """How many rows after its own a node's value depends on; negative: all that it looks at lies before.

    `reach` says which rows must be read, also on the way; this is the sum of the shifts.

    >>> rows_ahead(parse("Count(Ref($close, -60), 1)"))
    60
    >>> rows_ahead(parse("Ref(Ref($close, -2) / Ref($close, -1) - 1, 3)"))  # the label of three days ago
    -1
    """
    if not isinstance(node, Call):
        return 0
    ahead = max((rows_ahead(part) for part in node.series if not isinstance(part, Number)), default=0)
    function = FUNCTIONS[node.function]
    if function.reach is not None:
        return ahead + function.reach(*node.settings)[1]
    if function.form == "shift":
        return ahead - int(node.settings[0])
    return max(ahead, ahead - int(node.settings[0])) if function.form == "delta" else ahead


def _expressions(handler: PriceHandler) -> dict[str, str]:
    """Feature name -> its expression; empty where features are made in another way."""
    return dict(zip(handler.feature_names, handler.feature_expressions, strict=False))


def _since_the_first_day(handler: PriceHandler) -> list[str]:
    """Features that depend on the first day of the data, however long ago it is."""
    return [name for name, text in _expressions(handler).items() if depends_on_the_start(text)]


# ---------------------------------------------------------------- all experiments
def experiment(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    """Time a few batches, change the future, ask for less; what breaks off is a finding.

    Parameters
    ----------
    report : CheckReport
        Findings are added to it.
    workflow : Workflow
    dataset : DatasetH
        The workflow's, with every segment holding rows.
    """
    with report.attempt("time"):
        _time_an_epoch(report, workflow, dataset)
    trial: _Trial | None = None
    with report.attempt("look-ahead"):
        source = _source(dataset.handler)
        if source is None:
            report.add("note", "look-ahead", "left out: the prices or factors were given up (drop_raw)")
        elif _taken_as(workflow) is None:
            named = type(dataset.handler).__name__
            report.add("note", "look-ahead", f"left out: {named} takes neither data nor source")
        else:
            trial = _Trial.of(workflow, dataset, source)
            _change_the_future(report, trial)
    with report.attempt("invariance"):
        _ask_for_less(report, workflow, dataset)
    with report.attempt("invariance"):
        if trial is not None and isinstance(dataset.handler, PriceHandler):
            _begin_later(report, trial)


def scored(dataset: Any) -> str:
    """The segment whose scores matter most, of those that are there."""
    return next((name for name in ("test", "valid") if name in dataset.segments), "train")


@dataclass
class _Trial:
    """A workflow's dataset over a sample of the instruments, to be built again over other prices or factors."""

    workflow: Workflow
    source: Panel
    dataset: Any
    model: Any

    @classmethod
    def of(cls, workflow: Workflow, dataset: Any, source: Panel) -> _Trial:
        names = [str(name) for name in dataset.handler.panel("infer").instruments]
        wanted = {name.lower() for name in [*names[:: -(-len(names) // SAMPLE)], *_named(dataset.handler)]}
        sample = restrict_rows(source, [n for n in source.instruments if str(n).lower() in wanted], None, None)
        return cls(workflow, sample, _rebuilt(workflow, sample), _with_first_weights(workflow))

    @property
    def size(self) -> str:
        return f"({len(self.dataset.handler.panel('infer').instruments)} instruments)"


def _named(handler: Any) -> list[str]:
    """Instruments that expressions name."""
    if not isinstance(handler, PriceHandler):
        return []
    return [name for text in (*handler.feature_expressions, *handler.label_expressions) for name in instruments(text)]


def _source(handler: Any) -> Panel | None:
    """What the handler's features are computed from: prices, or the user's own factors."""
    if not isinstance(handler, PriceHandler):
        return None if handler.drop_raw else handler.panel("raw")
    return None if handler.prices is None else _joined(handler.prices, handler.mask_prices)


def _joined(panel: Panel, others: Mapping[str, Prices]) -> Panel:
    """The panel with the prices of instruments outside the market, which are no samples (not live)."""
    parts = [panel, *(prices.panel for prices in others.values())]
    if len(parts) == 1:
        return panel
    frames = [part.to_frame("price", np.arange(part.n_rows)) for part in parts]
    table = pd.concat(frames)[list(panel.columns("price"))]
    table = table[table.index.get_level_values("datetime").isin(panel.datetimes)]
    found = Panel.from_frame(table, group="price")
    live = np.isin(found.instruments, panel.instruments)[found.instrument_codes]
    if panel.live is not None:
        live[live] = panel.live  # both stand by (instrument, datetime)
    return replace(found, live=live)


def _handler_parameters(workflow: Workflow) -> Mapping[str, Any]:
    bare = {key: value for key, value in workflow.task.dataset.kwargs.handler.given().items() if key != "kwargs"}
    return registry.parameters(registry.HANDLERS.resolve(bare)[0])


def _taken_as(workflow: Workflow) -> str | None:
    """The argument by which the handler's class is given prices or factors; None: it has none."""
    taken = _handler_parameters(workflow)
    return next((name for name in ("data", "source") if name in taken), None)


def _rebuilt(workflow: Workflow, source: Panel, segments: Any = None, **changes: Any) -> Any:
    """The workflow's dataset over other prices or factors, with other segments and arguments of the handler."""
    spec = workflow.task.dataset.given()
    handler_spec = spec["kwargs"].pop("handler")
    taken = _handler_parameters(workflow)
    own = {key: value for key, value in handler_spec.get("kwargs", {}).items() if key not in OF_THE_SOURCE}
    own |= {key: value for key, value in changes.items() if key in taken}
    own[str(_taken_as(workflow))] = source
    handler = registry.HANDLERS.build({**handler_spec, "kwargs": own}, path="task.dataset.kwargs.handler")
    kwargs = {**spec["kwargs"], "handler": handler} | ({} if segments is None else {"segments": segments})
    return registry.DATASETS.build({**spec, "kwargs": kwargs}, path="task.dataset")


def _build_model(workflow: Workflow, **changes: Any) -> Any:
    spec = workflow.task.model.given()
    return registry.MODELS.build({**spec, "kwargs": {**spec.get("kwargs", {}), **changes}}, path="task.model")


def _with_first_weights(workflow: Workflow) -> Any:
    model = _build_model(workflow, progress=False)
    model.fitted = True
    return model


# ---------------------------------------------------------------- time
class _EnoughError(Exception):
    """Ends a timed fit."""


class _Stopwatch(Callback):
    """Times the first batches of a fit and ends it."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_epoch_start(self, estimator: Any) -> None:
        self.moments.append(time.perf_counter())

    def on_batch_end(self, estimator: Any) -> None:
        self.moments.append(time.perf_counter())
        if len(self.moments) > TIMED_BATCHES:
            raise _EnoughError

    def on_epoch_end(self, estimator: Any) -> None:  # fewer batches than that
        raise _EnoughError

    @property
    def seconds(self) -> float:
        """Of a batch; the first one pays for memory and threads."""
        steps = np.diff(self.moments)
        return float(np.median(steps[1:] if len(steps) > 1 else steps))


def _time_an_epoch(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    panel = dataset.handler.panel("infer")
    n_bytes = sum(p.nbytes for p in _distinct([dataset.handler.panel("infer"), dataset.handler.panel("learn")]))
    report.add("note", "memory", f"features and labels take {n_bytes / 2**20:,.0f} MB and are held once")
    model, watch = _build_model(workflow, n_epochs=1, progress=False), _Stopwatch()
    try:
        model.fit(dataset, callbacks=[watch])
    except _EnoughError:
        pass
    except QfastError as error:
        report.add("error", "training", str(error))
        return
    rows = panel.rows_between(*dataset.segments["train"])
    batch_size = model.get_params().get("batch_size")
    n_days = len(np.unique(panel.date_codes[rows]))
    batches = n_days if batch_size is None else max(1, len(rows) // batch_size)  # None: each batch is one day
    epoch, epochs = watch.seconds * batches, workflow.task.model.kwargs.get("n_epochs", 200)
    report.add(
        "note", "time",
        f"a training pass takes about {_duration(epoch)} ({batches:,} batches of {watch.seconds * 1e3:,.0f} ms, "
        f"{model.device}); {epochs} epochs, with their evaluation, at most {_duration(1.5 * epoch * int(epochs))}",
    )  # fmt: skip


def _distinct(panels: Sequence[Panel]) -> Iterator[Any]:
    seen: set[int] = set()
    for panel in panels:
        for block in panel.blocks.values():
            if id(block.values) not in seen:
                seen.add(id(block.values))
                yield block.values


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- look-ahead
def _change_the_future(report: CheckReport, trial: _Trial) -> None:
    """What lies after some of the days scored is changed; features and scores up to them must not move."""
    dataset, model = trial.dataset, trial.model
    days = _days_to_cut_at(dataset)
    if len(days) < FEWEST_DAYS:
        report.add("note", "look-ahead", _why_no_cut(dataset))
        return
    places = [(len(days) - 1) * part // CUTS for part in range(1, CUTS)]
    cuts = [days[place] for place in places]
    features = _features(dataset, cuts[-1])
    moved: set[str] = set()
    before, after = [], []
    for number, (place, cut) in enumerate(zip(places, cuts, strict=True)):
        other = _rebuilt(trial.workflow, _with_another_future(trial.source, cut, number))
        past, now = _until(features, cut), _features(other, cut)
        moved |= {str(c) for c in features if not np.array_equal(past[c], now[c], equal_nan=True)}
        span = slice(days[max(0, place - NEARBY)], days[min(place + NEARBY, len(days) - 1)])
        before.append(_until(model.predict(dataset, span), cut))
        after.append(model.predict(other, span).reindex(before[-1].index))
    said = f"with all prices after {', '.join(map(date_text, cuts))} changed, holes made and filled {trial.size}"
    if moved:
        named = some([str(c) for c in features if str(c) in moved])
        report.add("error", "look-ahead", f"{said}, {len(moved)} feature(s) of earlier days move: {named}")
    else:
        report.add("ok", "look-ahead", f"{said}, no feature of that day or before moves by a bit")
    _say_difference(report, "look-ahead", said, pd.concat(before), pd.concat(after))


def _until(table: Any, cut: pd.Timestamp) -> Any:
    return table[table.index.get_level_values("datetime") <= cut]


def _features(dataset: Any, until: pd.Timestamp) -> pd.DataFrame:
    found: pd.DataFrame = dataset.handler.fetch(slice(None, until), col_set="feature", data_key="infer")
    return found


def _days_to_cut_at(dataset: Any) -> pd.DatetimeIndex:
    """Days scored. Where train alone is there, days that no processor learns from: what they learn may move."""
    days = _days(dataset)
    if scored(dataset) != "train":
        return days
    panel, first = dataset.handler.panel("infer"), _fitted_until(dataset.handler)
    every = np.unique(panel.date_codes[panel.live_rows()])
    later = panel.datetimes[every[every >= first]]
    trained = later[later.isin(days)]
    return trained if len(trained) >= FEWEST_DAYS else later


def _fitted_until(handler: Any) -> int:
    """Code of the first day that no processor of the scores is fitted on."""
    panel = handler.panel("infer")
    fitted = [p for stage in STAGES for p in getattr(handler, f"{stage}_processors") if hasattr(p, "fit_end_time")]
    return max((int(panel.date_code_range(None, p.fit_end_time)[1]) for p in fitted), default=0)


def _why_no_cut(dataset: Any) -> str:
    name, last = scored(dataset), _fitted_until(dataset.handler)
    if name != "train" or not last:
        return f"{name} has fewer than {FEWEST_DAYS} days, too few for the experiment"
    return (
        f"left out: processors are fitted up to {date_text(dataset.handler.panel('infer').datetimes[last - 1])}, the "
        "data's last days, so a changed future changes what they learn. Remedy: a segment valid or test"
    )


def _with_another_future(panel: Panel, cut: pd.Timestamp, seed: int) -> Panel:
    """Other numbers after `cut`, and others of them missing, known and zero: what is missing tells something too."""
    rng = np.random.default_rng(seed)
    later = np.flatnonzero(np.asarray(panel.datetimes > cut)[panel.date_codes])
    absent = rng.random(len(later)) < HOLES
    blocks = {}
    for group, block in panel.blocks.items():
        values = block.values.copy()
        for place, name in enumerate(block.columns):
            column = values[later, place].astype(np.float64)
            known = column[np.isfinite(column)]
            filled = ~np.isfinite(column) & (rng.random(len(later)) < 0.5)
            if len(known):
                column[filled] = rng.choice(known, int(filled.sum()))
            column = column * np.exp(0.3 * rng.standard_normal(len(later))) + 0.01
            if str(name).lower() == "volume":
                column[rng.random(len(later)) < HOLES] = 0.0
            column[absent | (rng.random(len(later)) < HOLES / 2)] = np.nan
            values[later, place] = column
        blocks[group] = replace(block, values=values)
    return replace(panel, blocks=blocks)


# ---------------------------------------------------------------- invariance
def _ask_for_less(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    """Scores of the second half of a segment, asked for with the first half and without."""
    name = scored(dataset)
    days = _days(dataset)
    middle = days[len(days) // 2]
    model = _with_first_weights(workflow)
    whole, part = model.predict(dataset, name), model.predict(dataset, slice(middle, dataset.segments[name][1]))
    said = f"asked for from {date_text(middle)} on and with what lies before"
    _say_difference(report, "invariance", said, whole.loc[part.index], part)


def _begin_later(report: CheckReport, trial: _Trial) -> None:
    """Scores from prices that begin as late as the lookback of the features allows, processors as they are."""
    handler = trial.dataset.handler
    endless = _since_the_first_day(handler)
    if endless:
        report.add(
            "note", "invariance",
            f"{len(endless)} feature(s) depend on the first day of the data: {some(endless, most=3)} (EMA, windows of "
            "all rows so far); scores from prices of another start, or with another start_time, differ",
        )  # fmt: skip
        return
    days = _days(trial.dataset)
    place = len(days) // 2
    segment = slice(days[place], days[min(place + 2 * NEARBY, len(days) - 1)])
    first = int(trial.source.datetimes.searchsorted(segment.start)) + 1 - days_needed(trial.dataset)
    if first <= 0:
        return  # they begin so late as it is
    start = trial.source.datetimes[first]
    shorter = _rebuilt(
        trial.workflow, _from_day(trial.source, first, _named(handler)), {"later": (segment.start, segment.stop)},
        learn_processors=[], **{f"{stage}_processors": _frozen(handler, stage) for stage in STAGES},
    )  # fmt: skip
    whole, part = trial.model.predict(trial.dataset, segment), trial.model.predict(shorter, "later")
    said = f"asked for from {date_text(segment.start)} on, with prices from {date_text(start)} on {trial.size}"
    _say_difference(report, "invariance", said, whole, part.reindex(whole.index), NEAR, "warning")


def _from_day(panel: Panel, first: int, named: Sequence[str]) -> Panel:
    """Rows from date code `first` on, and all rows of `named` instruments that end before: expressions need them."""
    last = np.zeros(len(panel.instruments), dtype=np.int64)
    np.maximum.at(last, panel.instrument_codes, panel.date_codes)
    lower = [str(name).lower() for name in panel.instruments]
    ended = (last < first) & np.isin(lower, [name.lower() for name in named])
    return take_rows(panel, np.flatnonzero((panel.date_codes >= first) | ended[panel.instrument_codes]))


def _frozen(handler: Any, stage: str) -> list[Any]:
    """Copies of fitted processors that are not fitted again."""
    found = [copy.deepcopy(processor) for processor in getattr(handler, f"{stage}_processors")]
    for processor in found:
        processor.frozen = True
    return found


def _days(dataset: Any) -> pd.DatetimeIndex:
    """Days of what is scored."""
    panel = dataset.handler.panel("infer")
    codes = np.unique(panel.date_codes[panel.rows_between(*dataset.segments[scored(dataset)])])
    return panel.datetimes[codes]


def _say_difference(
    report: CheckReport,
    topic: str,
    said: str,
    one: pd.Series,
    other: pd.Series,
    same: float = SAME,
    level: str = "error",
) -> None:
    first, second = one.to_numpy(dtype=float), other.to_numpy(dtype=float)
    known = first[np.isfinite(first)]
    spread = float(np.std(known)) if len(known) else 0.0
    unlike = ~(np.abs(first - second) <= same * (spread or 1.0)) & ~(np.isnan(first) & np.isnan(second))
    if not unlike.any():
        report.add("ok", topic, f"{said}, all {len(one):,} scores are the same")
        return
    day, who = one.index[int(np.argmax(unlike))]
    report.add(
        level, topic, f"{said}, {int(unlike.sum()):,} of {len(one):,} scores differ, first {who} on {date_text(day)}"
    )
