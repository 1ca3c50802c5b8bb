"""Workflow files that would need unlimited time or memory, or that contain values which no file can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from qfast.cli import main
from qfast.errors import ConfigError
from qfast.workflow import template, yaml_text
from qfast.workflow.config import load_config
from qfast.workflow.yaml_text import InvalidYaml, parse_yaml
from support.hostile import HOSTILE_TEMPLATES, HOSTILE_YAML


@pytest.mark.parametrize(("text", "match"), HOSTILE_YAML.values(), ids=HOSTILE_YAML.keys())
def test_a_hostile_file_ends_in_one_line(text: str, match: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=match):
        load_config(file)
    assert main(["run", str(file), "--output", str(tmp_path / "run")]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1
    assert str(file) in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "match"), HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES.keys())
def test_a_template_has_limits(text: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MOST_SECONDS", 1)
    monkeypatch.setattr(template, "WAIT_SECONDS", 20)
    file = tmp_path / "w.yaml"
    file.write_text(f"task: {{}}\nx: {text}\n" if "{% if" not in text else text)
    with pytest.raises(ConfigError, match=match):
        load_config(file)


def test_templates_of_any_kind_still_render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("QFAST_TEST_NAMES", "a,b")
    file = tmp_path / "w.yaml"
    file.write_text(
        "task: {}\nx: [{% for n in QFAST_TEST_NAMES.split(',') %}{{ n }}1, {% endfor %}]\n"
        "y: {{ NO_SUCH_NAME | default(3) }}\nz: '{{ NOT_SET }}{{ 2 * 3 }}'\n"
    )
    values = load_config(file).values
    assert values == {"task": {}, "x": ["a1", "b1"], "y": 3, "z": "6"}
    assert "environment variables ['NOT_SET'] are not set" in caplog.text


def test_a_long_file_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_text, "MOST_CHARACTERS", 1000)
    with pytest.raises(InvalidYaml, match=r"the text has 2003 characters; at most 1000 are allowed"):
        parse_yaml("x: " + "a" * 2000)
    with pytest.raises(InvalidYaml, match=r"with aliases replaced, this value contains .* characters"):
        parse_yaml("a: &a " + "x" * 500 + "\nb: [*a, *a, *a]")
    assert parse_yaml("a: &a " + "x" * 400 + "\nb: *a").values == {"a": "x" * 400, "b": "x" * 400}


def test_set_has_the_same_limits(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("task: {}\nmarket: a\n")
    with pytest.raises(ConfigError, match=r"--set market: the value .* is invalid: line 1: values are nested"):
        load_config(file, ["market=" + "[" * 100 + "]" * 100])
    with pytest.raises(ConfigError, match=r"--set market: .*'\\ud800' has a character"):
        load_config(file, ['market="\\ud800"'])


BASES = {
    "secrets.json": ('{"password": "hunter2"}', "not a workflow file"),
    "secrets.yaml": ("password: hunter2\n", "not a workflow file"),
    "passwd": ("task: {}\nroot: hunter2\n", "not a workflow file"),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_file_must_be_a_workflow_file(name: str, tmp_path: Path) -> None:
    text, match = BASES[name]
    (tmp_path / name).write_text(text)
    file = tmp_path / "w.yaml"
    file.write_text(f"BASE_CONFIG_PATH: {tmp_path / name}\ntask: {{}}\n")
    with pytest.raises(ConfigError, match=match) as refused:
        load_config(file)
    assert "hunter2" not in str(refused.value)


def test_a_text_that_is_parsed_again_gives_new_values():
    first = parse_yaml("a: &a [1, 2]\nb: *a").values
    first["a"].append(3)
    again = parse_yaml("a: &a [1, 2]\nb: *a").values
    assert again == {"a": [1, 2], "b": [1, 2]}
    assert again["a"] is again["b"]
