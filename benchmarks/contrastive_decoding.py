"""Greedy generation by a contrastive pair beside its expert and its amateur alone.

    python -m benchmarks.contrastive_decoding

Byte-level Llamas with random weights: an expert of 6 layers of width 256 and amateurs of 1 layer of
width 64 and of the expert's size. 128 new tokens after a prompt of 64, in one compiled program;
least of seven runs in alternation. `over parts` is the pair's time over the sum of its models'.
"""

import functools

import numpy as np

from benchmarks import reporting
from benchmarks.timing import times_in_turn
from blt_jax.dist.huge_pages import use_huge_pages

ROWS, PROMPT, NEW, RUNS = (1, 8), 64, 128, 7
EXPERT = dict(num_layers=6, d_model=256, num_heads=4)
AMATEURS = {"small": dict(num_layers=1, d_model=64, num_heads=4), "equal": EXPERT}


def make_decoder(sizes: dict, seed: int):
    """A decoder with room for prompt and new tokens."""
    import jax

    from blt_jax.decoding.decoder import token_decoder
    from blt_jax.dist.sharding import init_params
    from blt_jax.models import llama3

    model = llama3.byte_level(**sizes).build()
    return token_decoder(model, init_params(model, jax.random.key(seed)), PROMPT + NEW)


def measure(rows: int, name: str) -> list[dict]:
    """Milliseconds per step of `rows` tokens: expert, amateur and pair."""
    from blt_jax.decoding.contrastive_decoding import ContrastiveDecoder
    from blt_jax.decoding.sampling import SamplingConfig, compile_generation

    expert, amateur = make_decoder(EXPERT, 0), make_decoder(AMATEURS[name], 1)
    parts = {"expert": expert, "amateur": amateur}
    decoders = parts | {"pair": ContrastiveDecoder.create(expert, amateur)}
    tokens = np.random.default_rng(0).integers(4, 260, (rows, PROMPT)).astype(np.int32)
    prompts = tokens, np.full((rows,), PROMPT, np.int32)
    greedy = SamplingConfig(temperature=0.0)
    programs = {
        kind: functools.partial(compile_generation(each, *prompts, greedy, NEW), *prompts)
        for kind, each in decoders.items()
    }
    times = {kind: min(found) for kind, found in times_in_turn(programs, RUNS).items()}
    alone = times["expert"] + times["amateur"]
    return [
        {
            "amateur": name,
            "rows": rows,
            "decoder": kind,
            "ms_per_step": 1e3 * seconds / NEW,
            "times_expert": seconds / times["expert"],
            "over_parts": seconds / alone if kind == "pair" else None,
        }
        for kind, seconds in times.items()
    ]


def main() -> None:
    table = [row for rows in ROWS for name in AMATEURS for row in measure(rows, name)]
    reporting.save("contrastive_decoding", __doc__, table)


if __name__ == "__main__":
    use_huge_pages()
    main()
