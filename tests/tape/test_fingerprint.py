"""Fingerprints of tensors: exact checksums in any layout and in both forms, norms, projections."""
import random
from math import inf, isnan, nan

import numpy as np
import pytest
import torch
from torch import nn

from loopctl.tape import fingerprint as module
from loopctl.tape.fingerprint import CHUNK, constants, fingerprint, random_states, sample_checksums
from loopctl.tape.tape_file import MISSING

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn]


def read(rows):
    """The checksums, norms and projections of rows of tensors."""
    table = fingerprint(rows, CPU)
    return table[:, 0].tolist(), table[:, 1].clone().view(torch.float32).tolist(), table[:, 2].clone().view(torch.float32).tolist()


def checksum(tensor):
    return read([[tensor]])[0][0]


def tensor_of(dtype, *shape):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50
    return numbers > 0 if dtype is torch.bool else numbers.to(dtype)


def by_hand(tensor):
    """The checksum as the docstring says: 32-bit words, times odd constants by position in a chunk, times one by chunk; modulo 2^32."""
    data = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    data = data.contiguous()
    size = min(4, data.element_size())
    words = np.frombuffer(data.view(torch.uint8).numpy().tobytes(), {4: "<i4", 2: "<i2", 1: "<u1"}[size])
    odd, total = constants(CPU)[0].tolist(), 0
    for index, word in enumerate(words.tolist()):
        total += word * odd[index % CHUNK] * module.multiplier(index // CHUNK)
    return (total + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checksum_is_the_sum_of_words_times_odd_constants_modulo_2_to_the_32(dtype):
    tensor = tensor_of(dtype, 7, 3)
    expected = by_hand(tensor)
    assert read([[tensor], [tensor, None]])[0] == [expected, expected]


def test_the_checksum_of_a_long_tensor_has_a_factor_for_each_chunk():
    tensor = tensor_of(torch.float32, 2 * CHUNK + 100)
    assert checksum(tensor) == by_hand(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (4, 3, 5, 2), (CHUNK // 64, 130), (3, CHUNK)], ids=str)
def test_the_form_for_other_devices_gives_the_same_checksums(monkeypatch, dtype, shape):
    tensor = tensor_of(dtype, *shape)
    rows = [[tensor], [None], [tensor, None, tensor.clone()]]
    usual = read(rows)
    monkeypatch.setattr(module, "in_one_kernel", lambda device: False)
    monkeypatch.setattr(module, "BLOCK", 2)
    other = read(rows)
    assert usual[0] == other[0]
    assert usual[1] == pytest.approx(other[1], rel=1e-5)
    assert usual[2] == pytest.approx(other[2], rel=1e-3, abs=1e-4 * abs(usual[1][0]) + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layout_of_a_tensor_does_not_matter(dtype):
    tensor = tensor_of(dtype, 4, 3, 5, 2)
    wide = torch.stack([tensor, tensor], -1)[..., 0]
    layouts = [wide, tensor.transpose(0, 2).contiguous().transpose(0, 2), tensor.contiguous(memory_format=torch.channels_last), tensor.reshape(-1)]
    assert not any(each.is_contiguous() for each in layouts[:3])
    assert {checksum(each) for each in layouts} == {checksum(tensor)}
    column = torch.stack([tensor.reshape(-1)] * 2, 1)[:, 1]         # one dimension, and no stride of 1
    assert checksum(column) == checksum(tensor)


def test_an_expanded_a_sparse_a_conjugate_and_a_nested_tensor_have_the_checksum_of_a_plain_one():
    row = torch.randn(4)
    assert checksum(row.expand(3, 4)) == checksum(row.repeat(3, 1))
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert checksum(dense.to_sparse()) == checksum(dense)
    number = torch.randn(3, dtype=torch.complex64)
    assert checksum(number.conj().imag) == checksum(-number.imag)
    assert checksum(number.conj()) == checksum(number.conj().resolve_conj()) != checksum(number)
    nested = torch.nested.nested_tensor([row, row[:2]], layout=torch.jagged)
    assert checksum(nested) == checksum(torch.cat([row, row[:2]]))
    assert checksum(nn.Parameter(row)) == checksum(row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.uint8], ids=str)
def test_a_change_of_one_bit_is_always_seen(dtype):
    tensor = tensor_of(dtype, 70)
    whole, found = checksum(tensor), set()
    for position in range(tensor.numel() * tensor.element_size()):
        for bit in range(8):
            changed = tensor.clone()
            changed.view(torch.uint8)[position] ^= 1 << bit
            found.add(checksum(changed))
    assert whole not in found


def test_a_bit_of_each_part_of_a_long_tensor_is_seen_and_the_order_of_elements_too():
    tensor = torch.randn(5 * CHUNK + 3)
    whole = checksum(tensor)
    for position in (0, CHUNK - 1, CHUNK, 3 * CHUNK + 5, 5 * CHUNK, 5 * CHUNK + 2):
        changed = tensor.clone()
        changed.view(torch.int32)[position] ^= 1
        assert checksum(changed) != whole
    assert checksum(tensor.roll(1)) != whole
    assert checksum(torch.cat([tensor[CHUNK:2 * CHUNK], tensor[:CHUNK], tensor[2 * CHUNK:]])) != whole      # chunks exchanged
    assert checksum(torch.zeros(3)) != checksum(-torch.zeros(3))


def test_overflow_of_int32_wraps_around():
    largest = torch.full((1000,), 2**31 - 1, dtype=torch.int32)
    assert checksum(largest) == by_hand(largest)


def test_nan_and_infinity_have_checksums_and_show_in_the_norm():
    (one, two, three), norms, _ = read([[torch.tensor([1.0, nan])], [torch.tensor([1.0, inf])], [torch.tensor([1.0, -inf])]])
    assert len({one, two, three}) == 3
    assert isnan(norms[0])
    assert norms[1:] == [inf, inf]


def test_norms_are_those_of_all_tensors_of_a_row_and_minus_one_where_there_is_none():
    one, two = torch.randn(100, 7), torch.randn(CHUNK + 5, dtype=torch.float64)
    _, norms, projections = read([[one], [one, two], [None], [], [torch.zeros(0)], [torch.zeros(2)]])
    assert norms[:2] == pytest.approx([one.norm().item(), torch.hypot(one.norm(), two.norm().float()).item()], rel=1e-5)
    assert norms[2:] == [MISSING, MISSING, MISSING, 0]
    assert projections[2:] == [0, 0, 0, 0]
    assert read([[None], []]) == ([0, 0], [MISSING, MISSING], [0, 0])
    assert fingerprint([], CPU).shape == (0, 3)
    assert read([[torch.tensor([60000.0, 60000.0], dtype=torch.float16)]])[1] == pytest.approx([60000 * 2**0.5], rel=1e-3)


def test_the_projection_is_linear_and_tells_directions_apart():
    one, two = torch.randn(3000), torch.randn(3000)
    _, norms, (p, q, total, half, minus) = read([[one], [two], [one + two], [one / 2], [-one]])
    assert total == pytest.approx(p + q, abs=1e-3)
    assert (half, minus) == (p / 2, -p)
    assert norms[3] == norms[0] / 2
    assert abs(p) < 6 * norms[0]            # a sum of random signs


@pytest.mark.parametrize("shape", [(5,), (5, 0), (6, 3, 7), (3, CHUNK + 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.complex64], ids=str)
def test_each_sample_of_a_batch_has_the_checksum_that_it_has_alone(monkeypatch, dtype, shape):
    batch = tensor_of(dtype, *shape)
    usual = sample_checksums(batch)
    assert usual.tolist() == [checksum(sample) for sample in batch]
    monkeypatch.setattr(module, "in_one_kernel", lambda device: False)
    assert sample_checksums(batch).tolist() == usual.tolist()
    order = torch.randperm(len(batch))
    assert sample_checksums(batch[order]).tolist() == usual[order].tolist()


def test_autocast_does_not_change_a_fingerprint():
    tensor = torch.randn(100)
    expected = read([[tensor]])
    with torch.autocast("cpu", torch.bfloat16):
        assert read([[tensor]]) == expected


def test_the_state_of_each_generator_has_a_checksum():
    found = [random_states(CPU)]
    assert random_states(CPU) == found[0]
    for kind, draw in (("torch", lambda: torch.rand(1)), ("python", random.random), ("numpy", lambda: np.random.rand(1))):
        draw()
        found.append(random_states(CPU))
        assert {name for name in found[0] if found[-1][name] != found[-2][name]} == {kind}
    np.random.seed(0)
    again = random_states(CPU)["numpy"]
    np.random.seed(0)
    assert random_states(CPU)["numpy"] == again
    np.random.rand(7)
    assert random_states(CPU)["numpy"] != again


def test_another_generator_of_numpy_has_a_checksum_too():
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        first = random_states(CPU)["numpy"]
        assert random_states(CPU)["numpy"] == first
        np.random.rand(1)
        assert random_states(CPU)["numpy"] != first
    finally:
        np.random.set_bit_generator(before)
