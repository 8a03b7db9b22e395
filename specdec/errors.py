"""The one error class for mistakes a user can mend."""


class UsageError(ValueError):
    """Bad input. The message names the argument, its value and the remedy; the command line prints it as one line."""


class CompatibilityError(UsageError):
    """This model, drafter or verifier cannot be used together; the message says why and what can."""
