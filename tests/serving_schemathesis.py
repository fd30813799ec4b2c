"""Test the server with schemathesis: what its own OpenAPI document promises, against what it does.

    python -m venv st && st/bin/pip install schemathesis pillow
    python tests/serving_schemathesis.py st/bin/schemathesis [--max-examples 200] [--only infer]

Starts the server on a tiny bundle, without and with API keys, runs ``schemathesis run --checks all`` against both, and
writes recipes/results/serving_schemathesis.json: how many cases and checks there were, and every failure.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tiny_onnx import write_bundle

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "recipes" / "results" / "serving_schemathesis.json"
KEY = "a-key-for-the-tests-0123456789"
CONFIG = """
[checks.not_a_server_error]
# A deadline of some microseconds that a client asks for is missed; that is no fault.
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]

[checks.positive_data_acceptance]
expected-statuses = ["2xx", 403, 404, 503, 504]
"""


def start(bundle, log, keys=None):
    """The server and its address; it writes into a file, since it would wait for a pipe that nobody empties."""
    command = [sys.executable, "-m", "mcruntime.server", str(bundle), "--port", "0", "--max-batch-size", "2"]
    command += ["--api-keys", str(keys)] if keys else []
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment())
    while server.poll() is None:
        found = re.search(r"listening on (\S+)\n", log.read_text())
        if found:
            return server, found[1]
        time.sleep(0.1)
    raise SystemExit(log.read_text())


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT / "export"), "OMP_NUM_THREADS": "1", **more}


def run(tool, url, folder, max_examples, seed, key=None, only=None):
    (folder / "schemathesis.toml").write_text(CONFIG)
    report = folder / "report.ndjson"
    command = [
        str(tool), "--config-file", str(folder / "schemathesis.toml"), "run", f"{url}/openapi.json", "--checks", "all",
        "--max-examples", str(max_examples), "--seed", str(seed), "--report", "ndjson", "--report-ndjson-path",
        str(report), "--no-color", "--continue-on-failure", "--suppress-health-check", "all",
    ]  # fmt: skip
    command += ["-H", f"Authorization: Bearer {key}"] if key else []
    command += ["--include-path-regex", only] if only else []
    hooks = environment(SCHEMATHESIS_HOOKS="schemathesis_hooks", PYTHONPATH=str(Path(__file__).parent))
    done = subprocess.run(command, capture_output=True, text=True, env=hooks, cwd=folder)
    print(done.stdout[-6000:], done.stderr[-2000:])
    return done.returncode, summarise(report)


def summarise(report):
    """Cases, checks and failures from schemathesis' events."""
    cases, checks, failures, statuses = 0, Counter(), [], Counter()
    for line in report.read_text().splitlines():
        event = json.loads(line).get("ScenarioFinished")
        if event is None:
            continue
        recorder = event["recorder"]
        for interaction in recorder.get("interactions", {}).values():
            cases += 1
            if interaction.get("response"):
                statuses[interaction["response"]["status_code"]] += 1
        for rows in recorder.get("checks", {}).values():
            for row in rows:
                checks[f"{row['name']}: {row['status']}"] += 1
                if row["status"] == "failure":
                    told = row["failure_info"]["failure"]
                    failures.append({"operation": recorder["label"], "check": row["name"], "says": told["message"]})
    return {
        "cases": cases,
        "answers": dict(sorted(statuses.items())),
        "checks": dict(sorted(checks.items())),
        "failures": failures,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", type=Path, help="schemathesis of a virtual environment of its own")
    parser.add_argument("--max-examples", type=int, default=100, help="of every operation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="paths that match this; nothing is written then")
    given = parser.parse_args()
    tool = given.tool.absolute()
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = write_bundle(folder / "bundle")
        (folder / "keys").write_text(KEY + "\n")
        for what, keys in (("open", None), ("with an API key", folder / "keys")):
            log = folder / f"{len(found)}.log"
            server, url = start(bundle, log, keys)
            try:
                code, found[what] = run(
                    tool, url, folder, given.max_examples, given.seed, KEY if keys else None, given.only
                )
                found[what]["exit_code"] = code
                found[what]["server_still_runs"] = server.poll() is None
                found[what]["lines_in_the_servers_log"] = len(log.read_text().splitlines()) - 2  # at start
            finally:
                server.terminate()
                server.wait(60)
    for what, one in found.items():
        print(what, one["exit_code"], one["cases"], "cases", one["answers"], len(one["failures"]), "failures")
    if given.only is None:
        told = {
            "command": f"python tests/serving_schemathesis.py schemathesis --max-examples {given.max_examples} "
            f"--seed {given.seed}",
            "schemathesis": version,
            "python": platform.python_version(),
            "notes": [
                "503 and 504 count as answers, since a client may ask for a deadline that cannot be kept",
                "bodies that are valid on purpose hold real images, and tensors of numbers up to 10,000",
            ],
            "runs": found,
        }
        RESULT.write_text(json.dumps(told, indent=2) + "\n")
    return int(any(one["exit_code"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
