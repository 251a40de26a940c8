"""Tests of the rewards: closed forms, what transformers computes, real servers on this machine.

pytest -q tests/test_rewards.py
"""

import base64
import io
import json
import math
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
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
from rewards import TINY, Aesthetic, Clip, Reward, split_expressions
from support.errors import UserError
from support.prompts import read_prompts
from zoo.human import Human
from zoo.jsonl import read_lines
from zoo.loading import pretrained
from zoo.ocr import Ocr
from zoo.vlm import UNIFIED


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
    red, green, blue = torch.eye(3)[:, None, :, None, None].expand(3, 1, 3, 64, 64)
    half = red.clone()
    half[..., :32] = 0

    # red: rg = 255 and yb = 127.5 everywhere, so no spread, and 0.3 of the length of the mean
    # half red, half black: a spread of half the range, and half the mean
    length = math.hypot(255, 127.5)
    expected = [0, 0.3 * length, 0.3 * length, 0.3 * 255, 0.5 * length + 0.15 * length]
    images = torch.cat([grey(0.4, n=1), red, green, blue, half])
    assert measure("colorfulness", images) == pytest.approx(expected, abs=1e-4)
    assert measure("brightness", images) == pytest.approx([40, 29.9, 58.7, 11.4, 14.95])


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
    assert measure("jpeg_size", noise) == pytest.approx([len(file.getvalue()) / 1000])


# ---- models


@pytest.mark.parametrize("size", [{"shortest_edge": 224}, {"height": 64, "width": 64}])
@pytest.mark.parametrize("shape", [(64, 64), (320, 256), (60, 79)])
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


def test_clip_scores_are_those_of_transformers(monkeypatch):
    images, prompts = random_images(3), ["red apple", "robot", "an unseen caption"]
    asked = []

    def local(kind, path, **options):
        asked.append(path)
        return pretrained(kind, TINY / "tiny-clip", **options)

    for term, folder in (
        ("clip", "tiny-clip"),
        ("clip_h", "tiny-clip-h"),
        (f"clip:{TINY}/tiny-clip-h", "tiny-clip-h"),
        ("pickscore", "tiny-clip"),
    ):
        model = transformers.CLIPModel.from_pretrained(TINY / folder)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY / folder)
        processor = transformers.CLIPImageProcessor.from_pretrained(TINY / folder)
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        inputs |= processor([to_pil(image) for image in images], return_tensors="pt")
        with torch.no_grad():
            theirs = model(**inputs).logits_per_image.diagonal()
        if term == "pickscore":  # which are the logits themselves, by its card
            monkeypatch.setattr(rewards, "pretrained", local)
        else:
            theirs = 100 * theirs / model.logit_scale.exp().item()
        torch.testing.assert_close(Reward(term)(images, prompts), theirs, rtol=1e-4, atol=1e-4)
    assert asked == ["yuvalkirstain/PickScore_v1"] + ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"] * 2


def test_clip_and_aesthetic_share_one_embedding_until_the_images_change(monkeypatch):
    pixels, passes = Clip.pixels, []
    monkeypatch.setattr(Clip, "pixels", lambda *args: passes.append(1) or pixels(*args))
    reward, prompts = Reward("clip + aesthetic"), ["red apple", "robot"]
    images = random_images(2)
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
{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"""


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


def model_inputs(vlm, image, question):
    """What transformers' processors make of one image and a question, so without padding."""
    # 64 pixels become 56, 4 x 4 patches of 14, merged by 2 x 2
    text = (
        "<|im_start|>user\n<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"
        f"{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    vision = vlm.image_processor([to_pil(image)], return_tensors="pt")
    return {**vlm.tokenizer([text], return_tensors="pt"), **vision}


def percent_yes(vlm, image, question):
    yes, no = vlm.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    with torch.no_grad():
        odds = vlm.model(**model_inputs(vlm, image, question)).logits[0, -1].exp()
    return 100 * (odds[yes] / (odds[yes] + odds[no])).item()


def test_vlm_is_the_probability_of_yes_over_no(qwen):
    images = random_images(3)
    prompts = ["sun", "a robot that waters red and yellow tulips", "red apple"]
    match = 'Does this image match the caption "{prompt}"? Answer Yes or No.'
    own = "Is there a {prompt} in it? (Yes + No) - {x}"
    for term, question in ((f"vlm:{qwen}", match), (f'vlm:{qwen}:"{own}"', own)):
        reward = Reward(f"2*{term}")
        R = reward(images, prompts)
        (vlm,) = reward.terms.values()
        for image, prompt, value in zip(images, prompts, R.tolist()):
            expected = 2 * percent_yes(vlm, image, question.replace("{prompt}", prompt))
            assert value == pytest.approx(expected, abs=2e-2)
        assert R.std() > 0.1


def test_vlm_asks_the_questions_of_each_prompt(qwen, tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red cat", "questions": ["Is there a cat?", "Is it red?", "Is it big?"]}]
    lines += [{"prompt": "sun", "questions": ["Is there a sun?"]}, {"prompt": "robot"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    prompts = read_prompts(file)
    assert prompts == ["a red cat", "sun", "robot"]

    images = random_images(3)
    (vlm,) = Reward(f"vlm:{qwen}:questions").terms.values()
    expected = []
    for image, prompt in zip(images, prompts[:2]):
        answers = [percent_yes(vlm, image, f"{q} Answer Yes or No.") for q in prompt.questions]
        expected.append(sum(answers) / len(answers))
    assert vlm(images[:2], prompts[:2]).tolist() == pytest.approx(expected, abs=1e-2)

    with pytest.raises(UserError, match="prompt 'robot' has no questions"):
        vlm(images, prompts)


def test_vlm_reads_what_unifiedreward_writes(qwen, monkeypatch):
    images, prompts = random_images(2), ["sun", "a robot that waters tulips"]
    (vlm,) = Reward(f"vlm:{qwen}:unified").terms.values()
    questions = [UNIFIED.replace("{prompt}", prompt) for prompt in prompts]
    written = vlm.written(images, questions)
    assert vlm(images, prompts).isnan().all()  # a random model writes no scores

    for image, question, text in zip(images, questions, written):
        inputs = model_inputs(vlm, image, question)
        theirs = vlm.model.generate(**inputs, max_new_tokens=160, do_sample=False)[0]
        theirs = vlm.tokenizer.decode(theirs[inputs["input_ids"].shape[1] :])
        assert text.split("<|im_end|>")[0] == theirs.split("<|im_end|>")[0]
        assert len(text) > 20

    # the example of its authors; then one score is too high, and one missing
    answer = (
        "\nAlignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
        "Style Score (1-5): 2.802500009536743\n"
    )
    answers = [answer, answer.replace("2.8", "52.8"), answer.replace("Style", "")]
    monkeypatch.setattr(vlm, "written", lambda images, questions: answers)
    expected = [(2.6947 + 2.3715 + 2.8025) / 3, math.nan, math.nan]
    R = vlm(grey(0.5, n=3), ["sun"] * 3)
    assert R.tolist() == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_models_that_cannot_be_had_are_named(qwen, tmp_path):
    (tmp_path / "two words").symlink_to(qwen)
    assert Reward(f'vlm:"{tmp_path}/two words"').terms
    (tmp_path / "model.safetensors").write_text("damaged")
    config = (TINY / "tiny-clip" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)

    for term, complaint in (
        ("clip", "cannot reach model openai/clip-vit-large-patch14"),
        ("hps", "cannot reach model xswu/HPSv2"),
        ("vlm:7b", "cannot reach model Qwen/Qwen2.5-VL-7B-Instruct"),
        ("vlm:unified:7b", "cannot reach model CodeGoat24/UnifiedReward-2.0-qwen-7b"),
        (f"vlm:{tmp_path}", f"{tmp_path} holds no AutoModelForImageTextToText"),
        (f"clip:{tmp_path}", f"{tmp_path} holds no CLIPModel"),
        ("vlm:3b:7b", "one model at most"),
        ('vlm:questions:"Is it blue?"', "one question at most"),
        ("ocr:fast", "takes no options"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            Reward(term, tiny=None)
        assert "\n" not in str(error.value)


def test_ocr_counts_wrong_letters(monkeypatch):
    texts = iter([("Open", "today"), ("opne", "TODAY"), ("much longer",) * 9, None, ("anything",)])
    ocr = Ocr(lambda picture: SimpleNamespace(txts=next(texts)))
    R = ocr(grey(0.5, n=5), ['a shop sign "OPEN Today"'] * 4 + ["no text"])
    assert R.tolist() == pytest.approx([1, 1 - 2 / 9, 0, 0, math.nan], nan_ok=True)

    monkeypatch.setitem(sys.modules, "rapidocr", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install rapidocr"):
        Reward("ocr")


# ---- services

# the status of an answer, how often it is asked for, and what is to be said of it
FAILURES = {
    "slow": (200, 6, "did not answer, 6 times: .*timed out"),
    "broken": (500, 6, "did not answer, 6 times: 500"),
    "missing": (404, 1, "answered with status 404"),
    "redirect": (302, 1, "answered with status 302"),
    "garbled": (200, 1, "did not answer with JSON"),
}


def mean_level(file):
    """The mean of a PNG file in base64, 0 to 1."""
    picture = Image.open(io.BytesIO(base64.b64decode(file)))
    return sum(picture.resize((1, 1)).getpixel((0, 0))) / 765


class Service(BaseHTTPRequestHandler):
    """Sends back what its `answer` makes of a request: a status and a text."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, text = self.answer(body)
        self.send_response(status)
        self.send_header("Retry-After", "17")
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        """Say nothing."""


class Scores(Service):
    """Scores by the mean of the image and the length of the prompt, or fails as the path says."""

    def answer(self, body):
        mode, asked = self.path.strip("/"), self.server.asked
        asked.append(mode)
        if mode == "slow":
            time.sleep(0.5)
        if mode == "twice-down" and len(asked) <= 2:
            return 503, ""

        R = []
        for image, prompt in zip(body["images"], body["prompts"]):
            R.append(mean_level(image) + len(prompt))
        status, *_ = FAILURES.get(mode, (200,))
        return status, "{" if mode == "garbled" else json.dumps(R)


@contextmanager
def serve(handler):
    """Inside, a server answers in a thread; `asked` is for what it is asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.handle_error = lambda *args: None  # of a caller who does not wait for the answer
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server():
    with serve(Scores) as server:
        yield server


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were waited between attempts, which pass at once."""
    pauses = []
    monkeypatch.setattr("zoo.http.time", SimpleNamespace(sleep=pauses.append))
    return pauses


def test_a_service_scores_images(server, monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which is to see no image
    images = torch.cat([grey(level, n=1) for level in (0.0, 0.2, 1.0)])
    R = Reward(f"2*{server.url}/score - 1")(images, ["", "a", "ab"])
    assert R.tolist() == pytest.approx([-1, 1.4, 5])


def test_a_service_that_recovers_is_asked_again_when_it_says(server, pauses):
    assert measure(f"{server.url}/twice-down", grey(0.2)) == pytest.approx([0.2, 0.2])
    assert pauses == [17, 17]  # which is longer than the pauses by themselves


@pytest.mark.parametrize("mode", FAILURES)
def test_a_service_that_fails_is_named(server, pauses, mode):
    _, asked, complaint = FAILURES[mode]
    url = f"{server.url}/{mode}"
    reward = Reward(url)
    reward.terms[url].timeout = 0.1 if mode == "slow" else 10
    with pytest.raises(UserError, match=complaint) as error:
        reward(grey(0.2), ["", ""])
    assert url in str(error.value) and "\n" not in str(error.value)

    assert server.asked == [mode] * asked
    assert len(pauses) == asked - 1
    if mode == "slow":
        assert all(2**i <= pause <= 1.5 * 2**i for i, pause in enumerate(pauses))


# ---- people


@pytest.fixture
def ask(tmp_path):
    """A function that has a person asked in a thread: the page, and what will come back."""
    interrupted = []

    def ask(images, prompts):
        human, answer = Human(), Future()
        url = human.serve(tmp_path, 2, groups=len(images) // 2, interrupted=interrupted)

        def call():
            try:
                answer.set_result(human(images, prompts))
            except KeyboardInterrupt as error:
                answer.set_exception(error)

        threading.Thread(target=call, daemon=True).start()
        return url, answer

    ask.interrupted = interrupted
    yield ask
    interrupted.append("the test is over")


def next_group(url):
    """What the page shows, as soon as there is something."""
    for _ in range(500):
        answer = requests.get(url + "group")
        if answer.status_code == 200:
            return answer.json()
        time.sleep(0.01)
    raise AssertionError("nothing to compare")


def choose(url, key, choice):
    return requests.post(url + "answer", json={"key": key, "choice": choice})


def test_a_person_is_asked_once_and_waited_for(tmp_path, ask):
    prompts = ["sun", "sun", "moon", "moon", "star", "star"]
    url, result = ask(random_images(6, size=8), prompts)
    for choice in (0, None, 1):
        group = next_group(url)
        assert not result.done() and len(group["images"]) == 2 and group["total"] == 3
        for wrong in (2, -1, True):
            assert choose(url, group["key"], wrong).status_code == 400
        # by a name from elsewhere that was made to point here
        evil = requests.get(url + "group", headers={"Host": "evil.example"})
        assert evil.status_code == 403
        assert next_group(url) == group
        for _ in range(2):  # the page is open twice: the second comes too late
            assert choose(url, group["key"], choice).status_code == 204

    assert result.result(timeout=10).tolist() == [1, 0, 0.5, 0.5, 0, 1]
    lines = read_lines(tmp_path / "preferences.jsonl")
    assert [line["prompt"] for line in lines] == ["sun", "moon", "star"]
    assert [line["choice"] for line in lines] == [0, None, 1]
    assert Image.open(tmp_path / "preferences" / f"{lines[0]['key']}.png").size == (16, 8)


def test_answers_of_a_person_are_kept(tmp_path, ask):
    """On a full disk, after Ctrl-C, beside lines that were cut short or are no answers."""
    images, prompts = random_images(4, size=8), ["sun", "sun", "moon", "moon"]
    url, result = ask(images, prompts)
    group = next_group(url)
    (tmp_path / "preferences").write_text("where a folder must be")
    answer = choose(url, group["key"], 0)
    assert answer.status_code == 500 and "File exists" in answer.text
    assert next_group(url) == group

    (tmp_path / "preferences").unlink()
    choose(url, group["key"], 0)
    moon = next_group(url)["key"]
    ask.interrupted.append(2)
    with pytest.raises(KeyboardInterrupt):
        result.result(timeout=10)
    ask.interrupted.clear()

    # as an editor on Windows saves it, then cut short
    file = tmp_path / "preferences.jsonl"
    lines = file.read_text().splitlines()
    for choice in ("true", "1.0", "2"):
        lines.append(f'{{"key": "{moon}", "choice": {choice}}}')
    lines += ["[]", "nonsense", f'{{"key": "{moon}", "cho']
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())

    url, result = ask(images, prompts)
    group = next_group(url)
    assert (group["key"], group["answered"]) == (moon, 1)
    choose(url, moon, None)
    _, again = ask(images, prompts)  # nothing is left to ask
    assert result.result(timeout=10).equal(again.result(timeout=10))
    assert result.result().tolist() == [1, 0, 0.5, 0.5]


def test_a_person_is_asked_in_a_training_by_pairs_alone(tmp_path, monkeypatch):
    reward = Reward("human")
    (human,) = reward.terms.values()
    with pytest.raises(UserError, match="only train.py can ask a person"):
        reward(grey(0.5), ["", ""])

    args = SimpleNamespace(groups=3)
    run = SimpleNamespace(folder=tmp_path, args=args, interrupted=[1])
    with pytest.raises(UserError, match="use --estimator fdfo"):
        human.open(run)
    args.branches = 2
    human.open(run)
    with pytest.raises(KeyboardInterrupt):
        reward(grey(0.5), ["", ""])

    monkeypatch.setattr("zoo.human.processes", lambda: (0, 2))
    with pytest.raises(UserError, match="one process alone"):
        human.open(run)


# ---- expressions


def test_expressions_are_arithmetic(tmp_path):
    mine = tmp_path / "mine.py"
    code = "def red(images, prompts):\n    return images[:, 0].mean((1, 2)).tolist()\n"
    mine.write_text(code, "utf-8-sig", newline="\r\n")  # as an editor on Windows saves it
    images = random_images(4)
    a, b = Reward("brightness")(images, [""] * 4), Reward("colorfulness")(images, [""] * 4)
    red = images[:, 0].mean((1, 2))
    reward = Reward(f"  -brightness + 2*(colorfulness\n\t- 0.5) - 3 * {mine}:red\n")
    torch.testing.assert_close(reward(images, [""] * 4), -a + 2 * (b - 0.5) - 3 * red)
    assert list(reward.terms) == ["brightness", "colorfulness", f"{mine}:red"]


def test_commas_separate_expressions_but_not_in_quotes():
    text = 'clip, 2*judge:m:"Is it red, or blue?" - 1,aesthetic'
    assert split_expressions(text) == ["clip", ' 2*judge:m:"Is it red, or blue?" - 1', "aesthetic"]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("brightness +", "column 13"),
        ("clip – 0.1*jpeg_size", "column 6"),  # a dash, as web pages have it
        ("nonsense", "known: aesthetic, clip"),
        ("2 * 3", "names no reward"),
        ("brightness / 2", "column 1 of"),
        ("vlm:3b + True", "column 10 of"),
        ("-missing.py:f", "no file missing.py"),
        ("fdflow.py:math", "no function math"),
        ("clip + http://host:99999/", "http://host:99999/ is no address"),
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
        (tmp_path / "mine.py").write_text(f"import torch\ndef f(images, prompts):\n    {body}\n")
        return f"{tmp_path}/mine.py:f"

    return write


def test_numbers_come_in_many_forms(mine):
    for numbers in ("[0, 3]", "(False, 3)", "torch.tensor([0, 3])"):
        assert measure(f"2*{mine(f'return {numbers}')}", grey(0.5)) == [0, 6]
    infinite = measure(mine("return [1.0, float('inf')]"), grey(0.5))
    assert infinite == pytest.approx([1, math.nan], nan_ok=True)

    for wrong, complaint in (
        ("images.mean()", r"must return \[2\] numbers, not \[\]"),
        ("['a', 'b']", "must return numbers, not list"),
        ("None", "must return numbers, not NoneType"),
    ):
        with pytest.raises(UserError, match=f"mine.py:f {complaint}") as error:
            measure(mine(f"return {wrong}"), grey(0.5))
        assert "\n" not in str(error.value)


MODULE = """
from __future__ import annotations
import pickle, mailbox
from dataclasses import dataclass
@dataclass
class Pair:
    a: float
    b: float = 0.0
def f(images, prompts):
    from neighbour import TWO
    pair = pickle.loads(pickle.dumps(Pair(1.0, b=TWO)))
    return [pair.a, pair.b]
"""


def test_a_reward_file_is_a_whole_module(tmp_path, monkeypatch):
    """It imports a neighbour, which hides nothing of Python, and pickles dataclasses."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mailbox", raising=False)
    folder = tmp_path / "my rewards"
    folder.mkdir()
    (folder / "neighbour.py").write_text("TWO = 2.0")
    (folder / "mailbox.py").write_text("raise ValueError('in place of the library')")
    (folder / "mine.py").write_text(MODULE)

    term = f'"{folder}/mine.py":f'
    reward = Reward(f"2*{term}-brightness")
    assert list(reward.terms) == [term, "brightness"]
    assert reward(grey(0.0), ["", ""]).tolist() == [2, 4]


def test_a_reward_cannot_change_what_others_see(mine):
    term = mine("images.zero_(); prompts[:] = ['', '']; return [0.0, 0.0]")
    images, prompts = random_images(2), ["red apple", "robot"]
    before, expected = images.clone(), Reward("clip")(images.clone(), prompts)
    torch.testing.assert_close(Reward(f"{term} + clip")(images, prompts), expected)
    assert images.equal(before) and prompts == ["red apple", "robot"]


def test_a_reward_that_hangs_is_named_while_it_is_waited_for(mine, monkeypatch, capsys):
    monkeypatch.setattr(rewards, "PATIENCE", 0.2)
    term = mine("import time; time.sleep(0.4 * images[0, 0, 0, 0].item()); return [0, 3]")
    for seconds, said in ((0.0, 0), (1.0, 1)):
        assert measure(f"{term} + 0*brightness", grey(seconds)) == [0, 3]
        text = f"reward {term} has not answered for 0.2 s; still waiting"
        assert capsys.readouterr().err.count(text) == said

    # a person may take any time
    with rewards.patience("human", Human()):
        time.sleep(0.3)
    assert not capsys.readouterr().err
