"""Bytes of the tensors of a model in training and sampling: pure functions of sizes.

Symbols: P parameters, R ranks, n tokens of a pack, m of them responses' tokens, h hidden size, q
and k the widths of all query and key heads of a token, i intermediate size, V vocabulary, L layers,
s bytes of a number in the compute dtype (4 float32, 2 bfloat16). All results are bytes.

What is counted are tensors of live data. Not counted: the interpreter and its libraries, the
context of a GPU, workspaces of matrix products, rows that sharding pads, vectors of n or m numbers.
"""

from __future__ import annotations

from rlsys.plan.shapes import ModelShape

FLOAT32 = 4


def masters(parameters: float, ranks: int) -> float:
    """Return the float32 weights of a rank of a trained model.

        4 P / R

    **Source:** FSDP2 shards every parameter over all ranks (`backends/fsdp2.py`).
    """
    return FLOAT32 * parameters / ranks


def moments(parameters: float, ranks: int) -> float:
    """Return AdamW's two float32 moments of a rank.

        8 P / R

    **Source:** torch.optim.AdamW keeps `exp_avg` and `exp_avg_sq` like the parameter. They exist
    from the first optimizer step on.
    """
    return 2 * FLOAT32 * parameters / ranks


def gradients(parameters: float, ranks: int) -> float:
    """Return the float32 gradients of a rank, which exist from a backward pass to the step.

        4 P / R

    **Source:** `MixedPrecisionPolicy(reduce_dtype=float32)`.
    """
    return FLOAT32 * parameters / ranks


def block_activations(shape: ModelShape, tokens: int, compute_bytes: int) -> float:
    """Return what one block keeps for its backward pass, attention's own tensors aside.

        n (2 (4 + 2 s) h + 4 s i)    and n (4 + s)(q + k) with norms of queries and keys

    Each of the two norms keeps its input in float32, the normalized input, and its output; the MLP
    keeps gate, silu(gate), up, and their product. Norms of queries and keys keep their input and
    the normalized input.

    **Source:** `LlamaRMSNorm`, `LlamaMLP` and `LlamaDecoderLayer` of transformers, and what
    autograd saves: `pow` and the products save their factors, `linear` its input, `silu` its input;
    sums and casts save nothing. A tensor that several functions save counts once.
    """
    # The input in float32, whatever the compute dtype.
    norm = FLOAT32 + 2 * compute_bytes
    head_norm = FLOAT32 + compute_bytes if shape.qk_norm else 0
    each = 2 * norm * shape.hidden
    each += 4 * compute_bytes * shape.intermediate
    each += head_norm * (shape.query_width + shape.key_width)
    return tokens * each


def attention_saved(
    shape: ModelShape, tokens: int, compute_bytes: int, *, kernel: str, group_tokens: int
) -> float:
    """Return what the attention of one block keeps for its backward pass.

        shared_prefix, flash   n s (2 q + 2 k) + 4 n heads: queries, keys, values, outputs, and a
                               float32 log-sum for each query and head
        sdpa                   n s (5 q) + 4 n heads + n s g: keys and values repeated for all query
                               heads, the outputs twice (by group, and joined for the projection),
                               and a mask of each group with its own length squared, g the longest

    Args:
        kernel: shared_prefix (sdpa on a CPU, `shared_prefix_attention.py`), flash, or sdpa (on a
            GPU, `_per_group` of `packed_attention.py`; an upper bound for its masks).
        group_tokens: tokens of the longest group: a prompt with those of its responses that share
            its computation.

    Raises:
        ValueError: another kernel.
    """
    log_sums = FLOAT32 * tokens * shape.heads
    if kernel in ("shared_prefix", "flash"):
        return tokens * compute_bytes * 2 * (shape.query_width + shape.key_width) + log_sums
    if kernel == "sdpa":
        masks = tokens * compute_bytes * min(group_tokens, tokens)
        return tokens * compute_bytes * 5 * shape.query_width + log_sums + masks
    raise ValueError(f"kernel: {kernel!r} is none of shared_prefix, flash, sdpa. Choose one.")


def last_norm(shape: ModelShape, tokens: int, compute_bytes: int) -> float:
    """Return what the norm after the last block keeps: its input and the normalized input.

        n (4 h + s h)

    Its output is read at the m predicting positions only, and freed.
    """
    return tokens * shape.hidden * (FLOAT32 + compute_bytes)


def block_input(shape: ModelShape, tokens: int, compute_bytes: int) -> float:
    """Return the input of a block, all that gradient checkpointing keeps of it.

    n s h
    """
    return tokens * shape.hidden * compute_bytes


def mlp_backward(shape: ModelShape, tokens: int, compute_bytes: int) -> float:
    """Return the gradients that live while the backward pass is in a block's MLP.

        s (2 n i + 2 n h + 2 h i)

    Those of gate, up and their product, less the product itself, which is freed by then; those of
    the residual stream and of the MLP's input; those of two of the matrices.
    """
    width = 2 * tokens * shape.intermediate + 2 * tokens * shape.hidden
    return compute_bytes * (width + 2 * shape.mlp_parameters)


def block_forward(shape: ModelShape, tokens: int, compute_bytes: int) -> float:
    """Return what lives at once in a forward pass without gradient, inside a block's MLP.

        s n (3 i + 2 h)

    The residual stream, the MLP's input, silu(gate), up, and their product.
    """
    return compute_bytes * tokens * (3 * shape.intermediate + 2 * shape.hidden)


def logits_forward(
    shape: ModelShape, response_tokens: int, chunk_tokens: int, compute_bytes: int
) -> float:
    """Return the tiles of logits that live at once in the forward pass of the LM head.

        one chunk:  2 tiles: logits and probabilities;    more: 3, since those of the chunk before
        are freed only when their names are bound again

    A tile is min(m, chunk) x V float32 numbers. In bfloat16 the product itself is a tile of half
    the size beside them.

    **Source:** `_TokenLogprobs.forward`.
    """
    tile = min(response_tokens, chunk_tokens) * shape.vocabulary
    tiles = 3 if response_tokens > chunk_tokens else 2
    product = 0 if compute_bytes == FLOAT32 else compute_bytes
    return tile * (FLOAT32 * tiles + product)


def logits_backward(
    shape: ModelShape,
    response_tokens: int,
    chunk_tokens: int,
    compute_bytes: int,
    *,
    entropy_bonus: bool = False,
    on_gpu: bool = False,
) -> float:
    """Return the tiles and the weight gradient that live at once in the LM head's backward pass.

    The largest of three moments; a tile is c x V float32 numbers:

        entering a chunk    4 tiles, 3 of them of the chunk before; bfloat16: the product, s c V
        in a chunk          3 tiles; with an entropy bonus 6, of which 3 are factors of its term
        adding its part     3 tiles; bfloat16: the gradient of the logits s c V, the part of the
                            head's gradient s V h, and on a CPU that part in float32, 4 V h

    and 4 V h in each: the gradient of the head, summed over chunks in float32.

    **Source:** `_TokenLogprobs.backward` and `HeadGradient`. On a CPU torch converts a bfloat16
    tensor that is added to a float32 one into a temporary; on a GPU the kernel converts it.
    """
    tile = min(response_tokens, chunk_tokens) * shape.vocabulary
    head = shape.embedding_parameters
    low = 0 if compute_bytes == FLOAT32 else compute_bytes

    entering = tile * (4 * FLOAT32 + low) if response_tokens > chunk_tokens else 0
    inside = tile * FLOAT32 * (6 if entropy_bonus else 3)
    converted = FLOAT32 if low and not on_gpu else 0
    adding = tile * (3 * FLOAT32 + low) + head * (low + converted)
    return max(entering, inside, adding) + FLOAT32 * head


def kv_cache(shape: ModelShape, tokens: int, cache_bytes: int, tensor_parallel: int = 1) -> float:
    """Return the keys and values of `tokens` tokens in all layers, on one GPU of an engine.

        2 L k tokens c / t,    c bytes of a number in the cache, t GPUs that share the heads

    Where t is more than the number of key heads, each GPU still has one.

    **Source:** one key and one value of each key head, layer and token.
    """
    heads = max(shape.kv_heads / tensor_parallel, 1)
    return 2 * shape.layers * heads * shape.head_dim * tokens * cache_bytes
