"""Completion in the shell of names, and of the options and values after a colon."""
import os
import subprocess
import sys

import pytest
from click.shell_completion import get_completion_class

from loopctl.cli import completion, main


def complete(*args, incomplete, shell="fish"):
    made = get_completion_class(shell)(main, {}, "loopctl", "_LOOPCTL_COMPLETE")
    return [item.value for item in made.get_completions(list(args), incomplete)]


@pytest.mark.parametrize(("option", "incomplete", "expected"), [
    ("--plugin", "clip:", ["clip:max_norm=", "clip:norm_type=", "clip:value=", "clip:auto="]),
    ("--plugin", "clip:max_norm=1,", ["clip:max_norm=1,norm_type=", "clip:max_norm=1,value=", "clip:max_norm=1,auto="]),
    ("--plugin", "clip:no", ["clip:norm_type="]),
    ("--plugin", "clip:max_norm=", []),
    ("--plugin", "amp:dtype=", ["amp:dtype=auto", "amp:dtype=float16", "amp:dtype=bfloat16"]),
    ("--plugin", "amp:growth_interval=1,dtype=b", ["amp:growth_interval=1,dtype=bfloat16"]),
    ("--plugin", "multistep:milestones=30,80,ga", ["multistep:milestones=30,80,gamma="]),
    ("--plugin", "ema:warmup=", ["ema:warmup=true", "ema:warmup=false"]),
    ("--plugin", "nothing:", []),
    ("--plugin", "clip:max_norn=", []),
    ("--plugin", "cli", ["clip"]),
    ("--model", "cnn:", ["cnn:width=", "cnn:dropout="]),
    ("--model", "cnn:width=2,d", ["cnn:width=2,dropout="]),
    ("--data", "fake:", ["fake:size=", "fake:image=", "fake:classes=", "fake:channels=", "fake:augment=", "fake:erase=", "fake:on_device="]),
    ("--data", "digits:on_device=", ["digits:on_device=true", "digits:on_device=false"]),
    ("--optimizer", "sgd:mo", ["sgd:momentum="]),
    ("--optimizer", "sgd:nesterov=t", ["sgd:nesterov=true"]),
    ("--optimizer", "nothing:", []),
])
def test_options_and_their_values_are_completed(option, incomplete, expected):
    assert complete("run", option, incomplete=incomplete) == expected


def test_the_names_of_pretrained_weights_are_completed():
    assert "resnet50:weights=IMAGENET1K_V2" in complete("run", "--model", incomplete="resnet50:weights=")


def test_a_plugin_and_a_factory_in_a_file_are_completed(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from dataclasses import dataclass\n@dataclass\nclass Noise:\n    std: float = 0.1\n"
                    "def net(num_classes, width: int = 3): ...\nraise SystemExit\n")
    assert complete("run", "--model", incomplete=f"{file}:net:") == [f"{file}:net:width="]
    assert complete("run", "--plugin", incomplete=f"{file}:Noise:") == []         # because of its last line
    file.write_text(file.read_text().replace("raise SystemExit\n", ""))
    assert complete("run", "--plugin", incomplete=f"{file}:Noise:") == [f"{file}:Noise:std="]


def bash(line, word, **environment):
    """What the script in bash prints for a line up to the cursor, where bash's current word is `word`."""
    names = {"_LOOPCTL_COMPLETE": "bash_complete", "COMP_LINE": line, "COMP_WORD": word, "COMP_WORDS": "", "COMP_CWORD": "0"}
    code = "import sys; from loopctl.cli import main\ntry: main(prog_name='loopctl')\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, **names, **environment})
    assert not done.stderr
    return [line.removeprefix("plain,") for line in done.stdout.split()]


@pytest.mark.parametrize(("line", "word", "expected"), [
    ("loopctl run --plugin clip:", ":", ["max_norm=", "norm_type=", "value=", "auto="]),
    ("loopctl run --plugin clip:max_norm=1,no", "1,no", ["1,norm_type="]),
    ("loopctl run --plugin=clip:va", "va", ["value="]),
    ('loopctl run --plugin "clip:va', '"clip:va', ["clip:value="]),
    ("OMP_NUM_THREADS=1 loopctl run --plugin amp:dtype=", "=", ["auto", "float16", "bfloat16"]),
])
def test_bash_gets_what_it_puts_in_place_of_its_word_and_torch_is_not_imported(line, word, expected):
    assert bash(line, word) == expected


def test_the_scripts_of_the_shells_pass_on_the_line_and_add_no_space_after_an_option():
    assert 'COMP_LINE="${COMP_LINE:0:$COMP_POINT}"' in completion.BashWords.source_template
    assert "compopt -o nospace" in completion.BashWords.source_template
    assert "compadd -U -S '' -V unsorted -a open" in completion.ZshWords.source_template
    assert 'string split -m 1 ","' in completion.FishWords.source_template
