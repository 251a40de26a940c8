"""Tests that need more than requirements.txt brings: an OCR model, and a browser that a program drives.

pip install rapidocr onnxruntime playwright && pytest -q extras.py      # with Chromium in the PATH
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

from rewards import Reward

HERE = Path(__file__).resolve().parent


def test_ocr_reads_drawn_words():
    texts = ["HELLO WORLD", "Hello World", "HELLO WROLD", ""]
    pictures = []
    for text in texts:
        picture = Image.new("RGB", (512, 512), "white")
        ImageDraw.Draw(picture).text((40, 200), text, "black", ImageFont.load_default(64))
        pictures.append(torch.tensor(list(picture.tobytes())).view(512, 512, 3).permute(2, 0, 1) / 255)
    R = Reward("ocr")(torch.stack(pictures), ['a sign that says "Hello World"'] * 4)
    assert R.tolist() == pytest.approx([1, 1, 1 - 2 / 10, 0])


def test_a_person_trains_the_tiny_model_in_a_browser(tmp_path):
    """Three groups in each of two iterations, by keyboard and mouse, with the page closed in between."""
    small = "--pairs 3 --steps 2 --iterations 2 --lr 0.005 --watch brightness --name by-hand"
    command = [sys.executable, str(HERE / "train.py"), "--reward", "human", *small.split()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    url = re.search(r"http://127.0.0.1:\d+/", run.stdout.readline())[0]
    screenshots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-background-networking"]
        )

        def open_page(number):
            page = browser.new_page(viewport={"width": 1000, "height": 700})
            page.goto(url)
            page.wait_for_selector(f"text=group {number} of 3")
            return page

        page = open_page(1)
        assert page.locator("img").count() == 2 and page.locator("h1").inner_text()
        assert page.locator("img").first.evaluate("image => image.naturalWidth") == 64
        page.screenshot(path=screenshots / "human.png")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("text=group 2 of 3; 1 answered")
        page.close()
        page = open_page(2)
        page.keyboard.press("Space")
        page.wait_for_selector("text=group 3 of 3; 2 answered")
        page.locator("button").nth(1).click()
        page.wait_for_selector("text=group 1 of 3; 3 answered")  # of the next iteration
        page.keyboard.press("3")  # there is no third image
        page.keyboard.press("2")
        page.wait_for_selector("text=group 2 of 3; 4 answered")
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("text=group 3 of 3; 5 answered")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("text=The training has stopped", timeout=60_000)
        browser.close()
    out = run.communicate(timeout=60)[0]
    assert run.returncode == 0 and "brightness" in out
    folder = tmp_path / "runs" / "by-hand"
    lines = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    assert [line["choice"] for line in lines] == [0, None, 1, 1, 1, 0]
    assert len(list((folder / "preferences").iterdir())) == 6
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record.get("reward") for record in records] == [None, 0.5, 0.5]
    assert records[-1]["drift"] > 0 and "held_out" not in records[-1]
    assert (folder / "report.png").exists() and (folder / "lora.safetensors").exists()
