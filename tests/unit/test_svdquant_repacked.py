"""The unpacked copy of a file: the same bits, parts where kernels want them, damage found."""

import os
import random
import threading

import pytest
import svdquant_models
import torch
from safetensors import safe_open
from slipstream.backends.svdquant import repacked, segments
from slipstream.backends.svdquant.assemble import assemble
from slipstream.backends.svdquant.buffer import (
    ALIGNMENT,
    packed,
    places_from_json,
    places_to_json,
    unpacked,
)
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.weight import PARTS, QuantWeight

CASES = [
    ("flux", "nunchaku-1", "int4"),
    ("flux", "nunchaku-1", "nvfp4"),
    ("qwen-image", "nunchaku-2", "int4"),
    ("qwen-image", "comfy-kitchen", "int4"),
    ("z-image", "nunchaku-lite", "int4"),
    ("sdxl", "nunchaku-1", "int4"),
]
BF16 = torch.bfloat16


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def read(path, dtype=BF16):
    return dict(assemble(detect(read_header(path)), dtype))


def write_copy(source, path, dtype=BF16):
    """What the loader does for a copy, without its folder; the source's identity."""
    checkpoint, made_from = detect(read_header(source)), repacked.identity([source], dtype)
    with path.open("wb") as file:
        sealed = repacked.write(
            file,
            assemble(checkpoint, dtype),
            num_tensors=len(checkpoint.layers) + len(checkpoint.dense),
            source=source,
            made_from=made_from,
        )
    repacked.seal(path, sealed)
    return made_from


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    svdquant_models.write(path, "flux", "nunchaku-1")
    return path


def assert_equal_weights(got, wanted):
    assert got.shape == wanted.shape
    assert len(got.segments) == len(wanted.segments)
    for a, b in zip(got.segments, wanted.segments, strict=True):
        assert a.facts == b.facts
        for part in PARTS:
            x, y = getattr(a, part), getattr(b, part)
            assert (x is None) == (y is None)
            if x is not None:
                assert x.dtype == y.dtype
                assert x.shape == y.shape
                assert torch.equal(raw(x), raw(y)), part


@pytest.mark.parametrize(("family", "dialect", "precision"), CASES)
def test_a_copy_is_the_model_bit_for_bit(family, dialect, precision, tmp_path):
    source, path = tmp_path / "model.safetensors", tmp_path / "copy.safetensors"
    svdquant_models.write(source, family, dialect, precision=precision)
    wanted = read(source)
    copy = repacked.open_copy(path, write_copy(source, path))
    assert set(copy.names) == set(wanted)
    num_quantised = sum(isinstance(value, QuantWeight) for value in wanted.values())
    assert len(copy.layers) == num_quantised > 0
    assert all(copy.header.tensors[name].start % ALIGNMENT == 0 for name in copy.names)
    with safe_open(str(path), framework="pt") as file:  # any reader of safetensors takes it
        for name, value in wanted.items():
            tensor, layer = file.get_tensor(name), copy.layers.get(name)
            if layer is None:
                assert tensor.dtype == value.dtype
                assert torch.equal(raw(tensor), raw(value))
            else:
                assert_equal_weights(unpacked(tensor, layer.places, layer.shape), value)


@pytest.mark.parametrize(("family", "dialect", "precision"), CASES)
def test_parts_are_aligned_contiguous_views_of_one_buffer(family, dialect, precision, tmp_path):
    source = tmp_path / "model.safetensors"
    svdquant_models.write(source, family, dialect, precision=precision)
    for weight in (v for v in read(source).values() if isinstance(v, QuantWeight)):
        buffer, places = packed(weight)
        assert places_from_json(places_to_json(places), buffer.numel()) == places
        moved = buffer.clone()  # as a copy to a device makes one
        got = unpacked(moved, places, weight.shape)
        assert_equal_weights(got, weight)
        for segment in got.segments:
            for tensor in (t for p in PARTS if (t := getattr(segment, p)) is not None):
                assert tensor.is_contiguous()
                assert tensor.untyped_storage().data_ptr() == moved.data_ptr()
                assert (tensor.data_ptr() - moved.data_ptr()) % ALIGNMENT == 0
        assert buffer.numel() == sum(s.num_bytes for s in weight.segments) + gaps(places)


def gaps(places):
    return sum(-part.num_bytes % ALIGNMENT for place in places for part in place.parts)


def test_places_outside_of_a_buffer_are_refused(source):
    weight = next(v for v in read(source).values() if isinstance(v, QuantWeight))
    buffer, places = packed(weight)
    value = places_to_json(places)
    with pytest.raises(ValueError, match="not inside"):
        places_from_json(value, buffer.numel() - ALIGNMENT)
    for change in (-ALIGNMENT, 1, 2**40):
        wrong = places_to_json(places)
        wrong[0][1][0][3] += change
        with pytest.raises(ValueError, match="not inside"):
            places_from_json(wrong, buffer.numel())
    for broken in ([[]], [[1, 2]], None, [[["int4"], [["q", "no_dtype", [1], 0]]]]):
        with pytest.raises(ValueError):
            places_from_json(broken, buffer.numel())


def test_another_source_or_code_is_not_taken(source, tmp_path, monkeypatch):
    path = tmp_path / "copy.safetensors"
    made_from = write_copy(source, path)
    assert repacked.open_copy(path, made_from).layers
    with pytest.raises(repacked.DamagedError, match="another file, or by another version"):
        repacked.open_copy(path, repacked.identity([source], torch.float16))
    monkeypatch.setattr(repacked, "code_version", lambda: "0")
    with pytest.raises(repacked.DamagedError, match="another file, or by another version"):
        repacked.open_copy(path, repacked.identity([source], BF16))


def test_a_source_replaced_by_one_of_the_same_size_and_date_is_another(source):
    before, stat = repacked.identity([source], BF16), source.stat()
    svdquant_models.write(source, "flux", "nunchaku-1", seed=1)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.stat().st_size == stat.st_size
    assert source.stat().st_mtime_ns == stat.st_mtime_ns
    assert repacked.identity([source], BF16) != before


def test_the_code_version_covers_what_unpacks():
    trees = {}
    for name in repacked._UNPACKERS:
        repacked._add_imported(repacked.HERE / name, trees)
    found = {str(path.relative_to(repacked.HERE)) for path in trees}
    assert {"layouts.py", "segments.py", "weight.py", "dialects.py"} <= found
    assert {f"families{os.sep}{name}.py" for name in ("flux", "sdxl", "data")} <= found
    assert "host.py" not in found


def test_damage_is_found(source, tmp_path):
    """Any byte that changes: in the header, in a buffer, in a gap; and any truncation."""
    path, damaged = tmp_path / "copy.safetensors", tmp_path / "damaged.safetensors"
    made_from = write_copy(source, path)
    whole = path.read_bytes()
    text = whole[8:].index(b"   ") + 8  # spaces fill the rest of the header
    data = repacked.open_copy(path, made_from).header.tensors
    start = min(entry.start for entry in data.values())
    generator = random.Random(0)
    places = [generator.randrange(text) for _ in range(60)]
    places += [generator.randrange(text, start) for _ in range(10)]
    places += [generator.randrange(start, len(whole)) for _ in range(60)]
    for at in places:
        wrong = bytearray(whole)
        wrong[at] ^= 0xFF
        damaged.write_bytes(wrong)
        with pytest.raises(repacked.DamagedError):
            repacked.open_copy(damaged, made_from)
    for size in (0, 7, 8, text, start, start + 1, len(whole) - 1, *places[::20]):
        damaged.write_bytes(whole[:size])
        with pytest.raises(repacked.DamagedError):
            repacked.open_copy(damaged, made_from)
    damaged.write_bytes(whole + b"\0")
    with pytest.raises(repacked.DamagedError):
        repacked.open_copy(damaged, made_from)


def test_a_copy_with_a_new_date_is_read_through_once(source, tmp_path, monkeypatch):
    path, read_through = tmp_path / "copy.safetensors", []
    verify = repacked._verify
    monkeypatch.setattr(repacked, "_verify", lambda *a: read_through.append(verify(*a)))
    made_from = write_copy(source, path)
    repacked.open_copy(path, made_from)
    assert not read_through
    os.utime(path)
    repacked.open_copy(path, made_from)
    repacked.open_copy(path, made_from)
    assert len(read_through) == 1


def test_only_copies_tell_their_source(source, tmp_path):
    path = tmp_path / "copy.safetensors"
    write_copy(source, path)
    assert repacked.read_info(path)["source"] == str(source)
    (tmp_path / "text.safetensors").write_text("no header at all")
    (tmp_path / "empty.safetensors").touch()
    for other in (source, tmp_path / "text.safetensors", tmp_path / "empty.safetensors"):
        assert repacked.read_info(other) is None


def test_a_device_without_memory_leaves_the_rest_to_the_cpu(source, monkeypatch):
    """The device is the CPU under another name; it fails at the third layer."""
    wanted, asked = read(source), []

    class Device:
        type = "cuda"

    class Reader(segments.SegmentReader):
        def _part(self, layer, part):
            asked.append(self.device.type)
            if self.device.type == "cuda" and len(set(names)) == 3:
                raise torch.cuda.OutOfMemoryError("full")
            names.append(layer.name)
            device, self.device = self.device, segments.CPU
            try:
                return super()._part(layer, part)
            finally:
                self.device = device

    names: list[str] = []
    monkeypatch.setattr("slipstream.backends.svdquant.assemble.SegmentReader", Reader)
    checkpoint = detect(read_header(source))
    got = dict(assemble(checkpoint, BF16, Device()))
    assert asked[0] == "cuda"
    assert asked[-1] == "cpu"
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, QuantWeight):
            assert_equal_weights(got[name], value)
        else:
            assert torch.equal(got[name], value)


def test_two_writers_make_one_copy(source, tmp_path):
    """The lock lets one in; it is free again when that one is gone."""
    from slipstream.backends.svdquant import host_cache

    entered, leave, found = threading.Event(), threading.Event(), []

    def first():
        with host_cache._writing(tmp_path) as is_ours:
            found.append(is_ours)
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(30)
    with host_cache._writing(tmp_path) as is_ours:
        found.append(is_ours)
    leave.set()
    thread.join(30)
    with host_cache._writing(tmp_path) as is_ours:
        found.append(is_ours)
    assert found == [True, False, True]
