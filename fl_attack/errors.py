"""What goes wrong in a way that a user can do something about; each message is one line."""


class InputError(ValueError):
    """Bad input; the message is one line: what was wrong, what is allowed."""


class RunError(RuntimeError):
    """A run that could not go on; the message is one line."""


class Interrupted(KeyboardInterrupt):
    """A run that a signal ended; the message is one line, with what is kept and where."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code  # what the program exits with: 130 after Ctrl-C, 143 after SIGTERM


def one_line(error: BaseException) -> str:
    """The message of an error in one line; empty where it has none."""
    return " ".join(str(error).split())


def message_or_type(error: BaseException) -> str:
    """The message of an error in one line; the name of its type where it has none."""
    return one_line(error) or type(error).__name__
