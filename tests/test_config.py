"""Workflow files: reading, templates, base files, --set, and error messages."""

from __future__ import annotations

import datetime as dt
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qfast import registry
from qfast.dates import normal_date
from qfast.errors import ConfigError
from qfast.workflow.config import apply_set, deep_merge, dump_yaml, fill_placeholders, load_config
from qfast.workflow.validation import check_workflow
from support.workflows import TEXT

PROCESSORS = "task.dataset.kwargs.handler.kwargs.infer_processors"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "w.yaml"):
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return file

    return write


def model_path(stem: str) -> str:
    return f"task.model.module_path=qlib.contrib.model.pytorch_{stem}"


def checked(file, *sets):
    return check_workflow(load_config(file, sets).values, file.name)


# ---------------------------------------------------------------- reading
def test_yaml_is_read_as_version_1_2(write):
    values = load_config(write("a: 1e-3\nb: yes\nc: 2008-01-01\nd: 010\n")).values
    assert values == {"a": 0.001, "b": "yes", "c": dt.date(2008, 1, 1), "d": 10}


def test_template_sees_environment_variables_and_nothing_else(write, monkeypatch, caplog):
    monkeypatch.setenv("QFAST_TEST_MARKET", "csi500")
    file = write("market: {{ QFAST_TEST_MARKET }}\nother: '{{ QFAST_TEST_UNSET }}'\n")
    with caplog.at_level(logging.WARNING, "qfast"):
        assert load_config(file).values == {"market": "csi500", "other": ""}
    assert "QFAST_TEST_UNSET" in caplog.text
    escape = write("a: {{ ''.__class__.__mro__[1].__subclasses__() }}\n")
    with pytest.raises(ConfigError, match=r"template does not render: .*__class__.* unsafe"):
        load_config(escape)


def test_base_file_is_merged_under(write, tmp_path, monkeypatch):
    write("market: a\ntask: {model: {kwargs: {x: 1, y: 2}}, extra: [1, 2]}\nshown: '{{ HOME }}'\n", "base.yaml")
    file = write("BASE_CONFIG_PATH: base.yaml\ntask: {model: {kwargs: {x: 9, y: __DROP__}}, extra: [3]}\n")
    monkeypatch.chdir(tmp_path.parent)  # then it is searched next to the workflow file
    values = load_config(file).values
    assert values["task"] == {"model": {"kwargs": {"x": 9}}, "extra": [3]}
    assert values["market"] == "a"
    assert values["shown"] == "{{ HOME }}"  # the base is not rendered


def test_merging_equals_qlib():
    data = pytest.importorskip("qlib.utils.data")
    base = {"a": {"b": {"c": 1, "d": [1]}, "e": 2}, "f": 3, "g": {"h": 4}}
    over = {"a": {"b": {"c": "__DROP__", "x": {"y": 1}}}, "f": {"z": 1}, "g": "__DROP__", "new": 5, "no": "__DROP__"}
    assert deep_merge(base, over) == data.update_config(base, over)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", r"not YAML: line 2, column 2: while parsing a flow sequence"),
        ("a: 1\na: 2\n", r"line 2, column 1: .*duplicate key"),
        ("a: !!python/object/apply:os.system [ls]\n", r"not YAML: line 1.*could not determine a constructor"),
        ("- 1\n", r"must be a mapping with the keys \['qlib_init', 'task'\]; this one is a list"),
        ("", r"this one is empty"),
        ("a: &x {b: *x}\n", r"the alias at 'a.b' contains itself|found undefined alias"),
        ("a: {{ b\n", r"template error on line"),
        ("BASE_CONFIG_PATH: none.yaml\n", r"BASE_CONFIG_PATH 'none.yaml' was not found; searched \["),
        ("BASE_CONFIG_PATH: 3\n", r"BASE_CONFIG_PATH must be a path, got 3"),
        ("a: 2020-02-29\nb: [2020-02-30]\n", r"line 2: '2020-02-30' is not a date"),
    ],
)
def test_unreadable_files_say_where(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text))


def test_missing_file_folder_and_binary(tmp_path):
    with pytest.raises(ConfigError, match=r"workflow file '.*none.yaml' does not exist \(looked in "):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"is a folder. Remedy: pass the YAML file"):
        load_config(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text"):
        load_config(tmp_path / "b.yaml")


# ---------------------------------------------------------------- --set
def test_set_types_values_as_yaml_does(write):
    file = write("task: {kwargs: {a: 1, b: [x, y], c: 3}}\n")
    sets = [
        "task.kwargs.a=1e-3",
        "task.kwargs.b.1=2016-12-31",
        "task.kwargs.c=[1, null]",
        "task.kwargs.new=",
        "task.record=[]",
    ]
    task = load_config(file, sets).values["task"]
    assert task == {
        "kwargs": {"a": 0.001, "b": ["x", dt.date(2016, 12, 31)], "c": [1, None], "new": None},
        "record": [],
    }


def test_set_changes_everything_that_shares_the_anchor(write):
    file = write(
        "market: &m csi300\nh: &h {instruments: *m, start: 2008-01-01}\ntask: {kwargs: *h, list: [*m, other]}\n"
    )
    for path in ("market", "h.instruments", "task.kwargs.instruments", "task.list.0"):
        values = load_config(file, [f"{path}=all", "task.kwargs.start=2009-01-01"]).values
        assert values["market"] == values["h"]["instruments"] == values["task"]["kwargs"]["instruments"] == "all"
        assert values["task"]["list"] == ["all", "other"]
        assert values["h"]["start"] == values["task"]["kwargs"]["start"] == dt.date(2009, 1, 1)


def test_set_on_a_shared_mapping_replaces_it_everywhere(write):
    file = write("h: &h {kwargs: &k {a: 1}}\ntask: {x: *h, y: *k}\n")
    values = load_config(file, ["h.kwargs={a: 2}"]).values
    assert values["task"]["x"]["kwargs"] == values["task"]["y"] == {"a": 2}


def test_anchors_of_a_base_file_stay_shared_unless_overridden(write):
    write("market: &m csi300\nh: {instruments: *m, other: *m}\n", "base.yaml")
    file = write("BASE_CONFIG_PATH: base.yaml\nh: {other: mine}\n")
    import os

    here = os.getcwd()
    os.chdir(file.parent)
    try:
        values = load_config(file, ["market=all"]).values
    finally:
        os.chdir(here)
    assert values["h"] == {"instruments": "all", "other": "mine"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_epochs=3", r"no 'n_epochs' at the top level; .* Did you mean 'task.model.kwargs.n_epochs'\?"),
        ("task.modle.kwargs.lr=1", r"no 'modle' at 'task'; known: .* Did you mean 'task.model'\?"),
        (
            "task.dataset.kwargs.segments.train.7=1",
            r"is a list of 2, so the next part must be a position from 0 to 1, got '7'",
        ),
        ("task.dataset.kwargs.segments.train.x=1", r"a position from 0 to 1, got 'x'"),
        ("experiment_name.x=1", r"'experiment_name' is the value 'small', which has no items"),
        ("task.model.kwargs.lr", r"expected key=value"),
        ("=3", r"expected key=value"),
        ("task.model.kwargs.lr={", r"the value '\{' is invalid: not YAML"),
        ("task.dataset.kwargs.segments.train=[2020-01-01, 2020-01-32]", r"'2020-01-32' is not a date"),
    ],
)
def test_wrong_sets_name_the_nearest_path(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(TEXT), [text])


@given(
    st.recursive(
        st.integers() | st.text("abc", max_size=3),
        lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3) | st.lists(inner, max_size=3),
        max_leaves=12,
    ),
    st.integers(),
)
def test_a_set_option_changes_its_path_only(tree, value):
    config = {"root": tree}

    def paths(item, path):
        pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, below in pairs:
            yield (*path, key)
            yield from paths(below, (*path, key))

    every = list(paths(config, ()))
    target = every[abs(value) % len(every)]
    apply_set(config, ".".join(map(str, target)) + f"={value}")
    result = config
    for key in target:
        result = result[key]
    assert result == value
    assert {p for p in every if p[: len(target)] != target} <= set(paths(config, ()))


# ---------------------------------------------------------------- placeholders
def test_placeholders_are_filled_in_a_copy():
    item = {
        "model": "<MODEL>",
        "list": ["<DATASET>", 1],
        "date": "<dataset.segments.train.0> 00:00",
        "text": "a <MODEL>",
        "no": "<x.y>",
    }
    before = dict(item)
    model, dataset = object(), object()
    config = {"dataset": {"segments": {"train": ["2008-01-01", "2014-12-31"]}}}
    filled = fill_placeholders(item, {"<MODEL>": model, "<DATASET>": dataset}, config)
    assert filled["model"] is model
    assert filled["list"][0] is dataset
    assert filled["date"] == "2008-01-01"
    assert (filled["text"], filled["no"]) == ("a <MODEL>", "<x.y>")
    assert item == before


# ---------------------------------------------------------------- checking
def test_a_good_file_resolves_to_plain_data_that_is_good_again(write):
    file = write(TEXT)
    resolved = checked(file).resolved()
    assert resolved["task"]["dataset"]["kwargs"]["segments"]["train"] == ["2020-01-01", "2020-02-05"]
    assert resolved["task"]["model"]["kwargs"]["lr"] == 0.01
    assert "&" not in dump_yaml(resolved)
    again = checked(write(dump_yaml(resolved), "again.yaml"))
    assert again.resolved() == resolved


def test_the_callers_data_stays_as_it_was(write):
    values = load_config(write(TEXT)).values
    before = dump_yaml(values)
    check_workflow(values)
    assert dump_yaml(values) == before


def test_all_problems_come_at_once_with_their_paths(write):
    sets = [
        "task.model.kwargs.n_epoch=3",
        "task.model.kwargs.hidden_size=abc",
        "task.dataset.kwargs.segments.valid=[2020-02-20, 2020-02-06]",
        "task.dataset.kwargs.segments.test.0=2008",
        f"{PROCESSORS}.0.class=RobustZScoreNrom",
        "task.dataset.kwargs.handler.kwargs.start=1",
        "task.record.1.kwargs.ann_scale=3",
    ]
    with pytest.raises(ConfigError) as caught:
        checked(write(TEXT), *sets)
    text = str(caught.value)
    assert text.startswith("w.yaml: 7 problems.\n")
    for line in (
        r"task.model.kwargs.n_epoch: LSTM has no argument 'n_epoch'; allowed:",
        "Did you mean 'n_epochs'?",
        "task.model.kwargs.hidden_size: expected a valid integer",
        "got 'abc'",
        "task.dataset.kwargs.segments.valid: the start 2020-02-20 is after the end 2020-02-06",
        "task.dataset.kwargs.segments.test: expected a date such as 2016-12-31",
        "infer_processors.0.class: unknown processor class 'RobustZScoreNrom'",
        "Did you mean 'RobustZScoreNorm'?",
        "task.dataset.kwargs.handler.kwargs.start: DataHandlerLP has no argument 'start'",
        "task.record.1.kwargs.ann_scale: SigAnaRecord has no argument 'ann_scale'",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["task.model.module_path=os"], r"model 'LSTM' is not registered under .* 'os'.*nothing is imported"),
        (["task.model.class=system", "task.model.module_path=os"], r"unknown model class 'system'"),
        (["task.model=os.system"], r"unknown model class 'system'"),
        (
            ["task.model.class=TransformerModel", model_path("transformer")],
            r"kwargs.hidden_size: TransformerModel has no argument 'hidden_size'; allowed: .*'d_model'.*'reg'",
        ),
        (["task.model.class=LocalformerModel", model_path("gru")], r"model 'LocalformerModel' is not registered under"),
        (["task.model.class=Transformer", model_path("transformer")], r"unknown model class 'Transformer'"),
        (["task.record.0.class=HFSignalRecord"], r"0.class: HFSignalRecord is not available in qfast"),
        (
            ["task.dataset.kwargs.handler=file://handler.pkl"],
            r"pickled objects are not supported, got 'file://handler.pkl'",
        ),
        (["task.model.kwargs=5"], r"task.model.kwargs: expected a mapping, got 5"),
        (["task.dataset.kwargs.segments={}"], r"segments: there is no 'train', only \[\]"),
        (["task.dataset.kwargs.segments={trian: [2020-01-01, 2020-02-01]}"], r"there is no 'train', only \['trian'\]"),
        (["task.dataset.kwargs.segments.train=2020-01-01"], r"segments.train: expected \[start, end\], got"),
        (["task.dataset.kwargs.segments.train.0=yesterday-ish"], r"expected a date such as .* got 'yesterday-ish'"),
        (["task.dataset.kwargs.handler.kwargs.fit_end_time=20200101"], r"expected a date .* got the int 20200101"),
        (["experiment_name=5"], r"experiment_name: expected a valid string, got 5"),
        (["task.model.class=null"], r"task.model.class: expected a valid string, got None"),
        (["task.record.1.kwargs.ann_scaler=-1"], r"record.1.kwargs: SigAnaRecord: ann_scaler, .* positive, got -1.0"),
        (["task.record.1.kwargs.ana_long_short=perhaps"], r"ana_long_short: expected a valid boolean, .*'perhaps'"),
        (["task.record.1.kwargs.label_col=1"], r"record.1.kwargs: SigAnaRecord: label_col must be 0"),
        (["qlib_init={region: mars}"], r"qlib_init.region: expected 'cn', 'us' or 'tw', got 'mars'"),
    ],
)
def test_each_wrong_value_is_refused_by_name(write, sets, message):
    with pytest.raises(ConfigError, match=message):
        checked(write(TEXT), *sets)


def test_misspelt_keys_are_reported(write):
    with pytest.raises(ConfigError, match=r"task: is missing. Did you mean to write it instead of 'taks'\?"):
        checked(write("taks: {}\n"))
    text = TEXT.replace("    module_path: qlib.contrib.model.pytorch_lstm\n", "    modul_path: x\n")
    with pytest.raises(ConfigError, match=r"task.model.modul_path: unknown key; .* Did you mean 'module_path'\?"):
        checked(write(text))


def test_nothing_is_imported_by_name(write, tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"Only registered classes are built"):
        checked(write(TEXT), "task.model.module_path=trap_module")
    assert "trap_module" not in sys.modules


def test_sys_is_accepted_but_not_obeyed(write, tmp_path, caplog):
    before = list(sys.path)
    with caplog.at_level(logging.WARNING, "qfast"):
        checked(write(TEXT + f"sys: {{path: [{tmp_path}], rel_path: .}}\n"))
    assert sys.path == before
    assert "is not added to the module search path" in caplog.text


def test_fitting_beyond_the_training_segment_is_warned_of(write, caplog):
    with caplog.at_level(logging.WARNING, "qfast"):
        checked(write(TEXT), "task.dataset.kwargs.handler.kwargs.fit_end_time=2020-03-01")
    assert "fit_end_time 2020-03-01 is after the end of the train segment 2020-02-05" in caplog.text


def test_values_get_the_declared_type(write):
    workflow = checked(write(TEXT), "task.model.kwargs.lr='1e-4'", "task.model.kwargs.n_epochs='7'")
    assert workflow.task.model.kwargs["lr"] == 1e-4
    assert workflow.task.model.kwargs["n_epochs"] == 7
    sets = [
        "task.record.1.kwargs={ana_long_short: no, ann_scaler: '252'}",
        "task.dataset.kwargs.handler.kwargs.drop_raw=no",
    ]
    task = checked(write(TEXT), *sets).task
    assert task.record[1].kwargs == {"ana_long_short": False, "ann_scaler": 252.0}
    assert task.dataset.kwargs.handler.kwargs.model_extra["drop_raw"] is False
    assert checked(write(TEXT), "qlib_init={region: US}").qlib_init.region == "us"


def test_record_may_be_one_mapping_or_absent(write):
    assert checked(write(TEXT), "task.record=null").task.record == []
    one = checked(write(TEXT), "task.record={class: SignalRecord}").task.record
    assert [spec.class_ for spec in one] == ["SignalRecord"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (dt.date(2016, 12, 31), "2016-12-31"),
        (dt.datetime(2016, 12, 31, 14, 30), "2016-12-31T14:30:00"),
        ("2016-12-31", "2016-12-31"),
        ("2016-12-31 09:30:00", "2016-12-31T09:30:00"),
        ("20161231", "2016-12-31"),
        ("12/31/2016", "2016-12-31"),
        ("07/07/2016", "2016-07-07"),
    ],
)
def test_dates(value, expected):
    assert normal_date(value) == expected


@pytest.mark.parametrize("value", [True, 20161231, 3.5, "soon", "NaT", [1], "01/07/2016", "1.7.2016", "15/06/20"])
def test_invalid_dates(value):
    with pytest.raises(ValueError, match=r"expected a date such as 2016-12-31"):
        normal_date(value)


@pytest.mark.parametrize("suffix", ["", "_ts"])
@pytest.mark.parametrize(
    ("name", "stem"),
    [
        *(("LSTM", "lstm"), ("GRU", "gru"), ("ALSTM", "alstm"), ("GATs", "gats"), ("TCN", "tcn")),
        *(("TransformerModel", "transformer"), ("LocalformerModel", "localformer")),
    ],
)
def test_every_model_accepts_weight_decay(write, name, stem, suffix):
    kwargs = "task.model.kwargs={d_feat: 3, weight_decay: 0.1}"
    workflow = checked(write(TEXT), f"task.model.class={name}", model_path(stem + suffix), kwargs)
    model = registry.MODELS.build(workflow.task.model.description(), path="task.model")
    assert model.get_params()[model.decay_name] == 0.1
    assert [group["weight_decay"] for group in model.train_optimizer.param_groups] == [0.1]


@pytest.mark.parametrize("name", ["loss", "metric"])
def test_loss_and_metric_of_a_file_are_names(write, name):
    with pytest.raises(
        ConfigError, match=rf"task.model.kwargs.{name}: input should be a valid string|expected a valid"
    ):
        checked(write(TEXT), f"task.model.kwargs.{name}=3")
    workflow = checked(write(TEXT), f"task.model.kwargs.{name}=package.function")
    with pytest.raises(
        ConfigError, match=rf"{name} must be one of .* or, in Python, a function of .*got 'package.func"
    ):
        registry.MODELS.build(workflow.task.model.description(), path="task.model")
