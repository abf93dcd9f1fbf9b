"""Training steps of BLT beside `transformers.BltForCausalLM`, alternating, on this machine.

    python -m benchmarks.blt_training [--quick]

Both sides make the whole step (loss, gradients, clip 1.0, AdamW) in float32 on two threads, on the
same bytes, each in a process of its own that waits while the other works, both with glibc's huge
pages, two steps at a time of which the second counts. Reported: medians of five alternations and
their ratio; variable against regular patches; time per doubling; peak memory of each process. The
table goes to benchmarks/results/.
"""

import itertools
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


class Worker:
    """One side in a process of its own, which makes a step when asked and else waits.

    Apart, neither side finds the other's threads still spinning or its memory in the caches.
    """

    def __init__(self, side: str, patches: str, num_bytes: int):
        name = f"--worker={side}:{patches}:{num_bytes}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.blt_training", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.step()  # waits until it is compiled

    def step(self) -> float:
        """Seconds of the second of two steps: the first finds memory that a virtual machine took
        back while the worker waited (it cost up to twice the time on either side)."""
        return self._ask("step")

    def close(self) -> float:
        """Ends the process; GiB of its largest resident memory."""
        peak = self._ask("end")
        self.process.wait()
        return peak

    def _ask(self, command: str) -> float:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def work(side: str, patches: str, num_bytes: int) -> None:
    """The loop of a worker's process."""
    lengths_of = blt_peer.variable_lengths if patches == "variable" else blt_peer.strided_lengths
    make = our_train_step if side == "ours" else blt_peer.peer_train_step
    step = make(tokens_of(num_bytes), lengths_of(num_bytes))
    step()
    for line in sys.stdin:
        if line.strip() == "end":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, flush=True)
            return
        step()
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def measure(num_bytes: int) -> dict:
    """One row of the table."""
    workers = {
        "ours": Worker("ours", "regular", num_bytes),
        "ours_variable": Worker("ours", "variable", num_bytes),
        "peer": Worker("peer", "regular", num_bytes),
    }
    times = {name: [] for name in workers}
    for _ in range(ALTERNATIONS):
        for name, worker in workers.items():
            time.sleep(0.3)
            times[name].append(worker.step())
    peaks = {name: worker.close() for name, worker in workers.items()}
    median = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "bytes_per_row": num_bytes,
        "ours_seconds": median["ours"],
        "peer_seconds": median["peer"],
        "ours_bytes_per_second": BATCH * num_bytes / median["ours"],
        "peer_bytes_per_second": BATCH * num_bytes / median["peer"],
        "ratio": median["peer"] / median["ours"],
        "variable_over_regular": median["ours_variable"] / median["ours"],
        "ours_peak_gib": peaks["ours"],
        "peer_peak_gib": peaks["peer"],
        "times": times,
    }


def main(argv: list[str]) -> None:
    for argument in argv:
        if argument.startswith("--worker="):
            side, patches, num_bytes = argument.removeprefix("--worker=").split(":")
            return work(side, patches, int(num_bytes))
    rows = []
    for num_bytes in (4096,) if "--quick" in argv else (1024, 4096, 8192):
        rows.append(measure(num_bytes))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "times"}), flush=True)
    for small, large in itertools.pairwise(rows):
        doublings = np.log2(large["bytes_per_row"] / small["bytes_per_row"])
        growth = large["ours_seconds"] / small["ours_seconds"]
        large["time_per_doubling"] = growth ** (1 / doublings)
    reporting.save("blt_training", __doc__, rows)


if __name__ == "__main__":
    use_huge_pages()
    main(sys.argv[1:])
