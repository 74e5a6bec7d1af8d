"""The fonts of the signs: which families are trained on, which are held out, and where their files are."""

import functools
import importlib.util
import re
from pathlib import Path

TRAINED = (
    "DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "Roboto",
    "SourceSansPro", "HankenGrotesk", "Manrope", "RedHatDisplay", "Caladea", "FredokaOne", "FjallaOne",
)  # fmt: skip
HELD_OUT = ("Lato", "SourceSerifPro")
PACKAGES = (
    "font_roboto", "font_source_sans_pro", "font_source_serif_pro", "font_lato", "font_manrope",
    "font_hanken_grotesk", "font_caladea", "font_rhd", "font_fredoka_one", "font_fjallaone",
)  # fmt: skip
# Hairlines are illegible at the sizes used; the display faces hold few glyphs; a variable file repeats the
# others.
_UNUSED = re.compile("Thin|ExtraLight|Variable|SansDisplay|SerifDisplay")


def family(path: Path) -> str:
    """The family of a font file, as named in TRAINED and HELD_OUT ("" for any other)."""
    stem = path.stem.split("-")[0]
    stem = re.sub("^STIXGeneral.*", "STIXGeneral", stem)
    return stem if stem in TRAINED + HELD_OUT else ""


def installed_folders() -> list[Path]:
    """Font folders of the installed packages (the optional dependencies of the demo)."""
    folders = []
    for package, inside in (("matplotlib", "mpl-data/fonts/ttf"), *((name, "files") for name in PACKAGES)):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            folders.append(Path(spec.origin).parent / inside)
    return folders


@functools.cache
def faces(held_out: bool, folder: str | None = None) -> tuple[tuple[str, ...], ...]:
    """Font files by family: the trained families or the held-out ones.

    ``folder`` replaces the installed packages as the place to look. Where a face exists as .ttf and .otf, the
    .ttf is taken.
    """
    found: dict[str, dict[str, Path]] = {name: {} for name in (HELD_OUT if held_out else TRAINED)}
    for place in [Path(folder)] if folder else installed_folders():
        for path in sorted(place.glob("*.[ot]tf")):
            name = family(path)
            if name in found and not _UNUSED.search(path.stem):
                found[name][path.stem] = path
    result = tuple(tuple(str(path) for _, path in sorted(files.items())) for files in found.values() if files)
    if not result:
        raise FileNotFoundError(
            f"no fonts in {folder or 'the installed font packages (pip install gemcut[demo])'}"
        )
    return result
