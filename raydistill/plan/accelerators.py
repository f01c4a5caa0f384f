"""What accelerators can do, by Ray's names for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device: peak rate of dense bf16 matrix products and memory."""

    flops: float
    """Dense bf16 FLOP per second, without structured sparsity."""
    memory_bytes: float
    """Device memory."""
    source: str
    """Where the numbers are printed. Datasheets that state rates with sparsity are halved."""


ACCELERATORS = {
    "A100": Accelerator(312e12, 80e9, "NVIDIA A100 80GB Tensor Core GPU datasheet (SXM)"),
    "B200": Accelerator(2250e12, 180e9, "NVIDIA HGX B200 specifications, per GPU"),
    "H100": Accelerator(989e12, 80e9, "NVIDIA H100 Tensor Core GPU datasheet (SXM)"),
    "H200": Accelerator(989e12, 141e9, "NVIDIA H200 Tensor Core GPU datasheet (SXM)"),
    "L4": Accelerator(121e12, 24e9, "NVIDIA L4 Tensor Core GPU datasheet"),
    "L40S": Accelerator(362e12, 48e9, "NVIDIA L40S GPU datasheet"),
}
"""Keys are those of `plan.accelerator`."""
