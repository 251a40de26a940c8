"""The pictures of a run: captioned grids, the report with its curves, and the animation."""

import base64
import io
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from support.errors import UserError, first_line

Image.MAX_IMAGE_PIXELS = None  # grids are our own, however large


def to_pil(image):
    """Turn [3, H, W] in [0, 1] into a PIL image."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def png(image):
    """Turn [3, H, W] in [0, 1] into a PNG file in base64."""
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def grid(images, captions, columns):
    """Make a captioned picture of images [N, 3, H, W] in [0, 1]; small ones at twice their size."""
    scale = 2 if images.shape[2] < 128 else 1
    height, width = images.shape[2] * scale, images.shape[3] * scale
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(12)
    canvas = Image.new("RGB", (columns * (width + 4) + 4, 4 + rows * (height + 20)), "white")
    draw = ImageDraw.Draw(canvas)

    for i, (image, caption) in enumerate(zip(images, captions)):
        left = 4 + i % columns * (width + 4)
        upper = 4 + i // columns * (height + 20)
        canvas.paste(to_pil(image).resize((width, height), Image.Resampling.BICUBIC), (left, upper))

        caption = " ".join(caption[:200].split())
        while draw.textlength(caption, font) > width:
            caption = caption[:-2] + "…"
        draw.text((left, upper + height), caption, "black", font)
    return canvas


def save_picture(picture, path, **options):
    """Write a picture beside its place, then move it there; as PNG if it is too large for its kind.

    Returns the path.
    """
    part = path.with_name(path.name + ".part")
    try:
        picture.save(part, Image.registered_extensions()[path.suffix.lower()], **options)
    except ValueError:  # WebP ends at 16,383 pixels
        path = path.with_suffix(".png")
        picture.save(part, "PNG")
    part.replace(path)
    return path


def check_writable(path):
    """UserError if no picture can be written there, which is better known before the work."""
    part = path.with_name(path.name + ".part")
    try:
        Image.new("RGB", (1, 1)).save(part, Image.registered_extensions()[path.suffix.lower()])
        part.unlink()
    except KeyError as error:
        raise UserError(f"cannot write {path}: end its name in .png, .jpg or .webp") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from error


def make_folder(path):
    """Make a folder, if there is none. UserError if it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {first_line(error)}") from error


def read_grids(folder):
    """Read the sample grids of a run, [(iteration, picture)]; a damaged one is left out."""
    grids = []
    for path in sorted(Path(folder, "samples").glob("*.png")):
        try:
            picture = Image.open(path).convert("RGB")
            picture.thumbnail((4096, 4096))  # more would fill the memory, and WebP holds 16,383
            grids.append((int(path.stem), picture))
        except (OSError, ValueError) as error:
            tqdm.write(f"{path} is damaged ({error}): left out of evolution.webp and report.png")
    return grids


def animate(folder, grids):
    """Animate the grids of a run, at least one, into evolution.webp."""
    first, *others = [picture for _, picture in grids]
    # milliseconds; the first and the last are shown long enough to look at
    times = [1500] + [300] * (len(others) - 1) + [2500] * (len(others) > 0)
    options = {"save_all": True, "append_images": others, "duration": times, "loop": 0}
    save_picture(first, Path(folder, "evolution.webp"), **options)


def report(folder, grids, records, reward):
    """Draw report.png: the first and the last grid of a run, and the curves of its records."""
    import matplotlib  # which takes a second
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a dollar in a reward is a dollar

    measured = [r for r in records if "change" in r]
    trained = [r for r in records if r.get("reward") is not None]
    x = [r["iteration"] for r in measured]
    x_trained = [r["iteration"] for r in trained]
    curves = ["reward", "watched", "drift", "norm"]
    figure = Figure(figsize=(16, 11), layout="constrained")
    axes = figure.subplot_mosaic([["before"] * 2 + ["after"] * 2, curves], height_ratios=[2.2, 1])

    for name, (iteration, picture) in (("before", grids[0]), ("after", grids[-1])):
        axes[name].imshow(picture)
        axes[name].set_title(f"{name}: iteration {iteration}, same prompts and noise")
        axes[name].axis("off")

    axes["reward"].plot(x_trained, [r["reward"] for r in trained], "C0", alpha=0.3)
    if measured[0].get("held_out") is not None:
        means, errors = [r["held_out"] for r in measured], [r["held_out_se"] or 0 for r in measured]
        axes["reward"].errorbar(x, means, errors, fmt="C0o-", capsize=3)
    axes["reward"].set_title(f"{reward[:40]}: held-out\n± standard error (pale: training)")

    for name, unit in measured[0]["watched_se"].items():
        change = [r["change"][name] or 0 for r in measured]
        in_units = [value / (unit or 1) for value in change]
        axes["watched"].plot(x, in_units, "o-", label=f"{name} ({change[-1]:+.2f})")
    axes["watched"].axhline(0, color="grey", lw=0.5)
    axes["watched"].set_title("watched: held-out change,\nin standard errors of the base model")
    axes["watched"].legend()

    axes["drift"].plot(x, [r["drift"] for r in measured], "o-")
    axes["drift"].set_title("drift from the base model")
    axes["norm"].plot(x_trained, [r["grad_norm"] or 0 for r in trained])
    axes["norm"].set_title("norm of the gradient")
    for name in curves:
        axes[name].set_xlabel("iteration")

    file = io.BytesIO()
    figure.savefig(file, dpi=80)
    save_picture(Image.open(file), Path(folder, "report.png"))
