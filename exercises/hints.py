"""A comparison that all checks share. It says in which way an answer is wrong."""

import torch


def assert_close(found, expected, what, hint="", tolerance=1e-6):
    """Pass if |found - expected| <= tolerance |expected|; else say how they differ, with a hint."""
    assert found is not None, f"{what}: your function returned None"
    found = torch.as_tensor(found, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)

    shapes = list(found.shape), list(expected.shape)
    assert shapes[0] == shapes[1], f"{what}: shape {shapes[0]}, not {shapes[1]}"
    assert found.isfinite().all(), f"{what} is not finite: something was divided by zero"

    size = expected.norm().item()
    if (found - expected).norm() <= tolerance * size:
        return

    # the factor that brings expected as near to found as possible
    scale = ((found * expected).sum() / size**2).item() if size > 0 else 0.0
    if size == 0:
        how = f"should be zero, but its length is {found.norm():.4g}"
    elif found.norm() == 0:
        how = "is zero"
    elif (found - scale * expected).norm() > max(tolerance, 1e-4) * size:
        cosine = (scale * size / found.norm()).item()
        how = f"points elsewhere: its cosine with the right one is {cosine:.3f}"
    elif abs(scale + 1) < max(tolerance, 1e-3):
        how = "has the right size but the wrong sign"
    else:
        how = f"is {scale:.4g} times what it should be"
    raise AssertionError(f"{what} {how}. {hint}".strip())
