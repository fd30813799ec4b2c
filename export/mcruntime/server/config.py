"""A model's configuration in the words of Triton's ModelConfig, which perf_analyzer and other tools ask for.

One tree for REST, and for gRPC through protobuf's own JSON mapping. It says how the model is served here; it is read
from no file.
"""

from __future__ import annotations

from typing import Any

from mcruntime.server.models import Model


def model_config(model: Model) -> dict[str, Any]:
    """The configuration of one loaded version; ``dims`` are without the batch, as Triton has them."""
    spec, batcher = model.spec, model.batcher
    on_gpu = model.about.get("provider", "cpu") != "cpu"
    return {
        "name": spec.name,
        "platform": spec.platform,
        "backend": spec.backend,
        "version_policy": {"all": {}},
        "max_batch_size": spec.max_batch_size,
        "input": [
            {"name": spec.input_name, "data_type": "TYPE_FP32", "format": "FORMAT_NONE", "dims": list(spec.shape)}
        ],
        "output": [
            {
                "name": spec.output_name,
                "data_type": "TYPE_FP32",
                "dims": [spec.num_classes],
                "label_filename": "labels.txt" if spec.labels else "",
            }
        ],
        "instance_group": [
            {"name": f"{spec.name}_0", "kind": "KIND_GPU" if on_gpu else "KIND_CPU", "count": batcher.num_workers}
        ],
        "dynamic_batching": {
            "preferred_batch_size": [batcher.max_batch],
            "max_queue_delay_microseconds": round(batcher.max_delay_s * 1e6),
        },
    }
