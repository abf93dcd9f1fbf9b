"""Training steps of BLT beside `transformers.BltForCausalLM`, alternating, on this machine.

    python -m benchmarks.blt_training [--quick]

Both sides make the whole step (loss, gradients, clip 1.0, AdamW) in float32 on two threads, on the
same bytes. Reported: medians of five alternations and their ratio; variable against regular
patches; time per doubling; peak memory of fresh processes. The table goes to benchmarks/results/.
"""

import json
import os
import resource
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks import blt_peer, reporting
from blt_jax.dist.huge_pages import use_huge_pages

BATCH = 2
ALTERNATIONS = 5


def tokens_of(num_bytes: int) -> np.ndarray:
    """Tokens [BATCH, num_bytes + 1] of the standard library's text."""
    from blt_jax.data.loader import DataConfig, loader

    config = DataConfig(batch_size=BATCH, sequence_length=num_bytes, shuffle=False, num_threads=0)
    batch = next(iter(loader(config)))
    return np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1).astype(np.int64)


def make_config(num_patches: int):
    """The configuration of `blt_peer` in our terms."""
    from blt_jax.layers.transformer import TransformerConfig
    from blt_jax.models import blt

    def stack(layers, width, mlp_dim, window=0):
        return TransformerConfig(
            num_layers=layers,
            d_model=width,
            num_heads=blt_peer.HEADS,
            mlp_dim=mlp_dim,
            window=window,
            scan_layers=False,
        )

    local = (blt_peer.LOCAL_WIDTH, blt_peer.LOCAL_MLP, blt_peer.WINDOW)
    return blt.BLTConfig(
        local_encoder=stack(blt_peer.ENCODER_LAYERS, *local),
        latent=stack(blt_peer.LATENT_LAYERS, blt_peer.LATENT_WIDTH, blt_peer.LATENT_MLP),
        local_decoder=stack(blt_peer.DECODER_LAYERS, *local),
        ngrams=blt.NgramConfig(sizes=blt_peer.HASH_SIZES, vocab_size=blt_peer.HASH_VOCAB),
        cross_attn_k=blt_peer.NUM_PATCH_VECTORS,
        encoder_cross_attention=blt.EncoderCrossAttention.LAST,
        max_patches=num_patches,
    )


def our_train_step(tokens: np.ndarray, lengths: np.ndarray):
    """A function that makes one step of `blt_jax.train` and returns the loss."""
    import jax
    import jax.numpy as jnp

    from blt_jax.dist.mesh import make_mesh
    from blt_jax.train import state as state_lib
    from blt_jax.train.optimizer import OptimizerConfig, make_optimizer
    from blt_jax.train.state import AveragingConfig
    from blt_jax.train.step import compile_step, make_train_step

    model = make_config(len(lengths)).build()
    shapes = state_lib.abstract_params(model)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    if count != blt_peer.PEER_PARAMETERS:
        raise RuntimeError(f"our model has {count} parameters, the peer {blt_peer.PEER_PARAMETERS}")
    averaging, optimizer_config = AveragingConfig(), OptimizerConfig()
    rate = lambda step: jnp.float32(4e-4)  # noqa: E731
    optimizer = make_optimizer(optimizer_config, shapes, rate)
    mesh = make_mesh(devices=jax.devices()[:1])
    state = state_lib.create_state(model, optimizer, averaging, jax.random.key(0), mesh)
    shardings = state_lib.state_shardings(
        model, optimizer, state_lib.abstract_state(model, optimizer, averaging), mesh
    )
    starts = np.zeros(tokens.shape, bool)
    starts[:, np.cumsum(lengths) - lengths] = True
    inputs = tokens[:, :-1].astype(np.int32)
    batch = {
        "tokens": inputs,
        "targets": tokens[:, 1:].astype(np.int32),
        "starts": starts,
        "segment_ids": np.ones_like(inputs),
        "positions": np.tile(np.arange(inputs.shape[1], dtype=np.int32), (len(inputs), 1)),
        "target_mask": np.ones(inputs.shape, bool),
        "target_bytes": np.ones_like(inputs),
    }
    batch = jax.device_put({name: value[None] for name, value in batch.items()})
    train_step = make_train_step(model.loss, optimizer, optimizer_config, rate, averaging)
    compiled = compile_step(train_step, state, shardings, batch, mesh)
    holder = [state]

    def step() -> float:
        holder[0], metrics = compiled(holder[0], batch)
        return float(metrics["objective"]) / float(metrics["weight"])

    return step


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_memory(side: str, num_bytes: int) -> float:
    """GiB of a fresh process that makes three steps of one side."""
    command = [sys.executable, "-m", "benchmarks.blt_training", f"--memory={side}:{num_bytes}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def _memory_worker(side: str, num_bytes: int) -> None:
    tokens, lengths = tokens_of(num_bytes), blt_peer.strided_lengths(num_bytes)
    make = our_train_step if side == "ours" else blt_peer.peer_train_step
    step = make(tokens, lengths)
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main(argv: list[str]) -> None:
    for argument in argv:
        if argument.startswith("--memory="):
            side, num_bytes = argument.removeprefix("--memory=").split(":")
            return _memory_worker(side, int(num_bytes))
    import torch

    torch.set_num_threads(2)
    sizes = (1024, 4096) if "--quick" in argv else (1024, 4096, 8192)
    rows = []
    for num_bytes in sizes:
        tokens = tokens_of(num_bytes)
        regular, variable = (
            blt_peer.strided_lengths(num_bytes),
            blt_peer.variable_lengths(num_bytes),
        )
        sides = {
            "ours": our_train_step(tokens, regular),
            "ours_variable": our_train_step(tokens, variable),
            "peer": blt_peer.peer_train_step(tokens, regular),
        }
        for step in sides.values():
            step()
        times = {name: [] for name in sides}
        for _ in range(ALTERNATIONS):
            for name, step in sides.items():
                times[name].append(seconds(step))
        median = {name: float(np.median(values)) for name, values in times.items()}
        del sides
        row = {
            "bytes_per_row": num_bytes,
            "ours_seconds": median["ours"],
            "peer_seconds": median["peer"],
            "ours_bytes_per_second": BATCH * num_bytes / median["ours"],
            "peer_bytes_per_second": BATCH * num_bytes / median["peer"],
            "ratio": median["peer"] / median["ours"],
            "variable_over_regular": median["ours_variable"] / median["ours"],
            "ours_peak_gib": peak_memory("ours", num_bytes),
            "peer_peak_gib": peak_memory("peer", num_bytes),
            "times": times,
        }
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "times"}), flush=True)
    for small, large in zip(rows, rows[1:], strict=False):
        doublings = np.log2(large["bytes_per_row"] / small["bytes_per_row"])
        large["time_per_doubling"] = (large["ours_seconds"] / small["ours_seconds"]) ** (
            1 / doublings
        )
    reporting.save("blt_training", __doc__, rows)


if __name__ == "__main__":
    use_huge_pages()
    main(sys.argv[1:])
