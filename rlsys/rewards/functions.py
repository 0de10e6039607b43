"""The reward functions of rlsys.

A reward function takes one `RewardInput`, or `(completion, ground_truth)` with an optional third
argument `completion_tokens`, the number of tokens that the policy sampled. Its keyword-only
parameters are set in the config (`reward.functions`). A parameter `max_tokens` is the token limit
of the run: null or left out, it follows `generation.max_tokens`.
"""

from __future__ import annotations

from typing import Literal

from rlsys.math_verifier import has_one_filled_box, reads_ground_truth, verify_math
from rlsys.rewards.records import RewardResult
from rlsys.rewards.registry import register_reward_function


def _warm_up_math() -> None:
    """Import the modules that the first expression needs."""
    verify_math("\\boxed{x^2 + 1}", "1 + x^2")


@register_reward_function("math", reads_ground_truth=reads_ground_truth, warm_up=_warm_up_math)
def math_reward(
    completion: str,
    ground_truth: str,
    *,
    extraction: Literal["boxed", "boxes", "answer_tag", "after_hashes", "lenient"] = "boxed",
    decimal_comma: bool | None = None,
    matrix_products: bool | None = None,
) -> RewardResult:
    """Return 1 if the completion's answer equals the ground truth, else 0. See `verify_math`.

    `decimal_comma` true reads 2,74 as 2.74 too; null does so where `extraction` is lenient.
    `matrix_products` true accepts an uncomputed product of matrices; null as above.
    """
    verdict = verify_math(
        completion,
        ground_truth,
        extraction=extraction,
        decimal_comma=decimal_comma,
        matrix_products=matrix_products,
    )
    return RewardResult(verdict.score, reason=verdict.reason, answer=verdict.answer)


@register_reward_function("format_boxed")
def format_boxed_reward(completion: str, ground_truth: str) -> float:
    r"""Return 1 if the completion has exactly one \boxed{...} or \fbox{...}, else 0.

    The box must be closed and not empty. Its answer may be wrong.
    """
    return float(has_one_filled_box(completion))


@register_reward_function("format_r1_zero")
def format_r1_zero_reward(completion: str, ground_truth: str) -> float:
    """Return 1 if the completion reads `reasoning </think> <answer> ... </answer>`, else 0.

    Each tag occurs exactly once. The opening <think> belongs to the prompt (template `r1_zero`).
    Only white space may stand between the elements and after the last.
    """
    tags = ("</think>", "<answer>", "</answer>")
    if any(completion.count(tag) != 1 for tag in tags) or "<think>" in completion:
        return 0.0

    _, _, rest = completion.partition("</think>")
    rest = rest.strip()
    return float(rest.startswith("<answer>") and rest.endswith("</answer>"))


def _buffer_of_soft_overlong(*, max_tokens: int | None, buffer_tokens: int | None) -> int:
    """Return the length of the buffer, or refuse parameters that contradict each other."""
    if max_tokens is None:
        raise ValueError(
            "reward.functions.parameters.max_tokens: null follows generation.max_tokens in a run "
            "only. Give the token limit."
        )
    buffer = max(1, max_tokens // 4) if buffer_tokens is None else buffer_tokens
    if not 0 < buffer < max_tokens:
        raise ValueError(
            f"reward.functions.parameters.buffer_tokens: {buffer} must be at least 1 and below "
            f"max_tokens ({max_tokens})."
        )
    return buffer


def _validate_soft_overlong(*, max_tokens: int | None, buffer_tokens: int | None) -> None:
    _buffer_of_soft_overlong(max_tokens=max_tokens, buffer_tokens=buffer_tokens)


@register_reward_function("soft_overlong", validate=_validate_soft_overlong)
def soft_overlong_reward(
    completion: str,
    ground_truth: str,
    completion_tokens: int,
    *,
    max_tokens: int | None = None,
    buffer_tokens: int | None = None,
) -> float:
    """Return the soft overlong punishment of DAPO, which penalizes long responses.

        0                                                 n <= max_tokens - buffer_tokens
        (max_tokens - buffer_tokens - n) / buffer_tokens  up to max_tokens
        -1                                                beyond

    **Source**: DAPO (arXiv:2503.14476), equation 13; there max_tokens is 20480 and buffer_tokens
    4096.

    **Conventions**: n counts sampled tokens, the end-of-sequence token included. In a run
    `max_tokens` null follows `generation.max_tokens`: a response cut off there gets -1.
    `buffer_tokens` null is a quarter of `max_tokens`. The paper adds it to rewards of +1 and -1:
    beside rewards of 1 and 0, which are half as far apart, its weight is 0.5.

    Example: with max_tokens 100 and buffer_tokens 20, 80 tokens give 0, 90 give -0.5, 100 give -1.
    """
    buffer = _buffer_of_soft_overlong(max_tokens=max_tokens, buffer_tokens=buffer_tokens)
    assert max_tokens is not None, "checked above"
    over = completion_tokens - (max_tokens - buffer)
    return -min(max(over / buffer, 0.0), 1.0)


def _validate_repetition(*, ngram: int, **_: object) -> None:
    if ngram < 1:
        raise ValueError(f"reward.functions.parameters.ngram: {ngram} must be at least 1.")


@register_reward_function("repetition", validate=_validate_repetition)
def repetition_reward(
    completion: str, ground_truth: str, *, ngram: int = 4, scale: float = 1.0
) -> float:
    """Return minus `scale` times the fraction of repeated word n-grams.

        -scale * (1 - distinct n-grams / n-grams)

    It is 0 where none occurs twice, and approaches -scale for a loop.

    **Source**: Demystifying Long Chain-of-Thought Reasoning (arXiv:2502.03373), the n-gram
    repetition penalty, averaged over the response.

    **Conventions**: words are separated by white space; a completion of fewer than `ngram` words
    gets 0. Ordinary prose repeats some n-grams, and algebra more: look at
    `reward/component/repetition` of the untrained model before choosing the weight.

    Example: "a b a b a b" with ngram 2 has five bigrams, two of them distinct: -0.6.
    """
    _validate_repetition(ngram=ngram)
    words = completion.split()
    total = len(words) - ngram + 1
    if total < 1:
        return 0.0
    distinct = len(set(zip(*(words[i:] for i in range(ngram)), strict=False)))
    return -scale * (1 - distinct / total)
