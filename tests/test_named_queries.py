"""Queries with names: what counts as a name, and where it shows."""

import pytest
from random_clips import clip_of
from short_runs import read

from decaf import extract_attentions, load_mllm
from decaf.attention.fusion import frame_fusion, object_background_fusion
from decaf.attention.points import attention_points
from decaf.attention.questions import clean_query, names_of, split_queries
from decaf.command import main as cli
from decaf.data import caption
from decaf.errors import DecafError


@pytest.mark.parametrize(
    ("line", "name", "sentence"),
    [
        ("ball: the ball he throws", "ball", "the ball he throws."),
        ("  Left_hand-2:\tthe hand", "Left_hand-2", "the hand."),
        ("球: 他扔的球", "球", "他扔的球."),
        ("a" * 24 + ": it", "a" * 24, "it."),
        ("ball: the ball: not the bat", "ball", "the ball: not the bat."),
        # no names
        ("a" * 25 + ": it", "", "a" * 25 + ": it."),
        ("Who wins: the dog or the cat?", "", "Who wins: the dog or the cat?"),
        ("what happens at 12:30", "", "what happens at 12:30."),
        ("2: the second one", "", "2: the second one."),
        ("http://page", "", "http://page."),
        ("the ball:", "", "the ball:."),
        ("ball:", "", "ball:."),
        (": the ball", "", ": the ball."),
        ("the.ball: it", "", "the.ball: it."),
    ],
)
def test_what_is_a_name(line, name, sentence):
    query = clean_query(line)
    assert (query, query.name) == (sentence, name)
    assert clean_query(query) is query, "cleaning it again changes nothing"


def test_a_query_without_a_name_is_called_by_its_number():
    assert names_of(split_queries(["a: one\n\ntwo", "c: three"])) == ["a", "2", "c"]
    assert names_of(split_queries(["one"])) == [""] and names_of(split_queries(["a: one"])) == ["a"]


@pytest.mark.parametrize(
    ("text", "told"),
    [("a: one\nA: two", 'Two queries are called "A"'), ("a: one\nb: one.", '"one." is given twice'), ("one\na: ", None)],
)
def test_names_that_cannot_be(text, told):
    if told is None:  # a name without a sentence is a sentence
        assert split_queries([text]) == ["one.", "a:."]
    else:
        with pytest.raises(DecafError, match=told):
            split_queries([text])


def test_names_go_through_the_records_and_not_into_the_question(mllm_folder):
    mllm = load_mllm(mllm_folder("qwen2_vl"))
    found = extract_attentions(mllm, clip_of(2), ["ball: the ball", "the bat"], tokens_per_frame=16)
    for (object, background), name, query in zip(found, ("ball", "2"), ("the ball.", "the bat."), strict=True):
        fused = frame_fusion(object_background_fusion(object, background))
        assert (object.name, background.name, fused.name, attention_points(fused).fused.name) == (name,) * 4
        assert object.query == query and object.question.startswith(query) and caption(fused) == f"{name}: {query}"
    with pytest.raises(DecafError, match="are called"):
        extract_attentions(mllm, clip_of(2), ["a: one", "A: two"])
    ((alone, _),) = extract_attentions(mllm, clip_of(2), ["the bat"], tokens_per_frame=16)
    assert alone.name == "" and caption(alone) == "the bat."


def folders(out):
    return sorted(path.parent.name for path in out.rglob("result.json"))


@pytest.mark.slow
def test_command_names_folders_and_lines(line, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(line(query="square: the red square\nthe blue slope")) == 0
    said = capsys.readouterr().out
    assert "square: the red square. " in said and "2: the blue slope. " in said
    assert folders(out) == ["query-2", "query-square"]
    square = read(out / "query-square")
    assert (square["name"], square["query"]) == ("square", "the red square.") and read(out / "query-2")["name"] == "2"
    # Another name for the same query: its attention is taken from the folder of the old one, which goes; what the user has renamed stays.
    (out / "query-2").rename(out / "query-kept")
    assert cli.main(line("--resume", query="box: the red square\nthe thin line")) == 0
    assert folders(out) == ["query-2", "query-box", "query-kept"]
    assert read(out / "query-box")["attention_from_earlier_run"] and read(out / "query-box")["name"] == "box"
    assert read(out / "query-2")["query"] == "the thin line." and not read(out / "query-2")["attention_from_earlier_run"]
    assert cli.main(line(query="one: the red square")) == 0
    assert read(out)["name"] == "one" and folders(out) == ["out", "query-kept"]
    assert cli.main(line("--query", "A: x", query="a: y")) == 2 and 'Two queries are called "A"' in capsys.readouterr().err
