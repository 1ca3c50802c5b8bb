"""The command line: qfast run, study, runs, new, check, predict, export, demo, bench, info, doctor."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qfast.cli_options import (
    EngineOption,
    EnsembleOption,
    ExpandingOption,
    GpusOption,
    GridOption,
    JobsOption,
    LabelDaysOption,
    ResumeStudyOption,
    RollingOption,
    SearchOption,
    SeedsOption,
    StudyOutputOption,
    ThreadsOption,
    TrialsOption,
    WarmStartOption,
    with_read_options,
)
from qfast.errors import ConfigError, QfastError, suggest
from qfast.interrupts import raised_as_keyboard_interrupt
from qfast.read_options import ReadOptions, command_line

if TYPE_CHECKING:
    from qfast.studies.study import StudyResult
    from qfast.workflow.run import RunResult

# This must be set before torch loads OpenMP. By default, waiting OpenMP threads spin. On a machine with other work they
# then occupy the core of the thread that they wait for: an epoch of the demo took between 2 and 47 s. Sleeping threads
# make an idle machine 25% slower. Set OMP_WAIT_POLICY=active to restore spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = ["app", "main"]

LOG_HANDLER = "qfast command line"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in the shell

app = typer.Typer(
    name="qfast",
    help="Train deep stock-forecasting models from workflow files, and score new prices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataOption = Annotated[
    Path | None,
    typer.Option(
        help="Prices: a CSV or Parquet file, a folder of such files, or a Qlib data folder. "
        "Default: the provider_uri of the workflow file."
    ),
]
DEVICE_HELP = "auto, cpu, cuda or cuda:N. auto uses a GPU if torch detects one."
DeviceOption = Annotated[str | None, typer.Option(help=f"{DEVICE_HELP} Default: the device of the workflow file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change one value of the workflow file, for example task.model.kwargs.n_epochs=5. Repeatable."
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Run folder to create. Default: runs/<experiment>-<UTC time>."),
]
SeedOption = Annotated[
    int | None,
    typer.Option(help="Random seed. Default: the seed of the workflow file, or a random one, which is recorded."),
]
CodeOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--allow-code",
        help="Python file or folder from which the workflow file may name classes. Repeatable. Without it, no code is "
        "imported.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings and errors only.")]


def _version(requested: bool) -> None:
    if requested:
        from qfast.workflow.folder import versions

        installed = versions()
        typer.echo(f"qfast {installed['qfast']} (torch {installed['torch']}, Python {installed['python']})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("run")
@with_read_options
def run_command(
    config: Annotated[
        Path | None, typer.Argument(help="Workflow file in Qlib's YAML format. Optional with --resume.")
    ] = None,
    data: DataOption = None,
    sets: SetOption = None,
    device: DeviceOption = None,
    output: OutputOption = None,
    seed: SeedOption = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue an interrupted or failed run in its folder, after its last complete epoch."),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Start the training from the weights of this run, or of a weight file (fine-tuning)."
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="qfast, or qlib to run the file in pyqlib, with its data, records and recorder and qfast's model."
        ),
    ] = "qfast",
    allow_code: CodeOption = None,
    quiet: QuietOption = False,
    *,
    read_options: ReadOptions,
) -> None:
    """Train the model of a workflow file. Write weights, scores, metrics, plots and a report to a run folder.

    Several processes share the work: torchrun --nproc-per-node 2 -m qfast run FILE --data DATA.
    """
    from qfast.workflow.run import run
    from qfast.workflow.torchrun import is_launched

    _log_to_stderr(quiet)
    if engine != "qfast":
        unsupported: dict[str, object] = {"--data": data, "--output": output, "--resume": resume}
        unsupported |= {"--init-from": init_from, "--allow-code": allow_code or None}
        unsupported |= {command_line(name): value for name, value in read_options.recorded().items()}
        _run_in_qlib(engine, config, unsupported, sets or (), device, seed)
        return
    result = run(
        *(config, data, sets or (), device, output, seed, resume),
        allow_code=allow_code,
        read_options=read_options,
        init_from=init_from,
    )
    if not is_launched() or os.environ["RANK"] == "0":
        _print_result(result)


@app.command("study")
@with_read_options
def study_command(
    config: Annotated[
        Path | None, typer.Argument(help="Workflow file in Qlib's YAML format. Optional with --resume.")
    ] = None,
    data: DataOption = None,
    sets: SetOption = None,
    device: DeviceOption = None,
    output: StudyOutputOption = None,
    seeds: SeedsOption = None,
    grid: GridOption = None,
    search: SearchOption = None,
    trials: TrialsOption = None,
    rolling: RollingOption = None,
    expanding: ExpandingOption = False,
    warm_start: WarmStartOption = False,
    label_days: LabelDaysOption = None,
    ensemble: EnsembleOption = None,
    jobs: JobsOption = None,
    threads: ThreadsOption = 1,
    on: EngineOption = "local",
    gpus: GpusOption = None,
    resume: ResumeStudyOption = None,
    allow_code: CodeOption = None,
    quiet: QuietOption = False,
    *,
    read_options: ReadOptions,
) -> None:
    """Run a workflow file many times: seeds, a grid, a search, rolling windows. The exit status is 1 if a run fails."""
    from qfast.studies.study import study

    _log_to_stderr(quiet)
    result = study(
        *(config, data, sets or (), device, output),
        seeds=seeds,
        grid=grid or (),
        search=search,
        trials=trials,
        rolling=rolling,
        expanding=expanding,
        warm_start=warm_start,
        label_days=label_days,
        ensemble=ensemble,
        jobs=jobs,
        threads=threads,
        on=on,
        gpus=gpus,
        resume=resume,
        allow_code=allow_code,
        read_options=read_options,
        quiet=quiet,
    )
    _print_study(result)
    raise typer.Exit(1 if result.failed else 0)


@app.command("runs")
def runs_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that contains runs, or a study folder.")],
    sort: Annotated[str | None, typer.Option(help="Column to sort by, highest first. Default: the start time.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Print all columns.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write all columns to this file, .csv or .parquet.")] = None,
) -> None:
    """Compare the runs below a folder: differences in configuration, scores and times. Broken runs are one row."""
    from qfast.studies.compare import compare_runs, table_lines
    from qfast.workflow.folder import check_table_target, write_frame

    if out is not None:
        check_table_target(out)
    table = compare_runs(folder)
    if sort is not None:
        if sort not in table:
            raise ConfigError(f"--sort {sort!r} is not a column; columns: {list(table)}.{suggest(sort, table)}")
        table = table.sort_values(sort, ascending=False, kind="stable")
    for line in table_lines(table, every=every):
        typer.echo(line)
    if out is not None:
        typer.echo(f"table: {write_frame(out, table)}")


@app.command("new")
@with_read_options
def new_command(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Prices, in any form that run --data accepts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Workflow file to write.")] = Path("workflow.yaml"),
    model: Annotated[str, typer.Option(help="Class of the model, for example GATs.")] = "LSTM",
    *,
    read_options: ReadOptions,
) -> None:
    """Inspect a table of prices and write a commented workflow file for it."""
    from qfast.workflow.new_workflow import new_workflow

    _log_to_stderr(quiet=False)
    file = new_workflow(table, output, model=model, read_options=read_options)
    typer.echo(f"{file}\nnext: qfast check {file}; qfast run {file}")


@app.command("check")
@with_read_options
def check_command(
    config: Annotated[Path, typer.Argument(help="Workflow file in Qlib's YAML format.")],
    data: DataOption = None,
    sets: SetOption = None,
    experiments: Annotated[
        bool,
        typer.Option(
            help="Also run the untrained model: time of an epoch, look-ahead, dependence on the requested dates."
        ),
    ] = True,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    allow_code: CodeOption = None,
    *,
    read_options: ReadOptions,
) -> None:
    """Look for problems in a workflow and its data before training. The exit status is 1 if there is an error."""
    from qfast.workflow.check import check

    _log_to_stderr(quiet=True)
    report = check(
        config,
        data,
        sets or (),
        device=device,
        experiments=experiments,
        allow_code=allow_code,
        read_options=read_options,
    )
    for line in report.lines():
        typer.echo(line)
    raise typer.Exit(0 if report.ok else 1)


@app.command("predict")
@with_read_options
def predict_command(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="New prices, in the format of the training data. Labels are not needed. Default: the data of the run."
        ),
    ] = None,
    start: Annotated[str | None, typer.Option(help="First date to score.")] = None,
    end: Annotated[str | None, typer.Option(help="Last date to score.")] = None,
    date: Annotated[
        str | None, typer.Option(help="The only date to score. latest: the last date for which the data has values.")
    ] = None,
    instruments: Annotated[
        str | None,
        typer.Option(
            help="all, the name of a market, or codes separated by commas. Default: the instruments of the workflow, "
            "which for a market are its members on each day."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights that replace those of the run, for example trained in Python.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output file, .parquet or .csv. Default: scores_<first>_<last>.parquet in the run folder."),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    allow_code: CodeOption = None,
    quiet: QuietOption = False,
    *,
    read_options: ReadOptions,
) -> None:
    """Score new prices with the weights and the fitted processors of a run."""
    from qfast.workflow.folder import RunFolder, check_table_target, write_frame
    from qfast.workflow.predict import predict

    _log_to_stderr(quiet)
    RunFolder.open(run_path)
    check_table_target(run_path / "scores.parquet" if out is None else out)
    scores = predict(
        run_path,
        data,
        start=start,
        end=end,
        date=date,
        instruments=_instruments(instruments),
        device=device,
        allow_code=allow_code,
        read_options=read_options,
        weights=weights,
    )
    dates = scores.index.get_level_values("datetime")
    written = write_frame(
        out or run_path / f"scores_{dates.min():%Y%m%d}_{dates.max():%Y%m%d}.parquet", scores.to_frame()
    )
    newest = scores.xs(dates.max(), level="datetime").sort_values(ascending=False)
    typer.echo(f"{len(scores):,} scores from {dates.min():%Y-%m-%d} to {dates.max():%Y-%m-%d}: {written}")
    for note in scores.attrs["notes"]:
        typer.echo(f"warning: {note}")
    typer.echo(f"highest on {dates.max():%Y-%m-%d}: " + ", ".join(f"{k} {v:.4f}" for k, v in newest.iloc[:5].items()))


@app.command("export")
def export_command(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: artifacts in the run folder.")] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Write the network to this ONNX file instead, for scoring without torch.")
    ] = None,
    allow_code: CodeOption = None,
) -> None:
    """Write the tables of a run as the pickles of Qlib's recorder: pred.pkl, report_normal_1day.pkl and so on."""
    if onnx is None:
        from qfast.workflow.artifacts import export_artifacts

        typer.echo(export_artifacts(run_path, out))
        return
    if out is not None:
        raise ConfigError(f"--out {out} is for the tables, which --onnx does not write. Remedy: omit one of them.")
    from qfast.workflow.onnx_export import export_onnx

    typer.echo(export_onnx(run_path, onnx, allow_code=allow_code))


@app.command("demo")
def demo_command(
    output: OutputOption = None,
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    quiet: QuietOption = False,
) -> None:
    """Train, score and report on a synthetic market with a planted signal. Takes less than two minutes."""
    from qfast.workflow.demo import demo

    _log_to_stderr(quiet)
    _print_result(demo(output=output, device=device, seed=seed))


@app.command("bench")
@with_read_options
def bench_command(
    config: Annotated[
        Path | None,
        typer.Argument(help="Workflow file, whose model is timed. Default: all models with Qlib's Alpha158 settings."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Prices, as for run. Default: the data of the workflow, or a synthetic market."),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Models to time, separated by commas, for example LSTM,GATs.")
    ] = None,
    sets: SetOption = None,
    minutes: Annotated[float, typer.Option(help="Time to plan for all models, without reading the data.")] = 3.0,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the last column of the table. Default: all cores. 1: none.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Precision of qfast's products: float32, bf16 or bf16-if-available. Default: float32."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="JSON file; the picture is written next to it. Default: bench-<UTC time>.json."
        ),
    ] = None,
    allow_code: CodeOption = None,
    *,
    read_options: ReadOptions,
) -> None:
    """Time an epoch of every model on this machine, compared with Qlib if it is installed and with torch otherwise."""
    from qfast.benchmarks.bench import bench

    _log_to_stderr(quiet=True)
    result = bench(
        *(config, data, None if models is None else models.split(",")),
        sets=sets or (),
        minutes=minutes,
        threads=threads,
        precision=precision,
        output=output,
        allow_code=allow_code,
        read_options=read_options,
        notify=lambda line: typer.echo(line, err=True),
    )
    for line in result.lines():
        typer.echo(line)
    typer.echo(f"figures: {result.json}\npicture: {result.png}")


@app.command("info")
def info_command(run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Print the status, the data and the metrics of a run."""
    from qfast.workflow.info import run_info

    info = run_info(run_path)
    for name in ("experiment", "status", "error", "started", "ended", "device", "seed"):
        if info[name] is not None:
            typer.echo(f"{name:<11}{info[name]}")
    data = info["data"]
    if "rows" not in data:  # the run ended before the data was loaded
        typer.echo(f"{'data':<11}{data.get('source')}")
    else:
        span = f"{data['instruments']} instruments, {data['first']} to {data['last']}"
        typer.echo(f"{'data':<11}{data['source']} ({span})")
    for name, text in info["pretraining"].items():
        typer.echo(f"{name.lower():<11}{text}")
    if info["code"]:
        typer.echo(f"{'code':<11}predict and resume need {info['code']}")
    for note in info["notes"]:
        typer.echo(f"{'note':<11}{note}")
    if info["metrics"]:
        typer.echo(_metric_lines(info["metrics"]))
    if info["status"] != "finished":
        typer.echo(info["hint"])


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show versions and build facts, list the implementation that each operator uses, and run a self-test."""
    from qfast import doctor

    raise typer.Exit(doctor.main(as_json=as_json))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Parameters
    ----------
    arguments : list of str, optional
        Default: `sys.argv[1:]`.

    Returns
    -------
    int
        0: success. 1: `qfast check` or `qfast doctor` reports an error. 2: wrong usage or a `QfastError`; set
        QFAST_TRACEBACK=1 to see its traceback. 130: interrupted; the log says how to resume.
    """
    with raised_as_keyboard_interrupt():
        return _run_command(arguments)


def _run_command(arguments: list[str] | None) -> int:
    try:
        returned = app(args=arguments, prog_name="qfast", standalone_mode=False)
    except QfastError as error:
        if os.environ.get("QFAST_TRACEBACK", "") not in ("", "0"):
            raise
        return _fail(str(error))
    except (OSError, MemoryError, RecursionError) as error:
        if os.environ.get("QFAST_TRACEBACK", "") not in ("", "0"):
            raise
        return _fail(_environment_problem(error))
    except KeyboardInterrupt:
        return _fail("interrupted.", EXIT_INTERRUPTED)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("click", "typer") and hasattr(error, "exit_code"):
            if hasattr(error, "show"):
                error.show()
            return int(error.exit_code)
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which this module does not import
            return _fail(_environment_problem(error))
        if type(error).__name__ == "Abort":
            return _fail("interrupted.", EXIT_INTERRUPTED)
        raise
    finally:
        _stop_logging()  # main() may run several times in one process, each time with another stderr
    status = returned if isinstance(returned, int) else 0
    return _fail("interrupted.", status) if status == EXIT_INTERRUPTED else status


def _environment_problem(error: BaseException) -> str:
    """One line for an error of the machine: a file that cannot be accessed, or insufficient memory."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f" {str(error.filename)!r}"
        return f"cannot access{where}: {error.strerror}. Remedy: check the path, the permissions and the disk."
    if isinstance(error, RecursionError):
        return f"the input is nested too deeply: {error}. Remedy: a flatter file."
    return f"insufficient memory: {error or 'no details'}. Remedy: less data, a smaller batch, or more memory."


def _fail(message: str, status: int = EXIT_ERROR) -> int:
    print(f"qfast: {message}", file=sys.stderr)
    return status


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


def _instruments(text: str | None) -> str | list[str] | None:
    """The codes of a list "A,B", or the name of a market."""
    return text if text is None or "," not in text else [code.strip() for code in text.split(",") if code.strip()]


def _run_in_qlib(
    engine: str,
    config: Path | None,
    unsupported: Mapping[str, object],
    sets: Sequence[str],
    device: str | None,
    seed: int | None,
) -> None:
    from qfast.integrations.qlib import run

    if engine != "qlib":
        raise ConfigError(f"--engine must be qfast or qlib, got {engine!r}.")
    options = [name for name, value in unsupported.items() if value is not None]
    if options:
        raise ConfigError(f"--engine qlib does not support {', '.join(options)}.")
    if config is None:
        raise ConfigError("--engine qlib needs a workflow file.")
    result = run(config, sets, device=device, seed=seed)
    for name, value in result.metrics.items():
        typer.echo(f"{name:<50}{value:.6g}")
    typer.echo(f"recorder: {result.recorder.id} of experiment {result.recorder.experiment_id}")


def _print_result(result: RunResult) -> None:
    typer.echo(_metric_lines(result.metrics))
    typer.echo(f"report: {result.report}")


def _print_study(result: StudyResult) -> None:
    for name, row in result.summary.iterrows():
        cells = [f"{key} {row[key]:.4f}±{row[f'{key} std']:.4f}" for key in ("IC", "ICIR", "Rank IC", "Rank ICIR")]
        typer.echo(f"{name} ({row['runs']:.0f} runs): {', '.join(cells)}")
    if result.best:
        typer.echo("best trial: " + ", ".join(f"{key}={value}" for key, value in result.best.items()))
    reasons = result.table.loc[~result.table["status"].isin(["finished", "pruned"]), ["run", "reason"]]
    for run, reason in reasons.itertuples(index=False):
        typer.echo(f"run {run:03d} failed: {reason}")
    typer.echo(f"table: {result.path / 'table.csv'}")
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
