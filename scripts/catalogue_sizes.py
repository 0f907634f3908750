"""Write data/catalogue/headers.json, what llama.cpp's converter makes of rows that are stated as config.json, and
sizes.json, the sizes of every level of every shipped model, from the recipes.

Run after changing a recipe or a row (a test says when): python scripts/catalogue_sizes.py
It needs the converter (any conversion fetches it) and takes seconds to minutes for each new row; headers of rows that
have not changed are in the cache.
"""

import json
from pathlib import Path

import yaml

from bitladder.files import catalogue
from bitladder.files.catalogue_headers import shipped_headers, shorten
from bitladder.files.converter import find_converter
from bitladder.files.header_conversion import header_of

FOLDER = Path(__file__).parents[1] / "src/bitladder/data/catalogue"


def write(name: str, table: dict) -> None:
    """One row a line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in table.items()]
    path = FOLDER / name
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{name}: {len(table)} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    converter = find_converter()
    headers = {}
    for row in yaml.safe_load((FOLDER / "models.yaml").read_text())["models"]:
        if "config" in row:
            model = header_of(row["hub"].split("/")[1], row["config"], (), converter).model
            print(f"{row['hub']}: {model.dims.architecture}, {model.elements / 1e9:.4g} of {row['params']}", flush=True)
            headers[row["hub"]] = shorten(model)
    write("headers.json", headers)
    shipped_headers.cache_clear()
    rows = catalogue._shipped()
    write("sizes.json", {catalogue.size_key(row): catalogue.compute_parts(row.whole()) for row in rows})
