"""How much of an estimate is signal: its cosine with the gradient of back-propagation, by method.

python -m studies.noise --steps 10         # reward aesthetic, before training, 64 images each
python -m studies.noise --iterations 44    # in mid-training, after so many iterations of fdfo
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from fdflow import LoRA, Problem, fdfo
from models.flow import load_flow
from models.lora_files import layers_named
from models.table import find_model
from rewards import TINY, Reward
from studies.baselines import awm, backprop, fdfo_published, flow_grpo, v_grpo
from support.arguments import Parser, add_model_arguments, fill_defaults, number
from support.draws import seeded
from support.errors import run_command
from support.evaluation import Counted, Scorer
from support.prompts import split_prompts

EXACT = (backprop, 64, {})
METHODS = {  # the estimator, how many groups make 64 images, and its options
    "fdfo": (fdfo, 32, {"churn": 0.05}),
    "fdfo, stored steps": (fdfo_published, 32, {"churn": 0.05, "updates": 1}),
    "flow-grpo": (flow_grpo, 8, {"train_steps": 2}),
    "flow-grpo, same noise": (flow_grpo, 8, {"train_steps": 2, "shared_noise": True}),
    "flow-grpo, cps": (flow_grpo, 8, {"train_steps": 2, "dynamics": "cps"}),
    "awm": (awm, 8, {}),
    "v-grpo": (v_grpo, 8, {}),
}


def draw(flow, groups, draws):
    """Draw noise eps [G, ...] and prompts cond [G] of some groups from a generator."""
    cond = torch.randint(len(flow.prompts), (groups,), generator=draws).to(flow.device)
    return flow.noise(torch.randint(2**31, (groups,), generator=draws).tolist()), cond


def estimates(problem, flow, method, n):
    """Make n estimates of a method, each from other noise and prompts.

    Returns them, [n, P], and the evaluations of the network that one takes.
    """
    estimate, groups, options = method
    parameters = problem.lora.parameters

    found = []
    for i in tqdm(range(n), leave=False):
        # others than those of the exact gradient, which has more groups
        eps, cond = draw(flow, groups, seeded(i, f"{groups} groups"))
        for p in parameters:
            p.grad = None
        estimate(problem, eps, cond, seeded(i, "estimator", flow.device), **options)
        found.append(torch.cat([p.grad.flatten() for p in parameters]).double())
    return torch.stack(found), problem.velocity.pop_count() // n


def mean_and_purity(exact):
    """Return the mean of estimates [n, P] of one gradient, and its cosine with the gradient.

    The product of two different estimates is, on average, the squared norm of the gradient.
    """
    n = len(exact)
    products = exact @ exact.T
    signal = (products.sum() - products.trace()) / (n * n - n)
    return exact.mean(0), (signal.clamp(min=0).sqrt() / exact.mean(0).norm()).item()


def main():
    parser = Parser(__doc__)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--estimates", type=number(int, 2, 10_000), default=16, help="of each: %(default)s")
    add("--iterations", type=number(int, 0), default=0, help="of fdfo before: %(default)s")
    args = parser.parse_args()
    model = find_model(args.model or "tiny")
    fill_defaults(args, vars(model))

    flow = load_flow(model, args, split_prompts(None)[0])
    reward = Reward("aesthetic", TINY, args.device)
    layers = layers_named(flow.network, model.layers)
    lora = LoRA(flow.network, layers, model.rank, model.scale * model.rank, seeded(0, "lora"))
    velocity = Counted(flow.velocity)
    problem = Problem(velocity, Scorer(flow, reward), lora, flow.train_times, args.batch)

    # train for a while
    optimizer = torch.optim.AdamW(lora.parameters, model.lr, weight_decay=1e-4)
    options = {"churn": model.churn, "train_steps": model.train_steps, "kl": model.kl}
    for i in tqdm(range(args.iterations), leave=False):
        eps, cond = draw(flow, 32, seeded(i, "draws"))
        fdfo(problem, eps, cond, seeded(i, "training", flow.device), **options)
        optimizer.step()
        optimizer.zero_grad()

    exact, _ = estimates(problem, flow, EXACT, args.estimates)
    mean, purity = mean_and_purity(exact)
    print(
        f"the mean of {len(exact)} exact gradients has a cosine of {purity:.2f} with the true one"
    )

    for name, method in METHODS.items():
        found, evaluations = estimates(problem, flow, method, args.estimates)
        cosines = F.cosine_similarity(found, mean[None]) / purity  # as with the true gradient
        cosine = cosines.mean().item()
        error = cosines.std().item() / len(cosines) ** 0.5
        print(f"{name:22} {cosine:+.3f} ± {error:.3f}  {evaluations:6,} evaluations", flush=True)


if __name__ == "__main__":
    run_command(main)
