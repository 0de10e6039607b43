"""Seconds of the same GRPO step in TRL, the single-process trainer that people would otherwise use.

    python3.11 -m venv /tmp/trl
    /tmp/trl/bin/pip install "torch==2.13.0" "trl==1.16.*" accelerate datasets
    /tmp/trl/bin/python benchmarks/trl_step.py MODEL_DIRECTORY --dtype bfloat16 --micro-batch 16

TRL is not a dependency of this project: it runs from an environment of its own. The work is that of
`benchmarks/grpo_step.py`: 4 prompts of 99 tokens x 8 responses, each forced to 32 new tokens
(`--tokens`), one update with AdamW, float32 masters; medians over the steps after two of warm-up.
`benchmarks/side_by_side.py` makes the environment and runs both in turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

PROMPTS, SAMPLES, PROMPT_TOKENS, WARM_UP = 4, 8, 99, 2


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, including its generation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def prompts_of(tokenizer, count: int) -> list[str]:
    """Return texts of about PROMPT_TOKENS tokens, all different."""
    texts = []
    for number in range(count):
        text = f"Question {number}: what is {number} plus {number % 7}?"
        while len(tokenizer(text)["input_ids"]) < PROMPT_TOKENS:
            text += " Think."
        texts.append(text)
    return texts


def length_reward(completions: list[str], **_: object) -> list[float]:
    """Return rewards that differ within a group, so that there is a gradient."""
    return [float(len(completion) % 7) for completion in completions]


def main() -> None:
    """Train a few steps and print the median seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--micro-batch", type=int, default=16, help="responses per forward pass")
    parser.add_argument("--tokens", type=int, default=32, help="of each response")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--kl", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=4, help="counted steps")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    steps = arguments.steps + WARM_UP
    times = StepTimes()
    with tempfile.TemporaryDirectory() as output:
        settings = GRPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=arguments.dtype == "bfloat16",
            per_device_train_batch_size=arguments.micro_batch,
            gradient_accumulation_steps=PROMPTS * SAMPLES // arguments.micro_batch,
            num_generations=SAMPLES,
            max_completion_length=arguments.tokens,
            generation_kwargs={"min_new_tokens": arguments.tokens},
            beta=arguments.kl,
            gradient_checkpointing=False,
            learning_rate=1e-5,
            max_steps=steps,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
        )
        trainer = GRPOTrainer(
            model,
            reward_funcs=length_reward,  # pyright: ignore[reportArgumentType]
            args=settings,
            train_dataset=Dataset.from_list(
                [{"prompt": text} for text in prompts_of(tokenizer, PROMPTS * steps)]
            ),
            processing_class=tokenizer,
            callbacks=[times],
        )
        trainer.train()

    seconds = statistics.median(times.seconds[WARM_UP:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    if arguments.json:
        print(json.dumps({"seconds": seconds, "gib": peak}))
        return
    print(
        f"TRL {arguments.dtype}, KL {arguments.kl}, micro-batch {arguments.micro_batch}: "
        f"{seconds:.2f} s per step, peak memory {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
