"""SlipstreamSequenceParallel through a real server's queue: parity, LoRA, ControlNet, other nodes'
patches, every fault with a good prompt behind it, a hundred prompts, the end of the server.
"""

import asyncio
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import queue_client
import tiny
import torch
from patience import patience
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")

WAN = "heads3/tiny_wan.safetensors"
PAIR, THREE, FOUR = "cpu,cpu", "cpu,cpu,cpu", "cpu,cpu,cpu,cpu"
seeds = iter(range(7000, 9000))  # ComfyUI answers equal prompts from its cache


@pytest.fixture(scope="module")
def files(models):
    """A Wan of three heads, LoRAs for it, and a ControlNet (XLabs layout) for the tiny Flux."""
    tiny.write(models / "diffusion_models" / "heads3", "wan", heads=3)
    wan = tiny.load("wan", heads=3)
    generator = torch.Generator().manual_seed(5)
    for number in (1, 2):
        weights = {}
        for key, value in wan.model.state_dict().items():
            if key.endswith("self_attn.q.weight"):
                name = key.removesuffix(".weight")
                for half, shape in (("A", (4, value.shape[1])), ("B", (value.shape[0], 4))):
                    random = torch.randn(shape, generator=generator) * 0.3
                    weights[f"{name}.lora_{half}.weight"] = random
        (models / "loras").mkdir(exist_ok=True)
        save_file(weights, models / "loras" / f"tiny_lora_{number}.safetensors")
    _write_controlnet(models / "controlnet")
    tiny.write(models / "diffusion_models", "sd15")
    return models


def _write_controlnet(folder):
    import comfy.ops
    from comfy.ldm.flux.controlnet import ControlNetFlux

    sizes = dict(tiny.load("flux").model.model_config.unet_config)
    for name in ("image_model", "dtype", "depth_single_blocks"):
        sizes.pop(name, None)
    network = ControlNetFlux(
        **sizes, depth_single_blocks=0, operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
    )  # fmt: skip
    weights = {  # the names that files have
        name.replace("key_norm.weight", "key_norm.scale").replace(
            "query_norm.weight", "query_norm.scale"
        ): value
        for name, value in tiny.fill(network, 3).items()
    }
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "tiny_controlnet.safetensors")


# --- prompts


def wan(*, tokens=8, negative=8, cfg=3.0, steps=3, model=("model", 0), sampler="euler", size=96):
    """A tiny Wan prompt whose latent is saved."""
    return {
        "model": node("UNETLoader", unet_name=WAN, weight_dtype="default"),
        "positive": node("SlipstreamTestConditioning", tokens=tokens, dim=768, seed=1),
        "negative": node("SlipstreamTestConditioning", tokens=negative, dim=768, seed=2),
        "latent": node("EmptyHunyuanLatentVideo", width=size, height=80, length=9, batch_size=1),
        "sampler": node(
            "KSampler", model=list(model), positive=["positive", 0], negative=["negative", 0],
            latent_image=["latent", 0], seed=0, steps=steps, cfg=cfg, sampler_name=sampler,
            scheduler="simple", denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="parallel"),
    }  # fmt: skip


def flux(**sampling):
    prompt = wan(cfg=1.0, **sampling)
    prompt["model"]["inputs"]["unet_name"] = "tiny_flux.safetensors"
    prompt["latent"] = node("EmptySD3LatentImage", width=112, height=80, batch_size=1)
    return prompt


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def shared(prompt, devices=THREE, *, source=None, **widgets):
    """Our node before the sampler's model input, or on the input of another node; a report."""
    prompt = json.loads(json.dumps(prompt))
    place = prompt[source or sampler_of(prompt)]["inputs"]
    prompt["parallel"] = node(
        "SlipstreamSequenceParallel", model=place["model"], workers=0, devices=devices,
        **{"timeout_s": 20, **widgets},
    )  # fmt: skip
    place["model"] = ["parallel", 0]
    prompt["report"] = node("SlipstreamReport", latent=["sampler", 0], model=["parallel", 0])
    prompt["json"] = node("PreviewAny", source=["report", 3])
    return prompt


def sampler_of(prompt):
    return next(i for i in ("guider", "sampler") if "model" in prompt.get(i, node(""))["inputs"])


def run(server, prompt, **options):
    return queue_client.run(server, with_seed(prompt, next(seeds)), **options)


def with_seed(prompt, seed):
    prompt = json.loads(json.dumps(prompt))
    for one in prompt.values():
        for name in ("seed", "noise_seed"):
            if name in one["inputs"] and one["class_type"] != "SlipstreamTestConditioning":
                one["inputs"][name] = seed
    return prompt


def latent(server, result):
    (saved,) = result.outputs["save"]["latents"]
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    found = load_file(path)["latent_tensor"]
    path.unlink()
    return found


def report(result):
    return json.loads(result.outputs["json"]["text"][0])["parallel"]


def compare(server, plain, noded):
    """Largest relative difference of two prompts with one seed, and the report of the second."""
    seed = next(seeds)
    expected = latent(server, queue_client.run(server, with_seed(plain, seed)))
    result = queue_client.run(server, with_seed(noded, seed))
    out = latent(server, result)
    assert torch.isfinite(expected).all()
    assert expected.std() > 0
    return ((out - expected).abs().max() / expected.abs().max()).item(), report(result)


def assert_same(server, plain, noded, *, local=0):
    difference, found = compare(server, plain, noded)
    assert difference <= 2e-6
    assert found["calls_distributed"] > 0
    assert found["calls_local"] == local, found["reasons"]
    return found


def workers(server):
    """Process ids of the server's workers."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                command = (folder / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(parent) == server.process.pid and "start_worker.py" in command:
                found.append(int(folder.name))
    return sorted(found)


# --- parity


def test_ksampler_without_and_with_cfg(server, files):
    one = assert_same(server, wan(cfg=1.0), shared(wan(cfg=1.0)))
    assert (one["workers"], one["ulysses"], one["cfg"]) == (3, 3, 1)
    assert_same(server, wan(cfg=4.0), shared(wan(cfg=4.0)))
    two = assert_same(server, wan(cfg=4.0), shared(wan(cfg=4.0), PAIR))
    assert (two["workers"], two["batch"]) == (2, 2), "two prompts of one length are two rows"
    four = assert_same(server, wan(cfg=4.0, negative=5), shared(wan(cfg=4.0, negative=5), FOUR))
    assert (four["workers"], four["cfg"], four["ulysses"]) == (4, 2, 2)


def test_chosen_degrees(server, files):
    for widgets in ({"ring": 3}, {"ulysses": 3}, {"cfg": 1}):
        assert_same(server, wan(), shared(wan(), **widgets))


def test_sampler_custom_advanced(server, files):
    prompt = wan()
    prompt["guider"] = node(
        "CFGGuider", model=["model", 0], positive=["positive", 0], negative=["negative", 0], cfg=4.0
    )
    prompt["noise"] = node("RandomNoise", noise_seed=1)
    prompt["select"] = node("KSamplerSelect", sampler_name="dpmpp_2m")
    prompt["sigmas"] = node("BasicScheduler", model=["model", 0], scheduler="simple", steps=4,
                            denoise=1.0)  # fmt: skip
    prompt["sampler"] = node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["select", 0],
        sigmas=["sigmas", 0], latent_image=["latent", 0],
    )  # fmt: skip
    assert_same(server, prompt, shared(prompt))


def test_image_to_image(server, files):
    prompt = flux()
    first = json.loads(json.dumps(prompt["sampler"]))
    prompt["first"] = first
    prompt["sampler"]["inputs"].update(latent_image=["first", 0], denoise=0.6)
    assert_same(server, prompt, shared(prompt))


def test_controlnet(server, files):
    prompt = flux()
    prompt["picture"] = node("EmptyImage", width=112, height=80, batch_size=1, color=8421504)
    prompt["net"] = node("ControlNetLoader", control_net_name="tiny_controlnet.safetensors")
    prompt["apply"] = node(
        "ControlNetApplyAdvanced", positive=["positive", 0], negative=["negative", 0],
        control_net=["net", 0], image=["picture", 0], strength=1.0, start_percent=0.0,
        end_percent=1.0,
    )  # fmt: skip
    without = flux()
    prompt["sampler"]["inputs"].update(positive=["apply", 0], negative=["apply", 1])
    assert_same(server, prompt, shared(prompt))
    assert compare(server, without, shared(prompt))[0] > 1e-4, "the control net does nothing"
    for one in (prompt, without):
        one["sampler"]["inputs"]["cfg"] = 3.0
    assert_same(server, prompt, shared(prompt, PAIR))


def test_lora_before_after_and_changed_between_prompts(server, files):
    def with_lora(number):
        prompt = wan(model=("lora", 0))
        prompt["lora"] = node("LoraLoaderModelOnly", model=["model", 0], strength_model=0.9,
                              lora_name=f"tiny_lora_{number}.safetensors")  # fmt: skip
        return prompt

    before = shared(with_lora(1), source="lora")
    assert_same(server, with_lora(1), shared(with_lora(1)))
    assert_same(server, with_lora(1), before)
    assert_same(server, with_lora(2), shared(with_lora(2)))
    assert_same(server, wan(), shared(wan()))
    assert compare(server, wan(), shared(with_lora(1)))[0] > 1e-4, "the LoRA does nothing"


def test_two_models_alternate(server, files):
    pids = workers(server)
    for _ in range(2):
        assert_same(server, wan(), shared(wan()))
        assert_same(server, flux(), shared(flux()))
    assert workers(server) == pids or not pids


@pytest.mark.parametrize("first", ["easycache", "parallel"])
def test_easycache(server, files, first):
    def cached(prompt, source):
        prompt["easycache"] = node(
            "EasyCache", model=source, reuse_threshold=0.9, start_percent=0.05, end_percent=0.95,
            verbose=False,
        )  # fmt: skip
        return prompt

    plain = cached(wan(steps=8, model=("easycache", 0)), ["model", 0])
    noded = shared(plain, source="easycache" if first == "parallel" else None)
    difference, found = compare(server, plain, noded)
    assert difference <= 3e-6
    assert 0 < found["calls_distributed"] < 8, "nothing was skipped"


def test_skip_layer_guidance_is_right_and_counted(server, files):
    prompt = wan(model=("slg", 0))
    prompt["slg"] = node(
        "SkipLayerGuidanceDiT", model=["model", 0], double_layers="1", single_layers="", scale=2.0,
        start_percent=0.0, end_percent=1.0, rescaling_scale=0.0,
    )  # fmt: skip
    found = assert_same(server, prompt, shared(prompt), local=3)
    assert "patches_replace" in str(found["reasons"]) or "dit" in str(found["reasons"])


def unet(*, images, cfg=7.0, sampler="euler_ancestral"):
    """Pictures of the tiny Stable Diffusion."""
    prompt = wan(cfg=cfg, sampler=sampler)
    prompt["model"]["inputs"]["unet_name"] = "tiny_sd15.safetensors"
    prompt["latent"] = node("EmptyLatentImage", width=128, height=96, batch_size=images)
    return prompt


def test_one_picture_of_an_unknown_family_runs_on_one_device(server, files):
    difference, found = compare(server, unet(images=1, cfg=1.0), shared(unet(images=1, cfg=1.0)))
    assert difference == 0
    assert found["calls_distributed"] == 0
    assert "No token plan for class UNetModel" in str(found["reasons"])


def test_a_unet_that_workers_cannot_load(server, files):
    """It runs as without the node, as before batches were shared; who asks for a batch is told."""
    prompt = flux()
    prompt["model"] = node("SlipstreamTestModel", family="pixart", heads=1, seed=0)
    prompt["latent"] = node("EmptyLatentImage", width=512, height=512, batch_size=1)
    difference, found = compare(server, prompt, shared(prompt))
    assert difference == 0
    assert found["calls_distributed"] == 0
    assert "No token plan for class PixArtMS" in str(found["reasons"])
    with pytest.raises(queue_client.PromptFailed) as caught:
        run(server, shared(prompt, batch=3))
    assert "Use a core loader or ours" in caught.value.message


# --- batches


def test_four_pictures_of_a_unet(server, files):
    """And the same graph again, and without the node behind it."""
    plain = unet(images=4)
    for _ in range(2):
        found = assert_same(server, plain, shared(plain, PAIR))
        assert found["layout"] == "batch 2 x cfg 1 x ulysses 1 x ring 1"
        assert sum(one["rows"] for one in found["rows"]) == 8, "two prompts in one call"
        assert [one["devices"] for one in found["rows"]] == [["cpu"], ["cpu"]]
    assert latent(server, run(server, plain)).shape[0] == 4


def test_three_pictures_of_flux_over_two_and_tokens_where_batch_is_1(server, files):
    plain = flux()
    plain["latent"]["inputs"]["batch_size"] = 3
    assert assert_same(server, plain, shared(plain, PAIR))["batch"] == 2
    found = assert_same(server, plain, shared(plain, PAIR, batch=1))
    assert found["batch"] == 1
    assert found["ulysses"] * found["ring"] == 2


def test_a_batch_with_a_controlnet(server, files):
    prompt = flux()
    prompt["latent"]["inputs"]["batch_size"] = 3
    prompt["picture"] = node("EmptyImage", width=112, height=80, batch_size=1, color=8421504)
    prompt["net"] = node("ControlNetLoader", control_net_name="tiny_controlnet.safetensors")
    prompt["apply"] = node(
        "ControlNetApplyAdvanced", positive=["positive", 0], negative=["negative", 0],
        control_net=["net", 0], image=["picture", 0], strength=1.0, start_percent=0.0,
        end_percent=1.0,
    )  # fmt: skip
    prompt["sampler"]["inputs"].update(positive=["apply", 0], negative=["apply", 1])
    assert assert_same(server, prompt, shared(prompt, PAIR))["batch"] == 2


def test_a_lane_killed_in_a_batch(server, files):
    prompt = shared(unet(images=4), PAIR)
    run(server, prompt)
    prompt["sampler"]["inputs"]["steps"] = 12
    error, _ = fails_during(server, prompt, lambda: os.kill(workers(server)[0], signal.SIGKILL))
    assert "ended with code -9" in error.message
    assert_same(server, unet(images=4), shared(unet(images=4), PAIR))


# --- mistakes


@pytest.mark.parametrize(
    ("widgets", "sentence"),
    [
        ({"devices": "cuda:0,cuda:1"}, "devices: 'cuda:0' does not exist here (found no GPU)."),
        ({"devices": "", "workers": 2}, "workers is 2, but no GPU is all there is here."),
        ({"devices": PAIR, "workers": 3}, "devices names 2 devices for 3 workers."),
        (
            {"devices": THREE, "workers": 3, "ulysses": 2},
            "ulysses 2 is 2 processes, but workers is 3.",
        ),
    ],
)
def test_mistakes_are_one_sentence(server, files, widgets, sentence):
    prompt = shared(wan())
    prompt["parallel"]["inputs"].update(widgets)
    with pytest.raises(queue_client.PromptFailed) as caught:
        run(server, prompt)
    assert sentence in caught.value.message


# --- faults, each followed by a good prompt


LONG = {"steps": 30, "size": 256}


def fails_during(server, prompt, action, *, at_step=3):
    """Queue, do `action` once step `at_step` is over; the error, and seconds since the action."""
    done = []

    def on_step(name, value, total):
        if name == "sampler" and value >= at_step and not done:
            done.append(time.monotonic())
            action()

    async def queue():
        async with queue_client.QueueClient(server.address) as client:
            await client.run(with_seed(prompt, next(seeds)), on_step=on_step)

    with pytest.raises((queue_client.PromptFailed, queue_client.PromptInterrupted)) as caught:
        asyncio.run(queue())
    return caught.value, time.monotonic() - done[0]


@pytest.mark.parametrize("devices", [PAIR, THREE])
def test_a_killed_worker(server, files, devices):
    assert_same(server, wan(), shared(wan(), devices))
    error, seconds = fails_during(
        server, shared(wan(**LONG), devices),
        lambda: os.kill(workers(server)[0], signal.SIGKILL),
    )  # fmt: skip
    assert "ended with code -9 (often out of memory). The next prompt starts" in error.message
    assert seconds < 2 * patience()
    assert_same(server, wan(), shared(wan(), devices))


def test_a_stopped_worker(server, files):
    assert_same(server, wan(), shared(wan()))
    victim = workers(server)[0]
    error, seconds = fails_during(
        server, shared(wan(**LONG), timeout_s=2), lambda: os.kill(victim, signal.SIGSTOP)
    )
    assert "did not answer for 2 s: raise timeout_s if a step is that slow" in error.message
    assert seconds < 10 * patience()
    assert victim not in workers(server)
    assert_same(server, wan(), shared(wan()))


def test_an_exception_on_rank_0(server, files):
    assert_same(server, wan(), shared(wan()))
    pids = workers(server)
    prompt = shared(wan(model=("fault", 0)))
    prompt["fault"] = node("SlipstreamTestFault", model=["model", 0], call=2)
    started = time.monotonic()
    with pytest.raises(queue_client.PromptFailed, match="test fault in call 2"):
        run(server, prompt)
    assert time.monotonic() - started < 5 * patience()
    assert workers(server) == pids
    assert_same(server, wan(), shared(wan()))


def test_an_exception_in_a_worker_reaches_the_node(server, files):
    """A model file that changed behind ComfyUI's back."""
    folder = files / "diffusion_models" / "changing"
    prompt = wan()
    prompt["model"]["inputs"]["unet_name"] = "changing/tiny_wan.safetensors"
    tiny.write(folder, "wan", seed=21)
    run(server, prompt)
    tiny.write(folder, "wan", seed=22)
    with pytest.raises(queue_client.PromptFailed) as caught:
        run(server, shared(prompt))
    assert "has changed since ComfyUI loaded it: load it again" in caught.value.message
    assert "Traceback" in caught.value.message
    assert_same(server, wan(), shared(wan()))


@pytest.mark.parametrize("devices", [PAIR, THREE])
def test_cancel_within_a_step(server, files, devices):
    assert_same(server, wan(), shared(wan(), devices))
    pids = workers(server)
    error, seconds = fails_during(
        server, shared(wan(**LONG), devices), lambda: server.post("/interrupt", {})
    )
    assert isinstance(error, queue_client.PromptInterrupted)
    assert seconds < 2 * patience()
    assert workers(server) == pids
    assert_same(server, wan(), shared(wan(), devices))


def test_free_unloads_and_the_next_prompt_works(server, files):
    assert_same(server, wan(), shared(wan()))
    pids = workers(server)
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    assert workers(server) == pids
    assert_same(server, wan(), shared(wan()))


def test_two_comfyuis_on_one_machine_do_not_meet(server, files):
    """This process is a second ComfyUI with workers of its own; both sample at the same time."""
    from slipstream.parallel.apply import apply_parallel, pool
    from slipstream.parallel.config import SequenceParallelConfig

    model = tiny.load("wan", heads=3, seed=31)
    expected = tiny.sample(model, "wan", steps=8)
    mine = apply_parallel(model, SequenceParallelConfig(devices=PAIR, timeout_s=20))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(1) as beside:
            theirs = beside.submit(assert_same, server, wan(), shared(wan(), PAIR))
            out = tiny.sample(mine, "wan", steps=8)
            theirs.result()
        assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()
        assert mine.model.diffusion_model is model.model.diffusion_model
        assert not {w.handle.pid for w in pool().workers} & set(workers(server))
        pool().close()
        assert_same(server, wan(), shared(wan(), PAIR))
    finally:
        pool().close()
        torch.set_num_threads(threads)


# --- a hundred prompts, and the end


def test_a_hundred_prompts_leave_nothing_behind(server, files):
    def counts():
        """pid -> (file descriptors, bytes); ComfyUI closes a prompt's event loop and the client's
        connections a moment after it has answered, so the fewest of two seconds count."""
        found = {}
        for _ in range(10):
            time.sleep(0.2)
            for pid in [server.process.pid, *workers(server)]:
                num_files = len(os.listdir(f"/proc/{pid}/fd"))
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                fewest = min(num_files, found.get(pid, (num_files, 0))[0])
                found[pid] = fewest, pages * 4096
        return found

    async def queue(number):
        async with queue_client.QueueClient(server.address) as client:
            for _ in range(number):
                prompt = with_seed(shared(wan(steps=1, cfg=1.0), PAIR), next(seeds))
                for name in ("save", "report", "json"):
                    del prompt[name]
                prompt["digest"] = node("SlipstreamTestDigest", samples=["sampler", 0])
                await client.run(prompt)

    asyncio.run(queue(20))
    before = counts()
    asyncio.run(queue(100))
    after = counts()
    assert after.keys() == before.keys(), "processes"
    for pid, (files_before, bytes_before) in before.items():
        files_after, bytes_after = after[pid]
        assert files_after <= files_before + 2
        assert bytes_after <= bytes_before + 30e6
