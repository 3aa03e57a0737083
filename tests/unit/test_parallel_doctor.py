"""./run --doctor: what it says about devices that are not here, and about loopback that is."""

import pytest
import torch
from slipstream.bench import doctor, launch


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are GPUs of these names."""

    def pretend(*names):
        monkeypatch.setattr(doctor, "gpu_names", lambda: list(names))
        monkeypatch.setattr(doctor, "copy_rate", lambda a, b: 50e9)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a + b == 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (20 << 30, 24 << 30))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 9))
        monkeypatch.setattr(doctor, "measured", lambda pair, backend: "1.00 GB/s")

    return pretend


def test_two_equal_gpus(gpus, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    gpus("RTX 4090", "RTX 4090")
    assert doctor.choices()[0].startswith("workers 0: 2 processes on cuda:0, cuda:1, backend ")
    assert doctor.problems() == ["nothing"]
    assert doctor.links()[:2] == [
        "cuda:0 -> cuda:1: peer access, 50.0 GB/s",
        "cuda:1 -> cuda:0: peer access, 50.0 GB/s",
    ]
    assert "compute capability 8.9, 20.0 of 24.0 GiB free" in doctor.devices()[1]


def test_what_would_be_refused(gpus, monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    gpus("RTX 4090", "RTX 3090")
    found = " ".join(doctor.problems())
    assert "cuda:1 is a RTX 3090, not a RTX 4090: left out by workers 0" in found
    assert "NCCL_SOCKET_IFNAME is not lo" in found
    assert "cudaMallocAsync" in found
    assert doctor.choices()[0].startswith("workers 0: 1 processes on cuda:0")


def test_without_a_gpu(gpus):
    gpus()
    assert doctor.devices()[-1] == "no GPU"
    assert "run on one device, as without the node" in doctor.choices()[0]


def test_the_report_has_every_part(gpus, capsys):
    gpus()
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for part in ("Versions", "Devices", "Links", "Sequence parallel would", "Refused or slow"):
        assert f"{part}\n  " in text
    assert torch.__version__ in text
    assert "ErnieImageModel: refused" in text


def test_loopback_is_measured_between_two_processes():
    rate = doctor.measured(("cpu", "cpu"), "gloo")
    assert rate.endswith(" GB/s")
    assert float(rate.split()[0]) > 0


def test_the_flag_of_run(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "main", lambda arguments: seen.append(arguments) or 0)
    options = launch.parser().parse_args(["--doctor", "--part", "comfyui"])
    assert launch.run_part(options) == 0
    assert seen == [[]]
