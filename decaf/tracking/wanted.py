"""How many objects a query means, from its words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise, takewhile

_NUMBERS = dict(zip("two three four five six seven eight nine ten".split(), range(2, 11), strict=True)) | {"both": 2}
_ALL = set("all several many few pair couple these those they them".split())
_ONE = set("a an one this that each every either another it its he she him her".split())
_SKIPPED = set("the which what who find mask segment show only just of are is me my our your their".split())
_IRREGULAR = set("people men women children mice geese feet teeth wolves leaves knives".split())
_NO_PLURALS = set(
    "glasses sunglasses trousers pants jeans shorts scissors goggles headphones tongs binoculars series species news tennis gas lens canvas "
    "always upwards downwards has does".split()
)
_ENDS = set(
    "that which who whose where with without in inside on onto at by to into from near next under over above below behind beside between before "
    "after against around along across through towards for while when as and or being left right closest farthest is are was were has have "
    "of".split()
)
"""Words that end what comes before the noun, and the noun."""
_ARTICLES = set("the a an his her its their my your our".split())


@dataclass(frozen=True)
class Wanted:
    """`most`: objects that are kept at most, None for all that match. `exact`: so many are kept even if they match badly."""

    most: int | None
    exact: bool = False


ONE, ALL = Wanted(1), Wanted(None)


def wanted(query: str, targets: str = "auto") -> Wanted:
    """What to keep. `targets`: one of `decaf.settings.TARGETS`; with "auto" the words of the query decide.

    A number before the noun ("the two dogs", "both cars") is that many, and so are things that are named one by one ("the man and his dog");
    "all", "several" or a noun in the plural is all that match; anything else, and any language but English, is one.
    """
    if targets != "auto":
        return ONE if targets == "one" else ALL
    words = re.findall(r"[a-z]+(?:'[a-z]+)?|\d+", query.lower())
    if words[:2] in (["which", "of"], ["one", "of"]):
        return ONE
    named = _named(words)
    if len(named) > 1:
        return ALL if any(_is_plural(noun) for noun in named) else Wanted(len(named), exact=True)
    many = False
    head: list[str] = []
    for place, word in enumerate(words):
        if not head and (word in _NUMBERS or (word.isdigit() and 2 <= int(word) <= 20)):
            return Wanted(_NUMBERS[word] if word in _NUMBERS else int(word), exact=True)
        if not head and word in _ALL:
            many = True
        elif not head and word in _ONE and not many:
            if word == "a" and words[place + 1 : place + 2] in (["pair"], ["couple"], ["few"]):
                continue
            return ONE
        elif not head and word in _SKIPPED:
            continue
        elif word in _ENDS or (head and word.endswith("ing")):
            break
        else:
            head.append(word)
    return ALL if many or (head and _is_plural(head[-1])) else ONE


def _named(words: list[str]) -> list[str]:
    """The nouns of a query that lists things, each with an article: "the red car, the bus and the dog on the left"."""
    if "and" not in words:
        return []
    place = words.index("and")
    before, after = words[:place], words[place + 1 :]
    # "the dog between the car and the tree" is one, and so is "the black and white dog".
    if not before or not after or before[0] not in _ARTICLES or after[0] not in _ARTICLES or not _ENDS.isdisjoint(before):
        return []
    nouns = [noun for noun, following in pairwise([*before, "the"]) if following in _ARTICLES and noun not in _ARTICLES]
    rest = list(takewhile(lambda word: word not in _ENDS, after[1:]))
    return nouns + (_named(after) or rest[-1:])


def _is_plural(noun: str) -> bool:
    return noun in _IRREGULAR or _looks_plural(noun)


def _looks_plural(noun: str) -> bool:
    return len(noun) > 3 and noun.endswith("s") and not noun.endswith(("ss", "us", "is", "'s")) and noun not in _NO_PLURALS
