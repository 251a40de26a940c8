"""PickScore v1 (Kirstain et al. 2023): a CLIP ViT-H/14 tuned on half a million choices of people.

Its unit is the model's own: the logarithm of the odds that one image is preferred to another is
the difference of their scores. Scores are typically 17 to 24.
"""

from zoo.loading import CLIP_H, large_model_dtype


def load(clip_from, device):
    """Return the Clip of PickScore, loaded by `clip_from` of rewards.py."""
    dtype = large_model_dtype(device)
    clip = clip_from("yuvalkirstain/PickScore_v1", CLIP_H, device, dtype=dtype)
    clip.scale = clip.model.logit_scale.exp().item()
    return clip
