"""The peak of each role's memory in each phase, on one rank.

A phase has moments at which its memory can be highest; the largest is its peak. What dies before a
moment does not count in it, so a peak is less than the sum of everything that a phase allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rlsys.plan import formulas
from rlsys.plan.shapes import ModelShape

GATHERED_BYTES = 16 << 20  # as in `backends/fsdp2.py`, which imports torch
CHECKPOINT_COPY = "copy for checkpoints"


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """What the memory of a rank depends on besides the shape of its model."""

    ranks: int
    compute_bytes: int
    tokens: int  # n, of a pack
    response_tokens: int  # m, that the pack predicts
    chunk_tokens: int
    kernel: str  # of attention; see `formulas.attention_saved`
    group_tokens: int
    gradient_checkpointing: bool = False
    offload: bool = False  # masters, moments and gradients are in host memory
    several_packs: bool = True  # a step accumulates the gradients of more than one pack
    entropy_bonus: bool = False
    value_head: bool = False  # a critic or reward model
    on_gpu: bool = False
    checkpoint_copy: bool = False  # of checkpoints that are written in the background

    def __post_init__(self) -> None:
        for name in ("ranks", "tokens", "response_tokens", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0. Give a number.")
        if self.compute_bytes not in (2, 4):
            raise ValueError(
                f"compute_bytes: {self.compute_bytes} is neither 2 (bfloat16) nor 4 (float32)."
            )

    @property
    def gathers(self) -> bool:
        """Whether the weights of a block come from other ranks, through a flat buffer."""
        return self.ranks > 1


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What lives at one moment of a phase, in bytes."""

    name: str
    device: Mapping[str, float] = field(default_factory=dict)  # of the GPU
    host: Mapping[str, float] = field(default_factory=dict)

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The largest memory of a rank in a phase: on its GPU and on its host, perhaps at two times."""

    phase: str
    device: Moment
    host: Moment

    @staticmethod
    def of(phase: str, moments: tuple[Moment, ...]) -> Peak:
        """Return the peak of a phase over its moments."""
        return Peak(
            phase=phase,
            device=max(moments, key=lambda moment: moment.device_bytes),
            host=max(moments, key=lambda moment: moment.host_bytes),
        )


def _moment(
    name: str,
    settings: RankSettings,
    *,
    computing: Mapping[str, float],
    sharded: Mapping[str, float],
    host: Mapping[str, float] | None = None,
) -> Moment:
    """Place tensors: on a CPU all in host memory, on a GPU the sharded ones where offload says."""
    always_host = dict(host or {})
    if not settings.on_gpu:
        return Moment(name=name, host={**sharded, **computing, **always_host})
    if settings.offload:
        return Moment(name=name, device=dict(computing), host={**sharded, **always_host})
    return Moment(name=name, device={**sharded, **computing}, host=always_host)


def resting(shape: ModelShape, settings: RankSettings) -> dict[str, float]:
    """Return what a trained rank holds between its phases: masters and moments."""
    parameters = shape.parameters(value_head=settings.value_head)
    return {
        "masters": formulas.masters(parameters, settings.ranks),
        "moments": formulas.moments(parameters, settings.ranks),
    }


def frozen_weights(shape: ModelShape, settings: RankSettings) -> dict[str, float]:
    """Return what a rank of a frozen model holds: its weights, stored in the compute dtype."""
    parameters = shape.parameters(value_head=settings.value_head)
    return {"weights": settings.compute_bytes * parameters / settings.ranks}


def saved_activations(shape: ModelShape, settings: RankSettings) -> float:
    """Return what the blocks and the last norm keep for the backward pass of one pack.

    With gradient checkpointing, the inputs of the blocks alone.
    """
    n, s = settings.tokens, settings.compute_bytes
    end = formulas.last_norm(shape, n, s) + formulas.block_input(shape, settings.response_tokens, s)
    if settings.gradient_checkpointing:
        return shape.layers * formulas.block_input(shape, n, s) + end
    return shape.layers * _one_block(shape, settings) + end


def _one_block(shape: ModelShape, settings: RankSettings) -> float:
    attention = formulas.attention_saved(
        shape,
        settings.tokens,
        settings.compute_bytes,
        kernel=settings.kernel,
        group_tokens=settings.group_tokens,
    )
    return formulas.block_activations(shape, settings.tokens, settings.compute_bytes) + attention


def update_moments(shape: ModelShape, settings: RankSettings) -> tuple[Moment, ...]:
    """Return the moments of an update at which its memory can be highest.

        logits                the last pack's forward pass is done; the LM head's backward pass
        last block            the backward pass enters the block that ran last
        embedding gradient    at the end of the backward pass: the gradients of head and embedding
                              exist whole, each s V h, those of the blocks are reduced
        root reduction        head and embedding are reduced in float32
        optimizer             masters, moments, gradients

    **Source:** FSDP2 of torch 2.13: the root stays unsharded from forward to backward pass; a block
    is unsharded into s p bytes, on several ranks through a flat buffer of the same size, and
    gathered one ahead; the float32 input of a reduction lives until the next one.
    """
    s, value = settings.compute_bytes, settings.value_head
    parameters = shape.parameters(value_head=value)
    rested = resting(shape, settings)
    all_gradients = formulas.gradients(parameters, settings.ranks)
    block_gradients = formulas.gradients(shape.layers * shape.block_parameters, settings.ranks)
    earlier = {"gradients": all_gradients if settings.several_packs else 0.0}
    later = {"gradients": all_gradients if settings.several_packs else block_gradients}

    root = shape.root_parameters(value_head=value)
    unsharded_root = {"unsharded embedding and head": float(s * root)}
    one_block = float(s * shape.block_parameters)
    ahead = {"gathered ahead": one_block if settings.gathers else 0.0}
    head_gradient = 0.0 if value else float(s * shape.embedding_parameters)
    activations = saved_activations(shape, settings)

    recomputed = _one_block(shape, settings) if settings.gradient_checkpointing else 0.0
    last_block = {
        "activations": activations + recomputed,
        "gradients of a block": formulas.mlp_backward(shape, settings.tokens, s),
        "unsharded block": one_block,
        "gradient of the head": head_gradient,
    }
    embedding = {
        "gradients of embedding and head": head_gradient + s * shape.embedding_parameters,
        "input of a reduction": float(formulas.FLOAT32 * shape.block_parameters),
    }
    reduction = {
        "input of a reduction": root * (formulas.FLOAT32 + max(s, 4 / settings.ranks)),
    }

    moments = [
        _moment(
            "last block",
            settings,
            sharded=rested | earlier,
            computing=unsharded_root | ahead | last_block,
        ),
        _moment(
            "embedding gradient",
            settings,
            sharded=rested | later,
            computing=unsharded_root | embedding,
        ),
        _moment("root reduction", settings, sharded=rested | later, computing=reduction),
        _moment("optimizer", settings, sharded=rested | {"gradients": all_gradients}, computing={}),
    ]
    if not value:
        logits = formulas.logits_backward(
            shape,
            settings.response_tokens,
            settings.chunk_tokens,
            s,
            entropy_bonus=settings.entropy_bonus,
            on_gpu=settings.on_gpu,
        )
        moments.append(
            _moment(
                "logits",
                settings,
                sharded=rested | earlier,
                computing=unsharded_root | ahead | {"activations": activations, "logits": logits},
            )
        )
    return tuple(moments)


def forward_moments(
    shape: ModelShape, settings: RankSettings, sharded: Mapping[str, float]
) -> tuple[Moment, ...]:
    """Return the moments of forward passes without gradient: log-probs, or values.

    Args:
        sharded: what the rank holds anyway, `resting` or `frozen_weights`.
    """
    s, value = settings.compute_bytes, settings.value_head
    root = {
        "unsharded embedding and head": float(s * shape.root_parameters(value_head=value)),
        # On several ranks the flat buffer of a block lives until the next one is gathered.
        "unsharded block": float(s * shape.block_parameters * (2 if settings.gathers else 1)),
    }
    working = formulas.block_forward(shape, settings.tokens, s)
    moments = [
        _moment("block", settings, sharded=sharded, computing=root | {"activations": working})
    ]
    if not value:
        logits = formulas.logits_forward(shape, settings.response_tokens, settings.chunk_tokens, s)
        at_head = {
            "unsharded embedding and head": root["unsharded embedding and head"],
            "gathered ahead": float(s * shape.block_parameters) if settings.gathers else 0.0,
            "activations": formulas.block_input(shape, settings.response_tokens, s),
            "logits": logits,
        }
        moments.append(_moment("logits", settings, sharded=sharded, computing=at_head))
    return tuple(moments)


def sync_moments(
    shape: ModelShape, settings: RankSettings, *, engine_bytes: int, bucket_bytes: int
) -> tuple[Moment, ...]:
    """Return the moment of rank 0 in a weight sync: one weight, and one bucket for the engines.

        host:  4 w, the largest weight in float32, except where a single rank on a CPU has it
               already; a bucket of `bucket_bytes`, or of one weight where that is larger (e w, e
               bytes in the engine); it is a view where nothing is gathered or cast
        ranks: each has a block of rows of the weight; see `_rows`

    The copies in the object store are not counted here.

    **Source:** `FSDP2Backend.weights`, `rlsys.models.weights.buckets_of`.
    """
    largest = _largest_weight(shape)
    bucket = min(engine_bytes * shape.parameters(), max(bucket_bytes, engine_bytes * largest))
    if _is_in_place(settings) and engine_bytes == formulas.FLOAT32:
        bucket = 0
    return (
        _moment(
            "a bucket filled",
            settings,
            sharded=resting(shape, settings),
            computing=_rows(largest, settings),
            host={"gathered weight": _gathered(largest, settings), "bucket": float(bucket)},
        ),
    )


def _largest_weight(shape: ModelShape) -> int:
    """Return the parameters w of the largest weight: V h, h i or h q."""
    widths = (shape.vocabulary, shape.intermediate, shape.query_width)
    return shape.hidden * max(widths)


def _is_in_place(settings: RankSettings) -> bool:
    """Return whether weights are whole, and on a CPU where they have to be: nothing is copied."""
    return settings.ranks == 1 and not settings.on_gpu


def _gathered(parameters: int, settings: RankSettings) -> float:
    """Return the host memory of a gathered weight in float32."""
    return 0.0 if _is_in_place(settings) else float(formulas.FLOAT32 * parameters)


def _rows(parameters: int, settings: RankSettings) -> dict[str, float]:
    """Return what several ranks exchange of a weight at a time: the rows of all, and their own.

    **Source:** `gathered` of `backends/fsdp2.py`.
    """
    if settings.ranks == 1:
        return {}
    of_all = min(GATHERED_BYTES, formulas.FLOAT32 * parameters)
    return {"exchanged rows": of_all * (1 + 1 / settings.ranks)}


def checkpoint_moments(shape: ModelShape, settings: RankSettings) -> tuple[Moment, ...]:
    """Return the moment of a rank in a checkpoint, in which it writes the largest weight.

        host:  4 w, as in a sync; one rank at a time has a whole weight

    The optimizer's state is written from where it is, from a GPU one shard at a time.

    **Source:** `FSDP2Backend.save`, `sharded_checkpoint.save_weights`.
    """
    largest = _largest_weight(shape)
    return (
        _moment(
            "a weight written",
            settings,
            sharded=resting(shape, settings),
            computing=_rows(largest, settings),
            host={"gathered weight": _gathered(largest, settings)},
        ),
    )


def with_checkpoint_copy(
    shape: ModelShape, settings: RankSettings, moments: tuple[Moment, ...]
) -> tuple[Moment, ...]:
    """Return the moments of a phase with the copy from which checkpoints are written.

        host:  12 P / R, masters and moments once more, with `trainer.checkpoints.asynchronous`

    The rank keeps that memory from its first such checkpoint on. The weights are divided by whole
    tensors, so that a rank may have up to one weight more than that.

    **Source:** `BackgroundFiles`, `WeightPlan`.
    """
    if not settings.checkpoint_copy:
        return moments
    copy = {CHECKPOINT_COPY: sum(resting(shape, settings).values())}
    return tuple(replace(moment, host={**moment.host, **copy}) for moment in moments)


def setup_moments(
    shape: ModelShape, settings: RankSettings, *, frozen: bool = False
) -> tuple[Moment, ...]:
    """Return the moments of loading, until the model is sharded.

    One rank:

        host:  4 P: it loads the whole model in float32, from files that it has mapped (f P, f bytes
               in the file). Mapped pages count as resident, but the system can take them back.
        GPU:   4 P: it is moved there, and checked in float32, before it is sharded; then each unit
               is copied into its shard, 4 p / R, before the whole unit is freed

    Several ranks:

        host:  the largest weight w of the file and in float32, (4 + f) w, and the mapped files
        GPU:   4 P / R: the rows of the rank. The check runs on them; it gathers embeddings and head
               for all of its passes, 4 r, and one block at a time, 8 p with the flat buffer.

    The forward passes of the check are not counted; so this is a lower bound on a GPU. A frozen
    model is checked in float32 as well, beside its rows in the compute dtype.

    **Source:** `model_setup.prepare`, `sharded_loading`, `FSDPParam._init_sharded_param`.
    """
    if settings.ranks > 1:
        return _sharded_setup_moments(shape, settings, frozen=frozen)
    parameters = shape.parameters(value_head=settings.value_head)
    whole = float(formulas.FLOAT32 * parameters)
    loading = Moment(
        name="loading",
        host={"whole model": whole, "mapped files": float(shape.file_bytes * parameters)},
    )
    unit = max(shape.block_parameters, shape.root_parameters(value_head=settings.value_head))
    moved = {"whole model": whole, "shard of a unit": float(formulas.FLOAT32 * unit)}
    if not settings.on_gpu:
        return (loading, Moment(name="sharding", host=moved))
    return (loading, Moment(name="sharding", device=moved))


def _sharded_setup_moments(
    shape: ModelShape, settings: RankSettings, *, frozen: bool
) -> tuple[Moment, ...]:
    """Return the moments of several ranks; see `setup_moments`."""
    parameters = shape.parameters(value_head=settings.value_head)
    checked = float(formulas.FLOAT32 * parameters / settings.ranks)
    rows = settings.compute_bytes * parameters / settings.ranks if frozen else checked
    largest = max(shape.embedding_parameters, shape.mlp_parameters)

    reading = {
        "largest weight": float((formulas.FLOAT32 + shape.file_bytes) * largest),
        "mapped files": float(shape.file_bytes * parameters),
    }
    # The check shares the rows where they are float32 and on its device.
    root = shape.root_parameters(value_head=settings.value_head)
    copied = rows < checked or (settings.on_gpu and settings.offload)
    checking = {
        "rows in float32": checked if copied else 0.0,
        "embeddings and head": float(formulas.FLOAT32 * root),
        "block": float(2 * formulas.FLOAT32 * shape.block_parameters),
    }
    held = {"rows": rows}
    return (
        _moment("loading", settings, computing={}, sharded=held, host=reading),
        _moment("check", settings, computing=checking, sharded=held),
    )
