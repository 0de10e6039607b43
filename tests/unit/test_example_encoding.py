"""From examples to tokens: what is learned, and what is not."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from rlsys.data.example_encoding import EncodedExample, ExampleEncoder, sequences_of
from rlsys.data.examples import Demonstration, PlainText, Ranking
from rlsys.data.problems import ChatMessage
from rlsys.models import resolve_model
from rlsys.models.loading import end_token_ids, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer, which has a chat template."""
    return load_tokenizer(resolve_model("tiny"))


def encoder(tokenizer: PreTrainedTokenizerBase, template: str = "plain") -> ExampleEncoder:
    ends = end_token_ids(resolve_model("tiny"), tokenizer)
    return ExampleEncoder(template, tokenizer, chat=None, end_tokens=ends)


def learned_text(tokenizer: PreTrainedTokenizerBase, example: EncodedExample) -> str:
    """Return the text of the learned tokens of the first response."""
    response = example.responses[0]
    return str(tokenizer.decode(response.token_ids[response.learned]))


def whole_text(tokenizer: PreTrainedTokenizerBase, example: EncodedExample) -> str:
    return str(tokenizer.decode([*example.prompt, *example.responses[0].token_ids]))


def end(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.eos_token)


def turns(*contents: str) -> tuple[ChatMessage, ...]:
    """Return a conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return tuple(
        ChatMessage(role=roles[i % 2], content=content) for i, content in enumerate(contents)
    )


def test_a_response_and_its_end_token_are_learned(tokenizer: PreTrainedTokenizerBase):
    example = encoder(tokenizer).demonstration(
        Demonstration(example_id="0", prompt="2 + 2 = ?", response="It is 4.")
    )
    assert whole_text(tokenizer, example).endswith(f"2 + 2 = ? It is 4.{end(tokenizer)}")
    assert learned_text(tokenizer, example).strip() == f"It is 4.{end(tokenizer)}"
    assert example.responses[0].learned.all()


def test_the_prompt_is_the_one_that_is_sampled_from(tokenizer: PreTrainedTokenizerBase):
    """The tokens of the prompt are those of `PromptRenderer`, whatever follows."""
    from rlsys.data.problems import Problem
    from rlsys.data.prompt_templates import PromptRenderer

    for template in ("plain", "few_shot", "chat_boxed"):
        example = encoder(tokenizer, template).demonstration(
            Demonstration(example_id="0", prompt="2 + 2 = ?", response="4")
        )
        problem = Problem(problem_id="0", problem="2 + 2 = ?", answer="")
        assert example.prompt == PromptRenderer(template, tokenizer).encode(problem).token_ids


@pytest.mark.parametrize(
    ("prompt", "response", "between"),
    [("a:", "b", " b"), ("a: ", "b", "b"), ("a:", "\nb", "\nb"), ("a:\n", "b", "b")],
)
def test_one_space_comes_between_unless_there_is_white_space(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, between: str
):
    example = encoder(tokenizer).demonstration(
        Demonstration(example_id="0", prompt=prompt, response=response)
    )
    text = str(tokenizer.decode(example.responses[0].token_ids[:-1]))
    assert text == between


def test_in_a_conversation_only_the_turns_of_the_assistant_are_learned(
    tokenizer: PreTrainedTokenizerBase,
):
    messages = turns("one plus one?", "It is two.", "and three?", "That is five.")
    example = encoder(tokenizer).demonstration(Demonstration(example_id="0", messages=messages))

    # The whole text is that of the chat template.
    rendered = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in messages], tokenize=False
    )
    assert whole_text(tokenizer, example) == rendered

    spans = learned_text(tokenizer, example).split(end(tokenizer))
    assert [span.strip() for span in spans] == ["It is two.", "That is five.", ""]
    # The user's second turn is in the sequence, and not learned.
    response = example.responses[0]
    assert "and three?" in str(tokenizer.decode(response.token_ids[~response.learned]))


def test_the_first_turn_is_learned_as_it_is_sampled(tokenizer: PreTrainedTokenizerBase):
    """A conversation of one exchange gives the tokens of the template chat."""
    conversation = encoder(tokenizer).demonstration(
        Demonstration(example_id="0", messages=turns("two?", "2"))
    )
    answered = encoder(tokenizer, "chat").demonstration(
        Demonstration(example_id="0", prompt="two?", response="2")
    )
    assert conversation.prompt == answered.prompt
    for ours, theirs in zip(conversation.responses, answered.responses, strict=True):
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(ours.learned, theirs.learned)


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerBase):
    original = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}{% if loop.last %}!{% endif %}]{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant!]{% endif %}"
    )
    try:
        with pytest.raises(ValueError, match="changes earlier turns of conversation 'c7'"):
            encoder(tokenizer).demonstration(
                Demonstration(example_id="c7", messages=turns("a", "b", "c", "d"))
            )
    finally:
        tokenizer.chat_template = original


def test_windows_of_a_text_learn_each_token_once(tokenizer: PreTrainedTokenizerBase):
    text = "the quick brown fox jumps over the lazy dog " * 3
    (whole,) = encoder(tokenizer).text(PlainText(example_id="0", text=text), 10_000)
    windows = encoder(tokenizer).text(PlainText(example_id="0", text=text), 7)
    assert len(windows) > 2
    assert all(len(window.prompt) == 1 for window in windows)
    assert max(window.longest_response for window in windows) == 7
    joined = np.concatenate([window.responses[0].token_ids for window in windows])
    np.testing.assert_array_equal(joined, whole.responses[0].token_ids)
    # The context of a window is the last token of the one before.
    before = windows[0].responses[0].token_ids[-1]
    assert windows[1].prompt == (before,)


def test_the_responses_of_a_ranking_are_one_group(tokenizer: PreTrainedTokenizerBase):
    responses = ("4", "5", "six")
    ranking = Ranking(example_id="0", prompt="2 + 2 =", responses=responses, ranks=(0, 2, 1))
    text = Demonstration(example_id="1", prompt="Hello", response="World")
    coder = encoder(tokenizer)
    sequences = sequences_of([coder.ranking(ranking), coder.demonstration(text)], [7, 8])
    assert sequences.group_ids.tolist() == [7, 7, 7, 8]
    prompts = {
        tuple(sequences.token_ids[start : start + length])
        for start, length in zip(sequences.offsets[:3], sequences.prompt_lengths[:3], strict=True)
    }
    assert len(prompts) == 1
    assert sequences.num_loss_tokens == int((sequences.lengths - sequences.prompt_lengths).sum())
