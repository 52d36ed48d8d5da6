"""The outcome of checking one law on one component, and how laws report."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PASS, FAIL, SKIP, WARN = "pass", "fail", "skip", "warn"


class LawBrokenError(Exception):
    """Raised by a law that does not hold; the message says what was seen."""


class NotApplicableError(Exception):
    """Raised by a law that cannot be checked here; the message is the reason."""


class WeaknessError(Exception):
    """Raised by a law whose breach is worth a warning, not a failure."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One law on one subject. `status` is `pass`, `fail`, `skip` or `warn`; `message` says why
    for all but `pass`."""

    subject: str
    law: str
    status: str
    message: str = ""

    def line(self) -> str:
        """The finding as one line."""
        text = f"{self.status:<4}  {self.subject}: {self.law}"
        return f"{text}: {self.message}" if self.message else text

    def to_json(self) -> dict[str, str]:
        """The finding as JSON values."""
        return asdict(self)


def check(subject: str, law: str, function: Callable[..., None], *arguments: Any) -> Finding:
    """Runs one law. Anything it raises, other than an interruption, becomes the finding."""
    try:
        function(*arguments)
    except NotApplicableError as reason:
        return Finding(subject, law, SKIP, _one_line(reason))
    except WeaknessError as weakness:
        return Finding(subject, law, WARN, _one_line(weakness))
    except LawBrokenError as breach:
        return Finding(subject, law, FAIL, _one_line(breach))
    except Exception as error:
        return Finding(subject, law, FAIL, describe_error(error))
    return Finding(subject, law, PASS)


def _one_line(message: BaseException) -> str:
    return " ".join(str(message).split())


def require(holds: bool, message: str) -> None:
    """Raises LawBrokenError with the message unless it holds."""
    if not holds:
        raise LawBrokenError(message)


def describe_error(error: BaseException) -> str:
    """An unexpected error in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}: {text}{place}"
