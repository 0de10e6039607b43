"""Groups of equal answers among the samples of a prompt, for majority votes."""

from __future__ import annotations

from collections.abc import Sequence

from rlsys.math_verifier import same_answer_text


def group_answers(answers: Sequence[str], correct: Sequence[bool]) -> list[int | None]:
    r"""Return the number of each answer's group; None for a sample without an answer ("").

    Answers are grouped by the verifier's equality, not by their text:

    1. Answers of the same text are in one group.
    2. All answers of which a sample was judged right are in one group: each equals the ground
       truth.
    3. Each other text, in the order of first appearance, joins the first group whose first answer
       the verifier finds equal to it (`same_answer_text`), else it founds a group.

    The verifier's equality is not transitive in every case (rounded numbers), so a group is the
    set of answers that equal its first one.

    Example: `\frac12`, `0.5`, `1/2` and `2` are the groups 0, 0, 0, 1.
    """
    right = {answer for answer, verdict in zip(answers, correct, strict=True) if verdict and answer}
    group_of: dict[str, int] = {}
    founders: list[tuple[str, int]] = []
    groups = 0
    right_group: int | None = None

    for answer in dict.fromkeys(answer for answer in answers if answer):
        if answer in right:
            if right_group is None:
                right_group = groups
                groups += 1
            group_of[answer] = right_group
            continue

        equal = (group for first, group in founders if same_answer_text(answer, first)[0])
        found = next(equal, None)
        if found is None:
            found = groups
            groups += 1
            founders.append((answer, found))
        group_of[answer] = found
    return [group_of.get(answer) for answer in answers]
