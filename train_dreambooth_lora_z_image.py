#!/usr/bin/env python
# ruff: noqa: E402
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11.0", "diffusers>=0.40.0", "transformers>=5.0.0", "peft>=0.18.0", "accelerate>=1.13.0",
#     "torchao>=0.16.0", "bitsandbytes>=0.50.0", "prodigyopt>=1.1.2", "wandb>=0.22.2", "huggingface_hub>=1.23.0",
#     "Pillow>=11.3.0",
# ]
# ///
"""Train a DreamBooth LoRA: teach Z-Image a new subject or style from a few images, in one file.

    python train_dreambooth_lora_z_image.py --demo                                  # a tiny model, no download, no GPU
    accelerate launch train_dreambooth_lora_z_image.py --pretrained_model_name_or_path=Tongyi-MAI/Z-Image \\
        --instance_data_dir=dog --instance_prompt="a photo of sks dog" --gradient_checkpointing --cache_latents

Read the file from top to bottom: a section uses only the sections above it.

    Words and files         error messages, console output, and atomic file writes
    Config                  every flag, one line each, and the combinations that are rejected
    Plan                    images, captions, buckets, the order of the examples, the length of the run
    Checks                  errors found before a model is loaded; the checkpoint to resume from
    Encoders and caches     embeddings and latents, once, on disk; what is random about an example; `Batch`
    Transformer and LoRA    the frozen model and the weights trained on top of it
    Objective               flow matching as pure functions; `training_loss`
    Training                `train`: the loop; learning rate, checkpoints, resuming
    Validation              class images and validation images, sampled from the live model
    Memory plan             the simulated run, what it costs, and what fits: --dry_run, --fit
    Artifacts               the LoRA file, the model card, the upload
    Demo                    a tiny random checkpoint and five images
    Main                    `run_all`: every stage of a run, in order

Data flows one way, the config is frozen, and every random choice is a function of (seed, example number). So a
resumed run, or one on more processes with the same total batch, sees the same images, noise, and learning rates.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import errno
import gc
import hashlib
import html
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import typing
import unicodedata
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import psutil  # accelerate depends on it
from filelock import FileLock, Timeout  # torch depends on it
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from safetensors import safe_open
from tqdm.auto import tqdm


# ==== Words and files ================================================================================================


class UserError(ValueError):
    """An error that the user can fix: one sentence that names the flag or file and the remedy."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; the message says how to resume. `number` is the signal's."""

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(f"{sentence}; resume with the same command and --resume_from_checkpoint latest")
        self.number = number


def require(condition: bool, sentence: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextlib.contextmanager
def explained(what: str, remedy: str = "") -> Iterator[None]:
    """Turn any exception of a library into a UserError: what failed, why, and the remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or type(error).__name__ == "OutOfMemoryError":  # `main` explains it
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{what}: {reason}{remedy and '; '}{remedy}") from error


def printable(text: str) -> str:
    """Escape newlines, terminal codes, and whatever standard output cannot encode, as in file names."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def whole(word: str) -> re.Pattern[str]:
    """Match a word, but not in a longer one; Chinese, Japanese, and Thai are written without spaces."""
    letter = r"[^\W\u0e00-\u0eff\u2e80-\ufaff]"
    return re.compile(f"(?<!{letter}){re.escape(word)}(?!{letter})")


def say(*lines: str, everywhere: bool = False) -> None:
    """Print lines from the first process (or from all), without breaking a progress bar."""
    for line in lines if everywhere or os.environ.get("RANK", "0") == "0" else ():
        tqdm.write(printable(line), file=sys.stdout)


def progress_bar(items: Iterable[Any], title: str, **options: Any) -> tqdm:
    """Show a progress bar on the first process while iterating."""
    seconds = 0.1 if sys.stderr.isatty() else 10  # fewer lines in a log file
    quiet = os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=title, disable=quiet, mininterval=seconds, dynamic_ncols=True, **options)


def sha256(content: bytes) -> str:
    """Hash bytes to a hexadecimal string."""
    return hashlib.sha256(content).hexdigest()


def derive_seed(*parts: Any) -> int:
    """Hash (seed, purpose, number, ...) to a 63-bit seed. All randomness in this file comes from here."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark. Raises UserError for any other encoding."""
    with explained(f"{path} cannot be read as UTF-8 text", "save it as UTF-8"):
        return path.read_text(encoding="utf-8-sig")


def read_json_object(name: str, file: Path) -> dict[str, Any]:
    """Read a JSON object; `name` is what an error calls the file. Raises UserError for anything else."""
    with explained(f"{name} cannot be read as JSON"):
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    require(isinstance(content, dict), f"{name} must contain one JSON object")
    return content


def sync(path: Path) -> None:
    """Flush a file, or a folder where the system can flush folders, to disk."""
    is_file = path.is_file()
    with contextlib.nullcontext() if is_file else contextlib.suppress(OSError):  # Windows, some network shares
        descriptor = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, *content: Any) -> None:
    """Write a file atomically: it is either complete or absent. Used for everything but metrics.jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".z-image-{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(content)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:  # a full disk, a signal: leave nothing behind
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def write_sealed(path: Path, metadata: dict[str, str], header: dict[str, Any], *tensors: Any) -> None:
    """Write a safetensors file, with a hash of everything in its header; equal content gives equal bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor)
    header = {"__metadata__": dict(sorted(metadata.items()))} | header
    header["__metadata__"]["sha256"] = sha256(json.dumps(header).encode() + digest.digest())
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_file(path, len(text).to_bytes(8, "little"), text, *tensors)


def read_sealed(path: Path) -> dict[str, str] | None:
    """Return the metadata of a sealed file, or None if the file is missing or differs from what was written."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
            digest = header["__metadata__"].pop("sha256")
            is_intact = digest == sha256(json.dumps(header).encode() + hashlib.file_digest(file, "sha256").digest())
        return header["__metadata__"] if is_intact else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


# ==== Config =========================================================================================================

BOUNDS = {
    "at_least": (lambda value, bound: value >= bound, "must be at least"),
    "above": (lambda value, bound: value > bound, "must be above"),
    "below": (lambda value, bound: value < bound, "must be below"),
    "multiple_of": (lambda value, bound: value % bound == 0, "must be a multiple of"),
}
Precision = Literal["bf16", "no", "fp16"]
Storage = Literal["fp8", "int8", "nf4"]
Prior = Literal["images", "base"]
Weighting = Literal["logit_normal", "none", "mode", "sigma_sqrt", "cosmap"]
LrScheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"
]
NO_FP16 = "{} fp16 is not supported: Z-Image overflows in fp16 and gives NaN or black images; use bf16 (or 'no': fp32)"
HEADINGS = {  # of --help, each above the first flag of its group
    "pretrained_model_name_or_path": "Model", "instance_data_dir": "Data", "cache_dir": "Caches", "rank": "LoRA",
    "weighting_scheme": "Objective", "optimizer": "Optimizer", "seed": "Training", "quantization": "Memory and speed",
    "validation_prompt": "Validation", "output_dir": "Output",
}  # fmt: skip


def flag(default: Any, help: str, *aliases: str, is_secret: bool = False, **bounds: float) -> Any:
    """Declare a setting: its default, help text, aliases, and bounds, with their names in `BOUNDS`."""
    metadata = {"help": help, "aliases": aliases, "is_secret": is_secret, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata, repr=not is_secret)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tune Z-Image with DreamBooth and LoRA."""

    # fmt: off
    pretrained_model_name_or_path: str | None = flag(None, "Local diffusers folder or Hub ID of Z-Image. Required.")
    revision: str | None = flag(None, "Branch, tag, or commit of the Hub model.")
    variant: str | None = flag(None, "Load the weight files of this variant, such as bf16.")
    max_sequence_length: int = flag(512, "Truncate prompts to this many tokens, chat template included.", at_least=1)

    instance_data_dir: str | None = flag(None, "Folder with the instance images, searched recursively.")
    instance_prompt: str | None = flag(None, "Prompt for every instance image without its own caption.")
    dataset_name: str | None = flag(None, "Hub dataset or local dataset folder, instead of --instance_data_dir.")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, if it has several.")
    image_column: str = flag("image", "Column of the dataset that contains the images.")
    caption_column: str | None = flag(None, "Column of the dataset that contains the captions.")
    holdout: int = flag(0, "Keep the last N images out of training, and measure the gain on them.", at_least=0)
    repeats: int = flag(1, "Number of times each instance image is shown per epoch.", at_least=1)
    resolution: int = flag(1024, "Side of the square training crops, in pixels.", at_least=16, multiple_of=16)
    use_aspect_ratio_buckets: bool = flag(False, "Keep aspect ratios, at most resolution^2 pixels; no upscaling.")
    aspect_ratio_buckets: str | None = flag(None, "Explicit buckets: 'height,width;height,width;...'.")
    center_crop: bool = flag(False, "Crop at the center instead of at a random position.")
    random_flip: bool = flag(False, "Flip images horizontally with probability 0.5.")
    trigger_word: str | None = flag(None, "Word put in place of [trigger], or before a prompt that lacks it.")
    caption_dropout: float = flag(0.0, "Share of instance examples with an empty prompt.", at_least=0, below=1)
    prior_preservation: Prior | None = flag(None, "Also train on class images, or toward the base model.")
    with_prior_preservation: bool = flag(False, "Old name for --prior_preservation images.")
    class_data_dir: str | None = flag(None, "Folder of class images; missing ones are generated there.")
    class_prompt: str | None = flag(None, "Prompt for the class images.")
    num_class_images: int = flag(100, "Generate class images until there are this many; all are used.", at_least=1)
    sample_batch_size: int = flag(4, "Batch size for generating class images, per process.", at_least=1)
    prior_generation_precision: Literal["bf16", "fp32", "no", "fp16"] = flag("bf16", "Class image precision; no=fp32.")

    cache_dir: str | None = flag(None, "Folder for downloads and encodings. Default: the Hugging Face home.")
    cache_latents: bool = flag(False, "Encode images once, then free the VAE; implies center crops.")

    rank: int = flag(16, "Rank of the LoRA matrices.", at_least=1)
    lora_alpha: float | None = flag(None, "The LoRA is scaled by alpha / rank. Default: rank.", above=0)
    training_adapter: str | None = flag(None, "LoRA that undoes Turbo's distillation, on only while training.")
    init_lora: str | None = flag(None, "LoRA file to start from; it sets --rank and --lora_layers.")
    lora_dropout: float = flag(0.0, "Dropout probability for the LoRA inputs.", at_least=0, below=1)
    lora_layers: str = flag("to_q,to_k,to_v,to_out.0,w1,w2,w3", "Linear layers to adapt: suffixes, names, or blocks.")

    weighting_scheme: Weighting = flag("logit_normal", "How noise levels are sampled or weighted; none is uniform.")
    logit_mean: float = flag(0.0, "Mean for logit_normal; above 0 means more noise.")
    logit_std: float = flag(1.0, "Standard deviation for logit_normal.", above=0)
    mode_scale: float = flag(1.29, "Scale for weighting scheme mode.")
    stratified_noise: bool = flag(True, "Spread the noise levels of successive examples evenly.")
    timestep_shift: str = flag("3", "Shift s of noise levels, s x / (1 + (s - 1) x); 'scheduler' uses the model's.")
    masked_loss: bool = flag(False, "Weigh the loss by NAME-masklabel.png, NAME.mask.png, or the alpha channel.")
    mask_background: float = flag(0.05, "Weight of what a mask leaves black, relative to white.", at_least=0, below=1)
    prior_loss_weight: float = flag(1.0, "Weight of a class image relative to an instance image.", at_least=0)

    optimizer: Literal["adamw", "prodigy"] = flag("adamw", "Optimizer; use --learning_rate 1 with prodigy.")
    learning_rate: float = flag(1e-4, "Learning rate after the warmup.", above=0, below=1e6)
    scale_lr: bool = flag(False, "Multiply the learning rate by batch size x processes x accumulation steps.")
    use_8bit_adam: bool = flag(False, "Use 8-bit AdamW from bitsandbytes; not for Prodigy.")
    adam_beta1: float = flag(0.9, "Decay of the first moment, also for Prodigy.", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "Decay of the second moment, also for Prodigy.", at_least=0, below=1)
    adam_weight_decay: float = flag(1e-4, "Weight decay, also for Prodigy.", at_least=0)
    adam_epsilon: float = flag(1e-8, "Epsilon of the denominator, also for Prodigy.", above=0)
    prodigy_beta3: float | None = flag(None, "Decay of Prodigy's estimate. Default: sqrt(beta2).", at_least=0, below=1)
    prodigy_decouple: bool = flag(True, "Use decoupled weight decay in Prodigy.")
    prodigy_use_bias_correction: bool = flag(True, "Use Adam's bias correction in Prodigy.")
    prodigy_safeguard_warmup: bool = flag(True, "Keep the warmup from distorting Prodigy's estimate.")
    max_grad_norm: float = flag(1.0, "Clip gradients to this norm.", above=0)
    lr_scheduler: LrScheduler = flag("cosine", "Learning rate schedule, as in diffusers.")
    lr_warmup_steps: int = flag(0, "Warmup in optimizer steps, for schedules with a warmup.", at_least=0)
    lr_num_cycles: int = flag(1, "Number of cycles for cosine_with_restarts.", at_least=1)
    lr_power: float = flag(1.0, "Power for polynomial.")
    lr_step_rules: str | None = flag(None, "For piecewise_constant: 'factor:until_step,...,factor', as in 1:100,0.1.")
    text_encoder_lr: float | None = flag(None, "Accepted for compatibility; has no effect.")
    adam_weight_decay_text_encoder: float | None = flag(None, "Accepted for compatibility; has no effect.")

    seed: int = flag(0, "Seed for every random choice.", at_least=0, below=2**32)
    max_train_steps: int | None = flag(None, "Optimizer steps. Default: from the epochs, else 1500.", at_least=1)
    num_train_epochs: int | None = flag(None, "Epochs; each shows every instance image --repeats times.", at_least=1)
    train_batch_size: int = flag(1, "Batch size per process.", at_least=1)
    gradient_accumulation_steps: int = flag(1, "Micro-batches per step.", "--gradient_accumulation", at_least=1)
    gradient_checkpointing: bool | None = flag(None, "Recompute all blocks, or none. Default on a GPU: as needed.")
    checkpoint_blocks: str | None = flag(None, "What to recompute: the first N blocks, none, attention, or all.")
    mixed_precision: Precision = flag("bf16", "Precision of frozen weights and compute; no=fp32.")
    checkpointing_steps: int = flag(500, "Steps between checkpoints; the last step always gets one.", at_least=1)
    checkpoints_total_limit: int | None = flag(None, "Keep only this many of the newest checkpoints.", at_least=1)
    checkpointing_minutes: float | None = flag(None, "Also save a checkpoint after this many minutes.", above=0)
    max_train_minutes: float | None = flag(None, "Stop after this many minutes, with a checkpoint.", above=0)
    resume_from_checkpoint: str | None = flag(None, "Resume from 'latest' or from a checkpoint folder.")
    resume_anyway: bool = flag(False, "Resume even if data or settings differ from the checkpoint's.")
    on_nan: Literal["stop", "skip"] = flag("stop", "If loss or gradient is not finite: stop, or skip the step.")
    local_rank: int | None = flag(None, "Accepted for compatibility; has no effect.")

    quantization: Storage | None = flag(None, "Store frozen weights in 8 or 4 bits; compute in --mixed_precision.")
    do_fp8_training: bool = flag(False, "Store and multiply weights in fp8; needs compute capability 8.9 or higher.")
    bnb_quantization_config_path: str | None = flag(None, "JSON file with a bitsandbytes configuration, 4 or 8 bits.")
    offload: bool = flag(False, "Keep text encoder and VAE in CPU memory; move only the layer in use to the GPU.")
    dry_run: bool = flag(False, "Check everything, report the plan and its simulated memory, and stop.")
    fit: str | None = flag(None, "Choose the fastest settings that fit in N GiB, or in the free GPU memory ('auto').")
    compile: bool = flag(False, "Compile the blocks with torch.compile; the first steps take minutes.")
    attention_backend: str = flag("native", "Attention kernel, as in diffusers: native, _native_cudnn, ...")
    enable_npu_flash_attention: bool = flag(False, "Old name for --attention_backend _native_npu.")
    deterministic: bool = flag(False, "Use only kernels that repeat a run exactly on a GPU; some are slower.")
    allow_tf32: bool = flag(False, "Use TF32 for fp32 matmuls on Ampere and later GPUs.")
    dataloader_num_workers: int = flag(2, "Number of batches that are loaded ahead, each in a thread.", at_least=0)
    fsdp_text_encoder: bool = flag(False, "Accepted for compatibility; has no effect.")

    validation_prompt: tuple[str, ...] | None = flag(None, "Prompts, each quoted, for images throughout training.")
    final_validation_prompt: str | None = flag(None, "Prompt for final images; --validation_prompt overrides it.")
    num_validation_images: int = flag(4, "Images per prompt.", at_least=1)
    validation_epochs: int = flag(50, "Epochs between validations.", at_least=1)
    validation_steps: int | None = flag(None, "Steps between validations; replaces --validation_epochs.", at_least=1)
    guidance_scale: float | None = flag(None, "Guidance scale; 0 is none. Default: 4, or 0 for Turbo.", at_least=0)
    negative_prompt: str = flag("", "Negative prompt for guidance.")
    num_inference_steps: int | None = flag(None, "Denoising steps. Default: 28, or 9 for Turbo.", at_least=1)
    validation_resolution: int | None = flag(None, "Image side. Default: --resolution.", at_least=16, multiple_of=16)
    skip_final_inference: bool = flag(False, "Generate no images after the last step.")

    output_dir: str = flag("z-image-dreambooth-lora", "Folder for the LoRA, checkpoints, images, and metrics.")
    overwrite_output_dir: bool = flag(False, "Delete the files of an earlier run in --output_dir.")
    upcast_before_saving: bool = flag(False, "Save the LoRA in fp32 instead of --mixed_precision.")
    logging_dir: str = flag("logs", "Folder for tracker files, inside --output_dir unless absolute.")
    report_to: str = flag("none", "Accelerate trackers, separated by commas: wandb, tensorboard, ...; or all.")
    push_to_hub: bool = flag(False, "Upload the LoRA, the model card, and validation images to the Hub.")
    hub_model_id: str | None = flag(None, "Repository to upload to. Default: the name of --output_dir.")
    hub_token: str | None = flag(None, "Hub token. Default: that of `hf auth login` or HF_TOKEN.", is_secret=True)
    hub_private_repo: bool = flag(False, "Make the repository private if it is new.")
    demo: bool = flag(False, "Train a tiny random model on generated images, both created in --output_dir.")
    # fmt: on

    def __post_init__(self) -> None:
        """Expand `~` in paths; reject invalid settings, naming the flags, before anything is loaded."""
        if isinstance(self.validation_prompt, str):  # in a notebook
            object.__setattr__(self, "validation_prompt", (self.validation_prompt,))
        for name, value in vars(self).items():
            if isinstance(value, str) and not name.endswith("prompt"):
                object.__setattr__(self, name, os.path.expanduser(value))
        for sentence in itertools.chain(misfits(self), contradictions(self)):
            raise UserError(sentence)
        for key, value in zip(("guidance_scale", "num_inference_steps"), (0.0, 9) if self.is_distilled else (4.0, 28)):
            object.__setattr__(self, key, value if getattr(self, key) is None else getattr(self, key))
        if self.enable_npu_flash_attention:
            object.__setattr__(self, "attention_backend", "_native_npu")

    @property
    def lora_scale(self) -> float:
        """Return the factor alpha / rank that scales the update."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.rank

    @property
    def is_distilled(self) -> bool:
        """Return whether the model is like Turbo, by its name, its scheduler's shift, or `--training_adapter`."""
        name, shift = self.pretrained_model_name_or_path or "", None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            shift = json.loads(Path(name, "scheduler", "scheduler_config.json").read_text()).get("shift")
        return self.training_adapter is not None or "turbo" in Path(name).name.lower() or shift == 3

    @property
    def prior_kind(self) -> str | None:
        """Return what preserves the model's prior: class images, the base model, or nothing."""
        return self.prior_preservation or ("images" if self.with_prior_preservation else None)

    @property
    def has_8bit_state(self) -> bool:
        """Return whether `--use_8bit_adam` takes effect: Prodigy has no 8-bit version."""
        return self.use_8bit_adam and self.optimizer == "adamw"

    @property
    def storage(self) -> str:
        """Return how the frozen weights are stored: in bf16 or fp32, a format, or as a bitsandbytes JSON says."""
        if self.do_fp8_training or self.quantization is not None:
            return self.quantization or "fp8"
        plain = "bf16" if self.mixed_precision == "bf16" else "fp32"
        return plain if self.bnb_quantization_config_path is None else "bitsandbytes"

    @property
    def recomputed(self) -> str:
        """Return what the backward pass recomputes: 'none', a number of blocks, their 'attention', or 'all'."""
        if uses_fsdp_checkpointing():
            return "none"
        return self.checkpoint_blocks or ("all" if self.gradient_checkpointing else "none")

    @property
    def training_side(self) -> int:
        """Return the side in pixels of a square with the area of the largest bucket."""
        areas = [height * width for height, width in parse_buckets(self.aspect_ratio_buckets)]
        return math.isqrt(max(areas)) // 16 * 16 if areas else self.resolution

    @property
    def encodings_folder(self) -> Path:
        """Return the folder of cached encodings: inside `--cache_dir`, else inside the Hugging Face home."""
        from huggingface_hub import constants

        return Path(self.cache_dir or constants.HF_HOME) / "z-image-encodings"

    @property
    def trackers(self) -> list[str]:
        """Return the names in `--report_to`, an empty list for none."""
        return [name for name in dict.fromkeys(re.findall(r"[^\s,]+", self.report_to)) if name != "none"]

    @property
    def repository(self) -> str:
        """Return the repository that `--push_to_hub` uploads to."""
        return self.hub_model_id or Path(self.output_dir).resolve().name


def misfits(cfg: Config) -> Iterator[str]:
    """Yield a sentence for every value of the wrong type or out of bounds."""
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(cfg):
        value, hint = getattr(cfg, field.name), hints[field.name]
        if not matches(value, hint):
            kind = " or ".join(re.findall(r"'(\w+)'", str(hint))) or str(hint)
            shown = "this value" if field.metadata["is_secret"] else repr(value)
            yield f"--{field.name} does not accept {shown}; it accepts {kind}"
        if value == "" and not field.name.endswith("prompt"):
            yield f"--{field.name} is empty; give it a value or leave it out"
        if "[trigger]" in str(value) and field.name.endswith("prompt") and field.name != "instance_prompt":
            yield f"--{field.name}: [trigger] is replaced in captions and --instance_prompt; write the word itself"
        for name, bound in field.metadata["bounds"].items():
            holds, words = BOUNDS[name]
            if value is not None and not holds(value, bound):
                yield f"--{field.name} {words} {bound}, got {value}"


def contradictions(cfg: Config) -> Iterator[str]:
    """Yield a sentence for every invalid combination of values."""
    if cfg.pretrained_model_name_or_path is None:
        yield "--pretrained_model_name_or_path is required: a folder, a Hub name such as Tongyi-MAI/Z-Image, or --demo"
    if (cfg.instance_data_dir is None) == (cfg.dataset_name is None):
        yield "give exactly one of --instance_data_dir and --dataset_name"
    if cfg.prior_kind == "images" and None in (cfg.class_data_dir, cfg.class_prompt):
        yield '--prior_preservation images requires --class_data_dir and --class_prompt ("a photo of a dog")'
    if cfg.prior_kind == "base" and cfg.class_prompt is None:
        yield '--prior_preservation base requires --class_prompt ("a photo of a dog")'
    names = ("mixed_precision", "prior_generation_precision")
    yield from (NO_FP16.format(f"--{name}") for name in names if getattr(cfg, name) == "fp16")
    for side in itertools.chain.from_iterable(parse_buckets(cfg.aspect_ratio_buckets)):
        if side < 16 or side % 16:
            yield f"--aspect_ratio_buckets: sides must be multiples of 16, got {side}"
    if not re.fullmatch(r"(?=.*[1-9])(\d+\.?\d*|\.\d+)|scheduler", cfg.timestep_shift):
        yield f"--timestep_shift accepts a number above 0 or 'scheduler', got {cfg.timestep_shift!r}"
    if (cfg.lr_scheduler == "piecewise_constant") != (cfg.lr_step_rules is not None):
        yield "--lr_scheduler piecewise_constant and --lr_step_rules must be used together"
    if not re.fullmatch(r"(\d{1,9}(\.\d+)?:\d{1,9},)*\d{1,9}(\.\d+)?", cfg.lr_step_rules or "1"):
        yield f"--lr_step_rules must be factor:until_step,...,factor, as in 1:100,0.1; got {cfg.lr_step_rules!r}"
    if cfg.lr_scheduler == "polynomial" and cfg.learning_rate <= 1e-7:
        yield "--lr_scheduler polynomial decays to 1e-7; --learning_rate must be above that"
    formats = ("quantization", "do_fp8_training", "bnb_quantization_config_path")
    given = [f"--{name}" for name in formats if getattr(cfg, name)]
    if len(given) > 1:
        yield f"{' and '.join(given)} set the format of the same weights; give only one of them"
    if cfg.enable_npu_flash_attention and cfg.attention_backend not in ("native", "_native_npu"):
        yield f"--enable_npu_flash_attention conflicts with --attention_backend {cfg.attention_backend}"
    if cfg.hub_token is not None and not re.fullmatch(r"[!-~]+", cfg.hub_token):
        yield "--hub_token contains whitespace or an invalid character; copy it again"
    if cfg.push_to_hub and not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]{0,95}", cfg.repository, re.A):
        yield f"--hub_model_id {cfg.repository} is not a valid repository name; use one such as user/my-lora"
    if not re.fullmatch(r"\d{1,4}|none|attention|all", cfg.checkpoint_blocks or "0"):
        yield f"--checkpoint_blocks accepts a number of blocks, none, attention, or all; got {cfg.checkpoint_blocks!r}"
    if cfg.checkpoint_blocks is not None and cfg.gradient_checkpointing is not None:
        yield "--checkpoint_blocks and --gradient_checkpointing set the same thing; use only one of them"
    if cfg.fit != "auto" and not re.fullmatch(r"(?=.*[1-9])\d{1,6}(\.\d{1,16})?", cfg.fit or "1"):
        yield f"--fit accepts the memory of a GPU in GiB, as in 24, or 'auto', got {cfg.fit!r}"
    if cfg.fit is not None and is_on("ACCELERATE_USE_FSDP"):
        yield "--fit does not know how FSDP shards the model; remove it"
    if cfg.dry_run and cfg.demo:
        yield "--demo needs no --dry_run: it creates what it trains on, and takes less than a minute"
    if cfg.overwrite_output_dir and cfg.resume_from_checkpoint is not None:
        yield "--overwrite_output_dir would delete what --resume_from_checkpoint resumes; give only one of them"


def parse_buckets(text: str | None) -> list[tuple[int, int]]:
    """Parse 'height,width;height,width;...' (None gives an empty list). Raises UserError for anything else."""
    is_list = re.fullmatch(r"(\s*\d+\s*,\s*\d+\s*(;|$))+\s*", text or "1,1") is not None
    require(is_list, f"--aspect_ratio_buckets must have the form 'height,width;height,width;...', got {text!r}")
    numbers = [int(number) for number in re.findall(r"\d+", text or "")]
    return list(zip(numbers[::2], numbers[1::2]))


def matches(value: Any, hint: Any) -> bool:
    """Tell whether a value has the type of a field. argparse checks flags, but not JSON files or notebooks."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in options:
        return value is None or matches(value, options[0])
    if origin is Literal:
        return value in options
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) > 0 and all(matches(item, options[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and -1e300 < value < 1e300
    return isinstance(value, hint) and not (hint is str and re.search("[\ud800-\udfff]", value))  # no UTF-8


def parse_config(argv: list[str] | None = None) -> Config:
    """Build the `Config` from the command line; `--config run.json` supplies defaults that flags override."""
    parser = argparse.ArgumentParser(
        description=Config.__doc__, usage="accelerate launch %(prog)s [--config FILE] [--flag VALUE ...]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=120), allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", type=Path, help="JSON file with settings, such as config.json")
    hints, group = typing.get_type_hints(Config), parser
    for field in dataclasses.fields(Config):
        group = parser.add_argument_group(HEADINGS[field.name]) if field.name in HEADINGS else group
        names = (f"--{field.name}", *field.metadata["aliases"])
        group.add_argument(*names, **argparse_options(field, hints[field.name]))
    try:
        if parser.parse_known_args(argv)[0].demo:
            parser.set_defaults(**demo_settings("z-image-demo"))
            parser.set_defaults(**demo_settings(parser.parse_known_args(argv)[0].output_dir))
        file = parser.parse_known_args(argv)[0].config
        if file is not None:
            parser.set_defaults(**read_settings(file.expanduser()))
        values = vars(parser.parse_args(argv))
        del values["config"]
        return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except UserError as error:
        parser.error(str(error))


def argparse_options(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """Translate one typed dataclass field into keyword arguments for `ArgumentParser.add_argument`."""
    if type(None) in typing.get_args(hint):
        hint = typing.get_args(hint)[0]  # `X | None`: the flag takes an X, leaving it out means None
    if hint is bool:
        options = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    elif typing.get_origin(hint) is Literal:
        options = {"type": str.lower, "choices": typing.get_args(hint)}
    elif typing.get_origin(hint) is tuple:
        options = {"type": str, "nargs": "+", "metavar": "STR"}
    else:
        options = {"type": hint, "metavar": hint.__name__.upper()}
    default = "" if field.default in (None, "") else f" [{field.default}]"
    return options | {"default": field.default, "help": (field.metadata["help"] + default).replace("%", "%%")}


def parse_bool(text: str) -> bool:
    """Parse true or false: `--flag` alone means true, `--flag false` turns off a flag that is on by default."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def read_settings(file: Path) -> dict[str, Any]:
    """Read a saved config.json without its record of the environment. Raises UserError for unknown settings."""
    settings = read_json_object(f"--config {file}", file)
    settings.pop("environment", None)
    unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(Config)})
    require(not unknown, f"--config {file} contains unknown settings: {', '.join(unknown)}")
    return settings


def demo_settings(output_dir: str) -> dict[str, Any]:
    """Return the settings of `--demo`; other flags override them."""
    return {
        "demo": True, "output_dir": output_dir, "pretrained_model_name_or_path": f"{output_dir}/demo-model",
        "instance_data_dir": f"{output_dir}/demo-images", "cache_dir": f"{output_dir}/demo-cache",
        "instance_prompt": "a photo of sks badge", "validation_prompt": ("a sks badge on a table", "桌子上的sks徽章"),
        "resolution": 64, "use_aspect_ratio_buckets": True, "cache_latents": True, "random_flip": True, "rank": 4,
        "learning_rate": 1e-3, "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 40,
        "checkpointing_steps": 20, "validation_steps": 20, "num_validation_images": 2, "num_inference_steps": 6,
    }  # fmt: skip


def advice(cfg: Config) -> Iterator[str]:
    """Yield a line for every setting that has no effect or an unexpected one."""
    launcher, word = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), cfg.trigger_word
    for name in ("text_encoder_lr", "adam_weight_decay_text_encoder", "local_rank", "fsdp_text_encoder"):
        if getattr(cfg, name) != getattr(Config, name):
            yield f"--{name} is accepted for compatibility and has no effect"
    if cfg.is_distilled and cfg.training_adapter is None:
        yield "this is Turbo, by its name or shift 3; training undoes Turbo's distillation: add a --training_adapter"
    if cfg.caption_column is not None and cfg.dataset_name is None:
        yield "--caption_column has no effect without --dataset_name; in a folder, use NAME.txt files"
    if cfg.num_train_epochs is not None and cfg.max_train_steps is not None:
        yield "--num_train_epochs has no effect with --max_train_steps"
    if cfg.validation_steps is not None and cfg.validation_epochs != Config.validation_epochs:
        yield "--validation_epochs has no effect with --validation_steps"
    if cfg.use_8bit_adam and not cfg.has_8bit_state:
        yield "--use_8bit_adam is ignored with --optimizer prodigy"
    if (cfg.gradient_checkpointing or cfg.checkpoint_blocks) and uses_fsdp_checkpointing():
        yield "--gradient_checkpointing: FSDP's own activation checkpointing is used instead"
    if not cfg.push_to_hub and (cfg.hub_model_id is not None or cfg.hub_private_repo):
        yield "--hub_model_id and --hub_private_repo have no effect without --push_to_hub"
    if cfg.lr_warmup_steps > 0 and cfg.lr_scheduler in ("constant", "piecewise_constant"):
        yield f"--lr_warmup_steps has no effect with --lr_scheduler {cfg.lr_scheduler}; use constant_with_warmup"
    elif cfg.lr_warmup_steps >= (cfg.max_train_steps or math.inf):
        yield f"--lr_warmup_steps {cfg.lr_warmup_steps} covers the whole run; the full rate is never reached"
    if cfg.optimizer == "prodigy" and cfg.learning_rate < 0.1:
        yield f"--learning_rate {cfg.learning_rate} is low for Prodigy, which multiplies it by its estimate; use 1.0"
    if cfg.prior_kind is None and (cfg.class_data_dir, cfg.class_prompt) != (None, None):
        yield "--class_data_dir and --class_prompt have no effect without --prior_preservation"
    if word is not None and not any(map(whole(word).search, cfg.validation_prompt or [word])):
        yield f"no --validation_prompt contains the --trigger_word {word}, which is put into training prompts only"
    if cfg.validation_prompt is not None and cfg.final_validation_prompt is not None:
        yield "--final_validation_prompt has no effect with --validation_prompt"
    if cfg.cache_latents:
        yield "--cache_latents: images are center-cropped" + ", and flipped copies are cached" * cfg.random_flip
    if launcher not in ("no", cfg.mixed_precision):
        yield f"--mixed_precision {cfg.mixed_precision} overrides {launcher} in the accelerate configuration"


def is_on(variable: str) -> bool:
    """Return whether an environment variable, as accelerate sets them, is true."""
    return os.environ.get(variable, "false").lower() == "true"


def uses_fsdp_checkpointing() -> bool:
    """Tell whether the accelerate configuration makes FSDP recompute activations."""
    return is_on("ACCELERATE_USE_FSDP") and is_on("FSDP_ACTIVATION_CHECKPOINTING")


def shareable_settings(cfg: Config) -> dict[str, Any]:
    """List the settings without secrets, for files, trackers, and cards."""
    return {one.name: getattr(cfg, one.name) for one in dataclasses.fields(cfg) if not one.metadata["is_secret"]}


def redact(text: str, cfg: Config) -> str:
    """Replace secrets from flags and from the environment with asterisks in whatever is printed, logged, or sent."""
    secrets = [getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.metadata["is_secret"]]
    secrets += [os.environ.get(name) for name in ("HF_TOKEN", "WANDB_API_KEY")]
    for secret in filter(None, (secret.strip() for secret in secrets if secret)):
        text = text.replace(secret, "***")
    return text


# ==== Plan ===========================================================================================================

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
CAPTION_SUFFIXES, CAPTION_TABLES = (".txt", ".caption"), ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")
CACHE_VERSION = 3  # increase it when the same inputs give different encodings
FOREIGN_FOLDER = re.compile(  # hidden; or of NAS systems, archives, photo managers, annotation tools, kohya's scripts
    r"\..*|@eadir|@recycle|[#$]recycle(\.bin)?|#snapshot|lost\+found|__macosx|thumb(nail)?s|masks?|segmentation\w+|reg"
)
FOREIGN_ENDING = re.compile(r"[-_. ]+(mask(label)?|matte|alpha|depth|seg|thumb(nail)?)s?")  # after an image's name
MASK_ENDINGS = ("-masklabel.png", ".mask.png")  # OneTrainer's, and ours
STRENGTHS, MEASURED = (0, 0.5, 0.75, 1, 1.25), 8  # of the final LoRA, in images; training images, for the gain
Example = tuple[int, int]  # an element of the endless stream: its position, and the index of its sample
warnings.filterwarnings("ignore", module="PIL|peft")  # about images that are read anyway, and a second adapter
Image.MAX_IMAGE_PIXELS = 250_000_000  # Pillow rejects images of more than twice as many
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # also limits color profiles


@dataclass(frozen=True)
class Sample:
    """One image as the run uses it; sizes are (height, width) in pixels."""

    path: Path
    size: tuple[int, int]
    bucket: tuple[int, int]
    prompt: str
    has_caption: bool
    is_prior: bool
    digest: str = ""  # SHA-256 of the file; empty for a class image that is yet to be generated
    mask: Path | None = None  # a file, or that of the image for its alpha channel


@dataclass(frozen=True)
class Schedule:
    """The batch sizes and intervals of a run; a step is one optimizer step."""

    micro_batch: int  # images in one forward pass of all processes
    total_batch: int  # images in one step
    epoch_examples: int
    max_train_steps: int
    validation_interval: int  # examples between two validations
    first_step: int  # the checkpoint's, else 0

    def is_validation_step(self, step: int) -> bool:
        """Return whether to validate after `step` steps: at the start, and after every interval."""
        done, before = (n * self.total_batch // self.validation_interval for n in (step, step - 1))
        return step < self.max_train_steps and (step == 0 or done > before)


def find_files(folder: Path) -> list[Path]:
    """List the files below a folder in sorted order, through links; foreign folders are listed but not entered."""
    found, entered = [], set()
    for parent, dirs, files in os.walk(folder, onerror=lambda why: say(f"warning: {why}; skipped"), followlinks=True):
        if os.path.realpath(parent) in entered:  # through a link
            dirs[:] = files = []
        entered.add(os.path.realpath(parent))
        foreign = [name for name in dirs if FOREIGN_FOLDER.fullmatch(name.lower())]
        found += [Path(parent, name) for name in files + foreign]
        dirs[:] = sorted(set(dirs) - set(foreign))
    return sorted(found)


def identity(path: Path) -> str:
    """Return the same string for all spellings of a path: relative, through links, with composed accents."""
    return unicodedata.normalize("NFC", os.path.join(os.path.realpath(path.parent), path.name))


def find_mask(path: Path, size: tuple[int, int]) -> Path | None:
    """Find the mask of an image: a file beside it, or its own alpha channel. Raises UserError if the size differs."""
    for mask in (path.with_name(f"{path.stem}{ending}") for ending in MASK_ENDINGS):
        if mask.is_file():
            with explained(f"--masked_loss: {mask} is not an image"):
                is_equal = load_image(mask).size == size[::-1]
            require(is_equal, f"--masked_loss: {mask} does not match its upright image in size; resize or rotate it")
            return mask
    return path if Image.open(path).has_transparency_data else None


def select_images(files: list[Path]) -> list[Path]:
    """Select the images; leave out their masks and thumbnails, and point out names that suggest a mistake."""
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    images = [path for path in images if path.is_file() and not path.name.lower().endswith(MASK_ENDINGS)]  # no FIFO
    stems, pairs = {path.with_suffix("") for path in images}, collections.defaultdict(set)
    for path in images:
        match = re.fullmatch(r"(?s)(.+?)([-_. ]+[^\W\d][^-_. ]*)", path.stem)
        if match is not None and path.with_name(match[1]) in stems:
            pairs[match[2].lower()].add(path)
    foreign = set().union(*(paths for ending, paths in pairs.items() if FOREIGN_ENDING.fullmatch(ending)))
    images = [path for path in images if path not in foreign]
    for ending in [ending for ending, paths in pairs.items() if 2 * len(paths - foreign) >= len(images) > 2]:
        say(f"note: half of the images are named like another one plus {ending}; remove them if they are not meant")
    return images


def read_metadata(file: Path, images: list[Path]) -> dict[Path, str]:
    """Read captions from a table. Raises UserError for an image that does not exist or a bad caption."""
    captions, columns, known = {}, set(), {identity(path): path for path in images}
    text = read_text(file)
    with explained(f"{file} is not a table", "its first line must name the columns"):
        rows = [*csv.DictReader(io.StringIO(text), strict=True)] if file.suffix == ".csv" else text.split("\n")
    for number, row in enumerate(rows, start=1):
        place = f"{file}, row {number}"
        if isinstance(row, str) and not row.strip():
            continue
        with explained(f'{place} is not a JSON object, or a line with commas, that has a "file_name"', "fix it"):
            row = json.loads(row) if isinstance(row, str) else row
            image = known.get(identity(file.parent / row["file_name"]))
        require(None not in row, f"{place} has more fields than columns; put captions with commas in quotes")
        require(image is not None, f"{place} lists {row['file_name']}, which is not an image there; fix the row")
        caption = next((row[key] for key in CAPTION_COLUMNS if row.get(key) is not None), None)
        if caption is not None:
            require(matches(caption, str), f"{place}: the caption {caption!r} is not text; put it in quotes")
            captions[image] = caption.strip()
        columns |= {str(key) for key, value in row.items() if isinstance(value, str)} - {"file_name"}
    if columns and not captions:
        say(f"note: {file} has no captions; their column is {' or '.join(CAPTION_COLUMNS)}, not {', '.join(columns)}")
    return captions


def load_image(file: Path | io.BytesIO, under: str = "white") -> Image.Image:
    """Decode the first frame to upright 8-bit RGB, over a color if transparent. Raises what Pillow does on damage."""
    with Image.open(file) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits in 32
        upright = upright.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    elif upright.mode == "F":
        brightest = upright.getextrema()[1]
        upright = upright.point(lambda value: value * (255 if brightest <= 1 else 1) + 0.5).convert("L")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    opaque = Image.new("RGBA", upright.size, under)
    opaque.alpha_composite(upright.convert("RGBA"))
    return opaque.convert("RGB")


def cache_file(cfg: Config, kind: str, *ingredients: Any) -> Path:
    """Name a cache file by a hash of its inputs, so that changed inputs miss the cache."""
    name = sha256(json.dumps((CACHE_VERSION, *ingredients)).encode())
    return cfg.encodings_folder / kind / f"{name}.safetensors"


def measure(path: Path, digest: str, cfg: Config) -> tuple[int, int]:
    """Return (height, width); decodes each image once, to know that it is intact. Raises UserError if it is not."""
    memo = cache_file(cfg, "sizes", digest)
    size = read_sealed(memo)
    if size is None:
        with explained(f"{path} cannot be read as an image"):
            width, height = load_image(path).size
        size = {"height": str(height), "width": str(width)}
        with contextlib.suppress(OSError):  # it only saves time
            write_sealed(memo, size, {})
    return int(size["height"]), int(size["width"])


def make_buckets(resolution: int) -> list[tuple[int, int]]:
    """Make (height, width) pairs of at most resolution x resolution pixels, from 1:4 through square to 4:1."""
    step = max(16, resolution // 16 // 16 * 16)
    short_sides = range(resolution, resolution // 2 - 1, -step)
    pairs = [(short, resolution * resolution // short // 16 * 16) for short in short_sides if short >= 16]
    return list(dict.fromkeys(pair for short, long in pairs for pair in ((short, long), (long, short))))


def nearest_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """Choose the bucket with the nearest aspect ratio on a logarithmic scale; among equals, the nearest area."""
    height, width = size
    aspects = [round(abs(math.log(height / width) - math.log(bucket[0] / bucket[1])), 9) for bucket in buckets]
    areas = [abs(math.log(height * width) - math.log(bucket[0] * bucket[1])) for bucket in buckets]
    return min(zip(aspects, areas, buckets))[2]


def choose_bucket(size: tuple[int, int], cfg: Config) -> tuple[int, int] | None:
    """Assign an image to its bucket; automatic buckets shrink until one fits inside the image, None if none does."""
    if cfg.aspect_ratio_buckets is not None:
        return nearest_bucket(size, parse_buckets(cfg.aspect_ratio_buckets))
    if not cfg.use_aspect_ratio_buckets:
        return (cfg.resolution, cfg.resolution)
    for resolution in range(cfg.resolution, 0, -16):
        bucket = nearest_bucket(size, make_buckets(resolution))
        if bucket[0] <= size[0] and bucket[1] <= size[1]:
            return bucket
    return None


def describe_ignored(files: list[Path]) -> list[str]:
    """Name the files that are not used, with hints."""
    suffixes, names = {path.suffix.lower() for path in files}, [path.name for path in files]
    names.sort(key=lambda name: name[0] == ".")  # hidden ones last
    hints = ["convert HEIC images to JPEG"] * bool(suffixes & {".heic", ".heif"})
    hints += ["class images belong in --class_data_dir"] * ("reg" in names)
    if suffixes & {".txt", ".caption", ".json", ".jsonl", ".csv"}:
        hints.append("captions are read from NAME.txt, NAME.caption, metadata.jsonl, and metadata.csv")
    shown = ", ".join(names[:10]) + f", and {len(names) - 10} more" * (len(names) > 10)
    return [f"ignored: {shown}" + f" ({'; '.join(hints)})" * bool(hints)] * bool(names)


def with_trigger(text: str, word: str) -> str:
    """Put the trigger word in place of [trigger], or before a text that lacks it."""
    replaced = text.replace("[trigger]", word)
    return replaced if replaced != text or whole(word).search(text) else f"{word} {text}".strip()


def scan_images(folder: Path, prompt: str | None, is_prior: bool, cfg: Config) -> list[Sample]:
    """Make samples from the images in a folder; report skipped files. Raises UserError for a bad caption."""
    found, samples, skipped = find_files(Path(os.path.normpath(folder))), [], []
    images = select_images(found)
    tables = [path for path in found if path.name in CAPTION_TABLES and path.is_file()]
    captions = {image: text for table in tables for image, text in read_metadata(table, images).items()}
    texts = [path for suffix in reversed(CAPTION_SUFFIXES) for path in found if path.suffix.lower() == suffix]
    texts = {identity(path.with_suffix("")): path for path in texts if path.is_file()}
    texts = {path: texts.get(identity(path.with_suffix(""))) for path in images}  # of each image
    masks = [path for path in found if path.name.endswith(MASK_ENDINGS)] if cfg.masked_loss else []
    say(*describe_ignored(sorted(set(found).difference(images, tables, texts.values(), masks))))
    for path in progress_bar(images, "reading images", delay=2):
        try:
            content = path.read_bytes()
            require(content[4:11] != b"ftyphei", f"{path} is a HEIC image; convert it to JPEG")
            digest = sha256(content)
            size = measure(path, digest, cfg)
            bucket = choose_bucket(size, cfg)
            require(bucket is not None, f"{path} is too small for any bucket ({size[0]} x {size[1]})")
        except (UserError, OSError) as error:
            skipped.append(f"warning: {error}; skipped")
            continue
        caption = captions.get(path) if texts[path] is None else read_text(texts[path]).strip()
        text = prompt if caption is None else caption
        column = ", or select the captions with --caption_column" * (cfg.dataset_name is not None)
        require(text is not None, f"--instance_prompt is required: {path} has no caption{column}")
        text = text if is_prior or cfg.trigger_word is None else with_trigger(text, cfg.trigger_word)
        require("[trigger]" not in text, f"the prompt of {path} contains [trigger]; set --trigger_word, or remove it")
        mask = find_mask(path, size) if cfg.masked_loss and not is_prior else None
        skipped += [f"note: {path} has no mask"] * (cfg.masked_loss and not is_prior and mask is None)
        samples.append(Sample(path, size, bucket, text, caption is not None, is_prior, digest, mask))
    say(*skipped)  # not before: tqdm would show a bar that is not due
    return samples


def trained_prompt(cfg: Config, samples: list[Sample]) -> str | None:
    """Return the prompt of the images without a caption, or else `--trigger_word`."""
    return next((one.prompt for one in samples if not one.has_caption and not one.is_prior), cfg.trigger_word)


def plan_samples(cfg: Config) -> list[Sample]:
    """Decide which images the run uses, and how. Raises UserError if there are no instance images."""
    folder = Path(cfg.instance_data_dir) if cfg.dataset_name is None else export_dataset(cfg)
    origin = f"--instance_data_dir {folder}" if cfg.dataset_name is None else f"--dataset_name {cfg.dataset_name}"
    require(folder.is_dir(), f"{origin} does not exist or is not a folder; specify the folder with your images")
    samples = scan_images(folder, cfg.instance_prompt, False, cfg)
    kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES) + " (HEIC must be converted)"
    require(bool(samples), f"{origin} contains no usable image; add some: {kinds}")
    folders = [re.fullmatch(r"(\d{1,3})_(.+)", name) for name in sorted({s.path.parent.name for s in samples})]
    for match in folders:  # as in kohya's scripts
        if match is not None and match.groups() != (str(cfg.repeats), cfg.instance_prompt):
            say(f"note: {match[0]} sets nothing; use --repeats {match[1]} and --instance_prompt='{match[2]}'")
    if cfg.prior_kind == "base":  # the same images, with the class in place of the trigger
        word, kind, more = cfg.trigger_word, cfg.class_prompt, {"has_caption": False, "is_prior": True, "mask": None}
        replaced = [whole(word).subn(lambda _: kind, one.prompt) if word else ("", 0) for one in samples]
        prompts = [text if count else kind for text, count in replaced]
        samples += [dataclasses.replace(one, prompt=text, **more) for one, text in zip(samples, prompts)]
    samples += plan_class_images(cfg) if cfg.prior_kind == "images" else []
    return sorted(samples, key=lambda sample: (sample.is_prior, sample.path))  # the stream refers to them by index


def hold_out(samples: list[Sample], cfg: Config) -> tuple[list[Sample], tuple[Sample, ...]]:
    """Split the samples into those to train and the last `--holdout` instance images by name."""
    instances = [sample for sample in samples if not sample.is_prior]
    require(cfg.holdout < len(instances), f"--holdout {cfg.holdout} leaves none of {len(instances)} images to train")
    held_out = {sample.path: sample for sample in instances[len(instances) - cfg.holdout :]}
    return [sample for sample in samples if sample.path not in held_out], tuple(held_out.values())


def plan_class_images(cfg: Config) -> list[Sample]:
    """Find the class images, and name those that are yet to be generated."""
    folder, side = Path(os.path.normpath(cfg.class_data_dir)), cfg.training_side
    present = scan_images(folder, cfg.class_prompt, True, cfg) if folder.exists() else []
    names = (folder / f"class-{number:05d}.png" for number in itertools.count())
    free = itertools.islice((path for path in names if not path.exists()), max(0, cfg.num_class_images - len(present)))
    bucket = choose_bucket((side, side), cfg)
    return present + [Sample(path, (side, side), bucket, cfg.class_prompt, False, True) for path in free]


def export_dataset(cfg: Config) -> Path:
    """Write the images and captions of `--dataset_name` to a folder, the only source the rest reads."""
    import datasets

    cache_dir = cfg.cache_dir and str(Path(cfg.cache_dir) / "datasets")
    with explained(f"--dataset_name {cfg.dataset_name} cannot be loaded", "check the name and the network"):
        splits = datasets.load_dataset(cfg.dataset_name, cfg.dataset_config_name, cache_dir=cache_dir)
    split = next(iter(splits)) if len(splits) == 1 else "train"
    require(split in splits, f"--dataset_name {cfg.dataset_name} has no train split, only {', '.join(splits)}")
    table = splits[split]
    for name in ("image_column", "caption_column"):
        is_there, columns = getattr(cfg, name) in (None, *table.column_names), ", ".join(table.column_names)
        require(is_there, f"--{name} {getattr(cfg, name)} is not a column of the dataset, which has {columns}")
    texts = [name for name, feature in table.features.items() if getattr(feature, "dtype", None) == "string"]
    if texts and cfg.caption_column is None:
        say(f"--dataset_name: captions are not used; to use them, set --caption_column to {' or '.join(texts)}")
    with explained(f"--image_column {cfg.image_column} does not contain images"):
        images = table.cast_column(cfg.image_column, datasets.Image(decode=False))[cfg.image_column]
        contents = [image["bytes"] or Path(image["path"]).read_bytes() for image in images]
    captions = table[cfg.caption_column] if cfg.caption_column else [None] * len(contents)
    names = [f"{number:06d}-{sha256(content)[:16]}.png" for number, content in enumerate(contents)]
    rows = [{"file_name": name, "text": caption} for name, caption in zip(names, captions)]
    metadata = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    folder = cfg.encodings_folder / "datasets" / sha256(metadata)
    for name, content in zip([*names, "metadata.jsonl"], [*contents, metadata]):
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            write_file(folder / name, content)
    return folder


def shuffle_epochs(indices: list[int], kind: str, seed: int) -> Iterator[int]:
    """Yield the indices epoch after epoch, without end, each epoch in a new order that depends only on the seed."""
    for epoch in itertools.count():
        yield from random.Random(derive_seed(seed, kind, epoch)).sample(indices, len(indices))


def example_stream(samples: list[Sample], cfg: Config) -> Iterator[Example]:
    """Yield the endless sequence of examples; with prior preservation, instance and class images alternate."""
    instances = [index for index, sample in enumerate(samples) if not sample.is_prior]
    classes = [index for index, sample in enumerate(samples) if sample.is_prior]
    indices = shuffle_epochs(instances * cfg.repeats, "instance order", cfg.seed)
    if classes:
        indices = itertools.chain.from_iterable(zip(indices, shuffle_epochs(classes, "class order", cfg.seed)))
    return enumerate(indices)


def micro_batches(samples: list[Sample], cfg: Config, size: int) -> Iterator[list[Example]]:
    """Group the stream into batches of one bucket each: yield a bucket's queue when it holds `size` examples."""
    queues: dict[tuple[int, int], list[Example]] = collections.defaultdict(list)
    for number, index in example_stream(samples, cfg):
        queue = queues[samples[index].bucket]
        queue.append((number, index))
        if len(queue) == size:
            yield queue[:]
            queue.clear()


def make_schedule(cfg: Config, samples: list[Sample], num_processes: int = 1, first_step: int = 0) -> Schedule:
    """Compute the schedule of the run."""
    micro_batch = cfg.train_batch_size * num_processes
    total_batch = micro_batch * cfg.gradient_accumulation_steps
    instances = sum(not sample.is_prior for sample in samples) * cfg.repeats
    epoch_examples = instances * (2 if cfg.prior_kind else 1)
    by_epochs = math.ceil((cfg.num_train_epochs or 0) * epoch_examples / total_batch)
    max_train_steps = cfg.max_train_steps or by_epochs or 1500
    interval = (cfg.validation_steps or 0) * total_batch or cfg.validation_epochs * epoch_examples
    return Schedule(micro_batch, total_batch, epoch_examples, max_train_steps, interval, first_step)


def count_views(samples: list[Sample], cfg: Config, schedule: Schedule) -> collections.Counter[int]:
    """Count how often the run shows each sample, by replaying the stream; extrapolates for a very long run."""
    total = schedule.max_train_steps * cfg.gradient_accumulation_steps
    replayed = min(total, math.ceil(500_000 / schedule.micro_batch))
    shown = itertools.islice(micro_batches(samples, cfg, schedule.micro_batch), replayed)
    views = collections.Counter(index for batch in shown for _, index in batch)
    return collections.Counter({sample: round(count * total / replayed) for sample, count in views.items()})


def describe_plan(samples: list[Sample], cfg: Config, schedule: Schedule) -> list[str]:
    """Describe the run as lines of a table. Raises UserError for a bucket that would never be trained."""
    views, size = count_views(samples, cfg, schedule), schedule.micro_batch
    first, last = schedule.first_step, schedule.max_train_steps
    require(first <= last, f"the checkpoint is already at step {first}; --max_train_steps must not be lower")
    examples, kinds = last * schedule.total_batch, collections.Counter(sample.is_prior for sample in samples)
    shown = examples // (2 if cfg.prior_kind else 1)  # instance images, and as many class images
    is_short = {False: shown < kinds[False] * cfg.repeats, True: shown < kinds[True]}
    table, notes = "{:>12} {:>9} {:>9} {:>12} {:>8} {:>13} {:>15}", []
    lines = [table.format("bucket", "images", "class", "captioned", "repeats", "times seen", "smallest image")]
    for bucket in sorted({sample.bucket for sample in samples}):
        members = [sample for sample in samples if sample.bucket == bucket]
        counts = [views[index] for index, sample in enumerate(samples) if sample.bucket == bucket]
        name, names = f"{bucket[0]} x {bucket[1]}", ", ".join(str(sample.path) for sample in members[:5])
        is_used = max(counts) > 0 or all(is_short[member.is_prior] for member in members)
        problem = f"bucket {name} never fills a batch of {size} in this run, so {names} would not be used; lower"
        remedy = "--train_batch_size, with more --gradient_accumulation_steps, use fewer buckets, or train longer"
        require(is_used, f"{problem} {remedy}")
        seen = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        classes, captions = sum(sample.is_prior for sample in members), sum(sample.has_caption for sample in members)
        smallest = "{} x {}".format(*min((sample.size for sample in members), key=math.prod))
        lines.append(table.format(name, len(members), classes, captions, cfg.repeats, seen, smallest))
        if len(members) < size:
            remedy = "a smaller --train_batch_size with more --gradient_accumulation_steps mixes better"
            notes.append(f"bucket {name} waits for later epochs to fill a batch of {size}; {remedy}")
        small = [one for one in members if one.size[0] < bucket[0] or one.size[1] < bucket[1]]
        files = [str(path) for _, path in sorted({(math.prod(one.size), one.path) for one in small})]
        notes += [f"upscaled to {name}: {', '.join(files[:5])}{', ...' * (len(files) > 5)}"] * bool(files)
    notes += ["the run is shorter than one epoch: not every image will be seen"] * is_short[False]
    is_unused = cfg.instance_prompt is not None and all(one.has_caption or one.is_prior for one in samples)
    notes += ["--instance_prompt is not used: every image has its own caption"] * is_unused
    processes, accumulation = size // cfg.train_batch_size, cfg.gradient_accumulation_steps
    product = f"batch {cfg.train_batch_size} x processes {processes} x accumulation {accumulation}"
    epochs = f"{examples / schedule.epoch_examples:,.1f} epochs of {schedule.epoch_examples}"
    steps = f"steps: {last:,} x {schedule.total_batch} ({product}) = {examples:,} examples = {epochs}"
    steps += f", of which {first:,} steps are done" * bool(first)
    return [*lines, *notes, steps, *describe_sampling(samples, cfg, schedule)]


def describe_sampling(samples: list[Sample], cfg: Config, schedule: Schedule) -> list[str]:
    """Describe what images and measurements cost, and their share of the work, in forward passes x pixels."""
    first, end, total = schedule.first_step, schedule.max_train_steps - 1, schedule.total_batch
    intervals = end * total // schedule.validation_interval - first * total // schedule.validation_interval
    times = (first == 0) + max(0, min(intervals, end - first))  # and once more at the end
    is_final = bool(cfg.validation_prompt or cfg.final_validation_prompt) and not cfg.skip_final_inference
    images = (times * bool(cfg.validation_prompt) + is_final) * len(cfg.validation_prompt or "1")
    images = images * cfg.num_validation_images + is_final * len(STRENGTHS)
    each = cfg.num_inference_steps * (2 if cfg.guidance_scale else 1)
    measured = cfg.holdout + min(cfg.holdout or MEASURED, sum(not one.is_prior for one in samples))
    gains = 10 * (times + 1) * measured * bool(cfg.holdout or cfg.validation_prompt)  # 5 levels, LoRA on and off
    side, missing = cfg.validation_resolution or cfg.training_side, sum(not sample.digest for sample in samples)
    area = sum(math.prod(sample.bucket) for sample in samples) / len(samples)
    sampling = images * each * side**2 + gains * area
    training = (end + 1 - first) * total * area * (3 if cfg.recomputed == "all" else 2)  # backward counts as one
    passes = f"{cfg.num_inference_steps} steps each{', twice for guidance' * bool(cfg.guidance_scale)}"
    line = f"validation: {images} images of {side} x {side}, {passes} = {images * each:,} forward passes, and "
    line += f"{gains:,} for the gain, about {100 * sampling / (sampling + training or 1):.0f}% of the work"
    generating = f"class images to generate first: {missing}, in {missing * each:,} forward passes"
    return [generating] * bool(missing) + [line] * bool(images + gains)


# ==== Checks =========================================================================================================

LORA_FILE, STATE_FILE = "pytorch_lora_weights.safetensors", "state.safetensors"
BEST_FILE, STEPS = "pytorch_lora_weights_best.safetensors", "validation/step-" + "[0-9]" * 6
RUN_FILES = (LORA_FILE, BEST_FILE, "report.html", "config.json", "metrics.jsonl", "README.md")
COMPONENTS = {
    "scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json",
    "text_encoder": "config.json", "vae": "config.json", "transformer": "config.json",
}  # fmt: skip


class Checkpoint(NamedTuple):
    """A checkpoint to resume from, known to be intact."""

    folder: Path
    step: int
    state: dict[str, Any]


class Plan(NamedTuple):
    """What a run will do: with which images, for how long, from where."""

    samples: list[Sample]
    schedule: Schedule
    checkpoint: Checkpoint | None
    held_out: tuple[Sample, ...] = ()  # not trained


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run, intact or not, oldest first; folders of other programs are ignored."""
    named = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    ours = [path for path in named if (path / STATE_FILE).is_file()]
    return sorted((path for path in ours if not path.is_symlink()), key=lambda path: int(path.name[11:]))


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Read a checkpoint; None if its state is damaged, or its step does not match its name."""
    try:
        state = json.loads((read_sealed(folder / STATE_FILE) or {})["state"])
        step, named = int(state["step"]), re.fullmatch(r"checkpoint-(\d+)", folder.name)
        is_possible = 0 < step < 10**9 and (named is None or step == int(named[1]))
        is_possible &= isinstance(state["binding"], dict)
        return Checkpoint(folder, step, state) if is_possible else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def is_half_checkpoint(path: Path) -> bool:
    """Tell whether a folder is what a run left that was killed while writing or removing: our LoRA at most."""
    names = {file.name for file in path.glob("[!.]*")} if path.is_dir() and not path.is_symlink() else {"a file"}
    return not names or (names == {LORA_FILE} and read_sealed(path / LORA_FILE) is not None)


def describe_last(cfg: Config) -> str:
    """Name the newest intact checkpoint."""
    last = next(filter(read_checkpoint, reversed(list_checkpoints(Path(cfg.output_dir)))), None)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def find_checkpoint(cfg: Config) -> Checkpoint | None:
    """Resolve `--resume_from_checkpoint`: a folder anywhere, or the newest intact one here; None for a fresh start."""
    name, output = cfg.resume_from_checkpoint, Path(cfg.output_dir)
    if name is None or (name == "latest" and not list_checkpoints(output)):
        return None
    found = list_checkpoints(output) if name == "latest" else [Path(name), output / name]
    found = [path for path in found if os.path.isdir(path)]
    require(bool(found), f"--resume_from_checkpoint {name} is not a folder; use a checkpoint-N folder or 'latest'")
    intact = next(filter(None, map(read_checkpoint, reversed(found))), None)
    what = "is damaged or not a checkpoint of this version; choose another, or start over with --overwrite_output_dir"
    require(intact is not None, f"--resume_from_checkpoint {name}: {found[-1]} {what}")
    return intact


def is_own(path: str) -> bool:
    """Tell whether a path relative to the output folder is at a place that the run itself uses."""
    name = path.split(os.sep)[0]
    return name in (*RUN_FILES, "validation", ".lock") or re.match(r"(superseded-)?checkpoint-\d", name) is not None


def check_output(cfg: Config, checkpoint: Checkpoint | None) -> None:
    """Reject an output folder that is a file, holds another run, or holds other programs' files under our names."""
    output = Path(cfg.output_dir)
    for path in (output, *output.parents):
        is_folder = not os.path.lexists(path) or path.is_dir()
        require(is_folder, f"--output_dir {output}: {path} is not a folder; choose another")
    settings, checkpoints = {}, list_checkpoints(output)
    with contextlib.suppress(UserError):
        settings = read_json_object("", output / "config.json")  # of an earlier run here
    present = [name for name in RUN_FILES if os.path.lexists(output / name)]
    numbered = [path for path in sorted(output.glob("checkpoint-*")) if re.fullmatch(r"checkpoint-\d+", path.name)]
    rest = [path for path in numbered if path not in checkpoints]
    foreign = [path.name for path in rest if not is_half_checkpoint(path)]
    foreign += [] if "environment" in settings else present
    names = ", ".join(foreign)
    require(not foreign, f"--output_dir {output} contains {names}, not written by this script; choose another")
    is_free = not is_own(os.path.normpath(cfg.logging_dir))
    require(is_free, f"--logging_dir {cfg.logging_dir} is a name that the run itself uses; choose another")
    has_steps = "metrics.jsonl" in present and (output / "metrics.jsonl").stat().st_size > 0
    has_steps |= any((path / LORA_FILE).exists() for path in rest)
    is_begun = bool(checkpoints) or LORA_FILE in present or (has_steps and cfg.resume_from_checkpoint != "latest")
    is_resumed = checkpoint is not None and checkpoint.folder.resolve().parent == output.resolve()
    is_demo = cfg.demo and settings.get("demo") is True
    is_free = is_resumed or is_demo or cfg.overwrite_output_dir or not is_begun
    remedy = "with --resume_from_checkpoint latest, replace it with --overwrite_output_dir, or choose another folder"
    require(is_free, f"--output_dir {output} contains another run; resume it {remedy}")


def check_nesting(cfg: Config) -> None:
    """Reject folders inside an image folder, because generated images there would be trained on."""
    names = ("instance_data_dir", "dataset_name", "class_data_dir", "output_dir", "cache_dir")
    folders = {name: Path(getattr(cfg, name)).resolve() for name in names if getattr(cfg, name) is not None}
    folders["logging_dir"] = Path(cfg.output_dir, cfg.logging_dir).resolve()  # wandb copies validation images
    for (outer, above), (inner, below) in itertools.permutations(folders.items(), 2):
        is_source = outer in names[:3] and (above.is_dir() or outer == "class_data_dir")
        remedy = "where every image is trained on; choose a folder outside it"
        require(not (is_source and below.is_relative_to(above)), f"--{inner} is inside --{outer} {above}, {remedy}")
    for name in (*names[:3], "init_lora", "training_adapter") if cfg.overwrite_output_dir or cfg.demo else ():
        path, home = Path(getattr(cfg, name) or os.sep).resolve(), folders["output_dir"]
        is_lost = path.exists() and path.is_relative_to(home) and is_own(f"{path.relative_to(home)}")
        require(not is_lost, f"--{name} {path} is part of the earlier run, which would be deleted; copy it elsewhere")


def hold_output(output: Path) -> contextlib.AbstractContextManager[Any]:
    """Lock the output folder, on the main process. Raises UserError if another live run holds the lock."""
    if os.environ.get("RANK", "0") != "0":
        return contextlib.nullcontext()
    holder = output / ".lock-holder"
    with explained(f"--output_dir {output} cannot be used", "choose another folder"):
        try:
            held = FileLock(output / ".lock", blocking=False).acquire()
        except Timeout as error:
            who = read_text(holder) if holder.is_file() else "another process"
            raise UserError(f"--output_dir {output} is in use by {who}; wait for it, or choose another") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            held = contextlib.nullcontext()
            say(f"warning: the disk of --output_dir {output} has no file locks; start no second run there")
        write_file(holder, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return held


def weight_files(component: Path, variant: str | None) -> list[Path]:
    """List a component's weight files of one variant: NAME.safetensors, NAME.VARIANT.safetensors, or their shards."""
    middle = f".{re.escape(variant)}" if variant else ""
    name = re.compile(rf"(?:diffusion_pytorch_)?model({middle}(-\d+-of-\d+)?|(-\d+-of-\d+)?{middle})\.safetensors")
    return sorted(path for path in component.glob("*.safetensors") if name.fullmatch(path.name))


def check_components(model: Path, cfg: Config) -> None:
    """Reject an incomplete model folder, naming what is missing or truncated; a dry run needs no weights."""
    variant = cfg.variant
    advice = "--pretrained_model_name_or_path needs a complete folder in diffusers format, or a Hub name"
    for component, file in COMPONENTS.items():
        require((model / component / file).is_file(), f"{model} has no {component}/{file}; {advice}")
        weights = weight_files(model / component, variant)
        names = ", ".join(sorted(path.name for path in (model / component).glob("*.safetensors")))
        wanted = f"for --variant {variant}, only {names or 'none'}" if variant else f"(*.safetensors); {advice}"
        is_absent = cfg.dry_run and not names
        require(bool(weights) or is_absent or file != "config.json", f"{model}/{component} has no weights {wanted}")
        for path in weights:
            with explained(f"{path} is damaged or not fully downloaded", advice), safe_open(path, "numpy"):
                pass
        for path in sorted((model / component).glob("*.json")):
            content, is_index = read_json_object(str(path), path), path.match("*.index.json")
            is_index = path.match(f"*.index.{variant}.json") if variant else is_index
            with explained(f"{path} is damaged", advice):
                shards = set(content["weight_map"].values()) if is_index else set()
            missing = sorted(shard for shard in shards if not (model / component / shard).is_file())
            require(not missing or is_absent, f"{model}/{component} is missing {', '.join(missing)}; {advice}")
    vocabularies = [model / "tokenizer" / name for name in ("tokenizer.json", "vocab.json")]
    require(any(path.is_file() for path in vocabularies), f"{model}/tokenizer has no tokenizer.json; {advice}")


def check_model(cfg: Config) -> None:
    """Reject a name that is neither a complete model folder nor a possible Hub name, and a LoRA that is no file."""
    name, lora, adapter = cfg.pretrained_model_name_or_path, cfg.init_lora, cfg.training_adapter or ""
    is_file = lora is None or (Path(lora).suffix == ".safetensors" and Path(lora).is_file())  # no pickles
    require(is_file, f"--init_lora {lora} is not a .safetensors file; specify one")
    is_file = not adapter.endswith(".safetensors") or Path(adapter).is_file()  # else a Hub name
    require(is_file, f"--training_adapter {adapter} is not a file")
    if os.path.exists(name):
        return check_components(Path(name), cfg)
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")
    require(is_name, f"--pretrained_model_name_or_path {name} does not exist and is not a Hub name (USER/MODEL)")


def read_bnb_settings(cfg: Config) -> dict[str, Any]:
    """Read the JSON of `--bnb_quantization_config_path`; empty without one. Raises UserError if it is not usable."""
    if cfg.bnb_quantization_config_path is None:
        return {}
    name = f"--bnb_quantization_config_path {cfg.bnb_quantization_config_path}"
    settings = read_json_object(name, Path(cfg.bnb_quantization_config_path))
    bits = [settings.get(f"load_in_{count}bit") is True for count in (4, 8)]
    require(sum(bits) == 1, f"{name} must set exactly one of load_in_4bit and load_in_8bit to true")
    return settings


def needed_packages(cfg: Config) -> dict[str, Any]:
    """Map the optional packages to whether the run needs them."""
    is_open = cfg.fit is not None or cfg.dry_run
    return {
        "datasets": cfg.dataset_name, "prodigyopt": cfg.optimizer == "prodigy",
        "torchao": is_open or cfg.storage in ("fp8", "int8") or read_bnb_settings(cfg).get("load_in_8bit"),
        "bitsandbytes": is_open or cfg.storage in ("nf4", "bitsandbytes") or cfg.has_8bit_state,
        "wandb": "wandb" in cfg.trackers, "tensorboard": "tensorboard" in cfg.trackers,
    }  # fmt: skip


def check_packages(cfg: Config) -> None:
    """Reject settings whose optional package is not installed, with the command that installs it."""
    for package, is_needed in needed_packages(cfg).items():
        is_there = not is_needed or getattr(importlib.util.find_spec(package), "origin", None) is not None
        require(is_there, f"the package {package} is required but not installed: pip install {package}")


def check_launch(cfg: Config) -> None:
    """Reject accelerate settings that this script or Z-Image does not support."""
    source = "accelerate configuration:"
    require(os.environ.get("ACCELERATE_MIXED_PRECISION") != "fp16", NO_FP16.format(source))
    for name in ("USE_DEEPSPEED", "USE_MEGATRON_LM"):
        require(not is_on(f"ACCELERATE_{name}"), f"{source} {name} is not supported; multi-GPU, FSDP, and dynamo are")
    if not is_on("ACCELERATE_USE_FSDP"):
        return
    for name, value in {"version": "2", "cpu_ram_efficient_loading": "false", "offload_params": "false"}.items():
        is_set = os.environ.get(f"FSDP_{name.upper()}", "1" if name == "version" else "false") == value
        require(is_set, f"{source} only fsdp_{name}: {value} is supported; change it there")
    twice = "FSDP's activation checkpointing would sample --lora_dropout twice and corrupt the gradient; turn one off"
    require(cfg.lora_dropout == 0 or not uses_fsdp_checkpointing(), twice)
    unsharded = {
        "--quantization": cfg.quantization, "--do_fp8_training": cfg.do_fp8_training,
        "--bnb_quantization_config_path": cfg.bnb_quantization_config_path,
        "--use_8bit_adam": cfg.has_8bit_state, "--optimizer prodigy": cfg.optimizer == "prodigy",
    }  # fmt: skip
    names = ", ".join(name for name, is_given in unsharded.items() if is_given)
    require(not names, f"FSDP does not support {names}; remove it, or select multi-GPU in accelerate config")


def make_binding(cfg: Config, contents: dict[str, str], plan: Plan) -> dict[str, Any]:
    """List the settings and data that must not change when a run resumes from a checkpoint."""
    bound = (
        "seed", "rank", "lora_layers", "lora_dropout", "optimizer", "resolution", "repeats", "center_crop",
        "random_flip", "cache_latents", "max_sequence_length", "gradient_accumulation_steps", "mixed_precision",
        "quantization", "do_fp8_training", "weighting_scheme", "logit_mean", "logit_std", "mode_scale",
        "stratified_noise", "timestep_shift", "prior_loss_weight", "caption_dropout", "masked_loss", "mask_background",
    )  # fmt: skip
    samples = [*plan.samples, *plan.held_out]
    masks = [sample.mask and sha256(sample.mask.read_bytes()) for sample in samples]
    uses = [(one.digest, one.bucket, one.prompt, one.is_prior, mask) for one, mask in zip(samples, masks)]
    images = [f"{sha256(json.dumps(use).encode())} {sample.path.name}" for use, sample in zip(uses, samples)]
    model, adapter = sha256(json.dumps(contents).encode())[:12], cfg.training_adapter
    return {f"--{name}": getattr(cfg, name) for name in bound} | {
        "--lora_alpha": cfg.lora_alpha or cfg.rank, "--use_8bit_adam": cfg.has_8bit_state,
        "--prior_preservation": cfg.prior_kind, "--holdout": cfg.holdout or None,
        "--training_adapter": sha256(Path(adapter).read_bytes())[:12] if os.path.isfile(adapter or "") else adapter,
        "--bnb_quantization_config_path": read_bnb_settings(cfg), "--init_lora": "given" if cfg.init_lora else None,
        "images": images, "--train_batch_size x processes": plan.schedule.micro_batch,
    } | ({"--pretrained_model_name_or_path (a hash of its files)": model} if contents else {})  # fmt: skip


def check_continuity(cfg: Config, checkpoint: Checkpoint, binding: dict[str, Any]) -> None:
    """Reject data or settings that differ from the checkpoint's, unless `--resume_anyway` allows it."""
    old = checkpoint.state["binding"]
    pairs = {name: (now, old.get(name)) for name, now in binding.items() if now != old.get(name)}
    changed = {name: f"{name} {now!s:.200} (was {before!s:.200})" for name, (now, before) in pairs.items()}
    if "images" in changed:
        names = sorted({line[65:] for line in set(binding["images"]) ^ set(old["images"])})
        changed["images"] = f"images, captions: {', '.join(names[:10]) or 'other order'}{', ...' * (len(names) > 10)}"
    is_possible = not changed.keys() & {"--rank", "--lora_layers", "--optimizer", "--use_8bit_adam"}
    remedy = "Restore them" + ", or add --resume_anyway if the change is intended" * is_possible
    problem = f"{checkpoint.folder} was saved with different settings or data: {'; '.join(changed.values())}. {remedy}"
    require(not changed or (is_possible and cfg.resume_anyway), problem)
    say(*(f"--resume_anyway: {change}" for change in changed.values()))


def make_plan(cfg: Config) -> Plan:
    """Check the settings, then make and print the plan, without torch. Raises UserError if it cannot work."""
    check_launch(cfg)
    check_packages(cfg)
    read_bnb_settings(cfg)
    checkpoint = find_checkpoint(cfg)
    check_output(cfg, checkpoint)
    check_nesting(cfg)
    check_model(cfg)
    say(*advice(cfg))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    scratch = tempfile.TemporaryDirectory(prefix="z-image-") if cfg.dry_run else contextlib.nullcontext(cfg.cache_dir)
    with scratch as cache_dir:
        cached = dataclasses.replace(cfg, cache_dir=cache_dir)
        with explained(f"the cache folder {cfg.encodings_folder} cannot be used", "choose another --cache_dir"):
            cached.encodings_folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cached.encodings_folder).close()
        samples, held_out = hold_out(plan_samples(cached), cfg)
    schedule = make_schedule(cfg, samples, processes, checkpoint.step if checkpoint else 0)
    say(*describe_plan(samples, cfg, schedule))
    say(*[f"held out: {', '.join(str(sample.path) for sample in held_out)}"] * bool(held_out))
    return Plan(samples, schedule, checkpoint, held_out)


def run_or_exit(conductor: Callable[..., Any], cfg: Config, *more: Any) -> Any:
    """Run part of the program; exit with one sentence, not a traceback, on an error that the user can fix."""
    try:
        return conductor(cfg, *more)
    except (UserError, FloatingPointError, OSError, Stopped) as error:  # OSError: disk full, no permission
        sentence, status = (str(error), 128 + error.number) if isinstance(error, Stopped) else (f"error: {error}", 2)
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OSError) or error.__cause__:  # may be local
            print(printable(redact(sentence, cfg)), file=sys.stderr, flush=True)
        if isinstance(error, Stopped) and not IS_INTERACTIVE:
            sys.stdout.flush()
            os._exit(status)  # a regular exit waits for other processes, forever if their launcher has died
        sys.exit(status)


RUN_AS_SCRIPT = __name__ == "__main__" and "__file__" in globals()  # false when pasted into a notebook cell
IS_INTERACTIVE = hasattr(sys, "ps1")  # Jupyter's %run, whose kernel must survive
PARENT = os.getppid()  # before the imports, during which it may die
if RUN_AS_SCRIPT:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and not IS_INTERACTIVE:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # outside training, Ctrl-C ends without a traceback
    CONFIG = parse_config()  # before the slow imports, so that --help and mistyped flags respond at once
    sys.argv[1:] = [redact(argument, CONFIG) for argument in sys.argv[1:]]  # wandb records them
    PLAN = None if CONFIG.demo else run_or_exit(make_plan, CONFIG)  # also before the imports
    for PACKAGE in ("bitsandbytes", "torchao"):  # peft and diffusers would import them for nothing
        if not needed_packages(CONFIG)[PACKAGE]:
            sys.modules.setdefault(PACKAGE, None)

logging.disable(logging.WARNING)  # hide irrelevant import warnings from torchao and diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState, cpu_offload
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, LoggerType, ProjectConfiguration
from accelerate.utils import gather_object, reduce as reduce_tensor, send_to_device
from diffusers import AutoencoderKL, BitsAndBytesConfig, FlowMatchEulerDiscreteScheduler, TorchAoConfig
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_z_image import FeedForward, ZImageTransformerBlock
from diffusers.optimization import get_scheduler
from diffusers.quantizers import DiffusersAutoQuantizer
from diffusers.training_utils import cast_training_params, free_memory
from diffusers.training_utils import compute_loss_weighting_for_sd3 as loss_weights
from diffusers.utils import logging as diffusers_logging, make_image_grid
from huggingface_hub import HfApi, ModelCardData, snapshot_download
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear, LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # documented, in spite of the underscore
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3Model

logging.disable(logging.NOTSET)
for library in (transformers.logging, diffusers_logging):
    library.set_verbosity_error()
    library.disable_progress_bar()


# ==== Encoders and caches ============================================================================================

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "no": torch.float32}
SAVED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}  # as safetensors calls them
LOADER_TIMEOUT = 600  # seconds
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
CENTER = (0.5, 0.5)


class Batch(NamedTuple):
    """One micro-batch of one process, on its device."""

    seeds: list[int]  # of the noise of each example
    sigmas: Tensor  # (B,) in fp32: the noise levels, 1 being pure noise
    latents: Tensor  # (B, 16, h, w) in fp32
    prompt_embeds: list[Tensor]  # B of (L_i, 2560)
    is_prior: list[bool]
    masks: Tensor | None  # (B, 1, h, w): the weight of each place, with --masked_loss
    names: list[str]  # of the images


class Encodings(NamedTuple):
    """The encoding model and its cache files, each named by a hash of its inputs."""

    cfg: Config
    model: Path
    contents: dict[str, str]  # a hash of the files of each component

    def prompt(self, prompt: str) -> Path:
        """Return the file with a prompt's embedding (L, 2560)."""
        encoder = [self.contents["tokenizer"], self.contents["text_encoder"], self.cfg.mixed_precision]
        return cache_file(self.cfg, "prompts", *encoder, self.cfg.max_sequence_length, prompt)

    def latents(self, sample: Sample, is_flipped: bool) -> Path:
        """Return the file with the latents (16, h, w) of an image cropped at its center."""
        image = (sample.digest, sample.bucket, is_flipped)
        return cache_file(self.cfg, "latents", self.contents["vae"], self.cfg.mixed_precision, *image)


def find_model(cfg: Config) -> Path:
    """Resolve the model to a local folder; the first process of each machine downloads it."""
    name = cfg.pretrained_model_name_or_path
    if Path(name).is_dir():
        return Path(name)
    weights = "*.safetensors" if cfg.variant is None else f"*.{cfg.variant}[.-]*safetensors"
    parts = ["*.json", "tokenizer/*"]
    parts += [f"{part}/{weights}" for part in ("text_encoder", "vae", "transformer") if not cfg.dry_run]
    problem = f"--pretrained_model_name_or_path {name} is not a local folder and cannot be downloaded"
    options = {"revision": cfg.revision, "token": cfg.hub_token, "allow_patterns": parts}
    with PartialState().local_main_process_first(), explained(problem, "check the name and the network"):
        if cfg.cache_dir is not None and not cfg.dry_run:
            with contextlib.suppress(Exception):  # a complete copy in the usual cache
                folder = Path(snapshot_download(name, **options, local_files_only=True))
                check_components(folder, cfg)
                return folder
        folder = Path(snapshot_download(name, **options, cache_dir=None if cfg.dry_run else cfg.cache_dir))
    check_components(folder, cfg)
    return folder


def fingerprint(path: Path) -> str:
    """Hash a file: a small one completely, a large one by its size and 4 KiB of every 4 MiB."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size < 2**24:
            return sha256(file.read())
        digest = hashlib.sha256(str(size).encode())
        for start in range(0, size, 2**22):  # the weight matrices of Z-Image's blocks are larger than that
            file.seek(start)
            digest.update(file.read(2**12))
    return digest.hexdigest()


def resolve_timestep_shift(cfg: Config, model: Path) -> Config:
    """Write `--timestep_shift` in one way, and replace `scheduler` by the value of the model's scheduler."""
    shift = cfg.timestep_shift
    if shift == "scheduler":
        settings = FlowMatchEulerDiscreteScheduler.load_config(model / "scheduler")
        shift = None if settings.get("use_dynamic_shifting") else settings.get("shift")
        require(shift is not None, "--timestep_shift scheduler: this model has no shift that fits all image sizes")
    return dataclasses.replace(cfg, timestep_shift=f"{float(shift):g}")


def identify(model: Path, variant: str | None) -> dict[str, str]:
    """Hash the files from which each component of the model is loaded."""
    contents = {}
    for name in COMPONENTS:
        files = [path for path in sorted((model / name).glob("[!.]*")) if path.suffix in (".json", ".jinja", ".txt")]
        files += weight_files(model / name, variant)
        contents[name] = sha256(json.dumps([(path.name, fingerprint(path)) for path in files]).encode())
    return contents


def reject_missing(names: list[str] | set[str], component: Path) -> None:
    """Reject a component with missing weights, which libraries leave random or empty."""
    require(not names, f"{component} has no weights for {', '.join(sorted(names)[:3])}; download it again")


def read_text_encoder_config(model: Path) -> Qwen3Config:
    """Describe Qwen3 without its last layer: Z-Image reads `hidden_states[-2]`."""
    config = Qwen3Config.from_pretrained(model / "text_encoder")
    config.num_hidden_layers -= 1
    config.layer_types = config.layer_types and config.layer_types[: config.num_hidden_layers]
    return config


def load_text_encoder(model: Path, cfg: Config) -> nn.Module:
    """Load Qwen3 without its last layer and norm, which Z-Image does not read."""
    with explained(f"{model}/text_encoder cannot be loaded"):
        config = read_text_encoder_config(model)
        options = {"variant": cfg.variant, "dtype": DTYPES[cfg.mixed_precision], "output_loading_info": True}
        text_encoder, report = Qwen3Model.from_pretrained(model / "text_encoder", config=config, **options)
    reject_missing(report["missing_keys"], model / "text_encoder")
    text_encoder.norm = nn.Identity()
    return put_on_device(text_encoder, cfg)


def put_on_device(module: nn.Module, cfg: Config) -> nn.Module:
    """Move a module to the device; with `--offload`, its weights stay in host memory and visit it one by one."""
    device = PartialState().device
    if not cfg.offload:
        return module.eval().to(device)
    return cpu_offload(module.eval(), device if device.type != "cpu" else "cpu")  # cpu:0 would confuse accelerate


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module works; the weights of an offloaded one are on the meta device."""
    return PartialState().device if module.device.type == "meta" else module.device


def tokenize(prompts: list[str], model: Path, max_sequence_length: int) -> dict[str, list[int]]:
    """Map every prompt to its tokens, as `ZImagePipeline` does; warn about truncation."""
    with explained(f"{model}/tokenizer cannot be loaded"):
        tokenizer, tokens = AutoTokenizer.from_pretrained(model / "tokenizer"), {}
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    for prompt in dict.fromkeys(prompts):
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)
        whole = tokenizer(chat).input_ids
        tokens[prompt] = whole[:max_sequence_length]
        if len(whole) > max_sequence_length:
            limit = f"{len(whole)} tokens exceeds --max_sequence_length {max_sequence_length}"
            say(f"warning: a prompt of {limit}; cut off: {tokenizer.decode(whole[max_sequence_length:])[:200]!r}")
    return tokens


@torch.no_grad()
def encode_prompt(text_encoder: nn.Module, tokens: list[int]) -> Tensor:
    """Encode one prompt at its true length, as `ZImagePipeline` does. -> (L, 2560)"""
    input_ids = torch.tensor([tokens], device=device_of(text_encoder))  # (1, L)
    return text_encoder(input_ids=input_ids).last_hidden_state[0]


def load_vae(model: Path, cfg: Config) -> AutoencoderKL:
    """Load the VAE."""
    with explained(f"{model}/vae cannot be loaded"):
        options = {"variant": cfg.variant, "torch_dtype": DTYPES[cfg.mixed_precision]}
        vae = AutoencoderKL.from_pretrained(model / "vae", **options)
    reject_missing([name for name, weight in vae.named_parameters() if weight.is_meta], model / "vae")
    return put_on_device(vae, cfg)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Encode pixels in [-1, 1] to the mode of their latents, scaled. (B, 3, H, W) -> (B, 16, h, w) in fp32"""
    latents = vae.encode(pixels.to(device_of(vae), vae.dtype)).latent_dist.mode().float()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def sample_augmentation(cfg: Config, number: int) -> tuple[bool, tuple[float, float]]:
    """Sample whether an example is flipped, and where it is cropped: from the top left (0, 0) to (1, 1)."""
    chance = random.Random(derive_seed(cfg.seed, "augmentation", number))
    is_flipped, centering = chance.random() < 0.5, (chance.random(), chance.random())
    return is_flipped and cfg.random_flip, CENTER if cfg.center_crop or cfg.cache_latents else centering


def sample_quantile(cfg: Config, number: int) -> float:
    """Choose an example's place among all noise levels, 0 to 1, by the golden ratio (Niederreiter 1992) or freely."""
    start = random.Random(derive_seed(cfg.seed, "sigma", 0 if cfg.stratified_noise else number)).random()
    return (start + number * (math.sqrt(5) - 1) / 2) % 1 if cfg.stratified_noise else start


def noise_levels(quantiles: list[float], cfg: Config) -> Tensor:
    """Map quantiles to continuous noise levels, 1 being pure noise. -> (B,)

    The densities are Stable Diffusion 3's (arXiv 2403.03206, section 3.1): a positive logit_mean means more noise. The
    shift is FlowMatchEulerDiscreteScheduler's. Levels are clamped to at least 1/1000: sigma_sqrt divides by them.
    """
    levels = torch.tensor(quantiles, dtype=torch.float64)  # of the uniform distribution
    if cfg.weighting_scheme == "logit_normal":
        levels = (cfg.logit_mean + cfg.logit_std * torch.special.ndtri(levels)).sigmoid()
    elif cfg.weighting_scheme == "mode":
        levels = 1 - levels - cfg.mode_scale * ((math.pi / 2 * levels).cos() ** 2 - 1 + levels)
    shift = float(cfg.timestep_shift)
    return (shift * levels / (1 + (shift - 1) * levels)).clamp(1e-3, 1.0).float()


def choose_prompt(sample: Sample, cfg: Config, number: int) -> str:
    """Choose the prompt of an example: that of its image or, for a share of the instance images, an empty one."""
    is_dropped = random.Random(derive_seed(cfg.seed, "caption", number)).random() < cfg.caption_dropout
    return "" if is_dropped and not sample.is_prior else sample.prompt


def load_pixels(sample: Sample, is_flipped: bool, centering: tuple[float, float] = CENTER) -> Tensor:
    """Load an image scaled to cover its bucket, cropped, and possibly flipped. -> (3, H, W) in [-1, 1]"""
    height, width = sample.bucket
    with explained(f"{sample.path} cannot be read any more", "restore it, and start or resume the run"):
        content = sample.path.read_bytes()
        require(sha256(content) == sample.digest, f"{sample.path} has changed since the start; start again")
        whole = load_image(io.BytesIO(content))
    image = ImageOps.fit(whole, (width, height), Image.Resampling.LANCZOS, centering=centering)
    image = ImageOps.mirror(image) if is_flipped else image
    return image_tensor(image).permute(2, 0, 1).float() / 127.5 - 1


def load_mask(sample: Sample, is_flipped: bool, centering: tuple[float, float], background: float) -> Tensor:
    """Load a mask, cropped and flipped as its image is, in the size of the latents. -> (1, h, w) in [background, 1]"""
    height, width = sample.bucket[0] // 8, sample.bucket[1] // 8
    if sample.mask is None:
        return torch.ones(1, height, width)
    if sample.mask == sample.path:
        with Image.open(sample.path) as image:
            mask = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    else:
        mask = load_image(sample.mask, "black").convert("L")
    mask = ImageOps.fit(mask, (width, height), Image.Resampling.BOX, centering=centering)
    mask = ImageOps.mirror(mask) if is_flipped else mask
    levels = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(1, height, width) / 255
    return background + (1 - background) * levels


def fulfill(future: Future, load: Callable[..., Any], job: tuple[Any, ...]) -> None:
    """Put the result of a call, or what it raises, into a future."""
    try:
        future.set_result(load(*job))
    except BaseException as error:
        future.set_exception(error)


def load_ahead(load: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], count: int) -> Iterator[Any]:
    """Call a function with the arguments of each job, in threads, `count` jobs ahead; yield the results in order."""
    pending = collections.deque()
    for job in itertools.chain(jobs, [None] * count):
        if job is not None:
            pending.append(Future())
            # an executor's threads would keep the program from ending while a file hangs
            threading.Thread(target=fulfill, args=(pending[-1], load, job), daemon=True).start()
        if pending and (job is None or len(pending) > count):
            with explained("images cannot be loaded", "check their disk, and resume the run"):
                yield pending.popleft().result(LOADER_TIMEOUT)


def image_tensor(image: Image.Image) -> Tensor:
    """Copy the pixels of an RGB image. -> (H, W, 3) of uint8"""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def any_process(condition: bool) -> bool:
    """Tell whether a condition holds on any process; all must call this together."""
    state = PartialState()
    if state.num_processes == 1:
        return condition
    return bool(reduce_tensor(torch.tensor(float(condition), device=state.device), "sum"))


def share_of(items: list[Any], is_even: bool = False) -> list[Any]:
    """Return this process's share of the work, split within the machine: others may have their own disks."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))
    if is_even:  # repeat some: FSDP needs equally many forward passes on every process
        items = list(itertools.islice(itertools.cycle(items), math.ceil(len(items) / processes) * processes))
    return items[PartialState().local_process_index :: processes]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a sealed file from their own memory; wide types first, so that each tensor is aligned."""
    header, contents, end = {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": SAVED[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
        contents.append(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    write_sealed(path, metadata or {}, header, *contents)


def fill_prompts_cache(tokens: dict[str, list[int]], encodings: Encodings) -> None:
    """Encode the prompts that are not cached yet; load the text encoder only if needed, and free it."""
    mine = [prompt for prompt in share_of([*tokens]) if read_sealed(encodings.prompt(prompt)) is None]
    if mine:
        text_encoder = load_text_encoder(encodings.model, encodings.cfg)
        for prompt in progress_bar(mine, "encoding prompts"):
            prompt_embeds = encode_prompt(text_encoder, tokens[prompt])
            write_tensors(encodings.prompt(prompt), {"prompt_embeds": prompt_embeds})
        del text_encoder
        free_memory()
    if not any_process(bool(mine)):
        say("prompts: all cached, the text encoder is not loaded")


def fill_latents_cache(samples: list[Sample], encodings: Encodings) -> None:
    """Encode the images that are not cached yet, and their flipped copies; load the VAE only if needed."""
    flips = (False, True) if encodings.cfg.random_flip else (False,)
    jobs = {encodings.latents(*job): job for job in itertools.product(samples, flips)}
    mine = [jobs[file] for file in share_of([*jobs]) if read_sealed(file) is None]
    if mine:
        vae = load_vae(encodings.model, encodings.cfg)
        for job, pixels in zip(progress_bar(mine, "encoding images"), load_ahead(load_pixels, mine, 1)):
            write_tensors(encodings.latents(*job), {"latents": encode_images(vae, pixels[None])[0]})
        del vae
        free_memory()
    if not any_process(bool(mine)) and encodings.cfg.cache_latents:
        say("latents: all cached, the VAE is not loaded for training")


def load_batch(examples: list[Example], samples: list[Sample], encodings: Encodings) -> Batch:
    """Load a micro-batch from disk; without cached latents, `latents` still holds pixels."""
    cfg, chosen = encodings.cfg, [samples[index] for _, index in examples]
    images, prompt_embeds, masks = [], [], []
    for (number, _), sample in zip(examples, chosen):
        is_flipped, centering = sample_augmentation(cfg, number)
        with explained(f"{sample.path} or its encoding cannot be read any more", "restore it, and resume the run"):
            if cfg.cache_latents:
                images.append(load_file(encodings.latents(sample, is_flipped))["latents"])
            else:
                images.append(load_pixels(sample, is_flipped, centering))
            if cfg.masked_loss:
                masks.append(load_mask(sample, is_flipped, centering, cfg.mask_background))
            prompt_embeds.append(load_file(encodings.prompt(choose_prompt(sample, cfg, number)))["prompt_embeds"])
    return Batch(
        seeds=[derive_seed(cfg.seed, "noise", number) for number, _ in examples],
        sigmas=noise_levels([sample_quantile(cfg, number) for number, _ in examples], cfg),
        latents=torch.stack(images), prompt_embeds=prompt_embeds, is_prior=[sample.is_prior for sample in chosen],
        masks=torch.stack(masks) if masks else None, names=[str(sample.path) for sample in chosen],
    )  # fmt: skip


def make_batches(samples: list[Sample], encodings: Encodings, step: int) -> Iterator[Batch]:
    """Yield this process's slice of every micro-batch after optimizer step `step`, without end, on the device."""
    cfg, state = encodings.cfg, PartialState()
    size, rank = cfg.train_batch_size, state.process_index
    batches = micro_batches(samples, cfg, size * state.num_processes)
    batches = itertools.islice(batches, step * cfg.gradient_accumulation_steps, None)
    jobs = ((batch[rank * size : (rank + 1) * size], samples, encodings) for batch in batches)
    vae = None if cfg.cache_latents else load_vae(encodings.model, cfg)
    for batch in load_ahead(load_batch, jobs, cfg.dataloader_num_workers):
        latents = batch.latents if vae is None else encode_images(vae, batch.latents)
        yield send_to_device(batch._replace(latents=latents), state.device)


# ==== Transformer and LoRA ===========================================================================================

BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+")
FP8, MIN_FP8_ROWS = torch.float8_e4m3fn, 256  # cuBLAS rejects products of fewer rows (and it would gain nothing)
LAYER_ALIASES = {"ff.net.0.proj": ("w1", "w3"), "ff.net.2": ("w2",)}  # their names in diffusers' other transformers


def to_fp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Round to fp8, each row scaled to fill its range. (M, K) -> (M, K) of e4m3, (M, 1) of fp32 to multiply it by"""
    largest = torch.linalg.vector_norm(tensor, math.inf, dim=-1, keepdim=True)  # (M, 1)
    scale = (torch.finfo(FP8).max / largest.double().clamp(min=1e-12)).float()
    return (tensor * scale).to(FP8), 1 / scale


def multiply_fp8(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    """Multiply scaled fp8 matrices. (M, K) with (M, 1), column-major (K, N) with (1, N) -> (M, N) of bf16"""
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(left, right, left_scale, by_row, right_scale, by_row, output_dtype=torch.bfloat16)


def dequantize(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize a torchao or bitsandbytes weight. -> (N, K)"""
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return (weight.data * (weight.SCB / 127)[:, None] if hasattr(weight, "SCB") else weight.dequantize()).to(dtype)


class FrozenProduct(torch.autograd.Function):
    """x W^T for a frozen weight; it saves only the stored weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, has_fp8_products: bool) -> Tensor:
        """Multiply. (..., K) -> (..., N)"""
        has_fp8_products &= x.shape[:-1].numel() >= MIN_FP8_ROWS
        ctx.weight, ctx.has_fp8_products, ctx.dtype = weight, has_fp8_products, x.dtype
        if not has_fp8_products:
            return F.linear(x, dequantize(weight, x.dtype))
        rows, rows_scale = to_fp8(x.flatten(0, -2))
        product = multiply_fp8(rows, weight.qdata.t(), rows_scale, weight.scale.t())
        return product.to(weight.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Compute the gradient of the input; the weight has none. (..., N) -> (..., K)"""
        weight = ctx.weight
        if not ctx.has_fp8_products:
            return gradient @ dequantize(weight, ctx.dtype), None, None
        rows, rows_scale = to_fp8(gradient.flatten(0, -2) * weight.scale.t())  # W's scales run along the summed axis
        turned = weight.qdata.t().contiguous().t()  # column-major, as the product requires
        product = multiply_fp8(rows, turned, rows_scale, torch.ones(1, weight.shape[1], device=weight.device))
        return product.to(ctx.dtype).unflatten(0, gradient.shape[:-1]), None, None


class LeanNorm(torch.autograd.Function):
    """x / rms(x) * weight; it saves x in its own dtype and one number per row, not copies in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalize. (..., D) -> (..., D)"""
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, inverse, weight)
        return (x * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Compute the gradient of the input; the weight has none. (..., D) -> (..., D)"""
        x, inverse, weight = ctx.saved_tensors
        direction, gradient = x * inverse, gradient * weight
        along = (gradient * direction).mean(-1, keepdim=True)  # (..., 1)
        return (inverse * (gradient - direction * along)).to(x.dtype), None, None


class LeanRMSNorm(RMSNorm):
    """An RMSNorm with a frozen weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer. (..., D) -> (..., D)"""
        return LeanNorm.apply(hidden_states, self.weight, self.eps)


class LeanFeedForward(FeedForward):
    """The feed-forward layers of a block; they save two of their four wide tensors, and recompute the others."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers. (..., D) -> (..., D)"""
        return checkpoint(self.join, self.w1(x), self.w3(x), use_reentrant=False)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """Gate and project. (..., H), (..., H) -> (..., D)"""
        return self.w2(F.silu(a) * b)


class LeanLora(LoraLinear):
    """A LoRA whose fp32 matrices are cast to the dtype of the input; PEFT casts the input, and saves the copy."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and the updates of its adapters. (..., K) -> (..., N)"""
        updates = []
        for name in (name for name in self.active_adapters if name in self.lora_A):
            a, b = self.lora_A[name].weight, self.lora_B[name].weight * self.scaling[name]  # (r, K), (N, r)
            updates.append(F.linear(F.linear(self.lora_dropout[name](x), a.to(x.dtype)), b.to(x.dtype)))
        return sum(updates, start=self.base_layer(x))  # not before the updates: it would be held beside their inputs


LEAN = {RMSNorm: LeanRMSNorm, FeedForward: LeanFeedForward, LoraLayer: LeanLora}  # ours, for the same weights


class HalfCheckpointedBlock(ZImageTransformerBlock):
    """A block that recomputes its attention half, which saves more for less work than the other half."""

    def forward(self, x: Tensor, attn_mask: Any, freqs_cis: Tensor, adaln_input: Any = None, *omni: Any) -> Tensor:
        """Apply the block. (B, L, D), (B, L) or None, (B, L, 64), (B, 256) or None -> (B, L, D)"""
        factors = [1.0] * 4
        if self.modulation:
            scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=2)
            factors = [1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()]  # of (B, 1, D)
        x = checkpoint(self.attend, x, *factors[:2], attn_mask, freqs_cis, use_reentrant=False)
        return x + factors[3] * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * factors[2]))

    def attend(self, x: Tensor, scale: Any, gate: Any, attn_mask: Any, freqs_cis: Tensor) -> Tensor:
        """Apply the attention half. (B, L, D) -> (B, L, D)"""
        attended = self.attention(self.attention_norm1(x) * scale, attention_mask=attn_mask, freqs_cis=freqs_cis)
        return x + gate * self.attention_norm2(attended)


class FrozenLinear(nn.Linear):
    """A quantized layer; the libraries' own keep a bf16 weight or fp32 activations for the backward pass."""

    has_fp8_products = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer. (..., K) -> (..., N)"""
        product = FrozenProduct.apply(x, self.weight, self.has_fp8_products)
        return product if self.bias is None else product + self.bias


def make_empty_transformer(model: Path) -> ZImageTransformer2DModel:
    """Build the transformer without weights, on the meta device."""
    with explained(f"{model}/transformer/config.json does not describe Z-Image"), torch.device("meta"):
        return ZImageTransformer2DModel.from_config(ZImageTransformer2DModel.load_config(model / "transformer"))


def loading_options(cfg: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Translate the storage of the frozen weights into options for `from_pretrained`."""
    outside = ["all_x_embedder", "all_final_layer", "t_embedder", "cap_embedder"]  # only the blocks are quantized
    device = PartialState().device
    placement = {"device_map": None if device.type == "cpu" else {"": device}}  # not through host memory
    if cfg.storage in DTYPES:
        return {} if is_on("ACCELERATE_USE_FSDP") else placement  # FSDP moves a shard
    if cfg.storage in ("fp8", "int8"):
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        kind = {"fp8": Float8WeightOnlyConfig, "int8": Int8WeightOnlyConfig}[cfg.storage]
        config = TorchAoConfig(kind(set_inductor_config=False, version=2), modules_to_not_convert=outside)
    else:
        given, known = read_bnb_settings(cfg), inspect.signature(BitsAndBytesConfig).parameters
        unknown = ", ".join(sorted(set(given) - set(known)))
        require(not unknown, f"--bnb_quantization_config_path: unknown {unknown}; there are {', '.join(known)}")
        given = given or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = BitsAndBytesConfig(**{"llm_int8_skip_modules": outside} | given | {"bnb_4bit_compute_dtype": dtype})
    return placement | {"quantization_config": config}


def load_transformer(model: Path, cfg: Config, dtype: torch.dtype) -> ZImageTransformer2DModel:
    """Load the frozen transformer, tensor by tensor, to the device, or to host memory for FSDP."""
    options = {"variant": cfg.variant, "torch_dtype": dtype} | loading_options(cfg, dtype)
    with explained(f"{model}/transformer cannot be loaded"):
        transformer = ZImageTransformer2DModel.from_pretrained(model / "transformer", **options)
    reject_missing([name for name, weight in transformer.named_parameters() if weight.is_meta], model / "transformer")
    freeze_quantized(transformer, cfg)
    transformer.set_attention_backend(cfg.attention_backend)  # always: diffusers keeps that of an earlier run
    return transformer.requires_grad_(False)


def freeze_quantized(transformer: ZImageTransformer2DModel, cfg: Config) -> None:
    """Make quantized layers FrozenLinear, whichever library has quantized them."""
    for module in transformer.modules():
        weight = module.weight if isinstance(module, nn.Linear) else None
        if any(hasattr(weight, name) for name in ("qdata", "quant_state", "SCB")):  # torchao, bnb 4 and 8 bits
            fits = all(side % 16 == 0 for side in weight.shape)  # fp8 matmuls require it
            module.__class__, module.has_fp8_products = FrozenLinear, cfg.do_fp8_training and fits


def prepare_blocks(transformer: ZImageTransformer2DModel, cfg: Config) -> None:
    """Have the layers save less for the backward pass, recompute what the config says, and compile the blocks."""
    for module in transformer.modules():
        module.__class__ = next((ours for theirs, ours in LEAN.items() if isinstance(module, theirs)), type(module))
    blocks = [module for module in transformer.modules() if isinstance(module, ZImageTransformerBlock)]
    if cfg.recomputed == "attention":
        for block in blocks:
            block.__class__ = HalfCheckpointedBlock
    elif cfg.recomputed != "none":
        is_all = cfg.recomputed == "all" or int(cfg.recomputed) >= len(transformer.layers)
        chosen = set(blocks if is_all else transformer.layers[: int(cfg.recomputed)])
        transformer.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(block, *args, use_reentrant=False) if block in chosen else block(*args)
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    for block in blocks if cfg.compile or backend != "no" else ():  # one graph for all sizes keeps resuming exact
        block.compile(backend="inductor" if backend == "no" else backend, dynamic=True)


def expand_range(name: str) -> Iterator[str]:
    """Expand `layers.0-9.attention` to ten names; a name without a range stays as it is."""
    match = re.fullmatch(r"(.+\.)(\d{1,99})-(\d{1,99})(\..+)?", name)
    if match is None or int(match[2]) > int(match[3]):
        return iter([name])
    return (f"{match[1]}{number}{match[4] or ''}" for number in range(int(match[2]), int(match[3]) + 1))


def resolve_lora_layers(lora_layers: str, empty: ZImageTransformer2DModel) -> list[str]:
    """Translate names of layers, of what is around them, or their last parts. Raises UserError if one is unknown."""
    linear = [name for name, module in empty.named_modules() if isinstance(module, nn.Linear)]
    wanted = [name.strip() for name in lora_layers.split(",") if name.strip()]
    require(bool(wanted), "--lora_layers is empty; leave it out for the attention and feed-forward layers")
    chosen = set()
    for name in wanted:
        if name in LAYER_ALIASES:
            say(f"--lora_layers: {name} means {' and '.join(LAYER_ALIASES[name])} in Z-Image")
        for part in LAYER_ALIASES.get(name, expand_range(name)):
            hits = {layer for layer in linear if f".{part}." in f".{layer}."}
            endings = sorted({re.sub(r"^\w+\.\d+\.", "", layer) for layer in linear})
            require(bool(hits), f"--lora_layers: no linear layer matches {part}; choose from {', '.join(endings)}")
            chosen |= hits
    return [layer for layer in linear if layer in chosen]


def check_positions(cfg: Config, samples: list[Sample], tokens: dict[str, list[int]], axes_lens: list[int]) -> None:
    """Reject what exceeds the transformer's tables of positions: one per token, and one per 16 pixels of each side."""
    (length, rows, columns), side = axes_lens, cfg.validation_resolution or cfg.training_side
    for height, width in {(side, side), *(sample.bucket for sample in samples)}:
        limit = f"{height} x {width} is too large for this model, which supports {16 * rows} x {16 * columns} pixels"
        remedy = "lower --resolution, --aspect_ratio_buckets, or --validation_resolution"
        require(height <= 16 * rows and width <= 16 * columns, f"{limit}; {remedy}")
    for prompt, count in ((prompt, len(numbers)) for prompt, numbers in tokens.items()):
        fits = math.ceil(count / 32) * 32 + 2 <= length  # padded, and the image follows
        require(fits, f"{count} tokens are too many for this model; lower --max_sequence_length: {prompt!r}")


def add_lora(transformer: ZImageTransformer2DModel, layers: list[str], cfg: Config) -> list[nn.Parameter]:
    """Add a LoRA in fp32 to the named layers, the same on every process; return its parameters."""
    torch.manual_seed(cfg.seed)
    size = {"r": cfg.rank, "lora_alpha": cfg.lora_alpha or cfg.rank, "lora_dropout": cfg.lora_dropout}
    transformer.add_adapter(LoraConfig(**size, target_modules=layers, init_lora_weights="gaussian"))
    if "adapter" in transformer.peft_config:
        transformer.set_adapters(["default", "adapter"])
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(".default." in name)
    cast_training_params(transformer, torch.float32)
    prepare_blocks(transformer, cfg)
    frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
    # else DDP broadcasts 12 GB, and fails on torchao's tensors; accelerate does not expose torch's `init_sync`
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def load_training_adapter(transformer: ZImageTransformer2DModel, cfg: Config) -> None:
    """Load the frozen adapter of `--training_adapter`, a file or a Hub name."""
    file = Path(cfg.training_adapter)
    place, name = (str(file.parent), file.name) if file.is_file() else (cfg.training_adapter, None)
    with explained(f"--training_adapter {cfg.training_adapter} cannot be loaded"):
        state, settings = ZImagePipeline.lora_state_dict(place, weight_name=name, return_lora_metadata=True)
        is_empty = transformer.device.type == "meta"  # then only checked; copying would warn
        transformer.load_lora_adapter(state, metadata=settings, adapter_name="adapter", low_cpu_mem_usage=is_empty)
    loaded = [name for name, _ in transformer.named_parameters() if ".adapter." in name]
    require(len(loaded) == len(state), f"--training_adapter {cfg.training_adapter} does not fit this model")


def read_lora(cfg: Config, empty: ZImageTransformer2DModel) -> tuple[Config, dict[str, Tensor]]:
    """Read `--init_lora`; return a config with its rank and layers, and its tensors. Raises UserError if it is odd."""
    if cfg.init_lora is None:
        return cfg, {}
    file, linear = Path(cfg.init_lora), [(n, m) for n, m in empty.named_modules() if isinstance(m, nn.Linear)]
    with explained(f"--init_lora {file} cannot be loaded"):
        options = {"weight_name": file.name, "local_files_only": True, "return_lora_metadata": True}
        found, settings = ZImagePipeline.lora_state_dict(str(file.parent), **options)
        get = (settings or {"transformer.r": 1, "transformer.lora_alpha": 1}).get
        scale = get("transformer.lora_alpha") / get("transformer.r")
        odd = [name for name in ("alpha_pattern", "use_rslora") if get(f"transformer.{name}")]
        found = {name.removeprefix("transformer."): tensor.float() for name, tensor in found.items()}
        sides = {"lora_A": "in_features", "lora_B": "out_features"}.items()
        sizes = {f"{name}.{half}.weight": getattr(module, side) for name, module in linear for half, side in sides}
        odd += [n for n, x in found.items() if sizes.get(n) != x.shape["lora_A" in n] or not x.isfinite().all()]
    layers = sorted({name.rsplit(".", 2)[0] for name in found})
    problem = f"{file} is no plain LoRA for linear layers of this model: {', '.join(odd[:3]) or 'it is incomplete'}"
    require(not odd and 0 < 2 * len(layers) == len(found), f"--init_lora {problem}")
    rank = max(tensor.shape["lora_B" in name] for name, tensor in found.items())
    lora = {name: tensor * (scale if "lora_B" in name else 1) for name, tensor in found.items()}
    say(f"--init_lora: rank {rank} in {len(layers)} layers, whatever --rank and --lora_layers say")
    return dataclasses.replace(cfg, rank=rank, lora_layers=",".join(layers)), lora


@torch.no_grad()
def start_from(lora: dict[str, Tensor], transformer: nn.Module, cfg: Config) -> None:
    """Copy a LoRA into the new one; where its rank is smaller, the rest of lora_B stays zero."""
    for name, parameter in lora_parameters(transformer).items() if lora else ():
        height, width = lora[name].shape  # (r, K) or (N, r)
        parameter[:height, :width] = lora[name] / (cfg.lora_scale if "lora_B" in name else 1)


def describe_lora(transformer: nn.Module, layers: list[str], cfg: Config) -> str:
    """Describe the size of the LoRA, its scale, and the size of the frozen weights."""
    frozen = sum(p.numel() * p.element_size() for p in transformer.parameters() if not p.requires_grad)
    count = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    size = f"{count:,} trainable parameters in {len(layers)} layers, rank {cfg.rank}, effective scale alpha / rank"
    return f"LoRA: {size} = {cfg.lora_scale:g}, over {frozen / 1e9:.3g} GB of frozen weights"


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP has sharded; all processes must call this. Others stay as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Put a tensor on the device of another one, sharded in the same way if it has the same shape."""
    if isinstance(example, DTensor) and tensor.shape == example.shape:
        return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)
    return tensor.to(example.device)


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Map names, without the wrappers of DDP, FSDP, and torch.compile, to the trainable parameters."""
    wrappers = re.compile(r"\b(module|_orig_mod|_checkpoint_wrapped_module|default)\.")
    named = transformer.named_parameters()
    return {wrappers.sub("", name): parameter for name, parameter in named if parameter.requires_grad}


def lora_state_dict(transformer: nn.Module) -> dict[str, Tensor]:
    """Gather the tensors of the LoRA, on all processes. Raises FloatingPointError if they are not finite."""
    state = {name: full_tensor(parameter.detach()) for name, parameter in lora_parameters(transformer).items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise FloatingPointError("the LoRA contains NaN or infinity and is not saved; lower --learning_rate")
    return state


@torch.no_grad()
def load_lora(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy tensors that `lora_state_dict` returned into the live model."""
    for name, parameter in lora_parameters(transformer).items():
        parameter.copy_(place_like(state[name], parameter))


def export_lora(state: dict[str, Tensor], scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name tensors for diffusers, and fold alpha / rank into lora_B, so that all loaders apply the LoRA equally."""
    folded = {name: tensor.float() * (scale if ".lora_B." in name else 1) for name, tensor in state.items()}
    return {f"transformer.{name}": tensor.to(dtype) for name, tensor in folded.items()}


def lora_metadata(cfg: Config, samples: list[Sample]) -> dict[str, str]:
    """Describe the LoRA for its header (modelspec 1.0.1), without dates and paths: equal content gives equal bytes."""
    prompt, side = trained_prompt(cfg, samples) or "", cfg.training_side
    return {
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "z-image/lora",
        "modelspec.implementation": "diffusers", "modelspec.resolution": f"{side}x{side}",
        "modelspec.title": f"Z-Image LoRA {prompt}".strip(), "modelspec.trigger_phrase": prompt,
    }  # fmt: skip


# ==== Objective ======================================================================================================

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # the middles of five bands of noise levels


def sample_noise(seeds: list[int], shape: torch.Size) -> Tensor:
    """Sample Gaussian noise, each example's from its own seed, the same on every device. -> (B, *shape)"""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def mix_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Interpolate between latents and noise. (B, 16, h, w), (B, 16, h, w), (B,) -> (B, 16, h, w)"""
    sigmas = sigmas.view(-1, 1, 1, 1)
    return (1 - sigmas) * latents + sigmas * noise


def predict_velocity(transformer: nn.Module, noisy: Tensor, sigmas: Tensor, prompt_embeds: list[Tensor]) -> Tensor:
    """Predict velocity by Z-Image's conventions: lists, not batches; a frame axis; time 1 - sigma; opposite sign."""
    assert len(prompt_embeds) == len(noisy), "the model would silently drop the surplus"
    frames = list(noisy.unsqueeze(2).unbind(0))  # B of (16, 1, h, w)
    outputs = transformer(frames, 1 - sigmas, prompt_embeds, return_dict=False)[0]
    return -torch.stack(outputs).squeeze(2)  # (B, 16, h, w)


def flow_matching_loss(velocity: Tensor, target: Tensor, weights: Tensor, masks: Tensor | None = None) -> Tensor:
    """Compute mean squared errors, weighted by image and place. (B, 16, h, w) x 2, (B,), (B, 1, h, w) -> (B,)"""
    squares = (velocity.float() - target.float()).square()  # (B, 16, h, w)
    if masks is not None:  # relative to their mean: an image counts as one whatever its mask
        squares = squares * masks / masks.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)
    return weights * squares.mean(dim=(1, 2, 3))


@contextlib.contextmanager
def strengths(transformer: nn.Module, **factors: float) -> Iterator[None]:
    """Scale the LoRA (`default`), or that of `--training_adapter` (`adapter`), for a while; 0 turns it off."""
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    for layer, (name, factor) in itertools.product(layers, factors.items()):
        layer.set_scale(name, factor)
    try:
        yield
    finally:
        for layer, name in itertools.product(layers, factors):
            layer.set_scale(name, 1)


def sum_by_band(losses: Tensor, batch: Batch) -> Tensor:
    """Sum losses, and count them, in five bands of noise levels, and those of preservation. (B,) -> (2, 6)"""
    is_prior = torch.tensor(batch.is_prior, device=losses.device)  # (B,)
    bands = F.one_hot(torch.where(is_prior, 5, (5 * batch.sigmas).long().clamp(max=4)), 6)  # (B, 6)
    return torch.stack([torch.where(bands == 1, losses[:, None], 0.0).sum(0), bands.sum(0)])


def training_loss(transformer: nn.Module, batch: Batch, cfg: Config) -> Tensor:
    """Compute the loss of each example: add noise, predict the velocity, compare it with the target. -> (B,)"""
    latents, sigmas = batch.latents, batch.sigmas  # (B, 16, h, w), (B,)
    noise = sample_noise(batch.seeds, latents.shape[1:]).to(latents.device)  # (B, 16, h, w)
    noisy_latents = mix_noise(latents, noise, sigmas).to(DTYPES[cfg.mixed_precision])  # (B, 16, h, w)
    velocity = predict_velocity(transformer, noisy_latents, sigmas, batch.prompt_embeds)  # (B, 16, h, w)
    target = noise - latents  # d noisy_latents / d sigma
    is_prior = torch.tensor(batch.is_prior, device=latents.device)  # (B,)
    if cfg.prior_kind == "base" and (any(batch.is_prior) or is_on("ACCELERATE_USE_FSDP")):  # FSDP needs all processes
        with torch.no_grad(), strengths(transformer, default=0):
            base = predict_velocity(transformer, noisy_latents, sigmas, batch.prompt_embeds)  # (B, 16, h, w)
        target = torch.where(is_prior.view(-1, 1, 1, 1), base.float(), target)
    prior_weights = torch.where(is_prior, cfg.prior_loss_weight, 1.0)  # (B,)
    weights = prior_weights * loss_weights(cfg.weighting_scheme, sigmas)  # (B,)
    return flow_matching_loss(velocity, target, weights, batch.masks)


# ==== Training =======================================================================================================


class StopRequest:
    """A request to stop training: a signal, the exit of the launcher, or `--max_train_minutes`.

    It is polled after every micro-batch and every denoising step, because all processes must stop at the same point.
    Before and after training, when there is nothing to save, signals keep their defaults.
    """

    def __init__(self, minutes: float | None) -> None:
        self.number, self.reason, self.handlers, self.is_waiting = signal.SIGTERM, "", {}, False
        self.parent = PARENT if RUN_AS_SCRIPT else os.getppid()
        if minutes is not None:
            timer = threading.Timer(min(60 * minutes, threading.TIMEOUT_MAX), self.expire)
            timer.daemon = True
            timer.start()

    def __enter__(self) -> "StopRequest":
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as with nohup
        if threading.current_thread() is threading.main_thread():  # signal handlers require it
            self.handlers = {number: signal.signal(number, self.receive) for number in heard}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def receive(self, number: int, frame: Any) -> None:
        """Handle a signal; interrupt the wait for a batch; a second SIGINT does what it did before training."""
        if number == signal.SIGINT:
            signal.signal(number, self.handlers.get(number, signal.SIG_DFL))
        self.number, self.reason = (self.number if self.reason else number), self.reason or signal.Signals(number).name
        if self.is_waiting:
            self.is_waiting = False
            raise Stopped(self.reason, number)

    def expire(self) -> None:
        """End the time for training, as a signal would."""
        self.reason = self.reason or "--max_train_minutes"
        if self.handlers:
            signal.raise_signal(signal.SIGTERM)  # the main thread handles it

    def heed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches until the processes agree to stop."""
        while True:
            with contextlib.suppress(Stopped):
                self.is_waiting = True
                batch = next(batches) if self.reason == "" else None
                self.is_waiting = False
            if self.is_agreed():
                return
            yield batch

    def is_agreed(self) -> bool:
        """Tell whether any process was asked to stop; all must call this together."""
        is_launched = bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys())
        if is_launched and os.getppid() != self.parent:
            self.reason = self.reason or "the exit of its launcher"
        is_asked = any_process(self.reason != "")  # a signal that arrives during this call counts for the next one
        self.reason = self.reason or "another process" * is_asked
        return is_asked

    def on_step_end(self, pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """Stop between two denoising steps; a callback for `ZImagePipeline`."""
        if self.is_agreed():
            raise Stopped(f"stopped by {self.reason}", self.number)
        return tensors


class Run(NamedTuple):
    """The state of a run: its settings, its plan, and its live objects."""

    cfg: Config
    plan: Plan
    encodings: Encodings
    accelerator: Accelerator
    transformer: nn.Module  # as accelerate has prepared it
    optimizer: torch.optim.Optimizer
    stop: StopRequest
    peaks: dict[str, int]  # the largest number of bytes on the device in each phase, if it is a GPU


def train(run: Run, batches: Iterator[Batch]) -> Iterator[dict[str, float]]:
    """Yield metrics after every optimizer step, until the steps or the batches end; the caller saves and validates."""
    cfg, accelerator, optimizer, schedule = run.cfg, run.accelerator, run.optimizer, run.plan.schedule
    learning_rate_at, skipped = make_learning_rate(cfg, schedule), 0
    parameters = [parameter for parameter in run.transformer.parameters() if parameter.requires_grad]
    run.transformer.train()
    for step in range(schedule.first_step, schedule.max_train_steps):
        started, seen = time.perf_counter(), []
        for batch in itertools.islice(batches, cfg.gradient_accumulation_steps):
            torch.manual_seed(derive_seed(cfg.seed, "dropout", step, len(seen), accelerator.process_index))
            with accelerator.accumulate(run.transformer):
                losses = training_loss(run.transformer, batch, cfg)  # (B,)
                accelerator.backward(losses.mean())
            seen.append((batch.names, batch.sigmas, sum_by_band(losses.detach(), batch)))
        if len(seen) < cfg.gradient_accumulation_steps:
            return  # the weights have not changed; a resumed run repeats these batches
        sums = accelerator.reduce(sum(each for *_, each in seen), "sum").tolist()  # 2 of 6
        grad_norm = float(full_tensor(accelerator.clip_grad_norm_(parameters, cfg.max_grad_norm)))
        metrics = {"step": step + 1, "loss": sum(sums[0]) / sum(sums[1]), "grad_norm": grad_norm}
        metrics |= {f"loss/{band}": total / count for band, total, count in zip((*LEVELS, "prior"), *sums) if count}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step)
        if is_finite(run, metrics, seen, skipped):
            optimizer.step()
            skipped = 0
        else:
            metrics["is_skipped"], skipped = True, skipped + 1
        optimizer.zero_grad()
        lr = learning_rate_at(step) * optimizer.param_groups[0].get("d", 1.0)  # Prodigy multiplies it by its d
        yield metrics | {"lr": lr, "seconds": round(time.perf_counter() - started, 3)}


def make_optimizer(parameters: list[nn.Parameter], cfg: Config) -> torch.optim.Optimizer:
    """Make the optimizer for the LoRA's fp32 parameters."""
    common = {"lr": cfg.learning_rate, "betas": (cfg.adam_beta1, cfg.adam_beta2), "eps": cfg.adam_epsilon}
    common["weight_decay"] = cfg.adam_weight_decay
    if cfg.has_8bit_state:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **common)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **common, fused=PartialState().device.type == "cuda" or None)
    from prodigyopt import Prodigy

    names = ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup")
    with contextlib.redirect_stdout(None):  # it prints a message
        return Prodigy(parameters, **common, **{name.removeprefix("prodigy_"): getattr(cfg, name) for name in names})


def check_hardware(cfg: Config, empty: ZImageTransformer2DModel) -> None:
    """Reject settings that this machine does not support."""
    device, dtype = PartialState().device, DTYPES[cfg.mixed_precision]
    if cfg.do_fp8_training:
        with explained("--do_fp8_training does not work here", "--quantization fp8 works on every GPU"):
            rows, scale = to_fp8(torch.ones(MIN_FP8_ROWS, 10240, device=device))  # the longest sum, the fewest rows
            multiply_fp8(rows, rows.t(), scale, scale.t())
    with explained("the frozen weights cannot be quantized here", "--quantization int8 and fp8 work everywhere"):
        options = loading_options(cfg, dtype)
        if "quantization_config" in options:
            DiffusersAutoQuantizer.from_config(options["quantization_config"]).validate_environment()
    if cfg.has_8bit_state:
        with explained("--use_8bit_adam: bitsandbytes does not support it on this machine", "remove the flag"):
            probe = nn.Parameter(torch.zeros(4096, device=device))
            probe.grad = torch.zeros_like(probe)
            make_optimizer([probe], cfg).step()
    name = f"--attention_backend {cfg.attention_backend}"
    with explained(name, "it does not work here; remove the flag"):
        query = torch.linspace(-9, 9, 2 * 64 * 2 * 128).sin().view(2, 64, 2, 128).to(device, dtype).requires_grad_()
        mask = (torch.arange(64) < torch.tensor([[64], [40]])).to(device)[:, None, None]  # of captions, padded
        outputs = []
        for backend in ("native", cfg.attention_backend):
            empty.set_attention_backend(backend)
            outputs.append(dispatch_attention_fn(query, query, query, attn_mask=mask))
        outputs[1].sum().backward()
        is_masked = torch.allclose(*outputs, atol=0.05)
        require(is_masked, f"{name} attends to the padding of captions; remove the flag")


def make_learning_rate(cfg: Config, schedule: Schedule) -> Callable[[int], float]:
    """Make the learning rate a function of the optimizer step, using diffusers' schedules."""
    peak = cfg.learning_rate * (schedule.total_batch if cfg.scale_lr else 1)
    placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak)
    steps = {"num_warmup_steps": cfg.lr_warmup_steps, "num_training_steps": schedule.max_train_steps}
    shape = {"num_cycles": cfg.lr_num_cycles, "power": cfg.lr_power}
    scheduler = get_scheduler(cfg.lr_scheduler, placeholder, cfg.lr_step_rules, **steps, **shape)
    return lambda step: peak * scheduler.lr_lambdas[0](step)


def is_finite(run: Run, metrics: dict[str, float], seen: list[tuple[Any, ...]], skipped: int) -> bool:
    """Tell whether a step's metrics are finite. Raises FloatingPointError, naming the images, unless told to skip."""
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return True
    pairs = [pair for names, sigmas, _ in seen for pair in zip(names, sigmas.tolist())]
    examples = ", ".join(gather_object([f"{name} at sigma {sigma:.3f}" for name, sigma in pairs]))
    problem = f"step {metrics['step']}: the loss is {metrics['loss']}, the gradient norm {metrics['grad_norm']}, for "
    if run.cfg.on_nan == "skip" and skipped < 10:
        say(f"warning: {problem}{examples}; the step is skipped")
        return False
    option = "ten steps in a row were already skipped" if skipped else "--on_nan skip skips such steps"
    remedy = f"{describe_last(run.cfg)}. Try a lower --learning_rate; {option}"
    raise FloatingPointError(f"{problem}{examples}; training stops, the weights are unchanged; {remedy}")


PRODIGY_COUNTS = ("k", "d", "d_max", "d_numerator", "d_denom", "d_hat")  # its estimates, not its settings


def save_lora(run: Run, state: dict[str, Tensor], file: Path, **metadata: str) -> dict[str, Tensor]:
    """Write the LoRA in its final form, from the main process; return the saved tensors."""
    cfg, dtype = run.cfg, torch.float32 if run.cfg.upcast_before_saving else DTYPES[run.cfg.mixed_precision]
    exported = export_lora(state, cfg.lora_scale, dtype)
    if run.accelerator.is_main_process:
        write_tensors(file, exported, lora_metadata(cfg, run.plan.samples) | metadata)
    return exported


def save_checkpoint(run: Run, step: int, binding: dict[str, Any]) -> None:
    """Write checkpoint-N: the LoRA in its final form; then, in fp32, the state that makes it a checkpoint."""
    folder = Path(run.cfg.output_dir) / f"checkpoint-{step}"
    lora = lora_state_dict(run.transformer)
    tensors = {f"lora/{name}": tensor for name, tensor in lora.items()}
    state = {"step": step, "binding": binding, "numbers": {}}
    for name, parameter in lora_parameters(run.transformer).items():
        for key, value in run.optimizer.state[parameter].items():
            kind = tensors if torch.is_tensor(value) else state["numbers"]
            value = full_tensor(value) if torch.is_tensor(value) else value
            # bitsandbytes shares tables between parameters, which safetensors rejects
            kind[f"{key}/{name}"] = value.clone() if key in ("qmap1", "qmap2") else value
    state["group"] = {key: value for key, value in run.optimizer.param_groups[0].items() if key in PRODIGY_COUNTS}
    save_lora(run, lora, folder / LORA_FILE)
    if run.accelerator.is_main_process:
        sync(folder.parent / "metrics.jsonl")  # metrics must be on disk before the checkpoint
        write_tensors(folder / STATE_FILE, tensors, {"state": json.dumps(state)})
        if read_checkpoint(folder) is None or read_sealed(folder / LORA_FILE) is None:
            raise OSError(f"{folder} was not written correctly; check the disk")
        for old in list_checkpoints(folder.parent)[: -(run.cfg.checkpoints_total_limit or sys.maxsize)]:
            if read_checkpoint(old):  # keep damaged ones for inspection
                remove_checkpoint(old)
    run.accelerator.wait_for_everyone()


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, its state first, so that a partial one is never taken for a complete one."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def set_aside(folder: Path) -> Path:
    """Move a checkpoint to a name that is never resumed from, its state first, file by file; returns the new name."""
    aside = folder.with_name(f"superseded-{folder.name}-{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    for file in sorted(folder.iterdir(), reverse=True):
        os.replace(file, aside / file.name)
    folder.rmdir()
    return aside


def load_checkpoint(run: Run, checkpoint: Checkpoint) -> None:
    """Load LoRA and optimizer state; the optimizer keeps this run's settings. Raises UserError if it does not fit."""
    values = load_file(checkpoint.folder / STATE_FILE) | checkpoint.state["numbers"]
    parameters = lora_parameters(run.transformer)
    lora = {name: values.pop(f"lora/{name}", None) for name in parameters}
    fits = None not in lora.values() and {path.split("/")[1] for path in values} in (set(), set(parameters))
    require(fits, f"--resume_from_checkpoint {checkpoint.folder} has different layers or optimizer; choose another")
    load_lora(run.transformer, lora)
    for path, value in values.items():
        key, name = path.split("/")
        is_tensor = torch.is_tensor(value)
        run.optimizer.state[parameters[name]][key] = place_like(value, parameters[name]) if is_tensor else value
    run.optimizer.param_groups[0].update(checkpoint.state["group"])


def resume(run: Run) -> None:
    """Restore LoRA, optimizer, and metrics to where they were at the checkpoint, or at the start."""
    checkpoint, output, step = run.plan.checkpoint, Path(run.cfg.output_dir), run.plan.schedule.first_step
    if checkpoint is not None:
        with explained(f"--resume_from_checkpoint: {checkpoint.folder} cannot be loaded", "choose another"):
            load_checkpoint(run, checkpoint)
        say(f"resuming from {checkpoint.folder}, after step {step}")
    elif run.cfg.resume_from_checkpoint is not None:
        say(f"no checkpoint in {output} yet: starting from scratch")
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        for later in [path for path in list_checkpoints(output) if int(path.name[11:]) > step]:
            is_damaged = read_checkpoint(later) is None  # either way, `latest` must never find it
            is_known = is_damaged or run.cfg.resume_from_checkpoint not in (None, "latest")
            require(is_known, f"another run has just saved {later}; start again with --resume_from_checkpoint latest")
            say(f"{later} is {'damaged' if is_damaged else 'superseded'}; renamed to {set_aside(later).name}")
        files = [folder / name for folder in output.glob(STEPS) for name in ("gain.json", "sheet.png")]
        later = [file for file in files if int(file.parent.name[5:]) > step]
        is_later = int((read_sealed(output / BEST_FILE) or {}).get("step", 0)) > step
        for file in [*later, *[output / BEST_FILE] * is_later]:
            file.unlink(missing_ok=True)
        file = output / "metrics.jsonl"  # keep the steps that are done; drop an incomplete last line
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        steps = [re.match(rb'\{"step": (\d+), .*\}\n$', line) for line in lines]
        write_file(file, b"".join(match[0] for match in steps if match is not None and int(match[1]) <= step))


def record_peak(peaks: dict[str, int], phase: str) -> None:
    """Record the largest memory on the GPU since the last call as that of a phase."""
    device = PartialState().device
    if device.type == "cuda":
        peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)


def log_metrics(run: Run, metrics: dict[str, float]) -> None:
    """Append one line to metrics.jsonl and log to the trackers."""
    step, schedule = metrics["step"], run.plan.schedule
    row = {"step": step, "epoch": round(step * schedule.total_batch / schedule.epoch_examples, 4)} | metrics
    row = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
    if run.accelerator.is_main_process:
        path = Path(run.cfg.output_dir) / "metrics.jsonl"
        with explained(f"{path} cannot be written"), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    run.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=step)


# ==== Validation =====================================================================================================


def make_pipeline(transformer: nn.Module, encodings: Encodings) -> ZImagePipeline:
    """Make a pipeline from a transformer that is on the device; prompts come from the cache."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(encodings.model / "scheduler")
    vae = load_vae(encodings.model, encodings.cfg)
    vae.enable_slicing()  # decodes one image at a time
    pipeline = ZImagePipeline(scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_images(
    pipeline: ZImagePipeline, encodings: Encodings, jobs: list[tuple[str, int]], side: int, on_step_end: Any = None
) -> list[Image.Image]:
    """Generate one square image per (prompt, seed); the global random state is not touched."""
    cfg, device = encodings.cfg, pipeline.transformer.device
    prompts = [prompt for prompt, _ in jobs] + [cfg.negative_prompt] * (len(jobs) if cfg.guidance_scale > 0 else 0)
    tensors = [load_file(encodings.prompt(prompt))["prompt_embeds"] for prompt in prompts]
    prompt_embeds = [tensor.to(device, pipeline.transformer.dtype) for tensor in tensors]
    return pipeline(
        prompt_embeds=prompt_embeds[: len(jobs)], negative_prompt_embeds=prompt_embeds[len(jobs) :],
        height=side, width=side, num_inference_steps=cfg.num_inference_steps, guidance_scale=cfg.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for _, seed in jobs], callback_on_step_end=on_step_end,
    ).images  # fmt: skip


def png_bytes(image: Image.Image, prompt: str = "") -> bytes:
    """Encode an image as PNG, with its prompt."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_itxt("prompt", prompt)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def generated_images(folder: Path) -> list[tuple[str, Path]]:
    """List the images of a validation, each with the prompt that it carries."""
    images = []
    for file in filter(Path.is_file, sorted(folder.glob("[0-9]*-[0-9]*.png"))):
        with contextlib.suppress(Exception), Image.open(file) as image:  # damaged, or of other programs
            images.append((str(image.info["prompt"]), file))
    return images


def generate_class_images(samples: list[Sample], encodings: Encodings) -> list[Sample]:
    """Generate the missing class images with the untrained model, seeded by their names, split over the processes."""
    cfg, mine = encodings.cfg, share_of([sample for sample in samples if not sample.digest])
    if mine:
        transformer = load_transformer(encodings.model, cfg, DTYPES[cfg.prior_generation_precision])
        pipeline = make_pipeline(transformer.eval().to(PartialState().device), encodings)
        groups = [mine[start : start + cfg.sample_batch_size] for start in range(0, len(mine), cfg.sample_batch_size)]
        for group in progress_bar(groups, "generating class images"):
            jobs = [(sample.prompt, derive_seed(cfg.seed, "class image", sample.path.name)) for sample in group]
            for sample, image in zip(group, sample_images(pipeline, encodings, jobs, cfg.training_side)):
                write_file(sample.path, png_bytes(image, sample.prompt))
        del pipeline, transformer
        free_memory()
    PartialState().wait_for_everyone()
    done = {s: dataclasses.replace(s, digest=sha256(s.path.read_bytes())) for s in samples if not s.digest}
    return [done.get(sample, sample) for sample in samples]


def validation_prompts(cfg: Config, is_final: bool) -> list[str]:
    """List the prompts of one validation."""
    if is_final and cfg.skip_final_inference:
        return []
    final = [cfg.final_validation_prompt] if is_final and cfg.final_validation_prompt is not None else []
    return list(cfg.validation_prompt or final)


def needed_prompts(samples: list[Sample], cfg: Config) -> list[str]:
    """List the prompts the run will use; the negative prompt only if guidance needs it."""
    sampled = [*validation_prompts(cfg, is_final=False), *validation_prompts(cfg, is_final=True)]
    sampled += [sample.prompt for sample in samples if not sample.digest]
    negative = [cfg.negative_prompt] * bool(sampled and cfg.guidance_scale)
    return [*(sample.prompt for sample in samples), *[""] * (cfg.caption_dropout > 0), *sampled, *negative]


def validation_folder(cfg: Config, step: int) -> Path:
    """Return the folder of the images generated after `step` steps."""
    return Path(cfg.output_dir) / "validation" / f"step-{step:06d}"


@torch.no_grad()
def measure_losses(run: Run, sample: Sample, level: float) -> tuple[float, float]:
    """Compute the loss of an image at a noise level, with noise that never changes: with the LoRA, and without it."""
    device, dtype = run.accelerator.device, DTYPES[run.cfg.mixed_precision]
    latents = load_file(run.encodings.latents(sample, False))["latents"][None].to(device)  # (1, 16, h, w)
    prompt_embeds = [load_file(run.encodings.prompt(sample.prompt))["prompt_embeds"].to(device)]
    seed = derive_seed(run.cfg.seed, "gain", sample.digest, level)
    noise, sigmas = sample_noise([seed], latents.shape[1:]).to(device), torch.tensor([level], device=device)
    noisy_latents = mix_noise(latents, noise, sigmas).to(dtype)
    with strengths(run.transformer, adapter=0):
        velocity = predict_velocity(run.transformer, noisy_latents, sigmas, prompt_embeds)
    with strengths(run.transformer, adapter=0, default=0):
        base = predict_velocity(run.transformer, noisy_latents, sigmas, prompt_embeds)
    return tuple(flow_matching_loss(each, noise - latents, sigmas.new_ones(1)).item() for each in (velocity, base))


def gain_of(rows: Iterable[tuple[Any, ...]]) -> float:
    """Compute by which share the sum of the losses with the LoRA is lower than that without it."""
    with_lora, base = map(sum, zip(*(row[-2:] for row in rows)))
    return round(1 - with_lora / base, 4)


def measured_samples(cfg: Config, plan: Plan) -> dict[str, list[Sample]]:
    """Choose the images on which validation measures the gain: those held out and as many others, or a few."""
    training = [sample for sample in plan.samples if not sample.is_prior][: len(plan.held_out) or MEASURED]
    kinds = {"held-out": [*plan.held_out], "training": training}
    return {name: kinds[name] for name in kinds if kinds[name] and (plan.held_out or cfg.validation_prompt)}


def measure_gain(run: Run, step: int) -> None:
    """Write the gain over the base model, with its standard error; keep the LoRA that is best on held-out images."""
    kinds, gains = measured_samples(run.cfg, run.plan), {"step": step}
    jobs = [(kind, sample, level) for kind, samples in kinds.items() for sample in samples for level in LEVELS]
    run.transformer.eval()
    with torch.compiler.set_stance("force_eager"):
        rows = [(kind, one.path, level, *measure_losses(run, one, level)) for kind, one, level in share_of(jobs, True)]
    run.transformer.train()
    rows = sorted(set(gather_object(rows)))
    for kind, samples in kinds.items():
        mine = [row for row in rows if row[0] == kind]
        bands = {level: gain_of(row for row in mine if row[2] == level) for level in LEVELS}
        each = torch.tensor([gain_of(row for row in mine if row[1] == one.path) for one in samples])
        spread = round(each.std().item() / math.sqrt(len(each)), 4) if len(each) > 1 else None
        gains[kind] = {"gain": gain_of(mine), "spread": spread, "bands": bands}
        values = {f"gain/{kind}": gain_of(mine)} | {f"gain/{kind}/{level}": bands[level] for level in LEVELS}
        run.accelerator.log(values, step=step)
    file, lora = validation_folder(run.cfg, step) / "gain.json", lora_state_dict(run.transformer)
    best, gain = Path(run.cfg.output_dir) / BEST_FILE, gains.get("held-out", {"gain": 0})["gain"]
    if gain > float((read_sealed(best) or {}).get("gain", 0)):
        save_lora(run, lora, best, step=f"{step}", gain=f"{gain}")
    if run.accelerator.is_main_process:
        write_file(file, json.dumps(gains, indent=2).encode())
        write_report(run, {})
    words = " and ".join(f"by {gains[kind]['gain']:z.1%} on {kind} images" for kind in kinds)
    say(f"step {step}: the LoRA lowers the loss {words}")


REPORT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 64em; margin: auto; padding: 1em }}
table {{ display: block; overflow-x: auto; border-collapse: collapse }} td {{ border: 1px solid; padding: 5px }}
img {{ width: 9em; display: block }} svg {{ max-width: 40em; font-size: 14px }} polyline {{ fill: none }}</style>
</head><body><h1>{title}</h1>{curves}{tables}</body></html>
"""


def smooth(rows: list[dict[str, Any]], name: str, window: int) -> list[tuple[int, float]]:
    """Average a metric over its last `window` values, at up to a thousand steps."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    ends = range(1, len(points) + 1, 1 + len(points) // 1000)
    return [(points[end - 1][0], statistics.fmean(y for _, y in points[max(0, end - window) : end])) for end in ends]


def draw_curves(title: str, curves: dict[str, list[tuple[int, float]]]) -> str:
    """Draw curves over the steps as inline SVG with labeled axes; nothing without two points."""
    curves = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items() if curve}
    points = list(itertools.chain.from_iterable(curves.values()))
    if len({x for x, _ in points}) < 2:
        return ""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points))
    drawn = '<path d="M70 40V190H570" fill="none" stroke="#888"/>'
    wide, tall = 500 / (right - left), 150 / (high - low or 1)
    for number, (name, curve) in enumerate(curves.items()):
        color = f"hsl({50 * number} 90% 35%)"
        places = " ".join(f"{70 + wide * (x - left):.1f},{190 - tall * (y - low):.1f}" for x, y in curve)
        drawn += f'<polyline stroke="{color}" points="{places}"/>'
        drawn += f'<text x="{70 + 76 * number}" y="26" fill="{color}">{name}</text>'
    labels = ((66, 194, "end", f"{low:.3g}"), (66, 44, "end", f"{high:.3g}"), (70, 206, "start", f"step {left}"))
    for x, y, anchor, label in (*labels, (570, 206, "end", f"step {right}")):
        drawn += f'<text x="{x}" y="{y}" text-anchor="{anchor}">{label}</text>'
    return f'<h2>{title}</h2><svg viewBox="0 0 600 210" role="img" aria-label="{title}">{drawn}</svg>'


def html_table(title: str, rows: list[list[Any]]) -> str:
    """Format rows as a table; a Path is an image beside the report, everything else is text. Empty without rows."""
    image = '<a href="{0}"><img src="{0}" alt=""></a>'.format
    rows = [[image(quote(f"{x}")) if isinstance(x, Path) else html.escape(f"{x}") for x in row] for row in rows]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<h2>{title}</h2><table>{body}</table>" if rows else ""


def write_report(run: Run, record: dict[str, Any]) -> None:
    """Write report.html, which shows the run in any browser, without JavaScript and without a network."""
    cfg, output = run.cfg, Path(run.cfg.output_dir)
    file, found = output / "metrics.jsonl", collections.defaultdict(dict)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []  # none before step 1
    window, kinds, folders = 2 + len(rows) // 20, ("held-out", "training"), sorted(output.glob(STEPS))
    losses = {"all": "loss", **{f"noise {level}": f"loss/{level}" for level in LEVELS}, "prior": "loss/prior"}
    losses = {label: smooth(rows, name, window) for label, name in losses.items()}
    gains = [read_json_object(f"{path}", path) for path in (path / "gain.json" for path in folders) if path.exists()]
    gains = {kind: [(row["step"], 100 * row[kind]["gain"]) for row in gains if kind in row] for kind in kinds}
    curves = draw_curves(f"Loss by noise level, means of up to {window} values", losses)
    curves += draw_curves("Gain over the base model, in percent", gains)
    curves += draw_curves("Learning rate", {"": smooth(rows, "lr", 1)})
    curves += draw_curves("Gradient norm", {"": smooth(rows, "grad_norm", 1)})
    shown = [folder for folder in folders if (folder / "sheet.png").exists()]
    for prompt, image in itertools.chain.from_iterable(map(generated_images, shown)):
        found[prompt, image.stem.split("-")[1]][image.parent] = image.relative_to(output)
    grid = [["prompt", *(f"after step {int(folder.name[5:])}" for folder in shown)]] * bool(found)
    grid += [[prompt, *(images.get(folder, "") for folder in shown)] for (prompt, _), images in found.items()]
    files = [(path / f"strength-{factor}.png").relative_to(output) for path in shown[-1:] for factor in STRENGTHS]
    sweep = [["strength", *STRENGTHS], ["", *files]] * any((output / file).exists() for file in files)
    samples = [one for one in (*run.plan.samples, *run.plan.held_out) if not one.is_prior]
    data = [[one.path.name, "{} x {}".format(*one.size), one.prompt] for one in samples]
    tables = {"Images by step": grid, "The LoRA, weaker and stronger": sweep, "Data (height x width)": data}
    tables |= {"Memory and speed": record.items(), "Settings": shareable_settings(cfg).items()}
    tables = "".join(html_table(*table) for table in tables.items())
    page = REPORT.format(title=f"Z-Image LoRA: {html.escape(output.resolve().name)}", curves=curves, tables=tables)
    write_file(output / "report.html", page.encode(errors="replace"))


def validate(run: Run, step: int, is_final: bool = False) -> None:
    """Generate PROMPT-IMAGE.png from the live transformer, split over the processes, and combine them in sheet.png."""
    cfg, prompts, folder = run.cfg, validation_prompts(run.cfg, is_final), validation_folder(run.cfg, step)
    names = [f"{prompt}-{image}" for prompt in range(len(prompts)) for image in range(cfg.num_validation_images)]
    jobs = [(name, *map(int, name.split("-")), 1) for name in names]
    jobs += [(f"strength-{factor}", 0, 0, factor) for factor in STRENGTHS if is_final and names]
    if measured_samples(cfg, run.plan):
        measure_gain(run, step)
    if not jobs:
        return
    record_peak(run.peaks, "training")
    say(f"step {step}: generating {len(jobs)} images")
    live = run.accelerator.unwrap_model(run.transformer).eval()
    on_step_end = None if is_final else run.stop.on_step_end  # finally, the LoRA is complete
    pipeline, side = make_pipeline(live, run.encodings), cfg.validation_resolution or cfg.training_side
    for name, prompt, nth, factor in share_of(jobs, is_even=True):
        with torch.compiler.set_stance("force_eager"), strengths(live, adapter=0, default=factor):  # compiling is slow
            (sampled,) = sample_images(pipeline, run.encodings, [(prompts[prompt], cfg.seed + nth)], side, on_step_end)
        write_file(folder / f"{name}.png", png_bytes(sampled, prompts[prompt]))
    del pipeline
    record_peak(run.peaks, "validation")
    free_memory()
    live.train()
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        images = [Image.open(folder / f"{name}.png") for name in names]
        sheet = make_image_grid(images, len(prompts), cfg.num_validation_images, min(512, side))
        write_file(folder / "sheet.png", png_bytes(sheet))
        log_images(run.accelerator, images, [prompts[prompt] for _, prompt, *_ in jobs[: len(names)]], step)
        write_report(run, {})
        say(f"step {step}: images in {folder}")


def log_images(accelerator: Accelerator, images: list[Image.Image], captions: list[str], step: int) -> None:
    """Log images to the trackers that accept them."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            arrays = torch.stack([image_tensor(image) for image in images])  # (N, H, W, 3)
            tracker.log_images({"validation": arrays}, step=step, dataformats="NHWC")
        if tracker.name == "wandb":
            import wandb

            logged = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions)]
            tracker.log({"validation": logged}, step=step)


# ==== Memory plan ====================================================================================================

GIB = 2**30
CONTEXT, RESERVE = 0.5 * GIB, 1.05  # memory for the CUDA context, and a factor for fragmentation
SLOWER = {"fp8": 1.15, "nf4": 1.3, "attention": 1.2, "all": 1.4}  # the time of a step, by an estimate


class Workload(NamedTuple):
    """What the memory of a run depends on, apart from its settings."""

    model: Path
    layers: list[str]  # with a LoRA
    bucket: tuple[int, int]  # the largest one
    tokens: int  # of the longest prompt
    has_missing: bool  # class images are to be generated


class Phase(NamedTuple):
    """The device memory of one phase of a run, in bytes, as `torch.cuda.max_memory_allocated` counts it."""

    name: str
    weights: int
    state: int  # of training: the LoRA, its gradients, and the optimizer
    activations: int  # saved for the backward pass
    temporaries: int

    @property
    def peak(self) -> int:
        """Return the sum."""
        return sum(self[1:])


class MemoryCounter(TorchDispatchMode):
    """Count the bytes of all living tensors of some types, each storage once."""

    def __init__(self, *kinds: type) -> None:
        super().__init__()
        self.kinds, self.living, self.now, self.peak = kinds, weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) in self.kinds and (storage := tensor.untyped_storage()) not in self.living:
                self.living.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return result

    def count(self, size: int) -> None:
        """Add or subtract bytes."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def restart(self) -> int:
        """Start a new peak; returns the bytes that are in use."""
        gc.collect()
        self.peak = self.now
        return self.now


@contextlib.contextmanager
def simulation() -> Iterator[MemoryCounter]:
    """Have operations compute only the shapes of their results, and count the memory that these would need."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.compiler.set_stance("force_eager"), fake, MemoryCounter(FakeTensor) as memory:
        yield memory


def quantize_simulated(transformer: nn.Module, cfg: Config) -> None:
    """Quantize simulated weights, if the config says so, with the functions that the libraries load real ones with."""
    if read_bnb_settings(cfg).get("load_in_8bit"):  # its weights are as large as torchao's
        cfg = dataclasses.replace(cfg, quantization="int8", bnb_quantization_config_path=None)
    config = loading_options(cfg, transformer.dtype).get("quantization_config")
    layers = [module for name, module in transformer.named_modules() if BLOCK.match(name) and ".lora_" not in name]
    for layer in [layer for layer in layers if isinstance(layer, nn.Linear) and config is not None]:
        if isinstance(config, TorchAoConfig):
            from torchao.quantization import quantize_

            quantize_(layer, config.quant_type)
        else:
            from bitsandbytes.functional import quantize_4bit

            # without double quantization, which needs real values: it would save 0.25 GiB more
            packed, state = quantize_4bit(layer.weight.data, quant_type=config.bnb_4bit_quant_type)
            layer.weight = nn.Parameter(packed, requires_grad=False)
            layer.weight.quant_state = state
    freeze_quantized(transformer, cfg)


def allocate_state(parameters: list[nn.Parameter], cfg: Config) -> list[Tensor]:
    """Allocate what an optimizer keeps: tensors of the size of its state."""
    if cfg.optimizer == "prodigy":  # s, two moments, and the initial value of what is not zero
        return [torch.empty(p.numel() * (3 + (p.shape[0] == cfg.rank))) for p in parameters]
    if cfg.has_8bit_state:  # two moments in 8 bits and a scale for 256 values, or in fp32 if they are small
        sizes = [8 * n if n < 4096 else 2 * n + 8 * math.ceil(n / 256) for n in (p.numel() for p in parameters)]
        return [torch.empty(size, dtype=torch.uint8) for size in sizes]
    return [torch.empty(2 * parameter.numel()) for parameter in parameters]


def make_simulated_transformer(cfg: Config, workload: Workload) -> nn.Module:
    """Build the transformer with its LoRA; both have no content yet."""
    transformer = make_empty_transformer(workload.model).to(DTYPES[cfg.mixed_precision]).requires_grad_(False)
    add_lora(transformer, workload.layers, cfg)
    return transformer.train()


def make_empty_batch(size: int, bucket: tuple[int, int], tokens: int, transformer: nn.Module) -> Batch:
    """Make a batch without content."""
    embeds = [torch.empty(tokens, transformer.config.cap_feat_dim, dtype=transformer.dtype) for _ in range(size)]
    latents = torch.empty(size, 16, bucket[0] // 8, bucket[1] // 8)
    return Batch([0] * size, torch.empty(size), latents, embeds, [False] * size, None, [""] * size)


def simulate_encoding(cfg: Config, workload: Workload) -> Phase:
    """Simulate the encoding of the longest prompt."""
    with torch.device("meta"):
        text_encoder = Qwen3Model(read_text_encoder_config(workload.model)).to(DTYPES[cfg.mixed_precision])
    text_encoder.norm = nn.Identity()
    with simulation() as memory:
        encode_prompt(text_encoder.to_empty(device="cpu"), [0] * workload.tokens)
    sizes = [parameter.nbytes for parameter in text_encoder.parameters()]
    held = max(sizes) if cfg.offload else sum(sizes)  # one matrix at a time
    return Phase("text encoding", held, 0, 0, memory.peak - sum(sizes))


def simulate_vae(cfg: Config, workload: Workload) -> tuple[Phase, Phase]:
    """Simulate the encoding of the largest image, or of a batch without cached latents, and the decoding of one."""
    side, size = cfg.validation_resolution or cfg.training_side, 1 if cfg.cache_latents else cfg.train_batch_size
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(workload.model / "vae"))
    vae.to(DTYPES[cfg.mixed_precision])
    with simulation() as memory, torch.no_grad():
        vae.to_empty(device="cpu")
        weights = memory.restart()
        encode_images(vae, torch.empty(size, 3, *workload.bucket))
        latents = Phase("latents", weights, 0, 0, memory.peak - weights)
        memory.restart()
        vae.decode(torch.empty(1, 16, side // 8, side // 8, dtype=vae.dtype))
    return latents, Phase("decoding", weights, 0, 0, memory.peak - weights)


def simulate_transformer(cfg: Config, workload: Workload, codec: tuple[Phase, Phase]) -> list[Phase]:
    """Simulate training steps and a denoising step of each kind of images, with the functions of a real run."""
    (latents, decoding), transformer = codec, make_simulated_transformer(cfg, workload)
    with simulation() as memory:
        quantize_simulated(transformer.to_empty(device="cpu"), cfg)
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        lora = sum(parameter.nbytes for parameter in parameters)
        weights = memory.restart() - lora
        optimizer_state = allocate_state(parameters, cfg)
        batch = make_empty_batch(cfg.train_batch_size, workload.bucket, workload.tokens, transformer)
        state, activations = memory.restart() - weights, 0
        for _ in range(min(2, cfg.gradient_accumulation_steps)):  # from the second on, gradients stay
            before = memory.now
            loss = training_loss(transformer, batch, cfg).mean()
            activations = memory.now - before
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        del optimizer_state
        state += lora  # gradients, which grow while activations shrink
        activations = min(activations, memory.peak - weights - state)
        others, vae = memory.peak - weights - state - activations, 0
        if not cfg.cache_latents:  # the VAE encodes every batch
            others, vae = max(others, latents.temporaries - activations), latents.weights
        phases = [Phase("training", weights + vae, state, activations, others)]
        for parameter in parameters:
            parameter.grad = None
        is_validated, side = bool({*needed_prompts([], cfg)} - {""}), cfg.validation_resolution or cfg.training_side
        ratio = DTYPES[cfg.prior_generation_precision].itemsize / transformer.dtype.itemsize
        kinds = [("class images", cfg.sample_batch_size, 0, ratio)] * workload.has_missing
        for name, images, held, factor in kinds + [("validation", 1, state - lora, 1)] * is_validated:
            before, count = memory.restart(), images * (2 if cfg.guidance_scale else 1)
            batch = make_empty_batch(count, (side, side), workload.tokens, transformer)
            with torch.no_grad():
                noisy_latents = batch.latents.to(transformer.dtype)
                predict_velocity(transformer, noisy_latents, batch.sigmas, batch.prompt_embeds)
            bare = weights * (factor if cfg.storage in DTYPES else 1) + decoding.weights
            others = factor * max(memory.peak - before, decoding.temporaries)
            phases.append(Phase(name, round(bare), held, 0, round(others)))
    return sorted([*phases, *[latents] * cfg.cache_latents])  # their names are in the order of a run


def list_choices(cfg: Config, plan: Plan) -> list[Config]:
    """List the config with all combinations of what it leaves open, from fast to slow."""
    is_open = cfg.fit is not None or (cfg.dry_run and PartialState().device.type == "cpu")
    kinds = [plan.checkpoint.state["binding"].get("--quantization")] if plan.checkpoint else [None, "fp8", "nf4"]
    storages = [{"quantization": kind} for kind in kinds] if is_open and cfg.storage in DTYPES else [{}]
    is_open = cfg.gradient_checkpointing is None and cfg.checkpoint_blocks is None
    dials = [{"checkpoint_blocks": kind} for kind in ("none", "attention", "all")] if is_open else [{}]
    options = [dataclasses.replace(cfg, **storage, **dial) for storage, dial in itertools.product(storages, dials)]
    return sorted(options, key=lambda option: SLOWER.get(option.storage, 1) * SLOWER.get(option.recomputed, 1))


def find_limit(cfg: Config) -> float:
    """Return the memory in bytes that the run may use: that of `--fit`, or what is free on its GPUs, or infinity."""
    device, is_given = PartialState().device, cfg.fit not in (None, "auto")
    require(cfg.fit != "auto" or device.type == "cuda", "--fit auto: torch sees no GPU; give a size, as in --fit 24")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    return float(cfg.fit) * GIB if is_given else min(gather_object([free]))


def fit(given: Config, plan: Plan, workload: Workload) -> tuple[Config, list[Phase]]:
    """Choose the fastest settings that fit, among those left open. Raises UserError if `--fit` finds none."""
    limit, is_told, options = find_limit(given), given.fit is not None or given.dry_run, []
    if (limit == math.inf or is_on("ACCELERATE_USE_FSDP")) and not given.dry_run:
        return given, []  # what FSDP shards is not simulated
    cfg, encoding, codec = given, simulate_encoding(given, workload), simulate_vae(given, workload)
    if given.fit is not None and encoding.peak * RESERVE + CONTEXT > limit:
        cfg = dataclasses.replace(given, offload=True)
        encoding = simulate_encoding(cfg, workload)
    table = "{:>15} {:>11} {:>8} {:>20} {:>13}".format
    say(*[table("frozen weights", "recomputed", "offload", "simulated peak (GiB)", "with reserve")] * is_told)
    for option in list_choices(cfg, plan):
        phases = [encoding, *simulate_transformer(option, workload, codec)]
        peak = max(phase.peak for phase in phases)
        needed = peak * RESERVE + CONTEXT
        options.append((needed, option, phases))
        figures = "yes" if option.offload else "no", f"{peak / GIB:.1f}", f"{needed / GIB:.1f}"
        say(*[table(option.storage, option.recomputed, *figures)] * is_told)
        if needed <= limit < math.inf:
            break
    needed, option, phases = options[0] if limit == math.inf else min(options, key=lambda one: one[0])
    reason = f"{needed / GIB:.1f} of {limit / GIB:.1f} GiB, simulated, with reserve"
    remedy = "lower --resolution, --train_batch_size, or --rank, or use a GPU with more memory"
    require(needed <= limit or cfg.fit is None, f"--fit {cfg.fit}: nothing fits: {reason}; {remedy}")
    chosen = {name: value for name, value in vars(option).items() if value != getattr(given, name)}
    flags = " ".join(f"--{name} {value}".replace(" True", "") for name, value in chosen.items())
    say(*[f"memory: {reason}, with {flags or 'the given settings'}"] * (limit < math.inf))
    say(*["warning: this may not fit; --fit auto can also quantize the weights"] * (needed > limit))
    return option, phases


def describe_costs(cfg: Config, workload: Workload, phases: list[Phase]) -> Iterator[str]:
    """Yield what a run costs in memory and compute, and the size of the LoRA; nothing of it is measured."""
    transformer = make_simulated_transformer(cfg, workload)
    yield describe_lora(transformer, workload.layers, cfg).split(", over ")[0]
    yield f"details for {cfg.storage} weights, recomputed blocks: {cfg.recomputed}"
    table = "{:>15} {:>9} {:>28} {:>13} {:>13} {:>7}".format
    yield table("simulated, GiB", "weights", "LoRA, gradients, optimizer", "activations", "temporaries", "peak")
    for phase in phases:
        yield table(phase.name, *(f"{size / GIB:.2f}" for size in (*phase[1:], phase.peak)))
    yield "reserve, not included: 0.5 GiB for the CUDA context, and 5% of the peak for fragmentation"
    encoder = simulate_encoding(dataclasses.replace(cfg, offload=False), workload).weights
    host = psutil.Process().memory_info().rss + encoder
    yield f"host memory: about {host / GIB:.1f} GiB, while the text encoder is loaded or offloaded"
    with simulation(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        batch = make_empty_batch(cfg.train_batch_size, workload.bucket, workload.tokens, transformer)
        training_loss(transformer.to_empty(device="cpu"), batch, cfg).mean().backward()
    flops = counter.get_total_flops() * cfg.gradient_accumulation_steps
    yield f"compute: {flops / 1e12:,.3g} TFLOP per step and process"


def describe_disk(cfg: Config, plan: Plan, workload: Workload, empty: ZImageTransformer2DModel) -> Iterator[str]:
    """Yield how much disk space checkpoints and encodings need at most, as a warning if there is less."""
    steps, limit = plan.schedule.max_train_steps - plan.schedule.first_step, cfg.checkpoints_total_limit
    count = min(math.ceil(steps / cfg.checkpointing_steps), (limit or steps) + 1)
    lora = sum(cfg.rank * sum(empty.get_submodule(layer).weight.shape) for layer in workload.layers)
    prompts = len({sample.prompt for sample in plan.samples}) * workload.tokens * empty.config.cap_feat_dim * 4
    pixels = sum(math.prod(sample.bucket) for sample in plan.samples) * cfg.cache_latents * (1 + cfg.random_flip)
    needs = {Path(cfg.output_dir): (count + 1) * 16 * lora, cfg.encodings_folder: prompts + pixels}  # a byte per pixel
    for folder, size in needs.items():
        present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        require(os.access(present, os.W_OK), f"{present} is read-only; choose another --output_dir or --cache_dir")
        free = shutil.disk_usage(present).free
        words = f"disk space: up to {size / 1e9:.2f} GB in {folder}, where {free / 1e9:.1f} GB are free"
        yield "warning: " * (size > free) + words


# ==== Artifacts ======================================================================================================

SHARED_FILES = (LORA_FILE, BEST_FILE, "README.md", "validation/step-*/*.png")
TEMPORARY_FILES = (".z-image-*.tmp", "checkpoint-*/.z-image-*.tmp", "validation/step-*/.z-image-*.tmp")


def finish_lora(run: Run) -> Path:
    """Write the final LoRA file; load the saved weights back into the live model."""
    output, scale = Path(run.cfg.output_dir), run.cfg.lora_scale
    saved = save_lora(run, lora_state_dict(run.transformer), output / LORA_FILE)
    unfolded = export_lora(saved, 1 / scale, torch.float32)
    load_lora(run.transformer, {name.removeprefix("transformer.transformer."): t for name, t in unfolded.items()})
    return output / LORA_FILE


def save_config(cfg: Config, record: dict[str, Any]) -> None:
    """Write config.json: all settings, which `--config` restores, and the environment, which it does not."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "Pillow")
    environment = {name: importlib.metadata.version(name) for name in packages} | {"python": sys.version.split()[0]}
    if "__file__" in globals():
        environment["script_sha256"] = sha256(Path(__file__).read_bytes())
    settings = shareable_settings(cfg) | {"environment": environment | record}
    for name in ("resume_from_checkpoint", "resume_anyway", "overwrite_output_dir"):  # these apply to one start only
        del settings[name]
    content = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_file(Path(cfg.output_dir) / "config.json", content.encode())


def save_model_card(cfg: Config, plan: Plan, record: dict[str, Any]) -> None:
    """Write README.md: images, trigger prompt, how to use the LoRA, how it was trained; without local paths."""
    step, trigger = plan.schedule.max_train_steps, trained_prompt(cfg, plan.samples)
    is_local = re.compile(r".*_(dir|path|checkpoint|name|adapter|lora)").fullmatch
    public = {n: v for n, v in shareable_settings(cfg).items() if v != getattr(Config, n) and not is_local(n)}
    base = None if Path(cfg.pretrained_model_name_or_path).exists() else cfg.pretrained_model_name_or_path
    images = generated_images(validation_folder(cfg, step))
    images = [(prompt, file.relative_to(cfg.output_dir).as_posix()) for prompt, file in images]
    data = ModelCardData(
        license="apache-2.0", base_model=base, library_name="diffusers", instance_prompt=trigger,
        pipeline_tag="text-to-image", tags=["text-to-image", "diffusers", "lora", "z-image", "template:sd-lora"],
        widget=[{"text": text, "output": {"url": file}} for text, file in images] or None,
    )  # fmt: skip
    card = CARD.format(
        trigger=one_line(trigger or "none: every image has its own caption"),
        images="\n".join(f"![{one_line(text)}]({file})" for text, file in images),
        cfg=cfg, scale=f"{cfg.lora_scale:g}", last=step, base=base or "path/to/the/base/model",
        checkpoints=", ".join(path.name for path in list_checkpoints(Path(cfg.output_dir))[:-1]) or "none",
        settings=json.dumps(public, ensure_ascii=False), record=json.dumps(record),
        side=cfg.validation_resolution or cfg.training_side,
        prompt=json.dumps(images[0][0] if images else trigger or plan.samples[0].prompt, ensure_ascii=False),
    )  # fmt: skip
    write_file(Path(cfg.output_dir) / "README.md", f"---\n{data.to_yaml()}\n---\n{card}".encode())


def one_line(text: str) -> str:
    """Put a prompt on one line, without the characters that Markdown and HTML interpret."""
    return " ".join(re.sub(r"[\[\]()<>|*_`#]", " ", text).split())


def open_repository(cfg: Config) -> str:
    """Create the repository before training and return its full name; in a dry run, only the name of the user."""
    remedy = "check your network and login (`hf auth login` or --hub_token), or upload later without this flag"
    with explained(f"--push_to_hub: the repository {cfg.repository} cannot be used", remedy):
        hub = HfApi(token=cfg.hub_token)
        if cfg.dry_run:
            return hub.whoami()["name"]
        return hub.create_repo(cfg.repository, private=cfg.hub_private_repo or None, exist_ok=True).repo_id


def push(cfg: Config, repository: str) -> None:
    """Upload only the files that are meant to be shared. Raises UserError with the command to try again."""
    options = " ".join(f"--include='{pattern}'" for pattern in SHARED_FILES)
    problem = f"the LoRA is complete and safe in {cfg.output_dir}, but the upload failed"
    with explained(problem, f"try again with: hf upload {repository} '{cfg.output_dir}' . {options}"):
        what = {"repo_id": repository, "folder_path": cfg.output_dir, "allow_patterns": SHARED_FILES}
        HfApi(token=cfg.hub_token).upload_folder(**what, commit_message="Z-Image LoRA")
    say(f"uploaded to {repository}")


def compare_peaks(run: Run, phases: list[Phase]) -> dict[str, Any]:
    """Compare the memory that the GPU has used with the simulated one, in GiB; add the median time of a step."""
    metrics = map(json.loads, Path(run.cfg.output_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    seconds = [row["seconds"] for row in metrics]
    record = {"seconds_per_step": round(statistics.median(seconds), 4)} if seconds else {}
    for phase in phases:
        sizes = {"simulated": phase.peak, "measured": max(gather_object([run.peaks.get(phase.name, 0)]))}
        record[phase.name] = {kind: round(size / GIB, 2) for kind, size in sizes.items() if size}
    return record


def describe_results(cfg: Config, file: Path, record: dict[str, Any]) -> list[str]:
    """Describe where the results are, and how many steps were skipped."""
    lines = [f"LoRA      {file}", f"report    {file.with_name('report.html')}"]
    skipped = file.with_name("metrics.jsonl").read_text(encoding="utf-8").count('"is_skipped": true')
    for name, value in record.items():
        parts = {"": value} if isinstance(value, float) else value
        text = ", ".join(f"{part:.3g} GiB {kind}" if kind else f"{part:.3g}" for kind, part in parts.items())
        lines.append(f"{name.replace('_', ' ')}: {text}")
    lines += [f"warning: {skipped} steps were skipped because the loss or gradient was not finite"] * bool(skipped)
    return lines + DEMO_FAREWELL.format(script=Path(sys.argv[0]).name).splitlines() * cfg.demo


CARD = """
# Z-Image LoRA

Trigger prompt: **{trigger}**

{images}

## Usage

```python
import torch
from diffusers import ZImagePipeline

pipe = ZImagePipeline.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("path/to/this/folder")
generator = torch.Generator().manual_seed({cfg.seed})
options = {{"num_inference_steps": {cfg.num_inference_steps}, "guidance_scale": {cfg.guidance_scale}}}
image = pipe({prompt}, height={side}, width={side}, generator=generator, **options).images[0]
image.save("output.png")
```

## Training

DreamBooth LoRA for Z-Image, from `train_dreambooth_lora_z_image.py`: rank {cfg.rank}, alpha / rank {scale} (folded
into the file), layers {cfg.lora_layers}, {last} steps of {cfg.optimizer} at {cfg.learning_rate}, {cfg.resolution}
pixels. Earlier steps that the run also saved: {checkpoints}. Other settings, without paths: `{settings}`.
Seconds per step, and peak memory of the GPU in GiB: `{record}`.
"""

DEMO_FAREWELL = """
That was a tiny random model. To train the real one on your own images, with a GPU:

accelerate launch {script} \\
  --pretrained_model_name_or_path=Tongyi-MAI/Z-Image --instance_data_dir=dog --instance_prompt="a photo of sks dog" \\
  --output_dir=my-first-lora --gradient_checkpointing --cache_latents --validation_prompt="sks dog in a bucket"
"""


# ==== Demo ===========================================================================================================

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_demo_model(folder: Path) -> None:
    """Write a random Z-Image checkpoint of all five components: byte-level text, 64 channels, two blocks."""
    from tokenizers.pre_tokenizers import ByteLevel

    torch.manual_seed(0)
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], unk_token="<|endoftext|>",
        eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    text_encoder = Qwen3Model(Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
    ))  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, layers_per_block=1, latent_channels=16, norm_num_groups=4,
        scaling_factor=0.3611, shift_factor=0.1159,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[8, 12, 12], axes_lens=[1024, 128, 128],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    ZImagePipeline(scheduler, vae, text_encoder.eval(), tokenizer, transformer).save_pretrained(folder)


def make_demo_images(folder: Path) -> None:
    """Draw one subject, a badge, five times, with different backgrounds, positions, sizes, and image shapes."""
    sizes = [(96, 96), (128, 96), (96, 128), (160, 120), (80, 80)]
    for number, (background, (width, height)) in enumerate(zip(("navy", "white", "orange", "black", "green"), sizes)):
        image = Image.new("RGB", (width * 4, height * 4), background)
        radius = min(width, height) * (1.1 + 0.1 * number)
        left, top = width * 2 - radius + 4 * number, height * 2 - radius - 4 * number
        box, draw = [left, top, left + 2 * radius, top + 2 * radius], ImageDraw.Draw(image)
        draw.pieslice(box, 90, 270, fill="red")
        draw.pieslice(box, 270, 450, fill="yellow")
        draw.ellipse(box, outline="gray", width=12)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        write_file(folder / f"badge-{number}.png", png_bytes(image))


def make_demo(cfg: Config) -> None:
    """Create the demo model and the demo images, unless the user specified others."""
    if PartialState().is_main_process:
        settings = demo_settings(cfg.output_dir)
        if cfg.pretrained_model_name_or_path == settings["pretrained_model_name_or_path"]:
            make_demo_model(Path(cfg.pretrained_model_name_or_path))
        if cfg.instance_data_dir == settings["instance_data_dir"]:
            make_demo_images(Path(cfg.instance_data_dir))
    PartialState().wait_for_everyone()


# ==== Main ===========================================================================================================


def make_accelerator(cfg: Config) -> Accelerator:
    """Make the accelerator for accumulation and processes; precision and torch.compile are not left to it."""
    names, known = cfg.trackers, LoggerType.list()
    require(set(names) <= set(known), f"--report_to {cfg.report_to}: accelerate supports {', '.join(known)}, or none")
    accumulation = GradientAccumulationPlugin(num_steps=cfg.gradient_accumulation_steps, sync_with_dataloader=False)
    with explained("accelerate cannot start"):
        accelerator = Accelerator(
            mixed_precision="no", dynamo_backend="no", gradient_accumulation_plugin=accumulation,
            log_with=names or None, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
            project_config=ProjectConfiguration(cfg.output_dir, str(Path(cfg.output_dir, cfg.logging_dir))),
        )  # fmt: skip
    is_there = "all" in names or len(accelerator.log_with) == len(names)
    require(is_there, f"--report_to: the package of a tracker is not installed; pip install {' '.join(names)}")
    started, seen = os.environ.get("WORLD_SIZE", "1"), accelerator.num_processes
    require(int(started) == seen, f"accelerate sees {seen} of {started} processes; torch must see a GPU for each")
    torch.set_float32_matmul_precision("high" if cfg.allow_tf32 else "highest")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it of deterministic runs
    torch.use_deterministic_algorithms(cfg.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return accelerator


def describe_device(cfg: Config) -> Iterator[str]:
    """Yield the device that the run uses, and a warning if it is not suitable."""
    device, is_gpu = PartialState().device, PartialState().device.type == "cuda"
    precision = "fp32" if cfg.mixed_precision == "no" else cfg.mixed_precision
    yield f"device: {torch.cuda.get_device_name(device) if is_gpu else device.type}, {precision} precision"
    if device.type == "cpu" and not cfg.demo:
        yield "warning: torch sees no GPU; on a CPU, training the full model is far too slow"
    if is_gpu and cfg.mixed_precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "warning: this GPU only emulates bf16, which is slow; use one of compute capability 8.0 or higher"


def prepare_output(cfg: Config, chosen: dict[str, Any], accelerator: Accelerator) -> None:
    """Prepare the output folder: start the trackers, remove an earlier run if requested, write config.json."""
    output, logs = Path(cfg.output_dir), Path(cfg.output_dir, cfg.logging_dir)
    if cfg.trackers:
        settings = {name: v if isinstance(v, (int, float)) else str(v) for name, v in shareable_settings(cfg).items()}
        with explained(f"--report_to {cfg.report_to} cannot start", "for wandb: `wandb login` or WANDB_MODE=offline"):
            logs.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere if its folder is missing
            accelerator.init_trackers("dreambooth-z-image-lora", settings, init_kwargs={"wandb": {"dir": str(logs)}})
    if accelerator.is_main_process:
        is_replaced = cfg.overwrite_output_dir or (cfg.demo and cfg.resume_from_checkpoint is None)
        stale = [path for pattern in TEMPORARY_FILES for path in output.glob(pattern)]  # of a run that was killed
        if is_replaced:
            names = re.compile(r"(\d+-\d+|sheet|strength-[\d.]+)\.png|gain\.json")
            stale += [path for path in output.glob(f"{STEPS}/*") if names.fullmatch(path.name)]
            stale += [output / name for name in RUN_FILES]
            folders = [*list_checkpoints(output), *filter(is_half_checkpoint, output.glob("checkpoint-*[0-9]"))]
            for folder in (*folders, *output.glob("superseded-checkpoint-*-????????")):
                if not folder.is_symlink():
                    remove_checkpoint(folder)
        for path in stale:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                path.parent.rmdir()
        save_config(cfg, {"chosen": chosen})
    accelerator.wait_for_everyone()


def check_plan(cfg: Config, plan: Plan, encodings: Encodings, empty: ZImageTransformer2DModel) -> None:
    """Reject a plan that the model, machine, or checkpoint does not support, before any weights are loaded."""
    check_hardware(cfg, empty)
    if cfg.training_adapter is not None:
        load_training_adapter(empty, cfg)
    steps = gather_object([plan.schedule.first_step])
    require(len(set(steps)) == 1, f"--output_dir {cfg.output_dir} differs between machines; use a shared folder")
    if plan.checkpoint is not None:
        with explained(f"--resume_from_checkpoint: {plan.checkpoint.folder} is damaged", "choose another"):
            check_continuity(cfg, plan.checkpoint, make_binding(cfg, encodings.contents, plan))


def train_and_save(run: Run) -> None:
    """Resume, train, validate, and save checkpoints. Raises Stopped, after saving, if asked to stop."""
    resume(run)
    cfg, schedule, stop = run.cfg, run.plan.schedule, run.stop
    binding = make_binding(cfg, run.encodings.contents, run.plan)
    step, last = schedule.first_step, schedule.max_train_steps
    saved_step, saved_at, interval = step, time.monotonic(), 60 * (cfg.checkpointing_minutes or math.inf)
    batches = make_batches(run.plan.samples, run.encodings, step)
    steps = train(run, stop.heed(batches))
    bar = progress_bar(steps, "training", initial=step, total=last)
    is_validated = step > 0 and (validation_folder(cfg, step) / "sheet.png").exists()
    with stop:
        with contextlib.suppress(Stopped):
            if schedule.is_validation_step(step) and not is_validated:
                validate(run, step)
            for metrics in bar:
                step = metrics["step"]
                bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
                log_metrics(run, metrics)
                if schedule.is_validation_step(step):
                    validate(run, step)
                is_due = step == last or step % cfg.checkpointing_steps == 0
                if is_due or (cfg.checkpointing_minutes and any_process(time.monotonic() - saved_at > interval)):
                    save_checkpoint(run, step, binding)
                    saved_step, saved_at = step, time.monotonic()
        if saved_step < step:
            save_checkpoint(run, step, binding)
    if step < last:
        for tracker in run.accelerator.trackers:
            tracker.finish()
        raise Stopped(f"stopped by {stop.reason} after step {step}{', which is saved' * (step > 0)}", stop.number)


def run_all(given: Config, plan: Plan, accelerator: Accelerator) -> Path:
    """Run everything: plan -> caches -> model -> loop -> artifacts. Returns the LoRA file."""
    stop, model, last = StopRequest(given.max_train_minutes), find_model(given), plan.schedule.max_train_steps
    empty = make_empty_transformer(model)
    start, lora = read_lora(resolve_timestep_shift(given, model), empty)
    layers = resolve_lora_layers(start.lora_layers, empty)
    samples = [*plan.samples, *plan.held_out]
    tokens = tokenize(needed_prompts(samples, given), model, given.max_sequence_length)
    check_positions(given, samples, tokens, empty.config.axes_lens)
    bucket = max((sample.bucket for sample in samples), key=math.prod)
    has_missing = any(not sample.digest for sample in plan.samples)
    workload = Workload(model, layers, bucket, max(map(len, tokens.values())), has_missing)
    cfg, phases = fit(start, plan, workload)
    chosen = {name: value for name, value in vars(cfg).items() if value != getattr(start, name)}
    disk = describe_disk(cfg, plan, workload, empty)
    if cfg.dry_run:
        if plan.checkpoint is not None:
            check_continuity(cfg, plan.checkpoint, make_binding(cfg, {}, plan))
        with explained(f"--attention_backend {cfg.attention_backend} does not work here"):
            empty.set_attention_backend(cfg.attention_backend)
        say(*describe_costs(cfg, workload, phases), *disk)
        if cfg.push_to_hub:
            say(f"Hub: logged in as {open_repository(cfg)}")
        return Path(cfg.output_dir, LORA_FILE)
    say(*(line for line in disk if line.startswith("warning")))
    encodings, peaks = Encodings(cfg, model, identify(model, cfg.variant)), {}
    check_plan(cfg, plan, encodings, empty)
    repository = open_repository(cfg) if cfg.push_to_hub and accelerator.is_main_process else None
    prepare_output(given, chosen, accelerator)

    fill_prompts_cache(tokens, encodings)
    record_peak(peaks, "text encoding")
    plan = plan._replace(samples=generate_class_images(plan.samples, encodings))
    record_peak(peaks, "class images")
    measured = sum(measured_samples(cfg, plan).values(), [])
    fill_latents_cache(plan.samples * cfg.cache_latents + measured, encodings)
    record_peak(peaks, "latents")

    transformer = load_transformer(model, cfg, DTYPES[cfg.mixed_precision])
    if cfg.training_adapter is not None:
        load_training_adapter(transformer, cfg)
    parameters = add_lora(transformer, layers, cfg)
    start_from(lora, transformer, cfg)
    say(describe_lora(transformer, layers, cfg))
    transformer, optimizer = accelerator.prepare(transformer, make_optimizer(parameters, cfg))
    run = Run(cfg, plan, encodings, accelerator, transformer, optimizer, stop, peaks)
    train_and_save(run)
    record_peak(peaks, "training")
    file = finish_lora(run)
    validate(run, last, is_final=True)
    record = compare_peaks(run, phases)
    if accelerator.is_main_process:
        save_config(given, {"chosen": chosen} | record)
        save_model_card(cfg, plan, record)
        write_report(run, record)
    accelerator.end_training()
    if repository is not None:
        push(cfg, repository)
    say(*describe_results(cfg, file, record))
    return file


def main(cfg: Config, plan: Plan | None = None) -> Path:
    """Run everything. Returns the LoRA file. Raises Stopped, after saving, if asked to stop while training."""
    free_memory()  # of an earlier run in a notebook, which only the garbage collector frees
    with contextlib.nullcontext() if cfg.dry_run else hold_output(Path(cfg.output_dir)):
        accelerator = make_accelerator(cfg)
        say(*describe_device(cfg))
        if cfg.demo:
            check_output(cfg, find_checkpoint(cfg))  # before anything is written there
            make_demo(cfg)
        try:
            return run_all(cfg, plan or make_plan(cfg), accelerator)
        except torch.OutOfMemoryError as error:
            more = "" if cfg.fit else "--fit auto, "
            more = f"the GPU is out of memory; try {more}a smaller --train_batch_size, --resolution, or --rank"
            raise UserError(f"{more}; {describe_last(cfg)}") from error


if RUN_AS_SCRIPT:
    gc.freeze()  # exclude the imports from garbage collection; scanning them takes 0.3 s each time
    run_or_exit(main, CONFIG, PLAN)
