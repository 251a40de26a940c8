"""Solution of exercise 8.

At v_ref, d rho / dv = -2 d / D, so the surrogate's gradient is 2 dR d / D = 2 g / D, that of the
pull. Its derivative with respect to rho, -dR + |dR| (rho - 1) / clip, is zero at rho = 1 + clip if
dR > 0, and at 1 - clip if dR < 0.
"""


def pull(v, v_ref, g):
    return ((v - (v_ref - g)) ** 2).mean()


def surrogate(v, v_ref, g, dR, clip):
    d = g / dR
    rho = ((d**2).mean() - ((v - (v_ref - d)) ** 2).mean()).exp()
    return -dR * rho + abs(dR) / (2 * clip) * (rho - 1) ** 2


def rho_at_rest(dR, clip):
    return 1 + clip if dR > 0 else 1 - clip
