"""The acceptance run: `python -m tests.gpu --output FOLDER`, see README.md."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any


PARTS = ("correctness", "heads", "step", "capture", "training")
# Seconds of one part; together below the ten minutes that a lent machine gives
LIMITS = {"step": 150, "capture": 90}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu_report"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("FIRST_TRL_KERNEL", "triton")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}), interpreter",
        "torch": torch.__version__,
        "versions": _versions(),
        "parts": {},
    }
    for part in args.parts:
        started = time.perf_counter()
        print(f"{part} ...", flush=True)
        try:
            result: dict[str, Any] = {"result": _run(part, device, args.output), "skipped": None}
        except (ImportError, subprocess.SubprocessError) as error:
            result = {"result": None, "skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        except Exception as error:  # the other parts still run; the report says that this one failed
            traceback.print_exc()
            result = {"result": None, "skipped": None, "failed": f"{type(error).__name__}: {error}"}
        report["parts"][part] = result | {"seconds": round(time.perf_counter() - started, 1)}
        print(f"  {result.get('skipped') or result.get('failed') or 'done'}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    text = _markdown(report)
    (args.output / "report.md").write_text(text)
    print(text)
    return 0 if _good(report) else 1


def _run(part: str, device: str, output: Path) -> Any:
    if part == "correctness":
        from . import correctness

        return correctness.run(device)
    if part == "heads":
        from . import heads

        # The interpreter counts right and not fast: the torch path stands for the CPU
        kernel = os.environ["FIRST_TRL_KERNEL"]
        if device == "cpu":
            os.environ["FIRST_TRL_KERNEL"] = "torch"
        try:
            return heads.run(device)
        finally:
            os.environ["FIRST_TRL_KERNEL"] = kernel
    if part == "training":
        from . import training

        return training.run(device)
    return _benchmark(part, device, output)


def _benchmark(part: str, device: str, output: Path) -> Any:
    """One of the benchmarks, in a process of its own."""
    file = (output / f"{part}.json").resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    large = device == "cuda"
    options = {
        "step": ["tests.benchmarks.train_step", "--no-memory", "--repeats", "3", "--weights", "full", "--variants", "sft", "topk", "bucket"]
        + (["--dtype", "bfloat16", "--shape", "qwen2.5-1.5b", "--rows", "8", "--seq-len", "512"] if large else ["--shape", "tiny", "--rows", "2", "--seq-len", "32"]),
        "capture": ["tests.benchmarks.capture", "--skip-memory", "--repeats", "3"]
        + (["--device", "cuda", "--dtype", "bfloat16", "--rows", "256", "--length", "512", "--vocab", "151936", "--batch-tokens", "32768", "--loop-rows", "1"] if large else ["--rows", "4", "--length", "32", "--width", "64", "--layers", "2", "--loop-rows", "1"]),
    }[part]  # fmt: skip
    environment = {**os.environ, "FIRST_TRL_KERNEL": "triton" if large else "torch", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", *options, "--json", str(file)]
    done = subprocess.run(command, env=environment, timeout=LIMITS[part], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if "ModuleNotFoundError" in last or "ImportError" in last:
            raise ImportError(last)
        raise RuntimeError(last)
    return json.loads(file.read_text())


def _good(report: dict[str, Any]) -> bool:
    parts = report["parts"]
    if any(part.get("failed") for part in parts.values()):
        return False
    correctness = (parts.get("correctness") or {}).get("result") or []
    training = (parts.get("training") or {}).get("result") or {"ok": True}
    return all(row["ok"] for row in correctness) and training["ok"]


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("triton", "transformers", "trl", "peft", "datasets", "accelerate", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _markdown(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"# Acceptance on {report['device']}", "", f"torch {report['torch']}, {versions}.", ""]
    for name, part in report["parts"].items():
        lines += [f"## {name} ({part['seconds']} s)", ""]
        result = part["result"]
        if part["skipped"] or part.get("failed"):
            lines += [f"Skipped: {part['skipped']}" if part["skipped"] else f"**Failed**: {part['failed']}", ""]
        elif name == "correctness":
            bad = [row for row in result if not row["ok"]]
            lines += [f"{len(result) - len(bad)} of {len(result)} cases within the tolerance.", ""]
            lines += [f"- wrong: {row}" for row in bad]
        elif name == "heads":
            lines += [
                "| shape | variant | ms (low to high) | x products | peak MB |",
                "| --- | --- | --- | --- | --- |",
            ]
            unit = {row["shape"]: row["ms"] for row in result if row["variant"] == "bare products"}
            for row in result:
                peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
                lines.append(
                    f"| {row['shape']} | {row['variant']} | {row['ms']:.2f} ({row['low']:.2f} to {row['high']:.2f}) | "
                    f"{row['ms'] / unit[row['shape']]:.2f} | {peak} |"
                )
            lines.append("")
        elif name == "step":
            lines += ["| variant | ms a step | x SFTTrainer |", "| --- | --- | --- |"]
            for row in result["steps"]:
                lines.append(f"| {row['variant']} | {1000 * row['median']:.1f} | {row['time_sft']:.2f} |")
            lines.append("")
        elif name == "capture":
            rates = ", ".join(
                f"{what.replace('_', ' ')} {rate:,.0f}" for what, rate in result["tokens_per_second"].items()
            )
            lines += [f"Tokens/s: {rates}; capture / bare forward {result['capture_over_bare_forward']}.", ""]
        else:
            lines += [
                f"Loss {result['loss_before']:.3f} before, {result['loss_after']:.3f} after; two runs differ by at most "
                f"{result['largest_difference_of_two_runs']:.1e} in a weight.",
                "",
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
