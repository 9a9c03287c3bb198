"""Lists of clips and queries: what is read from them, and what is said of those that cannot be read."""

import json
import time
from dataclasses import fields

import pytest

from decaf.command.manifest import COLUMNS, Stages, read_manifest
from decaf.command.options import check_stages
from decaf.errors import DecafError
from decaf.settings import AttentionSettings, PointSettings, TrackingSettings

STAGES = Stages(AttentionSettings(max_key_frames=9), PointSettings(), TrackingSettings())


def read(tmp_path, content, name="rows.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return read_manifest(path, STAGES, lambda one: check_stages(one.attention, one.points, one.tracking))


def refused(tmp_path, content, match, name="rows.csv"):
    with pytest.raises(DecafError, match=match) as caught:
        read(tmp_path, content, name)
    return str(caught.value)


def test_csv_and_json_lines_say_the_same(tmp_path):
    table = (
        "clip,query,id,max-key-frames,Point Threshold,not,key_frames,method,last\n"
        'a.mp4,the dog,dog,4,0.5,the cat,"1,2",as-published,7\n'
        '\n"b, c.mp4","ball: the ball\nthe boy",,,,,,,\n'
    )
    lines = [
        {"clip": "a.mp4", "query": "the dog", "id": "dog", "max_key_frames": 4, "point_threshold": 0.5, "not": "the cat",
         "key-frames": [1, 2], "method": "as published", "last_frame": 7},
        {"clip": "b, c.mp4", "query": ["ball: the ball", "the boy"], "detail": None},
    ]  # fmt: skip
    rows = read(tmp_path, table)
    others = read(tmp_path, "\n".join(map(json.dumps, lines)), "rows.jsonl")
    assert [(one.id, one.clip, one.query, one.stages) for one in rows] == [(one.id, one.clip, one.query, one.stages) for one in others]
    assert [row.query for row in rows] == ["the dog.", "ball: the ball.", "the boy."]
    assert rows[0].clip == tmp_path / "a.mp4" and rows[1].clip == tmp_path / "b, c.mp4"
    assert rows[0].stages == Stages(
        AttentionSettings(max_key_frames=4, not_this="the cat", key_frames=(1, 2), last_frame=7),
        PointSettings(point_threshold=0.5),
        TrackingSettings(method="as published"),
    )
    assert rows[1].stages == STAGES
    assert [row.line for row in rows] == [2, 4, 4] and [row.line for row in others] == [1, 2, 2]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_and_what_spreadsheets_write(tmp_path, delimiter):
    text = f"Clip{delimiter}Query{delimiter}ID\r\nä.mp4{delimiter}der Hund, der rennt{delimiter}x\r\n"
    rows = read(tmp_path, b"\xef\xbb\xbf" + text.encode())
    assert [(row.written, row.query, row.id) for row in rows] == [("ä.mp4", "der Hund, der rennt.", "x")]


def test_made_ids_stay_when_lines_are_moved(tmp_path):
    one = read(tmp_path, "clip,query,detail\nx/dog one.mp4,a,\nx/dog one.mp4,b,\nx/dog one.mp4,b,fast\n")
    other = read(tmp_path, "clip,query\nx/dog one.mp4,b\nx/dog one.mp4,a\n")
    assert [row.id for row in one][:2] == [row.id for row in other][::-1]
    assert len({row.id for row in one}) == 3
    assert all(row.id.startswith("dog-one-") for row in one)


def test_an_absolute_path_stays_one(tmp_path):
    assert str(read(tmp_path, "clip,query\n/films/a.mp4,a\n")[0].clip) == "/films/a.mp4"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "has no rows"),
        ("clip,query\n", "has no rows"),
        ("clip,text\na,b\n", 'no column "text"'),
        ("clip\na\n", 'has no column "query"; it has clip'),
        ("clip,query,max-keyframes\na,b,3\n", 'no column "max-keyframes"; did you mean "max_key_frames"'),
        ("clip,query,refine\na,b,3\n", 'no column "refine"'),
        ("clip,query,query\na,b,c\n", "column query twice"),
        ("clip,query\na,b,c\n", "line 2: 3 cells under 2 columns"),
        ("clip,query\n,b\n", 'line 2: there is no "clip"'),
        ("clip,query\na,\n", "line 2: The query is empty"),
        ('clip,query\na,"b\n', "no CSV"),
        ("clip,query,detail\na,b,slow\n", 'line 2: There is no detail "slow"; choose one of paper, fast'),
        ("clip,query,max-key-frames\na,b,four\n", 'line 2: "max_key_frames" is "four", and must be a whole number'),
        ("clip,query,max-key-frames\na,b,0\n", "line 2: --max-key-frames 0 is not between"),
        ("clip,query,point-threshold\na,b,nan\n", "line 2: --point-threshold nan"),
        ("clip,query,key-frames\na,b,x\n", "line 2: The key frames hold 'x'"),
        ("clip,query,not\na,b,B\n", "'Not this' says the same"),
        ("clip,query,id\na,b,x/y\n", "line 2: the id \"x/y\" names files, and cannot"),
        ("clip,query,id\na,b,x\nc,d,X\n", 'line 3: the id "X" as in line 2'),
        ("clip,query\na,b\na,b.\n", "line 3: the same clip and query as in line 2"),
        ("clip,query,id\na,b,x-1\nc,\"d\ne\",x\n", 'line 3: the id "x-1" as in line 2'),
        (b"clip,query\na,caf\xe9\n", "not UTF-8: line 2 has the byte 0xe9"),
        ("clip,query\na,b\n".encode("utf-16"), "is UTF-16"),
        (b"clip,query\na,b\n\0\n", "line 3 has a NUL"),
        ('[{"clip": "a"}]', "one JSON array"),
        ('{"clip": "a", "query": "b"}\n{', "line 2: no JSON"),
        ('{"clip": "a", "query": "b"}\n3', "line 2: no JSON object"),
        ('{"clip": "a", "query": []}', "neither a text nor a list of texts"),
        ('{"clip": "a", "query": 3}', "neither a text nor a list of texts"),
        ('{"clip": 3, "query": "b"}', 'there is no "clip"'),
        ('{"clip": "a", "query": "b", "max_tracks": true}', "must be a whole number"),
        ('{"clip": "a", "query": "b", "max_tracks": 1.5}', "must be a whole number"),
        ('{"clip": "a", "query": "b", "first": 1, "first_frame": 2}', '"first_frame" is given twice'),
        ('{"clip": "a", "query": "b"}\n' + "[" * 100_000, "line 2: no JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_told_with_its_line(tmp_path, content, match):
    refused(tmp_path, content, match)


def test_mistakes_are_told_together_but_not_all_of_thousands(tmp_path):
    told = refused(tmp_path, "clip,query\n" + "a,\n" * 3000, "has 3000 mistakes")
    assert told.count("\n") == 6 and "line 2:" in told and told.endswith("and 2995 more")


def test_no_file(tmp_path):
    with pytest.raises(DecafError, match="does not exist"):
        read_manifest(tmp_path / "none.csv", STAGES, lambda one: None)
    with pytest.raises(DecafError, match="is a folder"):
        read_manifest(tmp_path, STAGES, lambda one: None)


def test_ten_thousand_rows_are_read_at_once(tmp_path):
    rows = "".join(f"clips/{number // 3}.mp4,the thing number {number},{number % 7 + 1}\n" for number in range(10_000))
    begin = time.process_time()
    assert len(read(tmp_path, "clip,query,max-key-frames\n" + rows)) == 10_000
    assert time.process_time() - begin < 10  # takes about one


def test_every_setting_of_a_clip_has_a_column():
    """But those that are there for comparisons with the paper alone."""
    settings = {field.name for record in (AttentionSettings, PointSettings, TrackingSettings) for field in fields(record)}
    assert settings - {"v_max", "consistency", "nms_iou"} == set(COLUMNS) - {"id", "clip", "query"}
