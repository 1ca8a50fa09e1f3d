"""DemoError: something the user must mend before the demo can run."""


class DemoError(RuntimeError):
    """The message is one line, for the user."""
