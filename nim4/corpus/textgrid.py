"""Intervals of Praat's TextGrid files. The only door to praatio, which reads the long and the short form, in UTF-8 and UTF-16."""

from pathlib import Path

from nim4.config import RecipeError, nearest


def read_intervals(path: Path, tier: str) -> list[tuple[float, float, str]]:
    """(start in seconds, end in seconds, text) of the intervals of a tier that hold text, in order.

    Raises:
        RecipeError: if the file is missing or no TextGrid, or has no tier of intervals with this name.
    """
    from praatio import textgrid
    from praatio.utilities.errors import PraatioException

    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False)
    except FileNotFoundError as error:
        raise RecipeError(path, expected="a TextGrid file", found="no such file", fix="unpack the corpus again") from error
    except (PraatioException, OSError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:  # it does not check what it parses
        found = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
        raise RecipeError(path, expected="a TextGrid file", found=found, fix="unpack the corpus again, or save it with Praat") from error
    if tier not in grid.tierNames or not isinstance(grid.getTier(tier), textgrid.IntervalTier):
        found = ", ".join(grid.tierNames) or "none"
        raise RecipeError(path, expected=f"a tier of intervals named {tier!r}", found=found, fix=nearest(tier, list(grid.tierNames)))
    return [(float(entry.start), float(entry.end), entry.label.strip()) for entry in grid.getTier(tier).entries if entry.label.strip()]
