"""The check of values that users run on their device: it passes here, and it can fail."""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import reporting
from benchmarks.kernels import __main__, roofline, values, with_gradients
from pallas_kernels import evidence

CHOSEN = [case for case in values.cases() if case.shape in ("odd", "uneven")]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.operation)
def test_right_results_pass(case):
    row = values.checked(case)
    assert row["ok"], row
    assert 0 <= row["value"] <= row["tolerance"] and 0 <= row["gradients"] <= row["tolerance"]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.operation)
def test_kernels_compile_at_the_highest_precision(case):
    function = with_gradients(functools.partial(case.function, implementation=None))
    with jax.default_matmul_precision("highest"):
        text = evidence.compile_for_tpu(function, [case.floats]).as_text()
        assert "tpu_custom_call" in text
        assert evidence.lower_for_cuda(function, [case.floats]).kernels


def test_every_operation_and_dtype_is_there():
    found = {(case.operation, case.dtype) for case in values.cases()}
    operations = {case.operation for case in CHOSEN}
    assert len(operations) == 10
    assert found == {(o, dtype) for o in operations for dtype in ("float32", "bfloat16")}


def wrong(change):
    """A case whose default form gives change(x) for x."""

    def function(x, implementation):
        return x if implementation == "reference" else change(x)

    return values.Case("identity", "four", "float32", function, (jnp.arange(1.0, 5.0),))


@pytest.mark.parametrize(
    "change", [lambda x: 1.001 * x, lambda x: x * jnp.nan, lambda x: x.at[1].set(0)]
)
def test_wrong_results_fail(change):
    assert not values.checked(wrong(change))["ok"]


def test_wrong_gradients_fail():
    row = values.checked(wrong(lambda x: x + jnp.sin(1e5 * x) / 1e5))
    assert row["value"] <= row["tolerance"] < row["gradients"] and not row["ok"]


def test_what_does_not_run_fails_with_its_message():
    def refuse(x):
        raise NotImplementedError("no such device")

    row = values.checked(wrong(refuse))
    assert not row["ok"] and row["error"] == "NotImplementedError: no such device"


@pytest.mark.parametrize("ok", [True, False])
def test_exit_status(monkeypatch, capsys, tmp_path, ok):
    monkeypatch.setattr(sys, "argv", ["kernels", "values"])
    monkeypatch.setattr(values, "rows", lambda: [{"ok": True}, {"ok": ok}])
    monkeypatch.setattr(reporting, "RESULTS", tmp_path)
    if ok:
        return __main__.main()
    with pytest.raises(SystemExit) as raised:
        __main__.main()
    assert raised.value.code == 1
    assert "1 results are wrong" in capsys.readouterr().err


def test_rows_are_kept_as_they_come_and_chosen_by_text(monkeypatch, tmp_path):
    monkeypatch.setattr(reporting, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["kernels", "values", "--only", "sum odd"])
    seen = []

    def checked(case):
        seen.append((case.operation, case.shape, len(list(tmp_path.glob("*.json")))))
        return {"operation": case.operation, "shape": case.shape, "ok": True}

    monkeypatch.setattr(values, "checked", checked)
    __main__.main()
    assert seen == [("patch_pool sum", "odd", 0)]
    monkeypatch.setattr(sys, "argv", ["kernels", "values", "--only", "patch_pool sum"])
    seen.clear()
    __main__.main()
    assert len(seen) > 5
    # Beside the finished table of the first call one that grows, for the rest of the rows.
    assert [kept for *_, kept in seen] == [1] + [2] * (len(seen) - 1)
    tables = {path.stem.split("_", 1)[1] for path in tmp_path.iterdir()}
    assert tables == {"kernels_values_sum_odd", "kernels_values_patch_pool_sum"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["values", "--only", "no such"], "no row of 'values' has this text"),
        (["roofline", "--only", "no such"], "no row of 'roofline' has this text"),
        (["patch_pool", "--only", "max"], "not possible with 'patch_pool'"),
        (["pool"], "name 'pool' is unknown"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["kernels", *arguments])
    with pytest.raises(SystemExit):
        __main__.main()
    assert message in capsys.readouterr().err


def test_traffic_of_a_device():
    """Of a maximum: x, out and ties forward; g, x, out, ties and dx backward. A mean needs less."""
    x = jax.ShapeDtypeStruct((1, 8, 4), jnp.bfloat16)
    out = jax.ShapeDtypeStruct((1, 2, 4), jnp.bfloat16)
    size, pooled = 2 * x.size, 2 * out.size
    found = {
        name: roofline.traffic(passes, (x,), out) for name, passes in roofline.PATCH_PASSES.items()
    }
    assert found["patch_pool mean"] == (size + pooled, 2 * size + 2 * pooled)
    # The ties that are kept are counted with the backward pass, which a value alone does not have.
    assert found["patch_pool max"] == (size + pooled, 3 * size + 5 * pooled)
    assert found["patch_attention"] == (size + pooled, 3 * size + 3 * pooled)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
