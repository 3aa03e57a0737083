"""A network of two joint blocks with a token plan, and faults on demand: for tests of workers.

options["fault"] = (kind, process) makes that process raise, exit, hang or stop itself in the
second block; the process numbers itself with `process`.
"""

import os
import signal
import time

import torch
from fake_net_alias import pack

tokens = pack("backends.architectures.tokens")
plans = pack("backends.architectures.plans")

OVERRIDE = "optimized_attention_override"
HEADS, DIM = 3, 8
process = 0


def attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **options):
    """ComfyUI's calling convention on torch's attention."""
    if not skip_reshape:
        q, k, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def forward(self, x, transformer_options):
        q, k, v = self.qkv(x).chunk(3, -1)
        override = transformer_options.get(OVERRIDE)
        call = attention if override is None else lambda *args: override(attention, *args)
        return x + torch.tanh(call(q, k, v, HEADS))


class FakeTokenNet(torch.nn.Module):
    """x [B,N,24] -> [B,N,24]."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.head = torch.nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x, timestep=None, context=None, transformer_options=None):
        options = transformer_options or {}
        x = x + 0  # the caller's tensor stays as it is
        for index, block in enumerate(self.blocks):
            if index == 1:
                break_down(*options.get("fault", ("", -1)), is_shared=OVERRIDE in options)
            x = block(x, transformer_options=options)
        return self.head(x)


FakeTokenNet.__module__ = "comfy.ldm.fake"
PLAN = tokens.TokenPlan(
    blocks=(
        tokens.Blocks(path="blocks.*", layout=("x",), args={"x": tokens.Tok()}, define=("x",)),
    ),
    end=tokens.Gather(path="head", args={"input": tokens.Tok()}),
)
plans.PLANS["FakeTokenNet"] = PLAN


def break_down(kind, where, *, is_shared):
    """Do to this process what a test asked for."""
    if where != process:
        return
    if kind == "raise":
        raise RuntimeError(f"injected failure in process {process}")
    if kind == "plan" and is_shared:
        raise pack("parallel.shards").PlanError("injected misfit")
    if kind == "exit":
        os._exit(7)
    if kind == "warn":
        print("WARNING: the moon is full", flush=True)
    if kind == "memory":
        raise torch.OutOfMemoryError("injected: CUDA out of memory")
    if kind == "hang":
        time.sleep(1000)
    if kind == "nap":
        time.sleep(0.2)
    if kind == "hang a while":
        time.sleep(4)
    if kind == "hang on the device":
        Hanging.is_asked = True
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


class Hanging:
    """Whether the next exchange and all behind it never reach the device (late_group.py)."""

    is_asked = False


def attention_override():
    """An override of another node."""
    return lambda func, *args, **kwargs: func(*args, **kwargs)
