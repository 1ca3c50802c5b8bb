"""Studies on Ray: a local cluster of two nodes, one of which is killed while it executes a run."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path

import pytest

from qfast import study
from qfast.errors import ConfigError
from support.workflows import write_case

has_ray = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not has_ray, reason="ray, of the extra ray, is not installed")

KWARGS = "task.model.kwargs"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(workflow file, data file)."""
    return write_case(tmp_path_factory.mktemp("ray"))


@pytest.mark.skipif(has_ray, reason="ray is installed")
def test_a_missing_ray_is_reported(case):
    with pytest.raises(ConfigError, match=r"--on: ray is not installed. Remedy: pip install 'qfast-models\[ray\]'"):
        study(*case, on="ray")


@pytest.fixture
def cluster(monkeypatch):
    """A cluster whose head executes nothing, with two nodes of one CPU each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


@needs_ray
@pytest.mark.slow
def test_a_study_on_ray_survives_the_loss_of_a_node(case, tmp_path, cluster):
    """Both nodes are busy when one of them is killed. The table equals that of the local engine."""
    nodes = cluster[1]
    sets = [f"{KWARGS}.n_epochs=150", f"{KWARGS}.early_stop=200"]
    folder = tmp_path / "ray"
    killed = threading.Event()

    def kill() -> None:
        while len(list(folder.glob("runs/*/last.safetensors"))) < 2:
            time.sleep(0.05)
        cluster[0].remove_node(nodes[0], allow_graceful=False)
        killed.set()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = study(*case, sets, output=folder, seeds=3, on=f"ray://{cluster[0].address}", quiet=True)
    assert killed.is_set()
    assert result.table["status"].tolist() == ["finished"] * 3
    logs = "".join(Path(file).read_text() for file in sorted(folder.glob("logs/0*.txt")))
    assert "resum" in logs or logs.count("run folder: ") < logs.count("epoch 0: ") + 3
    expected = study(*case, sets, output=tmp_path / "here", seeds=3, on="inline", quiet=True)
    assert (folder / "table.csv").read_bytes() == (expected.path / "table.csv").read_bytes()


@needs_ray
def test_an_address_without_a_cluster_is_refused(case, tmp_path):
    with pytest.raises(ConfigError, match=r"--on: no Ray cluster answers at 127\.0\.0\.1:1 "):
        study(*case, output=tmp_path / "s", on="ray://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"--on: expected ray://HOST:PORT, got 'ray://host'"):
        study(*case, output=tmp_path / "s", on="ray://host")
    assert not (tmp_path / "s").exists()
