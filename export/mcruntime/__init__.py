"""mcruntime: what leaves the building. Loads a bundle, runs it, serves it; never imports torch, timm or mcdeploy."""

import os

# ONNX Runtime's newer wheels can report home what is run, which nobody who runs a bundle asked for; 0 allows it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
