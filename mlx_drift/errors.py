"""The one exception a user may see: a single clear line, no traceback."""


class DriftError(Exception):
    """Bad input. The message is one line that names the file, key or value, says what was
    expected and what to do; the command line prints it and exits with code 1."""
