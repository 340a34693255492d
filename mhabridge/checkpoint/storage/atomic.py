"""Files that appear whole or not at all: the old target stays until the new one is finished.

New content goes to a file without a name (``O_TMPFILE``), which the kernel frees by itself when this process dies; only
at the end does it get the target's name. File systems without such files (some network ones) get a temporary name
beside the target, which is removed on every failure but a kill.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from mhabridge.errors import CheckpointError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], force: bool = False, sync: bool = True) -> Iterator[int]:
    """Write a file that takes its name only when the ``with`` block has ended without an error.

    Args:
        path: the target; its folder has to exist. An old target's mode is kept, else the umask decides.
        force: whether an existing target may be replaced.
        sync: whether to wait until the bytes are on the disk, so that they also survive a power failure.

    Yields:
        The descriptor to write to.

    Raises:
        CheckpointError: the target exists, is no regular file (a link, too: what it points to may be shared), has no
            folder, or there is no room for it.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.bin"
        >>> with replacing(target) as descriptor:
        ...     _ = os.write(descriptor, b"whole")
        ...     target.exists()
        False
        >>> target.read_bytes()
        b'whole'
    """
    with replacing_all([path], force, sync) as descriptors:
        yield descriptors[0]


@contextlib.contextmanager
def replacing_all(
    paths: Sequence[str | os.PathLike[str]], force: bool = False, sync: bool = True
) -> Iterator[list[int]]:
    """As ``replacing``, for files that belong together; the last one is that which leads to the others (an index).

    Nothing gets a name before all are whole. A kill in the moment of naming can leave some new files beside some old
    ones; so that no reader takes them for one checkpoint, an old last file is removed first and the new one comes last.

    Yields:
        The descriptors to write to, in the order of the paths.

    Raises:
        CheckpointError: as ``replacing``, or two paths are the same.
    """
    targets = _checked(paths, force)
    try:
        for target in targets:
            target.open()
        with _no_room_explained(targets):
            yield [target.descriptor for target in targets]
            _publish(targets, sync)
    finally:
        for target in targets:
            target.clean_up()


def require_replaceable(paths: Sequence[str | os.PathLike[str]], force: bool = False) -> None:
    """Refuse targets that ``replacing_all`` refuses before it writes; nothing is made.

    Raises:
        CheckpointError: as there.
    """
    for target in _checked(paths, force):
        target.require_writable_folder()


def _checked(paths: Sequence[str | os.PathLike[str]], force: bool) -> list[_Target]:
    # From the last on: an error names the one that was asked for.
    targets = [_Target(Path(path), force) for path in reversed(paths)][::-1]
    if len({target.path for target in targets}) != len(targets):
        raise CheckpointError(
            ", ".join(target.path.name for target in targets), given="one target twice", expected="different ones"
        )
    return targets


def _publish(targets: list[_Target], sync: bool) -> None:
    for target in targets:
        if sync:
            os.fsync(target.descriptor)
        target.prepare()
    if len(targets) > 1:
        targets[-1].path.unlink(missing_ok=True)
    try:
        for target in targets:
            target.publish()
    except BaseException:
        for target in targets:
            target.withdraw()
        raise
    for folder in {target.path.parent for target in targets} if sync else ():
        _sync_folder(folder)


class _Target:
    """One file to be written, from the first check to its name."""

    def __init__(self, path: Path, force: bool) -> None:
        # The folder is resolved, the name itself not: a link there is not followed.
        self.path = path.parent.resolve() / path.name
        self.force = force
        self.descriptor = -1
        self._temporary: Path | None = None
        self._published = False
        self._mode = self._check()

    def _check(self) -> int | None:
        """Whether the target may be written; an old one's mode."""
        _require_folder(self.path)
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # ValueError: NUL in the name
            why = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(str(self.path), given=str(why), expected="a name that can be written") from None
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "no regular file"
            advice = f"Name the file that it leads to: {self.path.resolve()}." if stat.S_ISLNK(mode) else ""
            raise CheckpointError(
                str(self.path), given=what, expected="a new file, or a regular one to replace", advice=advice
            )
        if not self.force:
            raise self._exists("a file that exists")
        return stat.S_IMODE(mode)

    def open(self) -> None:
        try:
            self._open_unnamed()
            if self._mode is not None:
                os.fchmod(self.descriptor, self._mode)
        except OSError as error:
            raise self._not_writable(str(error.strerror)) from error

    def require_writable_folder(self) -> None:
        """Refuse a folder in which ``open`` could make no file, as far as that can be told without making one."""
        if not os.access(self.path.parent, os.W_OK | os.X_OK):
            raise self._not_writable("a folder that nothing can be written to")

    def _not_writable(self, why: str) -> CheckpointError:
        return CheckpointError(str(self.path), given=why, expected="a folder that can be written to")

    def _open_unnamed(self) -> None:
        try:
            if not _CAN_BE_NAMED:
                raise OSError(errno.EOPNOTSUPP, "no /proc")
            self.descriptor = os.open(self.path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise
            name = self._free_name()
            self.descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            self._temporary = name

    def prepare(self) -> None:
        """What can still fail is done before the first target gets its name: a rename hardly can."""
        if self._mode is not None and self._temporary is None:
            name = self._free_name()
            self._link_to(name)
            self._temporary = name

    def publish(self) -> None:
        if self._mode is not None:
            self._rename()
            return
        try:
            self._link_to(self.path)  # unlike a rename, a link fails when somebody else has made that file meanwhile
            self._published = True
        except FileExistsError:
            if not self.force:
                raise self._exists("a file that something else made meanwhile") from None
            self._mode = 0
            self.prepare()
            self._rename()

    def withdraw(self) -> None:
        """A new file of a set that did not become whole."""
        if self._published:
            self.path.unlink(missing_ok=True)

    def _rename(self) -> None:
        assert self._temporary is not None
        os.rename(self._temporary, self.path)
        self._temporary = None

    def _link_to(self, name: Path) -> None:
        if self._temporary is not None:
            os.link(self._temporary, name)
            return
        folder = os.open(name.parent, os.O_RDONLY)
        try:
            # With a dir_fd Python calls linkat, which follows the link in /proc; plain link(2) does not.
            os.link(f"/proc/self/fd/{self.descriptor}", name.name, dst_dir_fd=folder)
        finally:
            os.close(folder)

    def clean_up(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None

    def _exists(self, what: str) -> CheckpointError:
        return CheckpointError(
            str(self.path), given=what, expected="a new name", advice="Use force (--force) to replace it."
        )

    def _free_name(self) -> Path:
        return self.path.with_name(f".{self.path.name[:200]}.{secrets.token_hex(4)}.part")


# Not every file system has unnamed files, and an old kernel takes O_TMPFILE for an attempt to write to the folder.
_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_CAN_BE_NAMED = hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _require_folder(path: Path) -> None:
    folder = path.parent
    if folder.is_dir():
        return
    raise CheckpointError(
        str(path),
        given=f"a folder that {'is none' if folder.exists() else 'does not exist'}: {folder}",
        expected="a file in an existing folder",
        advice="Make the folder first, or check the path.",
    )


@contextlib.contextmanager
def _no_room_explained(targets: list[_Target]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise CheckpointError(
            str(targets[-1].path),
            given=str(error.strerror),
            expected="room for the whole file",
            advice="Nothing was written, and an old file is as it was.",
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
