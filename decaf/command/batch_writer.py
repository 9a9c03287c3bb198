"""What `decaf batch` writes for each row, in the process that has made the masks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..bulk.clip_worker import Ask, Masked
from ..clips import Clip
from ..data import Tracks
from ..files import write_json
from ..finishing import refine
from ..report import Report
from ..results import files
from ..results.record import described
from ..results.write import Wanted, write_result
from ..settings import RefineSettings


@dataclass(frozen=True)
class RowWriter:
    """A `decaf.bulk.clip_worker.Writer`: masks and what else is wanted into the folder `out`/KEY, `result.json` last.

    What it writes depends on nothing but clip, query, models and settings: no times, and nothing of who has done it. `Ask.data` is the path of the
    clip as a string.
    """

    out: Path
    wanted: Wanted
    refine: RefineSettings = RefineSettings()
    presence_threshold: float = 0.0

    def __call__(self, ask: Ask, clip: Clip, masked: Masked, report: Report) -> dict:
        folder = self.out / ask.key
        files.prepare_folder(folder)
        files.clear(folder)
        if masked.result is None:
            message, tracks, written = self._absence(ask, masked), None, []
            filled = _write_coarse(folder / files.MASKS, masked, empty=bool(message))
        else:
            result = masked.result
            if self.refine != RefineSettings():
                result = replace(result, tracks=refine(result.tracks, self.refine))
            message, tracks = result.tracks.message, result.tracks
            filled, written = write_result(folder, Path(ask.data), clip, result, self.wanted, report.progress)
        record = described(clip, masked.attention, tracks, filled, message)
        settings = {name: asdict(one) for name in ("attention", "points", "tracking") if (one := getattr(ask, name)) is not None}
        write_json(folder / files.RESULT, {**record, "settings": settings, "versions": files.versions(), "files": written})
        return {"frames": len(clip), "frames_with_mask": filled, "objects": _objects(tracks), "message": message}

    def _absence(self, ask: Ask, masked: Masked) -> str:
        return masked.fused.absence(ask.points.presence_threshold if ask.points is not None else self.presence_threshold)


def _objects(tracks: Tracks | None) -> int | None:
    return None if tracks is None else len(tracks.tracks)


def _write_coarse(folder: Path, masked: Masked, *, empty: bool) -> int:
    """Coarse masks of the key frames, each by the number of its frame. `empty`: the model does not see the object."""
    masks = masked.coarse & (not empty)
    return files.write_masks(folder, iter(masks), len(masks), numbers=masked.fused.clip.key_frames)
