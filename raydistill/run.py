"""The command line: `python -m raydistill.run FILES… [key=value …] [--stages a,b | --tune FILE] [--check | --plan]`.

Ray, torch and everything that needs them are imported inside functions, so that `--check` and a misspelt key answer
in a fraction of a second and on a machine that has neither.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from raydistill import errors
from raydistill.config.load import OVERRIDE, Draft, read_draft
from raydistill.config.paths import resolve_paths
from raydistill.config.schema import STAGES, RunConfig
from raydistill.errors import ConfigError, Interrupted, RaydistillError

EPILOG = f"""\
stages, in order:
  {", ".join(STAGES)}

examples:
  raydistill configs/quickstart.yaml
  raydistill configs/lm_topk.yaml my_cluster.yaml phases.0.recipe.alpha=0.5
  raydistill configs/lm_topk.yaml --check
  raydistill configs/lm_topk.yaml --plan plan.accelerator=H200
  raydistill configs/lm_topk.yaml --stages verify
  raydistill configs/lm_topk.yaml --tune tune/alpha_temperature.yaml
  ray job submit --working-dir . -- python -m raydistill.run configs/lm_topk.yaml

Files merge left to right: maps merge, lists are replaced. Overrides come last; their values are YAML, and numbers in a
key are positions in a list. Every key is described in docs/configuration.md. The same command continues a run that was
stopped; finished stages are skipped. RAY_ADDRESS names a running cluster to join; without it a local one is started.

exit status:
  0  done
  1  stopped, or something unforeseen
  2  the configuration or the data cannot be used
  3  a cache is damaged or a line of the checklist failed
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Ray reads this when it is imported. A thread that outlives the cluster would join one that it finds.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    options = _parser().parse_intermixed_args(arguments)
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        _act(options)
    except KeyboardInterrupt:
        stopped = Interrupted(f"stopped; what is finished is kept. Go on with:\n  {_command(arguments)}")
        return _report(stopped, stopped, options.debug)
    except Exception as error:
        return _report(error, root_cause(error), options.debug)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raydistill",
        usage="%(prog)s FILE [FILE ...] [key=value ...] [--stages NAMES | --tune FILE] [--check | --plan] [--debug]",
        description="Distil a teacher into a student: inputs, teacher signals, verification, training, evaluation, "
        "export and report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="+", metavar="FILE | key=value", help="configuration files, then overrides")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stages", metavar="NAMES", help="run exactly these stages, separated by commas")
    what.add_argument("--tune", metavar="FILE", help="train many students over a search space, from one cache")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="check the configuration and do nothing else")
    instead.add_argument("--plan", action="store_true", help="say what the run will cost and do nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _act(options: argparse.Namespace) -> None:
    overrides = [word for word in options.words if OVERRIDE.match(word)]
    files = [word for word in options.words if not OVERRIDE.match(word)]
    if not files:
        raise ConfigError("wanted at least one configuration file, found only overrides; e.g. configs/quickstart.yaml")
    stages = parse_stages(options.stages) if options.stages is not None else None
    draft = read_draft(files, overrides)
    config = draft.config()
    if options.check:
        tuned = f"; {_space(options.tune, draft)}" if options.tune is not None else ""
        print(f"{config.name}: the configuration is valid ({_summary(config)}{tuned})")
    elif options.plan and options.tune is not None:
        raise ConfigError(
            "--plan: wanted a run alone, found --tune too. Leave --tune out: a sweep costs the run's caches once and a "
            "training per trial, and --check with --tune says how many trials there are."
        )
    elif options.plan:
        from raydistill.plan import placement_table, plan, table

        resolved = resolve_paths(config)
        placed = placement_table(resolved)  # first: what no node can hold is an error
        print("\n\n".join(filter(None, (table(plan(resolved)), placed))))
    elif options.tune is not None:
        from raydistill.search.sweep import run_sweep

        run_sweep(draft, options.tune)
    else:
        from raydistill.pipeline import run

        run(resolve_paths(config), stages)


def parse_stages(text: str) -> tuple[str, ...]:
    """The stages in a comma-separated list, in the order of the pipeline; `ConfigError` for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise ConfigError(f"--stages: wanted names out of {', '.join(STAGES)}; found {name!r}{hint}.")
    if not names:
        raise ConfigError(f"--stages: wanted at least one of {', '.join(STAGES)}; found none.")
    return tuple(stage for stage in STAGES if stage in names)


def _space(file: str, draft: Draft) -> str:
    """A search space in words, once it is checked."""
    from raydistill.config.tune import load_space

    space = load_space(file, draft)
    points = space.points()
    trials = space.sweep.trials if points is None else len(points)
    return f"{trials} trials over {', '.join(space.sweep.keys)}"


def _summary(config: RunConfig) -> str:
    parts = [(len(config.teachers), "teacher"), (len(config.phases), "phase")]
    return ", ".join(f"{number} {word}{'' if number == 1 else 's'}" for number, word in parts)


def root_cause(error: BaseException) -> BaseException:
    """The first `RaydistillError` among an error and what it wraps, else the error itself.

    Ray wraps the errors of workers in its own. Those carry the original in `cause` or in the chain of causes; Ray Data
    keeps only its text, out of which it is made again.
    """
    wrapped = list(_wrapped(error, set()))
    ours = next((e for e in wrapped if isinstance(e, RaydistillError)), None)
    return ours or next((e for e in map(_quoted, wrapped) if e is not None), error)


def _wrapped(error: object, seen: set[int]) -> Iterator[BaseException]:
    if not isinstance(error, BaseException) or id(error) in seen:
        return
    seen.add(id(error))
    # An error that Ray raises in the guise of its cause inherits from it too, but its text is a remote traceback.
    yield from _wrapped(getattr(error, "cause", None), seen)
    yield error
    failures = getattr(error, "worker_failures", None)
    for below in (error.__cause__, error.__context__, *(failures.values() if isinstance(failures, dict) else ())):
        yield from _wrapped(below, seen)


_QUOTED = re.compile(r"^raydistill\.errors\.(\w+): (.*?)\s*(?=^\s*$|\Z)", re.MULTILINE | re.DOTALL)
"""A traceback's last line: the class and the message, which may have several lines."""


def _quoted(error: BaseException) -> RaydistillError | None:
    """The error of ours whose traceback is quoted in the text of `error`."""
    match = _QUOTED.search(str(error))
    kind = getattr(errors, match[1], None) if match else None
    return kind(match[2]) if match and kind is not None and issubclass(kind, RaydistillError) else None


def _report(error: BaseException, cause: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(cause, RaydistillError):
        label = "" if isinstance(cause, Interrupted) else "error: "
        print(f"raydistill: {label}{cause}", file=sys.stderr)
        return cause.exit_status
    line = next((text for text in reversed(str(cause).strip().splitlines()) if text.strip()), "no message")
    print(f"raydistill: unexpected {type(cause).__name__}: {line.strip()}", file=sys.stderr)
    if not debug:
        print("Run the same command with --debug for the traceback.", file=sys.stderr)
    return 1


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "raydistill.run", *arguments])


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Treat a polite kill (a job's stop, a node's shutdown) like Ctrl-C."""
    raise KeyboardInterrupt


def console() -> NoReturn:
    """The `raydistill` script."""
    sys.exit(main())


if __name__ == "__main__":
    console()
