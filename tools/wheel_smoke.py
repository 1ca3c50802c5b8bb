"""Checks an installed wheel for tools/check_wheel.sh: the report of `qfast doctor`, training, saving and loading."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import qfast
from qfast.data import DatasetH, synthetic
from qfast.models import LSTM


def main(report: str) -> None:
    """Check that the wheel's own library is in use, and that a saved model predicts the same scores."""
    facts = json.loads(Path(report).read_text())
    package = Path(qfast.__file__).parent
    if not package.is_relative_to(sys.prefix):
        sys.exit(f"qfast is imported from {package}, expected below {sys.prefix}")
    if any(package.glob("_C.*")):
        cpu = facts["backend"]["cpu"]
        if not (facts["healthy"] and cpu["loaded"]):
            sys.exit(f"qfast doctor is not healthy: {cpu}, {facts['self_test']}")
    dataset = DatasetH(synthetic.factors(8, 60, 3, missing=0.0), {"train": (None, None)})
    model = LSTM(d_feat=3, hidden_size=4, n_epochs=2, batch_size=64, seed=0, progress=False).fit(dataset)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.qfast")
        loaded = qfast.load(f"{folder}/model.qfast")
    if not loaded.predict(dataset, "train").equals(model.predict(dataset, "train")):
        sys.exit("a saved and loaded model predicts other scores")
    print(f"the wheel of qfast {qfast.__version__} works: {facts['backend']['cpu']['reason']}, {model!r}")


if __name__ == "__main__":
    main(sys.argv[1])
