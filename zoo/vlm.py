"""A vision-language model that is asked a question about each image."""

import os

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from support.errors import UserError
from support.pictures import to_pil
from zoo.loading import large_model_dtype, pretrained

MATCH = 'Does this image match the caption "{prompt}"? Answer Yes or No.'


class Vlm:
    """Probability, in percent, that a vision-language model answers a question about the image with yes.

    sigmoid(logit of "Yes" - logit of "No") at the answer's first token (VQAScore, Lin et al. 2024). Where the
    question holds {prompt}, the image's prompt is put in. For models of the Qwen-VL families.
    """

    def __init__(self, model, tokenizer, image_processor, question):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.image_processor, self.question = image_processor, question
        self.image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        self.yes, self.no = (
            tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No")
        )

    def __call__(self, images, prompts):
        vision = self.image_processor([to_pil(image) for image in images], return_tensors="pt")
        vision = vision.to(self.model.device, self.model.dtype)
        counts = (
            vision["image_grid_thw"].prod(1) // self.image_processor.merge_size**2
        )  # tokens per image
        texts = []
        for prompt, count in zip(prompts, counts.tolist()):
            question = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
            talk = [{"role": "user", "content": [{"type": "image"}, question]}]
            text = self.tokenizer.apply_chat_template(
                talk, add_generation_prompt=True, tokenize=False
            )
            texts.append(text.replace(self.image_token, self.image_token * count, 1))
        tokens = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        inputs = {**tokens.to(self.model.device), **vision}
        logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return 100 * torch.sigmoid(logits[:, self.yes] - logits[:, self.no])


def load(device, *options):
    """The Vlm of the options in a term `vlm:...`: a model, or a question in quotes, or both.

    A model is a size of Qwen2.5-VL, 3b (the default), 7b, 32b or 72b, or another of its kind: a hub id or a
    folder, in quotes if its path has spaces. UserError if it cannot be loaded.
    """
    texts = [option.strip('"') for option in options]
    questions = [text for text in texts if f'"{text}"' in options and not os.path.isdir(text)]
    names = [text for text in texts if text not in questions]
    if len(questions) > 1 or len(names) > 1:
        raise UserError(
            f"reward vlm:{':'.join(options)}: one model and one question in quotes are allowed"
        )
    name = names[0] if names else "3b"
    path = name if "/" in name else f"Qwen/Qwen2.5-VL-{name.upper()}-Instruct"
    model = pretrained(AutoModelForImageTextToText, path, dtype=large_model_dtype(device)).to(
        device
    )
    tokenizer, image_processor = (
        pretrained(part, path) for part in (AutoTokenizer, AutoImageProcessor)
    )
    if not hasattr(model.config, "image_token_id") or not hasattr(image_processor, "merge_size"):
        raise UserError(f"reward vlm: {path} is not of the Qwen-VL families; name another model")
    return Vlm(model, tokenizer, image_processor, questions[0] if questions else MATCH)
