"""Exercise 6: FDFO's g, the direction in which an image should move.

Two branches, images x_1 and x_2 [D] sampled from one noise, have the rewards R_1 and R_2. So along the one
direction tried, x_1 - x_2, the reward changes by R_1 - R_2. FDFO's estimate of the reward's gradient is
    g = (R_1 - R_2) (x_1 - x_2) / mean((x_1 - x_2)^2),
with the mean over the D elements. Each of K branches is compared with their mean:
    g = mean_k (R_k - mean R) (x_k - mean x) / (mean over k and elements of (x_k - mean x)^2).
Write both. On paper: with the sum of squares, not their mean, a pair's g would be the projection of the
gradient on the direction tried. Why is the mean right? (Average over all directions.)

Teaches: a gradient from two values; its units; one g serves all branches of a group, in whatever order.
Belongs to: image_gradient in fdflow.py. Check: pytest exercises/06_branches.py
"""

import torch

from exercises.hints import assert_close


def pair_gradient(R_1, R_2, x_1, x_2):
    """g [D], from two numbers and two images [D]; zero where the two images are the same."""
    raise NotImplementedError


def group_gradient(R, x):
    """g [D], from rewards R [K] of images x [K, D]; zero where all images are the same."""
    raise NotImplementedError


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def test_it_averages_to_the_gradient():
    w, x_1 = normal(5, seed=1), normal(5)  # the reward w . x has the gradient w everywhere
    directions, _ = torch.linalg.qr(normal(5, 5, seed=2))  # all five, at right angles
    for size in (1.0, 1e-3):  # how far the branches are apart must not matter
        pairs = [(x_1, x_1 + size * d) for d in directions]
        g = torch.stack([pair_gradient(w @ x, w @ y, x, y) for x, y in pairs]).mean(0)
        hint = "Divide by the mean of the squares, not their sum or the length; order both differences alike."
        assert_close(g, w, "the mean of g over 5 directions in 5 dimensions", hint)


def test_the_order_of_the_branches_does_not_matter():
    (x_1, x_2), (R_1, R_2) = normal(2, 5), normal(2, seed=1)
    hint = "If both differences change sign, g does not: no absolute values."
    one, other = pair_gradient(R_1, R_2, x_1, x_2), pair_gradient(R_2, R_1, x_2, x_1)
    assert_close(other, one, "with the branches swapped, g", hint)


def test_a_group_of_two_is_a_pair():
    x, R = normal(2, 5), normal(2, seed=1)
    hint = "Means over k above and over k and the elements below."
    assert_close(
        group_gradient(R, x),
        pair_gradient(*R, *x),
        "g of a group of two, against the pair's,",
        hint,
    )


def test_only_differences_within_a_group_count():
    x, R = normal(4, 5), normal(4, seed=1)
    g = group_gradient(R, x)
    assert_close(
        group_gradient(R + 10, x), g, "with 10 added to all rewards, g", "Subtract the mean of R."
    )
    hint = "Subtract the mean image, below the fraction line as well."
    assert_close(group_gradient(R, x + 10), g, "with 10 added to all images, g", hint)
    dR, dx = R - R.mean(), x - x.mean(0)
    expected = (
        sum(dR[k] * dx[k] for k in range(4)) / 4 / (sum(dx[k] @ dx[k] for k in range(4)) / 20)
    )
    assert_close(
        g, expected, "g of a group of four", "Means over k above and over k and the elements below."
    )


def test_equal_images_say_nothing():
    x = normal(1, 5).repeat(3, 1)
    for g in (
        pair_gradient(1.0, 2.0, x[0], x[0]),
        group_gradient(torch.tensor([1.0, 2.0, 3.0]).double(), x),
    ):
        assert_close(
            g,
            torch.zeros(5),
            "g of equal images",
            "Keep 0 / 0 from happening: clamp what you divide by.",
        )
