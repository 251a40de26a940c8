"""Measure training on a graphics card: one command for the first minutes with it.

python -m studies.card                      # about eight minutes on one GPU
python -m studies.card --only compiled      # only the rows with this in their name
python -m studies.card --smoke              # toy sizes on the CPU, to see that it runs

The networks are those of SD3.5-medium and SD-Turbo as published, with random weights. Random
numbers stand for encoded prompts, and the reward comes from a CLIP ViT-H, which has the size of
PickScore. A row trains on one micro-batch: half as many noises, with two branches each. Its numbers
are those of one pair, the two images of one noise: seconds, and the peak memory of each phase. A
TFLOP is 10^12 operations, two of them in a multiply-add.

Two rows run whole commands. One trains SD3.5-medium from a folder, in which it has the VAE and the
small text encoders of the bundled model, resumes, and samples with the LoRA. One trains the bundled
model on the CPU and on the card.

A machine with a card may have PyTorch 2.11 or newer and no network. Then fetch the other packages
(50 MB) with a Python of the same version, here, and take the folder along:

pip download -d wheels -c requirements.txt --no-deps --only-binary=:all: diffusers transformers \\
    tokenizers safetensors huggingface_hub httpx2 httpcore2 truststore peft accelerate psutil \\
    pillow requests urllib3 charset-normalizer importlib-metadata zipp matplotlib contourpy \\
    cycler fonttools kiwisolver pyparsing python-dateutil six
pip install --no-index --no-deps --upgrade wheels/*.whl && python -m studies.card    # there

The rows that matter most come first. After each of them card.md and card.json are written; a row
that fails says why, and the next one runs. What the commands print, and tracebacks, are in
card.log.
"""

import gc
import json
import shutil
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
from fdflow import LoRA, Problem, fdfo
from models.flow import Flow
from models.lora_files import layers_named
from models.table import MODELS, TINY
from rewards import Clip
from studies.baselines import fdfo_published
from support.arguments import Parser, number
from support.errors import UserError, first_line, run_command
from support.pictures import make_folder
from support.run import read_metrics, write_whole

# ---- what is measured: a model, steps of a roll-out, images in one call of the network, options;
# "published" trains all steps of both branches, as the paper does

FIRST = ["sd3.5 10 12", "sd3.5 10 12 compiled", "sd3.5 40 12 published"]
FIRST += ["sd3.5 40 12 published compiled", "train.py on sd3.5", "train.py on tiny"]
FIRST += ["sd-turbo 4 12", "sd-turbo 4 12 compiled", "sd3.5 10 24 checkpointing"]
ROWS = [*FIRST, "sd3.5 40 6 published"]
for batch, options in product([12, 24, 6], ["", " checkpointing", " compiled"]):
    ROWS += [f"{model} {batch}{options}" for model in ("sd3.5 10", "sd-turbo 4", "sd3.5 40")]

TO_BEAT = {  # on one H100, without decoding and reward
    "sd3.5 10 12": "counted: 105 TFLOP, 0.33 s at 40 % of 798 TFLOP/s",
    "sd3.5 40 12 published": "authors' loop, batch 13: 3.57 s, 37.2 GiB; ours: 2.81 s, 27.9 GiB",
    "sd3.5 40 12 published compiled": "ours: 1.47 s, 22.1 GiB",
    "sd3.5 40 6 published": "authors' loop: 4.74 s, 21.4 GiB",
}
COLUMNS = "row sampling decoding reward training pair TFLOP TFLOP/s remark".split()


# ---- architectures as published, or toys like them


def make_pipeline(name, toy, pooled=2048):
    """Make the pipeline of a model, without encoders.

    pooled: width of the second embedding of a prompt, for SD3.5
    """
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4 if toy else (128, 256, 512, 512),
        layers_per_block=1 if toy else 2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=16 if name == "sd3.5" else 4, shift_factor=0.0609,
    )  # fmt: skip
    if name == "sd3.5":
        layers = heads = 2 if toy else 24
        network = diffusers.SD3Transformer2DModel(
            num_layers=layers, num_attention_heads=heads, caption_projection_dim=64 * heads,
            dual_attention_layers=tuple(range(layers // 2 + 1)), qk_norm="rms_norm",
            pos_embed_max_size=16 if toy else 384, pooled_projection_dim=pooled,
        )  # fmt: skip
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        return diffusers.StableDiffusion3Pipeline(network, scheduler, vae, *[None] * 6)

    network = diffusers.UNet2DConditionModel(
        block_out_channels=(64,) * 4 if toy else (320, 640, 1280, 1280), cross_attention_dim=1024,
        attention_head_dim=2 if toy else (5, 10, 20, 20), use_linear_projection=True,
        layers_per_block=1 if toy else 2,
    )  # fmt: skip
    with torch.device("cpu"):  # where it computes its times
        scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1)
    return diffusers.StableDiffusionPipeline(vae, None, None, network, scheduler, None, None)


@cache
def make_clip(toy, device, dtype):
    """Make a CLIP ViT-H/14, of which PickScore is one."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1} if toy else {}
    both = {"num_attention_heads": 16, "patch_size": 14} | small
    config = transformers.CLIPConfig(text_config=text | both, vision_config=vision | both)
    with torch.device(device):
        model = transformers.CLIPModel(config).to(dtype)
    return Clip(model, None, transformers.CLIPImageProcessor())


def make_flow(name, steps, batch, options, toy, device):
    """Make a Flow of random weights, with random numbers in place of encoded prompts."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        pipe = make_pipeline(name, toy).to(dtype)

    # as encode_prompt returns them: the second of each two is for guidance
    outputs = {}
    shapes = [(8 if toy else 333, 4096), (2048,)] if name == "sd3.5" else [(77, 1024)]
    for i in range(batch // 2):
        rows = [torch.randn(1, *shape, dtype=dtype) for shape in shapes]
        outputs[f"prompt {i}"] = [output for row in rows for output in (row, None)]

    args = Namespace(steps=steps, guidance=1, negative=None, size="64" if toy else "512")
    args.device, args.dtype = device, str(dtype).removeprefix("torch.")
    args.compile, args.checkpointing = "compiled" in options, "checkpointing" in options
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_config(folder)
        return Flow(pipe, Namespace(path=folder, tokens=None), args, outputs, outputs)


# ---- the rows: functions that return cells


def measure(row, toy, device):
    """Train on a micro-batch; return what a pair takes, (seconds, GiB) for each phase."""
    name, steps, batch, *options = row.split()
    steps, batch = (2, 4) if toy else (int(steps), int(batch))
    model, flow = MODELS[name], make_flow(name, steps, batch, options, toy, device)
    clip = make_clip(toy, device, flow.dtype)
    lora = LoRA(flow.network, layers_named(flow.network, model.layers), 32, 64)
    optimizer = torch.optim.AdamW(lora.parameters, fused=device == "cuda" or None)
    marks = []

    def mark(phase, result=None):
        """Note the end of a phase, and the peak of memory since the mark before."""
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append((phase, time.perf_counter(), torch.cuda.max_memory_allocated() / 2**30))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return result

    def reward(x, cond):
        mark("sampling")
        images = mark("decoding", flow.decode(x))
        return mark("reward", clip.embed_images(images)[:, 0])

    estimate = partial(fdfo, churn=model.churn, train_steps=2 if toy else model.train_steps)
    if "published" in options:
        estimate = partial(fdfo_published, churn=model.churn, updates=1)
    problem = Problem(flow.velocity, reward, lora, flow.train_times, batch)

    def iteration(pairs):
        """Train on a number of pairs; return {phase: (seconds for a pair, GiB)}."""
        mark("start")
        estimate(problem, flow.noise(range(pairs)), torch.arange(pairs, device=device))
        train.optimizer_step(optimizer, lora.parameters)
        mark("training")

        cells = {}
        for (_, start, _), (phase, end, peak) in pairwise(marks[-5:]):
            cells[phase] = ((end - start) / pairs, peak)
        seconds, peaks = zip(*cells.values())
        return cells | {"pair": (sum(seconds), max(peaks))}

    # count the operations of one pair; then take the fastest of three, of which the first compiles
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        iteration(1)
    with torch.compiler.set_stance("force_eager" if toy else "default"):
        cells = min((iteration(batch // 2) for _ in range(3)), key=lambda cells: cells["pair"])
    tflop = counter.get_total_flops() / 1e12
    return cells | {"TFLOP": round(tflop, 3), "TFLOP/s": round(tflop / cells["pair"][0], 1)}


def run(main, *words):
    """Run one of our commands in this process; return how many seconds it took."""
    start = time.perf_counter()
    sys.argv = ["train.py", *map(str, words)]
    main()
    return time.perf_counter() - start


def train_from_folder(row, toy, device):
    """Train SD3.5 from a folder, resume, and sample with the LoRA."""
    with tempfile.TemporaryDirectory() as top:
        shutil.copytree(TINY, top, dirs_exist_ok=True)
        folder, prompts, run_folder = (Path(top, x) for x in ("tiny-sd3", "prompts.txt", "run"))
        prompts.write_text("red apple\nrobot\nsun\nmoon\n")
        with torch.device(device):
            network = make_pipeline("sd3.5", toy, pooled=256).transformer
        network.to(torch.bfloat16).save_pretrained(folder / "transformer")
        del network  # and the memory that it takes

        words = ["--model", folder, "--device", device, "--out", top, "--name", "run"]
        words += ["--steps", 2 if toy else 10, "--size", 64 if toy else 512, "--guidance", 1]
        words += ["--groups", 6, "--prompts", prompts, "--iterations"]
        seconds = [run(train.main, *words, 1), run(train.main, *words, 2, "--resume")]
        words = ["--lora", run_folder, "--device", device, "--out", Path(top, "robot.png")]
        seconds.append(run(sample.main, *words, "--prompt", "robot", "--compare"))
        last = read_metrics(run_folder)[-1]

    pair = (last["seconds"] / 6, last.get("memory_mb", 0) / 1074)
    remark = "train {:.0f} s, --resume {:.0f} s, sample {:.0f} s".format(*seconds)
    return {"pair": pair, "remark": remark}


def train_bundled(row, toy, device):
    """Train the bundled model on the CPU and on the card; return where both end."""
    words = ["--prompts", TINY / "prompts_test.txt", "--dtype", "float32", "--name", "run"]
    words += ["--iterations", 1 if toy else 20, "--groups", 2 if toy else 32]
    remarks = []
    for place in ("cpu", device):
        with tempfile.TemporaryDirectory() as top:
            seconds = run(train.main, *words, "--device", place, "--out", top)
            last = read_metrics(Path(top, "run"))[-1]
        numbers = [f"{key} {last[key]:.3f}" for key in ("held_out", "gain", "drift")]
        remarks.append(f"{place}: {', '.join(numbers)}, {seconds:.0f} s")
    return {"remark": "; ".join(remarks)}


COMMANDS = {"train.py on sd3.5": train_from_folder, "train.py on tiny": train_bundled}

# ---- the table


def text(cell):
    """Return the text of a cell, which may be (seconds, GiB)."""
    return f"{cell[0]:.3g} s, {cell[1]:.3g} GiB" if isinstance(cell, tuple) else str(cell)


def line(cells):
    """Return a line of a Markdown table."""
    return f"| {' | '.join(text(cell) for cell in cells)} |"


def main():
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=number(float, 0), default=8, help="no row starts later")
    parser.add_argument("--only", default="", help="only rows with this in their name")
    parser.add_argument("--out", type=Path, default="card", help="folder for what it writes")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on the CPU")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    end = time.time() + 60 * args.minutes
    if not args.smoke and not torch.cuda.is_available():
        raise UserError("there is no GPU here; --smoke shows whether it would run")
    make_folder(args.out)
    log = open(args.out / "card.log", "w")

    card = "toy sizes on the CPU" if args.smoke else torch.cuda.get_device_name()
    rows = []
    lines = [f"{card}, PyTorch {torch.__version__}", "", line(COLUMNS), line("-" * len(COLUMNS))]
    print("\n".join(lines))
    for name in FIRST if args.smoke else dict.fromkeys(ROWS):
        if args.only not in name or time.time() > end:
            continue
        with redirect_stdout(log), redirect_stderr(log):
            try:
                row = COMMANDS.get(name, measure)(name, args.smoke, device)
            except Exception as error:
                traceback.print_exc()
                row = {"remark": f"failed: {type(error).__name__}: {first_line(error)}"}

        rows.append({"row": name, "remark": TO_BEAT.get(name, "")} | row)
        lines.append(line(rows[-1].get(column, "") for column in COLUMNS))
        print(lines[-1], flush=True)
        write_whole(args.out / "card.md", "\n".join(lines).encode())
        write_whole(args.out / "card.json", json.dumps({"card": card, "rows": rows}).encode())

        # leave nothing to the next row
        torch.compiler.reset()
        gc.collect()


if __name__ == "__main__":
    run_command(main)
