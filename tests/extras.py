"""Tests that need more than requirements.txt brings: an OCR model, and a browser to drive.

pip install rapidocr onnxruntime playwright && pytest -q tests/extras.py  # and Chromium in the PATH
"""

import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

from rewards import Reward
from tests.commands import metrics, start
from zoo.jsonl import read_lines


def test_ocr_reads_drawn_words():
    pictures = []
    for text in ("HELLO WORLD", "Hello World", "HELLO WROLD", ""):
        picture = Image.new("RGB", (512, 512), "white")
        ImageDraw.Draw(picture).text((40, 200), text, "black", ImageFont.load_default(64))
        pictures.append(torch.tensor(np.array(picture)).permute(2, 0, 1) / 255)
    R = Reward("ocr")(torch.stack(pictures), ['a sign that says "Hello World"'] * 4)
    assert R.tolist() == pytest.approx([1, 1, 1 - 2 / 10, 0])


def test_a_person_trains_the_tiny_model_in_a_browser(tmp_path):
    """Three groups in each of two iterations, by keyboard and mouse, the page closed in between.

    Once an answer cannot be saved. Before the last one Ctrl-C stops the run; --resume asks for that
    alone.
    """
    flags = "--reward human --groups 3 --steps 2 --iterations 2 --lr 0.005 --watch brightness"
    folder = tmp_path / "runs" / "by-hand"

    def train(*more):
        run = start("train.py", *flags.split(), "--name", "by-hand", *more, cwd=tmp_path)
        for line in run.stdout:
            if found := re.search(r"http://127.0.0.1:\d+/", line):
                return run, found[0]

    run, url = train()
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def open_page(number):
            page = browser.new_page(viewport={"width": 1000, "height": 700})
            page.goto(url)
            page.wait_for_selector(f"text=group {number} of 3")
            return page

        page = open_page(1)
        assert page.locator("img").count() == 2
        assert page.locator("img").first.evaluate("image => image.naturalWidth") == 64
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("text=group 2 of 3; 1 answered")
        page.close()

        page = open_page(2)
        answered = folder / "preferences"
        answered.rename(answered.with_name("aside"))
        answered.write_text("as if the disk were full")
        page.keyboard.press("Space")
        page.wait_for_selector("text=Your answer was not saved")
        page.wait_for_selector("text=group 2 of 3; 1 answered")
        answered.unlink()
        answered.with_name("aside").rename(answered)
        page.keyboard.press("Space")
        page.wait_for_selector("text=group 3 of 3; 2 answered")
        assert not page.locator("#problem").inner_text()

        page.locator("button").nth(1).click()
        page.wait_for_selector("text=group 1 of 3; 3 answered")  # of the next iteration
        page.keyboard.press("3")  # there is no third image
        page.keyboard.press("2")
        page.wait_for_selector("text=group 2 of 3; 4 answered")
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("text=group 3 of 3; 5 answered")
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=10) == 130
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("text=Your answer was not saved (the training cannot be reached)")
        page.wait_for_selector("text=The training has stopped")

        run, url = train("--resume")
        page = open_page(3)
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("text=The training has stopped", timeout=60_000)
        browser.close()

    out = run.communicate(timeout=60)[0]
    assert run.returncode == 0 and "brightness" in out
    choices = [line["choice"] for line in read_lines(folder / "preferences.jsonl")]
    assert choices == [0, None, 1, 1, 1, 0]
    assert len(list((folder / "preferences").iterdir())) == 6
    records = metrics(folder)
    assert [record.get("reward") for record in records] == [None, 0.5, 0.5]
    assert records[-1]["drift"] > 0 and "held_out" not in records[-1]
    assert (folder / "report.png").exists() and (folder / "lora.safetensors").exists()
