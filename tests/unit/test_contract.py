"""What every technique relies on in ComfyUI's patcher and sampler, on the stand-in and on the real.

A line here for each host fact: the fake keeps CI without ComfyUI honest, the real one (marker
`host`) breaks first when ComfyUI changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy_home
import fake_patcher
import pytest
import torch

WRAPPERS = (
    "outer_sample",
    "prepare_sampling",
    "sampler_sample",
    "predict_noise",
    "calc_cond_batch",
    "apply_model",
    "diffusion_model",
)
CALLBACKS = ("on_clone", "on_pre_run", "on_prepare_state", "on_cleanup")
NUM_STEPS, NUM_BLOCKS = 2, 4


@dataclass
class Host:
    """make() -> fresh MODEL, 4 blocks of 2 attention calls each; sample(model, **how) -> latent."""

    make: Callable[[], Any]
    sample: Callable[..., torch.Tensor]


def fake_host() -> Host:
    def sample(model: Any, *, cfg: float = 2.0, split: bool = False, callback: Any = None):
        noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        return fake_patcher.sample(
            model, noise, steps=NUM_STEPS, cfg=cfg, split_cond=split, callback=callback
        )

    network = fake_patcher.FakeNet(num_layers=NUM_BLOCKS)
    return Host(lambda: fake_patcher.FakePatcher(fake_patcher.FakeModel(network)), sample)


def real_host() -> Host:
    if comfy_home.in_process() is None:
        pytest.skip(comfy_home.NOT_FOUND)
    import tiny

    return Host(
        lambda: tiny.load("wan"),
        lambda model, **how: tiny.sample(model, "wan", steps=NUM_STEPS, **how),
    )


@pytest.fixture(scope="module", params=["fake", pytest.param("real", marks=pytest.mark.host)])
def host(request: pytest.FixtureRequest) -> Host:
    return fake_host() if request.param == "fake" else real_host()


def wrap(model: Any, kind: str, before: Callable[..., None], key: str = "test") -> None:
    """Have before(executor, args, kwargs) called ahead of everything `kind` wraps."""

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        before(executor, args, kwargs)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(kind, key, wrapper)


def options_of_call(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """transformer_options of an APPLY_MODEL call: its sixth positional argument."""
    assert "transformer_options" not in kwargs
    assert isinstance(args[5], dict)
    return args[5]


def record(model: Any) -> list[str]:
    """Every hook of a run in order; wrappers and callbacks with their positional arguments."""
    events: list[str] = []

    def recorder(kind: str) -> Callable[..., Any]:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            events.append(kind if kind == "diffusion_model" else f"{kind}({len(args)})")
            try:
                return executor(*args, **kwargs)
            finally:
                events.append(f"/{kind}")

        return wrapper

    def attention(func: Any, *args: Any, **kwargs: Any) -> Any:
        events.append("attention")
        return func(*args, **kwargs)

    for kind in WRAPPERS:
        model.add_wrapper_with_key(kind, "test", recorder(kind))
    for kind in CALLBACKS:
        model.add_callback_with_key(
            kind, "test", lambda *args, kind=kind: events.append(f"{kind}({len(args)})")
        )
    model.model_options["transformer_options"]["optimized_attention_override"] = attention
    return events


CALL = ["apply_model(6)", "diffusion_model", *["attention"] * 2 * NUM_BLOCKS]
CALL += ["/diffusion_model", "/apply_model"]
EVALUATION = ["predict_noise(4)", "calc_cond_batch(5)", "on_prepare_state(3)", *CALL]
EVALUATION += ["/calc_cond_batch", "/predict_noise"]
ONE_RUN = ["outer_sample(8)", "prepare_sampling(3)", "/prepare_sampling", "on_pre_run(1)"]
ONE_RUN += ["sampler_sample(8)", *EVALUATION * NUM_STEPS, "/sampler_sample"]
ONE_RUN += ["on_cleanup(1)", "/outer_sample"]


def test_order_of_hooks_and_their_arguments(host):
    model = host.make()
    plain = host.sample(model)
    recorded = model.clone()
    events = record(recorded)
    assert torch.equal(host.sample(recorded), plain)
    assert events == ONE_RUN
    events.clear()
    host.sample(recorded)
    assert events == ONE_RUN, "the second run of a patched MODEL is like the first"
    assert torch.equal(host.sample(model), plain), "the MODEL that was cloned is untouched"


def test_cleanup_after_an_exception_is_inside_outer_sample(host):
    class BoomError(Exception):
        pass

    def boom(*ignored: Any) -> None:
        raise BoomError

    model = host.make().clone()
    events = record(model)
    wrap(model, "predict_noise", boom, key="boom")
    with pytest.raises(BoomError):
        host.sample(model)
    assert events[-4:] == ["/predict_noise", "/sampler_sample", "on_cleanup(1)", "/outer_sample"]


def test_exception_from_the_step_callback_ends_the_run(host):
    """How an interrupt between steps looks to a wrapper."""

    class StopError(Exception):
        pass

    def stop(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        raise StopError

    model = host.make().clone()
    events = record(model)
    with pytest.raises(StopError):
        host.sample(model, callback=stop)
    assert events.count("predict_noise(4)") == 1
    assert events[-2:] == ["on_cleanup(1)", "/outer_sample"]


def test_clone_owns_its_containers_and_shares_objects(host):
    base = host.make()
    first = base.clone()
    assert type(first) is type(base)
    assert first.model is base.model
    thing = object()
    first.model_options["transformer_options"]["ours"] = {"list": [1], "object": thing}
    wrap(first, "predict_noise", lambda *ignored: None)
    first.add_callback_with_key("on_cleanup", "test", lambda patcher: None)
    assert "ours" not in base.model_options["transformer_options"]
    assert not base.get_all_wrappers("predict_noise")
    assert not base.get_all_callbacks("on_cleanup")

    second = first.clone()
    ours = second.model_options["transformer_options"]["ours"]
    ours["list"].append(2)
    assert first.model_options["transformer_options"]["ours"]["list"] == [1]
    assert ours["object"] is thing
    assert second.get_wrappers("predict_noise", "test") == first.get_all_wrappers("predict_noise")
    second.remove_wrappers_with_key("predict_noise", "test")
    second.remove_wrappers_with_key("predict_noise", "never added")
    second.remove_callbacks_with_key("on_cleanup", "test")
    assert len(first.get_wrappers("predict_noise", "test")) == 1
    assert len(first.get_callbacks("on_cleanup", "test")) == 1
    assert not second.get_all_wrappers("predict_noise")


def test_clone_calls_on_clone_with_both(host):
    model, pairs = host.make(), []
    model.add_callback_with_key("on_clone", "test", lambda *patchers: pairs.append(patchers))
    clone = model.clone()
    assert len(pairs) == 1
    assert pairs[0][0] is model
    assert pairs[0][1] is clone


def test_attachments_are_shared_unless_they_say_how_to_clone(host):
    class Remembers:
        def on_model_patcher_clone(self) -> "Remembers":
            return Remembers()

    model, shared = host.make(), object()
    model.set_attachments("shared", shared)
    model.set_attachments("copied", Remembers())
    clone = model.clone()
    assert clone.get_attachment("shared") is shared
    assert type(clone.get_attachment("copied")) is Remembers
    assert clone.get_attachment("copied") is not model.get_attachment("copied")
    assert clone.get_attachment("never set") is None
    clone.remove_attachments("shared")
    assert model.get_attachment("shared") is shared


def test_first_registered_wrapper_is_outermost(host):
    model, order = host.make().clone(), []
    for key in ("one", "two"):
        wrap(model, "predict_noise", lambda *ignored, key=key: order.append(key), key=key)
    host.sample(model)
    assert order == ["one", "two"] * NUM_STEPS


def test_guider_owns_the_options_of_one_run(host):
    """What outer_sample writes reaches every call of this run, and nothing else."""
    model, seen = host.make().clone(), []
    token = object()

    def outer(executor: Any, args: Any, kwargs: Any) -> None:
        guider = executor.class_obj
        assert guider.model_patcher is model
        options = guider.model_options["transformer_options"]
        assert options is not model.model_options["transformer_options"]
        options["token"] = token

    def predict(executor: Any, args: Any, kwargs: Any) -> None:
        seen.append(executor.class_obj.model_options["transformer_options"]["token"])

    wrap(model, "outer_sample", outer)
    wrap(model, "predict_noise", predict)
    wrap(model, "apply_model", lambda _, a, kw: seen.append(options_of_call(a, kw)["token"]))
    host.sample(model)
    assert len(seen) == 2 * NUM_STEPS
    assert all(found is token for found in seen)
    assert "token" not in model.model_options["transformer_options"]


def test_sigmas_and_timesteps(host):
    """outer_sample: sigmas are the fourth argument; predict_noise: the sigma is the second."""
    model, sigmas, timesteps, sample_sigmas = host.make().clone(), [], [], []
    wrap(model, "outer_sample", lambda _, args, kw: sigmas.extend(args[3].tolist()))
    wrap(model, "predict_noise", lambda _, args, kw: timesteps.append(args[1].flatten()[0].item()))
    wrap(
        model,
        "apply_model",
        lambda _, a, kw: sample_sigmas.append(options_of_call(a, kw)["sample_sigmas"].tolist()),
    )
    host.sample(model)
    assert len(sigmas) == NUM_STEPS + 1
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[-1] == 0
    assert timesteps == sigmas[:-1]
    assert sample_sigmas == [sigmas] * NUM_STEPS


@pytest.mark.parametrize(
    ("how", "branches"),
    [
        ({"cfg": 2.0}, [[1, 0]]),
        ({"cfg": 2.0, "split": True}, [[0], [1]]),
        ({"cfg": 1.0}, [[0]]),
    ],
    ids=["batched", "split", "cfg 1"],
)
def test_branches(host, how, branches):
    """cond_or_uncond of the calls of one evaluation; uuids tell the branches apart all run long."""
    model, seen, uuids, batches = host.make().clone(), [], [], []

    def call(executor: Any, args: Any, kwargs: Any) -> None:
        options = options_of_call(args, kwargs)
        seen.append(list(options["cond_or_uncond"]))
        uuids.append(list(options["uuids"]))
        batches.append(len(args[0]))
        assert len(options["sigmas"]) == 1

    wrap(model, "apply_model", call)
    host.sample(model, **how)
    assert seen == branches * NUM_STEPS
    assert batches == [len(branch) for branch in branches] * NUM_STEPS
    first = uuids[: len(branches)]
    assert uuids == first * NUM_STEPS
    flat = [one for batch in first for one in batch]
    assert len(set(flat)) == len(flat) == sum(map(len, branches))
    again, uuids[:] = first, []
    host.sample(model, **how)
    assert uuids[: len(branches)] != again, "another run has other uuids"


def test_split_and_batched_branches_agree_on_the_stand_in():
    """Not so in ComfyUI, where only prompts of other lengths are split."""
    host = fake_host()
    model = host.make()
    torch.testing.assert_close(host.sample(model), host.sample(model, split=True))
    assert not torch.equal(host.sample(model), host.sample(model, cfg=3.0)), "branches differ"


def test_options_of_a_call_are_its_own(host):
    """A model call gets fresh options; the network gets a copy, so its block ids stay inside."""
    model, calls, inside = host.make().clone(), [], []

    def call(executor: Any, args: Any, kwargs: Any) -> None:
        options = options_of_call(args, kwargs)
        assert "left" not in options
        assert "block_index" not in options
        options["left"] = True
        calls.append(options)

    def network(executor: Any, args: Any, kwargs: Any) -> None:
        options = kwargs.get("transformer_options")
        inside.append(options or next(a for a in args if isinstance(a, dict) and "left" in a))

    wrap(model, "apply_model", call)
    wrap(model, "diffusion_model", network)
    host.sample(model)
    assert len({id(options) for options in (*calls, *inside)}) == 2 * NUM_STEPS
    assert [options["block_index"] for options in inside] == [NUM_BLOCKS - 1] * NUM_STEPS
    assert all("block_index" not in options for options in calls)


def test_attention_override_gets_every_call_with_its_block(host):
    model, blocks = host.make().clone(), []

    def override(func: Any, *args: Any, **kwargs: Any) -> Any:
        assert kwargs["_inside_attn_wrapper"] is True
        options = kwargs["transformer_options"]
        heads = kwargs["heads"] if "heads" in kwargs else args[3]
        assert all(isinstance(x, torch.Tensor) for x in args[:3])
        assert isinstance(heads, int)
        blocks.append((options["block_type"], options["block_index"]))
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    host.sample(model)
    per_call = [("double", index) for index in range(NUM_BLOCKS) for _ in range(2)]
    assert blocks == per_call * NUM_STEPS


def test_attention_override_decides_the_result(host):
    """Negative control of every parity test: an override that changes attention is seen."""
    model = host.make()
    broken = model.clone()
    broken.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda func, *args, **kwargs: func(*args, **kwargs) * 0
    )
    difference = (host.sample(broken) - host.sample(model)).abs().max()
    assert difference > 1e-3


def test_step_callback_and_result(host):
    """callback(step, denoised, x, number of steps) after each step; the latent is fp32."""
    model, steps = host.make(), []
    latent = host.sample(model, callback=lambda i, denoised, x, n: steps.append((i, n, x.shape)))
    assert [(i, n) for i, n, _ in steps] == [(0, NUM_STEPS), (1, NUM_STEPS)]
    assert latent.dtype == torch.float32
    assert latent.shape == steps[0][2]
    assert torch.isfinite(latent).all()


@pytest.mark.host
def test_names_of_hooks():
    if comfy_home.in_process() is None:
        pytest.skip(comfy_home.NOT_FOUND)
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    assert tuple(getattr(WrappersMP, name.upper()) for name in WRAPPERS) == WRAPPERS
    assert tuple(getattr(CallbacksMP, name.upper()) for name in CALLBACKS) == CALLBACKS
