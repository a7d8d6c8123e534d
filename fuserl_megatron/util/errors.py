"""The error that ends a command with one line."""


class UserError(ValueError):
    """Something the user can put right, in one line: what, where, what to type instead. Ends a command with code 2."""
