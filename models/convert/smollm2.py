"""SmolLM2 from one GGUF file to plain safetensors in bfloat16, with its tokenizer."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from models.convert import ConversionError, Progress


def convert(archives: dict[str, Path], target: Path, progress: Progress) -> None:
    """Unpacks the one ``*.gguf`` of ``archives`` into ``target`` as transformers and vLLM load it.

    Raises:
        ConversionError: not exactly one GGUF file was given, or the package that reads them is missing.
    """
    files = [path for path in archives.values() if path.suffix == ".gguf"]
    if len(files) != 1:
        raise ConversionError(f"expected one .gguf file, got {sorted(archives)}.")
    if importlib.util.find_spec("gguf") is None:
        raise ConversionError("reading a .gguf file needs the package gguf; run `pip install gguf`.")
    progress("loading libraries", 0.05)
    # Read when tqdm is imported; progress is told by `progress`, and a log is no place for bars.
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    folder, name = str(files[0].parent), files[0].name
    transformers_logging.disable_progress_bar()
    progress("reading the tokenizer", 0.2)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
    progress("unpacking the weights", 0.3)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are plain now; what still says "quantised" would make save_pretrained pack them again.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    progress("writing safetensors", 0.8)
    model.save_pretrained(target)
    progress("done", 1.0)
