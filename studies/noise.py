"""How much of an estimate is signal: its cosine with the gradient that back-propagation gives, by method.

python -m studies.noise --steps 10         # reward aesthetic, the model before training, 64 images each
python -m studies.noise --iterations 44    # in mid-training, after so many iterations of fdfo
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from fdflow import LoRA, Problem, fdfo
from models.flows import load_flow
from models.lora_files import layers_named
from models.table import TINY, fill_defaults
from rewards import Reward
from studies import baselines
from support.commands import Parser, number
from support.draws import seeded
from support.errors import run_command
from support.evaluation import Counted, Scorer
from support.prompts import split_prompts

METHODS = {  # the estimator, how many groups make 64 images, and its options
    "fdfo": (fdfo, 32, {"churn": 0.05}),
    "fdfo, stored steps": (baselines.fdfo_published, 32, {"churn": 0.05, "updates": 1}),
    "flow-grpo": (baselines.flow_grpo, 8, {"train_steps": 2}),
    "flow-grpo, same noise": (baselines.flow_grpo, 8, {"train_steps": 2, "shared_noise": True}),
    "awm": (baselines.awm, 8, {}),
}
EXACT = baselines.backprop, 64, {}


def draw(flow, groups, draws):
    """Random noise eps [G, ...] and prompts cond [G] of some groups, from a generator."""
    cond = torch.randint(len(flow.prompts), (groups,), generator=draws).to(flow.device)
    return flow.noise(torch.randint(2**31, (groups,), generator=draws).tolist()), cond


def estimates(problem, flow, method, n):
    """n estimates [n, P] of a method, each at other noise and prompts, and the evaluations that one takes."""
    estimate, groups, options = method
    found, parameters = [], problem.lora.parameters
    for i in tqdm(range(n), leave=False):
        # others than those of the exact gradient, which has more groups
        eps, cond = draw(flow, groups, seeded(i, f"{groups} groups"))
        for p in parameters:
            p.grad = None
        estimate(problem, eps, cond, seeded(i, "estimator", flow.device), **options)
        found.append(torch.cat([p.grad.flatten() for p in parameters]).double())
    return torch.stack(found), problem.velocity.pop_count() // n


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=number(int, 1, 1000), help="sampling steps (default 4)")
    parser.add_argument(
        "--estimates", type=number(int, 2, 10_000), default=16, help="of each (default 16)"
    )
    parser.add_argument(
        "--iterations", type=number(int, 0), default=0, help="of fdfo before (default 0)"
    )
    # all else as the bundled model has it
    parser.set_defaults(
        **dict.fromkeys("model size guidance batch device dtype rollout_steps".split())
    )
    parser.set_defaults(compile=False, checkpointing=False)
    args = parser.parse_args()
    model = fill_defaults(args)
    flow = load_flow(model, args, split_prompts(None)[0])
    reward = Reward("aesthetic", TINY, args.device)
    layers = layers_named(flow.network, model.layers)
    lora = LoRA(flow.network, layers, model.rank, model.scale * model.rank, seeded(0, "lora"))
    velocity, scorer = Counted(flow.velocity), Scorer(flow, reward)
    problem = Problem(velocity, scorer, lora, flow.train_times, args.batch)
    optimizer = torch.optim.AdamW(lora.parameters, model.lr, weight_decay=1e-4)
    for i in tqdm(range(args.iterations), leave=False):
        options = {"churn": model.churn, "train_steps": model.train_steps, "kl": model.kl}
        fdfo(
            problem,
            *draw(flow, 32, seeded(i, "draws")),
            seeded(i, "training", flow.device),
            **options,
        )
        optimizer.step()
        optimizer.zero_grad()
    exact, _ = estimates(problem, flow, EXACT, args.estimates)
    n, products, mean = len(exact), exact @ exact.T, exact.mean(0)
    # products of two different estimates are in the mean the squared norm of what both estimate
    signal = (products.sum() - products.trace()) / (n * n - n)
    purity = (
        signal.clamp(min=0).sqrt() / mean.norm()
    ).item()  # and so a cosine with the mean is too small
    print(f"the mean of {n} exact gradients has a cosine of {purity:.2f} with their expectation")
    for name, method in METHODS.items():
        found, evaluations = estimates(problem, flow, method, n)
        cosines = F.cosine_similarity(found, mean[None]) / purity
        cosine, error = cosines.mean().item(), cosines.std().item() / n**0.5
        print(f"{name:22} {cosine:+.3f} ± {error:.3f}  {evaluations:6,} evaluations", flush=True)


if __name__ == "__main__":
    run_command(main)
