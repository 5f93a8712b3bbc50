"""Claims that need no training: facts about functions and gradients at the start."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxres.identity import branches, probes
from flaxres.identity.claims.context import Claim, Context, Series, Verdict
from flaxres.nets.blocks import BasicBlock, Padded, Projection, Residual

Judged = tuple[dict[str, float], Verdict, str, Series | None]


def _zero_branch_is_identity(context: Context) -> Judged:
    model = context.model("resnet20_cifar", style="v2")
    zeroed = branches.zero(model, context.start(model))
    report = probes.identity(model, zeroed, context.images)
    keeps = np.array([row.keeps_shape for row in branches.table(model, zeroed)])
    largest = float(np.max(np.asarray(report["distance"])[keeps]))
    numbers = {"largest distance from the identity": largest}
    return numbers, Verdict.of(largest == 0), f"‖block(x) − x‖/‖x‖ ≤ {largest:g}", None


def _v1_block_is_identity(context: Context) -> Judged:
    model = context.model("resnet20_cifar")
    zeroed = branches.zero(model, context.start(model))
    report = probes.identity(model, zeroed, context.images)
    keeps = np.array([row.keeps_shape for row in branches.table(model, zeroed)])
    inside = float(np.max(np.asarray(report["distance"])[keeps]))
    module = model.make_block(1, 2)
    own = {k: v["stage1"]["block2"] for k, v in zeroed.items() if "stage1" in v}
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 16))
    out: Any = module.apply(own, x)
    anywhere = float(jnp.linalg.norm(out - x) / jnp.linalg.norm(x))
    numbers = {"inside a net": inside, "on signed inputs": anywhere}
    condition = "what it receives is non-negative" if anywhere > 0 else ""
    return (
        numbers,
        Verdict.of(inside == 0, condition),
        f"distance {inside:g} inside a net, {anywhere:.2f} on signed inputs",
        None,
    )


def _depth_is_one_function(context: Context) -> Judged:
    reference: Any = None
    largest = 0.0
    for blocks in (1, 2, 4):
        model = context.model("resnet8_cifar", style="v2", stage_sizes=(blocks,) * 3)
        logits: Any = model.apply(branches.zero(model, context.start(model)), context.images)
        reference = logits if reference is None else reference
        largest = max(largest, float(jnp.max(jnp.abs(logits - reference))))
    # A constant would be one function too, and is what plain nets are.
    spread = float(np.ptp(np.asarray(reference), axis=0).max())
    numbers = {"largest difference of logits": largest, "spread over inputs": spread}
    text = f"max |Δ logits| = {largest:g}, over inputs they vary by {spread:.2g}"
    return numbers, Verdict.of(largest == 0 and spread > 0), text, None


def _plain_zero_is_dead(context: Context) -> Judged:
    model = context.model("plain20_cifar", norm="none")
    variables = branches.zero(model, context.start(model), "*", "all")
    logits = np.asarray(model.apply(variables, context.images))
    spread = float(np.ptp(logits, axis=0).max())
    alive = probes.awakening(model, variables, context.images, context.labels, steps=3)
    share = float(
        np.max([leaf.max() for k in alive if k != "head" for leaf in jax.tree.leaves(alive[k])])
    )
    numbers = {"spread of logits over inputs": spread, "share of live weights below head": share}
    return (
        numbers,
        Verdict.of(spread == 0 and share == 0),
        f"logits vary by {spread:g}, {share:.0%} of the weights below the head get a gradient",
        None,
    )


def _zero_in_all_weights_learns(context: Context) -> Judged:
    shares = {}
    for init in ("zero_branch", "zero_last"):
        model = context.model("resnet8_cifar", style="v2", norm="none", residual_init=init)
        alive = probes.awakening(
            model, context.start(model), context.images, context.labels, steps=4
        )
        leaves = [
            float(leaf[-1]) > 0
            for stage in ("stage1", "stage2", "stage3")
            for leaf in jax.tree.leaves(alive[stage]["block1"]["branch"])
        ]
        shares[init] = float(np.mean(leaves))
    numbers = {
        "branch tensors alive, all weights zero": shares["zero_branch"],
        "branch tensors alive, last zero": shares["zero_last"],
    }
    return (
        numbers,
        Verdict.of(shares["zero_branch"] == 1),
        f"{shares['zero_branch']:.0%} of branch tensors ever get a gradient; "
        f"{shares['zero_last']:.0%} where only the last is zero",
        None,
    )


def _any_span_works(context: Context) -> Judged:
    del context
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 8))
    largest, alive = 0.0, 1.0
    for span in (1, 2, 3, 5, 8, 13):
        block = Residual(_Layers(span), activation=None)
        variables = block.init(jax.random.key(1), x)
        given: Any = block.apply(variables, x)
        largest = max(largest, float(jnp.max(jnp.abs(given - x))))

        def loss(params: Any, block: Residual = block) -> jax.Array:
            out: Any = block.apply({"params": params}, x)
            return jnp.sum(jnp.square(out - 1.0))

        params = variables["params"]
        for _ in range(2):
            grads = jax.grad(loss)(params)
            params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
        awake = [bool(np.any(g)) for g in jax.tree.leaves(jax.grad(loss)(params))]
        alive = min(alive, float(np.mean(awake)))
    numbers = {"largest distance from the identity": largest, "least share of live layers": alive}
    return (
        numbers,
        Verdict.of(largest == 0 and alive == 1),
        f"over 1 … 13 layers: distance {largest:g}, {alive:.0%} of the layers learn",
        None,
    )


class _Layers(nn.Module):
    """Any number of 3×3 convolutions, the last zero."""

    span: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(1, self.span + 1):
            last = layer == self.span
            init = nn.initializers.zeros if last else nn.initializers.he_normal()
            x = nn.Conv(x.shape[-1], (3, 3), use_bias=False, kernel_init=init)(x)
            x = x if last else nn.leaky_relu(x)
        return x


def _dimensions_must_match(context: Context) -> Judged:
    del context
    x = jnp.ones((2, 8, 8, 8))
    refused, fits = 0, 0
    cases = [(8, 2), (16, 1), (16, 2)]
    for features, strides in cases:
        branch = BasicBlock(features, strides, residual=False)
        try:
            Residual(branch).init(jax.random.key(0), x)
        except ValueError:
            refused += 1
        for shortcut in (Projection(features, strides), Padded(features, strides)):
            out, _ = Residual(branch, shortcut).init_with_output(jax.random.key(0), x)
            fits += out.shape == (2, 8 // strides, 8 // strides, features)
    numbers = {
        "misfits refused": float(refused),
        "of": float(len(cases)),
        "repaired by a shortcut": float(fits),
    }
    return (
        numbers,
        Verdict.of(refused == len(cases), "no projection or padding stands in the shortcut")
        if fits == 2 * len(cases)
        else Verdict.of(refused == len(cases)),
        f"{refused} of {len(cases)} misfits refused, {fits} of {2 * len(cases)} repaired",
        None,
    )


def _gradients_vanish(context: Context) -> Judged:
    depths = context.settings.depths
    lines, numbers = {}, {}
    for norm in ("none", "batch"):
        for kind in ("plain", "resnet"):
            values = []
            for depth in depths:
                model = context.model(f"{kind}{depth}_cifar", norm=norm, scan=True)
                variables = context.start(model)
                grads = jax.jit(
                    lambda v, model=model: probes.gradients(
                        model, v, context.images, context.labels
                    )
                )(variables)
                # Compared with the last block, so that the scale of the loss does not matter.
                values.append(float(grads["parameters"][0] / grads["parameters"][-1]))
            label = f"{kind}, {'batch norm' if norm == 'batch' else 'no norm'}"
            lines[label] = ([float(d) for d in depths], values)
            numbers[f"first over last at depth {depths[-1]}: {label}"] = values[-1]
    ratio = {label: y[-1] / y[0] for label, (_, y) in lines.items()}
    numbers |= {f"growth with depth: {label}": value for label, value in ratio.items()}
    vanish = {label: value < 0.5 for label, value in ratio.items() if label.startswith("plain")}
    if all(vanish.values()):
        verdict = Verdict.of(True)
    elif any(vanish.values()):
        verdict = Verdict.of(True, f"the net has {next(k for k, v in vanish.items() if v)[7:]}")
    else:
        verdict = Verdict.of(False)
    text = ", ".join(f"{label} ×{value:.2g}" for label, value in ratio.items())
    series = Series("layers", "gradient of the first block over the last's", lines, True, True)
    return numbers, verdict, f"first over last block, {depths[0]}→{depths[-1]}: {text}", series


def _gradients_shatter(context: Context) -> Judged:
    depths = context.settings.depths
    lines, numbers = {}, {}
    for kind in ("plain", "resnet"):
        values = []
        for depth in depths:
            model = context.model(f"{kind}{depth}_cifar", scan=True)
            found = jax.jit(
                lambda v, model=model: probes.gradient_correlation(
                    model, v, context.images[0], context.images[1], jax.random.key(0), points=48
                )
            )(context.start(model))
            values.append(float(found["neighbours"]))
        lines[kind] = ([float(d) for d in depths], values)
        numbers[f"cosine of neighbours at depth {depths[-1]}: {kind}"] = values[-1]
    plain, residual = lines["plain"][1][-1], lines["resnet"][1][-1]
    holds = residual > plain and plain < lines["plain"][1][0]
    series = Series("layers", "cosine of gradients at neighbouring inputs", lines, False, True)
    return (
        numbers,
        Verdict.of(holds),
        f"at {depths[-1]} layers: plain {plain:.2f}, residual {residual:.2f}",
        series,
    )


def _decay_alone(context: Context) -> Judged:
    """Multiply kernels by (1 - ηλ)^t, which is all that decay does without data."""
    factors = [float(factor) for factor in np.geomspace(1, 1e-2, 5)]
    lines, numbers = {}, {}
    for norm in ("none", "batch"):
        for kind in ("resnet", "plain"):
            model = context.model(f"{kind}20_cifar", norm=norm, num_classes=0)
            variables = context.start(model)

            # Statistics of the batch, with which a net trains, for all three.
            def output(variables: Any, model: Any = model, train: bool = norm == "batch") -> Any:
                return model.apply(variables, context.images, train=train, mutable=True)[0]

            target = output(branches.zero(model, variables, "*", "all"))
            size = jnp.linalg.norm(target if kind == "resnet" else output(variables))
            values = [
                float(jnp.linalg.norm(output(_decayed(variables, factor)) - target) / size)
                for factor in factors
            ]
            label = f"{kind}, {'batch norm' if norm == 'batch' else 'no norm'}"
            lines[label] = (factors, [max(v, 1e-8) for v in values])
            numbers[f"distance from the goal, kernels ×0.01: {label}"] = values[-1]
    reached = {label: y[-1] < 0.01 for label, (_, y) in lines.items()}
    free = reached["resnet, no norm"] and reached["plain, no norm"]
    normed = reached["resnet, batch norm"] and reached["plain, batch norm"]
    verdict = Verdict.of(free, "" if normed else "no norm undoes the scale of the kernels")
    text = ", ".join(f"{label} {y[-1]:.1e}" for label, (_, y) in lines.items())
    series = Series(
        "kernels multiplied by", "distance from skeleton or constant", lines, True, True
    )
    return numbers, verdict, f"kernels ×0.01: {text}", series


def _decayed(variables: Any, factor: float) -> Any:
    """Every convolution of a branch times a factor; stem, shortcuts and head stay."""

    def shrink(path: Any, leaf: jax.Array) -> jax.Array:
        names = [getattr(key, "key", "") for key in path]
        return leaf * factor if "branch" in names and names[-1] == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(shrink, variables)


CLAIMS = (
    Claim(
        "zero_branch_is_identity",
        "If the weights and biases of the branch are 0, the block gives back a[l].",
        "He 2016, arXiv 1603.05027",
        "largest ‖block(x) − x‖/‖x‖ over pre-activation blocks with a zero branch; must be 0",
        _zero_branch_is_identity,
    ),
    Claim(
        "v1_block_is_identity",
        "g(0 + a) = a: the original block, which activates after the sum, is the identity too.",
        "He 2015, arXiv 1512.03385",
        "the same distance inside a net, and on signed inputs; inside must be 0",
        _v1_block_is_identity,
    ),
    Claim(
        "depth_is_one_function",
        "With zero branches, nets of any depth are one function: deeper is never worse.",
        "He 2015, §1",
        "largest difference of logits between nets of 3, 6 and 12 zero blocks; must be 0, and the "
        "function no constant",
        _depth_is_one_function,
    ),
    Claim(
        "plain_zero_is_dead",
        "The plain twin with zero weights gives one constant, and cannot leave it.",
        "the argument turned round",
        "spread of logits over inputs, share of weights with a gradient in 3 steps; must be 0",
        _plain_zero_is_dead,
    ),
    Claim(
        "zero_in_all_weights_learns",
        "A block that starts with all weights at 0 can still learn.",
        "implied by “if the weights are 0 we are back at a[l]”",
        "share of branch tensors with a gradient by step 4; must be 1",
        _zero_in_all_weights_learns,
    ),
    Claim(
        "any_span_works",
        "A shortcut may span arbitrarily many transformations.",
        "He 2015, §3.2",
        "spans of 1 to 13 layers with the last at 0: distance from the identity must be 0, and "
        "every layer must get a gradient by step 2",
        _any_span_works,
    ),
    Claim(
        "dimensions_must_match",
        "The dimensions of shortcut and branch must match.",
        "He 2015, §3.2, eq. 2",
        "misfits that are refused (all), and repaired by a projection or padding",
        _dimensions_must_match,
    ),
    Claim(
        "gradients_vanish",
        "In deep plain nets the gradient vanishes on its way to the first layers.",
        "Glorot & Bengio 2010; He 2015, §4.1 doubts it under batch norm",
        "gradient norm of the first block over the last's, at the start, by depth; vanishing: it "
        "falls to less than half from the shallowest net to the deepest",
        _gradients_vanish,
    ),
    Claim(
        "gradients_shatter",
        "Gradients of deep plain nets at neighbouring inputs are unlike, of residual nets alike.",
        "Balduzzi 2017, arXiv 1702.08591",
        "mean cosine of input gradients at neighbouring points of a line between two images; the "
        "plain one must fall with depth and end below the residual one",
        _gradients_shatter,
    ),
    Claim(
        "decay_alone",
        "Weight decay alone drives a residual net to its shallow skeleton, a plain one to a "
        "constant.",
        "the argument: what is easy to reach by weights near 0",
        "distance of the pooled features from the skeleton, or the constant, once decay has "
        "shrunk the branches' kernels to a hundredth; must be below 1 %",
        _decay_alone,
    ),
)
