"""Verdicts follow the numbers: broken on purpose, claims stop to hold."""

import json
import re

import pytest

from flaxres.cli.claims import markdown
from flaxres.cli.main import main
from flaxres.identity import claims
from flaxres.identity.claims import Context, Outcome, Settings, Verdict
from flaxres.nets import zoo

EXACT = [claim.name for claim in claims.CLAIMS if not claim.trains]
CHEAP = [name for name in EXACT if not name.startswith("gradients_")]
EXPECTED = {
    "zero_branch_is_identity": "holds",
    "v1_block_is_identity": "holds if what it receives is non-negative",
    "depth_is_one_function": "holds",
    "plain_zero_is_dead": "holds",
    "zero_in_all_weights_learns": "does not hold",
    "any_span_works": "holds",
    "dimensions_must_match": "holds if no projection or padding stands in the shortcut",
    "decay_alone": "holds if no norm undoes the scale of the kernels",
}


@pytest.fixture(scope="module")
def outcomes():
    return {o.claim.name: o for o in claims.run(Settings(), CHEAP)}


def test_verdicts_without_training(outcomes):
    assert {name: o.verdict.text for name, o in outcomes.items()} == EXPECTED


def test_every_outcome_has_numbers_and_a_sentence(outcomes):
    for outcome in outcomes.values():
        assert outcome.numbers and outcome.number
        assert all(isinstance(value, (int, float)) for value in outcome.numbers.values())


@pytest.mark.parametrize("name", ["zero_branch_is_identity", "depth_is_one_function"])
def test_without_shortcuts_the_argument_breaks(name, outcomes):
    """The same measurement on nets whose shortcuts are missing must say so."""

    def broken(model, **fields):
        return zoo.create_model(model, **{**fields, "residual": False})

    (outcome,) = claims.run(names=[name], context=Context(Settings(), broken))
    assert outcomes[name].verdict.holds and not outcome.verdict.holds


def test_with_shortcuts_a_zero_net_is_not_dead(outcomes):
    def broken(model, **fields):
        return zoo.create_model(model, **{**fields, "residual": True})

    (outcome,) = claims.run(names=["plain_zero_is_dead"], context=Context(Settings(), broken))
    assert not outcome.verdict.holds


def test_a_live_start_changes_the_verdict_of_the_dead_one():
    def alive(model, **fields):
        return zoo.create_model(model, **{**fields, "residual_init": "zero_last"})

    context = Context(Settings(), alive)
    (outcome,) = claims.run(names=["zero_in_all_weights_learns"], context=context)
    assert outcome.verdict.text == "holds"


def test_verdicts():
    assert Verdict.of(True).text == "holds"
    assert Verdict.of(True, "it rains").text == "holds if it rains"
    assert Verdict.of(False, "it rains").text == "does not hold"


def test_unknown_claim_is_named():
    with pytest.raises(ValueError, match="unknown claim 'lesions' .known: zero_branch_is"):
        claims.select(["lesions"])


def test_bars_stay_within_their_cell_of_the_table():
    (claim,) = claims.select(["lesion"])
    outcome = Outcome(claim, "max |x| = 0", {}, Verdict.of(True), None)
    *_, row = markdown([outcome]).splitlines()
    assert r"max \|x\| = 0" in row
    assert len(re.split(r"(?<!\\)\|", row)) == 6


def test_command_writes_table_numbers_and_pictures(tmp_path, capsys):
    out = tmp_path / "claims"
    code = main(
        [
            "claims",
            "--quick",
            "--out",
            str(out),
            "--only",
            "decay_alone",
            "any_span_works",
            "--json",
        ]
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert [c["verdict"][:5] for c in found["claims"]] == ["holds", "holds"]
    assert json.loads((out / "claims.json").read_text()) == found
    assert (out / "decay_alone.png").stat().st_size > 10_000
    assert "**holds**" in (out / "claims.md").read_text()
    assert "data:image/png;base64" in (out / "claims.html").read_text()


def test_command_refuses_what_it_does_not_know(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["--only", "lesions"], "unknown claim 'lesions'"),
        (["--seeds", "0"], "seeds must be at least 1, not 0"),
        (["--data", "digit"], "unknown data set 'digit'"),
    ):
        assert main(["claims", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_claims_that_need_training():
    outcomes = {o.claim.name: o.verdict for o in claims.run(Settings())}
    for name in ("deeper_plain_is_worse", "deeper_residual_is_not_worse", "lesion", "deepening"):
        assert outcomes[name].holds
    assert not outcomes["failure_is_overfitting"].holds
