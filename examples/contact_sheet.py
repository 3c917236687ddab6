"""A picture of the crops in a folder of shards, read with plain webdataset.

    python examples/contact_sheet.py shards sheet.png

One clip a row, every third frame. Look at your crops before you train on them.
"""

import sys
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import webdataset

shards, picture = sys.argv[1:]
tars = sorted(str(path) for path in Path(shards).glob("*.tar"))
rows = []
for sample in islice(webdataset.WebDataset(tars, shardshuffle=False).decode("l8"), 0, 100, 20):
    strip = sample.get("mouth.jpg")  # (S x T, S) uint8, frames from top to bottom
    crops = sample["mouth.npy"] if strip is None else strip.reshape(-1, strip.shape[1], strip.shape[1])
    rows.append(np.concatenate(crops[::3], axis=1))
    print(sample["__key__"], sample["json"]["word"])
width = max(row.shape[1] for row in rows)
cv2.imwrite(picture, np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in rows]))
