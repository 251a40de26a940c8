"""The pictures of a run: captioned grids, the report with its curves, and the animation."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def to_pil(image):
    """[3, H, W] in [0, 1] to a PIL image."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(images, captions, columns, title=""):
    """A captioned picture of images [N, 3, H, W] in [0, 1]; small images are drawn at twice their size."""
    scale = 2 if images.shape[2] < 128 else 1
    height, width = images.shape[2] * scale, images.shape[3] * scale
    caption_height, top = 20, 24 if title else 4
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(12)
    canvas = Image.new("RGB", (columns * (width + 4) + 4, top + rows * (height + caption_height)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 4), title, "black", font)
    for i, (image, caption) in enumerate(zip(images, captions)):
        left, upper = 4 + i % columns * (width + 4), top + i // columns * (height + caption_height)
        canvas.paste(to_pil(image).resize((width, height), Image.Resampling.BICUBIC), (left, upper))
        while draw.textlength(caption, font) > width:
            caption = caption[:-2] + "…"
        draw.text((left, upper + height), caption, "black", font)
    return canvas


def save_picture(picture, path):
    """Write a PIL picture beside its place, then move it there."""
    part = path.with_name(path.name + ".part")
    picture.save(part, path.suffix[1:])
    part.replace(path)


def animate(folder):
    """Animate the grids of a run folder into evolution.webp."""
    frames = [Image.open(path).convert("RGB") for path in sorted(Path(folder, "samples").glob("*.png"))]
    times = [1500] + [300] * (len(frames) - 2) + [2500]  # milliseconds; first and last long enough to look at
    part = Path(folder, "evolution.part")
    frames[0].save(
        part, "WEBP", save_all=True, append_images=frames[1:], duration=times[: len(frames)], loop=0
    )
    part.replace(Path(folder, "evolution.webp"))


def report(folder, metrics, reward):
    """Draw report.png: the first and last grid of a run, and the curves of its metrics (a list of dicts)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grids = sorted(Path(folder, "samples").glob("*.png"))
    measured = [m for m in metrics if "change" in m]
    x = [m["iteration"] for m in measured]
    figure, axes = plt.subplot_mosaic(
        [["before"] * 2 + ["after"] * 2, ["reward", "watched", "drift", "norm"]],
        figsize=(16, 11), height_ratios=[2.2, 1], layout="constrained",
    )  # fmt: skip
    for name, path in (("before", grids[0]), ("after", grids[-1])):
        axes[name].imshow(Image.open(path))
        axes[name].set_title(f"{name}: iteration {int(path.stem)}, same prompts and noise")
        axes[name].axis("off")
    trained = [m for m in metrics if "reward" in m]
    axes["reward"].plot([m["iteration"] for m in trained], [m["reward"] for m in trained], "C0", alpha=0.3)
    if "held_out" in measured[0]:
        low, high = ([m["held_out"] + sign * m["held_out_se"] for m in measured] for sign in (-1, 1))
        axes["reward"].fill_between(x, low, high, color="C0", alpha=0.2)
        axes["reward"].plot(x, [m["held_out"] for m in measured], "C0o-")
    axes["reward"].set_title(f"{reward}: held-out ± s.e. (pale: training)")
    for name, unit in measured[0]["watched_se"].items():
        change = [m["change"][name] / (unit or 1) for m in measured]
        axes["watched"].plot(x, change, "o-", label=f"{name} ({measured[-1]['change'][name]:+.2f})")
    axes["watched"].axhline(0, color="grey", lw=0.5)
    axes["watched"].set_title("held-out change, in the base model's s.e.")
    axes["watched"].legend()
    axes["drift"].plot(x, [m["drift"] for m in measured], "o-")
    axes["drift"].set_title("drift from the base model")
    axes["norm"].plot([m["iteration"] for m in trained], [m["grad_norm"] for m in trained])
    axes["norm"].set_title("gradient norm")
    for name in ("reward", "watched", "drift", "norm"):
        axes[name].set_xlabel("iteration")
    part = Path(folder, "report.part")
    figure.savefig(part, format="png", dpi=80)
    plt.close(figure)
    part.replace(Path(folder, "report.png"))


def draw_costs(path, measured, other):
    """Draw what methods gain against what it costs, mean and standard deviation over seeds.

    measured: {reward: {method: {name: [seeds, points]}}}. other: {reward: the watched one that is drawn too}.
    """
    from matplotlib import pyplot as plt

    rows = len(measured)
    figure, axes = plt.subplots(
        rows, 4, figsize=(18, 4.5 * rows), squeeze=False, sharey="row", layout="constrained"
    )
    for row, (reward, methods) in zip(axes, measured.items()):
        costs = {"images": "images", "evaluations": "network evaluations", "seconds": "seconds on one core"}
        costs[other[reward]] = f"change in {other[reward]}, not trained"
        row[0].set_ylabel(f"gain in held-out {reward}")
        for method, c in methods.items():
            mean, spread = c["gain"].mean(0), c["gain"].std(0)
            for axis, (cost, label) in zip(row, costs.items()):
                x = c[cost].mean(0)
                (line,) = axis.plot(x, mean, ".-", label=method)
                if cost in ("images", "evaluations", "seconds"):  # the others may turn back
                    axis.fill_between(
                        x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, lw=0
                    )
                axis.set_xlabel(label)
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=70)
    plt.close(figure)


def draw_sensitivity(path, knobs, curves):
    """Draw where the runs of knobs {name: {value: flags}} end: gain and change in clip against the value.

    curves: flags -> {name: [1, points]}.
    """
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(knobs), figsize=(9, 5), sharex="col", sharey="row", layout="constrained"
    )
    for column, (knob, trials) in zip(axes.T, knobs.items()):
        runs = [curves(flags) for flags in trials.values()]
        for axis, name in zip(column, ("gain", "clip")):
            axis.semilogx(list(trials), [c[name][0, -1] for c in runs], "o-")
            axis.axhline(0, color="grey", lw=0.5)
            axis.set_xticks(list(trials), [f"{value:g}" for value in trials])
            axis.minorticks_off()
        column[1].set_xlabel(knob)
    axes[0, 0].set_ylabel("gain in aesthetic, trained")
    axes[1, 0].set_ylabel("change in clip, watched")
    figure.savefig(path, dpi=80)
    plt.close(figure)
