"""An encoder as an ONNX file, compared with torch before it is written."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from fastproj.core.errors import InputError
from fastproj.core.files import replacing
from fastproj.models.frozen import frozen

OPSET = 18  # the lowest that torch's exporter writes without a conversion
TOLERANCE = 1e-4  # of ONNX Runtime against torch, absolute and relative
BATCHES = (1, 3)  # images in the batches that are compared


class NoExport(InputError):
    """torch's exporter has no way to write this encoder."""


def save_onnx(
    encoder: nn.Module,
    path: Path,
    size: int,
    about: Mapping[str, str] | None = None,
    any_size: bool = True,
) -> float:
    """Write ``encoder`` to ``path`` as ONNX, opset ``OPSET``; returns the largest difference.

    Input ``images``: float32 (batch, 3, height, width), normalized, where the batch may be any, and
    with ``any_size`` height and width, otherwise ``size``; output ``features``: float32 (batch, d).
    ``encoder`` lies on the CPU; ``size``: side of the images that it is compared on, pixels;
    ``about`` becomes the file's metadata.

    Before the file is written, ONNX Runtime's features of random images are compared with
    torch's. Raises ``InputError`` where they differ by more than ``TOLERANCE``, where the encoder
    cannot be exported and where the file cannot be written, and ``ModuleNotFoundError`` where a
    package of the extra ``onnx`` is missing.
    """
    import onnxruntime
    import onnxscript  # noqa: F401  # torch's exporter needs it, and says so in many lines

    with frozen(encoder):
        try:
            program = torch.onnx.export(
                encoder,
                (torch.zeros(2, 3, size, size),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: "batch"} | ({2: "height", 3: "width"} if any_size else {}),),
                verbose=False,
            )
        except RuntimeError as error:  # the exporter's own; of an encoder of a plugin
            reason = str(error).strip().partition("\n")[0]
            raise NoExport(
                f"cannot write {path}: torch cannot export the encoder to ONNX ({reason})"
            ) from error
        assert program is not None
        program.model.metadata_props.update(about or {})
        content = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        largest = 0.0
        for batch in BATCHES:
            generator = torch.Generator().manual_seed(batch)
            images = torch.randn(batch, 3, size, size, generator=generator)
            with torch.no_grad():
                ours = encoder(images)
            (theirs,) = (torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()}))
            largest = max(largest, (theirs - ours).abs().max().item())
            if not torch.allclose(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE):
                raise InputError(
                    f"cannot write {path}: ONNX Runtime's features differ from torch's by "
                    f"{largest:.2g}, more than {TOLERANCE:g}"
                )
    with replacing(path) as file:
        file.write(content)
    return largest
