"""placeholder until merged"""


def user_error(error: BaseException) -> str | None:
    return str(error)
