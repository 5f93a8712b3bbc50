"""Peaks of accelerators, and what a measured step makes of them."""

from typing import Any

# Dense bfloat16 FLOP/s of one device as JAX counts devices, by its `device_kind`, from the makers'
# data sheets.
PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


def peak(device_kind: str) -> float | None:
    """FLOP/s of the longest known name that this one starts with; None if none is."""
    known = [name for name in PEAKS if device_kind.startswith(name)]
    return PEAKS[max(known, key=len)] if known else None


def achieved(device_kind: str, flops: float, seconds: float, compiled: Any) -> dict[str, Any]:
    """FLOP/s, their share of the peak, and the compiler's count of bytes, of one step.

    Args:
      device_kind: of `jax.Device`.
      flops: that the step needs (two a multiply-add; three times the forward pass to train).
      seconds: that it took.
      compiled: its program.
    """
    highest = peak(device_kind)
    return {
        "flops_per_second": flops / seconds,
        "share_of_peak": f"unknown device {device_kind!r}"
        if highest is None
        else flops / seconds / highest,
        "bytes_accessed": analysis(compiled).get("bytes accessed"),
    }


def analysis(compiled: Any) -> dict[str, float]:
    """The compiler's cost analysis; a loop's body counts once in it."""
    found = compiled.cost_analysis()
    return dict(found[0] if isinstance(found, list) else found or {})


def memory(compiled: Any) -> dict[str, int]:
    """Bytes of a program: temporaries, and at its peak what it is given, makes and gives too."""
    found = compiled.memory_analysis()
    temporary = int(found.temp_size_in_bytes)
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"temporary": temporary, "peak": int(held) + temporary}
