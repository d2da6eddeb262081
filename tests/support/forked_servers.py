"""A server that is a fork of a process which has imported SGLang: what it does is what a started one does, without the imports.

A start costs some 20 s of processor time, and 17 of them are the imports of three processes: launcher, scheduler and detokenizer.
Here the launcher is a fork, and before it sets anything up it forks the process that stands behind multiprocessing's
``spawn`` from then on (Python's own fork server): each scheduler is a fork of a process that has imported SGLang and nothing
else. It takes over the launcher's environment, imports the launcher's main module and loads the plugin, as a spawned one does.

``sglang_process.py`` calls :func:`become`. Servers that stand for the start itself are started as users start them.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import context, forkserver, resource_tracker, spawn
from typing import Any

PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: signal.Signals) -> None:
    """Let this process get a signal when its parent ends, however that ends: an interrupted pytest closes nothing."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def become(command: Sequence[str], log: str, env: Mapping[str, str], folder: str) -> None:
    """Make this process, a fresh fork, what ``python -m MODULE FLAGS...`` would be; ``command`` is all of these words."""
    _, dash_m, module, *flags = command
    assert dash_m == "-m", command
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # as the environment says, in all processes
    for path, mode, descriptors in ((os.devnull, os.O_RDONLY, [0]), (log, os.O_WRONLY | os.O_APPEND, [1, 2])):
        file = os.open(path, mode)
        for descriptor in descriptors:
            os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv, sys.path[0] = [module, *flags], folder
    _spawn_by_forking()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _spawn_by_forking() -> None:
    """Put a fork server in the place of multiprocessing's ``spawn``; it is a fork of this process as it stands."""
    prepared, server = spawn.get_preparation_data, forkserver._forkserver  # type: ignore[attr-defined]

    def with_environment(name: str) -> dict[str, Any]:
        return {**prepared(name), "environment": dict(os.environ)}

    # Inherited by all processes of the server: those that start others themselves ask the same fork server.
    spawn.get_preparation_data = with_environment
    server.ensure_running = resource_tracker.ensure_running
    context._concrete_contexts["spawn"] = context._concrete_contexts["forkserver"]  # type: ignore[attr-defined]
    launcher = os.getpid()
    with socket.socket(socket.AF_UNIX) as listener:
        # A name without a file: a path below a test's own folder may be longer than a socket's may be.
        server._forkserver_address = f"\0margingate-forks-{launcher}"
        listener.bind(server._forkserver_address)
        listener.listen()
        alive, server._forkserver_alive_fd = os.pipe()
        if os.fork() == 0:
            os.close(server._forkserver_alive_fd)
            _serve_forks(launcher, listener.detach(), alive)
        os.close(alive)


def _serve_forks(launcher: int, listener: int, alive: int) -> None:
    """Fork for each process that the launcher wants, and end with it."""
    end_with(launcher, signal.SIGKILL)
    # A scheduler that fails says so to its parent, which should be the launcher.
    signal.signal(signal.SIGQUIT, lambda *_: os.kill(launcher, signal.SIGQUIT))
    prepare = spawn.prepare

    def with_environment(data: dict[str, Any]) -> None:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(data["environment"])
        prepare(data)

    spawn.prepare = with_environment
    try:
        forkserver.main(listener, alive, [])
    finally:
        os._exit(0)
