"""Commands as a person types them: what they print, exit with, and leave behind."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from flaxres.cli.main import COMMANDS, main
from flaxres.train import presets
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
    assert [part["name"] for part in found["parts"]][:2] == ["stem", "stage1"]
    assert found["parts"][-1]["name"] == "head"
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
    "profile late": (
        ["train", "--steps", "20", "--profile-steps", "20:30"],
        "profile_steps=20:30 begins behind the last of 20 steps",
    ),
    "decay": (["train", "--weight-decay", "inf"], "weight_decay must be 0 or more, not inf"),
    "clip": (["train", "--clip-norm", "inf"], "clip_norm must be more than 0, not inf"),
    "classes": (["info", "resnet50", "--num-classes", "-1"], "num_classes must be 0 or more"),
    "driver": (
        ["train", "--driver", "horovod"],
        "invalid choice 'horovod' for argument '--driver'. Expected one of ('auto', 'device', "
        "'pmap', 'mesh') (flaxres train --help shows what is accepted)",
    ),
    "flag": (["train", "--stpes", "3"], "unrecognized options: --stpes, 3; did you mean --steps?"),
    "whole number": (["train", "--batch-size", "6.5"], "--batch-size takes INT, not '6.5'"),
    "number": (["train", "--steps", "ten"], "--steps takes INT, not 'ten'"),
    "no value": (["train", "--lr"], "missing value for argument '--lr'"),
    "nothing": (["eval"], "missing from flaxres eval: --workdir"),
    "checkpoint": (
        ["eval", "--workdir", "nowhere", "--checkpoint", "last"],
        "checkpoint must be a step or best, not 'last'",
    ),
    "warm-up": (
        ["train", "--steps", "30", "--warmup-steps", "30"],
        "warmup_steps must be less than steps=30, the whole run, not 30",
    ),
    "warm-up in epochs": (
        ["train", "--epochs", "1.5", "--warmup-epochs", "2"],
        "warmup_epochs must be less than epochs=1.5, the whole run, not 2",
    ),
    "mask without decay": (
        ["train", "--decay-mask", "kernle", "--weight-decay", "0"],
        "decay_mask 'kernle' matches no parameter",
    ),
    "part of optax": (
        ["train", "--optimizer", "lbfgs"],
        "optimizer 'lbfgs' of optax cannot train with a learning rate and gradients alone",
    ),
    "plain depth": (
        ["train", "--model", "plain20_cifar", "--stochastic-depth", "0.1"],
        "stochastic_depth=0.1 needs residual=True",
    ),
    "no image": (
        ["info", "resnet18", "--image-size", "0"],
        "image-size and channels must be positive, not 0 and 3",
    ),
    "image of many": (
        ["info", "resnet1*", "--image-size", "64"],
        "--image-size 64 needs the name of one model, not resnet1*",
    ),
    "classes of none": (
        ["info", "--num-classes", "5"],
        "--num-classes 5 needs the name of one model, not none",
    ),
    "channels of none": (["info", "--channels", "1"], "--channels 1 needs the name of one model"),
    "list of one": (["data", "list", "digits"], "flaxres data list takes no name, not 'digits'"),
    "manual": (
        ["data", "info", "digits", "--manual-dir", "here"],
        "--manual-dir here needs flaxres data prepare, not info",
    ),
    "nowhere": (
        ["train", "--steps", "2", "--workdir", "/dev/null/x"],
        "'/dev/null/x' cannot be written to (Not a directory): use another --workdir",
    ),
    "prepare": (["data", "prepare", "cifar1O"], "unknown data set 'cifar1O'; did you mean cifar10"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_exit_2_and_leaves_nothing(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, sentence = BAD[name]
    if name == "prepare":
        monkeypatch.setenv("TFDS_DATA_DIR", "nowhere")
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert sentence in err and err.startswith("flaxres: ") and err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


def test_a_switch_may_be_given_where_the_recipe_has_it_on():
    from flaxres.cli import options
    from flaxres.cli.train import Train

    for flag, found in ((["--scale-lr"], True), (["--no-scale-lr"], False), ([], True)):
        command = options.parse(Train, flag, "train", Train(presets.get("imagenet")))
        assert command.config.scale_lr is found


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_flag_is_refused_in_one_line_whatever_the_terminal(encoding):
    command = [sys.executable, "-m", "flaxres.cli.main", "train", "--driver", "horovod"]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("flaxres: invalid choice 'horovod'")


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


def test_a_data_set_may_have_moved(run, picture, tmp_path, capsys):
    moved = ["--data-dir", tmp_path / "moved"]
    assert call(capsys, "eval", "--workdir", run, *moved)[0] == 0
    assert call(capsys, "predict", "--workdir", run, *moved, picture)[0] == 0
    assert (tmp_path / "moved" / "digits").is_dir()


def test_the_best_checkpoint_is_evaluated_by_that_name(run, capsys):
    code, out, _ = call(capsys, "eval", "--workdir", run, "--checkpoint", "best", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["step"] == 6


def test_what_is_prepared_is_not_prepared_again(tfds_dir, capsys):
    code, out, _ = call(capsys, "data", "prepare", "fashion_mnist", "--data-dir", tfds_dir)
    assert code == 0 and str(tfds_dir / "fashion_mnist") in out


def test_help_of_train_has_every_recipe_with_its_source_and_time(capsys):
    _, out, _ = call(capsys, "train", "--help")
    for name in presets.PRESETS:
        assert f"{name}: " in out
    assert "arXiv 1512.03385" in out and "15 hours on four V100" in out


def test_report_reads_like_a_report(run):
    text = (run / "report.html").read_text()
    for part in ("test accuracy", "test examples", "Configuration", "Made by", "jaxlib"):
        assert part in text
    assert "None" not in text.partition("Configuration")[0]


def test_curves_say_what_the_loss_of_training_holds(run):
    from flaxres.cli.train import _training_loss
    from flaxres.train.workdir import Workdir

    assert _training_loss(Workdir(run)) == "training (smoothed labels)"


def test_a_loss_that_is_not_finite_is_drawn_and_reported(run, tmp_path, capsys):
    from flaxres.cli.train import finish
    from flaxres.train.results import Result
    from flaxres.train.workdir import Workdir

    work = Workdir(shutil.copytree(run, tmp_path / "run"))
    for file in (work.curves, work.report):
        file.unlink()
    with work.metrics_file.open("a") as file:
        file.write('{"step": 7, "split": "eval", "loss": null, "accuracy": 0.1}\n')
    finish(Result(7, float("nan"), 0.1, 360, 0.0, 1.0, "0", str(work.path)), True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] is None
    assert work.curves.is_file() and work.report.is_file()


@pytest.mark.parametrize("extra, code", [(["--lr", "1e30"], 1), ([], 0)])
def test_the_terminal_is_given_back_however_the_run_ends(
    extra, code, tmp_path, monkeypatch, capsys
):
    from flaxres.cli import progress

    closed = []
    monkeypatch.setattr(progress.Lines, "close", lambda self: closed.append(self))
    found, _, err = call(capsys, *TINY, "--workdir", tmp_path / "run", *extra)
    assert found == code and len(closed) == 1, err


def test_stopped_before_the_first_step_it_names_no_picture(tmp_path, capsys):
    from flaxres.cli.train import finish
    from flaxres.train.results import Result
    from flaxres.train.workdir import Workdir

    Workdir(tmp_path / "run").claim(TrainConfig())
    nan = float("nan")
    finish(
        Result(0, nan, nan, 0, 0.0, None, "0", str(tmp_path / "run"), stopped_by="SIGINT"), False
    )
    out = capsys.readouterr().out
    assert "stopped by SIGINT at step 0" in out and "curves" not in out and "report" in out


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
