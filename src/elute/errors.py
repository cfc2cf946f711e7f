"""The error tree. Every message is one sentence: where, found, wanted, what to do.

And NOTE, the logging level of what a user should read once though nothing is wrong.
"""

NOTE = 25  # between INFO and WARNING


class EluteError(Exception):
    """Anything elute refuses; the CLI prints it as one line and exits with code 1."""


class FormatError(EluteError):
    """A file is not what its format promises."""


class UnsupportedError(EluteError):
    """A well-formed input that elute does not implement."""


class NoHomeError(UnsupportedError):
    """Nothing says where to keep what elute makes: no home folder, and none is given."""


class ShapeError(EluteError, ValueError):
    """Sizes that do not fit together."""


class BudgetError(EluteError):
    """A limit (context, memory, disk) is too small for what was asked."""


class DeviceError(EluteError):
    """A compute device or instruction set is missing or failed."""
