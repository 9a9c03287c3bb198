"""What ComfyUI offers to the nodes: its folders, progress bar, devices, and frames as it passes them on."""

from __future__ import annotations

import ctypes
import os
import sys
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import torch
from comfy_api.latest import InputImpl, io, ui
from PIL import Image

from ..decaf.clips import Clip, clip_from_images, open_clip, open_window
from ..decaf.data import Tracks
from ..decaf.errors import DecafError, reason, shown
from ..decaf.finishing import SoundFile, SoundWave
from ..decaf.finishing.edges import box_of
from ..decaf.report import Progress
from .drawn_video import DrawnVideo
from .kept import KeptClip
from .live import NodeReport
from .managed import Managed  # noqa: F401, the other nodes have it from here
from .mask_memory import MaskMemory

Cancelled = mm.InterruptProcessingException
"""Raised by a progress callback when the user has pressed Cancel."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def register_folder(name: str) -> None:
    """Make models/<name> known to ComfyUI, beside the folders that extra_model_paths.yaml or another pack gave that name."""
    folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))


def folders(name: str) -> list[Path]:
    """The folders that hold models of the kind `name`; they need not exist."""
    return [Path(folder) for folder in folder_paths.get_folder_paths(name)]


def files(name: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Model files of the kind `name`: the name that a combo shows -> the file."""
    found = {
        file: folder_paths.get_full_path(name, file) for file in folder_paths.get_filename_list(name) if file.lower().endswith(suffixes)
    }
    return {file: Path(path) for file, path in found.items() if path}  # a file that has just gone may still be in ComfyUI's list


def compute_device() -> torch.device:
    return mm.get_torch_device()


def offload_device() -> torch.device:
    return mm.unet_offload_device()


def model_dtype(name: str) -> torch.dtype | None:
    """The dtype of a combo value. "auto" goes by the rule of `decaf.devices.language_dtype`, with ComfyUI's word on what the device can compute
    in, since it knows its own options (--force-fp32) and more kinds of devices. On a CPU it is None: the rule needs the weights there."""
    if name in DTYPES:
        return DTYPES[name]
    if mm.get_torch_device().type == "cpu":
        return None
    bf16 = mm.should_use_bf16(mm.get_torch_device(), prioritize_performance=False, manual_cast=True)  # that is: also emulated
    return torch.bfloat16 if bf16 else torch.float32


def mixed_dtype(name: str) -> torch.dtype:
    """The dtype that SAM 2 computes in, whose weights stay fp32; "auto" is bf16 where ComfyUI holds it to be fast, also on devices of which
    `decaf.devices.mixed_dtype` knows nothing."""
    if name in DTYPES:
        return DTYPES[name]
    return torch.bfloat16 if mm.should_use_bf16(mm.get_torch_device()) else torch.float32


def progress() -> NodeReport:
    """A callback, or report, that shows a step on the node and stops it when the user has pressed Cancel."""
    return NodeReport()


@cache
def _malloc_trim() -> Callable[[int], int]:
    """The C library's function of that name, where it has one: glibc's."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library
            trim = ctypes.CDLL(None).malloc_trim
            trim.argtypes = [ctypes.c_size_t]
            return trim
    return lambda keep: 0


def return_memory() -> None:
    """Give the system back what nothing lives in any more.

    glibc keeps freed blocks of up to 32 MB, such as a frame or a feature map, for as long as one that lives lies behind them: half a
    gigabyte after 247 frames of 720p, and more with every clip of another size. Other C libraries give it back by themselves.
    """
    _malloc_trim()(0)


@contextmanager
def returning_memory() -> Iterator[None]:
    """Around a stage that makes much and keeps little: what it has freed goes back to the system, also when it fails or is cancelled, and
    video files are let go of: on Windows nobody could replace one that is open."""
    try:
        yield
    finally:
        for _, clip in list(_opened.values()):
            clip.close()
        return_memory()


_opened: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
"""Clips of video files by the VIDEO that ComfyUI keeps for the graph: the next node, or the next query, decodes nothing again. Gone with it."""

_MOST_OPENED = 2
"""Each holds up to 384 MB of frames, of which ComfyUI's own cache knows nothing."""


def clip_of(frames) -> Clip:
    """The clip behind an IMAGE or VIDEO socket.

    A video file is streamed, a trimmed one too. One that another node holds in memory is taken as the frames that ComfyUI makes of it, and so
    is every video before ComfyUI 0.23, which does not tell whether it is trimmed.
    """
    if isinstance(frames, torch.Tensor):
        return clip_from_images(frames)
    if isinstance(frames, DrawnVideo):
        return open_clip(frames.get_stream_source(), progress=progress())
    stamp = file_stamp(frames)
    if stamp is None:  # a video in memory would be encoded only to be decoded again
        held = _read(frames, frames.get_components)
        return clip_from_images(held.images, fps=_rate(getattr(held, "frame_rate", None)))
    source, start, duration, *changed = stamp
    if not changed:
        return open_clip(source)  # which says that there is no such file
    if _opened.get(frames, (None,))[0] != stamp:
        if frames not in _opened:
            # Registered before the entry, and hence called after the frames went with it.
            weakref.finalize(frames, return_memory).atexit = False
        whole = start == duration == 0
        _opened.pop(frames, None)  # the latest comes last
        for oldest in list(_opened)[: -(_MOST_OPENED - 1)]:
            del _opened[oldest]
        if whole:
            clip = open_clip(source, progress=progress())
        else:
            clip = open_window(source, start, start + duration if duration else None, progress=progress())
        _opened[frames] = stamp, clip
    return _opened[frames][1]


def file_stamp(frames) -> tuple | None:
    """Which part of which file a VIDEO is: path, start, duration, and, if the file is there, when it changed and its size. None of what is no
    file."""
    # Others than ComfyUI's own do not say whether they are trimmed.
    told = isinstance(frames, InputImpl.VideoFromFile) and hasattr(frames, "get_active_trim_window")
    source = frames.get_stream_source() if told else None
    if not isinstance(source, str):
        return None
    if not os.path.isfile(source):
        return source, 0.0, 0.0
    state = os.stat(source)
    return source, *_read(frames, frames.get_active_trim_window), state.st_mtime_ns, state.st_size


def kept_of(model: Managed, frames) -> KeptClip:
    """What a segmenter has made of the clip in earlier runs."""
    return model.kept.of(frames, file_stamp(frames), model.value, mm.get_free_memory(torch.device("cpu")))


def frame_rate(frames, clip: Clip, otherwise: float) -> Fraction:
    """Frames per second of an IMAGE or VIDEO socket and its clip; IMAGE does not know its own. ComfyUI's reader is asked last: it fails at
    titles that are not UTF-8."""
    if isinstance(frames, torch.Tensor):
        return Fraction(otherwise).limit_denominator(1001)
    return clip.fps or _read(frames, frames.get_frame_rate)


def _rate(told: object) -> Fraction | None:
    """Frames per second that another node gave a video; None for what is no rate."""
    try:
        rate = Fraction(told)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return rate if rate > 0 else None


def _read(frames, ask: Callable):
    """What ComfyUI's own reader answers about a VIDEO. DecafError: the video cannot be read."""
    try:
        return ask()
    except Cancelled:
        raise
    except Exception as error:  # its reader has no kind of error of its own
        raise DecafError(
            f"ComfyUI could not read the video ({type(error).__name__}: {error}). Check the file, and the node that trims or makes it."
        ) from error


def as_image(pixels: torch.Tensor) -> torch.Tensor:
    """(..., H, W, 3) uint8 -> IMAGE float 0..1 on the device where ComfyUI keeps results."""
    return pixels.to(mm.intermediate_device(), mm.intermediate_dtype()) / 255


def as_mask(masks: torch.Tensor) -> torch.Tensor:
    """(T, H, W) bool -> MASK float 0 or 1 on the device where ComfyUI keeps results."""
    return masks.to(mm.intermediate_device(), torch.float32)


def tracks_mask(tracks: Tracks, report: Progress, objects: Sequence[int] | None = None) -> torch.Tensor:
    """MASK of all objects, or of those at the indices `objects`, together: 0 and 1, and between them where edges were made
    soft. Filled frame by frame: it is the only thing of its size."""
    memory = MaskMemory((tracks.length, *tracks.frame_size))
    for frame in range(tracks.length):
        report(frame, tracks.length, "filling the mask")
        levels = tracks.levels(frame, frame + 1, objects)[0]
        box = box_of(levels.numpy() > 0)
        if box is not None:
            memory.tensor[frame][box] = levels[box].float() / 255
        memory.filled(4 * levels.numel())
    memory.settle()
    report(tracks.length, tracks.length, "filling the mask")
    return memory.tensor


def file_of(video) -> Path | None:
    """The file that a VIDEO is, all of it; None if it is a part of one, or in memory."""
    told = isinstance(video, InputImpl.VideoFromFile) and hasattr(video, "get_active_trim_window")
    source = video.get_stream_source() if told else None
    if not isinstance(source, str) or any(_read(video, video.get_active_trim_window)):
        return None
    return Path(source)


def sound_of(frames, clip: Clip) -> SoundFile | SoundWave | None:
    """The sound of a VIDEO, `clip` being its pictures; IMAGE has none."""
    if isinstance(frames, torch.Tensor):
        return None
    whole = file_of(frames)
    if whole is not None:
        return SoundFile(whole)
    told = isinstance(frames, InputImpl.VideoFromFile) and hasattr(frames, "get_active_trim_window")
    source = frames.get_stream_source() if told else None
    if isinstance(source, str):
        end = clip.ticks(len(clip) - 1) * clip.time_base + (1 / clip.fps if clip.fps else 0)
        return SoundFile(Path(source), (clip.ticks(0) * clip.time_base, end))
    audio = _read(frames, frames.get_components).audio
    return None if audio is None else SoundWave(audio["waveform"][0], int(audio["sample_rate"]))


def output_path(prefix: str, suffix: str, size: tuple[int, int]) -> Path:
    """A new name in ComfyUI's output folder; `suffix` may be empty, for a folder. `size`: (H, W), for a prefix that
    names it.

    DecafError: the prefix leads out of the folder, or it cannot be written to.
    """
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory(), size[1], size[0])
    except OSError as error:
        raise DecafError(
            f"A folder for '{shown(prefix)}' could not be made in {folder_paths.get_output_directory()} ({reason(error)}). Choose another "
            "prefix, or change the permissions of the folder."
        ) from error
    except Exception as error:  # ComfyUI has no kind of its own for it
        raise DecafError(f"'{shown(prefix)}' leads out of ComfyUI's output folder. Choose a prefix without '..'.") from error
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


def temp_file(suffix: str) -> tuple[Path, ui.SavedResult]:
    """A new file in ComfyUI's folder for previews, and the name under which the page can show it."""
    name = f"decaf_{uuid.uuid4().hex[:12]}{suffix}"
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name, ui.SavedResult(name, "", io.FolderType.temp)


def drawn_video(draw: Callable[[Path], None], path: Path | None = None) -> DrawnVideo:
    """A VIDEO that `draw` writes when somebody reads it, unless it is at `path` already; else in a new file of ComfyUI's folder for previews."""
    return DrawnVideo(path or temp_file(".mp4")[0], draw)


def shown_images(images: torch.Tensor) -> ui.PreviewImage:
    """What a node shows of an IMAGE. DecafError: its files cannot be written to ComfyUI's temporary folder."""
    with _writing_pictures():
        return ui.PreviewImage(images)


def shown_picture(picture: torch.Tensor) -> ui.SavedResult:
    """A picture (H, W, 3) uint8 as a JPEG in ComfyUI's folder for previews. DecafError: it cannot be written there."""
    with _writing_pictures():
        path, saved = temp_file(".jpg")
        Image.fromarray(picture.numpy()).save(path, quality=90)
    return saved


@contextmanager
def _writing_pictures() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DecafError(
            f"The pictures to be shown could not be written to {folder_paths.get_temp_directory()} ({error.strerror or error}). "
            "Make room there, or start ComfyUI with --temp-directory elsewhere."
        ) from error
