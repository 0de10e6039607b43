"""From a problem to the tokens of a prompt.

    few_shot     three worked examples, for models that were never told to box their answers
    chat_boxed   the model's own chat template around the problem and a boxed-answer instruction
    r1_zero      <think> reasoning </think> <answer> answer </answer>; the prompt opens the first tag
    a path       a Jinja file of the user's, with {{ problem }}

Tokens are made here, once. Nobody tokenizes a prompt's text again.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from rlsys.data.batches import Prompt
from rlsys.data.problems import Problem

TEMPLATE_NAMES = ("few_shot", "chat_boxed", "r1_zero")
# What ends a response under each template, beside the end-of-sequence token. A box that has closed says all there is to say.
STOP_STRINGS = {"few_shot": ("\n\n", "}\n"), "chat_boxed": (), "r1_zero": ("</answer>",)}
_DIRECTORY = Path(__file__).parent / "templates"


def template_source(template: str) -> str:
    """The Jinja text of a template name or file.

    Raises:
        ValueError: no such name or file, or the text does not use `problem` or is no Jinja.
    """
    path = Path(template).expanduser()
    if template in TEMPLATE_NAMES:
        source = (_DIRECTORY / f"{template}.jinja").read_text()
    elif path.is_file():
        source = path.read_text()
    else:
        near = difflib.get_close_matches(template, TEMPLATE_NAMES, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"data.template: {template!r} is neither one of {', '.join(TEMPLATE_NAMES)} nor an existing Jinja file.{hint}"
        )
    try:
        text = (
            jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
            .from_string(source)
            .render(problem="PROBLEM")
        )
    except jinja2.TemplateError as error:
        raise ValueError(
            f"data.template: {template!r} is no usable Jinja template ({error}). Use {{{{ problem }}}} and nothing else."
        ) from error
    if "PROBLEM" not in text:
        raise ValueError(
            f"data.template: {template!r} never uses {{{{ problem }}}}. Put it where the problem's text belongs."
        )
    return source


def stop_strings(template: str, configured: tuple[str, ...]) -> tuple[str, ...]:
    """What ends a response: the user's `generation.stop`, else the template's own."""
    return configured or STOP_STRINGS.get(template, ())


class PromptRenderer:
    """Turns problems into prompts with one template and one tokenizer."""

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        )
        self._template = environment.from_string(template_source(template))
        self._chat = template == "chat_boxed"
        self._tokenizer = tokenizer
        if self._chat and not tokenizer.chat_template:
            raise ValueError(
                "data.template: 'chat_boxed' needs a chat template, and this model's tokenizer has none. Use few_shot, r1_zero, or a "
                "Jinja file of your own."
            )

    def encode(self, problem: Problem) -> Prompt:
        """The prompt of one problem, tokenized."""
        text = self._template.render(problem=problem.problem)
        if self._chat:
            messages = [{"role": "user", "content": text}]
            text = str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
            token_ids = self._tokenizer(text, add_special_tokens=False)[
                "input_ids"
            ]  # the chat template wrote the special tokens
        else:
            token_ids = self._tokenizer(text)["input_ids"]
        return Prompt(
            problem_id=problem.problem_id,
            token_ids=tuple(token_ids),
            text=text,
            problem=problem.problem,
            ground_truth=problem.answer,
        )
