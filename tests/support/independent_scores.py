"""J, F and R of masks on disk, computed another way than the library does: plain loops and NumPy, from the definitions."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image


def unpacked(stored: dict) -> np.ndarray:
    """A mask of run lengths, a letter at a time."""
    height, width = stored["size"]
    runs = stored["counts"]
    if isinstance(runs, str):
        text, runs, place = runs, [], 0
        while place < len(text):
            number, shift = 0, 0
            while True:
                letter = ord(text[place]) - 48
                number |= (letter & 31) << shift
                place, shift = place + 1, shift + 5
                if not letter & 32:
                    break
            if letter & 16:
                number -= 1 << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
    flat, value = [], False
    for run in runs:
        flat += [value] * run
        value = not value
    return np.array(flat).reshape((height, width), order="F")


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def border(mask: np.ndarray) -> np.ndarray:
    """Pixels whose right, lower or lower right neighbour differs; at the frame's edge those that are there."""
    found = np.zeros(mask.shape, bool)
    found[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    found[:-1] |= mask[:-1] != mask[1:]
    found[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return found


def near(points: np.ndarray, others: np.ndarray, radius: int) -> int:
    """How many of the points (n, 2) have one of the others within the radius."""
    if not len(points) or not len(others):
        return 0
    squared = ((points[:, None] - others[None]) ** 2).sum(2)
    return int((squared.min(1) <= radius**2).sum())


def j_and_f(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    either = np.logical_or(mask, truth).sum()
    j = np.logical_and(mask, truth).sum() / either if either else 1.0
    ours, theirs = np.argwhere(border(mask)), np.argwhere(border(truth))
    if not len(ours) or not len(theirs):
        return float(j), float(len(ours) == len(theirs))
    radius = math.ceil(0.008 * math.hypot(*mask.shape))
    precision, recall = near(ours, theirs, radius) / len(ours), near(theirs, ours, radius) / len(theirs)
    return float(j), 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def of_clip(folder: Path, truths: dict[str, np.ndarray]) -> tuple[float, float]:
    """Means over the frames that have a true mask and a mask in the folder."""
    scores = [j_and_f(picture(folder / f"{name}.png") > 127, truth) for name, truth in truths.items() if (folder / f"{name}.png").exists()]
    return tuple(map(float, np.mean(scores, axis=0)))


def robustness(folder: Path, truths: dict[str, np.ndarray], foregrounds: dict[str, np.ndarray]) -> float:
    shares = []
    for name, truth in truths.items():
        beside = (picture(folder / f"{name}.png") > 127) & ~truth
        shares.append(max(0.0, 1 - beside.sum() / (foregrounds[name].sum() + 1e-6)))
    return float(np.mean(shares))


def truths_of(dataset: str, root: Path) -> dict[str, dict[str, np.ndarray]]:
    """What the files of a made copy say is true: item -> frame -> mask."""
    found = {}
    if dataset == "ref-davis17":
        meta = json.loads((root / "meta_expressions/valid/meta_expressions.json").read_text())["videos"]
        for video, one in meta.items():
            for number, expression in one["expressions"].items():
                found[f"{video}/{number}"] = {
                    name: picture(root / "valid/Annotations" / video / f"{name}.png") == int(expression["obj_id"]) for name in one["frames"]
                }
    elif dataset in ("mevis", "revos"):
        folder, file = (root / "valid_u", "meta_expressions.json") if dataset == "mevis" else (root, "meta_expressions_valid_.json")
        meta = json.loads((folder / file).read_text())["videos"]
        masks = json.loads((folder / "mask_dict.json").read_text())
        for video, one in meta.items():
            for number, expression in one["expressions"].items():
                frames = {}
                for place, name in enumerate(one["frames"]):
                    path = folder / "JPEGImages" / video / f"{name}.jpg"
                    frames[name] = np.zeros(picture(path).shape[:2], bool)
                    for anno in expression["anno_id"]:
                        if masks[str(anno)][place]:
                            frames[name] |= unpacked(masks[str(anno)][place])
                found[f"{video}/{number}"] = frames
    elif dataset == "reasonvos":
        meta = json.loads((root / "meta_expressions.json").read_text())["videos"]
        for video, one in meta.items():
            # Of several expressions with one id the last keeps it, as in the authors' evaluation; the others get the next numbers.
            ids = [expression["exp_id"] for expression in one["expressions"]]
            free = max(ids) + 1
            for place, expression in enumerate(one["expressions"]):
                number = ids[place]
                if number in ids[place + 1 :]:
                    number, free = free, free + 1
                folder = root / "Annotations" / f"{one['source']}_{video}_{expression['obj_id']}"
                found[f"{video}/{number}"] = {name: picture(folder / f"{name}.png") > 0 for name in one["frames"]}
    return found
