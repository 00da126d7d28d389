"""The command line: what it prints is what the model says."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch

from sdq_hf.cli import main
from tests.hub_server import HubServer, patch_client
from tests.stopper import Stopper
from tests.test_modeling_sdq import create

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, bits in (("a", 3), ("b", 2)):
        model = create("resnet8_cifar")
        model.set_strategy(bits)
        model.set_strategy({"layer1.0.conv1": 5})
        model.save_pretrained(folder / name, print_size=False)
    return model, str(folder / "a"), str(folder / "b")


def test_info_prints_the_strategy_and_the_sizes(folders, capsys):
    model, _, path = folders
    assert main(["info", path]) == 0
    printed = capsys.readouterr().out
    assert model.strategy.table() in printed
    assert f"{model.strategy.weight_bytes() / 1e3:,.1f} kB of packed weights" in printed
    floats = sum(t.numel() * t.element_size() for t in model.float_twin().state_dict().values())
    assert model.float_bytes() == floats
    assert f"than {floats / 1e3:,.1f} kB in float32" in printed


def test_diff_lists_the_layers_that_differ(folders, capsys):
    _, first, second = folders
    assert main(["diff", first, second]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("7 of 10 layers differ")
    assert "layer3.0.conv2" in printed
    assert "W3 A4 -> W2 A4" in printed
    assert "layer1.0.conv1" not in printed
    assert main(["diff", first, first]) == 0
    assert capsys.readouterr().out.startswith("0 of 10 layers differ")


def test_push_info_and_diff_with_the_hub(folders, capsys, monkeypatch, tmp_path):
    model, first, second = folders
    with HubServer(tokens={"hf_good": "org-user"}) as hub:
        patch_client(monkeypatch, hub, tmp_path)
        assert main(["push", first, "org-user/net"]) == 0
        assert main(["push", second, "org-user/net", "--revision", "w2", "--commit-message", "Two bits"]) == 0
        assert hub.commits("org-user/net", "w2")[0][1] == "Two bits"
        assert main(["info", "org-user/net@w2"]) == 0
        assert model.strategy.table() in capsys.readouterr().out
        assert main(["diff", first, "org-user/net@w2"]) == 0
        assert "7 of 10 layers differ" in capsys.readouterr().out
        # Neither has downloaded weights.
        assert list((tmp_path / "hub").rglob("config.json"))
        assert not list((tmp_path / "hub").rglob("*.safetensors"))
        capsys.readouterr()
        assert main(["info", "org-user/nowhere"]) == 2
        assert "There is no folder 'org-user/nowhere', and as a Hub id: " in capsys.readouterr().err
        assert main(["info", "org-user/net@nowhere"]) == 2
        capsys.readouterr()
    # The Hub is gone, and config.json is in the cache still.
    assert main(["info", "org-user/net@w2"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sdq-hf: error: org-user/net@w2: the Hub cannot be reached: ")


def test_the_folder_of_a_run_is_not_that_of_a_model(folders, tmp_path, capsys):
    shutil.copytree(folders[1], tmp_path / "models" / "sdq-bits-2")
    assert main(["info", str(tmp_path)]) == 2
    assert f"name one of its models, {tmp_path}/models/sdq-bits-2" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "models" / "sdq-bits-2")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "/nowhere/at/all"], "There is no folder '/nowhere/at/all', and as a Hub id: "),
        (["export", "/nowhere/at/all", "--to", "onnx", "--output", "out"], "There is no folder '/nowhere/at/all', and"),
        (["push", "/nowhere/at/all", "org/name"], "no folder"),
        (["diff", "{a}", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folders, capsys, arguments, message):
    assert main([argument.replace("{a}", folders[1]) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sdq-hf: error:")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("command", [["info"], ["report"], ["diff", "{a}"]])
def test_a_model_without_a_strategy_is_named_and_nothing_else_printed(folders, capsys, tmp_path, command):
    shutil.copytree(folders[2], tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    del config["strategy"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    bare = str(tmp_path / "bare")
    assert main([part.replace("{a}", folders[1]) for part in command] + [bare]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"sdq-hf: error: {bare}: config.json has no strategy.\n"


def test_help_teaches(capsys):
    for arguments in (["--help"], ["info", "--help"], ["diff", "--help"], ["push", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert "hf auth login" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["inof"])
    assert stop.value.code == 2


def test_a_reader_that_has_seen_enough_is_no_error(folders):
    command = f"{sys.executable} -m sdq_hf.cli info {folders[1]} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.fixture
def ctrl_c():
    """Ctrl-C reaches the tests also where a script started them in its background, which shells let ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("when", ["onnx: writing", "integers: 20 images", "onnx: 20 real images"])
def test_ctrl_c_ends_an_export_in_one_line_and_leaves_nothing(tmp_path, capsys, ctrl_c, when):
    model = create("resnet8_cifar").to_hardware_profile(torch.rand(4, 3, 32, 32))
    model.save_pretrained(tmp_path / "model", print_size=False)
    command = ["export", str(tmp_path / "model"), "--to", "onnx", "--images", "20", "--output", str(tmp_path / "out")]
    with redirect_stdout(Stopper(when)):
        assert main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "sdq-hf: stopped"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
