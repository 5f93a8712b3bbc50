"""Every test runs on eight simulated CPU devices, set before JAX starts."""

import os
import pathlib

import pytest

_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def tfds_dir() -> pathlib.Path:
    """A TFDS data_dir that holds fashion_mnist, or a skip with the reason."""
    default = pathlib.Path(__file__).resolve().parents[2] / "shared/data/tfds"
    path = pathlib.Path(os.environ.get("FLAXRES_DATA_DIR", default))
    if not (path / "fashion_mnist").is_dir():
        pytest.skip(f"fashion_mnist is not prepared in {path} (set FLAXRES_DATA_DIR)")
    return path
