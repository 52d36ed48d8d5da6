"""Errors a user can meet, each with the exit code the command line returns for it.

Every message says what is wrong, where, and what would be right. Anything that is not a
`TenfoldError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_USAGE = 2
EXIT_COMPONENT = 3
EXIT_CAPABILITY = 4
EXIT_TOO_MANY_FAILURES = 5
EXIT_INTERRUPTED = 130


class TenfoldError(Exception):
    """Base of all errors a user can cause; `exit_code` is what the CLI returns for it."""

    exit_code = EXIT_RUN_FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  hint: {self.hint}" if self.hint else message


class ConfigError(TenfoldError):
    """A run file, option, workspace file or data file is wrong."""

    exit_code = EXIT_USAGE


class ComponentError(TenfoldError):
    """A component or plugin is missing, broken, or failed to build."""

    exit_code = EXIT_COMPONENT


class CapabilityError(TenfoldError):
    """A model lacks a capability that its role needs."""

    exit_code = EXIT_CAPABILITY


class RunFailed(TenfoldError):
    """The run itself failed; what was done is kept and can be resumed."""

    exit_code = EXIT_RUN_FAILED


class TooManyFailures(TenfoldError):
    """The run finished, but more items failed than `limits.max_failures` allows."""

    exit_code = EXIT_TOO_MANY_FAILURES


class TenfoldWarning(UserWarning):
    """A warning of the host; the command line shows it as one line on stderr."""


class TenfoldDeprecation(TenfoldWarning):
    """A name that still works and will go away; the message says which one to use."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
