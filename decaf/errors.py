"""Errors that a user can act on."""


class DecafError(ValueError):
    """Names the input, the state it is in, and what to do about it. Shown to users as it is."""
