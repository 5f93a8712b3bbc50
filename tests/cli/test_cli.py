"""Commands as a person types them: what they print, exit with, and leave behind."""

import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from flaxres.cli.main import COMMANDS, main
from flaxres.train.config import TrainConfig

TINY = [
    "train",
    *("--model", "resnet8_cifar", "--steps", "6", "--batch-size", "16"),
    *("--eval-batch-size", "360", "--driver", "device"),
]


def call(capsys, *arguments):
    """(exit code, standard output, standard error)."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:  # tyro's own refusals
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main([*TINY, "--workdir", str(path)]) == 0
    return path


@pytest.fixture()
def picture(tmp_path):
    path = tmp_path / "seven.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


def test_train_draws_and_says_where_everything_is(run, capsys):
    code, out, _ = call(capsys, *TINY, "--workdir", run)
    assert code == 0 and "test accuracy" in out
    for part in ("curves.png", "report.html", "metrics.jsonl", "checkpoints"):
        line = next(line for line in out.splitlines() if part in line)
        assert pathlib.Path(line.split()[-1]).exists()
    with PIL.Image.open(run / "figures" / "curves.png") as image:
        assert image.width > 1000
    assert "data:image/png;base64" in (run / "report.html").read_text()


def test_json_is_the_last_line_and_holds_what_is_promised(run, capsys):
    code, out, _ = call(capsys, *TINY, "--workdir", run, "--json")
    trained = json.loads(out.splitlines()[-1])
    assert code == 0
    code, out, _ = call(capsys, "eval", "--workdir", run, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    for key in (
        "step",
        "loss",
        "accuracy",
        "examples",
        "images_per_second",
        "time_to_first_step",
        "params_sha256",
        "workdir",
    ):
        assert key in trained and key in found
    assert found["params_sha256"] == trained["params_sha256"]
    assert found["step"] == 6 and found["examples"] == 360


def test_predict_names_classes_for_any_picture(run, picture, capsys):
    code, out, _ = call(capsys, "predict", "--workdir", run, picture, picture, "--json")
    found = json.loads(out.splitlines()[-1])["predictions"]
    assert code == 0
    best = found[str(picture)]
    assert len(best) == 3 and best[0]["probability"] >= best[1]["probability"]
    assert best[0]["class"] in list("0123456789")


def test_info_prints_published_numbers(capsys):
    code, out, _ = call(capsys, "info", "resnet50", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["params"] == 25_557_032 and round(found["gmacs"], 3) == 4.089
    _, out, _ = call(capsys, "info", "resnet*_cifar")
    assert "resnet1202_cifar" in out


def test_data_describes_the_digits(capsys):
    code, out, _ = call(capsys, "data", "info", "digits", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["splits"] == {"train": 1437, "test": 360}
    assert "fashion_mnist" in call(capsys, "data", "list")[1]


def test_doctor_lists_versions(capsys):
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 0 and "jax" in json.loads(out.splitlines()[-1])["versions"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_defaults(command, capsys):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0 and f"flaxres {command}" in out and "default" in out


BAD = {
    "unknown command": (["trian"], "unknown command 'trian'; did you mean train?"),
    "unknown model": (["info", "resnet5O"], "unknown model 'resnet5O'; did you mean"),
    "unknown model to train": (
        ["train", "--model", "resnt20_cifar"],
        "did you mean resnet20_cifar",
    ),
    "unknown data": (["train", "--data", "digit"], "unknown data set 'digit'; did you mean digits"),
    "not prepared": (
        ["train", "--data", "cifar10", "--data-dir", "nowhere"],
        "'cifar10' is not prepared in nowhere: run flaxres data prepare cifar10 --data-dir nowhere",
    ),
    "batch and devices": (
        ["train", "--batch-size", "12", "--devices", "8"],
        "batch_size=12 does not divide over 8 devices; use a multiple of 8",
    ),
    "steps": (["train", "--steps", "-3"], "steps must be more than 0, not -3"),
    "no steps": (["train", "--steps", "0"], "steps must be more than 0, not 0"),
    "batch": (["train", "--batch-size", "0"], "batch_size must be at least 1, not 0"),
    "rate": (["train", "--lr", "-0.1"], "lr must be more than 0, not -0.1"),
    "rate nan": (["train", "--lr", "nan"], "lr must be more than 0, not nan"),
    "image size": (
        ["train", "--model", "resnet18"],
        "an image of 12×12 is too small for strides of 32 in all; use at least 32×32",
    ),
    "devices": (["train", "--devices", "99"], "devices=99 asks for more than there are (8 cpu)"),
    "preset": (["train", "--preset", "digts"], "unknown preset 'digts'; did you mean digits"),
    "init": (
        ["train", "--residual-init", "zero_last"],
        "residual_init 'zero_last' does not fit style='v1' with norm='batch'",
    ),
    "optimizer": (["train", "--optimizer", "sdg"], "unknown optimizer 'sdg'"),
    "mask": (["train", "--decay-mask", "kernle"], "decay_mask 'kernle' matches no parameter"),
    "both lengths": (["train", "--steps", "3", "--epochs", "2"], "give steps or epochs, not both"),
    "no run": (["eval", "--workdir", "nowhere"], "'nowhere' is not a work directory"),
    "info image": (["info", "resnet18", "--image-size", "16"], "16×16 is too small"),
    "augment": (["train", "--augment", "spin"], "unknown augmentation 'spin'"),
    "profile": (["train", "--profile-steps", "9"], "profile_steps must be FROM:TO"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_exit_2_and_leaves_nothing(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, sentence = BAD[name]
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert sentence in err and err.startswith("flaxres: ") and err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["train", "--driver", "horovod"], ["train", "--stpes", "3"], ["eval"]]
)
def test_flags_that_do_not_parse_exit_with_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert code == 2 and arguments[-1].removeprefix("--") in (out + err).replace("eval", "eval")
    assert not list(tmp_path.iterdir())


def test_work_directory_of_another_run_names_the_fields(run, capsys):
    code, _, err = call(capsys, *TINY, "--workdir", run, "--lr", "0.3", "--seed", "4")
    assert code == 2 and "seed: 0 here, 4 there; lr: 0.2 here, 0.3 there" in err


def test_bad_pictures_are_named(run, tmp_path, picture, capsys):
    torn = tmp_path / "torn.png"
    torn.write_bytes(picture.read_bytes()[:200])
    text = tmp_path / "text.png"
    text.write_text("not an image")
    for path, sentence in (
        (torn, "cannot read"),
        (text, "cannot read"),
        (tmp_path / "none.png", "no image file"),
    ):
        code, _, err = call(capsys, "predict", "--workdir", run, path)
        assert code == 2 and sentence in err and str(path) in err and err.count("\n") == 1


def test_checkpoint_that_is_not_there_is_named(run, capsys):
    code, _, err = call(capsys, "eval", "--workdir", run, "--checkpoint", "5")
    assert code == 2 and "no checkpoint of step 5" in err and "there are: 6" in err


def test_help_needs_no_jax():
    code = (
        "import sys; from flaxres.cli.main import main; code = main(['--help']); "
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: flaxres" in done.stdout, done.stderr


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(monkeypatch):
    from flaxres.cli import progress

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert isinstance(progress.listener(False), progress.Bar)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert type(progress.listener(False)) is progress.Lines


def test_every_field_of_the_configuration_is_a_flag(capsys):
    _, out, _ = call(capsys, "train", "--help")
    for field in TrainConfig.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in out
