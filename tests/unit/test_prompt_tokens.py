"""Special tokens around prompts: BOS once at the beginning, where there is one; EOS never."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from rlsys.config import (
    ConfigError,
    DataConfig,
    GenerationConfig,
    ModelConfig,
    RunConfig,
)
from rlsys.data.problems import Problem
from rlsys.data.prompt_templates import PromptRenderer, beginning_tokens
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer
from rlsys.run.model_checks import ModelDirectories, check_model

BOS, EOS = "<|im_start|>", "<|im_end|>"
PROBLEM = Problem(problem_id="1", problem="2 + 3?", answer="5")


def tokenizer_that_adds(pattern: str) -> Any:
    """Return the tiny tokenizer with special tokens around texts: `<|im_start|> $A <|im_end|>`."""
    tokenizer: Any = load_tokenizer(resolve_model("tiny"))
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (BOS, EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=pattern, special_tokens=special
    )
    return tokenizer


def prompt_of(tokenizer: Any, tmp_path: Path, template: str) -> list[str]:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    tokens = PromptRenderer(str(file), tokenizer).encode(PROBLEM).token_ids
    return tokenizer.convert_ids_to_tokens(list(tokens))


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("$A", []),
        (f"{BOS} $A", [BOS]),
        (f"$A {EOS}", []),
        (f"{BOS} $A {EOS}", [BOS]),
        (f"{BOS} {BOS} $A {EOS}", [BOS, BOS]),
    ],
)
def test_a_prompt_begins_with_what_the_tokenizer_puts_before_texts_and_ends_with_its_text(
    tmp_path: Path, pattern: str, first: list[str]
):
    tokenizer = tokenizer_that_adds(pattern)
    plain = tokenizer.convert_ids_to_tokens(
        tokenizer("Solve 2 + 3? Answer:", add_special_tokens=False)["input_ids"]
    )
    assert prompt_of(tokenizer, tmp_path, "Solve {{ problem }} Answer:") == first + plain
    assert len(beginning_tokens(tokenizer)) == len(first)


def test_a_template_that_writes_bos_itself_gets_no_second_one(tmp_path: Path):
    tokenizer = tokenizer_that_adds(f"{BOS} $A {EOS}")
    tokens = prompt_of(tokenizer, tmp_path, BOS + "Solve {{ problem }}")
    assert tokens[0] == BOS
    assert tokens.count(BOS) == 1
    assert EOS not in tokens


def test_a_chat_template_writes_all_special_tokens_itself():
    tokenizer = tokenizer_that_adds(f"{BOS} $A {EOS}")
    prompt = PromptRenderer("chat_boxed", tokenizer).encode(PROBLEM)
    expected = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    assert list(prompt.token_ids) == expected


def without_end_token(tmp_path: Path) -> Path:
    directory = tmp_path / "endless"
    shutil.copytree(resolve_model("tiny"), directory)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = directory / name
        lines = file.read_text().splitlines()
        file.write_text("\n".join(line for line in lines if '"eos_token' not in line))
    return directory


def test_a_model_without_an_end_token_needs_a_stop_string(tmp_path: Path):
    directory = without_end_token(tmp_path)

    def config(template: str, *stop: str) -> RunConfig:
        return RunConfig(
            model=ModelConfig(path=str(directory)),
            data=DataConfig(template=template, max_prompt_tokens=100),
            generation=GenerationConfig(max_tokens=20, stop=stop),
        )

    file = tmp_path / "mine.jinja"
    file.write_text("{{ problem }}")
    with pytest.raises(ConfigError, match=r"^model\.path: .* names an end token.*stop"):
        check_model(config(str(file)), ModelDirectories.same(directory))
    check_model(config(str(file), "\n"), ModelDirectories.same(directory))
    check_model(
        config("few_shot"), ModelDirectories.same(directory)
    )  # it has stop strings of its own
    ends = replace(ModelDirectories.same(directory), policy=resolve_model("tiny"))
    check_model(config(str(file)), ends)
