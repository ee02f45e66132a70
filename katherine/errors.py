"""One exception root. A KatherineError's message is meant for the person at the screen: it says what was
found, where, and what to do. Anything not under this root is a bug."""

from collections.abc import Mapping, Sequence


class KatherineError(Exception):
    """Root of every error that a person can act on."""


class DataError(KatherineError, ValueError):
    """Input files, lines or datasets that cannot be used."""


class TemplateError(KatherineError, ValueError):
    """A chat template that cannot be rendered the same way in training and in chat."""


class RecipeError(KatherineError, ValueError):
    """A recipe that cannot work. `reasons` holds every reason at once, one sentence each; `fields` those that one field
    alone is to blame for, by its name."""

    def __init__(self, reasons: Sequence[str], fields: Mapping[str, str] | None = None):
        self.reasons = list(reasons)
        self.fields = dict(fields or {})
        super().__init__("\n".join(self.reasons))


class PriceError(KatherineError, ValueError):
    """A price, or a kind of GPU, that cannot be taken down."""


class NotFound(KatherineError, LookupError):
    """A dataset, run, base or file that was named but is not there."""


class Busy(KatherineError, RuntimeError):
    """Something is held by somebody else; the message names the holder."""


class SetupError(KatherineError, RuntimeError):
    """This machine lacks something the step needs."""


class DiskError(KatherineError, OSError):
    """Not enough room, or a file that cannot be written."""


class ModelError(KatherineError, RuntimeError):
    """A base and an adapter that do not fit each other, or cannot be loaded."""


class TrainingError(KatherineError, RuntimeError):
    """Training cannot go on: not a bug in the code, and the message says what to change."""


class ExportError(KatherineError, RuntimeError):
    """A merge, conversion or quantisation that failed."""


class ApprovalError(KatherineError, RuntimeError):
    """An export that is not approved, or may not be by whoever asks. Every reason is a line of the message."""


class PublishError(KatherineError, RuntimeError):
    """A push that cannot begin, or did not come to its end. Pushed again, it goes on from what is there."""


class EngineError(KatherineError, RuntimeError):
    """A model process that did not load, crashed, or answered out of protocol."""


class PodError(KatherineError, RuntimeError):
    """The pod's host refused, or could not be asked. `passing`: asking again later may help."""

    def __init__(self, message: str, *, passing: bool = False):
        super().__init__(message)
        self.passing = passing


class ReviewError(KatherineError, ValueError):
    """What a reviewer asked for cannot be done. Said in words for somebody who knows nothing of models: no ids, paths
    or names of files, which would also tell the answers apart."""
