"""Rankings for DPO and reward models: samples of a model, ranked by the verifier.

    python -m recipes.make_rankings --model.path runs/sft/... --output rankings.parquet
    python -m recipes.dpo_math --data.train rankings.parquet --model.path runs/sft/...

Every problem gets `generation.samples_per_prompt` samples. Different responses are ranked by their
reward; equal rewards are a tie. Problems whose responses all have the same reward are left out. The
same flags and seed give the same file.
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from recipes.prepared_run import machines_of
from rlsys.config import ConfigError, GenerationConfig, RunConfig
from rlsys.config.command_line import HelpRequested, dump_yaml, evolve, parse
from rlsys.config.errors import Mistakes, as_config_error
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.config.rankings import ProblemSourceConfig, RankingsRunConfig
from rlsys.run.shown_text import shown

if TYPE_CHECKING:
    from rich.console import Console

    from rlsys.data.batches import PromptBatch
    from rlsys.data.examples import Ranking
    from rlsys.data.prompt_stream import LoadedPrompts
    from rlsys.driver.sampling import Sampler


def make_rankings(hardware: Hardware) -> RankingsRunConfig:
    """Return the default configuration for this machine."""
    return RankingsRunConfig(
        data=ProblemSourceConfig(max_prompt_tokens=160 if not hardware.gpus else 1024),
        generation=GenerationConfig(
            max_tokens=32 if not hardware.gpus else 1024,
            cpus_per_worker=1 if hardware.cpus > 1 else 0,
            gpu_memory_utilization=0.85,
        ),
    )


def run_rankings(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command, and exit: 0 done, 1 failed, 2 invalid input, 130 interrupted."""
    hardware = detect_hardware()
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments, hardware)
    except HelpRequested as help_requested:
        print(help_requested)
        code = 0
    except KeyboardInterrupt:
        print("interrupted; no file was written", file=sys.stderr)
        code = 130
    except ConfigError as error:
        lines = [f"error: {line}" for line in str(error).splitlines()]
        print(shown("\n".join(lines)), file=sys.stderr)
        code = 2
    except Exception:
        print(shown(traceback.format_exc()), file=sys.stderr)
        code = 1
    sys.exit(code)


def _run(arguments: Sequence[str], hardware: Hardware) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rlsys.run.observers.plain_console import PlainConsole

    if any(word.partition("=")[0] == "--resume" for word in arguments):
        raise ConfigError("--resume: rankings are made in one go. Leave it out.")
    invocation = parse(make_rankings(hardware), arguments)
    console = PlainConsole()
    with as_config_error():
        config, model_directory, prompts = prepare(invocation.config, hardware)
    for notice in prompts.notices:
        console.print(notice, highlight=False, markup=False, soft_wrap=True)
    samples = config.generation.samples_per_prompt
    console.print(
        f"{len(prompts.train)} problems x {samples} samples into {config.output}", highlight=False
    )
    if invocation.dry_run:
        print(shown(dump_yaml(config)))
        return 0
    asyncio.run(_make(config, model_directory, prompts, console))
    return 0


def prepare(
    config: RankingsRunConfig, hardware: Hardware
) -> tuple[RankingsRunConfig, Path, LoadedPrompts]:
    """Check everything that can be checked before Ray starts.

    Raises:
        ValueError: mistakes, a line each.
    """
    from rlsys.data.prompt_stream import load_problems, load_prompts
    from rlsys.models import resolve_model
    from rlsys.models.loading import load_tokenizer
    from rlsys.rewards import refuse_rewards_of_training
    from rlsys.run.compute_dtype import choose_dtypes
    from rlsys.run.directory import RunDirectory
    from rlsys.run.model_checks import ModelDirectories, check_model
    from rlsys.run.preflight import config_mistakes

    online, mistakes = config.online(), Mistakes()
    place = RunDirectory(Path(config.output).parent, is_given=False, field="output")
    mistakes.lines += config_mistakes(online, place, hardware, resume=False)
    mistakes.attempt(
        "reward.functions",
        lambda: refuse_rewards_of_training(config.reward.functions, "recipes.make_rankings"),
    )
    mistakes.attempt("reward.functions", lambda: _refuse_steps(config))
    if Path(config.output).exists():
        mistakes.lines.append(f"output: {config.output!r} exists already. Name another file.")
    problems = mistakes.attempt("data.train", lambda: load_problems(online))
    mistakes.refuse()

    directory = resolve_model(config.model.path)
    check_model(online, ModelDirectories.same(directory))
    machines = machines_of(online, directory)
    choice = choose_dtypes(online, hardware, directory, machines=machines)
    config = evolve(config, {"generation.dtype": choice.config.generation.dtype})
    tokenizer = load_tokenizer(directory, trust_remote_code=config.model.trust_remote_code)
    prompts = load_prompts(config.online(), tokenizer, problems)
    # There are no steps here: a last batch that is not full repeats no problem.
    notices = [notice for notice in prompts.notices if not notice.startswith("trainer.")]
    return config, directory, replace(prompts, notices=tuple(notices))


def _refuse_steps(config: RankingsRunConfig) -> None:
    """Refuse rewards of steps beside a score: rankings would compare only a part of the reward.

    Raises:
        ValueError: a function gives both.
    """
    from rlsys.rewards import step_functions
    from rlsys.rewards.registry import reward_hooks

    giving = [name for name in step_functions(config.reward.functions) if reward_hooks(name).scores]
    if giving:
        raise ValueError(
            f"reward.functions: {giving[0]!r} rewards steps, and rankings compare the scores of "
            "whole responses. Leave it out."
        )


async def _make(
    config: RankingsRunConfig, model_directory: Path, prompts: LoadedPrompts, console: Console
) -> None:
    """Sample, rank and write."""
    from rich.progress import Progress

    from recipes.wiring import spawn_engines, spawn_reward_workers
    from rlsys.data.ranking_files import write_rankings
    from rlsys.driver.sampling import Sampler
    from workers.cluster import Cluster
    from workers.generation.group import GenerationGroup
    from workers.local_ray import interrupt_on_sigterm
    from workers.reward_worker import RewardWorkerClient

    interrupt_on_sigterm()
    online = config.online()
    cluster = Cluster.connect(online)
    try:
        cluster.faults.listen(lambda fault: console.print(fault.line(), soft_wrap=True))
        engines = spawn_engines(cluster, online, model_directory)
        rewards = spawn_reward_workers(cluster, online)
        await cluster.wait_until_ready()
        sampler = Sampler(online, GenerationGroup(engines), RewardWorkerClient(rewards))

        rankings: list[Ranking] = []
        batches = prompt_batches(prompts, config.batch)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("sampling", total=len(prompts.train))
            for number, batch in enumerate(batches):
                cluster.faults.enter(number, "")
                rankings += await _ranked(config, online, sampler, batch)
                progress.advance(task, len(batch))
    finally:
        cluster.shutdown()

    if not rankings:
        raise ConfigError(
            "generation.samples_per_prompt: for no problem do the samples differ in their reward, "
            "so there is nothing to rank. Raise it, or choose other problems or another model."
        )
    write_rankings(rankings, Path(config.output))
    console.print(
        f"{len(rankings)} of {len(prompts.train)} problems have responses that differ in their "
        f"reward: {config.output}",
        highlight=False,
    )


def prompt_batches(prompts: LoadedPrompts, size: int) -> list[PromptBatch]:
    """Return all training prompts in batches, in the order of the data."""
    import numpy as np

    from rlsys.data.batches import PromptBatch

    found = tuple(prompts.train.prompts)
    return [
        PromptBatch(
            batch_id=number,
            prompts=found[start : start + size],
            group_ids=np.arange(start, min(start + size, len(found)), dtype=np.int64),
        )
        for number, start in enumerate(range(0, len(found), size))
    ]


async def _ranked(
    config: RankingsRunConfig, online: RunConfig, sampler: Sampler, prompts: PromptBatch
) -> list[Ranking]:
    """Return the rankings of the problems whose samples differ in their reward."""
    from rlsys.data.examples import Ranking
    from rlsys.data.ranking_files import rank_by_reward
    from rlsys.driver.sampling import batch_seed, sampling_parameters

    generation = config.generation
    sampling = sampling_parameters(
        online,
        samples=generation.samples_per_prompt,
        temperature=generation.temperature,
        seed=batch_seed(config.seed, prompts.batch_id),
    )
    groups = await sampler.sample(prompts, sampling)
    rewards = await sampler.rewards(groups, "training")
    rankings = []
    for prompt, group, batch in zip(prompts.prompts, groups, rewards, strict=True):
        rollouts = await group.part.rollouts
        scored = batch.rewards[batch.scored].tolist()
        texts = [
            text for text, known in zip(rollouts.response_texts, batch.scored, strict=True) if known
        ]
        ranked = rank_by_reward(texts, scored, limit=config.responses)
        if ranked is not None:
            responses, ranks = ranked
            rankings.append(
                Ranking(
                    example_id=prompt.problem_id,
                    prompt=prompt.problem,
                    responses=responses,
                    ranks=ranks,
                    answer=prompt.ground_truth,
                )
            )
    return rankings


if __name__ == "__main__":
    run_rankings()
