"""Solution of exercise 6.

The gradient w has the projection (w . d) d onto a direction d of length 1, and the mean of this
over all directions is w / D, because each d sees one dimension of D. The sum of squares is D times
their mean, so with the mean g is w on average.
"""


def pair_gradient(R_1, R_2, x_1, x_2):
    dx = x_1 - x_2
    return (R_1 - R_2) * dx / (dx**2).mean().clamp(min=1e-12)


def group_gradient(R, x):
    dR, dx = R - R.mean(), x - x.mean(0)
    return (dR[:, None] * dx).mean(0) / (dx**2).mean().clamp(min=1e-12)
