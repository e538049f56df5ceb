"""What goes wrong in a way that a user can do something about; each message is one line."""


class InputError(ValueError):
    """Bad input; the message is one line: what was wrong, what is allowed."""


class RunError(RuntimeError):
    """A run that could not go on; the message is one line."""
