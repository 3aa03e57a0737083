"""The training script end to end in a few steps, and the exact embedding into ComfyUI's TAESD."""

import json
import subprocess
import sys

import pytest
import torch
from comfy_home import PACK_ROOT
from slipstream.bench.autoencoder import ACTIVE, Autoencoder, taesd_weights

SHORT = (
    *("--threads", "1", "--autoencoder-steps", "2", "--decoder-steps", "2"),
    *("--classifier-steps", "2", "--num-pictures", "200", "--flow-steps", "2", "--flow-batch", "4"),
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_taesd_computes_what_the_narrow_autoencoder_does(comfy, threads):
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(0)
    narrow = Autoencoder()
    pictures = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        narrow.norm.running_mean.uniform_(-1, 1)  # whitening has something to fold in
        narrow.norm.running_var.uniform_(0.01, 4)
        narrow.eval()
        wide = TAESD(latent_channels=16)
        wide.load_state_dict(taesd_weights(narrow))
        latents = narrow.encode(pictures)
        embedded = wide.taesd_encoder(pictures)
        assert (embedded[:, :ACTIVE] - latents).abs().max() < 3e-4
        assert embedded[:, ACTIVE:].abs().max() == 0
        decoded = wide.taesd_decoder(embedded)
        assert (decoded - narrow.decode(latents)).abs().max() < 3e-4
        # The whitening is folded in: without it the latents are others.
        assert (narrow.encoder(pictures) - latents).abs().max() > 0.01


def train(folder):
    """In a process of its own: training switches ComfyUI's rotary embedding for good."""
    command = [sys.executable, "bench", "train_demo", str(folder), *SHORT]
    return subprocess.run(command, cwd=PACK_ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.full
def test_every_stage_leaves_its_files_and_is_not_done_twice(comfy, tmp_path):
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    recorded = json.loads((tmp_path / "training.json").read_text("utf-8"))
    assert list(recorded) == ["autoencoder", "latents", "flow", "decoder", "classifier"]
    assert recorded["flow"]["steps"] == 2
    names = {path.name for path in tmp_path.glob("slipstream_demo_*.safetensors")}
    kinds = ("flux", "vae", "classes", "classifier")
    assert names == {f"slipstream_demo_{kind}.safetensors" for kind in kinds}
    again = train(tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("done before") == 5
