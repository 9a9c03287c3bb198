"""Texts written into copies of video files, such as the workflow that made them, where ComfyUI's page looks for them.

Frames, sound, times, and alpha stay byte for byte what they were: nothing is taken out of the file and put into another, only the table of
contents is written anew. (Packets copied by FFmpeg come out with other durations, rates or edit lists.) The texts come before the frames, since
the page reads the beginning of a large file alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from ..report import Progress, silent

_BLOCK = 8 << 20
_LARGEST = 256 << 20
"""Bytes of a table of contents; more is none."""

_Pieces = list[bytes | tuple[int, int]]
"""What a file is made of: new bytes, and parts (start, end) of the old file."""


def copy_with_tags(source: Path, target: Path, tags: Mapping[str, str], progress: Progress = silent) -> bool:
    """Copies a file a few megabytes at a time, so that a cancel stops it. Whether the texts `tags` are in the copy: not in one that is no whole MP4,
    MOV or WebM file, which is copied as it is."""
    with source.open("rb") as read, target.open("wb") as write:
        size = source.stat().st_size
        progress(0, size, "Saving")
        pieces = _tagged(read, size, tags, source.suffix.lower()) if tags else None
        for piece in pieces or [(0, size)]:
            if isinstance(piece, bytes):
                write.write(piece)
                continue
            place, end = piece
            read.seek(place)
            while block := read.read(min(_BLOCK, end - place)):
                write.write(block)
                place += len(block)
                progress(place, size, "Saving")
        progress(size, size, "Saving")
    return pieces is not None


def _tagged(read: BinaryIO, size: int, tags: Mapping[str, str], suffix: str) -> _Pieces | None:
    plan = {".mp4": _iso, ".m4v": _iso, ".mov": _iso, ".webm": _webm}.get(suffix)
    try:
        return plan and plan(read, size, {name: text.encode() for name, text in tags.items()})
    except (struct.error, OverflowError, ValueError, LookupError, RecursionError):  # damaged, or made in another way than such files are
        return None


# -- MP4 and MOV: boxes (ISO 14496-12) -------------------------------------------------------------------------------------------------

_CONTAINERS = (b"trak", b"mdia", b"minf", b"stbl")
_FRAGMENTED = {b"moof", b"sidx", b"mfra", b"styp"}


def _iso(read: BinaryIO, size: int, tags: dict[str, bytes]) -> _Pieces:
    """The file with a new `moov`, which comes second, if the places of the frames can still be told there, else where it was."""
    found = list(_boxes(lambda at, count: _at(read, at, count), 0, size))
    kinds = [kind for kind, *_ in found]
    if kinds.count(b"moov") != 1 or kinds[0] == b"moov" or _FRAGMENTED & set(kinds):
        raise ValueError
    old = kinds.index(b"moov")
    _, _, inside, end = found[old]
    moov = _at(read, inside, end - inside)
    if b"saio" in moov:  # encrypted: it tells places in the file, too
        raise ValueError
    for place in (1, old):
        order = found[:old] + found[old + 1 :]
        order.insert(place, found[old])
        changed = _with_user_data(moov, tags)
        moves, now = [], 0
        for kind, start, _, end in order:
            moves.append((start, end, now - start))
            now += 8 + len(changed) if kind == b"moov" else end - start
        try:
            _move_chunks(changed, 0, len(changed), moves)
        except OverflowError:  # more than 4 GB, told in 32 bits
            continue
        return [_box(b"moov", bytes(changed)) if kind == b"moov" else (start, end) for kind, start, _, end in order]
    raise OverflowError


def _boxes(get: Callable[[int, int], bytes], start: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """(kind, start, start of what is in it, end) of each box."""
    while start < end:
        length, kind = struct.unpack(">I4s", get(start, 8))
        head = 8
        if length == 1:
            (length,), head = struct.unpack(">Q", get(start + 8, 8)), 16
        elif length == 0:
            length = end - start
        if length < head or start + length > end:
            if kind == b"\0" * 4:  # QuickTime closes user data with a zero
                return
            raise ValueError
        yield kind, start, start + head, start + length
        start += length


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _with_user_data(moov: bytes, tags: dict[str, bytes]) -> bytearray:
    """The content of `moov` with the texts in its user data, first: the page looks into no second table."""
    kept, told = bytearray(), _box(b"meta", b"\0" * 4 + _texts(tags))
    for kind, start, inside, end in _boxes(_of(moov), 0, len(moov)):
        if kind != b"udta":
            kept += moov[start:end]
            continue
        names = [_box(b"mdta", name.encode()) for name in tags]
        for kind, first, _, last in _boxes(_of(moov), inside, end):
            if kind != b"meta" or not any(name in moov[first:last] for name in names):  # else those of an earlier workflow
                told += moov[first:last]
    return kept + _box(b"udta", told)


def _texts(tags: dict[str, bytes]) -> bytes:
    """As FFmpeg writes them with `use_metadata_tags`."""
    names = b"".join(_box(b"mdta", name.encode()) for name in tags)
    texts = b"".join(
        _box(struct.pack(">I", number), _box(b"data", struct.pack(">II", 1, 0) + text)) for number, text in enumerate(tags.values(), start=1)
    )
    handler = _box(b"hdlr", struct.pack(">II4s", 0, 0, b"mdta") + b"\0" * 13)
    return handler + _box(b"keys", struct.pack(">II", 0, len(tags)) + names) + _box(b"ilst", texts)


def _move_chunks(moov: bytearray, start: int, end: int, moves: list[tuple[int, int, int]]) -> None:
    """Writes anew where the frames are: each piece (start, end) of the old file has gone so many bytes on. OverflowError: there is no room for it."""
    for kind, _, inside, stop in _boxes(_of(moov), start, end):
        if kind in _CONTAINERS:
            _move_chunks(moov, inside, stop, moves)
        elif kind in (b"stco", b"co64"):
            (count,) = struct.unpack(">I", moov[inside + 4 : inside + 8])
            layout = f">{count}{'I' if kind == b'stco' else 'Q'}"
            places = struct.unpack_from(layout, moov, inside + 8)
            moved = [place + sum(by for first, last, by in moves if first <= place < last) for place in places]
            if kind == b"stco" and max(moved, default=0) >> 32:
                raise OverflowError
            struct.pack_into(layout, moov, inside + 8, *moved)


# -- WebM: elements (RFC 8794, RFC 9559) -----------------------------------------------------------------------------------------------

_EBML, _SEGMENT, _SEEK_HEAD, _CUES, _CLUSTER, _TAGS = 0x1A45DFA3, 0x18538067, 0x114D9B74, 0x1C53BB6B, 0x1F43B675, 0x1254C367
_SEEK, _SEEK_POSITION, _CUE_POINT, _CUE_POSITIONS, _CUE_CLUSTER, _CRC = 0x4DBB, 0x53AC, 0xBB, 0xB7, 0xF1, 0xBF
_TAG, _TARGETS, _SIMPLE_TAG, _TAG_NAME, _TAG_STRING = 0x7373, 0x63C0, 0x67C8, 0x45A3, 0x4487
_PLACES = {_SEEK_HEAD: (_SEEK, _SEEK_POSITION), _CUES: (_CUE_POINT, _CUE_POSITIONS, _CUE_CLUSTER)}
"""The elements that tell where others begin, counted from the beginning of the segment's content: the way to the number."""


def _webm(read: BinaryIO, size: int, tags: dict[str, bytes]) -> _Pieces:
    """The file with one more table of tags before the frames, and all that tells places written anew."""

    def get(at: int, count: int) -> bytes:
        return _at(read, at, count)

    top = list(_elements(get, 0, size))
    if [kind for kind, *_ in top] != [_EBML, _SEGMENT]:
        raise ValueError
    _, segment, content, end = top[1]
    order: list[tuple[int, int, bytes | tuple[int, int]]] = []
    new = _element(_TAGS, _element(_TAG, _element(_TARGETS, b"") + b"".join(_simple_tag(*one) for one in tags.items())))
    added = False
    for kind, start, inside, stop in _elements(get, content, end):
        if kind == _CLUSTER and not added:
            order.append((0, -1, new))
            added = True
        changed = kind in _PLACES or kind == _TAGS
        order.append((kind, start - content, get(inside, stop - inside) if changed else (start, stop)))
    if not added:
        raise ValueError
    order = [(kind, start, _element(_TAGS, _without(what, set(tags))) if kind == _TAGS else what) for kind, start, what in order]
    places = {start: 0 for _, start, _ in order}
    for _ in range(2):  # the first time shows how long everything is: as long as the second time, since every number has eight bytes
        pieces: _Pieces = []
        moved, now = {}, 0
        for kind, start, what in order:
            piece = _element(kind, _placed(what, _PLACES[kind], places)) if kind in _PLACES else what
            moved[start] = now
            now += len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
            pieces.append(piece)
        places = moved
    return [(0, segment), _id(_SEGMENT) + _long(now), *pieces]


def _elements(get: Callable[[int, int], bytes], start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(kind, start, start of what is in it, end) of each element. ValueError: its length is not told, as in a stream that was cut off."""
    while start < end:
        head = get(start, min(12, end - start))
        first = 9 - head[0].bit_length()
        second = 9 - head[first].bit_length()
        if first > 4 or second > 8:
            raise ValueError
        length = int.from_bytes(head[first : first + second], "big") - (1 << 7 * second)
        inside = start + first + second
        if length == (1 << 7 * second) - 1 or inside + length > end:
            raise ValueError
        yield int.from_bytes(head[:first], "big"), start, inside, inside + length
        start = inside + length


def _element(kind: int, content: bytes) -> bytes:
    return _id(kind) + _long(len(content)) + content


def _id(kind: int) -> bytes:
    return kind.to_bytes((kind.bit_length() + 7) // 8, "big")


def _long(length: int) -> bytes:
    """A length in eight bytes."""
    return ((1 << 56) | length).to_bytes(8, "big")


def _simple_tag(name: str, text: bytes) -> bytes:
    """Names of tags are in capitals (RFC 9559), and so the page looks for them."""
    return _element(_SIMPLE_TAG, _element(_TAG_NAME, name.upper().encode()) + _element(_TAG_STRING, text))


def _placed(content: bytes, way: tuple[int, ...], places: Mapping[int, int]) -> bytes:
    """The content of an element with new numbers at the end of `way`. A checksum would no longer be right, and goes."""
    made = b""
    for kind, start, inside, end in _elements(_of(content), 0, len(content)):
        if kind == way[0] and len(way) == 1:
            made += _element(kind, places[int.from_bytes(content[inside:end], "big")].to_bytes(8, "big"))
        elif kind == way[0]:
            made += _element(kind, _placed(content[inside:end], way[1:], places))
        elif kind != _CRC:
            made += content[start:end]
    return made


def _without(content: bytes, names: set[str]) -> bytes:
    """The content of a table of tags without those of an earlier workflow."""
    made, unwanted = b"", {name.upper().encode() for name in names}
    for kind, start, inside, end in _elements(_of(content), 0, len(content)):
        if kind == _TAG:
            made += _element(kind, _without(content[inside:end], names))
        elif kind == _SIMPLE_TAG:
            parts = [content[first:last] for one, _, first, last in _elements(_of(content), inside, end) if one == _TAG_NAME]
            made += b"" if unwanted & {part.upper() for part in parts} else content[start:end]
        elif kind != _CRC:
            made += content[start:end]
    return made


# -- bytes -----------------------------------------------------------------------------------------------------------------------------


def _at(read: BinaryIO, at: int, count: int) -> bytes:
    if count > _LARGEST:
        raise ValueError
    read.seek(at)
    found = read.read(count)
    if len(found) < count:
        raise ValueError
    return found


def _of(content: bytes) -> Callable[[int, int], bytes]:
    return lambda at, count: bytes(content[at : at + count])
