"""How many objects a query means."""

import pytest

from decaf.tracking.wanted import ALL, ONE, Wanted, wanted

ONE_OBJECT = [
    "the red star.", "a dog", "the one that stops.", "the thing that appears last.", "the dog between the two cars.", "the dog's tail",
    "the man with glasses.", "glasses", "the bus", "one of the three dogs", "Which of the two dogs wins?", "the object moving left.",
    "the dog that chases two cats.", "the second dog", "1 dog", "最大的狗", "", "???", "this group of birds", "the tennis player",
    "the black and white dog", "the dog between the car and the tree", "the man that runs and the dog", "the knife and fork",
    "the dog and", "and the dog", "the",
]  # fmt: skip
ALL_OBJECTS = [
    "all squares.", "dogs", "the people on the left.", "Which dogs are running?", "the objects moving up.", "several cars", "a pair of shoes",
    "the rabbits that are being fed", "those cars", "all of the sheep", "the guide dogs waiting", "the men", "a few birds",
    "the cats and the dog", "the man and his dogs",
]  # fmt: skip
EXACT = {"the two circles.": 2, "both dogs": 2, "The THREE diamonds.": 3, "2 cats": 2, "all of the four birds": 4, "12 people": 12}
EXACT |= {"the red circle and the blue star.": 2, "A man and his dog": 2, "the red car, the bus and the dog on the left": 3}
EXACT |= {"the cup and the plate and the spoon": 3}


@pytest.mark.parametrize("query", ONE_OBJECT)
def test_one(query):
    assert wanted(query) == ONE


@pytest.mark.parametrize("query", ALL_OBJECTS)
def test_all(query):
    assert wanted(query) == ALL


@pytest.mark.parametrize("query", EXACT)
def test_exactly_so_many(query):
    assert wanted(query) == Wanted(EXACT[query], exact=True)


@pytest.mark.parametrize("query", ["the red star.", "all squares.", "the two circles."])
def test_a_choice_overrules_the_words(query):
    assert wanted(query, "one") == ONE and wanted(query, "all") == ALL
