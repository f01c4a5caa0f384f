"""Submit a run to a Ray cluster, show its log, and end with its exit status.

    python cluster/submit.py [--address URL] [--runtime-env FILE] [--id NAME] [--no-wait] -- COMMAND...

    python cluster/submit.py -- python -m raydistill.run configs/lm_topk.yaml

Needs `ray[default]` alone. Beyond `ray job submit` it goes on showing the log when the connection breaks, takes up a
job of the same `--id` that is still running instead of starting another, and ends with the status of the run itself:
0 done, 2 something in the configuration or the data, 3 a check failed, 1 anything else. Ctrl-C leaves the job running
and says how to see and how to stop it; a run that was stopped goes on when it is submitted again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import time
from pathlib import Path

from aiohttp import ClientError, WSServerHandshakeError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

ENDED = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}
POLL_SECONDS = 2.0
PATIENCE_SECONDS = 300.0
DISCONNECTS = (OSError, RuntimeError, ClientError)
"""What a server that cannot be reached, or breaks off, is told by; the errors of `requests` are `OSError`."""
TOKEN = "the cluster did not accept the token; wanted RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        help="of the dashboard (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)",
    )
    parser.add_argument("--runtime-env", type=Path, help="YAML file; default: the working folder and nothing else")
    parser.add_argument("--id", help="name of the job; Ray makes one up otherwise")
    parser.add_argument("--no-wait", action="store_true", help="print the job's name and return")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after `--`")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command; wanted for example: -- python -m raydistill.run configs/lm_topk.yaml")
    try:
        environment = runtime_env(options.runtime_env)
    except (OSError, ValueError) as error:
        print(f"--runtime-env: {error}", file=sys.stderr)
        return 2
    try:
        client = JobSubmissionClient(options.address)
        job = submit(client, command, environment, options.id)
        if options.no_wait:
            print(job)
            return 0
    except AuthenticationError as error:
        print(f"{options.address}: {TOKEN}. {error}", file=sys.stderr)
        return 2
    except (*DISCONNECTS, ValueError) as error:
        print(f"{options.address}: {error}", file=sys.stderr)
        return 2
    try:
        return follow(client, job)
    except AuthenticationError as error:
        print(f"{options.address}: {TOKEN}; {job} goes on. {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = f"--address {options.address} {job}"
        print(f"\n{job} goes on. To see it: ray job logs --follow {where}", file=sys.stderr)
        print(f"To stop it: ray job stop {where}", file=sys.stderr)
        return 130


def runtime_env(file: Path | None) -> dict[str, object]:
    """The environment of the job; the folder that is submitted is the one this script is started in.

    Raises `OSError` or `ValueError` when `file` cannot be read or is no map.
    """
    if file is None:
        return {"working_dir": ".", "excludes": ["/runs", "/.venv", "/.git"]}
    import yaml

    try:
        found = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: wanted a map such as cluster/runtime_env.yaml holds, found {found!r}")
    return found


def submit(client: JobSubmissionClient, command: list[str], environment: dict[str, object], name: str | None) -> str:
    """The name of the job: a new one, or that of the same name which is still running."""
    if name is not None and any(j.submission_id == name and j.status not in ENDED for j in client.list_jobs()):
        print(f"{name} is running already; this is its log.", file=sys.stderr)
        return name
    if name is not None and any(j.submission_id == name for j in client.list_jobs()):
        client.delete_job(name)  # an ended one, whose name is wanted again
    return client.submit_job(entrypoint=shlex.join(command), runtime_env=environment, submission_id=name)


def follow(client: JobSubmissionClient, job: str) -> int:
    """Show the log of `job` until it ends; its exit status. Raises `AuthenticationError` when the token is refused."""
    log = Log()
    silent_since = None
    while True:
        try:
            asyncio.run(log.show(client, job))
            info = client.get_job_info(job)
            silent_since = None
            if info.status in ENDED:
                break
        except DISCONNECTS as error:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > PATIENCE_SECONDS:
                print(f"no answer for {PATIENCE_SECONDS:.0f} s: {error}", file=sys.stderr)
                return 1
        time.sleep(POLL_SECONDS)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    print(f"{job}: {info.status}. {info.message or ''}".rstrip(), file=sys.stderr)
    code = info.driver_exit_code or 1
    return code if 0 < code < 128 else 1  # beyond, a signal ended it


class Log:
    """What has been printed of a log. Every stream begins at the first line; what is known is passed."""

    def __init__(self) -> None:
        self.shown = 0

    async def show(self, client: JobSubmissionClient, job: str) -> None:
        """Print the log of `job` from where the last stream broke off until this one ends."""
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                print(text[max(0, self.shown - seen) :], end="", flush=True)
                seen += len(text)
                self.shown = max(self.shown, seen)
        except WSServerHandshakeError as error:
            if error.status in (401, 403):
                raise AuthenticationError(f"HTTP status {error.status}") from error
            raise


if __name__ == "__main__":
    sys.exit(main())
