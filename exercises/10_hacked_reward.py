"""Exercise 10: a reward that gets hacked, and one that does not.

First train the bundled model on brightness, watch `clip`, its fit to the prompt, and look at
report.png in the run's folder:

    python train.py --reward brightness --watch clip --lr 0.003 --iterations 6 --groups 16

Write `change`: by how much a value changed from the base model to the trained one, and its standard
error, from two images of each of P prompts (same noise before and after). A prompt's two images are
not independent.

Then write a reward, `repaired`, with which the same training on nine prompts gains at least 2 of
brightness and loses less than 12 of clip. With brightness alone it gains 19 and loses 39.

Teaches: what the reward does not measure may get worse; paired differences; how to write a reward.
Belongs to: rewards.py, and HeldOut and signs_of_hacking in support/evaluation.py.
Check (trains for half a minute): pytest exercises/10_hacked_reward.py
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from exercises.hints import assert_close

ROOT = Path(__file__).resolve().parent.parent
TRAIN = (
    "train.py --watch clip,brightness --iterations 6 --groups 16 --lr 0.003 --device cpu --name run"
)
PROMPTS = (
    "guard,unicorn,pineapple,light rail,party popper,hair pick,red apple,rainbow,cat with wry smile"
)


def change(before, after):
    """Return the mean change and its standard error, two numbers, from values [P, 2]."""
    raise NotImplementedError


def repaired(images, prompts):
    """Return [B] numbers, higher is better, for images [B, 3, H, W] in [0, 1] and their B prompts.

    `from rewards import TINY, brightness, load_clip`: brightness(images, prompts) and
    load_clip(TINY, "cpu")(images, prompts) are rewards, about 80 and 50 at first.
    """
    raise NotImplementedError


# ---- the check


def test_the_change_and_its_error():
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(50, 1, generator=generator)
    image = torch.randn(2, 50, 2, generator=generator)
    before = 20 * prompt + image[0]  # prompts differ widely
    after = before + 1.0 + prompt + 0.1 * image[1]  # and so, a little, do their gains
    mean, error = change(before, after)

    gains = (after - before).mean(1)
    assert_close(mean, gains.mean(), "the mean")
    hint = "First the differences, then a prompt's two together, then the error of a mean of P."
    assert_close(error, gains.std() / 50**0.5, "the standard error", hint, tolerance=0.02)


def train(reward, folder):
    """Train with a reward function; return what its held-out prompts changed by, {name: mean}."""
    prompts = Path(folder, "prompts.txt")
    prompts.write_text(PROMPTS.replace(",", "\n"))
    command = [sys.executable, *TRAIN.split(), "--prompts", str(prompts), "--out", folder]
    command += ["--reward", f'"{inspect.getfile(reward)}":{reward.__name__}']

    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last_line = (done.stderr.strip() or "nothing").splitlines()[-1]
    assert done.returncode == 0, f"train.py says: {last_line}"

    records = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    return json.loads(records[-1])["change"]


def test_the_repaired_reward():
    with tempfile.TemporaryDirectory() as folder:
        last = train(repaired, folder)

    found = f"brightness {last['brightness']:+.1f}, clip {last['clip']:+.1f}"
    print(found)
    hint = "this reward gets hacked. Put into it what it must not give up."
    assert last["clip"] > -12, f"{found}: {hint}"
    assert last["brightness"] > 2, f"{found}: hardly brighter. Give brightness more weight."
