"""The formulas against hand-computed numbers, real models, and what autograd really saves."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlsys.config.errors import ConfigError
from rlsys.data.packing import SegmentGroup
from rlsys.plan import formulas, roles
from rlsys.plan.roles import (
    CHECKPOINT_COPY,
    Peak,
    RankSettings,
    checkpoint_moments,
    forward_moments,
    resting,
    setup_moments,
    sync_moments,
    update_moments,
    with_checkpoint_copy,
)
from rlsys.plan.shapes import LLAMA_LIKE, NAMED_SHAPES, ModelShape, shape_of_config
from workers.training.backends import fsdp2
from workers.training.packed_attention import PackedLayout, register_packed_attention

# q = 8, k = 4. Block: 2 * 8 * (8 + 4) = 192, 3 * 8 * 16 = 384, norms 16: 592.
# Root: 32 * 8 = 256 and a norm of 8: 264. In all 2 * 592 + 264 = 1448.
SMALL = ModelShape(
    hidden=8,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate=16,
    vocabulary=32,
    head_dim=4,
    tied=True,
    file_bytes=4,
)
ONE_RANK = RankSettings(
    ranks=1,
    compute_bytes=4,
    tokens=10,
    response_tokens=6,
    chunk_tokens=4,
    kernel="shared_prefix",
    group_tokens=10,
)


def host_peak(moments: tuple) -> tuple[str, float]:
    peak = Peak.of("", moments).host
    return peak.name, peak.host_bytes


def test_parameters_by_hand():
    assert SMALL.block_parameters == 592
    assert SMALL.root_parameters() == 264
    assert SMALL.parameters() == 1448
    assert replace(SMALL, tied=False).parameters() == 1448 + 256
    assert SMALL.parameters(value_head=True) == 1448 + 8


def test_sharded_tensors_by_hand():
    assert formulas.masters(1448, 2) == 2896
    assert formulas.moments(1448, 2) == 5792
    assert formulas.gradients(1448, 2) == 2896


@pytest.mark.parametrize(
    ("compute_bytes", "expected"),
    [
        (4, 10 * (2 * (4 + 4 + 4) * 8 + 4 * 4 * 16)),  # 4480
        (2, 10 * (2 * (4 + 2 + 2) * 8 + 4 * 2 * 16)),  # 2560
    ],
)
def test_activations_of_a_block_by_hand(compute_bytes: int, expected: int):
    assert formulas.block_activations(SMALL, 10, compute_bytes) == expected


def test_attention_by_hand():
    def saved(kernel: str) -> float:
        return formulas.attention_saved(SMALL, 10, 4, kernel=kernel, group_tokens=6)

    assert saved("shared_prefix") == saved("flash") == 10 * 4 * (8 + 4 + 4 + 8) + 4 * 10 * 2
    assert saved("sdpa") == 10 * 4 * 5 * 8 + 4 * 10 * 2 + 10 * 4 * 6
    with pytest.raises(ValueError, match="kernel: 'other'"):
        saved("other")


def test_logits_by_hand():
    # A tile of 4 x 32 float32 numbers has 512 bytes, the gradient of the head 32 * 8 * 4 = 1024.
    assert formulas.logits_forward(SMALL, 4, 4, 4) == 2 * 512
    assert formulas.logits_forward(SMALL, 6, 4, 4) == 3 * 512
    assert formulas.logits_forward(SMALL, 6, 4, 2) == 3 * 512 + 256
    assert formulas.logits_backward(SMALL, 4, 4, 4) == 3 * 512 + 1024
    assert formulas.logits_backward(SMALL, 6, 4, 4) == 4 * 512 + 1024
    # bfloat16: 3 tiles, one of half the size, the head's part in bfloat16 and in float32
    assert formulas.logits_backward(SMALL, 6, 4, 2) == 3 * 512 + 256 + 512 + 1024 + 1024
    on_gpu = formulas.logits_backward(SMALL, 6, 4, 2, on_gpu=True)
    assert on_gpu == max(4 * 512 + 256, 3 * 512 + 256 + 512) + 1024
    assert formulas.logits_backward(SMALL, 6, 4, 4, entropy_bonus=True) == 6 * 512 + 1024


def test_cache_by_hand():
    # 2 layers, a key and a value of one head of 4 numbers, 2 bytes each, for 10 tokens
    assert formulas.kv_cache(SMALL, 10, 2) == 2 * 2 * 4 * 2 * 10
    assert formulas.kv_cache(SMALL, 10, 2, tensor_parallel=2) == 2 * 2 * 4 * 2 * 10
    two_heads = replace(SMALL, kv_heads=2)
    assert formulas.kv_cache(two_heads, 10, 2, 2) == formulas.kv_cache(two_heads, 10, 2) / 2


def test_peaks_of_an_update_by_hand():
    # Blocks: 2 * (4480 + 1040); last norm: 10 * 8 * (4 + 4); hidden states: 6 * 8 * 4.
    activations = 2 * (4480 + 1040) + 640 + 192
    held, root = 12 * 1448, 4 * 264
    moments = {moment.name: moment.host_bytes for moment in update_moments(SMALL, ONE_RANK)}
    assert moments["logits"] == held + 4 * 1448 + root + activations + 3072
    # Beside the activations: gradients in the MLP, the unsharded block, the head's gradient.
    in_block = 4 * (2 * 10 * 16 + 2 * 10 * 8 + 2 * 8 * 16) + 4 * 592 + 4 * 256
    assert moments["last block"] == held + 4 * 1448 + root + activations + in_block
    assert moments["embedding gradient"] == held + 4 * 1448 + root + 2 * 1024 + 4 * 592
    assert moments["root reduction"] == held + 4 * 1448 + 264 * (4 + 4)
    assert moments["optimizer"] == held + 4 * 1448

    # The only pack of a step finds no gradients, and reduces those of the blocks first.
    single = update_moments(SMALL, replace(ONE_RANK, several_packs=False))
    alone = {moment.name: moment.host_bytes for moment in single}
    assert alone["logits"] == moments["logits"] - 4 * 1448
    assert alone["root reduction"] == held + 4 * 2 * 592 + 264 * (4 + 4)


def test_peaks_of_the_other_phases_by_hand():
    rested = resting(SMALL, ONE_RANK)
    block = 12 * 1448 + 4 * 264 + 4 * 592 + 4 * 10 * (3 * 16 + 2 * 8)
    assert host_peak(forward_moments(SMALL, ONE_RANK, rested)) == ("block", block)

    two = replace(ONE_RANK, ranks=2)
    # The largest weight is the embedding, 256. A bucket of 1000 bytes holds more than that of 512.
    for ranks, size, expected in (
        (ONE_RANK, 4, 12 * 1448),  # nothing is gathered or cast
        (ONE_RANK, 2, 12 * 1448 + 1000),
        (two, 2, 6 * 1448 + 4 * 256 + 1000 + 4 * 256 * 1.5),
    ):
        synced = sync_moments(SMALL, ranks, engine_bytes=size, bucket_bytes=1000)
        assert host_peak(synced)[1] == expected
    (wide,) = sync_moments(SMALL, two, engine_bytes=2, bucket_bytes=100)
    assert wide.host["bucket"] == 2 * 256
    assert host_peak(checkpoint_moments(SMALL, ONE_RANK))[1] == 12 * 1448
    assert host_peak(checkpoint_moments(SMALL, two))[1] == 6 * 1448 + 4 * 256 * 2.5
    assert host_peak(setup_moments(SMALL, ONE_RANK)) == ("loading", (4 + 4) * 1448)
    # A half of the rows; the embedding, 256, as it is read, and the mapped file.
    read = 4 * 1448 / 2 + (4 + 4) * 256 + 4 * 1448
    assert host_peak(setup_moments(SMALL, two)) == ("loading", read)


def test_checkpoints_in_the_background_need_masters_and_moments_once_more():
    two = replace(ONE_RANK, ranks=2, checkpoint_copy=True)
    moments = checkpoint_moments(SMALL, two)
    (copied,) = with_checkpoint_copy(SMALL, two, moments)
    assert copied.host_bytes == moments[0].host_bytes + 6 * 1448
    on_gpu = replace(two, on_gpu=True)
    (copied,) = with_checkpoint_copy(SMALL, on_gpu, checkpoint_moments(SMALL, on_gpu))
    assert copied.host[CHECKPOINT_COPY] == 6 * 1448
    assert CHECKPOINT_COPY not in copied.device

    at_once = replace(two, checkpoint_copy=False)
    assert with_checkpoint_copy(SMALL, at_once, moments) == moments


def test_the_exchanged_rows_are_those_of_the_backend():
    assert roles.GATHERED_BYTES == fsdp2.GATHERED_BYTES


def test_on_a_gpu_set_up_needs_the_whole_model_on_one_rank_only():
    on_gpu = replace(ONE_RANK, on_gpu=True)
    device = Peak.of("", setup_moments(SMALL, on_gpu)).device
    assert device.device["whole model"] == 4 * 1448

    # Its rows; embeddings and head, 264, and a block, 592, which is gathered through a buffer.
    gathered = 4 * 264 + 8 * 592
    for ranks in (2, 8, 64):
        settings = replace(on_gpu, ranks=ranks)
        rows = 4 * 1448 / ranks
        assert Peak.of("", setup_moments(SMALL, settings)).device.device_bytes == rows + gathered

        # The check copies rows that are in host memory, or in bfloat16.
        away = Peak.of("", setup_moments(SMALL, replace(settings, offload=True)))
        assert away.device.device_bytes == rows + gathered
        assert away.host.host["rows"] == rows
        half = replace(settings, compute_bytes=2)
        frozen = Peak.of("", setup_moments(SMALL, half, frozen=True)).device
        assert frozen.device_bytes == 1.5 * rows + gathered


def test_offload_moves_the_sharded_tensors_to_the_host():
    on_gpu = replace(ONE_RANK, on_gpu=True)
    here, away = (
        {moment.name: moment for moment in update_moments(SMALL, settings)}
        for settings in (on_gpu, replace(on_gpu, offload=True))
    )
    for name, moment in here.items():
        sharded = {"masters", "moments", "gradients"} & moment.device.keys()
        assert not sharded & away[name].device.keys()
        assert all(away[name].host[part] == moment.device[part] for part in sharded)
        assert moment.host_bytes == 0


@pytest.mark.parametrize("moments", [update_moments, checkpoint_moments, setup_moments])
def test_memory_grows_with_every_size_of_the_model(moments):
    base = host_peak(moments(SMALL, ONE_RANK))[1]
    for name in ("hidden", "layers", "intermediate", "vocabulary"):
        larger = replace(SMALL, **{name: 2 * getattr(SMALL, name)})
        assert host_peak(moments(larger, ONE_RANK))[1] > base


def test_an_update_grows_with_tokens_and_shrinks_with_ranks_and_checkpointing():
    shape = NAMED_SHAPES["7b"]
    settings = replace(ONE_RANK, tokens=4096, response_tokens=4096, chunk_tokens=256)

    def peak(**changes: object) -> float:
        return host_peak(update_moments(shape, replace(settings, **changes)))[1]

    assert peak(tokens=8192) > peak()
    assert peak(chunk_tokens=2048) > peak()
    assert peak(ranks=8) < peak(ranks=4) < peak(ranks=2)
    assert peak(gradient_checkpointing=True) < peak()
    assert peak(compute_bytes=2) < peak()


def test_an_entropy_bonus_adds_tiles_of_logits():
    with_bonus = update_moments(SMALL, replace(ONE_RANK, entropy_bonus=True))
    logits = {
        moment.name: moment.host["logits"] for moment in with_bonus if "logits" in moment.host
    }
    assert logits == {"logits": 6 * 512 + 1024}


def test_what_is_no_size_is_refused():
    with pytest.raises(ValueError, match="layers: 0 is not above 0"):
        replace(SMALL, layers=0)
    with pytest.raises(ValueError, match="kv_heads: 3 does not divide"):
        replace(SMALL, kv_heads=3)
    with pytest.raises(ValueError, match="ranks: 0"):
        replace(ONE_RANK, ranks=0)
    with pytest.raises(ValueError, match="compute_bytes: 1"):
        replace(ONE_RANK, compute_bytes=1)


def model_of(kind: str, layers: int = 2, *, tied: bool = True) -> tuple:
    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
        head_dim=8,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        sliding_window=None,
    )
    shape = shape_of_config(config.to_dict(), source="the test")
    return AutoModelForCausalLM.from_config(config), shape


@pytest.mark.parametrize("kind", LLAMA_LIKE)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_real_model(kind: str, tied: bool):
    model, shape = model_of(kind, tied=tied)
    assert shape.parameters() == sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize("kind", LLAMA_LIKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_saves(kind: str, dtype: torch.dtype):
    """Each storage that a layer saves counts once; parameters are not activations."""
    tokens = 24
    name = register_packed_attention("sdpa")

    def saved(layers: int) -> tuple[int, ModelShape]:
        model, shape = model_of(kind, layers)
        model = model.to(dtype)
        model.set_attn_implementation(name)
        parameters = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        found: dict[int, int] = {}
        kept = []  # so that no address is used twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
            return tensor

        layout = PackedLayout([SegmentGroup(0, 6, (9, 9))], torch.device("cpu"))
        positions = torch.cat([torch.arange(15), torch.arange(6, 15)])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.model(
                input_ids=torch.arange(tokens)[None],
                position_ids=positions[None],
                use_cache=False,
                packed_layout=layout,
            )
        assert output.last_hidden_state.shape == (1, tokens, 32)
        return sum(found.values()), shape

    three, shape = saved(3)
    two, _ = saved(2)
    expected = formulas.block_activations(shape, tokens, dtype.itemsize)
    expected += formulas.attention_saved(
        shape, tokens, dtype.itemsize, kernel="shared_prefix", group_tokens=tokens
    )
    # The formulas leave out vectors: a float32 number of each norm, for each token or head.
    norms = 2 + (shape.heads + shape.kv_heads if shape.qk_norm else 0)
    assert three - two == expected + 4 * tokens * norms


def test_another_architecture_is_refused():
    with pytest.raises(ConfigError, match="of type 'gemma2'"):
        shape_of_config({"model_type": "gemma2"}, source="config.json")
    with pytest.raises(ConfigError, match="no number hidden_size"):
        shape_of_config({"model_type": "llama"}, source="config.json")
