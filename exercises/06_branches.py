"""Exercise 6: find FDFO's g, the direction in which an image should move.

Two branches, images x_1 and x_2 [D] that were sampled from one noise, have the rewards R_1 and R_2.
So along the one direction tried, x_1 - x_2, the reward changes by R_1 - R_2. FDFO's estimate of the
reward's gradient is

    g = (R_1 - R_2) (x_1 - x_2) / mean((x_1 - x_2)^2),

with the mean over the D elements. If there are K branches, each is compared with their mean:

    g = mean_k (R_k - mean R) (x_k - mean x) / (mean over k and elements of (x_k - mean x)^2).

Write both. On paper: with the sum of squares in place of their mean, a pair's g would be the
projection of the gradient onto the direction tried. Why is the mean right? (Average g over all
directions.)

Teaches: a gradient from two values; its units; one g serves all branches of a group.
Belongs to: image_gradient in fdflow.py. Check: pytest exercises/06_branches.py
"""

import torch

from exercises.hints import assert_close


def pair_gradient(R_1, R_2, x_1, x_2):
    """Return g [D], from two numbers and two images [D]; zero where the images are the same."""
    raise NotImplementedError


def group_gradient(R, x):
    """Return g [D], from rewards R [K] of images x [K, D]; zero where all images are the same."""
    raise NotImplementedError


# ---- the check


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def test_it_averages_to_the_gradient():
    w, x_1 = normal(5, seed=1), normal(5)  # the reward w . x has the gradient w everywhere
    directions, _ = torch.linalg.qr(normal(5, 5, seed=2))  # all five, at right angles
    for size in (1.0, 1e-3):  # how far the branches are apart must not matter
        found = []
        for direction in directions:
            x_2 = x_1 + size * direction
            found.append(pair_gradient(w @ x_1, w @ x_2, x_1, x_2))

        what = "the mean of g over 5 directions in 5 dimensions"
        hint = "Divide by the mean of the squares, not their sum; order both differences alike."
        assert_close(torch.stack(found).mean(0), w, what, hint)


def test_the_order_of_the_branches_does_not_matter():
    (x_1, x_2), (R_1, R_2) = normal(2, 5), normal(2, seed=1)
    one = pair_gradient(R_1, R_2, x_1, x_2)
    other = pair_gradient(R_2, R_1, x_2, x_1)

    hint = "If both differences change sign, g does not: no absolute values."
    assert_close(other, one, "with the branches swapped, g", hint)


def test_a_group_of_two_is_a_pair():
    x, R = normal(2, 5), normal(2, seed=1)
    found, expected = group_gradient(R, x), pair_gradient(*R, *x)

    hint = "Means over k above and over k and the elements below."
    assert_close(found, expected, "g of a group of two, against the pair's,", hint)


def test_only_differences_within_a_group_count():
    x, R = normal(4, 5), normal(4, seed=1)
    g = group_gradient(R, x)

    what, hint = "with 10 added to all rewards, g", "Subtract the mean of R."
    assert_close(group_gradient(R + 10, x), g, what, hint)
    what, hint = "with 10 added to all images, g", "Subtract the mean image, also in the divisor."
    assert_close(group_gradient(R, x + 10), g, what, hint)

    dR, dx = R - R.mean(), x - x.mean(0)
    mean_product = sum(dR[k] * dx[k] for k in range(4)) / 4
    mean_square = sum(dx[k] @ dx[k] for k in range(4)) / 20
    hint = "Means over k above and over k and the elements below."
    assert_close(g, mean_product / mean_square, "g of a group of four", hint)


def test_equal_images_say_nothing():
    x, R = normal(1, 5).repeat(3, 1), torch.tensor([1.0, 2.0, 3.0]).double()
    for g in (pair_gradient(1.0, 2.0, x[0], x[1]), group_gradient(R, x)):
        hint = "Keep 0 / 0 from happening: clamp what you divide by."
        assert_close(g, torch.zeros(5), "g of equal images", hint)
