"""The exceptions that end in one readable line. Nothing heavy is imported here, so a light module can raise them."""


class UserError(Exception):
    """Something the user can put right: the message names the thing, the place and the remedy. Anything else is a bug."""


class BadPicture(UserError):
    """A picture that cannot be used (corrupt, too small, no face): recorded, counted and skipped, never a crash."""
