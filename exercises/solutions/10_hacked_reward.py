"""One solution of exercise 10: what must not fall is in the reward. Brightness +5.2, clip -4.7."""

from rewards import TINY, brightness, load_clip


def change(before, after):
    gains = (after - before).mean(1)
    return gains.mean(), gains.std() / len(gains) ** 0.5


def repaired(images, prompts):
    return 2 * brightness(images, prompts) + load_clip(TINY, "cpu")(images, prompts)
