"""The process of the fixture `warm`: it has imported everything, and forks a child for each command line that it is sent."""
import atexit
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback

import rank
import torch._dynamo
import torch.utils.data._utils.worker

import loopctl.cli.data
import loopctl.cli.train
import loopctl.plugins.checkpoint
import loopctl.plugins.csv


def main(path):
    """Answer each connection with the process of its child, and later with its exit status; end with the first connection."""
    torch.set_num_threads(1)
    gc.freeze()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        tester, children = listener.accept()[0], {}
        while True:
            ready, _, _ = select.select([tester, listener, reader], [], [])
            if tester in ready:
                os._exit(0)
            if listener in ready:
                connection = listener.accept()[0]
                text, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
                child = os.fork()
                if not child:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for one in (tester, listener, reader, writer, connection, *children.values()):
                        one.close()
                    run(json.loads(text), files)
                for file in files:
                    os.close(file)
                children[child] = connection
                connection.sendall(f"{child}\n".encode())
            if reader in ready:
                reader.recv(4096)
                for child in [*children]:
                    found, status = os.waitpid(child, os.WNOHANG)
                    if found:
                        with children.pop(child) as connection:
                            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def run(words, files):
    """Run `loopctl` or rank.py as a new process would, in the folder that is the first word and with these files."""
    folder, *words = words
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell that runs the tests in the background has it ignored
    os.chdir(folder)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.argv, status = ["loopctl", *words], 1
    try:
        try:
            rank.main(words[1]) if words[0] == "rank" else loopctl.cli.main(words)
        except SystemExit as end:
            status = end.code or 0
        # The usual exit, but without the teardown of imported modules, which takes longer than the run.
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
