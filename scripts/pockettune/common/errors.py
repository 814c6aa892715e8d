"""The one exception that stands for a user's mistake."""

from pockettune.common.redaction import redact


class UserError(Exception):
    """A mistake in a config value, a file or a folder, told in one line.

    The text says what is wrong, the value, the limit, and what to do. Programs print it after
    `error: ` and exit with status 2; any other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        # What a library says may be of many lines, and name the address with its login.
        super().__init__(redact(" ".join(message.split())))


class DiskFullError(UserError):
    """The disk is full, or would be: nobody's mistake, and over as soon as there is room."""


def list_faults(faults: list[str], limit: int = 5) -> str:
    """Join faults of one kind into one line, so that all of them are mended at once."""
    shown = "; ".join(faults[:limit])
    more = len(faults) - limit
    return f"{shown}; and {more} more" if more > 0 else shown
