"""Memory of a run by role, rank and phase, computed before anything is started.

    shapes      the sizes of a model that its memory depends on
    formulas    pure functions: bytes of weights, gradients, activations, logits, KV cache
    roles       the peaks of each role in each phase
    gpus        memory of types of GPUs
    proposals   settings with which a model fits on some GPUs

`python -m rlsys.plan` prints it. It imports neither torch nor NumPy.
"""
