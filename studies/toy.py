"""Post-train a flow in two dimensions, and see which way each estimator points. Draws toy.png.

python -m studies.toy
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from fdflow import LoRA, Problem, central_difference, fdfo, noised, sample, spsa
from support.arguments import Parser
from support.errors import run_command
from support.pictures import check_writable

TIMES = torch.linspace(1, 0, 9).tolist()
LAYERS = ["net.0", "net.2", "net.4", "net.6"]
TARGET = (1.5, 0.8)


def data(n):
    """Draw n points [n, 2] on two interleaved half circles."""
    angle = torch.pi * torch.rand(n)
    side = 2.0 * torch.randint(2, (n,)) - 1
    moons = torch.stack([side * angle.cos() - side / 2, side * angle.sin() - side / 4], 1)
    return 1.2 * moons + 0.08 * torch.randn(n, 2)


def reward(x, cond=None):
    """Return minus the distance to TARGET."""
    return -(x - x.new_tensor(TARGET)).square().sum(1).sqrt()


class Velocity(nn.Module):
    """A small network v(x [B, 2], t), t a float or [B]."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Linear(4, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, t, cond=None):
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))[:, None]
        return self.net(torch.cat([x, t, (3 * t).cos()], 1))


def train_base(steps=3000, seed=0):
    """Train a Velocity on `data` by flow matching: x_t = (1 - t) x_0 + t eps, target eps - x_0."""
    torch.manual_seed(seed)
    velocity = Velocity()
    optimizer = torch.optim.Adam(velocity.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for _ in range(steps):
        x_0 = data(512)
        eps = torch.randn(512, 2)
        t = torch.rand(512)
        loss = (velocity(noised(x_0, t, eps), t) - (eps - x_0)).square().mean()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return velocity


def gradient(lora):
    """Return the estimate in .grad, minus what stands there, as a vector; clear .grad."""
    g = -torch.cat([p.grad.flatten() for p in lora.parameters])
    for p in lora.parameters:
        p.grad = None
    return g


def autograd(problem, eps, cond):
    """Back-propagate through the whole sampler, which the estimators do without."""
    x = sample(problem.velocity, eps, cond, problem.times)
    (-problem.reward(x, cond).mean()).backward()


def cosines(problem):
    """Measure the cosine of each estimate with the autograd gradient, by images used.

    Returns {name: [(images, cosine), ...]}, each cosine a mean of four.
    """
    autograd(problem, torch.randn(problem.batch, 2), torch.zeros(problem.batch))
    exact = gradient(problem.lora)

    curves = {"FDFO": [], "SPSA": [], "central difference": []}
    for n in (2 ** torch.arange(4, 12)).tolist():
        groups_and_estimators = {
            "FDFO": (n, partial(fdfo, churn=0.1)),
            "SPSA": (n, partial(spsa, directions=n // 8)),
            "central difference": (4, partial(central_difference, coordinates=n // 4)),
        }
        for name, (groups, estimate) in groups_and_estimators.items():
            total = 0
            for _ in range(4):
                images = estimate(problem, torch.randn(groups, 2), torch.zeros(groups))
                g = gradient(problem.lora)
                total += torch.cosine_similarity(g, exact, dim=0).item()
            curves[name].append((images, total / 4))
    return curves


def draw(before, after, curves):
    """Draw points [N, 2] before and after training, and the cosines of the estimates."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, x, name in ((axes[0], before, "before"), (axes[1], after, "after 30 iterations")):
        axis.scatter(*x.T, c=reward(x), s=4, vmin=-3.5, vmax=0)
        axis.plot(*TARGET, "r*", markersize=14)
        axis.set(xlim=(-2.4, 3), ylim=(-1.7, 1.7), aspect=1)
        axis.set_title(f"{name}: reward {reward(x).mean():.2f}")

    for name, curve in curves.items():
        axes[2].plot(*zip(*curve), "o-", label=name)
    axes[2].set(xscale="log", xlabel="images", ylim=(-0.05, 1.02))
    axes[2].set_title("cosine with the autograd gradient")
    axes[2].legend()
    figure.savefig("toy.png", dpi=90)


def main():
    Parser(__doc__).parse_args()
    check_writable(Path("toy.png"))
    torch.set_num_threads(1)  # networks this small only lose by more

    velocity = train_base()
    lora = LoRA(velocity, LAYERS, rank=4)
    problem = Problem(velocity, reward, lora, TIMES, batch=4096)
    optimizer = torch.optim.Adam(lora.parameters, 2e-3)
    eps = torch.randn(1500, 2)
    with torch.no_grad():
        before = sample(velocity, eps, None, TIMES)

    for iteration in range(30):
        if iteration == 10:  # on the way, where the gradient is neither zero nor that of the start
            curves = cosines(problem)
        fdfo(problem, torch.randn(256, 2), torch.zeros(256), churn=0.1)
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        after = sample(velocity, eps, None, TIMES)
    draw(before, after, curves)
    for name, curve in curves.items():
        found = [f"{cosine:.2f} from {images} images" for images, cosine in curve[::2]]
        print(f"{name}: {', '.join(found)}")


if __name__ == "__main__":
    run_command(main)
