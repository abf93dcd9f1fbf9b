"""What a run prints: one line per log step, and a bar on a terminal."""

import sys

import jax

from blt_jax.train import flops


def format_duration(seconds: float) -> str:
    """`hh:mm:ss`."""
    seconds = round(seconds)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def format_utilization(mfu: float | None, device: jax.Device) -> str:
    """`41%`, or why it is not known."""
    if mfu is not None:
        return f"{100 * mfu:.0f}%"
    if flops.peak_flops(device.device_kind) is None:
        return flops.unknown_device(device.device_kind)
    return "n/a: the model gives no FLOPs"


def format_line(
    step: int, total: int, numbers: dict[str, float], seconds_left: float, device: jax.Device
) -> str:
    """The progress line of a log step from the numbers of `metrics.jsonl`."""
    return (
        f"step {step}/{total} loss {numbers['loss']:.4f} bpb {numbers['bits_per_byte']:.4f} "
        f"bytes/s {numbers['bytes_per_second']:.2e} "
        f"mfu {format_utilization(numbers.get('mfu'), device)} "
        f"eta {format_duration(seconds_left)}"
    )


class Progress:
    """Prints lines on process 0; with a bar below them where stderr is a terminal."""

    def __init__(self, total: int, start: int = 0):
        self.enabled = jax.process_index() == 0
        self._bar = None
        if self.enabled and sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def line(self, text: str) -> None:
        """Prints one line."""
        if self._bar is not None:
            self._bar.write(text)
        elif self.enabled:
            print(text, flush=True)

    def update(self, steps: int = 1) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(steps)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
