"""Write data/catalogue/sizes.json: the sizes of every level of every shipped model, from the recipes.

Run after changing a recipe or a row (a test says when): python scripts/catalogue_sizes.py
"""

import json
from pathlib import Path

from bitladder.files.catalogue import _shipped, compute_parts, shape_key

TARGET = Path(__file__).parents[1] / "src/bitladder/data/catalogue/sizes.json"

if __name__ == "__main__":
    sizes = {shape_key(row.shape): compute_parts(row.shape) for row in _shipped()}
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in sizes.items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{TARGET.name}: {len(sizes)} shapes, {TARGET.stat().st_size} bytes")
