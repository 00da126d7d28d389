"""verify_hls.py on a network of three layers: measured once, and not again."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.load import load_script

from .test_lower import profile_of

pytest.importorskip("hls4ml")
if shutil.which("g++") is None:
    pytest.skip("There is no g++.", allow_module_level=True)

verify_hls = load_script("verify_hls")


def test_a_network_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    model, _ = profile_of("mobilenetv1_025_cifar", 12, model_args={"blocks": ("dsa_r1_k3_s2_c32",)})
    model.config.id2label = {i: str(i) for i in range(5)}
    model.save_pretrained(tmp_path / "model", print_size=False)
    out = tmp_path / "hls.json"
    monkeypatch.setattr(sys, "argv", ["verify_hls.py", str(tmp_path / "model"), "--images", "4", "--out", str(out)])
    assert verify_hls.main() == 0
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert (row["real images"], row["equal"], row["made images equal"]) == (4, True, True)
    assert (row["layers"], row["image"]) == (4, "3x12x12")
    assert row["differ from control"] >= 2
    table = capsys.readouterr().out

    def again(*_):
        raise AssertionError("It was measured already.")

    monkeypatch.setattr(verify_hls, "measure", again)
    assert verify_hls.main() == 0
    assert capsys.readouterr().out == table
    # Fewer images than are asked for are not enough.
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-4], "--images", "5", *sys.argv[-2:]])
    with pytest.raises(AssertionError, match="measured already"):
        verify_hls.main()

    # An export that is not the integers is no success.
    row["equal"] = False
    found["rows"] = [row]
    out.write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-4], "--images", "4", *sys.argv[-2:]])
    assert verify_hls.main() == 1
