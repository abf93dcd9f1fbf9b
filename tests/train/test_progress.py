"""Progress lines and the bar on a terminal."""

import sys

import jax

from blt_jax.train.progress import Progress, format_duration, format_line, format_utilization


def test_line_of_a_log_step():
    numbers = {"loss": 1.23456, "bits_per_byte": 1.78, "bytes_per_second": 51234.0}
    assert format_line(1200, 5000, numbers, 750.4, jax.devices()[0]) == (
        "step 1200/5000 loss 1.2346 bpb 1.7800 bytes/s 5.12e+04 "
        "mfu n/a: unknown device cpu eta 00:12:30"
    )
    assert format_utilization(0.4149, jax.devices()[0]) == "41%"
    assert format_duration(100.0 * 3600 + 61.2) == "100:01:01"


def test_no_bar_without_a_terminal(capsys):
    progress = Progress(10)
    progress.line("a line")
    progress.update()
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == "a line\n"
    assert captured.err == ""


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(10, start=4)
    progress.update(3)
    progress.line("a line")
    progress.close()
    captured = capsys.readouterr()
    assert "a line" in captured.out
    assert "7/10" in captured.err
