"""Build the tiny models from emoji pictures: pipeline (tokenizer, VAE, flow), two CLIPs, aesthetic.

    npm install unicode-emoji-json @iconify-json/fluent-emoji-flat \\
        emoji-datasource-google emoji-datasource-twitter
    pip install resvg_py
    for stage in data tokenizer vae flow clip aesthetic clip_h; do
        python tiny/build.py $stage --out build
    done

It wants a GPU; on a CPU give --steps 5 to see that everything runs. Stages read what earlier ones
wrote to --out. --data takes any .npz with images [N, 64, 64, 3] uint8, concept [N] and style [N]
(indices into the lists of names `concepts` and `styles`), so that you can train on pictures of your
own.
"""

import argparse
import io
import json
import math
import random
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from tqdm import trange

MAX_TOKENS, PAD_TOKENS = 16, 8
STEPS = {"vae": 2800, "flow": 6500, "clip": 3200, "aesthetic": 4000, "clip_h": 1200}
BATCH = {"vae": 192, "flow": 1024, "clip": 1024, "aesthetic": 512, "clip_h": 256}


# ---- pictures


def on_white(picture):
    """A PIL picture as uint8 [64, 64, 3] on white."""
    picture = picture.convert("RGBA").resize((64, 64), Image.Resampling.LANCZOS)
    return np.asarray(
        Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    )


def png_reader(folder):
    """A function from an emoji's code, as 1f34e, to its picture or None."""
    files = {path.stem.replace("-fe0f", ""): path for path in Path(folder).glob("*.png")}
    return lambda code: on_white(Image.open(files[code])) if code in files else None


def svg_reader(folder):
    """The same for the icons of an iconify package."""
    import resvg_py

    icons = json.loads((Path(folder) / "icons.json").read_text())
    names = json.loads((Path(folder) / "chars.json").read_text())
    names = {code.replace("-fe0f", ""): name for code, name in names.items()}

    def read(code):
        name = names.get(code)
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if name not in icons["icons"]:
            return None
        icon = {
            "width": icons.get("width", 32),
            "height": icons.get("height", 32),
            **icons["icons"][name],
        }
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {spaces} viewBox="0 0 {icon["width"]} {icon["height"]}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)
        return on_white(Image.open(io.BytesIO(bytes(png))))

    return read


# Unicode's groups, less what is text or comes in many near copies; of symbols a few plain shapes
GROUPS = "Smileys & Emotion,People & Body,Animals & Nature,Food & Drink,Travel & Places"
GROUPS = f"{GROUPS},Activities,Objects".split(",")
SHAPES = re.compile(
    r"^(red|orange|yellow|green|blue|purple|brown|black) (circle|square)$"
    r"|^(large|small) (orange|blue) diamond$"
    r"|^(yin yang|peace symbol|recycling symbol|radioactive|biohazard|warning|no entry|check mark)$"
)
SKIP = re.compile(
    r"o.clock|-thirty|^family|^kiss (wo)?man|^couple with heart |facing right|^input |button$"
    r"|holding hands|^page |^white large|^middle finger$"
    r"|^(on|soon|top|back|end) |^((wo)?man|(wo)?men) "
)


def build_data(args):
    """Collect up to three renderings of each emoji; hold a tenth of the names out."""
    readers = {
        "noto": png_reader(args.npm / "emoji-datasource-google/img/google/64"),
        "twemoji": png_reader(args.npm / "emoji-datasource-twitter/img/twitter/64"),
        "fluent": svg_reader(args.npm / "@iconify-json/fluent-emoji-flat"),
    }
    images, concept, style, names = [], [], [], []
    table = json.loads((args.npm / "unicode-emoji-json/data-by-emoji.json").read_text())
    for emoji, entry in table.items():
        name = re.sub("[“”]", "", entry["name"].lower().replace("’", "'"))
        if not SHAPES.match(name) and (entry["group"] not in GROUPS or SKIP.search(name)):
            continue
        code = "-".join(f"{ord(c):x}" for c in emoji if c != "\ufe0f")
        found = [
            (s, picture)
            for s, read in enumerate(readers.values())
            if (picture := read(code)) is not None
        ]
        if len(found) >= 2:
            images += [picture for _, picture in found]
            style += [s for s, _ in found]
            concept += [len(names)] * len(found)
            names.append(name)
    np.savez_compressed(
        args.data, images=images, concept=concept, style=style, concepts=names, styles=list(readers)
    )
    held_out = set(random.Random(0).sample(names, len(names) // 10))
    for file, chosen in (
        ("train", [n for n in names if n not in held_out]),
        ("test", sorted(held_out)),
    ):
        (args.out / f"prompts_{file}.txt").write_text("".join(f"{name}\n" for name in chosen))


class Data:
    """The pictures and their captions on the device."""

    def __init__(self, args):
        file = np.load(args.data)
        self.images = torch.from_numpy(file["images"]).to(args.device).permute(0, 3, 1, 2)
        self.concept = torch.from_numpy(file["concept"].astype(np.int64)).to(args.device)
        self.style = torch.from_numpy(file["style"].astype(np.int64)).to(args.device)
        self.concepts, self.styles = file["concepts"].tolist(), file["styles"].tolist()

    def pixels(self, index):
        """Images [n, 3, 64, 64] in [-1, 1], shifted by up to two pixels over the white border."""
        x = F.pad(self.images[index] / 127.5 - 1, (2, 2, 2, 2), value=1.0)
        i, j = torch.randint(5, (2,)).tolist()
        return x[:, :, i : i + 64, j : j + 64]

    def draw(self, n):
        """Random indices of n pictures."""
        return torch.randint(len(self.images), (n,), device=self.images.device)

    def captions(self, index, tokenizer):
        """Token ids [n, 16] of the names, two in five with their style: "red apple, noto"."""
        names = [self.concepts[c] for c in self.concept[index]]
        styles = [f", {self.styles[s]}" if random.random() < 0.4 else "" for s in self.style[index]]
        return tokenize(tokenizer, [name + s for name, s in zip(names, styles)]).to(
            self.images.device
        )


def tokenize(tokenizer, texts):
    options = dict(
        padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    return tokenizer(texts, **options).input_ids


# ---- training


def train(name, args, parameters, lr, loss_of, weight_decay=0.01):
    """AdamW with warm-up and cosine decay on loss_of(batch size); leaves their moving average."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = [p.detach().clone() for p in parameters]
    steps = args.steps or STEPS[name]
    for step in (bar := trange(steps, desc=name)):
        scale = min(1, (step + 1) / 300) * (
            0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        optimizer.param_groups[0]["lr"] = lr * scale
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = loss_of(args.batch or BATCH[name])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.9995, (step + 1) / (step + 11)))
        bar.set_postfix(loss=f"{loss.item():.3f}")
    for p, mean in zip(parameters, average):
        p.data.copy_(mean)


def save_half(model, folder):
    """Save float16 weights with a configuration that says float32, in which they are loaded."""
    model.half().save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


def build_tokenizer(args):
    """A byte-level BPE in CLIP's form whose 2,048 tokens come from the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    data = Data(args)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level])
    options = dict(
        vocab_size=2048, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(data.concepts * 2 + data.styles * 50, trainers.BpeTrainer(**options))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    merges = merges[: 2048 - 2 * len(alphabet) - 2]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(merge) for merge in merges]
    vocabulary = {
        t: i for i, t in enumerate(dict.fromkeys(tokens + ["<|startoftext|>", "<|endoftext|>"]))
    }
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS
    )
    for folder in (args.out / "tiny-sd3" / "tokenizer", args.out / "tiny-sd3" / "tokenizer_2"):
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(
            str(folder)
        )  # vocab.json and merges.txt for older transformers


def load_tokenizer(args):
    return transformers.CLIPTokenizer.from_pretrained(args.out / "tiny-sd3" / "tokenizer")


def special_tokens(tokenizer):
    return {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }


def edges(x):
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def difference(x, y):
    """Mean absolute difference of pixels and of edges."""
    return F.l1_loss(x, y) + sum(F.l1_loss(a, b) for a, b in zip(edges(x), edges(y)))


def build_vae(args):
    """An 8-fold VAE with 16 latent channels, each of about unit variance."""
    data = Data(args)
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, sample_size=64, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[24, 48, 64, 64], norm_num_groups=8, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
    ).to(args.device)  # fmt: skip

    def loss_of(n):
        x = data.pixels(data.draw(n))
        x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
        posterior = vae.encode(x).latent_dist
        # a little more noise than the posterior's, so that the decoder forgives imperfect latents
        extra = 0.1 * torch.rand(n, 1, 1, 1, device=x.device) * posterior.mean.detach().std()
        y = vae.decode(posterior.sample() + extra * torch.randn_like(posterior.mean)).sample
        reconstruction = sum(
            difference(F.avg_pool2d(x, k), F.avg_pool2d(y, k)) / k for k in (1, 2, 4)
        )
        return reconstruction + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    train("vae", args, vae.parameters(), 2e-3, loss_of, weight_decay=0.0)
    with torch.no_grad():  # fold the spread of each channel into the weights on either side
        spread = encode(vae, data).std((0, 2, 3))
        vae.encoder.conv_out.weight[:16] /= spread.view(-1, 1, 1, 1)
        vae.encoder.conv_out.bias[:16] /= spread
        vae.encoder.conv_out.bias[16:] -= 2 * spread.log()
        vae.decoder.conv_in.weight *= spread.view(1, -1, 1, 1)
        z = encode(vae, data)
    vae.register_to_config(
        shift_factor=round(z.mean().item(), 5), scaling_factor=round(1 / z.std().item(), 5)
    )
    save_half(vae, args.out / "tiny-sd3" / "vae")


def encode(vae, data):
    """The latent means of all pictures [N, 16, 8, 8]."""
    parts = (data.images / 127.5 - 1).split(256)
    return torch.cat([vae.encode(part).latent_dist.mean for part in parts])


def load_vae(args):
    """The trained VAE, frozen."""
    vae = diffusers.AutoencoderKL.from_pretrained(
        args.out / "tiny-sd3" / "vae", dtype=torch.float32
    )
    return vae.to(args.device).eval().requires_grad_(False)


# ---- the flow


def build_flow(args):
    """Two CLIP text encoders and an SD3 transformer, trained together by flow matching."""
    data, vae, tokenizer = Data(args), load_vae(args), load_tokenizer(args)
    z = (encode(vae, data) - vae.config.shift_factor) * vae.config.scaling_factor
    encoders = nn.ModuleList()
    for width in (96, 64):
        config = transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
            projection_dim=128, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS, hidden_act="gelu",
            **special_tokens(tokenizer),
        )  # fmt: skip
        encoders.append(transformers.CLIPTextModelWithProjection(config))
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=16, out_channels=16, num_layers=6,
        num_attention_heads=4, attention_head_dim=32, joint_attention_dim=160,
        caption_projection_dim=128, pooled_projection_dim=256,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    for block in transformer.transformer_blocks:  # start as the identity (adaLN-zero)
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    encoders.to(args.device), transformer.to(args.device)

    def loss_of(n):
        index = data.draw(n)
        caption = data.captions(index, tokenizer)
        caption[torch.rand(n) < 0.1] = tokenize(tokenizer, [""]).to(args.device)  # for guidance
        outputs = [encoder(caption, output_hidden_states=True) for encoder in encoders]
        text = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        # the pipeline pads with zero tokens in place of a T5: any number of them should do
        text = F.pad(text, (0, 0, 0, random.choice([0, 1, 1, PAD_TOKENS, 64])))
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        # logit-normal times as in SD3, a quarter of them uniform for the ends
        t = torch.where(torch.rand(n) < 0.75, torch.randn(n).sigmoid(), torch.rand(n)).to(
            args.device
        )
        eps = torch.randn_like(z[index])
        x = (1 - t.view(-1, 1, 1, 1)) * z[index] + t.view(-1, 1, 1, 1) * eps
        v = transformer(
            x, timestep=1000 * t, encoder_hidden_states=text, pooled_projections=pooled
        ).sample
        return F.mse_loss(v.float(), eps - z[index])

    train("flow", args, [*encoders.parameters(), *transformer.parameters()], 1.5e-3, loss_of)
    folder = args.out / "tiny-sd3"
    save_half(transformer, folder / "transformer")
    save_half(encoders[0], folder / "text_encoder")
    save_half(encoders[1], folder / "text_encoder_2")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    shutil.copy(Path(__file__).parent / "tiny-sd3" / "model_index.json", folder)


# ---- the rewards


def damage(x, z, vae):
    """Damage pictures x [n, 3, 64, 64], each in its own way; return qualities, too.

    z, vae: their latents, to damage those as well, or None
    """
    n, s = len(x), torch.rand(len(x), device=x.device) ** 1.5
    b = s.view(-1, 1, 1, 1)
    coarse = F.interpolate(torch.rand(n, 1, 4, 4, device=x.device), size=8, mode="bilinear")
    decoded = []
    if vae is not None:
        latents = torch.stack(
            [(1 - b) * z + b * torch.randn_like(z), torch.where(coarse < b / 2, z.roll(1, 0), z)]
        )
        decoded = [
            vae.decode(latent / vae.config.scaling_factor + vae.config.shift_factor).sample
            for latent in latents
        ]

    small = F.interpolate(F.interpolate(x, size=12, mode="area"), size=64, mode="bicubic")
    hidden = F.interpolate(coarse, size=64, mode="bicubic") < b / 2
    wrong = [
        x,
        x + 0.7 * b * torch.randn_like(x),
        (1 - b) * x + b * small,
        (1 - b / 2) * x + b / 2 * x.roll(1, 0),
    ]
    wrong += [torch.where(hidden, 1.0, x), (1 - b) * x + b * x.mean(1, keepdim=True), *decoded]
    way = torch.randint(len(wrong), (n,), device=x.device)
    x = torch.stack(wrong)[way, torch.arange(n, device=x.device)].clamp(-1, 1)
    return x, torch.where(way == 0, 1.0, 1 - s)


def build_clip(args):
    """A CLIP to which a damaged picture fits its caption less: its score falls with quality."""
    train_clip("clip", args, "tiny-clip", width=128, layers=4, patch=8, vae=load_vae(args))


def build_clip_h(args):
    """A second such CLIP, to measure with and never to train on; it knows nothing of the VAE."""
    torch.manual_seed(1)
    random.seed(1)
    train_clip("clip_h", args, "tiny-clip-h", width=96, layers=3, patch=16, vae=None)


def train_clip(name, args, folder, width, layers, patch, vae):
    """Train a CLIP of one form and save it with what loads its texts and pictures."""
    data, tokenizer = Data(args), load_tokenizer(args)
    z = None
    if vae is not None:
        z = (encode(vae, data) - vae.config.shift_factor) * vae.config.scaling_factor
    text = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, projection_dim=128,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        **special_tokens(tokenizer),
    )  # fmt: skip
    vision = dict(
        hidden_size=width, intermediate_size=4 * width, projection_dim=128,
        num_hidden_layers=layers, num_attention_heads=4, image_size=64, patch_size=patch,
        hidden_act="gelu",
    )  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    clip = transformers.CLIPModel(config).to(args.device)
    head = make_head().to(args.device)  # keeps in the embedding what quality needs

    def loss_of(n):
        chosen = torch.randperm(len(data.concepts))[:n].tolist()  # each caption once
        index = torch.stack([random_member(data, c) for c in chosen])
        with torch.no_grad():
            x, quality = damage(data.pixels(index), None if z is None else z[index], vae)
        image = F.normalize(clip.get_image_features(x).pooler_output.float(), dim=-1)
        captions = data.captions(index, tokenizer)
        caption = F.normalize(clip.get_text_features(captions).pooler_output.float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=20) * image @ caption.T
        to_text, to_image = F.log_softmax(logits, 1), F.log_softmax(logits, 0).diagonal()
        soft = quality * to_text.diagonal() + (1 - quality) * to_text.mean(1)
        regression = F.mse_loss(head(image)[:, 0] / 10, quality)
        return -(soft.mean() + (quality * to_image).mean()) / 2 + 3 * regression

    parameters = [*clip.parameters(), *head.parameters()]
    train(name, args, parameters, 1e-3, loss_of, weight_decay=0.1)
    folder = args.out / folder
    if name == "clip_h":
        save_half(clip, folder)
    else:
        clip.save_pretrained(folder)
    shutil.copytree(args.out / "tiny-sd3" / "tokenizer", folder, dirs_exist_ok=True)
    size = {"height": 64, "width": 64}
    options = dict(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    transformers.CLIPImageProcessor(**options).save_pretrained(folder)


def random_member(data, concept):
    """The index of a random picture of a concept."""
    members = torch.where(data.concept == concept)[0]
    return members[random.randrange(len(members))]


def make_head():
    return nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 1))


def build_aesthetic(args):
    """A head over CLIP embeddings of real, damaged and generated pictures."""
    data, vae = Data(args), load_vae(args)
    z = (encode(vae, data) - vae.config.shift_factor) * vae.config.scaling_factor
    clip = transformers.CLIPModel.from_pretrained(args.out / "tiny-clip").to(args.device).eval()
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(args.out / "tiny-sd3", **absent).to(
        args.device
    )
    pipe.set_progress_bar_config(disable=True)
    pictures, quality = [], []
    with torch.no_grad():
        for _ in range(10):
            index = data.draw(args.batch or BATCH["aesthetic"])
            for x, q in (
                damage(data.pixels(index), z[index], vae),
                (data.pixels(index), torch.ones(len(index))),
            ):
                pictures.append(x)
                quality.append(q.to(args.device))
        for steps, guidance, q in (
            (2, 1, 0.15),
            (4, 1, 0.3),
            (10, 1, 0.45),
            (10, 2, 0.62),
            (16, 4, 0.75),
        ):
            names = random.sample(data.concepts, min(64, len(data.concepts)))
            options = dict(num_inference_steps=steps, guidance_scale=guidance, height=64, width=64)
            images = pipe(names, **options, max_sequence_length=1, output_type="pt").images
            pictures.append(2 * images - 1)
            quality.append(torch.full((len(names),), q, device=args.device))
        embeddings = torch.cat([clip.get_image_features(x).pooler_output for x in pictures])
        embeddings, labels = F.normalize(embeddings, dim=-1), 0.5 + 9 * torch.cat(quality)
    head = make_head().to(args.device)
    head[-1].bias.data.fill_(6.0)

    def loss_of(n):
        index = torch.randint(len(labels), (n,), device=args.device)
        return F.huber_loss(head(embeddings[index])[:, 0], labels[index], delta=2.0)

    train("aesthetic", args, head.parameters(), 3e-3, loss_of)
    (args.out / "tiny-aesthetic").mkdir(exist_ok=True)
    save_file(
        {k: w.cpu() for k, w in head.state_dict().items()},
        args.out / "tiny-aesthetic" / "model.safetensors",
    )


def main():
    stages = {
        "data": build_data, "tokenizer": build_tokenizer, "vae": build_vae, "flow": build_flow,
        "clip": build_clip, "aesthetic": build_aesthetic, "clip_h": build_clip_h,
    }  # fmt: skip
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=stages)
    parser.add_argument(
        "--out", type=Path, default="build", help="folder for the models (default build)"
    )
    parser.add_argument("--data", type=Path, help="the pictures (default OUT/data.npz)")
    parser.add_argument(
        "--npm", type=Path, default="node_modules", help="data: folder of the npm packages"
    )
    parser.add_argument("--steps", type=int, help=f"training steps (default {STEPS})")
    parser.add_argument("--batch", type=int, help=f"pictures a step (default {BATCH})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.data = args.data or args.out / "data.npz"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    random.seed(0)
    stages[args.stage](args)


if __name__ == "__main__":
    main()
