"""The faked GPU is no kinder than a real one where our programs could tell."""

import subprocess
import sys

import comfy_home
import pytest

START = f"""
import sys
sys.path.insert(0, {str(comfy_home.PACK_ROOT / "tests")!r})
import fake_cuda, torch
from fake_cuda import Memory
fake_cuda.start()
def refused(call, words):
    try:
        call()
    except Exception as error:
        assert words in str(error), error
    else:
        raise AssertionError("it was accepted")
x = torch.ones(2, 3, device="cuda")
"""
CHECKS = {
    "tensors are on the device": (
        "assert x.is_cuda and x.device == torch.device('cuda', 0) and (x + 1).is_cuda\n"
        "assert not x.cpu().is_cuda and x.sum().item() == 6 and x[0].tolist() == [1, 1, 1]\n"
        "assert torch.tensor([1.0], device='cuda').is_cuda and torch.zeros(1).cuda().is_cuda"
    ),
    "both devices do not mix": (
        "refused(lambda: x + torch.ones(2, 3), 'same device')\n"
        "refused(lambda: torch.nn.Linear(3, 1)(x), 'same device')\n"
        "assert (x * torch.tensor(2.0)).is_cuda  # a number may come from the CPU\n"
        "with torch.inference_mode():\n"
        "    refused(lambda: x @ torch.ones(3, 1), 'same device')"
    ),
    "arrays are of the CPU": "refused(x.numpy, 'device type tensor to numpy')",
    "a module moves there and back": (
        "layer = torch.nn.Linear(3, 1).requires_grad_(False)\n"
        "before = layer.weight.clone()\n"
        "layer.to('cuda')\n"
        "assert layer.weight.is_cuda and layer(x).is_cuda\n"
        "layer.to('cpu')\n"
        "assert not layer.weight.is_cuda and torch.equal(layer.weight, before)"
    ),
    "bytes are counted": (
        "held = Memory.held\n"
        "big = torch.empty(1 << 20, device='cuda')\n"
        "view = big[:3]\n"
        "del big\n"
        "assert torch.cuda.memory_allocated() == held + (4 << 20)  # a view keeps all of it\n"
        "free, total = torch.cuda.mem_get_info()\n"
        "assert total - free == torch.cuda.memory_allocated()\n"
        "del view\n"
        "assert torch.cuda.memory_allocated() == held\n"
        "assert torch.cuda.max_memory_allocated() >= held + (4 << 20)\n"
        "torch.cuda.reset_peak_memory_stats()\n"
        "assert torch.cuda.max_memory_allocated() == held"
    ),
    "in place is in place": (
        "y = x.view(3, 2)\n"
        "assert y.zero_() is y and x.sum().item() == 0\n"
        "x.copy_(torch.ones(2, 3))\n"
        "assert x.is_cuda and y.sum().item() == 6"
    ),
    "events want what they want": (
        "a, b = torch.cuda.Event(), torch.cuda.Event(enable_timing=True)\n"
        "refused(lambda: a.elapsed_time(b), 'enable_timing')\n"
        "a = torch.cuda.Event(enable_timing=True)\n"
        "refused(lambda: a.elapsed_time(b), 'recorded')\n"
        "a.record(), b.record()\n"
        "assert a.elapsed_time(b) >= 0"
    ),
    "attention of torch's kernels is attention": (
        "q = torch.randn(1, 2, 8, 64, device='cuda', dtype=torch.bfloat16)\n"
        "wanted = torch.nn.functional.scaled_dot_product_attention(*[q.float()] * 3)\n"
        "out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)\n"
        "assert out.is_cuda and (out - wanted).abs().max() < 0.02 and lse.shape == (1, 2, 8)"
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_fake(name):
    done = subprocess.run(
        [sys.executable, "-c", START + CHECKS[name]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
