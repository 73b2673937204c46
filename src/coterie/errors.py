"""Errors that are the user's to read: what went wrong, where, the numbers, what to do.

Everything a user can cause is a `CoterieError`. The command line prints it as one message and exits with `exit_code`;
anything else that escapes is a bug and keeps its traceback.
"""


class CoterieError(Exception):
    """A problem the user can understand and act on.

    Parameters
    ----------
    message : str
        What went wrong, where, with the numbers.
    hint : str, optional
        What to do about it; printed on its own line.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(CoterieError):
    """The request cannot be right: unknown names, impossible budgets, options that contradict each other."""


class ModelError(CoterieError):
    """The model is not one this operation can handle: no MoE layers, routing that cannot be sliced."""


class CheckpointError(CoterieError):
    """The checkpoint is damaged, incomplete, unsafe to read or inconsistent with its config."""


class DataError(CoterieError):
    """The text is missing, empty, too short or not readable."""


class OutputError(CoterieError):
    """The result cannot be written: not permitted, no space, already there, in use by another run."""

    exit_code = 1
