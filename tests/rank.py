"""One of the processes that the fixture `ranks` keeps: calls functions of test files, as torchrun would have it do."""
import gc
import importlib.util
import os
import pickle
import sys
import warnings
from itertools import accumulate
from multiprocessing.connection import Client
from types import ModuleType

import torch
import torch.distributed as dist


def main(address):
    torch.set_num_threads(1)
    with Client(address) as wire:
        while True:
            try:
                file, package, name, environment = pickle.loads(wire.recv_bytes())
                arguments = wire.recv_bytes()
            except EOFError:
                return
            os.environ.update(environment)
            wire.send_bytes(pickle.dumps(answer(file, package, name, arguments)))


def answer(file, package, name, arguments):
    """What the function returned, or what it raised."""
    try:
        found = module(file, package)
        arguments = pickle.loads(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return getattr(found, name)(*arguments), None
    except (Exception, SystemExit) as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return None, error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()            # what an error holds may hold connections, and others would wait at their other end


def module(file, name):
    """The test file, under the name that pytest has given it, which what is sent here refers to."""
    if name not in sys.modules:
        for parent in accumulate(name.split(".")[:-1], "{}.{}".format):
            sys.modules.setdefault(parent, ModuleType(parent))
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        gc.freeze()             # so that to look for what a test has left does not take as long as the test
    return sys.modules[name]


if __name__ == "__main__":
    main(sys.argv[1])
