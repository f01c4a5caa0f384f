"""Names in cluster/ that only a cloud or a registry could confirm, and when and where each was last seen.

A name that the files use and this table lacks fails the tests: look it up first (the command beside each table, or the
vendor's documents), then add it here with the day.
"""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    """What one machine has, and the kind of its GPUs by Ray's name."""

    cpus: int
    gpus: int = 0
    kind: str | None = None


# gcloud compute machine-types describe NAME --zone=us-central1-a. 2026-11-22: A3 in Compute Engine's documents, G2 in
# public lists of machines; N2 has its number of processors in the name.
GCP_MACHINES = {
    "n2-standard-8": Machine(8),
    "n2-standard-16": Machine(16),
    "g2-standard-16": Machine(16, 1, "L4"),
    "a3-highgpu-8g": Machine(208, 8, "H100"),
}

# Boot disks of each series; the default of the interface, pd-standard, is not among them for G2 and A3.
# 2026-11-22: SkyPilot's issue 4705 and pull requests 5351 and 5457, which cite Google's tables.
GCP_BOOT_DISKS = {
    "n2": {"pd-standard", "pd-balanced", "pd-ssd"},
    "g2": {"pd-balanced", "pd-ssd"},
    "a3": {"pd-balanced", "pd-ssd", "hyperdisk-balanced"},
}

# gcloud compute images list --project=deeplearning-platform-release --filter="family~nvidia-580"
# 2026-11-22: in public scripts that start machines from it, an image of August 2026 among them.
GCP_IMAGE_FAMILIES = {"deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2204-nvidia-580"}

# aws ec2 describe-instance-types --instance-types NAME. 2026-11-22: names in the EC2 model of botocore; G6e and P5 in
# public lists of machines; sizes of M7i by AWS's rule, four processors for each x of xlarge.
AWS_MACHINES = {
    "m7i.2xlarge": Machine(8),
    "m7i.4xlarge": Machine(16),
    "g6e.4xlarge": Machine(16, 1, "L40S"),
    "p5.48xlarge": Machine(192, 8, "H100"),
}

# aws ssm get-parameter --name NAME. 2026-11-22: in public scripts that ask for it.
AWS_PARAMETERS = {"/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"}

# aws iam get-policy --policy-arn arn:aws:iam::aws:policy/NAME. 2026-11-22: the first two in Ray's own launcher, the
# third in public scripts that attach it.
AWS_POLICIES = {"AmazonEC2FullAccess", "AmazonS3FullAccess", "AmazonSSMReadOnlyAccess"}

# docker manifest inspect rayproject/ray:VERSION-TAG. 2026-11-22: seen with versions 2.44 to 2.58, not yet with 2.60.0.
RAY_TAGS = {"py311-cpu", "py311-gpu"}

OLDEST_DRIVER = 580
"""Of NVIDIA, for CUDA 13, which the torch of pyproject.toml brings (CUDA's release notes, table of drivers)."""
