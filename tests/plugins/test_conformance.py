"""Every built-in is what can be expected of any plugin; that they compose with each other is in test_pairs.py."""
from functools import cache

import pytest

from loopctl import available
from loopctl.testing import plugin_checks
from loopctl.testing.checks import CHECKS

NAMES = sorted({*available()} - {"cudagraph"})      # which needs a GPU, and refuses to train without
ARGUMENTS = {
    "amp": {"skip": {"never_waits": "autocast knows no meta device, and float16 waits in GradScaler"}},
    "checkpoint": {"skip": {"resumes": "it goes on from its own files, which its own tests do"}},
    "nan_guard": {"waits": True},       # on a CPU, where values are there; with a GPU it does not, see its own tests
    "sam": {"draws_random": True},      # it computes gradients twice per step, and Dropout draws each time
    "throughput": {"measured": ("samples_per_s", "data_wait", "memory_gb", "mfu")},
}
EXPECTED = [check.__name__ for check in CHECKS if check.__name__ != "composes"]


@cache
def checks(spec, name):
    return {check.__name__: check for check in plugin_checks(spec, **ARGUMENTS.get(name, {}))}


@pytest.mark.parametrize("check", EXPECTED)
@pytest.mark.parametrize("name", NAMES)
def test_conforms(name, check, example):
    checks(example(name), name)[check]()
