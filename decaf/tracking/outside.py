"""Objects that another tracker has masked, as tracks: SAM 3's of ComfyUI, masks from anywhere, tracks of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..clips.identity import check_same_pictures, same_shape
from ..data import ClipInfo, Track, Tracks
from ..errors import DecafError, shown


class SAM3Masks:
    """Masks of SAM 3's N objects, unpacked a frame at a time; the packed tensor itself is kept, not copied.

    Args:
        packed: (lead + T, N, h, w / 8) uint8 on any device, eight pixels a byte, the leftmost in the lowest bit. The h x w pixels are the whole
            frame, whatever its shape.
        frame_size: (H, W) that masks are enlarged to, bilinear between pixel centres, as ComfyUI's own nodes do it; so edges are soft.
        lead: frames before the clip's first.
    """

    finished = True  # a MASK of them is as soft as that of ComfyUI's own node

    def __init__(self, packed: Tensor, frame_size: tuple[int, int], lead: int = 0):
        self.length, self.frame_size = len(packed) - lead, tuple(frame_size)
        self._packed, self._lead = packed, lead

    def union(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) bool: at least half."""
        return self.alpha(objects, frames) >= 128

    def alpha(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) uint8 0..255."""
        masks = torch.zeros(len(frames), *self.frame_size, dtype=torch.uint8)
        for mask, frame in zip(masks, frames, strict=True):
            found = [self._packed[self._lead + frame, index].cpu().numpy() for index in objects]
            packed = np.bitwise_or.reduce(found) if found else None
            if packed is not None and packed.any():
                pixels = torch.from_numpy(np.unpackbits(packed, axis=-1, bitorder="little")).float()
                if tuple(pixels.shape) != self.frame_size:
                    pixels = F.interpolate(pixels[None, None], size=self.frame_size, mode="bilinear", align_corners=False)[0, 0]
                mask.copy_(pixels.mul_(255).round_())
        return masks

    def any(self) -> bool:
        """Whether any mask has a pixel."""
        return any(bool(frame.any()) for frame in self._packed[self._lead :])


class MaskBatch:
    """Masks of N objects one after the other: (N * T, H, W) float 0..1 or bool on any device, converted on access; the tensor is not copied."""

    finished = True

    def __init__(self, masks: Tensor, length: int):
        self.length, self.frame_size = length, tuple(masks.shape[1:])
        self._masks = masks

    def union(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) bool: at least half."""
        return self.alpha(objects, frames) >= 128

    def alpha(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) uint8 0..255."""
        alpha = torch.zeros(len(frames), *self.frame_size, dtype=torch.uint8)
        for mask, frame in zip(alpha, frames, strict=True):
            for index in objects:
                found = self._masks[index * self.length + frame].cpu().float().nan_to_num(0).clamp(0, 1).mul_(255).round_()
                torch.maximum(mask, found.to(torch.uint8), out=mask)
        return alpha

    def any(self) -> bool:
        """Whether any mask has a pixel."""
        return any(bool((mask >= 0.5).any()) for mask in self._masks)


def tracks_from_sam3(data: Mapping, clip: ClipInfo, lead: int = 0) -> Tracks:
    """Tracks of all objects, with SAM 3's scores as `predicted_iou`, numbered as ComfyUI numbers them: 0 to N - 1.

    Args:
        data: ComfyUI's SAM3_TRACK_DATA: `packed_masks` as in `SAM3Masks` or None, `n_frames`, `scores` per object, `orig_size` (height, width)
            of the frames that were tracked.
        clip: of the attention. Frames that were tracked in another size but the same shape pass.
        lead: tracked frames that come before the clip's first and do not count.

    DecafError: it is no such data, or was made of another clip. Without objects there are no tracks, and a message.
    """
    try:
        packed, (height, width) = data["packed_masks"], map(int, data["orig_size"])
        frames = int(data["n_frames"] if packed is None else len(packed))
        told = data.get("scores")
        scores = [] if told is None else [float(score) for score in told]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DecafError("The track data are not those of SAM 3. Connect the track_data of Run SAM3 Video Track.") from None
    if packed is not None and (not isinstance(packed, Tensor) or packed.ndim != 4 or packed.dtype != torch.uint8 or 0 in packed.shape[2:]):
        raise DecafError(
            "The masks in the track data are not packed as ComfyUI packs them, as (frames, objects, height, width / 8) bytes. Connect the "
            "track_data of Run SAM3 Video Track; update ComfyUI or this pack if you have."
        )
    if frames != clip.length + lead:
        before = f", of which {lead} are before its first," if lead else ""
        raise DecafError(
            f"SAM 3 has tracked {frames} frames{before} but the attention was taken from a clip of {clip.length}. Give the same clip to both."
        )
    if height < 1 or width < 1 or not same_shape((height, width), clip.frame_size):
        raise DecafError(
            f"SAM 3 has tracked frames of {width}x{height}, but the attention was taken from frames of "
            f"{clip.frame_size[1]}x{clip.frame_size[0]}, which is another shape. Give the same clip to both; crop or pad it before."
        )
    objects = 0 if packed is None else packed.shape[1]
    if not objects:
        empty = torch.zeros(clip.length, 0, 1, 1, dtype=torch.uint8)
        message = "SAM 3 has found no object to pick from. Write another name for it, or lower its detection_threshold."
        return Tracks(SAM3Masks(empty, clip.frame_size), (), message, clip)
    scores += [1.0] * (objects - len(scores))
    return Tracks(SAM3Masks(packed, clip.frame_size, lead), _numbered(scores[:objects]), clip=clip)


def tracks_from_mask_batch(masks: Tensor, clip: ClipInfo) -> Tracks:
    """Tracks of N objects from masks (N * T, H, W), float 0..1 or bool: all T masks of the first object, then all of the second, and so on.
    (H, W) is one object of a clip of one frame. DecafError: another size, or a number of masks that is no multiple of T."""
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or 0 in masks.shape:
        raise DecafError(f"The masks have the shape {tuple(masks.shape)}; they need (frames, height, width), with at least one pixel.")
    count, height, width = masks.shape
    if (height, width) != tuple(clip.frame_size):
        raise DecafError(
            f"The masks are {width}x{height}, but the attention was taken from frames of {clip.frame_size[1]}x{clip.frame_size[0]}. Scale "
            "the masks to that size."
        )
    if count % clip.length:
        raise DecafError(
            f"There are {count} masks for a clip of {clip.length} frames. Give {clip.length} masks for each object, one for every frame: all of "
            "the first object, then all of the second. Batch Masks puts the masks of several objects together."
        )
    return Tracks(MaskBatch(masks, clip.length), _numbered([1.0] * (count // clip.length)), clip=clip)


def tracks_of_same_clip(tracks: Tracks, clip: ClipInfo) -> Tracks:
    """The tracks, if they are of this clip. DecafError: they are of another one."""
    if tracks.length != clip.length:
        raise DecafError(
            f"The tracks have {tracks.length} frames, but the attention was taken from a clip of {clip.length}. Give the same clip to both."
        )
    if tuple(tracks.frame_size) != tuple(clip.frame_size):
        (height, width), (high, wide) = tracks.frame_size, clip.frame_size
        raise DecafError(
            f"The tracks are of frames of {width}x{height}, but the attention was taken from frames of {wide}x{high}. Give the same clip to both."
        )
    check_same_pictures(tracks, clip)
    return tracks


def tracks_from(objects: object, clip: ClipInfo, lead: int = 0) -> Tracks:
    """Tracks of whatever kind of `objects`: see the functions above. DecafError: it is none of them, or of another clip."""
    if isinstance(objects, Tracks):
        return tracks_of_same_clip(objects, clip)
    if isinstance(objects, Tensor):
        return tracks_from_mask_batch(objects, clip)
    if isinstance(objects, Mapping):
        return tracks_from_sam3(objects, clip, lead)
    raise DecafError(f"{shown(type(objects).__name__)} holds no objects to pick from. Give SAM 3's track data, tracks, or masks.")


def _numbered(scores: Sequence[float]) -> tuple[Track, ...]:
    return tuple(Track(index, 0, (0.5, 0.5), score, 0.0, 0.0) for index, score in enumerate(scores))
