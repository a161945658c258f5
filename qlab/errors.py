"""The one exception qlab raises on purpose: one sentence with what, where, the value and what to do."""


class QlabError(ValueError):
    """A refusal that its reader can act on. The command line prints it as one line and exits with 2."""


class Unwritable(QlabError):
    """A refusal of the place that is written to, not of what was given: what is written already stays, and the job can be resumed."""
