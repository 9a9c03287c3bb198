"""The SAM 2 stage against the package's public video predictor, driven as the paper's reference drives it: points one by one, objects one
at a time, and one propagation per prompt frame, each of which encodes the frames again."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sam2_oracle
import tiny_sam2
import torch
from torch import Tensor

import decaf.demo
from decaf.attention.frames import key_frames
from decaf.clips.base import Clip, clip_from_images
from decaf.clips.identity import clip_info
from decaf.data import FusedAttention, SAM2Prompts
from decaf.demo.scenes import make_scene
from decaf.masks import pack_bits, unpack_bits
from decaf.report import Report
from decaf.sam2 import SAM2, load_sam2
from decaf.sam2.architecture import read_architecture
from decaf.sam2.build import build_model
from decaf.tracking import segment

from .measure import Different, figures, measure, ratio

POINTS = 24
"""Per tracklet, at one place: all but one fall to non-maximum suppression, as most cells of a peak do. The demo's models give 14 to 63 points
a clip, half of the clips more than 24, for one or two tracklets."""

SETTINGS = {"nms_iou": 0.99, "score_threshold": -10.0}
"""Every distinct mask becomes a tracklet and every tracklet is propagated, so that the work is the same for any weights."""

TOLERANCE = 0.02
"""Share of an object's pixels that may differ: kernels round differently in batches, and memories are stored in bfloat16."""

SHAPES = {"tiny": ("t", 1024), "large": ("l", 1024), "small, 256 px": ("s", 256)}
"""Released SAM 2.1 shapes and the size of their input. At 256 pixels a CPU can run the small one; its encoder then takes 3.6 times as much
arithmetic as tracking one object, and that of the large one at 1024, which the paper's reference uses, 2.9 times."""


@dataclass(frozen=True)
class Case:
    """`shape`: "bundled" (the model in decaf/demo, 256 px), or "tiny" or "large" SAM 2.1 with random weights (1024 px). `tracklets` start
    on different key frames."""

    shape: str
    length: int
    tracklets: int
    frame_size: tuple[int, int] = (280, 364)
    half: bool = False


def build(shape: str, device: str) -> SAM2:
    if shape == "bundled":
        return load_sam2(Path(decaf.demo.__file__).parent / "models" / "sam2.safetensors", device=device)
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from sam2.build_sam import build_sam2

    if not GlobalHydra.instance().is_initialized():  # the package initialises it only when it is imported directly
        initialize_config_module("sam2", version_base="1.2")
    torch.manual_seed(0)
    letter, pixels = SHAPES[shape]
    theirs = build_sam2(f"configs/sam2.1/sam2.1_hiera_{letter}.yaml", device="cpu")
    tiny_sam2.enliven(theirs)
    weights = theirs.state_dict()
    architecture = read_architecture(weights, {"image_size": pixels})
    model = build_model(weights, architecture)
    model.load_state_dict(weights)
    return SAM2(model.to(device).eval().requires_grad_(False), architecture.settings.image_size, architecture.name)


def _clip_and_prompts(case: Case) -> tuple[Clip, SAM2Prompts]:
    """Objects that move over the whole clip, and points on them. The map decides nothing here."""
    scene = make_scene(3, size=case.frame_size, length=case.length, count=(4, 4), lively=False)
    clip = clip_from_images(torch.from_numpy(scene.frames))
    frames = key_frames(case.length)
    key, xy = [], []
    for i in range(case.tracklets):
        start = (2 * i + 1) * len(frames) // (2 * case.tracklets)
        x, y = scene.things[i % len(scene.things)].centres[frames[start]]
        key += [start] * POINTS
        xy += [(float(x) / case.frame_size[1], float(y) / case.frame_size[0])] * POINTS
    values = torch.linspace(0.9, 1.0, len(key))
    random = torch.Generator().manual_seed(0)
    fused = FusedAttention(torch.rand(len(frames), 18, 24, generator=random), clip_info(clip, frames))
    return clip, SAM2Prompts(torch.tensor(key), torch.tensor(xy).clamp(0, 1), values, fused)


# -- the two runs: each returns packed masks (n, T, H, bytes) and the images encoded for key frames and clip together ---------------------------


def prepare_ours(device: str, case: Case) -> tuple[SAM2, Clip, SAM2Prompts]:
    model = build(case.shape, device)
    return (dataclasses.replace(model, dtype=torch.bfloat16) if case.half else model, *_clip_and_prompts(case))


def ours(model: SAM2, clip: Clip, prompts: SAM2Prompts) -> tuple[np.ndarray, int]:
    report = Report()
    tracks = segment(model, clip, prompts, progress=report, **SETTINGS)
    masks = torch.stack([tracks.masks(number) for number in range(len(tracks.tracks))])
    return pack_bits(masks).numpy(), report.counts["sam2_key_encodings"] + report.counts["sam2_clip_encodings"]


def prepare_plain(device: str, case: Case) -> tuple:
    """The frames lie in files that need no decoding: both sides resize them and convert their numbers."""
    predictor = sam2_oracle.predictor_of(build(case.shape, device).model)
    clip, prompts = _clip_and_prompts(case)
    folder = tempfile.TemporaryDirectory()
    sam2_oracle.write([clip[t] for t in prompts.fused.clip.key_frames], Path(folder.name) / "keys")
    sam2_oracle.write(clip, Path(folder.name) / "clip")
    return predictor, folder, prompts


def plain(predictor, folder: tempfile.TemporaryDirectory, prompts: SAM2Prompts) -> tuple[np.ndarray, int]:
    before = predictor.encodings
    keys, whole = (predictor.init_state(str(Path(folder.name) / name)) for name in ("keys", "clip"))
    _, logits = sam2_oracle.segment_started(predictor, keys, whole, prompts, **SETTINGS)
    return pack_bits(logits > 0).numpy(), predictor.encodings - before


# -- the comparison ----------------------------------------------------------------------------------------------------------------------------


def overlap(found: np.ndarray, expected: np.ndarray) -> list[float]:
    """Per object, the intersection over union over the whole clip."""
    if found.shape != expected.shape:
        raise Different(f"One side found {len(found)} objects, the other {len(expected)}: nothing to compare.")
    return [_iou(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(found, expected, strict=True)]


def _iou(a: Tensor, b: Tensor) -> float:
    both, either = (int(sum(unpack_bits(x, 8 * x.shape[-1]).sum() for x in packed)) for packed in (a & b, a | b))
    return both / either if either else 1.0


def compare(found: np.ndarray, expected: np.ndarray) -> float:
    """The smallest overlap of an object's masks on the two sides. Raises Different if it is too small, or if there is nothing to see."""
    smallest = min(overlap(found, expected))
    if not smallest >= 1 - TOLERANCE or not all(one.any() for one in expected):
        raise Different(f"The masks of one object overlap only by {smallest:.3f}, or are empty: nothing to compare.")
    return smallest


def run(device: str, cases: list[Case], repeats: int) -> list[dict]:
    return [_case(device, case, repeats) for case in cases]


def _case(device: str, case: Case, repeats: int) -> dict:
    our, their, rough = [], [], []
    same = 1.0
    for _ in range(repeats):
        cost, (found, encodings) = measure(prepare_ours, ours, device, case)
        our.append(cost)
        cost, (expected, plain_encodings) = measure(prepare_plain, plain, device, case)
        their.append(cost)
        same = min(same, compare(found, expected))
        if device == "cuda":
            cost, (half, _) = measure(prepare_ours, ours, device, dataclasses.replace(case, half=True))
            rough.append(cost)
    row = {
        "shape": case.shape,
        "length": case.length,
        "tracklets": case.tracklets,
        **figures("ours", our),
        **figures("plain", their),
        "speedup": ratio(their, our),
        "speedup_in_cpu_seconds": ratio(their, our, "cpu_seconds"),
        "ours_encodings": encodings,
        "plain_encodings": plain_encodings,
        "encodings_per_frame": encodings / (case.length + min(case.length, 16)),
        "smallest_overlap": same,
    }
    if device == "cuda":
        row |= {**figures("half", rough), "half_speedup": ratio(their, rough), "half_overlap": min(overlap(half, expected))}
    return row


def summary(rows: list[dict]) -> dict[str, float]:
    """Of 3 tracklets in 100 frames with the last shape, and of each by name. Encodings: the most of all, per frame of the clip and key
    frame."""
    main = [row for row in rows if (row["length"], row["tracklets"]) == (100, 3)][-1]
    found = {"sam2_speedup": main["speedup"], "sam2_encodings_per_frame": max(row["encodings_per_frame"] for row in rows)}
    if "half_speedup" in main:
        found["sam2_speedup_half"] = main["half_speedup"]
    for row in rows:
        found[f"sam2_speedup_{row['shape']}_{row['length']}_{row['tracklets']}"] = row["speedup"]
    return found


def table(rows: list[dict]) -> list[str]:
    half = "half_seconds" in rows[0]
    lines = [
        f"SAM 2 stage: {POINTS} points per tracklet, tracklets over 16 key frames, propagation through the clip; ours against the public video "
        "predictor, both float32",
        f"{'shape':>10}{'frames':>8}{'tracklets':>11}{'ours s':>9}{'plain s':>9}{'speedup':>9}{'encodings':>11}{'plain':>7}{'ours MB':>9}"
        + (f"{'bf16 s':>9}{'speedup':>9}{'overlap':>9}" if half else ""),
    ]
    for row in rows:
        lines.append(
            f"{row['shape']:>10}{row['length']:>8}{row['tracklets']:>11}{row['ours_seconds']:>9.2f}{row['plain_seconds']:>9.2f}"
            f"{row['speedup']:>8.1f}x{row['ours_encodings']:>11}{row['plain_encodings']:>7}{row['ours_bytes'] / 1e6:>9.0f}"
            + (f"{row['half_seconds']:>9.2f}{row['half_speedup']:>8.1f}x{row['half_overlap']:>9.3f}" if half else "")
        )
    return lines
