"""Solution of exercise 2.

J(h) = J + h J' + h^2 J'' / 2 + ...: the one-sided difference leaves h J'' / 2. In the central one
the even terms cancel, and h^2 J''' / 6 is left. The best h is where h, or h^2, is about the
rounding error, unit / h.
"""


def one_sided(J, h):
    return (J(h) - J(0)) / h


def central(J, h):
    return (J(h) - J(-h)) / (2 * h)


def error_left(method):
    return {"one-sided": 1 / 3, "central": 1 / 9}[method]


def best_h(method, unit):
    return {"one-sided": unit ** (1 / 2), "central": unit ** (1 / 3)}[method]
