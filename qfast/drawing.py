"""Saves matplotlib figures whose texts are shown literally.

matplotlib interprets a text with two dollar signs as mathematics and raises an error if it is not. Names of segments,
columns and experiments are arbitrary texts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

from qfast.errors import shown

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure

__all__ = ["drawn", "legend_text", "save_figure"]

log = logging.getLogger("qfast")

PNG_LEVEL = 4  # of zlib: faster than its default of 6, and files become 1% larger


def save_figure(figure: Figure, target: str | os.PathLike[str] | IO[bytes], kind: str) -> None:
    """Draw a figure to a file or a stream. No text in it is interpreted as mathematics or TeX.

    Parameters
    ----------
    figure : Figure
    target : path or binary stream
    kind : "png", "pdf" or "svg"

    Examples
    --------
    >>> import io
    >>> from matplotlib.figure import Figure
    >>> figure, out = Figure(), io.BytesIO()
    >>> _ = figure.subplots().set_title("$x_{$")
    >>> save_figure(figure, out, "png")
    >>> out.getvalue()[1:4]
    b'PNG'
    """
    import matplotlib
    from matplotlib.text import Text

    for item in figure.findobj(Text):
        if isinstance(item, Text):
            item.set_parse_math(False)
            item.set_usetex(False)
    options: dict[str, Any] = {}
    if kind == "png":
        options = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": PNG_LEVEL}}
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):  # for texts that drawing creates
        figure.savefig(target, format=kind, **options)


def legend_text(name: object) -> str:
    """A name as the label of a line. matplotlib leaves labels that begin with an underscore out of the legend.

    >>> legend_text("test"), legend_text("_new") == "_new"
    ('test', False)
    """
    return f"\N{ZERO WIDTH SPACE}{name}" if str(name).startswith("_") else str(name)


def drawn(drawings: Mapping[str, Callable[[], bytes]]) -> tuple[dict[str, bytes], list[str]]:
    """Draw several plots. A failure costs only its own plot.

    Parameters
    ----------
    drawings : mapping
        Name of a plot -> function that returns the image.

    Returns
    -------
    images : dict of str to bytes
        The plots that could be drawn.
    notes : list of str
        Reasons why the others are missing, which are also logged.

    Examples
    --------
    >>> drawn({"loss": lambda: b"image"})
    ({'loss': b'image'}, [])
    """
    images, notes = {}, []
    for name, draw in drawings.items():
        image, note = _attempted(name, draw)
        if note is None:
            images[name] = image
        else:
            notes.append(note)
            log.warning("%s", note)
    return images, notes


def _attempted(name: str, draw: Callable[[], bytes]) -> tuple[bytes, str | None]:
    """The image, and the reason why there is none."""
    try:
        return draw(), None
    except Exception as error:  # a plot must not cost the results of a run
        log.debug("the plot %r failed", name, exc_info=True)
        return b"", f"the plot {name!r} was skipped: {type(error).__name__}: {shown(str(error), 200)}"
