"""Text in pictures, in any script that the machine has a font for."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Names that Pillow looks up in the system's font folders (Linux, Windows, macOS), common scripts first.
_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf", "Arial.ttf", "segoeui.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc", "YuGothM.ttc",
    "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf", "wqy-zenhei.ttc", "Nirmala.ttc",
    "NotoSansDevanagari-Regular.ttf", "NotoSansArabic-Regular.ttf", "NotoSansThai-Regular.ttf",
)  # fmt: skip
_MISSING = "\uffff"  # never a character, so it is drawn as the font's placeholder glyph


def font_for(text: str, size: int) -> ImageFont.ImageFont:
    """A font with every character of `text`: Pillow's own, else one of the system, else the one that lacks the fewest."""
    characters = frozenset(plain(text)) - {" "}
    own = ImageFont.load_default(size)
    if _lacks(own, characters) == 0:
        return own
    # A query may mix scripts that no single font covers.
    return min([*_system_fonts(size), own], key=lambda font: _lacks(font, characters))


@lru_cache(maxsize=8)
def _system_fonts(size: int) -> tuple[ImageFont.ImageFont, ...]:
    fonts = []
    for name in _FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not on this machine
            continue
    return tuple(fonts)


def _lacks(font: ImageFont.ImageFont, characters: frozenset[str]) -> int:
    """How many of the characters the font lacks."""
    placeholder = _glyph(font, _MISSING)
    return sum(_glyph(font, character) == placeholder for character in characters)


def _glyph(font: ImageFont.ImageFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def plain(text: str) -> str:
    """`text` with every run of spaces, line ends and control characters replaced by one space: Pillow cannot draw the latter."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def wrapped(text: str, font: ImageFont.ImageFont, width: float, max_lines: int) -> list[str]:
    """Plain `text` in at most `max_lines` lines of `width` pixels, broken at spaces where possible. Text that does not fit ends in "..."."""
    rest = plain(text)
    lines: list[str] = []
    while rest:
        fits = _fitting(rest, font, width)
        if fits == len(rest):
            return [*lines, rest]
        if len(lines) + 1 == max_lines:
            return [*lines, rest[: _fitting(rest, font, width - font.getlength("..."))].rstrip() + "..."]
        space = rest.rfind(" ", 1, fits + 1)
        cut = space if space > 0 else fits
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.ImageFont, width: float) -> int:
    """How many characters fit, at least one. Bisection, because a text may have thousands."""
    low, high = 1, min(len(text), 500)  # no line of a contact sheet is longer
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def captioned(picture: Tensor, text: str) -> Tensor:
    """(H, W, 3) uint8 with a line of text over a dark strip at its top; what does not fit ends in "..."."""
    size = max(9, picture.shape[0] // 24)
    image, font = Image.fromarray(picture.numpy()), font_for(text, size)
    lines = wrapped(text, font, picture.shape[1] - size, 1)
    image.paste((18, 20, 26), (0, 0, image.width, size + size // 2))
    for line in lines:
        write(image, (size // 2, size // 4), line, size, (240, 242, 246))
    return torch.from_numpy(np.array(image))


def write(picture: Image.Image, xy: tuple[float, float], text: str, size: int, colour: tuple[int, int, int], anchor: str = "la") -> None:
    """Draws one line of text at `xy`. `anchor`: as in Pillow ("la" is left, top)."""
    ImageDraw.Draw(picture).text(xy, text, fill=colour, font=font_for(text, size), anchor=anchor)
