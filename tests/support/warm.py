"""Processes of Python that have imported torch and Veneer before they start.

`executable()` is a program that takes Python's arguments, `-m module` or a script, and that a test
can start, signal and kill as it would `sys.executable`. The program is forked from one process of
this run of the tests, which has done the imports: they are most of what such a test would take.
Tests of how Veneer starts, and of what that imports, use `sys.executable`.

    launcher (what the test started) ── socket ── keeper (forked) ── the program (forked)
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path

from support import faults_shim

PRELOADED = (
    "support.faulty_server",
    "support.spoilt_files",
    "veneer.cli.app",
    "veneer.cli.console",
    "veneer.cli.tune",
    "veneer.compare.measure",
    "veneer.serve.run",
    "veneer.training.tune",
)
LAUNCHER = """\
#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({place!r})
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(asked).to_bytes(8, "little")], [0, 1, 2])
server.sendall(asked)
answers = server.makefile()
program = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGABRT):
    signal.signal(number, lambda number, _: os.kill(program, number))
for number in (0, 1, 2):
    os.close(number)
server.sendall(b"!")  # from here on what the test sends reaches the program, which begins now
code = int(answers.readline())
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@cache
def executable() -> str:
    """Return the path of the program; the process that it forks from ends with this one."""
    # Not a TemporaryDirectory, which a fork that clears what is to be done at exit would remove.
    home = Path(tempfile.mkdtemp(prefix="warm-"))
    place = str(home / "socket")
    launcher = home / "python"
    launcher.write_text(LAUNCHER.format(python=sys.executable, place=place), encoding="utf-8")
    launcher.chmod(0o755)
    tests = str(Path(__file__).parents[1])
    shim = faults_shim.build(home)  # which does nothing unless a program asks for it
    server = subprocess.Popen(
        [sys.executable, "-m", "support.warm", place],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])}
        | ({} if shim is None else {"LD_PRELOAD": str(shim)}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    atexit.register(shutil.rmtree, home)
    atexit.register(server.kill)
    return str(launcher)


def serve(place: str) -> list[str]:
    """Fork whatever is asked for until standard input ends; return the arguments in each fork."""
    for name in PRELOADED:
        import_module(name)
    sys.executable = str(Path(place).with_name("python"))  # for processes that these start
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return keep(connection)
        connection.close()


def keep(connection: socket.socket) -> list[str]:
    """Fork the program, which gets its arguments here, and end it where its launcher has ended, or
    the run of the tests."""
    server = os.pidfd_open(os.getppid())
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    asked = connection.makefile("rb").read(int.from_bytes(size, "little"))
    arguments, folder, environment = json.loads(asked)
    begin, release = os.pipe()
    program = os.fork()
    if program == 0:
        connection.close()
        os.close(release)
        os.read(begin, 1)
        os.close(begin)
        atexit.register(gc.unfreeze)  # else triton's bindings complain of what is never freed
        # Whoever runs the tests in the background may have them ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdout.reconfigure(line_buffering=bool(environment.get("PYTHONUNBUFFERED")))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        if "FAULTS_STATE" in environment:
            ctypes.CDLL(None).faults_attach()
        return arguments
    for number in (0, 1, 2, *streams):
        os.close(number)
    os.close(begin)
    connection.sendall(f"{program}\n".encode())
    connection.recv(1)
    os.close(release)
    ended = os.pidfd_open(program)
    ready, _, _ = select.select([connection, ended, server], [], [])
    if ended not in ready:
        os.kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    if ended in ready:
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def run(arguments: list[str]) -> int:
    """Run a module or a script as Python itself does, and return its exit code."""
    # -P only keeps modules out that lie in the current folder.
    if arguments[0] == "-P":
        del arguments[0]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        return end.code or 0
    return 0


def end(code: int) -> None:
    """End the process as Python does, without taking apart all that it shares with the one that it
    was forked from: every page would be copied for that, which takes longer than most programs."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    code = run(serve(sys.argv[1]))
    with suppress(Exception):  # a stream is gone, which Python has its own words for
        end(code)
    sys.exit(code)
