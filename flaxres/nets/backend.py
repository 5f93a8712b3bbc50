"""What XLA's CPU backend has to be told."""

import jax


def standing(x: jax.Array) -> jax.Array:
    """x, on CPU written to memory before it is read.

    The backend would otherwise make it again for each of several readers, or inside a sum over
    rows, which runs at the speed of memory only over what stands there.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
