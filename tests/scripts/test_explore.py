"""`explore.py`: the functions behind its buttons, and the page itself in a headless Chromium."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from sdq_hf import SDQForImageClassification

pytest.importorskip("gradio", reason="the page needs the extra `demo`")

SCRIPT = Path(__file__).parents[2] / "scripts" / "explore.py"
LABELS = {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
]


def load_script():
    spec = importlib.util.spec_from_file_location("explore", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["explore"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


explore = load_script()


def save_model(folder):
    torch.manual_seed(0)
    model = SDQForImageClassification.from_timm("resnet8_cifar", id2label=LABELS, img_size=32)
    # Without training all probabilities are about equal; a larger head sets them apart.
    state = model.float_twin().state_dict()
    head = list(model.strategy)[-1]
    state[f"{head}.weight"] *= 20
    model.load_float_state(state)
    model.set_strategy(dict(zip(model.strategy.searchable, (1, 2, 3, 4), strict=False)))
    model.eval().calibrate([torch.randn(16, 3, 32, 32)])
    model.save_pretrained(folder, print_size=False)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    pixels = np.random.default_rng(5).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@torch.no_grad()
def probabilities(folder, picture, twin=False):
    """Label -> probability, by nothing but the model's own interface."""
    model = SDQForImageClassification.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.open(picture), return_tensors="pt")["pixel_values"]
    logits = model.float_twin()(pixels) if twin else model(pixels).logits
    return {LABELS[i]: p for i, p in enumerate(logits[0].softmax(-1).tolist())}


# Functions ---------------------------------------------------------------------------------------------------------


def test_the_description_is_that_of_the_strategy_and_the_file(folder):
    model = SDQForImageClassification.from_pretrained(folder)
    headline, table = explore.describe(model, folder)
    figures = {title: value for title, value, _ in headline}
    size = (folder / "model.safetensors").stat().st_size
    assert figures["Average bits"] == f"{model.strategy.average_bits():.2f}"
    assert figures["File"] == f"{size / 1e3:,.1f} kB"
    assert figures["Network"] == "resnet8_cifar"
    assert list(table["layer"]) == list(model.strategy)
    assert list(table["weight bits"]) == list(model.strategy.weight_bits.values())
    assert list(table["MMACs"]) == [layer.macs / 1e6 for layer in model.strategy.values()]
    assert list(table["pinned"] == "yes") == [layer.pinned for layer in model.strategy.values()]


def test_a_float_layer_is_called_so_and_a_float_model_has_no_weight_plot(folder):
    model = SDQForImageClassification.from_pretrained(folder).dequantize()
    _, table = explore.describe(model, folder)
    assert set(table["weight bits"]) == {"float"}
    _, weights = explore.plots(model)
    assert weights is None


def test_each_layer_has_a_bar_and_a_panel_of_weights_has_a_column_of_its_own(folder):
    model = SDQForImageClassification.from_pretrained(folder)
    bits, weights = explore.plots(model)
    assert [bar.get_height() for bar in bits.axes[0].patches] == list(model.strategy.weight_bits.values())
    assert {axis.get_subplotspec().colspan.stop for axis in weights.axes if axis.axison} == {1}
    weights.canvas.draw()
    boxes = sorted(axis.get_position().y0 for axis in weights.axes if axis.axison)
    assert len(set(boxes)) == len(boxes)


def test_classify_gives_the_probabilities_of_the_model_and_of_its_twin(folder, picture):
    loaded = explore.load(str(folder))
    first, second, verdict = explore.classify(loaded.model, loaded.twin, loaded.processor, Image.open(picture))
    plain, twin = probabilities(folder, picture), probabilities(folder, picture, twin=True)
    assert first == pytest.approx(plain, abs=1e-6)
    assert second == pytest.approx(twin, abs=1e-6)
    assert ("Both say" in verdict) == (max(plain, key=plain.get) == max(twin, key=twin.get))
    assert f"{100 * max(abs(plain[label] - twin[label]) for label in plain):.1f} points" in verdict


def test_two_classes_of_one_name_stay_two(folder, picture):
    loaded = explore.load(str(folder))
    loaded.model.config.id2label[1] = "ant"
    first, _, _ = explore.classify(loaded.model, loaded.twin, loaded.processor, Image.open(picture))
    assert set(first) == {"ant (0)", "ant (1)", "cat", "dog"}


def test_the_cards_pictures_are_shown_where_there_are_any(folder, tmp_path):
    with_pictures = shutil.copytree(folder, tmp_path / "model")
    (with_pictures / "plots").mkdir()
    Image.new("RGB", (8, 8)).save(with_pictures / "plots" / "descent.png")
    for path, there in ((folder, False), (with_pictures, True)):
        search, descent, accuracy = explore.show(str(path), "")[6:9]
        assert search.visible is there
        assert (descent is not None, accuracy) == (there, None)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("", "", "Give a folder"),
        ("no/such/folder", "", "neither a folder here nor a Hub id"),
        ("org/missing", "", "org/missing could not be loaded"),
        ("<b>bold</b>", "", "&lt;b&gt;bold"),
        ("EMPTY", "", "no config.json"),
        ("DAMAGED", "", "the file is damaged"),
        ("CUT", "", "no readable safetensors file"),
        ("MODEL", "v1", "no revisions"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(name, revision, message, folder, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network\nin this test")

    if name == "org/missing":
        monkeypatch.setattr(explore, "snapshot_download", no_network)
    damaged = shutil.copytree(folder, tmp_path / "damaged") / "model.safetensors"
    contents = bytearray(damaged.read_bytes())
    contents[-9] ^= 1
    damaged.write_bytes(contents)
    cut = shutil.copytree(folder, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(contents[:-100])
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "DAMAGED": damaged.parent, "CUT": cut.parent, "MODEL": folder}
    first, *others = explore.show(str(places.get(name, name)), revision)
    assert message in first
    assert "Traceback" not in first
    assert "\n" not in first
    assert all(type(other) is dict for other in others)  # Gradio's sign for "as it was"


def test_classifying_without_a_model_or_an_image_says_what_is_missing(folder):
    assert "Load a model first" in explore.compare(None, None)[2]
    assert "Give an image first" in explore.compare(explore.load(str(folder)), None)[2]


def test_images_beside_the_script_are_those_to_try(tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "HERE", tmp_path)
    assert explore.example_images() == []
    (tmp_path / "examples").mkdir()
    Image.new("RGB", (9, 8)).save(tmp_path / "examples" / "a.png")
    (tmp_path / "examples" / "README.md").touch()
    assert [image.size for image in explore.example_images()] == [(9, 8)]


# Page --------------------------------------------------------------------------------------------------------------


@contextmanager
def running(folder, tmp_path):
    """The app as a child process; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with open(tmp_path / "log.txt", "w+") as log:
        command = [sys.executable, str(SCRIPT), str(folder), "--port", str(port)]
        app = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: app.poll() is not None or is_open(port), 120)
            assert app.poll() is None, (tmp_path / "log.txt").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            app.terminate()
            app.wait(20)


def is_open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, seconds=60):
    """Wait until `condition()` is true, and give what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"nothing happened within {seconds} s"
        time.sleep(0.2)
    return found


@contextmanager
def chromium(profile):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is tested with selenium")
    if not (CHROMIUM and DRIVER):
        pytest.skip("the page is tested in Debian's chromium, with chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield browser
    finally:
        browser.quit()


def test_the_page_in_a_browser(folder, picture, tmp_path):
    with chromium(tmp_path / "profile") as browser, running(folder, tmp_path) as address:

        def find(selector):
            return browser.find_element("css selector", selector)

        def texts(selector):
            # An element may be replaced between finding and reading it.
            script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
            return browser.execute_script(script, selector)

        def write(selector, text):
            find(selector).clear()
            find(selector).send_keys(text)

        browser.get(address)
        wait_for(lambda: texts("#head b"))
        model = SDQForImageClassification.from_pretrained(folder)
        assert texts("#head b")[0] == f"{model.strategy.average_bits():.2f}"
        wait_for(lambda: all(layer in texts("#layers")[0] for layer in model.strategy))

        write("#model textarea, #model input", str(tmp_path / "nowhere"))
        find("#load").click()
        wait_for(lambda: texts("#status .failed"))
        assert "neither a folder here nor a Hub id" in texts("#status .failed")[0]
        assert "Traceback" not in find("body").text
        write("#model textarea, #model input", str(folder))
        find("#load").click()
        wait_for(lambda: not texts("#status .failed"))

        (tab,) = [tab for tab in browser.find_elements("css selector", "button[role=tab]") if tab.text == "Classify"]
        tab.click()
        find("#image input[type=file]").send_keys(str(picture))
        wait_for(lambda: browser.find_elements("css selector", "#image img"))
        find("#classify").click()
        wait_for(lambda: texts("#verdict .prose") != [""])
        for column, twin in (("#quantized", False), ("#twin", True)):
            expected = probabilities(folder, picture, twin)
            lines = " ".join(texts(column)[0].split())
            shown = [(label, int(percent)) for label, percent in re.findall(r"(ant|bee|cat|dog) (\d+)\s?%", lines)]
            ranked = sorted(expected, key=expected.get, reverse=True)
            assert [label for label, _ in shown] == ranked
            assert [percent for _, percent in shown] == [round(100 * expected[label]) for label in ranked]
        assert find("#twin").rect["x"] > find("#quantized").rect["x"] + find("#quantized").rect["width"]
        assert find("#twin").rect["y"] == find("#quantized").rect["y"]
        assert browser.get_screenshot_as_file(str(tmp_path / "desktop.png"))

        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        wait_for(lambda: find("#twin").rect["y"] > find("#quantized").rect["y"])  # below one another now
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        assert browser.get_screenshot_as_file(str(tmp_path / "phone.png"))
