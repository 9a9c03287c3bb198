"""Errors that a user can act on."""


class DecafError(ValueError):
    """Names the input, the state it is in, and what to do about it. Shown to users as it is."""


def shown(text: object, longest: int = 160) -> str:
    """A name or a value from outside, for a message: on one line, without its middle where it is long."""
    text = str(text)
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]}...{text[-longest // 4 :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def reason(error: BaseException) -> str:
    """The first sentence of what a library says, or the kind of error where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shown(lines[0].split(". ")[0].rstrip("."))


def out_of_memory(error: Exception, what: str, remedy: str) -> Exception:
    """The same kind of error, so that a host still recognises it and can free memory, with a message that says what to lower."""
    return type(error)(f"GPU memory ran out during {what}, also with smaller batches. {remedy}")
