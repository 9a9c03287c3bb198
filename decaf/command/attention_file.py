"""Attention maps in a file, so that a later run need not ask the language model again."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..clips.identity import SIDE
from ..data import Attention, ClipInfo
from ..files import atomic_write


def save_attention(path: Path, attention: tuple[Attention, Attention], made_from: dict, record: dict) -> None:
    """Writes (object, background) attention with what it was `made_from`, and a `record` (JSON) to be given back by `load_attention`."""
    tensors = {"thumbnails": attention[0].clip.thumbnails}
    texts = {}
    for kind, one in {**{one.kind: one for one in attention}, _NOT_THIS: attention[0].not_this}.items():
        if one is None:
            continue
        tensors |= {f"{kind}.video": one.video.contiguous(), f"{kind}.frame": one.frame.contiguous()}
        texts[kind] = {"query": one.query, "question": one.question, "answers": one.answers, "presence": one.presence}
    if attention[0].seen is not None:  # the same for all of a query's maps
        tensors["seen"] = attention[0].seen.contiguous()
    clip = attention[0].clip
    about = {"length": clip.length, "frame_size": clip.frame_size, "key_frames": clip.key_frames, "part": clip.part}
    metadata = {"made_from": made_from, "clip": about, "texts": texts, "record": record}
    # Bytes first: the library's own file writer hides which error of the disk it met.
    content = save(tensors, metadata={key: json.dumps(value) for key, value in metadata.items()})
    with atomic_write(path) as part:
        part.write_bytes(content)


def load_attention(path: Path, made_from: dict) -> tuple[tuple[Attention, Attention], dict] | None:
    """(object, background) attention and the record saved with it; None when there is none, it was made from something else, or it is
    not what `save_attention` writes."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        return None
    try:
        with safe_open(path, "pt") as file:
            kept = file.metadata() or {}
            # Compared as text: another program's file of that name may hold anything.
            if kept.get("made_from") != json.dumps(made_from):
                return None
            metadata = {key: json.loads(kept[key]) for key in ("clip", "texts", "record")}
            kinds = [kind for kind in (*_KINDS, _NOT_THIS) if kind in _KINDS or kind in metadata["texts"]]
            names = ["thumbnails", *(f"{kind}.{part}" for kind in kinds for part in ("video", "frame"))]
            names += {"seen"} & {*file.keys()}
            tensors = {name: file.get_tensor(name) for name in names}
        return _attention(metadata, tensors), _record(metadata["record"])
    except (OSError, SafetensorError):  # unreadable or damaged
        return None
    except (ValueError, KeyError, TypeError, RecursionError):  # whole, but another program's
        return None


_KINDS = ("object", "background")
_NOT_THIS = "not_this"


def _attention(metadata: dict, tensors: dict[str, Tensor]) -> tuple[Attention, Attention]:
    """ValueError, KeyError or TypeError if these are not what `save_attention` writes."""
    about, keys = metadata["clip"], metadata["clip"]["key_frames"]
    part = about["part"] or (0, about["length"] - 1)
    numbers = [about["length"], *about["frame_size"], *keys, *part]
    _require(len(part) == 2 and 0 <= part[0] <= keys[0] and keys[-1] <= part[1] < about["length"])
    _require(all(type(number) is int for number in numbers) and len(about["frame_size"]) == 2 and min(about["frame_size"]) > 0)
    _require(len(keys) > 0 and keys == sorted(set(keys)) and 0 <= keys[0] and keys[-1] < about["length"])
    _require(tensors["thumbnails"].dtype == torch.uint8 and tensors["thumbnails"].shape == (len(keys), SIDE, SIDE, 3))
    clip = ClipInfo(about["length"], tuple(about["frame_size"]), tuple(keys), tensors["thumbnails"], about["part"] and tuple(part))
    found = {}
    for kind in [kind for kind in (*_KINDS, _NOT_THIS) if f"{kind}.video" in tensors]:
        text, video, frame = metadata["texts"][kind], tensors[f"{kind}.video"], tensors[f"{kind}.frame"]
        for maps in (video, frame):
            _require(maps.dtype == torch.float32 and maps.ndim == 3 and maps.numel() > 0 and bool(torch.isfinite(maps).all()))
        seen = tensors.get("seen")
        _require(seen is None or (seen.dtype == torch.bool and seen.shape == frame.shape))
        _require(len(frame) == len(keys) and len(video) in (len(keys), (len(keys) + 1) // 2))
        _require(all(isinstance(one, str) for one in (text["query"], text["question"], *text["answers"])))
        presence = text["presence"]
        _require(presence is None or (isinstance(presence, float) and 0 <= presence <= 1))
        named = "object" if kind == _NOT_THIS else kind
        found[kind] = Attention(named, video, frame, clip, text["query"], text["question"], tuple(text["answers"]), presence, seen=seen)
    _require(len({(one.video.shape, one.frame.shape) for one in found.values()}) == 1)
    return replace(found["object"], not_this=found.get(_NOT_THIS)), found["background"]


def _record(record: dict) -> dict:
    _require(all(isinstance(value, int | float) for name in ("seconds", "counts") for value in dict(record[name]).values()))
    _require(isinstance(record["queries_at_once"], int))
    return record


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError
