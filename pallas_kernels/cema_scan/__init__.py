"""The complex exponential moving average: a diagonal complex linear recurrence over time."""

from pallas_kernels.cema_scan.api import cema_scan

__all__ = ["cema_scan"]
