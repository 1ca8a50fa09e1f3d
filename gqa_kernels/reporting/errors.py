"""UsageError: a problem that the user must fix before a command can run."""


class UsageError(RuntimeError):
    """Its message is one line, written for the user."""
