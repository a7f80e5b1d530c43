"""Turn Debian's package openclipart-png (public domain drawings) into image folders for the experiments of the README.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb openclipart
    python recipes/drawings.py openclipart/usr/share/openclipart/png data

Writes three sets that share no drawing, a folder per category, PNGs of at most 256 pixels, transparency on white:

    data/drawings    8 categories, up to 120 drawings each: to fine-tune and shrink a model on
    data/probe       10 other categories, up to 80 each: to compare features on
    data/calib       what is left, up to 80 of a category: to rank units and repair layers by

Which drawings are taken depends on their paths alone. Tiny drawings (below 32 pixels a side), huge ones and
copies are left out.
"""

import argparse
import hashlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

# category: folder of the package
DRAWINGS = {
    "animals": "animals",
    "flags": "signs_and_symbols/flags",
    "food": "food",
    "games": "recreation/games",
    "geography": "geography",
    "people": "people",
    "tools": "tools",
    "transportation": "transportation",
}
PROBE = {
    "arrows": "shapes/arrows",
    "buildings": "buildings",
    "education": "education",
    "electronics": "electronics",
    "hardware": "computer/hardware",
    "holiday": "recreation/holiday",
    "office": "office",
    "plants": "plants",
    "religion": "recreation/religion",
    "weather": "signs_and_symbols/weather",
}
CALIB = {
    "computer": "computer",
    "containers": "containers",
    "decorations": "decorations",
    "logos": "logos",
    "recreation": "recreation",
    "science": "science",
    "shapes": "shapes",
    "signs": "signs_and_symbols",
    "special": "special",
    "unsorted": "unsorted",
}
SETS = {"drawings": (DRAWINGS, 120), "probe": (PROBE, 80), "calib": (CALIB, 80)}
SIZE, LEAST = 256, 32  # pixels of a side
MOST = 1 << 24  # pixels of a drawing that is read


def on_white(path: Path) -> Image.Image | None:
    """A drawing of at most `SIZE` pixels on white, or None where it cannot be used."""
    try:
        with Image.open(path) as file:
            if min(file.size) < LEAST or file.width * file.height > MOST:
                return None
            drawing = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # damaged, or huge
        return None
    drawing.thumbnail((SIZE, SIZE))
    white = Image.new("RGB", drawing.size, "white")
    white.paste(drawing, mask=drawing.getchannel("A"))
    return white


def usable(root: Path, folder: str, seen: set[str], taken: set[Path]) -> Iterator[Image.Image]:
    """Drawings of a folder that were not taken before, in an order that their paths decide."""
    paths = {p: p.relative_to(root).as_posix() for p in (root / folder).rglob("*.png") if p not in taken}
    for path in sorted(paths, key=lambda p: hashlib.sha256(paths[p].encode()).digest()):
        image = on_white(path)
        digest = image and hashlib.sha256(image.tobytes()).hexdigest()
        if image is None or digest in seen:
            continue
        seen.add(digest)
        yield image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("png", type=Path, help="the package's folder of PNGs")
    parser.add_argument("output", type=Path, help="where the three sets are written; must not hold them yet")
    args = parser.parse_args()
    folders = {name: folder for categories, _ in SETS.values() for name, folder in categories.items()}
    if missing := [folder for folder in folders.values() if not (args.png / folder).is_dir()]:
        sys.exit(f"drawings.py: {args.png} has no folder {missing[0]}; expected that of openclipart-png, …/png")
    if there := [name for name in SETS if (args.output / name).exists()]:
        sys.exit(f"drawings.py: {args.output / there[0]} exists; give another folder")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are looked at here
    seen: set[str] = set()
    for name, (categories, most) in SETS.items():
        # what another set is made of is in none of the folders around it
        others = [folder for set_, (chosen, _) in SETS.items() if set_ != name for folder in chosen.values()]
        for category, folder in categories.items():
            inner = [other for other in others if other.startswith(f"{folder}/")]
            taken = {path for other in inner for path in (args.png / other).rglob("*.png")}
            target = args.output / name / category
            target.mkdir(parents=True)
            count = 0
            for image in usable(args.png, folder, seen, taken):
                image.save(target / f"{count:03}.png")
                count += 1
                if count == most:
                    break
            print(f"{name}/{category}: {count}")


if __name__ == "__main__":
    main()
