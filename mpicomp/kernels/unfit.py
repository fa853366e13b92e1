"""Calls that a backend cannot take, and who takes them instead."""

from functools import wraps


class Unfit(ValueError):
    """A call that a backend's function cannot take; the reference may."""

    def __init__(self, text="float32 and uint8 arrays without gaps, of the right sizes, are "
                            "expected"):
        super().__init__(text)


def otherwise(theirs, instead):
    """Decorates a backend's form of the reference's function `theirs`: what is Unfit goes to
    `instead`."""
    def decorate(function):
        @wraps(function)
        def call(*arguments):
            try:
                return function(*arguments)
            except Unfit:
                pass  # outside of this block an error of the reference's has no context
            return instead(*arguments)

        call.__doc__ = theirs.__doc__
        return call

    return decorate
