"""A disk that fails on demand: the k-th call that writes, syncs, renames or makes a folder."""

import errno
import os
import tempfile
from pathlib import Path

CALLS = (
    (os, "write"),
    (os, "fsync"),
    (tempfile, "mkstemp"),
    (Path, "mkdir"),
    (Path, "chmod"),
    (Path, "replace"),
    (Path, "rename"),
)
# A different trouble each time: full, quota, limit, failing, gone, read-only.
TROUBLES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EROFS),
    *(errno.ENOENT, errno.EACCES),
)


class FailingDisk:
    """Counts the calls; number `fail_at` (from 1) raises, and with `stays` all after it, too.

    A failing write puts half of its bytes on the disk first, as a full disk does.
    """

    def __init__(self, monkeypatch, fail_at: int, stays: bool = False, calls=CALLS):
        self.calls, self.fail_at, self.stays = 0, fail_at, stays
        self.names: list[str] = []  # of the calls so far
        self.trouble = TROUBLES[fail_at % len(TROUBLES)]
        for owner, name in calls:
            monkeypatch.setattr(owner, name, self._failing(getattr(owner, name), name))

    @property
    def failed(self) -> bool:
        return self.calls >= self.fail_at

    def _failing(self, real, name):
        def call(*args, **kwargs):
            self.calls += 1
            self.names.append(name)
            if self.calls == self.fail_at or (self.stays and self.failed):
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(self.trouble, os.strerror(self.trouble))
            return real(*args, **kwargs)

        return call
