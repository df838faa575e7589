"""The command as people type it: output, errors, exit status."""

from pathlib import Path

import pytest

from mtjax.cli import main


def run(capsys, *args):
    """Exit status, standard output, standard error."""
    try:
        main(list(args))
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_teaches(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for word in ("quickstart", "train", "list", "mtjax data prepare", "goes on"):
        assert word in out
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0
    assert "--learning-rate" in out
    assert "of Adam" in out


def test_list_shows_methods_problems_and_data(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    words = ("nash_mtl", "Gramian", "held-out data", "2 further", "multi_mnist")
    for word in (*words, "census_income_kdd"):
        assert word in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--data", "multi_mnits"], "multi_mnist"),
        (["train", "--methods", "pcgard"], "pcgrad"),
        (["train", "--steps", "0"], "steps"),
        (["train", "--steps", "many"], "many"),
        (["train", "--data", "energy_efficiency", "--data-dir", "nowhere"], "prepare"),
        (["train", "--no-such-flag"], "no-such-flag"),
        (["train", "--seeds", "-1"], "seeds"),
    ],
)
def test_errors_exit_with_2_and_write_nothing(
    capsys, tmp_path, monkeypatch, args, message
):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *args, "--out", str(tmp_path / "run"))
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_data_has_commands_of_its_own(capsys):
    status, out, _ = run(capsys, "data", "--help")
    assert status == 0
    assert "prepare" in out
    status, out, _ = run(capsys, "data", "list")
    assert status == 0
    assert "census_income_kdd" in out
    status, _, err = run(capsys, "data")
    assert status == 2
    assert "prepare" in err


def test_prepare_then_train(capsys, tmp_path):
    source = Path(__file__).parents[2] / "shared" / "data" / "energy_efficiency"
    if not source.exists():
        pytest.skip("needs ../shared/data/energy_efficiency")
    data = ["--data-dir", str(tmp_path / "data")]
    status, out, _ = run(
        capsys, "data", "prepare", "energy_efficiency", "--from", str(source), *data
    )
    assert status == 0
    assert "Prepared" in out
    methods = ["--methods", "equal", "modo", "auto_lambda"]
    flags = ["--steps", "4", "--seeds", "2", "--no-single-task", *methods]
    status, out, _ = run(
        capsys,
        *["train", "--data", "energy_efficiency", *data, *flags],
        *["--out", str(tmp_path / "run")],
    )
    assert status == 0
    for word in ("rmse", "modo", "auto_lambda"):
        assert word in out


def test_prepare_without_the_files_says_which(capsys, tmp_path):
    status, _, err = run(
        capsys, "data", "prepare", "adult", "--from", str(tmp_path), "--data-dir", "x"
    )
    assert status == 2
    assert "adult" in err


def test_quickstart_runs_on_the_embedded_set(capsys, tmp_path):
    out = tmp_path / "run"
    flags = ["--steps", "2", "--seeds", "1", "--methods", "equal", "pcgrad"]
    status, table, _ = run(capsys, "quickstart", *flags, "--out", str(out))
    assert status == 0
    assert "single-task" in table
    assert "pcgrad" in table
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "training_curves.png", "tradeoff.png"} <= names
