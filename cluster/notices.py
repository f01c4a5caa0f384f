"""Tell Ray what the cloud says of a spot node beforehand: that it will go.

    nohup python cluster/notices.py aws $RAY_HEAD_IP:6379 &        # or gcp; on every node, after `ray start`

Asks the cloud every five seconds, at the address that every instance has for this. Once told, it has Ray drain this
node, so that nothing more is started here and workers save before the node goes, and ends. A node that is no spot node
never hears anything.
"""

from __future__ import annotations

import argparse
import http.client
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

METADATA = os.environ.get("RAYDISTILL_METADATA", "http://169.254.169.254")
POLL_SECONDS = float(os.environ.get("RAYDISTILL_METADATA_SECONDS", "5"))
REMAINING = {"aws": 110, "gcp": 25}
"""Seconds from the notice to the end, less five for asking."""
OWN_NODE = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(ray.get_runtime_context().get_node_id())"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", choices=REMAINING)
    parser.add_argument("address", help="of the Ray head, host:port")
    options = parser.parse_args(arguments)
    while (node := own_node(options.address)) is None:  # now, since thirty seconds are too few to start Python twice
        time.sleep(POLL_SECONDS)
    while not told(options.cloud):
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + REMAINING[options.cloud]
    print(f"{options.cloud} will take this node; draining {node}", flush=True)
    command = ["ray", "drain-node", "--address", options.address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"{options.cloud} takes its spot node"]
    while (left := deadline - time.monotonic()) > 0:
        status = subprocess.run([*command, "--deadline-remaining-seconds", str(int(left) + 1)], check=False).returncode
        if status == 0:
            return 0
        time.sleep(1)
    return 1


def own_node(address: str) -> str | None:
    """Ray's name of the node that this runs on; None while Ray does not say. Another process asks, so that this one
    stays small."""
    command = [sys.executable, "-c", OWN_NODE, address]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()[-1] if done.returncode == 0 else None


def told(cloud: str) -> bool:
    """Whether the cloud has given notice; no answer is none."""
    try:
        return aws() if cloud == "aws" else gcp()
    except (OSError, http.client.HTTPException) as error:
        print(f"{METADATA}: {error}", flush=True)
        return False


def aws() -> bool:
    """Instance metadata, version 2: `spot/instance-action` is not there until the notice."""
    token = ask("latest/api/token", method="PUT", **{"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    try:
        ask("latest/meta-data/spot/instance-action", **{"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise
    return True


def gcp() -> bool:
    """`instance/preempted` is FALSE until the notice."""
    return ask("computeMetadata/v1/instance/preempted", **{"Metadata-Flavor": "Google"}) == "TRUE"


def ask(path: str, method: str = "GET", **headers: str) -> str:
    """The answer to one request; raises `OSError` when there is none."""
    request = urllib.request.Request(f"{METADATA}/{path}", method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return str(answer.read().decode().strip())


if __name__ == "__main__":
    sys.exit(main())
