"""Errors that a user can act on."""


class DecafError(ValueError):
    """Names the input, the state it is in, and what to do about it. Shown to users as it is."""


def out_of_memory(error: Exception, what: str, remedy: str) -> Exception:
    """The same kind of error, so that a host still recognises it and can free memory, with a message that says what to lower."""
    return type(error)(f"GPU memory ran out during {what}, also with smaller batches. {remedy}")
