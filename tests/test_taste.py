"""Tests of a taste: the fit against autograd and known answers, the study at its page, the reward.

pytest -q tests/test_taste.py
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from rewards import TINY, Reward, load_clip
from studies import taste as study
from support.errors import UserError
from support.evaluation import HeldOut
from tests.commands import ENVIRONMENT, ROOT
from zoo.human import Human, read_answers
from zoo.jsonl import append_line, read_lines
from zoo.taste import PRECISIONS, fit, newton

SMALL = ["--steps", "1", "--batch", "8", "--name", "mine"]


# ---- the fit


def choices_of(w, n, generator):
    """Differences d [n, D], twice as large in the first half of D, and answers as w gives them."""
    d = torch.randn(n, len(w), generator=generator, dtype=torch.float64)
    d[:, : len(w) // 2] *= 2
    return d, (torch.rand(n, generator=generator) < torch.sigmoid(d @ w)).double()


def test_newton_finds_the_mode_of_autograd():
    d, y = choices_of(torch.ones(6).double(), 40, torch.Generator().manual_seed(0))

    def minus_log_posterior(u):
        return (F.softplus(d @ u) - y * (d @ u)).sum() + 0.3 / 2 * u @ u

    u, H = newton(d, y, 0.3, torch.zeros(6).double())
    slope = torch.autograd.functional.jacobian(minus_log_posterior, u)
    assert slope.abs().max() < 1e-8
    curvature = torch.autograd.functional.hessian(minus_log_posterior, u)
    # H is that of a step of under 1e-6 before
    torch.testing.assert_close(H, curvature, rtol=1e-5, atol=1e-5)


def test_the_fit_is_the_posterior_on_a_grid():
    """Mean and covariance of w in two dimensions, all precisions counted, from 500 x 500 values.

    24 choices, 8 of them without preference. Laplace's errors are a tenth too small here.
    """
    d, y = choices_of(torch.tensor([0.3, -0.5]).double(), 24, torch.Generator().manual_seed(0))
    y[:8] = 0.5
    found, covariance, _ = fit(d, y, torch.arange(24) % 10)

    w = torch.cartesian_prod(*[torch.linspace(-6, 6, 500).double()] * 2)
    C = d.T @ d
    C = C / C.diagonal().mean() + 0.1 * torch.eye(2)
    squares = ((w @ C.inverse()) * w).sum(1)
    prior = sum(precision * torch.exp(-precision / 2 * squares) for precision in PRECISIONS)
    p = prior * torch.exp((y * (w @ d.T) - F.softplus(w @ d.T)).sum(1))
    p = p / p.sum()
    mean, error = p @ w, covariance.diagonal().sqrt()
    exact = (p * (w - mean).T) @ (w - mean)
    assert ((found - mean) / error).abs().max() < 0.1
    assert ((exact - covariance) / error.outer(error)).abs().max() < 0.2


def test_fewer_choices_than_dimensions_leave_the_rest_unknown():
    d, y = choices_of(torch.ones(32).double(), 12, torch.Generator().manual_seed(0))
    _, covariance, _ = fit(d, y, torch.arange(12) % 10)
    assert torch.linalg.eigvalsh(covariance).min() > 0
    unseen = torch.linalg.svd(d)[2][-1]
    assert unseen @ covariance @ unseen > 0.1  # the prior's, over a precision of under 1


def test_choices_at_random_are_not_predicted():
    """20 times 100 coin tosses: in 48 dimensions they can be learned by heart, but not foreseen.

    Of 2,000 predictions half are right, with a standard error of 1.1 %; folds share data, so 4 %
    are allowed.
    """
    g, right, learned = torch.Generator().manual_seed(0), [], []
    for _ in range(20):
        d, y = choices_of(torch.zeros(48).double(), 100, g)
        w, _, unseen = fit(d, y, torch.arange(100) % 10)
        right.append(((unseen > 0) == (y > 0.5)).double().mean())
        learned.append(((d @ w > 0) == (y > 0.5)).double().mean())
    assert abs(sum(right) / 20 - 0.5) < 0.04 < sum(learned) / 20 - 0.5


def test_no_preference_pulls_to_the_middle():
    d, y = choices_of(torch.ones(4).double(), 100, torch.Generator().manual_seed(0))
    fold, half = torch.arange(100) % 10, torch.full_like(y, 0.5)
    w = fit(d, y, fold)[0]
    assert fit(d, half, fold)[0].norm() < 1e-6
    torch.testing.assert_close(w, fit(-d, 1 - y, fold)[0])  # whichever is shown first
    both = fit(torch.cat([d, d]), torch.cat([y, half]), torch.cat([fold, fold]))[0]
    assert 0 < both.norm() / w.norm() < 0.8


# ---- the study, at its page


def aesthetic(images):
    return Reward("aesthetic")(images, [""] * len(images))


def person(url, count):
    """Answer as the aesthetic predictor would, `count` times; returns what was shown last."""
    group = None
    for _ in range(count):
        while (answer := requests.get(url + "group")).status_code != 200:
            time.sleep(0.01)
        group = answer.json()
        files = [io.BytesIO(base64.b64decode(image)) for image in group["images"]]
        pixels = np.stack([np.array(Image.open(file)) for file in files])
        choice = int(aesthetic(torch.tensor(pixels).permute(0, 3, 1, 2) / 255).argmax())
        body = {"key": group["key"], "choice": choice}
        assert requests.post(url + "answer", json=body).status_code == 204
    return group


def run_study(monkeypatch, folder, *args, count=0):
    """Run the study in this process, with a person who answers `count` times.

    Returns what was shown last.
    """
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("sun\nrobot\nred apple\ngreen leaf\nblue car\nhouse\ncat\ndog\n")
    shown, threads, serve = [], [], Human.serve

    def serve_and_answer(self, *args, **options):
        url = serve(self, *args, **options)
        answer = threading.Thread(target=lambda: shown.append(person(url, count)), daemon=True)
        threads.append(answer)
        answer.start()
        return url

    argv = ["taste.py", *SMALL, "--out", str(folder), "--prompts", str(prompts), *args]
    with monkeypatch.context() as patch:
        patch.setattr(Human, "serve", serve_and_answer)
        patch.setattr(sys, "argv", argv)
        study.main()
    for thread in threads:
        thread.join(10)
    return shown[0] if shown else None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A taste for what the tiny predictor finds beautiful, from 24 choices; what was shown last."""
    folder = tmp_path_factory.mktemp("tastes")
    with pytest.MonkeyPatch.context() as patch:
        shown = run_study(patch, folder, "--choices", "24", count=24)
    return folder / "mine", shown


def images_in(folder):
    """The pairs of images of a study, [2 N, 3, 64, 64]."""
    pictures = [np.array(Image.open(path)) for path in sorted(folder.glob("preferences/*.png"))]
    pairs = torch.tensor(np.stack(pictures)).unflatten(2, (2, 64)) / 255
    return pairs.permute(0, 2, 4, 1, 3).flatten(0, 1)


def test_the_study_asks_learns_and_says_how_sure_it_is(made):
    folder, shown = made
    names = ["best-and-worst.png", "config.json", "head.safetensors"]
    assert sorted(os.listdir(folder)) == [*names, "preferences", "preferences.jsonl"]
    assert shown["count"] == "choice 24 of 24" and shown["total"] == 24 and shown["number"] == 24
    assert 40 < shown["right"] <= 100 and 1 < shown["error"] < 15
    assert re.search(r"predicts \d+ ± \d+ % of other choices", shown["note"])

    pairs = images_in(folder)
    R = Reward(f"taste:{folder}")(pairs, [""] * 48)
    assert R.mean().abs() < 1e-3  # 0 is the mean of what was seen
    chosen = aesthetic(pairs).view(24, 2).argmax(1)
    assert (R.view(24, 2).argmax(1) == chosen).sum() > 0.75 * 24


def test_a_study_goes_on_from_what_is_on_disk(tmp_path, monkeypatch, capsys):
    """Also from a line that was cut short, without a picture that is damaged, in another place."""
    monkeypatch.setattr(study, "LEAST", 5)
    shown = run_study(monkeypatch, tmp_path / "old", "--choices", "3", count=3)
    assert "bar here shows" in shown["note"] and "right" not in shown
    assert not (tmp_path / "old" / "mine" / "head.safetensors").exists()

    (tmp_path / "old").rename(tmp_path / "new")
    folder = tmp_path / "new" / "mine"
    with open(folder / "preferences.jsonl", "a") as file:
        file.write('{"key": "abc')
    damaged = next(iter((folder / "preferences").iterdir()))
    damaged.write_bytes(damaged.read_bytes()[:500])
    shown = run_study(monkeypatch, tmp_path / "new", "--choices", "7", count=5)
    assert shown["count"] == "choice 7 of 7" and "right" in shown
    assert f"{damaged.name} is damaged" in capsys.readouterr().err

    # there are enough: nothing is asked, and the fit is the same
    before = load_file(folder / "head.safetensors")["weight"]
    run_study(monkeypatch, tmp_path / "new", "--choices", "7")
    torch.testing.assert_close(load_file(folder / "head.safetensors")["weight"], before)

    # the file of prompts has moved with the folder; no other may be named while it is there
    other = ("--prompts", str(TINY / "prompts_test.txt"))
    for flags in (("--steps", "2"), other):
        with pytest.raises(UserError, match=f"was made with {flags[0]}"):
            run_study(monkeypatch, tmp_path / "new", "--choices", "7", *flags)


def test_answers_of_a_run_are_fitted(made, tmp_path, monkeypatch):
    """Those of pairs, and of groups of three, whose images lie side by side in a picture."""
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    for key, choice in (("best", 1), ("undecided", None)):
        Image.new("RGB", (3 * 64, 64)).save(run / "preferences" / f"{key}.png")
        append_line(run / "preferences.jsonl", {"key": key, "choice": choice})
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config, "utf-8-sig")  # as an editor on Windows saves it

    monkeypatch.setattr(study, "load_flow", None)  # nothing is drawn
    monkeypatch.setattr(sys, "argv", ["taste.py", "--from", str(run), "--out", str(tmp_path)])
    for _ in range(2):  # the second adds nothing
        study.main()
        assert len(read_lines(tmp_path / "mine" / "preferences.jsonl")) == 24 + 2
    found = study.Choices(tmp_path / "mine", load_clip(TINY, "cpu"), 64)
    answers = [y for _, y, _ in found.rows]
    assert answers.count(1.0) == 24 + 2 and answers.count(0.5) == 3
    assert found.clear == 24 + 1
    assert (tmp_path / "mine" / "head.safetensors").exists()

    (run / "preferences.jsonl").write_text("")
    with pytest.raises(UserError, match="no choices"):
        study.main()


# ---- the reward


def test_the_held_out_record_has_the_error_over_choices(made):
    """It is that of the mean change in embeddings; of the base model, which did not change, 0."""
    name, embed = f"taste:{made[0]}", load_clip(TINY, "cpu").embed_images
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    flow = SimpleNamespace(prompts=list("abcdef"), device="cpu")
    flow.images = lambda cond, seeds, batch: images
    reward, watched, cond = Reward("brightness"), Reward(f"0.5*{name}"), torch.arange(6)
    held_out = HeldOut(flow, cond, cond, reward, [watched], embed, 64, seed=0)
    assert held_out()[1]["change_se_choices"] == {name: 0}

    before, images = images, (images + 0.1 * torch.randn(images.shape)).clamp(0, 1)
    record, tensors = held_out()[1], load_file(made[0] / "head.safetensors")
    de = (embed(images) - embed(before)).mean(0)
    change = 0.5 * (de @ tensors["weight"]).item()
    assert record["change"][f"0.5*{name}"] == pytest.approx(change, rel=1e-3, abs=1e-5)
    error = (de @ tensors["covariance"] @ de).sqrt().item()
    assert record["change_se_choices"] == {name: pytest.approx(error, rel=1e-3)} and error > 0.01


def test_what_is_no_taste_is_refused(made, tmp_path, capsys):
    missing = "no tastes/nobody/head.safetensors; make one with: .* --name nobody"
    with pytest.raises(UserError, match=missing):
        Reward("taste:nobody")
    with pytest.raises(UserError, match="say whose"):
        Reward("taste:a:b")

    file, whole = tmp_path / "head.safetensors", made[0] / "head.safetensors"
    tensors = load_file(whole)

    def save(data, **changes):
        about = {"clip": "tiny-clip", "choices": 24, "right": 0.8} | changes
        save_file(data, file, {"taste": json.dumps(about)})

    def refused(complaint):
        with pytest.raises(UserError, match=complaint):
            Reward(f"2*taste:{tmp_path}")

    file.write_bytes(whole.read_bytes()[:-9])
    refused("is damaged")
    save_file(tensors, file)  # not one of ours
    refused("is damaged")
    save(tensors, clip="clip-vit-large-patch14")
    refused("fitted on clip-vit-large-patch14, and this model has tiny-clip")

    for right in (0.8, 0.6):  # a standard error of 0.08 and of 0.1
        save(tensors, right=right)
        Reward(f"2*taste:{tmp_path}")
        assert ("predicts 60 % of choices" in capsys.readouterr().err) == (right == 0.6)


# ---- what takes longer


def start(*command, cwd):
    """A command of ours in a process of its own, and the address of the page that it names."""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    run = subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, **pipes)
    return run, re.search(r"http://127.0.0.1:\d+/", run.stdout.readline())[0]


@pytest.mark.ci
def test_killed_at_random_moments_nothing_is_lost(tmp_path):
    """Five times within a second of an answer: every answer that the page has taken is there."""
    draws, taken, folder = torch.Generator().manual_seed(0), 0, tmp_path / "tastes" / "mine"
    (tmp_path / "prompts.txt").write_text("sun\nrobot\nred apple\n")
    command = ["-m", "studies.taste", *SMALL, "--prompts", "prompts.txt", "--choices", "200"]
    for _ in range(5):
        run, url = start(*command, cwd=tmp_path)
        person(url, 1)
        taken += 1
        threading.Timer(torch.rand(1, generator=draws).item(), run.kill).start()
        try:
            for _ in range(200):
                person(url, 1)
                taken += 1
        except requests.RequestException:
            pass
        run.wait()

        kept = read_answers(folder)
        assert taken <= len(kept) <= taken + 5  # one may be written whose confirmation was cut off
        for key in kept:
            Image.open(folder / "preferences" / f"{key}.png").load()

    # however few there are on a slow machine, it goes on from them
    total = max(len(kept), study.LEAST) + 1
    run, url = start("-m", "studies.taste", "--choices", str(total), cwd=tmp_path)
    person(url, total - len(kept))
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and f"{total} choices" in out
    Reward(f"taste:{folder}")


@pytest.mark.ci
def test_a_person_teaches_a_taste_in_a_browser(tmp_path, monkeypatch):
    """What the page of a study shows beyond that of a training (tests/extras.py)."""
    from playwright.sync_api import sync_playwright

    run, url = start("-m", "studies.taste", *SMALL, "--choices", "12", cwd=tmp_path)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(url)
        page.wait_for_selector("text=choice 1 of 12")
        assert page.locator("#gauge").is_hidden()

        for number in range(2, 13):
            page.keyboard.press("ArrowLeft")
            page.wait_for_selector(f"text=choice {number} of 12")
        assert "% of other choices" in page.locator("#note").inner_text()
        assert page.locator("#gauge").is_visible()
        page.screenshot(path=Path(os.environ.get("SCREENSHOTS", tmp_path), "taste.png"))

        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("text=The study has stopped. Your choices are kept.")
        browser.close()

    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "12 choices in tastes/mine." in out
    monkeypatch.chdir(tmp_path)
    Reward("taste:mine")
