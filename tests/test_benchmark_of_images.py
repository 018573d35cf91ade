"""benchmarks/images.py runs, on a few small images."""
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch


def test_the_benchmark_of_image_folders_prints_a_row_for_each_way(monkeypatch, capsys):
    script, threads = Path(__file__).parents[1] / "benchmarks" / "images.py", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [str(script), "--tiny"])
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    _, _, *rows = capsys.readouterr().out.splitlines()
    ways = ["plain program", "`imagefolder`", "`fast=true`", "`cache=DIR`"]
    assert [row.split(" | ")[2] for row in rows] == 2 * (ways + ["`fast=true`, with torchcodec"] * bool(find_spec("torchcodec")))
