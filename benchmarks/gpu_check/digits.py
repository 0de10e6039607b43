"""The share of digits in a text: a reward that a model with random weights can learn."""


def digit_share(text: str) -> float:
    """Return the share of digits among the characters of a text; 0 for an empty one."""
    return sum(character.isdecimal() for character in text) / max(1, len(text))
