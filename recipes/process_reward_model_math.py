"""A process reward model: the probability that a step of an answer is right.

On generated answers in steps, of which one half has a wrong step:

    python -m recipes.process_reward_model_math

On labelled steps of your own (columns prompt, completions, labels), from a fine-tuned model:

    python -m recipes.process_reward_model_math --data.train steps.parquet --model.path runs/sft/...

Each checkpoint is a Hugging Face model for token classification with one label. Its logit at the
last token of a step is log(p / (1 - p)) of the probability p that the step is right.

This differs from `reward_model_math` in the data and in the loss: each step has a label of its own,
instead of each response a rank.
"""

from recipes.reward_model_math import reward_model_math
from rlsys.config.hardware import Hardware
from rlsys.config.offline import (
    ProcessRewardModelRunConfig,
    StepDataConfig,
)


def process_reward_model_math(hardware: Hardware) -> ProcessRewardModelRunConfig:
    """Return the default configuration for this machine."""
    rankings = reward_model_math(hardware)
    return ProcessRewardModelRunConfig(
        recipe="process_reward_model_math",
        model=rankings.model,
        data=StepDataConfig(
            template=rankings.data.template,
            max_prompt_tokens=rankings.data.max_prompt_tokens,
            max_response_tokens=rankings.data.max_response_tokens,
        ),
        reward_model=rankings.reward_model,
        trainer=rankings.trainer,
    )


if __name__ == "__main__":
    from recipes.run_offline import run_offline

    run_offline(process_reward_model_math)
