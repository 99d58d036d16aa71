"""The converter between frozen values and plain data: what it reads, what it checks, and how it names a mistake."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Any, Literal

import pytest

from lowbit.numerics import Int, PerGroup, PerToken, Spec, check_types, from_dict, to_dict, untagged
from lowbit.solve import Gptq
from lowbit.steps import MeanAbsPower, Search, Set, Smooth, Solve


@untagged
@dataclass(frozen=True)
class Inner:
    name: str
    spec: Spec | None = None
    kind: Literal["a", "b"] = "a"


@untagged
@dataclass(frozen=True)
class Outer:
    inner: Inner
    others: tuple[Inner, ...] = ()
    pair: tuple[int, float] = (1, 0.5)
    either: Inner | tuple[Inner, ...] = ()
    free: Any = None


SPEC = Spec(Int(4), PerGroup(32))
PLAIN = {"grid": {"type": "Int", "bits": 4}, "granularity": {"type": "PerGroup", "size": 32}}


@pytest.mark.parametrize(
    "value",
    [
        Outer(Inner("x")),
        Outer(Inner("x", SPEC, "b"), (Inner("y"), Inner("z", SPEC)), (3, 0.25), Inner("w"), (1, "a", None, SPEC)),
        Outer(Inner("x"), either=(Inner("v"), Inner("w", SPEC))),
    ],
    ids=["defaults", "everything", "the other alternative"],
)
def test_what_is_written_is_read_back(value):
    assert from_dict(to_dict(value), type(value)) == value


def test_only_tagged_classes_are_written_with_their_name_and_defaults_are_left_out():
    assert to_dict(Outer(Inner("x", SPEC))) == {"inner": {"name": "x", "spec": {"type": "Spec", **PLAIN}}}
    assert from_dict({"type": "Spec", **PLAIN}) == SPEC


def test_a_field_of_one_class_is_read_without_a_name():
    assert from_dict({"name": "x", "spec": PLAIN}, Inner) == Inner("x", SPEC)
    assert from_dict({"name": "x", "other": [1, {"y": 2}]}) == {"name": "x", "other": (1, {"y": 2})}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"^Outer\.inner: Field required$"),
        ({"inner": {"nam": "x"}}, r"^Outer\.inner: unknown key 'nam' \(did you mean 'name'\?\)$"),
        ({"inner": {"name": 3}}, r"^Outer\.inner\.name: .*string, found 3$"),
        ({"inner": {"name": "x", "kind": "c"}}, r"^Outer\.inner\.kind: .*'a' or 'b', found 'c'$"),
        ({"inner": "x"}, r"^Outer\.inner: expected Inner, its fields as a mapping, found 'x'$"),
        ({"inner": {"name": "x"}, "others": [{"name": "y"}, {}]}, r"^Outer\.others\.1\.name: Field required$"),
        ({"inner": {"name": "x"}, "pair": [1, "y"]}, r"^Outer\.pair: .*number, found \(1, 'y'\)$"),
        ({"inner": {"name": "x"}, "pair": [True, 1.0]}, r"^Outer\.pair: .*integer, found \(True, 1\.0\)$"),
        (
            {"inner": {"name": "x", "spec": {**PLAIN, "grid": {"type": "Imt"}}}},
            r"unknown type 'Imt' \(did you mean 'Int'\?\)",
        ),
        (
            {"inner": {"name": "x", "spec": {**PLAIN, "grid": {"type": "Int", "bit": 4}}}},
            r"^Outer\.inner\.spec\.Spec\.grid\.Int has no option 'bit' \(did you mean 'bits'\?\)$",
        ),
        (
            {"inner": {"name": "x", "spec": {**PLAIN, "grid": {"type": "PerToken"}}}},
            r"^Outer\.inner\.spec\.Spec\.grid: expected Grid, found PerToken",
        ),
    ],
)
def test_a_mistake_is_named_with_its_path(data, message):
    with pytest.raises(ValueError, match=message):
        from_dict(data, Outer)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Set(PerToken(), ("norm_*",)), r"^Set\.rule: expected TransformRule, found PerToken\(\)$"),
        (Set(Smooth(0.5), "norm_*"), r"^Set\.at: expected a list, found 'norm_\*'$"),
        (Search(MeanAbsPower(2.5), ("v_o",)), r"^Search\.candidates\.MeanAbsPower\.grid: .*integer"),
        (
            Outer(Inner("x"), (Inner("y"), Inner("z", PerToken()))),
            r"^Outer\.others\.1\.spec: expected Spec, found PerToken",
        ),
        (Solve(Gptq(damp=nan)), r"^Solve\.solver\.Gptq\.damp: expected a number, found nan$"),
    ],
    ids=["an instance", "a tuple", "a value in a field", "an element", "no number"],
)
def test_a_value_built_in_python_is_checked_likewise(value, message):
    with pytest.raises(ValueError, match=message):
        check_types(value)
