"""Names of accelerators: those of Ray, which the configuration repeats so as to do without it."""

from __future__ import annotations

import pytest
from ray.util.accelerators import accelerators

from raydistill.config.accelerators import KNOWN, _meant, without_price


def test_the_names_are_those_of_ray() -> None:
    names = {value for name, value in vars(accelerators).items() if name[0] != "_" and isinstance(value, str)}
    assert set(KNOWN) == names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("L40s", "L40S"), ("h100", "H100"), ("H1000", "H100"), ("A100-80GB", "A100-80G"), ("L40S", None), ("L40", None),
        ("A40", None), ("GH200", None), ("RTX-A6000", None), ("GeForce-RTX-4090", None), ("our-gpus", None),
    ],
)  # fmt: skip
def test_only_what_looks_like_a_slip_is_taken_for_one(name: str, meant: str | None) -> None:
    assert _meant(name, KNOWN) == meant


def test_what_a_sum_leaves_out_is_named() -> None:
    assert without_price([]) == ""
    assert without_price(["H100", "L40S"]) == "without H100 and L40S: no price given"
