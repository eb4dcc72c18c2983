"""The demo: the whole pipeline on a small real example. ``run`` is the story, ``data`` and ``tasks`` its input."""
