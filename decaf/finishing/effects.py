"""What is made of one frame and its mask. Frames are (H, W, 3) uint8 arrays, alpha is (H, W) uint8: 255 in the object, 0 in the rest."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image, ImageFilter

from ..errors import DecafError, shown
from ..settings import EFFECTS, EffectSettings
from .edges import box_of, grown

_KEPT_AROUND = 16
"""Pixels around a cut-out that keep their colour, so that the black beyond does not run into its soft edge when the file is compressed."""


def check_effect(settings: EffectSettings, has_background: bool) -> None:
    """DecafError: a setting cannot be, or the picture for the background is missing."""
    if settings.effect not in EFFECTS:
        raise DecafError(f"There is no effect '{shown(settings.effect)}'. Choose one of {', '.join(EFFECTS)}.")
    if not 0 <= settings.strength <= 1:
        raise DecafError(f"'strength' is {settings.strength:g}, which is not between 0 and 1. Give such a number.")
    if settings.effect == "colour rest":
        colour_of(settings.colour)
    if settings.effect == "new background" and not has_background:
        raise DecafError("The effect 'new background' has no background. Connect an image or a video, or choose another effect.")


def colour_of(text: str) -> tuple[int, int, int]:
    """#RRGGBB or #RGB -> red, green, blue 0..255. DecafError: it is none."""
    found = re.fullmatch(r"#?([0-9a-fA-F]{6}|[0-9a-fA-F]{3})", text.strip())
    if not found:
        raise DecafError(f"'colour' is '{shown(text, 40)}', which is no colour. Write it as #RRGGBB, for example #00B140.")
    digits = found[1] if len(found[1]) == 6 else "".join(2 * digit for digit in found[1])
    return tuple(int(digits[place : place + 2], 16) for place in (0, 2, 4))


def has_alpha(settings: EffectSettings) -> bool:
    """Whether what is made has transparent parts."""
    return settings.effect == "cut out"


def made(frame: np.ndarray, alpha: np.ndarray, settings: EffectSettings, background: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8, or (H, W, 4) with straight alpha if `has_alpha`. `background`: (H, W, 3), for "new background"."""
    if settings.invert:
        alpha = 255 - alpha
    match settings.effect:
        case "cut out":
            coloured = np.where(grown(alpha > 0, _KEPT_AROUND)[..., None], frame, np.uint8(0))
            return np.concatenate([coloured, alpha[..., None]], axis=-1)
        case "matte":
            return np.repeat(alpha[..., None], 3, axis=-1)
        case "blur" | "pixelate":
            return _hidden(frame, alpha, settings)
        case "new background":
            return mixed(background, frame, alpha)
    rest = {"dim rest": _dimmed, "grey rest": _greyed, "colour rest": _coloured}[settings.effect](frame, settings)
    return mixed(rest, frame, alpha)


def mixed(below: np.ndarray, above: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`above` over `below`, rounded: exactly one of them where alpha is 0 or 255."""
    share = alpha[..., None].astype(np.uint16)
    sum = below * (255 - share) + above * share + 127  # at most 255 * 255 + 127, which 16 bits hold
    return (sum // 255).astype(np.uint8)


def fitted(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (h, w, 3) scaled to fill `size` (H, W), what is too much cut away evenly on both sides."""
    height, width = size
    if picture.shape[:2] == tuple(size):
        return picture
    scale = max(height / picture.shape[0], width / picture.shape[1])
    h, w = min(height / scale, picture.shape[0]), min(width / scale, picture.shape[1])
    top, left = (picture.shape[0] - h) / 2, (picture.shape[1] - w) / 2
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + w, top + h)))


def _hidden(frame: np.ndarray, alpha: np.ndarray, settings: EffectSettings) -> np.ndarray:
    coarse = coarseness(frame.shape[:2], settings.strength)
    box = box_of(alpha > 0)
    if box is None:
        return frame
    # With a margin as wide as a blur reaches; squares begin at multiples of their side, so that they stand still when the object moves.
    margin = 3 * coarse
    wide = tuple(slice(max(one.start - margin, 0) // coarse * coarse, one.stop + margin) for one in box)
    picture = Image.fromarray(np.ascontiguousarray(frame[wide]))
    if settings.effect == "blur":
        picture = picture.filter(ImageFilter.GaussianBlur(coarse))
    else:
        padded = np.pad(np.asarray(picture), [(0, -size % coarse) for size in picture.size[::-1]] + [(0, 0)], mode="edge")
        small = Image.fromarray(padded).reduce(coarse)
        picture = small.resize((padded.shape[1], padded.shape[0]), Image.Resampling.NEAREST).crop((0, 0, *picture.size))
    changed = frame.copy()
    changed[wide] = mixed(frame[wide], np.asarray(picture), alpha[wide])
    return changed


def coarseness(size: tuple[int, int], strength: float) -> int:
    """The radius of a blur, or the side of the squares, in pixels: up to a tenth of the frame's shorter side."""
    return max(round(min(size) * strength / 10), 2)


def _dimmed(frame: np.ndarray, settings: EffectSettings) -> np.ndarray:
    return mixed(frame, np.zeros_like(frame), np.full(frame.shape[:2], round(255 * settings.strength), np.uint8))


def _greyed(frame: np.ndarray, settings: EffectSettings) -> np.ndarray:
    grey = np.repeat(np.asarray(Image.fromarray(frame).convert("L"))[..., None], 3, axis=-1)
    return mixed(frame, grey, np.full(frame.shape[:2], round(255 * settings.strength), np.uint8))


def _coloured(frame: np.ndarray, settings: EffectSettings) -> np.ndarray:
    return np.broadcast_to(np.array(colour_of(settings.colour), np.uint8), frame.shape)
