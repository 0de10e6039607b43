"""The configuration of an evaluation: only options with an effect, and no contradictions."""

import pytest

from recipes.evaluate_math import evaluate_math
from rlsys.config import ConfigError
from rlsys.config.command_line import HelpRequested, dump_yaml, parse
from rlsys.config.evaluation_run import EvaluationRunConfig, evaluation_contradictions
from rlsys.config.fields import all_fields
from rlsys.config.hardware import detect_hardware


def configured(*flags: str) -> EvaluationRunConfig:
    return parse(evaluate_math(detect_hardware()), flags).config


def test_there_are_no_options_of_training():
    names = {name for name, _ in all_fields(EvaluationRunConfig)}
    assert {"compare", "data.train", "generation.temperature", "evaluation.seed"} <= names
    for absent in (
        *("model.attention", "data.shuffle", "generation.logprob_difference_tolerance"),
        *("trainer.steps", "policy.ranks", "algorithm.advantage.name", "preset"),
    ):
        assert absent not in names
        with pytest.raises(ConfigError, match="no such flag"):
            configured(f"--{absent}", "1")


def test_help_shows_every_option_and_the_chosen_rewards():
    with pytest.raises(HelpRequested) as shown:
        configured("--reward.functions", "math,format_boxed", "--help")
    text = str(shown.value)
    for name, _ in all_fields(EvaluationRunConfig):
        assert f"--{name} " in text
    assert "format_boxed: Return 1" in text


def test_the_saved_configuration_is_read_back():
    config = configured("--compare", "tiny", "--data.train", "null", "--evaluation.pass_at", "1,2")
    tree = parse(EvaluationRunConfig(), []).config.model_validate_json(config.model_dump_json())
    assert tree == config
    assert "compare: tiny" in dump_yaml(config)
    assert config.data.train == "off"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--generation.temperature", "0"], "4 greedy responses to a problem are all the same"),
        (["--evaluation.pass_at", "1,5"], "pass@5 needs as many samples"),
        (["--evaluation.majority_at", "8"], "majority@8 needs as many samples"),
        (["--data.eval", "off"], "'off' leaves nothing to evaluate on"),
        (["--data.eval", "auto"], "'auto' is the held-out part of data.train, which is off"),
        (["--data.train", "auto"], "'auto' is a value of data.eval"),
        (["--data.where", "{level: 1}"], "filters the rows of files"),
        (["--generation.min_tokens", "99"], "99 is above generation.max_tokens 16"),
        (["--reward.functions", "math,math"], "names a function twice"),
        (
            ["--generation.workers", "2", "--evaluation.prompts_per_part", "1"],
            "2 workers share the 1 problems of a part",
        ),
    ],
)
def test_contradictions_name_field_value_and_remedy(flags: list[str], expected: str):
    lines = evaluation_contradictions(configured(*flags))
    assert len(lines) == 1, lines
    assert expected in lines[0]
    field = lines[0].split(":")[0]
    assert field in {name for name, _ in all_fields(EvaluationRunConfig)}


def test_the_default_has_no_contradiction():
    assert evaluation_contradictions(configured()) == []


def test_the_sampling_run_has_the_same_engine_rewards_and_data():
    config = configured(
        *("--generation.temperature", "0", "--generation.samples_per_prompt", "1"),
        *("--generation.stop", "[</answer>]", "--data.template", "r1_zero"),
        *("--evaluation.seed", "5", "--reward.functions", "math"),
    )
    run = config.sampling_run()
    assert run.generation.stop == ("</answer>",)
    assert run.generation.max_tokens == config.generation.max_tokens
    assert (run.data.template, run.trainer.seed) == ("r1_zero", 5)
    assert run.reward == config.reward


@pytest.mark.parametrize("temperature", ["0.001", "-1", "nan"])
def test_a_temperature_that_no_engine_takes_is_refused(temperature: str):
    with pytest.raises(ConfigError, match=r"generation\.temperature"):
        configured("--generation.temperature", temperature)
