"""The floating-point operations per second of devices, as their makers state them: dense, a product and a sum are two.

Sources: the data sheets of the makers.
"""

from __future__ import annotations

from collections.abc import Mapping

# By the name that CUDA gives a device; of several names in it the longest counts.
BFLOAT16: Mapping[str, float] = {
    "A10": 125e12,
    "A100": 312e12,
    "A30": 165e12,
    "A40": 150e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H20": 148e12,
    "H200": 989e12,
    "H800": 989e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "MI250": 362e12,
    "MI300X": 1307e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}


def bfloat16_flops(device: str) -> float | None:
    """Return the operations a second of the *device* of that name in bfloat16; None for one that is not known."""
    found = [name for name in BFLOAT16 if name in device]
    return BFLOAT16[max(found, key=len)] if found else None
