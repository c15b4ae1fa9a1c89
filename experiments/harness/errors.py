"""Which errors a command says in one line, and which are bugs and show their traceback."""

import errno

from omegaconf.errors import OmegaConfBaseException

from keyanon.errors import UserError

SKIPPED = 3  # exit code: the work is done, but some pictures were skipped; what follows on a table may go on
FACES_IN_CLEAR = 4  # exit code of a command that finished: some published pictures show faces in clear


class FacesInClear(UserError):
    """A run that finished, of which some published pictures show faces of the originals in clear."""


def user_error(error: BaseException) -> str | None:
    """What a user can put right, in the words of this error or of one that caused it; None for a bug.

    Hydra wraps what a config's parts raise. A full disk counts as well, and what a configuration lacks.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError) or is_full_disk(cause):
            return str(cause)
        if isinstance(cause, OmegaConfBaseException):  # a setting that is not there, or refers to one that is not
            return ", ".join(line.strip() for line in str(cause).splitlines() if "object_type=" not in line)
        cause = cause.__cause__
    return None


def is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOSPC
