"""From a problem to the tokens of a prompt.

    few_shot     three worked examples, for models that were never told to box their answers
    chat_boxed   the model's own chat template around the problem and a boxed-answer instruction
    chat         the model's own chat template around the problem as it is
    r1_zero      <think> reasoning </think> <answer> answer </answer>; the prompt opens the first tag
    a path       a Jinja file of the user's, with {{ problem }}

A problem that is a conversation keeps its turns under chat and chat_boxed, which adds its instruction
to the last one; the other templates have no place for turns and refuse it.

Tokens are made here, once. Nobody tokenizes a prompt's text again. A prompt begins with what the tokenizer puts before every text (BOS, where it has
one), once, also where the template writes it; it never ends with what the tokenizer puts behind (EOS), since the response is to follow.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from rlsys.data.batches import Prompt
from rlsys.data.problems import Problem

TEMPLATE_NAMES = ("few_shot", "chat_boxed", "chat", "r1_zero")
CHAT_TEMPLATES = ("chat_boxed", "chat")
# What ends a response under each template, beside the end-of-sequence token. A box that has closed says all there is to say.
STOP_STRINGS = {
    "few_shot": ("\n\n", "}\n"),
    "chat_boxed": (),
    "chat": (),
    "r1_zero": ("</answer>",),
}
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


def check_template_takes(problems: Sequence[Problem], template: str, field: str) -> None:
    """Refuse conversations under a template that has no place for turns.

    Raises:
        ValueError: naming the first of them.
    """
    conversations = [problem for problem in problems if problem.messages]
    if conversations and template not in CHAT_TEMPLATES:
        raise ValueError(
            f"data.template: {template!r} cannot word chat messages, and {len(conversations)} of "
            f"{len(problems)} problems of {field} are (the first is {conversations[0].problem_id!r}). "
            "Use chat, or chat_boxed for a boxed-answer instruction after the last message."
        )


class PromptRenderer:
    """Turns problems into prompts with one template and one tokenizer."""

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        )
        self._template = environment.from_string(template_source(template))
        self._chat = template in CHAT_TEMPLATES
        self._tokenizer = tokenizer
        self._beginning = beginning_tokens(tokenizer)
        if self._chat and not tokenizer.chat_template:
            raise ValueError(
                f"data.template: {template!r} needs a chat template, and this model's tokenizer has none. Use few_shot, r1_zero, or a "
                "Jinja file of your own."
            )

    def encode(self, problem: Problem) -> Prompt:
        """The prompt of one problem, tokenized.

        Raises:
            ValueError: the model's chat template refuses the conversation.
        """
        text = self._template.render(problem=problem.problem)
        if self._chat:
            text = self._conversation(problem, text)
        return Prompt(
            problem_id=problem.problem_id,
            token_ids=self._tokens(text),
            text=text,
            problem=problem.problem,
            ground_truth=problem.answer,
            metadata=problem.metadata,
        )

    def _conversation(self, problem: Problem, last: str) -> str:
        """The model's chat template around the turns so far and `last`, the worded last one."""
        turns = [{"role": turn.role, "content": turn.content} for turn in problem.messages[:-1]]
        turns.append({"role": "user", "content": last})
        roles = ", ".join(turn["role"] for turn in turns)
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"data.template: the model's chat template refuses problem "
                f"{problem.problem_id!r} with the roles {roles} ({error}). Change or drop such "
                "conversations, or use another model."
            ) from error

        for turn in turns:  # of the assistant's some templates cut the reasoning, as they should
            if turn["role"] != "assistant" and turn["content"].strip() not in text:
                raise ValueError(
                    f"data.template: the model's chat template leaves out the {turn['role']} "
                    f"message of problem {problem.problem_id!r} with the roles {roles}. Change or "
                    "drop such conversations, or use another model."
                )
        return text

    def _tokens(self, text: str) -> tuple[int, ...]:
        """Tokens of a whole prompt; a chat template has written the special tokens itself."""
        tokens = _without_special_tokens(self._tokenizer, text)
        if self._chat or tokens[:1] == self._beginning[:1]:
            return tokens
        return self._beginning + tokens


def beginning_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Special tokens that a tokenizer puts before a text; those that it puts behind are left out."""
    plain = _without_special_tokens(tokenizer, "a")
    whole = tuple(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise ValueError(
        f"data.template: the tokenizer {type(tokenizer).__name__} reads a text differently with its special tokens than without. Give the model "
        "directory a tokenizer that only puts special tokens around the text."
    )


def _without_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
