"""Fingerprints of tensors: for each row an exact checksum, the norm, and a projection, computed on the device.

The checksum is a sum of the tensor's bits, as int32, times odd constants that depend on the position, modulo 2^32.
Integers have no rounding, so it is the same in any order of summation, on any device and with any number of threads.
Two tensors that differ in one bit, or in one element of up to 32 bits, never share it; others do once in 2^32. The norm
tells how large a tensor is. The projection is the sum of its elements, each with a fixed random sign. It is linear:
that of a sum of tensors is the sum of theirs. So two tensors of which one is a multiple of the other, or the sum of two
others, are told from the numbers alone. Norm and projection are float32 and rounded as any sum is; whether two tensors
are equal is what the checksum says.
"""
from __future__ import annotations

import ctypes
import random
import zlib
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopctl.tape.tape_file import COLUMNS, MISSING

CHUNK = 1 << 16             # elements that share the constants of one row of a longer tensor
BLOCK = 256                 # rows of such a tensor that are computed at once where that takes memory
PLAIN = (Tensor, torch.nn.Parameter)
MAX_SAMPLES = 512           # samples of a batch with a checksum of their own
MERSENNE_TWISTER = 625 * 4  # bytes of the state of that generator: 624 words and the position


@cache
def constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Odd int32 numbers and signs of either 1 or -1, by position within a row."""
    number = torch.arange(1, CHUNK + 1, dtype=torch.int64, device="cpu") * 0x9E3779B97F4A7C1 & 0x7FFFFFFFFFFFFFFF
    number = (number ^ number >> 29) * 0xBF58476D1CE4E5B & 0x7FFFFFFFFFFFFFFF
    number ^= number >> 32
    return (number | 1).to(torch.int32).to(device), (1 - 2 * (number >> 40 & 1)).to(torch.float32).to(device)


@lru_cache(1024)
def first(weights: Tensor, size: int) -> Tensor:
    """The first `size` elements of the constants."""
    return weights[:size]


def multiplier(index: int) -> int:
    """The odd number that the checksum of row `index` of a long tensor is multiplied by, as int32; 1 for the first."""
    number = index * 0x85EBCA6B & 0xFFFFFFFF
    number = (number ^ number >> 15) * 0xC2B2AE35 & 0xFFFFFFFF | 1
    return number - (number >> 31 << 32)


def bits(tensor: Tensor) -> Tensor:
    """The elements of a tensor in their logical order as int32, one dimension; two for each of 8 bytes."""
    flat = whole(tensor).reshape(-1)
    if flat.dtype in (torch.float32, torch.int32):
        return flat.view(torch.int32)
    if flat.dtype in (torch.float64, torch.int64):
        return flat.contiguous().view(torch.int32)
    if flat.element_size() == 2:
        return flat.view(torch.int16).to(torch.int32)
    if flat.element_size() == 1:
        return flat.view(torch.uint8).to(torch.int32)
    return flat.contiguous().view(torch.uint8).to(torch.int32)


def in_one_kernel(device: torch.device) -> bool:
    """Whether integers have a dot product there, which needs no temporary memory; on GPUs they have none."""
    return device.type == "cpu"


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense float32, so that its bits can be read as they are."""
    return (tensor.dtype is torch.float32 and type(tensor) in PLAIN and tensor.layout is torch.strided
            and not tensor.is_nested and not tensor.is_neg())


def whole(tensor: Tensor) -> Tensor:
    """The elements that this process has, as a dense tensor of real numbers."""
    tensor = getattr(tensor, "to_local", tensor.detach)().detach()
    if tensor.is_nested:
        tensor = torch.cat([part.reshape(-1) for part in tensor.unbind()])
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        return tensor.int_repr()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()


def numbers(tensor: Tensor) -> Tensor:
    """The elements of a tensor as float32, one dimension."""
    return whole(tensor).reshape(-1).to(torch.float32)


def weighed(elements: Tensor, weights: Tensor) -> list[Tensor]:
    """The sums of the elements times weights, one for each row of CHUNK elements, as scalars."""
    if in_one_kernel(elements.device):
        return [torch.dot(row, weights[:row.numel()]) for row in elements.split(CHUNK)]
    full = elements.numel() // CHUNK * CHUNK
    sums: list[Tensor] = []
    for block in elements[:full].view(-1, CHUNK).split(BLOCK):
        sums += (block * weights).sum(1, dtype=elements.dtype).unbind()
    if full < elements.numel():
        sums.append((elements[full:] * weights[:elements.numel() - full]).sum(dtype=elements.dtype))
    return sums


@torch.no_grad()
def fingerprint(rows: Sequence[Sequence[Tensor | None]], device: torch.device) -> Tensor:
    """Return the fingerprints of `rows`, each of one tensor or of several together: int32, of shape (rows, 3).

    The columns are the checksum, and the bits of the norm and of the projection as float32. The checksum of a row is 0
    and its norm -1 where none of its tensors is there.
    """
    if not rows:
        return torch.empty(0, COLUMNS, dtype=torch.int32, device=device)
    odd, signs = constants(device)
    usual = in_one_kernel(device)
    checksums: list[Tensor] = []            # of each row
    projections: list[Tensor] = []
    floats: list[Tensor] = []               # of each tensor, its elements
    lengths: list[int] = []                 # tensors of each row
    for row in rows:
        parts: list[Tensor] = []        # of the chunks of its tensors
        lines: list[Tensor] = []
        count = len(floats)
        for tensor in row:
            if tensor is None or not (size := tensor.numel()):
                continue
            if usual and size <= CHUNK and is_plain(tensor):
                number = tensor.detach().reshape(-1)            # the usual case, in few calls
                parts.append(torch.dot(number.view(torch.int32), first(odd, size)))
                lines.append(torch.dot(number, first(signs, size)))
            else:
                tensor = tensor.to(device, non_blocking=True)
                number = numbers(tensor)
                parts += weighed(bits(tensor), odd)
                lines += weighed(number, signs)
            floats.append(number)
        lengths.append(len(floats) - count)
        checksums.append(parts[0] if len(parts) == 1 else combined(parts, device))
        lines = lines or [signs.new_zeros(())]
        projections.append(lines[0] if len(lines) == 1 else torch.stack(lines).sum())
    found = iter(torch._foreach_norm(floats) if floats else ())
    norms = [norm_of([*islice(found, length)]) if length else signs.new_full((), MISSING) for length in lengths]
    return torch.stack([torch.stack(checksums), torch.stack(norms).view(torch.int32),
                        torch.stack(projections).view(torch.int32)], 1)


def norm_of(norms: list[Tensor]) -> Tensor:
    """The norm of several tensors together, of those of each."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def combined(parts: list[Tensor], device: torch.device) -> Tensor:
    """The checksum of a row of its parts, of which each has a factor; 0 of none."""
    factors = multipliers(device, len(parts))
    return (torch.stack(parts) * factors).sum(dtype=torch.int32) if parts else factors.sum(dtype=torch.int32)


@lru_cache(1024)
def multipliers(device: torch.device, count: int) -> Tensor:
    """The first `count` multipliers."""
    return torch.tensor([*map(multiplier, range(count))], dtype=torch.int32).to(device, non_blocking=True)


@torch.no_grad()
def sample_checksums(tensor: Tensor) -> Tensor:
    """Return a checksum for each sample of a tensor, along its first dimension: int32."""
    odd, _ = constants(tensor.device)
    total = torch.zeros(len(tensor), dtype=torch.int32, device=tensor.device)
    if tensor.numel():
        for number, part in enumerate(bits(tensor).view(len(tensor), -1).split(CHUNK, 1)):
            weights = odd[:part.shape[1]]
            usual = in_one_kernel(tensor.device)
            sums = torch.mv(part, weights) if usual else (part * weights).sum(1, dtype=torch.int32)
            total += multiplier(number) * sums
    return total


def random_states(device: torch.device) -> dict[str, int]:
    """Checksums of the states of the random-number generators of torch, Python and NumPy, and of the device's."""
    found = {"torch": zlib.crc32(torch.get_rng_state().numpy().data), "python": hash(random.getstate()[1]) & 0xFFFFFFFF,
             "numpy": zlib.crc32(numpy_state())}
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        found["cuda"] = zlib.crc32(torch.cuda.get_rng_state(device).numpy().data)
    return found


def numpy_state() -> bytes:
    """The state of NumPy's global generator; of a Mersenne twister from memory, as NumPy takes 24 us to return it."""
    generator: Any = np.random.mtrand.get_bit_generator()
    if type(generator) is np.random.MT19937:
        return ctypes.string_at(generator.ctypes.state_address, MERSENNE_TWISTER)
    return repr(generator.state).encode()
