"""Solution of exercise 7.

The test takes several groups of more than two branches, and writes the formula as loops. Training
shows only the mistakes that turn g around or make it random: four of the six mutants still raise
the reward.
"""

import torch


def notices(image_gradient):
    generator = torch.Generator().manual_seed(0)
    G, K, D = 3, 4, 5
    R = torch.randn(G, K, generator=generator).double()
    x = torch.randn(G, K, D, generator=generator).double()

    for R_k, x_k, g in zip(R, x, image_gradient(R, x)):
        dR, dx = R_k - R_k.mean(), x_k - x_k.mean(0)
        mean_product = sum(dR[k] * dx[k] for k in range(K)) / K
        mean_square = sum(dx[k] @ dx[k] for k in range(K)) / (K * D)
        if not torch.allclose(g, mean_product / mean_square):
            return True
    return False


def still_rises(mutant):
    return mutant not in ("wrong sign", "rewards of the next group")
