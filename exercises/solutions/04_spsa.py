"""Solution of exercise 4.

Element i of (m . d) d is m_i plus P - 1 terms m_j d_j d_i, uncorrelated, of mean 0 and variance m_j^2. Summed
over i that is (P - 1) |m|^2, and the mean over K directions has a K-th of it.
"""

import torch


def spsa(J, theta, h, signs):
    g = torch.zeros_like(theta)
    for d in signs:
        slope = (J(theta + h * d) - J(theta - h * d)) / (2 * h)
        g += slope * d / len(signs)
    return g


def relative_squared_error(P, K):
    return (P - 1) / K
