"""Downloads what a bare CUDA image lacks, and checks that it fits into 60 MB: `python tests/gpu/collect.py FOLDER`."""

import argparse
import subprocess
import sys
from pathlib import Path


# The bulk is pyarrow and pandas, which `datasets` cannot do without; later releases of pyarrow are too large
WHEELS = (
    "trl", "peft", "datasets", "dill", "multiprocess", "xxhash", "lazy_loader", "tenacity", "liger-kernel",
    "pyarrow<22", "pandas", "python-dateutil", "six",
)  # fmt: skip
LIMIT = 60e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="Python of the image")
    parser.add_argument("--platform", default="manylinux_2_28_x86_64")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(args.folder), "--only-binary", ":all:",
        "--python-version", args.python, "--platform", args.platform, *WHEELS,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    root = Path(__file__).resolve().parents[2]
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(args.folder), str(root)]
    subprocess.run(build, check=True)
    sizes = {path.name: path.stat().st_size for path in sorted(args.folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 1e6:6.1f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total / 1e6:6.1f} MB in all")
    if total > LIMIT:
        print(f"More than {LIMIT / 1e6:.0f} MB: leave out the largest and skip its part.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
