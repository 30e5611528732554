"""Classes that let torch's C++ raise our errors with their fields.

Inside `backward` torch converts a C++ exception by asking it for a Python class and calling that class with
one message. The native binding answers with a carrier made for that one failure.
"""

from __future__ import annotations

from typing import Any


def carrier(error: Exception) -> type[Exception]:
    """A subclass of the error's class whose instances, made from any message, are copies of `error`."""
    original = type(error)
    reduced: Any = error.__reduce__()
    make, arguments = reduced[:2]

    class Carrier(original):  # type: ignore[misc, valid-type]
        def __init__(self, _message: str) -> None:
            super().__init__(*arguments)

        def __reduce__(self) -> tuple[Any, ...]:
            return make, arguments

    Carrier.__name__ = Carrier.__qualname__ = original.__name__
    Carrier.__module__ = original.__module__
    return Carrier
