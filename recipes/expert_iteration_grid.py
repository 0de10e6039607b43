"""Expert iteration with every combination of rollouts per problem, epochs and problems per step.

    python -m recipes.expert_iteration_grid
    python -m recipes.expert_iteration_grid --grid.samples 2,4 --grid.epochs 1,2 --grid.problems 64

Each combination is a run of recipes.expert_iteration_math with a directory of its own in that of
the grid. All other flags are those of that recipe and hold for every run. The table of results is
printed and written to summary.csv and summary.parquet, curves and effects to summary.html, after
each run. With --run.directory and --resume finished runs are skipped and the others continue.
"""

from recipes.expert_iteration_math import expert_iteration_math
from rlsys.config.expert_grid import ExpertGridConfig
from rlsys.config.hardware import Hardware


def expert_iteration_grid(hardware: Hardware) -> ExpertGridConfig:
    """Return the grid around `expert_iteration_math` for this machine."""
    own = expert_iteration_math(hardware).model_dump(exclude={"recipe"})
    return ExpertGridConfig.model_validate(own)


if __name__ == "__main__":
    from recipes.run_expert_grid import run_expert_grid

    run_expert_grid(expert_iteration_grid)
