"""Tests of a taste: the fit against autograd and known answers, the study at its page, and the reward.

pytest -q tests/test_taste.py
"""

import argparse
import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from fdflow import LoRA
from models.flows import load_flow
from models.lora_files import layers_named
from models.table import fill_defaults
from rewards import TINY, Reward, load_clip
from studies import taste as study
from support.errors import UserError
from support.evaluation import HeldOut
from support.prompts import read_prompts
from zoo.human import Human
from zoo.taste import PRECISIONS, fit, newton

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--steps", "1", "--batch", "8", "--name", "mine"]


def choices_of(w, n, generator):
    """Differences d [n, D], twice as large in the first half of D, and answers y after Bradley and Terry."""
    d = torch.randn(n, len(w), generator=generator, dtype=torch.float64)
    d[:, : len(w) // 2] *= 2
    return d, (torch.rand(n, generator=generator) < torch.sigmoid(d @ w)).double()


def test_newton_finds_the_mode_of_autograd():
    g = torch.Generator().manual_seed(0)
    d, y = choices_of(torch.ones(6).double(), 40, g)

    def minus_log_posterior(u):
        return (F.softplus(d @ u) - y * (d @ u)).sum() + 0.3 / 2 * u @ u

    u, H = newton(d, y, 0.3, torch.zeros(6).double())
    slope = torch.autograd.functional.jacobian(minus_log_posterior, u)
    assert slope.abs().max() < 1e-8
    curvature = torch.autograd.functional.hessian(minus_log_posterior, u)
    torch.testing.assert_close(
        H, curvature, rtol=1e-5, atol=1e-5
    )  # that of a step of under 1e-6 before


def test_the_fit_is_the_posterior_on_a_grid():
    """Mean and covariance of w in two dimensions, all precisions counted, summed over 1,000 x 1,000 values.

    24 choices, 8 of them without preference. Laplace's approximation has errors a tenth too small here.
    """
    d, y = choices_of(torch.tensor([0.3, -0.5]).double(), 24, torch.Generator().manual_seed(0))
    y[:8] = 0.5
    found, covariance, _ = fit(d, y, torch.arange(24) % 10)
    w = torch.cartesian_prod(*[torch.linspace(-6, 6, 1000).double()] * 2)
    C = d.T @ d
    C = C / C.diagonal().mean() + 0.1 * torch.eye(2)
    squares = ((w @ C.inverse()) * w).sum(1)
    prior = sum(precision * torch.exp(-precision / 2 * squares) for precision in PRECISIONS)
    p = prior * torch.exp((y * (w @ d.T) - F.softplus(w @ d.T)).sum(1))
    p = p / p.sum()
    mean, error = p @ w, covariance.diagonal().sqrt()
    assert ((found - mean) / error).abs().max() < 0.1
    exact = (p * (w - mean).T) @ (w - mean)
    assert ((exact - covariance) / error.outer(error)).abs().max() < 0.2


def test_the_stated_error_is_that_of_the_logit():
    """60 tastes drawn from the prior in 16 dimensions, each from 200 choices.

    The logit of one difference, less the true one and over the stated error, has a mean square of 1, with a
    standard error of sqrt(2 / 60) = 18 % over the tastes; 2 of them are allowed for, and a factor of 1.1.
    """
    g, z = torch.Generator().manual_seed(0), []
    spread = torch.where(torch.arange(16) < 8, 2, 1)
    for _ in range(60):
        w = 0.25 * spread * torch.randn(16, generator=g).double()
        d, y = choices_of(w, 200, g)
        found, covariance, _ = fit(d, y, torch.arange(200) % 10)
        de = spread * torch.randn(16, generator=g).double()
        z.append(de @ (found - w) / (de @ covariance @ de).sqrt())
    assert 0.6 < torch.stack(z).square().mean() < 1.5


def test_fewer_choices_than_dimensions_leave_the_rest_unknown():
    g = torch.Generator().manual_seed(0)
    d, y = choices_of(torch.ones(32).double(), 12, g)
    _, covariance, _ = fit(d, y, torch.arange(12) % 10)
    seen = d[0] / d[0].norm()
    unseen = torch.linalg.svd(d)[2][-1]
    assert 0 < seen @ covariance @ seen and torch.linalg.eigvalsh(covariance).min() > 0
    assert unseen @ covariance @ unseen > 0


def test_choices_at_random_are_not_predicted():
    """20 times 100 coin tosses: in 48 dimensions they can be learned by heart, but not foreseen.

    Of 2,000 predictions 50 % are right, with a standard error of 1.1; folds share data, so 4 are allowed.
    """
    g, right, learned = torch.Generator().manual_seed(0), [], []
    for _ in range(20):
        d, y = choices_of(torch.zeros(48).double(), 100, g)
        w, _, unseen = fit(d, y, torch.arange(100) % 10)
        right.append(((unseen > 0) == (y > 0.5)).double().mean())
        learned.append(((d @ w > 0) == (y > 0.5)).double().mean())
    assert abs(sum(right) / 20 - 0.5) < 0.04 < sum(learned) / 20 - 0.5


def test_no_preference_pulls_to_the_middle():
    g = torch.Generator().manual_seed(0)
    d, y = choices_of(torch.ones(4).double(), 100, g)
    fold = torch.arange(100) % 10
    assert fit(d, torch.full_like(y, 0.5), fold)[0].norm() < 1e-6
    torch.testing.assert_close(
        fit(d, y, fold)[0], fit(-d, 1 - y, fold)[0]
    )  # whichever is shown first
    both = fit(torch.cat([d, d]), torch.cat([y, torch.full_like(y, 0.5)]), torch.cat([fold, fold]))[
        0
    ]
    assert 0 < both.norm() / fit(d, y, fold)[0].norm() < 0.8


# ---- the study, at its page


def aesthetic(images):
    return Reward("aesthetic")(images, [""] * len(images))


def person(url, count, prefers=aesthetic):
    """Answer `count` times at the page, as soon as it has something to compare: what it showed last."""
    for _ in range(count):
        while (answer := requests.get(url + "group")).status_code != 200:
            time.sleep(0.01)
        group = answer.json()
        files = [io.BytesIO(base64.b64decode(image)) for image in group["images"]]
        R = prefers(
            torch.stack([torch.tensor(np.array(Image.open(file))) / 255 for file in files]).permute(
                0, 3, 1, 2
            )
        )
        body = {"key": group["key"], "choice": None if R[0] == R[1] else int(R.argmax())}
        assert requests.post(url + "answer", json=body).status_code == 204
    return group


def run_study(monkeypatch, folder, *args, count=0, **options):
    """python -m studies.taste in this process and a person who answers `count` times: what was shown last."""
    found, shown, opened = threading.Event(), [], Human.open

    def open_page(self, *args):
        shown.append(opened(self, *args))
        found.set()
        return shown[0]

    def answer():
        found.wait(60)
        shown.append(person(shown[0], count, **options))

    monkeypatch.setattr(Human, "open", open_page)
    monkeypatch.setattr(sys, "argv", ["taste.py", *SMALL, "--out", str(folder), *args])
    thread = threading.Thread(target=answer, daemon=True)
    if count:
        thread.start()
    try:
        study.main()
    finally:
        monkeypatch.undo()
    if count:
        thread.join(10)
        return shown[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A taste for what the tiny predictor finds beautiful, from 24 choices; what the page showed last."""
    folder = tmp_path_factory.mktemp("tastes")
    with pytest.MonkeyPatch.context() as patch:
        shown = run_study(patch, folder, "--choices", "24", count=24)
    return folder / "mine", shown


def test_the_study_asks_learns_and_says_how_sure_it_is(made):
    folder, shown = made
    names = [
        "best-and-worst.png",
        "config.json",
        "head.safetensors",
        "preferences",
        "preferences.jsonl",
    ]
    assert [path.name for path in sorted(folder.iterdir())] == names
    assert shown["count"] == "choice 24 of 24" and shown["total"] == 24 and shown["number"] == 24
    assert 40 < shown["right"] <= 100 and 1 < shown["error"] < 15
    assert re.search(r"predicts \d+ ± \d+ % of other choices", shown["note"])
    assert len(list((folder / "preferences").iterdir())) == 24
    pictures = [
        torch.tensor(np.array(Image.open(path))) / 255
        for path in (folder / "preferences").iterdir()
    ]
    pairs = (
        torch.stack(pictures)
        .permute(0, 3, 1, 2)
        .unflatten(3, (2, 64))
        .permute(0, 3, 1, 2, 4)
        .flatten(0, 1)
    )
    R = Reward(f"taste:{folder}")(pairs, [""] * 48)
    assert R.mean().abs() < 1e-3  # 0 is the mean of what was seen
    truth = aesthetic(pairs).unflatten(0, (-1, 2)).diff(dim=1)
    assert ((R.unflatten(0, (-1, 2)).diff(dim=1) > 0) == (truth > 0)).float().mean() > 0.75


def test_a_study_goes_on_from_what_is_on_disk(tmp_path, monkeypatch, capsys):
    """Also from a line that was cut short, and without a picture that is damaged; the head is the same."""
    shown = run_study(monkeypatch, tmp_path, "--choices", "3", count=3)
    assert "bar here shows" in shown["note"] and "right" not in shown
    folder = tmp_path / "mine"
    assert not (folder / "head.safetensors").exists()
    with open(folder / "preferences.jsonl", "a") as file:
        file.write('{"key": "abc')
    pictures = sorted((folder / "preferences").iterdir())
    pictures[0].write_bytes(pictures[0].read_bytes()[:500])
    shown = run_study(monkeypatch, tmp_path, "--choices", "13", count=11)
    assert (
        shown["count"] == "choice 13 of 13"
        and f"{pictures[0].name} is damaged" in capsys.readouterr().err
    )
    assert len(json.loads((folder / "config.json").read_text())["size"]) == 2
    before = load_file(folder / "head.safetensors")["weight"]
    run_study(
        monkeypatch, tmp_path, "--choices", "13"
    )  # has enough: asks nothing, and fits the same
    torch.testing.assert_close(load_file(folder / "head.safetensors")["weight"], before)
    with pytest.raises(UserError, match="was made with --steps 1"):
        run_study(monkeypatch, tmp_path, "--steps", "2")


def test_answers_of_a_run_are_fitted(tmp_path, monkeypatch, capsys):
    """The chosen of three against each other; images of a run lie side by side in its pictures."""
    run = tmp_path / "run"
    run.mkdir()
    human = Human(branches=3, groups=12)
    url = human.open(run)
    g = torch.Generator().manual_seed(0)
    images = torch.rand(36, 3, 16, 16, generator=g) * torch.rand(36, 1, 1, 1, generator=g)
    threading.Thread(target=human, args=(images, ["sun"] * 36), daemon=True).start()
    person(url, 11)
    person(url, 1, prefers=lambda images: torch.zeros(3))
    config = {
        "model": "tiny",
        "steps": 4,
        "guidance": 1,
        "size": "16",
        "prompts": None,
        "reward": "human",
    }
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(study, "load_flow", None)  # nothing is drawn
    for _ in range(2):  # the second adds nothing
        monkeypatch.setattr(sys, "argv", ["taste.py", "--from", str(run), "--out", str(tmp_path)])
        study.main()
        assert "12 choices" in capsys.readouterr().out
    made = study.Choices(tmp_path / "mine", load_clip(TINY, "cpu"), 16)
    assert [y for _, y, _ in made.rows].count(1.0) == 22 and [y for _, y, _ in made.rows].count(
        0.5
    ) == 3
    R = Reward(f"taste:{tmp_path / 'mine'}")(images, [""] * 36).view(12, 3)
    best = aesthetic(images).view(12, 3).argmax(1)
    assert (R.argmax(1) == best).sum() >= 9
    (run / "preferences.jsonl").write_text("")
    with pytest.raises(UserError, match="no choices"):
        study.main()


# ---- the reward


def test_a_taste_is_a_reward_like_others(made):
    name, images = f"taste:{made[0]}", torch.rand(3, 3, 64, 64).requires_grad_()
    both = Reward(f"2*{name} + 0.1*clip")(images, ["sun"] * 3)
    single = Reward(name)(images, ["sun"] * 3)
    torch.testing.assert_close(both, 2 * single + 0.1 * Reward("clip")(images, ["sun"] * 3))
    (slope,) = torch.autograd.grad(single.sum(), images)
    step = 1e-2 * slope / slope.norm()  # one step along it, against the difference
    gained = Reward(name)(images.detach() + step, [""] * 3).sum() - single.sum()
    assert gained.item() == pytest.approx(1e-2 * slope.norm().item(), rel=0.05)


def test_the_held_out_record_has_the_error_over_choices(made):
    """It is that of the mean change in the embeddings; for the base model, which did not change, it is 0."""
    name, settings = (
        f"taste:{made[0]}",
        "model size guidance device dtype batch compile checkpointing",
    )
    args = argparse.Namespace(**dict.fromkeys(settings.split()), steps=1)
    prompts = read_prompts(TINY / "prompts_test.txt")[:6]
    flow = load_flow(fill_defaults(args), args, prompts)
    lora = LoRA(flow.network, layers_named(flow.network, "modulation"), 4)
    reward, watched, embed = (
        Reward("brightness"),
        Reward(f"0.5*{name}"),
        load_clip(TINY, "cpu").embed_images,
    )
    held_out = HeldOut(flow, 6, reward, [watched], embed, 64, seed=0)
    assert held_out()[1]["change_se_choices"] == {name: 0}
    before = flow.images(held_out.cond, held_out.seeds)
    with torch.no_grad():
        for p in lora.parameters:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    record, tensors = held_out()[1], load_file(made[0] / "head.safetensors")
    with torch.no_grad():
        de = (embed(flow.images(held_out.cond, held_out.seeds)) - embed(before)).mean(0)
    change = 0.5 * (de @ tensors["weight"]).item()
    assert record["change"][f"0.5*{name}"] == pytest.approx(change, rel=1e-3) and abs(change) > 0.01
    error = (de @ tensors["covariance"] @ de).sqrt().item()
    assert record["change_se_choices"] == {name: pytest.approx(error, rel=1e-3)} and error > 0.01


@pytest.mark.parametrize("estimator", ["backprop", "reward_gradient"])
def test_estimators_that_differentiate_take_a_taste(made, estimator, tmp_path, monkeypatch, capsys):
    import train

    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("sun\nrobot\n")
    small = "--prompts prompts.txt --pairs 2 --steps 1 --iterations 1 --watch brightness --name x"
    flags = [
        "--estimator",
        f"{ROOT}/studies/baselines.py:{estimator}",
        "--reward",
        f"taste:{made[0]}",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, *small.split()])
    monkeypatch.setattr("support.run.signal.signal", lambda *args: None)
    train.main()
    last = json.loads(Path("runs/x/metrics.jsonl").read_text().splitlines()[-1])
    assert (
        last["grad_norm"] > 0 and last["drift"] > 0 and "held-out taste:" in capsys.readouterr().out
    )


def test_what_is_no_taste_is_refused_in_one_line(made, tmp_path, capsys):
    with pytest.raises(
        UserError, match=r"no tastes/nobody/head.safetensors; make one with: .* --name nobody"
    ):
        Reward("taste:nobody")
    with pytest.raises(UserError, match="say whose"):
        Reward("taste:a:b")
    file, whole = tmp_path / "head.safetensors", made[0] / "head.safetensors"
    tensors, about = load_file(whole), {"clip": "tiny-clip", "choices": 24, "right": 0.8}
    tag = {"taste": json.dumps(about)}

    def refused(complaint):
        with pytest.raises(UserError, match=complaint) as raised:
            Reward(f"2*taste:{tmp_path}")
        assert "\n" not in str(raised.value)

    for data in (b"", b"nonsense", whole.read_bytes()[:-9]):
        file.write_bytes(data)
        refused("is damaged")
    damages = [(tensors, None), (tensors, {"taste": "[]"}), (tensors, {"taste": "{}"})]
    damages += [
        (tensors | {"weight": torch.full((128,), torch.nan)}, tag),
        ({"weight": torch.ones(2)}, tag),
    ]
    damages += [(tensors | {"covariance": torch.ones(128, 2)}, tag)]
    for wrong, metadata in damages:
        save_file(wrong, file, metadata)
        refused("is damaged")
    save_file(tensors, file, {"taste": json.dumps(about | {"clip": "clip-vit-large-patch14"})})
    refused("fitted on clip-vit-large-patch14, and this model has tiny-clip")
    large = {"weight": torch.zeros(768), "covariance": torch.eye(768), "mean": torch.zeros(768)}
    save_file(large, file, tag)
    refused("is damaged, or from another tiny-clip")
    capsys.readouterr()
    for right in (0.8, 0.6):  # a standard error of 0.08 and of 0.1
        save_file(tensors, file, {"taste": json.dumps(about | {"right": right})})
        Reward(f"2*taste:{tmp_path}")
        assert ("predicts 60 % of choices" in capsys.readouterr().err) == (right == 0.6)


# ---- what takes longer


def start(*command, cwd):
    """A command of ours in a process of its own, and the address of the page that it names."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job ignores
    )  # fmt: skip
    return run, re.search(r"http://127.0.0.1:\d+/", run.stdout.readline())[0]


@pytest.mark.ci
def test_killed_at_random_moments_nothing_is_lost(tmp_path):
    """Five times within a second of an answer: every answer that the page has taken is there, and fitted."""
    draws, taken, folder = torch.Generator().manual_seed(0), 0, tmp_path / "tastes" / "mine"
    for _ in range(5):
        run, url = start("-m", "studies.taste", *SMALL, "--choices", "200", cwd=tmp_path)
        person(url, 1)
        taken += 1
        killer = threading.Timer(torch.rand(1, generator=draws).item(), run.kill)
        killer.start()
        try:
            for _ in range(200):
                person(url, 1)
                taken += 1
        except requests.RequestException:
            pass
        run.wait()
        kept = study.answers(folder) if folder.exists() else {}
        assert taken <= len(kept) <= taken + 5  # one may be written whose confirmation was cut off
        for key in kept:
            Image.open(folder / "preferences" / f"{key}.png").load()
        if (folder / "head.safetensors").exists():
            Reward(f"taste:{folder}")
    assert len(kept) > study.LEAST
    run, url = start("-m", "studies.taste", "--choices", str(len(kept) + 1), cwd=tmp_path)
    person(url, 1)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and f"{len(kept) + 1} choices" in out


@pytest.mark.ci
def test_a_person_teaches_a_taste_in_a_browser_and_trains_with_it(tmp_path):
    """Choices by keyboard and mouse; page and study are closed and opened again; then it is trained for."""
    from playwright.sync_api import sync_playwright

    command = ["-m", "studies.taste", *SMALL, "--choices", "14"]
    run, url = start(*command, cwd=tmp_path)
    screenshots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-background-networking"],
        )

        def open_page(number, width=1280, height=800):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(url)
            page.wait_for_selector(f"text=choice {number} of 14")
            return page

        def choose(page, number, key):
            page.keyboard.press(key)
            page.wait_for_selector(f"text=choice {number + 1} of 14")

        page = open_page(1)
        assert page.locator("img").count() == 2 and page.locator("#gauge").is_hidden()
        for number, key in enumerate(["ArrowLeft", "ArrowRight", "1", "2"], 1):
            choose(page, number, key)
        page.close()
        page = open_page(5)
        choose(page, 5, "Space")
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=30) == 130
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("text=Your answer was not saved (the study cannot be reached)")
        page.wait_for_selector("text=The study has stopped. Your choices are kept.")
        page.close()
        run, url = start(*command, cwd=tmp_path)
        page = open_page(6)
        for number in range(6, 12):
            page.locator("button").nth(0).click()
            page.wait_for_selector(f"text=choice {number + 1} of 14")
        assert "% of other choices" in page.locator("#note").inner_text()
        assert page.locator("#gauge").is_visible()
        page.screenshot(path=screenshots / "taste.png")
        page.close()
        page = open_page(12, 390, 844)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        boxes = [page.locator("img").nth(i).bounding_box() for i in (0, 1)]
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] > 120
        page.screenshot(path=screenshots / "taste-phone.png")
        for number in (12, 13):
            choose(page, number, "ArrowLeft")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("text=The study has stopped")
        browser.close()
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "14 choices in tastes/mine." in out
    lines = (tmp_path / "tastes" / "mine" / "preferences.jsonl").read_text().splitlines()
    assert [json.loads(line)["choice"] for line in lines] == [0, 1, 0, 1, None, *[0] * 9]
    flags = "--reward taste:mine --watch brightness --iterations 2 --pairs 4 --steps 1 --name taught".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    trained = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert trained.returncode == 0 and "held-out taste:mine" in trained.stdout
    assert (tmp_path / "runs" / "taught" / "report.png").exists()
