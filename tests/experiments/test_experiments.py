import importlib
import json
import pathlib
import re

import pytest

from experiments import common
from flaxres.nets.initialize import residual_inits, resolve

FOLDER = pathlib.Path(common.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "common"))
FAST = ("identity_at_init", "shattered_gradients")


def module(name):
    return importlib.import_module(f"experiments.{name}")


def test_there_are_ten_experiments():
    assert len(NAMES) == 10


@pytest.mark.parametrize("name", NAMES)
def test_header_says_question_command_time_and_what_came_out(name):
    header = module(name).__doc__
    title, *parts = re.split(r"\n(Question|Command|Time|Came out) +", header)
    assert title.strip().endswith("?")
    assert parts[::2] == ["Question", "Command", "Time", "Came out"]
    assert all(len(part) > 10 for part in parts[1::2])
    assert f"python -m experiments.{name} [--quick]" in header
    assert "TODO" not in header


@pytest.mark.parametrize("name", NAMES)
def test_picture_and_numbers_are_there(name):
    picture = (FOLDER / "figures" / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert json.loads((FOLDER / "figures" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_readme_lists_the_experiment_with_its_picture(name):
    text = (FOLDER / "README.md").read_text()
    assert f"({name}.py)" in text
    assert f"(figures/{name}.png)" in text


def test_top_readme_shows_the_table_of_lesions():
    text = (FOLDER.parent / "README.md").read_text()
    numbers = json.loads((FOLDER / "figures" / "lesion.json").read_text())
    nets = ("residual, zero gamma", "residual", "plain")
    for block in numbers["plain: zeroed"]:
        cells = " | ".join(f"{numbers[f'{net}: zeroed'][block]:.1f}" for net in nets)
        assert f"| `{block}` | {cells} |" in text
    assert "python -m experiments.lesion" in text


def test_no_block_zeroed_ruins_a_net_from_zero_gamma_and_each_ruins_a_plain_one():
    numbers = json.loads((FOLDER / "figures" / "lesion.json").read_text())
    assert min(numbers["residual, zero gamma: zeroed"].values()) > 90
    assert max(numbers["plain: zeroed"].values()) < 20


def test_options_default_to_the_committed_figures():
    found = common.options("about", [], seeds=3)
    assert found == common.Options(quick=False, out=FOLDER / "figures", seeds=3)


def test_quick_takes_one_seed(tmp_path):
    found = common.options("about", ["--quick", "--seeds", "5", "--out", str(tmp_path)])
    assert found == common.Options(quick=True, out=tmp_path, seeds=1)


def test_no_seeds_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        common.options("about", ["--seeds", "0"])
    assert stop.value.code == 2
    assert "--seeds must be at least 1, not 0" in capsys.readouterr().err


def test_starts_are_all_that_fit():
    found = common.starts()
    for fields in found:
        resolve(fields["residual_init"]).check(
            style=fields["style"], norm=fields["norm"], residual=fields["residual"]
        )
    names = {fields["residual_init"].partition("(")[0] for fields in found}
    assert names == set(residual_inits()) - {"dirac"}
    plain = {fields["residual_init"] for fields in common.starts(residual=False)}
    assert plain == {"default", "zero_branch", "dirac"}


def test_saved_numbers_are_short_and_nan_is_null(tmp_path, capsys):
    common.save(tmp_path, "found", {"a": 1 / 3, "b": [float("nan"), 2], 3: {"c": "x"}})
    expected = {"a": 0.3333, "b": [None, 2], "3": {"c": "x"}}
    assert json.loads((tmp_path / "found.json").read_text()) == expected
    assert json.loads(capsys.readouterr().out) == expected


def check_run(name, out):
    numbers = module(name).main(["--quick", "--out", str(out)])
    assert numbers
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / f"{name}.json").read_text())


@pytest.mark.parametrize("name", FAST)
def test_fast_experiment_runs(name, tmp_path):
    check_run(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FAST])
def test_slow_experiment_runs(name, tmp_path):
    check_run(name, tmp_path)
