"""Surgery on residual branches: address, select, zero, scale, drop, reorder, interpolate, deepen.

Pure functions from (model, variables) to variables, or to (model, variables) where the depth
changes; in either layout. A selector is a glob over `stageS/blockB` ("*", "stage2/*",
"stage*/block[2-9]") or a predicate over rows of `table`; one that matches nothing raises
ValueError. Operations that keep shapes can be jitted.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxres.identity import layout
from flaxres.nets import drawing, initialize
from flaxres.nets.blocks import BLOCKS
from flaxres.nets.resnet import ResNet
from flaxres.nets.summary import count_params


@dataclasses.dataclass(frozen=True)
class Row:
    """One block of a model."""

    address: str
    """Such as "stage2/block3"."""
    depth: int
    """Place in the net, from 1."""
    stage: int
    block: int
    kind: str
    """Its shortcut: identity, padded, projection, or plain (none)."""
    keeps_shape: bool
    """Whether it gives the shape that it receives, so that it can be dropped or moved."""
    can_be_identity: bool
    """Whether a zero branch makes it the identity."""
    why: str
    """The reason."""
    branch_params: int = 0
    """Parameters of its branch."""


Selector = str | Callable[[Row], bool]


def table(model: ResNet, variables: Any) -> list[Row]:
    """Every block with its place, its shortcut and whether it can be the identity."""
    params = layout.unstack_tree(variables)["params"]
    return [
        dataclasses.replace(
            row,
            branch_params=count_params(params[f"stage{row.stage}"][f"block{row.block}"]["branch"]),
        )
        for row in _rows(model)
    ]


def _rows(model: ResNet) -> list[Row]:
    rows: list[Row] = []
    for stage, size in enumerate(model.stage_sizes, 1):
        received, given = model.stage_channels(stage)
        for block in range(1, size + 1):
            strides = model.stage_strides(stage) if block == 1 else 1
            channels = received if block == 1 else given
            made = BLOCKS[model.block](
                features=model.widths[stage - 1],
                strides=strides,
                shortcut_kind=model.shortcut,
                residual=model.residual,
            )
            kind = made.kind(channels)
            can, why = _identity(kind, model.style, model.activation)
            rows.append(
                Row(
                    address=f"stage{stage}/block{block}",
                    depth=len(rows) + 1,
                    stage=stage,
                    block=block,
                    kind=kind,
                    keeps_shape=strides == 1 and channels == given,
                    can_be_identity=can,
                    why=why,
                )
            )
    return rows


def _identity(kind: str, style: str, activation: str) -> tuple[bool, str]:
    if kind == "identity" and (style == "v2" or activation == "identity"):
        return True, "with a zero branch exactly its input"
    if kind == "identity" and activation == "relu":
        return True, "with a zero branch relu of its input, which is non-negative already"
    if kind == "identity":
        return False, f"with a zero branch {activation} of its input, which is not its input"
    if kind == "plain":
        return False, "no shortcut: with zero weights it gives one constant"
    return False, f"a {kind} shortcut changes the shape or the values"


def select(model: ResNet, selector: Selector, variables: Any = None) -> list[Row]:
    """The blocks that a selector means, in order. ValueError if there are none."""
    rows = _rows(model) if variables is None else table(model, variables)
    if callable(selector):
        found = [row for row in rows if selector(row)]
        name = getattr(selector, "__name__", "predicate")
    else:
        found = [row for row in rows if fnmatch.fnmatchcase(row.address, selector)]
        name = repr(selector)
    if not found:
        raise ValueError(
            f"selector {name} matches no block; there are {rows[0].address} to "
            f"{rows[-1].address} (blocks a stage: {', '.join(map(str, model.stage_sizes))})"
        )
    return found


def zero(model: ResNet, variables: Any, selector: Selector = "*", part: str = "last") -> Any:
    """Make the selected branches give exactly 0.

    Args:
      model: the model.
      variables: {"params": …, "batch_stats": …}, either layout.
      selector: which blocks.
      part: "last" zeroes the last linear parameters (v1: scale and bias of the last norm; v2 or
        without norm: the last convolution; with Fixup its last bias too), after which the branch
        can learn; "scale" the branch's multiplier, or the last norm's scale and bias; "all" every
        parameter of the branch, after which it cannot.

    Returns:
      Variables of the same shape.
    """
    if part not in ("last", "scale", "all"):
        raise ValueError(f"unknown part {part!r} of a branch (accepted: last, scale, all)")

    def change(branch: dict[str, Any]) -> dict[str, Any]:
        if part == "all":
            return jax.tree.map(_zeros_like, branch)
        paths = _output_paths(model, branch, prefer_gain=part == "scale")
        return _map_paths(branch, paths, _zeros_like)

    return _on_branches(model, variables, selector, change)


def scale(model: ResNet, variables: Any, selector: Selector = "*", *, by: jax.Array | float) -> Any:
    """Multiply what the selected branches give by a number, exactly, through their last weights."""
    if model.se:
        raise ValueError(
            "branches with squeeze-excitation are not linear in their last weights: they can be "
            "zeroed but not scaled"
        )

    def change(branch: dict[str, Any]) -> dict[str, Any]:
        paths = _output_paths(model, branch, prefer_gain=True, complain=False)
        return _map_paths(branch, paths, lambda leaf: leaf * jnp.asarray(by, leaf.dtype))

    return _on_branches(model, variables, selector, change)


def interpolate(
    model: ResNet, a: Any, b: Any, t: jax.Array | float, selector: Selector | None = None
) -> Any:
    """(1 - t) a + t b, leaf by leaf: of everything, or of the selected branches (others as in a).

    Batch statistics are interpolated too where everything is.
    """
    if str(jax.tree.structure(a)) != str(jax.tree.structure(b)):
        raise ValueError("a and b are variables of different models or layouts")

    def blend(x: jax.Array, y: jax.Array) -> jax.Array:
        return (1 - t) * x + t * y

    if selector is None:
        return jax.tree.map(blend, a, b)
    other = layout.unstack_tree(b)["params"]
    per_block = layout.unstack_tree(a)
    params = _copy_stages(per_block["params"])
    for row in select(model, selector, a):
        block = params[f"stage{row.stage}"][f"block{row.block}"]
        theirs = other[f"stage{row.stage}"][f"block{row.block}"]["branch"]
        block["branch"] = jax.tree.map(blend, block["branch"], theirs)
    return layout.convert(model, {**per_block, "params": params})


def drop(
    model: ResNet, variables: Any, selector: Selector, *, opt_state: Any = None
) -> tuple[Any, ...]:
    """Take the selected blocks out: (model, variables), and opt_state where it is given.

    ValueError if a block changes the shape (what follows would not fit) or a stage would be empty.
    """
    gone = select(model, selector, variables)
    for row in gone:
        if not row.keeps_shape:
            raise ValueError(
                f"{row.address} cannot be dropped: it opens its stage ({row.kind}), and without "
                "it the next block would receive another shape"
            )
    orders = {}
    for stage, size in enumerate(model.stage_sizes, 1):
        blocks = {row.block for row in gone if row.stage == stage}
        orders[stage] = [block for block in range(1, size + 1) if block not in blocks]
        if not orders[stage]:
            raise ValueError(f"selector {selector!r} would leave stage{stage} without blocks")
    return _rearranged(model, variables, orders, opt_state)


def reorder(
    model: ResNet, variables: Any, stage: str, order: Sequence[int], *, opt_state: Any = None
) -> tuple[Any, ...]:
    """Put the blocks of a stage into another order: (model, variables[, opt_state]).

    `order` names the present numbers of blocks in their new order, such as [1, 3, 2].
    """
    number = _stage_number(model, stage)
    size = model.stage_sizes[number - 1]
    if sorted(order) != list(range(1, size + 1)):
        raise ValueError(
            f"order {list(order)} is no permutation of the blocks 1 to {size} of {stage}"
        )
    fixed = [r for r in _rows(model) if r.stage == number and not r.keeps_shape]
    for row in fixed:
        if order[row.block - 1] != row.block:
            raise ValueError(
                f"{row.address} cannot move: it is a block of another shape ({row.kind}) than the "
                "rest of its stage"
            )
    return _rearranged(model, variables, {number: list(order)}, opt_state)


def permute(
    model: ResNet, variables: Any, selector: Selector, seed: int, *, opt_state: Any = None
) -> tuple[Any, ...]:
    """Shuffle the selected blocks among their places, stage by stage, by a seed.

    Of the selected blocks only those that keep the shape are moved; ValueError if there are none.
    """
    rows = [row for row in select(model, selector, variables) if row.keeps_shape]
    if not rows:
        raise ValueError(f"selector {selector!r} matches only blocks that change the shape")
    rng = np.random.default_rng(seed)
    orders = {}
    for stage, size in enumerate(model.stage_sizes, 1):
        places = [row.block for row in rows if row.stage == stage]
        order = np.arange(1, size + 1)
        order[np.array(places, int) - 1] = rng.permutation(places)
        orders[stage] = [int(block) for block in order]
    return _rearranged(model, variables, orders, opt_state)


def deepen(
    model: ResNet,
    variables: Any,
    add: dict[str, int],
    *,
    seed: int = 0,
    opt_state: Any = None,
) -> tuple[Any, ...]:
    """Insert zero blocks at the end of stages: a deeper model that is the same function.

    The new branches start as their model's do, drawn from `seed`, but give exactly 0 (zero last
    scale in v1, zero last convolution in v2 or without norm, zero multiplier where there is one),
    so that logits stay the same bit for bit, in evaluation and, but for stochastic depth, whose
    rates follow the depth, in training; and the new blocks learn from the first step (Chen 2015,
    arXiv 1511.05641; Gong 2019).

    Args:
      model: a residual model.
      variables: its variables, either layout.
      add: blocks to add by stage, such as {"stage3": 4}.
      seed: of the new weights.
      opt_state: moved along, new entries zero.

    Returns:
      (model, variables), and opt_state where it is given.
    """
    if not model.residual:
        raise ValueError("a plain net cannot be deepened: it has no block that is the identity")
    if model.shortcut == "C":
        raise ValueError(
            "a net with projections everywhere (shortcut='C') cannot be deepened: no block of it "
            "can be the identity"
        )
    if not _identity("identity", model.style, model.activation)[0]:
        raise ValueError(
            f"a net of style='v1' with activation={model.activation!r} cannot be deepened: a zero "
            "block would apply it once more; use style='v2', or relu, which changes nothing twice"
        )
    if initialize.resolve(model.residual_init).inner == "zero":
        raise ValueError(
            "blocks that start as residual_init='zero_branch' would never learn; deepen "
            "model.clone(residual_init='default')"
        )
    sizes = list(model.stage_sizes)
    for stage, count in add.items():
        if count < 1:
            raise ValueError(f"blocks to add to {stage} must be at least 1, not {count}")
        sizes[_stage_number(model, stage) - 1] += count
    deeper = model.clone(stage_sizes=tuple(sizes), scan=False)
    per_block = layout.unstack_tree(variables)
    fresh = _zeroed_fresh(deeper, per_block, seed)

    def extend(tree: Any, new: Any) -> Any:
        extended = dict(tree)
        for stage in add:
            number = _stage_number(model, stage)
            blocks = dict(tree.get(stage, {}))
            for block in range(model.stage_sizes[number - 1] + 1, sizes[number - 1] + 1):
                name = f"block{block}"
                if name in new.get(stage, {}):
                    blocks[name] = new[stage][name]
            if blocks:
                extended[stage] = blocks
        return extended

    result = {name: extend(tree, fresh.get(name, {})) for name, tree in per_block.items()}
    deeper = deeper.clone(scan=model.scan)
    outcome = (deeper, layout.convert(deeper, result))
    if opt_state is None:
        return outcome
    moved = _extend_state(layout.unstack_tree(opt_state), fresh["params"], extend)
    return (*outcome, layout.convert(deeper, moved))


def _zeroed_fresh(deeper: ResNet, variables: Any, seed: int) -> Any:
    """Newly drawn variables of the deeper model whose branches all give 0."""
    stem = variables["params"]["stem"]
    kernel = stem["conv" if "conv" in stem else "conv1"]["kernel"]
    side = deeper.total_stride
    fresh = drawing.init_variables(deeper, seed, (1, side, side, kernel.shape[-2]))
    gain = initialize.resolve(deeper.residual_init)
    part = "scale" if gain.gain != "none" and not gain.scalar_biases else "last"
    return zero(deeper, fresh, "*", part)


def _extend_state(state: Any, new: Any, extend: Callable[[Any, Any], Any]) -> Any:
    """Zeros for new blocks in every subtree of an optimiser state that is shaped like params."""

    def has_stages(node: Any) -> bool:
        return isinstance(node, dict) and any(re.fullmatch(r"stage\d+", str(k)) for k in node)

    def visit(node: Any) -> Any:
        if not has_stages(node):
            return node
        zeros = {
            stage: {name: _like(block, node[stage]) for name, block in blocks.items()}
            for stage, blocks in new.items()
            if stage in node and stage.startswith("stage")
        }
        return extend(node, zeros)

    return jax.tree.map(visit, state, is_leaf=has_stages)


def _like(block: Any, siblings: dict[str, Any]) -> Any:
    """Zeros like a new block, masked where the blocks beside it are masked."""
    sibling = siblings[max(siblings, key=lambda name: int(name.removeprefix("block")))]

    def visit(new: Any, old: Any) -> Any:
        if isinstance(old, optax.MaskedNode):
            return optax.MaskedNode()
        if isinstance(new, dict):
            inner = old if isinstance(old, dict) else {}
            return {name: visit(leaf, inner.get(name)) for name, leaf in new.items()}
        return _zeros_like(new)

    return visit(block, sibling)


def _rearranged(
    model: ResNet, variables: Any, orders: dict[int, list[int]], opt_state: Any
) -> tuple[Any, ...]:
    sizes = tuple(
        len(orders.get(stage, range(size))) for stage, size in enumerate(model.stage_sizes, 1)
    )
    changed = model.clone(stage_sizes=sizes)

    def move(name: str, blocks: dict[str, Any]) -> dict[str, Any]:
        order = orders.get(int(name.removeprefix("stage")))
        if order is None:
            return blocks
        return {
            f"block{place}": blocks[f"block{old}"]
            for place, old in enumerate(order, 1)
            if f"block{old}" in blocks
        }

    def apply(tree: Any) -> Any:
        return layout.convert(changed, layout.on_stages(layout.unstack_tree(tree), move))

    outcome = (changed, apply(variables))
    return outcome if opt_state is None else (*outcome, apply(opt_state))


def _stage_number(model: ResNet, stage: str) -> int:
    match = re.fullmatch(r"stage(\d+)", stage)
    if not match or not 1 <= int(match.group(1)) <= len(model.stage_sizes):
        raise ValueError(f"no {stage!r} in the model (stages: 1 to {len(model.stage_sizes)})")
    return int(match.group(1))


def _on_branches(
    model: ResNet,
    variables: Any,
    selector: Selector,
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> Any:
    rows = select(model, selector, variables)
    per_block = layout.unstack_tree(variables)
    params = _copy_stages(per_block["params"])
    for row in rows:
        block = params[f"stage{row.stage}"][f"block{row.block}"]
        block["branch"] = change(block["branch"])
    return layout.convert(model, {**per_block, "params": params})


def _copy_stages(params: dict[str, Any]) -> dict[str, Any]:
    """A tree whose blocks can be replaced without touching the caller's."""
    return {
        name: {block: dict(leaves) for block, leaves in tree.items()}
        if name.startswith("stage")
        else tree
        for name, tree in params.items()
    }


def _output_paths(
    model: ResNet, branch: dict[str, Any], prefer_gain: bool, complain: bool = True
) -> list[tuple[str, ...]]:
    """The parameters in which what the branch gives is linear."""
    layers = sum(name.startswith("conv") for name in branch)
    paths: list[tuple[str, ...]] = [(f"bias{layers}b",)] if f"bias{layers}b" in branch else []
    if prefer_gain and "gain" in branch:
        return [("gain",), *paths]
    if f"norm{layers}" in branch and model.style == "v1":
        return [(f"norm{layers}", "scale"), (f"norm{layers}", "bias"), *paths]
    if prefer_gain and complain:
        raise ValueError(
            f"branches of style={model.style!r} with norm={model.norm!r} end in no scale: use "
            "part='last', or a residual_init with a multiplier such as 'rezero'"
        )
    return [(f"conv{layers}", "kernel"), *paths]


def _map_paths(
    tree: dict[str, Any], paths: list[tuple[str, ...]], change: Callable[[Any], Any]
) -> dict[str, Any]:
    changed = dict(tree)
    for first, *rest in paths:
        inner = [tuple(rest)]
        changed[first] = _map_paths(changed[first], inner, change) if rest else change(tree[first])
    return changed


def _zeros_like(leaf: Any) -> Any:
    return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else jnp.zeros_like(leaf)
