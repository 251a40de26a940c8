"""Solution of exercise 4.

Element i of (w . d) d is w_i plus P - 1 terms w_j d_j d_i. These are uncorrelated, with mean 0 and
variance w_j^2. Summed over i that is (P - 1) |w|^2, and the mean over M directions has 1 / M of it.
"""

import torch


def spsa(J, theta, h, signs):
    g = torch.zeros_like(theta)
    for d in signs:
        slope = (J(theta + h * d) - J(theta - h * d)) / (2 * h)
        g += slope * d / len(signs)
    return g


def relative_squared_error(P, M):
    return (P - 1) / M
