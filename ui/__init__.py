"""The control panel in the browser. Shows and asks; every operation is `katherine`'s or `jobs`'."""
