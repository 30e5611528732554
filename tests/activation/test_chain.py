"""The values of the budget problem, and the simulator that replays schedules."""

from __future__ import annotations

import dataclasses

import pytest

from mlsys_engine.activation.chain import (
    BlockCosts,
    Chain,
    OptionCosts,
    Schedule,
    Step,
    option_letters,
)
from mlsys_engine.activation.simulate import simulate
from mlsys_engine.errors import ConfigError

KEEP = OptionCosts(
    name="keep", forward_s=2, backward_s=3, saved_bytes=10, forward_peak_bytes=11, backward_peak_bytes=14
)
BLOCK = BlockCosts(
    name="b",
    input_bytes=4,
    options=(KEEP,),
    drop_forward_s=1,
    drop_peak_bytes=6,
    output_gradient_bytes=5,
)
CHAIN = Chain(blocks=(BLOCK,) * 3)


def schedule(text: str) -> Schedule:
    actions = {"D": "drop", "C": "checkpoint", "B": "backward", "K": "option"}
    steps = tuple(
        Step(action=actions[word[0]], block=int(word[1:]), option="keep" if word[0] == "K" else None)
        for word in text.split()
    )
    return Schedule(steps=steps, seconds=0, peak_bytes=0, budget_bytes=0)


def test_the_simulator_counts_what_is_held_in_every_step() -> None:
    everything = simulate(CHAIN, schedule("K0 K1 K2 B2 B1 B0"))
    assert (everything.seconds, everything.peak_bytes) == (15, 2 * 10 + 14)
    # The last forward of block 1 runs beside the 5 bytes of block 1's output gradient; block 2's backward
    # beside its own stored input.
    thrifty = simulate(CHAIN, schedule("C0 D1 K2 B2 C0 K1 B1 K0 B0"))
    assert (thrifty.seconds, thrifty.peak_bytes) == (18, max(4 + 14, 4 + 11 + 5))


def test_an_input_that_cannot_be_recomputed_is_stored_beside_what_was_saved() -> None:
    apart = Chain(blocks=(BLOCK, dataclasses.replace(BLOCK, splittable=False), BLOCK))
    assert simulate(apart, schedule("K0 K1 K2 B2 B1 B0")).peak_bytes == 2 * 10 + 4 + 14
    # Stored once it exists, whatever the step says: so block 0 need not be run again before block 1.
    assert simulate(apart, schedule("C0 D1 K2 B2 K1 B1 K0 B0")).seconds == 17


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("K1", "Step 0, keep:1.*input is not there"),
        ("D0 D1 K2 B2 K1", "Step 4, keep:1.*input is not there"),
        ("K0 K0", "already has what it needs"),
        ("K0 K1 B1", "backward of block 2 comes first"),
        ("K0 K1 D2 B2", "no option's forward"),
        ("K0 K1 K2 B2 K2", "its backward has run"),
        ("K3", "does not exist"),
        ("K0 K1 K2 B2", "2 of 3 backwards missing"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused_at_its_step(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        simulate(CHAIN, schedule(text))


def test_dropping_a_stored_input_lets_it_go() -> None:
    simulate(CHAIN, schedule("C0 C1 K2 B2 K1 B1 K0 B0"))
    with pytest.raises(ConfigError, match=r"Step 5, keep:1.*input is not there"):
        simulate(CHAIN, schedule("C0 C1 D1 K2 B2 K1 B1 K0 B0"))


def test_a_schedule_prints_letters_and_goes_to_json_and_back() -> None:
    made = dataclasses.replace(schedule("C0 D1 K2 B2 K0 K1 B1 B0"), seconds=1.5, peak_bytes=7, budget_bytes=9)
    assert str(made) == (
        "1.5 s, peak 7 of 9 bytes; D drop, C checkpoint, B backward, K keep\nC0 D1 K2 B2 K0 K1 B1 B0"
    )
    assert made.options_of_last_forwards() == {0: "keep", 1: "keep", 2: "keep"}
    assert Schedule.from_json(made.to_json()) == made
    assert Chain.from_json(CHAIN.to_json()) == CHAIN
    assert str(CHAIN) == "chain of 3 blocks with options keep"


def test_options_share_no_letter_with_each_other_or_with_the_other_steps() -> None:
    letters = option_letters(["keep", "packed", "packed-int8", "bcd", "keep"])
    assert letters == {"keep": "K", "packed": "P", "packed-int8": "A", "bcd": "E"}
    many = option_letters([f"o{n}" for n in range(30)])
    assert len(set(many.values())) == 30


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": ""}, "An option named ''"),
        ({"name": "a b"}, "An option named 'a b'"),
        ({"forward_s": -1}, "forward_s=-1"),
        ({"backward_s": float("nan")}, "backward_s=nan"),
        ({"saved_bytes": -1}, "saved_bytes=-1"),
        ({"saved_bytes": 1.0}, "saved_bytes=1.0"),
        ({"saved_bytes": True}, "saved_bytes=True"),
        ({"forward_peak_bytes": 9}, "less than its saved_bytes=10"),
        ({"backward_peak_bytes": 2**51}, "backward_peak_bytes="),
    ],
)
def test_costs_that_cannot_be_are_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        dataclasses.replace(KEEP, **change)


def test_a_chain_and_its_blocks_need_parts_with_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match="A chain without blocks"):
        Chain(blocks=())
    for options in ((), (KEEP, KEEP)):
        with pytest.raises(ConfigError, match="at least one option, each with a name"):
            dataclasses.replace(BLOCK, options=options)
    with pytest.raises(ConfigError, match="asked for an option 'packed'"):
        BLOCK.option("packed")
    with pytest.raises(ConfigError, match="A step 'keep'"):
        Step(action="keep", block=0)
    with pytest.raises(ConfigError, match="A step 'drop' of block 0 with option 'keep'"):
        Step(action="drop", block=0, option="keep")
