"""Pictures of records. The only door to matplotlib."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nim4.stage import atomic_write


@contextmanager
def picture(out: Path, num_rows: int = 1) -> Iterator[list[Any]]:
    """Gives `num_rows` matplotlib axes, one above the other with a common x axis; what is drawn on them becomes the PNG file `out`.

    The file appears only when it is whole, and not at all when drawing fails.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(num_rows, figsize=(8, 4 if num_rows == 1 else 2.2 * num_rows), layout="constrained", sharex=True, squeeze=False)
    try:
        yield list(axes[:, 0])
        content = io.BytesIO()
        figure.savefig(content, dpi=120, format="png")
        with atomic_write(out, "wb") as file:
            file.write(content.getvalue())
    finally:
        pyplot.close(figure)
