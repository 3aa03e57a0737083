"""The wire: values round trip, foreign types are refused by path, hostile frames do nothing."""

import ast
import json
import pickle
import uuid
from dataclasses import is_dataclass

import pytest
import torch
from comfy_home import PACK_ROOT
from slipstream.parallel import messages
from slipstream.parallel.messages import Done, Failed, Forward, Hello, from_bytes, to_bytes
from slipstream.parallel.payload import decode_patches, digest, encode_patches
from slipstream.parallel.wire import Meta, Unsupported, decode, encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]
VALUES = [
    None, True, 0, -3, 1.5, "text", [], [1, [2]], (), (1, ("a",)), {}, {"a": {"b": [1]}},
    {1: "int key", ("t", 2): "tuple key"}, torch.float32, torch.Size([1, 2]), slice(1, None, 2),
    uuid.UUID(int=7), {"x", "y"}, float("inf"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back(value):
    tensors = []
    encoded = json.loads(json.dumps(encode(value, tensors)))
    assert decode(encoded, tensors) == value
    assert type(decode(encoded, tensors)) is type(value)


def test_tensors_travel_beside():
    value = {"a": [torch.ones(2), None], "b": (torch.zeros(()), "c")}
    tensors = []
    encoded = json.loads(json.dumps(encode(value, tensors)))
    assert len(tensors) == 2
    back = decode(encoded, tensors)
    assert back["a"][0] is tensors[0]
    assert back["b"][0] is tensors[1]


def test_devices_become_the_receivers():
    encoded = encode([torch.device("cpu"), torch.device("cuda:3")], [])
    assert decode(encoded, [], device=torch.device("cuda:1")) == [
        torch.device("cpu"),
        torch.device("cuda:1"),
    ]


class Foreign:
    pass


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": {"b": Foreign()}}, "call.a.b is a "),
        ([1, lambda: 0], "call[1] is a builtins.function"),
        ((torch.nn.Linear(1, 1),), "call[0] is a torch.nn.modules.linear.Linear"),
        (b"bytes", "call is a builtins.bytes"),
        ({"i": type("MyInt", (int,), {})(3)}, "call.i is a "),
        (torch.ones(2).to_sparse(), "call is a Tensor"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_foreign_types_are_refused_by_path(value, path):
    with pytest.raises(Unsupported) as caught:
        encode(value, [], "call")
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize(
    "hostile",
    [
        ["eval", "1+1"],
        ["adapter", "os.system", [], []],
        ["dtype", "load"],
        ["dtype", "os"],
        ["global", "builtins", "exec"],
        [["nested"], 1],
    ],
    ids=str,
)
def test_unknown_kinds_are_refused(hostile):
    with pytest.raises((ValueError, TypeError)):
        decode(hostile, [])


EXAMPLES = [
    Hello(3), Done({"a": 1}), Failed("error", "E: no", "trace"),
    Forward("key", "g", "_forward", [["x"], {}, {}], [[[1, 2], "float32", True]], {}),
]  # fmt: skip


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_messages_round_trip(message):
    tensors = [torch.ones(2, 3), torch.zeros(0, dtype=torch.bfloat16)]
    back, metas = from_bytes(to_bytes(message, tensors))
    assert back == message
    assert metas == [Meta.of(t) for t in tensors]


def test_every_message_is_frozen_and_known():
    kinds = [
        c for c in vars(messages).values() if getattr(c, "__module__", "") == messages.__name__
    ]
    kinds = [c for c in kinds if is_dataclass(c)]
    assert {c.__name__ for c in kinds} == set(messages._KINDS)
    for cls in kinds:
        assert cls.__dataclass_params__.frozen


@pytest.mark.parametrize(
    "frame",
    [
        b"not json",
        b"[]",
        b"{}",
        b'{"kind": "Popen", "values": {}, "tensors": []}',
        b'{"kind": "Done", "values": {"no": 1}, "tensors": []}',
        b'{"kind": "Done", "values": {}, "tensors": [["a"]]}',
        pickle.dumps({"kind": "Done"}),
    ],
    ids=str,
)
def test_frames_that_are_no_messages(frame):
    with pytest.raises(ValueError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        from_bytes(frame)


def unpickling(source):
    """What in a source file could unpickle: imports of pickle, torch.load, Connection.recv()."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if "pickle" in a.name]
        elif isinstance(node, ast.ImportFrom) and "pickle" in (node.module or ""):
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append("torch.load")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            on_connection = ast.unparse(node.func.value).endswith("_connection")
            if on_connection and node.func.attr in ("send", "recv"):
                found.append(node.func.attr)
    return found


def test_nothing_in_parallel_unpickles():
    """Connection.send, recv and pickles would run the code of whoever reaches the port."""
    for path in (PACK_ROOT / "parallel").glob("*.py"):
        assert unpickling(path.read_text()) == [], path
    for bad in ("import pickle", "torch.load(f)", "self._connection.recv()"):
        assert unpickling(bad)


# --- patches


class Adapter:
    """Stands for one of ComfyUI's weight adapters."""

    def __init__(self, keys, weights):
        self.loaded_keys, self.weights = keys, weights


def parts(value):
    if isinstance(value, Adapter):
        return "Adapter", sorted(value.loaded_keys), value.weights
    return None


def make(name, keys, weights):
    assert name == "Adapter"
    return Adapter(set(keys), weights)


def patches(value):
    return {"a.weight": [(1.0, value, 1.0, None, None)]}


def test_patches_round_trip_with_equal_hashes():
    adapter = Adapter({"up", "down"}, (torch.ones(4, 2), torch.zeros(2, 4), 4.0, None, None, None))
    everything = {
        **patches(adapter),
        "b.bias": [(0.5, ("diff", (torch.ones(3),)), 1.0, (0, 1, 2), None)],
    }
    encoded, tensors, sha256 = encode_patches(everything, parts)
    back = decode_patches(json.loads(json.dumps(encoded)), tensors, make)
    assert digest(*encode_patches(back, parts)[:2]) == sha256
    found = back["a.weight"][0][1]
    assert found.loaded_keys == {"up", "down"}
    assert torch.equal(found.weights[0], adapter.weights[0])
    assert back["b.bias"][0][3] == (0, 1, 2)


def test_another_value_has_another_hash():
    def sha256(value):
        return encode_patches(patches(("diff", (value,))), parts)[2]

    assert sha256(torch.ones(3)) != sha256(torch.tensor([1.0, 1.0, 1.0001]))
    assert sha256(torch.ones(3)) != sha256(torch.ones(3, 1))
    assert sha256(torch.ones(3)) != sha256(torch.ones(3, dtype=torch.float64))


def test_a_patch_with_a_function_cannot_travel():
    merge = {"a.weight": [(1.0, ("diff", (torch.ones(1),)), 1.0, None, lambda w: w)]}
    with pytest.raises(Unsupported, match=r"patches.a.weight\[0\]\[4\]"):
        encode_patches(merge, parts)


def test_patches_admit_nothing_else():
    with pytest.raises(ValueError, match="unknown kind"):
        decode_patches(["dict", ["a", ["object", "os.system"]]], [], make)
