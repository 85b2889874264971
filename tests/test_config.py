import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmscope_jax import config
from dlmscope_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    steps: int = 3
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    kind: Literal["a", "b"] = "a"
    maybe: int | None = None
    other: Inner | None = None
    many: tuple[Inner, ...] = ()
    table: dict[str, float] = dataclasses.field(default_factory=dict)
    flag: bool = False


inners = st.builds(
    Inner, st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.lists(st.text(max_size=5)).map(tuple), st.just((4, 0.25))
)
outers = st.builds(
    Outer,
    st.text(max_size=8),
    inners,
    st.sampled_from(["a", "b"]),
    st.none() | st.integers(),
    st.none() | inners,
    st.lists(inners, max_size=2).map(tuple),
    st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False, allow_infinity=False), max_size=2),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(outers)
def test_mapping_and_yaml_are_inverses(outer):
    import yaml

    assert config.from_mapping(Outer, config.to_mapping(outer)) == outer
    assert config.from_mapping(Outer, yaml.safe_load(config.dump(outer))) == outer


def test_file_and_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: first\ninner:\n  rate: 3e-4\n  names: [x]\nother: null\n")
    found = config.load(Outer, path, ["--inner.rate=1e-2", "--other.steps=9", "--many=[{rate: 1}]", "--name=007", "--inner.names=[p, q]"])
    assert found == Outer(name="007", inner=Inner(rate=1e-2, names=("p", "q")), other=Inner(steps=9), many=(Inner(rate=1.0),))
    assert config.load(Outer, path).inner.rate == 3e-4
    assert config.load(Outer, None, ["name=x", "flag=true"]).flag is True


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"name": "n", "inner": {"rat": 1}}, ["inner.rat", "'rate'"]),
        ({"name": "n", "zzz": 1}, ["zzz", "inner", "kind"]),
        ({}, ["name", "missing"]),
        ({"name": 3}, ["name", "3", "a text"]),
        ({"name": "n", "flag": 1}, ["flag", "true or false"]),
        ({"name": "n", "inner": {"steps": 2.5}}, ["inner.steps", "2.5", "whole number"]),
        ({"name": "n", "inner": {"steps": True}}, ["inner.steps", "whole number"]),
        ({"name": "n", "inner": {"rate": "high"}}, ["inner.rate", "'high'", "a number"]),
        ({"name": "n", "inner": {"names": "x"}}, ["inner.names", "a list"]),
        ({"name": "n", "inner": {"names": ["x", 1]}}, ["inner.names[1]", "a text"]),
        ({"name": "n", "inner": {"pair": [1]}}, ["inner.pair", "2"]),
        ({"name": "n", "inner": 4}, ["inner", "section", "rate"]),
        ({"name": "n", "kind": "c"}, ["kind", "'c'", "'a'", "'b'"]),
        ({"name": "n", "many": [{"rate": 1.0}, {"step": 1}]}, ["many[1].step", "'steps'"]),
        ({"name": "n", "table": {"x": "y"}}, ["table.x", "a number"]),
        ({"name": "n", "maybe": "x"}, ["maybe", "whole number"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_path(mapping, words):
    with pytest.raises(UserError) as caught:
        config.from_mapping(Outer, mapping)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [1,", ["not YAML"]),
        ("- 1\n", ["a list"]),
        ("name: a\nname: b\n", ["'name'", "twice"]),
        ("name: a\ninner: {ratee: 1}", ["inner.ratee"]),
    ],
)
def test_bad_files_name_the_file(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(Outer, path)
    assert "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("--inner.rate", "section.field=value"),
        ("--name.x=1", "name"),
        ("--inner.steps=many", "inner.steps"),
        ("--iner.rate=1", "'inner'"),
    ],
)
def test_bad_overrides(override, word):
    with pytest.raises(UserError, match=word):
        config.load(Outer, None, ["name=x", override])


def test_missing_file():
    with pytest.raises(UserError, match="nowhere.yaml"):
        config.load(Outer, "nowhere.yaml")


def test_digest_is_the_same_in_every_process_and_follows_every_field():
    base = Outer("n", table={"b": 1.0, "a": 2.0})
    assert config.digest(base) == config.digest(Outer("n", table={"a": 2.0, "b": 1.0}))
    changed = [
        dataclasses.replace(base, flag=True),
        dataclasses.replace(base, inner=Inner(steps=4)),
        dataclasses.replace(base, other=Inner()),
    ]
    assert len({config.digest(o) for o in [base, *changed]}) == 4
    script = "from dlmscope_jax import config; from dlmscope_jax.recipes.configs import Run; print(config.digest(Run()))"
    run = [sys.executable, "-c", script]
    seen = {subprocess.check_output(run, env={"PYTHONHASHSEED": seed}, cwd=ROOT) for seed in "12"}
    assert len(seen) == 1
