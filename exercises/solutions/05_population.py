"""Solution of exercise 5.

A view of x as [n, M, 1, in] has the rows of member k at [:, k]. So A and B, once they are
transposed to [M, in, rank] and [M, rank, out], multiply the rows of their own member. Likewise R,
viewed as [n, 2, M], has the plus sides of all directions at [:, 0].
"""

import torch

from fdflow import sample


def lora_forward(x, W, A, B, scale):
    rows = x.view(-1, len(A), 1, x.shape[-1])  # [n, M, 1, in]
    return x @ W.T + scale * (rows @ A.mT @ B.mT).reshape(len(x), -1)


@torch.no_grad()
def slopes(problem, directions, h, eps, cond):
    members = 2 * len(directions)
    eps = eps.repeat_interleave(members, 0)
    cond = cond.repeat_interleave(members, 0)
    with problem.lora.perturbed(torch.cat([h * directions, -h * directions])):
        R = problem.reward(sample(problem.velocity, eps, cond, problem.times), cond)

    plus, minus = R.view(-1, 2, len(directions)).unbind(1)  # [n, M] each
    return ((plus - minus) / (2 * h)).mean(0)
