"""Tests of the rewards: closed forms, what transformers computes, real servers on this machine.

pytest -q tests/test_rewards.py
"""

import ast
import base64
import io
import json
import math
import pickle
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import requests
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import pre_tokenizers
from torch import nn

import rewards
from rewards import TINY, Aesthetic, Clip, Reward, load_function, split_expressions
from support.errors import UserError
from support.prompts import read_prompts
from zoo.human import Human
from zoo.jsonl import append_line, read_lines
from zoo.loading import pretrained
from zoo.ocr import Ocr, edit_distance
from zoo.vlm import UNIFIED, unified_score


def grey(level, n=2, size=64):
    return torch.full((n, 3, size, size), level)


def random_images(n, size=64):
    """Images of whole levels of 255, so that nothing is lost when they become PIL images."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, size, size), generator=generator) / 255


def to_pil(image):
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def measure(name, images):
    return Reward(name)(images, [""] * len(images)).tolist()


# ---- programs


def test_colorfulness_and_brightness_have_their_closed_forms():
    red = grey(0.0, n=1)
    red[:, 0] = 1.0
    half = red.clone()
    half[:, 0, :, :32] = 0

    # red: rg = 255 and yb = 127.5 everywhere, so no spread, and 0.3 of the length of the mean
    # half red, half black: a spread of half the range, and half the mean
    length = math.hypot(255, 127.5)
    expected = [0, 0.3 * length, 0.5 * length + 0.15 * length]
    images = torch.cat([grey(0.4, n=1), red, half])
    assert measure("colorfulness", images) == pytest.approx(expected, abs=1e-4)
    assert measure("brightness", images) == pytest.approx([40, 29.9, 14.95])


def test_sharpness_has_its_closed_form():
    # on a checkerboard of 0 and 1 the Laplacian is +-4, so its variance is (4 * 255)^2
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    images = torch.cat([grey(0.25, n=1), board.float().expand(1, 3, 64, 64)])
    assert measure("sharpness", images) == pytest.approx([0, 1020**2], abs=1e-3)


def test_edges_and_entropy_have_their_closed_forms():
    half = grey(0.0, n=1)
    half[..., 32:] = 1.0  # black and white: one bit, and a line of edges two pixels wide
    images = torch.cat([half, grey(0.6, n=1)])
    assert measure("color_entropy", images) == pytest.approx([1, 0])
    assert measure("edge_density", images) == pytest.approx([100 * 2 / 62, 0])

    # a slope of just under 0.1 a pixel is no edge, one of just over is, along either side
    for slope, percent in ((0.099, 0), (0.101, 100)):
        ramp = (slope * torch.arange(8.0)).expand(1, 3, 8, 8)
        assert measure("edge_density", torch.cat([ramp, ramp.mT])) == [percent] * 2

    # every one of 512 colours once: 9 bits
    levels = (torch.arange(8) + 0.5) / 8
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 16, 32)
    assert measure("color_entropy", colours) == pytest.approx([9])


def test_jpeg_size_is_that_of_the_file():
    noise = random_images(1)
    file = io.BytesIO()
    to_pil(noise[0]).save(file, "JPEG", quality=95)
    of_noise, of_grey = measure("jpeg_size", torch.cat([noise, grey(0.5, n=1)]))
    assert of_noise == pytest.approx(len(file.getvalue()) / 1000)
    assert of_grey < 1.0 < of_noise


# ---- models


@pytest.mark.parametrize("size", [{"shortest_edge": 224}, {"height": 64, "width": 64}])
@pytest.mark.parametrize("shape", [(64, 64), (300, 300), (256, 320), (60, 79)])
def test_preprocessing_is_that_of_transformers(size, shape):
    side = size.get("shortest_edge", 64)
    crop = {"crop_size": {"height": side, "width": side}, "do_center_crop": "shortest_edge" in size}
    processor = transformers.CLIPImageProcessor(size=size, **crop)
    clip = Clip(nn.Identity(), None, processor)
    smooth = F.interpolate(random_images(1, size=20), shape, mode="bicubic").clamp(0, 1)
    image = (smooth * 255).round() / 255

    theirs = processor(to_pil(image[0]), return_tensors="pt").pixel_values
    ours = clip.pixels(image)
    assert ours.shape == theirs.shape
    # PIL rounds to whole levels after each of two passes: about 1 / 255, over a std of 0.26
    assert (ours - theirs).abs().max() < 1.6 / 255 / 0.26


def clip_logits(images, prompts):
    """What transformers makes of images and their prompts with its own processors."""
    model = transformers.CLIPModel.from_pretrained(TINY / "tiny-clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY / "tiny-clip")
    processor = transformers.CLIPImageProcessor.from_pretrained(TINY / "tiny-clip")
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    inputs |= processor([to_pil(image) for image in images], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()
    return logits, model.logit_scale.exp().item()


def test_clip_score_and_pickscore_are_those_of_transformers(monkeypatch):
    images, prompts = random_images(3), ["red apple", "robot", "an unseen caption"]
    logits, scale = clip_logits(images, prompts)
    for term in ("clip", f"clip:{TINY}/tiny-clip"):
        R = Reward(term)(images, prompts)
        torch.testing.assert_close(R * scale / 100, logits, rtol=1e-4, atol=1e-4)

    # PickScore's card: scale x normalised text @ normalised image, which are the model's logits
    asked = []

    def local(kind, path, **options):
        asked.append(path)
        return pretrained(kind, TINY / "tiny-clip", **options)

    monkeypatch.setattr(rewards, "pretrained", local)
    R = Reward("pickscore", tiny=None)(images, prompts)
    torch.testing.assert_close(R, logits, rtol=1e-4, atol=1e-4)
    assert asked == ["yuvalkirstain/PickScore_v1"] + ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"] * 2


def test_clip_and_aesthetic_share_one_embedding_until_the_images_change(monkeypatch):
    reward = Reward("clip + aesthetic")
    clip, passes = reward.terms["clip"], []
    pixels = clip.pixels
    monkeypatch.setattr(clip, "pixels", lambda images: passes.append(1) or pixels(images))

    images, prompts = random_images(2), ["red apple", "robot"]
    before = reward(images, prompts)
    assert len(passes) == 1
    images.copy_(images.flip(0))  # the same tensor with other contents
    after = reward(images, prompts[::-1])
    assert len(passes) == 2
    torch.testing.assert_close(after, before.flip(0), rtol=1e-4, atol=1e-4)

    # an embedding without a graph is no use where one is wanted
    with torch.no_grad():
        reward(images.requires_grad_(), prompts)
    reward(images, prompts).sum().backward()
    assert images.grad.abs().max() > 0


def test_aesthetic_reads_the_published_layout(tmp_path, monkeypatch):
    widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    x = torch.randn(3, 768)
    expected, state = x, {}
    for place, width in widths.items():
        linear = nn.Linear(*width)
        expected = linear(expected)
        state[f"layers.{place}.weight"] = linear.weight
        state[f"layers.{place}.bias"] = linear.bias
    torch.save(state, tmp_path / "aesthetic-model.pth")

    clip = SimpleNamespace(embed_images=lambda images: x)
    monkeypatch.setattr(rewards, "downloaded", lambda hub_id, file: tmp_path / file)
    monkeypatch.setattr(rewards, "load_clip", lambda tiny, device: clip)
    torch.testing.assert_close(Aesthetic(None, "cpu")(None, None), expected[:, 0])


def tiny_tokenizer(marks, **options):
    """A byte-level tokenizer of the Qwen family in which Yes and No are single tokens."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Y", "e"), ("Ye", "s"), ("N", "o")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else
%}{{ c.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{{ '<|im_start|>assistant\n' }}"""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a small random Qwen2.5-VL, its tokenizer and its image processor."""
    folder = tmp_path_factory.mktemp("qwen")
    pads = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = tiny_tokenizer(["<|im_start|>", "<|im_end|>", *pads], chat_template=TEMPLATE)
    start, end, image, video = tokenizer.convert_tokens_to_ids(pads)

    small = {"hidden_size": 32, "intermediate_size": 64}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**small, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "rope_parameters": rope}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {**small, "depth": 2, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    ids = {"image_token_id": image, "video_token_id": video}
    ids |= {"vision_start_token_id": start, "vision_end_token_id": end}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)

    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for p in model.parameters():  # or all answers are alike
        p.data += 0.1 * torch.randn(p.shape)
    processor = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 9)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def test_vlm_is_the_probability_of_yes_over_no(qwen):
    images = random_images(3)
    prompts = ["sun", "a robot that waters red and yellow tulips", "red apple"]
    reward = Reward(f"vlm:{qwen}")
    together = reward(images, prompts)
    (vlm,) = reward.terms.values()
    yes, no = vlm.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    assert together.std() > 0.1 and together.min() > 0 and together.max() < 100

    for image, prompt, R in zip(images, prompts, together):
        # one by one, so without padding; 64 pixels become 56, 4 x 4 patches of 14, merged by 2 x 2
        text = (
            "<|im_start|>user\n<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"
            f'Does this image match the caption "{prompt}"? Answer Yes or No.<|im_end|>\n'
            "<|im_start|>assistant\n"
        )
        vision = vlm.image_processor([to_pil(image)], return_tensors="pt")
        tokens = vlm.tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            odds = vlm.model(**tokens, **vision).logits[0, -1].exp()
        expected = 100 * odds[yes] / (odds[yes] + odds[no])
        assert R.item() == pytest.approx(expected.item(), abs=1e-2)


def test_vlm_takes_a_question_of_ones_own(qwen):
    images = random_images(2)
    reward = Reward(f'2*vlm:{qwen}:"Is there a {{prompt}} in it? (Yes + No) - {{x}}"')
    R = reward(images, ["cat", "dog"])
    (vlm,) = reward.terms.values()
    assert vlm.question == "Is there a {prompt} in it? (Yes + No) - {x}"

    vlm.question = "Is there a cat in it? (Yes + No) - {x}"
    same, other = reward(images, ["", ""]).tolist()
    assert same == pytest.approx(R[0].item(), abs=1e-2)
    assert other != pytest.approx(R[1].item(), abs=1e-2)


def test_vlm_asks_the_questions_of_each_prompt(qwen, tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red cat", "questions": ["Is there a cat?", "Is it red?", "Is it big?"]}]
    lines += [{"prompt": "sun", "questions": ["Is there a sun?"]}, {"prompt": "robot"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    prompts = read_prompts(file)
    assert prompts == ["a red cat", "sun", "robot"]

    images = random_images(3)
    R = Reward(f"vlm:{qwen}:questions")(images[:2], prompts[:2])
    alone = []
    for question, image in zip(["Is there a cat?", "Is it red?", "Is it big?"], [images[:1]] * 3):
        alone.append(Reward(f'vlm:{qwen}:"{question} Answer Yes or No."')(image, [""]))
    assert torch.cat(alone).std() > 0.1
    sun = Reward(f'vlm:{qwen}:"Is there a sun? Answer Yes or No."')(images[1:2], [""])
    expected = torch.cat([torch.cat(alone).mean(0, keepdim=True), sun])
    torch.testing.assert_close(R, expected, rtol=0, atol=1e-2)  # without padding, too

    with pytest.raises(UserError, match="prompt 'robot' has no questions"):
        Reward(f"vlm:{qwen}:questions")(images, prompts)


def test_vlm_reads_what_unifiedreward_writes(qwen, monkeypatch):
    images, prompts = random_images(2), ["sun", "a robot that waters tulips"]
    (vlm,) = Reward(f"vlm:{qwen}:unified").terms.values()
    questions = [UNIFIED.replace("{prompt}", prompt) for prompt in prompts]
    written = vlm.written(images, questions)
    assert vlm(images, prompts).isnan().all()  # a random model writes no scores

    for image, question, text in zip(images, questions, written):
        # one by one, so without padding; transformers has its own way to generate
        vision = vlm.image_processor([to_pil(image)], return_tensors="pt")
        tokens = vlm.tokenizer([vlm.text(question, 4)], return_tensors="pt")
        inputs = {**tokens, **vision}
        theirs = vlm.model.generate(**inputs, max_new_tokens=160, do_sample=False)[0]
        theirs = theirs[tokens.input_ids.shape[1] :]
        end = "<|im_end|>"
        assert text.split(end)[0] == vlm.tokenizer.decode(theirs).split(end)[0]
        assert len(text) > 20

    # the example of its authors
    answer = (
        "\nAlignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
    )
    answer += "Style Score (1-5): 2.802500009536743\n"
    whole = {"Alignment": "4", "Coherence": "5", "Style": "3"}
    other = "".join(f"{axis} Score (1-5): {score}\n" for axis, score in whole.items())
    monkeypatch.setattr(vlm, "written", lambda images, questions: [answer, other])
    expected = [(2.6947 + 2.3715 + 2.8025) / 3, 4]
    assert vlm(images, prompts).tolist() == pytest.approx(expected, abs=1e-4)
    assert math.isnan(unified_score(answer.replace("Style", "")))


def test_models_that_cannot_be_had_are_named(qwen, tmp_path):
    (tmp_path / "two words").symlink_to(qwen)
    assert Reward(f'vlm:"{tmp_path}/two words"').terms
    (tmp_path / "model.safetensors").write_text("damaged")
    config = (TINY / "tiny-clip" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)

    for term, complaint in (
        ("clip", "cannot reach model openai/clip-vit-large-patch14"),
        ("vlm:7b", "cannot reach model Qwen/Qwen2.5-VL-7B-Instruct"),
        (f"vlm:{tmp_path}", f"{tmp_path} holds no AutoModelForImageTextToText"),
        ("vlm:unified:7b", "cannot reach model CodeGoat24/UnifiedReward-2.0-qwen-7b"),
        ("clip:some/clip", "cannot reach model some/clip"),
        ("hps", "cannot reach model xswu/HPSv2"),
        ("vlm:3b:7b", "one model at most"),
        ('vlm:"Is it red?":"Is it blue?"', "one question at most"),
        ("vlm:questions:unified", "one question at most"),
        ("ocr:fast", "takes no options"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            Reward(term, tiny=None)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"{tmp_path} holds no CLIPModel"):
        pretrained(transformers.CLIPModel, tmp_path)


def test_ocr_counts_wrong_letters(monkeypatch):
    for a, b, distance in (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("a", "a", 0)):
        assert edit_distance(a, b) == distance
    texts = iter([("Open", "today"), ("opne", "TODAY"), None, ("anything",)])
    ocr = Ocr(lambda picture: SimpleNamespace(txts=next(texts)))
    R = ocr(grey(0.5, n=4), ['a shop sign "OPEN Today"'] * 3 + ["no text"])
    assert R.tolist() == pytest.approx([1, 1 - 2 / 9, 0, math.nan], nan_ok=True)

    monkeypatch.setitem(sys.modules, "rapidocr", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install rapidocr"):
        Reward("ocr")


def test_what_is_not_named_is_not_imported():
    seen, files = set(), ["rewards", "support.run"]
    while files:
        path = TINY.parent / (files.pop().replace(".", "/") + ".py")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module.startswith("zoo"):
                files.append(node.module)
                seen.add(node.module)
    assert seen == {"zoo.grammar", "zoo.loading"}


# ---- services


class Service(BaseHTTPRequestHandler):
    """Answers as the path says: the mean of each image, or what goes wrong with services."""

    def do_POST(self):
        mode, asked = self.path.strip("/"), self.server.asked
        asked.append(mode)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        files = [io.BytesIO(base64.b64decode(image)) for image in body["images"]]
        R = [sum(Image.open(file).resize((1, 1)).getpixel((0, 0))) / 765 for file in files]
        if mode == "prompts":
            R = [len(prompt) for prompt in body["prompts"]]
        if mode == "slow":
            time.sleep(0.5)

        status = {"broken": 500, "missing": 404, "redirect": 302}.get(mode, 200)
        if mode == "twice-down" and len(asked) <= 2:
            status = 503
        wrong = {"short": R[1:], "text": "high", "words": ["a", "b"], "nan": [math.nan] * len(R)}
        text = "{" if mode == "garbled" else json.dumps(wrong.get(mode, R))
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "7")
        self.send_header("Location", "/mean")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        """Say nothing."""


def serve(handler):
    """Start a server in a thread; `asked` is for what it is asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.handle_error = lambda *args: None  # of a caller who does not wait for the answer
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def server():
    server = serve(Service)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were waited between attempts, which pass at once."""
    pauses = []
    monkeypatch.setattr("zoo.http.time", SimpleNamespace(sleep=pauses.append))
    return pauses


def test_a_service_scores_images(server):
    images = torch.stack([torch.full((3, 16, 16), level) for level in (0.0, 0.2, 1.0)])
    assert measure(f"{server.url}/mean", images) == pytest.approx([0, 0.2, 1])
    R = Reward(f"2*{server.url}/prompts - 1")(images, ["", "a", "ab"])
    assert R.tolist() == [-1, 1, 3]
    assert Reward(f"{server.url}/nan")(images, [""] * 3).isnan().all()


@pytest.mark.parametrize(
    "mode, asked, complaint",
    [
        ("twice-down", 3, None),
        ("slow", 6, "did not answer, 6 times: .*timed out"),
        ("broken", 6, "did not answer, 6 times: 500"),
        ("missing", 1, "answered with status 404"),
        ("redirect", 1, "answered with status 302"),
        ("garbled", 1, "did not answer with JSON"),
        ("text", 1, "must return numbers, not str"),
        ("words", 1, "must return numbers, not list"),
        ("short", 1, r"must return \[2\] numbers, not \[1\]"),
    ],
)
def test_services_that_fail_are_asked_again_or_named(server, pauses, mode, asked, complaint):
    url = f"{server.url}/{mode}"
    reward = Reward(url)
    reward.terms[url].timeout = 0.1 if mode == "slow" else 10
    if complaint is None:
        assert reward(grey(0.2), ["", ""]).tolist() == pytest.approx([0.2, 0.2])
        assert pauses == [7, 7]  # as it says, which is longer than the pauses by themselves
    else:
        with pytest.raises(UserError, match=complaint) as error:
            reward(grey(0.2), ["", ""])
        assert url in str(error.value) and "\n" not in str(error.value)
    assert server.asked == [mode] * asked
    assert len(pauses) == asked - 1


def test_a_service_that_is_down_is_waited_for_and_named(pauses):
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/"
    with pytest.raises(UserError, match="did not answer, 6 times: .*refused"):
        Reward(url)(grey(0.2), ["", ""])
    assert all(2**i <= pause <= 1.5 * 2**i for i, pause in enumerate(pauses))
    assert len(pauses) == 5


@pytest.mark.parametrize("address", ["http://[::1/", "http://host:99999/", "http:///score"])
def test_a_malformed_address_fails_as_soon_as_it_is_read(address):
    with pytest.raises(UserError, match="is no address") as error:
        Reward(f"clip + {address}")
    assert address in str(error.value) and "\n" not in str(error.value)


def test_no_proxy_sees_the_images_for_this_machine(server, monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as closed:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed.server_port}")
    assert measure(f"{server.url}/mean", grey(0.2)) == pytest.approx([0.2, 0.2])


# ---- people


def post(url, answer):
    data = answer if isinstance(answer, str) else json.dumps(answer)
    return requests.post(url + "answer", data=data, headers={"Content-Type": "application/json"})


def next_group(url):
    """What the page shows, as soon as there is something."""
    for _ in range(500):
        answer = requests.get(url + "group")
        if answer.status_code == 200:
            return answer.json()
        time.sleep(0.01)
    raise AssertionError("nothing to compare")


def ask(folder, images, prompts, groups, interrupted=()):
    """Let a person be asked in a thread: the page, the thread, a list for what comes back."""
    human, results = Human(), []
    url = human.serve(folder, branches=2, groups=groups, interrupted=interrupted)

    def call():
        try:
            results.append(human(images, prompts).tolist())
        except KeyboardInterrupt as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return url, thread, results


def test_a_person_is_asked_once_and_waited_for(tmp_path):
    images, prompts = random_images(6, size=8), ["sun", "sun", "moon", "moon", "star", "star"]
    rounds = []
    for choices in ((0, None, 1), ()):  # the second round has all answers from the file
        url, thread, results = ask(tmp_path, images, prompts, groups=3)
        for choice in choices:
            group = next_group(url)
            assert thread.is_alive() and len(group["images"]) == 2 and group["total"] == 3
            for wrong in (2, -1, True, 0.0, "0"):
                assert post(url, {"key": group["key"], "choice": wrong}).status_code == 400
            assert post(url, "{").status_code == 400
            # by a name from elsewhere that was made to point here
            evil = requests.get(url + "group", headers={"Host": "evil.example"})
            assert evil.status_code == 403
            assert next_group(url) == group
            for _ in range(2):  # the page is open twice: the second comes too late
                assert post(url, {"key": group["key"], "choice": choice}).status_code == 204
        thread.join(timeout=10)
        rounds += results

    assert rounds == [[1, 0, 0.5, 0.5, 0, 1]] * 2
    lines = read_lines(tmp_path / "preferences.jsonl")
    assert [line["prompt"] for line in lines] == ["sun", "moon", "star"]
    assert [line["choice"] for line in lines] == [0, None, 1]
    assert Image.open(tmp_path / "preferences" / f"{lines[0]['key']}.png").size == (16, 8)


def test_an_answer_that_cannot_be_written_is_not_taken(tmp_path):
    url, thread, results = ask(tmp_path, random_images(2, size=8), ["sun"] * 2, groups=1)
    (tmp_path / "preferences").write_text("where a folder must be")
    group = next_group(url)
    answer = post(url, {"key": group["key"], "choice": 1})
    assert answer.status_code == 500 and "File exists" in answer.text
    assert next_group(url) == group and thread.is_alive()

    (tmp_path / "preferences").unlink()
    assert post(url, {"key": group["key"], "choice": 1}).status_code == 204
    thread.join(timeout=10)
    assert results == [[0, 1]]


def test_a_person_who_was_interrupted_goes_on_where_they_stopped(tmp_path):
    """Ctrl-C ends the waiting; a line that was cut short, or is no answer, is asked again."""
    images, prompts, interrupted = random_images(4, size=8), ["sun", "sun", "moon", "moon"], []
    url, thread, results = ask(tmp_path, images, prompts, 2, interrupted)
    post(url, {"key": next_group(url)["key"], "choice": 0})
    moon = next_group(url)["key"]
    interrupted.append(2)
    thread.join(timeout=10)
    assert isinstance(results[0], KeyboardInterrupt)

    file = tmp_path / "preferences.jsonl"
    for choice in (True, 1.0, 2, "1"):
        append_line(file, {"key": moon, "choice": choice})
    # as an editor on Windows saves it, then cut short
    lines = file.read_text().splitlines() + ["[]", "nonsense", f'{{"key": "{moon}", "cho']
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())

    url, thread, results = ask(tmp_path, images, prompts, groups=2)
    group = next_group(url)
    assert (group["key"], group["answered"]) == (moon, 1)
    post(url, {"key": moon, "choice": None})
    thread.join(timeout=10)
    _, thread, again = ask(tmp_path, images, prompts, groups=2)  # nothing is left to ask
    thread.join(timeout=10)
    assert results == again == [[1, 0, 0.5, 0.5]]


def test_a_person_is_asked_in_a_training_by_pairs_alone(tmp_path, monkeypatch, capsys):
    reward = Reward("human")
    (human,) = reward.terms.values()
    assert human.only_in_training
    with pytest.raises(UserError, match="only train.py can ask a person"):
        reward(grey(0.5), ["", ""])

    args = SimpleNamespace(groups=3)
    run = SimpleNamespace(folder=tmp_path, args=args, interrupted=[1])
    with pytest.raises(UserError, match="use --estimator fdfo"):
        human.open(run)
    args.branches = 2
    monkeypatch.setattr("zoo.human.processes", lambda: (0, 2))
    with pytest.raises(UserError, match="one process alone"):
        human.open(run)
    monkeypatch.setattr("zoo.human.processes", lambda: (0, 1))
    human.open(run)
    address = re.search(r"compare the images at (http://127.0.0.1:\d+/)\n", capsys.readouterr().out)
    assert "<html" in requests.get(address[1]).text
    with pytest.raises(KeyboardInterrupt):
        reward(grey(0.5), ["", ""])


# ---- expressions


def test_expressions_are_arithmetic(tmp_path):
    mine = tmp_path / "mine.py"
    code = "def red(images, prompts):\n    return images[:, 0].mean((1, 2)).tolist()\n"
    mine.write_text(code, "utf-8-sig", newline="\r\n")  # as an editor on Windows saves it
    images = random_images(4)
    a, b = Reward("brightness")(images, [""] * 4), Reward("colorfulness")(images, [""] * 4)
    red = images[:, 0].mean((1, 2))
    text = f"  -brightness + 2*(colorfulness\n\t- 0.5) - 3 * {mine}:red\n"
    torch.testing.assert_close(Reward(text)(images, [""] * 4), -a + 2 * (b - 0.5) - 3 * red)
    assert list(Reward(text).terms) == ["brightness", "colorfulness", f"{mine}:red"]
    assert Reward(" clip ").expression == "clip"


def test_commas_separate_expressions_but_not_in_quotes():
    text = 'clip, 2*judge:m:"Is it red, or blue?" - 1,aesthetic'
    assert split_expressions(text) == ["clip", ' 2*judge:m:"Is it red, or blue?" - 1', "aesthetic"]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "column 1"),
        ("brightness +", "column 13"),
        ("vlm:3b + clip )", "column 15"),
        ("brightness 2", "column 12"),
        ("clip – 0.1*jpeg_size", "column 6"),  # a dash, as web pages have it
        ("nonsense", "known: aesthetic, clip"),
        ("jpeg_size:3", "known: aesthetic, clip"),
        ("2 * 3", "names no reward"),
        ("brightness ** 2", "column 1 of"),
        ("brightness / 2", "column 1 of"),
        ("brightness + open('x')", "column 14 of"),
        ("brightness + True", "column 14 of"),
        ("-missing.py:f", "no file missing.py"),
        ("fdflow.py:no_such", "no function no_such"),
        ("-" * 5000 + "clip", "nested too deeply"),
        ("+".join(["clip"] * 10**4), "nested too deeply"),
    ],
)
def test_bad_expressions_are_refused(text, complaint, monkeypatch):
    monkeypatch.chdir(TINY.parent)
    with pytest.raises(UserError, match=f"reward.*{complaint}|{complaint}.*reward") as error:
        Reward(text)
    assert "\n" not in str(error.value)


# ---- functions in files


@pytest.fixture
def mine(tmp_path):
    """A function that writes a reward f with a body, and returns its term."""

    def write(body):
        head = "import torch\n\ndef f(images, prompts):\n"
        (tmp_path / "mine.py").write_text(f"{head}    {body}\n    return [0, 3]\n")
        return f"{tmp_path}/mine.py:f"

    return write


@pytest.mark.parametrize("numbers", ["[0, 3]", "(False, 3)", "torch.tensor([0, 3])"])
def test_numbers_come_in_many_forms(mine, numbers):
    assert measure(f"2*{mine(f'return {numbers}')}", grey(0.5)) == [0, 6]


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("return images.mean()", r"must return \[2\] numbers, not \[\]"),
        ("return ['a', 'b']", "must return numbers, not list"),
        ("return None", "must return numbers, not NoneType"),
    ],
)
def test_rewards_of_a_wrong_shape_are_named(mine, body, complaint):
    term = mine(body)
    with pytest.raises(UserError, match=complaint) as error:
        measure(term, grey(0.5))
    assert term in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_in_a_users_file_is_shown_as_python_does(mine, tmp_path):
    with pytest.raises(KeyError, match="gone"):
        measure(mine("raise KeyError('gone')"), grey(0.5))
    for text, kind in (("def f(:", SyntaxError), ("import no_such_module", ModuleNotFoundError)):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(kind):
            load_function("estimator", f"{tmp_path}/bad.py:f")
    (tmp_path / "bad.py").write_text("f = 3")
    with pytest.raises(UserError, match=f"^estimator .*:f: {tmp_path}/bad.py has no function f"):
        load_function("estimator", f"{tmp_path}/bad.py:f")
    with pytest.raises(UserError, match="^estimator none.py:f: there is no file none.py"):
        load_function("estimator", "none.py:f")


MODULE = """
from __future__ import annotations
import pickle, mailbox
from dataclasses import dataclass
from neighbour_at_once import ONE
@dataclass
class Pair:
    a: float = ONE
    b: float = 0.0
def f(images, prompts):
    from neighbour_later import TWO
    pair = pickle.loads(pickle.dumps(Pair(b=TWO)))
    return [pair.a, pair.b]
"""


def test_a_reward_file_is_a_whole_module(tmp_path, monkeypatch):
    """It imports neighbours, when it loads and when it is called, and pickles dataclasses."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mailbox", raising=False)
    folder = tmp_path / "my rewards"
    folder.mkdir()
    (folder / "neighbour_at_once.py").write_text("ONE = 1.0")
    (folder / "neighbour_later.py").write_text("TWO = 2.0")
    (folder / "mailbox.py").write_text("raise ValueError('in place of the library')")
    (folder / "mine.py").write_text(MODULE)

    term = f'"{folder}/mine.py":f'
    reward = Reward(f"2*{term}-brightness")
    assert list(reward.terms) == [term, "brightness"]
    assert reward(grey(0.0), ["", ""]).tolist() == [2, 4]
    # a path by itself may be without quotes
    pair = load_function("estimator", f"{folder}/mine.py:Pair")(3.0)
    assert pickle.loads(pickle.dumps(pair)) == pair


def test_a_reward_cannot_change_what_others_see(mine):
    term = mine("images.zero_(); prompts[:] = ['', '']; return [0.0, 0.0]")
    images, prompts = random_images(2), ["red apple", "robot"]
    before, expected = images.clone(), Reward("clip")(images.clone(), prompts)
    for text in (f"{term} + clip", f"clip + {term}"):
        torch.testing.assert_close(Reward(text)(images, prompts), expected)
    assert images.equal(before) and prompts == ["red apple", "robot"]


def test_infinite_rewards_become_nan(mine):
    term = mine("return [1.0, float('inf')]")
    assert measure(f"2*{term}", grey(0.5)) == pytest.approx([2, math.nan], nan_ok=True)


def test_a_reward_that_hangs_is_named_while_it_is_waited_for(mine, monkeypatch, capsys):
    monkeypatch.setattr(rewards, "PATIENCE", 0.2)
    term = mine("import time; time.sleep(0.4 * images[0, 0, 0, 0].item())")
    for seconds, said in ((0.0, 0), (1.0, 1)):
        assert measure(f"{term} + 0*brightness", grey(seconds)) == [0, 3]
        text = f"reward {term} has not answered for 0.2 s; still waiting"
        assert capsys.readouterr().err.count(text) == said

    # a person may take any time
    human = SimpleNamespace(only_in_training=True)
    with rewards.patience("human", human):
        time.sleep(0.3)
    assert not capsys.readouterr().err
