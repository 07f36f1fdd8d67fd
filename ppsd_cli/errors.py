"""Errors that a person can act on, each with the exit code of ``docs/cli.md``.

A message says what is wrong, where, and what to do, in one or two lines. A bug is an
``AssertionError``, never one of these.
"""


class PpsdError(Exception):
    """Base of all user-facing errors; ``exit_code`` is what the process returns."""

    exit_code = 1


class ConfigError(PpsdError):
    """Usage or configuration: a flag, a profile key, a combination that cannot work."""

    exit_code = 2


class AssetError(PpsdError):
    """A file, model, head or data set is missing or bad."""

    exit_code = 3


class ResourceError(PpsdError):
    """Devices, memory, disk or a port are not available."""

    exit_code = 4


class StageError(PpsdError):
    """A stage died, froze or computed something that is not a number."""

    exit_code = 5


class GateError(PpsdError):
    """A bench gate failed, or outputs that must be equal differ."""

    exit_code = 6
