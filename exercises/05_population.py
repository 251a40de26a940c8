"""Exercise 5: many perturbed models in one pass, with a population axis.

A LoRA layer computes W x + scale B A x, and W is frozen. Give A and B a leading axis of K members: they are
A [K, rank, in] and B [K, out, rank]. Member k acts on the k-th part of the batch: of K n rows, on rows k n to
(k + 1) n - 1. Then one pass through the network evaluates K models, which share the large product W x.

Write that layer. Then write the slopes of exercise 4 without a loop: K directions and n noises, and one call
of the sampler, on 2 K n images. Inside `with problem.lora.perturbed(offsets):` part k of every batch sees the
parameters theta + offsets[k], offsets [members, P]. Both sides of a difference see the same noises.

Teaches: the population axis; the order of the rows decides which member sees what.
Belongs to: LoRALinear.forward, LoRA.perturbed and slopes in fdflow.py.
Check: pytest exercises/05_population.py
"""

import torch

from exercises.hints import assert_close
from fdflow import sample
from test_fdflow import draw, small_problem


def lora_forward(x, W, A, B, scale):
    """[K n, out], from x [K n, in], W [out, in], A [K, rank, in], B [K, out, rank]."""
    raise NotImplementedError


def slopes(problem, directions, h, eps, cond):
    """[K]: (R(theta + h d) - R(theta - h d)) / 2h for each d of directions [K, P], mean over n noises.

    eps [n, 3], cond [n]. x_0 = sample(problem.velocity, eps, cond, problem.times), R = problem.reward(x_0,
    cond).
    """
    raise NotImplementedError


def test_the_layer():
    generator = torch.Generator().manual_seed(0)
    shapes = (12, 5), (6, 5), (4, 2, 5), (4, 6, 2)
    x, W, A, B = (torch.randn(shape, generator=generator).double() for shape in shapes)

    def rows(member):  # each row by itself, with the member that sees it
        return torch.stack(
            [(W + 0.5 * B[member(i)] @ A[member(i)]) @ row for i, row in enumerate(x)]
        )

    found = lora_forward(x, W, A, B, 0.5)
    assert found.shape == (12, 6), f"the output has the shape {list(found.shape)}, not [12, 6]"
    interleaved = torch.allclose(found, rows(lambda i: i % 4))
    assert not interleaved, (
        "member k acts on every K-th row: view x as [K, n, in], not as [n, K, in]"
    )
    assert_close(
        found, rows(lambda i: i // 3), "the output", "Is the scale there, and only on B A x?"
    )


def test_the_slopes_in_one_pass():
    problem, (eps, cond) = small_problem(), draw(6)
    generator, P = torch.Generator().manual_seed(0), sum(p.numel() for p in problem.lora.parameters)
    directions = 2.0 * torch.randint(2, (4, P), generator=generator).double() - 1

    def J(offset):
        with torch.no_grad(), problem.lora.perturbed(offset[None]):
            return problem.reward(sample(problem.velocity, eps, cond, problem.times), cond).mean()

    expected = torch.stack([(J(0.01 * d) - J(-0.01 * d)) / 0.02 for d in directions])
    velocity, calls = problem.velocity, []
    problem.velocity = lambda x, t, cond: calls.append(x) or velocity(x, t, cond)
    found = slopes(problem, directions, 0.01, eps, cond)
    steps, members = len(problem.times) - 1, 2 * len(directions)
    assert len(calls) == steps, f"the network is called {len(calls)} times: one pass takes {steps}"
    assert len(calls[0]) == members * len(eps), (
        f"{len(calls[0])} images: 2 K n are {members * len(eps)}"
    )
    seen = calls[0].view(members, len(eps), -1)
    same = all(torch.equal(part, eps) for part in seen)
    assert same, (
        "each part of the batch must be all n noises: eps.repeat(2 * K, 1), not repeat_interleave"
    )
    hint = (
        "Undo the order in which you stacked the offsets: [2, K, n] if all plus sides come first."
    )
    assert_close(found, expected, "the slopes", hint)
