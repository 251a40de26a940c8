"""A vision-language model that is asked a question about each image."""

import math
import os
import re

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from support.errors import UserError
from support.pictures import to_pil
from zoo.loading import large_model_dtype, pretrained

MATCH = 'Does this image match the caption "{prompt}"? Answer Yes or No.'
QUESTIONS = "questions"  # stands for those of each prompt

# UnifiedReward 2.0 (Wang et al. 2025, arXiv:2503.05236) is asked in the words it was trained with
UNIFIED = (
    "You are presented with a generated image and its associated text caption. Your task is to "
    "analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy."
    "\n\nOutput your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)
AXES = ("Alignment", "Coherence", "Style")


class Vlm:
    """Gives the probability, in percent, that a model answers a question about the image with yes.

    sigmoid(logit of "Yes" - logit of "No") at the answer's first token (VQAScore, Lin et al. 2024).
    {prompt} in the question stands for the image's prompt. With QUESTIONS those of each prompt are
    asked, and the mean counts, much as in GenEval 2 (arXiv:2512.16853). With UNIFIED the model
    writes three scores, whose mean counts, 1 to 5. For models of the Qwen-VL families.
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
        asked = [questions_about(prompt, self.question) for prompt in prompts]
        if self.question == UNIFIED:
            texts = self.written(images, [question for (question,) in asked])
            return torch.tensor([unified_score(text) for text in texts])

        # one question of each image at a time
        percent = torch.full((len(images), max(map(len, asked))), torch.nan)
        for k in range(percent.shape[1]):
            some = [i for i, questions in enumerate(asked) if k < len(questions)]
            percent[some, k] = self.percent_yes(images[some], [asked[i][k] for i in some]).cpu()
        return percent.nanmean(1)

    def check(self, prompts):
        """UserError if a prompt lacks the questions that are to be asked."""
        for prompt in prompts:
            questions_about(prompt, self.question)

    def percent_yes(self, images, questions):
        """Return the probability [B] of yes against no, one question an image."""
        inputs = self.inputs(images, questions)
        logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return 100 * torch.sigmoid(logits[:, self.yes] - logits[:, self.no])

    def written(self, images, questions):
        """Return what the model writes to each question, at most 160 tokens."""
        inputs = self.inputs(images, questions)
        tokens = self.model.generate(**inputs, max_new_tokens=160, do_sample=False)
        return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])

    def inputs(self, images, questions):
        """Return what the model takes: images and texts, padded on the left."""
        vision = self.image_processor([to_pil(image) for image in images], return_tensors="pt")
        vision = vision.to(self.model.device, self.model.dtype)
        patches = vision["image_grid_thw"].prod(1)
        counts = patches // self.image_processor.merge_size**2  # tokens of each image

        texts = [self.text(question, count) for question, count in zip(questions, counts.tolist())]
        tokens = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        return {**tokens.to(self.model.device), **vision}

    def text(self, question, count):
        """Return the conversation about an image of `count` tokens, up to the answer."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return text.replace(self.image_token, self.image_token * count, 1)


def questions_about(prompt, question):
    """Return what is asked about an image of a prompt. UserError if the prompt has no questions."""
    if question != QUESTIONS:
        return [question.replace("{prompt}", prompt)]
    questions = getattr(prompt, "questions", [])
    if not questions:
        raise UserError(f"prompt {str(prompt)!r} has no questions: give --prompts FILE.jsonl")
    return [f"{question} Answer Yes or No." for question in questions]


def unified_score(text):
    """Return the mean of the three scores in an answer of UnifiedReward.

    NaN if one is missing, or not from 1 to 5.
    """
    scores = []
    for axis in AXES:
        found = re.search(rf"{axis} Score \(1-5\): *(\d+(\.\d+)?)", text)
        score = float(found[1]) if found else math.nan
        scores.append(score if 1 <= score <= 5 else math.nan)
    return sum(scores) / len(AXES)


def names_and_question(term, options):
    """Return (names, question) of the options of a term; the question may be left out.

    A question has spaces and is no folder; `questions` and `unified` stand for one. UserError if
    there are several.
    """
    presets = {"questions": QUESTIONS, "unified": UNIFIED}
    texts = [option.strip('"') for option in options]
    questions = [text for text in texts if " " in text and not os.path.isdir(text)]
    questions += [text for text in texts if text in presets]
    names = [text for text in texts if text not in questions]
    if len(questions) > 1:
        raise UserError(f"reward {term}:{':'.join(options)} must have one question at most")
    question = questions[0] if questions else MATCH
    return names, presets.get(question, question)


def load(device, *options):
    """Return the Vlm of the options in a term `vlm:...`: a model, or a question in quotes, or both.

    A model is a size of Qwen2.5-VL, 3b (the default), 7b, 32b or 72b, or another of its kind: a hub
    id or a folder, in quotes if its path has spaces. In place of a question there may be
    `questions`, those of each prompt, or `unified`, for UnifiedReward 2.0 of the same sizes.
    UserError if it cannot be loaded.
    """
    names, question = names_and_question("vlm", options)
    if len(names) > 1:
        raise UserError(f"reward vlm:{':'.join(options)} must name one model at most")
    path = names[0] if names else "3b"
    if "/" not in path and question == UNIFIED:
        path = f"CodeGoat24/UnifiedReward-2.0-qwen-{path}"
    elif "/" not in path:
        path = f"Qwen/Qwen2.5-VL-{path.upper()}-Instruct"

    model = pretrained(AutoModelForImageTextToText, path, dtype=large_model_dtype(device))
    tokenizer = pretrained(AutoTokenizer, path)
    image_processor = pretrained(AutoImageProcessor, path)
    if not hasattr(model.config, "image_token_id") or not hasattr(image_processor, "merge_size"):
        raise UserError(f"reward vlm: {path} is not of the Qwen-VL families; name another model")
    return Vlm(model.to(device), tokenizer, image_processor, question)
