"""The saved position of the stream: prompts taken, and the digest of the problems."""

from __future__ import annotations

import json

import pytest

from rlsys.data.batches import Prompt
from rlsys.data.prompt_stream import PromptStream


def stream(*, size: int = 7, digest: str | None = "a", count: int = 40) -> PromptStream:
    prompts = [
        Prompt(problem_id=str(i), token_ids=(i,), text="", problem="", ground_truth="")
        for i in range(count)
    ]
    return PromptStream(prompts, prompts_per_step=size, seed=1, shuffle=True, digest=digest)


def taken(source: PromptStream, batches: int) -> tuple[list[str], list[int], list[int]]:
    made = [source.next_batch() for _ in range(batches)]
    return (
        [prompt.problem_id for batch in made for prompt in batch.prompts],
        [int(group) for batch in made for group in batch.group_ids],
        [batch.batch_id for batch in made],
    )


def test_another_batch_size_repeats_no_prompt_and_skips_none():
    first = stream(size=7)
    before, groups_before, batches_before = taken(first, 4)
    resumed = stream(size=3)
    resumed.load_state(json.loads(json.dumps(first.state())))
    after, groups_after, batches_after = taken(resumed, 4)
    assert sorted([*before, *after], key=int) == [str(i) for i in range(40)]  # one epoch: 28 + 12
    assert groups_before + groups_after == list(range(40))
    assert batches_before + batches_after == list(range(8))  # seeds of sampling are not used twice


def test_other_problems_of_equal_number_are_refused():
    state = stream(digest="a").state()
    with pytest.raises(
        ValueError, match=r"data\.train: the 40 prompts are not those .*--model\.path"
    ):
        stream(digest="b").load_state(state)
    stream(digest="a").load_state(state)


def test_a_state_without_a_hash_is_compared_by_number_alone():
    state = {"batches_taken": 2, "prompts_taken": 14, "prompts": 40}
    resumed = stream(digest="b")
    resumed.load_state(state)
    assert taken(resumed, 1)[1] == list(range(14, 21))
    with pytest.raises(ValueError, match="with 40 prompts, now there are 39"):
        stream(count=39).load_state(state)


def test_returned_prompts_come_first_and_once():
    """5 and 9 were taken and not trained; a batch follows that begins with them."""
    source = stream()
    before = taken(source, 2)
    state = json.loads(json.dumps(source.state([9, 5])))
    assert state["returned"] == [9, 5]

    resumed = stream()
    resumed.load_state(state)
    problems, groups, batches = taken(resumed, 1)
    assert groups == [9, 5, *range(14, 19)]
    assert problems[:2] == [before[0][9], before[0][5]]
    assert batches == [2], "seeds of sampling are not used twice"
    assert resumed.state()["returned"] == []
    assert taken(resumed, 1)[1] == list(range(19, 26))


def test_more_returned_prompts_than_a_batch_holds():
    source = stream()
    taken(source, 2)
    source.load_state(source.state(list(range(9))))
    assert taken(source, 1)[1] == list(range(7))
    assert source.state()["returned"] == [7, 8]
    assert taken(source, 1)[1] == [7, 8, *range(14, 19)]
