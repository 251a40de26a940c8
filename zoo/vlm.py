"""A vision-language model that is asked a question about each image."""

import os

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from support.errors import UserError
from support.pictures import to_pil
from zoo.loading import large_model_dtype, pretrained

MATCH = 'Does this image match the caption "{prompt}"? Answer Yes or No.'


class Vlm:
    """Gives the probability, in percent, that a model answers a question about the image with yes.

    sigmoid(logit of "Yes" - logit of "No") at the answer's first token (VQAScore, Lin et al. 2024).
    {prompt} in the question stands for the image's prompt. For models of the Qwen-VL families.
    """

    def __init__(self, model, tokenizer, image_processor, question):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.question = question
        self.image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        self.yes = tokenizer.encode("Yes", add_special_tokens=False)[0]
        self.no = tokenizer.encode("No", add_special_tokens=False)[0]

    def __call__(self, images, prompts):
        vision = self.image_processor([to_pil(image) for image in images], return_tensors="pt")
        vision = vision.to(self.model.device, self.model.dtype)
        patches = vision["image_grid_thw"].prod(1)
        counts = patches // self.image_processor.merge_size**2  # tokens of each image

        texts = [self.text(prompt, count) for prompt, count in zip(prompts, counts.tolist())]
        tokens = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")

        inputs = {**tokens.to(self.model.device), **vision}
        logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return 100 * torch.sigmoid(logits[:, self.yes] - logits[:, self.no])

    def text(self, prompt, count):
        """Return the whole talk about an image of `count` tokens, up to where the answer begins."""
        question = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
        talk = [{"role": "user", "content": [{"type": "image"}, question]}]
        text = self.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        return text.replace(self.image_token, self.image_token * count, 1)


def names_and_question(term, options):
    """Return (names, question) of the options of a term; the question may be left out.

    A question has spaces and is no folder. UserError if there are several.
    """
    texts = [option.strip('"') for option in options]
    questions = [text for text in texts if " " in text and not os.path.isdir(text)]
    names = [text for text in texts if text not in questions]
    if len(questions) > 1:
        raise UserError(f"reward {term}:{':'.join(options)} must have one question at most")
    return names, questions[0] if questions else MATCH


def load(device, *options):
    """Return the Vlm of the options in a term `vlm:...`: a model, or a question in quotes, or both.

    A model is a size of Qwen2.5-VL, 3b (the default), 7b, 32b or 72b, or another of its kind: a hub
    id or a folder, in quotes if its path has spaces. UserError if it cannot be loaded.
    """
    names, question = names_and_question("vlm", options)
    if len(names) > 1:
        raise UserError(f"reward vlm:{':'.join(options)} must name one model at most")
    name = names[0] if names else "3b"
    path = name if "/" in name else f"Qwen/Qwen2.5-VL-{name.upper()}-Instruct"

    model = pretrained(AutoModelForImageTextToText, path, dtype=large_model_dtype(device))
    tokenizer = pretrained(AutoTokenizer, path)
    image_processor = pretrained(AutoImageProcessor, path)
    if not hasattr(model.config, "image_token_id") or not hasattr(image_processor, "merge_size"):
        raise UserError(f"reward vlm: {path} is not of the Qwen-VL families; name another model")
    return Vlm(model.to(device), tokenizer, image_processor, question)
