"""The registry builds registered classes only, from copies of the caller's mappings."""

from __future__ import annotations

import copy

import pytest

from qfast.errors import ConfigError
from qfast.registry import Registry


class Circle:
    """Something to build."""

    def __init__(self, radius: float, colour: str = "red") -> None:
        self.radius, self.colour = radius, colour


class OtherCircle(Circle):
    """Same name, another module path."""


@pytest.fixture
def shapes() -> Registry:
    registry = Registry("shape")
    registry.add(Circle, "Circle", "Round", modules=("a.shapes", "b"))
    registry.add(OtherCircle, "Circle", modules=("c",))
    registry.unavailable("Cube", "Cube is not available yet.", modules=("a.shapes",))
    return registry


def test_builds_every_form(shapes):
    spec = {"class": "Circle", "module_path": "a.shapes", "kwargs": {"radius": 2}}
    before = copy.deepcopy(spec)
    assert shapes.build(spec, colour="blue", unrelated=1).colour == "blue"
    assert shapes.build({**spec, "kwargs": {"radius": 2, "colour": "green"}}, colour="blue").colour == "green"
    assert spec == before
    assert type(shapes.build({"class": "Circle", "module_path": "c", "kwargs": {"radius": 1}})) is OtherCircle
    assert type(shapes.build("a.shapes.Round", radius=3)) is Circle
    assert type(shapes.build({"class": "c.Circle", "kwargs": {"radius": 1}})) is OtherCircle
    assert type(shapes.build(Circle, radius=1)) is Circle
    one = Circle(1)
    assert shapes.build(one) is one
    assert shapes.names() == ["Circle", "Round"]
    assert shapes.modules("Circle") == ["a.shapes", "b", "c"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Circel", r"task\.x: unknown shape class 'Circel'; known: \['Circle', 'Round'\]\. Did you mean 'Circle'\?"),
        ("os.Circle", r"'Circle' is not registered under the module path 'os'.*nothing is imported by name"),
        ("Cube", "Cube is not available yet"),
        ({"class": "Circle"}, r"Circle requires the argument\(s\) \['radius'\]"),
        ({"class": "Circle", "kwargs": {"radios": 1}}, r"task\.x: Circle has no argument 'radios'.* 'radius'\?"),
        ({"class": "Circle", "kwargs": [1]}, "'kwargs' of Circle must be a mapping"),
        ({"clas": "Circle"}, r"unknown key 'clas'.* Did you mean 'class'\?"),
        ({"class": None}, "requires the key 'class'"),
        ({"class": dict}, "requires the key 'class'"),
        (4, "a shape must be a shape object, a name, or a mapping"),
    ],
)
def test_refuses(shapes, spec, message):
    with pytest.raises(ConfigError, match=message):
        shapes.build(spec, path="task.x")
