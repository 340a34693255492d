"""The names of backends: the reference, the frameworks that are importable here, and the registered interpreters."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mhabridge import mapping
from mhabridge.backends import limits, service, settings
from mhabridge.errors import BackendError, MHABridgeError

if TYPE_CHECKING:
    from mhabridge.backends.settings import Entry
    from mhabridge.backends.worker import Worker
    from mhabridge.calls import Result
    from mhabridge.spec import MHASpec
    from mhabridge.weights import MHAWeights

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True)
class BackendInfo:
    """What is known about a backend.

    Args:
        name: what ``backend`` takes.
        framework: "torch", "mindspore", "megengine" or "numpy".
        version: of the framework; None when it is not known.
        where: "here" (in this process) or "worker" (in another interpreter).
        python: path of the interpreter.
        host: name of the host, as given to ssh for another one.
        ok: nothing speaks against using it.
        reason: what is wrong and how to mend it, or how well it was checked; may be empty.
    """

    name: str
    framework: str
    version: str | None
    where: str
    python: str
    host: str
    ok: bool
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


class Backend:
    """A framework somewhere we can run it. ``mb.backend(name)`` gives one.

    Args:
        info: what is known about it.
        worker: where calls go; None for this process.
    """

    def __init__(self, info: BackendInfo, worker: Worker | None = None) -> None:
        self._info = info
        self.framework = info.framework
        self._worker = worker

    @property
    def info(self) -> BackendInfo:
        """What is known about it. Once its worker runs, the version is the one in use there."""
        running = self._worker.description if self._worker else None
        return dataclasses.replace(self._info, version=running["version"]) if running else self._info

    def __repr__(self) -> str:
        return f"<Backend {self.info.name}: {self.framework} {self.info.version or ''} ({self.info.where})>"

    def call(self, function: str, payload: dict[str, Any], timeout: float | None = None) -> Any:
        """Call a function of ``service`` there.

        Args:
            function: its name.
            payload: a tree (see ``wire``).
            timeout: limit in seconds for a worker's answer; None or inf for no limit. Nothing can stop a call in this
                process: there it has no effect.

        Raises:
            BackendError: the worker died, ran out of time, or raised something unforeseen.
            ArgumentTypeError: the timeout is no number.
            ArgumentError: the timeout is NaN, zero or negative.
        """
        limit = limits.seconds(timeout)
        if self._worker is None:
            return service.serve(function, self.framework, payload)
        return self._worker.call(function, payload, limit)

    def run(
        self,
        spec: MHASpec,
        weights: MHAWeights,
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        *,
        key_padding_mask: np.ndarray | None = None,
        attn_mask: np.ndarray | None = None,
        is_causal: bool = False,
        need_weights: bool = True,
        average_attn_weights: bool = True,
        fully_masked: str = "nan",
        mode: str = "auto",
        training: bool = False,
        grad_output: np.ndarray | None = None,
        grad_attn_weights: np.ndarray | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Run one call: NumPy in, NumPy out.

        Args:
            spec: the layer.
            weights: its parameters.
            query: (L, N, E), or (N, L, E) with ``spec.batch_first``, or (L, E); in the spec's dtype, as key and value.
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S); True is masked; uint8: non-zero is masked; floats are added to the scores.
            attn_mask: (L, S) or (N*H, L, S); likewise.
            is_causal: block j > i too.
            need_weights: return the attention weights.
            average_attn_weights: averaged over heads.
            fully_masked: what a row without any open position gives: "nan", "zero" or "error".
            mode: "native" refuses what the framework's own layer cannot do; "composed" uses none; "auto" chooses.
            training: dropout is active.
            grad_output: the gradient with respect to the output; asks for ``result.grads``.
            grad_attn_weights: the gradient with respect to the returned weights; likewise.
            timeout: limit in seconds for a worker's answer, as in ``call``.

        Raises:
            ArgumentError: an argument has a wrong value or shape.
            ArgumentTypeError: an argument has a wrong type.
            UnsupportedError: this framework cannot answer this call rightly.
            BackendError: the backend is broken, died or ran out of time.

        Example:
            >>> import numpy as np, mhabridge as mb
            >>> spec = mb.MHASpec(embed_dim=8, num_heads=2)
            >>> x = np.ones((3, 1, 8), "float32")
            >>> mb.backend("numpy").run(spec, mb.MHAWeights.random(spec), x, x, x).output.shape
            (3, 1, 8)
        """
        from mhabridge.backends.running import run_on

        return run_on(
            self,
            spec,
            weights,
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            is_causal=is_causal,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            fully_masked=fully_masked,
            mode=mode,
            training=training,
            grad_output=grad_output,
            grad_attn_weights=grad_attn_weights,
            timeout=timeout,
        )


def backends(probe: bool = True) -> list[BackendInfo]:
    """Every backend that has a name: the reference, each framework, and what is registered.

    A framework that is here has no row while its plain name is registered, since ``backend`` then takes that one. A
    framework here is reported from what is installed, without importing it; ``mhabridge backends doctor`` runs each.

    Args:
        probe: start the worker of each registered backend; otherwise only look whether its interpreter is there.

    Raises:
        BackendError: the settings are damaged.

    Example:
        >>> [(info.name, info.where) for info in backends(probe=False)][0]
        ('numpy', 'here')
    """
    known = settings.entries()
    infos = in_parallel(_probed if probe else _glanced, known)
    here = {name: _here(name) for name in (mapping.REFERENCE, *mapping.FRAMEWORKS)}
    names = {entry.name for entry in known}
    frameworks = {entry.framework for entry in known}
    # A missing framework is worth a row only while nothing stands in for it.
    shown = [info for info in here.values() if info.name not in names and (info.ok or info.name not in frameworks)]
    return shown + [_instead_of(here.get(info.name), info) for info in infos]


def in_parallel(
    function: Callable[[_Item], _Found], items: Iterable[_Item], threads: int | None = None
) -> list[_Found]:
    """The function's results, in order. Ctrl-C ends all workers: nobody waits until the last has answered."""
    with ThreadPoolExecutor(threads) as pool, ctrl_c_ends_workers():
        return list(pool.map(function, items))


@contextlib.contextmanager
def ctrl_c_ends_workers() -> Iterator[None]:
    """On Ctrl-C end all workers, so that threads which wait for one go on; to be entered inside of their pool."""
    try:
        yield
    except KeyboardInterrupt:
        from mhabridge.backends import process

        process.end_all()
        raise


def _instead_of(here: BackendInfo | None, info: BackendInfo) -> BackendInfo:
    """A registered backend; when it takes the name of a framework that is here too, that is said."""
    if not here or not here.ok:
        return info
    used = f"used instead of {here.framework} {here.version or ''} in {here.python}, which has the same name"
    return dataclasses.replace(info, reason=f"{info.reason} It is {used}." if info.reason else f"{used}.")


def backend(name: str) -> Backend:
    """The backend of that name: the one that was registered under exactly this name, otherwise what is importable here.

    "megengine" also finds a registered "megengine@1.13.0" if that is the only one; "torch@1.8.1" is taken exactly.
    The worker is started by the first call, and is shared by everybody in this process.

    Raises:
        BackendError: there is none, or none that can be used; it lists what there is and says what to do.
        ArgumentError: that is not a name.

    Example:
        >>> backend("numpy").info.where
        'here'
    """
    framework, version = mapping.parse_name(name)
    exact = settings.find(name)
    if exact:
        return _opened(exact, name)
    local = _here(framework) if framework in (mapping.REFERENCE, *mapping.FRAMEWORKS) else None
    if local and local.ok and version in (None, _public(local.version)):
        return Backend(dataclasses.replace(local, name=name))
    only = None if version else _only_version(framework)
    if only:
        return _opened(only, name)
    raise _unknown(name, framework, local)


def registered(info: BackendInfo) -> Backend:
    """The registered backend that ``backends`` listed as this.

    Raises:
        BackendError: it was removed since then.
    """
    entry = settings.find(info.name)
    if entry is None:
        raise BackendError(f"backend {info.name!r}", given="it was removed meanwhile")
    return _opened(entry, info.name)


def _opened(entry: Entry, name: str) -> Backend:
    return Backend(dataclasses.replace(_glanced(entry), name=name), worker_for(entry))


def worker_for(entry: Entry) -> Worker:
    """The one worker of this process for a registered backend."""
    from mhabridge.backends.worker import Worker

    with _workers_lock:
        if entry not in _workers:
            _workers[entry] = Worker(entry.python, entry.framework, ssh=entry.ssh, ssh_args=entry.ssh_args)
        return _workers[entry]


def end_worker(name: str) -> None:
    """End this process's workers for a registered name: its environment is about to change, or has changed."""
    with _workers_lock:
        ended = [_workers.pop(entry) for entry in list(_workers) if entry.name == name]
    for worker in ended:
        worker.close()


_workers: dict[Entry, Worker] = {}
_workers_lock = threading.Lock()


def _only_version(framework: str) -> Entry | None:
    versions = [entry for entry in settings.entries() if entry.name.partition("@")[0] == framework]
    return versions[0] if len(versions) == 1 else None


def _here(framework: str) -> BackendInfo:
    """A framework in this process, judged by what is installed."""
    facts = mapping.table(framework)["framework"]
    info = BackendInfo(framework, framework, None, "here", sys.executable, platform.node(), True)
    if facts["module"] not in sys.modules and importlib.util.find_spec(facts["module"]) is None:
        reason = f"not installed here. Install it: mhabridge backends install {framework}"
        return dataclasses.replace(info, ok=False, reason=reason)
    try:
        version = importlib.metadata.version(facts["distribution"])
    except importlib.metadata.PackageNotFoundError:
        return info  # a build from source
    info = dataclasses.replace(info, version=version)
    problem = numpy_problem(framework)
    return dataclasses.replace(info, ok=False, reason=problem) if problem else info


def numpy_problem(framework: str) -> str:
    """What is wrong with this process's NumPy for the framework; empty when nothing is."""
    limit = mapping.table(framework)["framework"].get("numpy_below")
    if limit is None or mapping.version_key(np.__version__) < mapping.version_key(limit):
        return ""
    return (
        f"NumPy {np.__version__} is installed; {framework} needs numpy<{limit}. "
        f"pip install 'numpy<{limit}', or keep it apart: mhabridge backends install {framework}"
    )


def _glanced(entry: Entry) -> BackendInfo:
    """A registered backend, not started."""
    info = BackendInfo(
        entry.name, entry.framework, entry.version, "worker", entry.python, entry.ssh or platform.node(), True
    )
    if entry.ssh is None and not os.access(entry.python, os.X_OK):
        reason = f"there is no interpreter at {entry.python} any more. {_mend(entry)}"
        return dataclasses.replace(info, ok=False, reason=reason)
    return info


def _probed(entry: Entry) -> BackendInfo:
    """A registered backend, started."""
    info = _glanced(entry)
    if not info.ok:
        return info
    try:
        description = worker_for(entry).describe()
    except MHABridgeError as error:
        return dataclasses.replace(info, ok=False, reason=f"{error} {_mend(entry)}")
    return dataclasses.replace(info, version=description["version"], host=entry.ssh or description["host"])


def _mend(entry: Entry) -> str:
    if entry.installed:
        return f"Make its environment again: mhabridge backends install {entry.name}"
    return f"Add it again, or: mhabridge backends remove {entry.name}"


def _public(version: str | None) -> str | None:
    """A version without its local part: "2.13.0+cpu" is 2.13.0."""
    return version.partition("+")[0] if version else None


def _unknown(name: str, framework: str, local: BackendInfo | None) -> BackendError:
    known = [info for info in backends(probe=False) if info.ok]
    several = [info.name for info in known if info.framework == framework and info.where == "worker"]
    if local and not local.ok and not several:
        given = local.reason.partition(". Install it")[0]  # what to do stands in the advice
    elif several:
        given = f"no backend of exactly this name; there are {', '.join(several)}"
    else:
        given = "no such backend"
    advice = f"Install it: mhabridge backends install {name}" if local else "mhabridge backends add registers one."
    return BackendError(
        f"backend {name!r}", given=given, expected="one of " + ", ".join(info.name for info in known), advice=advice
    )
