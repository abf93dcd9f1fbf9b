"""Megalodon beside megalodon-jax 0.2.1, same weights, one process, on this machine.

    python -m benchmarks.megalodon_training [--length=1024] [--case=forward]

Width 256, 2 layers, 1 head, 64 query and 512 value features, SwiGLU of 512, 16 complex states,
chunks of 256, 32 norm groups, 256 ids, float32, batch 1. Outputs are checked equal before any
time is taken. Reported: the least of seven runs of each side, alternating in both orders; the
seconds each program took to trace, lower and compile, the least of two; its temporary memory, and
`ordered` that of the same program in XLA's order of least memory instead of its default one for
CPU, which starts early whatever can run beside something else. Our layers are written out where
gradients are taken, and a loop in the forward pass. Packed rows hold documents of 300 tokens. The
continuation reads 256 tokens after the length, a step one token. Arguments choose a part, which is
printed and not kept.
"""

import functools
import json
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks import reporting
from benchmarks.timing import times_in_turn
from blt_jax.dist.huge_pages import use_huge_pages

LENGTHS = (1024, 8192)
CASES = ("forward", "gradient", "packed", "continuation", "step")
TARGETS = {"forward": 4.0, "gradient": 2.5, "packed": 2.5, "continuation": 5.0, "step": 1.3}
RUNS = 7
DOCUMENT = 300
ORDERED = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@functools.cache
def both_models(scan_layers: bool = False):
    import equinox as eqx
    import jax

    from benchmarks.megalodon_peer import make_peer
    from blt_jax.dist.sharding import init_params
    from blt_jax.models import megalodon

    config = megalodon.MegalodonConfig(
        vocab_size=256,
        num_layers=2,
        d_model=256,
        num_heads=1,
        qk_dim=64,
        value_dim=512,
        mlp_dim=512,
        swiglu=True,
        chunk_size=256,
        norm_groups=32,
        scan_layers=scan_layers,
    )
    model = config.build()
    params = init_params(model, jax.random.key(0))
    return model, params, *eqx.partition(make_peer(config, params), eqx.is_array)


def tokens_of(length: int):
    import jax

    return jax.random.randint(jax.random.key(1), (1, length), 0, 256, "int32")


def forward_case(length: int):
    import equinox as eqx

    model, params, arrays, static = both_models(scan_layers=True)
    ours = lambda params, tokens: model.apply({"params": params}, tokens).logits  # noqa: E731
    theirs = lambda arrays, tokens: eqx.combine(arrays, static)(tokens)[0]  # noqa: E731
    tokens = tokens_of(length)
    return (ours, (params, tokens)), (theirs, (arrays, tokens))


def gradient_case(length: int, packed: bool = False):
    """Mean loss of predicting the next token of the same document, and its gradient."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    model, params, arrays, static = both_models()
    tokens, segments = tokens_of(length), None
    mask = jnp.arange(length)[None] < length - 1
    if packed:
        segments = jnp.arange(length, dtype=jnp.int32)[None] // DOCUMENT + 1
        mask &= segments == jnp.roll(segments, -1, axis=1)

    def ours(params, tokens, segments):
        batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1), "target_mask": mask}
        batch["target_bytes"] = jnp.ones_like(tokens)
        if segments is not None:
            batch["segment_ids"] = segments

        def loss(params):
            sums = model.loss(params, batch)
            return sums.objective / sums.weight

        return jax.value_and_grad(loss)(params)

    def theirs(arrays, tokens, segments):
        def loss(arrays):
            peer = eqx.combine(arrays, static)
            return peer.compute_loss(tokens, tokens, segment_ids=segments)

        return jax.value_and_grad(loss)(arrays)

    return (ours, (params, tokens, segments)), (theirs, (arrays, tokens, segments))


def cached_case(length: int, new: int):
    """`new` tokens after `length` known ones; the known ones are read before the clock starts."""
    import equinox as eqx
    import jax

    from blt_jax.models.megalodon_decode import MegalodonDecoder

    model, params, arrays, static = both_models()
    tokens = tokens_of(length + new)
    known, unknown = tokens[:, :length], tokens[:, length:]
    decoder = MegalodonDecoder.create(model, params).prepare()
    lengths = np.array([length], np.int32)
    _, cache = jax.jit(MegalodonDecoder.prefill)(decoder, known, lengths)

    def ours(decoder, cache, unknown):
        if new == 1:
            logits, cache = decoder.step(unknown[:, 0], cache)
            return logits[:, None], cache
        return decoder.extend_logits(unknown, cache)

    def theirs(arrays, cache, tokens):
        return eqx.combine(arrays, static)(tokens, cache=cache, return_cache=True)

    read = jax.jit(lambda a, x: eqx.combine(a, static)(x, return_cache=True))
    peer_cache = read(arrays, known)[1]
    return (ours, (decoder, cache, unknown)), (theirs, (arrays, peer_cache, unknown))


def make_case(case: str, length: int):
    """(function, arguments) of our side and of the peer's."""
    if case == "forward":
        return forward_case(length)
    if case in ("gradient", "packed"):
        return gradient_case(length, case == "packed")
    return cached_case(length, 1 if case == "step" else 256)


def check_equal(case: str, ours, theirs) -> float:
    """Largest difference of what both computed; raises RuntimeError where it is no rounding."""
    import jax
    import jax.numpy as jnp

    from benchmarks.megalodon_peer import carried_over

    if case in ("gradient", "packed"):
        mapped = carried_over(theirs[1], ours[1], both_models()[0].config)
        pairs = [(ours[0], theirs[0])]
        pairs += zip(jax.tree.leaves(mapped), jax.tree.leaves(theirs[1]), strict=True)
        tolerance = 2e-4
    else:
        first = (lambda x: x) if case == "forward" else (lambda x: x[0])
        pairs, tolerance = [(first(ours), first(theirs))], 2e-4
    worst = max(float(jnp.abs(a - b).max()) for a, b in pairs)
    if not worst < tolerance:
        raise RuntimeError(f"{case}: the outputs differ by {worst}")
    return worst


def measure(case: str, length: int) -> dict:
    """One row of the table."""
    import jax

    sides, outputs, row = {}, [], {"case": case, "length": length}
    for name, (function, arguments) in zip(("ours", "peer"), make_case(case, length), strict=True):
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            program = jax.jit(lambda *x, f=function: f(*x)).lower(*arguments).compile()
            seconds.append(time.perf_counter() - start)
        row[f"{name}_compile_seconds"] = min(seconds)
        ordered = jax.jit(function).lower(*arguments).compile(compiler_options=ORDERED)
        for order, compiled in (("temporary", program), ("ordered", ordered)):
            memory = compiled.memory_analysis()
            row[f"{name}_{order}_mib"] = memory.temp_size_in_bytes / 2**20
        sides[name] = functools.partial(program, *arguments)
        outputs.append(jax.block_until_ready(sides[name]()))
    row["largest_difference"] = check_equal(case, *outputs)
    del outputs
    times = times_in_turn(sides, RUNS)
    for name, seconds in times.items():
        row[f"{name}_milliseconds"] = 1e3 * min(seconds)
    row["ratio"] = row["peer_milliseconds"] / row["ours_milliseconds"]
    row["target"] = TARGETS[case]
    row["compile_ratio"] = row["peer_compile_seconds"] / row["ours_compile_seconds"]
    row["times"] = list(times.values())
    return row


def main(argv: list[str]) -> None:
    options = dict(argument.removeprefix("--").split("=") for argument in argv)
    lengths = [int(options["length"])] if "length" in options else LENGTHS
    cases = [options["case"]] if "case" in options else CASES
    rows = []
    for length in lengths:
        for case in cases:
            rows.append(measure(case, length))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "times"}), flush=True)
    if not options:
        reporting.save("megalodon_training", __doc__, rows)


if __name__ == "__main__":
    use_huge_pages()
    main(sys.argv[1:])
