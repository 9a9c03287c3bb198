"""The questions that the model is asked. Their wording is a parameter of the method: all of it stands here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from ..errors import DecafError
from ..settings import MODES

LONGEST_QUERY = 2000
"""Characters of a query."""

LONGEST_QUESTION = 8000
"""Characters of a question template, and of a question with the query in it. Each character is up to four tokens for the model, which bounds
those before it answers (see `decaf.mllm.base.LONGEST_QUESTION_TOKENS`)."""

MOST_ANSWERS, LONGEST_NAME = 32, 80
"""Names that are chosen from: the most frequent answers, each cut to so many characters."""

MOST_QUERIES = 256
"""Queries that share the passes over one clip."""


class Query(str):
    """A query as it is asked: the sentence. `name`: what the user calls it; empty for nothing."""

    name: str

    def __new__(cls, sentence: str, name: str = ""):
        query = super().__new__(cls, sentence)
        query.name = name
        return query


_NAMED = re.compile(r"\s*([^\W\d_][\w-]{0,23}):\s+(?=\S)")
"""A name: one word of at most 24 letters, digits, _ and -, which begins with a letter; then a colon and a space. Several words before a colon are a
part of the sentence."""


def clean_query(query: str) -> Query:
    """The query as it is asked: one line, stripped, closed by a full stop unless it ends in `.` or `?`. Of "ball: the ball he throws" the name is
    "ball" (one word, see `_NAMED`).

    Raises DecafError when it is empty, longer than 2,000 characters, or no text.
    """
    if isinstance(query, Query):
        return query
    named = _NAMED.match(query)
    return Query(_cleaned(query[named.end() :], "The query"), named[1]) if named else Query(_cleaned(query, "The query"))


def names_of(queries: Sequence[Query]) -> list[str]:
    """What to call each: its own name; else, if there are several, its number, counted from 1. DecafError: two have the same name."""
    names = [query.name or (str(number) if len(queries) > 1 else "") for number, query in enumerate(queries, start=1)]
    folded = [name.casefold() for name in names]  # they name folders, too, and not every file system tells cases apart
    for index, name in enumerate(names):
        if folded[index] in folded[:index]:
            raise DecafError(f'Two queries are called "{name}". Give each a name of its own.')
    return names


def _cleaned(query: str, what: str) -> str:
    text = " ".join(query.split())
    if not text:
        raise DecafError(f'{what} is empty. Say what to look for, for example "the dog that gets the ball first".')
    _check_text(what, text)
    if len(text) > LONGEST_QUERY:
        raise DecafError(
            f"{what} has {len(text):,} characters; at most {LONGEST_QUERY:,} are asked. Describe the object in a sentence or two."
        )
    return text if text.endswith((".", "?")) else text + "."


def split_queries(texts: Iterable[str]) -> list[Query]:
    """The queries in `texts`, one a line, as they are asked; empty lines between others do not count. DecafError: as in `clean_query`, with
    the line if there are several; or a query or a name is given twice."""
    queries = []
    for text in texts:
        lines = [line for line in text.splitlines() if line.strip()] or [text]
        for line in lines:
            try:
                query = clean_query(line)
            except DecafError as error:
                raise DecafError(f"Query {len(queries) + 1}: {error}" if queries or len(lines) > 1 else str(error)) from None
            if query in queries:
                raise DecafError(f'The query "{query}" is given twice. Give each once.')
            queries.append(query)
            if len(queries) > MOST_QUERIES:
                raise DecafError(f"There are more than {MOST_QUERIES} queries. Ask fewer at a time.")
    names_of(queries)
    return queries


def clean_not_this(text: str, queries: Iterable[str]) -> str:
    """What is not to be masked, as it is asked. DecafError: as in `clean_query`, or it says the same as one of the (cleaned) queries."""
    if not text.strip():
        raise DecafError("'Not this' is empty. Say what must not be masked, for example \"the hand\", or leave it out.")
    cleaned = _cleaned(text, "'Not this'")
    for query in queries:
        if query.rstrip(".?").casefold() == cleaned.rstrip(".?").casefold():
            raise DecafError(
                f'\'Not this\' says the same as the query, "{query}", so nothing would be left of it. Say in \'not this\' only what must not '
                "be masked, or leave it out."
            )
    return cleaned


@dataclass(frozen=True)
class Templates:
    """Question templates. `{query}`, `{object}` and `{answers}` are replaced; other braces stay as they are.

    `object`: asked of the clip and of every key frame. `background`: its counterpart in the setting *expression*, which excludes what the
    expression refers to. `class_background`: its counterpart in the setting *class name*, which excludes one object name.
    `choose`: asked without pictures, to choose that name from the query and the answers to the object question.
    `presence`: asked of the clip, to be answered with yes or no (see `decaf.attention.presence`).
    """

    object: str = "{query} Which object is this about? Answer with a single word."
    background: str = (
        "Leave out whatever this expression refers to: {query} Describe only the background scene around it, in a word or a short phrase."
    )
    class_background: str = "Describe only the background scene, leaving out any {object}, in a word or a short phrase."
    choose: str = (
        "Somebody looked for this in a video: {query} Looking at the video and at single frames of it, these names were given for the object: "
        "{answers}. Which one name fits best? Answer with the name alone."
    )
    presence: str = "Somebody is looking for this: {query} Can it be seen here? Answer yes or no."

    def __post_init__(self):
        needs = {"class_background": ("{object}",), "choose": ("{query}", "{answers}")}
        for one in fields(self):
            for field in needs.get(one.name, ("{query}",)):
                if field not in getattr(self, one.name):
                    raise DecafError(f'The question template "{one.name}" does not contain {field}; write {field} where it belongs.')
            what = f'The question template "{one.name}"'
            _check_text(what, getattr(self, one.name))
            _check_length(what, getattr(self, one.name))

    def check(self, queries: Iterable[str], setting: str) -> None:
        """DecafError if a question of these queries would be too long to be asked; known without a model."""
        makers = {"object": self.ask_object, "presence": self.ask_presence}
        if setting == MODES[0]:
            makers["background"] = self.ask_background
        for query in queries:
            for name, make in makers.items():
                _check_length(f'The question "{name}" for the query "{query[:60]}"', make(query))

    def ask_object(self, query: str) -> str:
        return self.object.replace("{query}", query.lower())

    def ask_background(self, query: str) -> str:
        return self.background.replace("{query}", query)

    def ask_presence(self, query: str) -> str:
        return self.presence.replace("{query}", query.lower())

    def ask_class_background(self, name: str) -> str:
        return self.class_background.replace("{object}", name)

    def class_name(self, asked: str) -> str:
        """The name in a question of `ask_class_background`; empty if it is none of these templates."""
        before, *rest = self.class_background.split("{object}")
        letters = len(asked) - len(before) - sum(map(len, rest))
        name = asked[len(before) : len(before) + letters // len(rest)] if letters > 0 else ""
        return name if self.ask_class_background(name) == asked else ""

    def ask_choice(self, query: str, answers: list[str]) -> str:
        often = Counter(answer for answer in answers if answer).most_common(MOST_ANSWERS)
        named = ", ".join(answer[:LONGEST_NAME] for answer, _ in often) or "none"
        values = {"{query}": query, "{answers}": named}
        return re.sub("|".join(values), lambda found: values[found[0]], self.choose)


def _check_text(what: str, text: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DecafError(f"{what} holds bytes that are not text in UTF-8. Check the encoding of the terminal or file that it comes from.")


def _check_length(what: str, text: str) -> None:
    if len(text) > LONGEST_QUESTION:
        raise DecafError(f"{what} has {len(text):,} characters; at most {LONGEST_QUESTION:,} are asked. Shorten the wording or the query.")


AS_PUBLISHED = Templates(
    object="{query} Which main object, or objects, is this expression or question about? Go by who or what the action is mainly about, and "
    "answer with one word that names it, such as cat, person or dog.",
    class_background="What is the background scene of the video, if any {object} is left out? Answer with a word or a short phrase.",
)
"""What the published questions ask for, in words of our own: the main object of an action, then the background without what it was called. They
belong to the setting *class name*."""
