"""The README cannot drift: its commands parse, its examples run, its files exist."""

import pathlib
import re
import shlex

import pytest

from flaxres.cli.main import COMMANDS, main

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "experiments" / "README.md"]
README = TEXTS[0].read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands():
    found = []
    for path in TEXTS:
        for block in blocks(path.read_text(), "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            for line in lines:
                for part in line.split("#")[0].split("&&"):
                    if part.strip():
                        found.append(part.strip())
    return found


def test_ci_runs_the_test_command_of_the_readme():
    assert "pip install -e '.[test]' && pytest" in README
    assert "pip install -q -e '.[test]' && pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", [c for c in commands() if "flaxres " in c])
def test_flaxres_commands_parse(command, capsys, monkeypatch):
    words = shlex.split(command)
    words = words[words.index("flaxres") + 1 :]
    if words[0].startswith("-"):
        return
    assert words[0] in COMMANDS
    # Everything but the work itself: with --help behind them, flags are still parsed by name.
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    with pytest.raises(SystemExit) as stop:
        main([words[0], "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in flags:
        assert flag in text, f"{flag} is no flag of {words[0]}"


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m")])
def test_modules_that_are_run_exist(command):
    module = shlex.split(command)[2]
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(text):
    for target in re.findall(r"\]\(([^)#]+)\)", text.read_text()):
        if not target.startswith("http"):
            assert (text.parent / target).exists(), target


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_table_of_models_is_right():
    import jax
    import jax.numpy as jnp

    import flaxres
    from flaxres.nets.summary import count_params

    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", README, re.MULTILINE)
    assert len(rows) >= 10
    for name, params in rows:
        model = flaxres.create_model(name, scan=True)
        images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        assert f"{count_params(shapes['params']):,}" == params, name
