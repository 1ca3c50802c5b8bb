"""Permissions, stale temporary files, folders of killed runs, and the trust in cached factors."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from qfast.cli import main
from qfast.data import load_prices, synthetic
from qfast.data.factor_cache import FactorCache
from qfast.data.trusted_folder import require_trusted
from qfast.errors import ConfigError, DataError
from qfast.files import LOCK, STALE_SECONDS, atomic_write, locked
from qfast.models import GRU
from qfast.studies.folder import StudyFolder
from qfast.workflow import folder as folders
from qfast.workflow.folder import RunFolder
from qfast.workflow.run import run
from support.workflows import write_case

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Sets the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# ---------------------------------------------------------------- files
@posix
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_every_file_follows_the_umask(tmp_path: Path, umask, mask: int) -> None:
    umask(mask)
    for name in ("w.safetensors", "w.pkl"):
        GRU(d_feat=3, hidden_size=4, seed=0).save_weights(tmp_path / name)
        assert mode(tmp_path / name) == 0o666 & ~mask


def test_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "a[1].json"
    names = ("a[1].json", "b.json", "a[1].json")
    stale, other, recent = (tmp_path / f".{name}.{number:016x}.tmp" for number, name in enumerate(names))
    for file in (stale, other, recent):
        file.write_text("half")
    long_ago = time.time() - STALE_SECONDS - 5
    for file in (stale, other):
        os.utime(file, (long_ago, long_ago))
    atomic_write(target, lambda file: file.write_text("whole"))
    assert {file.name for file in tmp_path.iterdir()} == {target.name, other.name, recent.name}


# ---------------------------------------------------------------- folders of killed runs
@pytest.mark.parametrize(
    "existing", [[".new"], [".new", ".reserve"], [".reserve"], [".new", ".reserve", "config.yaml"]]
)
def test_a_run_that_was_killed_early_can_be_started_again(tmp_path: Path, existing: list[str]) -> None:
    path = tmp_path / "run"
    path.mkdir()
    for name in [*existing, LOCK, ".manifest.json.0123456789abcdef.tmp"]:
        (path / name).write_text("")
    with pytest.raises(
        ConfigError, match=r"was killed before its manifest.json was written.*start it again with --out"
    ):
        RunFolder.open(path)
    folder = RunFolder.create(path, "x", "task: {}\n", seed=1)
    assert {file.name for file in path.iterdir()} == {"manifest.json", "config.yaml", ".reserve"}
    assert folder.manifest["seed"] == 1


def test_a_kill_at_any_moment_of_the_creation_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process runs no cleanup, so the removal of files is disabled."""
    calls = []

    def dies(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == count:
            raise SystemExit("killed")
        real(*arguments)

    real = folders.atomic_write
    for count in (1, 2):
        calls.clear()
        path = tmp_path / f"run{count}"
        with monkeypatch.context() as patch:
            patch.setattr(folders, "atomic_write", dies)
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises(SystemExit):
                RunFolder.create(path, "x", "task: {}\n")
        assert any(path.iterdir())
        RunFolder.create(path, "x", "task: {}\n")
        assert (path / "manifest.json").is_file()


@pytest.mark.parametrize("names", [["config.yaml"], [".reserve", "notes.txt"], [".new", "manifest.json"]])
def test_other_files_are_never_removed(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"exists and is not empty"):
        RunFolder.create(tmp_path, "x", "task: {}\n")
    assert {file.name for file in tmp_path.iterdir()} == set(names)


def test_a_folder_in_creation_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".new").touch()
    with locked(tmp_path), pytest.raises(ConfigError, match=r"another process is creating a run there"):
        RunFolder.create(tmp_path, "x", "task: {}\n")
    assert (tmp_path / ".new").exists()


def test_a_study_that_was_killed_early_can_be_started_again(tmp_path: Path) -> None:
    for name in (".new", "workflow.yaml"):
        (tmp_path / name).write_text("")
    StudyFolder.begin(tmp_path, {"experiment_name": "x"}, data={}, axes={})
    assert {file.name for file in tmp_path.iterdir()} == {"study.json", "workflow.yaml"}


@pytest.mark.parametrize("command", ["output", "resume"])
def test_a_read_only_disk_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, command: str
) -> None:
    config, data = write_case(tmp_path)
    path = tmp_path / "run"
    path.mkdir()
    if command == "resume":
        RunFolder.create(path, "small", config.read_text(), data={"source": str(data), "given": "path"}, notes=[])
    real = os.open

    def refuse(name, flags, *arguments, **options):
        if flags & os.O_CREAT and str(name).startswith(str(path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
        return real(name, flags, *arguments, **options)

    def refuse_touch(self, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "touch", refuse_touch)
    arguments = ["--resume", str(path)] if command == "resume" else [str(config), "--output", str(path)]
    assert main(["run", *arguments, "--data", str(data), "-q"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("qfast: ")]
    assert len(errors) == 1
    assert "Read-only file system" in errors[0]
    assert str(path) in errors[0]
    assert "Traceback" not in "".join(errors)


# ---------------------------------------------------------------- cached factors
@pytest.fixture
def cached(tmp_path: Path, umask):
    """A cache with one entry, and its key."""
    umask(0o002)  # files would be writable by the group
    cache = FactorCache(tmp_path / "cache")
    prices = load_prices(synthetic.prices(2, 5))
    cache.write("key", ["$close"], prices, lambda out: out.fill(3))
    return cache, prices


def test_the_cache_reads_its_own_entry(cached) -> None:
    cache, prices = cached
    assert (np.asarray(cache.read("key", ["$close"], prices.n_rows)) == 3).all()


@posix
@pytest.mark.parametrize("where", ["cache", "entry", "header", "values"])
@pytest.mark.parametrize("bits", [0o020, 0o002], ids=["group", "others"])
def test_an_entry_that_others_can_change_is_not_read(cached, where: str, bits: int, caplog) -> None:
    cache, prices = cached
    entry = cache.path("key")
    values = next(entry.glob("contents-*/block-0.values"))
    path = {"cache": cache.folder, "entry": entry, "header": entry / "panel.json", "values": values}[where]
    path.chmod(mode(path) | bits)
    assert cache.read("key", ["$close"], prices.n_rows) is None
    assert "so other users can change it" in caplog.text
    path.chmod(mode(path) & ~bits)
    assert cache.read("key", ["$close"], prices.n_rows) is not None


@posix
def test_an_entry_of_another_user_is_not_read(cached, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = cached
    monkeypatch.setattr(os, "getuid", lambda: cache.folder.stat().st_uid + 1)
    if cache.folder.stat().st_uid == 0:
        os.chown(cache.path("key") / "panel.json", 12345, -1)
    with pytest.raises(DataError, match=r"belongs to user \d+, not to this user"):
        require_trusted(cache.path("key"))


@posix
def test_links_in_an_entry_are_not_followed(cached, tmp_path: Path) -> None:
    cache, prices = cached
    values = next(cache.path("key").glob("contents-*/block-0.values"))
    values.rename(tmp_path / "foreign")
    values.symlink_to(tmp_path / "foreign")
    assert cache.read("key", ["$close"], prices.n_rows) is None


def test_abandoned_entries_of_the_cache_are_removed(cached) -> None:
    cache, prices = cached
    abandoned, recent = cache.path("abandoned"), cache.path("recent")
    for path in (abandoned, recent):
        (path / "contents-0").mkdir(parents=True)
        (path / "contents-0" / "block-0.values").write_bytes(b"half")
    long_ago = time.time() - STALE_SECONDS - 5
    for path in [*abandoned.rglob("*"), abandoned]:
        os.utime(path, (long_ago, long_ago))
    temporary = cache.path("key") / ".panel.json.0123456789abcdef.tmp"
    temporary.write_text("half")
    cache.write("key", ["$close"], prices, lambda out: out.fill(4))
    assert not abandoned.exists()
    assert recent.exists()
    assert not temporary.exists()


def test_predict_reads_a_shared_run(tmp_path: Path, umask, undrawn_plots) -> None:
    config, data = write_case(tmp_path)
    path = run(config, data, ["task.model.kwargs.n_epochs=1"], output=tmp_path / "run").path
    unreadable = [str(file) for file in path.rglob("*") if file.is_file() and mode(file) & 0o044 != 0o044]
    assert unreadable == []
    assert json.loads((path / "manifest.json").read_text())["status"] == "finished"
