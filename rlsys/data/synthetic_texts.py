"""Short passages of plain English, generated, for runs with text that need no file.

They have nothing to do with the generated problems, so their loss shows what a policy forgets while
it is trained on those.
"""

from __future__ import annotations

import random

from rlsys.data.examples import PlainText

PASSAGES = 1000  # of one seed

PLACES = (
    *("the harbour", "the old market", "the valley", "the railway station", "the village"),
    *("the river bank", "the northern coast", "the town square", "the forest", "the island"),
)
PEOPLE = (
    *("a fisherman", "the baker", "two sisters", "a young teacher", "the postman"),
    *("an old sailor", "the gardener", "a group of children", "the doctor", "a travelling painter"),
)
SEASONS = ("In spring", "In early summer", "In autumn", "In winter", "After the long rains")
SCENES = (
    "{season}, {place} is quiet before sunrise.",
    "{season} the light over {place} changes from grey to gold.",
    "{season}, few visitors come to {place}.",
    "Nobody remembers when the first houses near {place} were built.",
    "The road to {place} follows a stream for most of the way.",
)
ACTIONS = (
    "Every morning {person} walks there with a dog and a basket.",
    "On most days {person} can be seen talking with the neighbours.",
    "Once a week {person} brings bread, apples and news from the city.",
    "It is said that {person} knows each path and each tree by name.",
    "For many years {person} has kept a diary of the weather.",
)
ENDINGS = (
    "When the wind turns, everyone goes home early.",
    "By evening the windows are lit and the streets are empty again.",
    "The bells can be heard from the other side of the water.",
    "Those who stay a little longer are offered tea.",
    "Then the clouds move on, and the hills come into view.",
)


def synthetic_texts(seed: int) -> list[PlainText]:
    """Return PASSAGES different passages; the same in every process for one seed."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < PASSAGES:
        scene = rng.choice(SCENES).format(season=rng.choice(SEASONS), place=rng.choice(PLACES))
        action = rng.choice(ACTIONS).format(person=rng.choice(PEOPLE))
        found[f"{scene} {action} {rng.choice(ENDINGS)}"] = None
    return [PlainText(example_id=f"passage-{i}", text=text) for i, text in enumerate(found)]
