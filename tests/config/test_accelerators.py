"""Names of accelerators: those of Ray, which the configuration repeats so as to do without it."""

from __future__ import annotations

from ray.util.accelerators import accelerators

from raydistill.config.accelerators import KNOWN, without_price


def test_the_names_are_those_of_ray() -> None:
    names = {value for name, value in vars(accelerators).items() if name[0] != "_" and isinstance(value, str)}
    assert set(KNOWN) == names


def test_what_a_sum_leaves_out_is_named() -> None:
    assert without_price([]) == ""
    assert without_price(["H100", "L40S"]) == "without H100 and L40S: no price given"
