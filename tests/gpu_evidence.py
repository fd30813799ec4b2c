"""Everything that one visit to a machine with an NVIDIA GPU can show, in one command; JSON for each part; by hand.

    PYTHONPATH=.:export:tests python -m gpu_evidence OUT [--parts facts,tests,steps,onnx,bench,serve]
        [--seconds 540] [--select "gpu and not tensorrt"] [--work DIR]

    facts   versions, the card, what it copies and multiplies in a second, what ``mcdeploy doctor`` says
    tests   pytest -m SELECT, as a table of what passed and what failed
    steps   how long one training step of a net takes, eager and compiled, alone and beside others; the loader alone
    onnx    mcdeploy bench: dense against pruned in ONNX Runtime's CUDA provider, fp32 and fp16
    bench   mcdeploy bench: dense against pruned in PyTorch on CUDA, eager and compiled, with the dense net twice (A/A)
    serve   mcdeploy serve --provider cuda under load; needs wrk

Parts end early when the time is up, and say what they left out. Nothing of the card's settings is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MCDEPLOY = [sys.executable, "-m", "mcdeploy.cli"]
GPU_TESTS = ("tests/test_cuda.py", "tests/test_gpu.py", "tests/test_pytorch_runner.py")
PARTS = ("facts", "tests", "steps", "onnx", "bench", "serve")
# timm name, image size, and the blocks that the pruned one does without
NETS = {
    "resnet34": (
        224,
        ("layer1.0", "layer1.1", "layer2.1", "layer2.2", "layer3.1", "layer3.2", "layer3.3", "layer3.4", "layer4.1"),
    ),
    "resnet50": (224, ("layer1.1", "layer2.1", "layer2.2", "layer3.1", "layer3.2", "layer3.3", "layer4.1")),
    "efficientnet_lite0": (224, ("blocks.3.1", "blocks.4.1", "blocks.5.1", "blocks.5.2")),
}
BATCHES = (1, 8, 32)
Plan = tuple[str, int, str, str]  # a name of STEPS, batch, plain or last (channels), eager or compiled
# name: backbone, rule, options of the rule; at 32x32 pixels, 10 classes
STEPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resnet56 maskconnect4": ("resnet56_cifar", "maskconnect", {"fan_in": 4}),
    "resnet56 ddw": ("resnet56_cifar", "ddw", {"router": "stage"}),
    "multibranch20 full": ("multibranch20_8x4d_cifar", "gateconnect", {"connect": "full"}),
    "multibranch20 k1": ("multibranch20_8x4d_cifar", "gateconnect", {"connect": "learned", "fan_in": 1}),
    "multibranch20 k4": ("multibranch20_8x4d_cifar", "gateconnect", {"connect": "learned", "fan_in": 4}),
    "multibranch29 k4": ("multibranch29_8x8d_cifar", "gateconnect", {"connect": "learned", "fan_in": 4}),
}


class Visit:
    """What all parts share: where results go, and how much time is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.work: Path = options.work or options.out
        self.select: str = options.select
        self.ends = time.monotonic() + options.seconds
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.ends - time.monotonic()

    def write(self, name: str, found: Any) -> None:
        (self.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")

    def run(self, *command: str | Path, at_most: float = 600.0) -> tuple[int, str, float]:
        """Exit code, all that was said, seconds; 124 where the time was up."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "export"), str(ROOT / "tests"), *filter(None, sys.path)]
            )
        }
        began = time.monotonic()
        try:
            done = subprocess.run(
                [str(word) for word in command], env=environment, capture_output=True, text=True, check=False,
                timeout=max(1.0, min(at_most, self.left())), cwd=ROOT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
            return 124, said, time.monotonic() - began
        except OSError as error:
            return 127, str(error), time.monotonic() - began
        return done.returncode, done.stdout + done.stderr, time.monotonic() - began


# --------------------------------------------------------------------------------------------------------------- facts


def facts(visit: Visit) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    names = (
        "torch", "torchvision", "timm", "accelerate", "triton", "numpy", "onnx", "onnxscript", "onnx-ir", "onnxruntime",
        "onnxruntime-gpu", "tensorrt", "cuda-bindings", "cuda-python", "nvidia-ml-py", "nvidia-cudnn-cu13", "pytest",
        "pydantic", "starlette", "uvicorn",
    )  # fmt: skip
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions, "cores": os.cpu_count()}
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total,mig.mode.current"
    found["nvidia-smi"] = visit.run("nvidia-smi", f"--query-gpu={query}", "--format=csv")[1]
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "ceilings": _ceilings()}
    code, said, _ = visit.run(*MCDEPLOY, "doctor", "--json", visit.work / "doctor.json", at_most=120)
    file = visit.work / "doctor.json"
    found["doctor"] = json.loads(file.read_text()) if file.exists() else said[-2000:]
    found["doctor exit code"] = code
    visit.write("facts", found)
    print(json.dumps(found["versions"]), found["nvidia-smi"], found.get("ceilings"), sep="\n", flush=True)


def _ceilings() -> dict[str, float]:
    """What the card copies and multiplies; medians of 10, on random data."""
    import torch

    def median_ms(call: Any) -> float:
        for _ in range(3):
            call()
        times = []
        for _ in range(10):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times)[5]

    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    found = {"copy GB/s, read and written": 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False), ("fp32", torch.float32, False), ("tf32", torch.float32, True),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        b = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        found[f"{name} matmul TFLOP/s"] = 2 * 8192**3 / median_ms(lambda a=a, b=b: a @ b) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    return {name: round(value, 1) for name, value in found.items()}


# --------------------------------------------------------------------------------------------------------------- tests


def tests(visit: Visit) -> None:
    report = visit.work / "tests.xml"
    command = [
        sys.executable, "-m", "pytest", *GPU_TESTS, "-m", visit.select, "-W", "default", "-n", "6", "--tb=short",
        f"--junitxml={report}",
    ]  # fmt: skip
    code, said, seconds = visit.run(*command)
    (visit.out / "tests.log").write_text(said[-400_000:])
    rows = [_row(case) for case in ET.parse(report).iter("testcase")] if report.exists() else []
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "failed", "skipped")}
    found = {"select": visit.select, "exit code": code, "seconds": round(seconds, 1), "counts": counts, "tests": rows}
    visit.write("tests", found)
    print(f"tests: {counts}, exit code {code}, {seconds:.0f} s", flush=True)
    for row in rows:
        if row["outcome"] != "passed":
            print(f"  {row['outcome']} {row['test']}: {row['words'][:700]}", flush=True)
    if not rows:
        print(said[-3000:])


def _row(case: ET.Element) -> dict[str, Any]:
    bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
    outcome = "passed" if not bad else "skipped" if bad[0].tag == "skipped" else "failed"
    words = " ".join((bad[0].get("message") or bad[0].text or "").split())[:1500] if bad else ""
    seconds = round(float(case.get("time", 0)), 2)
    return {
        "test": f"{case.get('classname')}::{case.get('name')}",
        "outcome": outcome,
        "seconds": seconds,
        "words": words,
    }


# --------------------------------------------------------------------------------------------------------------- steps


def steps(visit: Visit) -> None:
    """Alone first, one after the other; then eight of one kind at once."""
    found: dict[str, Any] = {"loader": _loader()}
    print("loader", found["loader"], flush=True)
    plans = [(name, 256, layout, "eager") for name in STEPS for layout in ("plain", "last")]
    plans += [(name, 128, "plain", "eager") for name in ("resnet56 maskconnect4", "multibranch20 k4")]
    found["alone"] = _step_runs(visit, [plans])[0]
    visit.write("steps", found)
    names = ("multibranch20 k4", "multibranch20 k1", "resnet56 maskconnect4", "resnet56 ddw")
    compiled = [(name, 256, "plain", "compiled") for name in names]
    _step_runs(visit, [[plan] for plan in compiled])  # all compile at once, which only fills the cache of kernels
    found["alone"] += _step_runs(visit, [compiled])[0]
    visit.write("steps", found)
    for mode in ("eager", "compiled"):
        found[f"eight at once, {mode}"] = _step_runs(visit, [[("multibranch20 k4", 256, "plain", mode)]] * 8)
        visit.write("steps", found)
    for name, rows in found.items():
        for row in rows if isinstance(rows, list) else ():
            print(name, row, flush=True)


def _step_runs(visit: Visit, lists: list[list[Plan]]) -> list[list[dict[str, Any]]]:
    """Every list of plans in a process of its own, all processes at once."""

    def one(plans: list[Plan]) -> list[dict[str, Any]]:
        if visit.left() < 20:
            return [{"plans": plans, "error": "no time left"}]
        words = [sys.executable, "-m", "gpu_evidence", "--step", json.dumps(plans)]
        code, said, _ = visit.run(*words, at_most=150)
        rows = [json.loads(line[5:]) for line in said.splitlines() if line.startswith("STEP ")]
        return rows if not code else [*rows, {"plans": plans, "error": f"exit code {code}: {said[-600:]}"}]

    with ThreadPoolExecutor(len(lists)) as pool:
        return list(pool.map(one, lists))


def one_step(plan: Plan) -> None:
    """Time the training step of one net in bf16: forward, backward, SGD, and the gates where there are any."""
    import timm
    import torch

    import mcdeploy
    import mcdeploy.backbones
    from mcdeploy.connectivity.wiring import wired_stages

    name, batch, layout, mode = plan
    backbone, rule, options = STEPS[name]
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    model = mcdeploy.wire(timm.create_model(backbone, num_classes=10), rule, image_size=32, **options).cuda().train()
    images = torch.randn(batch, 3, 32, 32, device="cuda")
    labels = torch.randint(0, 10, (batch,), device="cuda")
    if layout == "last":
        model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(mcdeploy.weights(model), lr=0.1, momentum=0.9, weight_decay=5e-4)
    gates = mcdeploy.gate_optimizer(model, lr=0.02) if options.get("fan_in") else None
    stages = wired_stages(model).values()
    run = torch.compile(model) if mode == "compiled" else model

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(run(images), labels)
        loss = sum((added for stage in stages if (added := stage.penalty()) is not None), start=loss)
        loss.backward()
        optimizer.step()
        if gates:
            gates.step()
        optimizer.zero_grad()

    began = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    warm = time.perf_counter() - began
    times = []
    began = time.perf_counter()
    while time.perf_counter() - began < 2.5 or len(times) < 3:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 5 * 1e3)
    peak = torch.cuda.max_memory_allocated() >> 20
    row = {"plan": plan, "ms": round(sorted(times)[len(times) // 2], 2), "warm_up_s": round(warm, 1), "peak_mib": peak}
    print("STEP", json.dumps(row), flush=True)


def _loader() -> dict[str, float]:
    """Milliseconds that one process needs to make a training batch of 32x32 images, padded, cropped and mirrored."""
    import numpy as np
    from mcruntime.preprocess import Preprocessing

    from mcdeploy.data import TrainingImages, _Arrays
    from mcdeploy.recipe import DataConfig

    config = DataConfig(source="folder", root="-", image_size=32, crop="pad4", hflip=0.5)
    rng = np.random.default_rng(0)
    source = _Arrays(rng.integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8), np.zeros(2000, np.int64))
    how = Preprocessing(
        image_size=32, mean=config.mean, std=config.std, interpolation=config.interpolation, crop_pct=config.crop_pct
    )
    images = TrainingImages(source, config, how, 0, True)
    found = {}
    for batch in (128, 256, 512):
        keys = [(0, index) for index in range(batch)]
        images.__getitems__(keys)
        began = time.perf_counter()
        for _ in range(20):
            images.__getitems__(keys)
        found[f"batch {batch}, ms"] = round((time.perf_counter() - began) / 20 * 1e3, 2)
    return found


# --------------------------------------------------------------------------------------------------------------- bench


def make_nets(visit: Visit) -> None:
    """NET_dense and NET_pruned as .pt2 and .onnx files in the working folder; random weights."""
    with ThreadPoolExecutor(6) as pool:
        jobs = [(net, kind) for net in NETS for kind in ("dense", "pruned")]
        for code, said, _ in pool.map(
            lambda job: visit.run(sys.executable, "-m", "gpu_evidence", "--net", *job, visit.work), jobs
        ):
            if code:
                print(f"nets: {said[-800:]}", flush=True)


def one_net(net: str, kind: str, work: Path) -> None:
    import timm
    import torch
    from tiny_models import images

    import mcdeploy
    from mcdeploy.backends.fp16 import to_fp16
    from mcdeploy.backends.onnx import export_program
    from mcdeploy.compile.certify import scramble

    size, blocks = NETS[net]
    if (work / f"{net}_{kind}.fp16.onnx").exists():
        return
    torch.manual_seed(0)
    model = timm.create_model(net, num_classes=1000).eval()
    scramble(model)
    example = images(2, size)
    if kind == "pruned":
        model = mcdeploy.wire(model, "drop", image_size=size, blocks=blocks)
    small = mcdeploy.compile_model(model, example)
    export_program(small, work / f"{net}_{kind}.pt2", example)
    mcdeploy.export_onnx(small, work / f"{net}_{kind}.onnx", example)
    to_fp16(work / f"{net}_{kind}.onnx", work / f"{net}_{kind}.fp16.onnx", images(8, size).numpy())


def _bench(
    visit: Visit, title: str, files: list[str], backend: str, batches: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    if visit.left() < seconds * len(batches) + 20:
        print(f"{title}: no time left", flush=True)
        return {"title": title, "error": "no time left"}
    file = visit.work / "bench.json"
    file.unlink(missing_ok=True)
    words = [word for batch in batches for word in ("--batch", str(batch))]
    targets = [str(visit.work / name) for name in files]
    code, said, took = visit.run(
        *MCDEPLOY, "bench", *targets, "--backend", backend, *words, "--seconds", str(seconds), "--json", file
    )
    if code or not file.exists():
        print(f"{title}: exit code {code}: {said[-600:]}", flush=True)
        return {"title": title, "exit code": code, "said": said[-2000:]}
    report = json.loads(file.read_text())
    print(f"{title} ({took:.0f} s)", flush=True)
    for row in report["latencies"]:
        row.pop("quantiles_ms", None)
        row["runner"] = Path(row["runner"]).name
        ratio = row["ratio"]
        print(
            f"  {row['runner']:42} batch {row['batch']:<3} {row['timed']} p50 {row['p50_ms']['value']:.3f} ms, host "
            f"{row['host_p50_ms']:.3f}, ratio {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}], "
            f"{row['energy_mj'] or 0:.1f} mJ, loads {row['num_loads']}",
            flush=True,
        )
    return {"title": title, "took_s": round(took, 1), **report}


def bench(visit: Visit) -> None:
    make_nets(visit)
    found: list[dict[str, Any]] = []
    for net in NETS:
        files = [f"{net}_dense.pt2", f"{net}_dense.pt2", f"{net}_pruned.pt2"]
        found.append(_bench(visit, f"{net} eager", files, "pytorch-cuda", BATCHES, 4))
        visit.write("bench", found)
    pairs = [(net, kind, batch) for net in NETS for batch in (1, 32) for kind in ("dense", "pruned")]
    with ThreadPoolExecutor(6) as pool:  # only fills the cache of compiled kernels
        list(
            pool.map(
                lambda job: visit.run(sys.executable, "-m", "gpu_evidence", "--warm", *map(str, job), visit.work), pairs
            )
        )
    for net in NETS:
        files = [f"{net}_dense.pt2", f"{net}_dense.pt2", f"{net}_pruned.pt2"]
        found.append(_bench(visit, f"{net} compiled", files, "compiled-cuda", (1, 32), 4))
        visit.write("bench", found)


def warm_cache(net: str, kind: str, batch: int, work: Path) -> None:
    """Compile as ``bench`` will, so that it finds the kernels made."""
    import torch
    from tiny_models import images

    from mcdeploy.backends.pytorch import TorchRunner

    module = torch.export.load(work / f"{net}_{kind}.pt2").module()
    with TorchRunner(module, name=net, mode="compiled", device="cuda") as runner:
        runner.infer(images(batch, NETS[net][0]).numpy())


def onnx(visit: Visit) -> None:
    make_nets(visit)
    found: list[dict[str, Any]] = []
    for net in NETS:
        files = [f"{net}_dense.onnx", f"{net}_dense.onnx", f"{net}_pruned.onnx"]
        found.append(_bench(visit, f"{net} onnx-cuda fp32", files, "onnx-cuda", BATCHES, 3))
        halves = [f"{net}_dense.fp16.onnx", f"{net}_pruned.fp16.onnx"]
        found.append(_bench(visit, f"{net} onnx-cuda fp16", halves, "onnx-cuda", BATCHES, 3))
        visit.write("onnx", found)


# --------------------------------------------------------------------------------------------------------------- serve


def serve(visit: Visit) -> None:
    """ResNet-18 at 64x64 behind the CUDA provider; the raw loop is ours around the same provider in one process."""
    import signal
    import uuid

    import httpx
    import numpy as np
    from mcruntime.bundle import load_bundle
    from mcruntime.engine import OnnxRunner
    from speed_load import MARK, as_json, loop, wrk
    from speed_models import make_bundle, model_file

    bundle = make_bundle("resnet18", visit.work)
    name = load_bundle(bundle).manifest.name
    mark = uuid.uuid4().hex
    images = np.random.default_rng(0).standard_normal((32, 3, 64, 64)).astype(np.float32)
    found: dict[str, Any] = {"net": "resnet18, 3x64x64, 10 classes", "raw": {}, "loads": []}
    with OnnxRunner(model_file(bundle), provider="cuda") as runner:
        expected = runner.infer(images[:1])
        for batch in (1, 8, 32):
            raw = loop(lambda batch=batch: runner.infer(images[:batch]), batch, 2, mark)
            found["raw"][batch] = as_json(raw)
            print(f"serve: raw loop, batch {batch}: {raw.images_per_s:.0f} images/s", flush=True)
    for buckets in ("", "1,2,4,8,16,32"):
        command = [*MCDEPLOY, "serve", str(bundle), "--port", "0", "--provider", "cuda", "--max-batch", "32"]
        command += ["--buckets", buckets] if buckets else []
        environment = os.environ | {MARK: mark}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        ) as server:
            try:
                assert server.stdout is not None
                said: list[str] = []
                port = None
                for line in server.stdout:
                    said.append(line)
                    if address := re.search(r"127\.0\.0\.1:(\d+)", line):
                        port = address[1]
                        break
                if port is None:
                    raise RuntimeError(f"the server did not start: {''.join(said)[-600:]}")
                url = f"http://127.0.0.1:{port}/v2/models/{name}"
                tensor = httpx.get(url).json()["inputs"][0]["name"]
                image = images[:1]
                asked = {"name": tensor, "shape": list(image.shape), "datatype": "FP32"}
                head = json.dumps(
                    {
                        "inputs": [{**asked, "parameters": {"binary_data_size": image.nbytes}}],
                        "parameters": {"binary_data_output": True},
                    }
                ).encode()
                headers = {
                    "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head)),
                }  # fmt: skip
                body = head + image.tobytes()
                answer = httpx.post(f"{url}/infer", content=body, headers=headers)
                length = int(answer.headers["Inference-Header-Content-Length"])
                got = np.frombuffer(answer.content[length:], np.float32)
                distance = float(np.abs(got - expected[0]).max())
                wrk(f"{url}/infer", headers, body, 16, 3, mark)
                for connections in (1, 8, 32, 128):
                    load = wrk(f"{url}/infer", headers, body, connections, 4, mark)
                    row = {"buckets": buckets, "connections": connections, "max_abs": distance, **as_json(load)}
                    found["loads"].append(row)
                    print(f"serve: {row}", flush=True)
                found.setdefault("metrics", httpx.get(f"http://127.0.0.1:{port}/metrics").text[-6000:])
            finally:
                server.send_signal(signal.SIGTERM)
                rest = server.stdout.read() if server.stdout else ""
        found.setdefault("ended", []).append({"exit code": server.returncode, "said": rest[-600:]})
        visit.write("serve", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--select", default="gpu and not tensorrt")
    parser.add_argument("--work", type=Path, help="for what is made on the way; default: OUT")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # this script's own processes
    parser.add_argument("--net", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--warm", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        for plan in json.loads(options.step):
            one_step(tuple(plan))
        return None
    if options.net:
        return one_net(options.net[0], options.net[1], Path(options.net[2]))
    if options.warm:
        return warm_cache(options.warm[0], options.warm[1], int(options.warm[2]), Path(options.warm[3]))
    if options.out is None:
        parser.error("say where the results go")
    visit, parts = Visit(options), options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; valid are {', '.join(PARTS)}")
    failed = []
    for part in parts:
        print(f"=== {part}, {visit.left():.0f} s left", flush=True)
        try:
            globals()[part](visit)
        except Exception as error:  # the next part is worth its own
            failed.append(part)
            print(f"FAILED {part}: {type(error).__name__}: {error}", flush=True)
    print(f"=== done, {visit.left():.0f} s left{', failed: ' + ', '.join(failed) if failed else ''}", flush=True)
    if failed:
        sys.exit(1)
    return None


if __name__ == "__main__":
    main()
