"""What a program is told of the methods is what they take."""

from __future__ import annotations

import json

import pytest

import MedXAILib as mx
from MedXAILib.description import describe
from MedXAILib.registry import make

TYPES = {"bool": bool, "int": int, "float": float, "choice": str, "text": str, "list": tuple}


@pytest.mark.parametrize("method", mx.methods())
def test_defaults_choices_and_limits_are_those_the_method_checks(method: str) -> None:
    kind = mx.methods()[method]
    said = json.loads(json.dumps(describe(kind)))
    assert (said["id"], said["title"], said["layered"]) == (method, kind.title, "layers" in kind.model_fields)
    assert said["question"].endswith((".", "?")) and said["taxonomy"]["limits"] == kind.taxonomy.limits
    assert [p["name"] for p in said["parameters"]] == list(kind.model_fields)
    made = make(method, {p["name"]: p["default"] for p in said["parameters"]})
    assert made == kind() and made.signed == said["signed"]
    for parameter in said["parameters"]:
        name = parameter["name"]
        assert isinstance(getattr(made, name), TYPES[parameter["type"]]) and parameter["help"]
        for choice in parameter["choices"]:
            assert getattr(make(method, {name: choice}), name) == choice
        if parameter["choices"]:
            with pytest.raises(mx.MedXAIError, match=f"{name} = 'no such'"):
                make(method, {name: "no such"})
        for limit, beyond in ((parameter["minimum"], -1), (parameter["maximum"], 1)):
            if limit is not None:
                assert getattr(make(method, {name: limit}), name) == limit
                with pytest.raises(mx.MedXAIError, match=f"{name} = "):
                    make(method, {name: limit + beyond})


def test_what_can_be_another_scan_is_open(tmp_path) -> None:
    baselines = [p for p in describe(mx.methods()["integrated_gradients"])["parameters"] if p["open"]]
    assert [p["name"] for p in baselines] == ["baseline"] and "blur" in baselines[0]["choices"]
    (tmp_path / "atlas.nrrd").touch()
    make("integrated_gradients", {"baseline": str(tmp_path / "atlas.nrrd")})
