"""The exceptions that end in one readable line. Nothing heavy is imported here, so a light module can raise them.

Errors that belong to one thing stand beside it: BadKey, BadHeader, BadModel, MissingWeights, WrongWeights, BadMethod. A ValueError,
TypeError or assertion that is no UserError is a bug of ours, and shows its traceback.
"""


class UserError(Exception):
    """Something the user can put right: the message names the thing, the place and the remedy. Anything else is a bug."""


class BadPicture(UserError):
    """A picture that cannot be used (corrupt, too small, no face): recorded, counted and skipped, never a crash."""


class BadSetting(UserError, ValueError):
    """A setting that cannot be used: out of its range, of a name that nothing has, or at odds with another one."""


class BadData(UserError, ValueError):
    """Files that are there and cannot be used: a malformed list, two pictures of one id, none of a run's pictures readable."""


class MissingData(UserError, FileNotFoundError):
    """Pictures, lists or results that are not on this machine."""


class MissingPackage(UserError, ModuleNotFoundError):
    """A Python package that is not installed."""
