"""Solution of exercise 3.

With the same noise the slope converges to a derivative as h shrinks, and its variance does not
depend on h. With different noises the numerator has the variance 2 Var(R), however small h is, and
that is divided by (2h)^2.
"""


def slopes_common(R, h, draw):
    eps = draw()
    return (R(h, eps) - R(-h, eps)) / (2 * h)


def slopes_independent(R, h, draw):
    return (R(h, draw()) - R(-h, draw())) / (2 * h)


def predicted_variance(R_0, h):
    return 2 * R_0.var() / (2 * h) ** 2
