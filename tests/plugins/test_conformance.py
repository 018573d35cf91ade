"""Every built-in plugin passes the checks of loopctl.testing; pairs of plugins are tested in test_pairs.py."""
from functools import cache

import pytest

from loopctl import available
from loopctl.testing import plugin_checks
from loopctl.testing.checks import CHECKS
from loopctl.testing.tiny import default_arguments
from tests.conftest import as_images, pool_images

NAMES = sorted({*available()} - {"cudagraph"})      # it needs a GPU
pytestmark = pytest.mark.usefixtures("undrawn")


def images():
    """Arguments of a tiny run on images."""
    arguments = default_arguments()
    arguments["model"].register_forward_pre_hook(pool_images)
    return {"model": arguments["model"], **{part: as_images(arguments[part]) for part in ("train", "valid")}}


ARGUMENTS = {
    "amp": {"skip": {"never_waits": "autocast does not support the meta device, and GradScaler synchronizes with float16"}},
    "cutmix": {"draws_random": True, **images()},
    "mixup": {"draws_random": True},
    "progressive_resizing": images(),
    "selective_backprop": {"draws_random": True},
    "checkpoint": {"skip": {"resumes": "it resumes from its own files, which test_checkpoint.py tests"}},
    "lora": {"draws_random": True},     # of the first values of the matrices
    "nan_guard": {"waits": True},       # on a CPU; on a GPU it does not, see test_nan_guard.py
    "sam": {"draws_random": True},      # it computes gradients twice per step, with new dropout masks
    "spike": {"waits": True},           # as nan_guard, see test_spike.py
    "throughput": {"measured": ("samples_per_s", "data_wait", "memory_gb", "mfu")},
}
EXPECTED = [check.__name__ for check in CHECKS if check.__name__ != "composes"]


@cache
def checks(spec, name):
    return {check.__name__: check for check in plugin_checks(spec, **ARGUMENTS.get(name, {}))}


@pytest.mark.parametrize("check", EXPECTED)
@pytest.mark.parametrize("name", NAMES)
def test_passes_the_check(name, check, example):
    checks(example(name), name)[check]()
