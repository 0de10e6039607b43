"""Some steps of TRL's SFTTrainer, DPOTrainer or RewardTrainer on a file of examples, in its order.

    TRL/bin/python benchmarks/trl_offline_step.py MODEL DATA --kind sft --output steps.json

TRL is not a dependency of this project: it runs from an environment of its own, which
`benchmarks/offline_side_by_side.py` makes. That script also runs rlsys and compares the two.

The output has, for each step, the loss before the step, the time at its end, and the tokens that
reached the model. Both precision and arithmetic are float32, without dropout and without gradient
checkpointing, which TRL uses by default and which makes a step slower.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import (  # pyright: ignore[reportMissingImports]
    DPOConfig,
    DPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

# By kind: the trainer, its configuration, and the class of the model.
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "sft": (SFTTrainer, SFTConfig, AutoModelForCausalLM),
    "dpo": (DPOTrainer, DPOConfig, AutoModelForCausalLM),
    "reward_model": (RewardTrainer, RewardConfig, AutoModelForSequenceClassification),
}


class Record(TrainerCallback):
    """What happened in each optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ends: list[float] = []  # seconds since the epoch
        self.rows: list[list[Any]] = []  # [token ids, learned] of each sequence

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.losses.append(0.0)
        self.rows.append([])

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.time())


def recorded(trainer: Any, kind: str, record: Record) -> Any:
    """Return the trainer's class, whose micro-batches are recorded."""

    class Recorded(trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Tensor:
            record.rows[-1] += rows_of(kind, inputs)
            loss = super().training_step(model, inputs, *rest, **named)
            # Each micro-batch has its share of the step's loss.
            record.losses[-1] += float(loss)
            return loss

    return Recorded


def rows_of(kind: str, inputs: Any) -> list[Any]:
    """Return the sequences of a micro-batch without padding: of a pair, the chosen one first.

    With each sequence goes the mask of the tokens that are learned, or None for a reward model.
    """
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    ids = [row[:length].tolist() for row, length in zip(inputs["input_ids"], lengths, strict=True)]
    learned: list[Any] = [None] * len(ids)
    if kind != "reward_model":
        mask = inputs["labels"] != -100 if kind == "sft" else inputs["completion_mask"] == 1
        learned = [row[:length].tolist() for row, length in zip(mask, lengths, strict=True)]

    rows = [list(row) for row in zip(ids, learned, strict=True)]
    if kind == "sft":
        return rows
    half = len(rows) // 2  # all chosen ones come before all rejected ones
    return [row for pair in zip(rows[:half], rows[half:], strict=True) for row in pair]


def main() -> None:
    """Train, and write what was recorded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="directory; of a reward model: one with a head")
    parser.add_argument("data", help="JSONL file; see offline_side_by_side.py")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--examples", type=int, default=8, help="per step; of pairs: pairs")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--optimizer", type=json.loads, default={}, help="further settings as JSON")
    arguments = parser.parse_args()

    trainer_class, config_class, model_class = KINDS[arguments.kind]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # A classifier reads the last token that is not padding. If the end token were padding, as in
    # this tokenizer, it would read the one before it.
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model = model_class.from_pretrained(arguments.model, dtype=torch.float32)
    lines = Path(arguments.data).read_text().splitlines()

    record = Record()
    with tempfile.TemporaryDirectory() as output:
        settings = config_class(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=arguments.examples // arguments.accumulation,
            gradient_accumulation_steps=arguments.accumulation,
            train_sampling_strategy="sequential",
            max_length=None,
            gradient_checkpointing=False,
            max_steps=arguments.steps,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            **arguments.optimizer,
        )
        trainer = recorded(trainer_class, arguments.kind, record)(
            model,
            args=settings,
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=tokenizer,
            callbacks=[record],
        )
        trainer.train()

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    result = {"losses": record.losses, "ends": record.ends, "rows": record.rows, "gib": peak}
    arguments.output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
