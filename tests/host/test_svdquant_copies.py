"""Unpacked copies through the real loader: made once, mapped after, equal to no copy at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import comfy_home
import pytest
import svdquant_models
import torch
from slipstream.backends import run as runs
from slipstream.backends.svdquant import host, host_cache, repacked
from slipstream.backends.svdquant.host import load_svdquant, notice_of
from slipstream.backends.svdquant.host_patcher import quantised_layers
from slipstream.bench import svdquant_cache, svdquant_load
from svdquant_networks import FLUX, loaded_flux_output, sample

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where copies go; small files get one too."""
    path = tmp_path / "models" / host_cache.FOLDER
    monkeypatch.setattr(host_cache, "cache_folder", lambda: path)
    monkeypatch.setattr(host_cache, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(host_cache, "KEPT_FREE_BYTES", 0)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two models of the same names and sizes."""
    paths = [tmp_path_factory.mktemp("made") / f"{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        svdquant_models.write(path, "flux", "nunchaku-1", seed=seed, **FLUX)
    return paths


@pytest.fixture
def source(made, tmp_path):
    return Path(shutil.copy(made[0], tmp_path / "model.safetensors"))


def load(path, **config):
    return load_svdquant(str(path), {"backend": "dequant", **config})


def names(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def copies(folder):
    return [name for name in names(folder) if name.endswith(".safetensors")]


def is_mapped(model, folder):
    """Whether every quantised weight lies in the mapping of a file in `folder`."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(str(folder)):
            start, end = (int(part, 16) for part in fields[0].split("-"))
            spans.append((start, end))
    found = [
        any(start <= module.weight._qdata.data_ptr() < end for start, end in spans)
        for module in quantised_layers(model.model).values()
    ]
    assert len(set(found)) == 1
    return found[0]


def test_a_step_is_the_same_without_with_a_new_and_with_an_old_copy(source, folder):
    off = load(source, keep_unpacked=False)
    assert not names(folder)
    assert notice_of(off) == ""
    wanted = sample(off, "flux")
    first = load(source)
    (name,) = copies(folder)
    size = (folder / name).stat().st_size
    assert notice_of(first) == (
        f"made a {size / 1e6:.1f} MB copy for fast loading in slipstream_cache; "
        "off by the widget keep_unpacked"
    )
    host_cache.settle()
    stamp = (folder / name).stat()
    second = load(source)
    assert notice_of(second) == (
        f"opened from its {size / 1e6:.1f} MB copy for fast loading in slipstream_cache; "
        "off by the widget keep_unpacked"
    )
    for model in (first, second):
        assert torch.equal(sample(model, "flux"), wanted)
        assert is_mapped(model, folder)
    assert not is_mapped(off, folder)
    after = (folder / name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)
    section = runs.run_log(second).latest().to_json()["svdquant"]
    assert section["copy"] == notice_of(second)
    text = runs.run_log(second).latest().to_text()
    assert f"SVDQuant: {notice_of(second)}" in text.splitlines()
    assert names(folder) == [".lock", name]


def test_a_lora_goes_on_and_off_and_leaves_the_copy_as_it_is(source, folder):
    load(source)
    (path,) = folder.glob("*.safetensors")
    before = path.read_bytes()
    plain, mapped = load(source, keep_unpacked=False), load(source)
    key = "diffusion_model.single_blocks.0.linear2.weight"
    patch = {key: ("diff", (torch.randn(128, 640),))}
    outputs = []
    for model in (plain, mapped):
        with_lora = model.clone()
        with_lora.add_patches(patch, 0.5)
        outputs.append([sample(m, "flux") for m in (model, with_lora, model)])
    (off, on, again), other = outputs
    assert torch.equal(off, again)
    assert not torch.equal(off, on)
    assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))
    assert path.read_bytes() == before


def test_full_and_low_vram_loads_and_deep_copies_are_alike(source, folder):
    load(source)
    wanted = loaded_flux_output(load(source, keep_unpacked=False))
    model = load(source)
    assert torch.equal(loaded_flux_output(model), wanted)
    model.unpatch_model(model.offload_device)
    low = load(source)
    low.load(torch.device("cpu"), lowvram_model_memory=1)
    assert torch.equal(loaded_flux_output(low), wanted)
    deep = load(source).clone(force_deepcopy=True)
    assert torch.equal(loaded_flux_output(deep), wanted)


def test_a_load_does_not_wait_for_the_disk(source, folder, monkeypatch):
    """A copy gets its date when it is on the disk; a disk that fails takes the copy with it."""
    disk, seal = threading.Event(), repacked.seal

    def slow(path, sealed):
        assert disk.wait(60)
        seal(path, sealed)

    monkeypatch.setattr(repacked, "seal", slow)
    wanted = sample(load(source), "flux")
    (path,) = folder.glob("*.safetensors")
    sealed = repacked.read_info(path)["sealed"] * 10**9
    assert path.stat().st_mtime_ns != sealed
    disk.set()
    host_cache.settle()
    assert path.stat().st_mtime_ns == sealed
    path.unlink()

    def broken(path, sealed):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(repacked, "seal", broken)
    assert torch.equal(sample(load(source), "flux"), wanted)
    host_cache.settle()
    assert not copies(folder)


def test_a_copy_per_dtype_in_memory(source, folder):
    wide = sample(load(source, dtype="fp32"), "flux")
    sample(load(source, dtype="bf16"), "flux")
    assert len(copies(folder)) == 2
    assert torch.equal(sample(load(source, dtype="fp32"), "flux"), wide)


@pytest.mark.parametrize("damage", ["truncated", "byte", "empty", "other"])
def test_a_damaged_copy_is_made_again(source, folder, caplog, damage):
    wanted = sample(load(source), "flux")
    (path,) = folder.glob("*.safetensors")
    whole = path.read_bytes()
    at = len(whole) * 2 // 3
    path.write_bytes(
        {
            "truncated": whole[:at],
            "byte": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "empty": b"",
            "other": source.read_bytes(),
        }[damage]
    )
    caplog.clear()
    with caplog.at_level("INFO", logger="slipstream"):
        model = load(source)
    assert "is made again" in caplog.text
    assert notice_of(model).startswith("made a ")
    assert torch.equal(sample(model, "flux"), wanted)
    assert path.stat().st_size == len(whole)
    assert notice_of(load(source)).startswith("opened")


def test_a_replaced_source_replaces_its_copy_also_under_a_loaded_model(source, made, folder):
    old = load(source)
    before, stat = sample(old, "flux"), source.stat()
    shutil.copy(made[1], source)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.stat().st_size == stat.st_size
    new = load(source)
    assert notice_of(new).startswith("made a ")
    assert len(copies(folder)) == 1
    after = sample(new, "flux")
    assert torch.equal(after, sample(load(source, keep_unpacked=False), "flux"))
    assert not torch.equal(after, before)
    assert torch.equal(sample(old, "flux"), before)  # its mapping is of the file that was there


def test_the_folder_may_go_while_the_model_is_loaded(source, folder):
    model = load(source)
    wanted = sample(model, "flux")
    shutil.rmtree(folder)
    assert torch.equal(sample(model, "flux"), wanted)
    assert notice_of(load(source)).startswith("made a ")


def test_what_cannot_be_written_is_said_and_the_load_goes_on(source, folder, monkeypatch):
    wanted = sample(load(source, keep_unpacked=False), "flux")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file where the folder should be")
    model = load(source)
    assert "loaded without a copy for fast loading: " in notice_of(model)
    assert "cannot be written" in notice_of(model)
    assert torch.equal(sample(model, "flux"), wanted)
    folder.unlink()
    monkeypatch.setattr(host_cache, "KEPT_FREE_BYTES", 2**62)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 91, 9))
    model = load(source)
    assert "are left alone. Free some, or move slipstream_cache" in notice_of(model)
    assert names(folder) == [".lock"]
    assert torch.equal(sample(model, "flux"), wanted)


def test_a_disk_that_fills_up_leaves_nothing(source, folder, monkeypatch):
    """The limit on a file's size stands for the disk: the write fails with an OSError."""
    import resource

    wanted = sample(load(source, keep_unpacked=False), "flux")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (source.stat().st_size // 2, limit[1]))
    try:
        model = load(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "cannot be written (File too large)" in notice_of(model)
    assert names(folder) == [".lock"]
    assert torch.equal(sample(model, "flux"), wanted)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, "cancel"])
def test_a_cancelled_load_leaves_nothing_and_the_next_one_works(source, folder, monkeypatch, kind):
    import comfy.model_management as management

    stop = management.InterruptProcessingException if kind == "cancel" else kind
    assemble, seen = host.assemble, []

    def interrupted(*args):
        for index, entry in enumerate(assemble(*args)):
            seen.append(names(folder))
            if index == 9:
                raise stop
            yield entry

    monkeypatch.setattr(host, "assemble", interrupted)
    with pytest.raises(stop):
        load(source)
    assert any(name.endswith(".part") for name in seen[-1])
    assert names(folder) == [".lock"]
    monkeypatch.setattr(host, "assemble", assemble)
    assert notice_of(load(source)).startswith("made a ")


def test_while_another_process_writes_this_one_goes_on(source, folder):
    folder.mkdir(parents=True)
    with host_cache._writing(folder) as is_ours:
        assert is_ours
        model = load(source)
    assert "another process is writing one" in notice_of(model)
    assert not copies(folder)
    assert notice_of(load(source)).startswith("made a ")


def test_a_copy_goes_with_its_source_and_what_is_not_ours_stays(source, folder, tmp_path):
    load(source)
    other = tmp_path / "other.safetensors"
    shutil.copy(source, other)
    foreign = folder / "foreign.safetensors"
    shutil.copy(other, foreign)
    away = tmp_path / "disk"
    away.mkdir()
    moved = shutil.copy(source, away / "moved.safetensors")
    load(moved)
    assert len(copies(folder)) == 3
    away.rename(tmp_path / "unplugged")  # a disk that is not there now
    source.unlink()
    load(other)
    left = copies(folder)
    assert len(left) == 3
    assert foreign.name in left
    assert any(name.startswith("moved-") for name in left)
    assert not any(name.startswith("model-") for name in left)


CHILD = """
import sys, json
sys.path.insert(0, sys.argv[1])
import comfy_home, torch
comfy_home.load_pack(); comfy_home.in_process(); torch.set_num_threads(2)
from pathlib import Path
from slipstream.backends.svdquant import host_cache, repacked
host_cache.cache_folder = lambda: Path(sys.argv[3])
host_cache.SMALLEST_BYTES = host_cache.KEPT_FREE_BYTES = 0
from slipstream.backends.svdquant import host
if sys.argv[4] == "hang":  # in the middle of the file, until it is killed
    assemble = host.assemble
    def slow(*args):
        import time
        for index, entry in enumerate(assemble(*args)):
            if index == 9:
                print("half", flush=True)
                time.sleep(600)
            yield entry
    host.assemble = slow
model = host.load_svdquant(sys.argv[2], {"backend": "dequant"})
import comfy.model_management
comfy.model_management.load_models_gpu([model], force_full_load=True)
g = torch.Generator().manual_seed(3)
x, c, y = (torch.randn(s, generator=g) for s in ((1, 16, 8, 8), (1, 7, 768), (1, 768)))
with torch.no_grad():
    out = model.model.diffusion_model(
        x, torch.tensor([0.7]), context=c, y=y, guidance=torch.tensor([3.5]))
torch.save(out.float(), sys.argv[4])
print(host.notice_of(model))
"""


def child(source, folder, what):
    tests = str(comfy_home.PACK_ROOT / "tests")
    command = [sys.executable, "-P", "-c", CHILD, tests, str(source), str(folder), str(what)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_nothing_that_stays(source, folder):
    process = child(source, folder, "hang")
    try:
        assert process.stdout.readline() == "half\n"
    finally:
        process.kill()
        process.communicate()
    assert [name for name in names(folder) if name.endswith(".part")]
    wanted = loaded_flux_output(load(source, keep_unpacked=False))
    model = load(source)
    assert notice_of(model).startswith("made a ")
    assert not [name for name in names(folder) if name.endswith(".part")]
    assert torch.equal(loaded_flux_output(model), wanted)


def test_processes_at_the_same_time_give_one_copy_and_equal_outputs(source, folder, tmp_path):
    outputs = [tmp_path / f"{index}.pt" for index in range(2)]
    processes = [child(source, folder, output) for output in outputs]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("made a " in text for text in said) >= 1, said
    assert len(copies(folder)) == 1
    wanted = loaded_flux_output(load(source, keep_unpacked=False))
    for output in outputs:
        assert torch.equal(torch.load(output, weights_only=True), wanted)


def test_the_folder_is_beside_the_models_or_where_the_user_says(monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.undo()  # the tests' own folder for copies
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(folder_paths, "models_dir", str(tmp_path))
        assert host_cache.cache_folder() == tmp_path / "slipstream_cache"
        context.setattr(folder_paths, "folder_names_and_paths", {})
        folder_paths.add_model_folder_path(host_cache.FOLDER, str(tmp_path / "big"))
        assert host_cache.cache_folder() == tmp_path / "big"


def test_small_files_and_switched_off_leave_no_trace(source, folder, monkeypatch):
    load(source, keep_unpacked=False)
    monkeypatch.setattr(host_cache, "SMALLEST_BYTES", source.stat().st_size + 1)
    model = load(source)
    assert notice_of(model) == ""
    assert not folder.exists()


def test_the_command_lists_and_deletes(source, folder):
    load(source, dtype="fp32")
    load(source, dtype="bf16")
    lines = "\n".join(svdquant_cache.listing(folder))
    assert lines.startswith(f"2 unpacked copies in {folder}")
    assert f"of {source.resolve()}" in lines
    assert "are free on this disk" in lines
    first, second = copies(folder)
    assert svdquant_cache.deleted(folder, "nonsense")[1] is False
    (line,), is_done = svdquant_cache.deleted(folder, first)
    assert is_done
    assert line.startswith(f"{first}: deleted, ")
    assert copies(folder) == [second]
    assert svdquant_cache.deleted(folder, "all")[1]
    assert not copies(folder)
    assert svdquant_cache.deleted(folder, "all") == (["Nothing to delete."], True)


def test_a_copy_that_windows_holds_is_said(source, folder, monkeypatch):
    load(source)

    def held(self, missing_ok=False):
        raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr(Path, "unlink", held)
    (line,), is_done = svdquant_cache.deleted(folder, "all")
    assert not is_done
    assert "stop it and delete again" in line


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.full
def test_a_wide_file_loads_from_its_copy_in_a_fraction_and_nothing_private(tmp_path, capsys):
    """python bench svdquant_load with one block: the ratios that 60 blocks are measured for."""
    source, folder = tmp_path / "files", tmp_path / "out"
    source.mkdir()
    argv, sys.argv = sys.argv, ["svdquant_load", "--blocks", "1", "--threads", "1"]
    sys.argv += ["--folder", str(source), "--out", str(folder)]
    try:
        assert svdquant_load.main() == 0
    finally:
        sys.argv = argv
    found = json.loads((folder / "svdquant-load.json").read_text())
    rows = {row["case"]: row for row in found["rows"]}
    assert not any("error" in row for row in rows.values()), rows
    dense = 2 * 3072 * (64 + 3584 + 256 + 3072 + 2 * 3072 + 64)  # copied by core's own classes
    assert rows["off"]["private_bytes"] > 0.9 * found["file_bytes"]
    # one block of 290 MB: the first load's allocator keeps about a layer, however many there are
    for case, share in (("first", 0.2), ("second", 0.1)):
        beyond = rows[case]["private_bytes_after_use"] - dense
        assert beyond < share * found["file_bytes"], rows[case]
    assert rows["second"]["cpu_seconds"] < rows["off"]["cpu_seconds"] / 2
    assert "every later load" in (folder / "svdquant-load.md").read_text()
