"""The one error that a person can fix: it names the place, what was found there, and the fix."""

from __future__ import annotations


class UserError(Exception):
    """`where: found. Fix: fix` as one message; the command line exits with code 2 on it."""

    def __init__(self, where: str, found: str, fix: str) -> None:
        super().__init__(where, found, fix)  # all three, so that it survives pickling
        self.where, self.found, self.fix = where, found, fix

    def __str__(self) -> str:
        stop = "" if self.found.endswith((".", "?", "!")) else "."
        return f"{self.where}: {self.found}{stop} Fix: {self.fix}"
