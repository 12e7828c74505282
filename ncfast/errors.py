"""The one exception that is meant for the user of a program, not for its author."""


class UserError(Exception):
    """A mistake of the user's: a program reports it as one line and exits with code 2, without a traceback.

    The message says what was expected, what came and what to do; it is kept to one line, whatever it quotes.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
