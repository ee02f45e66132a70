"""What makes a part of the page ask for news: once when it comes into sight, then every so often while it stays there.
The page itself knows what is in sight. A gr.Timer would have to be told so by the server at each change of tabs, which
costs a request, and one that was not told stands still."""

from ui.component import HTML, when_ready


def clock(every: float | None) -> HTML:
    """Gives a `tick` event. every: seconds between two; None for only the one when it comes into sight, be it that its
    tab is opened or that the browser's own tab is looked at again. In sight is the gr.Tab that it stands in or, outside
    of any, the page."""
    return HTML(
        "",
        html_template="",
        js_on_load=when_ready(f"katherine.clock(element, trigger, {(every or 0) * 1000:.0f})"),
        apply_default_css=False,
        visible="hidden",
    )
