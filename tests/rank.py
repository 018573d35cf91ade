"""One of the processes that the fixture `ranks` keeps: calls functions of test files, as torchrun would have it do."""
import gc
import importlib.util
import os
import pickle
import sys
import warnings
from multiprocessing.connection import Client

import torch
import torch.distributed as dist


def main(address):
    torch.set_num_threads(1)
    with Client(address) as wire:
        while True:
            try:
                file, name, arguments, environment = pickle.loads(wire.recv_bytes())
            except EOFError:
                return
            os.environ.update(environment)
            wire.send_bytes(pickle.dumps(answer(file, name, arguments)))


def answer(file, name, arguments):
    """What the function returned, or what it raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return getattr(module(file), name)(*arguments), None
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


def module(file):
    if file not in sys.modules:
        spec = importlib.util.spec_from_file_location(file, file)
        sys.modules[file] = found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return sys.modules[file]


if __name__ == "__main__":
    main(sys.argv[1])
