"""A worker program without ComfyUI: the pack's own message loop around tests/fake_net.py."""

import importlib
import importlib.util
import os
import sys
import time
from multiprocessing.connection import Client
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ALIAS = "slipstream_worker"


def load_pack():
    root = TESTS.parent
    spec = importlib.util.spec_from_file_location(
        ALIAS, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    sys.modules[ALIAS] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[ALIAS])


def main(host, port, number):
    sys.path.insert(0, str(TESTS))
    load_pack()
    import fake_net
    import late_group
    import torch
    from fake_net_alias import pack

    late_group.install_if_asked(pack("parallel.comm"))
    lifeline = pack("parallel.lifeline").Lifeline()
    messages = pack("parallel.messages")
    channel = pack("parallel.channel").Channel(Client((host, int(port)), authkey=lifeline.key))
    channel.send(messages.Hello(int(number)))
    start, _ = channel.recv()
    torch.set_num_threads(1)
    fake_net.process = int(number)
    print(f"fake worker {number} is up", flush=True)
    channel.send(messages.Done())
    if os.environ.get("SLIPSTREAM_TEST_NO_MEASURE"):
        fake_net.Hanging.is_asked = True
    server = pack("parallel.serve").Server(channel, Models(), torch.device("cpu"), start.idle_s)
    lifeline.on_abort = server.abort
    server.serve()
    os._exit(0)


class Model:
    def __init__(self, seed):
        import fake_net

        self.network = fake_net.FakeTokenNet(seed)

    def begin(self, facts, decide):
        time.sleep(float(os.environ.get("SLIPSTREAM_TEST_BEGIN_S", "0")))
        from fake_net_alias import pack

        patcher = pack("bench.reference").ReferencePatcher(self)
        self.diffusion_model = self.network
        return pack("parallel.runs").WorkerRun(patcher, facts, {})


class Models:
    """A model is a seed, its patches are added to the head's bias."""

    def __init__(self):
        self.models = {}

    def __getitem__(self, key):
        return self.models[key]

    def load(self, message):
        self.models[message.key] = Model(message.index)
        return self.facts()

    def patch(self, message, tensors):
        from fake_net_alias import pack

        payload = pack("parallel.payload")
        patches = payload.decode_patches(message.patches, tensors, None)
        head = self.models[message.key].network.head
        for ((_, (_, (value,)), *_),) in patches.values():
            head.bias.data += value
        return {"sha256": payload.encode_patches(patches, lambda value: None)[2]}

    def park(self, key):
        self.parked = [*getattr(self, "parked", ()), key]

    def unload(self, key):
        for known in [key] if key else list(self.models):
            self.models.pop(known, None)

    def facts(self):
        return {"models": len(self.models), "private_bytes": None, "device_bytes": None}


if __name__ == "__main__":
    main(*sys.argv[1:])
