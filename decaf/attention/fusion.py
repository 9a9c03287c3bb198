"""Decomposed attention fusion of the DecAF paper: raw attention rollouts to one map per key frame, and its coarse mask.

Object-background fusion subtracts the attention of the background question from that of the object question. Where something was named that is
not meant, the larger of its attention and the background's is subtracted, cell by cell (not in the paper).
Video-frame fusion averages the map of all key frames seen together, which knows the action, with the maps of single frames, which have a finer
grid.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from ..data import Attention, ClipInfo, FusedAttention
from ..errors import DecafError
from ..settings import METHODS, TrackingSettings, check_choice

log = logging.getLogger(__name__)

SIGMA = 1.0
VIDEO_KERNEL = 3
FRAME_KERNEL = 7


def object_background_fusion(
    object: Attention, background: Attention, *, sigma: float = SIGMA, video_kernel: int = VIDEO_KERNEL, frame_kernel: int = FRAME_KERNEL
) -> Attention:
    """Attention of the object question minus that of the background question, or of what is not meant where that is larger; negative values set
    to 0.

    Args:
        sigma: of the Gaussian that smooths both first, in cells; 0 for none.
        video_kernel, frame_kernel: width of the Gaussian, in cells, odd.

    Returns:
        Attention of kind "contrast" with the object's grids, query and question. The video map is scaled to 0..1 over the whole clip, each
        frame map by itself. A map without contrast becomes zero. Its `not_this` is what is attended for that more than for background and object.

    Raises:
        DecafError: the attentions are swapped, of the wrong kind, of different clips, key frames or grids, or not finite.
    """
    _check_pair(object, background)

    def less(one: Attention, *others: Attention) -> Attention:
        """What `one` attends more than any of the others."""
        maps = {}
        for name, kernel in (("video", video_kernel), ("frame", frame_kernel)):
            more = attended_more(getattr(one, name), [getattr(other, name) for other in others], kernel, sigma)
            maps[name] = min_max(more, per_frame=name == "frame")
        return replace(one, kind="contrast", **maps)

    if object.not_this is None:
        return less(object, background)
    _check_pair(object.not_this, replace(background, query=object.not_this.query))
    return replace(less(object, background, object.not_this), not_this=less(object.not_this, background, object))


def attended_more(one: Tensor, others: Sequence[Tensor], kernel: int, sigma: float = SIGMA) -> Tensor:
    """What `one` attends more than any of the `others`, at least one of them: raw maps (n, rows, cols), smoothed first; 0..1, not scaled."""
    rest = functools.reduce(torch.maximum, (smooth(other, kernel, sigma) for other in others))
    return contrast(smooth(one, kernel, sigma), rest)


def frame_fusion(attention: Attention, *, video_weight: float = 0.5, method: str = TrackingSettings.method) -> FusedAttention:
    """The video map resized to the grid of the frame maps, averaged with them and scaled to 0..1 over the whole clip.

    A single frame does not show motion or order. With the method "agreement", frames count as far as they agree with the video: their share is
    multiplied by `agreement` of the two maps, and the rest is the video's. Where both agree fully this is the published mean. Cells that no
    single frame showed (see `decaf.attention.zoom`) have the video's value.

    Args:
        attention: of kind "contrast". A raw object attention is accepted too, for comparison: it is smoothed and scaled as object-background
            fusion would do with an empty background; what is not meant is not subtracted from it.
        video_weight: share of the video map, 0 (frame maps only) to 1 (video map only); with "agreement" the least that it has.
        method: one of `decaf.settings.METHODS`.

    Raises:
        DecafError: a background attention, maps that do not fit the key frames, values that are not finite, a weight outside 0..1, or no such
            method.
    """
    check_choice("method", method, METHODS)
    if not 0 <= video_weight <= 1:
        raise DecafError(f"video_weight is {video_weight}; give a share from 0 (frame maps only) to 1 (video map only).")
    if attention.kind == "background":
        raise DecafError(
            "Frame fusion was given the background attention, which would mask the background; connect the contrast of "
            "object-background fusion, or the object attention."
        )
    _check_maps(attention)
    video, frame = attention.video, attention.frame
    if attention.kind != "contrast":
        video = min_max(smooth(video, VIDEO_KERNEL, SIGMA))
        frame = min_max(smooth(frame, FRAME_KERNEL, SIGMA), per_frame=True)
    video = resize(slots_to_frames(video, len(frame)), frame.shape[-2:])
    own_weight, frame_weight, seen = video_weight, 1 - video_weight, attention.seen
    if method != METHODS[1]:
        frame_weight *= agreement(video, frame) if seen is None else agreement(video[seen], frame[seen])
        video_weight = 1 - frame_weight
    mixed = video_weight * video + frame_weight * frame
    fused = min_max(mixed if seen is None else torch.where(seen, mixed, video))
    not_this = attention.not_this and frame_fusion(attention.not_this, video_weight=own_weight, method=method).map
    return FusedAttention(fused, attention.clip, attention.query, attention.presence, not_this, attention.name)


def agreement(video: Tensor, frame: Tensor) -> float:
    """How far two maps of a clip agree, tensors of one shape: their correlation over all cells of all key frames, 0 where it is negative.

    1 if one of them is the same everywhere, and says nothing that the other could disagree with.
    """
    first, second = (each.double() - each.double().mean() for each in (video, frame))
    size = first.norm() * second.norm()
    return float(((first * second).sum() / size).clamp(0, 1)) if size > 0 else 1.0


def coarse_masks(fused: FusedAttention, size: tuple[int, int] | None = None) -> Tensor:
    """The masks that attention gives without SAM 2: each map enlarged, scaled to 0..255 integers and split by Otsu's threshold.

    Args:
        size: (H, W) of the masks; None takes that of the clip's frames.

    Returns:
        (K, H, W) bool. A map that is zero everywhere gives an empty mask.
    """
    height, width = size or fused.clip.frame_size
    masks = torch.zeros(len(fused.map), height, width, dtype=torch.bool)
    for mask, frame_map in zip(masks, fused.map, strict=True):  # one by one: the enlarged maps of sixteen 4K frames would take 500 MB
        levels = resize(frame_map[None], (height, width))[0].mul(255).to(torch.uint8)
        torch.gt(levels, otsu_threshold(levels), out=mask)
    return masks


def smooth(maps: Tensor, kernel: int, sigma: float) -> Tensor:
    """Each of the maps (n, rows, cols) convolved with a normalised Gaussian, zero-padded; the same shape."""
    if kernel < 1 or kernel % 2 == 0:
        raise DecafError(f"The smoothing kernel is {kernel} cells wide; give an odd number from 1.")
    if sigma < 0:
        raise DecafError(f"The smoothing sigma is {sigma}; give 0 (no smoothing) or more.")
    if sigma == 0:
        return maps
    offset = torch.arange(kernel, dtype=torch.float32) - kernel // 2
    weights = torch.exp(-(offset**2) / (2 * sigma**2))
    weights = torch.outer(weights, weights)
    return conv2d(maps[:, None], (weights / weights.sum())[None, None], padding=kernel // 2)[:, 0]


def contrast(object: Tensor, background: Tensor) -> Tensor:
    """`object` minus `background`, clamped to 0..1: all of one shape, (n, rows, cols)."""
    return (object - background).clamp(0, 1)


def min_max(maps: Tensor, *, per_frame: bool = False) -> Tensor:
    """(n, rows, cols) scaled to 0..1, over all maps or (`per_frame`) each by itself. Constant maps become zero."""
    dims = (1, 2) if per_frame else (0, 1, 2)
    low, high = maps.amin(dims, keepdim=True), maps.amax(dims, keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)


def slots_to_frames(video: Tensor, frames: int) -> Tensor:
    """(slots, rows, cols) -> (frames, rows, cols): a slot of two key frames is repeated for both. The last slot of an odd number covers one."""
    return video if len(video) == frames else video.repeat_interleave(2, dim=0)[:frames]


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, rows, cols) -> (n, *size), bilinear between cell centres."""
    return interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def otsu_threshold(levels: Tensor) -> int:
    """Otsu's threshold of a uint8 map: the level 0..255 with the largest between-class variance. The upper class is *above* it.

    The lowest such level if several are equal; 0 for a constant map.
    """
    count = np.bincount(levels.reshape(-1).numpy(), minlength=256).astype(np.int64)
    below, total = count.cumsum(), count.sum()
    sums = (count * np.arange(256)).cumsum()
    above = total - below
    # Integers up to here, so that equal splits compare equal: (total * sums) stays below 2**63 up to 190 million pixels.
    spread = (total * sums - below * sums[-1]).astype(np.float64) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.where((below > 0) & (above > 0), spread**2 / (below.astype(np.float64) * above), 0.0)
    return int(variance.argmax())


def same_clip(first: ClipInfo, second: ClipInfo) -> bool:
    """Whether both records are of the same key frames of the same clip."""
    told = [(one.length, one.frame_size, one.key_frames, one.part) for one in (first, second)]
    return told[0] == told[1] and torch.equal(first.thumbnails, second.thumbnails)


def _check_pair(object: Attention, background: Attention) -> None:
    kinds = (object.kind, background.kind)
    if kinds == ("background", "object"):
        raise DecafError("The object and background attentions are swapped: the object input holds the background's; exchange the two.")
    if kinds != ("object", "background"):
        raise DecafError(
            f'Object-background fusion needs one "object" and one "background" attention, but was given "{kinds[0]}" and "{kinds[1]}"; '
            "connect both outputs of the attention extraction."
        )
    if object.clip.key_frames != background.clip.key_frames:
        raise DecafError(
            f"The two attentions have different key frames: object {list(object.clip.key_frames)}, background "
            f"{list(background.clip.key_frames)}; extract both from the same clip with the same number of key frames."
        )
    if not same_clip(object.clip, background.clip):
        raise DecafError(
            f"The two attentions are of different clips: object of {_describe(object.clip)}, background of {_describe(background.clip)}; "
            "extract both from the same clip."
        )
    for name in ("video", "frame"):
        shapes = tuple(getattr(object, name).shape), tuple(getattr(background, name).shape)
        if shapes[0] != shapes[1]:
            raise DecafError(
                f"The {name} maps have different grids: object {_grid(shapes[0])}, background {_grid(shapes[1])}; "
                "extract both with the same model and settings."
            )
    _check_maps(object)
    _check_maps(background)
    if object.query != background.query:
        log.warning('The object attention is of "%s", the background attention of "%s".', object.query, background.query)


def _check_maps(attention: Attention) -> None:
    frames, slots = len(attention.clip.key_frames), len(attention.video)
    if len(attention.frame) != frames or slots not in (frames, (frames + 1) // 2):
        raise DecafError(
            f"The {attention.kind} attention has {frames} key frames but {slots} video slots and {len(attention.frame)} frame maps; "
            f"there must be {frames} or {(frames + 1) // 2} slots and {frames} frame maps. Extract it again."
        )
    if attention.seen is not None and attention.seen.shape != attention.frame.shape:
        raise DecafError(
            f"The {attention.kind} attention says for {_grid(tuple(attention.seen.shape))} cells whether single frames showed them, and has frame "
            f"maps of {_grid(tuple(attention.frame.shape))}. Extract it again."
        )
    for name in ("video", "frame"):
        not_finite = int((~getattr(attention, name).isfinite()).sum())
        if not_finite:
            raise DecafError(
                f"{not_finite} values of the {attention.kind} attention's {name} maps are not finite numbers; load the model in "
                "another precision (bfloat16 or float32 instead of float16) and extract it again."
            )


def _describe(clip: ClipInfo) -> str:
    return f"{clip.length} frames of {clip.frame_size[1]}x{clip.frame_size[0]}"


def _grid(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}x{shape[2]} (rows x cols)"
