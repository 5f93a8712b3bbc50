"""The argument for residual learning as a table: claim, source, measurement, number, verdict.

A verdict is computed from the numbers by a rule that stands beside the measurement, never typed
in. `run` measures all claims, or some, on real data.
"""

from collections.abc import Callable, Iterable

from flaxres.identity.claims import exact, trained
from flaxres.identity.claims.context import Claim, Context, Outcome, Settings, Verdict

CLAIMS: tuple[Claim, ...] = (*exact.CLAIMS, *trained.CLAIMS)


def select(names: Iterable[str] | None = None) -> tuple[Claim, ...]:
    """The claims of these names, or all. ValueError names the known ones."""
    if names is None:
        return CLAIMS
    known = {claim.name: claim for claim in CLAIMS}
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"unknown claim {name!r} (known: {', '.join(known)})")
    return tuple(known[name] for name in wanted)


def run(
    settings: Settings | None = None,
    names: Iterable[str] | None = None,
    watch: Callable[[Outcome], None] | None = None,
    context: Context | None = None,
) -> list[Outcome]:
    """Measure claims in order; `watch` is called with each outcome as it is there."""
    context = context or Context(settings or Settings())
    outcomes = []
    for claim in select(names):
        outcome = claim.measure(context)
        outcomes.append(outcome)
        if watch:
            watch(outcome)
    return outcomes


__all__ = ["CLAIMS", "Claim", "Context", "Outcome", "Settings", "Verdict", "run", "select"]
