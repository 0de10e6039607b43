"""Sources of examples, and the stream of a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config.offline import PreferenceRunConfig, RewardModelRunConfig, SupervisedRunConfig
from rlsys.data.example_stream import LoadedExamples, load_examples, source_examples
from rlsys.data.examples import Demonstration, Ranking
from rlsys.data.synthetic_problems import generate_problems, generate_solved_problems
from rlsys.math_verifier import verify_math
from rlsys.models import resolve_model
from rlsys.models.loading import end_token_ids, load_tokenizer

SMALL = {"synthetic": {"train_size": 20, "eval_size": 6}}


def supervised(**sections: Any) -> SupervisedRunConfig:
    return SupervisedRunConfig.model_validate({"data": SMALL, **sections})


def load(config: Any) -> LoadedExamples:
    directory = resolve_model("tiny")
    tokenizer = load_tokenizer(directory)
    ends = end_token_ids(directory, tokenizer)
    return load_examples(config, tokenizer, source_examples(config), ends)


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_every_generated_demonstration_is_accepted_by_the_verifier(level: int):
    train, held_out = generate_solved_problems([level], train_size=60, eval_size=20, seed=0)
    for solved in [*train, *held_out]:
        assert verify_math(solved.solution, solved.problem.answer).score == 1


@pytest.mark.parametrize("level", [3, 5])
def test_each_equation_of_a_derivation_is_right(level: int):
    train, _ = generate_solved_problems([level], train_size=60, eval_size=5, seed=0)
    for solved in train:
        derivation = solved.solution.split(". ")[0]
        values = {eval(part) for part in derivation.split(" = ")}
        assert values == {int(solved.problem.answer)}


def test_the_problems_are_those_of_an_rl_run():
    solved, _ = generate_solved_problems([1, 3], train_size=30, eval_size=6, seed=4)
    problems, _ = generate_problems([1, 3], train_size=30, eval_size=6, seed=4)
    assert [item.problem for item in solved] == problems


@pytest.mark.parametrize("responses", [2, 3, 4])
def test_generated_rankings_agree_with_the_verifier(responses: int):
    config = PreferenceRunConfig.model_validate({"data": {**SMALL, "responses": responses}})
    for ranking in source_examples(config).train:
        assert isinstance(ranking, Ranking)
        assert sorted(ranking.ranks) == list(range(responses))
        by_rank = dict(zip(ranking.ranks, ranking.responses, strict=True))
        correct = {
            rank: verify_math(text, ranking.answer or "").score == 1
            for rank, text in by_rank.items()
        }
        # Only the best one is right and boxed.
        assert correct == {rank: rank == 0 for rank in range(responses)}


def test_rankings_differ_by_seed_and_not_from_call_to_call():
    def responses(seed: int) -> list[tuple[str, ...]]:
        config = RewardModelRunConfig.model_validate({"data": SMALL, "trainer": {"seed": seed}})
        return [item.responses for item in source_examples(config).train]  # type: ignore[union-attr]

    assert responses(0) == responses(0)
    assert responses(0) != responses(1)


def test_train_and_held_out_share_no_prompt(tmp_path: Path):
    rows = [{"prompt": f"p{i % 10}", "completion": f"c{i}"} for i in range(40)]
    config = supervised(data={"train": written(tmp_path, rows), "held_out": 0.3})
    examples = source_examples(config)
    train = {example.prompt_key for example in examples.train}
    held_out = {example.prompt_key for example in examples.held_out}
    assert len(held_out) == 3
    assert not train & held_out
    assert any("neither trained on nor evaluated" in notice for notice in examples.notices)


def test_a_resumed_stream_continues_with_the_same_batches():
    whole = load(supervised(trainer={"examples_per_step": 7})).train
    batches = [whole.next_batch() for _ in range(6)]  # more than an epoch of 20

    first = load(supervised(trainer={"examples_per_step": 7})).train
    for _ in range(2):
        first.next_batch()
    second = load(supervised(trainer={"examples_per_step": 7})).train
    second.load_state(json.loads(json.dumps(first.state())))
    for expected in batches[2:]:
        found = second.next_batch()
        assert found.batch_id == expected.batch_id
        np.testing.assert_array_equal(found.sequences.token_ids, expected.sequences.token_ids)
        np.testing.assert_array_equal(found.sequences.group_ids, expected.sequences.group_ids)


def test_other_examples_are_refused_on_a_resume():
    state = load(supervised()).train.state()
    other = load(supervised(trainer={"seed": 1})).train
    with pytest.raises(ValueError, match=r"data\.train: the 20 examples are not the 20"):
        other.load_state(state)


def test_overlong_examples_are_dropped_or_refused(tmp_path: Path):
    rows = [{"prompt": "p", "completion": "x " * n} for n in (2, 3, 50)]
    data = {"train": written(tmp_path, rows), "eval": "off", "max_response_tokens": 20}
    loaded = load(supervised(data=data))
    assert len(loaded.train) == 2
    assert any("1 of 3 examples of data.train are longer" in notice for notice in loaded.notices)
    with pytest.raises(ValueError, match=r"set data\.overlong to drop"):
        load(supervised(data={**data, "overlong": "refuse"}))
    with pytest.raises(ValueError, match=r"data\.max_response_tokens: 3 of 3"):
        load(supervised(data={**data, "max_response_tokens": 1}))


def test_rankings_of_ties_are_dropped_or_refused(tmp_path: Path):
    tied = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}
    ranked = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [0, 0, 1]}
    file = written(tmp_path, [tied, ranked])
    config = RewardModelRunConfig.model_validate({"data": {"train": file, "eval": "off"}})
    examples = source_examples(config)
    assert len(examples.train) == 1
    assert any("1 of 2 rankings have tied responses only" in text for text in examples.notices)

    only_ties = written(tmp_path, [tied])
    config = RewardModelRunConfig.model_validate({"data": {"train": only_ties, "eval": "off"}})
    with pytest.raises(ValueError, match=r"data\.train: .*no pair is left"):
        source_examples(config)


def test_problems_are_the_held_out_examples_with_answers(tmp_path: Path):
    loaded = load(supervised())
    assert len(loaded.problems) == 6
    assert loaded.held_out is not None
    first = loaded.problems.prompts[0]
    tokens = loaded.held_out.sequences.token_ids[: len(first.token_ids)]
    assert tuple(tokens.tolist()) == first.token_ids

    limited = supervised(trainer={"evaluation": {"problems": 2}})
    assert len(load(limited).problems) == 2
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(9)]
    without_answers = load(supervised(data={"train": written(tmp_path, rows)}))
    assert len(without_answers.problems) == 0
    assert without_answers.held_out is not None


def test_an_answer_in_the_file_makes_a_problem(tmp_path: Path):
    rows = [{"problem": f"{i} + 1?", "solution": "so", "answer": i + 1} for i in range(9)]
    examples = source_examples(supervised(data={"train": written(tmp_path, rows)}))
    assert all(isinstance(example, Demonstration) for example in examples.train)
    loaded = load(supervised(data={"train": written(tmp_path, rows)}))
    prompt = loaded.problems.prompts[0]
    assert int(prompt.ground_truth) == int(prompt.problem.split()[0]) + 1
