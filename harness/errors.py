"""Errors that reach a user as one sentence."""


class ReplivitError(ValueError):
    """Something the user can act on: the message is one clear sentence, without a traceback.

    It is a `ValueError`, since nearly always a name, a file or a number was the wrong one.
    """


def one_line(error: BaseException) -> str:
    """The message of `error` as a single line: what a row or a terminal shows."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
