"""Where errors become messages: a KatherineError shows its text, anything else is a bug and shows a reference to the
server's log. Every handler of a page goes through `shown`, which also notes there whatever kept a person waiting."""

import functools
import html
import logging
import secrets
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import gradio as gr

from katherine.errors import KatherineError

P = ParamSpec("P")
R = TypeVar("R")
_log = logging.getLogger("katherine.ui")
# Seconds that a handler may take: what needs longer is a job's or an errand's, which the page then follows.
SLOW = 1.0


def shown(handler: Callable[P, R]) -> Callable[P, R]:
    """The handler, with its errors turned into a message on the page. The message is escaped: it may quote a file's
    name or a line of data, and Gradio shows messages as HTML."""

    @functools.wraps(handler)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        began = time.monotonic()
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except KatherineError as error:
            raise gr.Error(message(str(error)), duration=None, print_exception=False) from None
        except Exception as error:
            reference = secrets.token_hex(4)
            _log.exception("bug %s in %s", reference, getattr(handler, "__qualname__", handler))
            text = f"A bug in the panel ({type(error).__name__}). The panel's log has it under {reference}."
            raise gr.Error(message(text), duration=None, print_exception=False) from None
        finally:
            if (took := time.monotonic() - began) > SLOW:
                _log.warning("slow: %s took %.2f s", getattr(handler, "__qualname__", handler), took)

    return guarded


def message(text: str) -> str:
    """Plain text as a message box takes it."""
    return html.escape(text).replace("\n", "<br>")
