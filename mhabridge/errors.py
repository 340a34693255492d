"""The errors of mhabridge: one base class, and what every message says.

Each error carries four short texts: the *subject* (the argument, or the parameter's path), what was *given*, what was
*expected*, and the *advice* (what to do next). Any of the last three may be empty. ``str(error)`` joins them into
one sentence each, and ``to_dict`` / ``from_dict`` carry an error over the border between two interpreters.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

from typing import Any

_LONGEST = 4000  # characters


def _cut(text: str) -> str:
    """A text without its middle when it is very long: a hostile file may have names of megabytes."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


class MHABridgeError(Exception):
    """Base of every error that mhabridge raises on purpose.

    Args:
        subject: the argument, the parameter's path or the file that the error is about.
        given: what was found there.
        expected: what would have been right.
        advice: what to do next.

    Example:
        >>> print(WeightsError("q_weight", given="shape (8, 4)", expected="shape (8, 8)", advice="Check kdim."))
        q_weight: given shape (8, 4); expected shape (8, 8). Check kdim.
    """

    def __init__(self, subject: str, *, given: str = "", expected: str = "", advice: str = "") -> None:
        super().__init__(subject, given, expected, advice)
        self.subject = subject
        self.given = given
        self.expected = expected
        self.advice = advice

    def __str__(self) -> str:
        facts = []
        if self.given:
            facts.append(f"given {_cut(self.given)}")
        if self.expected:
            facts.append(f"expected {_cut(self.expected)}")
        head = ": ".join(part for part in (_cut(self.subject), "; ".join(facts)) if part)
        if not self.advice:
            return head
        advice = _cut(self.advice)
        return f"{head} {advice}" if head.endswith((".", "?", "!")) else f"{head}. {advice}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__name__, self.to_dict())

    def to_dict(self) -> dict[str, str]:
        """The error as plain text fields, with its class name under ``kind``."""
        return {
            "kind": type(self).__name__,
            "subject": self.subject,
            "given": self.given,
            "expected": self.expected,
            "advice": self.advice,
        }


class UnsupportedError(MHABridgeError):
    """Something cannot be said, or cannot be done rightly, in that framework."""


class WeightsError(MHABridgeError):
    """A weight has the wrong shape, dtype or name, or would be lost."""


class CheckpointError(MHABridgeError):
    """A file is damaged, of an unknown kind, or asks for something that we refuse to do."""


class BackendError(MHABridgeError):
    """A backend is missing, broken, died or ran out of time.

    ``ending`` says how a worker that died ended ("SIGSEGV", "exit status 1"); it is empty for all else.
    """

    ending = ""


class ArgumentError(MHABridgeError, ValueError):
    """An argument has the right type and a wrong value."""


class ArgumentTypeError(MHABridgeError, TypeError):
    """An argument has the wrong type, or a call has the wrong arguments."""


ERRORS = {
    error.__name__: error
    for error in (
        MHABridgeError,
        UnsupportedError,
        WeightsError,
        CheckpointError,
        BackendError,
        ArgumentError,
        ArgumentTypeError,
    )
}


def from_dict(fields: dict[str, str]) -> MHABridgeError:
    """The error that ``to_dict`` described.

    Example:
        >>> from_dict(ArgumentError("dropout", given="1.5", expected="a number in [0, 1]").to_dict())
        ArgumentError('dropout', '1.5', 'a number in [0, 1]', '')
    """
    kind = ERRORS.get(fields["kind"], MHABridgeError)
    return kind(fields["subject"], given=fields["given"], expected=fields["expected"], advice=fields["advice"])


def _rebuild(kind: str, fields: dict[str, str]) -> MHABridgeError:
    return from_dict({**fields, "kind": kind})
