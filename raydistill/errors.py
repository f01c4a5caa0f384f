"""Errors a user can cause. Each message says what was wanted, what was found and what to do.

The command line prints the message without a traceback and exits with `exit_status`.
"""

from __future__ import annotations


class RaydistillError(Exception):
    """Base of the errors whose message is meant for the user."""

    exit_status = 1


class ConfigError(RaydistillError):
    """The configuration asks for something impossible or unknown."""

    exit_status = 2


class DataError(RaydistillError):
    """An input file or a model folder cannot be used."""

    exit_status = 2


class CacheMismatch(RaydistillError):
    """A cache was made by another configuration than the one that wants to read it."""

    exit_status = 2


class SignalMismatch(RaydistillError):
    """A batch does not have the fields, dtypes or shapes that its schema promises."""

    exit_status = 2


class VerificationFailed(RaydistillError):
    """A cache is damaged, or a line of the checklist failed."""

    exit_status = 3


class TrainingDiverged(RaydistillError):
    """The loss became NaN, infinite or exploded."""


class StorageFailed(RaydistillError):
    """A store could not be read or written, though it was tried several times."""


class OutOfSpace(RaydistillError):
    """A file could not be written because the disk is full."""


class Interrupted(RaydistillError):
    """The user stopped the run; the same command continues it."""
