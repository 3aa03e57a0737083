"""Block overrides on dummy networks with every calling convention, in-place blocks among them."""

import pytest
import torch
from slipstream.backends.architectures import JOIN_CAT, Architecture, Carry, Notes, Stack
from slipstream.backends.cache.borders import BorderCheck
from slipstream.backends.cache.stack import (
    FRESH,
    NOTHING,
    STORED,
    StackOverride,
    logical_stack,
    overridden,
)
from torch import nn

DIM = 8


class Single(nn.Module):
    """x -> x, new tensor."""

    def __init__(self, seed):
        super().__init__()
        self.num_runs = 0
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(DIM, DIM, generator=generator) * 0.1

    def change(self, x):
        self.num_runs += 1
        return torch.tanh(x @ self.weight)

    def forward(self, x, scale=1.0):
        return x + scale * self.change(x)


class SingleInPlace(Single):
    def forward(self, x, scale=1.0):
        x += scale * self.change(x)
        return x


class Dual(Single):
    """img, txt by keyword, written in place; the image sees the text."""

    def forward(self, img, txt):
        mean = txt.mean(1, keepdim=True)
        img += self.change(img + mean)
        txt += 0.5 * torch.tanh(txt @ self.weight)
        return img, txt


class TextFirst(Single):
    """Called with the image first, returns the text first."""

    def forward(self, hidden_states, encoder_hidden_states):
        img = hidden_states + self.change(hidden_states)
        return encoder_hidden_states * 1.1, img


class Packed(Single):
    """One tuple in, one tuple out."""

    def forward(self, x):
        video, audio = x
        return video + self.change(video), audio + 0.1


class Positional(Single):
    """forward(*args): text, image; the last block drops the text."""

    is_last = False

    def forward(self, *args):
        txt, img = args
        img = img + self.change(img)
        return (None if self.is_last else txt * 0.9), img


DUAL = Carry(streams=("img", "txt"), args=("img", "txt"), returns=("img", "txt"))


class Network(nn.Module):
    """A host: its own loops over its own lists, with an optional add between the blocks."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.add = kind, 0.0
        make = {
            "single": lambda: [Single(i) for i in range(6)],
            "in_place": lambda: [SingleInPlace(i) for i in range(6)],
            "dual": lambda: [Dual(i) for i in range(3)],
            "text_first": lambda: [TextFirst(i) for i in range(6)],
            "packed": lambda: [Packed(i) for i in range(6)],
            "positional": lambda: [Positional(i) for i in range(6)],
        }[kind]
        self.blocks = nn.ModuleList(make())
        self.tail = nn.ModuleList(SingleInPlace(10 + i) for i in range(4) if kind == "dual")
        if kind == "positional":
            self.blocks[-1].is_last = True

    def forward(self, x, txt):
        x = x * 1.0  # the embedder: blocks never see the latent itself
        if self.kind in ("single", "in_place"):
            for block in self.blocks:
                x = block(x, scale=0.5)
                if self.add:
                    x += self.add
            return x
        if self.kind == "packed":
            state = (x, txt)
            for block in self.blocks:
                state = block(state)
            return torch.cat(state, 1)
        if self.kind == "positional":
            for block in self.blocks:
                txt, x = block(txt, x)
            return x
        return self.two_streams(x, txt)

    def two_streams(self, x, txt):
        txt = txt * 1.0
        for block in self.blocks:
            if self.kind == "dual":
                x, txt = block(img=x, txt=txt)
            else:
                txt, x = block(x, encoder_hidden_states=txt)
            if self.add:
                x += self.add
        x = torch.cat((txt, x), 1)
        for block in self.tail:
            x = block(x)
            if self.add:
                x += self.add
        return x[:, txt.shape[1] :]

    @property
    def num_runs(self):
        return sum(m.num_runs for m in (*self.blocks, *self.tail))


STACKS = {
    "single": (Stack(blocks="blocks", block_type="a"),),
    "in_place": (Stack(blocks="blocks", block_type="a"),),
    "dual": (
        Stack(blocks="blocks", block_type="double", carry=DUAL),
        Stack(blocks="tail", block_type="single", joins=JOIN_CAT),
    ),
    "text_first": (
        Stack(
            blocks="blocks",
            block_type="a",
            carry=Carry(
                streams=("img", "txt"),
                args=("hidden_states", "encoder_hidden_states"),
                returns=("txt", "img"),
            ),
        ),
    ),
    "packed": (
        Stack(
            blocks="blocks",
            block_type="a",
            carry=Carry(
                streams=("video", "audio"), args=("x",), returns=("video", "audio"), packed=True
            ),
        ),
    ),
    "positional": (
        Stack(
            blocks="blocks",
            block_type="a",
            carry=Carry(
                streams=("txt", "img"),
                args=("context", "x"),
                returns=("txt", "img"),
                dropped=("txt",),
            ),
        ),
    ),
}
KINDS = tuple(STACKS)


def architecture(kind, joins=None):
    stacks = STACKS[kind]
    if joins is not None:
        stacks = (stacks[0], Stack(blocks="tail", block_type="single", joins=joins))
    return Architecture(class_name="Network", name="Dummy", stacks=stacks, notes=Notes())


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, 5, DIM, generator=generator),
        torch.randn(1, 3, DIM, generator=generator),
    )


class Recorder:
    """The other side of an override: what it was asked and given."""

    def __init__(self, network, kind, **settings):
        self.blocks = logical_stack(network, architecture(kind))
        self.network, self.settings = network, settings
        self.metrics, self.residual = [], None

    def run(self, x, txt, *, reuse, **more):
        def decide(metric):
            self.metrics.append(metric)
            return reuse

        last = len(self.blocks) - 1 - self.settings.get("back", 0)
        override = StackOverride(
            self.blocks,
            front=self.settings.get("front", 1),
            last=last,
            reuse=None,
            decide=decide,
            predict=lambda: self.residual,
            between=self.settings.get("between", NOTHING),
            **more,
        )
        before = self.network.num_runs
        with override:
            out = self.network(x, txt)
        if override.residual is not None:
            self.residual = override.residual
        assert self.network.num_runs - before == override.num_computed
        assert override.num_computed + override.num_skipped == len(self.blocks)
        return out, override


def clean(network):
    return all("forward" not in module.__dict__ for module in network.modules())


@pytest.mark.parametrize("between", [NOTHING, FRESH, STORED])
@pytest.mark.parametrize(("front", "back"), [(1, 0), (2, 1), (1, 2), (4, 0), (5, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_reuse_at_the_same_input_gives_the_same_output(kind, front, back, between):
    network = Network(kind)
    x, txt = inputs()
    plain = network(x, txt)
    recorder = Recorder(network, kind, front=front, back=back, between=between)
    computed, first = recorder.run(x, txt, reuse=False)
    assert torch.equal(computed, plain), "a computed call must not change the result"
    assert first.stored_at == len(recorder.blocks) - 1 - back
    assert not first.applied
    reused, second = recorder.run(x, txt, reuse=True)
    assert second.applied
    assert second.num_computed == front + back
    assert torch.allclose(reused, plain, atol=1e-5)
    assert torch.equal(recorder.metrics[0], recorder.metrics[1])
    assert clean(network)
    assert torch.equal(network(x, txt), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_metric_is_what_the_front_blocks_added_to_the_image(kind):
    network = Network(kind)
    x, txt = inputs()
    recorder = Recorder(network, kind)
    recorder.run(x, txt, reuse=False)
    block = recorder.blocks[0]
    if kind == "dual":
        expected = torch.tanh((x + txt.mean(1, keepdim=True)) @ block.module.weight)
    else:
        scale = 0.5 if kind in ("single", "in_place") else 1.0
        expected = scale * torch.tanh(x @ block.module.weight)
    assert torch.allclose(recorder.metrics[0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_never_written_to(kind):
    network = Network(kind)
    x, txt = inputs()
    kept = x.clone(), txt.clone()
    recorder = Recorder(network, kind)
    recorder.run(x, txt, reuse=False)
    residual = [None if r is None else r.clone() for r in recorder.residual]
    recorder.run(x, txt, reuse=True)
    assert torch.equal(x, kept[0])
    assert torch.equal(txt, kept[1])
    for now, then in zip(recorder.residual, residual, strict=True):
        assert (now is None) == (then is None)
        assert now is None or torch.equal(now, then), "a reused call changed what is stored"


@pytest.mark.parametrize("kind", ["single", "in_place", "dual"])
def test_deltas_leave_out_what_the_host_adds_between_blocks(kind):
    """ControlNet: adds differ per step, so the residual must hold the blocks' share only."""
    network = Network(kind)
    x, txt = inputs()
    errors = {}
    for between in (NOTHING, FRESH):
        recorder = Recorder(network, kind, between=between)
        network.add = 0.3
        recorder.run(x, txt, reuse=False)
        network.add = 0.6
        expected = network(x, txt)
        reused, _ = recorder.run(x, txt, reuse=True)
        errors[between] = (reused - expected).abs().mean().item()
    network.add = 0.0
    assert errors[FRESH] < 0.5 * errors[NOTHING]


@pytest.mark.parametrize("kind", ["single", "in_place", "dual"])
def test_stored_adds_are_not_added_twice(kind):
    """An injector reads the stream, which a reused call does not have: its old add stands in."""
    network = Network(kind)
    network.add = 0.3
    x, txt = inputs()
    plain = network(x, txt)
    errors = {}
    for between in (NOTHING, STORED):
        recorder = Recorder(network, kind, between=between)
        recorder.run(x, txt, reuse=False)
        reused, _ = recorder.run(x, txt, reuse=True)
        errors[between] = (reused - plain).abs().mean().item()
    assert errors[STORED] < 1e-5
    assert errors[NOTHING] > 1


def test_decision_known_beforehand_asks_nothing_and_observes_if_wanted():
    network = Network("in_place")
    blocks = logical_stack(network, architecture("in_place"))
    x, txt = inputs()
    seen = []

    def run(observe):
        with StackOverride(
            blocks, front=2, last=5, reuse=False, decide=pytest.fail,
            predict=pytest.fail, observe=observe,
        ):  # fmt: skip
            network(x, txt)

    run(None)
    run(seen.append)
    assert len(seen) == 1
    assert torch.isfinite(seen[0]).all()


def test_front_zero_decides_before_any_block():
    network = Network("dual")
    recorder = Recorder(network, "dual", front=0)
    x, txt = inputs()
    plain, _ = recorder.run(x, txt, reuse=False)
    reused, override = recorder.run(x, txt, reuse=True)
    assert recorder.metrics == [None, None]
    assert override.num_computed == 0
    assert torch.allclose(reused, plain, atol=1e-5)


def test_probe_sees_the_first_blocks_arguments():
    network = Network("dual")
    recorder = Recorder(network, "dual", front=0)
    x, txt = inputs()
    recorder.run(x, txt, reuse=False, probe=lambda block, args, kwargs: kwargs["img"].clone() * 2)
    assert torch.equal(recorder.metrics[0], x * 2)


def test_front_blocks_that_were_not_called_leave_no_metric():
    """A patch may replace block 0: then there is nothing to compare."""
    network = Network("single")
    recorder = Recorder(network, "single", front=1)
    first, network.blocks = network.blocks[0], nn.ModuleList(list(network.blocks)[1:])
    decided = []
    override = StackOverride(
        recorder.blocks, front=1, last=5, reuse=None,
        decide=lambda metric: bool(decided.append(metric)), predict=pytest.fail,
    )  # fmt: skip
    with override:
        network(*inputs())
    assert decided == [None]
    assert override.num_computed == 5
    assert "forward" not in first.__dict__


def test_forwards_are_put_back_after_an_exception():
    network = Network("single")
    recorder = Recorder(network, "single")
    network.blocks[4].change = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        recorder.run(*inputs(), reuse=False)
    assert clean(network)


def test_an_instance_forward_that_was_there_is_called_and_put_back():
    """Offload and torch.compile put one there."""
    network = Network("single")
    calls = []
    block = network.blocks[3]
    inner = block.forward

    def hook(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    block.__dict__["forward"] = hook
    recorder = Recorder(network, "single")
    recorder.run(*inputs(), reuse=False)
    assert calls == [1]
    assert block.__dict__["forward"] is hook
    recorder.run(*inputs(), reuse=True)
    assert calls == [1], "a skipped block must not run the hook below"


def test_blocks_compiled_in_place_are_skipped_too():
    network = Network("single")
    for block in network.blocks:
        block.compile(backend="eager")
    slots = [block.__dict__["_compiled_call_impl"] for block in network.blocks]
    recorder = Recorder(network, "single")
    x, txt = inputs()
    plain, _ = recorder.run(x, txt, reuse=False)
    reused, override = recorder.run(x, txt, reuse=True)
    assert override.num_skipped == 5
    assert torch.allclose(reused, plain, atol=1e-5)
    assert [block.__dict__["_compiled_call_impl"] for block in network.blocks] == slots


def test_overridden_restores_in_reverse_order():
    module = Single(0)
    with overridden([(module, lambda x: 1), (module, lambda x: 2)]):
        assert module(torch.zeros(1)) == 2
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("kind", KINDS)
def test_borders_match_where_the_data_says_so(kind):
    network = Network(kind)
    check = BorderCheck()
    recorder = Recorder(network, kind)
    recorder.run(*inputs(), reuse=False, watch=check)
    assert check.close() == (False, False)
    assert check.reshaped is None


def test_borders_show_an_add_between_blocks():
    network = Network("in_place")
    network.add = 0.1
    check = BorderCheck()
    Recorder(network, "in_place").run(*inputs(), reuse=False, watch=check)
    assert check.close() == (True, False)


def test_borders_show_a_wrong_join():
    network = Network("dual")
    check = BorderCheck()
    blocks = logical_stack(network, architecture("dual", joins="img,txt"))
    override = StackOverride(
        blocks, front=1, last=6, reuse=False, decide=pytest.fail, predict=pytest.fail, watch=check
    )
    with override:
        network(*inputs())
    assert check.close() == (False, True)
