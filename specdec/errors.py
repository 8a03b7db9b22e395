"""The one error class for mistakes a user can mend."""


class UsageError(ValueError):
    """Bad input. The message names the argument, its value and the remedy; the command line prints it as one line."""


def first_line(error: BaseException, most: int = 160) -> str:
    """Kind and first line of a foreign error, which may have no message at all."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {line[:most]}"


class CompatibilityError(UsageError):
    """This model, drafter or verifier cannot be used together; the message says why and what can."""
