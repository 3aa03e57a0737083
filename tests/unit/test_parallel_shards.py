"""Shards and arrangements as integers: every legal factorisation, streams of any length."""

import itertools
import random

import pytest
from slipstream.parallel.shards import PlanError, Shards, arrange, even_split, joined, pick

WORLDS = range(1, 9)
LAYOUTS = [("x",), ("txt", "img"), ("img", "txt"), ("txt", "ref", "img")]


def factors(world):
    return [(u, world // u) for u in range(1, world + 1) if world % u == 0]


def made(rank, world, lengths, replicate=()):
    shards = Shards(rank=rank, world=world, replicate=replicate)
    for stream, length in lengths.items():
        shards.define(stream, length)
    return shards


def tokens(spans):
    return [p for start, length in spans for p in range(start, start + length)]


@pytest.mark.parametrize("length", [0, 1, 7, 64, 1000])
def test_even_split_adds_up_and_is_even(length):
    for parts in WORLDS:
        split = even_split(length, parts)
        assert sum(split) == length
        assert max(split) - min(split) <= 1
        assert list(split) == sorted(split, reverse=True)


def test_joined_keeps_the_tokens():
    assert joined([(0, 2), (2, 3), (7, 0), (5, 1), (9, 1)]) == ((0, 6), (9, 1))
    assert joined([(3, 2), (0, 3)]) == ((3, 2), (0, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_factorisation_delivers_every_token_once(world, layout):
    """Chunks and replicated tokens are all tokens; the canonical order is found again."""
    random.seed(world)
    for ulysses, ring in factors(world):
        lengths = {s: random.randint(1, 40) for s in layout}
        plans = [
            arrange(made(rank, world, lengths), layout, ulysses=ulysses, ring=ring)
            for rank in range(world)
        ]
        total = sum(lengths.values())
        for rank, plan in enumerate(plans):
            everything = [t for c in plan.chunks for t in tokens(c)] + tokens(plan.replicated)
            assert sorted(everything) == list(range(total))
            assert tokens(plan.gathered) == everything
            order = plan.to_canonical
            back = everything if order is None else [everything[i] for i in tokens(order)]
            assert back == list(range(total))
            local = sum(length for length, _ in plan.segments)
            assert local == plan.rows[rank] + plan.num_replicated
            assert plan.chunks == plans[0].chunks
            keys = [t for c in range(ring) for t in tokens(plan.keys(c))]
            assert sorted(keys) == list(range(total)), "every key counts once"
            queries = tokens(plan.queries(rank // ulysses))
            assert set(tokens(plan.replicated)) <= set(queries)


@pytest.mark.parametrize("world", WORLDS)
def test_local_tokens_of_all_ranks_are_the_stream(world):
    lengths = {"txt": 77, "img": 101}
    for streams in [("txt",), ("img",), ("txt", "img")]:
        seen = [made(r, world, lengths).positions(streams) for r in range(world)]
        assert sorted(itertools.chain(*seen)) == list(range(sum(lengths[s] for s in streams)))


def test_a_stream_shorter_than_the_world_is_replicated():
    shards = made(2, 4, {"txt": 3, "img": 9})
    assert shards.replicated == {"txt"}
    assert shards.local(("txt",)) == 3
    assert shards.offset("txt") == 0
    assert shards.positions(("txt", "img")) == [0, 1, 2, 3 + 5, 3 + 6]


def test_a_plan_can_keep_a_stream_whole():
    shards = made(1, 2, {"txt": 50, "img": 50}, replicate=("txt",))
    assert shards.local(("txt",)) == 50
    assert shards.local(("img",)) == 25


def test_redefining_changes_the_version_and_the_parts():
    shards = made(0, 2, {"img": 4})
    before = shards.version
    shards.replicate("txt", 5)
    shards.define("img", 6, parts=(2, 4))
    assert shards.version > before
    assert shards.parts["img"] == (2, 4)
    assert shards.total(("txt", "img")) == 11


def test_pick_and_cut_on_tensors():
    torch = pytest.importorskip("torch")
    rows = torch.arange(10).view(1, 10)
    assert pick(rows, 1, [(8, 2), (0, 1)]).tolist() == [[8, 9, 0]]
    assert pick(rows, 1, []).shape == (1, 0)
    whole = torch.arange(12).view(1, 12)
    parts = [made(r, 3, {"txt": 4, "img": 8}).cut(whole, 1, ("txt", "img")) for r in range(3)]
    assert [p.tolist()[0] for p in parts] == [
        [0, 1, 4, 5, 6], [2, 7, 8, 9], [3, 10, 11],
    ]  # fmt: skip


def test_plan_error_is_not_a_user_mistake():
    assert not issubclass(PlanError, ValueError)
