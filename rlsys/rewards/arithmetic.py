"""A rule that rewards the steps of a response: are the equations between numbers right?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from rlsys.math_verifier import same_answer_text
from rlsys.rewards.records import RewardResult
from rlsys.rewards.registry import register_reward_function
from rlsys.rewards.steps import DELIMITER, Split, split_steps

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?)"
_OPERATOR = r"(?:\*\*|[-+*/^×÷·−()]|\\(?:times|cdot|div)\b)"
# Numbers, operators, brackets and equality signs, with white space between them.
_CALCULATION = re.compile(rf"(?:(?:{_NUMBER}|{_OPERATOR}|=)[ \t]*)+")
_BINARY = re.compile(rf"{_NUMBER}[ \t)]*{_OPERATOR}")
_MAX_CHARACTERS = 200  # of an equation; nobody writes longer ones by hand
_SIGNS_OF_MONEY = re.compile(r"\\?\$")


def _validate(*, delimiter: str, **_: object) -> None:
    if not delimiter:
        raise ValueError(
            "reward.functions.parameters.delimiter: '' does not separate anything. Give at least "
            "one character."
        )


def _warm_up() -> None:
    """Import the modules that the first comparison needs."""
    same_answer_text("3 + 4", "7")


@register_reward_function(
    "arithmetic_steps", validate=_validate, warm_up=_warm_up, steps=True, scores=False
)
def arithmetic_steps_reward(
    completion: str,
    ground_truth: str,
    *,
    split: Split = "delimiter",
    delimiter: str = DELIMITER,
    average: bool = False,
) -> RewardResult:
    """Return a reward for each step with an equation between numbers: 1 if all are right, else 0.

    The steps are those of `split_steps`. `average` divides the rewards by the number of steps with
    an equation, so that a response gets the fraction that is right, and not more for more of them.

    Conventions: a calculation is a chain of sides without letters, `2 * 3 + 1 = 6 + 1 = 7`, and
    each side must equal the next by the rules of `verify_math`; a rounded decimal is not equal. One
    side at least has an operator. A side next to a letter or a percent sign is left out (`2x + 3 =
    7`, `20% of 50`), and so is everything that is not written in figures. A step without an
    equation is not rewarded: it belongs to the next one that has an equation. The score of the
    whole response is 0, so the function is not for the first place, which decides accuracy.

    Example: "3 + 4 = 7.\\n\\nSo 2 * 7 = 15." has the step rewards 1 and 0.
    """
    rewards = []
    ends = []
    for step in split_steps(completion, split, delimiter=delimiter):
        pairs = list(equations(step.text))
        if pairs:
            rewards.append(float(all(same_answer_text(a, b)[0] for a, b in pairs)))
            ends.append(step.end)

    if average and rewards:
        rewards = [reward / len(rewards) for reward in rewards]
    return RewardResult(0.0, step_rewards=rewards, step_ends=ends)


def equations(text: str) -> Iterator[tuple[str, str]]:
    """Yield both sides of each equation between numbers; a chain gives one pair for each `=`.

    Example: "So 2 * 3 + 1 = 6 + 1 = 7 apples" gives ("2 * 3 + 1", "6 + 1") and ("6 + 1", "7").
    """
    text = _SIGNS_OF_MONEY.sub(" ", text)
    for match in _CALCULATION.finditer(text):
        if "=" not in match.group() or len(match.group()) > _MAX_CHARACTERS:
            continue
        sides = [side.strip() for side in match.group().split("=")]
        if not _begins_whole(text, match):
            sides[0] = ""
        if not _ends_whole(text, match):
            sides[-1] = ""

        if any(_BINARY.search(side) for side in sides):
            yield from (pair for pair in itertools.pairwise(sides) if all(pair))


def _begins_whole(text: str, match: re.Match[str]) -> bool:
    """Return whether the first side is not the rest of something with letters before it.

    `x + 3 = 7`, `2x + 3 = 7` and `10% of 20 - 2 = 0` begin with such a rest.
    """
    before = text[: match.start()]
    first = match.group()[0]
    if before[-1:].isalnum() or before[-1:] in tuple("\\_}]%!."):
        return False
    joined = not (first.isdigit() or first == "(")  # an operator joins what is before it
    if joined and before.rstrip()[-1:] not in ("", *":;,.({[>"):
        return False
    return not before.rstrip().endswith((" of", "%"))


def _ends_whole(text: str, match: re.Match[str]) -> bool:
    """Return whether the last side does not go on with letters, as `7x`, `7 x` or `7\\pi`."""
    if match.group().rstrip()[-1] in "+-*/^×÷·−(":
        return False
    after = text[match.end() :]
    is_spaced = match.group()[-1].isspace()
    if not is_spaced and (after[:1].isalnum() or after[:1] in tuple("\\_{[%!")):
        return False
    word = re.match(r"[^\W\d_]+", after)
    return not after.startswith(("\\", "%")) and (word is None or len(word.group()) > 1)
