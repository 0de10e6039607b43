"""Reward functions that fail, one for each way to fail, and some that work."""

# pyright: reportArgumentType=false

import ctypes
import functools
import os
import signal
import sys
import time
from typing import Any

from rlsys.rewards import register_reward_function


@register_reward_function("raises")
def raises(completion: str, ground_truth: str) -> float:
    return _divide(1.0, 0.0)


def _divide(a: float, b: float) -> float:
    return a / b


@register_reward_function("gives_nan")
def gives_nan(completion: str, ground_truth: str) -> float:
    return float("nan")


@register_reward_function("gives_none")
def gives_none(completion: str, ground_truth: str):
    print(f"scored a completion of {len(completion)} characters")


@register_reward_function("gives_list")
def gives_list(completion: str, ground_truth: str):
    return [1.0]


@register_reward_function("gives_text")
def gives_text(completion: str, ground_truth: str):
    return "1.0"


@register_reward_function("gives_huge")
def gives_huge(completion: str, ground_truth: str) -> float:
    return -1e39


@register_reward_function("hangs")
def hangs(completion: str, ground_truth: str) -> float:
    time.sleep(3600)
    return 1.0


@register_reward_function("imports_late")
def imports_late(completion: str, ground_truth: str) -> float:
    """Take long for the first answer in a process, as a function that imports a large module."""
    if not _imported:
        time.sleep(0.3)
    _imported.append(True)
    return 1.0


_imported: list[bool] = []


@register_reward_function("calls_sys_exit")
def calls_sys_exit(completion: str, ground_truth: str) -> float:
    sys.exit("no more")


@register_reward_function("calls_os_exit")
def calls_os_exit(completion: str, ground_truth: str) -> float:
    print("last words")
    os._exit(7)


@register_reward_function("segfaults")
def segfaults(completion: str, ground_truth: str) -> float:
    ctypes.string_at(0)
    return 1.0


@register_reward_function("is_killed_once")
def is_killed_once(completion: str, ground_truth: str) -> float:
    """Have the process killed, unless the file that the completion names exists by now."""
    if os.path.exists(completion):
        return 1.0
    with open(completion, "w"):
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


@register_reward_function("returns_coroutine")
def returns_coroutine(completion: str, ground_truth: str):
    return is_async(completion, ground_truth)


@register_reward_function("is_async")
async def is_async(completion: str, ground_truth: str) -> float:
    return 1.0


@register_reward_function("is_generator")
def is_generator(completion: str, ground_truth: str):
    yield 1.0


@register_reward_function("takes_one")
def takes_one(completion: str) -> float:
    return 1.0


@register_reward_function("takes_swapped")
def takes_swapped(ground_truth: str, completion: str) -> float:
    return 1.0


@register_reward_function("takes_batch")
def takes_batch(completions: list[str], ground_truth: list[str], **others: Any) -> list[float]:
    return [1.0 for _ in completions]


@register_reward_function("takes_tokens_by_keyword")
def takes_tokens_by_keyword(completion: str, ground_truth: str, *, completion_tokens: int) -> float:
    return 1.0


def _check_length(*, shortest: int, longest: int) -> None:
    if shortest >= longest:
        raise ValueError(f"shortest {shortest} is not below longest.")


@register_reward_function("has_length", validate=_check_length)
def has_length(
    completion: str, ground_truth: str, *, shortest: int = 1, longest: int = 1000
) -> float:
    return float(shortest <= len(completion) <= longest)


class CountsLetter:
    """A reward that is an object."""

    def __init__(self, letter: str) -> None:
        self.letter = letter

    def __call__(self, completion: str, ground_truth: str, *, scale: float = 1.0) -> float:
        return scale * completion.count(self.letter)


register_reward_function("counts_a")(CountsLetter("a"))
register_reward_function("is_short")(functools.partial(has_length, longest=5))


@register_reward_function("sometimes")
def sometimes(completion: str, ground_truth: str) -> float:
    """Fail on texts whose characters add up to a multiple of five: on a fifth of them."""
    if sum(map(ord, completion)) % 5 == 0:
        raise KeyError("unlucky")
    return 1.0
