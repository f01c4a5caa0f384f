"""The Slurm script with stand-ins for Slurm and for Ray: what it starts where, and with what status it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster/slurm/raydistill.sbatch"

SRUN = """#!/bin/bash
node=somewhere
while [[ "$1" == --* ]]; do
  case "$1" in --nodelist=*) node="${1#*=}";; --exclude=*) node="not ${1#*=}";; esac
  shift
done
if [ "$1" = hostname ]; then echo 10.0.0.1; exit; fi
echo "$node: ${*##*/}" >> "$CALLS"
exec sleep 600
"""
SCONTROL = """#!/bin/bash
printf 'node1\\nnode2\\nnode3\\n'
"""
RAY = """#!/bin/bash
echo "ray $*" >> "$CALLS"
"""
PYTHON = """#!/bin/bash
if [ "$1" = - ]; then cat > /dev/null; echo "waited for $RAY_NODES nodes at $RAY_ADDRESS" >> "$CALLS"; exit; fi
echo "python $* with $RAY_ADDRESS, $RAY_AUTH_MODE, $RAYDISTILL_HOME" >> "$CALLS"
exit 3
"""
SLEEP = """#!/bin/bash
[ "$1" = 15 ] || exec /bin/sleep "$1"
"""


@pytest.fixture
def calls(tmp_path: Path) -> tuple[int, list[str]]:
    """The status of the script and the lines that its stand-ins wrote."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY, "python": PYTHON, "sleep": SLEEP}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path), "CALLS": str(tmp_path / "calls"),
        "SLURM_SUBMIT_DIR": "/shared/project", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_ON_NODE": "64", "SLURM_GPUS_ON_NODE": "8",
        "RAYDISTILL_PYTHON": str(folder / "python"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(SCRIPT), "configs/x.yaml", "seed=1"], env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, sorted((tmp_path / "calls").read_text().splitlines())


def test_head_workers_and_run_are_started_where_they_belong(calls: tuple[int, list[str]]) -> None:
    _, lines = calls
    assert lines == sorted(
        [
            "ray get-auth-token --generate",
            "node1: ray start --head --block --node-ip-address=10.0.0.1 --port=20007 --num-cpus=64 --num-gpus=8 "
            "--include-dashboard=true --dashboard-host=127.0.0.1 --disable-usage-stats",
            "not node1: ray start --block --address=10.0.0.1:20007 --num-cpus=64 --num-gpus=8",
            "waited for 3 nodes at 10.0.0.1:20007",
            "python -m raydistill.run configs/x.yaml seed=1 with 10.0.0.1:20007, token, /shared/project",
        ]
    )


def test_the_scripts_status_is_that_of_the_run(calls: tuple[int, list[str]]) -> None:
    assert calls[0] == 3


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")  # the extra `test` installs it
    done = subprocess.run([str(shellcheck), str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
