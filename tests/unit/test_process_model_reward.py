"""A process reward model as a reward: refusals, the scores of its ranks, how they join the others.

A whole run is in tests/integration/test_process_rewards.py.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.evaluate_math import evaluate_math
from recipes.expert_iteration_math import expert_iteration_math
from recipes.grpo_math import grpo_math
from recipes.make_rankings import run_rankings
from recipes.rlhf import rlhf
from recipes.run_evaluation import run_evaluation
from recipes.run_expert_iteration import run_expert_iteration
from recipes.run_offline import run_offline
from recipes.run_recipe import run_recipe
from recipes.run_rlhf import run_rlhf
from recipes.sft_math import sft_math
from rlsys.config import RewardConfig, RewardFunctionConfig, RunConfig
from rlsys.config.offline import ProcessRewardModelRunConfig
from rlsys.data.batches import RewardBatch, RolloutBatch, ScoredBatch, StepScoreBatch, TrainBatch
from rlsys.data.example_encoding import NO_STEP, ExampleEncoder
from rlsys.data.example_stream import ExampleBatch
from rlsys.data.examples import StepLabels
from rlsys.data.response_text import text_after_each_token
from rlsys.driver.batch_metrics import batch_metrics
from rlsys.driver.credit_assignment import CreditAssigner
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.ports import Handle
from rlsys.driver.sampling import Sampler
from rlsys.metrics import values
from rlsys.models import resolve_model
from rlsys.models.loading import end_token_ids, load_tokenizer
from rlsys.models.saving import change_model_config
from rlsys.rewards.scoring import CompletionOutcomes, FunctionReward
from tests.support.in_process_fakes import (
    FirstTokenScorer,
    Stage,
    TableGenerator,
    held_out_prompts,
)
from tests.support.reward_models import (
    build_process_reward_model,
    build_reward_model,
    plain_step_scores,
)
from tests.support.rollout_examples import rollouts
from workers.reward_worker import join_step_scores, reward_batch, step_rewards
from workers.training.offline import ProcessRewardModelWorker
from workers.training.reward_scoring import StepScoringWorker

TOKENIZER: Any = load_tokenizer(resolve_model("tiny"))
MATH = RewardFunctionConfig(name="math")
PROCESS = ["--algorithm.advantage.name", "grpo_process", "--algorithm.advantage.parameters", "{}"]


@pytest.fixture(scope="module")
def process_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_process_reward_model(tmp_path_factory.mktemp("models") / "process_model")


def judge(path: object = "somewhere", *, weight: float = 1.0, **parameters: Any) -> Any:
    return RewardFunctionConfig(
        name="process_model", weight=weight, parameters={"path": str(path), **parameters}
    )


def flag(*functions: RewardFunctionConfig) -> str:
    return json.dumps([function.model_dump() for function in functions])


Command = Callable[..., tuple[Any, str]]


@pytest.fixture
def dry_run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that makes a dry run of grpo_process; it returns exit code and stderr."""

    def run(*functions: RewardFunctionConfig, flags: tuple[str, ...] = ()) -> tuple[Any, str]:
        arguments = ["--model.path", "tiny", "--dry-run", *PROCESS, *flags]
        with pytest.raises(SystemExit) as end:
            run_recipe(grpo_math, [*arguments, "--reward.functions", flag(*functions)])
        return end.value.code, capsys.readouterr().err

    return run


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "reward.functions.parameters.path: process_model_reward needs this parameter"),
        ({"path": ""}, "reward.functions.parameters.path: it is empty."),
        ({"path": "tiny", "split": "words"}, "reward.functions.parameters.split: "),
        ({"path": "tiny", "delimiter": ""}, "parameters.delimiter: '' does not separate"),
        (
            {"path": "tiny", "split": "sentences", "delimiter": "\n"},
            "parameters.delimiter: '\\n' is not read where split is sentences.",
        ),
        ({"path": "tiny", "ranks": 2}, "parameters.ranks: 2 is above policy.ranks 1"),
        ({"path": "tiny", "compute_dtype": "float16"}, "'float16' is not accepted. Choose one of"),
        ({"path": "tiny"}, "parameters.path: 'tiny': it is a process reward model without a head."),
    ],
)
def test_parameters_that_cannot_work_are_refused(
    parameters: dict[str, Any], message: str, dry_run: Command
):
    function = RewardFunctionConfig(name="process_model", parameters=parameters)
    code, err = dry_run(MATH, function)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert message in err


def test_it_counts_as_a_function_that_rewards_steps(dry_run: Command, process_model: Path):
    assert dry_run(MATH, judge(process_model))[0] == 0
    code, err = dry_run(MATH, judge(process_model), flags=("--algorithm.advantage.name", "maxrl"))
    assert code == 2
    assert "'process_model' rewards steps, and the estimator 'maxrl' is defined for" in err


def test_it_decides_no_accuracy(dry_run: Command, process_model: Path):
    code, err = dry_run(judge(process_model))
    assert code == 2
    assert "'process_model' is first, where it decides accuracy" in err


def test_two_models_are_refused(dry_run: Command, process_model: Path):
    other = RewardFunctionConfig(name="model", parameters={"path": str(process_model)})
    code, err = dry_run(MATH, judge(process_model), other)
    assert code == 2
    assert "'model' and 'process_model' are both models, and a run has the ranks of one." in err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "saved as ForSequenceClassific"),
        ({"value_role": "reward_model"}, "it is a reward model, whose value judges a whole"),
        ({"value_role": "critic"}, "it is a critic, whose values are no rewards."),
        ({"id2label": {"0": "A", "1": "B"}}, "has 2 labels, and a value is one number"),
        ({"max_position_embeddings": 100}, "generation.max_tokens 16 exceed the 100 positions of"),
        ({"vocab_size": 100}, "has embeddings for 100 tokens and model.path 'tiny' for 381"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    fields: dict[str, Any], message: str, dry_run: Command, process_model: Path, tmp_path: Path
):
    changed = tmp_path / "changed"
    shutil.copytree(process_model, changed)
    change_model_config(changed, fields)
    code, err = dry_run(MATH, judge(changed))
    assert code == 2
    assert err.startswith("error: reward.functions.parameters.path: ")
    assert message in err


def test_each_kind_of_model_is_refused_under_the_name_of_the_other(
    dry_run: Command, process_model: Path, tmp_path: Path
):
    whole = build_reward_model(tmp_path / "whole")
    code, err = dry_run(MATH, judge(whole))
    assert code == 2
    assert "Name the reward 'model' where the response is to be scored as a whole." in err

    outcome = RewardFunctionConfig(name="model", parameters={"path": str(process_model)})
    code, err = dry_run(MATH, outcome, flags=("--algorithm.advantage.name", "grpo"))
    assert code == 2
    assert "name the reward process_model where the values judge steps" in err


def test_other_commands_refuse_it(
    capsys: pytest.CaptureFixture[str], process_model: Path, tmp_path: Path
):
    functions = flag(MATH, judge(process_model))
    flags = ["--model.path", "tiny", "--generation.engine", "transformers"]
    flags += ["--reward.functions", functions, "--dry-run"]
    refused = "'process_model' is a reward of RL training"
    pipeline = ["--model.path", "tiny", "--dry-run", "--ppo.reward.functions"]
    both = flag(MATH, RewardFunctionConfig(name="model"), judge(process_model))
    commands: list[tuple[Callable[[], object], str]] = [
        (lambda: run_evaluation(evaluate_math, flags), refused),
        (lambda: run_rankings([*flags, "--output", str(tmp_path / "r.parquet")]), refused),
        (lambda: run_offline(sft_math, flags), refused),
        (lambda: run_expert_iteration(expert_iteration_math, flags), refused),
        (lambda: run_rlhf(rlhf, [*pipeline, functions]), "leaves out the reward model"),
        (lambda: run_rlhf(rlhf, [*pipeline, both]), "are both models"),
    ]
    for command, message in commands:
        with pytest.raises(SystemExit) as end:
            command()
        assert end.value.code == 2, message
        assert message in capsys.readouterr().err


# --- ranks ----------------------------------------------------------------------------------------


@contextmanager
def started(kind: Any, config: Any, directory: Path) -> Iterator[Any]:
    """Start a rank that is alone, in this process."""
    worker = kind(config, str(directory), 0, 1)
    worker.setup(worker.rendezvous())
    yield worker
    worker.shutdown()


def run_config(path: Path, policy: dict[str, Any], **parameters: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "tiny"},
            "data": {"max_prompt_tokens": 64},
            "generation": {"max_tokens": 64},
            "policy": {"compute_dtype": "float32", **policy},
            "reward": {"functions": [MATH, judge(path, **parameters)]},
        }
    )


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def batch_of(*groups: tuple[str, list[str]]) -> RolloutBatch:
    """Return responses to prompts, with the texts that their tokens decode to."""
    made = rollouts([(ids(prompt), [ids(text) for text in texts]) for prompt, texts in groups])
    return replace(made, response_texts=tuple(text for _, texts in groups for text in texts))


def sequences_of(batch: RolloutBatch) -> list[list[int]]:
    """Return prompt and response of each row."""
    return [tokens.tolist() for tokens in np.split(batch.token_ids, batch.sequence_offsets[1:-1])]


# Finished and cut off, with a blank line at the end, of one step, of white space alone, and empty.
RESPONSES = batch_of(
    ("What is 2 + 3?", ["2 + 3 = 5.\n\nThe answer is 5.", "First\n\n\n\nthen\n\n", "", "no ste"]),
    ("And 7?", ["\n\n", "€uro\n\n5.\n\n7"]),
)
# As text: the ends of the steps, written by hand.
STEPS = [["2 + 3 = 5.", "2 + 3 = 5.\n\nThe answer is 5."], ["First", "First\n\n\n\nthen"]]
STEPS += [[], ["no ste"], [], ["€uro", "€uro\n\n5.", "€uro\n\n5.\n\n7"]]


def slow_token_of(prompt: list[int], response: list[int], text: str) -> int:
    """Return the first token after which the whole `text` has been sampled."""
    before = len(TOKENIZER.decode(prompt))
    for end in range(len(response)):
        decoded = TOKENIZER.decode([*prompt, *response[: end + 1]])[before:]
        if decoded.startswith(text):
            return end
    raise AssertionError(text)


def expected_ends() -> list[list[int]]:
    found = []
    for row, texts in enumerate(STEPS):
        tokens, length = sequences_of(RESPONSES)[row], int(RESPONSES.prompt_lengths[row])
        found.append([slow_token_of(tokens[:length], tokens[length:], text) for text in texts])
    return found


@pytest.mark.parametrize(
    "policy", [{}, {"microbatch_tokens": 20}, {"packing": False}, {"shared_prefix_packing": False}]
)
def test_scores_are_those_of_transformers_on_single_sequences(
    policy: dict[str, Any], process_model: Path
):
    with started(StepScoringWorker, run_config(process_model, policy), process_model) as worker:
        batch = worker.scores(RESPONSES)
    assert batch.unplaced == ()

    found = StepScoreBatch.gather([batch], len(RESPONSES))
    ends = expected_ends()
    assert [[end for end, _ in steps] for steps in found] == ends
    prompts = RESPONSES.prompt_lengths.tolist()
    places = [[length + end for end in own] for length, own in zip(prompts, ends, strict=True)]
    expected = plain_step_scores(process_model, sequences_of(RESPONSES), places)
    flat = [score for steps in expected for score in steps]
    assert np.std(flat) > 0.05, "the model tells steps apart"
    np.testing.assert_allclose([score for own in found for _, score in own], flat, atol=1e-4)


def test_scores_are_those_that_the_training_of_the_model_evaluates(process_model: Path):
    """The same text as a labelled example and as a response: the same tokens, the same values."""
    ends = end_token_ids(resolve_model("tiny"), TOKENIZER)
    encoder = ExampleEncoder("plain", TOKENIZER, chat=None, end_tokens=ends)
    texts = [("2 + 3 = 5.", "So 5 + 1 = 6.", "6"), ("a b ", "\nc")]
    examples = [
        encoder.steps(
            StepLabels(
                example_id=str(n), prompt=f"Problem {n}", steps=steps, labels=(True,) * len(steps)
            ),
            "\n\n",
        )
        for n, steps in enumerate(texts)
    ]

    offline = ProcessRewardModelRunConfig.model_validate(
        {
            "model": {"path": str(process_model)},
            "data": {"max_prompt_tokens": 64, "max_response_tokens": 64},
            "reward_model": {"compute_dtype": "float32"},
        }
    )
    labelled = ExampleBatch.of(0, examples, 0)
    logits: dict[tuple[int, int], float] = {}
    with started(ProcessRewardModelWorker, offline, process_model) as worker, torch.no_grad():
        for pack in worker.packs_of_batch(labelled):
            found = torch.sigmoid(worker.run(pack, 1.0).values).tolist()
            rows = pack.rows[pack.response_index].tolist()
            places = (pack.response_positions - 1).tolist()
            logits |= dict(zip(zip(rows, places, strict=True), found, strict=True))
    assert labelled.step_labels is not None
    assert len(logits) == (labelled.step_labels != NO_STEP).sum() == 5

    groups = [(list(one.prompt), [one.responses[0].token_ids.tolist()]) for one in examples]
    made = rollouts(groups)
    decoded = [text_after_each_token(TOKENIZER, p, r[0])[0] for p, r in groups]
    made = replace(made, response_texts=tuple(decoded))
    with started(StepScoringWorker, run_config(process_model, {}), process_model) as worker:
        batch = worker.scores(made)
    scored = {
        (row, end): score
        for row, end, score in zip(batch.rows, batch.ends, batch.scores.tolist(), strict=True)
    }
    assert scored == pytest.approx(logits, abs=1e-5)


def test_steps_in_one_token_are_one_and_other_texts_are_told(process_model: Path):
    """With "a" as the delimiter "man" has the steps "ma" and "n", and it is one token."""
    assert len(ids("man")) == 1
    made = batch_of(("p", ["man", "no"]))
    made = replace(made, response_texts=("man", "xyz"))
    config = run_config(process_model, {}, delimiter="a")
    with started(StepScoringWorker, config, process_model) as worker:
        batch = worker.scores(made)
        nothing = worker.scores(batch_of(("p", ["", "\n"])))
    assert (batch.rows.tolist(), batch.ends.tolist()) == ([0], [0])
    assert batch.unplaced == (1,)
    assert (len(nothing.scores), nothing.unplaced) == (0, ())


# --- joining --------------------------------------------------------------------------------------


def part(*steps: tuple[int, int, float], unplaced: tuple[int, ...] = ()) -> StepScoreBatch:
    """Return a rank's scores of (row, end, score)."""
    rows, ends, scores = zip(*steps, strict=True) if steps else ((), (), ())
    return StepScoreBatch(
        batch_id=0,
        rows=np.asarray(rows, dtype=np.int64),
        ends=np.asarray(ends, dtype=np.int64),
        scores=np.asarray(scores, dtype=np.float32),
        unplaced=unplaced,
    )


def joined(config: RewardConfig, *parts: StepScoreBatch) -> RewardBatch:
    """Return the rewards of two responses, of which the second is right by `math`."""
    pool = [
        CompletionOutcomes(outcomes=(FunctionReward(reward=0.0),)),
        CompletionOutcomes(outcomes=(FunctionReward(reward=1.0),)),
    ]
    outcomes = join_step_scores(config, pool, parts)
    return replace(reward_batch(0, config, outcomes), step_rewards=step_rewards(config, outcomes))


def test_the_scores_of_ranks_join_as_rewards_of_steps_by_weight():
    """Weight 2; gae without a critic sums what comes after: (2*0.5, 2*0.25 + 0) and (2*0.75, 1)."""
    functions = (MATH, judge(weight=2.0))
    config = RewardConfig(functions=functions)
    rewards = joined(config, part((0, 1, 0.25), (1, 0, 0.75)), part((0, 0, 0.5)))
    assert rewards.rewards.tolist() == [0.0, 1.0]
    assert rewards.correct.tolist() == [False, True]
    assert rewards.components["process_model"].tolist() == [0.0, 0.0]
    steps = rewards.step_rewards["process_model"]
    assert steps.offsets.tolist() == [0, 2, 3]
    assert steps.ends.tolist() == [0, 1, 0]
    assert steps.rewards.tolist() == [0.5, 0.25, 0.75]

    made = rollouts([([9], [[1, 2], [3, 4]])])
    numbers = values(batch_metrics(ScoredBatch(rollouts=made, rewards=rewards)))
    assert numbers["reward/steps/process_model"] == 1.5
    assert numbers["reward/step_mean/process_model"] == 0.5

    run = RunConfig.model_validate(
        {
            "generation": {"min_tokens": 0, "max_tokens": 2, "samples_per_prompt": 2},
            "algorithm": {"advantage": {"name": "gae", "parameters": {}}},
            "reward": {"functions": functions},
        }
    )
    train, _ = CreditAssigner(run).assign(made, rewards, [], [])
    assert isinstance(train, TrainBatch)
    assert train.advantages.tolist() == [0.0, 1.5, 0.5, 0.0, 2.5, 1.0]


@pytest.mark.parametrize("on_failure", ["zero", "drop"])
def test_what_cannot_be_scored_is_a_failure(on_failure: Any):
    config = RewardConfig(functions=(MATH, judge()), on_failure=on_failure)
    rewards = joined(config, part((1, 0, math.nan), unplaced=(0,)), part(unplaced=(0,)))
    assert np.isnan(rewards.components["process_model"]).all()
    assert rewards.step_rewards["process_model"].offsets.tolist() == [0, 0, 0]
    assert rewards.scored.all() == (on_failure == "zero")
    first, second = rewards.failures
    assert (first.function, second.function) == ("process_model",) * 2
    assert "decode to another text" in first.message
    assert second.message == "ValueError: its score is nan; a reward must be finite"


def test_no_step_is_scored_twice():
    with pytest.raises(AssertionError, match="exactly one rank"):
        StepScoreBatch.gather([part((0, 1, 0.5)), part((0, 1, 0.5))], 1)


async def test_an_evaluation_reports_the_mean_of_steps():
    class WithSteps(FirstTokenScorer):
        async def _score(self, rollouts: Handle[RolloutBatch]) -> RewardBatch:
            rewards = await super()._score(rollouts)
            outcomes = [
                CompletionOutcomes(
                    outcomes=(
                        FunctionReward(reward=1.0),
                        FunctionReward(reward=0.0, step_rewards=(0.25, 0.5), step_ends=(0, 1)),
                    )
                )
                for _ in range(len(rewards))
            ]
            functions = config.reward
            scored = reward_batch(rewards.batch_id, functions, outcomes)
            return replace(scored, step_rewards=step_rewards(functions, outcomes))

    config = RunConfig.model_validate(
        {
            "generation": {"min_tokens": 0, "max_tokens": 2},
            "reward": {"functions": [MATH, judge()]},
        }
    )
    stage = Stage()
    sampler = Sampler(config, TableGenerator(stage, config), WithSteps(stage))
    found = await Evaluator(config, held_out_prompts(), sampler).evaluate()
    assert found["eval/step_mean/process_model"] == 0.375
    assert found["eval/reward"] == found["eval/accuracy"] == 1.0
