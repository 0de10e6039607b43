"""The configuration of a grid of expert iterations: every combination of some values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.config.root import CONTRADICTIONS_LATER
from rlsys.config.section import Section
from rlsys.config.storage_uri import unsupported_storage

Count = Annotated[int, Field(ge=1)]

RECIPE_OF_A_CELL = "expert_iteration_math"

# The fields of a run that the grid sets, by the grid's fields.
AXES = {
    "samples": "generation.samples_per_prompt",
    "epochs": "expert.epochs",
    "problems": "trainer.prompts_per_step",
}


class GridConfig(Section):
    """The values that are combined; each combination is a run."""

    samples: tuple[Count, ...] = Field(
        default=(2, 4),
        min_length=1,
        description="Values of generation.samples_per_prompt: responses per problem (G).",
    )
    epochs: tuple[Count, ...] = Field(
        default=(1, 2),
        min_length=1,
        description="Values of expert.epochs: passes of fine-tuning over the kept responses.",
    )
    problems: tuple[Count, ...] = Field(
        default=(32, 64),
        min_length=1,
        description="Values of trainer.prompts_per_step: problems of an iteration (D_b).",
    )


class ExpertGridConfig(ExpertIterationRunConfig):
    """Expert iteration with every combination of some values, one run after the other."""

    recipe: str = Field(
        default="expert_iteration_grid",
        description="Name of the recipe, used in the name of the grid's directory.",
    )
    grid: GridConfig = Field(default=GridConfig(), description="The values that are combined.")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of values."""

    samples: int
    epochs: int
    problems: int

    @property
    def name(self) -> str:
        """The name of the run's directory in that of the grid."""
        return f"samples_{self.samples}-epochs_{self.epochs}-problems_{self.problems}"

    @property
    def label(self) -> str:
        """The combination in the notation of papers."""
        return f"G {self.samples}, epochs {self.epochs}, D_b {self.problems}"

    def config(self, grid: ExpertGridConfig, directory: str) -> ExpertIterationRunConfig:
        """Return the configuration of the run of this combination; it may have contradictions."""
        tree = grid.model_dump(exclude={"grid"})
        tree["recipe"] = RECIPE_OF_A_CELL
        tree["run"]["directory"] = directory
        for axis, field in AXES.items():
            section, name = field.split(".")
            tree[section][name] = getattr(self, axis)
        return ExpertIterationRunConfig.model_validate(tree, context=CONTRADICTIONS_LATER)


def cells_of(grid: GridConfig) -> Iterator[Cell]:
    """Yield every combination once, the cheapest values first."""
    values = (sorted(set(grid.problems)), sorted(set(grid.samples)), sorted(set(grid.epochs)))
    for problems, samples, epochs in itertools.product(*values):
        yield Cell(samples=samples, epochs=epochs, problems=problems)


def grid_mistakes(config: ExpertGridConfig, explicit: Iterable[str]) -> Iterator[str]:
    """Yield a line for each field that a flag sets and the grid would overwrite."""
    yield from unsupported_storage(config.run.storage, "a grid")
    given = set(explicit)
    for axis, field in AXES.items():
        if field in given:
            yield (
                f"{field}: the grid sets it, to each of grid.{axis} "
                f"{', '.join(map(str, getattr(config.grid, axis)))}. Use --grid.{axis}."
            )
