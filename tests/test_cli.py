"""The command line: its output on both streams and its exit status."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from qfast import cli
from qfast.errors import ConfigError
from qfast.training.callbacks import Progress
from qfast.workflow import run as run_module
from support.workflows import write_case


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(workflow file, data file, run folder made through the command line)."""
    base = tmp_path_factory.mktemp("cli")
    config, data = write_case(base)
    assert cli.main(["run", str(config), "--data", str(data), "-o", str(base / "run"), "--seed", "1", "-q"]) == 0
    return config, data, base / "run"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qfast ")


def test_no_arguments_give_help(capsys):
    cli.main([])
    shown = capsys.readouterr()
    for command in ("run", "predict", "demo", "doctor", "info"):
        assert command in shown.out + shown.err


def test_run_prints_the_metrics_and_the_report(case, tmp_path, capsys):
    config, data, _ = case
    status = cli.main(
        [
            "run",
            str(config),
            "--data",
            str(data),
            "--output",
            str(tmp_path / "r"),
            "--set",
            "task.model.kwargs.n_epochs=1",
            "--set",
            "task.model.kwargs.lr=1e-3",
            "--device",
            "cpu",
        ]
    )
    shown = capsys.readouterr()
    assert status == 0
    assert "Rank ICIR" in shown.out
    assert shown.out.strip().endswith(f"report: {tmp_path / 'r' / 'report.html'}")
    assert "epoch 0" in shown.err
    assert "lr: 0.001" in (tmp_path / "r" / "config.yaml").read_text()


def test_run_twice_into_one_folder(case, capsys):
    config, data, path = case
    assert cli.main(["run", str(config), "--data", str(data), "-o", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "exists and is not empty" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_predict_writes_scores(case, tmp_path, capsys, name):
    _, data, path = case
    out = tmp_path / name
    assert cli.main(["predict", str(path), "--data", str(data), "--start", "2020-03-10", "--out", str(out)]) == 0
    table = pd.read_csv(out) if name.endswith("csv") else pd.read_parquet(out)
    assert len(table) == 12
    assert "12 scores from 2020-03-10 to 2020-03-10" in capsys.readouterr().out


def test_predict_without_out_writes_into_the_run(case, capsys):
    _, data, path = case
    assert cli.main(["predict", str(path), "--data", str(data), "--start", "2020-03-09"]) == 0
    assert (path / "scores_20200309_20200310.parquet").exists()


def test_predict_refuses_a_strange_suffix(case, tmp_path, capsys):
    _, data, path = case
    assert cli.main(["predict", str(path), "--data", str(data), "--out", str(tmp_path / "x.xlsx")]) == 2
    assert "must be .parquet or .csv, got 'x.xlsx'" in capsys.readouterr().err


def test_info(case, capsys):
    assert cli.main(["info", str(case[2])]) == 0
    shown = capsys.readouterr().out
    for part in ("status     finished", "12 instruments", "PortAnaRecord", "Rank IC"):
        assert part in shown
    assert cli.main(["info", "no/such/run"]) == 2
    assert "run folder 'no/such/run' does not exist" in capsys.readouterr().err


def test_errors_are_one_message_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("QFAST_TRACEBACK", raising=False)
    assert cli.main(["run", str(tmp_path / "none.yaml")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("qfast: workflow file ")
    assert shown.out == ""
    monkeypatch.setenv("QFAST_TRACEBACK", "1")
    with pytest.raises(ConfigError, match=r"does not exist"):
        cli.main(["run", str(tmp_path / "none.yaml")])


def test_wrong_usage_is_status_2(capsys):
    assert cli.main(["run", "--no-such-option"]) == 2
    assert "No such option" in capsys.readouterr().err
    assert cli.main(["predict"]) == 2


@pytest.mark.parametrize("status", [0, 1])
def test_doctor_sets_the_exit_status(monkeypatch, status):
    from qfast import doctor

    monkeypatch.setattr(doctor, "main", lambda *, as_json: status)
    assert cli.main(["doctor"]) == status


def test_no_log_handler_remains(case, tmp_path):
    config, data, _ = case
    logger = logging.getLogger("qfast")
    before = list(logger.handlers), logger.level
    assert cli.main(["run", str(config), "--data", str(data), "-o", str(tmp_path / "run")]) == 0
    assert (list(logger.handlers), logger.level) == before


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run", interrupted)
    assert cli.main(["run", "x.yaml"]) == 130
    assert "qfast: interrupted." in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals of this kind are POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_leaves_a_folder_that_can_be_resumed(case, tmp_path, number):
    config, data, _ = case
    path = tmp_path / "run"
    command = [sys.executable, "-m", "qfast.cli", "run", str(config), "--data", str(data), "-o", str(path)]
    process = subprocess.Popen(
        [*command, "--set", "task.model.kwargs.n_epochs=100000", "--set", "task.model.kwargs.early_stop=100000"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # child processes of a shell's background job inherit an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (path / "last.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"qfast run --resume {path}" in err
    assert '"status": "interrupted"' in (path / "manifest.json").read_text()
    done = len(pd.read_csv(path / "history.csv"))
    assert cli.main(["run", "--resume", str(path), "--set", f"task.model.kwargs.n_epochs={done + 1}", "-q"]) == 0
    assert '"status": "finished"' in (path / "manifest.json").read_text()


class _SignalsWhenFinalized:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_during_a_finalizer_ends_the_run(case, tmp_path, capsys, monkeypatch, request):
    config, data, _ = case
    epochs = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores SIGINT
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def signal_in_finalizer(self, estimator) -> None:
        epochs.append(estimator.epoch_)
        _SignalsWhenFinalized()  # Python discards the exception of the handler

    monkeypatch.setattr(Progress, "on_epoch_end", signal_in_finalizer)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    sets = ["--set", "task.model.kwargs.n_epochs=50", "--set", "task.model.kwargs.early_stop=50"]
    assert cli.main(["run", str(config), "--data", str(data), "-o", str(tmp_path / "run"), *sets]) == 130
    assert epochs == [0]
    assert '"status": "interrupted"' in (tmp_path / "run" / "manifest.json").read_text()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_python_m_qfast_is_the_command() -> None:
    command = [sys.executable, "-m", "qfast"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert (version.returncode, version.stdout.split()[0]) == (0, "qfast")
    wrong = subprocess.run([*command, "runn"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "No such command 'runn'" in wrong.stderr


@pytest.mark.parametrize(("words", "expected"), [("qfast pre", "predict"), ("qfast predict --da", "--data")])
def test_completion_in_the_shell(words: str, expected: str) -> None:
    environment = {**os.environ, "_QFAST_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    command = [sys.executable, "-c", "from qfast.cli import main; main()"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert expected in result.stdout.split()
