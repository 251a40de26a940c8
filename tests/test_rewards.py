"""Tests of the rewards: closed forms, what transformers itself computes, real servers on this machine.

pytest -q tests/test_rewards.py
"""

import base64
import io
import json
import math
import pickle
import re
import socket
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
import zoo.human
from rewards import TINY, Aesthetic, Clip, Reward, load_function
from support.errors import UserError
from zoo.http import Http
from zoo.human import Human
from zoo.ocr import Ocr, edit_distance


def grey(level, n=2, size=64):
    return torch.full((n, 3, size, size), level)


def test_programs_have_their_closed_forms():
    assert Reward("colorfulness")(grey(0.4), ["", ""]).abs().max() < 1e-4
    red = grey(0.0)
    red[:, 0] = 1.0
    # rg = 255, yb = 127.5 everywhere: no spread, 0.3 of the mean's length
    assert Reward("colorfulness")(red, ["", ""]).tolist() == pytest.approx(
        [0.3 * math.hypot(255, 127.5)] * 2
    )
    half = red.clone()
    half[:, 0, :, :32] = 0  # half red, half black: spread of half the range, mean of half
    expected = 0.5 * math.hypot(255, 127.5) + 0.3 * 0.5 * math.hypot(255, 127.5)
    assert Reward("colorfulness")(half, ["", ""]).tolist() == pytest.approx([expected] * 2)
    assert Reward("brightness")(grey(0.25), ["", ""]).tolist() == pytest.approx([25, 25])
    assert Reward("brightness")(red, ["", ""]).tolist() == pytest.approx([29.9, 29.9])
    assert Reward("sharpness")(grey(0.25), ["", ""]).abs().max() < 1e-3
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    # on a checkerboard of 0 and 1 the Laplacian is +-4, so its variance is (4 * 255)^2
    assert Reward("sharpness")(board.float().expand(1, 3, 64, 64), [""]).item() == pytest.approx(
        1020**2
    )


def test_edges_and_entropy_have_their_closed_forms():
    half = grey(0.0, n=1)
    half[..., 32:] = 1.0  # black and white: one bit, and a line of edges two pixels wide
    flat, split = grey(0.3, n=1), torch.cat([half, grey(0.6, n=1)])
    assert Reward("color_entropy")(flat, [""]).item() == 0
    assert Reward("color_entropy")(split, [""] * 2).tolist() == pytest.approx([1, 0])
    assert Reward("edge_density")(split, [""] * 2).tolist() == pytest.approx([100 * 2 / 62, 0])
    # a slope of 0.1 a pixel is just not an edge, of 0.11 it is, along either side
    for slope, percent in ((0.099, 0), (0.101, 100)):
        ramp = (slope * torch.arange(8.0)).expand(1, 3, 8, 8)
        assert Reward("edge_density")(ramp, [""]).item() == percent
        assert Reward("edge_density")(ramp.mT, [""]).item() == percent
    # every one of 512 colours once, in 9 bits
    levels = (torch.arange(8) + 0.5) / 8
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 16, 32)
    assert Reward("color_entropy")(colours, [""]).item() == pytest.approx(9)


def test_jpeg_size_is_that_of_the_file():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels = Image.fromarray((noise[0].permute(1, 2, 0) * 255).round().byte().numpy())
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=95)
    both = Reward("jpeg_size")(torch.cat([noise, grey(0.5, 1)]), ["", ""])
    assert both[0].item() == pytest.approx(len(file.getvalue()) / 1000)
    assert both[1] < 1.0 < both[0]


@pytest.mark.parametrize("size", [{"shortest_edge": 224}, {"height": 64, "width": 64}])
@pytest.mark.parametrize("shape", [(64, 64), (300, 300), (256, 320)])
def test_preprocessing_is_that_of_transformers(size, shape):
    crop = size["shortest_edge"] if "shortest_edge" in size else 64
    processor = transformers.CLIPImageProcessor(
        size=size, crop_size={"height": crop, "width": crop}, do_center_crop="shortest_edge" in size
    )
    clip = Clip.__new__(Clip)
    clip.processor = processor
    smooth = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    pixels = (F.interpolate(smooth, shape, mode="bicubic").clamp(0, 1) * 255).round().byte()
    theirs = processor(
        Image.fromarray(pixels[0].permute(1, 2, 0).numpy()), return_tensors="pt"
    ).pixel_values
    ours = clip.pixels(pixels / 255)
    assert ours.shape == theirs.shape
    # PIL rounds to whole levels after each of its two passes: about one level of 1 / 255, over a std of 0.26
    assert (ours - theirs).abs().max() < 1.6 / 255 / 0.26


def test_clip_score_is_that_of_transformers():
    prompts = ["red apple", "robot", "an unseen caption"]
    images = torch.rand(3, 3, 64, 64)
    model = transformers.CLIPModel.from_pretrained(TINY / "tiny-clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY / "tiny-clip")
    processor = transformers.CLIPImageProcessor.from_pretrained(TINY / "tiny-clip")
    pictures = [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in images]
    inputs = {
        **tokenizer(prompts, padding=True, return_tensors="pt"),
        **processor(pictures, return_tensors="pt"),
    }
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()
    images = (images * 255).round() / 255
    torch.testing.assert_close(
        Reward("clip")(images, prompts) / 100 * model.logit_scale.exp(),
        logits,
        rtol=1e-4,
        atol=1e-4,
    )


def test_pickscore_is_the_formula_of_its_model(monkeypatch):
    asked, pretrained = [], rewards.pretrained

    def local(kind, path, **options):
        asked.append(path)
        return pretrained(kind, TINY / "tiny-clip", **options)

    monkeypatch.setattr(rewards, "pretrained", local)
    images, prompts = (torch.rand(2, 3, 64, 64) * 255).round() / 255, ["red apple", "robot"]
    reward = Reward("pickscore", tiny=None)
    assert asked == ["yuvalkirstain/PickScore_v1"] + ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"] * 2
    clip = reward.terms["pickscore"]
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        # the model card's formula, scale x normalised text @ normalised image, is that of the model's logits
        logits = clip.model(pixel_values=clip.pixels(images), **tokens).logits_per_text.diagonal()
    torch.testing.assert_close(reward(images, prompts), logits, rtol=1e-4, atol=1e-4)


def test_clip_and_aesthetic_share_one_embedding_until_the_images_change(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    reward = Reward(f"clip + {tmp_path}/mine.py:f + aesthetic")
    model, passes = reward.terms["clip"].model, []
    embed = model.get_image_features
    monkeypatch.setattr(
        model, "get_image_features", lambda pixels: (passes.append(1), embed(pixels))[1]
    )
    images, prompts = torch.rand(2, 3, 64, 64), ["red apple", "robot"]
    before = reward(images, prompts)
    assert len(passes) == 1
    images.copy_(images.flip(0))  # the same tensor with other contents
    after = reward(images, prompts[::-1])
    assert len(passes) == 2
    torch.testing.assert_close(after, before.flip(0), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        Reward("clip")(images.requires_grad_(False), prompts)
        Reward("clip")(images.requires_grad_(), prompts)
    Reward("clip")(
        images, prompts
    ).sum().backward()  # an embedding without a graph is no use where one is wanted
    assert images.grad.abs().max() > 0
    images = images.detach().clone()
    Reward("clip")(images, prompts)
    Reward("clip")(images.requires_grad_(), prompts).sum().backward()
    assert images.grad.abs().max() > 0


# ---- a vision-language model


TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{{ '<|im_start|>assistant\n' }}"""  # noqa: E501


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a small random Qwen2.5-VL, its tokenizer and its image processor."""
    folder = tmp_path_factory.mktemp("qwen")
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Y", "e"), ("Ye", "s"), ("N", "o")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, chat_template=TEMPLATE)
    marks = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    start, end, image, video = tokenizer.convert_tokens_to_ids(marks[2:])
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for p in model.parameters():  # or all answers are alike
        p.data += 0.1 * torch.randn(p.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 9).save_pretrained(
        folder
    )
    return folder


def test_vlm_is_the_probability_of_yes_over_no(qwen):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["sun", "a robot that waters red and yellow tulips", "red apple"]
    reward = Reward(f"vlm:{qwen}")
    together = reward(images, prompts)
    vlm = reward.terms[f"vlm:{qwen}"]
    for image, prompt, R in zip(images, prompts, together):
        # one by one, without padding, by hand: 64 pixels become 56, 4 x 4 patches of 14, merged by 2 x 2
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        vision = vlm.image_processor([picture], return_tensors="pt")
        text = (
            "<|im_start|>user\n<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"
            f'Does this image match the caption "{prompt}"? Answer Yes or No.<|im_end|>\n'
            "<|im_start|>assistant\n"
        )  # fmt: skip
        tokens = vlm.tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            logits = vlm.model(**tokens, **vision).logits[0, -1]
        yes, no = (logits[vlm.tokenizer.convert_tokens_to_ids(word)] for word in ("Yes", "No"))
        assert R.item() == pytest.approx(
            100 * (yes.exp() / (yes.exp() + no.exp())).item(), abs=1e-2
        )
        # neither the others nor the padding matter
        assert reward(image[None], [prompt]).item() == pytest.approx(R.item(), abs=1e-2)
    assert together.std() > 0.1 and together.min() > 0 and together.max() < 100


def test_vlm_takes_a_question_of_ones_own(qwen):
    images = torch.rand(2, 3, 64, 64)
    about = Reward(f'2*vlm:{qwen}:"Is there a {{prompt}} in it? (Yes + No) - {{x}}"')
    R = about(images, ["cat", "dog"])
    (term,) = about.terms.values()
    assert term.question == "Is there a {prompt} in it? (Yes + No) - {x}"
    term.question = "Is there a cat in it? (Yes + No) - {x}"
    assert about(images, ["", ""])[0].item() == pytest.approx(R[0].item(), abs=1e-2)
    assert about(images, ["", ""])[1].item() != pytest.approx(R[1].item(), abs=1e-2)
    long = "Is there a cat in it? " * 20  # longer than a path may be
    (term,) = Reward(f'vlm:"{long}":{qwen}').terms.values()
    assert term.question == long


def test_a_vlm_that_cannot_be_had_is_named(qwen, tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "two words").symlink_to(qwen)
    assert Reward(f'vlm:"{tmp_path}/two words"').terms
    for term, complaint in (
        ("vlm:7b", "cannot reach model Qwen/Qwen2.5-VL-7B-Instruct"),
        (f"vlm:{tmp_path}", f"{tmp_path} holds no AutoModelForImageTextToText"),
        (f"vlm:{TINY}/tiny-clip", "tiny-clip holds no AutoModelForImageTextToText"),
        ("vlm:3b:7b", "one model and one question"),
        ('vlm:"Is it red?":"Is it blue?"', "one model and one question"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            Reward(term)
        assert "\n" not in str(error.value)


def test_ocr_counts_wrong_letters():
    for a, b, distance in (
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("same", "same", 0),
    ):
        assert edit_distance(a, b) == distance
    texts = iter([("Open", "today"), ("opne", "TODAY"), None, ("anything",)])
    ocr = Ocr(lambda pixels: SimpleNamespace(txts=next(texts)))
    R = ocr(grey(0.5, n=4), ['a shop sign "OPEN Today"'] * 3 + ["no text"])
    assert R[:3].tolist() == pytest.approx([1, 1 - 2 / 9, 0]) and R[3].isnan()


# ---- services and people


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
        wrong = {
            "short": R[1:],
            "text": "high",
            "words": ["a"] * len(R),
            "nan": [float("nan")] * len(R),
        }
        text = json.dumps(wrong.get(mode, R)) + " " * (10**7 * (mode == "huge"))
        text = {"garbled": "{", "deep": "[" * 5000, "digits": f"[{'9' * 400}, 0]"}.get(mode, text)
        self.send_response(status)
        if mode == "redirect":
            self.send_header("Location", f"http://localhost:{self.server.server_port}/mean")
        self.end_headers()
        if mode == "drip":
            for _ in range(20):
                time.sleep(0.1)
                self.wfile.write(b" ")
        self.wfile.write(text.encode())

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.handle_error = lambda *args: None  # of a caller who does not wait for the answer
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_service_scores_images(server):
    server.asked, url = [], f"http://127.0.0.1:{server.server_port}"
    images = torch.stack([torch.full((3, 16, 16), level) for level in (0.0, 0.2, 1.0)])
    assert Reward(f"{url}/mean")(images, [""] * 3).tolist() == pytest.approx([0, 0.2, 1])
    assert Reward(f"2*{url}/prompts - 1")(images, ["", "a", "ab"]).tolist() == [-1, 1, 3]
    assert Reward(f"{url}/nan")(images, [""] * 3).isnan().all()


@pytest.mark.parametrize(
    "mode, asked, complaint",
    [
        ("twice-down", 3, None),
        ("slow", 3, "did not answer, 3 times: timed out"),
        ("drip", 3, "did not answer, 3 times: timed out"),
        ("broken", 3, "did not answer, 3 times: 500"),
        ("missing", 1, "answered with status 404"),
        ("redirect", 1, "answered with status 302"),
        ("huge", 1, "more than 1000000 bytes"),
        ("garbled", 1, "did not answer with JSON"),
        ("deep", 1, "did not answer with JSON"),
        ("digits", 1, "must return numbers, not list: int too large"),
        ("text", 1, "must return numbers, not str"),
        ("words", 1, "must return numbers, not list"),
        ("short", 1, r"must return \[2\] numbers, not \[1\]"),
    ],
)
def test_services_that_fail_are_asked_again_or_named(server, mode, asked, complaint):
    server.asked, url = [], f"http://127.0.0.1:{server.server_port}/{mode}"
    reward, start = Reward(url), time.monotonic()
    reward.terms[url] = Http(url, timeout=0.3, attempts=3, pause=0.01)
    if complaint is None:
        assert reward(grey(0.2), ["", ""]).tolist() == pytest.approx([0.2, 0.2])
    else:
        with pytest.raises(UserError, match=complaint) as error:
            reward(grey(0.2), ["", ""])
        assert url in str(error.value) and "\n" not in str(error.value)
    assert server.asked == [mode] * asked
    assert time.monotonic() - start < 3 * 0.3 + 1  # a whole drip takes 2 s


@pytest.mark.parametrize(
    "address",
    [
        "http://a..b/",
        "http://[::1/",
        "http://host:99999/",
        "http:///score",
        "http://1.2.3.400/",
        "http://" + "a" * 64,
    ],
)
def test_a_malformed_address_fails_as_soon_as_it_is_read(address):
    with pytest.raises(UserError, match="is no address") as error:
        Reward(f"clip + {address}")
    assert address in str(error.value) and "\n" not in str(error.value)


def test_no_proxy_sees_the_images_for_this_machine(server, monkeypatch):
    server.asked = []
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), Service
    ) as proxy:  # a proxy that is closed right away
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    url = f"http://127.0.0.1:{server.server_port}/mean"
    assert Http(url, attempts=1)(grey(0.2), ["", ""]) == pytest.approx([0.2, 0.2])


def test_a_service_that_is_down_is_named():
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
    start = time.time()
    with pytest.raises(UserError, match="did not answer, 3 times"):
        Http(url, attempts=3, pause=0.1)(grey(0.2), ["", ""])
    assert time.time() - start > 0.1 + 0.2


def post(url, answer):
    data = answer if isinstance(answer, str) else json.dumps(answer)
    return requests.post(url + "answer", data=data, headers={"Content-Type": "application/json"})


def next_group(url):
    """What the page shows, as soon as there is something."""
    for _ in range(500):
        if (answer := requests.get(url + "group")).status_code == 200:
            return answer.json()
        time.sleep(0.01)
    raise AssertionError("nothing to compare")


def ask(human, images, prompts):
    """The call of a person in a thread; returns it, and the list that gets the result, or what is raised."""
    results = []

    def call():
        try:
            results.append(human(images, prompts))
        except KeyboardInterrupt as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread, results


def test_a_person_is_asked_once_and_waited_for(tmp_path):
    images = torch.rand(6, 3, 8, 8)
    prompts, rounds = ["sun", "sun", "moon", "moon", "star", "star"], []
    for choices in ((0, None, 1), ()):  # the second round has all answers from the file
        human = Human(branches=2, groups=3)
        url = human.open(tmp_path)
        thread, results = ask(human, images, prompts)
        for choice in choices:
            group = next_group(url)
            assert thread.is_alive() and len(group["images"]) == 2 and group["total"] == 3
            for wrong in (2, -1, True, 0.0, "0", [0]):
                assert post(url, {"key": group["key"], "choice": wrong}).status_code == 400
            for wrong in ("[" * 1000, "[]", "{", "3", '{"choice": 0}'):
                assert post(url, wrong).status_code == 400
            assert next_group(url) == group
            good = {"key": group["key"], "choice": choice}
            # a form of another page, and a name from elsewhere
            assert requests.post(url + "answer", data=json.dumps(good)).status_code == 403
            assert requests.get(url, headers={"Host": "evil.example"}).status_code == 403
            for _ in range(2):  # the second comes too late, and nothing happens
                assert post(url, good).status_code == 204
        thread.join(timeout=10)
        rounds += [R.tolist() for R in results]
    assert rounds == [[1, 0, 0.5, 0.5, 0, 1]] * 2
    lines = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["sun", "moon", "star"]
    assert [line["choice"] for line in lines] == [0, None, 1]
    picture = Image.open(tmp_path / "preferences" / f"{lines[0]['key']}.png")
    assert picture.size == (16, 8)
    with pytest.raises(UserError, match="only train.py"):
        Reward("human")


def test_lines_that_are_no_answers_are_asked_again(tmp_path):
    """A crash cut the last line short, someone wrote others: neither ends a resume or spoils what follows."""
    images, file = torch.rand(4, 3, 8, 8), tmp_path / "preferences.jsonl"
    url = (human := Human(branches=2, groups=2)).open(tmp_path)
    thread, _ = ask(human, images, ["sun", "sun", "moon", "moon"])
    for _ in range(2):
        post(url, {"key": next_group(url)["key"], "choice": 1})
    thread.join(timeout=10)
    first, second = file.read_text().splitlines()
    strange = [
        json.dumps(json.loads(second) | {"choice": choice}) for choice in (True, 1.0, 2, "1")
    ]
    file.write_text("\n".join([first, *strange, "", "[]", "nonsense", second[:-9]]))
    url = (human := Human(branches=2, groups=2)).open(tmp_path)
    thread, results = ask(human, images, ["sun", "sun", "moon", "moon"])
    assert (group := next_group(url))["key"] == json.loads(second)["key"] and group["answered"] == 1
    post(url, {"key": group["key"], "choice": 0})
    thread.join(timeout=10)
    assert results[0].tolist() == [0, 1, 1, 0]
    (human := Human(branches=2, groups=2)).open(tmp_path)
    thread, results = ask(human, images, ["sun", "sun", "moon", "moon"])
    thread.join(timeout=10)
    assert results[0].tolist() == [0, 1, 1, 0]


def test_an_answer_that_cannot_be_written_is_not_taken(tmp_path):
    url = (human := Human(branches=2, groups=1)).open(tmp_path)
    (tmp_path / "preferences").write_text("where a folder must be")
    thread, results = ask(human, torch.rand(2, 3, 8, 8), ["sun", "sun"])
    group = next_group(url)
    answer = post(url, {"key": group["key"], "choice": 1})
    assert answer.status_code == 500 and "File exists" in answer.text
    assert next_group(url) == group and thread.is_alive()
    (tmp_path / "preferences").unlink()
    assert post(url, {"key": group["key"], "choice": 1}).status_code == 204
    thread.join(timeout=10)
    assert results[0].tolist() == [0, 1]


def test_ctrl_c_ends_the_waiting_at_once_and_keeps_the_answers(tmp_path):
    images, interrupted = torch.rand(4, 3, 8, 8), []
    url = (human := Human(branches=2, groups=2)).open(tmp_path, interrupted)
    thread, results = ask(human, images, ["sun", "sun", "moon", "moon"])
    post(url, {"key": next_group(url)["key"], "choice": 0})
    thread.join(timeout=0.5)
    assert thread.is_alive()
    interrupted.append(2)
    thread.join(timeout=10)
    assert isinstance(results[0], KeyboardInterrupt)
    url = (human := Human(branches=2, groups=2)).open(tmp_path, [])
    thread, results = ask(human, images, ["sun", "sun", "moon", "moon"])
    assert next_group(url)["prompt"] == "moon"
    post(url, {"key": next_group(url)["key"], "choice": None})
    thread.join(timeout=10)
    assert results[0].tolist() == [1, 0, 0.5, 0.5]


def test_the_page_is_safe_from_other_pages_and_silent_callers(tmp_path, monkeypatch):
    assert 0 < zoo.human.Handler.timeout <= 60
    url = Human(branches=2, groups=1).open(tmp_path)
    assert requests.get(url).headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    head = b"POST /answer HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    monkeypatch.setattr(zoo.human.Handler, "timeout", 5)
    for length in (b"-1", b"1001", b"many", b""):  # answered without waiting for what does not come
        with socket.create_connection(
            ("127.0.0.1", int(url[:-1].rsplit(":")[-1])), timeout=2
        ) as caller:
            caller.sendall(head + b"Content-Length: " + length + b"\r\n\r\n")
            assert b" 400 " in caller.recv(100)
    monkeypatch.setattr(zoo.human.Handler, "timeout", 0.2)
    with socket.create_connection(
        ("127.0.0.1", int(url[:-1].rsplit(":")[-1])), timeout=2
    ) as caller:
        assert caller.recv(100) == b""  # hung up on, for saying nothing


def test_aesthetic_reads_the_published_layout(tmp_path, monkeypatch):
    widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    linears = {i: nn.Linear(*width) for i, width in widths.items()}
    state = {
        f"layers.{i}.{key}": w
        for i, linear in linears.items()
        for key, w in linear.state_dict().items()
    }
    torch.save(state, tmp_path / "aesthetic-model.pth")
    x = torch.randn(3, 768)
    expected = x
    for linear in linears.values():
        expected = linear(expected)
    monkeypatch.setattr(rewards, "downloaded", lambda hub_id, file: tmp_path / file)
    monkeypatch.setattr(
        rewards, "load_clip", lambda *args: SimpleNamespace(embed_images=lambda images: x)
    )
    torch.testing.assert_close(Aesthetic(None, "cpu")(None, None), expected[:, 0])


# ---- expressions and files


def test_expressions_are_arithmetic(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def red(images, prompts):\n    return images[:, 0].mean((1, 2)).tolist()\n"
    )
    images = torch.rand(4, 3, 32, 32)
    a, b = Reward("brightness")(images, [""] * 4), Reward("colorfulness")(images, [""] * 4)
    red = images[:, 0].mean((1, 2))
    text = f"-brightness + 2*(colorfulness - 0.5) - 3*{tmp_path}/mine.py:red"
    torch.testing.assert_close(Reward(text)(images, [""] * 4), -a + 2 * (b - 0.5) - 3 * red)
    assert list(Reward(text).terms) == ["brightness", "colorfulness", f"{tmp_path}/mine.py:red"]


def test_white_space_does_not_matter():
    images = torch.rand(2, 3, 8, 8)
    expected = 2 * Reward("brightness")(images, ["", ""]) - Reward("colorfulness")(images, ["", ""])
    for text in (
        " 2*brightness - colorfulness",
        "2 * brightness\n\t-colorfulness\n",
        "(2*brightness)-colorfulness ",
    ):
        assert Reward(text)(images, ["", ""]).equal(expected)
    assert Reward(" clip ").expression == "clip"


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("brightness +", "column 13"),
        ("brightness 2", "column 12"),
        ("nonsense", "known: aesthetic, clip"),
        ("clip:3", "known: aesthetic, clip"),
        ("2 * 3", "names no reward"),
        ("brightness ** 2", "column 1"),
        ("brightness / 2", "column 1"),
        ("brightness + open('x')", "column 14"),
        ("__import__('os')", "column 1"),
        ("brightness + True", "column 14"),
        ("missing.py:f", "no file missing.py"),
        ("-missing.py:f", "no file missing.py"),
        (f"{'a' * 300}.py:f", "no file aaa"),
        ("fdflow.py:no_such", "no function no_such"),
        ("", "column 1"),
        ("1e400 * brightness", "column 1 .* numbers to 1e30"),
        (f"{'9' * 400} * brightness", "column 1 .* numbers to 1e30"),
        ("2j * brightness", "column 1 .* numbers"),
        ("\u0663 * brightness", "column 1"),  # a 3 in Arabic
        ("brightness * \uff12", "column 14"),  # a wide 2
        ("brightness - \uff43lip", "column 14"),  # a wide c, which Python takes for a c
        ("-" * 101 + "brightness", "too long: 100 of"),
        ("-" * 5000 + "brightness", "too long: 2,000 characters"),
        ("+".join(["clip"] * 102), "too long: 100 of"),
        ("a" * 120_000, "too long: 2,000 characters"),
        ("+".join(["clip"] * 10**5), "too long: 2,000 characters"),
        ("(" * 900 + "clip" + ")" * 900, "too long: 100 of"),
        (f"0.{'0' * 2000}1 * clip", "too long: 2,000 characters"),
        ("~" * 1900 + "clip", "column"),
        ("not " * 450 + "clip", "column"),
        ("clip" + ".a" * 900, "column"),
        ("clip\0", "column"),
    ],
)
def test_bad_expressions_are_refused(text, complaint, monkeypatch):
    monkeypatch.chdir(TINY.parent)
    with pytest.raises(UserError, match="reward") as error:
        Reward(text)
    assert re.search(complaint, str(error.value)) and "\n" not in str(error.value)


def test_long_expressions_and_large_numbers_have_a_value():
    assert Reward("+".join(["brightness"] * 101))(grey(0.01), ["", ""]).tolist() == pytest.approx(
        [101] * 2
    )
    assert Reward("-" * 100 + "brightness")(grey(0.01), ["", ""]).tolist() == pytest.approx([1, 1])
    assert Reward("1" + "0" * 22 + "*brightness")(grey(0.01), ["", ""]).tolist() == pytest.approx(
        [1e22] * 2
    )


@pytest.mark.parametrize(
    "numbers", ["[0, 3]", "(False, 3)", "torch.tensor([0, 3])", "torch.tensor([0, 3]).to_sparse()"]
)
def test_numbers_come_in_many_forms(tmp_path, numbers):
    (tmp_path / "mine.py").write_text(
        f"import torch\n\ndef f(images, prompts):\n    return {numbers}\n"
    )
    assert Reward(f"2*{tmp_path}/mine.py:f")(grey(0.5), ["", ""]).tolist() == [0, 6]


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("raise KeyError('gone')", "raised KeyError: 'gone'"),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})", "raised Mute: Mute"),
        ("import sys; sys.exit(3)", "raised SystemExit: 3"),
        ("return f(images, prompts)", "raised RecursionError"),
        ("return images.mean()", "[2] numbers"),
        ("return ['a', 'b']", "must return numbers"),
        ("return None", "must return numbers"),
        ("return [10**400, 0]", "must return numbers"),
    ],
)
def test_bad_rewards_are_named(tmp_path, body, complaint):
    (tmp_path / "bad.py").write_text(f"def f(images, prompts):\n    {body}\n")
    with pytest.raises(UserError) as error:
        Reward(f"{tmp_path}/bad.py:f")(grey(0.5), ["", ""])
    assert (
        "bad.py:f" in str(error.value)
        and complaint in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize("what", ["reward", "estimator"])
def test_files_that_fail_are_named(tmp_path, what):
    for text, complaint in (
        ("import sys\nsys.exit(3)", "raised SystemExit: 3"),
        ("import sys\nsys.exit()", "raised SystemExit"),
        ("raise ValueError('no\\nluck')", "raised ValueError: no"),
        ("def f(:", "raised SyntaxError"),
        ("import no_such_module", "raised ModuleNotFoundError"),
        ("f = 3", "has no function f"),
    ):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(UserError, match=f"^{what} {tmp_path}/bad.py:f: .*{complaint}") as error:
            load_function(what, f"{tmp_path}/bad.py:f")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"^{what} none.py:f: there is no file none.py"):
        load_function(what, "none.py:f")


def test_a_reward_file_is_a_whole_module(tmp_path, monkeypatch):
    """It imports neighbours when it loads and when it is called, and has dataclasses and pickles them."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mailbox", raising=False)
    folder = tmp_path / "my rewards"
    folder.mkdir()
    (folder / "neighbour_at_once.py").write_text("ONE = 1.0\n")
    (folder / "neighbour_later.py").write_text("TWO = 2.0\n")
    (folder / "mailbox.py").write_text("raise ValueError('in place of the library')\n")
    (folder / "mine.py").write_text(
        "from __future__ import annotations\n"
        "import pickle, mailbox\n"
        "from dataclasses import dataclass\n"
        "from neighbour_at_once import ONE\n"
        "@dataclass\n"
        "class Pair:\n"
        "    a: float = ONE\n"
        "    b: float = 0.0\n"
        "def f(images, prompts):\n"
        "    from neighbour_later import TWO\n"
        "    pair = pickle.loads(pickle.dumps(Pair(b=TWO)))\n"
        "    return [pair.a, pair.b]\n"
        "def g(images, prompts):\n"
        "    return f(images, prompts)\n"
    )
    term = f'"{folder}/mine.py":f'
    reward = Reward(f'2*({term} + "{folder}/mine.py":g)-brightness')
    assert list(reward.terms) == [term, f'"{folder}/mine.py":g', "brightness"]
    assert reward(grey(0.0), ["", ""]).tolist() == [4, 8]
    pair = load_function("estimator", f"{folder}/mine.py:Pair")(
        3.0
    )  # a path by itself may be without quotes
    assert pickle.loads(pickle.dumps(pair)) == pair


def test_a_reward_cannot_change_what_others_see(tmp_path):
    (tmp_path / "spoil.py").write_text(
        "def f(images, prompts):\n    images.zero_()\n    prompts[:] = ['', '']\n    return [0.0, 0.0]\n"
    )
    images, prompts = torch.rand(2, 3, 64, 64), ["red apple", "robot"]
    before, expected = images.clone(), Reward("clip")(images.clone(), prompts)
    for text in (f"{tmp_path}/spoil.py:f + clip", f"clip + {tmp_path}/spoil.py:f"):
        torch.testing.assert_close(Reward(text)(images, prompts), expected)
    assert images.equal(before) and prompts == ["red apple", "robot"]


def test_infinite_rewards_become_nan(tmp_path):
    (tmp_path / "inf.py").write_text("def f(images, prompts):\n    return [1.0, float('inf')]\n")
    R = Reward(f"2*{tmp_path}/inf.py:f")(grey(0.5), ["", ""])
    assert R[0] == 2 and R[1].isnan()
