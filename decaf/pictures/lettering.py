"""Text in pictures, in any script for which the machine has a font."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

# Names that Pillow looks up in the system's font folders (Linux, Windows, macOS), from common to special scripts.
_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf", "Arial.ttf", "segoeui.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc", "YuGothM.ttc",
    "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf", "wqy-zenhei.ttc", "Nirmala.ttc",
    "NotoSansDevanagari-Regular.ttf", "NotoSansArabic-Regular.ttf", "NotoSansThai-Regular.ttf",
)  # fmt: skip
_MISSING = "\uffff"  # never a character, so that its picture is the font's sign for a character it lacks


def font_for(text: str, size: int) -> ImageFont.ImageFont:
    """A font that has every character of `text`: Pillow's own if it does, else one of the system; Pillow's own if none does."""
    characters = frozenset(plain(text)) - {" "}
    own = ImageFont.load_default(size)
    if _lacks(own, characters) == 0:
        return own
    # The first of those that lack the fewest: a query may mix scripts that no single font has.
    return min([*_system_fonts(size), own], key=lambda font: _lacks(font, characters))


@lru_cache(maxsize=8)
def _system_fonts(size: int) -> tuple[ImageFont.ImageFont, ...]:
    found = []
    for name in _FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not on this machine
            continue
    return tuple(found)


def _lacks(font: ImageFont.ImageFont, characters: frozenset[str]) -> int:
    missing = _picture(font, _MISSING)
    return sum(_picture(font, one) == missing for one in characters)


def _picture(font: ImageFont.ImageFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def plain(text: str) -> str:
    """`text` with one space for every run of spaces, line ends and control characters: drawing fails at the latter."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def wrapped(text: str, font: ImageFont.ImageFont, width: float, most: int) -> list[str]:
    """Plain `text` in at most `most` lines of `width` pixels, broken at spaces where there are some; what does not fit ends in "..."."""
    rest = plain(text)
    lines: list[str] = []
    while rest:
        fits = _fitting(rest, font, width)
        if fits == len(rest):
            return [*lines, rest]
        if len(lines) + 1 == most:
            return [*lines, rest[: _fitting(rest, font, width - font.getlength("..."))].rstrip() + "..."]
        space = rest.rfind(" ", 1, fits + 1)
        cut = space if space > 0 else fits
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.ImageFont, width: float) -> int:
    """How many characters fit, at least one: found by halving, for a text of thousands of them."""
    low, high = 1, min(len(text), 500)  # no line of a sheet is longer
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def write(picture: Image.Image, xy: tuple[float, float], text: str, size: int, colour: tuple[int, int, int], anchor: str = "la") -> None:
    """Draws one line of text at `xy`; `anchor` as Pillow names them ("la": left, top)."""
    ImageDraw.Draw(picture).text(xy, text, fill=colour, font=font_for(text, size), anchor=anchor)
