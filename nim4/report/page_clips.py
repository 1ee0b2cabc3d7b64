"""The demo clips of arXiv 2604.18105's page, scored again: which reported rates follow from the texts, and what `fair` makes of them."""

from pathlib import Path
from typing import Any

from nim4.config import RecipeError
from nim4.score import profiles
from nim4.score.attribution import attribute, distance
from nim4.score.error_rate import merge_compounds
from nim4.stage import read_json

CAPPED = ">100"  # how the page shows a rate above 100


def rescored(path: Path) -> list[dict[str, Any]]:
    """One row per clip and system: what the page reports, what `page` counts in the text it shows and in the restored one, and what `fair` does.

    Raises RecipeError when the file is not one of reported clips.
    """
    content = read_json(path)
    try:
        return [_row(clip, system) for clip in content["clips"] for system in clip["systems"]]
    except (KeyError, TypeError) as error:
        raise RecipeError(path, expected="reported clips: clips, systems, rate, hyp", found=f"no {error}", fix="restore the file") from error


def as_markdown(path: Path) -> str:
    """The rows in which `fair` counts something else than the page reports, and why."""
    rows = rescored(path)
    lines = [
        "| clip | system | page % | from the text shown | restored | fair % | what fair takes away |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        if row["fair"] != row["reported"]:
            why = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items() if kind != "lexical") or "fewer reference units"
            lines.append(f"| {row['id']} | {row['system']} | {row['reported']} | {row['shown']} | {row['restored'] or ''} | {row['fair']} | {why} |")
    follow = sum(row["shown"] == row["reported"] for row in rows)
    restored = sum((row["restored"] or row["shown"]) == row["reported"] for row in rows)
    names = ", ".join(f"{name} {profiles.profile_hash(name)}" for name in ("page", "fair"))
    counts = (
        f"{follow} of {len(rows)} rates follow from the texts that the page shows, {restored} from the restored ones; the same rate under `fair`: "
    )
    return "\n".join([*lines, "", f"{counts}{sum(row['fair'] == row['reported'] for row in rows)}. Profiles {names}."])


def _row(clip: dict[str, Any], system: dict[str, Any]) -> dict[str, Any]:
    ref, hyp = clip["ref"], system["hyp"]
    best_ref, best_hyp = clip.get("ref_restored", ref), system.get("hyp_restored", hyp)
    restored = (best_ref, best_hyp) != (ref, hyp)
    errors, rate = _count(best_ref, best_hyp, "page")
    return {
        "id": clip["id"],
        "system": system["system"],
        "reported": system["rate"],
        "shown": _count(ref, hyp, "page")[1],
        "restored": rate if restored else None,
        "fair": _count(best_ref, best_hyp, "fair")[1],
        "kinds": dict(attribute(best_ref, best_hyp, errors, chinese=True)),
    }


def _count(ref: str, hyp: str, profile: str) -> tuple[int, str]:
    """Mixed errors, and their rate as the page writes it."""
    ref_units, hyp_units = (tuple(profiles.units(profiles.normalise(text, profile, chinese=True), "MER", profile)) for text in (ref, hyp))
    if profiles.merges_compounds(profile):
        hyp_units = merge_compounds(ref_units, hyp_units)
    errors = distance(ref_units, hyp_units)
    rate = 100 * errors / len(ref_units)
    return errors, CAPPED if rate > 100 else f"{rate:.2f}"
