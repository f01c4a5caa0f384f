"""The names of accelerators, which are easily mistyped: a stage would wait for a node that never comes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydistill.config.schema import RunConfig

KNOWN = (
    "A100", "A100-40G", "A100-80G", "A10G", "AMD-Instinct-MI100", "AMD-Instinct-MI210", "AMD-Instinct-MI250X",
    "AMD-Instinct-MI250X-MI250", "AMD-Instinct-MI300A", "AMD-Instinct-MI300X-HF", "AMD-Instinct-MI300X-OAM",
    "AMD-Instinct-MI308X", "AMD-Instinct-MI325X-OAM", "AMD-Instinct-MI350X-OAM", "AMD-Instinct-MI355X-OAM",
    "AMD-Radeon-HD-7900", "AMD-Radeon-R9-200-HD-7900", "Apple-Silicon", "Ascend910B", "Ascend910B4",
    "aws-neuron-core", "B200", "B300", "FURIOSA_RNGD", "GB200", "GB300", "H100", "H20", "H200", "Intel-GAUDI",
    "Intel-GPU-Max-1100", "Intel-GPU-Max-1550", "K80", "L4", "L40S", "M1", "M1-Max", "M1-Pro", "M1-Ultra", "M2",
    "M2-Max", "M2-Pro", "M2-Ultra", "M3", "M3-Max", "M3-Pro", "MOBILINT_ARIES", "MOBILINT_REGULUS", "MXC500",
    "MXC550", "P100", "P4", "RTX-PRO-6000", "T4", "TPU-V2", "TPU-V3", "TPU-V4", "TPU-V5LITEPOD", "TPU-V5P",
    "TPU-V6E", "TPU-V7X", "V100",
)  # fmt: skip
"""Ray's names (`ray.util.accelerators`); the configuration does without Ray."""


def without_price(names: Collection[str]) -> str:
    """Words for the accelerators whose hours a sum of money leaves out, none when there are none."""
    return f"without {' and '.join(names)}: no price given" if names else ""


def unknown_accelerators(config: RunConfig) -> Iterator[str]:
    """A line for each accelerator, asked for or priced, that nobody knows.

    A cluster may give its nodes names of its own. With its file, they are looked up there, together with all else that
    the stages ask for.
    """
    resources = config.resources
    asked = {"teacher": resources.teacher.accelerator, "train": resources.train.accelerator}
    if resources.cluster is None and not os.environ.get("RAYDISTILL_CLUSTER"):
        own = "; for a name of your cluster's own, name its file: resources.cluster"
        for part, name in asked.items():
            if name is not None and name not in KNOWN:
                yield f"resources.{part}.accelerator: {_wanted(name, KNOWN)}{own}."
    prices = config.plan.price_per_hour
    known = (*KNOWN, *filter(None, asked.values()))
    for name in prices if isinstance(prices, dict) else ():
        if name not in known:
            yield f"plan.price_per_hour: {_wanted(name, known)}."


def _wanted(name: str, known: Collection[str]) -> str:
    by_small = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_small, n=1)
    nearest = f"; nearest: {by_small[near[0]]}" if near else ""
    return f"wanted Ray's name of an accelerator (L40S, H100, …), found {name!r}{nearest}"
