"""From raw attention rollouts to one map per key frame (the decomposed attention fusion of the DecAF paper), and the coarse mask that it
gives by itself.

Object-background fusion takes what the background question also attends out of what the object question attends.
Video-frame fusion joins the map of the key frames asked together, which knows the action, with the maps of each frame asked alone,
which have twice the resolution.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from ..data import Attention, ClipInfo, FusedAttention
from ..errors import DecafError

log = logging.getLogger(__name__)

SIGMA = 1.0
VIDEO_KERNEL = 3
FRAME_KERNEL = 7


def object_background_fusion(
    object: Attention, background: Attention, *, sigma: float = SIGMA, video_kernel: int = VIDEO_KERNEL, frame_kernel: int = FRAME_KERNEL
) -> Attention:
    """What the object question attends more than the background question, each map in 0..1.

    `sigma` in cells (0 = no smoothing), the kernels in cells, odd. The video map is scaled to 0..1 over the whole clip, frame maps each
    by itself; a map without contrast becomes zero. The result keeps the object's grids, query and question; its kind is "contrast".
    DecafError: the two attentions swapped, of the wrong kind, of other clips, key frames or grids, or not finite.
    """
    _check_pair(object, background)
    video = contrast(smooth(object.video, video_kernel, sigma), smooth(background.video, video_kernel, sigma))
    frame = contrast(smooth(object.frame, frame_kernel, sigma), smooth(background.frame, frame_kernel, sigma))
    return Attention(
        kind="contrast", video=min_max(video), frame=min_max(frame, per_frame=True), clip=object.clip, query=object.query,
        question=object.question, answers=object.answers, presence=object.presence,
    )  # fmt: skip


def frame_fusion(attention: Attention, *, video_weight: float = 0.5) -> FusedAttention:
    """The video map on the grid of the frame maps, averaged with them and scaled to 0..1 over the whole clip.

    `video_weight`: share of the video map, 0 (frame maps only) to 1 (video map only). A raw object attention is accepted too, for a look
    at what contrast adds: it is smoothed and scaled the way object-background fusion would do with an empty background.
    DecafError: a background attention, maps whose frames do not fit the key frames, values that are not finite, a weight outside 0..1.
    """
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
    fused = min_max(video_weight * video + (1 - video_weight) * frame)
    return FusedAttention(fused, attention.clip, attention.query, attention.presence)


def coarse_masks(fused: FusedAttention, size: tuple[int, int] | None = None) -> Tensor:
    """The mask that attention gives without SAM 2: (K, H, W) bool at `size` (H, W), by default the size of the clip's frames.

    Each map is enlarged, scaled to 0..255 integers and split by Otsu's threshold. A map that is zero everywhere gives an empty mask.
    """
    height, width = size or fused.clip.frame_size
    masks = torch.zeros(len(fused.map), height, width, dtype=torch.bool)
    for mask, one in zip(masks, fused.map, strict=True):  # one at a time: the enlarged maps of sixteen 4K frames would take 500 MB
        levels = resize(one[None], (height, width))[0].mul(255).to(torch.uint8)
        torch.gt(levels, otsu_threshold(levels), out=mask)
    return masks


def smooth(maps: Tensor, kernel: int, sigma: float) -> Tensor:
    """(n, rows, cols) -> the same shape: each map under a Gaussian whose weights sum to 1, zeros beyond the border."""
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
    """What `object` has more than `background`, at most 1; the same shape as both."""
    return (object - background).clamp(0, 1)


def min_max(maps: Tensor, *, per_frame: bool = False) -> Tensor:
    """(n, rows, cols) scaled to 0..1, over all maps or (`per_frame`) each by itself. What is constant becomes zero."""
    dims = (1, 2) if per_frame else (0, 1, 2)
    low, high = maps.amin(dims, keepdim=True), maps.amax(dims, keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)


def slots_to_frames(video: Tensor, frames: int) -> Tensor:
    """(slots, rows, cols) -> (frames, rows, cols): a slot of two key frames counts for both; an odd clip's last slot covers one."""
    return video if len(video) == frames else video.repeat_interleave(2, dim=0)[:frames]


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, rows, cols) -> (n, *size), bilinear between cell centres."""
    return interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def otsu_threshold(levels: Tensor) -> int:
    """The level 0..255 that splits a uint8 map into two classes of largest between-class variance; the upper class is what lies *above* it.

    The lowest one if several split alike; 0 for a constant map.
    """
    count = np.bincount(levels.reshape(-1).numpy(), minlength=256).astype(np.int64)
    below, total = count.cumsum(), count.sum()
    sums = (count * np.arange(256)).cumsum()
    above = total - below
    # Integers up to here, so that levels which split alike are found equal: (total * sums) stays below 2**63 up to 190 million pixels.
    spread = (total * sums - below * sums[-1]).astype(np.float64) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.where((below > 0) & (above > 0), spread**2 / (below.astype(np.float64) * above), 0.0)
    return int(variance.argmax())


def same_clip(one: ClipInfo, other: ClipInfo) -> bool:
    """Whether both records were made of the same key frames of the same clip."""
    return (one.length, one.frame_size, one.key_frames) == (other.length, other.frame_size, other.key_frames) and torch.equal(
        one.thumbnails, other.thumbnails
    )


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
    for name in ("video", "frame"):
        wrong = int((~getattr(attention, name).isfinite()).sum())
        if wrong:
            raise DecafError(
                f"{wrong} values of the {attention.kind} attention's {name} maps are not finite numbers; load the model in "
                "another precision (bfloat16 or float32 instead of float16) and extract it again."
            )


def _describe(clip: ClipInfo) -> str:
    return f"{clip.length} frames of {clip.frame_size[1]}x{clip.frame_size[0]}"


def _grid(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}x{shape[2]} (rows x cols)"
