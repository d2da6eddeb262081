"""What a hook into SGLang is, and the proof that each is in place; the hooks themselves stand in hook_table.py."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_margingate.settings.support import TESTED

LAUNCHER, SCHEDULER = "launcher", "scheduler"

LAUNCHER_PID_ENV = "MARGINGATE_LAUNCHER_PID"


class HookError(RuntimeError):
    """A hook is not in place; serving would claim what it cannot keep."""


@dataclass(frozen=True)
class Hook:
    """One hook into SGLang.

    Parameters
    ----------
    target
        Dotted path of the function or method.
    kind
        ``before``, ``after``, ``around`` or ``replace`` (SGLang's ``HookType``).
    function
        Ours.
    roles
        Processes that need it.
    why, until
        The reason, and what would make the hook unnecessary.
    needed
        Whether this version of SGLang needs it; the same answer at every call in a process. None: every version does.
    """

    target: str
    kind: str
    function: Callable[..., Any]
    roles: tuple[str, ...]
    why: str
    until: str
    needed: Callable[[], bool] | None = None


def role() -> str:
    """Return this process's role.

    The front door notes its process id: while a spawned process imports its main module, Python's own
    ``parent_process()`` still says that there is none.
    """
    launcher_pid = os.environ.get(LAUNCHER_PID_ENV)
    if launcher_pid is not None:
        return LAUNCHER if launcher_pid == str(os.getpid()) else SCHEDULER
    return LAUNCHER if multiprocessing.parent_process() is None else SCHEDULER


def spare_collector() -> None:
    """Take what stands at the end of a start-up out of the garbage collector's sight; it stands as long as the process.

    It is half a million objects, and a full collection that looks at each of them stops a process for some 0.2 s in the midst
    of serving. What is made later is collected as before.
    """
    gc.collect()
    gc.freeze()


_installed: tuple[Hook, ...] | None = None


def install(hooks: Sequence[Hook]) -> None:
    """Hand this process's hooks to SGLang's registry; :func:`check` tells whether they attached."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    global _installed
    _installed = tuple(hooks)
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))


def _resolve(target: str) -> Any:
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise HookError(f"{target}: no such module")


def check() -> list[str]:
    """Return the targets whose hooks are in place; raise when one is not, or none was ever installed.

    Raises
    ------
    HookError
        Names the target and what it is needed for.
    """
    if _installed is None:
        raise HookError("no hook was installed in this process: the plugin did not load. Check SGLANG_PLUGINS")
    done = []
    for hook in _installed:
        try:
            found = _resolve(hook.target)
        except (AttributeError, HookError) as error:
            raise HookError(
                f"hook on {hook.target} did not attach ({error}); needed because {hook.why}. "
                f"SGLang {', '.join(TESTED)} have it"
            ) from None
        if not _is_ours(found, hook.function):
            raise HookError(
                f"hook on {hook.target} did not attach; needed because {hook.why}. Check SGLANG_PLUGINS and the log above"
            )
        done.append(hook.target)
    return done


def _is_ours(found: Any, function: Callable[..., Any]) -> bool:
    """Follow SGLang's wrapper chain and look for our function in the closures."""
    current = getattr(found, "__func__", found)
    while current is not None:
        cells = getattr(current, "__closure__", None) or ()
        if any(cell.cell_contents is function for cell in cells):
            return True
        current = getattr(current, "__wrapped__", None)
    return False
