"""A program such as the authors of a method would write: `stub_method.py WHAT IMAGES OUTPUT KEY`, for tests/test_external.py.

Every picture is XORed with the bytes of its own key. Other values of WHAT go wrong, each in its way. The folder that it is
started in gets `seen.json`: what such a program can see of its surroundings.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image

what, images, output, key = sys.argv[1], *map(Path, sys.argv[2:5])
text = key.read_text()
names = sorted(images.iterdir())
pictures = [PIL.Image.open(path) for path in names]
seen = {
    "arguments": sys.argv,
    "environment": dict(os.environ),
    "key": text,
    "mode": oct(key.stat().st_mode & 0o777),
    "pictures": [path.name for path in names],
    "sizes": sorted({picture.size for picture in pictures}),
    "starts": json.loads(Path("seen.json").read_text())["starts"] + 1 if Path("seen.json").exists() else 1,
}
Path("seen.json").write_text(json.dumps(seen))
print("the key is", text.strip().upper())
print("read", len(names), "pictures", file=sys.stderr)

secrets = dict(line.rpartition(" ")[::2] for line in text.splitlines())
for path, picture in zip(names, pictures, strict=True):
    before = picture.tobytes()
    mask = hashlib.shake_256((secrets.get(path.name) or secrets[""]).encode()).digest(len(before))
    picture = PIL.Image.frombytes("RGB", picture.size, bytes(a ^ b for a, b in zip(before, mask, strict=True)))
    is_last = path == names[-1]
    file = output / f"{path.stem}.png"
    if what == "crash" and is_last:
        raise SystemExit("no memory left")
    if what == "missing" and is_last:
        continue
    if what == "unreadable" and is_last:
        file.write_bytes(b"no picture")
        continue
    if what == "large" and is_last:
        picture = picture.resize((16, 16))
    if what == "twice" and is_last:
        picture.save(file.with_suffix(".bmp"))
    if what == "elsewhere":
        (output / "anonymous").mkdir(exist_ok=True)
        file = output / "anonymous" / f"{path.stem}_any.tiff"
    picture.save(file)
if what == "extra":
    PIL.Image.new("RGB", (9, 9)).save(output / "1.png")
    (output / "notes").mkdir()
    PIL.Image.new("RGB", (9, 9)).save(output / "notes" / names[0].name)
if what == "child":
    Path("child").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
