"""The pictures of a run: captioned grids, the report with its curves, and the animation."""

import base64
import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm


def to_pil(image):
    """[3, H, W] in [0, 1] to a PIL image."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def png(image):
    """[3, H, W] in [0, 1] to a PNG file in base64."""
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def grid(images, captions, columns):
    """A captioned PIL picture of images [N, 3, H, W] in [0, 1]; small ones are drawn at twice their size."""
    scale = 2 if images.shape[2] < 128 else 1
    height, width = images.shape[2] * scale, images.shape[3] * scale
    rows, font = -(-len(images) // columns), ImageFont.load_default(12)
    canvas = Image.new("RGB", (columns * (width + 4) + 4, 4 + rows * (height + 20)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image, caption) in enumerate(zip(images, captions)):
        left, upper = 4 + i % columns * (width + 4), 4 + i // columns * (height + 20)
        canvas.paste(to_pil(image).resize((width, height), Image.Resampling.BICUBIC), (left, upper))
        caption = " ".join(caption[:200].split())
        while draw.textlength(caption, font) > width:
            caption = caption[:-2] + "…"
        draw.text((left, upper + height), caption, "black", font)
    return canvas


def save_picture(picture, path, **options):
    """Write a PIL picture beside its place, then move it there."""
    part = path.with_name(path.name + ".part")
    picture.save(part, path.suffix[1:], **options)
    part.replace(path)


def read_grids(folder):
    """[(iteration, PIL picture)] of the sample grids of a run folder; one that is damaged is left out."""
    grids = []
    for path in sorted(Path(folder, "samples").glob("*.png")):
        try:
            grids.append((int(path.stem), Image.open(path).convert("RGB")))
        except Exception as error:  # whatever damage does
            tqdm.write(f"{path} is damaged ({error}): left out of evolution.webp and report.png")
    return grids


def animate(folder, grids):
    """Animate the grids of a run folder, at least one, into evolution.webp."""
    frames = [picture for _, picture in grids]
    times = (
        [1500] + [300] * (len(frames) - 2) + [2500]
    )  # milliseconds; first and last long enough to look at
    options = {
        "save_all": True,
        "append_images": frames[1:],
        "duration": times[: len(frames)],
        "loop": 0,
    }
    save_picture(frames[0], Path(folder, "evolution.webp"), **options)


def report(folder, grids, records, reward):
    """Draw report.png: the first and last of a run's grids, and the curves of its records."""
    from matplotlib.figure import Figure  # which takes a second

    measured, trained = (
        [r for r in records if r.get(key) is not None] for key in ("change", "reward")
    )
    x = [r["iteration"] for r in measured]
    figure, curves = (
        Figure(figsize=(16, 11), layout="constrained"),
        ["reward", "watched", "drift", "norm"],
    )
    axes = figure.subplot_mosaic([["before"] * 2 + ["after"] * 2, curves], height_ratios=[2.2, 1])
    for name, (iteration, picture) in (("before", grids[0]), ("after", grids[-1])):
        axes[name].imshow(picture)
        axes[name].set_title(f"{name}: iteration {iteration}, same prompts and noise")
        axes[name].axis("off")
    axes["reward"].plot(
        [r["iteration"] for r in trained], [r["reward"] for r in trained], "C0", alpha=0.3
    )
    if measured[0].get("held_out") is not None:
        errors = [r["held_out_se"] or 0 for r in measured]
        axes["reward"].errorbar(x, [r["held_out"] for r in measured], errors, fmt="C0o-", capsize=3)
    axes["reward"].set_title(f"{reward[:40]}: held-out\n± standard error (pale: training)")
    for name, unit in measured[0]["watched_se"].items():
        change = [(r["change"][name] or 0) / (unit or 1) for r in measured]
        axes["watched"].plot(
            x, change, "o-", label=f"{name} ({measured[-1]['change'][name] or 0:+.2f})"
        )
    axes["watched"].axhline(0, color="grey", lw=0.5)
    axes["watched"].set_title("watched: held-out change,\nin standard errors of the base model")
    axes["watched"].legend()
    axes["drift"].plot(x, [r["drift"] for r in measured], "o-")
    axes["drift"].set_title("drift from the base model")
    axes["norm"].plot([r["iteration"] for r in trained], [r["grad_norm"] or 0 for r in trained])
    axes["norm"].set_title("norm of the gradient")
    for name in curves:
        axes[name].set_xlabel("iteration")
    file = io.BytesIO()
    figure.savefig(file, dpi=80)
    save_picture(Image.open(file), Path(folder, "report.png"))
