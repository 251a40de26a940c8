"""Exercise 5: run many perturbed models in one pass, with a population.

A LoRA layer computes W x + scale B A x, where W is frozen. A population of M members gives A and B
a leading axis: A [M, rank, in] and B [M, out, rank]. The members take the rows of the batch in
turn: row i is computed with A[i mod M] and B[i mod M]. So one pass through the network evaluates M
models, and they share the large product W x. Write that layer.

Then write the slopes of exercise 4 without a loop, for M directions and n noises, with one call of
the sampler on 2 M n images. For this the population has 2 M members: theta + h d for each direction
d, then theta - h d. Inside `with problem.lora.perturbed(offsets):`, image i of every batch is
computed with the parameters theta + offsets[i mod len(offsets)]. Both sides of a difference see the
same noises.

Teaches: the population axis; the order of the images decides which member computes what.
Belongs to: LoRALinear.forward, LoRA.perturbed and slopes in fdflow.py.
Check: pytest exercises/05_population.py
"""

import torch

from exercises.hints import assert_close
from fdflow import sample
from test_fdflow import draw, small_problem


def lora_forward(x, W, A, B, scale):
    """Return the outputs [n M, out] of a LoRA layer with a population of M members.

    x: [n M, in]
    W: [out, in]
    A: [M, rank, in]
    B: [M, out, rank]
    """
    raise NotImplementedError


def slopes(problem, directions, h, eps, cond):
    """Return a slope for each of M directions, the mean over n noises: [M].

    directions: [M, P]
    eps, cond: [n, 3] and [n]; every direction sees all of them

    x_0 = sample(problem.velocity, eps, cond, problem.times) are images and R = problem.reward(x_0,
    cond) their rewards.
    """
    raise NotImplementedError


# ---- the check


def test_the_layer():
    generator = torch.Generator().manual_seed(0)
    x, W, A, B = (
        torch.randn(shape, generator=generator).double()
        for shape in ((12, 5), (6, 5), (4, 2, 5), (4, 6, 2))
    )

    def rows(member):
        """Compute each row i by itself, by member(i)."""
        weights = [W + 0.5 * B[member(i)] @ A[member(i)] for i in range(12)]
        return torch.stack([weight @ row for weight, row in zip(weights, x)])

    found = lora_forward(x, W, A, B, 0.5)
    assert found.shape == (12, 6), f"the output has the shape {list(found.shape)}, not [12, 6]"

    in_blocks = torch.allclose(found, rows(lambda i: i // 3))
    hint = "each member got a block of rows: row i goes to member i mod M, so view x as [n, M, in]"
    assert not in_blocks, hint
    expected = rows(lambda i: i % 4)
    assert_close(found, expected, "the output", "Is the scale there, and only on B A x?")


def test_the_slopes_in_one_pass():
    problem, (eps, cond) = small_problem(), draw(6)
    P = sum(p.numel() for p in problem.lora.parameters)
    generator = torch.Generator().manual_seed(0)
    directions = 2.0 * torch.randint(2, (4, P), generator=generator).double() - 1

    def J(offset):
        with torch.no_grad(), problem.lora.perturbed(offset[None]):
            return problem.reward(sample(problem.velocity, eps, cond, problem.times), cond).mean()

    expected = torch.stack([(J(0.01 * d) - J(-0.01 * d)) / 0.02 for d in directions])

    # listen to what is asked of the network
    velocity, calls = problem.velocity, []

    def spy(x, t, cond):
        calls.append(x)
        return velocity(x, t, cond)

    problem.velocity = spy
    found = slopes(problem, directions, 0.01, eps, cond)

    steps = len(problem.times) - 1
    assert len(calls) == steps, f"the network is called {len(calls)} times: one pass takes {steps}"
    images, members = len(calls[0]), 2 * len(directions)
    assert images == members * len(eps), f"{images} images: 2 M n are {members * len(eps)}"

    seen = calls[0].view(len(eps), members, -1)
    same = torch.equal(seen, eps[:, None].expand_as(seen))
    hint = "every noise must come 2 M times in a row, once for each member: not eps.repeat"
    assert same, hint

    hint = "Undo the order in which you stacked the offsets: [n, 2, M] if plus sides come first."
    assert_close(found, expected, "the slopes", hint)
