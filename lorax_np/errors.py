"""What a caller did wrong, by kind: each message names the argument, what was wanted, and what came."""


class ShapeError(ValueError):
    """An axis has two sizes, or an array has the wrong number of axes."""


class DtypeError(TypeError):
    """Arrays that must share one dtype do not, or a dtype cannot be computed in."""


class BackendError(RuntimeError):
    """The array library that was asked for is missing or does not work here."""


class ConfigError(ValueError):
    """A configuration, or a combination of parts, that has no meaning in the mathematics."""


class FormatError(ValueError):
    """A file that is damaged, hostile, or not of the format it claims."""
