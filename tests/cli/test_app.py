"""What every command shares: help with an example, one line for a mistake, exit codes, a quick start."""

import subprocess
import sys

import pytest

import remoe
from remoe.cli.failures import FOR_THE_FIRST, exit_code_of, spread_overrides
from remoe.errors import DataError, TrainingError

COMMANDS = (
    "demo", "prepare", "train", "compare", "eval", "analyze", "density", "generate", "export", "convert", "plan",
    "bench", "runs", "recipes",
)  # fmt: skip
SUBCOMMANDS = ("bench layer", "bench model", "bench decode", "bench tune", "runs diff", "recipes show")


@pytest.fixture(name="cli")
def _cli(remoe):
    return remoe


def test_help_names_every_command_and_no_other(cli):
    listed = cli("--help").out.partition("Commands:")[2].partition("Example:")[0]
    assert {line.split()[0] for line in listed.strip().splitlines()} == set(COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, *SUBCOMMANDS])
def test_help_of_each_command_has_an_example(cli, command):
    outcome = cli(*command.split(), "--help")
    assert outcome.code == 0
    assert f"Example: remoe {command.split()[0]}" in " ".join(outcome.out.split())


def test_version_is_the_packages(cli):
    assert cli("--version").out == f"remoe {remoe.__version__}\n"


def test_help_is_quick_because_torch_is_not_loaded():
    code = "import sys; from remoe.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_module_is_the_command():
    finished = subprocess.run(
        [sys.executable, "-m", "remoe", "recipes", "show", "demo-rleu"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert finished.returncode == 2
    assert finished.stderr == "remoe: there is no recipe 'demo-rleu'; did you mean 'demo-relu'?\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian x", "there is no command 'trian'; did you mean 'train'?; see `remoe --help`"),
        ("train --overwite x", "there is no option --overwite; did you mean '--overwrite'?; see `remoe train --help`"),
        ("plan", "missing argument"),
        ("generate x --seed y", "--seed is y, must be a whole number; see `remoe generate --help`"),
        ("export x --nonsense", "there is no option --nonsense; allowed: --help, --overwrite, --shard-gb, --to; see"),
        ("recipes --nonsense", "there is no option --nonsense; allowed: --help; see `remoe recipes --help`"),
        ("compare demo-relu --no-reprot", "there is no option --no-reprot; did you mean '--no-report'?"),
        ("recipes shwo x", "there is no command 'shwo'; did you mean 'show'?"),
        ("plan demo-relu more", "unexpected extra argument"),
        ("compare demo-relu --routers relu --name x --parallel 0", "--parallel is 0, must be at least 1"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_code_2(cli, arguments, message):
    outcome = cli(*arguments.split())
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_exit_code_is_the_errors_own(capsys):
    def fail_with(error):
        def command():
            raise error

        return exit_code_of(command)

    assert fail_with(DataError("the text\nis empty")) == 2
    assert fail_with(TrainingError("no finite loss")) == 1
    assert fail_with(OSError(28, "No space left on device", "runs/x")) == 2
    assert fail_with(FileExistsError(17, "File exists", "text.txt")) == 2
    assert fail_with(KeyboardInterrupt()) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["remoe: the text is empty", "remoe: no finite loss"]
    assert lines[2] == "remoe: runs/x: No space left on device; name a place that can be written, with room"


def test_a_process_beside_the_first_ends_in_silence_once_that_one_could_speak(capsys, monkeypatch):
    def fail():
        raise DataError("the text is empty")

    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("remoe.cli.failures.time.sleep", waits.append)
    assert exit_code_of(fail) == 2
    assert waits == [FOR_THE_FIRST]
    assert capsys.readouterr().err == ""


def test_a_file_that_may_not_be_read_is_not_told_as_one_to_write(capsys, tmp_path, monkeypatch):
    def use(name):
        def fail():
            raise PermissionError(13, "Permission denied", str(tmp_path / name))

        assert exit_code_of(fail) == 2
        return capsys.readouterr().err.partition("denied; ")[2]

    (tmp_path / "secret.txt").touch()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    assert use("secret.txt") == "must be readable: give yourself access, or name another\n"
    assert use("new.txt") == "name a place that can be written, with room\n"


def test_a_folder_in_place_of_a_file_to_write_is_said_before_anything_is_measured(cli):
    outcome = cli("bench", "layer", "--json", ".")
    assert (outcome.code, outcome.err) == (2, "remoe: --json is ., a folder, must be a file\n")


def test_a_file_in_place_of_the_folder_of_runs_is_said(cli, tmp_path):
    (tmp_path / "text.txt").touch()
    outcome = cli("runs", "--root", "text.txt")
    assert (outcome.code, outcome.err) == (2, "remoe: --root is text.txt, a file, must be a folder of runs\n")


def test_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("train x --set a=1 b=2 --resume", "train x --set a=1 --set b=2 --resume"),
        ("train --set a=1 x.yaml", "train --set a=1 x.yaml"),
        ("train x --set a=1 --set b=2 c=3", "train x --set a=1 --set b=2 --set c=3"),
        ("train x", "train x"),
    ],
)
def test_one_set_may_take_several_overrides(given, read):
    assert " ".join(spread_overrides(given.split())) == read


def test_reader_that_stops_early_is_no_error():
    pipe = f"{sys.executable} -m remoe train --keys | head -1"
    finished = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, timeout=60, check=False)
    assert finished.stdout.startswith("name = run")
    assert finished.stderr == ""
