"""A teacher whose blocks are read one after another, against the same one that is loaded whole: time, and memory.

Memory is limited in a process of its own.
"""

import ctypes
import os
import resource
import threading
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import Options, Result, cost, in_subprocess, interleaved, ratio, resident_bytes
from benchmarks.pair import wanted_signals
from xkd_pipeline.capture.capture import TeacherSettings, capture
from xkd_pipeline.capture.measure import Reading
from xkd_schemas.tokens import CONTENT, Tokens
from xkd_trainer.models.architecture import num_layers
from xkd_trainer.models.forward import check_model
from xkd_trainer.models.loading import load_model
from xkd_trainer.models.streaming import check_steps, load_streamed

TIMES = 10  # weights of the limited process, as a multiple of what it may take
BLOCKS = 24
CLASSES = 512
LENGTH, SHORT = 512, 128  # tokens of a document; where memory is limited, of a batch


def run(options: Options) -> list[Result]:
    """CPU time, in which reading counts although a thread does it; and a process with memory for a tenth of them."""
    large = random_teacher(options.scratch / "large", BLOCKS, options.size(1_536, 64))
    weights = sum(path.stat().st_size for path in Path(large).glob("*.safetensors"))
    limit = weights // TIMES + options.size(0, 64 * 2**20)
    in_subprocess(capture_limited, large, limit, 256)
    timed = random_teacher(options.scratch / "timed", options.size(12, 3), options.size(384, 64))
    models = {"whole": load_model(timed, dtype=torch.float32),
              "streamed": load_streamed(timed, dtype=torch.float32, device="cpu")}  # fmt: skip
    tokens = options.size(65_536, 1_024)
    readings, wanted = random_readings(tokens), wanted_signals(num_layers(models["whole"]))
    settings = TeacherSettings(model=timed, dtype="float32")
    seconds = interleaved(
        {name: lambda model=model: capture(model, readings, wanted, settings) for name, model in models.items()},
        options.size(2, 1),
    )
    what = f"capture of {tokens:,} tokens, blocks read one after another / loaded whole"
    mib = [size / 2**20 for size in (weights, limit)]
    return [
        cost(what, seconds["streamed"], seconds["whole"], bar=1.25),
        ratio(f"weights of {BLOCKS} blocks / RLIMIT_DATA above the libraries", *mib, "MiB", bar=TIMES, at_least=True),
    ]


def random_teacher(folder: Path, blocks: int, width: int) -> str:
    """A Llama with random weights in float32."""
    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=CLASSES, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=blocks,
        num_attention_heads=width // 32, max_position_embeddings=LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def random_readings(tokens: int, length: int = LENGTH) -> list[Reading]:
    """Documents of random tokens, half of them targets, with words of two tokens and phrases of eight."""
    rng = np.random.default_rng(0)
    starts, end = np.arange(length), length // 2
    return [
        Reading(
            tokens=Tokens(
                status="ok", num_chars=length, ids=rng.integers(0, CLASSES, length).astype(np.int32),
                spans=np.stack([starts, starts + 1], 1), kinds=np.full(length, CONTENT, np.uint8),
                targets=starts >= end,
            ),
            ranges={unit: np.stack([starts[::n], starts[::n] + n], 1).astype(np.int32)
                    for unit, n in (("word", 2), ("phrase", 8))},
        )
        for _ in range(tokens // length)
    ]  # fmt: skip


def capture_all(name: str, tokens: int) -> None:
    """As a worker does it, with the checks of a teacher that was just loaded."""
    model = load_streamed(name, dtype=torch.float32, device="cpu")
    check_model(model)
    check_steps(model)
    settings = TeacherSettings(model=name, dtype="float32", batch_tokens=SHORT)
    capture(model, random_readings(tokens, SHORT), wanted_signals(num_layers(model)), settings)


def capture_limited(name: str, limit: str, tokens: str) -> None:
    """Capture in a process that may take so many bytes more than Python and its libraries have taken."""
    threading.stack_size(2**20)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # one tensor at a time, which is in memory twice while it is read
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    torch.set_num_threads(1)
    capture_all(random_teacher(Path(name).parent / "small", 4, 64), LENGTH)  # compiles what is compiled
    most = resident_bytes("VmData") + int(limit)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    capture_all(name, int(tokens))
