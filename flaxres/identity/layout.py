"""One tree, two layouts: a leaf per block, or equal blocks of a stage stacked for scan.

Per block, `stage2/block3/branch/conv1/kernel`; stacked, `stage2/blocks2to9/branch/conv1/kernel`
with a leading axis of 8. The tree says which it is. Conversion is exact both ways, and works on
any pytree that holds such subtrees: params, batch_stats, EMA, optimiser state, gradients.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxres.nets.resnet import STACKED_RUN, ResNet, block_runs, run_name

_STAGE = re.compile(r"stage(\d+)")


def stack(model: ResNet, variables: Any) -> tuple[ResNet, Any]:
    """The scanned form of a model and its variables: the same function, compiled once a run."""
    return model.clone(scan=True), stack_tree(unstack_tree(variables), model)


def unstack(model: ResNet, variables: Any) -> tuple[ResNet, Any]:
    """The per-block form: the exact inverse of `stack`."""
    return model.clone(scan=False), unstack_tree(variables)


def convert(model: ResNet, tree: Any) -> Any:
    """The tree, of either layout, in the layout of the model."""
    per_block = unstack_tree(tree)
    return stack_tree(per_block, model) if model.scan else per_block


def is_stacked(tree: Any) -> bool:
    """Whether any run of blocks in the tree is stacked."""
    found: list[str] = []

    def look(name: str, stage: dict[str, Any]) -> dict[str, Any]:
        found.extend(key for key in stage if STACKED_RUN.fullmatch(key))
        return stage

    on_stages(tree, look)
    return bool(found)


def stack_tree(tree: Any, model: ResNet) -> Any:
    """Stack the runs of blocks that `model` scans, in every subtree of stages.

    Which blocks are equal is the model's to say, since a strided block can have the shapes of the
    next one. Raises ValueError if the tree lacks blocks that the model has, or has others.
    """
    scanned = model.clone(scan=True)

    def convert(name: str, stage: dict[str, Any]) -> dict[str, Any]:
        runs = block_runs(scanned, int(name[len("stage") :]))
        names = [f"block{block}" for first, last in runs for block in range(first, last + 1)]
        if not stage:  # such as batch statistics of a net without norms
            return stage
        if missing := [block for block in names if block not in stage]:
            raise ValueError(f"{name} has no {missing[0]}, which the model has")
        if strange := [block for block in stage if block not in names]:
            raise ValueError(f"{name} has a {strange[0]}, which the model has not")
        stacked = {}
        for first, last in runs:
            blocks = [stage[f"block{block}"] for block in range(first, last + 1)]
            whole = blocks[0] if first == last else jax.tree.map(_stack, *blocks)
            stacked[run_name(first, last)] = whole
        return stacked

    return on_stages(tree, convert)


def unstack_tree(tree: Any) -> Any:
    """Give every block of a stacked tree leaves of its own; a per-block tree stays as it is."""

    def convert(name: str, stage: dict[str, Any]) -> dict[str, Any]:
        blocks = {}
        for key, subtree in stage.items():
            if match := STACKED_RUN.fullmatch(key):
                first, last = map(int, match.groups())
                for block in range(first, last + 1):
                    take = block - first
                    blocks[f"block{block}"] = jax.tree.map(lambda leaf, i=take: leaf[i], subtree)
            else:
                blocks[key] = subtree
        return blocks

    return on_stages(tree, convert)


def on_stages(tree: Any, convert: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Any:
    """Apply `convert(name, blocks)` to every `stageN` dict anywhere in a pytree."""

    def has_stages(node: Any) -> bool:
        return isinstance(node, dict) and any(_STAGE.fullmatch(str(key)) for key in node)

    def visit(node: Any) -> Any:
        if not has_stages(node):
            return node
        return {
            key: convert(key, value) if _STAGE.fullmatch(str(key)) else value
            for key, value in node.items()
        }

    return jax.tree.map(visit, tree, is_leaf=has_stages)


def _stack(*leaves: Any) -> Any:
    return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)
