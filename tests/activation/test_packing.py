"""Packed activations: the reference's bits, bounds against float64, shapes and values at the edges."""

from __future__ import annotations

import hashlib
import warnings

import pytest
import torch
from torch import Tensor

from mlsys_engine.activation import packing, torch_packing
from mlsys_engine.activation.packing import FORMS, Packed, pack
from mlsys_engine.errors import ConfigError
from mlsys_engine.optim.kernels import operators
from tests.activation.packing_cases import IN_BLOCKS, SIZES, TAKEN, hard_tensors, same_values, spread
from tests.support.ranks import run_ranks

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Half of the spacing of a dtype's numbers near 1: what its own rounding of an unpacked value may add.
OWN_ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


def unpacked(tensor: Tensor, form: str, seed: int = 0) -> Tensor:
    return pack(tensor, form, seed=seed).unpack()


def of_blocks(values: Tensor) -> Tensor:
    """The largest magnitude of each element's block, in float64."""
    padded = torch.nn.functional.pad(values.double().abs(), (0, -values.numel() % 64)).reshape(-1, 64)
    return padded.amax(dim=1, keepdim=True).expand(-1, 64).reshape(-1)[: values.numel()]


@pytest.mark.parametrize(("form", "dtype"), TAKEN)
def test_packs_and_unpacks_to_the_bits_of_torchs_operations(form: str, dtype: torch.dtype) -> None:
    for tensor in hard_tensors(dtype):
        ours = pack(tensor, form, seed=3)
        wanted = torch_packing.pack(tensor, form, 3)
        if form == "bf16":  # the payload of a nan is anybody's
            assert same_values(ours.data.view(torch.bfloat16), wanted.view(torch.bfloat16))
        else:
            assert torch.equal(ours.data, wanted)
        assert ours.num_bytes == packing.packed_bytes(form, tensor.numel()) == ours.data.numel()
        back = ours.unpack()
        assert back.dtype == dtype
        assert back.shape == (tensor.numel(),)
        assert same_values(back, torch_packing.unpack(ours.data, form, dtype, tensor.numel()))


@pytest.mark.parametrize("numel", SIZES)
def test_masks_come_back_as_they_were(numel: int) -> None:
    mask = spread(numel, torch.bool)
    assert torch.equal(unpacked(mask, "mask"), mask)
    assert pack(mask, "mask").num_bytes == (numel + 7) // 8


def test_a_byte_of_a_mask_that_is_not_zero_is_true() -> None:
    mask = torch.arange(256, dtype=torch.uint8).view(torch.bool)
    assert unpacked(mask, "mask").tolist() == [False] + [True] * 255


@pytest.mark.parametrize("dtype", FLOATS)
def test_positive_gives_relus_gradient_to_the_bit_also_for_nan(dtype: torch.dtype) -> None:
    for tensor in hard_tensors(dtype):
        result = tensor.reshape(-1).relu()
        gradient = spread(result.numel(), dtype, seed=9)
        from_result, from_bits = (
            torch.ops.aten.threshold_backward(gradient, saved, 0)
            for saved in (result, unpacked(result, "positive"))
        )
        assert torch.equal(from_result, from_bits)


def test_bf16_comes_back_within_half_a_bfloat16_spacing() -> None:
    values = spread(1000, torch.float32)
    assert (
        (unpacked(values, "bf16").double() - values.double()).abs() <= values.double().abs() * 2**-8
    ).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("numel", [1, 65, 70_001])
def test_int8_comes_back_within_one_step_of_its_block(dtype: torch.dtype, numel: int) -> None:
    values = spread(numel, dtype)
    # A step is largest / 127. It, its inverse, and the two products are rounded to float32: 4 roundings of at
    # most 127 steps each.
    step = of_blocks(values) / 127 * (1 + 127 * 4 * 2.0**-24)
    error = (unpacked(values, "int8").double() - values.double()).abs()
    floor = torch.finfo(torch.float32).smallest_normal
    assert (error <= step + of_blocks(values) * OWN_ROUNDING[dtype] + floor).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("numel", [1, 65, 70_001])
def test_fp8_comes_back_within_an_eighth_or_a_tiny_part_of_its_block(dtype: torch.dtype, numel: int) -> None:
    values = spread(numel, dtype)
    # e4m3 is spaced by at most 1/8 of the value; below 2^-6 by 2^-9, and its unit is at most largest / 224.
    spacing = torch.maximum(values.double().abs() / 8, of_blocks(values) / 224 * 2.0**-9)
    error = (unpacked(values, "fp8").double() - values.double()).abs()
    most = values.double().abs() + spacing
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error <= spacing + most * OWN_ROUNDING[dtype] + tiny).all()


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_the_mean_of_many_draws_is_what_was_packed(form: str) -> None:
    values, draws = spread(256, torch.float32), 2000
    mean = sum(unpacked(values, form, seed=seed).double() for seed in range(draws)) / draws
    largest = of_blocks(values)
    eighth = torch.maximum(values.double().abs() / 8, largest / 224 * 2.0**-9)
    spacing = largest / 127 if form == "int8" else eighth
    # 8 random bits leave at most spacing / 512; a draw's deviation is at most spacing / 2, and 5 of them are
    # not exceeded by 256 means. Rounded to nearest, most values would be many times further off.
    assert ((mean - values.double()).abs() <= spacing * (1 / 512 + 5 * 0.5 / draws**0.5 + 1e-4)).all()


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_numbers_that_are_codes_survive_unchanged(form: str) -> None:
    whole = torch.arange(-16.0, 17.0) * 8 if form == "fp8" else torch.arange(-127.0, 128.0)[::2]
    values = torch.zeros(64)
    values[: min(64, whole.numel())] = whole[:64] if form == "fp8" else whole[-64:]
    for seed in range(20):
        assert torch.equal(unpacked(values, form, seed=seed), values)
        assert torch.equal(unpacked(torch.zeros(100), form, seed=seed), torch.zeros(100))


@pytest.mark.parametrize(("form", "dtype"), IN_BLOCKS)
def test_inf_and_nan_come_back_in_their_places_and_nothing_else_becomes_one(
    form: str, dtype: torch.dtype
) -> None:
    for tensor in hard_tensors(dtype):
        back = unpacked(tensor, form)
        infinite = tensor.isinf()
        assert torch.equal(back.isinf(), infinite)
        assert torch.equal(back[infinite], tensor[infinite])
        assert torch.equal(back.isnan(), tensor.isnan())


def test_finite_neighbours_of_an_inf_stay_within_a_step_of_the_largest_finite_one() -> None:
    values = torch.linspace(-3.0, 5.0, 64)
    values[10], values[20] = torch.inf, torch.nan
    finite = values.isfinite()
    error = (unpacked(values, "int8") - values)[finite].abs()
    assert (error <= 5.0 / 127 * (1 + 1e-4)).all()


def test_draws_follow_the_seed_and_the_largest_of_the_block_and_nothing_else() -> None:
    values = torch.rand(128, generator=torch.Generator().manual_seed(0)).clamp(max=0.9)
    values[0] = values[64] = 1.0
    other = values.clone()
    other[0] = 1.5
    first = pack(values, "int8", seed=1)
    assert torch.equal(first.data, pack(values.clone().reshape(2, 64), "int8", seed=1).data)
    assert not torch.equal(first.data, pack(values, "int8", seed=2).data)
    ups, other_ups = (unpacked(tensor, "int8", seed=1) > tensor for tensor in (values, other))
    assert not torch.equal(ups[:64], other_ups[:64])
    assert torch.equal(ups[64:], other_ups[64:])


def test_int8_and_fp8_take_3_7_times_fewer_bytes_than_float32() -> None:
    for form in ("int8", "fp8"):
        assert 64_000 * 4 / packing.packed_bytes(form, 64_000) > 3.7


def hash_of_packed(rank: int, world_size: int, threads: int) -> str:
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for form, dtype in TAKEN:
        packed = pack(spread(70_003, dtype), form)
        for tensor in (packed.data, packed.unpack()):
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits() -> None:
    levels = ("scalar", "avx2", "avx512")
    possible = levels[: levels.index(operators().simd_level()) + 1]
    hashes = {
        run_ranks(hash_of_packed, 1, 1 + index % 2, init=False, env={"MLSYS_SIMD": level})[0]
        for index, level in enumerate(possible)
    }
    assert len(hashes | {hash_of_packed(0, 1, torch.get_num_threads())}) == 1


@pytest.mark.parametrize(("form", "dtype"), TAKEN)
def test_results_that_are_streamed_past_the_caches_are_the_same(form: str, dtype: torch.dtype) -> None:
    numel = (8 << 20) + 100  # from 8 MiB on, in any dtype
    tail = spread(4100, dtype)
    whole = torch.cat([torch.zeros(numel - tail.numel(), dtype=dtype), tail])
    packed = pack(whole, form)
    first = whole.numel() // 64 * 64 - 4032  # on a block's boundary
    back = packed.unpack()
    assert not back[: numel - 4100].any()
    if form in {"mask", "bf16", "positive"}:
        assert torch.equal(back[first:], unpacked(whole[first:].clone(), form))
    else:
        step = of_blocks(whole[first:]) / (127 if form == "int8" else 7)
        error = (back[first:].double() - whole[first:].double()).abs()
        assert (error <= step * (1 + 1e-4) + of_blocks(whole[first:]) * 2 * OWN_ROUNDING[dtype]).all()


def test_without_kernels_torchs_operations_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    values = spread(1000, torch.float32)
    native = pack(values, "fp8", seed=4)
    monkeypatch.setattr(packing, "_runs_kernels", lambda device: False)
    packed = pack(values, "fp8", seed=4)
    assert torch.equal(packed.data, native.data)
    assert torch.equal(packed.unpack(), native.unpack())


def test_a_tensor_that_requires_grad_is_packed_without_a_graph_or_a_warning() -> None:
    values = spread(100, torch.float32).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = pack(values, "int8")
    assert not packed.data.requires_grad
    assert packed == Packed(packed.data, "int8", torch.float32, 100)


def test_unknown_forms_and_dtypes_and_strides_are_refused_in_three_parts() -> None:
    with pytest.raises(ConfigError, match=r"form 'int9' was given.*No form has.*Did you mean 'int8'"):
        pack(torch.zeros(3), "int9")
    with pytest.raises(
        ConfigError, match=r"torch.float64 was given to the packed form 'int8'.*takes bfloat16"
    ):
        pack(torch.zeros(3, dtype=torch.float64), "int8")
    with pytest.raises(ConfigError, match=r"takes bool.*Take 'positive', 'int8', 'fp8' for such"):
        pack(torch.zeros(3, dtype=torch.bfloat16), "mask")
    with pytest.raises(ConfigError, match=r"strides \(1, 2\).*contiguous tensor is expected"):
        pack(torch.zeros(3, 2).t(), "int8")


def test_the_operators_refuse_what_would_not_fit() -> None:
    values = torch.zeros(100)
    room = torch.zeros(1000, dtype=torch.uint8)
    number = FORMS["int8"].number
    with pytest.raises(RuntimeError, match="136 bytes are expected for 100 elements"):
        operators().pack(values, room, number)
    with pytest.raises(RuntimeError, match="begins 1 bytes after a multiple of 16"):
        operators().pack(values, room[1:137], number)
    with pytest.raises(RuntimeError, match=r"form is 5. 0 to 4 is expected"):
        operators().unpack(room[:136], values, 5)
    with pytest.raises(RuntimeError, match="mask takes bool"):
        operators().unpack(room[:13], values, FORMS["mask"].number)


def test_the_operators_pass_torchs_operator_checks() -> None:
    packed = pack(torch.ones(100), "int8")  # registers the fakes
    number = FORMS["int8"].number
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators().pack.default, (torch.ones(100), packed.data, number), test_utils=checks)
    torch.library.opcheck(
        operators().unpack.default, (packed.data, torch.ones(100), number), test_utils=checks
    )
