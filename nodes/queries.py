"""One of several queries, for a branch of its own."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io

from ..decaf.data import Tracks as TracksRecord
from ..decaf.data import caption
from ..decaf.errors import DecafError
from . import host
from .inputs import checked
from .interop import brief
from .objects import describe
from .sockets import CATEGORY, Tracks


class DecAFPickQuery(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFPickQuery",
            display_name="Pick Query",
            category=CATEGORY,
            description="Of several queries, the objects that one of them has found. For three queries with a branch each, use three of these "
            "nodes. No model runs for it.",
            search_aliases=["decaf", "select query", "branch", "list item", "split queries", "several masks", "mask by name"],
            is_input_list=True,
            inputs=[
                Tracks.Input("tracks", tooltip="From Propagate with SAM 2: the tracks of all queries."),
                io.String.Input(
                    "query",
                    default="1",
                    tooltip="The name of the query, as in 'ball: the ball he throws'; or its number, counted from 1.",
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="Union of the query's objects, one mask per frame of the clip. Empty when nothing was found."),
                Tracks.Output("tracks", tooltip="The query's objects, for Show Objects, Pick Objects as Mask, Refine Mask and Correct Objects."),
                io.String.Output("report", tooltip="The query, and its objects with their scores, or why there are none."),
                io.String.Output("name", tooltip="The query's name, for file names; its number if it has none."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, tracks, query) -> io.NodeOutput:
        if len(query) != 1:
            raise DecafError(f"'query' was given {len(query)} texts. Give one name or number; use one Pick Query for each branch.")
        number = _place(tracks, query[0])
        picked = tracks[number]
        return io.NodeOutput(host.tracks_mask(picked, host.progress()), picked, describe(picked), picked.name or str(number + 1))


def _place(tracks: Sequence[TracksRecord], wanted: str) -> int:
    """Index of the tracks whose query has this name, or this number, counted from 1. DecafError: there is none, or more than one."""
    wanted = wanted.strip().removesuffix(":")
    named = [place for place, one in enumerate(tracks) if one.name and one.name.casefold() == wanted.casefold()]
    if len(named) > 1:
        raise DecafError(f"{len(named)} queries are called {brief(wanted)}. Give its number, counted from 1, or give each a name of its own.")
    if named:
        return named[0]
    if wanted.isdecimal() and 1 <= int(wanted) <= len(tracks):
        return int(wanted) - 1
    there = "; ".join(caption(one) if one.name else f"{place}: {one.query}" for place, one in enumerate(tracks, start=1))
    raise DecafError(f"There is no query {brief(wanted)}. Write the name or the number of one of these: {there}")
