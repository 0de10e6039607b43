"""Secrets: which values are some, texts without them, and configurations that hold one.

A configuration is written to config.yaml and shown in the report, and its flags are visible to
every user of the machine. So it names the variable or the file that holds a secret, never the
secret itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rlsys.config.errors import Mistakes
from rlsys.config.root import RootConfig

HIDDEN = "***"
SHORTEST = 8  # characters of an environment variable that is hidden in every text

_KEYS = r"(?:api|access|account|private|secret|signing)_?key"
_TOKENS = r"(?:access|api|auth|bearer|hf|hub|refresh|secret|session)_?token"
_WORDS = rf"(?:{_KEYS}|{_TOKENS}|secret|password|passwd|passphrase|credentials?)"

# In environment variables every TOKEN is a secret: HF_TOKEN, GITHUB_TOKEN.
VARIABLE = re.compile(rf"(?:{_WORDS}|token|(?:^|_)pat)(?:_id)?$", re.IGNORECASE)
# A parameter may be the text of a token of the model, such as `step_token`.
PARAMETER = re.compile(rf"(?:^|_){_WORDS}$", re.IGNORECASE)

# The first group stays, the rest is hidden. Each begins with a fixed text, so that a long response
# is searched in linear time.
_PATTERNS = (
    re.compile(r"(://)[^\s/@:'\"<>]*:[^\s/@'\"<>]+(?=@)"),  # user:password@ in a URL
    re.compile(
        rf"([?&](?:[\w.-]{{0,40}}(?:{_WORDS}|token|signature)|sig|key)=)[^&\s'\"<>]+",
        re.IGNORECASE,
    ),
    re.compile(r"(\bBearer )[\w.~+/-]{8,}=*"),
    # Tokens of the Hugging Face Hub, GitHub, AWS, and of hosted models.
    re.compile(r"()\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b"),
    re.compile(r"()\bsk-[A-Za-z0-9_-]{20,}"),
    # api_key='...', "password": "...", in the text of an error.
    re.compile(
        rf"((?<![A-Za-z0-9]){_WORDS}['\"]?\s?[:=]\s?['\"]?)[^\s'\",;)\]}}<>]{{{SHORTEST},}}",
        re.IGNORECASE,
    ),
)


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Return the values of variables whose names say that they are secret, the longest first."""
    found = set()
    for name, value in environment.items():
        is_secret = len(value) >= SHORTEST and VARIABLE.search(name)
        if is_secret and not _is_file(value):
            found |= {value, quote(value, safe="")}
    return sorted(found, key=len, reverse=True)


def _is_file(value: str) -> bool:
    """Return whether a value is the path of an existing file, as GOOGLE_APPLICATION_CREDENTIALS."""
    try:
        return Path(value).exists()
    except (OSError, ValueError):
        return False


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return a text without secrets, with `***` in their places.

    Secrets are the values of the environment's secret variables, credentials in URLs, and what has
    the form of a known kind of token or follows a name such as `api_key=`.

    Args:
        environment: the variables. None: those of this process.
    """
    for value in secret_values(os.environ if environment is None else environment):
        text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text


def refuse_secrets(config: RootConfig) -> None:
    """Refuse a configuration that holds a secret.

    Raises:
        ConfigError: the fields, without their values.
    """
    mistakes = Mistakes()
    for name, value in _texts(config.model_dump(mode="json")):
        key = name.rpartition(".")[2]
        if value and (PARAMETER.search(key) or redacted(value) != value):
            mistakes.lines.append(
                f"{name}: its value (not shown here) is a secret, and config.yaml and the report "
                "would hold it. Put it into an environment variable and leave it out here: Ray's "
                "processes inherit the environment, storage and the hub read their own variables, "
                "and a reward function reads os.environ."
            )
    mistakes.refuse()


def _texts(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts in nested mappings and lists, by dotted name."""
    if isinstance(tree, str):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            yield from _texts(value, f"{name}.{place}")
