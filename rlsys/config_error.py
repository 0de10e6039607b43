"""The error of mistakes that the user can correct.

It stands outside `rlsys.config`, so that loading a model does not import pydantic.
"""


class ConfigError(ValueError):
    """One or more mistakes that the user can correct, a line each: field, value and remedy.

    A command that ends with it prints the lines and exits with code 2, without a traceback.
    """
