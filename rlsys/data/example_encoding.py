"""From examples to tokens, and the mask of the tokens that are learned.

    prompt and response      the prompt as `PromptRenderer` renders it, the response, an end token
    conversation             the model's chat template; the turns of the assistant are learned
    response in steps        as a response, with each step's label at its last token
    plain text               windows of tokens; all but the first token of a text are learned

A response is tokenized apart from its prompt, as an engine samples it. After a prompt that does not
end with white space, a response gets a space in front of it, unless it has white space of its own
or the chat template ends the prompt.

    <|user|> 2 + 2? <|end|> <|assistant|> 4 <|end|> <|user|> ... <|assistant|> 5 <|end|>
    ------------- prompt ---------------- learned   - not learned -            learned
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlsys.data.examples import Demonstration, PlainText, Ranking, StepLabels
from rlsys.data.problems import ChatMessage, Problem
from rlsys.data.prompt_templates import PromptRenderer, beginning_tokens
from rlsys.data.response_text import text_after_each_token
from rlsys.data.sequences import TokenSequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_STEP = -1  # the label of a token at which no step ends


@dataclass(frozen=True, kw_only=True)
class EncodedResponse:
    """The tokens after a prompt, and which of them are learned."""

    token_ids: NDArray[np.int32]  # [L]
    learned: NDArray[np.bool_]  # [L]
    # [L] int8 at the last token of a step 1 (right) or 0 (wrong), elsewhere NO_STEP; None: the
    # response is not in steps
    step_labels: NDArray[np.int8] | None = None


@dataclass(frozen=True, kw_only=True)
class EncodedExample:
    """A prompt with K responses and their ranks (0: best); a demonstration has one response."""

    prompt: tuple[int, ...]
    responses: tuple[EncodedResponse, ...]
    ranks: tuple[int, ...]

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response."""
        return max(len(response.token_ids) for response in self.responses)


class ExampleEncoder:
    """A converter of examples into tokens, with one template and one tokenizer."""

    def __init__(
        self,
        template: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool | None,
        end_tokens: Collection[int],
    ) -> None:
        """Create an encoder.

        Args:
            chat: as `PromptRenderer` takes it.
            end_tokens: any of them ends a response.

        Raises:
            ValueError: see `PromptRenderer`; there is no end token.
        """
        if not end_tokens:
            raise ValueError(
                "model.path: the tokenizer names no end token, so a model could not learn to end "
                "its responses. Put eos_token_id into its generation_config.json."
            )
        self._renderer = PromptRenderer(template, tokenizer, chat=chat)
        self._tokenizer = tokenizer
        self._end_tokens = frozenset(end_tokens)
        own = tokenizer.eos_token_id
        self._end = own if isinstance(own, int) else min(end_tokens)

    def demonstration(self, example: Demonstration) -> EncodedExample:
        """Return the tokens of a demonstration.

        Raises:
            ValueError: the chat template refuses the conversation, or changes its earlier turns.
        """
        if example.messages:
            prompt, response = self._conversation(example.messages, example.example_id)
            return EncodedExample(prompt=prompt, responses=(response,), ranks=(0,))
        return self._answered(example, (example.response,), (0,))

    def ranking(self, example: Ranking) -> EncodedExample:
        """Return the tokens of a prompt with its responses.

        Raises:
            ValueError: as `demonstration`.
        """
        return self._answered(example, example.responses, example.ranks)

    def steps(self, example: StepLabels, separator: str) -> EncodedExample:
        """Return the tokens of a response in steps, with a label at the end of each step.

        The response is the steps with `separator` between them. A step ends at the token with its
        last character that is not white space, as `rlsys.rewards.split_steps` places it. Steps
        that end in one token have one label: wrong if one of them is.

        Raises:
            ValueError: as `demonstration`; the tokens do not decode to the steps.
        """
        response = separator.join(example.steps)
        encoded = self._answered(example, (response,), (0,))
        (tokens,) = encoded.responses
        text, lengths = text_after_each_token(
            self._tokenizer, encoded.prompt, tokens.token_ids.tolist()
        )
        start = text.find(response)
        if start < 0:
            raise ValueError(
                f"data.train: the tokens of example {example.example_id!r} do not decode to its "
                "steps, so their ends have no token. Remove characters that the model's tokenizer "
                "does not keep, or drop the example."
            )

        labels = np.full(len(tokens.token_ids), NO_STEP, dtype=np.int8)
        for step, label in zip(example.steps, example.labels, strict=True):
            token = bisect_left(lengths, start + len(step.rstrip()))
            labels[token] = label if labels[token] == NO_STEP else min(labels[token], label)
            start += len(step) + len(separator)
        return replace(encoded, responses=(replace(tokens, step_labels=labels),))

    def text(self, example: PlainText, window: int) -> list[EncodedExample]:
        """Return windows of at most `window` learned tokens; together they learn each token once.

        A window begins with one token that is not learned: the first of the text, or the last of
        the window before.
        """
        tokens = [*beginning_tokens(self._tokenizer), *self._tokens(example.text), self._end]
        ids = np.asarray(tokens, dtype=np.int32)
        windows = []
        for start in range(0, len(ids) - 1, window):
            part = ids[start + 1 : start + 1 + window]
            response = EncodedResponse(token_ids=part, learned=np.ones(len(part), dtype=np.bool_))
            windows.append(
                EncodedExample(prompt=(int(ids[start]),), responses=(response,), ranks=(0,))
            )
        return windows

    def _answered(
        self,
        example: Demonstration | Ranking | StepLabels,
        responses: Sequence[str],
        ranks: tuple[int, ...],
    ) -> EncodedExample:
        problem = Problem(
            problem_id=example.example_id,
            problem=example.prompt,
            answer="",
            messages=example.context,
        )
        prompt = self._renderer.encode(problem)
        encoded = tuple(self._response(prompt.text, problem, response) for response in responses)
        return EncodedExample(prompt=prompt.token_ids, responses=encoded, ranks=ranks)

    def _response(self, prompt: str, problem: Problem, response: str) -> EncodedResponse:
        if self._renderer.chat:
            return self._span(self._renderer.completed(problem, prompt, response))
        separator = ""
        if not prompt[-1:].isspace() and not response[:1].isspace():
            separator = " "
        tokens = [*self._tokens(separator + response), self._end]
        return EncodedResponse(
            token_ids=np.asarray(tokens, dtype=np.int32),
            learned=np.ones(len(tokens), dtype=np.bool_),
        )

    def _span(self, text: str) -> EncodedResponse:
        """Return a turn of the assistant as the chat template writes it, learned up to its end."""
        tokens = np.asarray(self._tokens(text), dtype=np.int32)
        ends = np.flatnonzero(np.isin(tokens, list(self._end_tokens)))
        last = int(ends[0]) if len(ends) else len(tokens) - 1
        return EncodedResponse(token_ids=tokens, learned=np.arange(len(tokens)) <= last)

    def _conversation(
        self, messages: Sequence[ChatMessage], example_id: str
    ) -> tuple[tuple[int, ...], EncodedResponse]:
        """Return the tokens before the first turn of the assistant, and all after them."""
        prompt: tuple[int, ...] = ()
        tokens: list[NDArray[np.int32]] = []
        learned: list[NDArray[np.bool_]] = []
        done = ""
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._renderer.conversation_text(messages[:number], respond=True)
            after = self._renderer.conversation_text(messages[: number + 1], respond=False)
            if not before.startswith(done) or not after.startswith(before):
                raise ValueError(
                    f"data.train: the model's chat template changes earlier turns of conversation "
                    f"{example_id!r} where later ones follow, so they cannot be learned in one "
                    "sequence. Split such conversations, one for each turn of the assistant."
                )
            between = self._tokens(before[len(done) :])
            span = self._span(after[len(before) :])
            if done:
                tokens.append(np.asarray(between, dtype=np.int32))
                learned.append(np.zeros(len(between), dtype=np.bool_))
            else:
                prompt = between
            tokens.append(span.token_ids)
            learned.append(span.learned)
            done = after
        response = EncodedResponse(
            token_ids=np.concatenate(tokens), learned=np.concatenate(learned)
        )
        return prompt, response

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def sequences_of(examples: Sequence[EncodedExample], group_ids: Sequence[int]) -> TokenSequences:
    """Return the responses of examples after their prompts; those of one example are a group."""
    rows = [
        (example.prompt, response, group)
        for example, group in zip(examples, group_ids, strict=True)
        for response in example.responses
    ]
    sequences = TokenSequences.of(
        [prompt for prompt, _, _ in rows],
        [response.token_ids for _, response, _ in rows],
        group_ids=[group for _, _, group in rows],
    )
    learned = np.concatenate([response.learned for _, response, _ in rows])
    mask = sequences.loss_mask.copy()
    mask[mask] = learned
    return TokenSequences(
        token_ids=sequences.token_ids,
        offsets=sequences.offsets,
        prompt_lengths=sequences.prompt_lengths,
        loss_mask=mask,
        group_ids=sequences.group_ids,
    )


def step_labels_of(examples: Sequence[EncodedExample]) -> NDArray[np.int8] | None:
    """Return [N] the labels of the tokens of `sequences_of`; None: no response is in steps."""
    rows = [(example.prompt, response) for example in examples for response in example.responses]
    parts: list[NDArray[np.int8]] = []
    for prompt, response in rows:
        if response.step_labels is None:
            return None
        parts += [np.full(len(prompt), NO_STEP, dtype=np.int8), response.step_labels]
    return np.concatenate(parts)
