"""One of the processes of the fixture `ranks`, forked by warm.py: it calls functions of test files in the environment of torchrun."""
import faulthandler
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
    faulthandler.enable()           # for SIGABRT
    with Client(address) as connection:
        while True:
            try:
                file, module_name, name, environment = pickle.loads(connection.recv_bytes())
                arguments = connection.recv_bytes()
            except EOFError:
                return
            os.environ.update(environment)
            connection.send_bytes(pickle.dumps(call(file, module_name, name, arguments)))
            gc.collect()
            gc.freeze()         # otherwise each gc.collect() would take as long as a test


def call(file, module_name, name, arguments):
    """Call the function `name` of a test file. Return what it returned and what it raised, one of them None."""
    try:
        module = load_module(file, module_name)
        arguments = pickle.loads(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return getattr(module, name)(*arguments), None
    except (Exception, SystemExit) as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return None, error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()            # an error may hold references to connections, whose other ends would keep waiting


def load_module(file, name):
    """Import a test file under the name that pytest gives it, so that pickled objects of it can be loaded."""
    if name not in sys.modules:
        for parent in accumulate(name.split(".")[:-1], "{}.{}".format):
            sys.modules.setdefault(parent, ModuleType(parent))
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
