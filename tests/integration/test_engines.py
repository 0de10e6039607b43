"""Contracts of the rollout engines, on real vLLM and on transformers."""

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from rlsys.config import DataConfig, GenerationConfig, ModelConfig, RunConfig
from rlsys.config.engines import ENGINES
from rlsys.data.batches import Prompt, PromptBatch, RolloutBatch, SamplingParameters, StopReason
from rlsys.driver.ports import WeightSyncError
from rlsys.models import resolve_model
from rlsys.models.loading import load_causal_lm, load_tokenizer
from rlsys.models.weights import StoredWeights, pack_weights
from workers.generation.group import GenerationGroup
from workers.generation.worker import GenerationWorker, differing_groups
from workers.weight_sync.synchronizer import EngineWeightSync

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
SAMPLING = SamplingParameters(
    samples_per_prompt=4, temperature=0.8, min_tokens=2, max_tokens=12, seed=3
)


def config(engine: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="tiny"),
        data=DataConfig(max_prompt_tokens=100),
        generation=GenerationConfig.model_validate(
            {"engine": engine, "dtype": "float32", "max_tokens": 64}
        ),
    )


def start_worker(engine: str, directory: Path | None = None) -> Any:
    """Start a generation worker, on the tiny model unless `directory` names another."""
    remote_class: Any = ray.remote(GenerationWorker)
    model = str(directory or resolve_model("tiny"))
    return remote_class.options(num_cpus=0).remote(config(engine), model)


@pytest.fixture(scope="module")
def workers(ray_cluster: None) -> Iterator[dict[str, Any]]:
    started = {engine: start_worker(engine) for engine in ENGINES}
    yield started
    for actor in started.values():
        ray.kill(actor)


@pytest.fixture(params=ENGINES)
def worker(request: pytest.FixtureRequest, workers: dict[str, Any]) -> Any:
    return workers[request.param]


@pytest.fixture(scope="module")
def model():
    return load_causal_lm(resolve_model("tiny"), dtype=torch.float32, attention="eager").eval()


@pytest.fixture(scope="module")
def prompts() -> PromptBatch:
    tokenizer = load_tokenizer(resolve_model("tiny"))
    texts = [
        "Problem: Ann has 3 and",
        "Eva gets 5",
        "What is the answer? " * 6,
        "Tom loses 1 and 2.",
    ]
    rows = tuple(
        Prompt(
            problem_id=str(i),
            token_ids=tuple(tokenizer(text)["input_ids"]),
            text=text,
            problem=text,
            ground_truth="1",
        )
        for i, text in enumerate(texts)
    )
    return PromptBatch(batch_id=5, prompts=rows, group_ids=np.arange(20, 24, dtype=np.int64))


async def generate(
    workers: list, prompts: PromptBatch, sampling: SamplingParameters
) -> RolloutBatch:
    """Generate with all workers, and return the responses in the order of the prompts."""
    parts = [part async for part in GenerationGroup(workers).generate(prompts, sampling)]
    parts.sort(key=lambda part: part.prompt_index)
    batches = [await part.rollouts for part in parts]
    counts = [batch.num_response_tokens for batch in batches]
    assert [part.num_response_tokens for part in parts] == counts
    return RolloutBatch.concatenate(batches)


@torch.no_grad()
def expected_logprobs(model: torch.nn.Module, batch: RolloutBatch, row: int) -> np.ndarray:
    """Return the model's own log-probabilities of a sequence at the temperature, [L - 1]."""
    start, end = batch.sequence_offsets[row], batch.sequence_offsets[row + 1]
    tokens = torch.from_numpy(batch.token_ids[start:end].astype(np.int64))[None]
    logs = (model(input_ids=tokens).logits[0, :-1] / batch.temperature).log_softmax(-1)
    return logs.gather(1, tokens[0, 1:, None])[:, 0].numpy()


def without_min_tokens(sampling: SamplingParameters) -> SamplingParameters:
    """Return the sampling without min_tokens.

    It masks no token, so the engine's distribution is the model's own.
    """
    return replace(sampling, min_tokens=0)


async def test_batch_layout(worker, prompts: PromptBatch):
    batch = await generate([worker], prompts, SAMPLING)
    assert batch.batch_id == 5
    # In the order of the prompts, with the responses of a group together.
    assert batch.group_ids.tolist() == [20] * 4 + [21] * 4 + [22] * 4 + [23] * 4

    for row, group in enumerate(batch.group_ids):
        prompt = prompts.prompts[group - 20]
        start, end = batch.sequence_offsets[row], batch.sequence_offsets[row + 1]
        middle = start + len(prompt.token_ids)
        assert tuple(batch.token_ids[start:middle]) == prompt.token_ids
        assert not batch.response_mask[start:middle].any()
        assert batch.response_mask[middle:end].all()
        assert 2 <= end - middle <= 12
        cut_off = end - middle == 12 and batch.token_ids[end - 1] != _end_token()
        assert (batch.stop_reasons[row] == StopReason.LENGTH) == cut_off

    assert (batch.rollout_logprobs[~batch.response_mask] == 0).all()
    assert (batch.rollout_logprobs[batch.response_mask] <= 0).all()


def _end_token() -> int:
    tokenizer: Any = load_tokenizer(resolve_model("tiny"))
    return tokenizer.convert_tokens_to_ids("<|im_end|>")


async def test_logprobs_are_those_of_the_model_at_the_sampling_temperature(
    worker, prompts: PromptBatch, model: torch.nn.Module
):
    await install(worker, model, 0)
    batch = await generate([worker], prompts, without_min_tokens(SAMPLING))
    for row in range(len(batch)):
        start, end = batch.sequence_offsets[row], batch.sequence_offsets[row + 1]
        mask = batch.response_mask[start:end][1:]
        found = batch.rollout_logprobs[start:end][1:]
        assert np.abs(found - expected_logprobs(model, batch, row))[mask].max() < 2e-3


@pytest.mark.parametrize(
    "truncation",
    [{"top_p": 0.5}, {"top_k": 5}, {"min_tokens": 6}, {"top_p": 0.9, "top_k": 20, "min_tokens": 3}],
    ids=str,
)
async def test_truncation_leaves_logprobs_alone(
    worker, prompts: PromptBatch, model: torch.nn.Module, truncation: dict[str, Any]
):
    """Compare log-probabilities with those of the whole distribution at the temperature.

    The ratio to the trainer's is 1, although unlikely tokens were never sampled.
    """
    await install(worker, model, 0)
    sampling = replace(SAMPLING, min_tokens=0, max_tokens=32)
    batch = await generate([worker], prompts, replace(sampling, **truncation))
    log_ratios = np.zeros(len(batch))
    for row in range(len(batch)):
        start, end = batch.sequence_offsets[row], batch.sequence_offsets[row + 1]
        mask = batch.response_mask[start:end][1:]
        found = batch.rollout_logprobs[start:end][1:][mask]
        differences = expected_logprobs(model, batch, row)[mask] - found
        assert np.abs(differences).max() < 2e-3
        log_ratios[row] = differences.sum()
        assert mask.sum() > truncation.get("min_tokens", 0)
    assert np.abs(log_ratios).max() < 0.01

    if truncation.keys() & {"top_p", "top_k"}:  # min_tokens may change nothing: ends are rare
        free = await generate([worker], prompts, sampling)
        assert free.token_ids.tolist() != batch.token_ids.tolist()


async def test_equal_seeds_equal_tokens(worker, prompts: PromptBatch):
    one = await generate([worker], prompts, SAMPLING)
    two = await generate([worker], prompts, SAMPLING)
    other = await generate([worker], prompts, replace(SAMPLING, seed=4))
    assert one.token_ids.tolist() == two.token_ids.tolist()
    assert one.token_ids.tolist() != other.token_ids.tolist()


async def test_greedy_is_transformers_generate(worker, prompts: PromptBatch, model):
    await install(worker, model, 0)
    greedy = SamplingParameters(samples_per_prompt=1, temperature=0.0, max_tokens=8)
    batch = await generate([worker], prompts, greedy)
    for row, prompt in enumerate(prompts.prompts):
        tokens = torch.tensor([prompt.token_ids])
        expected = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=8
        )[0]
        start, end = batch.sequence_offsets[row], batch.sequence_offsets[row + 1]
        assert batch.token_ids[start:end].tolist() == expected.tolist()


async def test_stop_strings_stay_in_the_response(worker, prompts: PromptBatch):
    free = await generate([worker], prompts, replace(SAMPLING, min_tokens=1))
    whole = [text for text in free.response_texts if len(text) > 6 and "\ufffd" not in text[:6]]
    text, stop = whole[0], whole[0][3:5]

    batch = await generate([worker], prompts, replace(SAMPLING, min_tokens=1, stop=(stop,)))
    row = free.response_texts.index(text)
    expected = text[: text.index(stop) + len(stop)]
    assert batch.response_texts[row].startswith(expected)
    assert batch.stop_reasons[row] == StopReason.END

    # The tokens are those sampled, up to the one that completed the string, and none after it.
    start = batch.sequence_offsets[row] + batch.prompt_lengths[row]
    end = batch.sequence_offsets[row + 1]
    tokenizer: Any = load_tokenizer(resolve_model("tiny"))
    decoded = tokenizer.decode(batch.token_ids[start:end].tolist(), skip_special_tokens=True)
    assert decoded.startswith(expected)
    assert len(decoded) - len(expected) < 8


async def test_stop_strings_cut_both_engines_alike(
    workers: dict[str, Any], prompts: PromptBatch, model: torch.nn.Module
):
    """Compare greedy responses of both engines, wherever stop string and min_tokens fall.

    The tokens are the same in both, so everything else must be too.
    """
    for worker in workers.values():
        await install(worker, changed(model, 1.0), 0)
    greedy = SamplingParameters(samples_per_prompt=1, temperature=0.0, max_tokens=16)
    free = await generate([workers["transformers"]], prompts, greedy)
    stops = {text[i : i + n] for text in free.response_texts for i in (0, 2, 5) for n in (1, 3)}

    seen = set()
    for stop in sorted(stops - {""})[:12]:
        for least in (0, 1, 4):
            sampling = replace(greedy, stop=(stop, "absent"), min_tokens=least)
            one, two = [await generate([worker], prompts, sampling) for worker in workers.values()]
            assert one.token_ids.tolist() == two.token_ids.tolist()
            assert one.response_texts == two.response_texts
            assert one.stop_reasons.tolist() == two.stop_reasons.tolist()
            assert (one.response_lengths > least).all()
            for text, reason in zip(one.response_texts, one.stop_reasons, strict=True):
                if reason == StopReason.END and stop in text:
                    assert text.endswith(stop)
                seen.add((least, reason == StopReason.END))

    assert seen == {(least, ended) for least in (0, 1, 4) for ended in (False, True)}


@pytest.mark.parametrize("ends", [None, "several"])
async def test_several_or_no_end_tokens_mean_the_same_in_both_engines(
    tmp_path: Path, prompts: PromptBatch, model: torch.nn.Module, ends: str | None
):
    """Declare the likeliest next tokens as end tokens, or none at all.

    Greedy responses repeat such a token, which shows at once whether an engine knows it.
    """
    likeliest = []
    for prompt in prompts.prompts[:2]:
        logits = model(input_ids=torch.tensor([prompt.token_ids])).logits
        likeliest.append(int(logits[0, -1].argmax()))

    directory = model_with_end_tokens(tmp_path, likeliest if ends else None)
    started = [start_worker(engine, directory) for engine in ENGINES]
    try:
        for least in (0, 3):
            sampling = SamplingParameters(
                samples_per_prompt=1, temperature=0.0, max_tokens=8, min_tokens=least
            )
            one, two = [await generate([worker], prompts, sampling) for worker in started]
            assert one.token_ids.tolist() == two.token_ids.tolist()
            assert one.stop_reasons.tolist() == two.stop_reasons.tolist()
            assert one.response_texts == two.response_texts

            if ends is None:
                assert (one.response_lengths == 8).all()
            elif least == 0:
                assert one.response_lengths[:2].tolist() == [1, 1]
            else:
                assert (one.response_lengths > least).all()
    finally:
        for actor in started:
            ray.kill(actor)


def model_with_end_tokens(directory: Path, ends: list[int] | None) -> Path:
    """Write the tiny model, with end tokens in generation_config.json alone."""
    shutil.copytree(resolve_model("tiny"), directory, dirs_exist_ok=True)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        settings = json.loads((directory / name).read_text())
        settings.pop("eos_token", None)
        settings["eos_token_id"] = ends if name == "generation_config.json" else None
        (directory / name).write_text(json.dumps(settings))
    return directory


async def test_by_default_a_short_right_answer_ends(worker, prompts: PromptBatch, model):
    """Stop at a string that the second token completes: no least length delays the end."""
    await install(worker, model, 0)
    default = GenerationConfig()
    greedy = SamplingParameters(
        samples_per_prompt=1, temperature=0.0, max_tokens=16, min_tokens=default.min_tokens
    )
    free = await generate([worker], prompts, greedy)

    tokens = free.token_ids[free.prompt_lengths[0] : free.sequence_offsets[1]]
    tokenizer: Any = load_tokenizer(resolve_model("tiny"))
    stop = tokenizer.decode(tokens[:2].tolist())

    batch = await generate([worker], prompts, replace(greedy, stop=(stop,)))
    assert batch.response_texts[0] == stop
    assert batch.response_lengths[0] == 2


async def install(worker, model: torch.nn.Module, version: int) -> None:
    """Install the weights of `model` in the engine of `worker`."""
    stored = packed(model, version)
    # The actors outlive single tests, so versions only grow.
    manifest = replace(stored.manifest, version=max(version, await worker.version.remote()))
    await worker.install_weights.remote(stored._replace(manifest=manifest))


def packed(model: torch.nn.Module, version: int) -> StoredWeights:
    """Return the weights of `model` as the trainer sends them, without the tied LM head."""
    tensors = model.state_dict()
    tensors.pop("lm_head.weight", None)
    manifest, buckets = pack_weights(
        tensors.items(), version=version, dtype=torch.float32, bucket_bytes=2**18
    )
    return StoredWeights(manifest, [ray.put(bucket) for bucket in buckets])


def changed(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    """Return a copy of `model` with noise of relative size `scale` in every parameter."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.std() * scale)
    return other


def head_of(model: Any) -> torch.Tensor:
    return model.lm_head.weight


async def test_new_weights_are_used_by_every_layer_and_by_the_tied_head(
    worker, prompts: PromptBatch, model: torch.nn.Module
):
    """Compare with the new model, and with its body under the old LM head.

    With tied embeddings the LM head of a CPU engine reads a packed copy, which a reload may leave
    stale without an error.
    """
    other = changed(model, 0.5)
    await install(worker, other, 1)
    batch = await generate([worker], prompts, without_min_tokens(SAMPLING))

    old_head: Any = changed(model, 0.5)
    old_head.lm_head.weight = torch.nn.Parameter(head_of(model).detach().clone())
    differences, stale = [], []
    for row in range(len(batch)):
        start, end = batch.sequence_offsets[row], batch.sequence_offsets[row + 1]
        mask = batch.response_mask[start:end][1:]
        found = batch.rollout_logprobs[start:end][1:][mask]
        differences.append(np.abs(found - expected_logprobs(other, batch, row)[mask]))
        stale.append(np.abs(found - expected_logprobs(old_head, batch, row)[mask]))

    assert np.concatenate(differences).max() < 5e-3
    assert np.concatenate(stale).mean() > 0.02  # so a stale head would have been seen
    assert set(batch.newest_weight_version.tolist()) == {await worker.version.remote()}
    await install(worker, model, 2)


async def test_older_weights_are_refused(worker, model: torch.nn.Module):
    stored = packed(model, -5)
    await install(worker, model, 3)
    with pytest.raises(Exception, match=r"weights version -5 is older than the installed"):
        await worker.install_weights.remote(stored)


async def test_two_workers_cover_all_prompts_in_order(
    workers: dict[str, Any], prompts: PromptBatch, model: torch.nn.Module
):
    """Generate with one worker and with two of the transformers engine.

    Each response has its own seed, so the assignment of prompts to workers changes nothing.
    """
    first, second = workers["transformers"], start_worker("transformers")
    for actor in (first, second):
        await install(actor, model, 0)

    both = await generate([first, second], prompts, SAMPLING)
    alone = await generate([first], prompts, SAMPLING)
    assert both.token_ids.tolist() == alone.token_ids.tolist()
    ray.kill(second)


async def test_groups_stream_out_before_the_last_is_done(worker, prompts: PromptBatch):
    """Receive the first part while its worker still has prompts: parts arrive one by one."""
    parts = []
    stream = GenerationGroup([worker]).generate(prompts, SAMPLING)
    parts.append(await anext(stream))
    parts += [part async for part in stream]
    assert sorted(part.prompt_index for part in parts) == [0, 1, 2, 3]


class TrainerSide:
    """The policy's side of weight sync: it computes with one model and exports another."""

    def __init__(self, model: torch.nn.Module, exported: torch.nn.Module) -> None:
        self._model = model
        self._exported = exported

    async def export_weights(
        self, version: int, keep: Sequence[StoredWeights] = ()
    ) -> StoredWeights:
        return packed(self._exported, version)

    async def probe_logprobs(
        self, sequences: Sequence[np.ndarray], temperature: float
    ) -> list[np.ndarray]:
        return [self.logprobs_of(sequence) for sequence in sequences]

    @torch.no_grad()
    def logprobs_of(self, sequence: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(sequence.astype(np.int64))
        logs = self._model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        return logs.gather(1, tokens[1:, None])[:, 0].numpy()


async def test_sync_is_proven_by_a_probe(worker, model: torch.nn.Module):
    probe = [np.arange(10, 10 + length, dtype=np.int32) for length in (12, 5, 40)]
    version = await worker.version.remote() + 1
    good = EngineWeightSync(TrainerSide(model, model), [worker], config("vllm"), probe)
    report = await good.sync(version)
    assert report["sync/logprob_difference_mean"].value < 1e-3

    wrong = TrainerSide(changed(model, 0.5), model)
    bad = EngineWeightSync(wrong, [worker], config("vllm"), probe)
    with pytest.raises(
        WeightSyncError,
        match=r"differ by \d\.\d+ in mean log-probability .*Parameter groups that differ",
    ):
        await bad.sync(version + 1)


def test_parameter_groups_that_differ_are_named():
    tensors = {
        "model.layers.0.q_proj.weight": torch.ones(2),
        "model.layers.0.k_proj.weight": torch.ones(3),
        "model.norm.weight": torch.ones(4),
    }
    fused = ("model.layers.0.q_proj.weight", "model.layers.0.k_proj.weight")
    norm = ("model.norm.weight",)
    assert differing_groups(tensors.items(), {fused: 5.0, norm: 4.0}) == []
    assert differing_groups(tensors.items(), {fused: 5.0, norm: 9.0}) == ["model.norm.weight"]
    assert differing_groups(tensors.items(), {fused: 6.0}) == [" + ".join(fused)]
