"""Prompt templates: from a problem to the tokens of a prompt.

    plain        the problem as it is
    few_shot     three worked examples, for models that were not trained to box their answers
    chat_boxed   the model's own chat template around the problem and a boxed-answer instruction
    chat         the model's own chat template around the problem as it is
    r1_zero      <think> reasoning </think> <answer> answer </answer>; the prompt opens <think>
    a path       a Jinja file of the user's, with {{ problem }}

A template is a Jinja file, here in `templates/` or the user's own. Front matter between two lines
of --- declares what else belongs to it: `chat: true` wraps the prompt in the model's chat
template, and `stop: [...]` names the strings that end a response.

A problem that is a conversation keeps its turns where the prompt is wrapped in the chat template;
the template is applied to the last one. Elsewhere there is no place for turns, and conversations
are refused.

A prompt is tokenized here, once; its text is not tokenized again anywhere. It begins with the
tokens that the tokenizer puts before every text (BOS, where it has one), exactly once, also where
the template writes them itself. It never ends with those that the tokenizer puts behind (EOS),
since the response follows.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlsys.config import DataConfig
from rlsys.data.batches import Prompt
from rlsys.data.problems import ChatMessage, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIRECTORY = Path(__file__).parent / "templates"
TEMPLATE_NAMES = tuple(sorted(path.stem for path in _DIRECTORY.glob("*.jinja")))
FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The text of a template, and the declarations of its front matter."""

    source: str  # Jinja, with {{ problem }}
    chat: bool = False  # the model's chat template goes around it
    stop: tuple[str, ...] = ()  # strings that end a response, beside the end-of-sequence token


def load_template(template: str) -> PromptTemplate:
    """Return the template called `template`, or that of a file.

    Raises:
        ValueError: no such name or file, its front matter declares something else, or its text does
            not use `problem` or is not valid Jinja.
    """
    declared, source = _parts(template, _text(template))
    _check_source(template, source)
    return PromptTemplate(source=source, **declared)


def _text(template: str) -> str:
    path = Path(template).expanduser()
    if template in TEMPLATE_NAMES:
        return (_DIRECTORY / f"{template}.jinja").read_text()
    if path.is_file():
        return path.read_text()
    near = difflib.get_close_matches(template, TEMPLATE_NAMES, n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"data.template: {template!r} is neither one of {', '.join(TEMPLATE_NAMES)} nor an "
        f"existing Jinja file.{hint}"
    )


def _parts(template: str, text: str) -> tuple[dict[str, Any], str]:
    """Return the declarations of the front matter, between two lines of ---, and the rest."""
    front = FRONT_MATTER.match(text)
    if front is None:
        return {}, text
    try:
        declared = yaml.safe_load(front[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"data.template: the front matter of {template!r} is not valid YAML "
            f"({' '.join(str(error).split())}). Write `chat: true` or `stop: [...]`."
        ) from error

    if not isinstance(declared, dict) or not declared.keys() <= {"chat", "stop"}:
        raise ValueError(
            f"data.template: the front matter of {template!r} declares {declared!r}. It may hold "
            "chat (true or false) and stop (strings that end a response)."
        )
    chat = declared.get("chat", False)
    stop = declared.get("stop", [])
    if isinstance(stop, str):
        stop = [stop]

    if not isinstance(chat, bool):
        raise ValueError(f"data.template: chat of {template!r} is {chat!r}. Write true or false.")
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(
            f'data.template: stop of {template!r} is {stop!r}. Write strings, as in ["</answer>"].'
        )
    return {"chat": chat, "stop": tuple(stop)}, text[front.end() :]


def _check_source(template: str, source: str) -> None:
    try:
        text = _compiled(source).render(problem="PROBLEM")
    except jinja2.TemplateError as error:
        raise ValueError(
            f"data.template: {template!r} is not a valid Jinja template ({error}). Use "
            "{{ problem }} and nothing else."
        ) from error
    if "PROBLEM" not in text:
        raise ValueError(
            f"data.template: {template!r} never uses {{{{ problem }}}}. Put it where the problem's "
            "text belongs."
        )


def _compiled(source: str) -> jinja2.Template:
    # A template from elsewhere has no access to Python, as the chat templates of transformers.
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(source)


def stop_strings(template: str, configured: tuple[str, ...]) -> tuple[str, ...]:
    """Return the strings that end a response: `generation.stop`, else the template's own."""
    return configured or load_template(template).stop


def uses_chat_template(data: DataConfig) -> bool:
    """Return whether prompts are wrapped in the model's chat template."""
    return load_template(data.template).chat if data.chat is None else data.chat


def check_template_takes(problems: Sequence[Problem], data: DataConfig, field: str) -> None:
    """Refuse conversations where the prompt has no place for turns.

    Raises:
        ValueError: the message names the first of them.
    """
    conversations = [problem for problem in problems if problem.messages]
    if conversations and not uses_chat_template(data):
        raise ValueError(
            f"data.template: {data.template!r} without the model's chat template has no place for "
            f"chat messages, and {len(conversations)} of {len(problems)} problems of {field} are "
            f"conversations (the first is {conversations[0].problem_id!r}). Use chat, or "
            "chat_boxed for a boxed-answer instruction after the last message, or set data.chat "
            "to true."
        )


class PromptRenderer:
    """A converter of problems into prompts with one template and one tokenizer."""

    def __init__(
        self, template: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool | None = None
    ) -> None:
        """Create a renderer; `chat` None: as the template declares.

        With `chat`, prompts are wrapped in the model's chat template.

        Raises:
            ValueError: see `load_template`; a chat template that the tokenizer does not have.
        """
        loaded = load_template(template)
        self._template = _compiled(loaded.source)
        self._chat = loaded.chat if chat is None else chat
        self._tokenizer = tokenizer
        self._beginning = beginning_tokens(tokenizer)
        if self._chat and not tokenizer.chat_template:
            cause = f"data.template: {template!r}" if chat is None else "data.chat: true"
            raise ValueError(
                f"{cause} needs a chat template, and this model's tokenizer has none. Use "
                "few_shot, r1_zero or a Jinja file of your own, and leave data.chat at null."
            )

    @property
    def chat(self) -> bool:
        """Whether prompts are wrapped in the model's chat template."""
        return self._chat

    def encode(self, problem: Problem) -> Prompt:
        """Return the prompt of one problem, tokenized.

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
        """Apply the model's chat template to the turns so far and `last`, the rendered last one."""
        turns = _turns(problem, last)
        text = self._apply(turns, problem.problem_id, respond=True)
        roles = ", ".join(turn["role"] for turn in turns)

        # Some templates cut the reasoning out of the assistant's turns, as they should.
        for turn in turns:
            if turn["role"] != "assistant" and turn["content"].strip() not in text:
                raise ValueError(
                    f"data.template: the model's chat template leaves out the {turn['role']} "
                    f"message of problem {problem.problem_id!r} with the roles {roles}. Change or "
                    "drop such conversations, or use another model."
                )
        return text

    def completed(self, problem: Problem, prompt: str, response: str) -> str:
        """Return what the chat template writes after `prompt` when the assistant has responded.

        Raises:
            ValueError: the template refuses the turns, or writes another prompt before a response.
        """
        last = self._template.render(problem=problem.problem)
        turns = [*_turns(problem, last), {"role": "assistant", "content": response}]
        text = self._apply(turns, problem.problem_id, respond=False)
        if not text.startswith(prompt):
            raise ValueError(
                f"data.template: the model's chat template writes another prompt for "
                f"{problem.problem_id!r} when a response follows it, so that the response could "
                "not be learned as it is sampled. Use another model, or a template without chat."
            )
        return text[len(prompt) :]

    def conversation_text(
        self, messages: Sequence[ChatMessage], *, respond: bool, name: str = "a conversation"
    ) -> str:
        """Return a conversation as the chat template writes it.

        Args:
            respond: add what the template writes before a response.
            name: of the conversation, for messages.

        Raises:
            ValueError: the template refuses it.
        """
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        return self._apply(turns, name, respond=respond)

    def _apply(self, turns: list[dict[str, str]], name: str, *, respond: bool) -> str:
        if not self._tokenizer.chat_template:
            raise ValueError(
                "data.train: conversations need a chat template, and this model's tokenizer has "
                "none. Use a model with one, or columns of prompt and response."
            )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=respond
                )
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise ValueError(
                f"data.template: the model's chat template refuses problem "
                f"{name!r} with the roles {roles} ({error}). Change or drop such "
                "conversations, or use another model."
            ) from error

    def _tokens(self, text: str) -> tuple[int, ...]:
        """Tokenize a whole prompt; a chat template has written the special tokens itself."""
        tokens = _without_special_tokens(self._tokenizer, text)
        if self._chat or tokens[:1] == self._beginning[:1]:
            return tokens
        return self._beginning + tokens


def _turns(problem: Problem, last: str) -> list[dict[str, str]]:
    """Return the turns of a prompt, with `last` as the last one."""
    turns = [{"role": turn.role, "content": turn.content} for turn in problem.messages[:-1]]
    return [*turns, {"role": "user", "content": last}]


def beginning_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special tokens that a tokenizer puts before a text, without those behind it.

    Raises:
        ValueError: the tokenizer changes the text's own tokens when it adds special ones.
    """
    plain = _without_special_tokens(tokenizer, "a")
    whole = tuple(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]

    raise ValueError(
        f"data.template: the tokenizer {type(tokenizer).__name__} reads a text differently with "
        "its special tokens than without. Give the model directory a tokenizer that only puts "
        "special tokens around the text."
    )


def _without_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
