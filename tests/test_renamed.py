"""Module paths and names of earlier releases: the same objects, with a DeprecationWarning."""

import importlib
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

import qfast
from qfast._renamed import RENAMED_MODULES, install, renamed_names
from qfast.models import LSTM
from qfast.training.optim import ClippedAdam


@pytest.fixture
def forgotten():
    """Old module paths as a new process sees them."""
    saved = {old: sys.modules.pop(old) for old in RENAMED_MODULES if old in sys.modules}
    yield
    sys.modules.update(saved)


@pytest.mark.parametrize("old", RENAMED_MODULES)
def test_old_module_path_is_the_new_module(old, forgotten):
    with pytest.warns(DeprecationWarning, match=f"{old} has been renamed to {RENAMED_MODULES[old]}") as caught:
        module = importlib.import_module(old)
    assert module is importlib.import_module(RENAMED_MODULES[old])
    assert module.__name__ == module.__spec__.name == RENAMED_MODULES[old]
    assert len(caught) == 1


def test_import_statements(forgotten):
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import qfast.optim
    from qfast.callbacks import Callback
    from qfast import checkpoint
print(sorted((w.category.__name__, w.filename) for w in caught))
import qfast.training.callbacks, qfast.training.checkpoint, qfast.training.optim
assert Callback is qfast.training.callbacks.Callback
assert qfast.optim is qfast.training.optim
assert checkpoint is qfast.training.checkpoint
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([("DeprecationWarning", "<string>")] * 3)


def test_pickle_of_an_earlier_release(forgotten):
    text = pickle.dumps(ClippedAdam, protocol=0).replace(b"qfast.training.optim", b"qfast.optim")
    with pytest.warns(DeprecationWarning, match=r"qfast\.optim has been renamed"):
        assert pickle.loads(text) is ClippedAdam


def test_pickled_estimator_of_an_earlier_release(forgotten):
    model = LSTM(d_feat=3, hidden_size=4, seed=0)
    text = pickle.dumps(model, protocol=2)
    for new, old in ((b"qfast.training.base\n", b"qfast.estimator\n"), (b"qfast.training.optim\n", b"qfast.optim\n")):
        assert new in text
        text = text.replace(new, old)
    with pytest.warns(DeprecationWarning, match=r"qfast\.(estimator|optim) has been renamed") as caught:
        loaded = pickle.loads(text)
    assert len(caught) == 2
    assert type(loaded) is LSTM
    assert type(loaded.train_optimizer) is ClippedAdam
    assert torch.equal(loaded.network.fc_out.weight, model.network.fc_out.weight)


def test_an_unknown_module_is_still_an_import_error():
    with pytest.raises(ModuleNotFoundError, match=r"qfast\.optimizers"):
        importlib.import_module("qfast.optimizers")


def test_install_again_changes_nothing():
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before


def test_renamed_names():
    resolve = renamed_names("qfast", {"OldAdam": "qfast.training.optim.ClippedAdam"})
    with pytest.warns(DeprecationWarning, match=r"qfast\.OldAdam has been renamed to qfast\.training\.optim"):
        assert resolve("OldAdam") is ClippedAdam
    with pytest.raises(AttributeError, match="module 'qfast' has no attribute 'Adam'"):
        resolve("Adam")


def test_new_paths_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for new in RENAMED_MODULES.values():
            importlib.import_module(new)
    assert qfast.__version__
