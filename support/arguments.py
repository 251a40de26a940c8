"""Command lines: flags with checked values, their defaults, and the flags of an estimator."""

import argparse
import inspect
import re
from functools import partial
from pathlib import Path

import torch

from support.errors import UserError, first_line
from support.run import read_config, run_of, warn


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are one line."""

    hint = ""  # is added to what is said of a flag that does not exist

    def __init__(self, doc, **options):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message):
        if "expected one argument" in message:
            message += "; if it begins with a minus, put an equals sign: --reward=-jpeg_size"
        if "unrecognized arguments" in message:
            message += self.hint
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low, high=10**9):
    """Make an argparse type: an int or float within [low, high]."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def size(text):
    """Check the size of an image, a side or width x height in pixels; an argparse type."""
    if not re.fullmatch(r"[1-9]\d{1,3}(x[1-9]\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text} is not a size like 512 or 768x512")
    return text


def model_path(text):
    """Return a model by its whole path if it is a folder or a file; an argparse type."""
    return str(Path(text).resolve()) if "/" in text and Path(text).exists() else text


def add_model_arguments(parser):
    """Add the flags that all commands share; None leaves the choice to the model or the run."""
    add = parser.add_argument
    whole = number(int, 1)
    add("--model", type=model_path, help="a name in docs/models.md, a hub id, a folder or a file")
    add("--steps", type=number(int, 1, 1000), help="sampling steps")
    add("--guidance", type=number(float, 0, 100), help="guidance scale; for most models 1 is none")
    add("--negative", help="a prompt that guidance leads away from")
    add("--size", type=size, help="in pixels: 512, or 768x512 (width first)")

    # the machine
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the model")
    add("--batch", type=whole, help="images in one call of the network")
    add("--compile", action="store_true", help="compile the network: a slow start, then faster")
    add("--checkpointing", action="store_true", help="recompute instead of storing: less memory")


def add_training_arguments(parser):
    """Add the flags of train.py; those that are None are filled in for the model and estimator."""
    add = parser.add_argument
    whole = number(int, 1)
    add("--reward", default="aesthetic", help='an expression, as "0.2*clip + aesthetic"')
    add("--watch", help="rewards that are measured, not trained, with commas")
    add("--prompts", metavar="FILE", help="one prompt a line, every tenth held out")
    add("--estimator", default="fdfo", help="fdfo, spsa, central or file.py:function")

    # how long and how strongly
    add("--iterations", type=whole, help="roll-outs")
    add("--groups", type=whole, help="groups in an iteration, each from its own noise")
    add("--rollout-steps", type=whole, help="sampling steps in training (default: 10 at most)")
    add("--lr", type=number(float, 0, 1), help="learning rate")

    # the LoRA
    add("--rank", type=whole, help="of the LoRA")
    add("--layers", help="with a LoRA: attention, modulation, all, last, or ends of names")
    add("--init-lora", metavar="FILE", help="go on from the LoRA of a file or of a run's folder")

    # the run
    add("--seed", type=number(int, 0, 10**6), default=0, help="of everything random")
    add("--eval-every", type=whole, default=20, help="iterations between evaluations")
    add("--name", help="of the run (default: made from the reward)")
    add("--out", default="runs", help="folder of the runs")
    add("--resume", action="store_true", help="go on with a run: the same command, with --resume")
    add("--max-requests", type=whole, help="to judges; a run that needs more stops")
    add_model_arguments(parser)


def parse_training_args(doc, find_estimator, find_model, suits):
    """Read the command line of train.py. Returns the arguments, the Model and the estimator.

    find_estimator, find_model: functions of a name
    suits: {name of an estimator: its defaults of other flags}
    """
    # which estimator comes first, because its options are flags, too
    early = Parser(None, add_help=False)
    early.add_argument("--estimator", default="fdfo")
    name = early.parse_known_args()[0].estimator
    estimate = find_estimator(name)
    options = options_of(estimate)

    parser = Parser(doc)
    add_training_arguments(parser)
    add_estimator_arguments(parser, name, estimate)
    args = parser.parse_args()

    # of two defaults for one flag the later counts; a model's churn and kl are meant for fdfo
    model = find_model(args.model or "tiny")
    own = {option: parameter.default for option, parameter in options.items()}
    order = [own, vars(model)] if name == "fdfo" else [vars(model), own]
    fill_defaults(args, order[0] | order[1] | suits.get(name, {}))
    return args, model, partial(estimate, **{option: getattr(args, option) for option in options})


def add_lora_argument(parser):
    """Add the flag of a LoRA to draw with."""
    text = "a run, or one of its files, which also sets model, steps, guidance and size; or a file"
    parser.add_argument("--lora", help=text)


def find_model_of(args, find_model):
    """Return the Model of a command that may draw with a LoRA, and fill in what was not given.

    What a run was trained with comes before what suits the model.
    """
    saved, folder = {}, run_of(args.lora) if args.lora else None
    if folder:
        config = read_config(folder)
        names = ("model", "steps", "guidance", "negative", "size")
        saved = {name: config[name] for name in names if config.get(name) is not None}
        for key in ("guidance", "size"):
            if key in saved and getattr(args, key) not in (None, saved[key]):
                warn(f"this LoRA was trained with --{key} {saved[key]}: images may suffer")

    model = find_model(args.model or saved.get("model") or "tiny")
    fill_defaults(args, vars(model) | saved)
    return model


def fill_defaults(args, defaults):
    """Fill in the arguments that were not given, from {name: value} or for this machine."""
    roll_out_given = getattr(args, "rollout_steps", None) is not None
    for name, value in defaults.items():
        if name in args and getattr(args, name) is None:
            setattr(args, name, value)
    args.model = args.model or "tiny"
    if "rollout_steps" in args and not roll_out_given:
        args.rollout_steps = min(args.rollout_steps, args.steps)

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.dtype is None and args.device.startswith("cuda"):
        # cards before 2020 only emulate bfloat16
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if native else "float16"
    args.dtype = args.dtype or "float32"

    try:
        torch.zeros(1, device=args.device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {first_line(error)}") from error


def options_of(estimator):
    """Return an estimator's options, its arguments after the first four: {name: Parameter}.

    UserError if it does not take those four, or an option has no default that can be written.
    """
    parameters = list(inspect.signature(estimator).parameters.items())
    if len(parameters) < 4:
        raise UserError("an estimator takes (problem, eps, cond, generator), then its options")

    for name, parameter in parameters[4:]:
        if not isinstance(parameter.default, bool | int | float | str | None):
            raise UserError(f"option {name} of an estimator must have a number or text as default")
    return dict(parameters[4:])


def add_estimator_arguments(parser, name, estimator):
    """Add a flag for each option of an estimator, its help from a line "option: text"."""
    group = parser.add_argument_group(f"--estimator {name}")
    flags = []
    for option, parameter in options_of(estimator).items():
        flag = f"--{option.replace('_', '-')}"
        flags.append(flag)
        text = re.search(rf"^ *{option}: (.*)", inspect.getdoc(estimator) or "", re.MULTILINE)
        help = f"{text[1] if text else ''} (default {parameter.default})".replace("%", "%%")

        # bool before int, since every bool is one; "int | None" counts as int
        annotation = str(parameter.annotation)
        kinds = [kind for kind in (bool, int, float) if kind.__name__ in annotation]
        kind = kinds[0] if kinds else type(parameter.default)
        try:
            if kind is bool:
                group.add_argument(flag, action="store_true", default=None, help=help)
            else:
                read = {int: number(int, 1), float: number(float, 0)}.get(kind, str)
                group.add_argument(flag, type=read, help=help)
        except argparse.ArgumentError as error:  # a flag of train.py has this name
            raise UserError(f"estimator {name}: {first_line(error)}") from error

    parser.hint = f"; --estimator {name} takes {', '.join(flags) or 'no flags of its own'}"
