"""Exercise 8: several updates from one roll-out, with a plain pull and with SPO's surrogate.

FDFO regresses the velocity v, which was v_ref during sampling: loss = mean((v - (v_ref - g))^2).
The rewards were measured at v_ref, so g says little about velocities far from it. Several optimiser
steps from the same images need a bound. SPO (Xie et al. 2024) has a soft one. With dR, the
difference of the rewards behind g, and d = g / dR,

    rho  = exp(mean(d^2) - mean((v - (v_ref - d))^2)),
    loss = -dR rho + |dR| / (2 clip) (rho - 1)^2.

At v = v_ref, rho is 1, and it changes as v moves along d. Write both losses. On paper: show that
their gradients agree at v = v_ref. At which rho does the surrogate stop?

Teaches: what a trust region is for; with one update from each roll-out it changes nothing.
Belongs to: the loss in fdfo in fdflow.py, and spo_loss in studies/baselines.py.
Check: pytest exercises/08_trust_region.py
"""

import torch

from exercises.hints import assert_close

V_REF, G = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()


def pull(v, v_ref, g):
    """Return FDFO's loss, a number, from v, v_ref and g [D]."""
    raise NotImplementedError


def surrogate(v, v_ref, g, dR, clip):
    """Return SPO's loss, a number, from v, v_ref and g [D].

    dR: a number, which may be negative
    clip: a number > 0
    """
    raise NotImplementedError


def rho_at_rest(dR, clip):
    """Return the rho at which gradient descent on the surrogate stops.

    Assume that mean(d^2) is large enough to get there.
    """
    raise NotImplementedError


# ---- the check


def gradient(loss, v):
    v = v.clone().requires_grad_()
    return torch.autograd.grad(loss(v), v)[0]


def rho(v, d):
    return ((d**2).mean() - ((v - (V_REF - d)) ** 2).mean()).exp().item()


def test_the_pull():
    at_target = gradient(lambda v: pull(v, V_REF, G), V_REF - G)
    hint = "The image moves along g if v moves along -g: the target is v_ref - g."
    assert_close(at_target, torch.zeros(6), "the gradient at v_ref - g", hint)

    at_start = gradient(lambda v: pull(v, V_REF, G), V_REF)
    hint = "The loss is a mean over the elements."
    assert_close(at_start, 2 / 6 * G, "the gradient at v_ref", hint)


def test_one_update_is_the_same():
    for dR in (0.5, -0.5, 2.0):
        for clip in (0.01, 0.3):
            found = gradient(lambda v: surrogate(v, V_REF, G, dR, clip), V_REF)

            what = f"dR = {dR}, clip = {clip}: the gradient at v_ref"
            hint = "At rho = 1 only -dR rho has a gradient; d is g / dR, so that dR cancels."
            assert_close(found, 2 / 6 * G, what, hint)


def test_many_updates_stop():
    for dR, clip in ((1.0, 0.1), (-1.0, 0.1), (3.0, 0.02)):
        g = 2 * dR * G / G.norm()  # mean(d^2) = 2/3, whatever dR is
        v = V_REF.clone()
        for _ in range(500):
            v -= clip / abs(dR) * gradient(lambda v: surrogate(v, V_REF, g, dR, clip), v)

        where = f"dR = {dR}, clip = {clip}"
        stop = rho(v, g / dR)
        hint = "Does the bound have |dR|, not dR?"
        assert abs(stop - 1) < 2 * clip, f"{where}: v goes on to rho = {stop:.3f}. {hint}"

        found = rho_at_rest(dR, clip)
        hint = "Set the derivative of the loss with respect to rho to zero."
        assert_close(found - 1, stop - 1, f"{where}: your rho - 1", hint, tolerance=0.02)
