"""Solution of exercise 1.

(1 + churn) r (1 - s) = s (1 - r) is linear in r. With the fresh noise there are 1 - r parts image
and (1 + churn) r parts noise. Together they are 1 + churn r, and must be 1 again, so a is
1 / (1 + churn r). The old noise has the standard deviation a r, and both noises together have
(1 + churn) a r. Variances add, so b^2 = ((1 + churn)^2 - 1) (a r)^2.
"""

import math


def overshoot(s, churn):
    return s / (1 + churn * (1 - s))


def add_noise(x_r, r, churn, xi):
    return (x_r + r * math.sqrt((1 + churn) ** 2 - 1) * xi) / (1 + churn * r)
