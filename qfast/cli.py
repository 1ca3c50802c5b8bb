"""The command line: qfast run, check, predict, demo, info, doctor."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qfast.errors import ConfigError, QfastError

# Before torch loads OpenMP. By default its threads spin while they wait, and on a machine that does anything else
# they keep the core from the thread they wait for: an epoch of the demo was seen to take between 2 and 47 s. Waiting
# asleep costs a quarter on an idle machine. OMP_WAIT_POLICY=active brings the spinning back.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = ["app", "main"]

LOG_HANDLER = "qfast command line"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shell's custom

app = typer.Typer(
    name="qfast",
    help="Deep stock-forecasting models: train from a workflow file, score new prices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataOption = Annotated[
    Path | None,
    typer.Option(help="Prices: a CSV or Parquet file, a folder of CSV files, or a Qlib data folder."),
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one value: task.model.kwargs.n_epochs=5. May be given several times."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The run folder to make. Default: runs/<experiment>-<UTC time>."),
]
SeedOption = Annotated[int | None, typer.Option(help="Random seed; drawn and written down where none is given.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")]


def _version(asked: bool) -> None:
    if asked:
        from qfast.workflow.folder import versions

        found = versions()
        typer.echo(f"qfast {found['qfast']} (torch {found['torch']}, Python {found['python']})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command("run")
def run_command(
    config: Annotated[Path | None, typer.Argument(help="Workflow file in Qlib's YAML format.")] = None,
    data: DataOption = None,
    sets: SetOption = None,
    device: DeviceOption = None,
    output: OutputOption = None,
    seed: SeedOption = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with an unfinished run folder."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="qfast, or qlib: data, records and recorder are pyqlib's, the model is ours.")
    ] = "qfast",
    quiet: QuietOption = False,
) -> None:
    """Train the model of a workflow file; write scores, metrics, plots and a report into a run folder."""
    from qfast.workflow.run import run

    _log_to_stderr(quiet)
    if engine != "qfast":
        _run_in_qlib(engine, config, {"--data": data, "--output": output, "--resume": resume}, sets or (), device, seed)
        return
    result = run(config, data, sets or (), device, output, seed, resume)
    _print_result(result)


@app.command("check")
def check_command(
    config: Annotated[Path, typer.Argument(help="A workflow file in Qlib's format.")],
    data: DataOption = None,
    sets: SetOption = None,
    experiments: Annotated[
        bool, typer.Option(help="Also run the model: time of an epoch, look-ahead, window invariance.")
    ] = True,
    device: DeviceOption = "cpu",
) -> None:
    """Look a workflow and its data over before training; exit status 1 if something must be mended."""
    from qfast.workflow.check import check

    _log_to_stderr(quiet=True)
    report = check(config, data, sets or (), device=device, experiments=experiments)
    for line in report.lines():
        typer.echo(line)
    raise typer.Exit(0 if report.ok else 1)


@app.command("predict")
def predict_command(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    data: Annotated[Path, typer.Option(help="New prices; they need no label and may end today.")],
    start: Annotated[str | None, typer.Option(help="Score from this date on.")] = None,
    end: Annotated[str | None, typer.Option(help="Score up to this date.")] = None,
    date: Annotated[str | None, typer.Option(help="Score this date only; latest: the newest one of the data.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the scores go, .parquet or .csv. Default: scores_<first>_<last> in the run folder."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    quiet: QuietOption = False,
) -> None:
    """Score new prices with the weights and the fitted processors of a run."""
    from qfast.workflow.folder import RunFolder, check_table_target, write_frame
    from qfast.workflow.predict import predict

    _log_to_stderr(quiet)
    RunFolder.open(run_path)
    check_table_target(run_path / "scores.parquet" if out is None else out)
    scores = predict(run_path, data, start=start, end=end, date=date, device=device)
    dates = scores.index.get_level_values("datetime")
    if out is None:
        first, last = (stamp.strftime("%Y%m%d") for stamp in (dates.min(), dates.max()))
        out = run_path / f"scores_{first}_{last}.parquet"
    written = write_frame(out, scores.to_frame())
    newest = scores.xs(dates.max(), level="datetime").sort_values(ascending=False)
    typer.echo(f"{len(scores):,} scores from {dates.min():%Y-%m-%d} to {dates.max():%Y-%m-%d}: {written}")
    for note in scores.attrs["notes"]:
        typer.echo(f"warning: {note}")
    typer.echo(f"highest on {dates.max():%Y-%m-%d}: " + ", ".join(f"{k} {v:.4f}" for k, v in newest.iloc[:5].items()))


@app.command("export")
def export_command(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    out: Annotated[Path | None, typer.Option(help="Where they go. Default: artifacts in the run folder.")] = None,
) -> None:
    """Write a run's tables as the pickles that Qlib's recorder keeps: pred.pkl, report_normal_1day.pkl and so on."""
    from qfast.workflow.artifacts import export_artifacts

    typer.echo(export_artifacts(run_path, out))


@app.command("demo")
def demo_command(
    output: OutputOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """The whole job on a made-up market with a planted signal, in under two minutes."""
    from qfast.workflow.demo import demo

    _log_to_stderr(quiet)
    _print_result(demo(output=output, device=device, seed=seed))


@app.command("info")
def info_command(run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Print a run's status, data and metrics."""
    from qfast.workflow.info import run_info

    found = run_info(run_path)
    for name in ("experiment", "status", "error", "started", "ended", "device", "seed"):
        if found[name] is not None:
            typer.echo(f"{name:<11}{found[name]}")
    data = found["data"]
    if "rows" not in data:  # it ended before the data was read
        typer.echo(f"{'data':<11}{data.get('source')}")
    else:
        span = f"{data['instruments']} instruments, {data['first']} to {data['last']}"
        typer.echo(f"{'data':<11}{data['source']} ({span})")
    for name, text in found["pretraining"].items():
        typer.echo(f"{name.lower():<11}{text}")
    for note in found["notes"]:
        typer.echo(f"{'note':<11}{note}")
    if found["metrics"]:
        typer.echo(_metric_lines(found["metrics"]))
    if found["status"] != "finished":
        typer.echo(found["hint"])


@app.command("doctor")
def doctor_command() -> None:
    """Say what is installed, what serves each operator and why, and test it."""
    from qfast import doctor

    raise typer.Exit(doctor.main())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done. 2: wrong usage or an error that qfast names (QFAST_TRACEBACK=1 shows where it arose).
    130: interrupted; the message says how to go on.
    """
    with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there handles signals
        signal.signal(signal.SIGTERM, _terminated)
    try:
        returned = app(args=arguments, prog_name="qfast", standalone_mode=False)
    except QfastError as error:
        if os.environ.get("QFAST_TRACEBACK", "") not in ("", "0"):
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted.", EXIT_INTERRUPTED)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("click", "typer") and hasattr(error, "exit_code"):
            if hasattr(error, "show"):
                error.show()  # usage errors know how to print themselves
            return int(error.exit_code)
        if type(error).__name__ == "Abort":
            return _fail("interrupted.", EXIT_INTERRUPTED)
        raise
    finally:
        _stop_logging()  # main() may run several times in one process, with another stderr each
    status = returned if isinstance(returned, int) else 0
    return _fail("interrupted.", status) if status == EXIT_INTERRUPTED else status


def _fail(message: str, status: int = EXIT_ERROR) -> int:
    print(f"qfast: {message}", file=sys.stderr)
    return status


def _terminated(number: int, frame: Any) -> None:
    raise KeyboardInterrupt  # a kill leaves the run folder as an interrupt from the keyboard does


def _log_to_stderr(quiet: bool) -> None:
    logger = logging.getLogger("qfast")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    handler = logging.StreamHandler()
    handler.name = LOG_HANDLER
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)


def _stop_logging() -> None:
    logger = logging.getLogger("qfast")
    for handler in [h for h in logger.handlers if h.name == LOG_HANDLER]:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def _run_in_qlib(
    engine: str, config: Path | None, ours: Mapping[str, Any], sets: Sequence[str], device: str | None, seed: int | None
) -> None:
    from qfast.integrations.qlib import run

    given = [name for name, value in ours.items() if value is not None]
    if engine != "qlib":
        raise ConfigError(f"--engine must be qfast or qlib, got {engine!r}.")
    if config is None or given:
        raise ConfigError(f"--engine qlib needs a workflow file and takes no {', '.join(given) or '--resume'}.")
    result = run(config, sets, device=device, seed=seed)
    for name, value in result.metrics.items():
        typer.echo(f"{name:<50}{value:.6g}")
    typer.echo(f"recorder: {result.recorder.id} of experiment {result.recorder.experiment_id}")


def _print_result(result: Any) -> None:
    typer.echo(_metric_lines(result.metrics))
    typer.echo(f"report: {result.report}")


def _metric_lines(metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    columns = list(dict.fromkeys(name for row in metrics.values() for name in row))
    table = [["segment", *columns]]
    for segment, row in metrics.items():
        table.append([segment, *(_number(row.get(column)) for column in columns)])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table)


def _number(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
