"""Several queries at once, and queries for what is not there, by the command."""

import json

import numpy as np
import pytest
from short_runs import FRAMES, Meter, masks, read

from decaf.command import main as cli


def test_several_queries_share_the_pictures(line, tmp_path, monkeypatch, capsys):
    """One folder each, the same masks as asked alone, and the vision tower and SAM 2 see every frame once for all of them."""
    alone = {}
    for query in ("the red square", "the blue slope"):
        assert cli.main(line(query=query)) == 0
        alone[query] = masks(tmp_path / "out" / "masks"), read(tmp_path / "out")
    meter = Meter(monkeypatch)
    assert cli.main(line("--query", "the blue slope", query="the red square\n\n")) == 0
    assert "the blue slope. " in capsys.readouterr().out
    for folder, (query, (expected, one)) in zip(("query-1", "query-2"), alone.items(), strict=True):
        result = read(tmp_path / "out" / folder)
        assert result["query"] == query + "." and result["queries_at_once"] == 2
        assert np.array_equal(masks(tmp_path / "out" / folder / "masks"), expected)
        assert result["presence"] == pytest.approx(one["presence"], abs=1e-6)
        for name in ("frames_encoded_video", "frames_encoded_image", "visual_tokens_prefilled"):
            assert result["counts"][name] == one["counts"][name]
    encoded = [read(tmp_path / "out" / folder)["counts"] for folder in ("query-1", "query-2")]
    assert [sum(counts[name] for name in ("sam2_key_encodings", "sam2_clip_encodings")) for counts in encoded] == [FRAMES, 0]
    assert meter.prefilled == sum(result["counts"][name] for name in ("visual_tokens_prefilled", "text_tokens_prefilled"))


def test_resume_asks_only_the_new_query(line, tmp_path, monkeypatch):
    assert cli.main(line(query="the red square\nthe blue slope")) == 0
    kept = (tmp_path / "out" / "query-1" / "result.json").stat().st_mtime_ns
    assert cli.main(line("--resume", query="the red square\nthe thin line")) == 0
    assert (tmp_path / "out" / "query-1" / "result.json").stat().st_mtime_ns == kept
    assert (read(tmp_path / "out" / "query-2")["query"], read(tmp_path / "out" / "query-2")["queries_at_once"]) == ("the thin line.", 1)


def results(out):
    return {path.parent.relative_to(out).as_posix(): json.loads(path.read_text())["query"] for path in out.rglob("result.json")}


@pytest.mark.slow
def test_results_of_earlier_queries_do_not_stay(line, tmp_path):
    """Whatever is found in --out is of the last run; files that are not ours stay."""
    out = tmp_path / "out"
    assert cli.main(line("--objects", query="the red square")) == 0
    (out / "notes.txt").write_text("mine")
    assert cli.main(line(query="the red square\nthe blue slope\nthe thin line")) == 0
    assert results(out) == {"query-1": "the red square.", "query-2": "the blue slope.", "query-3": "the thin line."}
    assert {path.name for path in out.iterdir()} == {"notes.txt", "query-1", "query-2", "query-3"}
    (out / "query-3" / "notes.txt").write_text("mine")
    assert cli.main(line("--resume", query="the thin line\nthe red square")) == 0
    assert results(out) == {"query-1": "the thin line.", "query-2": "the red square."}
    assert read(out / "query-1")["attention_from_earlier_run"] and read(out / "query-2")["attention_from_earlier_run"]
    assert [path.name for path in (out / "query-3").iterdir()] == ["notes.txt"]
    assert cli.main(line("--resume", query="the thin line\nthe red square")) == 0
    assert results(out) == {"query-1": "the thin line.", "query-2": "the red square."}
    assert cli.main(line(query="the blue slope")) == 0
    assert results(out) == {".": "the blue slope."}


@pytest.mark.slow
def test_resume_tells_old_attention_from_new(line, tmp_path):
    """One query's attention is there, the other is asked now: each record says what it cost."""
    assert cli.main(line(query="the red square\nthe blue slope\nthe thin line")) == 0
    assert cli.main(line("--resume", "--score-threshold", "0.5", query="the thin line\nthe green cup")) == 0
    old, new = (read(tmp_path / "out" / name) for name in ("query-1", "query-2"))
    assert (old["attention_from_earlier_run"], old["queries_at_once"]) == (True, 3)
    assert (new["attention_from_earlier_run"], new["queries_at_once"]) == (False, 1)


def test_a_clip_among_the_results_of_other_queries(line, tmp_path, capsys):
    """They would be cleared away at the end, and the clip with them."""
    assert cli.main(line(query="the red square\nthe blue slope")) == 0
    clip = tmp_path / "out" / "query-2" / "masks"
    assert cli.main(line(clip=clip)) == 2
    assert "would be overwritten" in capsys.readouterr().err and len(masks(clip)) == FRAMES


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--query", "the red square."], '"the red square." is given twice'),
        (["--query", ""], "Query 2: The query is empty"),
        (["--query", "\n".join(map(str, range(256)))], "more than 256 queries"),
    ],
)
def test_queries_that_cannot_be_asked_together(line, capsys, more, told):
    assert cli.main(line(*more)) == 2
    assert told in capsys.readouterr().err


def test_presence_threshold(line, tmp_path, capsys):
    """Below the threshold all masks are empty and a sentence says why; 0 masks the best match. The attention is the same."""
    assert cli.main(line("--presence-threshold", "0")) == 0
    result = read(tmp_path / "out")
    assert 0 < result["presence"] < 1 and result["tracks"] and result["frames_with_mask"]
    assert cli.main(line("--resume", "--presence-threshold", "1")) == 0
    absent = read(tmp_path / "out")
    assert absent["attention_from_earlier_run"] and absent["presence"] == result["presence"]
    assert absent["tracks"] == [] and not np.any(masks(tmp_path / "out" / "masks"))
    assert '"the red square" is not in this clip' in absent["message"] and "presence threshold to 0" in absent["message"]
    assert absent["message"] in capsys.readouterr().out
