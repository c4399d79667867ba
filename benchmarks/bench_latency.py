"""Latency of ICIIA behind MobileNetV2 in onnxruntime: one image of one client, with one and two threads.

    python benchmarks/bench_latency.py

Weights are random: they do not change the time. D = 1280, K = 1000, N = 3, 15 past images; G = 1 (ICIIA-B) and
256 (ICIIA-T), attention `causal`, which keeps keys and values of the past, and `full`, which computes the past again.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from bench_service import ICIIA, make_run

from iciia_exp.models.backbones.torchvision_backbone import TorchvisionBackbone
from iciia_exp.serving.latency import measure
from iciia_exp.serving.programs import programs_of, write_program
from iciia_exp.serving.run import Run


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    backbone = TorchvisionBackbone(1000, "mobilenet_v2").eval().requires_grad_(False)
    print("milliseconds of one image, MobileNetV2 at 224 px, D=1280, K=1000, N=3, 15 past images; median and 90 %")
    print(f"{'attention':<11}{'G':>4}{'threads':>9}{'backbone':>16}{'step':>16}{'of backbone':>13}{'step, MB':>10}")
    for attention in ("causal", "full"):
        for groups in (1, 256):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                ICIIA["groups"] = groups
                make_run(folder, attention)
                run = Run.load(folder)
                programs = [p for p in programs_of(run, backbone, "float") if p.name in ("step", "backbone")]
                for program in programs:
                    write_program(program, folder / f"{program.name}.onnx", "onnx")
                found = measure(run, folder, programs)
                size = (folder / "step.onnx").stat().st_size / 1e6
                for threads, added in found["added_percent"].items():
                    times = (found["milliseconds"][name][threads] for name in ("backbone", "step"))
                    cells = "".join(f"{time['median']:>8.2f}{time['p90']:>8.2f}" for time in times)
                    print(f"{attention:<11}{groups:>4}{threads:>9}{cells}{added:>11.0f} %{size:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
