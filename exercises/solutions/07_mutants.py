"""Solution of exercise 7.

Several groups of more than two branches, and the formula in loops. Training notices only what turns g around
or makes it random: four of the six mutants still raise the reward.
"""

import torch


def notices(image_gradient):
    generator = torch.Generator().manual_seed(0)
    R, x = (torch.randn(shape, generator=generator).double() for shape in ((3, 4), (3, 4, 5)))
    for R_k, x_k, g in zip(R, x, image_gradient(R, x)):
        dR, dx = R_k - R_k.mean(), x_k - x_k.mean(0)
        expected = (
            sum(dR[k] * dx[k] for k in range(4)) / 4 / (sum(dx[k] @ dx[k] for k in range(4)) / 20)
        )
        if not torch.allclose(g, expected):
            return True
    return False


def still_rises(mutant):
    return mutant not in ("wrong sign", "rewards of the next group")
