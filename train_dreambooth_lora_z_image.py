#!/usr/bin/env python
# ruff: noqa: E402
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.13.0", "diffusers>=0.42.1", "transformers>=5.24.0", "peft>=0.21.2", "accelerate>=1.15.0",
#     "torchao>=0.18.0", "bitsandbytes>=0.50.2", "prodigyopt>=1.1.2", "wandb>=0.31.0", "huggingface_hub>=2.4.0",
#     "Pillow>=13.0.0",
# ]
# ///
"""Teach Z-Image a new subject or style from a handful of pictures: DreamBooth with LoRA, in one file.

    python train_dreambooth_lora_z_image.py --demo                                  # a tiny model, no download, no GPU
    accelerate launch train_dreambooth_lora_z_image.py --pretrained_model_name_or_path=Tongyi-MAI/Z-Image \\
        --instance_data_dir=dog --instance_prompt="a photo of sks dog" --gradient_checkpointing --cache_latents
    accelerate launch train_dreambooth_lora_z_image.py --config OUTPUT_DIR/config.json --resume_from_checkpoint latest

The file is read from top to bottom; a section uses only what stands above it.

    Config                  every flag, one line each; refuses what cannot work
    Data plan               pictures, captions, buckets, the order of the examples, the length of the run
    Checks                  what can be refused before anything is loaded; the checkpoint to continue from
    Encoders and caches     prompts and pictures become embeddings and latents, once, on disk; `Batch`
    Transformer and LoRA    the frozen model and what is trained in it
    Objective               flow matching, as pure functions; `training_loss`
    Training                `train`: the loop; learning rate, checkpoints, resume
    Sampling                class pictures and validation, from the live model
    Artefacts               the LoRA file, the model card
    Demo                    a tiny random checkpoint and drawn pictures
    Main                    the table of contents

Data flows one way, the config is frozen, and every random choice is a function of (seed, number of the example). So a
run that is interrupted and continued sees the same pictures, noise and rates, and on a CPU ends in the same bytes; and
one on more processes, with the same total batch, follows the same loss curve up to rounding (without LoRA dropout).
"""

import argparse
import collections
import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
import types
import typing
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageDraw, ImageOps
from tqdm.auto import tqdm


# =====================================================================================================================
# Config
# =====================================================================================================================


class UserError(ValueError):
    """Say what the user can mend: one sentence that names the flag or the file, and the remedy."""


class Stopped(KeyboardInterrupt):
    """Say that the run has been asked to stop, and how to continue it; holds the number of the signal."""

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(f"{sentence}; continue with the same command and --resume_from_checkpoint latest")
        self.number = number


def require(condition: bool, sentence: str) -> None:
    """Refuse with a sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextlib.contextmanager
def explained(what: str, remedy: str = "") -> Iterator[None]:
    """Turn the errors of a library, each of which raises its own, into a sentence: what failed, why, the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{what}: {reason}{remedy and '; '}{remedy}") from error


def printable(text: str) -> str:
    """Put a text on one line: newlines, terminal codes and halves of letters, as file names have them, are escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def say(*lines: str, everywhere: bool = False) -> None:
    """Print for a person, from the first process only unless told otherwise, without tearing a progress bar."""
    for line in lines if everywhere or os.environ.get("RANK", "0") == "0" else ():
        tqdm.write(printable(line), file=sys.stdout)


BOUNDS = {
    "at_least": (operator.ge, "must be at least"),
    "above": (operator.gt, "must be above"),
    "below": (operator.lt, "must be below"),
    "multiple_of": (lambda value, bound: value % bound == 0, "must be a multiple of"),
}


def flag(default: Any, help: str, *aliases: str, is_secret: bool = False, **bounds: float) -> Any:
    """One setting: its default, its line of help, its other names, and its bounds, by the names in `BOUNDS`."""
    metadata = {"help": help, "aliases": aliases, "is_secret": is_secret, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata, repr=not is_secret)


class Settings:
    """A group of settings; what bounds and types cannot say, it refuses in `check`."""

    def check(self) -> None:
        """Refuse contradictions; most groups have none."""


Precision = Literal["bf16", "no", "fp16"]
Storage = Literal["fp8", "int8", "nf4"]
Weighting = Literal["logit_normal", "none", "mode", "sigma_sqrt", "cosmap"]
Course = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"
]
NO_FP16 = "{} fp16 is refused: Z-Image overflows in fp16 and gives NaN or black pictures; use bf16, or no for fp32"


# fmt: off
@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Model"""

    pretrained_model_name_or_path: str | None = flag(None, "Z-Image: a diffusers folder or a hub name. Required.")
    revision: str | None = flag(None, "Branch, tag or commit of a hub name.")
    variant: str | None = flag(None, "Read the weight files with this in their names, such as bf16.")
    max_sequence_length: int = flag(512, "Prompts are cut after this many tokens, chat template included.", at_least=1)

    def check(self) -> None:
        """Refuse a run without a model."""
        sentence = "--pretrained_model_name_or_path is required: a folder or a hub name such as Tongyi-MAI/Z-Image"
        require(self.pretrained_model_name_or_path is not None, f"{sentence} (or try --demo, which needs none)")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Data"""

    instance_data_dir: str | None = flag(None, "Folder with the pictures to learn, searched recursively.")
    instance_prompt: str | None = flag(None, "Prompt of every picture without a caption of its own.")
    dataset_name: str | None = flag(None, "Hub dataset or local dataset folder, instead of --instance_data_dir.")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, if it has several.")
    image_column: str = flag("image", "Column of the dataset with the pictures.")
    caption_column: str | None = flag(None, "Column of the dataset with the captions.")
    repeats: int = flag(1, "How often every instance picture appears in one epoch.", at_least=1)
    resolution: int = flag(1024, "Side of the square pictures are cropped to.", at_least=16, multiple_of=16)
    use_aspect_ratio_buckets: bool = flag(False, "Buckets of about resolution x resolution pixels; never enlarges.")
    aspect_ratio_buckets: str | None = flag(None, "Explicit buckets: 'height,width;height,width;...'.")
    center_crop: bool = flag(False, "Crop the middle instead of a fresh random place every time.")
    random_flip: bool = flag(False, "Mirror half of the examples.")
    with_prior_preservation: bool = flag(False, "Alternate with pictures of the class, so that it is not forgotten.")
    class_data_dir: str | None = flag(None, "Folder of class pictures; missing ones are generated into it.")
    class_prompt: str | None = flag(None, "Prompt of the class pictures.")
    num_class_images: int = flag(100, "Generate until there are this many class pictures; all are used.", at_least=1)
    sample_batch_size: int = flag(4, "Class pictures generated at a time, per process.", at_least=1)
    prior_generation_precision: Literal["bf16", "fp32", "no", "fp16"] = flag("bf16", "For class pictures; no is fp32.")

    def check(self) -> None:
        """Refuse contradictory sources, unreadable buckets and half a prior preservation."""
        is_one = (self.instance_data_dir is None) != (self.dataset_name is None)
        require(is_one, "give the pictures with --instance_data_dir or with --dataset_name, one of the two")
        is_table = self.caption_column is None or self.dataset_name is not None
        require(is_table, "--caption_column belongs to --dataset_name; a folder has NAME.txt or metadata.jsonl")
        if self.aspect_ratio_buckets is not None:
            parse_buckets(self.aspect_ratio_buckets)
        has_class = not self.with_prior_preservation or None not in (self.class_data_dir, self.class_prompt)
        require(has_class, '--with_prior_preservation needs --class_data_dir and --class_prompt ("a photo of dog")')
        require(self.prior_generation_precision != "fp16", NO_FP16.format("--prior_generation_precision"))


def parse_buckets(text: str) -> list[tuple[int, int]]:
    """Read 'height,width;height,width;...'. Raises UserError for anything else, and for sides no multiple of 16."""
    is_list = re.fullmatch(r"\s*\d+\s*,\s*\d+\s*(;\s*\d+\s*,\s*\d+\s*)*;?\s*", text) is not None
    require(is_list, f"--aspect_ratio_buckets reads 'height,width;height,width;...', got {text!r}")
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    for side in numbers:
        require(side >= 16 and side % 16 == 0, f"--aspect_ratio_buckets: sides must be multiples of 16, got {side}")
    return list(zip(numbers[::2], numbers[1::2]))


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """Caches"""

    cache_dir: str | None = flag(None, "Folder for downloads and encodings. Default: the Hugging Face home.")
    cache_latents: bool = flag(False, "Encode every picture once, then free the VAE; centres the crops.")


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """LoRA"""

    rank: int = flag(16, "Rank r of the update matrices.", at_least=1)
    lora_alpha: float | None = flag(None, "The update is scaled by alpha / rank. Default: rank.", above=0)
    lora_dropout: float = flag(0.0, "Share of the update's inputs dropped in training.", at_least=0, below=1)
    lora_layers: str = flag("to_q,to_k,to_v,to_out.0,w1,w2,w3", "Linear layers to adapt: suffixes, names or blocks.")

    @property
    def lora_scale(self) -> float:
        """The factor alpha / rank by which the update counts."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings):
    """Objective"""

    weighting_scheme: Weighting = flag("logit_normal", "How noise levels are drawn or weighted; none is uniform.")
    logit_mean: float = flag(0.0, "Mean of logit_normal; above 0 means more noise.")
    logit_std: float = flag(1.0, "Standard deviation of logit_normal.", above=0)
    mode_scale: float = flag(1.29, "Scale of mode.")
    timestep_shift: str = flag("1", "Shift s of noise levels: s x / (1 + (s - 1) x); 'scheduler' takes the model's.")
    prior_loss_weight: float = flag(1.0, "Weight of a class picture beside an instance picture.", at_least=0)

    def check(self) -> None:
        """Refuse a shift that is neither a positive number nor the model's."""
        number = re.fullmatch(r"\d+\.?\d*|\.\d+", self.timestep_shift)
        is_shift = self.timestep_shift == "scheduler" or (number is not None and float(number[0]) > 0)
        require(is_shift, f"--timestep_shift takes a number above 0 or 'scheduler', got {self.timestep_shift!r}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """Optimizer"""

    optimizer: Literal["adamw", "prodigy"] = flag("adamw", "In any case; prodigy wants --learning_rate 1.")
    learning_rate: float = flag(1e-4, "Learning rate after the warm-up.", above=0, below=1e6)
    scale_lr: bool = flag(False, "Multiply the rate by the pictures of one step: batch x processes x accumulation.")
    use_8bit_adam: bool = flag(False, "AdamW of bitsandbytes, whose state takes 8 bits; not for Prodigy.")
    adam_beta1: float = flag(0.9, "Decay of the first moment, also Prodigy's.", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "Decay of the second moment, also Prodigy's.", at_least=0, below=1)
    adam_weight_decay: float = flag(1e-4, "Weight decay, also Prodigy's.", at_least=0)
    adam_epsilon: float = flag(1e-8, "Added to the denominator, also Prodigy's.", above=0)
    prodigy_beta3: float | None = flag(None, "Of Prodigy's estimate. Default: root of beta2.", at_least=0, below=1)
    prodigy_decouple: bool = flag(True, "Decoupled weight decay in Prodigy.")
    prodigy_use_bias_correction: bool = flag(True, "Adam's bias correction in Prodigy.")
    prodigy_safeguard_warmup: bool = flag(True, "Keep a warm-up from spoiling Prodigy's estimate.")
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this norm.", above=0)
    lr_scheduler: Course = flag("constant", "Course of the learning rate, as in diffusers.")
    lr_warmup_steps: int = flag(0, "Optimizer steps up to the full rate, for schedules that warm up.", at_least=0)
    lr_num_cycles: int = flag(1, "Cycles of cosine_with_restarts.", at_least=1)
    lr_power: float = flag(1.0, "Power of polynomial.")
    lr_step_rules: str | None = flag(None, "Of piecewise_constant: 'factor:until_step,...,factor', as in 1:100,0.1.")
    text_encoder_lr: float | None = flag(None, "Accepted for old commands, without effect.")
    adam_weight_decay_text_encoder: float | None = flag(None, "Accepted for old commands, without effect.")

    @property
    def has_8bit_state(self) -> bool:
        """Whether `--use_8bit_adam` counts: Prodigy has no 8-bit form."""
        return self.use_8bit_adam and self.optimizer == "adamw"

    def check(self) -> None:
        """Refuse step rules without their schedule, and the schedule without rules."""
        is_pair = (self.lr_scheduler == "piecewise_constant") == (self.lr_step_rules is not None)
        require(is_pair, "--lr_scheduler piecewise_constant and --lr_step_rules need each other")
        is_rule = re.fullmatch(r"(\d{1,9}(\.\d+)?:\d{1,9},)*\d{1,9}(\.\d+)?", self.lr_step_rules or "1") is not None
        shown = f"such as 1:100,0.1; got {self.lr_step_rules!r}"
        require(is_rule, f"--lr_step_rules reads 'factor:until_step,...,factor', {shown}")
        can_fall = self.lr_scheduler != "polynomial" or self.learning_rate > 1e-7
        require(can_fall, "--lr_scheduler polynomial falls to 1e-7; --learning_rate must be above that")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """Training"""

    seed: int = flag(0, "Every random choice follows from it.", at_least=0, below=2**32)
    max_train_steps: int | None = flag(None, "Optimizer steps. Default: 1500, or what the epochs need.", at_least=1)
    num_train_epochs: int | None = flag(None, "Epochs, each showing every sample once.", at_least=1)
    train_batch_size: int = flag(1, "Pictures per process in one forward pass.", at_least=1)
    gradient_accumulation_steps: int = flag(1, "Passes per optimizer step.", "--gradient_accumulation", at_least=1)
    gradient_checkpointing: bool = flag(False, "Recompute activations: far less memory, up to twice the time.")
    mixed_precision: Precision = flag("bf16", "Of the frozen weights and the maths; no is fp32, fp16 is refused.")
    checkpointing_steps: int = flag(500, "Steps between checkpoints; the last step has one too.", at_least=1)
    checkpoints_total_limit: int | None = flag(None, "Keep only the newest checkpoints.", at_least=1)
    checkpointing_minutes: float | None = flag(None, "Minutes between checkpoints, besides those by steps.", above=0)
    max_train_minutes: float | None = flag(None, "Stop after this time, with a checkpoint to continue from.", above=0)
    resume_from_checkpoint: str | None = flag(None, "Continue from 'latest' or from a checkpoint folder.")
    resume_anyway: bool = flag(False, "Continue with other data or settings than the checkpoint was made with.")
    on_nan: Literal["stop", "skip"] = flag("stop", "Where loss or gradient is not finite: stop, or skip the step.")
    local_rank: int | None = flag(None, "Accepted for old commands, without effect.")

    def check(self) -> None:
        """Refuse fp16."""
        require(self.mixed_precision != "fp16", NO_FP16.format("--mixed_precision"))


@dataclass(frozen=True, kw_only=True)
class HardwareConfig(Settings):
    """Memory and speed"""

    quantization: Storage | None = flag(None, "Frozen weights in 8 or 4 bits; products as in --mixed_precision.")
    do_fp8_training: bool = flag(False, "fp8 weights and fp8 products, for GPUs of compute capability 8.9 and above.")
    bnb_quantization_config_path: str | None = flag(None, "JSON of a bitsandbytes configuration, 4 or 8 bits.")
    offload: bool = flag(False, "Text encoder and VAE live in host memory; on the GPU only while they are used.")
    attention_backend: str = flag("native", "Kernel of the attention, as in diffusers: native, flash, flex, ...")
    enable_npu_flash_attention: bool = flag(False, "Old name of --attention_backend _native_npu.")
    allow_tf32: bool = flag(False, "TF32 for fp32 products, on Ampere and later.")
    dataloader_num_workers: int = flag(0, "Processes that load pictures or latents; 0 is the main one.", at_least=0)
    fsdp_text_encoder: bool = flag(False, "Accepted for old commands, without effect.")

    @property
    def storage(self) -> str | None:
        """The format of the frozen weights, where it is ours and not bitsandbytes' own."""
        return "fp8" if self.do_fp8_training else self.quantization

    @property
    def attention(self) -> str:
        """The attention backend, by its old flag or its new one."""
        return "_native_npu" if self.enable_npu_flash_attention else self.attention_backend

    def check(self) -> None:
        """Refuse two formats for the same weights, and two attention backends."""
        formats = ("quantization", "do_fp8_training", "bnb_quantization_config_path")
        given = [f"--{name}" for name in formats if getattr(self, name)]
        require(len(given) < 2, f"{' and '.join(given)} are formats for the same weights; give one of them")
        is_one = not self.enable_npu_flash_attention or self.attention_backend in ("native", self.attention)
        require(is_one, f"--enable_npu_flash_attention contradicts --attention_backend {self.attention_backend}")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Settings):
    """Validation"""

    validation_prompt: tuple[str, ...] | None = flag(None, "Prompts, each quoted, drawn before, during and after.")
    final_validation_prompt: str | None = flag(None, "Drawn after training only; ignored beside --validation_prompt.")
    num_validation_images: int = flag(4, "Pictures per prompt.", at_least=1)
    validation_epochs: int = flag(50, "Epochs between two validations.", at_least=1)
    validation_steps: int | None = flag(None, "Steps between two validations, instead of epochs.", at_least=1)
    guidance_scale: float = flag(4.0, "Classifier-free guidance; 0 turns it off, as Turbo wants.", at_least=0)
    negative_prompt: str = flag("", "What guidance moves away from.")
    num_inference_steps: int = flag(28, "Denoising steps per picture.", at_least=1)
    validation_resolution: int | None = flag(None, "Default: --resolution.", at_least=16, multiple_of=16)
    skip_final_inference: bool = flag(False, "No pictures after the last step.")


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Settings):
    """Output"""

    output_dir: str = flag("z-image-dreambooth-lora", "Folder for the LoRA, checkpoints, pictures and metrics.")
    overwrite_output_dir: bool = flag(False, "Remove what an earlier run of this program left in --output_dir.")
    upcast_before_saving: bool = flag(False, "Save the LoRA in fp32 instead of the training precision.")
    logging_dir: str = flag("logs", "Folder of the trackers' files, below --output_dir unless absolute.")
    report_to: str = flag("none", "Trackers accelerate knows, separated by commas: wandb, tensorboard, ...; or all.")
    push_to_hub: bool = flag(False, "Upload LoRA, card, pictures and config.json to the hub after training.")
    hub_model_id: str | None = flag(None, "Repository to upload to. Default: your account, name of --output_dir.")
    hub_token: str | None = flag(None, "For the hub. Default: that of `hf auth login` or HF_TOKEN.", is_secret=True)
    hub_private_repo: bool = flag(False, "Make the repository private if it is new.")
    demo: bool = flag(False, "Train a tiny random model on drawn pictures, both made under --output_dir.")

    @property
    def trackers(self) -> list[str]:
        """The names in `--report_to`; empty for none."""
        names = dict.fromkeys(re.findall(r"[^\s,]+", self.report_to))
        return [name for name in names if name != "none"]

    @property
    def repository(self) -> str:
        """The repository that `--push_to_hub` uploads to."""
        return self.hub_model_id or Path(self.output_dir).resolve().name

    def check(self) -> None:
        """Refuse a name that no repository can have, and a token that is none."""
        is_token = self.hub_token is None or re.fullmatch(r"[!-~]+", self.hub_token) is not None
        require(is_token, "--hub_token holds a line break, a space or a letter that no token has; copy it again")
        require(
            not self.push_to_hub or re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]{0,95}", self.repository, re.A) is not None,
            f"--hub_model_id {self.repository} is no name of a repository; give one such as user/my-lora",
        )
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Config(
    ModelConfig, DataConfig, CacheConfig, LoraSettings, ObjectiveConfig, OptimizerConfig, TrainingConfig,
    HardwareConfig, ValidationConfig, OutputConfig,
):  # fmt: skip
    """LoRA DreamBooth fine-tuning of Z-Image."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the flags, before anything is loaded."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            kind = " or ".join(re.findall(r"'(\w+)'", str(hint))) or str(hint)
            shown = "this value" if field.metadata["is_secret"] else repr(value)
            require(matches(value, hint), f"--{field.name} does not take {shown}; it takes {kind}")
            is_given = value != "" or field.name.endswith("prompt")
            require(is_given, f"--{field.name} is empty; give a value or leave it out")
            for name, bound in field.metadata["bounds"].items():
                holds, words = BOUNDS[name]
                require(value is None or holds(value, bound), f"--{field.name} {words} {bound}, got {value}")
        for group in Config.__bases__:
            group.check(self)


def matches(value: Any, hint: Any) -> bool:
    """Tell whether a value has the type of a field; argparse sees to that, JSON files and notebooks do not."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) > 0 and all(matches(item, options[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and -1e300 < value < 1e300
    return isinstance(value, hint) and (hint is not str or is_text(value))


def is_text(value: str) -> bool:
    """Tell whether a string can be written as UTF-8; bytes that were none come from a shell as lone surrogates."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)


def parse_config(argv: list[str] | None = None) -> Config:
    """Build the `Config` from the command line; `--config run.json` supplies defaults that flags override."""
    parser = argparse.ArgumentParser(
        description=Config.__doc__,
        usage="accelerate launch %(prog)s [--config FILE] [--flag VALUE ...]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=120),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="JSON of settings, such as an earlier run's config.json"
    )
    for group in Config.__bases__:
        section, hints = parser.add_argument_group(group.__doc__), typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            names = (f"--{field.name}", *field.metadata["aliases"])
            section.add_argument(*names, **argparse_options(field, hints[field.name]))
    try:
        if parser.parse_known_args(argv)[0].demo:
            parser.set_defaults(**demo_settings("z-image-demo"))
            parser.set_defaults(**demo_settings(parser.parse_known_args(argv)[0].output_dir))
        file = parser.parse_known_args(argv)[0].config
        if file is not None:
            parser.set_defaults(**read_settings(file))
        values = vars(parser.parse_args(argv))
        del values["config"]
        return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except UserError as error:
        parser.error(str(error))


def argparse_options(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """Translate one typed dataclass field into keyword arguments of `ArgumentParser.add_argument`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
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
    """Read true or false: `--flag` alone means true, `--flag false` turns off a flag that is on by default."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def read_json_object(name: str, file: Path) -> dict[str, Any]:
    """Read a JSON file that a flag names. Raises UserError, calling it by that name, if it holds no object."""
    with explained(f"{name} cannot be read as JSON"):
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    require(isinstance(content, dict), f"{name} must hold one JSON object")
    return content


def read_settings(file: Path) -> dict[str, Any]:
    """Read a saved config.json, less the record of its environment. Raises UserError if it is none."""
    settings = read_json_object(f"--config {file}", file)
    settings.pop("environment", None)
    unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(Config)})
    require(not unknown, f"--config {file} has settings that do not exist: {', '.join(unknown)}")
    return settings


def demo_settings(output_dir: str) -> dict[str, Any]:
    """List the small numbers of `--demo`; flags given beside it win."""
    places = {
        "output_dir": output_dir, "pretrained_model_name_or_path": f"{output_dir}/demo-model",
        "instance_data_dir": f"{output_dir}/demo-pictures", "cache_dir": f"{output_dir}/demo-cache",
    }  # fmt: skip
    prompts = {
        "instance_prompt": "a photo of sks badge",
        "validation_prompt": ("a sks badge on a table", "桌子上的sks徽章"),
    }  # fmt: skip
    numbers = {
        "resolution": 64, "use_aspect_ratio_buckets": True, "cache_latents": True, "random_flip": True, "rank": 4,
        "learning_rate": 1e-3, "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 40,
        "checkpointing_steps": 20, "validation_steps": 20, "num_validation_images": 2, "num_inference_steps": 6,
    }  # fmt: skip
    return {"demo": True} | places | prompts | numbers


def advice(cfg: Config) -> Iterator[str]:
    """Yield a line for every setting that has no effect, or not the one its name suggests."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for name in ("text_encoder_lr", "adam_weight_decay_text_encoder", "local_rank"):
        if getattr(cfg, name) is not None:
            yield f"--{name} is accepted for old commands and has no effect"
    if cfg.fsdp_text_encoder:
        yield "--fsdp_text_encoder has no effect: prompts are encoded before training, the encoder is gone by then"
    if cfg.has_8bit_state:
        yield "--use_8bit_adam saves little: AdamW in fp32 costs only 240 MB more, at rank 16 with the default layers"
    elif cfg.use_8bit_adam:
        yield "--use_8bit_adam is ignored with --optimizer prodigy"
    if cfg.gradient_checkpointing and uses_fsdp_checkpointing():
        yield "--gradient_checkpointing: FSDP's own activation checkpointing is used instead, not both"
    if cfg.revision is not None and os.path.exists(cfg.pretrained_model_name_or_path):
        yield "--revision has no effect on a local folder"
    if not cfg.push_to_hub and (cfg.hub_model_id is not None or cfg.hub_private_repo):
        yield "--hub_model_id and --hub_private_repo have no effect without --push_to_hub"
    if cfg.lr_warmup_steps > 0 and cfg.lr_scheduler in ("constant", "piecewise_constant"):
        yield f"--lr_scheduler {cfg.lr_scheduler} has no warm-up; --lr_warmup_steps counts with constant_with_warmup"
    elif cfg.lr_warmup_steps >= (cfg.max_train_steps or math.inf):
        yield f"--lr_warmup_steps {cfg.lr_warmup_steps} is as long as the run, which never reaches its full rate"
    if cfg.optimizer == "prodigy" and cfg.learning_rate < 0.1:
        yield f"--learning_rate {cfg.learning_rate} is low for Prodigy, which multiplies it by an estimate; use 1.0"
    if not cfg.with_prior_preservation and (cfg.class_data_dir, cfg.class_prompt) != (None, None):
        yield "--class_data_dir and --class_prompt have no effect without --with_prior_preservation"
    if cfg.validation_prompt is not None and cfg.final_validation_prompt is not None:
        yield "--final_validation_prompt is not used beside --validation_prompt"
    if cfg.cache_latents:
        yield "--cache_latents: every picture is cropped at its centre" + ", with its mirror image" * cfg.random_flip
    if launcher not in ("no", cfg.mixed_precision):
        yield f"accelerate's configuration says {launcher}, but --mixed_precision {cfg.mixed_precision} is what counts"


def uses_fsdp() -> bool:
    """Tell whether accelerate's configuration shards the transformer."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def uses_fsdp_checkpointing() -> bool:
    """Tell whether accelerate's configuration has FSDP recompute activations."""
    return uses_fsdp() and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true"


def shareable_settings(cfg: Config) -> dict[str, Any]:
    """List the settings without secrets: for files, trackers and cards."""
    shareable = [field.name for field in dataclasses.fields(cfg) if not field.metadata["is_secret"]]
    return {name: getattr(cfg, name) for name in shareable}


def redact(text: str, cfg: Config) -> str:
    """Replace secrets, of flags and of the environment, by stars: for all that is printed, logged or sent."""
    secrets = [getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.metadata["is_secret"]]
    secrets += [os.environ.get(name) for name in ("HF_TOKEN", "WANDB_API_KEY")]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***").replace(secret.strip(), "***")
    return text


def sha256(content: bytes) -> str:
    """Hash bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def derive_seed(*parts: Any) -> int:
    """Turn (seed, purpose, number, ...) into a seed of 63 bits: a pure function, the source of all randomness here."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def sync(path: Path) -> None:
    """Have a file or a folder written to the disk now."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a file or folder that is whole its name, for good."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there. All but metrics.jsonl is written so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        put_in_place(temporary, path)
    except BaseException as error:  # a full disk, a signal: leave nothing behind
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


# =====================================================================================================================
# Data plan
# =====================================================================================================================


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
CAPTION_SUFFIXES = (".txt", ".caption")
warnings.filterwarnings("ignore", module="PIL")  # about pictures that it reads all the same


@dataclass(frozen=True)
class Sample:
    """One picture as the run will use it; sides are (height, width) in pixels."""

    path: Path
    size: tuple[int, int]
    bucket: tuple[int, int]
    prompt: str
    has_caption: bool
    is_prior: bool
    digest: str = ""  # SHA-256 of the file; empty for a class picture that is still to be generated


class Draw(NamedTuple):
    """One example of the endless stream: its place in it, and which sample it shows."""

    number: int
    sample: int


def find_files(folder: Path) -> list[Path]:
    """List what lies below a folder in sorted order; hidden folders are listed, but not entered."""
    found = []
    for parent, folders, names in os.walk(folder):
        found += [Path(parent, name) for name in names + [name for name in folders if name.startswith(".")]]
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(found)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark. Raises UserError if it is in another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it again as UTF-8") from error


def read_metadata(file: Path, pictures: set[Path]) -> dict[Path, str]:
    """Read the captions of one metadata.jsonl. Raises UserError for a picture that is not there, or a bad caption."""
    captions = {}
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        with explained(f'{place} is not a JSON object with "file_name"', "mend or remove the line"):
            row = json.loads(line)
            picture = Path(os.path.normpath(file.parent / row["file_name"]))
        require(picture in pictures, f"{place} names {row['file_name']}, which is no picture there; mend the line")
        caption = next((row[key] for key in ("text", "caption", "prompt") if row.get(key) is not None), None)
        if caption is not None:
            is_caption = isinstance(caption, str) and is_text(caption)
            require(is_caption, f"{place}: the caption {caption!r} is not text; put it in quotes")
            captions[picture] = caption.strip()
    return captions


def read_caption(picture: Path, metadata: dict[Path, str]) -> str | None:
    """Find a picture's own caption: NAME.txt, else NAME.caption, else metadata.jsonl."""
    for suffix in CAPTION_SUFFIXES:
        beside = picture.with_suffix(suffix)
        if os.path.isfile(beside):  # unlike Path.is_file, false for a name that is too long
            return read_text(beside).strip()
    return metadata.get(picture)


def read_size(path: Path) -> tuple[int, int] | None:
    """Read (height, width) from a picture's header, EXIF rotation applied; None if Pillow cannot."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            is_turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (width, height) if is_turned else (height, width)  # Pillow gives a TIFF's size upright
    except Exception:  # Pillow's readers raise almost anything on damaged files
        return None


def load_picture(path: Path) -> Image.Image:
    """Decode the first frame to upright 8-bit RGB, transparency over white. Raises whatever Pillow does on damage."""
    with Image.open(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits in 32
        upright = upright.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    elif upright.mode == "F":
        brightest = upright.getextrema()[1]
        upright = upright.point(lambda value: value * (255 if brightest <= 1 else 1) + 0.5).convert("L")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    white = Image.new("RGBA", upright.size, "white")
    white.alpha_composite(upright.convert("RGBA"))
    return white.convert("RGB")


def make_buckets(resolution: int) -> list[tuple[int, int]]:
    """Make (height, width) pairs of at most resolution x resolution pixels, from 1:4 over the square to 4:1."""
    step = max(16, resolution // 16 // 16 * 16)
    short_sides = range(resolution, resolution // 2 - 1, -step)
    pairs = [(short, resolution * resolution // short // 16 * 16) for short in short_sides if short >= 16]
    return list(dict.fromkeys(pair for short, long in pairs for pair in ((short, long), (long, short))))


def nearest_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """Pick the bucket of the nearest aspect ratio on a logarithmic scale; among equals, of the nearest area."""
    height, width = size
    aspects = [round(abs(math.log(height / width) - math.log(bucket[0] / bucket[1])), 9) for bucket in buckets]
    areas = [abs(math.log(height * width) - math.log(bucket[0] * bucket[1])) for bucket in buckets]
    return min(zip(aspects, areas, buckets))[2]


def choose_bucket(size: tuple[int, int], cfg: DataConfig) -> tuple[int, int] | None:
    """Assign a picture to its bucket; automatic buckets shrink until they fit inside it, None if none does."""
    if cfg.aspect_ratio_buckets is not None:
        return nearest_bucket(size, parse_buckets(cfg.aspect_ratio_buckets))
    if not cfg.use_aspect_ratio_buckets:
        return (cfg.resolution, cfg.resolution)
    for resolution in range(cfg.resolution, 0, -16):
        bucket = nearest_bucket(size, make_buckets(resolution))
        if bucket[0] <= size[0] and bucket[1] <= size[1]:
            return bucket
    return None


class Scan(NamedTuple):
    """What a folder holds: usable samples, what is wrong with other pictures, other files."""

    samples: list[Sample]
    unusable: list[str]
    others: list[Path]


def scan_pictures(folder: Path, prompt: str | None, is_prior: bool, cfg: DataConfig) -> Scan:
    """Read headers and captions of all pictures below a folder. Raises UserError for a bad or missing caption."""
    files = find_files(Path(os.path.normpath(folder)))
    pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    tables = [path for path in files if path.name == "metadata.jsonl" and path.is_file()]
    captions = {key: text for table in tables for key, text in read_metadata(table, set(pictures)).items()}
    known = {*pictures, *tables, *(path.with_suffix(suffix) for path in pictures for suffix in CAPTION_SUFFIXES)}
    scan = Scan([], [], [path for path in files if path not in known])
    for path in pictures:
        size = read_size(path) if path.is_file() else None  # a fifo would never end
        bucket = size and choose_bucket(size, cfg)
        if bucket is None:
            why = f"is too small for any bucket ({size[0]} x {size[1]})" if size else "cannot be read as a picture"
            scan.unusable.append(f"{path} {why}")
            continue
        caption = read_caption(path, captions)
        text = prompt if caption is None else caption
        column = ", or name the data set's captions in --caption_column" * (cfg.dataset_name is not None)
        require(text is not None, f"--instance_prompt is required: {path} has no caption of its own{column}")
        scan.samples.append(Sample(path, size, bucket, text, caption is not None, is_prior))
    return scan


def scan_instances(folder: Path, cfg: DataConfig) -> Scan:
    """Scan the instance pictures. Raises UserError if there is nothing to learn from."""
    origin = f"--instance_data_dir {folder}" if cfg.dataset_name is None else f"--dataset_name {cfg.dataset_name}"
    require(folder.is_dir(), f"{origin} does not exist or is no folder; name the folder that holds the pictures")
    scan = scan_pictures(folder, cfg.instance_prompt, False, cfg)
    damaged = f" ({scan.unusable[0]})" if scan.unusable else ""
    kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    require(bool(scan.samples), f"{origin} holds no picture that can be used{damaged}; put some in it: {kinds}")
    return scan


def scan_classes(cfg: DataConfig) -> Scan:
    """Scan the class pictures there are so far; none without prior preservation."""
    if not cfg.with_prior_preservation or not Path(cfg.class_data_dir).is_dir():
        return Scan([], [], [])
    return scan_pictures(Path(cfg.class_data_dir), cfg.class_prompt, True, cfg)


def encodings_folder(cfg: CacheConfig) -> Path:
    """Locate the folder of cached encodings: below `--cache_dir`, else below the Hugging Face home."""
    from huggingface_hub import constants

    return Path(cfg.cache_dir or constants.HF_HOME) / "z-image-encodings"


def cache_file(folder: Path, kind: str, *ingredients: Any) -> Path:
    """Name a cache file after everything its content depends on, so that changed ingredients cannot hit."""
    return folder / kind / sha256(json.dumps(ingredients).encode())


def verify_pictures(samples: list[Sample], folder: Path) -> list[Sample]:
    """Decode every new picture once, remembering good ones by content; damaged ones are left out with a warning."""
    good = []
    for sample in samples:
        digest = sha256(sample.path.read_bytes())
        seen = cache_file(folder, "decoded", digest)
        if not seen.exists():
            try:
                load_picture(sample.path)
            except Exception as error:  # as in read_size
                say(f"warning: {sample.path} is damaged and will be left out: {error}")
                continue
            write_file(seen, b"")
        good.append(dataclasses.replace(sample, digest=digest))
    return good


def plan_samples(cfg: Config, instance_folder: Path) -> list[Sample]:
    """Decide which pictures the run uses, and how. Raises UserError if no instance picture is left."""
    instances, classes = scan_instances(instance_folder, cfg), scan_classes(cfg)
    for scan in (instances, classes):
        if scan.others:
            names = ", ".join(path.name for path in scan.others[:10]) + ", ..." * (len(scan.others) > 10)
            is_apple = any(path.suffix.lower() in (".heic", ".heif") for path in scan.others)
            say(f"left alone: {names}" + " (HEIC pictures must be converted, to JPEG for example)" * is_apple)
        for problem in scan.unusable:
            say(f"warning: {problem} and will be left out")
    samples = verify_pictures([*instances.samples, *classes.samples], encodings_folder(cfg))
    is_any_left = any(not sample.is_prior for sample in samples)
    require(is_any_left, f"every picture in {instance_folder} is damaged; export them again from their source")
    samples += plan_class_images(cfg, sum(sample.is_prior for sample in samples))
    return sorted(samples, key=lambda sample: (sample.is_prior, sample.path))  # the stream draws by place in the list


def plan_class_images(cfg: DataConfig, present: int) -> list[Sample]:
    """Name the class pictures that are still to be generated; none without prior preservation."""
    if not cfg.with_prior_preservation:
        return []
    names = (Path(os.path.normpath(cfg.class_data_dir)) / f"class-{number:05d}.png" for number in itertools.count())
    free = itertools.islice((path for path in names if not path.exists()), max(0, cfg.num_class_images - present))
    size = (training_side(cfg), training_side(cfg))
    bucket = choose_bucket(size, cfg)
    return [Sample(path, size, bucket, cfg.class_prompt, has_caption=False, is_prior=True) for path in free]


def export_dataset(cfg: Config) -> Path:
    """Write the pictures and captions of `--dataset_name` to a folder: the rest of the program knows only folders."""
    import datasets

    cache_dir = cfg.cache_dir and str(Path(cfg.cache_dir) / "datasets")
    with explained(f"--dataset_name {cfg.dataset_name} cannot be loaded"):
        splits = datasets.load_dataset(cfg.dataset_name, cfg.dataset_config_name, cache_dir=cache_dir)
    split = next(iter(splits)) if len(splits) == 1 else "train"
    require(split in splits, f"--dataset_name {cfg.dataset_name} has no split train, but {', '.join(splits)}")
    table = splits[split]
    columns = ", ".join(table.column_names)
    for name, column in (("image_column", cfg.image_column), ("caption_column", cfg.caption_column)):
        is_there = column in (None, *table.column_names)
        require(is_there, f"--{name} {column} is no column of the dataset; it has {columns}")
    texts = [name for name, feature in table.features.items() if getattr(feature, "dtype", None) == "string"]
    if texts and cfg.caption_column is None:
        say(f"--dataset_name: no captions are taken; --caption_column takes them from {' or '.join(texts)}")
    kind = table.features[cfg.image_column]
    require(isinstance(kind, datasets.Image), f"--image_column {cfg.image_column} holds no pictures but {kind}")
    pictures = table.cast_column(cfg.image_column, datasets.Image(decode=False))[cfg.image_column]
    require(None not in pictures, f"--dataset_name {cfg.dataset_name} has rows without a picture; remove them")
    captions = list(table[cfg.caption_column]) if cfg.caption_column else [None] * len(pictures)
    are_texts = all(caption is None or isinstance(caption, str) for caption in captions)
    require(are_texts, f"--caption_column {cfg.caption_column} holds no text")
    names = [f"{number:06d}-{sha256(picture_bytes(picture))[:16]}.png" for number, picture in enumerate(pictures)]
    rows = [{"file_name": name, "text": caption} for name, caption in zip(names, captions)]
    metadata = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    folder = encodings_folder(cfg) / "datasets" / sha256(metadata)
    for name, picture in zip(names, pictures):
        if not (folder / name).exists():
            write_file(folder / name, picture_bytes(picture))
    write_file(folder / "metadata.jsonl", metadata)
    return folder


def picture_bytes(picture: dict[str, Any]) -> bytes:
    """Read an undecoded picture of a dataset: inline bytes, else a file."""
    return picture["bytes"] or Path(picture["path"]).read_bytes()


def endless(indices: list[int], kind: str, seed: int) -> Iterator[int]:
    """Yield the indices epoch after epoch, each time in a fresh order that follows from the seed alone."""
    for epoch in itertools.count():
        yield from random.Random(derive_seed(seed, kind, epoch)).sample(indices, len(indices))


def example_stream(samples: list[Sample], cfg: Config) -> Iterator[Draw]:
    """Yield the endless sequence of examples; with prior preservation, instance and class pictures in turn."""
    instances = [index for index, sample in enumerate(samples) if not sample.is_prior]
    classes = [index for index, sample in enumerate(samples) if sample.is_prior]
    draws = endless(instances * cfg.repeats, "instance order", cfg.seed)
    if classes:
        draws = itertools.chain.from_iterable(zip(draws, endless(classes, "class order", cfg.seed)))
    return (Draw(number, sample) for number, sample in enumerate(draws))


def micro_batches(samples: list[Sample], cfg: Config, size: int) -> Iterator[list[Draw]]:
    """Group the stream into batches of one bucket: a queue per bucket, which leaves when it is `size` long."""
    queues: dict[tuple[int, int], list[Draw]] = collections.defaultdict(list)
    for draw in example_stream(samples, cfg):
        queue = queues[samples[draw.sample].bucket]
        queue.append(draw)
        if len(queue) == size:
            yield queue[:]
            queue.clear()


@dataclass(frozen=True)
class Schedule:
    """The numbers that follow from config, data and the count of processes; a step is one optimizer step."""

    micro_batch: int  # pictures of all processes in one forward pass
    total_batch: int  # pictures in one step
    epoch_examples: int
    max_train_steps: int
    validation_interval: int  # examples between two validations
    timestep_shift: float
    first_step: int  # where the checkpoint left the run, else 0

    def epoch(self, step: int) -> float:
        """Tell how many epochs the first `step` steps have covered."""
        return step * self.total_batch / self.epoch_examples

    def is_validation_step(self, step: int) -> bool:
        """Tell whether pictures are due after `step` steps: at the start, and whenever an interval is complete."""
        done, before = step * self.total_batch, (step - 1) * self.total_batch
        is_complete = done // self.validation_interval > before // self.validation_interval
        return step < self.max_train_steps and (step == 0 or is_complete)


def make_schedule(
    cfg: Config, samples: list[Sample], num_processes: int = 1, timestep_shift: float = 1.0, first_step: int = 0
) -> Schedule:
    """Compute the run's arithmetic once."""
    micro_batch = cfg.train_batch_size * num_processes
    total_batch = micro_batch * cfg.gradient_accumulation_steps
    instances = sum(not sample.is_prior for sample in samples) * cfg.repeats
    epoch_examples = instances * (2 if cfg.with_prior_preservation else 1)
    by_epochs = math.ceil((cfg.num_train_epochs or 0) * epoch_examples / total_batch)
    by_steps = cfg.validation_steps and cfg.validation_steps * total_batch
    return Schedule(
        micro_batch=micro_batch, total_batch=total_batch, epoch_examples=epoch_examples, first_step=first_step,
        max_train_steps=cfg.max_train_steps or by_epochs or 1500, timestep_shift=timestep_shift,
        validation_interval=by_steps or cfg.validation_epochs * epoch_examples,
    )  # fmt: skip


def count_views(samples: list[Sample], cfg: Config, schedule: Schedule) -> collections.Counter[int]:
    """Count how often this run will show each sample, by replaying the stream; of a very long run, its first part."""
    total = schedule.max_train_steps * cfg.gradient_accumulation_steps
    replayed = min(total, math.ceil(500_000 / schedule.micro_batch))
    shown = itertools.islice(micro_batches(samples, cfg, schedule.micro_batch), replayed)
    views = collections.Counter(draw.sample for batch in shown for draw in batch)
    return collections.Counter({sample: round(count * total / replayed) for sample, count in views.items()})


def describe_plan(samples: list[Sample], cfg: Config, schedule: Schedule) -> list[str]:
    """Tell what the run will do, as lines of a table. Raises UserError for a bucket that would never be trained."""
    views, kinds = count_views(samples, cfg, schedule), collections.Counter(sample.is_prior for sample in samples)
    drawn = schedule.max_train_steps * schedule.total_batch // (2 if cfg.with_prior_preservation else 1)
    covers_epoch = {False: drawn >= kinds[False] * cfg.repeats, True: drawn >= kinds[True]}  # of instances, of classes
    table, notes = "{:>12} {:>9} {:>9} {:>12} {:>8} {:>13} {:>15}", []
    lines = [table.format("bucket", "pictures", "of class", "own caption", "repeats", "times seen", "smallest file")]
    for bucket in sorted({sample.bucket for sample in samples}):
        indices = [index for index, sample in enumerate(samples) if sample.bucket == bucket]
        members, counts = [samples[index] for index in indices], [views[index] for index in indices]
        name, names = f"{bucket[0]} x {bucket[1]}", ", ".join(str(sample.path) for sample in members[:5])
        require(
            max(counts) > 0 or not any(covers_epoch[member.is_prior] for member in members),
            f"bucket {name} never fills a batch of {schedule.micro_batch} in this run: {names} would not be trained; "
            "lower --train_batch_size, with more --gradient_accumulation_steps, use fewer buckets, or train longer",
        )
        seen = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        classes, captions = sum(sample.is_prior for sample in members), sum(sample.has_caption for sample in members)
        smallest = "{} x {}".format(*min((sample.size for sample in members), key=math.prod))
        lines.append(table.format(name, len(members), classes, captions, cfg.repeats, seen, smallest))
        if len(members) < schedule.micro_batch:
            notes.append(
                f"bucket {name} has fewer pictures than a batch of {schedule.micro_batch} and waits for later epochs "
                "to fill it; a smaller --train_batch_size with more --gradient_accumulation_steps mixes better"
            )
        enlarged = [sample for sample in members if sample.size[0] < bucket[0] or sample.size[1] < bucket[1]]
        if enlarged:
            notes.append(f"to be enlarged to {name}: {', '.join(str(sample.path) for sample in enlarged[:5])}")
    if not covers_epoch[False]:
        notes.append("the run is shorter than one epoch: not every picture will be seen")
    return [*lines, *notes, describe_schedule(cfg, schedule), *describe_validation(samples, cfg, schedule)]


def describe_schedule(cfg: Config, schedule: Schedule) -> str:
    """Tell the length of the run in steps, examples and epochs. Raises UserError if it is over already."""
    steps, first = schedule.max_train_steps, schedule.first_step
    processes = schedule.micro_batch // cfg.train_batch_size
    require(first <= steps, f"the checkpoint has done {first} steps already; give --max_train_steps at least that")
    done = f", of which {first:,} steps are done" * bool(first)
    return (
        f"steps: {steps:,} x {schedule.total_batch} (batch {cfg.train_batch_size} x processes {processes} x "
        f"accumulation {cfg.gradient_accumulation_steps}) = {steps * schedule.total_batch:,} examples = "
        f"{schedule.epoch(steps):,.1f} epochs of {schedule.epoch_examples}{done}"
    )


def describe_validation(samples: list[Sample], cfg: Config, schedule: Schedule) -> list[str]:
    """Tell how often pictures are drawn and what share of the run they take, counted in forward passes per pixel."""
    first, last = schedule.first_step, schedule.max_train_steps
    steps = range(first + (first > 0), last)  # the pictures of the first step were drawn before its checkpoint
    times = sum(schedule.is_validation_step(step) for step in steps) if cfg.validation_prompt else 0
    final = bool(cfg.validation_prompt or cfg.final_validation_prompt) and not cfg.skip_final_inference
    pictures, guided = len(cfg.validation_prompt or [None]) * cfg.num_validation_images, cfg.guidance_scale > 0
    passes = (times + final) * pictures * cfg.num_inference_steps * (1 + guided)
    missing = sum(not sample.digest for sample in samples)
    generating = f"{missing * cfg.num_inference_steps * (1 + guided):,} forward passes for {missing} class pictures"
    side = cfg.validation_resolution or training_side(cfg)
    area = sum(math.prod(sample.bucket) for sample in samples) / len(samples)
    drawing = passes * side**2
    cost = 3 if cfg.gradient_checkpointing else 2  # forward, backward to the inputs alone, forward again
    training = (last - first) * schedule.total_batch * area * cost
    line = (
        f"validation: {times + final} x {pictures} pictures of {side} x {side}, {cfg.num_inference_steps} steps each"
        f"{', twice for guidance' * guided} = {passes:,} forward passes, about "
        f"{100 * drawing / (drawing + training or 1):.0f} % of the work"
    )
    return [f"to be generated first: {generating}"] * (missing > 0) + [line] * (passes > 0)


def training_side(cfg: DataConfig) -> int:
    """Choose the side of a square picture as large as the training pictures."""
    if cfg.aspect_ratio_buckets is None:
        return cfg.resolution
    return math.isqrt(max(math.prod(bucket) for bucket in parse_buckets(cfg.aspect_ratio_buckets))) // 16 * 16


# =====================================================================================================================
# Checks
# =====================================================================================================================

RUN_FILES = ("pytorch_lora_weights.safetensors", "config.json", "metrics.jsonl", "README.md")
SHARED_FILES = ("pytorch_lora_weights.safetensors", "README.md", "config.json", "validation/step-*/*.png")
CHECKPOINT_FILES = ("lora.safetensors", "optimizer.safetensors", "state.json")


class Checkpoint(NamedTuple):
    """A checkpoint to continue from, whose manifest holds."""

    folder: Path
    step: int
    state: dict[str, Any]


def is_checkpoint(path: Path) -> bool:
    """Tell whether a folder is a checkpoint of this program, intact or not, and not one of diffusers' script."""
    is_named_so = re.fullmatch(r"checkpoint-\d+", path.name) is not None and not path.is_symlink()
    return is_named_so and any(os.path.isfile(path / name) for name in ("manifest.json", *CHECKPOINT_FILES))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first; other names are not ours and are left alone."""
    return sorted(filter(is_checkpoint, output_dir.glob("checkpoint-*")), key=lambda path: int(path.name[11:]))


def file_entry(content: bytes) -> dict[str, Any]:
    """Describe a file as a manifest does."""
    return {"bytes": len(content), "sha256": sha256(content)}


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Read a checkpoint if its files are on disk as its manifest says, and its step as its name does; else None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        state = json.loads((folder / "state.json").read_bytes())
        is_intact = manifest == {name: file_entry((folder / name).read_bytes()) for name in CHECKPOINT_FILES}
        step, named = int(state["step"]), re.fullmatch(r"checkpoint-(\d+)", folder.name)
        is_possible = 0 < step < 10**9 and (named is None or step == int(named[1]))
        return Checkpoint(folder, step, state) if is_intact and is_possible else None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def find_checkpoint(cfg: Config) -> Checkpoint | None:
    """Resolve `--resume_from_checkpoint`: a folder anywhere, or the newest intact one here; None starts afresh."""
    name, output = cfg.resume_from_checkpoint, Path(cfg.output_dir)
    if name is None or (name == "latest" and not list_checkpoints(output)):
        return None
    found = list_checkpoints(output) if name == "latest" else [Path(name), output / name]
    found = [path for path in found if os.path.isdir(path)]
    require(bool(found), f"--resume_from_checkpoint {name} is no folder; name a checkpoint-N, or 'latest'")
    intact = next(filter(None, map(read_checkpoint, reversed(found))), None)
    problem = f"{found[-1]} is damaged or no checkpoint of this program" + ", and so are all here" * (name == "latest")
    remedy = "name another one, or start over with --overwrite_output_dir"
    require(intact is not None, f"--resume_from_checkpoint {name}: {problem}; {remedy}")
    return intact


def is_whole(path: Path) -> bool:
    """Tell whether a safetensors file is there and as long as its header says."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < os.path.getsize(path) else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return os.path.getsize(path) == 8 + length + max(ends)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_output(cfg: Config) -> None:
    """Refuse an output folder that is a file, that holds another run, or other files under the names of ours."""
    output = Path(cfg.output_dir)
    for path in (output, *output.parents):
        require(not os.path.lexists(path) or path.is_dir(), f"--output_dir {output}: {path} is a file; name a folder")
    is_one = cfg.resume_from_checkpoint is None or not cfg.overwrite_output_dir
    require(is_one, "--overwrite_output_dir would remove what --resume_from_checkpoint continues; give one of the two")
    logs = os.path.normpath(cfg.logging_dir).split(os.sep)[0]
    is_own = logs in (*RUN_FILES, "validation", ".lock") or re.match(r"(superseded-)?checkpoint-\d", logs)
    require(not is_own, f"--logging_dir {cfg.logging_dir} is a name that the run itself uses; name another")
    odd = [path for name in (*RUN_FILES, ".lock") if os.path.lexists(path := output / name) and not path.is_file()]
    require(not odd, f"--output_dir {output} holds {odd and odd[0].name}, which is no file; name another folder")
    checkpoint = find_checkpoint(cfg)
    settings, checkpoints = read_own_config(output), list_checkpoints(output)
    present = [name for name in RUN_FILES if os.path.exists(output / name)]
    foreign = present if "environment" not in settings and not checkpoints else []
    numbered = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    foreign += sorted(path.name for path in numbered if path not in checkpoints)
    names = ", ".join(foreign)
    require(not foreign, f"--output_dir {output} holds {names}, which this program did not write; name another folder")
    is_demo = cfg.demo and settings.get("demo") is True
    has_steps = (output / "metrics.jsonl").is_file() and (output / "metrics.jsonl").stat().st_size > 0
    is_begun = has_steps and cfg.resume_from_checkpoint != "latest"
    is_free = RUN_FILES[0] not in present and not checkpoints and not is_begun
    is_resumed = checkpoint is not None and checkpoint.folder.resolve().parent == output.resolve()
    require(
        is_free or is_demo or is_resumed or cfg.overwrite_output_dir,
        f"--output_dir {output} holds another run; continue it with --resume_from_checkpoint latest, replace it with "
        "--overwrite_output_dir, or name another folder",
    )


def read_own_config(output: Path) -> dict[str, Any]:
    """Read the config.json of an earlier run in a folder; empty if there is none."""
    try:
        return read_json_object("", output / "config.json")
    except UserError:
        return {}


def check_model(cfg: ModelConfig) -> None:
    """Refuse a name that is neither a complete checkpoint folder nor a possible hub name."""
    name = cfg.pretrained_model_name_or_path
    if os.path.exists(name):
        return check_components(Path(name), cfg.variant)
    require(
        re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith("."),
        f"--pretrained_model_name_or_path {name} does not exist, and is no hub name such as Tongyi-MAI/Z-Image either",
    )


def weight_files(component: Path, variant: str | None) -> list[Path]:
    """List a component's weight files of one variant: NAME.safetensors, or NAME.VARIANT.safetensors, or shards."""
    middle = f".{re.escape(variant)}" if variant else ""
    name = re.compile(rf"(?:diffusion_pytorch_)?model({middle}(-\d+-of-\d+)?|(-\d+-of-\d+)?{middle})\.safetensors")
    return sorted(path for path in component.glob("*.safetensors") if name.fullmatch(path.name))


def check_components(model: Path, variant: str | None) -> None:
    """Refuse a checkpoint folder that lacks a component, or a shard of one, naming what is missing."""
    advice = "--pretrained_model_name_or_path takes a whole checkpoint folder in the diffusers format, or a hub name"
    require(model.is_dir(), f"{model} is a file; {advice}")
    files = {
        "scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json",
        "text_encoder": "config.json", "vae": "config.json", "transformer": "config.json",
    }  # fmt: skip
    for component, file in files.items():
        require((model / component / file).is_file(), f"{model} has no {component}/{file}; {advice}")
        weights = weight_files(model / component, variant)
        if file == "config.json":
            names = ", ".join(sorted(path.name for path in (model / component).glob("*.safetensors")))
            wanted = f"of --variant {variant}; it has {names or 'none'}" if variant else f"(*.safetensors); {advice}"
            require(bool(weights), f"{model}/{component} has no weights {wanted}")
        for path in weights:
            require(is_whole(path), f"{path} is damaged or was not downloaded to its end; {advice}")
        for path in sorted((model / component).glob("*.json")):
            with explained(f"{path} is damaged", advice):
                content = json.loads(read_text(path))
                is_index = path.name.endswith(f".index.{variant}.json" if variant else ".index.json")
                shards = set(content["weight_map"].values()) if is_index else set()
            missing = sorted(shard for shard in shards if not (model / component / shard).is_file())
            require(not missing, f"{model}/{component} lacks {', '.join(missing)}; {advice}")
    vocabularies = [model / "tokenizer" / name for name in ("tokenizer.json", "vocab.json")]
    require(any(path.is_file() for path in vocabularies), f"{model}/tokenizer has no tokenizer.json; {advice}")


def check_packages(cfg: Config) -> None:
    """Refuse settings whose optional package is not installed, with the line that installs it."""
    is_bnb_format = cfg.quantization == "nf4" or cfg.bnb_quantization_config_path is not None
    needed = {
        "datasets": cfg.dataset_name is not None,
        "prodigyopt": cfg.optimizer == "prodigy",
        "torchao": cfg.storage in ("fp8", "int8"),
        "bitsandbytes": is_bnb_format or cfg.has_8bit_state,
    }
    needed |= {name: name in cfg.trackers for name in ("wandb", "tensorboard")}
    for package, is_needed in needed.items():
        is_there = not is_needed or getattr(importlib.util.find_spec(package), "origin", None) is not None
        require(is_there, f"the package {package} is needed and not installed: pip install {package}")


BNB_TYPES = {
    "load_in_4bit": bool, "load_in_8bit": bool, "bnb_4bit_quant_type": Literal["nf4", "fp4"],
    "bnb_4bit_use_double_quant": bool, "bnb_4bit_compute_dtype": str, "bnb_4bit_quant_storage": str,
    "llm_int8_threshold": float, "llm_int8_skip_modules": list | None, "llm_int8_has_fp16_weight": bool,
}  # fmt: skip


def read_bnb_settings(cfg: HardwareConfig) -> dict[str, Any]:
    """Read the JSON of `--bnb_quantization_config_path`; empty without one. Raises UserError if it is none."""
    if cfg.bnb_quantization_config_path is None:
        return {}
    name = f"--bnb_quantization_config_path {cfg.bnb_quantization_config_path}"
    settings = read_json_object(name, Path(cfg.bnb_quantization_config_path))
    for key, value in settings.items():
        require(key in BNB_TYPES, f"{name}: {key} is not known; there are {', '.join(BNB_TYPES)}")
        require(matches(value, BNB_TYPES[key]), f"{name}: {key} does not take {value!r}")
    bits = [settings.get(f"load_in_{count}bit", False) for count in (4, 8)]
    require(sum(bits) == 1, f"{name} must set load_in_4bit or load_in_8bit to true, one of the two")
    return settings


def check_launch(cfg: Config) -> None:
    """Refuse what accelerate's configuration asks for and this program, or Z-Image, cannot do."""
    require(os.environ.get("ACCELERATE_MIXED_PRECISION") != "fp16", NO_FP16.format("accelerate's configuration:"))
    for name in ("USE_DEEPSPEED", "USE_MEGATRON_LM", "DYNAMO_USE_REGIONAL_COMPILATION"):
        is_used = os.environ.get(f"ACCELERATE_{name}", "false").lower() == "true"
        require(not is_used, f"accelerate's configuration: {name} does not work here; multi-GPU, FSDP and dynamo do")
    if uses_fsdp():
        check_fsdp(cfg)


def check_fsdp(cfg: Config) -> None:
    """Refuse what cannot be sharded, or would train wrongly if it were."""
    needed = {"version": "2", "cpu_ram_efficient_loading": "false", "offload_params": "false"}
    for name, value in needed.items():
        is_so = os.environ.get(f"FSDP_{name.upper()}", "1" if name == "version" else "false") == value
        require(is_so, f"accelerate's configuration: only fsdp_{name}: {value} is supported; change it there")
    require(
        cfg.lora_dropout == 0 or not uses_fsdp_checkpointing(),
        "--lora_dropout would be drawn anew when FSDP recomputes activations, which spoils the gradient; "
        "set fsdp_activation_checkpointing: false in accelerate's configuration, or leave the dropout out",
    )
    reasons = {
        "--quantization": cfg.quantization, "--do_fp8_training": cfg.do_fp8_training,
        "--bnb_quantization_config_path": cfg.bnb_quantization_config_path,
        "--use_8bit_adam": cfg.has_8bit_state,
        "--optimizer prodigy": cfg.optimizer == "prodigy",
    }  # fmt: skip
    refused = ", ".join(name for name, is_given in reasons.items() if is_given)
    require(
        not refused, f"{refused} cannot be sharded by FSDP; leave it out, or choose multi-GPU in accelerate config"
    )


def check_inputs(cfg: Config) -> None:
    """Refuse folders, captions, pictures and environments that cannot work; needs Pillow only, changes nothing."""
    check_launch(cfg)
    check_packages(cfg)
    read_bnb_settings(cfg)
    check_output(cfg)
    check_nesting(cfg)
    made = demo_settings(cfg.output_dir) if cfg.demo else {}  # what `make_demo` has still to make
    if cfg.pretrained_model_name_or_path != made.get("pretrained_model_name_or_path"):
        check_model(cfg)
    if cfg.instance_data_dir not in (None, made.get("instance_data_dir")):
        scan_instances(Path(cfg.instance_data_dir), cfg)
    scan_classes(cfg)


def check_nesting(cfg: Config) -> None:
    """Refuse folders below pictures that are learned, where pictures this program makes would be learned as well."""
    names = ("instance_data_dir", "dataset_name", "class_data_dir", "output_dir", "cache_dir")
    folders = {name: Path(getattr(cfg, name)).resolve() for name in names if getattr(cfg, name) is not None}
    folders["logging_dir"] = Path(cfg.output_dir, cfg.logging_dir).resolve()  # wandb copies validation pictures
    for source in names[:3]:
        if source in folders and (source != "dataset_name" or os.path.isdir(folders[source])):
            inside = [name for name in folders if name != source and folders[name].is_relative_to(folders[source])]
            require(
                not inside,
                f"--{inside and inside[0]} lies in --{source} {folders[source]}, all of whose pictures are learned; "
                "name a folder beside it",
            )


def run_or_exit(conductor: Callable[[Config], Any], cfg: Config) -> None:
    """Run a part of the program; an error that the user can mend ends it with its sentence, not with a traceback."""
    try:
        conductor(cfg)
    except (UserError, FloatingPointError, OSError, Stopped) as error:  # OSError: a disk is full, or not ours to write
        sentence, status = (str(error), 128 + error.number) if isinstance(error, Stopped) else (f"error: {error}", 2)
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OSError) or error.__cause__:  # perhaps its own
            print(printable(redact(sentence, cfg)), file=sys.stderr, flush=True)
        if isinstance(error, Stopped):
            sys.stdout.flush()
            os._exit(status)  # taking processes apart would wait for those that have gone, a dead launcher's for ever
        sys.exit(status)


RUN_AS_SCRIPT = __name__ == "__main__" and "__file__" in globals()  # false when pasted into a notebook cell
PARENT = os.getppid()  # before the imports, during which it may die
if RUN_AS_SCRIPT:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` listens, Ctrl-C ends without a traceback
    CONFIG = parse_config()  # before the slow imports below: --help and a mistyped flag answer at once
    sys.argv[1:] = [redact(argument, CONFIG) for argument in sys.argv[1:]]  # wandb records them
    run_or_exit(check_inputs, CONFIG)

logging.disable(logging.WARNING)  # torchao and diffusers report kernels and tensors that nobody here asked for
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, LoggerType, ProjectConfiguration
from accelerate.utils import reduce as reduce_tensor
from accelerate.utils import send_to_device
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from diffusers.optimization import get_scheduler
from diffusers.quantizers import DiffusersAutoQuantizer
from diffusers.training_utils import cast_training_params, compute_density_for_timestep_sampling, free_memory
from diffusers.training_utils import compute_loss_weighting_for_sd3 as loss_weights
from diffusers.utils import logging as diffusers_logging
from filelock import FileLock, Timeout  # torch depends on it
from huggingface_hub import HfApi, ModelCardData, snapshot_download
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3Model

logging.disable(logging.NOTSET)
for library in (transformers.logging, diffusers_logging):
    library.set_verbosity_error()
    library.disable_progress_bar()


# =====================================================================================================================
# Encoders and caches
# =====================================================================================================================

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "no": torch.float32}
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
ENCODING_VERSION = 1  # raise it when the same ingredients begin to give other encodings


class Example(NamedTuple):
    """One example on its way to a batch."""

    seed: int
    image: Tensor  # latents (16, h, w) from the cache, else pixels (3, H, W)
    prompt_embeds: Tensor  # (L, 2560)
    is_prior: bool


class Batch(NamedTuple):
    """One micro-batch of one process, on its device."""

    seeds: list[int]  # of the noise and the noise level of each example
    latents: Tensor  # (B, 16, h, w) in fp32
    prompt_embeds: list[Tensor]  # B of (L_i, 2560)
    is_prior: Tensor  # (B,) of bool


@dataclass(frozen=True)
class Encodings:
    """Where encodings lie on disk; each name is a hash of everything that its content depends on."""

    model: Path
    folder: Path
    text_encoder: tuple[Any, ...]
    vae: tuple[Any, ...]

    def prompt(self, prompt: str) -> Path:
        """Name the file with a prompt's embedding (L, 2560)."""
        return cache_file(self.folder, "prompts", *self.text_encoder, prompt).with_suffix(".safetensors")

    def latents(self, sample: Sample, is_flipped: bool) -> Path:
        """Name the file with the latents (16, h, w) of a picture cropped at its centre."""
        picture = (sample.digest, sample.bucket, "centre", is_flipped)
        return cache_file(self.folder, "latents", *self.vae, *picture).with_suffix(".safetensors")


def find_model(cfg: Config, accelerator: Accelerator) -> Path:
    """Resolve the checkpoint to a local folder, downloading it on the first process if it is a hub name."""
    name = cfg.pretrained_model_name_or_path
    if Path(name).is_dir():
        return Path(name)
    weights = "*.safetensors" if cfg.variant is None else f"*.{cfg.variant}[.-]*safetensors"
    parts = ["*.json", "tokenizer/*", *(f"{part}/{weights}" for part in ("text_encoder", "vae", "transformer"))]
    problem = f"--pretrained_model_name_or_path {name} is no folder here and cannot be downloaded"
    with accelerator.local_main_process_first(), explained(problem):
        folder = snapshot_download(
            name, revision=cfg.revision, cache_dir=cfg.cache_dir, token=cfg.hub_token, allow_patterns=parts
        )
    model = Path(folder)
    check_components(model, cfg.variant)
    return model


def file_digest(path: Path, folder: Path) -> str:
    """Hash a large file, remembering the result by path, size and time of change."""
    if re.fullmatch(r"[0-9a-f]{64}", path.resolve().name):
        return path.resolve().name  # the hub's cache names large files by their SHA-256
    status = path.stat()
    memo = cache_file(folder, "digests", str(path.resolve()), status.st_size, status.st_mtime_ns)
    if not memo.exists() or re.fullmatch(rb"[0-9a-f]{64}", memo.read_bytes()) is None:
        if status.st_size > 1e9:
            say(f"hashing {path.name}, {status.st_size / 1e9:.1f} GB, once")
        with open(path, "rb") as file:
            write_file(memo, hashlib.file_digest(file, "sha256").hexdigest().encode())
    return memo.read_text()


def identify(component: Path, cfg: Config) -> list[str]:
    """Identify a component of the checkpoint by the content of the files that are read."""
    files = [path for path in sorted(component.glob("[!.]*")) if path.suffix in (".json", ".jinja", ".txt")]
    files += weight_files(component, cfg.variant)
    return [f"{path.name} {file_digest(path, encodings_folder(cfg))}" for path in files]


def identify_encodings(cfg: Config, model: Path, accelerator: Accelerator) -> Encodings:
    """Collect what prompts and pictures are encoded with; hashes the encoders' files when they are new."""
    with accelerator.local_main_process_first():
        text_encoder = [*identify(model / "tokenizer", cfg), *identify(model / "text_encoder", cfg)]
        vae = identify(model / "vae", cfg)
    return Encodings(
        model=model, folder=encodings_folder(cfg), vae=(ENCODING_VERSION, vae, cfg.mixed_precision),
        text_encoder=(ENCODING_VERSION, text_encoder, cfg.max_sequence_length, cfg.mixed_precision),
    )  # fmt: skip


class TextEncoder(NamedTuple):
    """Qwen3 without its last layer, and its tokenizer."""

    tokenizer: Any
    model: nn.Module


@contextlib.contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a model on a device for as long as it is used; then it goes back to where it lives."""
    origin = module.device
    module.to(device)
    try:
        yield
    finally:
        module.to(origin)


def refuse_missing(names: list[str] | set[str], component: Path) -> None:
    """Refuse a component whose files lack weights, which libraries leave random or empty."""
    require(not names, f"{component} has no weights for {', '.join(sorted(names)[:3])}; download it again")


def load_text_encoder(model: Path, cfg: Config, device: torch.device) -> TextEncoder:
    """Load what prompts are encoded with.

    Z-Image reads `hidden_states[-2]`, which needs neither the last layer nor the final norm: both are left out, and
    the shortened model's last hidden state is that tensor.
    """
    with explained(f"{model}: text_encoder or tokenizer cannot be loaded"):
        config = Qwen3Config.from_pretrained(model / "text_encoder")
        config.num_hidden_layers -= 1
        config.layer_types = config.layer_types and config.layer_types[: config.num_hidden_layers]
        options = {"variant": cfg.variant, "dtype": DTYPES[cfg.mixed_precision], "output_loading_info": True}
        text_encoder, report = Qwen3Model.from_pretrained(model / "text_encoder", config=config, **options)
        tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    refuse_missing(report["missing_keys"], model / "text_encoder")
    text_encoder.norm = nn.Identity()
    return TextEncoder(tokenizer, text_encoder.eval().to("cpu" if cfg.offload else device))


@torch.no_grad()
def encode_prompt(encoder: TextEncoder, prompt: str, max_sequence_length: int) -> Tensor:
    """Encode one prompt at its true length, as `ZImagePipeline` does; says what is cut off. -> (L, 2560)"""
    chat = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    tokens = encoder.tokenizer(chat).input_ids
    if len(tokens) > max_sequence_length:
        lost = encoder.tokenizer.decode(tokens[max_sequence_length:])[:200]
        limit = f"--max_sequence_length {max_sequence_length} of {len(tokens)} tokens"
        say(f"warning: {limit}; cut off: {lost!r}", everywhere=True)
    input_ids = torch.tensor([tokens[:max_sequence_length]], device=encoder.model.device)  # (1, L)
    return encoder.model(input_ids=input_ids).last_hidden_state[0]


def load_vae(model: Path, cfg: Config, device: torch.device) -> AutoencoderKL:
    """Load the VAE."""
    with explained(f"{model}/vae cannot be loaded"):
        options = {"variant": cfg.variant, "torch_dtype": DTYPES[cfg.mixed_precision]}
        vae = AutoencoderKL.from_pretrained(model / "vae", **options)
    refuse_missing([name for name, weight in vae.named_parameters() if weight.is_meta], model / "vae")
    return vae.eval().to("cpu" if cfg.offload else device)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: Tensor, device: torch.device) -> Tensor:
    """Encode pixels in [-1, 1] to the mode of their latents, scaled. (B, 3, H, W) -> (B, 16, h, w) in fp32"""
    with visiting(vae, device):
        latents = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode().float()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Decode scaled latents, on their device, to pictures as `ZImagePipeline` does. (B, 16, h, w) -> B pictures"""
    with visiting(vae, latents.device):
        unscaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(unscaled, return_dict=False)[0]  # (B, 3, H, W)
    return VaeImageProcessor().postprocess(pixels, output_type="pil")


class Augmentation(NamedTuple):
    """How one example differs from its picture."""

    is_flipped: bool
    centering: tuple[float, float]  # place of the crop, from left (0) to right (1) and from top to bottom


CENTRE = (0.5, 0.5)


def draw_augmentation(cfg: Config, number: int) -> Augmentation:
    """Draw the flip and the crop of the `number`-th example."""
    chance = random.Random(derive_seed(cfg.seed, "augmentation", number))
    is_flipped, centering = chance.random() < 0.5, (chance.random(), chance.random())
    return Augmentation(is_flipped and cfg.random_flip, CENTRE if cfg.center_crop else centering)


def noise_seed(cfg: TrainingConfig, number: int) -> int:
    """Choose the seed of the noise and the noise level of the `number`-th example."""
    return derive_seed(cfg.seed, "noise", number)


def load_pixels(sample: Sample, augmentation: Augmentation) -> Tensor:
    """Load a picture scaled to cover its bucket, cropped and perhaps mirrored. -> (3, H, W) in [-1, 1]"""
    height, width = sample.bucket
    place, picture = augmentation.centering, load_picture(sample.path)
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS, centering=place)
    if augmentation.is_flipped:
        picture = ImageOps.mirror(picture)
    return picture_tensor(picture).permute(2, 0, 1).float() / 127.5 - 1


def picture_tensor(picture: Image.Image) -> Tensor:
    """Copy an RGB picture's pixels. -> (H, W, 3) of uint8"""
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)


def share_of(items: list[Any], accelerator: Accelerator, is_even: bool = False) -> list[Any]:
    """Take every n-th item of a list, the same for all n processes of this machine, whose disk may be its own.

    With `is_even` some items are done twice, so that all processes do equally many, as FSDP's forward passes must be.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if is_even:
        items = list(itertools.islice(itertools.cycle(items), math.ceil(len(items) / processes) * processes))
    return items[accelerator.local_process_index :: processes]


def progress_bar(items: Iterable[Any], title: str, accelerator: Accelerator, **options: int) -> tqdm:
    """Show a bar on the first process while items are worked through."""
    seconds = 0.1 if sys.stderr.isatty() else 10  # a log file wants few lines
    quiet = not accelerator.is_main_process
    return tqdm(items, desc=title, disable=quiet, mininterval=seconds, dynamic_ncols=True, **options)


def tensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Encode tensors as a safetensors file whose bytes depend on its content only.

    safetensors 0.8 writes its `__metadata__` in random order, so the header is sorted and padded to 8 bytes again.
    """
    content = serialize({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if "__metadata__" in header:
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} | header
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def encoding_bytes(name: str, tensor: Tensor) -> bytes:
    """Encode a tensor as a file of the cache, which knows its own hash."""
    return tensors_bytes({name: tensor}, {"sha256": sha256(tensors_bytes({name: tensor}))})


def is_encoding(path: Path) -> bool:
    """Tell whether a file of the cache is there as it was written."""
    try:
        with safe_open(path, "pt") as file:
            (name,) = file.keys()
            return path.read_bytes() == encoding_bytes(name, file.get_tensor(name))
    except Exception:  # a damaged header can say anything
        return False


def fill_prompts_cache(prompts: list[str], encodings: Encodings, cfg: Config, accelerator: Accelerator) -> None:
    """Encode the prompts that are not on disk yet; only then is the text encoder loaded, and freed again."""
    mine = share_of([*dict.fromkeys(prompts)], accelerator)
    mine = [prompt for prompt in mine if not is_encoding(encodings.prompt(prompt))]
    if not mine:
        say("prompts: all come from the cache, the text encoder is not loaded")
    else:
        encoder = load_text_encoder(encodings.model, cfg, accelerator.device)
        with visiting(encoder.model, accelerator.device):
            for prompt in progress_bar(mine, "encoding prompts", accelerator):
                embedding = encode_prompt(encoder, prompt, cfg.max_sequence_length)
                write_file(encodings.prompt(prompt), encoding_bytes("prompt_embeds", embedding))
        del encoder
        free_memory()
    accelerator.wait_for_everyone()


def fill_latents_cache(samples: list[Sample], encodings: Encodings, cfg: Config, accelerator: Accelerator) -> None:
    """Encode the pictures that are not on disk yet, with mirror images if wanted; only then is the VAE loaded."""
    wanted = [(sample, is_flipped) for sample in samples for is_flipped in (False, True)[: 1 + cfg.random_flip]]
    mine = [job for job in share_of(wanted, accelerator) if not is_encoding(encodings.latents(*job))]
    if not mine:
        say("latents: all come from the cache, the VAE is not loaded for training")
    else:
        vae = load_vae(encodings.model, cfg, accelerator.device)
        for sample, is_flipped in progress_bar(mine, "encoding pictures", accelerator):
            pixels = load_pixels(sample, Augmentation(is_flipped, CENTRE))[None]
            latents = encode_images(vae, pixels, accelerator.device)[0]
            write_file(encodings.latents(sample, is_flipped), encoding_bytes("latents", latents))
        del vae
        free_memory()
    accelerator.wait_for_everyone()


def ignore_signals(worker: int) -> None:
    """Leave the signals of the whole group to the main process, which ends its workers when it is done."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class TrainingExamples(Dataset):
    """Turn a `Draw` into an `Example`: load one picture or its latents, and one embedding, from disk."""

    def __init__(self, samples: list[Sample], encodings: Encodings, cfg: Config) -> None:
        self.samples, self.encodings, self.cfg = samples, encodings, cfg

    def __getitem__(self, draw: Draw) -> Example:
        sample, augmentation = self.samples[draw.sample], draw_augmentation(self.cfg, draw.number)
        if self.cfg.cache_latents:
            image = load_file(self.encodings.latents(sample, augmentation.is_flipped))["latents"]
        else:
            image = load_pixels(sample, augmentation)
        prompt_embeds = load_file(self.encodings.prompt(sample.prompt))["prompt_embeds"]
        return Example(noise_seed(self.cfg, draw.number), image, prompt_embeds, sample.is_prior)


def collate(examples: list[Example]) -> Batch:
    """Put the examples of one bucket together; `latents` still holds pixels where the cache is not used."""
    seeds, images, prompt_embeds, is_prior = zip(*examples)
    return Batch(list(seeds), torch.stack(images), list(prompt_embeds), torch.tensor(is_prior))


def make_batches(
    samples: list[Sample], encodings: Encodings, cfg: Config, accelerator: Accelerator, step: int
) -> Iterator[Batch]:
    """Yield this process's slice of every micro-batch after optimizer step `step`, without end, on the device."""
    size, rank = cfg.train_batch_size, accelerator.process_index
    batches = micro_batches(samples, cfg, size * accelerator.num_processes)
    batches = itertools.islice(batches, step * cfg.gradient_accumulation_steps, None)
    mine = (batch[rank * size : (rank + 1) * size] for batch in batches)
    loader = DataLoader(
        TrainingExamples(samples, encodings, cfg), batch_sampler=mine, collate_fn=collate,
        num_workers=cfg.dataloader_num_workers, worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else the loader would draw from the global one
    )  # fmt: skip
    vae = None if cfg.cache_latents else load_vae(encodings.model, cfg, accelerator.device)
    for batch in loader:
        latents = batch.latents if vae is None else encode_images(vae, batch.latents, accelerator.device)
        yield send_to_device(batch._replace(latents=latents), accelerator.device)


# =====================================================================================================================
# Transformer and LoRA
# =====================================================================================================================

FP8 = torch.float8_e4m3fn
LAYER_ALIASES = {  # names from diffusers' other transformers, which commands for Z-Image have inherited
    "ff.net.0.proj": ("feed_forward.w1", "feed_forward.w3"),
    "ff.net.2": ("feed_forward.w2",),
}


class Format(NamedTuple):
    """How a frozen weight (N, K) is stored, and how it is multiplied."""

    storage: str  # fp8 and int8: a scale per row; nf4: a scale per 64 values
    shape: torch.Size
    dtype: torch.dtype  # of the layer's inputs and outputs
    has_fp8_products: bool


def to_fp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Round to fp8, every row scaled to fill its range. (M, K) -> (M, K) of e4m3, (M, 1) of fp32 to multiply it by"""
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    scale = tensor_to_scale(tensor, FP8, scaling_granularity=ScalingGranularity.AXISWISE, axiswise_dim=-1)
    return to_fp8_saturated(tensor.float() * scale, FP8).contiguous(), 1 / scale


def multiply_fp8(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    """Multiply scaled fp8 matrices. (M, K) with (M, 1), column-major (K, N) with (1, N) -> (M, N) of bf16"""
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(left, right, left_scale, by_row, right_scale, by_row, output_dtype=torch.bfloat16)


def compress(weight: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """Quantise a weight. (N, K) -> its bytes, fp32 scales

    fp8 goes as uint8, because PEFT would make a LoRA in the dtype of a floating-point weight.
    """
    if storage == "nf4":
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return packed, state.absmax
    if storage == "int8":
        from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine

        row = (1, weight.shape[1])
        scale, zero = choose_qparams_affine(
            weight, MappingType.SYMMETRIC, row, torch.int8, scale_dtype=torch.float32, keepdim=True
        )
        return quantize_affine(weight, row, scale, zero, torch.int8), scale
    rounded, scale = to_fp8(weight)
    return rounded.view(torch.uint8), scale


def restore(stored: Tensor, scale: Tensor, form: Format) -> Tensor:
    """Undo `compress`, up to its rounding. -> (N, K)"""
    if form.storage == "nf4":
        from bitsandbytes.functional import QuantState, dequantize_4bit

        return dequantize_4bit(stored, QuantState(scale, form.shape, blocksize=64, quant_type="nf4", dtype=form.dtype))
    values = stored.view(FP8) if form.storage == "fp8" else stored
    return values.to(form.dtype) * scale.to(form.dtype)


class FrozenProduct(torch.autograd.Function):
    """x W^T for a frozen weight; the backward pass keeps the weight as it is stored, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, form: Format) -> Tensor:
        """Multiply. (..., K) -> (..., N)"""
        ctx.save_for_backward(stored, scale)
        ctx.form = form
        if not form.has_fp8_products:
            return F.linear(x, restore(stored, scale, form))
        rows, rows_scale = to_fp8(x.flatten(0, -2))
        product = multiply_fp8(rows, stored.view(FP8).t(), rows_scale, scale.t())
        return product.to(form.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Take the gradient back to the input; the weight has none. (..., N) -> (..., K)"""
        (stored, scale), form = ctx.saved_tensors, ctx.form
        if not form.has_fp8_products:
            return gradient @ restore(stored, scale, form), None, None, None
        rows, rows_scale = to_fp8(gradient.flatten(0, -2) * scale.t())  # W's scales lie along the sum: they go first
        weight = stored.view(FP8).t().contiguous().t()  # column-major, as the product wants it
        product = multiply_fp8(rows, weight, rows_scale, torch.ones(1, form.shape[1], device=scale.device))
        return product.to(form.dtype).unflatten(0, gradient.shape[:-1]), None, None, None


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is stored in 8 or 4 bits and never trained."""

    def __init__(self, linear: nn.Linear, storage: str, dtype: torch.dtype, has_fp8_products: bool) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta", dtype)
        fits = linear.in_features % 16 == 0 and linear.out_features % 16 == 0  # else the hardware cannot
        self.form = Format(storage, self.weight.shape, dtype, has_fp8_products and fits)

    def store(self, weight: Tensor) -> None:
        """Take over a weight (N, K)."""
        stored, scale = compress(weight, self.form.storage)
        self.weight, self.scale = nn.Parameter(stored, False), nn.Parameter(scale, False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer. (..., K) -> (..., N)"""
        product = FrozenProduct.apply(x.to(self.form.dtype), self.weight, self.scale, self.form)
        return product if self.bias is None else product + self.bias


def make_empty_transformer(model: Path) -> ZImageTransformer2DModel:
    """Build the transformer without weights, on the meta device."""
    with explained(f"{model}/transformer/config.json does not describe Z-Image"), torch.device("meta"):
        return ZImageTransformer2DModel.from_config(ZImageTransformer2DModel.load_config(model / "transformer"))


def load_compressed(model: Path, cfg: Config, dtype: torch.dtype, device: torch.device) -> ZImageTransformer2DModel:
    """Read the transformer tensor by tensor, quantising at once: it never exists whole in its original precision."""
    transformer = make_empty_transformer(model).to(dtype)
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    for block in (module for module in transformer.modules() if isinstance(module, ZImageTransformerBlock)):
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                block.set_submodule(name, FrozenLinear(linear, cfg.storage, dtype, cfg.do_fp8_training))
    for file in weight_files(model / "transformer", cfg.variant):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():
                tensor = shard.get_tensor(name).to(device, dtype)
                fits = tensor.shape == shapes.get(name)
                require(fits, f"{file}: {name} does not fit the model's config.json; download it again")
                owner, _, kind = name.rpartition(".")
                module = transformer.get_submodule(owner)
                if isinstance(module, FrozenLinear) and kind == "weight":
                    module.store(tensor)
                else:
                    setattr(module, kind, nn.Parameter(tensor.clone(), False))  # a view would keep the whole shard
    return transformer


def bnb_options(cfg: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Translate `--bnb_quantization_config_path` into options of `from_pretrained`; none without it."""
    settings = read_bnb_settings(cfg)
    if not settings:
        return {}
    from diffusers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**settings | {"bnb_4bit_compute_dtype": dtype})}


def load_transformer(model: Path, cfg: Config, dtype: torch.dtype, device: torch.device) -> ZImageTransformer2DModel:
    """Load the frozen transformer: to host memory, quantised ones to the device."""
    if cfg.storage is not None:
        transformer = load_compressed(model, cfg, dtype, device)
    else:
        options = {"variant": cfg.variant, "torch_dtype": dtype} | bnb_options(cfg, dtype)
        with explained(f"{model}/transformer cannot be loaded"):
            transformer = ZImageTransformer2DModel.from_pretrained(model / "transformer", **options)
    refuse_missing([name for name, weight in transformer.named_parameters() if weight.is_meta], model / "transformer")
    transformer.set_attention_backend(cfg.attention)  # always: diffusers keeps an earlier run's for the whole process
    if cfg.gradient_checkpointing and not uses_fsdp_checkpointing():
        transformer.enable_gradient_checkpointing()
    return transformer.requires_grad_(False)


def expand_range(name: str) -> Iterator[str]:
    """Write `layers.0-9.attention` out as ten names; a name without a range stays as it is."""
    match = re.fullmatch(r"(.+\.)(\d{1,99})-(\d{1,99})(\..+)?", name)
    if match is None or int(match[2]) > int(match[3]):
        return iter([name])
    return (f"{match[1]}{number}{match[4] or ''}" for number in range(int(match[2]), int(match[3]) + 1))


def resolve_lora_layers(lora_layers: str, model: Path) -> list[str]:
    """Translate `--lora_layers` into the full names of linear layers, looked up in a model without weights.

    A name stands for every layer that it is, that ends in it, or that lies inside it: `to_q`, `layers.10.attention`,
    `layers.10.attention.to_q`; `layers.0-9` is a range. Raises UserError for a name that stands for nothing.
    """
    modules = make_empty_transformer(model).named_modules()
    linear = [name for name, module in modules if isinstance(module, nn.Linear)]
    wanted = [name.strip() for name in lora_layers.split(",") if name.strip()]
    require(bool(wanted), "--lora_layers is empty; leave it out for the attention and feed-forward layers")
    chosen = set()
    for name in wanted:
        if name in LAYER_ALIASES:
            say(f"--lora_layers: {name} means {' and '.join(LAYER_ALIASES[name])} in Z-Image")
        for part in LAYER_ALIASES.get(name, expand_range(name)):
            hits = {layer for layer in linear if f".{part}." in f".{layer}."}
            endings = sorted({re.sub(r"^\w+\.\d+\.", "", layer) for layer in linear})
            require(bool(hits), f"--lora_layers: no linear layer is called {part}; there are {', '.join(endings)}")
            chosen |= hits
    return [layer for layer in linear if layer in chosen]


def check_sizes(cfg: Config, samples: list[Sample], model: Path) -> None:
    """Refuse pictures beyond the transformer's table of positions, one for every 16 pixels."""
    frames, rows, columns = make_empty_transformer(model).config.axes_lens
    length = cfg.max_sequence_length  # captions are padded to a multiple of 32, and the picture comes after them
    fits = length <= 512 or math.ceil(length / 32) * 32 + 2 <= frames
    require(fits, f"--max_sequence_length {length} is beyond this model, which has {frames} positions; take 512")
    side = cfg.validation_resolution or training_side(cfg)
    for height, width in {(side, side), *(sample.bucket for sample in samples)}:
        require(
            height <= 16 * rows and width <= 16 * columns,
            f"{height} x {width} is too large for this model, which knows {16 * rows} x {16 * columns} pixels; "
            "lower --resolution, --aspect_ratio_buckets or --validation_resolution",
        )


def add_lora(
    transformer: ZImageTransformer2DModel, layers: list[str], cfg: LoraSettings, seed: int
) -> list[nn.Parameter]:
    """Add a LoRA in fp32 to the named layers, the same on every process; returns what is trained."""
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=cfg.rank, lora_alpha=cfg.lora_alpha or cfg.rank, lora_dropout=cfg.lora_dropout, target_modules=layers,
        init_lora_weights="gaussian",
    )  # fmt: skip
    transformer.add_adapter(settings)
    cast_training_params(transformer, torch.float32)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def describe_lora(transformer: nn.Module, layers: list[str], cfg: LoraSettings) -> list[str]:
    """Tell how much is frozen and trained, and how strongly it counts."""
    frozen = [parameter for parameter in transformer.parameters() if not parameter.requires_grad]
    size = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
    count = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    return [
        f"transformer: {size / 1e9:.3g} GB of frozen weights",
        f"LoRA: {count:,} trainable parameters in {len(layers)} layers, rank {cfg.rank}, "
        f"effective scale alpha / rank = {cfg.lora_scale:g}",
    ]


# =====================================================================================================================
# Objective
# =====================================================================================================================


def sample_noise(seeds: list[int], shape: torch.Size) -> Tensor:
    """Draw Gaussian noise, each example's from its own seed, the same on every device. -> (B, *shape)"""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels towards noise for a shift above 1, as FlowMatchEulerDiscreteScheduler does. (B,) -> (B,)"""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def read_timestep_shift(cfg: ObjectiveConfig, model: Path) -> float:
    """Resolve `--timestep_shift`: a number, or what the checkpoint's scheduler says."""
    if cfg.timestep_shift != "scheduler":
        return float(cfg.timestep_shift)
    settings = FlowMatchEulerDiscreteScheduler.load_config(model / "scheduler")
    is_static = not settings.get("use_dynamic_shifting", False)
    require(is_static, "--timestep_shift scheduler: this checkpoint shifts by picture size; give a number instead")
    return settings["shift"]


def sample_sigmas(seeds: list[int], cfg: ObjectiveConfig, shift: float) -> Tensor:
    """Draw continuous noise levels, 1 being pure noise, each from its example's seed. -> (B,)

    The densities are those of Stable Diffusion 3 (arXiv 2403.03206, section 3.1), where time is the share of noise;
    a positive logit_mean therefore means more noise. Levels below 1/1000 are raised to it: sigma_sqrt divides by them.
    """
    generators = [torch.Generator().manual_seed(derive_seed(seed, "sigma")) for seed in seeds]
    density = (cfg.weighting_scheme, 1, cfg.logit_mean, cfg.logit_std, cfg.mode_scale)
    draws = [compute_density_for_timestep_sampling(*density, generator=generator) for generator in generators]
    return shift_sigmas(torch.cat(draws), shift).clamp(1e-3, 1.0)


def mix_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Move latents along the straight line to the noise. (B, 16, h, w), (B, 16, h, w), (B,) -> (B, 16, h, w)"""
    sigmas = sigmas.view(-1, 1, 1, 1)
    return (1 - sigmas) * latents + sigmas * noise


def predict_velocity(
    transformer: nn.Module, noisy_latents: Tensor, sigmas: Tensor, prompt_embeds: list[Tensor]
) -> Tensor:
    """Speak Z-Image's dialect: lists instead of batches, a frame axis, time 1 - sigma, and the opposite sign."""
    assert len(prompt_embeds) == len(noisy_latents), "the model pairs them by zip and drops the surplus"
    frames = list(noisy_latents.unsqueeze(2).unbind(0))  # B of (16, 1, h, w)
    outputs = transformer(frames, 1 - sigmas, prompt_embeds, return_dict=False)[0]
    return -torch.stack(outputs).squeeze(2)  # (B, 16, h, w)


def flow_matching_loss(velocity: Tensor, target: Tensor, image_weights: Tensor) -> Tensor:
    """Mean squared error, each image counted by its weight. (B, 16, h, w), (B, 16, h, w), (B,) -> scalar"""
    per_image = (velocity.float() - target.float()).square().mean(dim=(1, 2, 3))  # (B,)
    return (image_weights * per_image).mean()


def training_loss(transformer: nn.Module, batch: Batch, cfg: ObjectiveConfig, shift: float) -> Tensor:
    """Take one forward pass: noise the latents, predict the velocity, compare it with the true one. -> scalar"""
    latents = batch.latents  # (B, 16, h, w)
    noise = sample_noise(batch.seeds, latents.shape[1:]).to(latents.device)  # (B, 16, h, w)
    sigmas = sample_sigmas(batch.seeds, cfg, shift).to(latents.device)  # (B,)
    noisy_latents = mix_noise(latents, noise, sigmas)  # (B, 16, h, w)
    velocity = predict_velocity(transformer, noisy_latents, sigmas, batch.prompt_embeds)  # (B, 16, h, w)
    target = noise - latents  # d noisy_latents / d sigma
    prior_weights = torch.where(batch.is_prior, cfg.prior_loss_weight, 1.0)  # (B,)
    return flow_matching_loss(velocity, target, prior_weights * loss_weights(cfg.weighting_scheme, sigmas))


# =====================================================================================================================
# Training
# =====================================================================================================================


def anyone(condition: bool) -> bool:
    """Tell whether a condition holds on any process; all must ask together."""
    state = PartialState()
    if state.num_processes == 1:
        return condition
    return bool(reduce_tensor(torch.tensor(float(condition), device=state.device), "sum"))


class StopRequest:
    """What asks the run to stop: a signal, the end of its launcher, or of `--max_train_minutes`.

    It raises `Stopped` at once, for every file is whole at every moment. While `is_deferred`, as in training, where a
    checkpoint can be saved first, it waits until all processes, of which one is enough, agree on a place to stop.
    """

    def __init__(self, minutes: float | None) -> None:
        self.number, self.reason, self.is_deferred = 0, "", False
        self.parent = PARENT if RUN_AS_SCRIPT else os.getppid()
        self.deadline = time.monotonic() + 60 * (minutes or math.inf)
        self.is_over, self.handlers = threading.Event(), {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # signals are for no other
            self.handlers = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
            threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.is_over.set()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        """Take a signal; a second SIGINT ends the process where it stands."""
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        self.number, self.reason = self.number or number, self.reason or signal.Signals(number).name
        if not self.is_deferred:
            raise Stopped(f"stopped by {self.reason}", self.number)

    def watch(self) -> None:
        """Look every second whether the launcher has died or the time is up, and pass on what nobody has heard."""
        is_launched = bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys())
        while not self.is_over.wait(1):
            if is_launched and os.getppid() != self.parent:
                self.reason = self.reason or "the end of its launcher"
            elif time.monotonic() > self.deadline:
                self.reason = self.reason or "--max_train_minutes"
            if self.reason and not (self.number and self.is_deferred):
                os.kill(os.getpid(), self.number or signal.SIGTERM)

    def is_agreed(self) -> bool:
        """Tell whether any process has been asked to stop; all must ask together."""
        is_asked = anyone(self.number > 0)  # a signal that comes while they ask is for the next time
        if is_asked:
            self.number, self.reason = self.number or signal.SIGTERM, self.reason or "another process"
        return is_asked

    def ends(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on until the run is to stop."""
        for batch in batches:
            yield batch
            if self.is_agreed():
                return

    def on_step_end(self, pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """Stop between two denoising steps; all processes must draw equally many."""
        if self.is_agreed():
            raise Stopped(f"stopped by {self.reason}", self.number)
        return tensors


def whole(tensor: Tensor) -> Tensor:
    """Collect a tensor that FSDP has spread over the processes, all of which must call this; others stay as is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Spread a tensor over the processes as another one is, if it is."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def train(
    cfg: Config, accelerator: Accelerator, transformer: nn.Module, optimizer: Optimizer, batches: Iterator[Batch],
    samples: list[Sample], schedule: Schedule,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Run the loop, yielding metrics after every optimizer step; saving and sampling happen at the caller's.

    It ends early when the batches do. Raises FloatingPointError, before the weights move, if the loss is not finite.
    """
    learning_rate_at, skipped = make_learning_rate(cfg, schedule), 0
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    transformer.train()
    for step in range(schedule.first_step, schedule.max_train_steps):
        started, losses = time.perf_counter(), []
        for index, batch in enumerate(itertools.islice(batches, cfg.gradient_accumulation_steps)):
            torch.manual_seed(derive_seed(cfg.seed, "dropout", step, index, accelerator.process_index))
            with accelerator.accumulate(transformer):
                loss = training_loss(transformer, batch, cfg, schedule.timestep_shift)
                accelerator.backward(loss)
            losses.append(loss.detach())
        if len(losses) < cfg.gradient_accumulation_steps:
            return  # the weights have not moved; whoever continues takes these batches again
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        grad_norm = float(whole(accelerator.clip_grad_norm_(parameters, cfg.max_grad_norm)))
        metrics = {"step": step + 1, "loss": loss, "grad_norm": grad_norm}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step)
        skipped = 0 if is_finite(metrics, samples, cfg, schedule, skipped) else skipped + 1
        if skipped:
            metrics["is_skipped"] = True
        else:
            optimizer.step()
        optimizer.zero_grad()
        lr = learning_rate_at(step) * optimizer.param_groups[0].get("d", 1.0)  # Prodigy's rate counts times its d
        yield metrics | {"lr": lr, "seconds": round(time.perf_counter() - started, 3)}


def make_optimizer(parameters: list[nn.Parameter], cfg: OptimizerConfig) -> Optimizer:
    """Make the optimizer over the LoRA's fp32 parameters."""
    common = {
        "lr": cfg.learning_rate, "betas": (cfg.adam_beta1, cfg.adam_beta2), "weight_decay": cfg.adam_weight_decay,
        "eps": cfg.adam_epsilon,
    }  # fmt: skip
    if cfg.has_8bit_state:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **common)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **common)
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(None):  # it prints a remark of its own
        return Prodigy(
            parameters, **common, beta3=cfg.prodigy_beta3, decouple=cfg.prodigy_decouple,
            use_bias_correction=cfg.prodigy_use_bias_correction, safeguard_warmup=cfg.prodigy_safeguard_warmup,
        )  # fmt: skip


def make_learning_rate(cfg: OptimizerConfig, schedule: Schedule) -> Callable[[int], float]:
    """Make the learning rate a function of the optimizer step, with diffusers' schedules."""
    peak = cfg.learning_rate * (schedule.total_batch if cfg.scale_lr else 1)
    placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak)
    scheduler = get_scheduler(
        cfg.lr_scheduler, placeholder, cfg.lr_step_rules, num_warmup_steps=cfg.lr_warmup_steps,
        num_training_steps=schedule.max_train_steps, num_cycles=cfg.lr_num_cycles, power=cfg.lr_power,
    )  # fmt: skip
    return lambda step: peak * scheduler.lr_lambdas[0](step)


def is_finite(metrics: dict[str, float], samples: list[Sample], cfg: Config, schedule: Schedule, skipped: int) -> bool:
    """Tell whether a step's numbers are finite; if not, name its pictures and noise levels, on all processes.

    Raises FloatingPointError, or with `--on_nan skip` returns False, up to ten times in a row.
    """
    step, count = metrics["step"], cfg.gradient_accumulation_steps
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return True
    batches = itertools.islice(micro_batches(samples, cfg, schedule.micro_batch), (step - 1) * count, step * count)
    draws = [draw for batch in batches for draw in batch]
    sigmas = sample_sigmas([noise_seed(cfg, draw.number) for draw in draws], cfg, schedule.timestep_shift)
    examples = [f"{samples[draw.sample].path} at sigma {sigma:.3f}" for draw, sigma in zip(draws, sigmas)]
    problem = f"step {step}: the loss is {metrics['loss']}, the gradient norm {metrics['grad_norm']}, with "
    problem += ", ".join(examples)
    if cfg.on_nan == "skip" and skipped < 10:
        say(f"warning: {problem}; the step is skipped")
        return False
    last = next(filter(read_checkpoint, reversed(list_checkpoints(Path(cfg.output_dir)))), None)
    good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    others = "ten steps in a row were skipped already" if skipped else "--on_nan skip goes on without such steps"
    raise FloatingPointError(
        f"{problem}; the run stops, its weights unmoved; {good}. A lower --learning_rate is the usual remedy; {others}"
    )


def lora_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """Find the live tensors of the LoRA, by their names in files.

    PEFT's own function finds none of them inside the wrappers of FSDP's activation checkpointing.
    """
    state = transformer.state_dict()  # its tensors share their memory with the parameters
    return {name.replace(".default.", "."): tensor for name, tensor in state.items() if ".lora_" in name}


def lora_state_dict(transformer: nn.Module) -> dict[str, Tensor]:
    """Collect the LoRA's tensors, on all processes. Raises FloatingPointError if they are broken."""
    state = {name: whole(tensor) for name, tensor in lora_tensors(transformer).items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise FloatingPointError("the LoRA is no longer finite and is not saved; lower --learning_rate")
    return state


@torch.no_grad()
def load_lora(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Put tensors that `lora_state_dict` collected into the live model."""
    for name, live in lora_tensors(transformer).items():
        live.copy_(spread_like(state[name], live))


def flatten(tree: dict[Any, Any], path: str = "") -> dict[str, Any]:
    """Name the leaves of nested dictionaries by their paths, such as `0.exp_avg`; tensors are collected."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{path}{key}.")
        else:
            # a copy: bitsandbytes shares tables between parameters, which safetensors refuses
            flat[f"{path}{key}"] = whole(value).clone() if torch.is_tensor(value) else value
    return flat


def unflatten(flat: dict[str, Any], parameters: list[nn.Parameter]) -> dict[int, dict[str, Any]]:
    """Undo `flatten` for the state of an optimizer, spreading what has a parameter's shape as the parameter is."""
    state: dict[int, dict[str, Any]] = collections.defaultdict(dict)
    for path, value in flat.items():
        number, *inner, key = path.split(".")
        parameter, entry = parameters[int(number)], state[int(number)]
        for name in inner:
            entry = entry.setdefault(name, {})
        has_shape = torch.is_tensor(value) and value.shape == parameter.shape
        entry[key] = spread_like(value, parameter) if has_shape else value
    return state


def save_checkpoint(
    accelerator: Accelerator, cfg: Config, transformer: nn.Module, optimizer: Optimizer, step: int, run: dict[str, Any]
) -> None:
    """Write checkpoint-N: the LoRA and the optimizer in fp32 as safetensors, the rest as JSON, whole or not at all."""
    lora, state = lora_state_dict(unwrap(accelerator, transformer)), optimizer.state_dict()
    values = flatten(state["state"])
    tensors = {name: value for name, value in values.items() if torch.is_tensor(value)}
    numbers = {name: value for name, value in values.items() if name not in tensors}
    content = {"step": step, "run": run, "optimizer": numbers, "param_groups": state["param_groups"]}
    files = (tensors_bytes(lora), tensors_bytes(tensors), json.dumps(content, indent=1).encode())
    folder = Path(cfg.output_dir) / f"checkpoint-{step}"
    if accelerator.is_main_process and not folder.exists():
        write_checkpoint(folder, dict(zip(CHECKPOINT_FILES, files)))
        for old in list_checkpoints(folder.parent)[: -(cfg.checkpoints_total_limit or sys.maxsize)]:
            if read_checkpoint(old):  # a damaged one is left for its owner to look at
                remove_folder(old)
    accelerator.wait_for_everyone()


def write_checkpoint(folder: Path, files: dict[str, bytes]) -> None:
    """Put files and their manifest in place, and read them back. Raises OSError if the disk does not give them."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    manifest = {name: file_entry(content) for name, content in files.items()}
    try:
        for name, content in {**files, "manifest.json": json.dumps(manifest, indent=1).encode()}.items():
            write_file(temporary / name, content)
        sync(folder.parent / "metrics.jsonl")
        put_in_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if read_checkpoint(folder) is None:
        raise OSError(f"{folder} cannot be read back as it was written; check the disk")


def remove_folder(folder: Path) -> None:
    """Remove a folder, its name first, so that half of a checkpoint is never taken for a whole one."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def describe_run(cfg: Config, model: Path, samples: list[Sample], schedule: Schedule) -> dict[str, Any]:
    """List what a checkpoint is bound to: the examples that come next, what is trained, and how it is measured."""
    bound = (
        "seed", "rank", "lora_layers", "lora_dropout", "optimizer", "resolution", "repeats", "center_crop",
        "random_flip", "cache_latents", "max_sequence_length", "gradient_accumulation_steps", "mixed_precision",
        "quantization", "do_fp8_training", *(field.name for field in dataclasses.fields(ObjectiveConfig)),
    )  # fmt: skip
    components = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")
    contents = [identify(model / name, cfg) for name in components]
    pictures = []
    for sample in samples:
        content = json.dumps((sample.digest, sample.bucket, sample.prompt, sample.is_prior)).encode()
        pictures.append(f"{sha256(content)} {sample.path.name}")
    settings = {f"--{name}": getattr(cfg, name) for name in bound}
    settings |= {"--lora_alpha": cfg.lora_alpha or cfg.rank, "--use_8bit_adam": cfg.has_8bit_state}
    settings |= {"--bnb_quantization_config_path": read_bnb_settings(cfg)}
    settings |= {
        "--pretrained_model_name_or_path (a hash of its files)": sha256(json.dumps(contents).encode())[:12],
        "pictures": pictures,
    }
    return settings | {"--train_batch_size x processes": schedule.micro_batch}


def check_continuity(cfg: Config, checkpoint: Checkpoint, run: dict[str, Any]) -> None:
    """Refuse to continue with other data or settings than the checkpoint's, unless that is possible and meant."""
    before = checkpoint.state["run"]
    changed = {name: f"{name} {run[name]} (was {before.get(name)})" for name in run if run[name] != before.get(name)}
    if "pictures" in changed:
        names = sorted({line[65:] for line in set(run["pictures"]) ^ set(before["pictures"])})
        changed["pictures"] = f"pictures: {', '.join(names[:10]) or 'in another order'}{', ...' * (len(names) > 10)}"
    is_possible = not changed.keys() & {"--rank", "--lora_layers", "--optimizer", "--use_8bit_adam"}
    require(
        not changed or (is_possible and cfg.resume_anyway),
        f"{checkpoint.folder} was made with other settings or data: {'; '.join(changed.values())}. Give the same again"
        f"{', or --resume_anyway if the change is meant' * is_possible}",
    )
    say(*(f"--resume_anyway: {change}" for change in changed.values()))


def resume(
    accelerator: Accelerator, cfg: Config, transformer: nn.Module, optimizer: Optimizer, checkpoint: Checkpoint | None
) -> None:
    """Put LoRA, optimizer and metrics back to where they were at the checkpoint, or at the start."""
    step = 0 if checkpoint is None else checkpoint.step
    if checkpoint is not None:
        with explained(f"--resume_from_checkpoint: {checkpoint.folder} cannot be loaded", "name another one"):
            load_checkpoint(checkpoint, unwrap(accelerator, transformer), optimizer)
        say(f"continuing from {checkpoint.folder}, after step {step}")
    elif cfg.resume_from_checkpoint is not None:
        say(f"no checkpoint in {cfg.output_dir} yet: starting afresh")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        cut_metrics(Path(cfg.output_dir) / "metrics.jsonl", step)
        for later in list_checkpoints(Path(cfg.output_dir)):
            if int(later.name[11:]) > step:  # else `latest` would find it one day
                aside = later.with_name(f"superseded-{later.name}-{uuid.uuid4().hex[:8]}")
                state = "not continued" if read_checkpoint(later) else "damaged"
                say(f"{later} is {state}; it is now called {aside.name}")
                os.replace(later, aside)


def unwrap(accelerator: Accelerator, transformer: nn.Module) -> nn.Module:
    """Take the bare transformer out of DDP and torch.compile, whose wrappers would change its keys."""
    return accelerator.unwrap_model(transformer, keep_torch_compile=False)


def load_checkpoint(checkpoint: Checkpoint, transformer: nn.Module, optimizer: Optimizer) -> None:
    """Load LoRA and optimizer; settings of the optimizer stay as this run has them. Raises on a misfit."""
    lora, values = (load_file(checkpoint.folder / name) for name in CHECKPOINT_FILES[:2])
    values |= checkpoint.state["optimizer"]
    group, fresh = checkpoint.state["param_groups"][0], optimizer.state_dict()["param_groups"][0]
    counted = ("params", "k", "d", "d_max", "d_numerator", "d_denom", "d_hat")  # not what the optimizer is told
    numbers = {path.split(".")[0] for path in values}  # none if every step so far was skipped
    fits = lora.keys() == lora_tensors(transformer).keys() and numbers in (set(), set(map(str, fresh["params"])))
    require(fits, f"--resume_from_checkpoint {checkpoint.folder} has other layers or another optimizer; name another")
    load_lora(transformer, lora)
    state = unflatten(values, optimizer.param_groups[0]["params"])
    group = fresh | {name: value for name, value in group.items() if name in counted}
    optimizer.load_state_dict({"state": state, "param_groups": [group]})


def cut_metrics(file: Path, step: int) -> None:
    """Keep the metrics of the first `step` steps, so that continuing repeats none; a torn last line goes too."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    steps = [re.match(rb'\{"step": (\d+), .*\}\n$', line) for line in lines]
    write_file(file, b"".join(match[0] for match in steps if match is not None and int(match[1]) <= step))


def log_metrics(accelerator: Accelerator, cfg: Config, metrics: dict[str, float], schedule: Schedule) -> None:
    """Append one line to metrics.jsonl and tell the trackers."""
    step = metrics["step"]
    row = {"step": step, "epoch": round(schedule.epoch(step), 4)} | metrics
    row = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON knows no NaN
    if accelerator.is_main_process:
        path = Path(cfg.output_dir) / "metrics.jsonl"
        with explained(f"{path} cannot be written"), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    accelerator.log({name: value for name, value in row.items() if name != "step"}, step=step)


# =====================================================================================================================
# Sampling
# =====================================================================================================================


def make_pipeline(transformer: nn.Module, model: Path) -> ZImagePipeline:
    """Put a transformer that is on the device into the official pipeline, which then draws latents."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model / "scheduler")
    pipeline = ZImagePipeline(scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_pictures(
    pipeline: ZImagePipeline, vae: AutoencoderKL, jobs: list[tuple[str, int]], side: int, encodings: Encodings,
    cfg: ValidationConfig, on_step_end: Callable[..., dict[str, Any]] | None = None,
) -> list[Image.Image]:  # fmt: skip
    """Draw one square picture per (prompt, seed) from cached embeddings; the global random state is not touched."""
    device, dtype = pipeline.device, pipeline.transformer.dtype
    prompts = [prompt for prompt, _ in jobs] + [cfg.negative_prompt] * (len(jobs) if cfg.guidance_scale > 0 else 0)
    embeddings = [load_file(encodings.prompt(prompt))["prompt_embeds"].to(device, dtype) for prompt in prompts]
    latents = pipeline(
        prompt_embeds=embeddings[: len(jobs)], negative_prompt_embeds=embeddings[len(jobs) :], height=side, width=side,
        num_inference_steps=cfg.num_inference_steps, guidance_scale=cfg.guidance_scale, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for _, seed in jobs], callback_on_step_end=on_step_end,
    ).images  # fmt: skip
    return decode_latents(vae, latents)


def png_bytes(image: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def generate_class_images(
    samples: list[Sample], encodings: Encodings, cfg: Config, accelerator: Accelerator
) -> list[Sample]:
    """Draw the missing class pictures with the untrained model, each from its own name, split over the processes."""
    mine = share_of([sample for sample in samples if not sample.digest], accelerator)
    if mine:
        dtype = DTYPES[cfg.prior_generation_precision]
        transformer = load_transformer(encodings.model, cfg, dtype, accelerator.device).eval().to(accelerator.device)
        pipeline = make_pipeline(transformer, encodings.model)
        vae = load_vae(encodings.model, cfg, accelerator.device)
        groups = [mine[start : start + cfg.sample_batch_size] for start in range(0, len(mine), cfg.sample_batch_size)]
        for group in progress_bar(groups, "generating class pictures", accelerator):
            jobs = [(sample.prompt, derive_seed(cfg.seed, "class picture", sample.path.name)) for sample in group]
            drawn = draw_pictures(pipeline, vae, jobs, training_side(cfg), encodings, cfg)
            for sample, picture in zip(group, drawn):
                write_file(sample.path, png_bytes(picture))
        del pipeline, transformer, vae
        free_memory()
    accelerator.wait_for_everyone()
    return [sample if sample.digest else verify_pictures([sample], encodings.folder)[0] for sample in samples]


def validation_prompts(cfg: ValidationConfig, is_final: bool) -> list[str]:
    """List the prompts of one validation."""
    if is_final and cfg.skip_final_inference:
        return []
    final = [cfg.final_validation_prompt] if is_final and cfg.final_validation_prompt is not None else []
    return list(cfg.validation_prompt or final)


def needed_prompts(samples: list[Sample], cfg: ValidationConfig) -> list[str]:
    """List the prompts the run will use; the negative one only where guidance will."""
    drawn = [*validation_prompts(cfg, is_final=False), *validation_prompts(cfg, is_final=True)]
    drawn += [sample.prompt for sample in samples if not sample.digest]
    negative = [cfg.negative_prompt] * bool(drawn and cfg.guidance_scale)
    return [*(sample.prompt for sample in samples), *drawn, *negative]


def validation_folder(cfg: OutputConfig, step: int) -> Path:
    """Name the folder of the pictures drawn after `step` steps."""
    return Path(cfg.output_dir) / "validation" / f"step-{step:06d}"


def validate(
    cfg: Config, accelerator: Accelerator, transformer: nn.Module, encodings: Encodings, step: int, stop: StopRequest,
    is_final: bool = False,
) -> None:  # fmt: skip
    """Draw PROMPT-IMAGE.png from the live transformer, split over the processes, and put them on sheet.png."""
    prompts, folder = validation_prompts(cfg, is_final), validation_folder(cfg, step)
    jobs = list(itertools.product(range(len(prompts)), range(cfg.num_validation_images)))
    mine = share_of(jobs, accelerator, is_even=True)
    live = unwrap(accelerator, transformer).eval()
    if mine:
        say(f"step {step}: drawing {len(jobs)} pictures")
        pipeline = make_pipeline(live, encodings.model)
        vae = load_vae(encodings.model, cfg, accelerator.device)
        side = cfg.validation_resolution or training_side(cfg)
        for prompt, image in mine:
            job = (prompts[prompt], cfg.seed + image)
            picture = draw_pictures(pipeline, vae, [job], side, encodings, cfg, stop.on_step_end)[0]
            write_file(folder / f"{prompt}-{image}.png", png_bytes(picture))
        del pipeline, vae
        free_memory()
    live.train()
    accelerator.wait_for_everyone()
    if prompts and accelerator.is_main_process:
        pictures = [Image.open(folder / f"{prompt}-{image}.png") for prompt, image in jobs]
        sheet = make_sheet(pictures, columns=cfg.num_validation_images)
        write_file(folder / "sheet.png", png_bytes(sheet))
        log_pictures(accelerator, pictures, [prompts[prompt] for prompt, _ in jobs], step)
        say(f"step {step}: pictures in {folder}")


def make_sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Lay pictures out on one sheet, row by row, each at most 512 pixels wide."""
    side = min(512, pictures[0].width)
    sheet = Image.new("RGB", (side * columns, side * (len(pictures) // columns)))
    for number, picture in enumerate(pictures):
        sheet.paste(picture.resize((side, side)), (number % columns * side, number // columns * side))
    return sheet


def log_pictures(accelerator: Accelerator, pictures: list[Image.Image], captions: list[str], step: int) -> None:
    """Show the pictures to the trackers that take them."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            arrays = torch.stack([picture_tensor(picture) for picture in pictures])  # (N, H, W, 3)
            tracker.log_images({"validation": arrays}, step=step, dataformats="NHWC")
        if tracker.name == "wandb":
            import wandb

            images = [wandb.Image(picture, caption=caption) for picture, caption in zip(pictures, captions)]
            tracker.log({"validation": images}, step=step)


# =====================================================================================================================
# Artefacts
# =====================================================================================================================


def export_lora(state: dict[str, Tensor], scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fold alpha / rank into the matrices B, so that every loader applies the LoRA alike; name them for diffusers."""
    return {
        f"transformer.{name}": (tensor.float() * (scale if ".lora_B." in name else 1)).to(dtype)
        for name, tensor in state.items()
    }


def lora_metadata(cfg: Config) -> dict[str, str]:
    """Describe the LoRA in its header (modelspec 1.0.1), without dates and paths: equal content gives equal bytes."""
    prompt = cfg.instance_prompt or ""
    return {
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "z-image/lora",
        "modelspec.implementation": "diffusers", "modelspec.resolution": f"{training_side(cfg)}x{training_side(cfg)}",
        "modelspec.title": f"Z-Image LoRA {prompt}".strip(), "modelspec.trigger_phrase": prompt,
    }  # fmt: skip


def save_artefacts(accelerator: Accelerator, cfg: Config, transformer: nn.Module) -> Path:
    """Write the LoRA file; the live model continues with the weights as the file holds them."""
    file = Path(cfg.output_dir) / "pytorch_lora_weights.safetensors"
    live = unwrap(accelerator, transformer)
    dtype = torch.float32 if cfg.upcast_before_saving else DTYPES[cfg.mixed_precision]
    exported = export_lora(lora_state_dict(live), cfg.lora_scale, dtype)
    if accelerator.is_main_process:
        write_file(file, tensors_bytes(exported, lora_metadata(cfg)))
    as_saved = {name.removeprefix("transformer."): tensor.float() for name, tensor in exported.items()}
    unfolded = {name: tensor / (cfg.lora_scale if ".lora_B." in name else 1) for name, tensor in as_saved.items()}
    load_lora(live, unfolded)
    return file


def save_config(cfg: Config) -> None:
    """Write config.json: all settings, which `--config` replays, and the environment, which it does not."""
    settings = shareable_settings(cfg) | {"environment": describe_environment()}
    for order in ("resume_from_checkpoint", "resume_anyway", "overwrite_output_dir"):  # for this start alone
        del settings[order]
    content = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_file(Path(cfg.output_dir) / "config.json", content.encode())


def describe_environment() -> dict[str, str]:
    """Record what else a repetition depends on: the script and the libraries."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "Pillow")
    script = {"script_sha256": sha256(Path(__file__).read_bytes())} if "__file__" in globals() else {}
    return script | {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def save_model_card(cfg: Config, step: int) -> None:
    """Write README.md: pictures, trigger prompt, how to use the LoRA, how it was made; no paths of this machine."""
    base = None if Path(cfg.pretrained_model_name_or_path).exists() else cfg.pretrained_model_name_or_path
    folder, prompts = validation_folder(cfg, step).relative_to(cfg.output_dir), validation_prompts(cfg, is_final=True)
    jobs = list(itertools.product(range(len(prompts)), range(cfg.num_validation_images)))
    texts = [prompts[prompt] for prompt, _ in jobs]
    files = [f"{folder.as_posix()}/{prompt}-{image}.png" for prompt, image in jobs]
    data = ModelCardData(
        license="apache-2.0", base_model=base, library_name="diffusers", instance_prompt=cfg.instance_prompt,
        pipeline_tag="text-to-image", tags=["text-to-image", "diffusers", "lora", "z-image", "template:sd-lora"],
        widget=[{"text": text, "output": {"url": file}} for text, file in zip(texts, files)] or None,
    )  # fmt: skip
    snippet = CARD_SNIPPET.format(
        base=base or "path/to/the/base/model", side=cfg.validation_resolution or training_side(cfg), seed=cfg.seed,
        prompt=json.dumps((prompts or [cfg.instance_prompt or ""])[0], ensure_ascii=False),
        steps=cfg.num_inference_steps, guidance=cfg.guidance_scale,
    )  # fmt: skip
    names = (
        "rank", "lora_layers", "resolution", "learning_rate", "optimizer", "lr_scheduler", "weighting_scheme",
        "timestep_shift", "train_batch_size", "gradient_accumulation_steps", "with_prior_preservation",
        "mixed_precision", "seed",
    )  # fmt: skip
    rows = [f"| {name} | {getattr(cfg, name)} |" for name in names]
    rows += [f"| alpha / rank (folded into the file) | {cfg.lora_scale:g} |", f"| steps | {step} |"]
    pictures = [f"![{plain(text)}]({file})" for text, file in zip(texts, files)]
    trigger = plain(cfg.instance_prompt or "(the pictures had captions of their own)")
    card = CARD.format(prompt=trigger, pictures="\n".join(pictures), snippet=snippet, rows="\n".join(rows))
    write_file(Path(cfg.output_dir) / "README.md", f"---\n{data.to_yaml()}\n---\n{card}".encode())


def open_repository(cfg: OutputConfig) -> str:
    """Create the repository before training, so that a missing login shows now; returns its full name."""
    with explained(
        f"--push_to_hub: the repository {cfg.repository} cannot be made",
        "check network and login (`hf auth login`, or --hub_token), or leave the flag out and upload later",
    ):
        hub = HfApi(token=cfg.hub_token)
        return hub.create_repo(cfg.repository, private=cfg.hub_private_repo or None, exist_ok=True).repo_id


def push(cfg: OutputConfig, repository: str) -> None:
    """Upload what is meant to be shared, and nothing else. Raises UserError with the way to try again."""
    options = " ".join(f"--include='{pattern}'" for pattern in SHARED_FILES)
    with explained(
        f"the LoRA is finished and safe in {cfg.output_dir}, but uploading it failed",
        f"try again with: hf upload {repository} '{cfg.output_dir}' . {options}",
    ):
        HfApi(token=cfg.hub_token).upload_folder(
            repo_id=repository, folder_path=cfg.output_dir, allow_patterns=SHARED_FILES, commit_message="Z-Image LoRA"
        )
    say(f"uploaded to {repository}")


def plain(text: str) -> str:
    """Put a prompt on one line, without the marks that Markdown and HTML would act on."""
    return " ".join(re.sub(r"[\[\]()<>|*_`#]", " ", text).split())


def describe_results(cfg: Config, file: Path) -> list[str]:
    """Tell where the results of the run are, and how many steps were skipped."""
    metrics, pictures = Path(cfg.output_dir) / "metrics.jsonl", Path(cfg.output_dir) / "validation"
    lines = [f"LoRA      {file}", f"metrics   {metrics}"] + [f"pictures  {pictures}"] * pictures.is_dir()
    skipped = metrics.read_text(encoding="utf-8").count('"is_skipped": true')
    lines += [f"warning: {skipped} steps were skipped, whose loss or gradient was not finite"] * bool(skipped)
    return lines + DEMO_FAREWELL.format(script=Path(sys.argv[0]).name).splitlines() * cfg.demo


CARD = """
# Z-Image LoRA

Trigger prompt: **{prompt}**

{pictures}

## Use it

```python
{snippet}
```

## How it was made

DreamBooth with LoRA on Z-Image, by `train_dreambooth_lora_z_image.py`. All settings are in `config.json`.

| setting | value |
|---|---|
{rows}
"""

CARD_SNIPPET = """
import torch
from diffusers import ZImagePipeline

pipe = ZImagePipeline.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("path/to/this/folder")
generator = torch.Generator().manual_seed({seed})
size = {{"height": {side}, "width": {side}}}
image = pipe({prompt}, **size, num_inference_steps={steps}, guidance_scale={guidance}, generator=generator).images[0]
image.save("output.png")
""".strip()


# =====================================================================================================================
# Demo
# =====================================================================================================================

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
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
        )
    )  # fmt: skip
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
    ZImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder.eval(), tokenizer=tokenizer, transformer=transformer
    ).save_pretrained(folder)


def make_demo_pictures(folder: Path) -> None:
    """Draw one subject, a badge, five times: other backgrounds, places, sizes and shapes of the picture."""
    sizes = [(96, 96), (128, 96), (96, 128), (160, 120), (80, 80)]
    for number, (background, (width, height)) in enumerate(zip(("navy", "white", "orange", "black", "green"), sizes)):
        picture = Image.new("RGB", (width * 4, height * 4), background)
        radius = min(width, height) * (1.1 + 0.1 * number)
        left, top = width * 2 - radius + 4 * number, height * 2 - radius - 4 * number
        box, draw = [left, top, left + 2 * radius, top + 2 * radius], ImageDraw.Draw(picture)
        draw.pieslice(box, 90, 270, fill="red")
        draw.pieslice(box, 270, 450, fill="yellow")
        draw.ellipse(box, outline="gray", width=12)
        smooth = picture.resize((width, height), Image.Resampling.LANCZOS)
        write_file(folder / f"badge-{number}.png", png_bytes(smooth))


def make_demo(cfg: Config, accelerator: Accelerator) -> None:
    """Make the model and the pictures that `demo_settings` names; what the user named instead is left alone."""
    if accelerator.is_main_process:
        settings = demo_settings(cfg.output_dir)
        if cfg.pretrained_model_name_or_path == settings["pretrained_model_name_or_path"]:
            make_demo_model(Path(cfg.pretrained_model_name_or_path))
        if cfg.instance_data_dir == settings["instance_data_dir"]:
            make_demo_pictures(Path(cfg.instance_data_dir))
    accelerator.wait_for_everyone()


DEMO_FAREWELL = """
That was a tiny random model. The real one, on a GPU, with a folder of your own pictures:

accelerate launch {script} \\
  --pretrained_model_name_or_path=Tongyi-MAI/Z-Image --instance_data_dir=dog --instance_prompt="a photo of sks dog" \\
  --output_dir=trained-z-image-lora --gradient_checkpointing --cache_latents --max_train_steps=1500 \\
  --validation_prompt="A photo of sks dog in a bucket"
"""


# =====================================================================================================================
# Main
# =====================================================================================================================


def make_accelerator(cfg: Config) -> Accelerator:
    """Make the accelerator; the config alone decides about precision and accumulation."""
    names, known = cfg.trackers, LoggerType.list()
    require(set(names) <= set(known), f"--report_to {cfg.report_to}: accelerate knows {', '.join(known)}, or none")
    accumulation = GradientAccumulationPlugin(num_steps=cfg.gradient_accumulation_steps, sync_with_dataloader=False)
    with explained("accelerate does not start", "in a notebook, restart the kernel to change --mixed_precision"):
        accelerator = Accelerator(
            mixed_precision=cfg.mixed_precision, gradient_accumulation_plugin=accumulation,
            log_with=names or None,
            project_config=ProjectConfiguration(cfg.output_dir, str(Path(cfg.output_dir, cfg.logging_dir))),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )  # fmt: skip
    is_there = "all" in names or len(accelerator.log_with) == len(names)
    require(is_there, f"--report_to: the package of a tracker is not installed; pip install {' '.join(names)}")
    started, seen = os.environ.get("WORLD_SIZE", "1"), accelerator.num_processes
    require(int(started) == seen, f"accelerate's configuration: {started} processes were started, it sees {seen}")
    torch.set_float32_matmul_precision("high" if cfg.allow_tf32 else "highest")
    return accelerator


def check_hardware(cfg: Config, model: Path, device: torch.device) -> None:
    """Refuse what this machine cannot compute, before anything is loaded."""
    is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    require(
        not (cfg.do_fp8_training and is_old),
        "--do_fp8_training needs a GPU of compute capability 8.9 or above (Ada, Hopper or later); "
        "--quantization fp8 stores the weights in 8 bits on any GPU",
    )
    if cfg.bnb_quantization_config_path is not None:
        with explained("--bnb_quantization_config_path", "--quantization nf4 or int8 runs everywhere"):
            config = bnb_options(cfg, DTYPES[cfg.mixed_precision])["quantization_config"]
            DiffusersAutoQuantizer.from_config(config).validate_environment()
    if cfg.has_8bit_state:
        with explained("--use_8bit_adam: bitsandbytes cannot do it on this machine", "leave the flag out"):
            probe = nn.Parameter(torch.zeros(4096, device=device))
            probe.grad = torch.zeros_like(probe)
            make_optimizer([probe], cfg).step()
    empty = make_empty_transformer(model)
    with explained(f"--attention_backend {cfg.attention}", "it cannot be trained with here; leave it out"):
        empty.set_attention_backend(cfg.attention)
        query = torch.ones(1, 32, 2, 64, dtype=DTYPES[cfg.mixed_precision], device=device, requires_grad=True)
        dispatch_attention_fn(query, query, query).sum().backward()


@contextlib.contextmanager
def sole_user(output: Path) -> Iterator[None]:
    """Hold the output folder, on the first process. Raises UserError if another run has it; a dead one has nothing."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        holder = (output / ".lock").read_text(encoding="utf-8") or "another process"
        raise UserError(f"--output_dir {output} is in use by {holder}; wait for it, or name another folder") from error
    try:
        (output / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def prepare_output(cfg: Config, accelerator: Accelerator) -> None:
    """Open the output folder: remove an earlier run if that was asked for, write config.json, start the trackers."""
    output = Path(cfg.output_dir)
    if cfg.trackers:
        start_trackers(cfg, accelerator)
    if accelerator.is_main_process:
        is_ours = "environment" in read_own_config(output) or bool(list_checkpoints(output))
        if is_ours and (cfg.overwrite_output_dir or (cfg.demo and cfg.resume_from_checkpoint is None)):
            remove_run(output)
        leftovers = [*output.glob(".*.tmp"), *output.glob("validation/step-*/.*.tmp")]
        for leftover in leftovers:  # of a run that was killed while writing
            if re.fullmatch(r"\.(checkpoint-\d+\.)?[0-9a-f]{32}\.tmp", leftover.name):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        save_config(cfg)
    accelerator.wait_for_everyone()


def start_trackers(cfg: Config, accelerator: Accelerator) -> None:
    """Start the trackers. Raises UserError if one cannot start, for want of a login or a network."""
    logs = Path(accelerator.logging_dir)
    logs.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere if its folder is missing
    shareable = shareable_settings(cfg).items()
    settings = {name: value if isinstance(value, (int, float)) else str(value) for name, value in shareable}
    with explained(f"--report_to {cfg.report_to} cannot start", "for wandb: `wandb login`"):
        accelerator.init_trackers("dreambooth-z-image-lora", settings, init_kwargs={"wandb": {"dir": str(logs)}})


def remove_run(output: Path) -> None:
    """Remove what an earlier run of this program wrote, and nothing else."""
    for name in RUN_FILES:
        (output / name).unlink(missing_ok=True)
    for folder in (*list_checkpoints(output), *output.glob("superseded-checkpoint-*")):
        remove_folder(folder)
    for path in output.glob("validation/step-*/*.png"):
        if re.fullmatch(r"step-\d+/(\d+-\d+|sheet)\.png", f"{path.parent.name}/{path.name}"):
            path.unlink()
    for folder in output.glob("validation/step-*"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class Plan(NamedTuple):
    """What a run will do: with which pictures, how long, from where."""

    samples: list[Sample]
    schedule: Schedule
    checkpoint: Checkpoint | None


def make_plan(cfg: Config, model: Path, accelerator: Accelerator) -> Plan:
    """Decide what the run will do, and tell. Raises UserError for what cannot work."""
    with accelerator.local_main_process_first():
        instance_folder = Path(cfg.instance_data_dir) if cfg.dataset_name is None else export_dataset(cfg)
        samples = plan_samples(cfg, instance_folder)
    check_sizes(cfg, samples, model)
    checkpoint, shift = find_checkpoint(cfg), read_timestep_shift(cfg, model)
    first_step = 0 if checkpoint is None else checkpoint.step
    steps = accelerator.gather(torch.tensor([first_step], device=accelerator.device)).tolist()
    shared = f"--output_dir {cfg.output_dir} holds another checkpoint on every machine; name a folder they share"
    require(len(set(steps)) == 1, shared)
    schedule = make_schedule(cfg, samples, accelerator.num_processes, shift, first_step)
    say(*describe_plan(samples, cfg, schedule))
    with accelerator.local_main_process_first():
        run = describe_run(cfg, model, samples, schedule)  # hashes the model: one process does it, the rest look it up
    if checkpoint is not None:
        with explained(f"--resume_from_checkpoint: {checkpoint.folder} is damaged", "name another one"):
            check_continuity(cfg, checkpoint, run)
    return Plan(samples, schedule, checkpoint)


def learn(
    cfg: Config, accelerator: Accelerator, transformer: nn.Module, optimizer: Optimizer, plan: Plan,
    encodings: Encodings, stop: StopRequest,
) -> None:  # fmt: skip
    """Train from where the run was left, with pictures and checkpoints. Raises Stopped, once its steps are saved."""
    resume(accelerator, cfg, transformer, optimizer, plan.checkpoint)
    schedule, origin = plan.schedule, describe_run(cfg, encodings.model, plan.samples, plan.schedule)
    step, last, saved = schedule.first_step, schedule.max_train_steps, time.monotonic()
    interval = 60 * (cfg.checkpointing_minutes or math.inf)
    batches = stop.ends(make_batches(plan.samples, encodings, cfg, accelerator, step))
    steps = train(cfg, accelerator, transformer, optimizer, batches, plan.samples, schedule)
    bar = progress_bar(steps, "training", accelerator, initial=step, total=last)
    stop.is_deferred = True
    with contextlib.suppress(Stopped):
        is_drawn = step > 0 and (validation_folder(cfg, step) / "sheet.png").exists()
        if schedule.is_validation_step(step) and not is_drawn:
            validate(cfg, accelerator, transformer, encodings, step, stop)
        for metrics in bar:
            step = metrics["step"]
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            log_metrics(accelerator, cfg, metrics, schedule)
            if schedule.is_validation_step(step):
                validate(cfg, accelerator, transformer, encodings, step, stop)
            if step == last or step % cfg.checkpointing_steps == 0 or anyone(time.monotonic() - saved > interval):
                save_checkpoint(accelerator, cfg, transformer, optimizer, step, origin)
                saved = time.monotonic()
    if step < last:
        if step > schedule.first_step:
            save_checkpoint(accelerator, cfg, transformer, optimizer, step, origin)
        for tracker in accelerator.trackers:
            tracker.finish()
        raise Stopped(f"stopped by {stop.reason} after step {step}{', which is saved' * (step > 0)}", stop.number)
    stop.is_deferred = False


def run_all(cfg: Config, stop: StopRequest) -> Path:
    """Run everything: config -> data plan -> caches -> model -> loop -> artefacts. Returns the LoRA file."""
    accelerator = make_accelerator(cfg)
    if cfg.demo:
        make_demo(cfg, accelerator)
    say(*advice(cfg))

    model = find_model(cfg, accelerator)
    check_hardware(cfg, model, accelerator.device)
    layers = resolve_lora_layers(cfg.lora_layers, model)
    plan = make_plan(cfg, model, accelerator)
    repository = open_repository(cfg) if cfg.push_to_hub and accelerator.is_main_process else None
    prepare_output(cfg, accelerator)

    encodings = identify_encodings(cfg, model, accelerator)
    fill_prompts_cache(needed_prompts(plan.samples, cfg), encodings, cfg, accelerator)
    plan = plan._replace(samples=generate_class_images(plan.samples, encodings, cfg, accelerator))
    if cfg.cache_latents:
        fill_latents_cache(plan.samples, encodings, cfg, accelerator)

    transformer = load_transformer(model, cfg, DTYPES[cfg.mixed_precision], accelerator.device)
    parameters = add_lora(transformer, layers, cfg, cfg.seed)
    say(*describe_lora(transformer, layers, cfg))
    optimizer = make_optimizer(parameters, cfg)
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    learn(cfg, accelerator, transformer, optimizer, plan, encodings, stop)

    file, last = save_artefacts(accelerator, cfg, transformer), plan.schedule.max_train_steps
    validate(cfg, accelerator, transformer, encodings, last, stop, is_final=True)
    if accelerator.is_main_process:
        save_model_card(cfg, last)
    accelerator.end_training()
    say(*describe_results(cfg, file))
    if repository is not None:
        push(cfg, repository)
    return file


def main(cfg: Config) -> Path:
    """Run everything. Returns the LoRA file. Raises Stopped, with nothing lost, when a signal asks the run to stop."""
    check_inputs(cfg)
    free_memory()  # of an earlier run in a notebook, which only the garbage collector lets go
    with StopRequest(cfg.max_train_minutes) as stop, sole_user(Path(cfg.output_dir)):
        return run_all(cfg, stop)


if RUN_AS_SCRIPT:
    gc.freeze()  # what the imports have made stays; searching it takes a third of a second each time
    run_or_exit(main, CONFIG)
