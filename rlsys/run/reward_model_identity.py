"""The reward model of a run: its directory, and a hash by which a resumed run knows it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.config import ConfigError, RunConfig
from rlsys.rewards import reward_model_of
from rlsys.rewards.learned import PATH_FIELD
from rlsys.run.checkpoints import Checkpoint
from rlsys.run.evaluated_model import model_fingerprint, resolve_evaluated
from rlsys.run.resume import REWARD_MODEL_STATE


@dataclass(frozen=True, kw_only=True)
class RewardModelIdentity:
    """A reward model; its state in checkpoints is the hash of its files."""

    directory: Path
    fingerprint: str

    def state(self) -> dict[str, Any]:
        """See `session.HasState`."""
        return {"fingerprint": self.fingerprint}

    def load_state(self, state: Any) -> None:
        """See `session.HasState`; `reward_model_identity` has compared the models."""


def reward_model_identity(
    config: RunConfig, checkpoint: Checkpoint | None
) -> RewardModelIdentity | None:
    """Return the reward model of a run, fetched on first use; None where no reward is a model.

    Raises:
        ValueError: see `resolve_evaluated`.
        ConfigError: the run that `checkpoint` belongs to had another reward model.
    """
    function = reward_model_of(config.reward.functions)
    if function is None:
        return None

    path = function.parameters["path"]
    directory = resolve_evaluated(path, PATH_FIELD).directory
    found = RewardModelIdentity(directory=directory, fingerprint=model_fingerprint(directory))

    before = checkpoint.state.get(REWARD_MODEL_STATE) if checkpoint else None
    if checkpoint and before and before != found.state():
        raise ConfigError(
            f"{PATH_FIELD}: {path!r} holds another model than the one whose rewards checkpoint "
            f"{checkpoint.path} was trained on. Give that one, or start a new run with "
            f"--model.path {checkpoint.path}."
        )
    return found
