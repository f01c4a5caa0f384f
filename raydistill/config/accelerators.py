"""The names of accelerators, which are easily mistyped: a stage would wait for a node that never comes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Sequence
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
OTHERS = ("A2", "A10", "A16", "A30", "A40", "A800", "GH200", "H800", "L40", "RTX-A4000", "RTX-A5000", "RTX-A6000")
"""More that Ray makes of what `nvidia-smi` says, near enough to the first to be taken for a slip."""
NEAR = 0.75
"""Names that are as alike as this are taken for each other's misspelling (`difflib`: twice the common characters)."""


def without_price(names: Collection[str]) -> str:
    """Words for the accelerators whose hours a sum of money leaves out, none when there are none."""
    return f"without {' and '.join(names)}: no price given" if names else ""


def misspelt_accelerators(config: RunConfig) -> Iterator[str]:
    """A line for each accelerator, asked for or priced, that looks like another one's name misspelt.

    Ray takes names from drivers, and clusters may give names of their own, so what is merely unknown is looked up among
    the nodes, or in the cluster's file, together with all else that the stages ask for. With that file, nothing is
    said here.
    """
    resources, prices = config.resources, config.plan.price_per_hour
    if resources.cluster is not None or os.environ.get("RAYDISTILL_CLUSTER"):
        return
    asked = {"teacher": resources.teacher.accelerator, "train": resources.train.accelerator}
    for part, name in asked.items():
        if name is not None and (nearest := _meant(name, KNOWN)):
            own = "for a name of your cluster's own, name its file: resources.cluster"
            yield f"resources.{part}.accelerator: {_wanted(name, nearest)}; {own}."
    for name in prices if isinstance(prices, dict) else ():
        if name not in asked.values() and (nearest := _meant(name, [*filter(None, asked.values()), *KNOWN])):
            yield f"plan.price_per_hour: {_wanted(name, nearest)}."


def _meant(name: str, known: Sequence[str]) -> str | None:
    """The one of `known` that `name` is not, but nearly."""
    if name in known or name in OTHERS:
        return None
    by_small = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_small, n=1, cutoff=NEAR)
    return by_small[near[0]] if near else None


def _wanted(name: str, nearest: str) -> str:
    return f"wanted Ray's name of an accelerator (L40S, H100, …), found {name!r}; nearest: {nearest}"
