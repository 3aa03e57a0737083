"""The suite as a user runs it: interrupted, with refusals; its subjects, its sides, its loss."""

import argparse
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from comfy_home import PACK_ROOT
from slipstream.bench import draw, offload_models, suite, suite_measure, suite_peers, variants
from slipstream.bench.demo_models import WEIGHTS
from slipstream.bench.flow_model import GUIDANCE, NO_CLASS
from slipstream.bench.paired import AGAIN, BASELINE, SLOWER
from slipstream.bench.subjects import WAN_BLOCKS, trained_subject, wan_subject
from slipstream.bench.subjects_gpu import FULL_WIDTH
from slipstream.bench.train_demo import _LABEL_DROP, draw_sigmas
from slipstream.bench.trained import CLOCKS, TrainedModel

TIMEOUT_S = 300


@pytest.fixture(scope="module")
def demo(comfy):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield TrainedModel(clock=CLOCKS["cpu"])
    torch.set_num_threads(before)


class Bar:
    def reset(self, total):
        self.left = total

    def update(self, num=1):
        self.left -= num

    def set_description(self, text):
        self.text = text


def chosen(*names):
    found = [variant for variant in variants.variants(clock="cpu") if variant.name in names]
    assert len(found) == len(names)
    return found


# --- one round


def test_a_round_of_the_suite(demo):
    """Two sides, one round each, as the suite measures them."""
    bar = Bar()
    sides = chosen("attention, exact", "cache, scm")
    found = suite.measure(trained_subject(demo, size=64, num_steps=8), sides, 2, bar)
    assert bar.left == 0
    assert [side["name"] for side in found["sides"]] == [
        BASELINE,
        AGAIN,
        "attention, exact",
        "cache, scm",
    ]
    assert [side["identical"] for side in found["sides"]] == [True, True, True, False]
    assert len(found["sides"][0]["denoise_steps_ms"]) == 8


# --- interrupting


def test_ctrl_c_keeps_what_is_finished(comfy, tmp_path):
    """A real run and a real SIGINT, while its second subject is on."""
    command = [sys.executable, "bench", "suite", "--quick", "--only", "LazyCache"]
    command += ["--threads", "1", "--clock", "cpu", "--out", str(tmp_path)]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        command, cwd=PACK_ROOT, stdout=log, stderr=log,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored behind an "&"
    )  # fmt: skip
    saved, end = tmp_path / "suite-quick.json", time.monotonic() + TIMEOUT_S
    while not saved.is_file() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130, (tmp_path / "log").read_text()[-2000:]
    log.close()
    found = json.loads(saved.read_text("utf-8"))
    first = found["subjects"][0]
    assert first["name"] == "trained Flux, 64 x 64"
    assert first["num_rounds"] == 10
    assert {side["name"] for side in first["sides"]} == {"plain", "plain again", "LazyCache"}
    assert "of 3 subjects measured" in found["interrupted"]
    page = (tmp_path / "suite-quick.md").read_text("utf-8")
    assert f"**Partial**: {found['interrupted']}." in page
    assert "| LazyCache | core |" in page
    assert "Traceback" not in (tmp_path / "log").read_text()


# --- sides


def test_a_technique_that_loses_is_slower_and_a_refusal_is_no_failure(demo):
    """SVDQuant on a CPU loses many times over; two front blocks too many are refused by us."""
    subject = trained_subject(demo, size=64, num_steps=4)

    def refused(subject):
        from slipstream.backends.cache.config import CacheConfig

        return variants.apply_cache(subject.model, CacheConfig(front_blocks=10))

    def broken(subject):
        raise RuntimeError("a kernel that does not start")

    more = [
        variants.Variant("too many blocks", variants.OURS, "cache", refused),
        variants.Variant("a broken one", variants.OURS, "cache", broken),
    ]
    sides = [*chosen("SVDQuant int4, dequant", "MultiGPU CFG Split"), *more]
    found = suite_measure.measure(subject, sides, 3, Bar())
    rows = {side["name"]: side for side in found["sides"]}
    assert rows["SVDQuant int4, dequant"]["verdict"] == SLOWER
    assert rows["SVDQuant int4, dequant"]["psnr_db"] > 20
    assert "leave nothing to skip" in found["not_measured"]["too many blocks"]
    assert found["failed"] == {"a broken one": "RuntimeError: a kernel that does not start"}
    if torch.cuda.device_count() < 2:
        assert "two GPUs" in found["not_measured"]["MultiGPU CFG Split"]


def test_sequence_parallel_is_measured_in_process(demo):
    """By the wall: this process's clock does not see the other rank."""
    subject = trained_subject(demo, size=64, num_steps=2)
    wall = [v for v in variants.variants(clock="wall") if v.technique == "parallel"]
    try:
        found = suite_measure.measure(subject, wall, 1, Bar())
    finally:
        suite._stop_workers()
    row = next(side for side in found["sides"] if side["name"] == "Sequence Parallel, two ranks")
    assert row["latent_rel_l2"] < 1e-5
    assert torch.get_num_threads() == 1
    cpu = suite_measure.measure(subject, chosen("Sequence Parallel, two ranks"), 1, Bar())
    assert "--clock wall" in cpu["not_measured"]["Sequence Parallel, two ranks"]


def test_other_packs_are_named_when_they_are_not_there(tmp_path):
    options = argparse.Namespace(only="")
    part = {"name": "a model", "sides": [], "not_measured": {}, "failed": {}}
    suite_peers.add(part, 0, tmp_path, options, Bar())
    assert part["not_measured"].keys() == suite_peers.PEERS.keys()
    assert all("custom_nodes" in reason for reason in part["not_measured"].values())


def test_a_pack_runs_beside_plain_and_its_row_is_taken_over(demo, tmp_path, monkeypatch, capsys):
    """A stand-in for a pack whose node halves the latent: measured, shown as different."""
    name = "chengzeyi/Comfy-WaveSpeed, 0.12"
    pack = tmp_path / suite_peers.PEERS[name]
    pack.mkdir()
    (pack / "__init__.py").write_text(
        "class Node:\n"
        "    def patch(self, model, target, threshold):\n"
        "        clone = model.clone()\n"
        "        clone.set_model_sampler_post_cfg_function(lambda args: args['denoised'] * 0.5)\n"
        "        return (clone,)\n"
        "NODE_CLASS_MAPPINGS = {'ApplyFBCacheOnModel': Node}\n"
    )
    monkeypatch.setitem(sys.modules, "Comfy_WaveSpeed", None)  # removed again behind the test
    planned = (lambda: trained_subject(demo, size=64, num_steps=2), 1)
    suite_peers.child(name, planned, tmp_path, Bar(), {"environment": {}})
    said = capsys.readouterr().out
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=said, stderr="")

    monkeypatch.setattr(suite_peers.subprocess, "run", run)
    options = argparse.Namespace(only="WaveSpeed", threads=1, clock="cpu", quick=True)
    part = {"name": "a model", "sides": [], "not_measured": {}, "failed": {}}
    suite_peers.add(part, 0, tmp_path, options, Bar())
    assert [(side["name"], side["owner"]) for side in part["sides"]] == [(name, suite_peers.OWNER)]
    assert not part["sides"][0]["identical"]
    assert "a process of its own" in part["sides"][0]["about"]
    assert ["--peer", name] == commands[0][4:6]


def test_a_pack_that_breaks_is_a_row_too(demo, tmp_path, capsys):
    planned = (lambda: trained_subject(demo, size=64, num_steps=2), 1)
    name = "welltop-cn/ComfyUI-TeaCache"
    suite_peers.child(name, planned, tmp_path, Bar(), {"environment": {}})
    line = capsys.readouterr().out.splitlines()[-1]
    failed = json.loads(line[len(suite_peers.MARK) :])["failed"]
    assert failed[name].startswith("FileNotFoundError")


# --- subjects


def test_caches_have_something_to_skip_in_the_small_wan(demo, tmp_path):
    subject = wan_subject(demo, tmp_path, num_steps=6)
    assert len(subject.model.model.diffusion_model.blocks) == WAN_BLOCKS
    found = suite_measure.measure(subject, chosen("Cache-DiT, quality"), 1, Bar())
    assert found["failed"] == found["not_measured"] == {}


@pytest.mark.parametrize(
    ("model", "kind", "least", "most"),
    [
        ("flux", "Flux", 11.8e9, 12.0e9),
        ("wan", "WAN21_T2V", 7.2e9, 7.3e9),  # half of 14B: 20 of 40 blocks
        ("wan-video", "WAN21_T2V", 3.7e9, 3.8e9),  # a quarter: 10 of 40 blocks
        ("qwen", "QwenImage", 6.8e9, 6.9e9),  # a third of 20B
        ("sdxl", "SDXL", 2.56e9, 2.57e9),
    ],
)
def test_models_of_full_width_are_what_comfyui_takes_them_for(comfy, model, kind, least, most):
    """On the meta device: shapes only. Sampling them needs a GPU and is unverified."""
    from comfy.model_detection import model_config_from_unet

    network, sizes, text = offload_models.PARTS[model]()
    weights = network.state_dict()
    assert {value.device.type for value in weights.values()} == {"meta"}
    assert least <= sum(value.numel() for value in weights.values()) <= most
    assert type(model_config_from_unet(weights, "")).__name__ == kind
    one = next(full for full in FULL_WIDTH if full.model == model)
    assert sizes[one.size][1] in (4, 16)
    assert text()[0][0].ndim == 3


def test_full_width_is_planned_on_a_gpu_only(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(suite.plan(demo, tmp_path, quick=True)) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(suite.plan(demo, tmp_path, quick=True)) == 3 + len(FULL_WIDTH)


# --- the trained model


@pytest.mark.full
def test_the_loss_through_comfyui_is_the_one_that_training_recorded(demo):
    """apply_model of the shipped weights on pictures that were never trained on, within 3 %."""
    recorded = json.loads((WEIGHTS / "training.json").read_text("utf-8"))["flow"]["loss"]
    generator = torch.Generator().manual_seed(99)
    pictures, labels = draw.batch(250, generator)
    labels = labels.repeat(4)  # every picture with four noises, at four sigmas
    labels[torch.rand(len(labels), generator=generator) < _LABEL_DROP] = NO_CLASS
    model = demo.model.model
    with torch.inference_mode():
        stored = [demo.vae.encode(some) for some in pictures.movedim(1, -1).split(50)]
        clean = model.latent_format.process_in(torch.cat(stored)).repeat(4, 1, 1, 1)
        noise, sigmas = torch.randn(clean.shape, generator=generator), draw_sigmas(1000, generator)
        loss = flow_loss(demo, clean, noise, sigmas, labels)
        some = [values[:200] for values in (clean, noise, sigmas)]
        right = flow_loss(demo, *some, labels[:200])
        wrong = flow_loss(demo, *some, (labels[:200] + 1) % NO_CLASS)
    assert loss == pytest.approx(recorded, rel=0.03)
    assert wrong > 1.03 * right, "the check cannot fail"


def flow_loss(demo, clean, noise, sigmas, labels):
    """Mean squared error of the velocity, in batches of 100."""
    sigma, total = sigmas[:, None, None, None], 0.0
    noisy = sigma * noise + (1 - sigma) * clean
    for rows in torch.arange(len(clean)).split(100):
        denoised = demo.model.model.apply_model(
            noisy[rows], sigmas[rows], c_crossattn=demo.context[labels[rows]],
            y=demo.pooled[labels[rows]], guidance=torch.full((len(rows),), GUIDANCE),
            transformer_options={},
        )  # fmt: skip
        velocity = (noisy[rows] - denoised) / sigma[rows]
        total += (velocity - (noise[rows] - clean[rows])).square().sum().item()
    return total / clean.numel()


def test_both_forms_of_the_vae_are_equal(demo, tmp_path):
    """The shipped file in models/vae, and its halves in models/vae_approx as "taef1"."""
    import folder_paths
    from safetensors.torch import load_file, save_file

    weights = load_file(WEIGHTS / "slipstream_demo_vae.safetensors")
    for half in ("encoder", "decoder"):
        own = {k.split(".", 1)[1]: v for k, v in weights.items() if k.startswith(f"taesd_{half}.")}
        assert own
        save_file(own, tmp_path / f"taef1_{half}.safetensors")
    before = list(folder_paths.folder_names_and_paths["vae_approx"][0])
    folder_paths.folder_names_and_paths["vae_approx"][0][:] = [str(tmp_path)]
    try:
        folder_paths.filename_list_cache.pop("vae_approx", None)
        halves = demo.loaders.VAELoader().load_vae("taef1")[0]
    finally:
        folder_paths.folder_names_and_paths["vae_approx"][0][:] = before
        folder_paths.filename_list_cache.pop("vae_approx", None)
    pictures, _ = draw.batch(8, torch.Generator().manual_seed(3))
    with torch.inference_mode():
        pixels = pictures.movedim(1, -1)
        latents = demo.vae.encode(pixels)
        for one, other in (
            (halves.encode(pixels), latents),
            (halves.decode(latents), demo.vae.decode(latents)),
        ):  # not bit for bit: the file holds scale and shift in 16 bits
            assert (one - other).norm() < 2e-4 * other.norm()
        assert (halves.decode(1.01 * latents) - other).norm() > 2e-4 * other.norm()
