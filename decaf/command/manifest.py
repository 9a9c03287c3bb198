"""The list of clips and queries that `decaf batch` works off: CSV, or JSON lines."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from .. import settings as choices
from ..attention.frames import read_key_frames
from ..attention.questions import clean_not_this, clean_query, names_of, split_queries
from ..bulk.jobs import is_key
from ..errors import DecafError, reason, shown
from ..paths import look_at
from ..settings import AttentionSettings, PointSettings, TrackingSettings, check_choice

_LARGEST = 1 << 30
_MOST_TOLD = 5
"""Mistakes that are told at once."""


@dataclass(frozen=True)
class Stages:
    """Settings of one row."""

    attention: AttentionSettings
    points: PointSettings
    tracking: TrackingSettings

    def changed(self, given: dict[str, object]) -> Stages:
        """With the settings `given` by name."""
        return Stages(
            *(
                replace(record, **{name: value for name, value in given.items() if name in {one.name for one in fields(record)}})
                for record in (self.attention, self.points, self.tracking)
            )
        )


@dataclass(frozen=True)
class Row:
    """One query about one clip.

    Attributes:
        id: names its results; a safe file name.
        line: of the manifest, counted from 1.
        clip: where it is.
        written: the clip as the manifest has it.
        query: as it is written, with its name if it has one.
        given: settings of its own.
    """

    id: str
    line: int
    clip: Path
    written: str
    query: str
    stages: Stages
    given: tuple[tuple[str, object], ...] = ()


def read_manifest(path: Path, stages: Stages, check: Callable[[Stages], None]) -> list[Row]:
    """The rows of a manifest, in its order; a row with several queries is several of them.

    Args:
        stages: settings of a row that says nothing else.
        check: raises DecafError for settings that no row can have.

    Raises DecafError: it is no file that can be read, or some of it cannot be understood; the message has the lines.
    """
    kind = look_at(path, "The manifest")
    if kind != "file":
        raise DecafError(f"The manifest {shown(path)} " + ("is a folder. Give a file." if kind else "does not exist. Check the path."))
    try:
        if path.stat().st_size > _LARGEST:
            raise DecafError(f"The manifest {shown(path)} is larger than 1 GB. Split it.")
        content = path.read_bytes()
    except OSError as error:
        raise DecafError(f"The manifest {shown(path)} cannot be read ({reason(error)}). Change its permissions.") from error
    return _Reading(path, stages, check).rows(_decoded(path, content))


def _decoded(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DecafError(f"The manifest {shown(path)} is UTF-16. Save it as UTF-8.") from None
        line = content.count(b"\n", 0, error.start) + 1
        raise DecafError(
            f"The manifest {shown(path)} is not UTF-8: line {line} has the byte 0x{content[error.start]:02x}. Save the file as UTF-8."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DecafError(f"The manifest {shown(path)} is no text: line {line} has a NUL. Give a CSV file, or one of JSON lines.")
    return text


class _Reading:
    """From text to rows. Mistakes are gathered, so that they can be put right together."""

    def __init__(self, path: Path, stages: Stages, check: Callable[[Stages], None]):
        self._path, self._stages, self._check = path, stages, check
        self._mistakes: list[str] = []
        self._known: dict[tuple, Stages] = {}

    def rows(self, text: str) -> list[Row]:
        first = text.lstrip()[:1]
        if first == "[":
            raise DecafError(f"{self._named} is one JSON array. Write one object a line, without commas between the lines.")
        is_json = first == "{" or self._path.suffix.lower() in (".jsonl", ".ndjson", ".json")
        rows: list[Row] = []
        for line, record in (self._json_lines if is_json else self._csv)(text):
            try:
                rows += self._row(line, record)
            except DecafError as error:
                self._mistake(line, str(error))
        rows = self._with_own_ids(rows)
        if self._mistakes:
            more = len(self._mistakes) - _MOST_TOLD
            told = "\n".join(["", *self._mistakes[:_MOST_TOLD], *([f"and {more} more"] if more > 0 else [])])
            raise DecafError(f"{self._named} has {len(self._mistakes)} mistake" + "s" * (len(self._mistakes) != 1) + f":{told}")
        if not rows:
            raise DecafError(f'{self._named} has no rows. Write a header such as "clip,query", and a line for each clip.')
        return rows

    @property
    def _named(self) -> str:
        return f"The manifest {shown(self._path)}"

    def _mistake(self, line: int, what: str) -> None:
        self._mistakes.append(f"line {line}: {what}")

    def _json_lines(self, text: str) -> Iterator[tuple[int, dict]]:
        for line, written in enumerate(text.split("\n"), 1):
            if not written.strip():
                continue
            try:
                record = json.loads(written)
            except (ValueError, RecursionError) as error:
                self._mistake(line, f"no JSON ({reason(error)}). Write one object a line.")
                continue
            if not isinstance(record, dict):
                self._mistake(line, 'no JSON object. Write for example {"clip": "dog.mp4", "query": "the dog"}.')
                continue
            yield line, record

    def _csv(self, text: str) -> Iterator[tuple[int, dict]]:
        header = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = max(",;\t", key=header.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns: list[str] | None = None
        line = 1
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                self._mistake(line, f"no CSV ({reason(error)}). Put cells with quotes or line breaks in quotes.")
                return
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = self._columns([cell.strip() for cell in cells])
                continue
            if len(cells) > len(columns):
                self._mistake(line, f"{len(cells)} cells under {len(columns)} columns. Put cells with a '{delimiter}' in them in quotes.")
                continue
            yield line, {column: cell for column, cell in zip(columns, cells, strict=False) if cell.strip()}

    def _columns(self, columns: list[str]) -> list[str]:
        """Those of the header. DecafError: one is missing, unknown or there twice; nothing else could be read then."""
        for column in columns:
            try:
                _known_name(column)
            except DecafError as error:
                raise DecafError(f"{self._named}, line 1: {error}") from None
        names = [_known_name(column) for column in columns]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise DecafError(f"{self._named} has the column {twice} twice. Keep one of them.")
        for name in ("clip", "query"):
            if name not in names:
                raise DecafError(f'{self._named} has no column "{name}"; it has {", ".join(columns)[:200]}. Name it in the first line.')
        return columns

    def _row(self, line: int, record: dict) -> list[Row]:
        named: dict[str, object] = {}
        for column, value in record.items():
            name = _known_name(column)
            if name in named:
                raise DecafError(f'"{name}" is given twice. Give it once.')
            if value is not None:
                named[name] = value
        written, asked, own = named.pop("clip", ""), named.pop("query", ""), named.pop("id", None)
        if not isinstance(written, str) or not written.strip():
            raise DecafError('there is no "clip". Give a video, or a folder of images.')
        queries = split_queries(_texts(asked))
        given = tuple((name, _value(name, value)) for name, value in named.items())
        stages = self._stages_of(given)
        if stages.attention.not_this is not None:
            clean_not_this(stages.attention.not_this, queries)
        written = written.strip()
        texts = [f"{query.name}: {query}" if query.name else str(query) for query in queries]
        ids = _own_ids(own, queries) if own is not None else [_made_id(written, text, given) for text in texts]
        return [Row(id, line, self._path.parent / written, written, text, stages, given) for id, text in zip(ids, texts, strict=True)]

    def _stages_of(self, given: tuple[tuple[str, object], ...]) -> Stages:
        """Thousands of rows have the same few settings."""
        if given not in self._known:
            stages = self._stages.changed(dict(given))
            self._check(stages)
            self._known[given] = stages
        return self._known[given]

    def _with_own_ids(self, rows: Iterable[Row]) -> list[Row]:
        seen: dict[str, Row] = {}
        for row in rows:
            before = seen.setdefault(row.id.casefold(), row)
            if before is not row:
                same = before.written == row.written and before.query == row.query
                said = "the same clip and query" if same else f'the id "{row.id}"'
                remedy = "Remove one of them, or give each an id." if same else "Give each row an id of its own."
                self._mistake(row.line, f"{said} as in line {before.line}. {remedy}")
        return list(seen.values())


def _texts(asked: object) -> list[str]:
    if isinstance(asked, str):
        return [asked]
    if isinstance(asked, list) and asked and all(isinstance(one, str) for one in asked):
        return asked
    raise DecafError('"query" is neither a text nor a list of texts. Write for example ["the dog", "the ball"].')


def _own_ids(id: object, queries: list) -> list[str]:
    id = str(id).strip() if isinstance(id, str | int) and not isinstance(id, bool) else ""
    if not is_key(id):
        raise DecafError(f'the id "{shown(id, 40)}" names files, and cannot. Use letters, digits and _.+=@-, at most 120, a letter first.')
    ids = [f"{id}-{name}" for name in names_of(queries)] if len(queries) > 1 else [id]
    for one in ids:
        if not is_key(one):
            raise DecafError(f'the id "{shown(one, 40)}" of one of its queries cannot name files. Name the query in plain letters.')
    return ids


def _made_id(written: str, query: str, given: tuple) -> str:
    """Of what the row says, so that it stays when lines are moved: the clip's name, and letters that tell its rows apart."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(written).stem).strip("-")[:60] or "clip"
    said = json.dumps([written, clean_query(query), sorted(given)], ensure_ascii=False)
    return f"{stem}-{hashlib.sha256(said.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


_WHOLE, _NUMBER, _TEXT = "whole number", "number", "text"
_SETTINGS = {
    "setting": choices.MODES,
    "not_this": _TEXT,
    "max_key_frames": _WHOLE,
    "key_frames": "frames",
    "key_frames_by": choices.KEY_FRAMES_BY,
    "first_frame": _WHOLE,
    "last_frame": _WHOLE,
    "tokens_per_frame": _WHOLE,
    "start_layer": _WHOLE,
    "detail": choices.DETAILS,
    "single_frames": choices.SINGLE_FRAMES,
    "point_threshold": _NUMBER,
    "presence_threshold": _NUMBER,
    "score_threshold": _NUMBER,
    "method": choices.METHODS,
    "targets": choices.TARGETS,
    "max_tracks": _WHOLE,
}
"""What a row can set, and of what kind it is: one of several words, or a number or text."""

_SHORT = {"not": "not_this", "first": "first_frame", "last": "last_frame", "queries": "query"}
"""As the options of `decaf segment` are called."""

COLUMNS = ("id", "clip", "query", *_SETTINGS)


def _known_name(column: str) -> str:
    """The column that is meant. DecafError: there is no such one."""
    plain = str(column).strip().lower().replace("-", "_").replace(" ", "_").lstrip("_")
    plain = _SHORT.get(plain, plain)
    if plain in COLUMNS:
        return plain
    near = difflib.get_close_matches(plain, [*COLUMNS, *_SHORT], n=1)
    meant = f'; did you mean "{near[0]}"?' if near else "."
    raise DecafError(f'there is no column "{shown(column, 40)}"{meant} Known are {", ".join(COLUMNS)}.')


def _value(name: str, value: object) -> object:
    """A cell as the setting that it is. DecafError: it is none."""
    kind = _SETTINGS[name]
    if isinstance(kind, tuple):
        plain = str(value).strip().lower().replace("-", " ").replace("_", " ")
        check_choice(name, plain if plain in kind else shown(value, 40), kind)
        return plain
    if kind == "frames":
        return read_key_frames(",".join(map(str, value)) if isinstance(value, list) else str(value))
    if kind == _TEXT:
        if not isinstance(value, str):
            raise DecafError(f'"{name}" is no text.')
        return value.strip()
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = int(value) if kind == _WHOLE and not isinstance(value, float) else float(value)
        if kind == _WHOLE and number != int(number):
            raise ValueError
        return int(number) if kind == _WHOLE else number
    except (ValueError, OverflowError):
        raise DecafError(f'"{name}" is "{shown(value, 40)}", and must be a {kind}.') from None
