"""The recurrence beside its other forms: batch 2, length 2048, D = 1024, N = 16, float32.

Medians of calls in alternation, and the temporary memory of the compiled program. "reference" is
`jax.lax.scan` token by token, "associative" is `jax.lax.associative_scan` and runs, for its memory
and compile time, on an eighth of the channels: its times and memory here are 8 times those
measured. "packed" resets the state every 500 tokens. `ratio` is the time of the form
over that of "xla" in the same rows, `per doubling` the time over that of half the length.
"""

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks.kernels import medians, with_gradients
from pallas_kernels.cema_scan.shapes import Shape, make_arguments

LENGTH, WIDTH, SIZE = 2048, 1024, 16
FORMS = {"xla": 1, "reference": 1, "fft": 1, "associative": 8}
"""Form -> the part of the channels left out of its measurement."""


def rows() -> list[dict]:
    table = []
    for packed in (False, True):
        for gradients in (False, True):
            forms = [f for f in FORMS if not (packed and f == "fft")]
            measured = measure(LENGTH, packed, gradients, forms)
            times = medians(
                {form: run for form, (run, _) in measured.items()}, alternations=3, limit=6.0
            )
            for form, (_, memory) in measured.items():
                part = FORMS[form]
                table.append(
                    {
                        "form": form,
                        "length": LENGTH,
                        "what": "value and gradients" if gradients else "value",
                        "packed": packed,
                        "ms": part * times[form],
                        "temporary MB": part * memory / 1e6,
                        "ratio": part * times[form] / times["xla"],
                    }
                )
    return table + doublings()


def doublings() -> list[dict]:
    """The portable form at twice and four times the length."""
    table, before = [], None
    for length in (LENGTH, 2 * LENGTH, 4 * LENGTH):
        ((run, memory),) = measure(length, False, True, ["xla"]).values()
        time = medians({"xla": run}, alternations=3)["xla"]
        row = {"form": "xla", "length": length, "what": "value and gradients", "packed": False}
        row |= {"ms": time, "temporary MB": memory / 1e6}
        if before is not None:
            row["per doubling"] = time / before
            table.append(row)
        before = time
    return table


def measure(length: int, packed: bool, gradients: bool, forms: list[str]) -> dict:
    """form -> (a call of it, bytes of temporary memory)."""
    found = {}
    for form in forms:
        resets = tuple(range(0, length, 500)) if packed else None
        shape = Shape(
            name="timed",
            rows=2,
            length=length,
            width=WIDTH // FORMS[form],
            size=SIZE,
            resets=resets,
        )
        arguments = make_arguments(shape)
        floats = jax.tree.map(jnp.asarray, (arguments.x, arguments.coefficients, arguments.state))
        reset = None if arguments.reset is None else jnp.asarray(arguments.reset)
        found[form] = compiled(form, gradients, floats, reset)
    return found


def compiled(form, gradients, floats, reset):
    def value(x, coefficients, state, reset):
        return pallas_kernels.cema_scan(x, *coefficients, state, reset, implementation=form)

    function = with_gradients(value) if gradients else jax.jit(lambda x, reset: value(*x, reset))
    program = function.lower(floats, reset).compile()
    memory = program.memory_analysis().temp_size_in_bytes
    return lambda: program(floats, reset), memory
