"""Exercise 10: a reward that gets hacked, and one that does not.

First train the bundled model on brightness, watch `clip`, its fit to the prompt, and look at report.png:
    python train.py --reward brightness --watch clip --lr 0.003 --iterations 6 --pairs 16
Write `change`: by how much a value changed from the base model to the trained one, and its standard error,
from two images of each of P prompts (same noise before and after). A prompt's two images are not independent.

Then write a reward, `repaired`, with which the same training on nine prompts gains 2 of brightness or more,
and costs less than 12 of clip. With brightness alone it gains 18 and costs 37.

Teaches: what the reward does not measure may get worse; paired differences; how to write a reward.
Belongs to: rewards.py, and HeldOut and signs_of_hacking in support/evaluation.py.
Check (trains for a quarter of a minute): pytest exercises/10_hacked_reward.py
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
    "train.py --watch clip,brightness --iterations 6 --pairs 16 --lr 0.003 --device cpu --name run"
)
PROMPTS = (
    "guard,unicorn,pineapple,light rail,party popper,hair pick,red apple,rainbow,cat with wry smile"
)


def change(before, after):
    """The mean change and its standard error, two numbers, from values before and after [P, 2]."""
    raise NotImplementedError


def repaired(images, prompts):
    """[B] numbers, higher is better, for images [B, 3, H, W] in [0, 1] and their B prompts.

    `from rewards import TINY, brightness, load_clip`: brightness(images, prompts) and
    load_clip(TINY, "cpu")(images, prompts) are rewards, about 80 and 50 at first.
    """
    raise NotImplementedError


def test_the_change_and_its_error():
    generator = torch.Generator().manual_seed(0)
    prompt, image = (
        torch.randn(50, 1, generator=generator),
        torch.randn(2, 50, 2, generator=generator),
    )
    before = 20 * prompt + image[0]  # prompts differ widely
    after = before + 1.0 + prompt + 0.1 * image[1]  # and so, a little, do their gains
    mean, error = change(before, after)
    gains = (after - before).mean(1)
    assert_close(mean, gains.mean(), "the mean")
    hint = "First the differences, then the mean of a prompt's two, then the error of a mean of P numbers."
    assert_close(error, gains.std() / 50**0.5, "the standard error", hint, tolerance=0.02)


def test_the_repaired_reward():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "prompts.txt").write_text(PROMPTS.replace(",", "\n"))
        command = [
            sys.executable,
            *TRAIN.split(),
            "--reward",
            f'"{inspect.getfile(repaired)}":repaired',
        ]
        command += ["--prompts", f"{folder}/prompts.txt", "--out", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (
            f"train.py says: {(done.stderr.strip() or 'nothing').splitlines()[-1]}"
        )
        last = json.loads(Path(folder, "run", "metrics.jsonl").read_text().splitlines()[-1])[
            "change"
        ]
    found = f"brightness {last['brightness']:+.1f}, clip {last['clip']:+.1f}"
    print(found)
    assert last["clip"] > -12, (
        f"{found}: this reward gets hacked. Put into it what it must not give up."
    )
    assert last["brightness"] > 2, f"{found}: hardly brighter. Give brightness more weight."
