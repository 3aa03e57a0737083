"""Train the demo model, from pictures that this script draws: autoencoder, judge, flow.

    python bench train_demo FOLDER [--threads 2] [--flow-steps N] [--stages ...]

FOLDER gets the files of bench/demo_weights and, while a stage is on its way, its checkpoint: the
same command takes an interrupted training up again. Seeds are fixed and lengths are in steps. Needs
a ComfyUI (the flow is its own Flux class) and tqdm; nothing is downloaded.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from . import draw
from .autoencoder import ACTIVE, LATENT, Autoencoder, taesd_weights
from .demo_models import CLASS_VECTORS, FLUX, VAE
from .flow_model import NO_CLASS, SIGMA_SHIFT, ClassFlow
from .in_process import use_comfyui
from .judge import Classifier, is_right, load_classifier, psnr
from .training import Schedule, Training

CLASSIFIER = "slipstream_demo_classifier.safetensors"
_AUTOENCODER = "autoencoder.safetensors"  # fp32 and narrow: for the stages after it, not shipped
_LATENTS = "latents.safetensors"
_LABEL_DROP = 0.1
_LATENT_NOISE = 0.1  # the decoder must forgive what the flow gets a little wrong
_TEST_SEED = 3


def train_autoencoder(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Pictures to latents and back; what it leaves is the encoder, the decoder trains on."""
    torch.manual_seed(1)
    net = Autoencoder().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = options.autoencoder_steps
    schedule = Schedule(num_steps=steps, learning_rate=2.5e-3, seed=1, weight_decay=1e-4)

    def loss(generator: torch.Generator) -> Tensor:
        pictures = draw.batch(32, generator)[0].contiguous(memory_format=torch.channels_last)
        with fast():
            return reconstruction(net, net.encode(pictures), pictures, generator)

    training = Training(net, schedule, folder / "autoencoder.checkpoint")
    training.run(loss, label="autoencoder")
    save(net.state_dict(), folder / _AUTOENCODER)
    return {"steps": steps, "seconds": training.spent_s, "psnr_db": check_autoencoder(folder)}


def train_decoder(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The decoder alone, further: latents stay as they are, so the flow can train beside it."""
    net = load_autoencoder(folder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = options.decoder_steps
    schedule = Schedule(num_steps=steps, learning_rate=1.5e-3, seed=7, weight_decay=1e-4, ema=0.99)

    def loss(generator: torch.Generator) -> Tensor:
        pictures = draw.batch(32, generator)[0].contiguous(memory_format=torch.channels_last)
        with fast():
            with torch.no_grad():
                latents = net.encode(pictures)
            return reconstruction(net, latents, pictures, generator)

    training = Training(net.decoder, schedule, folder / "decoder.checkpoint")
    training.run(loss, label="decoder")
    save(net.state_dict(), folder / _AUTOENCODER)
    half = {key: value.half() for key, value in taesd_weights(net).items()}
    scale = {key: half[key].float() for key in ("vae_scale", "vae_shift")}
    save(half | scale, folder / VAE)
    return {"steps": steps, "seconds": training.spent_s, "psnr_db": check_autoencoder(folder)}


def reconstruction(
    net: Autoencoder, latents: Tensor, pictures: Tensor, generator: torch.Generator
) -> Tensor:
    """Loss of the pictures decoded from slightly noisy latents; edges count extra."""
    noise = _LATENT_NOISE * torch.randn(latents.shape, generator=generator)
    decoded = net.decode(latents + noise).float()
    edges = sum((decoded.diff(dim=d) - pictures.diff(dim=d)).abs().mean() for d in (2, 3))
    return (decoded - pictures).abs().mean() + 0.5 * edges + 2 * mse_loss(decoded, pictures)


def check_autoencoder(folder: Path) -> float:
    """dB on pictures that it was not trained on; draws autoencoder.png."""
    net = load_autoencoder(folder)
    pictures, _ = draw.batch(100, torch.Generator().manual_seed(_TEST_SEED))
    with torch.no_grad():
        decoded = net.decode(net.encode(pictures)).clamp(0, 1)
    draw.save_sheet(
        torch.cat([pictures[:20], decoded[:20]]), folder / "autoencoder.png", columns=20
    )
    return psnr(decoded, pictures).mean().item()


def train_classifier(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The judge; it sees drawn pictures and, as many, decoded ones."""
    torch.manual_seed(2)
    autoencoder, net = load_autoencoder(folder), Classifier()
    steps = options.classifier_steps
    schedule = Schedule(num_steps=steps, learning_rate=3e-3, seed=2, num_warmup_steps=20)

    def loss(generator: torch.Generator) -> Tensor:
        pictures, labels = draw.batch(96, generator)
        with torch.no_grad(), fast():
            latents = autoencoder.encode(pictures[:48])
            latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
            pictures[:48] = autoencoder.decode(latents).float().clamp(0, 1)
        strength = 0.08 * torch.rand(96, 1, 1, 1, generator=generator)
        noise = torch.randn(pictures.shape, generator=generator)
        return cross_entropy(net((pictures + strength * noise).clamp(0, 1)), labels)

    training = Training(net, schedule, folder / "classifier.checkpoint")
    training.run(loss, label="classifier")
    net.eval()
    save(
        {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()},
        folder / CLASSIFIER,
    )
    pictures, labels = draw.batch(2000, torch.Generator().manual_seed(_TEST_SEED))
    with torch.no_grad():
        parts = pictures.split(200)
        decoded = torch.cat([autoencoder.decode(autoencoder.encode(p)).clamp(0, 1) for p in parts])
    judge = load_classifier(folder / CLASSIFIER)
    return {
        "steps": steps,
        "seconds": training.spent_s,
        "accuracy_drawn": is_right(judge, pictures, labels).float().mean().item(),
        "accuracy_decoded": is_right(judge, decoded, labels).float().mean().item(),
    }


def make_latents(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The flow's data set: latents of drawn pictures, made once."""
    from tqdm import tqdm

    autoencoder, generator = load_autoencoder(folder), torch.Generator().manual_seed(4)
    started, latents, labels = time.monotonic(), [], []
    with torch.no_grad():
        for _ in tqdm(range(options.num_pictures // 200), desc="latents", mininterval=5):
            pictures, chosen = draw.batch(200, generator)
            latents.append(autoencoder.encode(pictures).half())
            labels.append(chosen)
    save({"latents": torch.cat(latents), "labels": torch.cat(labels)}, folder / _LATENTS)
    return {"num_pictures": options.num_pictures, "seconds": time.monotonic() - started}


def train_flow(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The diffusion model and the vectors of the classes."""
    from safetensors.torch import load_file

    drawn = load_file(folder / _LATENTS)
    latents, labels = drawn["latents"].float(), drawn["labels"]
    net, size = ClassFlow(seed=5), options.flow_batch
    schedule = Schedule(
        num_steps=options.flow_steps,
        learning_rate=1.5e-3,
        seed=6,
        betas=(0.9, 0.98),
        ema=0.999,
        checkpoint_every=1000,
    )

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(0, len(latents), (size,), generator=generator)
        chosen = labels[rows].clone()
        chosen[torch.rand(size, generator=generator) < _LABEL_DROP] = NO_CLASS
        clean = torch.zeros(size, LATENT, *latents.shape[2:])
        clean[:, :ACTIVE] = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = draw_sigmas(size, generator)
        sigma = sigmas[:, None, None, None]
        with fast():
            velocity = net(sigma * noise + (1 - sigma) * clean, sigmas, chosen)
        return mse_loss(velocity.float(), noise - clean)

    training = Training(net, schedule, folder / "flow.checkpoint")
    training.run(loss, label="flow", at_checkpoint=lambda: save_flow(training, net, folder))
    save_flow(training, net, folder)
    return {
        "steps": options.flow_steps,
        "schedules": "; ".join(f"from step {a} that of {b} steps" for a, b in training.lengths),
        "batch": size,
        "seconds": training.spent_s,
        "loss": training.loss,
        "parameters": sum(value.numel() for value in net.flux.parameters()),
    }


def draw_sigmas(num: int, generator: torch.Generator) -> Tensor:
    """[num] in (0, 1), half uniform and half logit-normal, shifted up as the sampler's are."""
    uniform = torch.rand(num, generator=generator)
    normal = torch.sigmoid(torch.randn(num, generator=generator))
    even = torch.where(torch.rand(num, generator=generator) < 0.5, uniform, normal)
    return (SIGMA_SHIFT * even / (1 + (SIGMA_SHIFT - 1) * even)).clamp(1e-3, 1)


def save_flow(training: Training, net: ClassFlow, folder: Path) -> None:
    """Write the averaged weights as the two files that are shipped."""
    average = training.average
    flux = {key[5:]: value.half() for key, value in average.items() if key.startswith("flux.")}
    save(flux, folder / FLUX)
    save({key: average[key] for key in ("context", "pooled")}, folder / CLASS_VECTORS)


def load_autoencoder(folder: Path) -> Autoencoder:
    """The narrow one of the first stage, in evaluation."""
    from safetensors.torch import load_file

    net = Autoencoder()
    net.load_state_dict(load_file(folder / _AUTOENCODER))
    return net.eval()


def save(weights: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, whole or not there."""
    from safetensors.torch import save_file

    unfinished = path.with_suffix(".part")
    save_file({key: value.detach().contiguous() for key, value in weights.items()}, unfinished)
    unfinished.replace(path)


def fast() -> contextlib.AbstractContextManager[object]:
    """bfloat16 where the CPU multiplies it in hardware, else nothing."""
    if torch.cpu._is_amx_tile_supported():
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


STAGES: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "autoencoder": train_autoencoder,
    "latents": make_latents,
    "flow": train_flow,
    "decoder": train_decoder,
    "classifier": train_classifier,
}


def recorded(record: Path) -> dict[str, dict[str, Any]]:
    """What each stage that is done has measured."""
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--autoencoder-steps", type=int, default=2000)
    parser.add_argument("--decoder-steps", type=int, default=2500)
    parser.add_argument("--classifier-steps", type=int, default=250)
    parser.add_argument("--num-pictures", type=int, default=40_000)
    parser.add_argument("--flow-steps", type=int, default=4_000)
    parser.add_argument("--flow-batch", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    record = options.folder / "training.json"
    done = recorded(record)
    print("".join(f"{stage}: done before\n" for stage in options.stages if stage in done), end="")
    missing = [stage for stage in options.stages if stage not in done]
    if missing:
        use_comfyui()
    for stage in missing:
        measured = STAGES[stage](options.folder, options)
        found = recorded(record) | {stage: measured}  # read again: flow and decoder may run at once
        record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"{stage}: {json.dumps(measured)}", flush=True)
    return 0
