"""Settings of torch for the whole process that change the speed of a run: set them for a block."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def torch_settings(
    *, matmul: Literal["highest", "high", "medium"] | None = None, cudnn_benchmark: bool | None = None,
    threads: int | None = None,
) -> Iterator[None]:
    """Set what is given inside the block, and restore it afterwards.

    matmul: the precision of float32 matrix products, as for torch.set_float32_matmul_precision
    cudnn_benchmark: whether cuDNN tries its algorithms for each new shape of a convolution and keeps the fastest, which
        is torch.backends.cudnn.benchmark
    threads: the threads that compute on the CPU, as for torch.set_num_threads
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.get_num_threads()
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn_benchmark is not None:
            torch.backends.cudnn.benchmark = cudnn_benchmark
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(before[0])
        if cudnn_benchmark is not None:
            torch.backends.cudnn.benchmark = before[1]
        if threads is not None:
            torch.set_num_threads(before[2])
