"""Rewards that are programs: what can be said of an image by looking at its pixels.

Each takes images, float [B, 3, H, W] in [0, 1], and prompts, which it ignores, and returns [B].
"""

import io
import math

import torch
import torch.nn.functional as F
from PIL import Image


def luma(images):
    """Rec. 601 luma of [B, 3, H, W]: [B, H, W] in [0, 1]."""
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)


def brightness(images, prompts):
    """Mean luma in percent, 0 (black) to 100 (white)."""
    return 100 * luma(images).mean((1, 2))


def sharpness(images, prompts):
    """Variance of the Laplacian of the luma, in levels of 255 squared (Pech-Pacheco et al. 2000)."""
    kernel = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return F.conv2d(255 * luma(images)[:, None], kernel[None, None]).var((1, 2, 3), correction=0)


def colorfulness(images, prompts):
    """M3 of Hasler and Süsstrunk 2003, "Measuring colourfulness in natural images": 0 (grey) to above 100."""
    red, green, blue = (255 * images).unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = torch.sqrt(rg.var((1, 2), correction=0) + yb.var((1, 2), correction=0))
    return spread + 0.3 * torch.sqrt(rg.mean((1, 2)) ** 2 + yb.mean((1, 2)) ** 2)


def jpeg_size(images, prompts):
    """Size as a JPEG file of quality 95, in kB of 1,000 bytes (DDPO, Black et al. 2023)."""
    sizes = []
    for image in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def edge_density(images, prompts):
    """Percentage of pixels at which the luma changes by over a tenth of its range a pixel (Sobel)."""
    kernel = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    gradient = F.conv2d(luma(images)[:, None], torch.stack([kernel, kernel.T])[:, None])
    return 100 * (gradient.norm(dim=1) > 0.1).float().mean((1, 2))


def color_entropy(images, prompts):
    """Shannon entropy of the colours in bits, 0 (one colour) to 9, with each channel in 8 levels."""
    levels = (8 * images).long().clamp(max=7)
    bins = levels[:, 0] * 64 + levels[:, 1] * 8 + levels[:, 2]
    p = torch.stack([torch.bincount(b, minlength=512) / b.numel() for b in bins.flatten(1)])
    return -torch.special.xlogy(p, p).sum(1) / math.log(2)
