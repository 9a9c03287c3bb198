"""Small copies of the public benchmarks' folders, filled with made-up scenes whose masks are known."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from decaf.demo.scenes import make_scene

LENGTH = 3
SIZE = (84, 112)


def scene(seed, length=LENGTH, size=SIZE):
    return make_scene(seed, size=size, length=length, count=(2, 3), lively=False)


def voc_palette() -> list[int]:
    """Colours of object numbers as DAVIS has them."""
    colours = []
    for number in range(256):
        red = green = blue = 0
        for group in range(3):
            red |= (number >> (3 * group) & 1) << (7 - group)
            green |= (number >> (3 * group + 1) & 1) << (7 - group)
            blue |= (number >> (3 * group + 2) & 1) << (7 - group)
        colours += [red, green, blue]
    return colours


def packed(mask: np.ndarray) -> dict:
    """A mask as COCO packs it, written after its description: a number at a time."""
    runs, value, run = [], 0, 0
    for pixel in mask.astype(int).flatten(order="F"):
        if pixel != value:
            runs.append(run)
            value, run = pixel, 0
        run += 1
    runs.append(run)
    text = ""
    for place, number in enumerate(runs):
        number -= runs[place - 2] if place > 2 else 0
        more = True
        while more:
            bits, number = number & 31, number >> 5
            more = number != (-1 if bits & 16 else 0)
            text += chr(bits + 48 + (32 if more else 0))
    return {"size": [int(side) for side in mask.shape], "counts": text}


def plain_runs(mask: np.ndarray) -> dict:
    """The same with its runs as a list."""
    pixels = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate(([False], pixels)).astype(int)))
    return {"size": list(map(int, mask.shape)), "counts": np.diff(np.concatenate(([0], edges, [pixels.size]))).tolist()}


def frame_names(length: int, first: int = 0, step: int = 1) -> list[str]:
    return [f"{first + step * index:05d}" for index in range(length)]


def write_frames(folder: Path, frames: np.ndarray, names: list[str], suffix: str = ".jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in zip(names, frames, strict=True):
        Image.fromarray(frame).save(folder / f"{name}{suffix}", **({"quality": 95} if suffix == ".jpg" else {}))


def write_palette(folder: Path, masks: np.ndarray, names: list[str], numbers: list[int] | None = None) -> None:
    """(N, T, H, W): object n has the number n + 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        picture = np.zeros(masks.shape[2:], np.uint8)
        for number, mask in zip(numbers or range(1, len(masks) + 1), masks[:, index], strict=True):
            picture[mask] = number
        image = Image.fromarray(picture, "P")
        image.putpalette(voc_palette())
        image.save(folder / f"{name}.png")


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def sentence(scene, target: int) -> str:
    thing = scene.things[target]
    return f"the {thing.colour} {thing.shape}"


def ref_davis17(root: Path, videos=("blackswan", "bmx-trees"), *, as_they_come=False, split="valid", objects=3) -> None:
    meta, texts = {}, [[], [], [], []]
    for number, video in enumerate(videos):
        made, names = scene(40 + number), frame_names(LENGTH)
        frames_folder = "DAVIS/JPEGImages/480p" if as_they_come else f"{split}/JPEGImages"
        masks_folder = "DAVIS/Annotations_unsupervised/480p" if as_they_come else f"{split}/Annotations"
        write_frames(root / frames_folder / video, made.frames, names)
        write_palette(root / masks_folder / video, made.masks, names)
        expressions = {}
        for target in range(min(objects, len(made.things))):
            thing = made.things[target]
            told = [sentence(made, target), f"a {thing.shape}", f"{sentence(made, target)} here", f"a {thing.colour} thing"]
            for annotator, text in enumerate(told):
                expressions[str(len(expressions))] = {"exp": text, "obj_id": str(target + 1)}
                texts[annotator].append(f'{video} {target + 1} "{text}"')
        meta[video] = {"expressions": expressions, "frames": names}
    if as_they_come:
        lists = root / "DAVIS/ImageSets/2017"
        lists.mkdir(parents=True)
        (lists / "val.txt").write_text("\n".join(videos) + "\n")
        folder = root / "davis_text_annotations"
        folder.mkdir()
        for name, lines in zip(("annot1", "annot1_full_video", "annot2", "annot2_full_video"), texts, strict=True):
            (folder / f"Davis17_{name}.txt").write_text("\n".join(lines) + "\n", encoding="latin-1")
    else:
        write_json(root / f"meta_expressions/{split}/meta_expressions.json", {"videos": meta})


def mevis(root: Path, split="valid_u", *, nested_meta=False, videos=("0ab4afe7fb46", "0fea0cb75a25"), encode=packed, no_target=False) -> None:
    meta, mask_dict = {}, {}
    for number, video in enumerate(videos):
        made, names = scene(60 + number), frame_names(LENGTH)
        write_frames(root / split / "JPEGImages" / video, made.frames, names)
        ids = list(range(len(mask_dict), len(mask_dict) + len(made.masks)))
        for one, masks in zip(ids, made.masks, strict=True):
            mask_dict[str(one)] = [encode(mask) if mask.any() else None for mask in masks]
        expressions = {"0": {"exp": sentence(made, 0), "obj_id": [0], "anno_id": ids[:1]}}
        expressions["1"] = {"exp": "the things", "obj_id": [0, 1], "anno_id": ids[:2]}
        if no_target:
            expressions["2"] = {"exp": "the horse that flies away", "obj_id": [], "anno_id": []}
        if split == "valid":
            expressions = {name: {"exp": one["exp"]} for name, one in expressions.items()}
        meta[video] = {"expressions": expressions, "vid_id": number, "frames": names}
    folder = f"meta_expressions/{split}" if nested_meta else split
    write_json(root / folder / "meta_expressions.json", {"videos": meta})
    if split != "valid":
        write_json(root / split / "mask_dict.json", mask_dict)


def revos(root: Path, videos=("UVO/all/-fbscFfkh4M", "MOSE/00e9e8f3"), *, foreground=True) -> None:
    meta, mask_dict, behind = {}, {}, {}
    for number, video in enumerate(videos):
        made, names = scene(80 + number), frame_names(LENGTH)
        write_frames(root / "JPEGImages" / video, made.frames, names)
        ids = list(range(len(mask_dict), len(mask_dict) + len(made.masks)))
        for one, masks in zip(ids, made.masks, strict=True):
            mask_dict[str(one)] = [packed(mask) if mask.any() else None for mask in masks]
        behind[video] = {"masks_rle": [packed(mask) for mask in made.masks.any(0)], "foreground_ratio": [0.1] * LENGTH}
        height, width = SIZE
        meta[video] = {
            "vid_id": number, "height": height, "width": width, "frames": names,
            "expressions": {
                "0": {"exp": sentence(made, 0), "obj_id": [0], "anno_id": ids[:1], "type_id": 0},
                "1": {"exp": f"Which one is {made.things[1].colour}?", "obj_id": [1], "anno_id": ids[1:2], "type_id": 1},
                "2": {"exp": sentence(made, 1), "obj_id": [1], "anno_id": ids[1:2], "type_id": 0},
                "3": {"exp": "a whale", "obj_id": [], "anno_id": [], "type_id": 2},
            },
        }  # fmt: skip
    write_json(root / "meta_expressions_valid_.json", {"videos": meta})
    write_json(root / "mask_dict.json", mask_dict)
    if foreground:
        write_json(root / "mask_dict_foreground.json", behind)


def reasonvos(root: Path, videos=("0000f77c", "v_12 a_b")) -> None:
    meta = {}
    for number, video in enumerate(videos):
        made, names = scene(20 + number), frame_names(LENGTH, first=1, step=5)
        source = ("MeViS", "BURST")[number % 2]
        write_frames(root / "JPEGImages" / video, made.frames, names)
        expressions = []
        for target in range(2):
            write_palette(root / "Annotations" / f"{source}_{video}_{target}", made.masks[target : target + 1], names, [(1, 38)[target]])
            told = ((sentence(made, target), 0), (f"Which one would you call {made.things[target].colour}?", 1))
            # The public file gives some ids of a clip twice.
            expressions += [
                {"exp_id": place if target == 0 else place + 1, "obj_id": target, "exp_text": text, "is_sent": sent}
                for place, (text, sent) in enumerate(told)
            ]
        meta[video] = {"source": source, "frames": names, "expressions": expressions}
    write_json(root / "meta_expressions.json", {"videos": meta})


def ref_youtube_vos(root: Path, videos=("003234408d", "0062f687f1"), test=("00f88c4f0a",)) -> None:
    meta, kept_back = {}, {}
    for number, video in enumerate((*videos, *test)):
        made, names = scene(10 + number), frame_names(LENGTH, step=5)
        split = "test" if video in test else "valid"
        write_frames(root / split / "JPEGImages" / video, made.frames, names)
        meta[video] = {"expressions": {"0": {"exp": sentence(made, 0)}, "1": {"exp": sentence(made, 1)}}, "frames": names}
        if video in test:
            kept_back[video] = meta[video]
    write_json(root / "meta_expressions/valid/meta_expressions.json", {"videos": meta})
    write_json(root / "meta_expressions/test/meta_expressions.json", {"videos": kept_back})


def ref_youtube_vos_train(root: Path, videos=("003234408d",)) -> None:
    meta = {}
    for number, video in enumerate(videos):
        made, names = scene(10 + number), frame_names(LENGTH, step=5)
        write_frames(root / "train/JPEGImages" / video, made.frames, names)
        write_palette(root / "train/Annotations" / video, made.masks, names)
        expressions = {str(n): {"exp": sentence(made, n), "obj_id": str(n + 1)} for n in range(2)}
        meta[video] = {"expressions": expressions, "frames": names}
    write_json(root / "meta_expressions/train/meta_expressions.json", {"videos": meta})
