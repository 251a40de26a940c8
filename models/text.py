"""The text of prompts, as the encode_prompt of a pipeline returns it: once for each prompt."""

import inspect
import os
from types import SimpleNamespace

import torch
import transformers
from tqdm import tqdm

from models.table import call_options, load_pipeline, network_config
from support.errors import UserError
from support.run import warn

CHUNK = 64  # texts encoded at a time


class Encoded(Exception):
    """Ends the call of a pipeline as soon as its encode_prompt has returned."""


def run(pipe, texts, options):
    """Call a pipeline on texts; with gradients, since its own torch.no_grad is unwrapped."""
    options = options | {"prompt": list(texts)}  # some pipelines write into the list
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * len(texts)
    return inspect.unwrap(type(pipe).__call__)(pipe, **options)[0]


@torch.no_grad()
def encode(model, args, texts):
    """Encode texts. Returns {text: outputs of encode_prompt}, and the names of the encoders.

    Outputs are as for a text alone, on the CPU: None, a tensor [1, ...], a list of one tensor, or a
    tensor that is the same for all texts. Only the text encoders are loaded, and they are gone when
    this returns.
    """
    pipe = load_pipeline(model, args, without=["transformer", "unet", "vae"])
    encoders = [name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
    pipe.to(args.device)
    name, config = network_config(model.path)
    setattr(pipe, name, SimpleNamespace(config=config))  # some texts depend on its width
    options = {"height": 1024, "width": 1024} | call_options(model, args)
    encode_prompt = pipe.encode_prompt

    def encode_and_end(*positional, **named):
        raise Encoded(encode_prompt(*positional, **named))

    def encoded(texts):
        try:
            run(pipe, texts, options)
        except Encoded as end:
            return end.args[0]

    pipe.encode_prompt = encode_and_end
    texts = list(dict.fromkeys([*texts, args.negative or ""]))
    warn_of_cut_texts(pipe, texts, options)

    # where all texts have one length, many may go at once; else each alone, so that none is padded
    first, longest = encoded([""]), encoded([max(texts, key=len)])
    size = CHUNK if shapes(first) == shapes(longest) else 1
    last, outputs = None, {}
    bar = {"leave": False, "delay": 5, "disable": os.environ.get("LOCAL_RANK", "0") != "0"}
    for i in tqdm(range(0, len(texts), size), "encoding prompts", **bar):
        many = encoded(texts[i : i + size])
        for j, text in enumerate(texts[i : i + size]):
            last = outputs[text] = row(many, j, first, last)

    del pipe.encode_prompt  # which holds the pipeline
    return outputs, encoders


def warn_of_cut_texts(pipe, texts, options):
    """Say once how many texts are longer than an encoder takes, and by how much."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    default = getattr(parameters.get("max_sequence_length"), "default", None)
    for name, tokenizer in pipe.components.items():
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            continue
        most = tokenizer.model_max_length
        if not isinstance(tokenizer, transformers.CLIPTokenizer):  # which always takes its 77
            most = min(most, options.get("max_sequence_length") or default or most)

        over = [len(ids) - most for ids in tokenizer(texts).input_ids]
        cut = [tokens for tokens in over if tokens > 0]
        if cut:
            text = f"{name} takes {most} tokens: {len(cut)} of {len(texts)} prompts are cut"
            warn(f"{text}, by {max(cut)} at most")


def row(many, j, first, last):
    """Take the outputs of the j-th of many texts; what equals the last text's is kept once.

    first: the outputs for another text alone, which show what has a row for each text.
    UserError if there is something that differs from text to text without having rows.
    """
    outputs = []
    for i, output in enumerate(many):
        before = last[i] if last else None
        if isinstance(output, list):
            output = [output[j].cpu()] if output else []
        elif output is not None:
            has_rows = len(first[i]) == 1
            output = output[j : j + 1].cpu() if has_rows else output.cpu()

            if before is not None and torch.equal(before, output):
                output = before
            elif before is not None and not has_rows:
                raise UserError("this model's text is of a kind that cannot be put into batches")
        outputs.append(output)
    return outputs


def shapes(outputs):
    """Return the shapes of outputs, which must be equal for texts to stand in one batch."""
    return tuple(o.shape if isinstance(o, torch.Tensor) else type(o) for o in outputs)


def batched(rows, device):
    """Put the outputs for single texts together for a batch of them, on a device."""
    batch = []
    for outputs in zip(*rows):
        first = outputs[0]

        if isinstance(first, list):  # one tensor for each text, whatever its length
            batch.append([tensor.to(device) for output in outputs for tensor in output])
        elif first is None:
            batch.append(None)
        elif len(first) != 1:  # the same for all texts
            batch.append(first.to(device))
        elif all(output is first for output in outputs):
            batch.append(first.to(device).expand(len(outputs), *first.shape[1:]))
        else:
            batch.append(torch.cat(outputs).to(device))
    return tuple(batch)
