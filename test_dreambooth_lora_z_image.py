"""Tests of `train_dreambooth_lora_z_image.py`, on a CPU, with tiny models and without a network.

Run all tests with `python -m pytest`, or in two processes with `-n 2` (pytest-xdist). Long tests run only if selected:
`-m benchmark` measures memory; `-m ablation` compares settings on the toy model; `-m soak` kills runs and compares
their results with those of uninterrupted runs; `-m gpu` trains a full-size random model on a CUDA GPU; `-m oldest`
installs the oldest versions and runs the demo.
"""

import ast
import base64
import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import http.server
import itertools
import json
import math
import os
import pickle
import pty
import random
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import warnings
import weakref
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more; read when torch is imported
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from diffusers.optimization import SchedulerType, get_scheduler
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

import train_dreambooth_lora_z_image as z
from train_dreambooth_lora_z_image import Config, UserError, main, parse_config

warnings.filterwarnings(
    "ignore", category=pytest.PytestUnknownMarkWarning
)  # there is no ini file to register marks in

HERE = Path(__file__).parent
SCRIPT = HERE / "train_dreambooth_lora_z_image.py"
README = (HERE / "README.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")
NO_FP8_PRODUCTS = not torch.cuda.is_available() and torch.__version__ < (2, 12)  # F.scaled_mm is for GPUs only
PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0}
LONG = ("benchmark", "soak", "ablation", "gpu", "oldest")
FP32 = Config(pretrained_model_name_or_path="m", instance_data_dir="d", instance_prompt="p", mixed_precision="no")


@pytest.fixture(autouse=True)
def _only_when_named(request):
    """Skip long tests unless their mark is named on the command line."""
    for mark in LONG:
        if request.node.get_closest_marker(mark) and mark not in request.config.getoption("-m"):
            pytest.skip(f"long: run it with -m {mark}")


@pytest.fixture(autouse=True, scope="session")
def _old_objects_are_not_searched():
    """Exclude the libraries from garbage collection; scanning their objects takes 0.3 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Reset accelerate's state, which has no public reset, so that every test can choose its precision."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny random Z-Image checkpoint."""
    folder = tmp_path_factory.mktemp("model") / "tiny-z-image"
    z.make_demo_model(folder)
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """One cache for all tests: it is keyed by content, so tests do not interfere with each other."""
    return tmp_path_factory.mktemp("cache")


def draw(path, size=(64, 64), color=(200, 30, 30), **options):
    """Write an image with some structure in it."""
    image = Image.new("RGB", size, color)
    image.paste((20, 60, 220), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def images(tmp_path):
    """Five square images."""
    for number in range(5):
        draw(tmp_path / "images" / f"{number}.png", color=(50 * number, 200 - 30 * number, 90))
    return tmp_path / "images"


@pytest.fixture
def make_config(model, images, tmp_path, shared_cache):
    """A factory of small fp32 configs; keyword arguments override its defaults."""

    def make(**changes):
        defaults = {
            "pretrained_model_name_or_path": str(model),
            "instance_data_dir": str(images),
            "instance_prompt": "a photo of sks dog",
            "output_dir": str(tmp_path / "out"),
            "cache_dir": str(shared_cache),
            "resolution": 32,
            "rank": 4,
            "learning_rate": 1e-2,
            "mixed_precision": "no",
            "max_train_steps": 2,
            "num_inference_steps": 2,
            "num_validation_images": 1,
            "cache_latents": True,
            "lr_scheduler": "constant",  # so that a short run is the start of a longer one
        }
        return Config(**(defaults | changes))

    return make


def metrics_of(cfg):
    """Read metrics.jsonl without timings."""
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def losses_of(cfg):
    """Read the loss curve."""
    return [row["loss"] for row in metrics_of(cfg)]


def lora_bytes(cfg):
    """Read the LoRA file."""
    return (Path(cfg.output_dir) / "pytorch_lora_weights.safetensors").read_bytes()


def run_script(*arguments, cwd=None, env=None, without_torch=False, tmp_path=None):
    """Run the script as a process; with `without_torch`, importing torch would end it with status 99."""
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", **(env or {})}
    if without_torch:
        poison = tmp_path / "poison" / "torch.py"
        poison.parent.mkdir(exist_ok=True)
        poison.write_text("import os; os._exit(99)")
        env["PYTHONPATH"] = str(poison.parent)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


# =====================================================================================================================
# Code conventions
# =====================================================================================================================


def depth_of(node, inside=0):
    """Return the nesting depth of a node; `elif` does not count."""
    deepest = inside
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            is_elif = name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            nests = isinstance(child, (ast.For, ast.While, ast.If, ast.With, ast.Try)) and not is_elif
            deepest = max(deepest, depth_of(child, inside + nests))
    return deepest


def broken_house_rules(source):
    """List functions that are too long or deep, nested, undocumented, unannotated, or have too many parameters."""
    broken, tree = [], ast.parse(source)
    broken += [f"line {n.lineno}: global" for n in ast.walk(tree) if isinstance(n, (ast.Global, ast.Nonlocal))]
    broken += [f"line {i}: over 119 columns" for i, line in enumerate(source.splitlines(), 1) if len(line) > 119]
    for f in (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))):
        arguments = f.args.args + f.args.kwonlyargs if isinstance(f, ast.FunctionDef) else []
        arguments = [a for a in arguments if a.arg not in ("self", "cls", "ctx")]
        rules = {
            "over 60 lines": isinstance(f, ast.FunctionDef) and f.end_lineno - f.lineno >= 60,
            "nested deeper than 4": isinstance(f, ast.FunctionDef) and depth_of(f) > 4,
            "more than 5 parameters": len(arguments) > 5,
            "no docstring": not f.name.startswith("__") and ast.get_docstring(f) is None,
            "a parameter without a type": any(a.annotation is None for a in arguments),
            "a result without a type": isinstance(f, ast.FunctionDef) and f.returns is None,
            "hidden inside another": isinstance(f, ast.FunctionDef)
            and any(isinstance(n, ast.FunctionDef) for n in ast.walk(f) if n is not f),
        }
        broken += [f"{f.name}: {rule}" for rule, is_broken in rules.items() if is_broken]
    return broken


def test_house_rules():
    source = SCRIPT.read_text(encoding="utf-8")
    assert broken_house_rules(source) == [] and len(source.splitlines()) <= 3458
    assert "from __future__" not in source
    assert re.findall(r"\bprint\(.*", source) == [
        "print(printable(redact(sentence, cfg)), file=sys.stderr, flush=True)"
    ]


def test_house_rules_find_what_they_forbid():
    bad = (
        "def f(a, b: int):\n    global x\n"
        + "".join("    " * i + f"if a > {i}:\n" for i in range(1, 7))
        + " " * 28
        + "pass\n"
    )
    found = broken_house_rules(bad)
    assert {"f: nested deeper than 4", "f: no docstring", "f: a parameter without a type", "line 2: global"} <= set(
        found
    )


@pytest.mark.parametrize("more", [[], ["--use_8bit_adam"]])
def test_optional_packages_are_imported_only_if_they_are_needed(more, model, images, tmp_path):
    """Importing bitsandbytes takes a second; peft would do it whenever it is installed."""
    code = f"""import runpy, sys
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
print("IMPORTED", *[name for name in ("bitsandbytes", "torchao", "wandb", "prodigyopt") if sys.modules.get(name)])"""
    flags = [f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={images}", "--instance_prompt=p"]
    flags += ["--resolution=32", "--max_train_steps=1", "--cache_latents", f"--cache_dir={tmp_path}/cache", *more]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].split()[1:] == ["bitsandbytes"] * bool(more)


def test_map_of_sections_is_true():
    source = SCRIPT.read_text(encoding="utf-8")
    banners = re.findall(r"^# ==== (.+?) =+$", source, re.M)
    listed = re.findall(r"^    ([A-Z][\w ]+?)  +\S", ast.get_docstring(ast.parse(source), clean=False), re.M)
    assert banners == listed and len(banners) == 13
    assert banners == re.findall(r"^\| ([A-Z][\w ]+) \| ", README[README.index("| section | contents |") :], re.M)[:13]


def test_sections_use_only_what_stands_above():
    """A section's functions call its own and those of the sections above it."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    defined = {n.name: n.lineno for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    source = SCRIPT.read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(source, 1) if line.startswith("# ==== ")]
    section = lambda line: sum(line >= start for start in starts)  # noqa: E731
    upward = [
        f"{f.name} -> {n.id}"
        for f in tree.body
        if isinstance(f, ast.FunctionDef)
        for n in ast.walk(f)
        if isinstance(n, ast.Name) and n.id in defined and section(defined[n.id]) > section(f.lineno)
    ]
    assert upward == []


def test_every_flag_is_read_somewhere():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    assert {f.name for f in dataclasses.fields(Config)} - read == set()


def test_requirements_agree():
    wanted = (HERE / "requirements_z_image.txt").read_text().split()
    block = re.search(r"# /// script\n(.*?)# ///", SCRIPT.read_text(encoding="utf-8"), re.S)[1]
    assert re.findall(r'"([\w]+>=[\d.]+)"', block) == wanted
    names = {re.split(">=", line)[0] for line in wanted}
    assert names == {
        "torch", "diffusers", "transformers", "peft", "accelerate", "torchao", "bitsandbytes", "prodigyopt", "wandb",
        "huggingface_hub", "Pillow",
    }  # fmt: skip


# =====================================================================================================================
# README
# =====================================================================================================================

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
BY_CI = [text for kind, text in BLOCKS if kind == "bash" and text.startswith("pip install")]
COMMANDS = [text for kind, text in BLOCKS if kind == "bash" and not text.startswith("pip install")]
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]
JSONS = [text for kind, text in BLOCKS if kind == "json"]
FSDP_YAML = next(text for kind, text in BLOCKS if kind == "yaml")
SMALL = "--resolution=32 --max_train_steps=2 --num_inference_steps=2 --num_validation_images=1"


def test_readme_blocks_are_known():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "text", "json", "yaml"}
    assert (len(BY_CI), len(COMMANDS), len(SNIPPETS), len(JSONS)) == (2, 7, 4, 2)


def block_with(words, blocks=COMMANDS):
    """Return the only README block that contains some words."""
    (block,) = [text for text in blocks if words in text]
    return block


def test_ci_runs_the_two_commands_of_the_readme():
    lines = (HERE / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("pip install -r")] == [text.strip() for text in BY_CI]


@pytest.fixture
def workplace(tmp_path, model):
    """A README reader's folder: the script, and images in `dog` as snapshot_download leaves them."""
    shutil.copy(SCRIPT, tmp_path)
    for number, size in enumerate([(64, 64), (96, 64), (64, 96), (48, 80), (80, 80)]):
        draw(tmp_path / "dog" / f"dog-{number}.jpeg", size)
    (tmp_path / "dog" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "dog" / ".cache" / "huggingface" / "dog.jpeg").write_bytes(b"not an image")
    (tmp_path / "dog" / ".gitattributes").write_text("*.jpeg filter=lfs\n")
    return tmp_path


class Hub(http.server.BaseHTTPRequestHandler):
    """A fake Hub API: accepts repositories and uploads, and records them in its server."""

    def log_message(self, *_):
        """Log nothing."""

    def reply(self, content, status=200):
        """Send a JSON response."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self):
        """Implement the endpoints that an upload needs."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name, place = self.path.split("?")[0], f"http://127.0.0.1:{self.server.server_port}"
        self.server.requests.append((self.command, name, self.headers.get("Authorization"), body))
        if self.server.is_broken and "/preupload/" in name:
            self.reply({"error": "no space left for you"}, 403)
        elif name == "/api/repos/create":
            wanted = json.loads(body)
            full = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.reply({"url": f"{place}/{full}", "id": full})
        elif "/preupload/" in name:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.reply({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif "/commit/" in name:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply({"commitUrl": f"{place}/me/x/commit/abc", "commitOid": "a" * 40, "success": True})
        else:
            self.reply({"errors": [], "warnings": [], "id": "x", "sha": "b" * 40, "siblings": []})

    do_GET = do_POST = do_PUT = do_HEAD = answer


@pytest.fixture
def hub():
    """A running fake Hub; `env` points a process to it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.files, server.is_broken = [], {}, False
    address = f"http://127.0.0.1:{server.server_port}"
    server.env = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_of_the_user", "HF_HUB_DISABLE_XET": "1"}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run_block(text, workplace, model, more="", env=None):
    """Run a fenced command with nothing changed but the model, the sizes and the number of steps."""
    text = text.replace("Tongyi-MAI/Z-Image", str(model)).rstrip()
    text = re.sub(r"--max_train_steps=(\d+)", lambda m: f"--max_train_steps={2 * int(m[1]) // 500}", text)
    text = re.sub(r"--(resolution)=1024", r"--\1=32", text)
    text = re.sub(r"(\d+),(\d+)(?=[;\"])", lambda m: f"{int(m[1]) // 16 // 8 * 16},{int(m[2]) // 16 // 8 * 16}", text)
    text = text.replace("--num_class_images=100", "--num_class_images=3")
    env = {
        **os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HOME": str(workplace / "hf"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **(env or {}),
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-c", f"set -e\n{text} {more}"], cwd=workplace, env=env, capture_output=True, text=True, timeout=600
    )


FEW = "--num_inference_steps=2 --num_validation_images=1 --rank=2"


def test_readme_main_command_then_resume_then_inference(workplace, model, hub, monkeypatch):
    """The main command, the one that continues from its config.json, and inference with the result."""
    done = run_block(block_with('OUTPUT_DIR="trained-z-image-lora"'), workplace, model, FEW, hub.env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "--lr_warmup_steps has no effect with --lr_scheduler constant" in done.stdout
        and "constant_with_warmup" in done.stdout
    )
    output = workplace / "trained-z-image-lora"
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((output / "config.json").read_text())["guidance_scale"] == 5.0
    assert list((output / "logs").rglob("*.wandb")), "the tracker wrote nothing"
    assert {path.name for path in (output / "validation").iterdir()} == {"step-000000", "step-000002"}
    assert hub.files["pytorch_lora_weights.safetensors"] == (output / "pytorch_lora_weights.safetensors").read_bytes()

    done = run_block(block_with("--config"), workplace, model, "--push_to_hub=false")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from trained-z-image-lora/checkpoint-2, after step 2" in done.stdout
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").open()] == [1, 2, 3, 4]

    monkeypatch.chdir(workplace)
    names = {}
    for snippet in (block_with("output.png", SNIPPETS), block_with("unload_lora_weights", SNIPPETS)):
        snippet = snippet.replace("Tongyi-MAI/Z-Image", str(model)).replace('"cuda"', '"cpu"').replace("1024", "32")
        snippet = snippet.replace("steps=50", "steps=2").replace("my-first-lora", str(output), 1)
        exec(snippet.replace(", generator=", ", height=32, width=32, num_inference_steps=2, generator="), names)
    assert Image.open(workplace / "output.png").size == (32, 32)
    steps = [pixels_of(Image.open(workplace / f"checkpoint-{step}.png")) for step in (2, 4)]
    assert not torch.equal(*steps), "each checkpoint is a LoRA of its own"


@pytest.mark.parametrize("name", ["fp8", "prodigy"])
def test_readme_variants_of_the_main_command(name, workplace, model, hub):
    if name == "fp8" and NO_FP8_PRODUCTS:
        pytest.skip("torch before 2.12 multiplies in fp8 on GPUs only")
    done = run_block(block_with(f"trained-z-image-lora-{name}"), workplace, model, FEW, hub.env)
    assert done.returncode == 0, done.stderr[-3000:]
    output = workplace / f"trained-z-image-lora-{name}"
    settings = json.loads((output / "config.json").read_text())
    assert (settings["do_fp8_training"], settings["optimizer"] == "prodigy") == (name == "fp8", name == "prodigy")
    assert settings["mixed_precision"] == "bf16" and "pytorch_lora_weights.safetensors" in hub.files
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2


def test_readme_commands_fit_a_gpu():
    """Without it, activations at 1024 pixels would need about 50 GB (computed, not measured)."""
    commands = [text for text in COMMANDS if "--instance_data_dir" in text]
    commands += [text for text in SNIPPETS if "instance_data_dir=" in text]
    assert len(commands) >= 6 and [text for text in commands if "gradient_checkpointing" not in text] == []


def test_readme_buckets_and_bilingual_prompts(workplace, model):
    done = run_block(block_with("--aspect_ratio_buckets"), workplace, model, SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"128 x 128 +2 ", done.stdout), "the two square images belong to the square bucket"
    sheet = Image.open(workplace / "trained-z-image-lora-buckets" / "validation" / "step-000002" / "sheet.png")
    assert sheet.size == (128, 256), "two prompts, generated at the size of the buckets"


def test_readme_prior_preservation(workplace, model):
    done = run_block(block_with("--with_prior_preservation"), workplace, model, SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in (workplace / "dogs").iterdir()) == [f"class-0000{n}.png" for n in range(3)]
    assert "generating class images" in done.stderr


def test_readme_notebook_snippet(workplace, model, monkeypatch):
    monkeypatch.chdir(workplace)
    snippet = block_with("dataclasses.replace", SNIPPETS).replace("Tongyi-MAI/Z-Image", str(model))
    snippet = snippet.replace("max_train_steps=500", "max_train_steps=1, resolution=32, cache_dir='cache'")
    exec(snippet, {})
    shapes = [load_file(f"trained-z-image-lora-rank-{rank}/pytorch_lora_weights.safetensors") for rank in (16, 32)]
    assert [next(iter(state.values())).shape[0] for state in shapes] == [16, 32]


def test_pasted_into_a_notebook_cell(workplace, model):
    """A real Jupyter kernel: accelerate configured, the file in one cell, runs in the next two."""
    import nbclient
    import nbformat

    configure = """import os, pathlib
os.environ["HF_HOME"] = str(pathlib.Path("hf").resolve())
""" + block_with("write_basic_config", SNIPPETS)
    run = f"""cfg = parse_config(["--pretrained_model_name_or_path", {str(model)!r}, "--instance_data_dir", "dog",
        "--instance_prompt", "a sks dog", "--cache_dir", "cache", "--output_dir", "out", *{SMALL.split()}])
main(cfg)"""
    launch = """from accelerate import notebook_launcher
notebook_launcher(main, (dataclasses.replace(cfg, output_dir="launched"),), num_processes=1)"""
    sources = (configure, SCRIPT.read_text(encoding="utf-8"), run, launch)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(workplace)}}).execute()
    files = [workplace / name / "pytorch_lora_weights.safetensors" for name in ("out", "launched")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (workplace / "hf" / "accelerate" / "default_config.yaml").is_file()


def test_a_stopped_run_does_not_end_the_kernel(workplace, model):
    """`%run` in Jupyter: the script stops, the kernel lives, and an interrupt there is an ordinary one."""
    import nbclient
    import nbformat

    flags = " ".join(small_run(model, "--max_train_minutes=1e-9", "--skip_final_inference"))
    run = f"""import signal
try:
    get_ipython().run_line_magic("run", {f"{SCRIPT.name} {flags}"!r})
finally:
    print("alive", signal.getsignal(signal.SIGINT) is signal.default_int_handler)"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (run, "print('well')")])
    options = {"timeout": 300, "allow_errors": True, "resources": {"metadata": {"path": str(workplace)}}}
    nbclient.NotebookClient(notebook, **options).execute()
    outputs = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]
    assert "stopped by --max_train_minutes after step" in outputs[0] and "alive True" in outputs[0]
    assert outputs[1] == "well\n"


def press_enter_until_it_ends(command, env):
    """Run a program in its own terminal, accept every default, and return the exit status."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, env)
    with contextlib.suppress(OSError):  # how Linux says that the other side has closed
        while True:
            is_speaking = select.select([terminal], [], [], 0.3)[0]
            if not is_speaking:
                os.write(terminal, b"\r")
            elif not os.read(terminal, 4096):
                break
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("how", ["accelerate config", "accelerate config default and write_basic_config()"])
def test_every_way_to_configure_accelerate_runs(how, workplace, model):
    env = {**os.environ, "HF_HOME": str(workplace / "hf"), "COLUMNS": "200"}
    accelerate, file = (
        str(Path(sys.executable).with_name("accelerate")),
        workplace / "hf/accelerate/default_config.yaml",
    )
    if how == "accelerate config":
        assert press_enter_until_it_ends([accelerate, "config"], env) == 0
    else:
        snippet, written = block_with("write_basic_config", SNIPPETS), []
        for command in ([accelerate, "config", "default"], [sys.executable, "-c", snippet]):
            subprocess.run(command, env=env, check=True, capture_output=True)
            written.append(file.read_text())
            file.unlink()
        assert written[0] == written[1], "both ways configure the same run"
        file.write_text(written[0])
    assert file.is_file()
    done = run_block(block_with("my-first-lora"), workplace, model, f"{FEW} --resolution=32 --max_train_steps=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (workplace / "my-first-lora" / "README.md").is_file()


def flag_tables():
    """The README's reference of all flags, from the flags themselves."""
    lines = []
    for field in dataclasses.fields(Config):
        if field.name in z.HEADINGS:
            lines += ["", f"### {z.HEADINGS[field.name]}", "", "| flag | default | what it does |", "|---|---|---|"]
        default = "" if field.default in (None, "") else str(field.default).lower()
        names = ", ".join(f"`{name}`" for name in (f"--{field.name}", *field.metadata["aliases"]))
        lines.append(f"| {names} | {default} | {field.metadata['help'].replace('|', '/')} |")
    return "\n".join(lines[1:])


def test_readme_lists_every_flag(tmp_path):
    assert flag_tables() in README
    shown = run_script("--help", without_torch=True, tmp_path=tmp_path).stdout
    in_help = {name for line in re.findall(r"^  (--.*?)(?:   |$)", shown, re.M) for name in re.findall(r"--\w+", line)}
    in_readme = {
        name for row in re.findall(r"^\| (`--.*?) \|", flag_tables(), re.M) for name in re.findall(r"--\w+", row)
    }
    assert in_help - in_readme == {"--config"} and in_readme <= in_help


def test_readme_tells_of_every_default_that_differs():
    section = README[README.index("## Migrate from the diffusers script") : README.index("## All flags")]
    mine = {field.name: field.default for field in dataclasses.fields(Config)}
    differing = [name for name, value in ANCESTOR.items() if str(mine[name]).lower() != str(value).lower()]
    assert [name for name in differing if f"`--{name}`" not in section] == []
    rows = re.findall(r"^\| `--(\w+)` \|", section, re.M)
    assert set(rows) <= set(differing) and len(rows) == len(set(rows)) > 10


# =====================================================================================================================
# Config
# =====================================================================================================================

ANCESTOR = {  # the flags of diffusers' script, and their defaults
    "pretrained_model_name_or_path": None, "revision": None, "bnb_quantization_config_path": None,
    "do_fp8_training": False, "variant": None, "dataset_name": None, "dataset_config_name": None,
    "instance_data_dir": None, "cache_dir": None, "image_column": "image", "caption_column": None, "repeats": 1,
    "class_data_dir": None, "instance_prompt": None, "class_prompt": None, "max_sequence_length": 512,
    "validation_prompt": None, "skip_final_inference": False, "final_validation_prompt": None,
    "num_validation_images": 4, "validation_epochs": 50, "rank": 4, "lora_alpha": 4, "lora_dropout": 0.0,
    "with_prior_preservation": False, "prior_loss_weight": 1.0, "num_class_images": 100,
    "output_dir": "z-image-dreambooth-lora", "seed": None, "resolution": 512, "aspect_ratio_buckets": None,
    "use_aspect_ratio_buckets": False, "center_crop": False, "random_flip": False, "train_batch_size": 4,
    "sample_batch_size": 4, "num_train_epochs": 1, "max_train_steps": None, "checkpointing_steps": 500,
    "checkpoints_total_limit": None, "resume_from_checkpoint": None, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "learning_rate": 0.0001, "guidance_scale": 3.5, "text_encoder_lr": 5e-06,
    "scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500, "lr_num_cycles": 1, "lr_power": 1.0,
    "dataloader_num_workers": 0, "weighting_scheme": "none", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29,
    "optimizer": "AdamW", "use_8bit_adam": False, "adam_beta1": 0.9, "adam_beta2": 0.999, "prodigy_beta3": None,
    "prodigy_decouple": True, "adam_weight_decay": 0.0001, "adam_weight_decay_text_encoder": 0.001,
    "lora_layers": None, "adam_epsilon": 1e-08, "prodigy_use_bias_correction": True, "prodigy_safeguard_warmup": True,
    "max_grad_norm": 1.0, "push_to_hub": False, "hub_token": None, "hub_model_id": None, "logging_dir": "logs",
    "allow_tf32": False, "cache_latents": False, "report_to": "tensorboard", "mixed_precision": None,
    "upcast_before_saving": False, "offload": False, "prior_generation_precision": None, "local_rank": -1,
    "enable_npu_flash_attention": False, "fsdp_text_encoder": False,
}  # fmt: skip

NEEDED = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--instance_prompt=p"]


def test_help_and_a_mistyped_flag_answer_without_torch(tmp_path):
    done = run_script("--help", without_torch=True, tmp_path=tmp_path)
    assert done.returncode == 0
    assert [name for name in ANCESTOR if f"--{name} " not in done.stdout] == []
    assert re.findall(r"^([A-Z].*):$", done.stdout, re.M) == list(z.HEADINGS.values())
    done = run_script(*NEEDED, "--learning_rat=1", without_torch=True, tmp_path=tmp_path)
    assert done.returncode == 2 and "unrecognized arguments: --learning_rat=1" in done.stderr


def test_defaults():
    cfg = parse_config(NEEDED)
    assert (cfg.resolution, cfg.rank, cfg.lora_alpha, cfg.lora_scale, cfg.train_batch_size) == (1024, 16, None, 1, 1)
    assert (cfg.lr_scheduler, cfg.seed, cfg.weighting_scheme, cfg.timestep_shift) == ("cosine", 0, "logit_normal", "3")
    assert (cfg.checkpointing_steps, cfg.report_to, cfg.mixed_precision, cfg.guidance_scale) == (
        500,
        "none",
        "bf16",
        4.0,
    )
    assert cfg.num_inference_steps == 28
    assert z.make_schedule(cfg, [sample(0)], 1).max_train_steps == 1500


def test_flags_as_people_write_them():
    cfg = parse_config(
        [*NEEDED, "--optimizer=adamW", "--gradient_accumulation=4", "--prodigy_decouple", "false", "--seed=0",
         "--lora_layers=to_k,to_q", "--validation_prompt", "a, b", "c", "--random_flip"]
    )  # fmt: skip
    assert (cfg.optimizer, cfg.gradient_accumulation_steps, cfg.prodigy_decouple) == ("adamw", 4, False)
    assert cfg.validation_prompt == ("a, b", "c") and cfg.random_flip and cfg.lora_layers == "to_k,to_q"


def test_a_tilde_means_the_home_folder(make_config, tmp_path, monkeypatch):
    """Where the shell leaves it alone, as in --output_dir=~/x of some shells, in notebooks and JSON files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("pretrained_model_name_or_path", "instance_data_dir", "class_data_dir", "cache_dir", "output_dir")
    names += ("logging_dir", "resume_from_checkpoint", "bnb_quantization_config_path")
    cfg = make_config(**dict.fromkeys(names, "~/x"), instance_prompt="~/x", final_validation_prompt="~")
    assert {getattr(cfg, name) for name in names} == {str(tmp_path / "x")}
    assert make_config(instance_data_dir=None, dataset_name="~/x").dataset_name == str(tmp_path / "x")
    assert (cfg.instance_prompt, cfg.final_validation_prompt) == ("~/x", "~")
    (tmp_path / "run.json").write_text(json.dumps(dataclasses.asdict(cfg) | {"rank": 3}))
    assert parse_config(["--config", "~/run.json"]).rank == 3


def test_prompts_of_a_notebook_may_be_a_list(make_config):
    assert z.validation_prompts(make_config(validation_prompt=["a", "b"]), is_final=False) == ["a", "b"]


def test_config_round_trip(make_config, tmp_path):
    cfg = make_config(validation_prompt=("一只sks狗的照片", "b"), lora_alpha=2.5, overwrite_output_dir=True)
    z.save_config(cfg, {})
    file = tmp_path / "out" / "config.json"
    assert "torch" in json.loads(file.read_text())["environment"]
    assert parse_config(["--config", str(file)]) == dataclasses.replace(cfg, overwrite_output_dir=False)
    assert parse_config(["--config", str(file), "--rank=7"]).rank == 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"), ("[1]", "one JSON object"), ('{"rnak": 3}', "unknown settings: rnak"),
        ('{"rank": "3a"}', "rank"), ('{"rank": 2.5}', "--rank does not accept 2.5"), (None, "cannot be read"),
        ('{"optimizer": "sgd"}', "--optimizer does not accept 'sgd'; it accepts adamw or prodigy"),
    ],
)  # fmt: skip
def test_bad_config_files(content, words, tmp_path, capsys):
    file = tmp_path / "c.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        parse_config([*NEEDED, "--config", str(file)])
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "--rank must be at least 1, got 0"),
        ({"max_train_steps": -5}, "--max_train_steps must be at least 1, got -5"),
        ({"resolution": 100}, "--resolution must be a multiple of 16"),
        ({"aspect_ratio_buckets": "1024,1000"}, "--aspect_ratio_buckets: sides must be multiples of 16, got 1000"),
        ({"aspect_ratio_buckets": "1024x1024"}, "--aspect_ratio_buckets must have the form 'height,width"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 is not supported"),
        ({"prior_generation_precision": "fp16"}, "--prior_generation_precision fp16 is not supported"),
        ({"optimizer": "lion"}, "--optimizer does not accept 'lion'"),
        ({"instance_data_dir": None}, "give exactly one of --instance_data_dir and --dataset_name"),
        ({"dataset_name": "x"}, "give exactly one of --instance_data_dir and --dataset_name"),
        ({"with_prior_preservation": True}, "requires --class_data_dir"),
        ({"timestep_shift": "nan"}, "--timestep_shift accepts a number above 0 or 'scheduler'"),
        ({"timestep_shift": "0"}, "--timestep_shift"),
        ({"learning_rate": math.nan}, "--learning_rate does not accept nan; it accepts float"),
        ({"learning_rate": 0.0}, "--learning_rate must be above 0"),
        ({"lora_dropout": 1.0}, "--lora_dropout must be below 1"),
        ({"lr_scheduler": "piecewise_constant"}, "must be used together"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_step_rules": "0.1,a:3"},
            "--lr_step_rules must be factor:until_step",
        ),
        ({"validation_prompt": 5}, "--validation_prompt does not accept 5; it accepts tuple[str, ...]"),
        ({"repeats": True}, "--repeats does not accept True"),
        ({"instance_prompt": "\udcff"}, "--instance_prompt does not accept"),
        ({"learning_rate": 10**400}, "--learning_rate does not accept"),
        ({"seed": 2**64}, "--seed must be below"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1.2.3:5,1"},
            "--lr_step_rules must be factor:until_step",
        ),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "--lr_scheduler polynomial decays to 1e-7"),
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is required"),
        ({"quantization": "fp8", "do_fp8_training": True}, "--quantization and --do_fp8_training set the format"),
        ({"quantization": "int4"}, "--quantization does not accept 'int4'; it accepts fp8 or int8 or nf4"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "--hub_model_id a/b/c is not a valid repository name"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers must be at least 0"),
        ({"push_to_hub": True, "hub_model_id": "用户/a"}, "--hub_model_id 用户/a is not a valid repository name"),
        ({"hub_token": "hf_x\r"}, "--hub_token contains whitespace or an invalid character"),
        ({"hub_token": ["hf_x"]}, "--hub_token does not accept this value; it accepts str"),
    ],
)
def test_config_refuses(changes, words, make_config):
    with pytest.raises(UserError) as refusal:
        make_config(**changes)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_encoder_lr": 1e-5}, "--text_encoder_lr"),
        ({"adam_weight_decay_text_encoder": 1e-5}, "--adam_weight_decay_text_encoder"),
        ({"local_rank": 0}, "--local_rank"),
        ({"lr_warmup_steps": 100}, "constant_with_warmup"),
        ({"lr_warmup_steps": 2, "lr_scheduler": "linear"}, "--lr_warmup_steps 2 covers the whole run"),
        ({"optimizer": "prodigy"}, "--learning_rate 0.01 is low for Prodigy"),
        ({"class_prompt": "dog"}, "have no effect without --prior_preservation"),
        (
            {"final_validation_prompt": "a", "validation_prompt": ("b",)},
            "--final_validation_prompt has no effect with",
        ),
        ({"cache_latents": True, "random_flip": True}, "images are center-cropped, and flipped copies are cached"),
        ({"fsdp_text_encoder": True}, "--fsdp_text_encoder is accepted for compatibility and has no effect"),
        (PRODIGY | {"use_8bit_adam": True}, "--use_8bit_adam is ignored with --optimizer prodigy"),
        ({"hub_model_id": "me/lora"}, "no effect without --push_to_hub"),
        ({"caption_column": "text"}, "--caption_column has no effect without --dataset_name"),
        ({"num_train_epochs": 3}, "--num_train_epochs has no effect with --max_train_steps"),
        ({"validation_steps": 3, "validation_epochs": 2}, "--validation_epochs has no effect with --validation_steps"),
    ],
)
def test_advice(changes, words, make_config):
    quiet = {"cache_latents": False}
    assert list(z.advice(make_config(**quiet))) == []
    lines = list(z.advice(make_config(**(quiet | changes))))
    assert len(lines) == 1 and words in lines[0]


def test_a_blank_token_hides_nothing(make_config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " ")
    assert z.redact("an error", make_config()) == "an error"
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    assert z.redact("hf_secret, hf_secret\n", make_config()) == "***, ***\n"


def test_advice_names_a_precision_that_does_not_count(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert any("fp8" in line for line in z.advice(make_config()))


# =====================================================================================================================
# Plan
# =====================================================================================================================


def sample(number, bucket=(32, 32), is_prior=False):
    """A sample that need not exist."""
    return z.Sample(Path(f"{number}.png"), bucket, bucket, "p", False, is_prior, f"digest {number}")


def test_find_files_is_sorted_and_recursive_and_enters_no_hidden_folder(tmp_path):
    for name in ("b/1.PNG", "a.jpeg", ".hidden.png", ".cache/x.png", "b/.git/y.png", "Thumbs.db", "名前.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [path.relative_to(tmp_path).as_posix() for path in z.find_files(tmp_path)]
    assert found == [".cache", ".hidden.png", "Thumbs.db", "a.jpeg", "b/.git", "b/1.PNG", "名前.webp"]


def bomb(path):
    """A PNG of 30,000 x 30,000 pixels, by its header."""
    content = bytearray(draw(path).read_bytes())
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def truncated(path):
    """The first half of a file."""
    content = draw(path, (300, 300)).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def in_mode(mode, **options):
    """An image of some mode."""
    return lambda path: Image.new("RGB", (64, 64), (9, 99, 200)).convert(mode).save(path, **options)


def frames(path):
    """An animation of two frames."""
    Image.new("RGB", (64, 64), "red").save(path, save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")])


def palette_with_transparency(path):
    """A palette whose entries have transparency of their own."""
    Image.new("P", (64, 64), 1).save(path, transparency=bytes([0, 128, 255]))


def float_tiff(path):
    """Brightness from 0 to 1 in 32 bits."""
    Image.new("F", (64, 64), 0.5).save(path)


def with_text(text):
    """An image whose caption file contains given bytes."""
    return lambda path: (draw(path), path.with_suffix(".txt").write_bytes(text))


def nested(path):
    """An image ten folders deep."""
    draw(path.joinpath(*"abcdefghij", "deep.png"))


def hidden_in(folder):
    """A file in a folder that other tools create."""
    return lambda path: draw(path.parent / folder / ("._1.png" if folder == "__MACOSX" else "1.png"))


# Unusual files in an image folder: how to create them, and whether they are used, skipped, or rejected.
ODD_FILES = {
    "truncated.jpg": (truncated, "skipped"), "zero.png": (lambda path: path.write_bytes(b""), "skipped"),
    "jpeg called.png": (lambda path: draw(path, format="JPEG"), "used"),
    "text called.png": (lambda path: path.write_text("no image"), "skipped"),
    "pixel.png": (lambda path: draw(path, (1, 1)), "used"), "line.png": (lambda path: draw(path, (1, 5000)), "used"),
    "bomb.png": (bomb, "skipped"), "cmyk.jpg": (in_mode("CMYK"), "used"), "16 bits.png": (in_mode("I;16"), "used"),
    "float.tiff": (float_tiff, "used"), "palette.png": (palette_with_transparency, "used"),
    "gray alpha.png": (in_mode("LA"), "used"), "animated.gif": (frames, "skipped"), "animated.webp": (frames, "used"),
    **{f"exif {n}.jpg": (lambda path, n=n: draw(path, exif=rotation(n)), "used") for n in range(1, 9)},
    "profile.png": (in_mode("RGB", icc_profile=b"broken" * 50), "used"),
    "exif.jpg": (in_mode("RGB", exif=b"Exif\0\0broken"), "used"),
    "loop.png": (lambda path: path.symlink_to(path), "skipped"),
    "dangling.png": (lambda path: path.symlink_to("nothing"), "skipped"),
    "linked.png": (lambda path: path.symlink_to(draw(path.parent.with_name("elsewhere.png"))), "used"),
    "fifo.png": (os.mkfifo, "skipped"), "folder.png": (lambda path: draw(path / "inside.png"), "used"),
    "latin1.png": (with_text("caf\u00e9".encode("latin-1")), "refused"), "empty caption.png": (with_text(b""), "used"),
    "utf-8 with mark.png": (with_text("\ufeffa caption".encode()), "used"),
    "missing.txt": (lambda path: path.write_text("caption of nothing"), "skipped"),
    "new\nline \x1b[2J.png": (draw, "used"), "\U0001f436.png": (draw, "used"), "名前.png": (draw, "used"),
    f"{'x' * 251}.png": (draw, "used"), "a.b.c.png": (draw, "used"), "deep": (nested, "used"),
    "1.heic": (lambda path: path.write_bytes(b"x"), "skipped"), "-rf.png": (draw, "used"),
    ".cache": (hidden_in(".cache"), "skipped"), ".ipynb_checkpoints": (hidden_in(".ipynb_checkpoints"), "skipped"),
    "__MACOSX": (hidden_in("__MACOSX"), "skipped"), "Thumbs.db": (lambda path: path.write_bytes(b"x"), "skipped"),
    "metadata.jsonl": (os.mkfifo, "skipped"), "head.jpg": (lambda path: path.write_bytes(b"\xff\xd8\xff"), "skipped"),
}  # fmt: skip


def rotation(orientation):
    """EXIF data that rotate an image."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("name", ODD_FILES, ids=ascii)
def test_whatever_lies_among_the_images_is_used_or_named(name, make_config, tmp_path, capsys):
    make, outcome = ODD_FILES[name]
    folder = tmp_path / "among"
    draw(folder / "good.png")
    make(folder / name)
    cfg = make_config(instance_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="PIL")
        if outcome == "refused":
            with pytest.raises(UserError, match="latin1.txt cannot be read as UTF-8 text: .*; save it as UTF-8"):
                z.make_plan(cfg)
            return
        samples = z.plan_samples(cfg)
        pixels = [z.load_pixels(sample, False) for sample in samples]
    said = capsys.readouterr().out
    assert len(samples) == 1 + (outcome == "used") and all(one.shape == (3, 32, 32) for one in pixels)
    assert (name in said) == (outcome == "skipped") and said.count("\n") == (outcome == "skipped"), said
    assert "\x1b" not in said + z.describe_plan(samples, cfg, z.make_schedule(cfg, samples))[0]


# Files that other tools put beside images: the files, those that are trained on, and what the run says.
FOREIGN = {
    "mask of OneTrainer": (["0.png", "0-masklabel.png", "1.png", "1-masklabel.png"], 2, "ignored: 0-masklabel.png, "),
    "mask and thumbnail": (["0.png", "0_mask.png", "0.mask.png", "0_thumb.jpg"], 1, "ignored: 0.mask.png, 0_mask.p"),
    "two separators": (["a-b.png", "a-b__mask.png"], 1, "ignored: a-b__mask.png"),
    "mask of another suffix": (["0.jpg", "0-Mask.PNG"], 1, "ignored: 0-Mask.PNG"),
    "a mask as a subject": (["my-mask.png", "red_mask.png"], 2, ""),
    "Synology": (["0.png", "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/9.png"], 1, "ignored: #recycle, @eaDir"),
    "QNAP and Windows": (["0.png", "@Recycle/9.png", "$RECYCLE.BIN/9.png", "lost+found/9.png"], 1, "$RECYCLE.BIN, @"),
    "annotations": (["img/0.png", "masks/0.png", "SegmentationClass/0.png", "thumbs/0.png"], 1, "SegmentationClass,"),
    "half by a suffix": (["0.png", "0_control.png", "1.png", "1_control.png"], 4, "half of the images are named"),
    "numbers": (["1.png", "10.png", "11.png", "2.png", "20.png", "21.png"], 6, ""),
    "views": (["dog.png", "dog-1.png", "dog-2.png", "dog_side.png"], 4, ""),
    "kohya": (
        ["img/10_sks dog/0.png", "reg/1_dog/0.png"], 1,
        "ignored: reg (class images belong in --class_data_dir)\nnote: 10_sks dog sets nothing; use --repeats 10 and",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_other_tools_leave_beside_images_is_not_learned(name, make_config, tmp_path, capsys):
    files, count, words = FOREIGN[name]
    for number, file in enumerate(files):
        draw(tmp_path / "photos" / file, color=(number, 0, 0))
    samples = z.plan_samples(make_config(instance_data_dir=str(tmp_path / "photos")))
    said = capsys.readouterr().out
    assert len(samples) == count and words in said and bool(said) == bool(words), said


def test_links_are_followed_once_and_what_cannot_be_read_is_named(make_config, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    draw(photos / "0.png")
    draw(tmp_path / "elsewhere" / "1.png")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "again").symlink_to(tmp_path / "elsewhere")
    (photos / "loop").symlink_to(photos)
    draw(photos / "closed" / "2.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    samples = z.plan_samples(make_config(instance_data_dir=str(photos)))
    assert [sample.path.name for sample in samples] == ["0.png", "1.png"]
    assert re.search(r"warning: .*Permission denied: '.*photos/closed'; skipped", capsys.readouterr().out)


@pytest.mark.parametrize("accent", ["NFC", "NFD"])
def test_captions_are_found_by_what_paths_mean(accent, make_config, tmp_path, monkeypatch, capsys):
    """Absolute paths beside a relative flag, paths through a link, accents of a Mac, suffixes in any case, CSV."""
    monkeypatch.chdir(tmp_path)
    name = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[accent], "é")
    for file in ("absolute.png", "far/linked.png", f"{name}.png", f"{name}2.png", "upper.PNG", "table.png"):
        draw(tmp_path / "photos" / file)
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "photos" / "far")
    spelled = unicodedata.normalize(accent, "é")
    rows = [(str(tmp_path / "photos" / "absolute.png"), "a"), ("link/linked.png", "b"), (f"{spelled}.png", "c")]
    lines = [json.dumps({"file_name": file, "text": text}, ensure_ascii=False) for file, text in rows]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "photos" / "metadata.csv").write_text('file_name,text\ntable.png,"d, with\na comma"\n')
    (tmp_path / "photos" / "upper.TXT").write_text("e")
    (tmp_path / "photos" / f"{spelled}2.txt").write_text("f")
    samples = z.plan_samples(make_config(instance_data_dir="photos"))
    captions = {unicodedata.normalize("NFC", sample.path.name): sample.prompt for sample in samples}
    assert captions == {
        "absolute.png": "a", "linked.png": "b", "é.png": "c", "table.png": "d, with\na comma", "upper.PNG": "e",
        "é2.png": "f",
    }  # fmt: skip
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("content", "words"), [
    ("file_name,text\n0.png,sks dog, zero\n", "row 1 has more fields than columns; put captions with commas in"),
    ("name;text\n0.png;x\n", 'row 1 is not a JSON object, or a line with commas, that has a "file_name"'),
    ('file_name,text\n0.png,"open\n1.png,b\n', "metadata.csv is not a table: unexpected end of data"),
    ('file_name,text\n0.png,"' + "x" * 200_000 + '"\n', "metadata.csv is not a table: field larger than field limit"),
])  # fmt: skip
def test_a_table_that_is_no_table_is_refused(content, words, make_config, images):
    """A caption is never cut at a comma without a word."""
    (images / "metadata.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        z.plan_samples(make_config())


def test_kohyas_names_are_explained_until_they_are_followed(make_config, tmp_path, capsys):
    draw(tmp_path / "kohya" / "10_sks dog" / "0.png")
    draw(tmp_path / "kohya" / "reg" / "1_dog" / "0.png")
    cfg = make_config(instance_data_dir=str(tmp_path / "kohya"), instance_prompt="sks dog", repeats=10)
    z.plan_samples(cfg)
    assert "sets nothing" not in capsys.readouterr().out
    prior = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "kohya" / "reg"), "class_prompt": "dog"}
    samples = z.plan_samples(dataclasses.replace(cfg, num_class_images=1, **prior))
    assert [sample.is_prior for sample in samples] == [False, True] and "sets nothing" not in capsys.readouterr().out
    missing = dataclasses.replace(cfg, **prior | {"class_data_dir": str(tmp_path / "later")})
    z.plan_samples(missing)
    assert "warning" not in capsys.readouterr().out, "class images will be generated there"


def test_captions_that_are_not_used_are_pointed_out(make_config, images, capsys):
    (images / "metadata.jsonl").write_text('{"file_name": "0.png", "tags": "red", "score": 3}\n')
    (images / "0.png.txt").write_text("a")
    (images / "captions.csv").write_text("a")
    samples = z.plan_samples(make_config())
    assert not any(sample.has_caption for sample in samples)
    said = capsys.readouterr().out
    assert f"{images / 'metadata.jsonl'} has no captions; their column is text or caption or prompt, not tags" in said
    assert (
        "ignored: 0.png.txt, captions.csv (captions are read from NAME.txt, NAME.caption, metadata.jsonl, and" in said
    )


def test_a_prompt_that_is_not_trained_is_no_trigger(make_config, images, tmp_path, capsys):
    for number in range(5):
        (images / f"{number}.txt").write_text(f"caption {number}")
    run(make_config())
    assert "--instance_prompt is not used: every image has its own caption" in capsys.readouterr().out
    assert "a photo of sks dog" not in (tmp_path / "out" / "README.md").read_text().split("Other settings")[0]
    assert z.read_sealed(tmp_path / "out" / "pytorch_lora_weights.safetensors")["modelspec.trigger_phrase"] == ""
    (images / "0.txt").unlink()
    run(make_config(output_dir=str(tmp_path / "used")))
    assert "--instance_prompt is not used" not in capsys.readouterr().out
    assert "Trigger prompt: **a photo of sks dog**" in (tmp_path / "used" / "README.md").read_text()


def test_large_images_are_used_or_named_with_their_size(make_config, tmp_path, capsys):
    """More than 1 MB of text and of color profile; 200 megapixels pass, 900 do not; HEIC under another name."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("workflow", "node " * 400_000, zip=True)
    profile = bytes(random.Random(0).choices(range(4), k=2**21))
    draw(tmp_path / "large" / "text.png", pnginfo=text, icc_profile=profile)
    bomb(tmp_path / "large" / "bomb.png")
    (tmp_path / "large" / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    samples = z.plan_samples(make_config(instance_data_dir=str(tmp_path / "large"), cache_dir=str(tmp_path / "c")))
    said = capsys.readouterr().out
    assert [sample.path.name for sample in samples] == ["text.png"]
    assert "bomb.png cannot be read as an image: Image size (900000000 pixels) exceeds limit of 500000000" in said
    assert "phone.jpg is a HEIC image; convert it to JPEG" in said


def test_a_long_scan_shows_its_progress(make_config, monkeypatch):
    shown = []
    monkeypatch.setattr(z, "progress_bar", lambda items, title, **options: shown.append((title, options)) or items)
    z.plan_samples(make_config())
    assert shown == [("reading images", {"delay": 2})], "the bar appears after two seconds"


def test_other_files_and_damaged_images_are_named(make_config, images, capsys):
    (images / "notes.md").write_text("x")
    (images / ".DS_Store").write_bytes(b"x")
    (images / "zero.jpg").write_bytes(b"")
    whole = draw(images / "cut.jpg", (300, 300)).read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    samples = z.plan_samples(make_config())
    said = capsys.readouterr().out
    assert len(samples) == 5 and "ignored: notes.md, .DS_Store" in said
    assert re.search(r"warning: .*cut.jpg cannot be read as an image: .*; skipped", said)
    assert re.search(r"warning: .*zero.jpg cannot be read as an image: .*; skipped", said)


def test_refused_if_every_image_is_damaged(make_config, tmp_path):
    whole = draw(tmp_path / "one" / "cut.jpg", (300, 300)).read_bytes()
    (tmp_path / "one" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="one contains no usable image"):
        z.plan_samples(make_config(instance_data_dir=str(tmp_path / "one")))


def test_a_good_image_is_decoded_only_once(make_config, images, monkeypatch, tmp_path):
    cfg = make_config(cache_dir=str(tmp_path / "fresh"))
    draw(images / "wide.png", (96, 64))
    planned = z.plan_samples(cfg)
    monkeypatch.setattr(z, "load_image", lambda path: pytest.fail(f"{path} was decoded again"))
    assert z.plan_samples(cfg) == planned and planned[-1].size == (64, 96) and len(planned) == 6


def test_a_full_cache_disk_drops_no_image(make_config, monkeypatch, tmp_path):
    def refuse(path, *content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(z, "write_file", refuse)
    assert len(z.plan_samples(make_config(cache_dir=str(tmp_path / "full")))) == 5


def test_a_damaged_record_of_a_size_is_made_again(make_config, images, tmp_path):
    cfg = make_config(cache_dir=str(tmp_path / "fresh"), use_aspect_ratio_buckets=True)
    draw(images / "wide.png", (96, 128))
    planned = z.plan_samples(cfg)
    for record in (tmp_path / "fresh").rglob("sizes/*"):
        record.write_bytes(record.read_bytes().replace(b"128", b"12").replace(b"64", b"46"))
    assert z.plan_samples(cfg) == planned


def test_an_image_that_may_not_be_read_is_named(make_config, images, monkeypatch, capsys):
    read = Path.read_bytes

    def refuse(path):
        if path == images / "1.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert len(z.plan_samples(make_config())) == 4
    assert re.search(r"warning: .*Permission denied: '\S+1.png'; skipped", capsys.readouterr().out)


RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P", "L", "1", "RGBA", "LA", "PA", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    path = tmp_path / "x.tif"
    gray = Image.linear_gradient("L").resize((32, 32))
    if mode in ("I;16", "I"):
        image = gray.convert("I").point(lambda v: v * 257)
        image = image.convert("I;16") if mode == "I;16" else image
    elif mode == "F":
        image = gray.convert("F").point(lambda v: v * (1 / 255))
    elif mode == "PA":
        image, path = gray.convert("RGBA").quantize(), tmp_path / "x.png"
    else:
        image = gray.convert("LA" if mode == "LA" else mode)
    image.save(path)
    loaded = z.load_image(path)
    assert loaded.mode == "RGB" and loaded.size == (32, 32)
    dark, bright = loaded.getpixel((16, 1))[0], loaded.getpixel((16, 30))[0]
    assert bright - dark > 150, (mode, dark, bright)


def test_transparency_lies_over_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (16, 16), (255, 0, 0, 128)).save(tmp_path / "b.webp", lossless=True)
    assert z.load_image(tmp_path / "a.png").getpixel((3, 3)) == WHITE
    assert z.load_image(tmp_path / "b.webp").getpixel((3, 3)) == (255, 127, 127)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert z.load_image(tmp_path / "x.webp").getpixel((3, 3)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation, tmp_path):
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))  # top left
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("x.png", "x.tif"):
        stored.save(tmp_path / name, exif=exif)
        loaded = z.load_image(tmp_path / name)
        assert loaded.size == (32, 16) and loaded.getpixel((2, 2)) == RED and loaded.getpixel((30, 14)) == WHITE


def test_captions(make_config, images):
    (images / "0.txt").write_text("\ufeff一只sks狗的照片\n", encoding="utf-8")
    (images / "1.caption").write_text("from caption")
    (images / "0.caption").write_text("second choice")
    rows = [{"file_name": f"{n}.png", key: f"from {key}"} for n, key in ((2, "text"), (3, "caption"), (1, "prompt"))]
    rows[0]["text"] += "\u2028two lines"  # a line for Python, not for JSON
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (images / "metadata.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    draw(images / ("x" * 251 + ".png"))
    samples = z.scan_images(images / ".." / "images", "default", False, make_config())
    prompts = [sample.prompt for sample in samples]
    assert prompts == [
        "一只sks狗的照片", "from caption", "from text\u2028two lines", "from caption", "default", "default",
    ]  # fmt: skip
    assert [sample.has_caption for sample in samples] == [True] * 4 + [False] * 2


def test_instance_prompt_is_required_only_without_captions(make_config, images):
    cfg = make_config(instance_prompt=None)
    with pytest.raises(UserError, match="--instance_prompt is required: .*0.png has no caption"):
        z.make_plan(cfg)
    for number in range(5):
        (images / f"{number}.txt").write_text("own")
    z.plan_samples(cfg)


def test_nearest_bucket_goes_by_log_aspect_then_area():
    buckets = [(32, 512), (512, 512), (1024, 1024), (1024, 512)]
    assert z.nearest_bucket((900, 450), buckets) == (1024, 512)
    assert z.nearest_bucket((500, 500), buckets) == (512, 512)
    assert z.nearest_bucket((2000, 2000), buckets) == (1024, 1024)
    # |h * bw - w * bh| is smaller for any small bucket, whatever its shape
    assert z.nearest_bucket((1000, 1100), [(1024, 1024), (16, 32)]) == (1024, 1024)
    assert z.nearest_bucket((480, 640), [(640, 480), (480, 640)]) == (480, 640)


@pytest.mark.parametrize("resolution", [32, 256, 512, 1024, 1536])
def test_automatic_buckets(resolution):
    buckets = z.make_buckets(resolution)
    assert (resolution, resolution) in buckets and len(set(buckets)) == len(buckets)
    assert all(h % 16 == w % 16 == 0 and h * w <= resolution**2 for h, w in buckets)
    assert {(w, h) for h, w in buckets} == set(buckets)


def test_automatic_buckets_never_enlarge(make_config):
    cfg = make_config(use_aspect_ratio_buckets=True, resolution=256)
    for size in itertools.product((17, 40, 100, 256, 300, 1000), repeat=2):
        bucket = z.choose_bucket(size, cfg)
        assert bucket[0] <= size[0] and bucket[1] <= size[1], (size, bucket)
    assert z.choose_bucket((2000, 1000), cfg)[0] > 256 > z.choose_bucket((2000, 1000), cfg)[1]
    assert z.choose_bucket((10, 900), cfg) is None


def test_samples_follow_their_buckets(make_config, tmp_path):
    for name, size in {"wide": (96, 48), "tall": (48, 96), "square": (90, 90)}.items():
        draw(tmp_path / "shapes" / f"{name}.png", size)
    cfg = make_config(aspect_ratio_buckets="32,32;32,64;64,32", instance_data_dir=str(tmp_path / "shapes"))
    samples = z.plan_samples(cfg)
    assert {s.path.stem: s.bucket for s in samples} == {"square": (32, 32), "tall": (64, 32), "wide": (32, 64)}
    for s in samples:
        assert z.load_pixels(s, False).shape == (3, *s.bucket)


def shown(samples, cfg, batches, size):
    """Count how often each sample is shown in the first micro-batches."""
    stream = itertools.islice(z.micro_batches(samples, cfg, size), batches)
    return collections.Counter(index for batch in stream for _, index in batch)


@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("processes", [1, 2])
def test_five_images_of_five_shapes_are_seen_equally_often(batch, processes, make_config):
    cfg, size = make_config(train_batch_size=batch), batch * processes
    samples = [sample(n, (32, 32 + 16 * n)) for n in range(5)]
    for batch_of in z.micro_batches(samples, cfg, size):
        assert len({samples[index].bucket for _, index in batch_of}) == 1 and len(batch_of) == size
        break
    counts = shown(samples, cfg, 40, size)
    assert len(counts) == 5 and max(counts.values()) - min(counts.values()) <= size


@pytest.mark.parametrize("batch", [1, 3])
def test_prior_preservation_uses_every_image_equally_often(batch, make_config):
    cfg = make_config(with_prior_preservation=True, class_data_dir="c", class_prompt="dog", train_batch_size=batch)
    samples = [sample(n) for n in range(5)] + [sample(5 + n, is_prior=True) for n in range(7)]
    counts = shown(samples, cfg, 210 // batch, batch)
    instances, classes = [counts[n] for n in range(5)], [counts[n] for n in range(5, 12)]
    assert sum(instances) == sum(classes) == 105
    assert max(instances) - min(instances) <= batch and max(classes) - min(classes) <= batch


def test_an_epoch_is_a_permutation_and_depends_on_seed_and_epoch(make_config):
    samples = [sample(n) for n in range(20)]
    orders = {}
    for seed in (0, 1):
        indices = [index for _, index in itertools.islice(z.example_stream(samples, make_config(seed=seed)), 40)]
        orders[seed, 0], orders[seed, 1] = indices[:20], indices[20:]
    assert all(sorted(order) == list(range(20)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert [number for number, _ in itertools.islice(z.example_stream(samples, make_config()), 5)] == [0, 1, 2, 3, 4]


def test_plan_refuses_a_bucket_that_never_trains_and_tells_of_short_runs(make_config):
    samples = [sample(n) for n in range(9)] + [sample("lonely", (32, 64))]
    cfg = make_config(train_batch_size=4, max_train_steps=4)
    with pytest.raises(UserError, match=r"bucket 32 x 64 never fills a batch of 4.*lonely.png.*--train_batch_size"):
        z.describe_plan(samples, cfg, z.make_schedule(cfg, samples, 1))
    classes = [sample(n, is_prior=True) for n in range(10, 60)] + [sample(60, (64, 32), is_prior=True)]
    prior = {"with_prior_preservation": True, "class_data_dir": "c", "class_prompt": "p"}
    cfg = make_config(max_train_steps=20, **prior)  # two epochs of the instances, a fifth of the class images
    z.describe_plan(samples[:5] + classes, cfg, z.make_schedule(cfg, samples[:5] + classes, 1))
    cfg = make_config(train_batch_size=4, max_train_steps=4, repeats=3)  # 16 of 30 examples
    z.describe_plan(samples, cfg, z.make_schedule(cfg, samples, 1))
    cfg = make_config(train_batch_size=4, max_train_steps=1)
    lines = z.describe_plan(samples, cfg, z.make_schedule(cfg, samples, 1))
    assert any("shorter than one epoch" in line for line in lines)
    cfg = make_config(train_batch_size=4, max_train_steps=20)
    text = "\n".join(z.describe_plan(samples, cfg, z.make_schedule(cfg, samples, 1)))
    assert (
        "bucket 32 x 64 waits for later epochs to fill a batch of 4" in text
        and "80 examples = 8.0 epochs of 10" in text
    )


def test_plan_states_how_often_images_are_seen_and_what_validation_costs(make_config):
    samples = [sample(n) for n in range(5)]
    cfg = make_config(max_train_steps=100, validation_prompt=("a",), num_validation_images=4, num_inference_steps=10)
    cfg = dataclasses.replace(cfg, validation_steps=50)
    lines = z.describe_plan(samples, cfg, z.make_schedule(cfg, samples, 1))
    assert re.search(r"32 x 32 +5 +0 +0 +1 +20 ", lines[1])
    # before, after 50 and after the last step: 3 x 4 images x 10 steps x 2 for guidance, against 2 passes an image
    # and five of the LoRA weaker and stronger; 3 gains x 5 images x 5 noise levels x 2
    words = (
        "17 images of 32 x 32, 10 steps each, twice for guidance = 340 forward passes, and 150 for the gain, about 71%"
    )
    assert words in lines[-1]
    larger = dataclasses.replace(cfg, validation_resolution=64, guidance_scale=0.0)
    line = z.describe_plan(samples, larger, z.make_schedule(larger, samples, 1))[-1]
    assert "10 steps each = 170 forward passes, and 150 for the gain, about 81%" in line  # 170 x 4 + 150 against 200
    held = dataclasses.replace(cfg, validation_prompt=None, holdout=2)
    line = z.describe_plan(samples, held, z.make_schedule(held, samples, 1))[-1]
    assert "validation: 0 images" in line and " = 0 forward passes, and 120 for the gain, about 38%" in line
    missing = [dataclasses.replace(sample(n, is_prior=True), digest="") for n in range(7)]
    line = z.describe_plan(samples + missing, cfg, z.make_schedule(cfg, samples + missing))[-2]
    assert line == "class images to generate first: 7, in 140 forward passes"


def test_the_plan_names_the_smallest_of_the_images_to_upscale(make_config):
    samples = [dataclasses.replace(sample(n), size=(31 - n, 31)) for n in range(6)] + [sample(6)]
    samples += [dataclasses.replace(one, is_prior=True) for one in samples]  # as --prior_preservation base has them
    cfg = make_config(prior_preservation="base", class_prompt="dog")
    lines = z.describe_plan(samples, cfg, z.make_schedule(cfg, samples))
    assert "upscaled to 32 x 32: 5.png, 4.png, 3.png, 2.png, 1.png, ..." in lines


def test_validations_are_counted_without_replaying_the_run(make_config):
    """As many as `is_validation_step` says, also for a run that ends by the clock after 10^9 steps."""
    samples = [sample(n) for n in range(5)]
    changes = {"validation_prompt": ("a",), "num_validation_images": 1, "skip_final_inference": True}
    for last, first, epochs, batch in itertools.product((1, 2, 9, 40), (0, 1, 7), (1, 2, 3), (1, 3, 8)):
        cfg = make_config(**changes, max_train_steps=last, validation_epochs=epochs, train_batch_size=batch)
        schedule = z.make_schedule(cfg, samples, 1, min(first, last))
        steps = range(schedule.first_step + (schedule.first_step > 0), last)
        expected = sum(map(schedule.is_validation_step, steps))
        line = "".join(z.describe_sampling(samples, cfg, schedule))
        assert f"validation: {expected} images" in line, (last, first, epochs, batch)
    cfg = make_config(**changes, max_train_steps=10**9, validation_steps=10)
    assert "validation: 100000000 images" in "".join(z.describe_sampling(samples, cfg, z.make_schedule(cfg, samples)))


def test_a_long_run_is_planned_from_its_first_part(make_config):
    samples, cfg = [sample(n) for n in range(5)], make_config(max_train_steps=10**9)
    views = z.count_views(samples, cfg, z.make_schedule(cfg, samples, 1))
    assert set(views.values()) == {2 * 10**8}


def test_sizes_beyond_the_model_are_refused(make_config, model):
    lens = z.make_empty_transformer(model).config.axes_lens
    z.check_positions(make_config(), [sample(0, (2048, 2048))], {}, lens)
    with pytest.raises(UserError, match="16 x 4096 is too large for this model, which supports 2048 x 2048"):
        z.check_positions(make_config(), [sample(0, (16, 4096))], {}, lens)
    with pytest.raises(UserError, match="4096 x 4096 is too large .* --validation_resolution"):
        z.check_positions(make_config(validation_resolution=4096), [sample(0)], {}, lens)


def test_prompts_beyond_the_model_are_refused(make_config, tmp_path):
    """The caption is padded to a multiple of 32 tokens, and the image needs two positions after it."""
    z.make_demo_model(tmp_path / "m")
    config = tmp_path / "m" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"axes_lens": [96, 128, 128]}))
    overhead = len("Suser\nE\nSassistant\n")  # S and E: <|im_start|> and <|im_end|>
    cfg = make_config(pretrained_model_name_or_path=str(tmp_path / "m"), output_dir=str(tmp_path / "fits"))
    run(dataclasses.replace(cfg, instance_prompt="x" * (64 - overhead)))
    refused = pytest.raises(UserError, match="65 tokens are too many for this model; lower --max_sequence_length: 'xx")
    with refused:
        run(dataclasses.replace(cfg, instance_prompt="x" * (65 - overhead), output_dir=str(tmp_path / "refused")))


def test_images_are_generated_at_the_size_of_the_buckets(make_config):
    assert make_config().training_side == 32
    assert make_config(aspect_ratio_buckets="32,512;96,16").training_side == 128
    assert make_config(aspect_ratio_buckets="672,1568;1024,1024").training_side == 1024


def test_class_images_have_the_size_of_training_not_of_validation(make_config, tmp_path):
    prior = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "c"), "class_prompt": "dog"}
    run(make_config(**prior, num_class_images=1, validation_resolution=16, resolution=48))
    assert Image.open(tmp_path / "c" / "class-00000.png").size == (48, 48)


def test_validation_steps(make_config):
    samples = [sample(n) for n in range(5)]
    cfg = make_config(validation_epochs=2, train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=9)
    schedule = z.make_schedule(cfg, samples, 1)  # 10 examples between validations, 4 per step
    assert [step for step in range(9) if schedule.is_validation_step(step)] == [0, 3, 5, 8]
    cfg = dataclasses.replace(cfg, validation_steps=4)
    schedule = z.make_schedule(cfg, samples, 3)
    assert [step for step in range(9) if schedule.is_validation_step(step)] == [0, 4, 8]


def test_steps_from_epochs(make_config):
    samples = [sample(n) for n in range(5)] + [sample(5, is_prior=True)]
    cfg = make_config(max_train_steps=None, num_train_epochs=3, repeats=2, train_batch_size=2)
    assert z.make_schedule(cfg, samples, 2).max_train_steps == math.ceil(3 * 10 / 4)
    cfg = dataclasses.replace(cfg, with_prior_preservation=True, class_data_dir="c", class_prompt="p")
    assert z.make_schedule(cfg, samples, 1).epoch_examples == 20


def test_dataset_folder(make_config, tmp_path, capsys):
    """Images and captions of a local dataset, as `datasets` reads it, become samples."""
    for number in range(3):
        draw(tmp_path / "set" / "train" / f"{number}.png", (40 + number, 40))
    rows = [{"file_name": f"{n}.png", "words": f"caption {n}", "number": n} for n in range(3)]
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"instance_data_dir": None, "dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    cfg = make_config(**changes, caption_column="words")
    samples = z.plan_samples(cfg)
    assert sorted((s.prompt, s.size) for s in samples) == [(f"caption {n}", (40, 40 + n)) for n in range(3)]
    (exported,) = (tmp_path / "cache").rglob("datasets/*/metadata.jsonl")
    exported.write_text("")
    draw(next(exported.parent.glob("000001-*")), (70, 70))
    assert z.plan_samples(cfg) == samples, "what is damaged is written again"
    cfg = make_config(**changes)
    assert {s.prompt for s in z.plan_samples(cfg)} == {"a photo of sks dog"}
    assert "captions are not used; to use them, set --caption_column to words" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="--caption_column txt is not a column of the dataset, which has image, words, number"
    ):
        z.export_dataset(make_config(**changes, caption_column="txt"))
    with pytest.raises(UserError, match="metadata.jsonl, row 1: the caption 0 is not text"):
        z.plan_samples(make_config(**changes, caption_column="number"))
    with pytest.raises(UserError, match="--image_column words"):
        z.export_dataset(make_config(**changes, image_column="words"))
    for name in ("one", "two"):
        draw(tmp_path / "configs" / name / "x.png", (50, 50) if name == "one" else (60, 60))
    configs = "\n".join(f"- config_name: {name}\n  data_dir: {name}" for name in ("one", "two"))
    (tmp_path / "configs" / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    for name, size in (("one", (50, 50)), ("two", (60, 60))):
        cfg = make_config(**(changes | {"dataset_name": str(tmp_path / "configs"), "dataset_config_name": name}))
        assert [s.size for s in z.plan_samples(cfg)] == [size]
    with pytest.raises(UserError, match="--dataset_name .*nowhere cannot be loaded"):
        z.export_dataset(make_config(**(changes | {"dataset_name": str(tmp_path / "nowhere")})))


# Each entry makes one mistake in a working setup, and gives the expected error text.
MISTAKES = {
    "no folder": (lambda w: ["--instance_data_dir=cats"], "--instance_data_dir cats does not exist"),
    "empty folder": (lambda w: (w / "empty").mkdir() or ["--instance_data_dir=empty"], "contains no usable image"),
    "no readable image": (
        lambda w: (w / "text").mkdir() or (w / "text" / "x.png").write_text("x") and ["--instance_data_dir=text"],
        "contains no usable image; add some",
    ),
    "caption in Latin-1": (
        lambda w: (w / "dog" / "dog-0.txt").write_bytes(b"caf\xe9") and [],
        "dog-0.txt cannot be read as UTF-8 text",
    ),
    "metadata names a missing file": (
        lambda w: (w / "dog" / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n') and [],
        "metadata.jsonl, row 1 lists gone.png",
    ),
    "metadata leaves the folder": (
        lambda w: (w / "dog" / "metadata.jsonl").write_text('{"file_name": "../x.png", "text": "x"}\n') and [],
        "metadata.jsonl, row 1 lists ../x.png",
    ),
    "caption that is not text": (
        lambda w: (w / "dog" / "metadata.jsonl").write_text('{"file_name": "dog-0.jpeg", "text": 5}\n') and [],
        "metadata.jsonl, row 1: the caption 5 is not text",
    ),
    "metadata is not JSON": (
        lambda w: (w / "dog" / "metadata.jsonl").write_text("file_name: x\n") and [],
        'metadata.jsonl, row 1 is not a JSON object, or a line with commas, that has a "file_name": Expecting value',
    ),
    "bucket": (lambda w: ["--aspect_ratio_buckets=100,64"], "--aspect_ratio_buckets: sides must be multiples of 16"),
    "rank 0": (lambda w: ["--rank=0"], "--rank must be at least 1"),
    "negative steps": (lambda w: ["--max_train_steps=-1"], "--max_train_steps must be at least 1"),
    "optimizer": (lambda w: ["--optimizer=lion"], "--optimizer: invalid choice: 'lion'"),
    "fp16": (lambda w: ["--mixed_precision=fp16"], "--mixed_precision fp16 is not supported"),
    "component missing": (lambda w: shutil.rmtree(w / "model" / "vae") or [], "model has no vae/config.json"),
    "weights missing": (
        lambda w: (w / "model" / "vae" / "diffusion_pytorch_model.safetensors").unlink() or [],
        "model/vae has no weights",
    ),
    "no model": (lambda w: ["--pretrained_model_name_or_path=/no/such"], "/no/such does not exist"),
    "model cut off": (
        lambda w: os.truncate(w / "model" / "vae" / "diffusion_pytorch_model.safetensors", 5000) or [],
        "vae/diffusion_pytorch_model.safetensors is damaged or not fully downloaded",
    ),
    "model's settings damaged": (
        lambda w: (w / "model" / "vae" / "config.json").write_text("{") and [],
        "model/vae/config.json cannot be read as JSON",
    ),
    "no tokenizer": (lambda w: (w / "model" / "tokenizer" / "tokenizer.json").unlink() or [], "has no tokenizer.json"),
    "checkpoint of diffusers": (
        lambda w: (w / "out" / "checkpoint-500").mkdir(parents=True)
        or (w / "out" / "checkpoint-500" / "pytorch_lora_weights.safetensors").write_text("x")
        and (w / "out" / "checkpoint-500" / "optimizer.bin").write_text("x") and [],
        "--output_dir out contains checkpoint-500, not written by this script",
    ),
    "a LoRA of another program": (
        lambda w: (w / "out" / "checkpoint-500").mkdir(parents=True)
        or (w / "out" / "checkpoint-500" / "pytorch_lora_weights.safetensors").write_text("x") and [],
        "--output_dir out contains checkpoint-500, not written by this script",
    ),
    "logs in a checkpoint": (lambda w: ["--logging_dir=checkpoint-5/a"], "checkpoint-5/a is a name that the run"),
    "logs in what is set aside": (lambda w: ["--logging_dir=./superseded-checkpoint-5-a"], "is a name that the run"),
    "logs under the name of a file": (lambda w: ["--logging_dir=README.md"], "README.md is a name that the run"),
    "index without a map": (
        lambda w: (w / "model" / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}") and [],
        "model/vae/diffusion_pytorch_model.safetensors.index.json is damaged",
    ),
    "checkpoint that is a link": (
        lambda w: (w / "elsewhere").mkdir() or (w / "elsewhere" / "state.safetensors").write_text("x")
        and (w / "out").mkdir() or (w / "out" / "checkpoint-500").symlink_to(w / "elsewhere") or [],
        "--output_dir out contains checkpoint-500, not written by this script",
    ),
    "checkpoint of an earlier version": (
        lambda w: (w / "out" / "checkpoint-500").mkdir(parents=True)
        or (w / "out" / "checkpoint-500" / "manifest.json").write_text("{}")
        and ["--resume_from_checkpoint=latest"],
        "out contains checkpoint-500, not written by this script",
    ),
    "output lost its checkpoints": (
        lambda w: (w / "out").mkdir()
        or (w / "out" / "pytorch_lora_weights.safetensors").write_text("x")
        and (w / "out" / "config.json").write_text('{"environment": {}}')
        and ["--resume_from_checkpoint=latest"],
        "--output_dir out contains another run",
    ),
    "output among class images still to be made": (
        lambda w: ["--with_prior_preservation", "--class_prompt=p", "--class_data_dir=out", "--output_dir=out"],
        "--output_dir is inside --class_data_dir",
    ),
    "class images around the instance images": (
        lambda w: ["--with_prior_preservation", "--class_prompt=p", "--class_data_dir=."],
        "--instance_data_dir is inside --class_data_dir",
    ),
    "empty name": (lambda w: ["--output_dir="], "--output_dir is empty"),
    "endless rate": (lambda w: ["--learning_rate=inf"], "--learning_rate does not accept inf"),
    "output is a file": (lambda w: (w / "out").write_text("x") and [], "--output_dir out: out is not a folder"),
    "output holds others' files": (
        lambda w: (w / "out").mkdir() or (w / "out" / "README.md").write_text("x") and [],
        "--output_dir out contains README.md, not written by this script",
    ),
    "output holds a run": (
        lambda w: (w / "out" / "checkpoint-2").mkdir(parents=True)
        or (w / "out" / "checkpoint-2" / "state.safetensors").write_text("{}") and [],
        "contains another run; resume it with --resume_from_checkpoint latest",
    ),
    "output holds the steps of a run without a checkpoint": (
        lambda w: (w / "out").mkdir()
        or (w / "out" / "config.json").write_text('{"environment": {}}')
        and (w / "out" / "metrics.jsonl").write_text('{"step": 1}\n') and [],
        "contains another run; resume it with --resume_from_checkpoint latest",
    ),
    "output is a link to nothing": (
        lambda w: (w / "out").symlink_to("nowhere") or [], "--output_dir out: out is not a folder"
    ),
    "logs among the images": (
        lambda w: [f"--logging_dir={w / 'dog' / 'logs'}"], "--logging_dir is inside --instance_data_dir"
    ),
    "two attention backends": (
        lambda w: ["--enable_npu_flash_attention", "--attention_backend=flash"],
        "--enable_npu_flash_attention conflicts with --attention_backend flash",
    ),
    "output among the images": (
        lambda w: ["--output_dir=dog/out"],
        "--output_dir is inside --instance_data_dir",
    ),
    "classes among the images": (
        lambda w: ["--with_prior_preservation", "--class_prompt=p", "--class_data_dir=dog"],
        "--class_data_dir is inside --instance_data_dir",
    ),
    "overwriting what is started from": (
        lambda w: (w / "out" / "validation").mkdir(parents=True)
        or (w / "link").symlink_to("out")
        or (w / "out" / "validation" / "a.safetensors").write_text("")
        or ["--overwrite_output_dir", "--init_lora=link/validation/a.safetensors", "--output_dir=out"],
        "validation/a.safetensors is part of the earlier run, which would be deleted; copy it elsewhere",
    ),
    "overwriting what is trained on": (
        lambda w: shutil.copytree(w / "dog", w / "out" / "validation" / "step-000002")
        and ["--overwrite_output_dir", "--instance_data_dir=out/validation/step-000002", "--output_dir=out"],
        "step-000002 is part of the earlier run, which would be deleted; copy it elsewhere",
    ),
    "overwriting what is continued": (
        lambda w: ["--overwrite_output_dir", "--resume_from_checkpoint=latest"],
        "give only one of them",
    ),
    "no bitsandbytes file": (
        lambda w: ["--bnb_quantization_config_path=nf4.json"], "--bnb_quantization_config_path nf4.json cannot be read"
    ),
    "no bits": (
        lambda w: (w / "b.json").write_text("{}") and ["--bnb_quantization_config_path=b.json"],
        "b.json must set exactly one of load_in_4bit and load_in_8bit to true",
    ),
    "list for bitsandbytes": (
        lambda w: (w / "b.json").write_text("[]") and ["--bnb_quantization_config_path=b.json"],
        "b.json must contain one JSON object",
    ),
    "no such variant": (
        lambda w: ["--variant=bf16"], "model/text_encoder has no weights for --variant bf16, only model.safetensors"
    ),
    "no checkpoint": (lambda w: ["--resume_from_checkpoint=dog"], "dog is damaged or not a checkpoint of this"),
    "unknown flag": (lambda w: ["--lerning_rate=1"], "unrecognized arguments: --lerning_rate=1"),
    "no prompt": (lambda w: ["--config=c.json"] if (w / "c.json").write_text('{"instance_prompt": 3}') else [], None),
}  # fmt: skip


def test_a_demo_writes_nothing_into_a_folder_it_may_not_use(tmp_path, make_config):
    out = tmp_path / "out"
    run(make_config(max_train_steps=1))
    z.write_file(out / "demo-images" / "badge-0.png", b"mine")
    with pytest.raises(UserError, match="out contains another run"):
        run(parse_config(["--demo", f"--output_dir={out}", "--mixed_precision=no"]))
    assert (out / "demo-images" / "badge-0.png").read_bytes() == b"mine" and not (out / "demo-model").exists()
    with pytest.raises(UserError, match="badge-0.png cannot be used: .*; choose another folder"):
        run(make_config(output_dir=str(out / "demo-images" / "badge-0.png")))


def test_nothing_is_planned_checked_or_described_twice(make_config, monkeypatch):
    """One plan: made by the script's guard and handed to main, or by main itself in a notebook."""
    cfg = make_config(max_train_steps=1)
    run(cfg)
    again, calls = dataclasses.replace(cfg, max_train_steps=2, resume_from_checkpoint="latest"), collections.Counter()
    before = ("check_launch", "check_packages", "check_output", "check_nesting", "check_model", "scan_images")
    before += ("find_checkpoint", "make_schedule", "describe_plan", "advice")
    after = ("identify", "make_empty_transformer", "check_hardware", "check_positions", "check_continuity")
    for name in (*before, *after):
        work = getattr(z, name)
        monkeypatch.setattr(z, name, lambda *args, name=name, work=work: calls.update([name]) or work(*args))
    plan = z.make_plan(again)
    assert calls == dict.fromkeys(before, 1)
    AcceleratorState._reset_state(True)
    main(again, plan)
    assert calls == dict.fromkeys((*before, *after), 1)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_in_a_sentence_before_torch(mistake, workplace, model):
    make, words = MISTAKES[mistake]
    shutil.copytree(model, workplace / "model")
    flags = [
        "--pretrained_model_name_or_path=model",
        "--instance_data_dir=dog",
        "--output_dir=out",
        "--cache_dir=cache",
    ]
    more = make(workplace)
    before = {path: path.lstat().st_mtime_ns for path in workplace.rglob("*")}
    prompt = [] if mistake == "no prompt" else ["--instance_prompt=p"]
    done = run_script(*flags, *prompt, *more, cwd=workplace, without_torch=True, tmp_path=workplace)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (words or "--instance_prompt does not accept 3") in done.stderr
    assert {path: t for path in workplace.rglob("*") if (t := path.lstat().st_mtime_ns) and path in before} == before


def test_a_disk_that_refuses_is_answered_in_a_sentence(workplace, model, capsys):
    cfg = parse_config([f"--pretrained_model_name_or_path={model}", "--instance_data_dir=d", "--instance_prompt=p"])
    with pytest.raises(SystemExit) as stop:
        z.run_or_exit(lambda cfg: (workplace / ("x" * 300)).mkdir(), cfg)
    assert stop.value.code == 2 and "error: [Errno 36] File name too long" in capsys.readouterr().err


def test_what_only_one_process_suffers_is_not_silent(make_config, monkeypatch, capsys):
    """Shared errors are printed by the main process, errors of a single process by that process."""
    monkeypatch.setenv("RANK", "1")

    def fails(error, what=None):
        with contextlib.nullcontext() if what is None else z.explained(what):
            raise error

    for error, what, said in (
        (UserError("--rank"), None, ""),
        (FloatingPointError("loss"), None, ""),
        (OSError("disk"), None, "error: disk"),
        (MemoryError("no memory"), "vae cannot be loaded", "error: vae cannot be loaded: no memory"),
    ):
        with pytest.raises(SystemExit):
            z.run_or_exit(lambda cfg, error=error, what=what: fails(error, what), make_config())
        assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize(
    ("changes", "env", "words"),
    [
        ({}, {"FSDP_VERSION": "1"}, "only fsdp_version: 2 is supported"),
        ({}, {"FSDP_OFFLOAD_PARAMS": "true"}, "only fsdp_offload_params: false"),
        ({}, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "only fsdp_cpu_ram_efficient_loading: false"),
        ({"lora_dropout": 0.1}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "would sample --lora_dropout twice"),
        ({"quantization": "int8"}, {}, "FSDP does not support --quantization"),
        ({"do_fp8_training": True}, {}, "FSDP does not support --do_fp8_training"),
        ({"bnb_quantization_config_path": "nf4.json"}, {}, "FSDP does not support --bnb_quantization_config_path"),
        ({"use_8bit_adam": True}, {}, "FSDP does not support --use_8bit_adam"),
        ({"optimizer": "prodigy", "use_8bit_adam": True}, {}, "FSDP does not support --optimizer prodigy"),
        ({"fit": "24"}, {}, "--fit does not know how FSDP shards the model; remove it"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(changes, env, words, make_config, monkeypatch):
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | env).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refusal:
        z.make_plan(make_config(**changes))
    assert words in str(refusal.value)


@pytest.mark.parametrize("name", ["USE_DEEPSPEED", "USE_MEGATRON_LM"])
def test_what_else_accelerate_offers_is_refused(name, make_config, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{name}", "true")
    with pytest.raises(UserError, match=f"{name} is not supported; multi-GPU, FSDP, and dynamo are"):
        z.make_plan(make_config())


def test_fp16_from_accelerates_configuration(workplace, model):
    flags = [f"--pretrained_model_name_or_path={model}", "--instance_data_dir=dog", "--instance_prompt=p"]
    env = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    done = run_script(*flags, cwd=workplace, env=env, without_torch=True, tmp_path=workplace)
    assert done.returncode == 2 and "accelerate configuration: fp16 is not supported" in done.stderr


@pytest.mark.parametrize(
    ("package", "changes"),
    [
        ("prodigyopt", {"optimizer": "prodigy", "learning_rate": 1.0}),
        ("bitsandbytes", {"use_8bit_adam": True}),
        ("bitsandbytes", {"quantization": "nf4"}),
        ("torchao", {"quantization": "int8"}),
        ("torchao", {"do_fp8_training": True}),
        ("wandb", {"report_to": "wandb"}),
    ],
)
def test_a_missing_package_gets_its_pip_line(package, changes, make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        z.check_packages(make_config(**changes))


def test_any_stdout_can_show_what_is_printed(workplace, model):
    """A pipe or log file of Windows is not UTF-8."""
    os.rename(workplace / "dog" / "dog-0.jpeg", workplace / "dog" / "狗.heic")
    flags = [f"--pretrained_model_name_or_path={model}", "--instance_data_dir=dog", "--instance_prompt=一只sks狗"]
    done = run_script(*flags, *SMALL.split(), cwd=workplace, env={"PYTHONIOENCODING": "cp1252", "HF_HOME": "hf"})
    assert done.returncode == 0 and r"\u72d7.heic" in done.stdout, done.stderr[-3000:]


def test_a_folder_with_the_name_of_a_package_is_none(make_config, monkeypatch, tmp_path):
    (tmp_path / "prodigyopt").mkdir()
    monkeypatch.delitem(sys.modules, "prodigyopt", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install prodigyopt"):
        z.check_packages(make_config(**PRODIGY))


@pytest.mark.parametrize("missing", [[], ["wandb", "bitsandbytes", "torchao", "prodigyopt"]])
def test_importing_is_silent_and_needs_no_optional_package(missing):
    code = f"""import sys
sys.modules.update(dict.fromkeys({missing!r}))
import train_dreambooth_lora_z_image
for name in ("wandb", "prodigyopt"):  # the others are imported by peft where they are installed
    assert not sys.modules.get(name), name"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_component_that_cannot_be_loaded_gets_a_sentence(make_config, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "m")
    changes = {"pretrained_model_name_or_path": str(broken), "cache_dir": str(tmp_path / "cache")}
    for component in ("transformer", "vae", "text_encoder"):
        (file,) = z.weight_files(broken / component, None)
        content = file.read_bytes()
        tensors = load_file(file)
        save_file({name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}, file)
        with pytest.raises(UserError, match=rf"m(/|: ){component}.* cannot be loaded: "):
            run(make_config(**changes, output_dir=str(tmp_path / component)))
        file.write_bytes(content)
        shutil.rmtree(tmp_path / "cache")
    (broken / "transformer" / "config.json").write_text('{"n_layers": "3"}')
    with pytest.raises(UserError, match="transformer/config.json does not describe Z-Image: "):
        run(make_config(**changes))


def test_large_files_are_identified_by_slices(tmp_path):
    """Small files are hashed completely, large ones by 4 KiB of every 4 MiB, which covers every weight matrix."""
    for size, start, is_seen in ((2**24 - 1, 5000, True), (2**25, 2**22 + 17, True), (2**25, 5000, False)):
        content = bytearray(size)
        (tmp_path / "a").write_bytes(content)
        content[start] = 1
        (tmp_path / "b").write_bytes(content)
        assert (z.fingerprint(tmp_path / "a") != z.fingerprint(tmp_path / "b")) == is_seen
    (tmp_path / "b").write_bytes(bytes(2**25 + 1))
    assert z.fingerprint(tmp_path / "a") != z.fingerprint(tmp_path / "b"), "the size counts"
    with torch.device("meta"):
        block = z.ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1).layers[0]
    assert min(p.numel() * 2 for p in block.parameters() if p.dim() == 2) > 2**22, "bytes in bf16, at full size"


def test_a_missing_shard_is_named(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "m" / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="text_encoder is missing model-00001-of-00002.safetensors, model-00002"):
        z.check_components(tmp_path / "m", FP32)
    shutil.copy(tmp_path / "m/text_encoder/model.safetensors", tmp_path / "m/text_encoder/model.bf16.safetensors")
    for component in ("vae", "transformer"):
        file = tmp_path / "m" / component / "diffusion_pytorch_model.safetensors"
        shutil.copy(file, file.with_name("diffusion_pytorch_model.bf16.safetensors"))
    z.check_components(
        tmp_path / "m", dataclasses.replace(FP32, variant="bf16")
    )  # does not need the other variant's shards


# =====================================================================================================================
# Encoders and caches
# =====================================================================================================================


def encode(model, prompt, cfg=FP32):
    """Encode a prompt."""
    return z.encode_prompt(z.load_text_encoder(model, cfg), tokens_of(model, [prompt])[prompt])


def tokens_of(model, prompts, limit=512):
    """Tokenize prompts."""
    return z.tokenize(prompts, Path(model), limit)


def encodings_of(cfg, model):
    """Identify the encodings of a config."""
    return z.Encodings(cfg, Path(model), z.identify(Path(model), cfg.variant))


@pytest.mark.parametrize("prompt", ["a photo of sks dog", "一只sks狗在桶里的照片", "", "x" * 900])
def test_prompts_are_encoded_as_the_pipeline_does(prompt, model, capsys):
    pipe = ZImagePipeline.from_pretrained(model)
    expected = pipe.encode_prompt(prompt, device=CPU, do_classifier_free_guidance=False)[0][0]
    encoded = encode(model, prompt)
    assert encoded.shape == expected.shape and torch.allclose(encoded, expected, atol=1e-6)
    assert ("cut off: 'xx" in capsys.readouterr().out) == (prompt == "x" * 900)


def test_text_encoder_saved_as_a_language_model_loads_too(model, tmp_path):
    """The real checkpoint may hold Qwen3ForCausalLM: other key names, an unused head."""
    from transformers import Qwen3ForCausalLM, Qwen3Model

    shutil.copytree(model, tmp_path / "m")
    language_model = Qwen3ForCausalLM(Qwen3Model.from_pretrained(model / "text_encoder").config)
    language_model.model.load_state_dict(Qwen3Model.from_pretrained(model / "text_encoder").state_dict())
    language_model.save_pretrained(tmp_path / "m" / "text_encoder")
    assert torch.equal(encode(model, "dog"), encode(tmp_path / "m", "dog"))


def test_images_are_encoded_to_the_scaled_mode(model):
    vae = z.load_vae(model, FP32)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = z.encode_images(vae, pixels)
    assert latents.shape == (2, 16, 4, 6) and latents.dtype == torch.float32
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
    assert torch.allclose(latents / 0.3611 + 0.1159, mean, atol=1e-5)


def test_pixels_are_cropped_and_mirrored(tmp_path):
    wide = Image.new("RGB", (96, 32), (0, 0, 0))
    wide.paste(RED, (0, 0, 32, 32))
    wide.save(tmp_path / "x.png")
    digest = z.sha256((tmp_path / "x.png").read_bytes())
    s = z.Sample(tmp_path / "x.png", (32, 96), (32, 32), "p", False, False, digest)
    left = z.load_pixels(s, False, (0.0, 0.5))
    assert left.min() == -1 and left[0].min() == 1 and left.shape == (3, 32, 32)
    assert z.load_pixels(s, False, (1.0, 0.5)).max() == -1
    half = z.load_pixels(s, False, (0.25, 0.5))
    assert torch.equal(z.load_pixels(s, True, (0.25, 0.5)), half.flip(-1))


def test_augmentation_is_a_function_of_seed_and_number(make_config):
    def sampled(**changes):
        cfg = make_config(cache_latents=False, **changes)
        return [z.sample_augmentation(cfg, n) for n in range(200)]

    plain, flipped = sampled(), sampled(random_flip=True)
    assert not any(a[0] for a in plain) and 70 < sum(a[0] for a in flipped) < 130
    assert [a[1] for a in plain] == [a[1] for a in flipped] and len(set(plain)) == 200
    assert sampled(random_flip=True) == flipped != sampled(random_flip=True, seed=1)
    assert {a[1] for a in sampled(center_crop=True)} == {(0.5, 0.5)}


def test_a_second_run_encodes_nothing_and_says_so(make_config, tmp_path, capsys, monkeypatch):
    cfg = make_config(cache_dir=str(tmp_path / "fresh"), random_flip=True)
    main(cfg)
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "fresh").rglob("*.safetensors")}
    assert len(list((tmp_path / "fresh" / "z-image-encodings" / "latents").iterdir())) == 10
    capsys.readouterr()
    monkeypatch.setattr(z, "load_text_encoder", lambda *_: pytest.fail("the text encoder was loaded"))
    monkeypatch.setattr(z, "load_vae", lambda *_: pytest.fail("the VAE was loaded"))
    main(dataclasses.replace(cfg, output_dir=str(tmp_path / "again")))
    said = capsys.readouterr().out
    assert "text encoder is not loaded" in said and "VAE is not loaded" in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "fresh").rglob("*.safetensors")} == cached


@pytest.mark.parametrize(("guidance", "negatives"), [(0.0, set()), (2.0, {"blurry"})])
def test_every_prompt_is_encoded_once_and_no_negative_without_guidance(guidance, negatives, make_config, tmp_path):
    cfg = make_config(
        cache_dir=str(tmp_path / "fresh"), validation_prompt=("a", "b", "a photo of sks dog"),
        negative_prompt="blurry", guidance_scale=guidance, num_inference_steps=1,
    )  # fmt: skip
    run(cfg)
    encodings = encodings_of(cfg, cfg.pretrained_model_name_or_path)
    expected = {encodings.prompt(prompt) for prompt in {"a", "b", "a photo of sks dog", *negatives}}
    assert set((tmp_path / "fresh" / "z-image-encodings" / "prompts").iterdir()) == expected


def test_a_process_encodes_its_share_whatever_others_have_done(make_config, model, tmp_path, monkeypatch, images):
    """The second of two processes, when the first, or another run, has encoded some prompts in the meantime."""
    cfg, prompts = make_config(cache_dir=str(tmp_path / "fresh")), ["a", "b", "c", "d"]
    encodings = (Accelerator(cpu=True), encodings_of(cfg, model))[1]
    z.fill_prompts_cache(tokens_of(model, ["a"]), encodings)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setitem(PartialState._shared_state, "local_process_index", 1)
    z.fill_prompts_cache(tokens_of(model, prompts), encodings)
    assert [prompt for prompt in prompts if encodings.prompt(prompt).exists()] == ["a", "b", "d"]
    samples = z.plan_samples(cfg)
    z.fill_latents_cache(samples, encodings)
    assert [encodings.latents(sample, False).exists() for sample in samples] == [False, True, False, True, False]


def test_an_example_is_mirrored_from_the_cache_too_and_has_noise_of_its_own(make_config, model, images):
    cfg = make_config(random_flip=True)
    encodings, samples = (Accelerator(cpu=True), encodings_of(cfg, model))[1], z.plan_samples(cfg)
    z.fill_prompts_cache(tokens_of(model, [samples[0].prompt]), encodings)
    z.fill_latents_cache(samples[:1], encodings)
    examples = {number: z.load_batch([(number, 0)], samples, encodings) for number in range(12)}
    vae = z.load_vae(model, FP32)
    for number in range(12):
        is_flipped, _ = z.sample_augmentation(cfg, number)
        pixels = z.load_pixels(samples[0], is_flipped)
        assert torch.allclose(examples[number].latents[0], z.encode_images(vae, pixels[None])[0], atol=1e-5)
    assert len({z.sample_augmentation(cfg, number)[0] for number in range(12)}) == 2
    assert len({examples[number].seeds[0] for number in range(12)}) == 12


def test_all_is_cached_only_if_it_is_for_every_process(make_config, model, tmp_path, monkeypatch, capsys):
    cfg = make_config(cache_dir=str(tmp_path / "fresh"))
    encodings = (Accelerator(cpu=True), encodings_of(cfg, model))[1]
    z.fill_prompts_cache(tokens_of(model, ["a"]), encodings)
    capsys.readouterr()
    monkeypatch.setattr(z, "any_process", lambda condition: True)  # another one has something to encode
    z.fill_prompts_cache(tokens_of(model, ["a"]), encodings)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(z, "any_process", lambda condition: condition)
    z.fill_prompts_cache(tokens_of(model, ["a"]), encodings)
    assert "prompts: all cached" in capsys.readouterr().out


@pytest.mark.parametrize("count", [0, 1, 3])
def test_jobs_are_loaded_ahead_in_order(count):
    """As many as requested, and no more; nothing is loaded twice or left out."""
    started, seen = [], []

    def load(number):
        started.append(number)
        return number

    for result in z.load_ahead(load, ((number,) for number in range(9)), count):
        seen.append(result)
        assert len(started) <= len(seen) + count
    assert seen == sorted(started) == list(range(9))


def test_what_fails_while_loading_ahead_fails_in_its_turn():
    loaded = z.load_ahead(lambda text: int(text), iter([("1",), ("x",), ("3",)]), 2)
    assert next(loaded) == 1
    with pytest.raises(UserError, match="images cannot be loaded: invalid literal for .*'x'; check their disk"):
        next(loaded)


def test_leaving_the_loader_does_not_wait_for_a_file_that_hangs(tmp_path):
    """As on a network disk: neither the caller nor the end of the program waits for the threads that do."""
    os.mkfifo(tmp_path / "fifo")
    code = f"""import pathlib
import train_dreambooth_lora_z_image as z
read = lambda path: path and pathlib.Path(path).read_bytes()
loaded = z.load_ahead(read, iter([(None,), ({str(tmp_path / "fifo")!r},), (None,)]), 1)
print(next(loaded))
loaded.close()"""
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "None\n", done.stderr


def test_a_file_that_hangs_ends_the_run_with_a_sentence(monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(z, "LOADER_TIMEOUT", 0.01)
    with pytest.raises(UserError, match="images cannot be loaded: TimeoutError; check their disk, and resume the run"):
        next(z.load_ahead(hangs.wait, iter([()]), 0))
    hangs.set()


def test_an_image_that_changes_after_the_plan_is_not_cached_under_its_old_name(make_config, model, images, tmp_path):
    """Also if it is replaced by an intact one; what cannot be decoded is named."""
    cfg = make_config(cache_dir=str(tmp_path / "fresh"))
    encodings, samples = (Accelerator(cpu=True), encodings_of(cfg, model))[1], z.plan_samples(cfg)
    shutil.copy(images / "1.png", images / "3.png")
    with pytest.raises(UserError, match="3.png has changed since the start; start again"):
        z.fill_latents_cache(samples, encodings)
    assert not encodings.latents(samples[3], False).exists()
    (images / "3.png").unlink()
    with pytest.raises(UserError, match="3.png cannot be read any more: .* restore it, and start or resume the run"):
        z.fill_latents_cache(samples, encodings)


def test_changed_ingredients_miss_the_cache(make_config, model, images, tmp_path):
    def files(folder=model, **changes):
        cfg = make_config(**changes)
        encodings, s = encodings_of(cfg, folder), z.plan_samples(cfg)[0]
        return {encodings.prompt(s.prompt), encodings.latents(s, False), encodings.latents(s, True)}

    seen = files()
    assert files() == seen and len(seen) == 3
    prompts = [files(instance_prompt="another") - seen, files(max_sequence_length=99) - seen]
    assert [len(new) for new in prompts] == [1, 1]
    assert len(files(mixed_precision="bf16") - seen) == 3
    assert len(files(resolution=48) - seen) == 2
    changed = Image.open(images / "0.png")
    changed.putpixel((5, 5), (1, 2, 3))
    changed.save(images / "0.png")
    assert len(files() - seen) == 2
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, other / "vae" / "diffusion_pytorch_model.safetensors")
    assert len(files(other) - files()) == 2
    (other / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert len(files(other) - files()) == 3


def test_damaged_cache_files_are_made_again(make_config, tmp_path):
    cfg = make_config(cache_dir=str(tmp_path / "fresh"))
    run(cfg)
    good = lora_bytes(cfg)
    files = [*(tmp_path / "fresh").rglob("*.safetensors")]
    damages = {
        "cut": lambda content: content[:-7],
        "one bit": lambda content: content[:-7] + bytes([content[-7] ^ 1]) + content[-6:],
        "another name": lambda content: content.replace(b"latents", b"talents").replace(
            b"prompt_embeds", b"prompt_empeds"
        ),
        "another type": lambda content: content.replace(b'"F32"', b'"I32"'),
    }
    for name, damage in damages.items():
        for path in files:
            path.write_bytes(damage(path.read_bytes()))
        run(dataclasses.replace(cfg, overwrite_output_dir=True))
        assert lora_bytes(cfg) == good, name


def test_a_file_is_whole_or_not_there(tmp_path):
    """With many writers of one file, readers never see a partial file, and no temporary file remains."""
    path, seen = tmp_path / "x" / "y.bin", set()
    writers = [threading.Thread(target=z.write_file, args=(path, bytes([n]) * 100_000)) for n in range(8)]
    for writer in writers:
        writer.start()
        if path.exists():
            seen.add((len(set(path.read_bytes())), path.stat().st_size))
    for writer in writers:
        writer.join()
    seen.add((len(set(path.read_bytes())), path.stat().st_size))
    assert seen == {(1, 100_000)} and [p.name for p in path.parent.iterdir()] == ["y.bin"]


def test_equal_tensors_give_equal_files(tmp_path):
    metadata = {f"key {n}": str(n) for n in range(20)}
    for name, ordered in (("a", metadata), ("b", dict(reversed(metadata.items())))):
        z.write_tensors(tmp_path / name, {"x": torch.arange(6.0).view(2, 3)[:, 1:]}, ordered)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert metadata.items() < file.metadata().items() and file.get_tensor("x").tolist() == [[1, 2], [4, 5]]


def test_tensors_of_all_types_are_written_for_the_library_that_reads_them(tmp_path):
    """As an optimizer with 8-bit state has them: an odd number of bytes must not displace wider types."""
    tensors = {
        "a bytes": torch.arange(5, dtype=torch.uint8), "b": torch.randn(3, 1).bfloat16(), "c": torch.tensor(2.5),
        "d none": torch.zeros(0, 4), "e": torch.randn(2, 3, 4), "f turned": torch.randn(3, 2).t(),
    }  # fmt: skip
    z.write_tensors(tmp_path / "file", tensors)
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys() and z.read_sealed(tmp_path / "file") == {}
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    with safe_open(tmp_path / "file", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    header = json.loads((tmp_path / "file").read_bytes()[8:].split(b"}}")[0] + b"}}")
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0


def test_hub_name_is_found_in_the_cache_and_answered_in_a_sentence_otherwise(workplace, model):
    """Complete copies in the usual cache come first, then those below --cache_dir; another name has no network."""
    repository = workplace / "cache" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for branch in ("main", "newer"):
        shutil.copytree(model, repository / "snapshots" / f"of-{branch}")
        (repository / "refs" / branch).write_text(f"of-{branch}")
    run = """import sys; from train_dreambooth_lora_z_image import *
cfg = parse_config(sys.argv[1:]); make_accelerator(cfg); print(find_model(cfg))
print(find_model(dataclasses.replace(cfg, revision="newer")))
print(find_model(dataclasses.replace(cfg, cache_dir=None)))
print(find_model(dataclasses.replace(cfg, pretrained_model_name_or_path="org/usual")))
print(find_model(dataclasses.replace(cfg, pretrained_model_name_or_path="org/broken")))
run_or_exit(main, dataclasses.replace(cfg, pretrained_model_name_or_path="org/gone"))"""
    flags = [
        "--pretrained_model_name_or_path=org/tiny",
        "--instance_data_dir=dog",
        "--instance_prompt=p",
        "--cache_dir=cache",
    ]
    usual = workplace / "hf" / "hub"
    for name in ("tiny", "usual", "broken"):
        shutil.copytree(repository, usual / f"models--org--{name}")
    shutil.copytree(repository, repository.with_name("models--org--broken"))
    shutil.rmtree(usual / "models--org--broken" / "snapshots" / "of-main" / "vae")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace / "hf")}
    done = subprocess.run([sys.executable, "-c", run, *flags], cwd=workplace, env=env, capture_output=True, text=True)
    found = [Path(line).relative_to(workplace).as_posix() for line in done.stdout.splitlines()[:5]]
    assert found == [
        "hf/hub/models--org--tiny/snapshots/of-main", "hf/hub/models--org--tiny/snapshots/of-newer",
        "hf/hub/models--org--tiny/snapshots/of-main", "hf/hub/models--org--usual/snapshots/of-main",
        "cache/models--org--broken/snapshots/of-main",
    ], done.stderr  # fmt: skip
    assert done.returncode == 2
    assert "--pretrained_model_name_or_path org/gone is not a local folder and cannot be" in done.stderr


def test_variant(model, make_config, tmp_path, capsys):
    """Weights in files named after a variant are read, others of the folder are not; plain ones do not mix in."""
    shutil.copytree(model, tmp_path / "m")
    for component in ("text_encoder", "vae", "transformer"):
        (weights,) = (tmp_path / "m" / component).glob("*.safetensors")
        other = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
        save_file(other, weights.with_name(f"{weights.stem}.other.safetensors"), {"format": "pt"})
    results = {}
    for name, changes in {
        "plain": {},
        "other": {"variant": "other"},
        "small": {"quantization": "int8", "variant": "other"},
    }.items():
        cfg = make_config(
            pretrained_model_name_or_path=str(tmp_path / "m"), output_dir=str(tmp_path / name), max_train_steps=1,
            cache_dir=str(tmp_path / f"cache of {name}"), **changes,
        )  # fmt: skip
        run(cfg)
        results[name] = losses_of(cfg)[0]
    run(make_config(output_dir=str(tmp_path / "original"), max_train_steps=1))
    original = losses_of(make_config(output_dir=str(tmp_path / "original")))[0]
    assert results["plain"] == original != results["other"]
    assert results["small"] != results["other"] and results["small"] == pytest.approx(results["other"], rel=0.01)
    names = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.bf16.safetensors",
        "model.bf16-00001-of-00002.safetensors",
    ]
    for name in [*names, "model-00001-of-00002.bf16.safetensors"]:
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(b"")
    assert [path.name for path in z.weight_files(tmp_path / "files", None)] == sorted(names[:2])
    assert len(z.weight_files(tmp_path / "files", "bf16")) == 3


@pytest.mark.parametrize("component", ["text_encoder", "vae", "transformer"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_weight_that_is_missing_is_named_and_never_random(component, quantization, model, make_config, tmp_path):
    stranger = shutil.copytree(model, tmp_path / "m")
    (file,) = (stranger / component).glob("*.safetensors")
    state = load_file(file)
    name = min(key for key in state if key.endswith("weight") and "layers.2" not in key)
    save_file({key: value for key, value in state.items() if key != name}, file, {"format": "pt"})
    cfg = make_config(pretrained_model_name_or_path=str(stranger), quantization=quantization)
    with pytest.raises(UserError, match=f"{component} has no weights for {re.escape(name)}; download it again"):
        run(cfg)


def test_other_files_beside_the_weights_are_not_read(model, make_config, tmp_path):
    """A backup is not a shard: quantized or not, the run is the same as without it."""
    copied = shutil.copytree(model, tmp_path / "m")
    state = load_file(copied / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({key: value * 0.1 for key, value in state.items()}, copied / "transformer" / "z_my_backup.safetensors")
    for place, folder in (("one", model), ("two", copied)):
        changes = {"pretrained_model_name_or_path": str(folder), "quantization": "int8"}
        run(make_config(**changes, output_dir=str(tmp_path / place)))
    cfgs = [make_config(output_dir=str(tmp_path / place)) for place in ("one", "two")]
    assert lora_bytes(cfgs[0]) == lora_bytes(cfgs[1])


def test_batches_loaded_ahead_are_those_loaded_on_demand(make_config, tmp_path, monkeypatch):
    changes, counts, load_ahead = {"cache_latents": False, "random_flip": True, "max_train_steps": 3}, [], z.load_ahead
    monkeypatch.setattr(z, "load_ahead", lambda *args: counts.append(args[2]) or load_ahead(*args))
    cfgs = [make_config(**changes, output_dir=str(tmp_path / str(n)), dataloader_num_workers=n) for n in (0, 3)]
    for cfg in cfgs:
        run(cfg)
    assert counts == [0, 3] and lora_bytes(cfgs[0]) == lora_bytes(cfgs[1])


def test_offloaded_encoders_give_the_same_and_hold_one_weight_at_a_time(model, make_config, images):
    """`--offload`: between calls, no weight is on the device; during one, those of a single layer."""
    cfg, prompt, pixels = make_config(offload=True), "a photo of sks dog", torch.rand(2, 3, 32, 48)
    Accelerator(cpu=True)
    encoder, vae, seen = z.load_text_encoder(model, cfg), z.load_vae(model, cfg), []
    for module in (encoder, vae):
        leaves = [leaf for leaf in module.modules() if list(leaf.parameters(recurse=False))]
        for leaf in leaves:
            leaf.register_forward_pre_hook(
                lambda *_, leaves=leaves: seen.append(sum(not next(leaf.parameters()).is_meta for leaf in leaves))
            )
    tokens = tokens_of(model, [prompt])[prompt]
    assert torch.equal(z.encode_prompt(encoder, tokens), encode(model, prompt))
    assert torch.equal(z.encode_images(vae, pixels), z.encode_images(z.load_vae(model, FP32), pixels))
    assert set(seen) <= {0, 1} and len(seen) > 40
    assert all(parameter.is_meta for module in (encoder, vae) for parameter in module.parameters())


@pytest.mark.parametrize("is_cached", [True, False])
def test_encoders_are_freed_before_the_transformer_comes(is_cached, make_config, tmp_path, monkeypatch):
    """Also with `--offload`; the VAE stays only if images are encoded in every step. The LoRA is that without."""
    alive, left = [], []
    for name in ("load_text_encoder", "load_vae"):
        load = getattr(z, name)
        monkeypatch.setattr(
            z, name, lambda *args, load=load: (alive.append(weakref.ref(made := load(*args))), made)[1]
        )
    load = z.load_transformer
    monkeypatch.setattr(
        z, "load_transformer", lambda *args: left.append([ref() for ref in alive if ref()]) or load(*args)
    )
    options = {"cache_latents": is_cached, "validation_prompt": ("a",), "max_train_steps": 1}
    cfgs = [
        make_config(**options, offload=on, cache_dir=str(tmp_path / f"c{on}"), output_dir=str(tmp_path / f"o{on}"))
        for on in (True, False)
    ]
    for cfg in cfgs:
        run(cfg)
    assert len(alive) == 2 * (4 if is_cached else 5) and left == [[], []]
    assert lora_bytes(cfgs[0]) == lora_bytes(cfgs[1])
    pngs = [[path.read_bytes() for path in sorted(Path(cfg.output_dir).rglob("*.png"))] for cfg in cfgs]
    assert pngs[0] == pngs[1] and len(pngs[0]) == 4 + len(z.STRENGTHS)


# =====================================================================================================================
# Transformer and LoRA
# =====================================================================================================================

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def layers_of(model, lora_layers):
    """Resolve `--lora_layers`."""
    return z.resolve_lora_layers(lora_layers, z.make_empty_transformer(model))


def test_lora_layers(model, capsys):
    blocks = ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"]
    default = Config.__dataclass_fields__["lora_layers"].default
    assert set(layers_of(model, default)) == {
        f"{b}.{part}"
        for b in blocks
        for part in [*(f"attention.{a}" for a in ATTENTION), *(f"feed_forward.w{n}" for n in (1, 2, 3))]
    }
    assert set(layers_of(model, "to_k,to_q,to_v,to_out.0")) == {
        f"{b}.attention.{a}" for b in blocks for a in ATTENTION
    }
    assert layers_of(model, "layers.1.attention.to_q") == ["layers.1.attention.to_q"]
    assert set(layers_of(model, "layers.1.attention")) == {f"layers.1.attention.{a}" for a in ATTENTION}
    assert set(layers_of(model, "layers.0-1.attention")) == {
        f"layers.{n}.attention.{a}" for n in (0, 1) for a in ATTENTION
    }
    assert layers_of(model, "layers.1-1.attention.to_q") == ["layers.1.attention.to_q"]
    assert layers_of(model, "all_final_layer.2-1.linear") == ["all_final_layer.2-1.linear"]
    with pytest.raises(UserError, match="no linear layer matches layers.2.attention"):
        layers_of(model, "layers.0-999999999999.attention")
    aliased = layers_of(model, "ff.net.0.proj, ff.net.2")
    assert set(aliased) == {f"{b}.feed_forward.w{n}" for b in blocks for n in (1, 2, 3)}
    assert "ff.net.0.proj means w1 and w3 in Z-Image" in capsys.readouterr().out


@pytest.mark.parametrize("storage", [None, "int8"])
def test_weights_go_to_the_device_without_a_stay_in_host_memory(storage, make_config, monkeypatch):
    """Else every process would hold 12 GB of its own; FSDP moves a shard at a time."""
    cuda, cfg = torch.device("cuda:1"), make_config(quantization=storage)
    monkeypatch.setattr(PartialState, "device", property(lambda self: cuda, lambda self, _: None), raising=False)
    assert z.loading_options(cfg, torch.bfloat16)["device_map"] == {"": cuda}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert ("device_map" in z.loading_options(cfg, torch.bfloat16)) == (storage is not None)


def test_a_device_map_changes_nothing_else(make_config, model, monkeypatch):
    """The path of a GPU, on the CPU."""
    options = z.loading_options
    plain = dict(z.load_transformer(model, make_config(), torch.float32).named_parameters())
    monkeypatch.setattr(z, "loading_options", lambda *args: options(*args) | {"device_map": {"": CPU}})
    mapped = z.load_transformer(model, make_config(), torch.float32)
    assert all(torch.equal(parameter, plain[name]) for name, parameter in mapped.named_parameters())
    cfg = make_config()
    z.add_lora(mapped, layers_of(model, cfg.lora_layers), cfg)
    Accelerator(cpu=True).prepare(mapped.to(CPU))


def test_unknown_lora_layers_are_refused_before_weights_are_read(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(
        UserError, match=r"no linear layer matches to_x; choose from .*attention.to_q.*feed_forward.w1"
    ):
        layers_of(tmp_path / "m", "to_q,to_x")
    with pytest.raises(UserError, match="--lora_layers is empty"):
        layers_of(tmp_path / "m", ",")


def make_run(cfg, transformer, optimizer=None, accelerator=None, samples=()):
    """Build a `Run` from hand-made parts."""
    model, samples = Path(cfg.pretrained_model_name_or_path), list(samples) or [sample(0)]
    plan = z.Plan(samples, z.make_schedule(cfg, samples), None)
    encodings = z.Encodings(cfg, model, {})
    return z.Run(
        cfg,
        plan,
        encodings,
        accelerator or Accelerator(cpu=True),
        transformer,
        optimizer,
        z.StopRequest(None),
        {},
    )


def with_lora(model, cfg, dtype=torch.float32, b_std=0.0):
    """A transformer with a LoRA, whose B matrices are random if `b_std` is given."""
    transformer = z.load_transformer(Path(model), cfg, dtype)
    parameters = z.add_lora(transformer, layers_of(model, cfg.lora_layers), cfg)
    if b_std:
        torch.manual_seed(1)
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=b_std)
    return transformer, parameters


def test_lora_is_fp32_seeded_and_alone_trainable(model, make_config):
    (first, parameters), (_, others) = (
        with_lora(model, make_config(), torch.bfloat16),
        with_lora(model, make_config(), torch.bfloat16),
    )
    names = [name for name, parameter in first.named_parameters() if parameter.requires_grad]
    assert len(names) == len(parameters) == 2 * 28 and all("lora_" in name for name in names)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {p.dtype for p in first.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(parameters, others))
    assert not torch.equal(parameters[0], with_lora(model, make_config(seed=1))[1][0])
    line = z.describe_lora(first, layers_of(model, make_config().lora_layers), make_config(lora_alpha=2.0))
    assert "28 layers, rank 4, effective scale alpha / rank = 0.5, over 0.00118 GB of frozen weights" in line


def make_batch(size=2, side=4, is_prior=False, length=9, dtype=torch.float32):
    """A random micro-batch."""
    generator = torch.Generator().manual_seed(3)
    return z.Batch(
        seeds=list(range(size)),
        sigmas=torch.arange(1, size + 1) / (1 + size),
        latents=torch.randn(size, 16, side, side + 2, generator=generator),
        prompt_embeds=[torch.randn(length + 20 * n, 32, generator=generator).to(dtype) for n in range(size)],
        is_prior=[is_prior] * size,
        masks=None,
        names=[f"{number}.png" for number in range(size)],
    )


def gradients(transformer, parameters, cfg, batch):
    """Backpropagate one loss."""
    transformer.train()
    z.training_loss(transformer, batch, cfg).mean().backward()
    return [parameter.grad.clone() for parameter in parameters]


def test_lean_layers_save_less_and_give_the_same(model, make_config, monkeypatch):
    """In fp32, loss and gradients are equal up to rounding; in bf16, they differ as bf16 does from fp32."""
    found = {}
    for precision, is_lean in itertools.product(("no", "bf16"), (True, False)):
        cfg, dtype = make_config(mixed_precision=precision), z.DTYPES[precision]
        with monkeypatch.context() as patch:
            if not is_lean:
                patch.setattr(z, "LEAN", {})
            transformer, parameters = with_lora(model, cfg, dtype, b_std=0.1)
        lean = {type(module).__name__ for module in transformer.modules() if type(module).__name__.startswith("Lean")}
        assert lean == ({"LeanRMSNorm", "LeanFeedForward", "LeanLora"} if is_lean else set())
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_lean and precision == "bf16"):
            found[precision, is_lean] = (
                gradients(transformer, parameters, cfg, make_batch(dtype=dtype)),
                saved_bytes(transformer, cfg),
            )
    for (a, _), (b, _), bound in (
        (found["no", True], found["no", False], 1e-5), (found["bf16", True], found["no", False], 0.1),
    ):  # fmt: skip
        assert max(float((x - y).norm() / (y.norm() + 1e-9)) for x, y in zip(a, b)) < bound
    assert found["bf16", True][1] < 0.7 * found["bf16", False][1] and found["no", True][1] < found["no", False][1]


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "nf4"])
def test_the_main_stream_has_the_training_precision(name, model, make_config):
    """Latents that entered in fp32 would make everything fp32."""
    seen, cfg = [], make_config(mixed_precision="bf16", quantization=None if name == "bf16" else name)
    transformer, _ = with_lora(model, cfg, torch.bfloat16)
    transformer.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0][0].dtype, inputs[1].dtype)))
    z.training_loss(transformer, make_batch(dtype=torch.bfloat16), cfg)
    assert seen == [(torch.bfloat16, torch.float32)], "noise levels keep their precision"


DIAL = {
    "all": {"gradient_checkpointing": True}, "attention": {"checkpoint_blocks": "attention"},
    "0": {"checkpoint_blocks": "0"}, "1": {"checkpoint_blocks": "1"}, "2": {"checkpoint_blocks": "2"},
}  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_equal_gradients(dropout, model, make_config):
    """The dial saves more or less, and changes nothing; all main blocks means the refiners, too."""
    cfg, found, saved = make_config(lora_dropout=dropout), {}, {}
    for name, changes in {"none": {}, **DIAL}.items():
        transformer, parameters = with_lora(model, dataclasses.replace(cfg, **changes), b_std=0.1)
        torch.manual_seed(0)
        found[name] = gradients(transformer, parameters, cfg, make_batch())
        saved[name] = saved_bytes(transformer, cfg)
    for name in DIAL:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found["none"], found[name])), name
    assert saved["none"] == saved["0"] > saved["1"] > saved["2"] == saved["all"]
    assert saved["none"] > saved["attention"] > saved["all"]


# =====================================================================================================================
# Quantized weights
# =====================================================================================================================

STORAGES = {  # settings, and the largest allowed size of the blocks' linear layers, relative to bf16
    "fp8": ({"quantization": "fp8"}, 0.56),
    "int8": ({"quantization": "int8"}, 0.56),
    "nf4": ({"quantization": "nf4"}, 0.3),
    "fp8 training": ({"do_fp8_training": True}, 0.56),
}


@pytest.fixture(autouse=True)
def _bitsandbytes_on_cpu(request):
    """`--quantization nf4` is diffusers' and bitsandbytes', which diffusers refuses without a GPU."""
    if "without_a_gpu" not in request.node.name:
        request.getfixturevalue("bitsandbytes_on_cpu")


@pytest.fixture(autouse=True)
def _fp8_products_on_cpu(monkeypatch):
    """Replace the fp8 matmul of a torch that has it for GPUs only."""

    def scaled_mm(left, right, left_scale, _, right_scale, __, output_dtype):
        return ((left.float() * left_scale) @ (right.float() * right_scale)).to(output_dtype)

    if NO_FP8_PRODUCTS:
        monkeypatch.setattr(nn.functional, "scaled_mm", scaled_mm)


def frozen_layers(transformer):
    """The quantized layers by name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, z.FrozenLinear)}


def stored_tensors(layer):
    """Return the tensors of a quantized weight."""
    return (
        (layer.weight.qdata, layer.weight.scale)
        if hasattr(layer.weight, "qdata")
        else (layer.weight.data, layer.weight.quant_state.absmax)
    )


def restored(layer, dtype=torch.bfloat16):
    """Return a quantized weight as its matmul uses it."""
    return z.dequantize(layer.weight, dtype)


@pytest.mark.parametrize("name", STORAGES)
def test_linear_layers_of_the_blocks_are_stored_small(name, model, make_config):
    changes, share = STORAGES[name]
    small = z.load_transformer(model, make_config(**changes), torch.bfloat16)
    plain = dict(z.load_transformer(model, FP32, torch.bfloat16).named_parameters())
    layers, inside = frozen_layers(small), re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\..*")
    linear = [n for n, p in plain.items() if n.endswith("weight") and p.dim() == 2 and inside.fullmatch(n)]
    assert sorted(f"{n}.weight" for n in layers) == sorted(linear)
    stored = sum(p.numel() * p.element_size() for m in layers.values() for p in stored_tensors(m))
    assert stored <= share * sum(2 * plain[n].numel() for n in linear)
    assert not any(p.requires_grad or p.is_meta for p in small.parameters()) and small.dtype == torch.bfloat16
    for n, parameter in small.named_parameters():
        if n in plain and n not in linear:
            assert torch.equal(parameter, plain[n]), n
    for n, layer in layers.items():
        weight = restored(layer)
        error = (weight.float() - plain[f"{n}.weight"].float()).abs().mean() / plain[
            f"{n}.weight"
        ].float().abs().mean()
        assert error < {"int8": 0.01, "nf4": 0.12}.get(name, 0.04) and weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", STORAGES)
def test_gradients_of_quantized_layers(name, model, make_config, fp8_for_few_rows):
    """Exact for stored weights, up to fp8's rounding for fp8 products; with checkpointing the same."""
    changes, _ = STORAGES[name]
    layer = frozen_layers(z.load_transformer(model, make_config(**changes), torch.float32))["layers.0.attention.to_q"]
    weight = restored(layer, torch.float32)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    product = layer(x)
    product.backward(torch.cos(product.detach()), retain_graph=True)
    expected = x.detach() @ weight.T
    distance = lambda a, b: ((a - b).norm() / b.norm()).item()  # noqa: E731
    tolerance = 0.06 if name == "fp8 training" else 1e-6
    assert distance(product, expected) < tolerance
    assert distance(x.grad, torch.cos(product.detach()) @ weight) < tolerance
    cfgs = [make_config(**changes, gradient_checkpointing=is_on) for is_on in (False, True)]
    found = [gradients(*with_lora(model, cfg, b_std=0.1), cfg, make_batch()) for cfg in cfgs]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found))


@pytest.fixture
def fp8_for_few_rows(monkeypatch):
    """Multiply in fp8 however few the rows are; the tiny model has few tokens."""
    monkeypatch.setattr(z, "MIN_FP8_ROWS", 1)


def test_few_rows_are_not_multiplied_in_fp8(model, make_config, monkeypatch):
    """cuBLAS refuses them, as a caption of 32 tokens in front of a wide layer."""
    multiplied, product = [], z.multiply_fp8
    monkeypatch.setattr(z, "multiply_fp8", lambda *args: multiplied.append(len(args[0])) or product(*args))
    layer = frozen_layers(z.load_transformer(model, make_config(do_fp8_training=True), torch.bfloat16))[
        "layers.0.attention.to_q"
    ]
    for rows in (255, 256):
        x = torch.randn(1, rows, 64, dtype=torch.bfloat16, requires_grad=True)
        out = layer(x)
        out.backward(torch.ones_like(out))
        assert (out.detach() - x.detach() @ restored(layer).T).norm() < 0.06 * out.norm(), rows
        assert (x.grad - torch.ones_like(out) @ restored(layer)).norm() < 0.06 * x.grad.norm(), rows
    assert multiplied == [256, 256], "forward and backward, of 256 rows only"


def test_fp8_training_multiplies_in_fp8_where_the_hardware_can(model, make_config, monkeypatch, fp8_for_few_rows):
    multiplied = []
    product = z.multiply_fp8
    monkeypatch.setattr(z, "multiply_fp8", lambda *args: multiplied.append(args[0].dtype) or product(*args))
    layers = frozen_layers(z.load_transformer(model, make_config(do_fp8_training=True), torch.bfloat16))
    for name, layer in layers.items():
        multiplied.clear()
        x = torch.randn(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        fits = layer.in_features % 16 == layer.out_features % 16 == 0
        assert multiplied == [torch.float8_e4m3fn] * (2 if fits else 0), name
    assert {layer.out_features % 16 for layer in layers.values()} != {0}, "the tiny model has both kinds"


def saved_bytes(transformer, cfg):
    """Return the bytes that a forward pass saves for the backward pass, besides the parameters."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in transformer.parameters() if not hasattr(p, "qdata")}

    def keep(tensor):
        if hasattr(tensor, "qdata"):
            return tensor  # a parameter as it is stored
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        z.training_loss(transformer.train(), make_batch(dtype=transformer.dtype), cfg)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", STORAGES)
def test_the_backward_pass_keeps_no_more_than_in_bf16(name, model, make_config, fp8_for_few_rows):
    cfg = make_config(mixed_precision="bf16")
    plain = saved_bytes(with_lora(model, cfg, torch.bfloat16)[0], cfg)
    small = make_config(**STORAGES[name][0], mixed_precision="bf16")
    assert 0 < saved_bytes(with_lora(model, small, torch.bfloat16)[0], small) <= plain


@pytest.mark.parametrize("name", STORAGES)
def test_the_model_never_exists_whole_in_its_own_precision(name, model, make_config, monkeypatch):
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
    from diffusers.quantizers.torchao.torchao_quantizer import TorchAoHfQuantizer

    most = []
    for kind in (BnB4BitDiffusersQuantizer, TorchAoHfQuantizer):
        create = kind.create_quantized_param

        def watched(self, transformer, *args, create=create, **options):
            create(self, transformer, *args, **options)
            plain = [p for n, p in transformer.named_parameters() if "layers" in n and p.dim() == 2 and not p.is_meta]
            most.append(sum(type(p) is nn.Parameter for p in plain))

        monkeypatch.setattr(kind, "create_quantized_param", watched)
    z.load_transformer(model, make_config(**STORAGES[name][0]), torch.bfloat16)
    assert len(most) > 20 and max(most) == 0


def test_a_quantized_model_is_read_from_shards_and_its_gaps_are_named(model, make_config, tmp_path):
    from diffusers import ZImageTransformer2DModel

    whole = z.load_transformer(model, make_config(quantization="int8"), torch.bfloat16)
    shutil.copytree(model, tmp_path / "m")
    folder = tmp_path / "m" / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    ZImageTransformer2DModel.from_pretrained(model / "transformer").save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    sharded = z.load_transformer(tmp_path / "m", make_config(quantization="int8"), torch.bfloat16)
    pairs = zip(frozen_layers(whole).values(), frozen_layers(sharded).values())
    assert all(torch.equal(restored(a), restored(b)) for a, b in pairs)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    save_file({name: torch.ones(3) for name in tensors}, first, {"format": "pt"})
    with pytest.raises(UserError, match=r"transformer cannot be loaded: "):
        z.load_transformer(tmp_path / "m", make_config(quantization="int8"), torch.bfloat16)
    name = next(name for name in tensors if "layers.0" in name or "refiner.0" in name)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, first, {"format": "pt"})
    with pytest.raises(UserError, match=f"transformer has no weights for {name}; download it again"):
        z.load_transformer(tmp_path / "m", make_config(quantization="int8"), torch.bfloat16)
    save_file(tensors, first, {"format": "pt"})
    second.unlink()
    with pytest.raises(UserError, match=f"transformer cannot be loaded: .*{second.name}"):
        z.load_transformer(tmp_path / "m", make_config(quantization="int8"), torch.bfloat16)


def test_quantized_runs_lose_nothing(make_config, tmp_path, fp8_for_few_rows):
    """After 20 steps the loss is within 3% of the bf16 loss."""
    ends = {}
    for name, (changes, _) in {"bf16": ({}, 1), **STORAGES}.items():
        cfg = make_config(
            output_dir=str(tmp_path / name), max_train_steps=20, mixed_precision="bf16", train_batch_size=2, **changes
        )
        run(cfg)
        ends[name] = losses_of(cfg)[-1]
    assert {name: end for name, end in ends.items() if abs(end / ends["bf16"] - 1) > 0.03} == {}
    assert len(set(ends.values())) == len(ends), "each one is another computation"


def test_fp8_training_is_refused_where_its_products_fail(model, make_config, monkeypatch):
    """As on a GPU below compute capability 8.9; the product that is tried is the one that cuBLAS supports least."""
    tried, empty, product = [], z.make_empty_transformer(model), z.multiply_fp8
    monkeypatch.setattr(z, "multiply_fp8", lambda *args: tried.append(args[0].shape) or product(*args))
    z.check_hardware(make_config(do_fp8_training=True), empty)
    assert tried == [(256, 10240)]

    def fail(*_):
        raise RuntimeError("only supported with compute capability 8.9")

    monkeypatch.setattr(z, "multiply_fp8", fail)
    sentence = (
        "--do_fp8_training does not work here: only supported with compute capability 8.9; --quantization fp8 works"
    )
    with pytest.raises(UserError, match=sentence):
        z.check_hardware(make_config(do_fp8_training=True), empty)
    z.check_hardware(make_config(quantization="fp8"), empty)


@pytest.fixture
def bitsandbytes_on_cpu(monkeypatch):
    """Bypass diffusers' check that bitsandbytes has a GPU; bitsandbytes itself works on a CPU."""
    if torch.cuda.is_available():
        return
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, _: {"": "cpu"})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_the_readmes_bitsandbytes_files(bits, precision, model, make_config, tmp_path, bitsandbytes_on_cpu):
    file = tmp_path / "bnb.json"
    file.write_text(block_with(f"load_in_{bits}bit", JSONS))
    cfg = make_config(bnb_quantization_config_path=str(file), mixed_precision=precision)
    dtype = z.DTYPES[precision]
    layer = z.load_transformer(model, cfg, dtype).layers[0].attention.to_q
    assert isinstance(layer, z.FrozenLinear) and layer.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert bits == 8 or (layer.weight.quant_state.dtype == dtype and layer.weight.quant_state.nested)
    plain = z.load_transformer(model, make_config(mixed_precision=precision), dtype).layers[0].attention.to_q.weight
    restored = z.dequantize(layer.weight, dtype)
    assert restored.dtype == dtype and (restored - plain).norm() / plain.norm() < {4: 0.1, 8: 0.01}[bits]
    run(cfg)
    run(dataclasses.replace(cfg, output_dir=str(tmp_path / "plain"), bnb_quantization_config_path=None))
    assert losses_of(cfg)[-1] == pytest.approx(
        losses_of(dataclasses.replace(cfg, output_dir=str(tmp_path / "plain")))[-1], rel=0.03
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bitsandbytes_without_a_gpu_gets_a_sentence(make_config, model, tmp_path):
    (tmp_path / "bnb.json").write_text(JSONS[0])
    (tmp_path / "odd.json").write_text('{"load_in_4bit": true, "double": true}')
    with pytest.raises(
        UserError, match="--bnb_quantization_config_path: unknown double; there are load_in_8bit, load_in_4bit, "
    ):
        z.check_hardware(
            make_config(bnb_quantization_config_path=str(tmp_path / "odd.json")), z.make_empty_transformer(model)
        )
    with pytest.raises(UserError, match="cannot be quantized here: No GPU found.*--quantization int8 and fp8"):
        z.check_hardware(
            make_config(bnb_quantization_config_path=str(tmp_path / "bnb.json")), z.make_empty_transformer(model)
        )


def test_8_bit_adam_that_cannot_step_gets_a_sentence(make_config, model, monkeypatch):
    import bitsandbytes

    def fail(*_):
        raise NotImplementedError("no kernel")

    cfg = make_config(use_8bit_adam=True)
    z.check_hardware(cfg, z.make_empty_transformer(model))
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", fail)
    with pytest.raises(
        UserError, match="--use_8bit_adam: bitsandbytes does not support it on this machine: no kernel; remove"
    ):
        z.check_hardware(cfg, z.make_empty_transformer(model))
    z.check_hardware(make_config(**PRODIGY, use_8bit_adam=True), z.make_empty_transformer(model))


def test_8_bit_adam_keeps_its_state_in_8_bits(make_config):
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = z.make_optimizer([parameter], make_config(use_8bit_adam=True))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8


def test_attention_backends(make_config, model):
    assert make_config(attention_backend="_native_math").attention_backend == "_native_math"
    assert make_config(enable_npu_flash_attention=True).attention_backend == "_native_npu"
    for name in ("_native_math", "native"):  # the second run does not keep what the first one set for the process
        transformer = z.load_transformer(model, make_config(attention_backend=name), torch.float32)
        backends = {m.processor._attention_backend.value for m in transformer.modules() if hasattr(m, "processor")}
        assert backends == {name}
    with pytest.raises(UserError, match="--attention_backend fast: `backend='fast'` must be one of the following"):
        z.check_hardware(make_config(attention_backend="fast"), z.make_empty_transformer(model))
    with pytest.raises(UserError, match="--attention_backend flex: .*it does not work here; remove the flag"):
        z.check_hardware(
            make_config(attention_backend="flex"), z.make_empty_transformer(model)
        )  # has no backward pass on a CPU


def test_an_attention_without_gradient_is_refused(make_config, model, monkeypatch):
    """A fake kernel like sage's, whose output is detached from its inputs."""
    attend = z.dispatch_attention_fn
    monkeypatch.setattr(z, "dispatch_attention_fn", lambda *inputs, **mask: attend(*inputs, **mask).detach())
    with pytest.raises(UserError, match="--attention_backend native: .*does not require grad"):
        z.check_hardware(make_config(), z.make_empty_transformer(model))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_attention_that_ignores_padding_is_refused(precision, make_config, model, monkeypatch):
    """A fake kernel like xformers' in diffusers, which attends to what a boolean mask excludes; and one like flash."""
    attend, calls = z.dispatch_attention_fn, []

    def ignoring(*inputs, attn_mask):
        calls.append(attn_mask)
        return attend(*inputs, attn_mask=attn_mask if len(calls) == 1 else 1.0 * attn_mask)

    def refusing(*inputs, attn_mask):
        calls.append(attn_mask)
        if len(calls) > 1:
            raise ValueError("`attn_mask` is not supported for flash-attn 2.")
        return attend(*inputs, attn_mask=attn_mask)

    cfg, empty = (
        make_config(mixed_precision=precision, attention_backend="_native_math"),
        z.make_empty_transformer(model),
    )
    z.check_hardware(cfg, empty)
    monkeypatch.setattr(z, "dispatch_attention_fn", ignoring)
    with pytest.raises(UserError, match="--attention_backend _native_math attends to the padding of captions; remove"):
        z.check_hardware(cfg, empty)
    calls.clear()
    monkeypatch.setattr(z, "dispatch_attention_fn", refusing)
    with pytest.raises(
        UserError, match="--attention_backend _native_math: `attn_mask` is not supported .*; it does not"
    ):
        z.check_hardware(cfg, empty)


# =====================================================================================================================
# Objective
# =====================================================================================================================


class Oracle(nn.Module):
    """A transformer that returns a given velocity, in Z-Image's conventions, and records the call."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, x, t, cap_feats, return_dict):
        self.call = (x, t, cap_feats)
        return (list((-self.velocity).unsqueeze(2).unbind(0)),)


def test_one_euler_step_along_the_true_velocity_recovers_the_latents():
    batch, noise = make_batch(3), torch.randn(3, 16, 4, 6)
    sigmas = torch.tensor([0.1, 0.5, 1.0])
    noisy = z.mix_noise(batch.latents, noise, sigmas)
    oracle = Oracle(noise - batch.latents)
    velocity = z.predict_velocity(oracle, noisy, sigmas, batch.prompt_embeds)
    assert torch.allclose(noisy - sigmas.view(-1, 1, 1, 1) * velocity, batch.latents, atol=1e-6)
    x, t, cap_feats = oracle.call
    assert [tuple(frame.shape) for frame in x] == [(16, 1, 4, 6)] * 3 and torch.equal(t, 1 - sigmas)
    assert z.flow_matching_loss(velocity, noise - batch.latents, torch.ones(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("steps", [1, 3])
def test_velocity_and_euler_steps_agree_with_the_pipeline(steps, model):
    """Our velocity, driven by the scheduler, gives the pipeline's latents."""
    pipe = ZImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    embeddings = encode(model, "dog")
    options = {"height": 32, "width": 48, "num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "latent"}
    expected = pipe(prompt_embeds=[embeddings], latents=latents.clone(), **options).images
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model / "scheduler")
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index]
        with torch.no_grad():
            velocity = z.predict_velocity(pipe.transformer, latents, sigma.view(1), [embeddings])
        by_hand = latents + (scheduler.sigmas[index + 1] - sigma) * velocity
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        assert torch.allclose(by_hand, latents, atol=1e-6)
    assert torch.allclose(latents, expected, atol=1e-5)


def test_captions_must_match_images():
    with pytest.raises(AssertionError, match="silently drop the surplus"):
        z.predict_velocity(
            Oracle(torch.zeros(2, 16, 4, 6)), torch.zeros(2, 16, 4, 6), torch.zeros(2), [torch.zeros(3, 32)]
        )


def sigmas_of(make_config, count=2000, **changes):
    """The noise levels of the first examples."""
    cfg = make_config(**{"timestep_shift": "1", **changes})
    return z.noise_levels([z.sample_quantile(cfg, number) for number in range(count)], cfg)


@pytest.mark.parametrize("stratified", [False, True])
def test_noise_levels(stratified, make_config):
    make_config = functools.partial(make_config, stratified_noise=stratified)
    middle = sigmas_of(make_config)
    assert abs(middle.mean() - 0.5) < 0.02 and abs(((middle < 0.2).float().mean()) - 0.08) < 0.02
    assert len(middle.unique()) > 1990, "noise levels must be continuous"
    assert sigmas_of(make_config, logit_mean=1.0).mean() > 0.65
    assert sigmas_of(make_config, logit_std=0.1).std() < 0.05
    uniform = sigmas_of(make_config, weighting_scheme="none")
    assert abs((uniform < 0.2).float().mean() - 0.2) < 0.03
    assert not torch.equal(
        sigmas_of(make_config, weighting_scheme="mode"),
        sigmas_of(make_config, weighting_scheme="mode", mode_scale=0.5),
    )
    shifted = sigmas_of(make_config, weighting_scheme="none", timestep_shift="3")
    assert abs((shifted > 0.8).float().mean() - 0.43) < 0.04
    assert torch.equal(sigmas_of(make_config, count=10), middle[:10]), "a level depends on its example alone"


def test_noise_levels_are_those_of_the_paper(make_config):
    """Quantiles of both distributions, from a million samples by diffusers."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    quantiles = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    for scheme, mean, std, scale in (
        ("logit_normal", 0.5, 0.8, 1.0),
        ("mode", 0.0, 1.0, 0.8),
        ("none", 0.0, 1.0, 1.0),
    ):
        generator = torch.Generator().manual_seed(0)
        density = compute_density_for_timestep_sampling(scheme, 10**6, mean, std, scale, generator=generator)
        cfg = make_config(
            weighting_scheme=scheme, logit_mean=mean, logit_std=std, mode_scale=scale, timestep_shift="1"
        )
        levels = z.noise_levels(quantiles.tolist(), cfg).sort().values  # mode turns them around
        assert torch.allclose(levels, density.double().quantile(quantiles).float(), atol=3e-3), scheme


def test_stratified_noise_covers_all_levels_in_every_window(make_config):
    """Of any 8 examples in a row, the quantiles are never far apart; independent ones leave large gaps."""
    gaps = {}
    for stratified in (True, False):
        cfg = make_config(stratified_noise=stratified)
        quantiles = [z.sample_quantile(cfg, number) for number in range(1000)]
        windows = [sorted([0.0, *quantiles[start : start + 8], 1.0]) for start in range(990)]
        gaps[stratified] = max(b - a for window in windows for a, b in itertools.pairwise(window))
    assert gaps[True] < 0.25 and gaps[False] > 0.5, gaps
    starts = {z.sample_quantile(make_config(seed=seed), 0) for seed in range(20)}
    assert len(starts) == 20 and max(starts) - min(starts) > 0.5, "the sequence starts anywhere"


def test_prompts_are_dropped_for_a_share_of_the_instance_examples(make_config):
    cfg = make_config(caption_dropout=0.1)
    kept = [z.choose_prompt(sample(0), cfg, number) == sample(0).prompt for number in range(2000)]
    assert 0.08 < 1 - sum(kept) / 2000 < 0.12
    assert all(z.choose_prompt(sample(0, is_prior=True), cfg, number) for number in range(100))
    assert "" in z.needed_prompts([sample(0)], cfg) and "" not in z.needed_prompts([sample(0)], make_config())


def test_the_trigger_word_is_in_every_prompt(images, make_config):
    for number, caption in enumerate(("a [trigger] in a box, [trigger]", "一只sks狗", "two skses", "")):
        (images / f"{number}.txt").write_text(caption, encoding="utf-8")
    samples = z.plan_samples(make_config(trigger_word="sks", instance_prompt="a photo"))
    expected = ["a sks in a box, sks", "一只sks狗", "sks two skses", "sks", "sks a photo"]
    assert [sample.prompt for sample in samples] == expected
    assert z.trained_prompt(make_config(trigger_word="sks", instance_prompt="a photo"), samples) == "sks a photo"
    samples = z.plan_samples(make_config(trigger_word="<s+>", instance_prompt="a [trigger]"))
    assert [samples[0].prompt, samples[4].prompt] == ["a <s+> in a box, <s+>", "a <s+>"]
    cases = {
        "[trigger]s playing": "skss playing", "тsks": "sks тsks", "sksé": "sks sksé", "sks'猫": "sks'猫",
        "รูปsksแมว": "รูปsksแมว", "猫sksの写真": "猫sksの写真", "_sks": "sks _sks", "sks-dog": "sks-dog",
    }  # fmt: skip
    assert {text: z.with_trigger(text, "sks") for text in cases} == cases
    assert z.with_trigger("a <s+> dog", "<s+>") == "a <s+> dog"
    with pytest.raises(UserError, match=r"the prompt of .*0.png contains \[trigger\]; set --trigger_word"):
        z.plan_samples(make_config(instance_prompt="p"))
    for name in ("class_prompt", "final_validation_prompt"):
        with pytest.raises(UserError, match=rf"--{name}: \[trigger\] is replaced in captions and --instance_prompt"):
            make_config(**{name: "a [trigger]"})
    classes = {"prior_preservation": "images", "class_data_dir": str(images), "class_prompt": "dog"}
    (images / "0.txt").write_text("one cat")
    prompts = {one.prompt for one in z.plan_samples(make_config(trigger_word="sks", **classes)) if one.is_prior}
    assert {"one cat", "dog"} < prompts and "sks dog" not in prompts


def test_a_validation_prompt_without_the_trigger_word_is_pointed_out(make_config):
    words = "no --validation_prompt contains the --trigger_word sks, which is put into training prompts only"
    for prompts, is_told in ((("a dog", "a cat"), True), ("skses", True), (("a dog", "sks"), False), (None, False)):
        assert (words in z.advice(make_config(trigger_word="sks", validation_prompt=prompts))) == is_told
    assert not any("trigger" in line for line in z.advice(make_config(validation_prompt=("a dog",))))


def test_one_validation_prompt_needs_no_tuple(make_config):
    """As in a notebook; it is one prompt, not one for each letter."""
    assert make_config(validation_prompt="a dog").validation_prompt == ("a dog",)


def test_shift_is_the_schedulers(model, make_config, tmp_path):
    cfg = z.resolve_timestep_shift(make_config(timestep_shift="scheduler", weighting_scheme="none"), model)
    assert z.resolve_timestep_shift(make_config(timestep_shift="2.5"), model).timestep_shift == "2.5"
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(tmp_path / "m" / "scheduler")
    with pytest.raises(
        UserError, match="--timestep_shift scheduler: this model has no shift that fits all image sizes"
    ):
        z.resolve_timestep_shift(make_config(timestep_shift="scheduler"), tmp_path / "m")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    plain = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64).tolist()
    assert torch.allclose(z.noise_levels(plain, cfg), scheduler.sigmas, atol=1e-6)


def test_loss_weights():
    sigmas = torch.tensor([0.1, 0.5, 1.0])
    assert torch.allclose(z.loss_weights("sigma_sqrt", sigmas), torch.tensor([100.0, 4.0, 1.0]))
    assert z.loss_weights("logit_normal", sigmas).tolist() == [1, 1, 1]
    assert torch.allclose(z.loss_weights("cosmap", sigmas), 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)))


def test_the_smallest_noise_level_keeps_weights_finite(make_config):
    sigmas = sigmas_of(make_config, logit_mean=-50.0, count=5)
    assert sigmas.min() >= 1e-3 and z.loss_weights("sigma_sqrt", sigmas).isfinite().all()


def test_class_images_count_by_their_weight(make_config):
    batch = make_batch(3)
    oracle = Oracle(torch.zeros_like(batch.latents))

    def loss(is_prior, weight):
        marked = batch._replace(is_prior=is_prior)
        return z.training_loss(oracle, marked, make_config(prior_loss_weight=weight)).mean()

    full = loss([False, False, False], 0.3)
    assert torch.isclose(loss([True, True, True], 0.3), 0.3 * full)
    alone = [loss([n != m for n in range(3)], 0.0) for m in range(3)]
    assert torch.isclose(sum(alone), full) and loss([True, False, True], 1.0) == full


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_base_model_is_the_target_of_preservation(quantization, model, make_config):
    """Nothing to learn at first; then the pull back to the base model, computed here with a model of its own."""
    cfg = make_config(prior_preservation="base", class_prompt="dog", quantization=quantization)
    transformer, parameters = with_lora(model, cfg)
    batch = make_batch(2)._replace(is_prior=[True, True])
    assert z.training_loss(transformer, batch, cfg).tolist() == [0, 0]
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1
    loss = z.training_loss(transformer, batch, cfg).mean()
    base = z.load_transformer(model, cfg, torch.float32).requires_grad_(False)
    noise = z.sample_noise(batch.seeds, batch.latents.shape[1:])
    sigmas = batch.sigmas
    with torch.no_grad():
        noisy = z.mix_noise(batch.latents, noise, sigmas)
        here, there = (z.predict_velocity(one, noisy, sigmas, batch.prompt_embeds) for one in (transformer, base))
    assert loss.item() == pytest.approx((here - there).square().mean().item(), rel=1e-4) and loss.item() > 1e-4
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)
    instance = batch._replace(is_prior=[False, False])
    plain = z.training_loss(transformer, instance, make_config(quantization=quantization))
    assert torch.equal(z.training_loss(transformer, instance, cfg), plain), "instance images learn as before"


def test_preservation_by_the_base_model_puts_the_class_in_place_of_the_trigger(images, make_config):
    (images / "0.txt").write_text("a sks dog in a box")
    (images / "1.txt").write_text("two [trigger]s")
    cfg = make_config(prior_preservation="base", class_prompt="dog", trigger_word="sks dog", instance_prompt="photo")
    samples = z.plan_samples(cfg)
    assert [one.prompt for one in samples if one.is_prior] == ["a dog in a box", "dog", *["dog photo"] * 3]
    (images / "1.txt").unlink()
    assert [one.digest for one in samples if one.is_prior] == [one.digest for one in samples if not one.is_prior]
    samples = z.plan_samples(dataclasses.replace(cfg, trigger_word=None))
    assert {one.prompt for one in samples if one.is_prior} == {"dog"}
    with pytest.raises(UserError, match="--prior_preservation base requires --class_prompt"):
        make_config(prior_preservation="base")


@pytest.mark.parametrize("kind", ["-masklabel.png", ".mask.png", "alpha"])
@pytest.mark.parametrize("bucket", [(32, 32), (32, 64), (64, 32)])
def test_a_mask_follows_its_image(kind, bucket, make_config, tmp_path):
    """The image shows what its mask says: after crop and flip, it still does, at an eighth of the size."""
    gray = Image.linear_gradient("L").rotate(30).resize((90, 70))
    (tmp_path / "i").mkdir()
    gray.convert("RGB").save(tmp_path / "i" / "0.png")
    if kind == "alpha":
        visible = gray.convert("RGB")
        visible.putalpha(gray)
        visible.save(tmp_path / "i" / "0.png")
    else:
        gray.save(tmp_path / "i" / f"0{kind}")
    cfg = make_config(instance_data_dir=str(tmp_path / "i"), masked_loss=True)
    (planned,) = z.plan_samples(cfg)
    shown = dataclasses.replace(planned, bucket=bucket)
    if kind == "alpha":  # which load_image composes on white: compare with an opaque copy
        gray.convert("RGB").save(tmp_path / "opaque.png")
        digest = z.sha256((tmp_path / "opaque.png").read_bytes())
        opaque = dataclasses.replace(shown, path=tmp_path / "opaque.png", digest=digest)
    for is_flipped, centering in itertools.product((False, True), ((0.5, 0.5), (0.0, 1.0), (1.0, 0.2))):
        mask = z.load_mask(shown, is_flipped, centering, 0.0)
        pixels = z.load_pixels(opaque if kind == "alpha" else shown, is_flipped, centering)
        expected = nn.functional.avg_pool2d(pixels.mean(0, keepdim=True) / 2 + 0.5, 8)
        assert mask.shape == (1, bucket[0] // 8, bucket[1] // 8) and (mask - expected).abs().max() < 0.05
    floor = z.load_mask(shown, False, (0.5, 0.5), 0.2)
    assert floor.min() >= 0.2 and torch.allclose(floor, 0.2 + 0.8 * z.load_mask(shown, False, (0.5, 0.5), 0.0))


def test_the_loss_counts_where_the_mask_is_white():
    velocity, target, ones = torch.randn(2, 16, 4, 6), torch.zeros(2, 16, 4, 6), torch.ones(2)
    masks = torch.ones(2, 1, 4, 6)
    plain = z.flow_matching_loss(velocity, target, ones, None)
    assert torch.allclose(z.flow_matching_loss(velocity, target, ones, masks), plain)
    masks[:, :, :, 3:] = 0
    half = z.flow_matching_loss(velocity[..., :3], target[..., :3], ones, None)
    assert torch.allclose(z.flow_matching_loss(velocity, target, ones, masks), half), "an image counts as one"
    masks[0] = 0
    assert z.flow_matching_loss(velocity[:1], target[:1], ones[:1], masks[:1]) == 0, "an empty mask is no NaN"


def test_masks_that_do_not_fit_are_refused_and_missing_ones_named(images, make_config, capsys):
    for number in range(4):
        Image.new("L", (64, 64), 255).save(images / f"{number}-masklabel.png")
    cfg = make_config(masked_loss=True)
    assert [sample.mask and sample.mask.name for sample in z.plan_samples(cfg)] == [
        *(f"{number}-masklabel.png" for number in range(4)), None,
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert f"note: {images / '4.png'} has no mask" in said and "masklabel" not in said
    assert all(sample.mask is None for sample in z.plan_samples(make_config()))
    Image.new("L", (32, 64)).save(images / "0-masklabel.png")
    with pytest.raises(UserError, match="--masked_loss: .*0-masklabel.png does not match its upright image in size;"):
        z.plan_samples(cfg)
    (images / "0-masklabel.png").write_text("nonsense")
    with pytest.raises(UserError, match="--masked_loss: .*0-masklabel.png is not an image"):
        z.plan_samples(cfg)


def test_runs_with_masks_differ_by_the_masks_and_resume_exactly(images, make_config, tmp_path):
    for number in range(5):
        draw(images / f"{number}.mask.png", (64, 64), (0, 0, 0))
    common = {"max_train_steps": 2, "checkpointing_steps": 1, "cache_latents": False, "random_flip": True}
    plain = make_config(output_dir=str(tmp_path / "plain"), **common)
    masked = dataclasses.replace(plain, masked_loss=True, output_dir=str(tmp_path / "masked"))
    weak = dataclasses.replace(masked, mask_background=0.9, output_dir=str(tmp_path / "weak"))
    for cfg in (plain, masked, weak):
        run(cfg)
    assert len({lora_bytes(cfg) for cfg in (plain, masked, weak)}) == 3
    whole = lora_bytes(masked)
    run(dataclasses.replace(masked, resume_from_checkpoint="checkpoint-1"))
    assert lora_bytes(masked) == whole
    Image.new("L", (64, 64), 255).save(images / "2.mask.png")
    with pytest.raises(UserError, match="different settings or data: images, captions: 2.png"):
        run(dataclasses.replace(masked, resume_from_checkpoint="checkpoint-1"))


def test_noise_follows_from_the_seed_of_the_example_alone():
    together = z.sample_noise([5, 6, 7], torch.Size((16, 4, 4)))
    assert torch.equal(together[1:2], z.sample_noise([6], torch.Size((16, 4, 4))))
    assert abs(z.sample_noise(list(range(50)), torch.Size((16, 8, 8))).std() - 1) < 0.02


# =====================================================================================================================
# Training
# =====================================================================================================================


def run(cfg):
    """Run main with fresh accelerate state, as a new process would have."""
    AcceleratorState._reset_state(True)
    return main(cfg)


def test_only_the_lora_moves_and_all_of_it(model, make_config, tmp_path):
    """In fp32 under bf16, plain AdamW at 1e-4 moves every element; in bf16 it would move a tenth."""
    run(
        make_config(
            mixed_precision="bf16", learning_rate=1e-4, checkpointing_steps=1, max_train_steps=3, adam_weight_decay=0
        )
    )
    first, last = (load_file(tmp_path / "out" / f"checkpoint-{n}" / "state.safetensors") for n in (1, 3))
    assert {t.dtype for t in last.values()} == {torch.float32}
    first = {name: tensor for name, tensor in first.items() if name.startswith("lora/")}
    moved = torch.cat([(first[n] != last[n]).flatten() for n in first if "lora_A" in n])
    assert moved.float().mean() > 0.99


def test_batch_4_equals_4_accumulated(make_config, tmp_path):
    curves = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        cfg = make_config(
            train_batch_size=batch, gradient_accumulation_steps=accumulation, max_train_steps=6,
            output_dir=str(tmp_path / f"b{batch}"), random_flip=True, cache_latents=False,
        )  # fmt: skip
        run(cfg)
        curves.append(losses_of(cfg))
    assert len(curves[0]) == 6 and len(set(curves[0])) == 6
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-4)


TOY = HERE.parent / "shared" / "toy" / "toy-z-image"


@pytest.mark.skipif(not TOY.is_dir(), reason="needs the toy model beside the repository, in ../shared/toy")
def test_a_trained_model_learns_the_subject(make_config, tmp_path):
    """Real weights, real images: sixty steps nearly halve the loss, and the images change toward the subject."""
    z.make_demo_images(tmp_path / "badge")
    cfg = make_config(
        pretrained_model_name_or_path=str(TOY), instance_data_dir=str(tmp_path / "badge"), resolution=64, rank=16,
        instance_prompt="a sks badge", max_train_steps=60, train_batch_size=4, learning_rate=2e-3,
    )  # fmt: skip
    run(cfg)
    losses = losses_of(cfg)
    assert sum(losses[-20:]) < 0.6 * sum(losses[:10]) * 2


EXACT = {
    "accumulation, mid-epoch": {"gradient_accumulation_steps": 3, "checkpointing_steps": 2},
    "on the fly, flips, buckets, batch 2": {"cache_latents": False, "random_flip": True, "train_batch_size": 2},
    "dropout": {"lora_dropout": 0.3},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "bf16": {"mixed_precision": "bf16", "lora_alpha": 3.0},
    "8-bit Adam, 8-bit weights": {"use_8bit_adam": True, "rank": 64, "quantization": "int8"},
    "base model as prior, captions": {"prior_preservation": "base", "class_prompt": "dog", "caption_dropout": 0.3},
}


@pytest.mark.parametrize("name", EXACT)
def test_resume_is_exact(name, make_config, tmp_path, capsys):
    """Training for 2N steps, or N, resuming, and N more, gives byte-identical files."""
    whole = make_config(max_train_steps=6, output_dir=str(tmp_path / "whole"), **EXACT[name])
    half = dataclasses.replace(whole, max_train_steps=3, output_dir=str(tmp_path / "half"))
    rest = dataclasses.replace(whole, output_dir=half.output_dir, resume_from_checkpoint="latest")
    run(whole)
    run(half)
    assert lora_bytes(half) != lora_bytes(whole)
    run(rest)
    assert "after step 3" in capsys.readouterr().out
    assert lora_bytes(rest) == lora_bytes(whole)
    assert metrics_of(rest) == metrics_of(whole) and [row["step"] for row in metrics_of(rest)] == [1, 2, 3, 4, 5, 6]


def test_going_back_cuts_the_metrics_and_sets_later_checkpoints_aside(make_config, tmp_path):
    cfg = make_config(max_train_steps=4, checkpointing_steps=1)
    run(cfg)
    complete, rows = lora_bytes(cfg), metrics_of(cfg)
    with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 5, "lo')  # torn by a power cut
    run(dataclasses.replace(cfg, resume_from_checkpoint="checkpoint-2", max_train_steps=3))
    names = {path.name for path in (tmp_path / "out").glob("*checkpoint-*")}
    assert {name[:23] for name in names} == {
        "checkpoint-1", "checkpoint-2", "checkpoint-3", "superseded-checkpoint-3", "superseded-checkpoint-4",
    }  # fmt: skip
    assert metrics_of(cfg) == rows[:3]
    run(dataclasses.replace(cfg, resume_from_checkpoint="latest"))
    assert metrics_of(cfg) == rows and lora_bytes(cfg) == complete


def test_a_checkpoint_elsewhere_continues_in_a_folder_of_its_own(make_config, tmp_path):
    cfg = make_config(max_train_steps=4, checkpointing_steps=2)
    run(cfg)
    elsewhere = shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "elsewhere" / "mine")
    with pytest.raises(UserError, match="contains another run"):
        run(dataclasses.replace(cfg, resume_from_checkpoint=str(elsewhere)))
    new = dataclasses.replace(cfg, resume_from_checkpoint=str(elsewhere), output_dir=str(tmp_path / "new"))
    run(new)
    assert lora_bytes(new) == lora_bytes(cfg) and metrics_of(new) == metrics_of(cfg)[2:]


def flip_a_bit(path):
    """Flip one bit of a file, as a bad disk can."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sign(folder, state):
    """Seal a checkpoint with another state, as an attacker can."""
    z.write_tensors(folder / "state.safetensors", load_file(folder / "state.safetensors"), {"state": state})


def change_header(folder):
    """Change one character of a checkpoint's header."""
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes().replace(b"adamw", b"adamv"))


DAMAGES = {
    "one bit": lambda folder: flip_a_bit(folder / "state.safetensors"),
    "one letter of the header": change_header,
    "cut": lambda folder: os.truncate(folder / "state.safetensors", 900),
    "empty": lambda folder: os.truncate(folder / "state.safetensors", 0),
    "another one's number": lambda folder: shutil.copytree(
        folder.with_name("checkpoint-2"), folder, dirs_exist_ok=True
    ),
    "endless steps": lambda folder: sign(folder, '{"step": Infinity}'),
    "no steps": lambda folder: sign(folder, "[]"),
    "no binding": lambda folder: sign(folder, '{"step": 3, "binding": null}'),
}


def test_a_damaged_checkpoint_is_skipped_named_and_never_deleted(make_config, tmp_path, capsys):
    cfg = make_config(max_train_steps=3, checkpointing_steps=1, learning_rate=1e-3)
    run(cfg)
    out, expected = tmp_path / "out", (lora_bytes(cfg), losses_of(cfg))
    for name, damage in DAMAGES.items():
        damage(out / "checkpoint-3")
        remains = {path.name: path.read_bytes() for path in (out / "checkpoint-3").iterdir()}
        run(dataclasses.replace(cfg, resume_from_checkpoint="latest"))
        printed = capsys.readouterr().out
        assert "resuming from" in printed and "checkpoint-2, after step 2" in printed, name
        aside = re.search(r"checkpoint-3 is damaged; renamed to (\S+)", printed)[1]
        assert {path.name: path.read_bytes() for path in (out / aside).iterdir()} == remains, name
        assert (lora_bytes(cfg), losses_of(cfg)) == expected, name
    assert len(list(out.glob("superseded-checkpoint-3-*"))) == len(DAMAGES)


def test_a_checkpoint_without_its_state_is_none(make_config, tmp_path, capsys):
    """A run killed while writing or removing a checkpoint leaves the LoRA alone, or half of it."""
    cfg = make_config(max_train_steps=3, checkpointing_steps=1)
    run(cfg)
    out, expected = tmp_path / "out", (lora_bytes(cfg), losses_of(cfg))
    (out / "checkpoint-3" / "state.safetensors").unlink()
    (out / "checkpoint-3" / f".z-image-{'ab' * 16}.tmp").write_bytes(b"half")
    (out / "checkpoint-4").mkdir()
    run(dataclasses.replace(cfg, resume_from_checkpoint="latest"))
    assert "checkpoint-2, after step 2" in capsys.readouterr().out and (lora_bytes(cfg), losses_of(cfg)) == expected
    files = {path.name for path in (out / "checkpoint-3").iterdir()}
    assert files == {"pytorch_lora_weights.safetensors", "state.safetensors"} and z.read_checkpoint(
        out / "checkpoint-3"
    )
    assert z.read_sealed(out / "checkpoint-3" / "pytorch_lora_weights.safetensors") is not None


def test_a_lora_without_a_state_is_not_overwritten_by_a_fresh_run(make_config, tmp_path):
    """Someone may have kept the LoRAs, which are ready to use, and removed the large states."""
    cfg, kept = make_config(max_train_steps=1), tmp_path / "kept" / "checkpoint-1"
    run(cfg)
    shutil.copytree(tmp_path / "out" / "checkpoint-1", kept)
    (kept / "state.safetensors").unlink()
    with pytest.raises(UserError, match="kept contains another run"):
        run(dataclasses.replace(cfg, output_dir=str(tmp_path / "kept")))


def test_the_state_makes_a_checkpoint_whole(make_config, tmp_path, monkeypatch):
    """It is written last, and set aside first: half a folder is not a checkpoint."""
    write, replace, out = z.write_file, os.replace, tmp_path / "out"

    def break_at(name):
        def fail(path, *rest):
            if Path(path).name == name and Path(path).parent.name == "checkpoint-1":
                raise OSError("the power is gone")
            return (write if len(rest) and isinstance(rest[0], bytes) else replace)(path, *rest)

        return fail

    cfg = make_config(max_train_steps=1)
    monkeypatch.setattr(z, "write_file", break_at("pytorch_lora_weights.safetensors"))
    with pytest.raises(OSError, match="the power is gone"):
        run(cfg)
    assert (out / "metrics.jsonl").stat().st_size > 0 and z.list_checkpoints(out) == []
    monkeypatch.setattr(z, "write_file", write)
    run(dataclasses.replace(cfg, overwrite_output_dir=True))
    monkeypatch.setattr(os, "replace", break_at("pytorch_lora_weights.safetensors"))
    with pytest.raises(OSError, match="the power is gone"):
        z.set_aside(out / "checkpoint-1")
    assert (out / "checkpoint-1").is_dir() and z.list_checkpoints(out) == []


def test_every_process_waits_for_a_checkpoint(make_config, model, monkeypatch):
    """Also one that is so late that it sees the files of the first: else the others would wait for it in vain."""
    cfg, waited = make_config(), []
    accelerator = z.make_accelerator(cfg)
    transformer, parameters = with_lora(model, cfg)
    run = make_run(cfg, transformer, z.make_optimizer(parameters, cfg), accelerator)
    z.write_file(Path(cfg.output_dir) / "metrics.jsonl", b"")
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda _: waited.append(True))
    for number in (1, 2):
        z.save_checkpoint(run, 7, {})
        assert len(waited) == number


def test_no_folder_is_renamed(make_config, tmp_path, monkeypatch, capsys):
    """Object store mounts can rename only files; checkpoints are still written, removed, and set aside."""
    replace = os.replace

    def refuse_folders(source, target):
        assert not os.path.isdir(source), "a folder was renamed"
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_folders)
    monkeypatch.setattr(os, "rename", refuse_folders)
    cfg = make_config(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=3)
    run(cfg)
    run(dataclasses.replace(cfg, resume_from_checkpoint="checkpoint-2", max_train_steps=3))
    assert "checkpoint-4 is superseded; renamed to superseded-checkpoint-4" in capsys.readouterr().out
    run(dataclasses.replace(cfg, overwrite_output_dir=True, max_train_steps=1))
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-1"]


@pytest.mark.parametrize("alpha", [4.0, 2.0, 12.0])
def test_every_checkpoint_is_a_lora_to_use(alpha, make_config, model, tmp_path):
    """diffusers loads the folder of a checkpoint and applies the LoRA of that step at its strength, alpha / rank."""
    run(make_config(lora_alpha=alpha, max_train_steps=3, checkpointing_steps=1, learning_rate=0.1))
    options = {"prompt": "a photo of sks dog", "height": 32, "width": 32, "num_inference_steps": 2}
    seen = set()
    for step in (1, 2, 3):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        live, _ = with_lora(model, make_config(lora_alpha=alpha))
        state = load_file(folder / "state.safetensors")
        z.load_lora(live, {n.removeprefix("lora/"): t for n, t in state.items() if n.startswith("lora/")})
        images = []
        for transformer in (live, None):
            pipe = ZImagePipeline.from_pretrained(model)
            pipe.set_progress_bar_config(disable=True)
            if transformer is None:
                pipe.load_lora_weights(folder)
            else:
                pipe.transformer = transformer.eval()
            generator = torch.Generator().manual_seed(0)
            images.append(pipe(**options, generator=generator, output_type="pt").images)
        assert (images[0] - images[1]).abs().max() < 1e-4
        seen.add(round(images[0].double().sum().item(), 4))
    assert len(seen) == 3, "another step is another LoRA"


def test_rotation_keeps_damaged_checkpoints_and_comes_after_the_new_one_is_verified(
    make_config, tmp_path, monkeypatch
):
    cfg = make_config(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    run(cfg)
    flip_a_bit(tmp_path / "out" / "checkpoint-3" / "state.safetensors")
    again = dataclasses.replace(cfg, resume_from_checkpoint="latest")
    run(dataclasses.replace(again, max_train_steps=6))
    names = [path.name for path in z.list_checkpoints(tmp_path / "out")]
    assert names == ["checkpoint-3", "checkpoint-5", "checkpoint-6"]
    write, newest = z.write_file, tmp_path / "out" / "checkpoint-7"
    for spoiled in ("state.safetensors", "pytorch_lora_weights.safetensors"):

        def lose(path, *content, place=newest / spoiled):
            """Simulate a disk that loses writes."""
            write(path, *content)
            if path == place:
                flip_a_bit(path)

        monkeypatch.setattr(z, "write_file", lose)
        with pytest.raises(OSError, match="checkpoint-7 was not written correctly; check the disk"):
            run(dataclasses.replace(again, max_train_steps=7))
        assert {"checkpoint-5", "checkpoint-6"} < {path.name for path in z.list_checkpoints(tmp_path / "out")}
        shutil.rmtree(newest)


def test_damaged_checkpoints_alone_are_refused_and_nothing_touched(make_config, tmp_path):
    cfg = make_config()
    run(cfg)
    flip_a_bit(tmp_path / "out" / "checkpoint-2" / "state.safetensors")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    for name in ("latest", "checkpoint-2"):
        with pytest.raises(UserError, match=f"--resume_from_checkpoint {name}: .*checkpoint-2 is damaged or not"):
            run(dataclasses.replace(cfg, resume_from_checkpoint=name, max_train_steps=3))
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()} == before


def test_the_optimizers_settings_are_those_of_the_resumed_run(make_config, tmp_path):
    cfg = make_config(optimizer="prodigy", learning_rate=1.0)
    run(cfg)
    run(dataclasses.replace(cfg, adam_weight_decay=0.5, max_train_steps=3, resume_from_checkpoint="latest"))
    groups = [z.read_checkpoint(path).state["group"] for path in z.list_checkpoints(tmp_path / "out")]
    assert [group["k"] for group in groups] == [2, 3] and not any("weight_decay" in group for group in groups)


def test_a_checkpoint_that_appears_after_the_plan_is_not_set_aside(make_config, tmp_path):
    """The earlier run of a requeued job may save its last checkpoint while the next one imports its libraries."""
    cfg = make_config(max_train_steps=1)
    run(cfg)
    again = dataclasses.replace(cfg, max_train_steps=3, resume_from_checkpoint="latest")
    plan = z.make_plan(again)
    run(dataclasses.replace(again, max_train_steps=2))
    AcceleratorState._reset_state(True)
    with pytest.raises(UserError, match="another run has just saved .*out/checkpoint-2; start again with --resume"):
        main(again, plan)
    run(again)
    assert len(losses_of(cfg)) == 3 and not list((tmp_path / "out").glob("superseded-*"))


def test_latest_without_a_checkpoint_starts_afresh(make_config, capsys, tmp_path):
    (tmp_path / "out" / "checkpoint-foo").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2").mkdir()
    (tmp_path / "out" / "checkpoint-2" / f".z-image-{'ba' * 16}.tmp").write_bytes(b"half")  # and in this one
    (tmp_path / "out" / f".z-image-{'ab' * 16}.tmp").write_bytes(b"half")  # of a run that was killed while saving
    (tmp_path / "out" / "validation" / "step-000000").mkdir(parents=True)
    (tmp_path / "out" / "validation" / "step-000000" / f".z-image-{'cd' * 16}.tmp").write_bytes(b"half")
    (tmp_path / "out" / "validation" / "step-000000" / ".mine.tmp").write_bytes(b"not of this program")
    (tmp_path / "out" / "another run").mkdir()
    (tmp_path / "out" / "another run" / f".z-image-{'ef' * 16}.tmp").write_bytes(b"being written")
    run(make_config(resume_from_checkpoint="latest"))
    assert "starting from scratch" in capsys.readouterr().out and len(metrics_of(make_config())) == 2
    assert {path.name for path in (tmp_path / "out").rglob(".*.tmp")} == {".mine.tmp", f".z-image-{'ef' * 16}.tmp"}


def test_resuming_with_what_cannot_fit_is_refused_before_anything_is_touched(make_config, tmp_path):
    cfg = make_config(max_train_steps=3)
    run(cfg)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    changes = {
        r"--rank 8 \(was 4\); --lora_alpha 8 \(was 4\). Restore them$": {"rank": 8, "resume_anyway": True},
        r"--lora_layers to_q \(was to_q,to_k": {"lora_layers": "to_q", "resume_anyway": True},
        r"--optimizer prodigy \(was adamw\)": {"optimizer": "prodigy", "resume_anyway": True},
        r"--use_8bit_adam True \(was False\)": {"use_8bit_adam": True, "resume_anyway": True},
        "the checkpoint is already at step 3; --max_train_steps must not be lower": {"max_train_steps": 2},
    }
    for words, change in changes.items():
        with pytest.raises(UserError, match=words):
            run(dataclasses.replace(cfg, resume_from_checkpoint="latest", **change))
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()} == before


def test_resuming_a_finished_run_trains_nothing(make_config):
    cfg = make_config()
    run(cfg)
    before = lora_bytes(cfg), metrics_of(cfg)
    run(dataclasses.replace(cfg, resume_from_checkpoint="latest"))
    assert (lora_bytes(cfg), metrics_of(cfg)) == before


def test_checkpoints_are_whole_rotated_and_without_pickles(make_config, tmp_path):
    cfg = make_config(max_train_steps=5, checkpointing_steps=2, checkpoints_total_limit=2)
    run(cfg)
    assert [path.name for path in z.list_checkpoints(tmp_path / "out")] == ["checkpoint-4", "checkpoint-5"]
    folder = tmp_path / "out" / "checkpoint-5"
    assert {path.name for path in folder.iterdir()} == {"pytorch_lora_weights.safetensors", "state.safetensors"}
    kinds = {key.split("/")[0] for key in load_file(folder / "state.safetensors")}
    assert kinds == {"lora", "exp_avg", "exp_avg_sq", "step"}
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == lora_bytes(cfg), "the last one is the result"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix == ".tmp"]


def test_a_run_that_diverges_stops_and_names_the_last_good_checkpoint(make_config, model, tmp_path):
    run(make_config(max_train_steps=2))
    poisoned = shutil.copytree(model, tmp_path / "m")
    weights = load_file(poisoned / "transformer" / "diffusion_pytorch_model.safetensors")
    weights["layers.0.feed_forward.w1.weight"][0, 0] = math.nan
    save_file(weights, poisoned / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    changes = {"pretrained_model_name_or_path": str(poisoned), "resume_from_checkpoint": "latest"}
    changes |= {"resume_anyway": True}
    words = r"step 3: the loss is nan, .* for \S+/\d.png at sigma 0\.\d+; .*checkpoint-2.*--learning_rate"
    with pytest.raises(FloatingPointError, match=words):
        run(make_config(**changes, max_train_steps=8))
    assert len(losses_of(make_config())) == 2
    assert [path.name for path in z.list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_a_gpu_without_memory_gets_a_sentence(make_config, monkeypatch, capsys):
    """It names what helps, without what is used already."""
    loss, calls = z.training_loss, []

    def exhausted(*args):
        calls.append(args)
        if len(calls) > 1:
            with z.explained("a part of the run failed"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMany lines")
        return loss(*args)

    monkeypatch.setattr(z, "training_loss", exhausted)
    with pytest.raises(SystemExit) as ended:
        z.run_or_exit(run, make_config(checkpointing_steps=1))
    said = capsys.readouterr().err
    remedies = "--fit auto, a smaller --train_batch_size, --resolution, or --rank"
    assert f"error: the GPU is out of memory; try {remedies}; the last good checkpoint is " in said
    assert ended.value.code == 2 and said.strip().endswith("checkpoint-1")


def test_a_broken_lora_is_not_saved(make_config, model):
    cfg = make_config()
    transformer, parameters = with_lora(model, cfg)
    parameters[3].data[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="--learning_rate"):
        z.finish_lora(make_run(cfg, transformer))
    assert not Path(cfg.output_dir).exists()


def test_processes_that_do_not_see_each_other_are_refused(make_config, monkeypatch):
    monkeypatch.setenv(
        "WORLD_SIZE", "2"
    )  # as with FSDP and use_cpu: true, for which accelerate starts two runs of one
    with pytest.raises(UserError, match="accelerate sees 1 of 2 processes; torch must see a GPU for each"):
        z.make_accelerator(make_config())


def test_the_first_lines_name_the_device(make_config, monkeypatch, capsys):
    run(make_config())
    said = capsys.readouterr().out
    assert (
        "device: cpu, fp32 precision\nwarning: torch sees no GPU; on a CPU, training the full model is far too" in said
    )
    assert said.index("device:") < said.index("bucket")
    assert len(list(z.describe_device(make_config(demo=True)))) == 1, "a demo is meant to run anywhere"
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(PartialState, "device", property(lambda self: cuda, lambda self, _: None), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    lines = list(z.describe_device(make_config(mixed_precision="bf16")))
    assert lines[0] == "device: Tesla T4, bf16 precision" and lines[1].startswith(
        "warning: this GPU only emulates bf16"
    )
    assert len(list(z.describe_device(make_config()))) == 1


def test_a_notebook_may_change_the_precision(make_config):
    run(make_config())
    main(make_config(mixed_precision="bf16", overwrite_output_dir=True))
    assert {tensor.dtype for tensor in load_file(Path(make_config().output_dir) / z.LORA_FILE).values()} == {
        torch.bfloat16
    }


def test_one_step_can_be_taken_by_hand(model, make_config):
    cfg = make_config(gradient_accumulation_steps=2)
    accelerator = z.make_accelerator(cfg)
    transformer, parameters = with_lora(model, cfg)
    transformer, optimizer = accelerator.prepare(transformer, z.make_optimizer(parameters, cfg))
    batches = itertools.repeat(make_batch())
    metrics = next(z.train(make_run(cfg, transformer, optimizer, accelerator), batches))
    losses = [name for name in metrics if name.startswith("loss/")]
    assert list(metrics) == ["step", "loss", "grad_norm", *losses, "lr", "seconds"]
    assert metrics["step"] == 1 and metrics["loss"] > 0


def test_adamw_is_fused_on_cuda_and_resumes_there(model, make_config, monkeypatch, tmp_path):
    """A fused step needs its count on the device; here, fused kernels for the CPU stand in."""
    cfg = make_config(max_train_steps=4, output_dir=str(tmp_path / "whole"))
    assert z.make_optimizer([nn.Parameter(torch.ones(2))], cfg).param_groups[0]["fused"] is None
    adamw, seen = torch.optim.AdamW, []
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda *args, fused, **options: seen.append(adamw(*args, fused=True, **options)) or seen[-1],
    )
    run(cfg)
    half = dataclasses.replace(cfg, output_dir=str(tmp_path / "half"))
    run(dataclasses.replace(half, max_train_steps=2))
    run(dataclasses.replace(half, resume_from_checkpoint="latest"))
    assert lora_bytes(half) == lora_bytes(cfg)
    monkeypatch.undo()
    cuda = torch.device("cuda")
    monkeypatch.setattr(PartialState, "device", property(lambda self: cuda, lambda self, _: None), raising=False)
    assert z.make_optimizer([nn.Parameter(torch.ones(2))], cfg).param_groups[0]["fused"] is True


def test_the_optimizer_steps_at_the_scheduled_rate(model, make_config):
    cfg = make_config(lr_scheduler="linear", max_train_steps=4, gradient_accumulation_steps=1)
    accelerator = z.make_accelerator(cfg)
    transformer, parameters = with_lora(model, cfg)
    transformer, optimizer = accelerator.prepare(transformer, z.make_optimizer(parameters, cfg))
    steps = z.train(make_run(cfg, transformer, optimizer, accelerator), itertools.repeat(make_batch()))
    rates = [optimizer.param_groups[0]["lr"] for _ in steps]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


RULES = {"lr_step_rules": "1:3,0.1:6,0.01"}


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_schedule_of_diffusers(name, make_config):
    rules = RULES if name == "piecewise_constant" else {}
    cfg = make_config(lr_scheduler=name, lr_warmup_steps=3, max_train_steps=12, lr_num_cycles=2, lr_power=2.0, **rules)
    rate = z.make_learning_rate(cfg, z.make_schedule(cfg, [sample(0)], 4))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.learning_rate)
    scheduler = get_scheduler(
        name,
        optimizer,
        step_rules=cfg.lr_step_rules,
        num_warmup_steps=3,
        num_training_steps=12,
        num_cycles=2,
        power=2.0,
    )
    for step in range(12):
        assert rate(step) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_the_learning_rate_follows_the_optimizer_step(make_config, tmp_path):
    cfg = make_config(lr_scheduler="linear", max_train_steps=4, gradient_accumulation_steps=2)
    run(cfg)
    assert [row["lr"] for row in metrics_of(cfg)] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_metrics_have_one_line_per_optimizer_step(make_config, tmp_path):
    cfg = make_config(max_train_steps=3, train_batch_size=2, gradient_accumulation_steps=2)
    run(cfg)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    names = [[name for name in row if not name.startswith("loss/")] for row in rows]
    assert names == [["step", "epoch", "loss", "grad_norm", "lr", "seconds"]] * 3
    assert [row["epoch"] for row in rows] == [0.8, 1.6, 2.4] and rows[0]["lr"] == 1e-2


WORKER = """import json, os, runpy, sys, torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from diffusers.quantizers.bitsandbytes import bnb_quantizer

bnb_quantizer.BnB4BitDiffusersQuantizer.validate_environment = lambda self, *_, **__: None
bnb_quantizer.BnB4BitDiffusersQuantizer.update_device_map = lambda self, _: {"": "cpu"}
if not torch.cuda.is_available() and torch.__version__ < (2, 12):  # F.scaled_mm is for GPUs only
    torch.nn.functional.scaled_mm = lambda left, right, left_scale, _, right_scale, __, output_dtype: (
        (left.float() * left_scale) @ (right.float() * right_scale)
    ).to(output_dtype)

def report(self, *args, prepare=Accelerator.prepare):
    prepared = prepare(self, *args)
    local = [getattr(p, "to_local", lambda p=p: p)() for p in prepared[0].parameters()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in local)
    os.write(1, f"bytes of this rank: {size}\\n".encode())  # in one piece
    return prepared

Accelerator.prepare = report
if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # accelerate shards on accelerators only
    PartialState._prepare_backend = lambda self, cpu, sagemaker, backend=None: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
if sys.argv[1].endswith(".py"):
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    from train_dreambooth_lora_z_image import Config, main
    PartialState.destroy_process_group = lambda self, group=None: None  # the next run needs it
    for settings, env in json.load(open(sys.argv[1])):
        os.environ.update(env)
        AcceleratorState._reset_state()
        if PartialState._shared_state.get("distributed_type") == DistributedType.FSDP:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # as before the first run
        torch._dynamo.reset()
        main(Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}))
"""


def launch(tmp_path, *arguments, **env):
    """Run the worker in two gloo processes."""
    (tmp_path / "worker.py").write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": str(HERE), "WANDB_MODE": "offline"} | env
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(tmp_path / "worker.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def launch_configs(tmp_path, configs, envs=None, **env):
    """Run main in two gloo processes, for each config in turn, each with its own environment variables."""
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(list(zip(map(dataclasses.asdict, configs), envs or [{}] * len(configs)))))
    return launch(tmp_path, str(file), **env)


def test_two_processes_follow_the_curve_of_one(make_config, tmp_path):
    """2 x batch 2 = 1 x batch 4, in three buckets, class images and validation images generated in shares."""
    for number, size in enumerate([(96, 48), (48, 96), (90, 90), (60, 60)]):
        draw(tmp_path / "shapes" / f"{number}.png", size, (40 * number, 90, 20))
        (tmp_path / "shapes" / f"{number}.txt").write_text(f"caption {number} {'long ' * 9 * number}")
    common = {
        "instance_data_dir": str(tmp_path / "shapes"), "aspect_ratio_buckets": "32,32;32,64;64,32",
        "max_train_steps": 8,
        "with_prior_preservation": True, "class_prompt": "dog", "num_class_images": 3, "validation_prompt": ("a", "b"),
        "gradient_accumulation_steps": 2, "cache_dir": str(tmp_path / "cache"), "prior_generation_precision": "fp32",
    }  # fmt: skip
    one = make_config(
        **common, train_batch_size=4, output_dir=str(tmp_path / "one"), class_data_dir=str(tmp_path / "c1")
    )
    two = make_config(
        **common, train_batch_size=2, output_dir=str(tmp_path / "two"), class_data_dir=str(tmp_path / "c2")
    )
    changes = {
        "with_prior_preservation": False,
        "prior_preservation": "base",
        "caption_dropout": 0.3,
        "trigger_word": "t",
        "masked_loss": True,
        "holdout": 1,
    }
    pair = [dataclasses.replace(cfg, **changes, output_dir=f"{cfg.output_dir}-base") for cfg in (one, two)]
    done = launch_configs(tmp_path, [two, pair[1]], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("examples = ") == 2, "the second process must be quiet"
    run(one)
    run(pair[0])
    assert losses_of(pair[1]) == pytest.approx(losses_of(pair[0]), abs=1e-4) != losses_of(two)
    gains = [gains_of(cfg)[8]["held-out"]["bands"] for cfg in pair]
    assert gains[1] == pytest.approx(gains[0], abs=1e-3)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-4) and len(losses_of(one)) == 8
    for name in sorted(path.name for path in (tmp_path / "c1").iterdir()):
        assert (tmp_path / "c1" / name).read_bytes() == (tmp_path / "c2" / name).read_bytes()
    sheets = [Image.open(tmp_path / name / "validation" / "step-000000" / "sheet.png") for name in ("one", "two")]
    assert sheets[0].tobytes() == sheets[1].tobytes()


def accelerate_launch(workplace, settings, *flags, env=None):
    """Run the script by `accelerate launch` with a configuration, in two processes for FSDP."""
    (workplace / "accelerate.yaml").write_text(settings)
    (workplace / "worker.py").write_text(WORKER)
    launcher = Path(sys.executable).with_name("accelerate")
    command = [str(launcher), "launch", "--config_file=accelerate.yaml"]
    command += ["--num_processes=2", "worker.py"] if "FSDP" in settings else ["--num_processes=1", "--cpu"]
    command += [str(SCRIPT), *flags]
    env = {**os.environ, "HF_HOME": str(workplace / "hf")} | (env or {})
    return subprocess.run(command, cwd=workplace, env=env, capture_output=True, text=True, timeout=900)


def test_fsdp_as_the_readme_says(make_config, model, workplace):
    """The README's YAML: shards, one process's losses and LoRA, checkpoint, resume, validation."""
    common = [f"--pretrained_model_name_or_path={model}", "--instance_data_dir=dog", "--instance_prompt=p"]
    common += ["--mixed_precision=no", "--resolution=32", "--cache_latents", "--num_inference_steps=2", "--rank=4"]
    common += ["--num_validation_images=3", "--validation_steps=2", "--checkpointing_steps=2", "--validation_prompt=a"]
    common += ["--gradient_checkpointing", "--learning_rate=1e-2", "--gradient_accumulation_steps=2"]
    common += ["--lr_scheduler=constant"]  # another length is another cosine
    half, whole = (
        [*common, "--output_dir=two", "--max_train_steps=2"],
        [*common, "--output_dir=two", "--max_train_steps=4"],
    )
    first = accelerate_launch(workplace, FSDP_YAML, *half)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "FSDP's own activation checkpointing is used instead" in first.stdout
    rest = accelerate_launch(workplace, FSDP_YAML, *whole, "--resume_from_checkpoint=latest")
    assert rest.returncode == 0 and "resuming from two/checkpoint-2, after step 2" in rest.stdout, rest.stderr[-3000:]
    one = run_script(*common, "--output_dir=one", "--max_train_steps=4", "--train_batch_size=2", cwd=workplace)
    assert one.returncode == 0, one.stderr[-3000:]
    transformer, _ = with_lora(model, make_config())
    total = sum(p.numel() * p.element_size() for p in transformer.parameters())
    ranks = [int(size) for size in re.findall(r"bytes of this rank: (\d+)", first.stdout)]
    assert len(ranks) == 2 and all(0.45 * total < size < 0.55 * total for size in ranks)
    rows = [[json.loads(line) for line in (workplace / name / "metrics.jsonl").open()] for name in ("one", "two")]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows[1]] == pytest.approx([row[key] for row in rows[0]], abs=1e-3)
    files = [load_file(workplace / name / "pytorch_lora_weights.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys() and len(files[0]) == 56
    distances = torch.cat([(files[0][name] - files[1][name]).abs().flatten() for name in files[0]])
    assert distances.mean() < 1e-5 and (distances > 1e-3).sum() <= 2, "AdamW enlarges rounding where gradients vanish"
    sheets = [workplace / name / "validation" / "step-000004" / "sheet.png" for name in ("one", "two")]
    assert (pixels_of(Image.open(sheets[0])) - pixels_of(Image.open(sheets[1]))).abs().max() <= 1


INDUCTOR = "distributed_type: 'NO'\ndynamo_config:\n  dynamo_backend: INDUCTOR\nnum_processes: 1\nuse_cpu: true\n"


def test_compiled_runs_resume_exactly(workplace, model):
    """With `--compile` or accelerate's INDUCTOR, an interrupted run has the same bytes, and nearly eager's values."""
    common = [f"--pretrained_model_name_or_path={model}", "--instance_data_dir=dog", "--instance_prompt=p"]
    common += ["--mixed_precision=no", "--aspect_ratio_buckets=32,32;48,32", "--cache_latents", "--rank=4"]
    common += ["--learning_rate=1e-2", "--lr_scheduler=constant"]
    env = {"TORCHINDUCTOR_CACHE_DIR": str(workplace / "inductor")}
    first = accelerate_launch(workplace, INDUCTOR, *common, "--output_dir=c", "--max_train_steps=1", env=env)
    assert first.returncode == 0, first.stderr[-3000:]
    assert list((workplace / "inductor").rglob("*.py")), "nothing was compiled"
    flags = [*common, "--output_dir=c", "--max_train_steps=4", "--resume_from_checkpoint=latest", "--compile"]
    env = {"TORCHINDUCTOR_CACHE_DIR": str(workplace / "inductor2")}
    rest = run_script(*flags, cwd=workplace, env=env)
    assert rest.returncode == 0 and "resuming from c/checkpoint-1" in rest.stdout, rest.stderr[-3000:]
    assert list((workplace / "inductor2").rglob("*.py")), "nothing was compiled"
    for name, flag in (("whole", "--compile"), ("plain", "--compile=false")):
        done = run_script(*common, flag, f"--output_dir={name}", "--max_train_steps=4", cwd=workplace, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, half, plain = (workplace / name / z.LORA_FILE for name in ("whole", "c", "plain"))
    assert whole.read_bytes() == half.read_bytes() != plain.read_bytes()
    for name, tensor in load_file(plain).items():
        assert torch.allclose(tensor, load_file(whole)[name], atol=1e-3)


@pytest.mark.parametrize("recomputed", [{}, {"gradient_checkpointing": True}, {"checkpoint_blocks": "attention"}])
def test_one_compilation_serves_all_buckets_and_captions(recomputed, model, make_config, monkeypatch):
    """At most 6 graphs for the README's 17 buckets and captions with and without a mask; dynamo gives up after 8."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    text = re.search(r'--aspect_ratio_buckets="([\d,;]+)"', README)[1]
    buckets = [(height // 128 * 16, width // 128 * 16) for height, width in z.parse_buckets(text)]
    assert len(buckets) == 17
    cfg, counts = make_config(**recomputed), []
    transformer, _ = with_lora(model, cfg)
    transformer.train()
    for number, (height, width) in enumerate(buckets):
        batch = make_batch(length=5 + 7 * number)  # 5 and 25 tokens to 117 and 137
        latents = torch.randn(2, 16, height // 8, width // 8)
        z.training_loss(transformer, batch._replace(latents=latents), cfg).mean().backward()
        counts.append(counters["stats"]["unique_graphs"])
    assert 0 < counts[-1] <= 6 and counters["graph_break"] == {}, counts


TECHNIQUES = {
    "fp8 training": {"do_fp8_training": True},
    "`--quantization`": {"quantization": "nf4"},
    "bitsandbytes JSON": {"bnb_quantization_config_path": "nf4.json"},
    "8-bit Adam": {"use_8bit_adam": True},
    "Prodigy": PRODIGY,
    "compile": {},
    "offload": {"offload": True, "cache_latents": False},
    "checkpointing": {"gradient_checkpointing": True},
    "DDP": {},
    "FSDP": {},
}
FORMATS = ("fp8 training", "`--quantization`", "bitsandbytes JSON")


def verdict(first, second):
    """Return the README table's entry for two techniques, in the order of `TECHNIQUES`."""
    if second == "FSDP":
        return {"DDP": "instead of DDP"}.get(first, "no" if first in (*FORMATS, "8-bit Adam", "Prodigy") else "yes")
    if first in FORMATS and second in FORMATS:
        return "no"
    return "ignored" if (first, second) == ("8-bit Adam", "Prodigy") else "yes"


def technique_table():
    """The README's table of pairs."""
    names = list(TECHNIQUES)
    lines = [f"| | {' | '.join(names[:-1])} |", "|---" * len(names) + "|"]
    for row in range(1, len(names)):
        cells = [verdict(names[column], names[row]) if column < row else "" for column in range(len(names) - 1)]
        lines.append(f"| **{names[row]}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_readme_shows_what_goes_with_what():
    assert technique_table() in README


def together(make_config, tmp_path, *names):
    """A config with some techniques, and what its environment needs."""
    (tmp_path / "nf4.json").write_text(block_with("load_in_4bit", JSONS))
    changes = {key: value for name in names for key, value in TECHNIQUES[name].items()}
    if "bnb_quantization_config_path" in changes:
        changes["bnb_quantization_config_path"] = str(tmp_path / "nf4.json")
    return make_config(**changes, output_dir=str(tmp_path / "_".join(names).replace("`", "")))


ALONE = [name for name in TECHNIQUES if name not in ("DDP", "FSDP")]


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(ALONE, 2)])
def test_pairs_of_techniques(first, second, make_config, tmp_path, monkeypatch, capsys, bitsandbytes_on_cpu):
    if verdict(first, second) == "no":
        with pytest.raises(UserError, match="set the format of the same weights; give only one of them"):
            together(make_config, tmp_path, first, second)
        return
    cfg = together(make_config, tmp_path, first, second)
    if "compile" in (first, second):
        torch._dynamo.reset()
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    run(cfg)
    assert len(losses_of(cfg)) == 2
    assert ("--use_8bit_adam is ignored" in capsys.readouterr().out) == (verdict(first, second) == "ignored")


def test_every_technique_in_two_processes(make_config, tmp_path):
    """DDP with each of the others, in one launch."""
    configs = [together(make_config, tmp_path, "DDP", name) for name in ALONE]
    envs = [{"ACCELERATE_DYNAMO_BACKEND": "EAGER" if name == "compile" else "NO"} for name in ALONE]
    done = launch_configs(tmp_path, configs, envs, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {cfg.output_dir: len(losses_of(cfg)) for cfg in configs} == {cfg.output_dir: 2 for cfg in configs}


def test_every_technique_under_fsdp_that_is_not_refused(make_config, tmp_path):
    """FSDP with each technique that can be sharded, and validation, in one launch; the rejected ones: another test."""
    names = [name for name in ALONE if verdict(name, "FSDP") == "yes"]
    common = {"validation_prompt": ["a"], "validation_steps": 1, "num_inference_steps": 2, "guidance_scale": 0.0}
    configs = [dataclasses.replace(together(make_config, tmp_path, "FSDP", name), **common) for name in names]
    two = make_config(
        output_dir=str(tmp_path / "two"), mixed_precision="bf16", max_train_steps=4, train_batch_size=1,
        timestep_shift="1",
    )  # fmt: skip
    envs = [{"ACCELERATE_DYNAMO_BACKEND": "EAGER" if name == "compile" else "NO"} for name in [*names, "bf16"]]
    done = launch_configs(
        tmp_path, [*configs, two], envs, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP="ZImageTransformerBlock",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    curves = {name: losses_of(cfg) for name, cfg in zip(names, configs)}
    assert names == ["compile", "offload", "checkpointing"] and {len(curve) for curve in curves.values()} == {2}
    sharded = sorted(map(int, re.findall(r"bytes of this rank: (\d+)", done.stdout)))[2:]  # without bf16
    assert len(sharded) == 2 * len(names) and sharded[-1] < 1.1 * sharded[0]
    sheets = [(Path(cfg.output_dir) / "validation" / "step-000002" / "sheet.png").read_bytes() for cfg in configs]
    assert set(sheets) == {sheets[0]}, "a compiled model gives the same images"
    one = dataclasses.replace(two, output_dir=str(tmp_path / "one"), train_batch_size=2)
    run(one)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-3), "in bf16, noise levels are not rounded"


# =====================================================================================================================
# Stop and resume
# =====================================================================================================================


def start(workplace, *flags, launcher=()):
    """Start the script in its own process group, with line-buffered output; return the process."""
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, flags)]
    env = {**os.environ, "HF_HOME": str(workplace / "hf"), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command,
        cwd=workplace,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(process, words):
    """Read a process's output up to a line with some words."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"{words!r} never came: {''.join(lines)[-3000:]}")


def small_run(model, *more):
    """Flags of a run that lasts until it is stopped."""
    flags = [f"--pretrained_model_name_or_path={model}", "--instance_data_dir=dog", "--instance_prompt=p", "--rank=2"]
    flags += [
        "--cache_latents",
        "--resolution=32",
        "--mixed_precision=no",
        "--validation_prompt=a",
        "--output_dir=out",
    ]
    flags += ["--num_inference_steps=2", "--num_validation_images=1", "--validation_steps=3", "--cache_dir=cache"]
    return [*flags, "--max_train_steps=100000", "--resume_from_checkpoint=latest", *more]


def steps_on_disk(output):
    """The steps of metrics.jsonl and of the checkpoints, all of which must be intact."""
    rows = [json.loads(line)["step"] for line in (output / "metrics.jsonl").open()]
    assert rows == list(range(1, len(rows) + 1)) and all(map(z.read_checkpoint, z.list_checkpoints(output)))
    return rows, [int(path.name[11:]) for path in z.list_checkpoints(output)]


def test_signals_to_the_process_stop_it_after_the_micro_batch_with_a_checkpoint(workplace, model):
    """SIGTERM in training and in saving, SIGINT in validation, SIGUSR1 in caching, each by the same command."""
    process = start(workplace, *small_run(model))
    read_until(process, "step 3: images in")
    os.killpg(process.pid, signal.SIGTERM)
    rest = process.communicate(timeout=300)[0]
    rows, checkpoints = steps_on_disk(workplace / "out")
    assert process.returncode == 128 + signal.SIGTERM and checkpoints == [rows[-1]] and rows[-1] >= 3
    assert f"stopped by SIGTERM after step {rows[-1]}, which is saved; resume with the same command and" in rest
    assert "Traceback" not in rest

    process = start(workplace, *small_run(model, "--validation_steps=1", "--num_inference_steps=100000"))
    read_until(process, "resuming from")
    read_until(process, ": generating 1 images")
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=300)[0]
    rows, checkpoints = steps_on_disk(workplace / "out")
    assert process.returncode == 128 + signal.SIGINT and "stopped by SIGINT after step" in rest
    assert checkpoints[-1] == rows[-1], "the step whose images were being generated is saved"
    assert not list((workplace / "out" / "validation" / f"step-{rows[-1]:06d}").glob("*.png"))

    process = start(workplace, *small_run(model, "--checkpointing_steps=1"))
    while process.poll() is None and len([*(workplace / "out").glob("checkpoint-*")]) == len(checkpoints):
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=300)[0]
    rows, checkpoints = steps_on_disk(workplace / "out")
    assert process.returncode == 128 + signal.SIGTERM and checkpoints[-1] == rows[-1], rest
    assert not list((workplace / "out").glob(".z-image-*"))

    shutil.rmtree(workplace / "cache")
    process = start(workplace, *small_run(model))
    read_until(process, "encoding p")
    process.send_signal(signal.SIGUSR1)
    rest = process.communicate(timeout=300)[0]
    assert process.returncode == -signal.SIGUSR1 and "Traceback" not in rest, "before the training: at once"
    assert steps_on_disk(workplace / "out")[1][-1] >= rows[-1]


def test_the_first_of_several_signals_is_the_reason_and_the_status():
    stop = z.StopRequest(None)
    stop.receive(signal.SIGUSR1, None)
    stop.receive(signal.SIGTERM, None)
    assert (stop.reason, stop.number) == ("SIGUSR1", signal.SIGUSR1)


def test_the_time_that_ends_in_the_final_validation_stops_nothing(make_config, monkeypatch, tmp_path):
    """The LoRA is complete by then."""
    requests, request = [], z.StopRequest
    monkeypatch.setattr(z, "StopRequest", lambda minutes: requests.append(request(minutes)) or requests[-1])
    generate = z.sample_images
    monkeypatch.setattr(z, "sample_images", lambda *args: requests[0].expire() or generate(*args))
    run(make_config(final_validation_prompt="a"))
    assert (tmp_path / "out" / "README.md").is_file() and requests[0].reason == "--max_train_minutes"


def test_a_dropped_connection_saves_the_run_unless_it_was_told_to_ignore_it(make_config, monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests themselves may run under nohup
    try:
        with (
            monkeypatch.context() as patch,
            pytest.raises(z.Stopped, match="by SIGHUP after step 1, which") as stopped,
        ):
            log = z.log_metrics
            patch.setattr(z, "log_metrics", lambda *args: log(*args) or os.kill(os.getpid(), signal.SIGHUP))
            run(make_config(max_train_steps=100))
        assert stopped.value.number == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with z.StopRequest(None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_agreed()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


DEAF = """import os, signal, sys, threading
import train_dreambooth_lora_z_image as z
read, first = z.Image.open, threading.Lock()

def open_image(path):
    if threading.current_thread() is threading.main_thread():
        return read(path)
    if first.acquire(blocking=False):  # a second signal, after the run has stopped, would kill it
        os.kill(os.getpid(), signal.SIGTERM)
    return read("fifo")  # never returns

z.RUN_AS_SCRIPT, z.Image.open = True, open_image
z.run_or_exit(z.main, z.parse_config(sys.argv[1:]))"""


def test_a_batch_that_never_comes_does_not_make_a_run_deaf(workplace, model):
    """Reading an image never ends; the run answers SIGTERM, and its steps are saved."""
    flags = [flag for flag in small_run(model, "--max_train_steps=1") if flag != "--cache_latents"]
    assert run_script(*flags, cwd=workplace, env={"HF_HOME": "hf"}).returncode == 0
    os.mkfifo(workplace / "fifo")
    command = [sys.executable, "-c", DEAF, *flags, "--max_train_steps=9"]
    env = {**os.environ, "HF_HOME": "hf", "PYTHONPATH": str(workplace)}
    done = subprocess.run(command, cwd=workplace, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM and "Traceback" not in done.stderr, done.stderr
    assert "stopped by SIGTERM after step 1, which is saved" in done.stderr


def test_the_time_can_be_over_while_a_batch_is_awaited():
    stop = z.StopRequest(None)

    def never():
        threading.Thread(target=stop.expire).start()
        for _ in range(1000):
            threading.Event().wait(0.01)
        yield pytest.fail("the wait was not interrupted")

    with stop:
        assert list(stop.heed(never())) == [] and stop.reason == "--max_train_minutes"


def test_a_hanging_disk_does_not_outlast_the_time_for_training(make_config, monkeypatch, tmp_path):
    cfg = make_config(cache_latents=False, output_dir=str(tmp_path / "a"), max_train_steps=9)
    read, fifo = Image.open, tmp_path / "fifo"
    os.mkfifo(fifo)
    run(dataclasses.replace(cfg, max_train_steps=1))
    main = threading.main_thread()
    monkeypatch.setattr(z.Image, "open", lambda path: read(path if threading.current_thread() is main else fifo))
    try:
        with pytest.raises(z.Stopped, match="stopped by --max_train_minutes after step 1, which is saved"):
            run(dataclasses.replace(cfg, resume_from_checkpoint="latest", max_train_minutes=1e-3))
    finally:
        monkeypatch.undo()
        for _ in range(3):  # let the threads that wait go on
            with contextlib.suppress(OSError):
                os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))


def test_an_image_that_vanishes_ends_the_run_with_one_sentence(workplace, model):
    flags = [flag for flag in small_run(model) if flag != "--cache_latents"]
    process = start(workplace, *flags, "--dataloader_num_workers=2", "--validation_steps=1000")
    read_until(process, "step 0: images in")
    shutil.rmtree(workplace / "dog")
    rest = process.communicate(timeout=300)[0]
    assert process.returncode == 2 and "Traceback" not in rest and "\\n" not in rest, rest
    error = re.search("error: .*", rest)[0]
    assert re.match(r"error: dog/dog-\d.jpeg cannot be read any more: \[Errno 2\]", error)
    assert len(error) < 200


def test_a_second_ctrl_c_ends_at_once():
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the script does
        with z.StopRequest(None) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # not a second Ctrl-C
            os.kill(os.getpid(), signal.SIGTERM)
            if stop.reason == "SIGINT":
                os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


def test_a_launcher_that_dies_takes_its_process_along(workplace, model):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1")
    process = start(workplace, *small_run(model), launcher=launcher)
    read_until(process, "step 3: images in")
    process.terminate()
    rest = process.communicate(timeout=300)[0]  # ends when the orphan has closed its side
    rows, checkpoints = steps_on_disk(workplace / "out")
    assert checkpoints[-1] == rows[-1] and f"stopped by the exit of its launcher after step {rows[-1]}" in rest


def test_a_signal_that_comes_while_processes_agree_is_for_the_next_time(monkeypatch):
    """Otherwise this process would stop and wait for others that continue."""
    stop = z.StopRequest(None)
    monkeypatch.setattr(z, "any_process", lambda is_asked: stop.receive(signal.SIGTERM, None) or is_asked)
    assert [stop.is_agreed(), stop.reason, stop.is_agreed()] == [False, "SIGTERM", True]


def test_one_ranks_signal_is_everybodys(workplace, model):
    """Two gloo processes, of which one is told to stop."""
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    )
    process = start(workplace, *small_run(model), launcher=launcher)
    read_until(process, "step 3: images in")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGUSR1)
    rest = process.communicate(timeout=300)[0]
    rows, checkpoints = steps_on_disk(workplace / "out")
    assert process.returncode == 1 and checkpoints == [rows[-1]], rest[-3000:]
    assert f"after step {rows[-1]}, which is saved" in rest


def test_the_time_for_training_can_be_limited(make_config, tmp_path):
    with pytest.raises(z.Stopped, match="stopped by --max_train_minutes.*--resume_from_checkpoint latest") as stop:
        run(make_config(max_train_steps=10**6, max_train_minutes=1e-9))
    assert stop.value.number == signal.SIGTERM
    checkpoints = z.list_checkpoints(tmp_path / "out")
    assert not checkpoints or len(metrics_of(make_config())) == int(checkpoints[-1].name[11:])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not z.StopRequest(None).reason


def test_processes_do_not_ask_each_other_for_nothing(make_config, monkeypatch):
    """Without `--checkpointing_minutes`, a step has one question per micro-batch: whether to stop."""
    asked = []
    monkeypatch.setattr(z, "any_process", lambda condition: asked.append(condition) or condition)
    run(make_config(max_train_steps=3, gradient_accumulation_steps=2))
    assert len(asked) == 2 + 3 * 2, "two for the caches, and one for each micro-batch"


def test_the_timer_of_a_run_that_has_ended_stops_no_other():
    """In one process, such as a notebook's, the time of an earlier run may be over while a later one trains."""
    first = z.StopRequest(None)
    with first:
        pass
    with z.StopRequest(None) as second:
        first.expire()
        assert second.reason == "" and not second.is_agreed()


def test_checkpoints_by_the_clock(make_config, tmp_path):
    run(make_config(max_train_steps=3, checkpointing_minutes=1e-9))
    assert [path.name for path in z.list_checkpoints(tmp_path / "out")] == [f"checkpoint-{n}" for n in (1, 2, 3)]


def test_batches_end_at_a_signal_and_a_half_accumulated_step_is_dropped(make_config, model):
    cfg = make_config(gradient_accumulation_steps=3)
    accelerator = z.make_accelerator(cfg)
    transformer, parameters = with_lora(model, cfg)
    transformer, optimizer = accelerator.prepare(transformer, z.make_optimizer(parameters, cfg))
    before, batches = [parameter.clone() for parameter in parameters], iter([make_batch()] * 2)  # two of three
    assert list(z.train(make_run(cfg, transformer, optimizer, accelerator), batches)) == []
    assert all(torch.equal(a, b) for a, b in zip(before, parameters))


# The stages of a run; it is killed when a stage's file first appears, so the next run gets further.
EVENTS = {
    "encoding prompts": "cache/*/prompts/*",
    "generating": "classes/class-00001.png",
    "encoding images": "cache/*/latents/*",
    "training": "out/metrics.jsonl",
    "saving": "out/checkpoint-*",
    "validating": "out/validation/step-000004/0-0.png",
    "exporting": "out/pytorch_lora_weights.safetensors",
}
KILLED = {
    "accumulation, dropout, flips": {"gradient_accumulation_steps": 3, "lora_dropout": 0.2, "random_flip": True},
    "on the fly, batch 2, warmup": {
        "cache_latents": False, "train_batch_size": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 3,
    },
    "Prodigy, bf16": {"optimizer": "prodigy", "learning_rate": 1.0, "mixed_precision": "bf16"},
    "8-bit weights, time": {"quantization": "int8", "checkpointing_minutes": 1e-9, "checkpoints_total_limit": 2},
    "base model as prior, captions, holdout": {
        "with_prior_preservation": False, "prior_preservation": "base", "caption_dropout": 0.3, "holdout": 1,
    },
}  # fmt: skip


def killed_config(workplace, model, name):
    """A config whose run covers every stage."""
    settings = {
        "pretrained_model_name_or_path": str(model), "instance_data_dir": "dog", "instance_prompt": "a sks dog",
        "resolution": 32, "rank": 4, "mixed_precision": "no", "max_train_steps": 8, "num_inference_steps": 2,
        "num_validation_images": 2, "validation_steps": 4, "validation_prompt": ["a sks dog", "一只sks狗"],
        "checkpointing_steps": 3, "cache_latents": True, "with_prior_preservation": True, "class_prompt": "a dog",
        "class_data_dir": "classes", "num_class_images": 3, "sample_batch_size": 1, "cache_dir": "cache",
        "output_dir": "out",
    }  # fmt: skip
    (workplace / "run.json").write_text(json.dumps(settings | KILLED[name]))
    return ["--config=run.json", "--resume_from_checkpoint=latest"]


def has_happened(workplace, event):
    """Tell whether something is on disk."""
    found = next(workplace.glob(EVENTS[event]), None)
    return found is not None and (event != "training" or found.stat().st_size > 0)


def kill_when(process, is_time):
    """Kill a process group as soon as a condition holds; return whether it was still running."""
    while process.poll() is None and not is_time():
        os.sched_yield()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    return process.returncode != 0


def results(workplace):
    """Return all outputs of a run except timings."""
    rows = [json.loads(line) for line in (workplace / "out" / "metrics.jsonl").open()]
    images = sorted([*(workplace / "out" / "validation").rglob("*"), *(workplace / "classes").glob("[!.]*")])
    files = [workplace / "out" / "pytorch_lora_weights.safetensors", *(path for path in images if path.is_file())]
    return [row | {"seconds": 0} for row in rows], {path.relative_to(workplace): path.read_bytes() for path in files}


def run_undisturbed(workplace, model, name):
    """Return the results of an uninterrupted run, and clean the folder."""
    process = start(workplace, *killed_config(workplace, model, name))
    assert process.communicate(timeout=300) and process.returncode == 0
    expected = results(workplace)
    for folder in ("out", "cache", "classes"):
        shutil.rmtree(workplace / folder, ignore_errors=folder == "classes")  # only where there are class images
    return expected


def test_a_run_killed_at_six_moments_ends_in_the_same_bytes(workplace, model):
    name = "accumulation, dropout, flips"
    expected, flags = run_undisturbed(workplace, model, name), killed_config(workplace, model, name)
    for event in list(EVENTS)[1:]:
        assert kill_when(start(workplace, *flags), lambda: has_happened(workplace, event)), event
        assert all(map(z.read_checkpoint, z.list_checkpoints(workplace / "out"))), event
    process = start(workplace, *flags)
    assert process.communicate(timeout=300) and process.returncode == 0
    assert results(workplace) == expected
    assert not [path for path in (workplace / "out").rglob("*") if path.suffix == ".tmp"]


@pytest.mark.soak
@pytest.mark.parametrize("how", ["at the seven moments", "at random"])
@pytest.mark.parametrize("name", KILLED)
def test_soak(name, how, workplace, model, capsys):
    """Every configuration killed seven times, through the launcher's group, then left to end."""
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1")
    expected, flags = run_undisturbed(workplace, model, name), killed_config(workplace, model, name)
    without = {"generating": "prior_preservation", "encoding images": "cache_latents"}  # settings that skip a stage
    chance, hits = random.Random(name), []
    for event in EVENTS:
        if how == "at random":
            process = start(workplace, *flags, launcher=launcher)
            read_until(process, " bucket ")  # the imports are over
            until = time.monotonic() + 2 * chance.random()
            hits += ["random"] * kill_when(process, lambda: time.monotonic() > until)
        elif without.get(event) not in KILLED[name]:
            assert not has_happened(workplace, event)
            hits += [event] * kill_when(
                start(workplace, *flags, launcher=launcher), lambda: has_happened(workplace, event)
            )
    process = start(workplace, *flags, launcher=launcher)
    assert process.communicate(timeout=300) and process.returncode == 0
    assert results(workplace) == expected
    with capsys.disabled():
        print(f"\n{name}: {len(hits)} kills, {hits}; {len(expected[0])} steps, {len(expected[1])} files equal")


def test_more_processes_or_fewer_continue_on_the_same_curve(make_config, tmp_path):
    """4 on one process = 2 x 2, over buckets; and each continues the other's checkpoint."""
    for number, size in enumerate([(96, 48), (48, 96), (90, 90), (60, 60)]):
        draw(tmp_path / "shapes" / f"{number}.png", size, (40 * number, 90, 20))
    common = {"instance_data_dir": str(tmp_path / "shapes"), "aspect_ratio_buckets": "32,32;32,64;64,32"}
    one = make_config(**common, max_train_steps=6, train_batch_size=4, output_dir=str(tmp_path / "one"))
    run(one)
    begun = dataclasses.replace(one, max_train_steps=3, output_dir=str(tmp_path / "begun by one"))
    run(begun)
    again = {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
    two = dataclasses.replace(one, train_batch_size=2, output_dir=str(tmp_path / "two"))
    finished = dataclasses.replace(begun, train_batch_size=2, **again)
    half = dataclasses.replace(two, max_train_steps=3, output_dir=str(tmp_path / "begun by two"))
    square = dataclasses.replace(two, aspect_ratio_buckets=None, output_dir=str(tmp_path / "square"))
    done = launch_configs(tmp_path, [two, finished, half, square], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    run(dataclasses.replace(half, train_batch_size=4, **again))
    for cfg in (two, finished, half):
        assert len(losses_of(cfg)) == 6 and losses_of(cfg) == pytest.approx(losses_of(one), abs=1e-4), cfg.output_dir
    accumulated = dataclasses.replace(
        square, gradient_accumulation_steps=2, train_batch_size=2, output_dir=str(tmp_path / "accumulated")
    )
    run(accumulated)
    assert losses_of(accumulated) == pytest.approx(losses_of(square), abs=1e-4)


CHANGED = {
    "seed": ({"seed": 1}, r"--seed 1 \(was 0\)"),
    "resolution": ({"resolution": 48}, r"--resolution 48 \(was 32\); images, captions: 0.png, 1.png"),
    "alpha": ({"lora_alpha": 2.0}, r"--lora_alpha 2.0 \(was 4\)"),
    "batch": ({"train_batch_size": 2}, r"--train_batch_size x processes 2 \(was 1\)"),
    "accumulation": ({"gradient_accumulation_steps": 2}, r"--gradient_accumulation_steps 2 \(was 1\)"),
    "prompt": ({"instance_prompt": "other"}, "images, captions: 0.png"),
    "flips": ({"random_flip": True}, r"--random_flip True \(was False\)"),
    "objective": ({"weighting_scheme": "none"}, r"--weighting_scheme none \(was logit_normal\)"),
    "precision": ({"mixed_precision": "bf16"}, r"--mixed_precision bf16 \(was no\)"),
    "storage": ({"quantization": "int8"}, r"--quantization int8 \(was None\)"),
    "fp8 products": ({"do_fp8_training": True}, r"--do_fp8_training True \(was False\)"),
    "cuts": ({"max_sequence_length": 256}, r"--max_sequence_length 256 \(was 512\)"),
    "repeats": ({"repeats": 2}, r"--repeats 2 \(was 1\)"),
    "crops": ({"center_crop": True}, r"--center_crop True \(was False\)"),
    "no cache": ({"cache_latents": False}, r"--cache_latents False \(was True\)"),
    "dropout": ({"lora_dropout": 0.1}, r"--lora_dropout 0.1 \(was 0.0\)"),
    "two": ({"seed": 1, "gradient_accumulation_steps": 2}, r"--seed 1 \(was 0\); --gradient_accumulation_steps 2"),
}


def test_changed_settings_are_refused_with_the_list_unless_meant(make_config, tmp_path, images, model, capsys):
    cfg = make_config(max_train_steps=1)
    run(cfg)
    again = dataclasses.replace(cfg, resume_from_checkpoint="latest", max_train_steps=2)
    for name, (change, words) in CHANGED.items():
        with pytest.raises(
            UserError, match=f"saved with different settings or data: {words}.*or add --resume_anyway if the cha"
        ):
            run(dataclasses.replace(again, **change))
        kept = shutil.copytree(tmp_path / "out", tmp_path / name)
        capsys.readouterr()
        run(dataclasses.replace(again, **change, output_dir=str(kept), resume_anyway=True))
        assert re.search(rf"--resume_anyway: {words.split(';')[0]}", capsys.readouterr().out), name
        assert "resume_anyway" not in json.loads((kept / "config.json").read_text()), "for this start alone"
        assert len(losses_of(make_config(output_dir=str(kept)))) == 2, name
    harmless = {"validation_prompt": ("a",), "checkpointing_steps": 1, "guidance_scale": 0.0, "learning_rate": 1e-3}
    harmless |= {"lora_alpha": 4.0}  # which it was by default
    run(dataclasses.replace(again, **harmless))
    moved = dataclasses.replace(
        again, pretrained_model_name_or_path=str(shutil.copytree(model, tmp_path / "m")), max_train_steps=3
    )
    file = tmp_path / "m" / "transformer" / "diffusion_pytorch_model.safetensors"
    original = file.read_bytes()
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"_path \(a hash of its files\) [0-9a-f]{12} \(was [0-9a-f]{12}\)"):
        run(moved)
    file.write_bytes(original)
    run(moved)
    draw(images / "1.png", color=(1, 2, 3))
    (images / "0.png").unlink()
    with pytest.raises(UserError, match=r"data: images, captions: 0.png, 1.png. Restore them, or add --resume_anyway"):
        run(dataclasses.replace(again, max_train_steps=4))


def test_two_runs_cannot_share_an_output_folder(make_config, tmp_path):
    cfg, out = make_config(), tmp_path / "out"
    with z.hold_output(out):
        with pytest.raises(
            UserError, match=rf"out is in use by process {os.getpid()} on {socket.gethostname()}; wait for it"
        ):
            main(cfg)
        assert not (out / "config.json").exists()
    code = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=1); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(out / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="out is in use by"):
        main(cfg)
    holder.kill()
    holder.communicate()
    run(cfg)  # a dead process holds no lock


FILL = """import sys
from pathlib import Path
import train_dreambooth_lora_z_image as z
cfg = z.parse_config(sys.argv[1:])
accelerator = z.make_accelerator(cfg)
samples = z.plan_samples(cfg)
model = Path(cfg.pretrained_model_name_or_path)
encodings = z.Encodings(cfg, model, z.identify(model, cfg.variant))
print("filling", flush=True)
z.fill_prompts_cache(z.tokenize([str(number) for number in range(20)], model, 512), encodings)
z.fill_latents_cache(samples, encodings)
"""


def test_four_processes_fill_one_cache_while_one_is_killed(workplace, model):
    for number in range(20):
        draw(workplace / "dog" / f"{number}.png", color=(number * 9, 50, 90))
    flags, cache = small_run(model), workplace / "cache"
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", FILL, *flags]
    processes = [
        subprocess.Popen(command, cwd=workplace, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert processes[0].stdout.readline(), "the first one to be killed has begun"
    while not next(cache.glob("*/prompts/*"), None):
        os.sched_yield()
    processes[0].kill()
    for process in processes:
        process.communicate(timeout=300)
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 0, 0, 0]
    made = list(cache.rglob("*.safetensors"))
    assert len(made) == 20 + 25 + 25 and all(z.read_sealed(path) is not None for path in made), "with sizes"


def test_a_folder_that_cannot_be_synced_is_not_synced(make_config, monkeypatch, tmp_path):
    """Some network shares refuse to flush a folder; a file that cannot be flushed is an error."""
    flush = os.fsync

    def refuse(descriptor, of_files=False):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or of_files:
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        z.write_file(tmp_path / "file", bytes([number]))
    assert (tmp_path / "file").read_bytes() == b"\2" and len(os.listdir("/proc/self/fd")) == before
    run(make_config())
    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(descriptor, True))
    with pytest.raises(OSError, match="Invalid argument"):
        z.write_file(tmp_path / "file", b"x")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_used_with_a_warning(number, make_config, monkeypatch, capsys, tmp_path):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run(make_config())
    assert f"warning: the disk of --output_dir {tmp_path / 'out'} has no file locks" in capsys.readouterr().out
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_without_flock_a_killed_run_does_not_keep_its_folder(make_config, monkeypatch, tmp_path):
    """Where flock is missing, filelock keeps a record of the holder in `.lock`, which stays after SIGKILL."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    output = Path(make_config().output_dir)
    child = os.fork()
    if child == 0:
        with z.hold_output(output):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (output / ".lock").exists() and str(child) in (output / ".lock-holder").read_text()
    with z.hold_output(output):
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"), z.hold_output(output):
            pass


def test_a_disk_that_renames_no_files_is_refused_at_the_start(make_config, monkeypatch, tmp_path):
    """As some mounted buckets; the encodings are on another disk."""
    replace = os.replace

    def refuse(source, target):
        if Path(target).is_relative_to(tmp_path / "out"):
            raise OSError(errno.ENOSYS, "Function not implemented")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(z, "make_accelerator", lambda cfg: pytest.fail("the run has started"))
    with pytest.raises(
        UserError, match="--output_dir .*out cannot be used: .*not implemented.*; choose another folder"
    ):
        run(make_config())


def test_a_cache_that_cannot_be_written_is_refused_with_the_flag(make_config, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UserError, match="the cache folder .*file/z-image-encodings cannot be used: .*; choose another --c"
    ):
        z.make_plan(make_config(cache_dir=str(tmp_path / "file")))

    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        UserError, match="the cache folder .* cannot be used: .*Read-only file system; choose another --c"
    ):
        z.make_plan(make_config())


@contextlib.contextmanager
def full_disk(size):
    """A disk on which no file can exceed a size in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path):
    z.write_file(tmp_path / "a", b"before")
    with full_disk(4000), pytest.raises(OSError, match="File too large: .*/a'"):
        z.write_file(tmp_path / "a", bytes(5000))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"before"


def test_metrics_that_cannot_be_written_get_a_sentence(make_config, tmp_path):
    cfg, file = make_config(), tmp_path / "out" / "metrics.jsonl"
    z.write_file(file, b"x" * 4000)
    with full_disk(4000), pytest.raises(UserError, match="out/metrics.jsonl cannot be written: .* File too large"):
        z.log_metrics(make_run(cfg, None), {"step": 1, "loss": 1.0})


def test_a_full_disk_gets_a_sentence_and_harms_nothing(make_config, tmp_path, capsys):
    cfg = make_config()
    run(cfg)
    out, expected = tmp_path / "out", lora_bytes(cfg)
    with full_disk(4000), pytest.raises(SystemExit) as stop:
        z.run_or_exit(run, dataclasses.replace(cfg, max_train_steps=3, resume_from_checkpoint="latest"))
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and re.fullmatch(r"error: \[Errno 27\] File too large: '.*/out/\S+'", printed)
    assert lora_bytes(cfg) == expected and [path.name for path in z.list_checkpoints(out)] == ["checkpoint-2"]
    assert z.read_checkpoint(out / "checkpoint-2") and not list(out.rglob("*.tmp"))
    run(dataclasses.replace(cfg, max_train_steps=3, resume_from_checkpoint="latest"))
    assert len(losses_of(cfg)) == 3


class Malice:
    """An object whose unpickling would leave a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_no_file_of_a_stranger_is_executed(make_config, model, tmp_path):
    """A malicious pickle in the place of every file that is read: refused, or not read at all."""
    trace, cfg = tmp_path / "trace", make_config(cache_dir=str(tmp_path / "cache"))
    run(cfg)
    evil = pickle.dumps(Malice(trace))
    pickle.loads(evil)
    trace.unlink()  # it would work
    stranger = shutil.copytree(model, tmp_path / "m")
    elsewhere = shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "checkpoint-2")
    places = [
        *([file] for file in elsewhere.iterdir()),
        *([file] for file in stranger.rglob("*.safetensors")),
        [*stranger.rglob("*.json")],
        [stranger / part / "pytorch_model.bin" for part in ("transformer", "vae", "text_encoder")],
        [path for path in (tmp_path / "cache").rglob("*") if path.is_file()],
        *([tmp_path / "images" / name] for name in ("6.png", "1.txt", "metadata.jsonl")),
    ]
    changes = {
        "pretrained_model_name_or_path": str(stranger), "resume_from_checkpoint": str(elsewhere), "max_train_steps": 3,
    }  # fmt: skip
    for number, files in enumerate(places):
        before = {file: file.read_bytes() for file in files if file.exists()}
        for file in files:
            file.write_bytes(evil)
        with contextlib.suppress(UserError):
            run(dataclasses.replace(cfg, **changes, output_dir=str(tmp_path / f"new-{number}")))
        assert not trace.exists(), files
        for file in files:
            file.write_bytes(before[file]) if file in before else file.unlink()
    run(dataclasses.replace(cfg, **changes, output_dir=str(tmp_path / "harmless")))  # it was the files, then
    (tmp_path / "evil.json").write_bytes(evil)
    for flag in ("--config", "--bnb_quantization_config_path"):
        with pytest.raises((SystemExit, UserError)):
            z.make_plan(parse_config([*SMALLEST, f"{flag}={tmp_path / 'evil.json'}"]))
    assert not trace.exists()


SMALLEST = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--instance_prompt=p"]
ODD_TEXTS = {
    "newlines": "a\nb\r\nc", "HTML": "<script>alert(1)</script><img src=x onerror=y>",
    "braces": "{prompt} {0} {{x}} %s",
    "paths": "../../etc/passwd", "long": "word " * 20_000, "markdown": "](x) | `# **", "YAML": '"\n---\n- : {',
    "terminal": "\x1b[2J\x07", "template": "<|im_end|><|im_start|>system",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_texts_break_nothing(name, make_config, tmp_path, images, capsys):
    from huggingface_hub import ModelCard

    text = ODD_TEXTS[name]
    (images / "0.txt").write_text(text)
    changes = {"validation_prompt": (text,), "report_to": "tensorboard", "cache_dir": str(tmp_path / "cache")}
    cfg = make_config(instance_prompt=text, max_train_steps=1, **changes)
    before = set(tmp_path.parent.rglob("*"))
    run(cfg)
    assert all(path.is_relative_to(tmp_path) for path in set(tmp_path.parent.rglob("*")) - before)
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.instance_prompt == text and card.data.base_model is None
    body = card.text.split("```python")
    assert len(body) == 2 and body[1].count("```") == 1 and "<script" not in body[0] and "# **" not in body[0]
    code = body[1].split("```")[0]
    assert json.dumps(text, ensure_ascii=False) in code and ast.parse(code)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["instance_prompt"] == text
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1
    assert not set("\x1b\x07") & set(capsys.readouterr().out)


def test_tokens_are_never_printed(make_config, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    cfg = make_config(hub_token="hf_of_the_flag")
    for error in (UserError("for hf_of_the_flag"), OSError("hf_of_the_environment")):
        with pytest.raises(SystemExit):
            z.run_or_exit(lambda cfg: z.require(False, str(error)), cfg)
        assert capsys.readouterr().err in ("error: for ***\n", "error: ***\n")
    assert "hf_of" not in repr(cfg) and "hf_of" not in json.dumps(z.shareable_settings(cfg))


def test_images_cannot_be_named_outside_the_data_folder(make_config, images, tmp_path):
    draw(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        (images / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        with pytest.raises(UserError, match="metadata.jsonl, row 1 lists .*secret.png, which is not an image there"):
            z.plan_samples(make_config())


def make_nan(file):
    """Replace cached latents by NaN in an intact file."""
    z.write_tensors(file, {"latents": torch.full_like(load_file(file)["latents"], math.nan)})


def test_a_nan_can_be_skipped_and_is_counted(make_config, tmp_path, capsys):
    cfg = make_config(max_train_steps=10, cache_dir=str(tmp_path / "cache"), on_nan="skip", checkpointing_steps=4)
    run(dataclasses.replace(cfg, max_train_steps=1, output_dir=str(tmp_path / "first")))
    spoilt = min((tmp_path / "cache").rglob("latents/*.safetensors"))
    make_nan(spoilt)
    run(cfg)
    printed, rows = capsys.readouterr().out, metrics_of(cfg)
    skipped = [row["step"] for row in rows if row.get("is_skipped")]
    assert len(skipped) == 2 and len(rows) == 10 and "2 steps were skipped" in printed
    assert all((rows[step - 1]["loss"], rows[step - 1]["grad_norm"]) == (None, None) for step in skipped)
    assert re.search(
        rf"step {skipped[0]}: the loss is nan, .* for \S+/\d.png at sigma 0.\d+; the step is skipped", printed
    )
    half = dataclasses.replace(cfg, output_dir=str(tmp_path / "half"), max_train_steps=4)
    run(half)
    run(dataclasses.replace(half, max_train_steps=10, resume_from_checkpoint="latest"))
    assert lora_bytes(half) == lora_bytes(cfg) and metrics_of(half) == rows
    with pytest.raises(FloatingPointError, match="loss is nan"):
        run(dataclasses.replace(cfg, on_nan="stop", output_dir=str(tmp_path / "stops")))
    for file in (tmp_path / "cache").rglob("latents/*.safetensors"):
        make_nan(file)
    hopeless = dataclasses.replace(cfg, output_dir=str(tmp_path / "hopeless"), max_train_steps=20)
    with pytest.raises(
        FloatingPointError, match="step 11: .* training stops, .*; ten steps in a row were already skipped"
    ):
        run(hopeless)
    assert [row["is_skipped"] for row in metrics_of(hopeless)] == [True] * 10
    few = dataclasses.replace(hopeless, output_dir=str(tmp_path / "few"), max_train_steps=3)
    run(few)
    run(
        dataclasses.replace(few, max_train_steps=4, resume_from_checkpoint="latest")
    )  # of an optimizer without a state
    assert len(metrics_of(few)) == 4


# =====================================================================================================================
# Validation
# =====================================================================================================================


def pixels_of(image):
    """Pixels as a tensor of integers."""
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).int()


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_the_file_gives_the_images_of_the_final_validation(alpha, make_config, model, tmp_path):
    cfg = make_config(
        lora_alpha=alpha, max_train_steps=4, validation_prompt=("a sks dog", "一只狗"), num_validation_images=2,
        guidance_scale=1.5, negative_prompt="blurry", learning_rate=0.05,
    )  # fmt: skip
    run(cfg)
    pipe = ZImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path / "out" / "validation" / "step-000004"

    def sampled(prompt, image):
        return pipe(
            prompt=cfg.validation_prompt[prompt], negative_prompt="blurry", height=32, width=32, num_inference_steps=2,
            guidance_scale=1.5, generator=torch.Generator().manual_seed(cfg.seed + image),
        ).images[0]  # fmt: skip

    baseline = tmp_path / "out" / "validation" / "step-000000" / "0-0.png"
    assert torch.equal(pixels_of(sampled(0, 0)), pixels_of(Image.open(baseline))), (
        "the baseline is the untrained model"
    )
    pipe.load_lora_weights(tmp_path / "out")
    for prompt, image in itertools.product(range(2), repeat=2):
        saved = pixels_of(Image.open(folder / f"{prompt}-{image}.png"))
        difference = (pixels_of(sampled(prompt, image)) - saved).abs()
        assert difference.max() <= 1 and (difference > 0).sum() <= 3, "but for rounding to 8 bits"
    assert not torch.equal(pixels_of(sampled(0, 0)), pixels_of(Image.open(baseline)))
    assert Image.open(folder / "sheet.png").size == (64, 64)


def test_validation_leaves_the_model_and_the_random_state_alone(make_config, model):
    cfg = make_config(validation_prompt=("a",), lora_dropout=0.5)
    accelerator, encodings = z.make_accelerator(cfg), encodings_of(cfg, model)
    samples = z.plan_samples(cfg)[:1]
    z.fill_prompts_cache(tokens_of(model, ["a", "", samples[0].prompt]), encodings)
    z.fill_latents_cache(samples, encodings)
    transformer, _ = with_lora(model, cfg, b_std=0.5)
    transformer = accelerator.prepare(transformer.train())
    before, addresses = torch.get_rng_state(), {name: p.data_ptr() for name, p in transformer.named_parameters()}
    images = []
    for step in (1, 2):
        z.validate(make_run(cfg, transformer, None, accelerator, samples)._replace(encodings=encodings), step)
        images.append((z.validation_folder(cfg, step) / "0-0.png").read_bytes())
    assert torch.equal(torch.get_rng_state(), before) and transformer.training
    assert {name: p.data_ptr() for name, p in transformer.named_parameters()} == addresses
    assert images[0] == images[1], "dropout must be off while sampling"


def gains_of(cfg):
    """The measured gains by step."""
    files = sorted(Path(cfg.output_dir).glob("validation/step-*/gain.json"))
    return {int(file.parent.name[5:]): json.loads(file.read_text()) for file in files}


@pytest.mark.parametrize("cache_latents", [True, False])
def test_the_gain_is_measured_on_held_out_and_on_training_images(cache_latents, images, make_config, tmp_path, capsys):
    cfg = make_config(
        holdout=2, max_train_steps=8, validation_steps=3, learning_rate=0.01, cache_latents=cache_latents,
        validation_prompt=("a",), gradient_accumulation_steps=2, checkpointing_steps=1,
    )  # fmt: skip
    run(cfg)
    gains = gains_of(cfg)
    assert list(gains) == [0, 3, 6, 8] and gains[0]["held-out"] == gains[0]["training"]
    assert gains[0]["training"] == {"gain": 0.0, "spread": 0.0, "bands": dict.fromkeys(map(str, z.LEVELS), 0.0)}
    assert all(value != 0 for kind in ("held-out", "training") for value in gains[8][kind]["bands"].values())
    said = capsys.readouterr().out
    assert re.search(r"step 8: the LoRA lowers the loss by -?\d+\.\d% on held-out images and by -?\d", said)
    shown = [line for line in said.splitlines() if " 32 x 32 " in line]
    assert len(shown) == 1 and shown[0].split()[3] == "3", "two of five images are not trained"
    best = max((row["held-out"]["gain"], -step) for step, row in gains.items())
    file = tmp_path / "out" / z.BEST_FILE
    assert best[0] > 0
    saved, then = load_file(file), load_file(tmp_path / "out" / f"checkpoint-{-best[1]}" / z.LORA_FILE)
    assert saved.keys() == then.keys() and all(torch.equal(saved[name], then[name]) for name in then)


def test_the_measured_gain_is_that_of_the_losses(model, images, make_config, tmp_path):
    """Computed here again: with the finished LoRA loaded by diffusers, and with the base model."""
    cfg = make_config(holdout=1, max_train_steps=4, learning_rate=0.01, upcast_before_saving=True, seed=3)
    run(cfg)
    pipe = ZImagePipeline.from_pretrained(model)
    (path,) = (images / "4.png",)
    encodings = z.Encodings(cfg, Path(model), z.identify(Path(model), None))
    (one,) = (one for one in z.plan_samples(cfg) if one.path == path)
    latents = load_file(encodings.latents(one, False))["latents"][None]
    embeds = [load_file(encodings.prompt(one.prompt))["prompt_embeds"]]
    losses = {}
    for name in ("base", "lora"):
        if name == "lora":
            pipe.load_lora_weights(cfg.output_dir)
        for level in z.LEVELS:
            noise = z.sample_noise([z.derive_seed(3, "gain", one.digest, level)], latents.shape[1:])
            noisy = (1 - level) * latents + level * noise
            with torch.no_grad():
                velocity = z.predict_velocity(pipe.transformer, noisy, torch.tensor([level]), embeds)
            losses[name, level] = (velocity - (noise - latents)).square().mean().item()
    bands = {f"{level}": 1 - losses["lora", level] / losses["base", level] for level in z.LEVELS}
    assert gains_of(cfg)[4]["held-out"]["bands"] == pytest.approx(bands, abs=2e-4)


def test_without_holdout_the_gain_is_measured_on_training_images(images, make_config, tmp_path, capsys):
    cfg = make_config(max_train_steps=4, learning_rate=0.01, validation_prompt=("a",), num_inference_steps=1)
    for cache_latents in (False, True):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        run(dataclasses.replace(cfg, cache_latents=cache_latents))
        gains = gains_of(cfg)
        assert list(gains) == [0, 4] and set(gains[4]) == {"step", "training"}
        assert gains[0]["training"]["gain"] == 0 != gains[4]["training"]["gain"]
        assert not (tmp_path / "out" / z.BEST_FILE).exists()
    assert re.search(r"step 4: the LoRA lowers the loss by -?\d+\.\d% on training images\n", capsys.readouterr().out)
    many = z.Plan([sample(number) for number in range(20)], None, None)
    assert len(z.measured_samples(cfg, many)["training"]) == 8
    assert z.measured_samples(dataclasses.replace(cfg, validation_prompt=None), many) == {}


def test_the_final_lora_is_sampled_weaker_and_stronger(images, make_config, model, tmp_path):
    """As diffusers samples it with the same scales; the live LoRA is as strong as before."""
    cfg = make_config(
        max_train_steps=3, learning_rate=0.03, validation_prompt=("a",), num_inference_steps=2, mixed_precision="no"
    )
    run(cfg)
    folder = tmp_path / "out" / "validation" / "step-000003"
    assert (folder / "strength-1.png").read_bytes() == (folder / "0-0.png").read_bytes()
    base = folder.parent / "step-000000" / "0-0.png"
    assert (folder / "strength-0.png").read_bytes() == base.read_bytes() != (folder / "0-0.png").read_bytes()
    pipe = ZImagePipeline.from_pretrained(model)
    pipe.load_lora_weights(cfg.output_dir)
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    expected = pipe(
        prompt="a", height=32, width=32, num_inference_steps=2, guidance_scale=cfg.guidance_scale,
        generator=torch.Generator().manual_seed(cfg.seed),
    ).images[0]  # fmt: skip
    half = torch.tensor([*Image.open(folder / "strength-0.5.png").tobytes()])
    assert (half - torch.tensor([*expected.tobytes()])).abs().max() <= 1
    assert not list(folder.parent.glob("step-000000/strength*")), "only at the end"


def test_the_training_loss_is_told_by_noise_level(images, make_config, tmp_path):
    """Each example's loss is in its band, and their mean, weighted by their numbers, is the loss."""
    cfg = make_config(max_train_steps=6, train_batch_size=2, gradient_accumulation_steps=2)
    run(cfg)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for step, row in enumerate(rows):
        sigmas = z.noise_levels([z.sample_quantile(cfg, number) for number in range(4 * step, 4 * step + 4)], cfg)
        counts = collections.Counter(min(z.LEVELS, key=lambda level: abs(level - sigma)) for sigma in sigmas.tolist())
        assert {name for name in row if name.startswith("loss/")} == {f"loss/{level}" for level in counts}
        mean = sum(row[f"loss/{level}"] * count for level, count in counts.items()) / 4
        assert mean == pytest.approx(row["loss"], rel=1e-5)
    batch = make_batch(5)._replace(sigmas=torch.tensor([0.0, 0.19, 1.0, 0.5, 0.5]), is_prior=[False] * 4 + [True])
    sums = z.sum_by_band(torch.tensor([1.0, 2.0, 4.0, math.nan, 8.0]), batch)
    assert sums.nan_to_num(-1).tolist() == [[3, 0, -1, 0, 4, 8], [2, 0, 1, 0, 1, 1]], "NaN stays in its band"


def test_a_validation_without_images_rewrites_the_report(make_config, monkeypatch):
    seen = []
    monkeypatch.setattr(z, "write_report", lambda run, record: seen.append(len(gains_of(run.cfg))))
    run(make_config(holdout=1, max_train_steps=4, validation_steps=2))
    assert seen == [1, 2, 3, 3], "after each validation, and at the end"


def test_the_report_of_a_run_that_went_back_ends_there(make_config, tmp_path):
    """Images and gains of later steps, which a run has left behind, are not those of its LoRA."""
    cfg = make_config(
        max_train_steps=6, validation_steps=2, checkpointing_steps=2, holdout=1, validation_prompt=("a",)
    )
    run(cfg)
    run(dataclasses.replace(cfg, max_train_steps=3, resume_from_checkpoint="checkpoint-2"))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<td>after step (\d)</td>", text) == ["0", "2", "3"] and "step 6<" not in text
    assert (tmp_path / "out" / "validation" / "step-000006" / "0-0.png").exists()
    run(dataclasses.replace(cfg, max_train_steps=7, validation_steps=5, resume_from_checkpoint="checkpoint-2"))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<td>after step (\d)</td>", text) == ["0", "2", "5", "7"]


def test_the_report_shows_images_under_their_own_prompts(make_config, tmp_path):
    """Images of an earlier prompt, or somebody's own, are not those of the prompt that a resumed run has."""
    cfg = make_config(max_train_steps=2, validation_steps=1, checkpointing_steps=1, validation_prompt=("a", "一只狗"))
    run(dataclasses.replace(cfg, max_train_steps=1))
    (tmp_path / "out" / "validation" / "step-000000" / "1-0.png").write_bytes(b"mine")
    Image.new("RGB", (9, 9)).save(tmp_path / "out" / "validation" / "step-000000" / "2-0.png")
    huge = bytearray((tmp_path / "out" / "validation" / "step-000000" / "2-0.png").read_bytes())
    huge[16:24] = 2 * (40_000).to_bytes(4, "big")
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    (tmp_path / "out" / "validation" / "step-000000" / "3-0.png").write_bytes(huge)
    os.mkfifo(tmp_path / "out" / "validation" / "step-000000" / "4-0.png")
    cfg = dataclasses.replace(cfg, validation_prompt=("b", "一只狗"), resume_from_checkpoint="latest")
    run(cfg)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8").split("The LoRA, weaker and stronger")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    rows = [[row[0], *(re.sub(r".*step-00000(\d)/(\d)-0.*", r"\1 \2", cell) for cell in row[1:])] for row in rows]
    assert rows[1:] == [["a", "0 0", "1 0", ""], ["一只狗", "", "1 1", "2 1"], ["b", "", "", "2 0"]]
    run(dataclasses.replace(cfg, validation_prompt=None))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "![b](validation/step-000002/0-0.png)" in card and 'pipe("b",' in card, "the images are still there"


def test_an_overwritten_run_leaves_no_measurements(make_config, tmp_path):
    cfg = make_config(max_train_steps=4, validation_steps=2, holdout=1, validation_prompt=("a",))
    run(cfg)
    assert list(gains_of(cfg)) == [0, 2, 4]
    (tmp_path / "out" / "validation" / "step-000002" / "mine.txt").write_text("mine")
    run(dataclasses.replace(cfg, max_train_steps=1, overwrite_output_dir=True, holdout=0, validation_prompt=None))
    left = [path.name for path in (tmp_path / "out" / "validation").rglob("*") if path.is_file()]
    assert left == ["mine.txt"]


def test_losses_of_preservation_are_told_apart(make_config, tmp_path):
    cfg = make_config(max_train_steps=4, prior_preservation="base", class_prompt="dog")
    run(cfg)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert ["loss/prior" in row for row in rows] == [False, True, False, True]
    assert all(row["loss"] == row["loss/prior"] for row in rows[1::2])
    assert ">prior</text>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_run_survives_odd_names_in_its_folders(make_config, images, tmp_path):
    """A name that is no UTF-8, folders beside those of validation, and strengths that are somebody's own."""
    os.rename(images / "0.png", os.fsencode(images) + b"/caf\xe9.png")
    odd = tmp_path / "out" / "validation"
    for name in ("step-foo/strength-mine.png", "step-000002 (copy)/0-0.png", "step-000000/strength-mine.png"):
        z.write_file(odd / name, b"mine")
    cfg = make_config(validation_prompt=("a",), holdout=1)
    run(cfg)
    assert "caf?.png" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    run(dataclasses.replace(cfg, overwrite_output_dir=True))
    assert sum(path.read_bytes() == b"mine" for path in odd.rglob("*.png")) == 3
    (odd / "step-000000" / "gain.json").write_text("{")
    with pytest.raises(UserError, match="step-000000/gain.json cannot be read as JSON"):
        run(dataclasses.replace(cfg, resume_from_checkpoint="latest"))


def test_the_report_shows_images_also_without_final_ones(make_config, tmp_path):
    run(make_config(validation_prompt=("a",), skip_final_inference=True))
    assert "step-000000/0-0.png" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_lora_that_is_not_finite_is_named_also_when_measured(make_config, tmp_path):
    cfg = make_config(learning_rate=9e5, max_train_steps=6, validation_steps=1, validation_prompt=("a",))
    with pytest.raises(FloatingPointError, match="lower --learning_rate|the loss is"):
        run(cfg)
    nan = float("nan")
    assert z.draw_curves("Loss", {"a": [(1, 0.5), (2, nan), (3, 1.0)]}).count("points=") == 1
    assert "nan" not in z.draw_curves("Loss", {"a": [(1, 0.5), (2, nan), (3, 1.0)]})


def test_the_best_lora_of_an_abandoned_course_is_removed(make_config, tmp_path):
    """Only if it is of a later step: on the same course, resuming restores it."""
    cfg = make_config(
        max_train_steps=6, validation_steps=2, checkpointing_steps=2, holdout=1, validation_prompt=("a",)
    )
    run(cfg)
    best = tmp_path / "out" / z.BEST_FILE
    for top, is_kept in ((2, True), (6, False)):
        z.write_tensors(best, {}, {"step": f"{top}", "gain": "9"})
        content = best.read_bytes()
        run(dataclasses.replace(cfg, max_train_steps=3, resume_from_checkpoint="checkpoint-2"))
        assert sorted(gains_of(cfg)) == [0, 2, 3]
        assert (best.exists() and best.read_bytes() == content) == is_kept


def test_another_course_finds_its_own_best_lora(make_config, tmp_path):
    """The gain of a LoRA that has been removed with its course is no bar for those to come."""
    cfg = make_config(max_train_steps=6, validation_steps=2, checkpointing_steps=2, holdout=1, learning_rate=0.01)
    run(cfg)
    best, gains = tmp_path / "out" / z.BEST_FILE, gains_of(cfg)
    at = max(gains, key=lambda step: gains[step]["held-out"]["gain"])
    assert z.read_sealed(best)["step"] == f"{at}" and float(z.read_sealed(best)["gain"]) > 0
    z.write_tensors(best, {}, {"step": "6", "gain": "9"})
    run(dataclasses.replace(cfg, max_train_steps=7, validation_steps=5, resume_from_checkpoint="checkpoint-2"))
    gains = gains_of(cfg)
    at = max((5, 7), key=lambda step: gains[step]["held-out"]["gain"])
    assert sorted(gains) == [0, 2, 5, 7] and z.read_sealed(best)["step"] == f"{at}"
    z.write_tensors(best, {}, {"step": "2", "gain": "9"})
    run(dataclasses.replace(cfg, max_train_steps=7, validation_steps=5, resume_from_checkpoint="checkpoint-2"))
    assert z.read_sealed(best)["gain"] == "9" and gains_of(cfg)[at]["held-out"]["gain"] > 0, "it is still the best"


def test_the_number_of_held_out_images_is_bound(make_config):
    """Else images that have been trained would count as held out."""
    cfg = make_config(max_train_steps=2, checkpointing_steps=1)
    run(cfg)
    with pytest.raises(UserError, match=r"different settings or data: --holdout 2 \(was None\)"):
        run(dataclasses.replace(cfg, holdout=2, resume_from_checkpoint="latest"))


def test_an_image_of_two_samples_is_encoded_once(make_config, tmp_path, capsys):
    cache = str(tmp_path / "cache")
    run(make_config(prior_preservation="base", class_prompt="dog", cache_dir=cache, validation_prompt=("a",)))
    assert "encoding images: 100%|██████████| 5/5 " in capsys.readouterr().err


def test_the_shift_is_bound_as_a_number(make_config, model):
    shifts = [make_config(timestep_shift=text) for text in ("6", "6.0", "scheduler")]
    assert {z.resolve_timestep_shift(cfg, model).timestep_shift for cfg in shifts} == {"6"}


def test_a_mask_is_no_image_and_may_be_transparent(images, make_config, capsys):
    draw(images / "gone-MaskLabel.PNG", (64, 64), (255, 255, 255))
    mask = Image.new("RGBA", Image.open(images / "0.png").size, (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, mask.width // 2, mask.height))
    mask.save(images / "0.mask.png")
    samples = z.plan_samples(make_config(masked_loss=True))
    assert len(samples) == 5 and "ignored: gone-MaskLabel.PNG" in capsys.readouterr().out
    levels = z.load_mask(samples[0], False, (0.5, 0.5), 0.0)
    assert levels[..., 0].min() == 1 and levels[..., -1].max() == 0, "what is transparent does not count"


def test_the_plan_names_what_is_held_out(make_config, capsys):
    plan = z.make_plan(make_config(holdout=2))
    assert len(plan.held_out) == 2
    assert re.search(r"held out: \S+3.png, \S+4.png\n", capsys.readouterr().out)


def test_held_out_images_are_not_trained_and_stay_so_on_resuming(images, make_config, tmp_path):
    cfg = make_config(
        holdout=2,
        max_train_steps=4,
        checkpointing_steps=2,
        validation_steps=1,
        prior_preservation="base",
        class_prompt="dog",
    )
    samples, held_out = z.hold_out(z.plan_samples(cfg), cfg)
    assert [one.path.name for one in held_out] == ["3.png", "4.png"]
    assert {one.path.name for one in samples} == {"0.png", "1.png", "2.png"} and len(samples) == 6
    run(cfg)
    whole, gains = lora_bytes(cfg), gains_of(cfg)
    kept = (images / "4.png").read_bytes()
    draw(images / "4.png", (64, 64), (1, 2, 3))  # another image, not trained either
    run(dataclasses.replace(cfg, output_dir=str(tmp_path / "other")))
    assert lora_bytes(dataclasses.replace(cfg, output_dir=str(tmp_path / "other"))) == whole
    with pytest.raises(UserError, match="images, captions: 4.png"):  # the gain would be another one
        run(dataclasses.replace(cfg, resume_from_checkpoint="checkpoint-2"))
    (images / "4.png").write_bytes(kept)
    run(dataclasses.replace(cfg, resume_from_checkpoint="checkpoint-2"))
    assert lora_bytes(cfg) == whole and gains_of(cfg)[4]["training"] == gains[4]["training"]
    with pytest.raises(UserError, match="--holdout 5 leaves none of 5 images to train"):
        z.hold_out(z.plan_samples(cfg), dataclasses.replace(cfg, holdout=5))


@pytest.fixture
def reported(make_config, tmp_path):
    """A run with a report, of prompts and captions that are HTML."""
    for number in range(4):
        draw(tmp_path / "shapes" / f"{number}.png", (64, 64), (60 * number, 40, 200))
        (tmp_path / "shapes" / f"{number}.txt").write_text(f"<b>{number}</b> & more")
    cfg = make_config(
        instance_data_dir=str(tmp_path / "shapes"), output_dir=str(tmp_path / "<i> 狗 #1"), max_train_steps=6,
        holdout=1, validation_prompt=("<script>alert(1)</script>", "b"), validation_steps=2, num_validation_images=2,
        hub_token="hf_secret",
    )  # fmt: skip
    run(cfg)
    return Path(cfg.output_dir) / "report.html"


def test_the_report_shows_the_run_and_needs_nothing_else(reported):
    from html.parser import HTMLParser
    from urllib.parse import unquote

    text, seen = reported.read_text(encoding="utf-8"), []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append((tag, dict(attributes)))
    parser.feed(text)
    tags = [tag for tag, _ in seen]
    assert not {"script", "b", "i", "link", "iframe"} & set(tags) and "http" not in text and "hf_secret" not in text
    sources = [unquote(attributes["src"]) for tag, attributes in seen if tag == "img"]
    images = [(row, step) for row in ("0-0", "0-1", "1-0", "1-1") for step in (0, 2, 4, 6)]
    images += [(f"strength-{factor}", 6) for factor in (0, 0.5, 0.75, 1, 1.25)]
    assert sources == [f"validation/step-{step:06d}/{name}.png" for name, step in images]
    assert all((reported.parent / source).is_file() for source in sources)
    assert [attributes["href"] for tag, attributes in seen if tag == "a"] == [a["src"] for t, a in seen if t == "img"]
    titles = [attributes["aria-label"] for tag, attributes in seen if tag == "svg"]
    loss = "Loss by noise level, means of up to 2 values"
    assert titles == [loss, "Gain over the base model, in percent", "Learning rate", "Gradient norm"]
    assert "&lt;b&gt;0&lt;/b&gt; &amp; more" in text and "seconds_per_step" in text
    points = re.findall(r'points="([^"]*)"', text)
    assert [len(line.split()) for line in (points[0], *points[-4:])] == [6, 4, 4, 6, 6]
    assert sum(len(line.split()) for line in points[1:-4]) == 6, "a step of one example has a loss in one band"
    places = [tuple(map(float, place.split(","))) for line in points for place in line.split()]
    assert all(70 <= x <= 570 and 40 <= y <= 190 for x, y in places)


def test_curves_without_two_steps_are_not_drawn():
    assert z.draw_curves("Loss", {"a": []}) == z.draw_curves("Loss", {"a": [(1, 0.5)]}) == ""
    assert z.draw_curves("Loss", {"a": [(1, 0.5), (2, 0.5)]}).count("190.0") == 2, "a constant is a line"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium on this machine")
def test_the_report_in_a_browser(reported, tmp_path):
    """Chromium lays out every label inside its drawing, and loads all images but one that is missing on purpose."""
    script = """<script>onload = () => document.body.dataset.seen = JSON.stringify({
      images: [...document.images].map(one => one.naturalWidth), errors: window.failures || [],
      labels: [...document.querySelectorAll("svg text")].map(
        one => [one.textContent, one.getBBox().x, one.getBBox().y])
    }); onerror = message => (window.failures = window.failures || []).push(message)</script></body>"""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'p'}"]

    def look():
        copy = reported.with_name("copy.html")
        copy.write_text(reported.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
        command = ["chromium", *options, "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()]
        page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        parts = re.search(r'data-seen="([^"]*)"', page)
        return json.loads(parts[1].replace("&quot;", '"').replace("&amp;", "&"))

    seen = look()
    assert seen["images"] == [32] * 21 and seen["errors"] == []
    curves = re.findall("<polyline", reported.read_text(encoding="utf-8"))
    labels = [label for label, x, y in seen["labels"] if 0 <= x <= 600 and 0 <= y <= 210]
    assert len(labels) == len(seen["labels"]) == 4 * 4 + len(curves) and labels.count("step 6") == 4
    (reported.parent / "validation" / "step-000002" / "0-0.png").unlink()
    assert sorted(look()["images"]) == [0] + [32] * 20


def test_when_images_are_generated(make_config, tmp_path):
    def steps(**changes):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        run(make_config(max_train_steps=4, validation_steps=2, num_inference_steps=1, **changes))
        return sorted({path.parent.name for path in (tmp_path / "out").glob("validation/*/*.png")})

    assert steps() == []
    assert steps(validation_prompt=("a",)) == ["step-000000", "step-000002", "step-000004"]
    assert steps(validation_prompt=("a",), skip_final_inference=True) == ["step-000000", "step-000002"]
    assert steps(final_validation_prompt="a") == ["step-000004"]


def test_class_images_are_generated_once_and_only_the_missing(make_config, tmp_path, capsys):
    draw(tmp_path / "classes" / "mine.png")
    cfg = make_config(
        with_prior_preservation=True, class_data_dir=str(tmp_path / "classes"), class_prompt="dog", num_class_images=4,
        sample_batch_size=2, max_train_steps=7, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    run(cfg)
    assert "generating class images: 100%|██████████| 2/2" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "classes").iterdir())
    assert names == ["class-00000.png", "class-00001.png", "class-00002.png", "mine.png"]
    assert len([*(tmp_path / "cache").rglob("latents/*.safetensors")]) == 5 + 4, "each image has latents of its own"
    first = lora_bytes(cfg)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "classes" / "class-00001.png").unlink()
    run(dataclasses.replace(cfg, sample_batch_size=1))
    assert lora_bytes(cfg) == first, "a class image depends on its name alone"


# =====================================================================================================================
# Artifacts
# =====================================================================================================================


def apply_like_a_loader_that_knows_alpha_tensors(model, file):
    """Merge a LoRA as ComfyUI's kind of loader does: scale alpha / rank where an .alpha tensor says so, else 1."""
    transformer, state = z.load_transformer(Path(model), FP32, torch.float32), load_file(file)
    for name in {key.rsplit(".lora_", 1)[0] for key in state}:
        a, b = state[f"{name}.lora_A.weight"].float(), state[f"{name}.lora_B.weight"].float()
        scale = state[f"{name}.alpha"] / len(a) if f"{name}.alpha" in state else 1
        transformer.get_submodule(name.removeprefix("transformer.")).weight.data += scale * b @ a
    return transformer


@pytest.mark.parametrize(("alpha", "tolerance"), [(4.0, 1e-5), (7.0, 1e-5)])
def test_the_file_means_the_same_everywhere(alpha, tolerance, make_config, model, tmp_path):
    cfg = make_config(lora_alpha=alpha)
    live, _ = with_lora(model, cfg, b_std=0.3)
    batch, sigmas = make_batch(), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = z.predict_velocity(live.eval(), batch.latents, sigmas, batch.prompt_embeds)
    z.finish_lora(make_run(cfg, live))
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    pipe = ZImagePipeline.from_pretrained(model)
    bare = z.load_transformer(model, FP32, torch.float32)
    pipe.load_lora_weights(file.parent)
    others = [pipe.transformer, apply_like_a_loader_that_knows_alpha_tensors(model, file), bare]
    with torch.no_grad():
        outputs = [z.predict_velocity(t.eval(), batch.latents, sigmas, batch.prompt_embeds) for t in others]
    assert torch.allclose(outputs[0], expected, atol=tolerance) and torch.allclose(outputs[1], expected, atol=1e-4)
    assert (outputs[2] - expected).abs().max() > 0.01, "the LoRA must matter in this test"


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_the_last_images_use_the_weights_as_the_file_holds_them(alpha, make_config, model):
    cfg = make_config(mixed_precision="bf16", lora_alpha=alpha)
    live, _ = with_lora(model, cfg, torch.bfloat16, b_std=0.3)
    before = {name: tensor.clone() for name, tensor in z.lora_parameters(live).items()}
    file = load_file(z.finish_lora(make_run(cfg, live)))
    after = z.lora_parameters(live)
    assert any(not torch.equal(before[name], after[name]) for name in before), "rounding to bf16 must show"
    for name, tensor in z.export_lora(after, cfg.lora_scale, torch.float32).items():
        assert torch.allclose(tensor, file[name].float(), rtol=1e-6)


def test_the_file_itself(make_config, tmp_path):
    cfg = make_config(mixed_precision="bf16", lora_alpha=8.0, instance_prompt="a photo of sks dog")
    run(cfg)
    path = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    state = load_file(path)
    assert all(key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert header["modelspec.architecture"] == "z-image/lora" and header["modelspec.resolution"] == "32x32"
    assert header["modelspec.trigger_phrase"] == "a photo of sks dog" and "lora_adapter_metadata" not in header
    first = path.read_bytes()
    run(dataclasses.replace(cfg, output_dir=str(tmp_path / "other")))
    assert (tmp_path / "other" / path.name).read_bytes() == first
    run(dataclasses.replace(cfg, upcast_before_saving=True, overwrite_output_dir=True))
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def some_lora(kind, model, folder):
    """Write a LoRA with random matrices in one of the formats that exist, with alpha / rank = 2."""
    generator, state = torch.Generator().manual_seed(0), {}
    modules = z.make_empty_transformer(model).named_modules()
    sizes = {name: module.weight.shape for name, module in modules if isinstance(module, nn.Linear)}
    for rank, layer in (
        (4, "layers.0.attention.to_q"),
        (2, "layers.1.feed_forward.w2"),
        (4, "noise_refiner.0.attention.to_v"),
    ):
        rank = 4 if kind == "peft" else rank  # it has one rank for all layers, unless it lists exceptions
        tensors = {"A": torch.randn(rank, sizes[layer][1], generator=generator)}
        tensors["B"] = torch.randn(sizes[layer][0], rank, generator=generator)
        names = {"A": "lora_A", "B": "lora_B"} if kind in ("ours", "peft") else {"A": "lora_down", "B": "lora_up"}
        prefix = {"comfy": "diffusion_model.", "kohya": "lora_unet_"}.get(kind, "transformer.")
        place = prefix + (layer.replace(".", "_") if kind == "kohya" else layer)
        state |= {f"{place}.{names[half]}.weight": 0.1 * tensor for half, tensor in tensors.items()}
        state |= {f"{place}.alpha": torch.tensor(2.0 * rank)} if kind in ("comfy", "kohya") else {}
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q", "w2", "to_v"]}
    header = {"lora_adapter_metadata": json.dumps(settings)} if kind == "peft" else {}
    save_file(state, folder / f"{kind}.safetensors", {"format": "pt"} | header)
    return folder / f"{kind}.safetensors"


@pytest.mark.parametrize("kind", ["ours", "peft", "comfy", "kohya"])
def test_a_run_starts_from_a_lora(kind, model, make_config, tmp_path, capsys):
    """The new LoRA predicts what diffusers predicts with the file, and the run goes on from there."""
    file, note = some_lora(kind, model, tmp_path), "--init_lora: rank 4 in 3 layers, whatever --rank and --lora_layers"
    cfg, lora = z.read_lora(make_config(init_lora=str(file), lora_alpha=6.0), z.make_empty_transformer(model))
    assert note in capsys.readouterr().out
    transformer, _ = with_lora(model, cfg)
    z.start_from(lora, transformer, cfg)
    pipe = ZImagePipeline.from_pretrained(model)
    pipe.load_lora_weights(str(file))
    batch, sigmas = make_batch(), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        one, other = (
            z.predict_velocity(each, batch.latents, sigmas, batch.prompt_embeds)
            for each in (transformer, pipe.transformer)
        )
        pipe.unload_lora_weights()
        plain = z.predict_velocity(pipe.transformer, batch.latents, sigmas, batch.prompt_embeds)
    assert torch.allclose(one, other, atol=1e-5) and (one - plain).abs().max() > 1e-2
    assert cfg.rank == 4 and len(layers_of(model, cfg.lora_layers)) == 3
    run_cfg = make_config(init_lora=str(file), max_train_steps=1, learning_rate=1e-9)
    run(run_cfg)
    trained = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    for layer in {name.rsplit(".", 2)[0] for name in lora}:
        a, b = (trained[f"transformer.{layer}.{half}.weight"] for half in ("lora_A", "lora_B"))
        given = lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
        assert torch.allclose(b @ a, given, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["init_lora"] == str(file)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_training_adapter_is_on_only_while_training(quantization, model, make_config, tmp_path):
    """Its effect is diffusers' own; validation, the gain, and the file are without it."""
    file = some_lora("comfy", model, tmp_path)
    cfg = make_config(
        training_adapter=str(file), quantization=quantization, validation_prompt=("a",), holdout=1, max_train_steps=2,
        checkpointing_steps=1, learning_rate=1e-3, validation_steps=1,
    )  # fmt: skip
    transformer = z.load_transformer(model, cfg, torch.float32)
    z.load_training_adapter(transformer, cfg)
    parameters = z.add_lora(transformer, layers_of(model, cfg.lora_layers), cfg)
    assert parameters and set(map(id, parameters)) == set(map(id, z.lora_parameters(transformer).values()))
    assert not any("adapter" in name for name in z.lora_parameters(transformer))
    pipe = ZImagePipeline.from_pretrained(model, transformer=z.load_transformer(model, cfg, torch.float32))
    batch, sigmas = make_batch(), torch.tensor([0.3, 0.8])

    def predict(one):
        with torch.no_grad():
            return z.predict_velocity(one, batch.latents, sigmas, batch.prompt_embeds)

    base = predict(pipe.transformer)
    with z.strengths(transformer, adapter=0):
        assert torch.allclose(predict(transformer), base, atol=1e-5)
    pipe.load_lora_weights(str(file))
    adapted = predict(pipe.transformer)
    assert torch.allclose(predict(transformer), adapted, atol=1e-5) and (adapted - base).abs().max() > 1e-2
    run(cfg)
    plain = dataclasses.replace(cfg, training_adapter=None, output_dir=str(tmp_path / "plain"))
    run(plain)
    first = "validation/step-000000/0-0.png"
    assert (Path(cfg.output_dir) / first).read_bytes() == (Path(plain.output_dir) / first).read_bytes()
    assert losses_of(cfg)[0] != losses_of(plain)[0] and gains_of(cfg)[0]["training"]["gain"] == 0
    names = [load_file(Path(one.output_dir, z.LORA_FILE)).keys() for one in (cfg, plain)]
    assert names[0] == names[1]
    whole, state = file.read_bytes(), load_file(file)
    save_file({name: 2 * tensor for name, tensor in state.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="saved with different settings or data: --training_adapter"):
        run(dataclasses.replace(cfg, resume_from_checkpoint="checkpoint-1"))
    for old, new in (("diffusion_model", "text_encoder"), ("layers", "blocks")):
        save_file({name.replace(old, new): tensor for name, tensor in state.items()}, file, {"format": "pt"})
        with pytest.raises(UserError, match="--training_adapter .* does not fit this model|cannot be loaded"):
            z.load_training_adapter(z.load_transformer(model, cfg, torch.float32), cfg)
    file.write_bytes(whole)
    whole = lora_bytes(cfg)
    run(dataclasses.replace(cfg, resume_from_checkpoint="checkpoint-1"))
    assert lora_bytes(cfg) == whole


def test_a_training_adapter_that_cannot_be_loaded_is_named(model, make_config, tmp_path):
    (tmp_path / "a.safetensors").write_text("nonsense")
    with pytest.raises(UserError, match="--training_adapter .*b.safetensors is not a file"):
        z.make_plan(make_config(training_adapter=str(tmp_path / "b.safetensors")))
    cfg = make_config()
    whole = run(cfg).read_bytes()
    cfg = dataclasses.replace(cfg, overwrite_output_dir=True, training_adapter=str(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match="--training_adapter .*a.safetensors cannot be loaded"):
        run(cfg)
    assert lora_bytes(cfg) == whole, "the earlier run is deleted only when the new one can start"


def test_a_training_adapter_loads_without_warnings(workplace, model):
    some_lora("ours", model, workplace)
    flags = small_run(model, "--max_train_steps=1", "--training_adapter=ours.safetensors")
    done = run_script(*flags, cwd=workplace, env={"HF_HOME": "hf"})
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr


def test_a_distilled_model_is_validated_in_few_steps(model, tmp_path, capsys):
    common = ["--instance_data_dir=d", "--instance_prompt=p"]
    presets = {}
    for name in ("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo", str(model), str(tmp_path / "three")):
        FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "three" / "scheduler")
        cfg = parse_config([f"--pretrained_model_name_or_path={name}", *common])
        presets[Path(name).name] = (cfg.guidance_scale, cfg.num_inference_steps)
        assert any("undoes Turbo's distillation" in line for line in z.advice(cfg)) == cfg.is_distilled
    assert list(presets.values()) == [(4.0, 28), (0.0, 9), (4.0, 28), (0.0, 9)], presets
    cfg = parse_config(["--pretrained_model_name_or_path=a/b-turbo", "--guidance_scale=2", *common])
    assert (cfg.guidance_scale, cfg.num_inference_steps) == (2.0, 9), "flags take precedence"
    cfg = parse_config(["--pretrained_model_name_or_path=a/b", "--training_adapter=c/d", *common])
    assert cfg.num_inference_steps == 9 and not any("distillation" in line for line in z.advice(cfg))


def test_a_run_from_a_lora_resumes_exactly(model, make_config, tmp_path):
    cfg = make_config(init_lora=str(some_lora("ours", model, tmp_path)), max_train_steps=2, checkpointing_steps=1)
    run(cfg)
    whole = lora_bytes(cfg)
    with pytest.raises(UserError, match=r"--init_lora None \(was given\)"):
        run(dataclasses.replace(cfg, init_lora=None, resume_from_checkpoint="checkpoint-1"))
    plan = z.make_plan(dataclasses.replace(cfg, resume_from_checkpoint="checkpoint-1"))
    with pytest.raises(UserError, match=r" --seed x{200} \(was 0\)\. Restore"):
        z.check_continuity(cfg, plan.checkpoint, {"--seed": 500 * "x"})
    run(dataclasses.replace(cfg, resume_from_checkpoint="checkpoint-1"))
    assert lora_bytes(cfg) == whole


def test_a_file_that_is_no_lora_of_this_model_is_refused(model, make_config, tmp_path):
    file = some_lora("ours", model, tmp_path)
    state, empty = load_file(file), z.make_empty_transformer(model)
    names, cases = sorted(state), {}
    cases["lora_A.weight"] = {name.replace("layers.0", "layers.99"): tensor for name, tensor in state.items()}
    cases["w2.lora_magnitude"] = state | {"transformer.layers.1.feed_forward.w2.lora_magnitude_vector": torch.ones(2)}
    cases["to_q.lora_B.weight"] = state | {names[1]: torch.ones(3, 4)}
    cases["it is incomplete"] = {name: state[name] for name in names[1:]}
    cases["to_q.lora_A.weight"] = state | {names[0]: torch.full_like(state[names[0]], math.nan)}
    for words, tensors in cases.items():
        save_file(tensors, tmp_path / "odd.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"--init_lora .*odd.safetensors is no plain LoRA .*{words}"):
            z.read_lora(make_config(init_lora=str(tmp_path / "odd.safetensors")), empty)
    (tmp_path / "odd.safetensors").write_text("nonsense")
    settings = json.dumps({"transformer.r": 0, "transformer.lora_alpha": 1})
    save_file(state, tmp_path / "zero.safetensors", {"format": "pt", "lora_adapter_metadata": settings})
    for name in ("odd", "zero"):
        with pytest.raises(UserError, match=f"--init_lora .*{name}.safetensors cannot be loaded"):
            z.read_lora(make_config(init_lora=str(tmp_path / f"{name}.safetensors")), empty)
    wider = {
        name: torch.cat([x, x], int("lora_B" in name)) if "to_q.lora_B" in name else x for name, x in state.items()
    }
    save_file(wider, tmp_path / "wider.safetensors", {"format": "pt"})
    cfg, lora = z.read_lora(make_config(init_lora=str(tmp_path / "wider.safetensors")), empty)
    transformer = z.load_transformer(model, cfg, torch.float32)
    z.add_lora(transformer, z.resolve_lora_layers(cfg.lora_layers, empty), cfg)
    z.start_from(lora, transformer, cfg)  # the surplus meets rows that are not in the file
    torch.save(state, tmp_path / "odd.bin")
    for name in ("nowhere.safetensors", str(tmp_path), str(tmp_path / "odd.bin")):
        with pytest.raises(UserError, match="--init_lora .* is not a .safetensors file; specify one"):
            z.make_plan(make_config(init_lora=name))


def test_model_card(make_config, tmp_path):
    from huggingface_hub import ModelCard

    more = {"validation_prompt": ("a dog",), "num_validation_images": 2, "checkpointing_steps": 1}
    run(make_config(instance_prompt='a "sks" dog: 狗', **more))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.instance_prompt == 'a "sks" dog: 狗' and card.data.license == "apache-2.0"
    assert "Earlier steps that the run also saved: checkpoint-1." in card.text
    assert '"max_train_steps": 2' in card.text and str(tmp_path) not in card.text
    for row in card.data.widget:
        assert (tmp_path / "out" / row["output"]["url"]).is_file() and f"]({row['output']['url']})" in card.text
    assert len(card.data.widget) == 2 and '"a dog"' in card.text and "rank 4, alpha / rank 1 (folded" in card.text
    assert str(tmp_path) not in card.content
    assert z.one_line("a\n---\n<b>`x`</b> ![y](z) | #1") == "a --- b x /b ! y z 1"
    ast.parse(re.search(r"```python\n(.*?)```", card.text, re.S)[1])


def test_overwriting_removes_only_what_this_program_wrote(make_config, tmp_path):
    run(make_config(max_train_steps=3, validation_prompt=("a",)))
    for name in ("notes.txt", "validation/mine.png", "validation/step-000000/1-mine-2.png", "checkpoint-mine/x"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("keep")
    with pytest.raises(UserError, match="contains another run"):
        run(make_config())
    run(make_config(overwrite_output_dir=True))
    left = {path.name for path in (tmp_path / "out").iterdir()} - {
        ".lock",
        ".lock-holder",
    }  # runs agree on .lock's inode
    assert left == {
        "notes.txt", "validation", "checkpoint-mine", "checkpoint-2",
        "pytorch_lora_weights.safetensors", "config.json",
        "metrics.jsonl", "README.md", "report.html",
    }  # fmt: skip
    left = sorted(path.name for path in (tmp_path / "out" / "validation").rglob("*"))
    assert left == ["1-mine-2.png", "mine.png", "step-000000"], "a folder that is empty goes, too"


def test_overwriting_follows_no_link_and_spares_other_names(make_config, tmp_path):
    out, cfg = tmp_path / "out", make_config(max_train_steps=1)
    run(cfg)
    mine = shutil.copytree(out / "checkpoint-1", tmp_path / "mine")
    (out / "superseded-checkpoint-1-deadbeef").symlink_to(mine)
    z.write_file(out / "superseded-checkpoint-mine" / "notes.txt", b"keep")
    z.write_file(out / "superseded-checkpoint-1-0123abcd" / "state.safetensors", b"old")
    shutil.copytree(out / "checkpoint-1", out / "checkpoint-7")
    (out / "checkpoint-7" / "state.safetensors").unlink()
    run(dataclasses.replace(cfg, overwrite_output_dir=True))
    assert {path.name for path in mine.iterdir()} == {"state.safetensors", "pytorch_lora_weights.safetensors"}
    left = {path.name for path in out.glob("*checkpoint*")}
    assert left == {"checkpoint-1", "superseded-checkpoint-1-deadbeef", "superseded-checkpoint-mine"}


def test_wandb(workplace, model):
    """A real offline run holds the scalars of every step and captioned images, and no secret."""
    flags = [f"--pretrained_model_name_or_path={model}", "--instance_data_dir=dog", "--instance_prompt=p", "--rank=2"]
    flags += ["--report_to=wandb", "--hub_token=hf_secret", "--validation_prompt=a sks dog, 一只sks狗"]
    flags += SMALL.split()
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HOME": str(workplace / "hf")}
    done = run_script(*flags, cwd=workplace, env=os.environ | env)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = workplace.rglob("*.wandb")
    content = record.read_bytes()
    for name in ("loss", "grad_norm", "lr", "epoch", "seconds"):
        assert len(re.findall(rb"\b%s\b" % name.encode(), content)) >= 2, name
    captions = re.findall(rb'captions.{1,5}(\[".*?"\])', content, re.S)
    assert [json.loads(text) for text in captions[:2]] == [["a sks dog, 一只sks狗"]] * 2
    assert len(list(record.parent.rglob("validation_*.png"))) == 2
    everything = b"".join(path.read_bytes() for path in workplace.rglob("*") if path.is_file())
    assert b"hf_secret" not in everything and b"hf_secret" not in (done.stdout + done.stderr).encode()


def test_tensorboard(make_config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(make_config(report_to="tensorboard", validation_prompt=("a",)))
    events = EventAccumulator(str(next((tmp_path / "out" / "logs").rglob("events*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Images("validation")] == [0, 2]


def test_trackers_are_closed_when_a_run_is_stopped(make_config, monkeypatch):
    """Otherwise wandb would mark the run as crashed."""
    log, writers = z.log_metrics, set()

    def log_and_stop(run, metrics):
        log(run, metrics)
        writers.add(run.accelerator.get_tracker("tensorboard", unwrap=True))
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(z, "log_metrics", log_and_stop)
    with pytest.raises(z.Stopped, match="stopped by SIGTERM after step 2, which is saved; resume with"):
        run(make_config(report_to="tensorboard", max_train_steps=9))
    assert [writer.file_writer for writer in writers] == [None], "it has let go of its file"


def test_trackers_that_cannot_start_get_a_sentence(make_config, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--report_to wandbb: accelerate supports all,.*wandb"):
        run(make_config(report_to="wandbb"))
    assert make_config(report_to="wandb, tensorboard,wandb").trackers == ["wandb", "tensorboard"]
    assert make_config(report_to="none").trackers == []
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match="--report_to wandb cannot start: .*wandb login"):
        run(make_config(report_to="wandb"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_demo_replaces_only_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "mine" / "0.png")
    small = ["--demo", "--max_train_steps=1", "--num_inference_steps=1"]
    run(parse_config(small))
    said = capsys.readouterr().out
    assert "z-image-demo/report.html" in said and "accelerate launch" in said
    run(parse_config([*small, "--instance_data_dir=mine", "--rank=2"]))
    assert json.loads((tmp_path / "z-image-demo" / "config.json").read_text())["rank"] == 2
    assert len((tmp_path / "z-image-demo" / "metrics.jsonl").read_text().splitlines()) == 1
    settings = json.loads((tmp_path / "z-image-demo" / "config.json").read_text())
    (tmp_path / "z-image-demo" / "config.json").write_text(json.dumps(settings | {"demo": False}))
    with pytest.raises(UserError, match="contains another run"):
        run(parse_config(small))


def run_with_hub(hub, workplace, model, *more):
    """Train in `workplace` and upload to the stand-in."""
    flags = [f"--pretrained_model_name_or_path={model}", "--instance_data_dir=dog", "--instance_prompt=a sks dog"]
    flags += ["--output_dir=my-dog", "--validation_prompt", "a", "--push_to_hub", *SMALL.split(), *more]
    env = {**hub.env, "HF_HOME": str(workplace / "hf")}
    return run_script(*flags, cwd=workplace, env=env)


def test_push_to_hub(hub, workplace, model):
    """LoRA, card and images go up; checkpoints, metrics, caches, foreign files, tokens and local paths do not."""
    (workplace / "my-dog" / "private").mkdir(parents=True)
    (workplace / "my-dog" / "private" / "diary.png").write_bytes(b"x")
    more = ["--hub_model_id=org/dog", "--hub_private_repo", "--hub_token=hf_secret", "--report_to=tensorboard"]
    done = run_with_hub(hub, workplace, model, *more)
    assert done.returncode == 0 and "uploaded to org/dog" in done.stdout, done.stderr[-3000:]
    images = [f"validation/step-00000{step}/{name}.png" for step in (0, 2) for name in ("0-0", "sheet")]
    images += [f"validation/step-000002/strength-{factor}.png" for factor in z.STRENGTHS]
    assert sorted(hub.files) == sorted(["pytorch_lora_weights.safetensors", "README.md", *images])
    assert not any(str(path).encode() in content for path in (model, workplace) for content in hub.files.values())
    assert all((workplace / "my-dog" / name).read_bytes() == content for name, content in hub.files.items())
    made = [json.loads(body) for _, name, _, body in hub.requests if name == "/api/repos/create"]
    assert made == [{"name": "dog", "organization": "org", "private": True}] or made[0]["visibility"] == "private"
    assert {token for _, name, token, _ in hub.requests if name.startswith("/api/models")} == {"Bearer hf_secret"}
    written = [path for path in (workplace / "my-dog").rglob("*") if path.is_file()]
    assert (workplace / "my-dog" / "checkpoint-2" / "state.safetensors") in written
    assert [path for path in written if b"hf_secret" in path.read_bytes()] == []
    assert "hf_secret" not in done.stdout + done.stderr + repr(parse_config([*NEEDED, *more]))


def test_a_failed_upload_keeps_the_lora_and_tells_how_to_retry(hub, workplace, model):
    hub.is_broken = True
    done = run_with_hub(hub, workplace, model, "--skip_final_inference")
    assert done.returncode == 2 and (workplace / "my-dog" / "pytorch_lora_weights.safetensors").is_file()
    assert "error: the LoRA is complete and safe in my-dog, but the upload failed: " in done.stderr
    assert "try again with: hf upload me/my-dog 'my-dog' . --include='pytorch_lora_weights" in done.stderr
    assert "Traceback" not in done.stderr
    hub.is_broken = False
    command = re.search(r"try again with: (hf upload .*)", done.stderr)[1]
    env = {**os.environ, **hub.env, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], cwd=workplace, env=env, check=True, capture_output=True)
    assert {"pytorch_lora_weights.safetensors", "README.md"} <= set(hub.files)
    assert not any("checkpoint" in name for name in hub.files)


def test_a_hub_that_cannot_be_reached_stops_the_run_before_it_starts(hub, workplace, model):
    hub.env["HF_ENDPOINT"] = "http://127.0.0.1:1"
    done = run_with_hub(hub, workplace, model)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: --push_to_hub: the repository my-dog cannot be used: " in done.stderr
    assert "check your network and login (`hf auth login`" in done.stderr and not list(
        (workplace / "my-dog").glob("*.safetensors")
    )


# =====================================================================================================================
# Flags
# =====================================================================================================================


def schedule_of(cfg):
    """The run's arithmetic for five images and two class images."""
    samples = [sample(n) for n in range(5)] + [sample(5 + n, is_prior=True) for n in range(2)]
    return z.make_schedule(cfg, samples, 1)


def levels_of(cfg):
    """The noise levels of the first examples."""
    cfg = z.resolve_timestep_shift(cfg, Path(cfg.pretrained_model_name_or_path))
    return z.noise_levels([z.sample_quantile(cfg, number) for number in range(9)], cfg).tolist()


def validation_times(cfg):
    """Steps with images."""
    schedule = schedule_of(dataclasses.replace(cfg, max_train_steps=300))
    return [step for step in range(300) if schedule.is_validation_step(step)]


def augmentations(cfg):
    """Flips and crops."""
    return [z.sample_augmentation(cfg, n) for n in range(20)]


def order(cfg):
    """The order of the examples."""
    return [index for _, index in itertools.islice(z.example_stream([sample(n) for n in range(9)], cfg), 9)]


def optimizer_group(cfg):
    """Return the optimizer's settings."""
    optimizer = z.make_optimizer([nn.Parameter(torch.zeros(1))], cfg)
    return {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}


def rates(cfg):
    """The learning rate at twenty steps."""
    rate = z.make_learning_rate(cfg, schedule_of(cfg))
    return [rate(step) for step in range(20)]


def lora_of(cfg):
    """Names and shapes of the LoRA, and its dropout."""
    transformer, _ = with_lora(Path(cfg.pretrained_model_name_or_path), cfg)
    dropout = [module.p for module in transformer.modules() if isinstance(module, nn.Dropout)]
    return {name: tensor.shape for name, tensor in z.lora_parameters(transformer).items()}, set(dropout)


def trained(cfg):
    """The LoRA of a whole run."""
    run(cfg)
    return lora_bytes(cfg)


def images_of(cfg):
    """All images that a whole run leaves."""
    run(cfg)
    return {path.name: path.read_bytes() for path in Path(cfg.output_dir).parent.rglob("*.png")}


def latents_of(cfg):
    """Whether a whole run leaves latents in the cache."""
    run(cfg)
    return (cfg.encodings_folder / "latents").is_dir()


def prompt_length(cfg):
    """Tokens of a long prompt."""
    prompts = ["word " * 60]
    return len(tokens_of(cfg.pretrained_model_name_or_path, prompts, cfg.max_sequence_length)[prompts[0]])


def planned(cfg):
    """The samples of the plan."""
    return [(s.path, s.prompt, s.bucket) for s in z.plan_samples(cfg)]


def has_deterministic_kernels(cfg):
    z.make_accelerator(cfg)
    return torch.are_deterministic_algorithms_enabled()


def product_precision(cfg):
    """How fp32 products are computed once the accelerator is made."""
    torch.set_float32_matmul_precision("highest")
    z.make_accelerator(cfg)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return precision


def tracked(cfg):
    """Where the trackers' files are after a whole run."""
    run(cfg)
    return {path.parent.relative_to(cfg.output_dir).parts[0] for path in Path(cfg.output_dir).rglob("events.out*")}


PRIOR = {
    "with_prior_preservation": True,
    "class_data_dir": "no-such-folder",
    "class_prompt": "dog",
    "num_class_images": 2,
}
SEEN = {"validation_prompt": ("a",)}
COURSE = {"max_train_steps": 20, "lr_warmup_steps": 2}

# flag: what is observed, two values, other settings
OBSERVED = {
    "max_sequence_length": (prompt_length, 50, 100, {}),
    "instance_prompt": (planned, "a", "b", {}),
    "repeats": (schedule_of, 1, 2, {}),
    "resolution": (planned, 32, 48, {}),
    "use_aspect_ratio_buckets": (planned, False, True, {"resolution": 96}),
    "aspect_ratio_buckets": (planned, None, "16,32;48,48", {}),
    "center_crop": (augmentations, False, True, {"cache_latents": False}),
    "random_flip": (augmentations, False, True, {}),
    "seed": (order, 0, 1, {}),
    "with_prior_preservation": (planned, False, True, PRIOR),
    "prior_preservation": (planned, "images", "base", PRIOR),
    "class_data_dir": (planned, "one", "two", PRIOR),
    "class_prompt": (planned, "a", "b", PRIOR),
    "num_class_images": (planned, 1, 2, PRIOR),
    "cache_dir": (lambda cfg: cfg.encodings_folder, "a", "b", {}),
    "rank": (lora_of, 2, 4, {}),
    "lora_alpha": (lambda cfg: cfg.lora_scale, 2.0, 4.0, {}),
    "lora_dropout": (lora_of, 0.0, 0.5, {}),
    "lora_layers": (lora_of, "to_q", "to_k", {}),
    "stratified_noise": (trained, True, False, {}),
    "caption_dropout": (trained, 0.0, 0.9, {}),
    "timestep_shift": (levels_of, "1", "scheduler", {}),
    "optimizer": (optimizer_group, "adamw", "prodigy", {}),
    "learning_rate": (optimizer_group, 0.1, 0.2, {}),
    "adam_beta1": (optimizer_group, 0.8, 0.9, {}),
    "adam_beta2": (optimizer_group, 0.8, 0.9, {}),
    "adam_weight_decay": (optimizer_group, 0.0, 0.1, {}),
    "adam_epsilon": (optimizer_group, 1e-8, 1e-4, {}),
    "prodigy_beta3": (optimizer_group, None, 0.5, PRODIGY),
    "prodigy_decouple": (optimizer_group, True, False, PRODIGY),
    "prodigy_use_bias_correction": (optimizer_group, True, False, PRODIGY),
    "prodigy_safeguard_warmup": (optimizer_group, True, False, PRODIGY),
    "max_grad_norm": (trained, 1.0, 1e-9, {}),
    "lr_scheduler": (rates, "constant", "linear", COURSE),
    "lr_warmup_steps": (rates, 2, 4, COURSE | {"lr_scheduler": "cosine"}),
    "lr_num_cycles": (rates, 1, 3, COURSE | {"lr_scheduler": "cosine_with_restarts"}),
    "lr_power": (rates, 1.0, 2.0, COURSE | {"lr_scheduler": "polynomial"}),
    "lr_step_rules": (rates, "1:5,0.1", "1:9,0.1", COURSE | {"lr_scheduler": "piecewise_constant"}),
    "max_train_steps": (schedule_of, 3, 4, {}),
    "num_train_epochs": (schedule_of, 1, 2, {"max_train_steps": None}),
    "train_batch_size": (schedule_of, 1, 2, {}),
    "gradient_accumulation_steps": (schedule_of, 1, 2, {}),
    "validation_epochs": (validation_times, 5, 6, {}),
    "validation_steps": (validation_times, 5, 6, {}),
    "prior_generation_precision": (images_of, "bf16", "fp32", PRIOR),
    "cache_latents": (latents_of, True, False, {}),
    "num_validation_images": (images_of, 1, 2, SEEN),
    "guidance_scale": (images_of, 0.0, 2.0, SEEN),
    "negative_prompt": (images_of, "", "blurry", SEEN),
    "num_inference_steps": (images_of, 1, 2, SEEN),
    "validation_resolution": (images_of, 32, 48, SEEN),
    "scale_lr": (rates, False, True, {"train_batch_size": 2, "gradient_accumulation_steps": 3}),
    "allow_tf32": (product_precision, False, True, {}),
    "deterministic": (has_deterministic_kernels, False, True, {}),
    "logging_dir": (tracked, "logs", "elsewhere", {"report_to": "tensorboard"}),
}

# flags whose difference a test of their own shows
SHOWN = {
    "training_adapter": "test_the_training_adapter_is_on_only_while_training",
    "holdout": "test_the_gain_is_measured_on_held_out_and_on_training_images",
    "masked_loss": "test_runs_with_masks_differ_by_the_masks_and_resume_exactly",
    "mask_background": "test_runs_with_masks_differ_by_the_masks_and_resume_exactly",
    "init_lora": "test_a_run_starts_from_a_lora",
    "trigger_word": "test_the_trigger_word_is_in_every_prompt",
    "pretrained_model_name_or_path": "test_hub_name_is_found_in_the_cache_and_answered_in_a_sentence_otherwise",
    "instance_data_dir": "test_two_processes_follow_the_curve_of_one",
    "dataset_name": "test_dataset_folder",
    "dataset_config_name": "test_dataset_folder",
    "image_column": "test_dataset_folder",
    "caption_column": "test_dataset_folder",
    "sample_batch_size": "test_class_images_are_generated_once_and_only_the_missing",
    "weighting_scheme": "test_noise_levels",
    "logit_mean": "test_noise_levels",
    "logit_std": "test_noise_levels",
    "mode_scale": "test_noise_levels",
    "prior_loss_weight": "test_class_images_count_by_their_weight",
    "text_encoder_lr": "test_advice",
    "adam_weight_decay_text_encoder": "test_advice",
    "local_rank": "test_advice",
    "gradient_checkpointing": "test_gradient_checkpointing_gives_equal_gradients",
    "checkpoint_blocks": "test_on_a_gpu_only_recomputation_is_chosen",
    "dry_run": "test_a_dry_run_reports_the_costs_and_writes_nothing",
    "fit": "test_fit_takes_the_fastest_that_fits",
    "compile": "test_compiled_runs_resume_exactly",
    "mixed_precision": "test_changed_ingredients_miss_the_cache",
    "checkpointing_steps": "test_checkpoints_are_whole_rotated_and_without_pickles",
    "checkpoints_total_limit": "test_checkpoints_are_whole_rotated_and_without_pickles",
    "resume_from_checkpoint": "test_resume_is_exact",
    "checkpointing_minutes": "test_checkpoints_by_the_clock",
    "max_train_minutes": "test_the_time_for_training_can_be_limited",
    "resume_anyway": "test_changed_settings_are_refused_with_the_list_unless_meant",
    "on_nan": "test_a_nan_can_be_skipped_and_is_counted",
    "validation_prompt": "test_when_images_are_generated",
    "final_validation_prompt": "test_when_images_are_generated",
    "skip_final_inference": "test_when_images_are_generated",
    "output_dir": "test_the_file_itself",
    "overwrite_output_dir": "test_overwriting_removes_only_what_this_program_wrote",
    "upcast_before_saving": "test_the_file_itself",
    "report_to": "test_tensorboard",
    "demo": "test_demo_replaces_only_its_own",
    "revision": "test_hub_name_is_found_in_the_cache_and_answered_in_a_sentence_otherwise",
    "variant": "test_variant",
    "use_8bit_adam": "test_8_bit_adam_keeps_its_state_in_8_bits",
    "quantization": "test_a_quantized_model_is_read_from_shards_and_its_gaps_are_named",
    "do_fp8_training": "test_fp8_training_multiplies_in_fp8_where_the_hardware_can",
    "bnb_quantization_config_path": "test_the_readmes_bitsandbytes_files",
    "offload": "test_offloaded_encoders_give_the_same_and_hold_one_weight_at_a_time",
    "attention_backend": "test_attention_backends",
    "enable_npu_flash_attention": "test_attention_backends",
    "dataloader_num_workers": "test_batches_loaded_ahead_are_those_loaded_on_demand",
    "fsdp_text_encoder": "test_advice",
    "push_to_hub": "run_with_hub",
    "hub_model_id": "test_push_to_hub",
    "hub_token": "test_push_to_hub",
    "hub_private_repo": "test_push_to_hub",
}


def test_every_flag_has_a_test_of_its_effect():
    assert sorted([*OBSERVED, *SHOWN]) == sorted(field.name for field in dataclasses.fields(Config))
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    tests = {n.name: ast.unparse(n) for n in functions}
    assert {name: test for name, test in SHOWN.items() if name not in tests[test]} == {}


@pytest.mark.parametrize("name", OBSERVED)
def test_flag(name, make_config, tmp_path):
    observe, first, second, others = OBSERVED[name]
    seen = []
    for place, value in enumerate((first, second)):
        (tmp_path / str(place)).mkdir()
        folders = {"output_dir": str(tmp_path / str(place) / "out"), "cache_dir": str(tmp_path / str(place) / "cache")}
        if "class_data_dir" in others:
            folders["class_data_dir"] = str(tmp_path / "classes" / str(place))
        if observe in (images_of, latents_of):
            folders["class_data_dir"] = str(tmp_path / str(place) / "classes")
        else:
            folders.pop("cache_dir")
        changes = others | folders | {"learning_rate": others.get("learning_rate", 1e-2)} | {name: value}
        seen.append(observe(make_config(**changes)))
    assert seen[0] != seen[1]


# =====================================================================================================================
# Benchmarks
# =====================================================================================================================


@pytest.mark.benchmark
def test_memory_does_not_grow_with_the_number_of_images(model, tmp_path):
    """1,000 images of 1024 px are planned and cached with less than 300 MB above what 10 need."""
    peaks = []
    for count in (10, 1000):
        first = draw(tmp_path / f"{count}" / "0.jpg", (1024, 1024))
        for number in range(1, count):
            Image.open(first).save(first.with_name(f"{number}.jpg"), quality=50 + number % 50)
        flags = [f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={first.parent}", "--cache_latents"]
        flags += ["--instance_prompt=p", f"--cache_dir={tmp_path}/c{count}", f"--output_dir={tmp_path}/o{count}"]
        code = f"""import resource, runpy, sys
sys.argv = ["train.py", *{flags!r}, "--max_train_steps=1"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(re.search(r"PEAK (\d+)", done.stdout)[1]) / 1e3)
    assert peaks[1] - peaks[0] < 300, peaks


# =====================================================================================================================
# Ablation
# =====================================================================================================================

TOY_FOLDER = Path(os.environ.get("Z_IMAGE_TOY", HERE.parent / "shared" / "toy"))
TOY_ATTENTION, TOY_FEED_FORWARD = "to_k,to_q,to_v,to_out.0", "w1,w2,w3"
BASE = ["--prior_preservation=base", "--trigger_word=sks badge", "--class_prompt=circle"]
CLASS_IMAGES = ["--prior_preservation=images", "--class_prompt=circle", "--num_class_images=64"]
SEEDS = int(os.environ.get("Z_IMAGE_SEEDS", "3"))
STRONG = ["--learning_rate=3e-3", "--timestep_shift=6"]
ABLATION = {  # flags of each row; a name in `VARIANTS` also changes what has no flag
    "defaults": [],
    "learning rate 1.2e-3": ["--learning_rate=1.2e-3"],
    "learning rate 2e-3": ["--learning_rate=2e-3"],
    "constant learning rate": ["--lr_scheduler=constant"],
    "Prodigy": ["--optimizer=prodigy", "--learning_rate=1"],
    "timestep_shift 1": ["--timestep_shift=1"],
    "timestep_shift 2": ["--timestep_shift=2"],
    "timestep_shift 6": ["--timestep_shift=6"],
    "logit_mean -0.5": ["--logit_mean=-0.5"],
    "uniform noise levels, shifted": ["--weighting_scheme=none"],
    "independent noise levels": ["--stratified_noise=false"],
    "attention only": [f"--lora_layers={TOY_ATTENTION}"],
    "attention, feed-forward, adaLN": [f"--lora_layers={TOY_ATTENTION},{TOY_FEED_FORWARD},adaLN_modulation.0"],
    "without refiners": ["--lora_layers=layers"],
    "rank 4": ["--rank=4"],
    "rank 64": ["--rank=64"],
    "alpha = rank / 4": ["--lora_alpha=4"],
    "rsLoRA: alpha = 4 x rank": ["--lora_alpha=64"],
    "PEFT's default init": [],
    "PiSSA": [],
    "DoRA": [],
    "EMA of the weights, 0.98": [],
    "fewer ranks at high noise, as in T-LoRA": [],
    "lora_dropout 0.1": ["--lora_dropout=0.1"],
    "caption_dropout 0.1": ["--caption_dropout=0.1"],
    "one prompt, no captions": ["--instance_prompt=a photo of sks badge"],
    "base model preserved": BASE,
    "base model preserved, 2e-3": [*BASE, "--learning_rate=2e-3"],
    "captioned class images, 3e-3, weight 0.3": [*CLASS_IMAGES, "--learning_rate=3e-3", "--prior_loss_weight=0.3"],
    "base model preserved, 3e-3, weight 0.3, timestep_shift 6": [*BASE, *STRONG, "--prior_loss_weight=0.3"],
    "captioned class images, 3e-3, weight 0.1, timestep_shift 6": [*CLASS_IMAGES, *STRONG, "--prior_loss_weight=0.1"],
}  # fmt: skip


def with_lora_options(**changes):
    """Have the script pass other options to PEFT."""
    options = z.LoraConfig
    z.LoraConfig = lambda **given: options(**(given | changes))


def use_dora():
    """Train magnitudes, too, with PEFT's own layers."""
    with_lora_options(use_dora=True)
    export, z.load_lora = z.export_lora, lambda *_: None
    z.LEAN = {theirs: ours for theirs, ours in z.LEAN.items() if ours is not z.LeanLora}
    z.export_lora = lambda *given: {n.replace("vector.weight", "vector"): t for n, t in export(*given).items()}


def use_pissa():
    """Start from the largest singular values; the file holds the difference to that start, at twice the rank."""
    with_lora_options(init_lora_weights="pissa")
    add, export, start, z.load_lora = z.add_lora, z.export_lora, {}, lambda *_: None

    def add_lora(transformer, *given):
        parameters = add(transformer, *given)
        start.update({name: value.detach().clone() for name, value in z.lora_parameters(transformer).items()})
        return parameters

    def export_lora(state, *given):
        if not start.keys() >= state.keys():  # what was saved, on its way back into the model
            return {}
        halves = {n: (t, -start[n], 1) if "lora_B" in n else (t, start[n], 0) for n, t in state.items()}
        return export({n: torch.cat([t, old], axis) for n, (t, old, axis) in halves.items()}, *given)

    z.add_lora, z.export_lora = add_lora, export_lora


def use_ema():
    """Finish with a moving average of the weights, which forgets faster in the first steps."""
    train = z.train

    def averaged(run, batches):
        average = None
        for metrics in train(run, batches):
            now = z.lora_state_dict(run.transformer)
            average = average or {name: tensor.clone() for name, tensor in now.items()}
            for name, tensor in now.items():
                average[name].lerp_(tensor, 1 - min(0.98, (1 + metrics["step"]) / (10 + metrics["step"])))
            if metrics["step"] == run.plan.schedule.max_train_steps:
                z.load_lora(run.transformer, average)
            yield metrics

    z.train = averaged


def use_fewer_ranks_at_high_noise():
    """Train half of the ranks at pure noise, all without noise; the file has all."""
    loss, now = z.training_loss, []

    def training_loss(transformer, batch, cfg):
        now[:] = [batch.sigmas]
        return loss(transformer, batch, cfg)

    def forward(self, x):
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight * self.scaling["default"]
        kept = torch.arange(len(a)) < len(a) * (1 - now[0] / 2)[:, None]  # (B, r)
        return self.base_layer(x) + nn.functional.linear(nn.functional.linear(x, a) * kept[:, None], b)

    z.training_loss, z.LeanLora.forward = training_loss, forward


VARIANTS = {
    "PEFT's default init": functools.partial(with_lora_options, init_lora_weights=True),
    "PiSSA": use_pissa,
    "DoRA": use_dora,
    "EMA of the weights, 0.98": use_ema,
    "fewer ranks at high noise, as in T-LoRA": use_fewer_ranks_at_high_noise,
}


def train_variant(name, *flags):
    """Change the script, and run it; in a process of its own."""
    VARIANTS.get(name, lambda: None)()
    main(parse_config(list(flags)))


def write_toy_images(folder):
    """Write the instance images without and with captions, and class images of the base model."""
    for name in ("images", "captioned"):
        subprocess.run([sys.executable, str(TOY_FOLDER / "score.py"), "instances", str(folder / name)], check=True)
    for number, color in enumerate(("blue", "white", "orange", "black", "green")):
        (folder / "captioned" / f"{number}.txt").write_text(f"a sks badge on a {color} background")
    sys.path.insert(0, str(TOY_FOLDER))
    from world import COLORS, SHAPES

    pipe, chance = ZImagePipeline.from_pretrained(TOY_FOLDER / "toy-z-image"), random.Random(99)
    pipe.set_progress_bar_config(disable=True)
    (folder / "classes").mkdir()
    for number in range(64):
        shape, (color, background) = chance.choice([*SHAPES]), chance.sample([*COLORS], 2)
        prompt = f"a {color} {shape} on a {background} background"
        options = {"height": 64, "width": 64, "num_inference_steps": 20, "guidance_scale": 2.0}
        image = pipe(prompt, generator=torch.Generator().manual_seed(1000 + number), **options).images[0]
        image.save(folder / "classes" / f"{number}.png")
        (folder / "classes" / f"{number}.txt").write_text(prompt)


def toy_row(job):
    """Train on the toy and score the LoRA, in processes of their own."""
    folder, name, seed = job
    images = folder / ("images" if "--instance_prompt" in "".join(ABLATION[name]) else "captioned")
    output = folder / f"{list(ABLATION).index(name)}-{seed}"
    flags = [f"--pretrained_model_name_or_path={TOY_FOLDER / 'toy-z-image'}", f"--instance_data_dir={images}"]
    flags += ["--resolution=64", "--mixed_precision=no", "--rank=16", "--learning_rate=1e-3", "--max_train_steps=300"]
    flags += ["--train_batch_size=4", "--cache_latents", f"--seed={seed}", f"--cache_dir={folder / 'cache'}"]
    flags += [f"--class_data_dir={folder / 'classes'}"] if "--prior_preservation=images" in ABLATION[name] else []
    code = "import sys, test_dreambooth_lora_z_image as tests; tests.train_variant(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, *flags, f"--output_dir={output}", *ABLATION[name]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()][100:]
    score = [sys.executable, str(TOY_FOLDER / "score.py"), str(output)]
    figures = json.loads(subprocess.run(score, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return name, figures | {"std of the loss": torch.tensor(losses).std().item()}


@pytest.mark.ablation
@pytest.mark.skipif(not TOY_FOLDER.is_dir(), reason="needs the toy in ../shared/toy, or in Z_IMAGE_TOY")
def test_ablation(tmp_path):
    """Train with every row of `ABLATION` and several seeds; print the README's table: mean (smallest to largest)."""
    from concurrent.futures import ThreadPoolExecutor

    write_toy_images(tmp_path)
    jobs, found = [(tmp_path, name, seed) for seed in range(SEEDS) for name in ABLATION], collections.defaultdict(list)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, figures in pool.map(toy_row, jobs):
            found[name].append(figures)
            print(name, figures, flush=True)
    columns = list(figures)
    print(f"\n| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for name, rows in found.items():
        values = ([row[column] for row in rows] for column in columns)
        cells = [f"{sum(row) / len(row):.4f} ({min(row):.4f} to {max(row):.4f})" for row in values]
        print(f"| {name} | {' | '.join(cells)} |")
    assert {len(rows) for rows in found.values()} == {SEEDS}


# =====================================================================================================================
# On a GPU
# =====================================================================================================================

FULL_TRANSFORMER = {
    "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
}  # fmt: skip
FULL_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "use_quant_conv": False,
    "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
SIZES = {  # settings of the transformer (None: the demo model), resolution, and the lengths of two captions
    "full": (FULL_TRANSFORMER, 1024, (20, 200)),
    "small": (FULL_TRANSFORMER | {"n_layers": 2, "n_refiner_layers": 1}, 256, (20, 200)),
    "tiny": (None, 32, (5, 90)),
}
GPU_RUNS = {  # settings of each row of the table
    "bf16": {},
    "bf16, nothing recomputed": {"gradient_checkpointing": False},
    "bf16, attention recomputed": {"gradient_checkpointing": None, "checkpoint_blocks": "attention"},
    "chosen by itself": {"gradient_checkpointing": None},
    "fp8": {"quantization": "fp8"},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "bitsandbytes, 4 bits": {"bnb_quantization_config_path": "load_in_4bit"},
    "bitsandbytes, 8 bits": {"bnb_quantization_config_path": "load_in_8bit"},
    "fp8 training": {"do_fp8_training": True},
    "8-bit Adam": {"use_8bit_adam": True},
    "Prodigy": PRODIGY,
    "batch of 2 captions": {"train_batch_size": 2},
    "images decoded again": {"cache_latents": False, "dataloader_num_workers": 2},
    "validation": {"validation_prompt": ("a", "a longer prompt " * 20), "skip_final_inference": True},
    "compiled": {"max_train_steps": 3},
}


def write_random_model(folder, size):
    """Write a random Z-Image of a size in `SIZES`; the transformer tensor by tensor, as a full one has 12 GB."""
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    z.make_demo_model(folder)
    settings = SIZES[size][0]
    if settings is None:
        return
    for name in ("transformer", "vae", "text_encoder"):
        shutil.rmtree(folder / name)
    AutoencoderKL(**FULL_VAE).to(torch.bfloat16).save_pretrained(folder / "vae")
    encoder = Qwen3Config(
        vocab_size=300, hidden_size=2560, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    Qwen3Model(encoder).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel(**settings)
    transformer.save_config(folder / "transformer")
    device, files = "cuda" if torch.cuda.is_available() else "cpu", {}
    generator = torch.Generator(device).manual_seed(0)
    for number, (name, meta) in enumerate(transformer.named_parameters()):
        tensor = torch.randn(meta.shape, generator=generator, device=device, dtype=torch.bfloat16)
        tensor = tensor * meta.shape[-1] ** -0.5 if meta.dim() > 1 else (1 if "norm" in name else 0) + 0 * tensor
        files[name] = f"diffusion_pytorch_model-{number:05d}.safetensors"
        save_file({name: tensor.cpu().contiguous()}, folder / "transformer" / files[name], {"format": "pt"})
    for path in (folder / "transformer").glob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}-of-{len(files):05d}.safetensors"))
    files = {name: f"{Path(file).stem}-of-{len(files):05d}.safetensors" for name, file in files.items()}
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))


def gpu_config(folder, size, name):
    """The config of a row of the table."""
    _, resolution, lengths = SIZES[size]
    for number, length in enumerate(lengths):
        if not (folder / "images" / f"{number}.png").exists():
            draw(folder / "images" / f"{number}.png", (resolution, resolution), (90 * number, 40, 200))
            (folder / "images" / f"{number}.txt").write_text("x" * length)
    changes = dict(GPU_RUNS[name])
    if "bnb_quantization_config_path" in changes:
        file = folder / f"{changes['bnb_quantization_config_path']}.json"
        file.write_text(block_with(changes["bnb_quantization_config_path"], JSONS))
        changes["bnb_quantization_config_path"] = str(file)
    common = {
        "pretrained_model_name_or_path": str(folder / "model"), "instance_data_dir": str(folder / "images"),
        "output_dir": str(folder / re.sub(r"\W+", "-", name)), "cache_dir": str(folder / "cache"),
        "resolution": resolution, "gradient_checkpointing": True, "cache_latents": True, "max_train_steps": 4,
        "num_validation_images": 1, "num_inference_steps": 4, "checkpointing_steps": 1000,
    }  # fmt: skip
    return Config(**(common | changes))


def gpu_row(cfg):
    """Train; return the last loss, the median seconds, and the GPU memory of training in GiB: simulated and used."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    main(cfg)
    environment = json.loads((Path(cfg.output_dir) / "config.json").read_text())["environment"]
    memory = environment.get("training", {})
    seconds = environment["seconds_per_step"]
    return metrics_of(cfg)[-1]["loss"], seconds, memory.get("simulated", 0), memory.get("measured", 0)


def gpu_stop(folder, size, monkeypatch):
    """SIGTERM after the first step saves it, and the run that resumes ends with the bytes of one without a stop."""
    changes = {"output_dir": str(folder / "whole"), "max_train_steps": 3, "deterministic": True}
    whole = dataclasses.replace(gpu_config(folder, size, "bf16"), **changes)
    gpu_row(whole)
    cfg = dataclasses.replace(whole, output_dir=str(folder / "stopped"))
    log = z.log_metrics
    AcceleratorState._reset_state(True)
    with monkeypatch.context() as patch, pytest.raises(z.Stopped, match="stopped by SIGTERM after step 1"):
        patch.setattr(z, "log_metrics", lambda *args: log(*args) or os.kill(os.getpid(), signal.SIGTERM))
        main(cfg)
    gpu_row(dataclasses.replace(cfg, resume_from_checkpoint="latest"))
    files = [Path(one.output_dir, z.LORA_FILE).read_bytes() for one in (whole, cfg)]
    assert [row["step"] for row in metrics_of(cfg)] == [1, 2, 3] and files[0] == files[1]


def gpu_table(folder, size, monkeypatch, compiler):
    """Do every run; return the rows of the table, and what failed, by name."""
    write_random_model(folder / "model", size)
    rows, failures = {}, {}
    for name in GPU_RUNS:
        try:
            with monkeypatch.context() as patch:
                patch.setenv("ACCELERATE_DYNAMO_BACKEND", compiler if name == "compiled" else "NO")
                rows[name] = gpu_row(gpu_config(folder, size, name))
        except Exception as error:
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"
    try:
        gpu_stop(folder, size, monkeypatch)
    except (Exception, pytest.fail.Exception) as error:  # pytest's is no Exception
        traceback.print_exc()
        failures["SIGTERM"] = f"{type(error).__name__}: {error}"
    print(f"\n{'run (' + size + ')':<26} {'loss':>8} {'s/step':>8} {'simulated':>9} {'used GiB':>9}")
    for name, (loss, seconds, *memory) in rows.items():
        print(f"{name:<26} {loss:>8.4f} {seconds:>8.3f} {memory[0]:>9.2f} {memory[1]:>9.2f}")
    for name, error in failures.items():
        print(f"{name:<26} {error.splitlines()[0]}")
    return rows, failures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
@pytest.mark.parametrize("size", ["small", "full"])
def test_gpu(size, tmp_path, monkeypatch):
    """Every storage and optimizer trains, near the loss of bf16; prints seconds, simulated and measured memory."""
    rows, failures = gpu_table(tmp_path, size, monkeypatch, "INDUCTOR")
    shutil.rmtree(tmp_path / "model")
    assert failures == {}
    same_data = set(rows) - {"batch of 2 captions", "Prodigy", "compiled", "images decoded again"}
    assert {name: rows[name][0] for name in same_data if abs(rows[name][0] / rows["bf16"][0] - 1) > 0.05} == {}


def test_the_gpu_suite_runs_on_a_cpu(tmp_path, monkeypatch, capsys, bitsandbytes_on_cpu):
    """So that it is known to work when a GPU comes: its model, its runs, and its table, with a tiny model."""
    rows, failures = gpu_table(tmp_path, "tiny", monkeypatch, "EAGER")
    assert failures == {} and list(rows) == list(GPU_RUNS)
    table = capsys.readouterr().out.split("run (tiny)")[1]
    assert table.count("\n") == 1 + len(GPU_RUNS) and table.split()[:4] == ["loss", "s/step", "simulated", "used"]


def test_a_random_model_of_the_full_kind_can_be_loaded(tmp_path, monkeypatch):
    """The transformer that is written tensor by tensor is one that diffusers reads; here with narrow blocks."""
    small = FULL_TRANSFORMER | {"n_layers": 1, "n_refiner_layers": 1, "dim": 128, "n_heads": 1, "n_kv_heads": 1}
    monkeypatch.setitem(SIZES, "narrow", (small, 32, (5, 40)))
    monkeypatch.setitem(FULL_VAE, "block_out_channels", [32] * 4)
    write_random_model(tmp_path / "model", "narrow")
    loss, *_ = gpu_row(gpu_config(tmp_path, "narrow", "bf16"))
    assert 0 < loss < 10


# =====================================================================================================================
# Memory plan
# =====================================================================================================================

TEXT_ENCODER = {  # Qwen3-4B
    "model_type": "qwen3", "head_dim": 128, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 40960, "vocab_size": 151936,
}  # fmt: skip


def write_configs(folder, transformer):
    """Write a model folder without weights: the full-size text encoder and VAE, and a transformer of some size."""
    from diffusers import AutoencoderKL, ZImageTransformer2DModel

    z.make_demo_model(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    with torch.device("meta"):
        AutoencoderKL(**FULL_VAE).save_config(folder / "vae")
        ZImageTransformer2DModel(**transformer).save_config(folder / "transformer")
    (folder / "text_encoder" / "config.json").write_text(json.dumps(TEXT_ENCODER))
    return folder


@pytest.fixture(scope="session")
def full_size(tmp_path_factory):
    """The configuration files of the full-size model."""
    return write_configs(tmp_path_factory.mktemp("full") / "z-image", FULL_TRANSFORMER)


def workload_of(model, cfg, side, tokens=128, **changes):
    """A workload of square images."""
    layers = layers_of(Path(model), cfg.lora_layers)
    return z.Workload(Path(model), layers, (side, side), tokens, False)._replace(**changes)


def simulated(model, cfg, side, **changes):
    """The simulated training step."""
    work = workload_of(model, cfg, side, **changes)
    return next(
        phase for phase in z.simulate_transformer(cfg, work, z.simulate_vae(cfg, work)) if phase[0] == "training"
    )


BF16 = dataclasses.replace(FP32, mixed_precision="bf16", cache_latents=True)
ATTENTION_LORA = {"lora_layers": "to_q,to_k,to_v,to_out.0"}
SMALL_RUNS = {
    "as it is": {},
    "batch of 2": {"train_batch_size": 2},
    "192 pixels": {"resolution": 192},
    "rank 64": {"rank": 64},
    "attention": ATTENTION_LORA,
    "all recomputed": {"gradient_checkpointing": True},
    "attention recomputed": {"checkpoint_blocks": "attention"},
    "2 blocks recomputed": {"checkpoint_blocks": "2"},
    "accumulation": {"gradient_accumulation_steps": 3},
    "fp8": {"quantization": "fp8"},
    "int8": {"quantization": "int8", "gradient_checkpointing": True},
    "nf4": {"quantization": "nf4"},
    "bitsandbytes": {"bnb_quantization_config_path": "nf4.json"},
    "fp32": {"mixed_precision": "no"},
    "Prodigy": {"optimizer": "prodigy"},
    "8-bit Adam": {"use_8bit_adam": True},
}


@pytest.fixture(scope="session")
def mid_size(tmp_path_factory):
    """A model large enough that its activations and weights outweigh everything else, with weights."""
    from diffusers import ZImageTransformer2DModel

    folder = tmp_path_factory.mktemp("mid") / "z-image"
    z.make_demo_model(folder)
    transformer = ZImageTransformer2DModel(
        dim=256, n_layers=4, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=32,
        axes_dims=[16, 24, 24], axes_lens=[1024, 128, 128],
    )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    return folder


def stored_bytes(parameter):
    """Return the bytes that a parameter, quantized or not, occupies."""
    if hasattr(parameter, "qdata"):
        return parameter.qdata.nbytes + parameter.scale.nbytes
    state = getattr(parameter, "quant_state", None)
    return parameter.nbytes + (0 if state is None else state.absmax.nbytes + state.code.nbytes)


def inner_tensors(parameter):
    """Return the plain tensors that a parameter consists of."""
    return [parameter.qdata, parameter.scale] if hasattr(parameter, "qdata") else [parameter]


@pytest.mark.parametrize("name", SMALL_RUNS)
def test_simulated_and_allocated_peaks_agree(name, mid_size, make_config, tmp_path, bitsandbytes_on_cpu):
    """Within 2%: what fake tensors predict, and what the training loop allocates for real ones."""
    (tmp_path / "nf4.json").write_text(json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    changes = {"mixed_precision": "bf16", "resolution": 256, "rank": 16} | SMALL_RUNS[name]
    if "bnb_quantization_config_path" in changes:
        changes["bnb_quantization_config_path"] = str(tmp_path / "nf4.json")
    cfg = make_config(pretrained_model_name_or_path=str(mid_size), **changes)
    expected = simulated(mid_size, cfg, cfg.resolution, tokens=100)
    dtype, size, side = z.DTYPES[cfg.mixed_precision], cfg.train_batch_size, cfg.resolution // 8
    transformer, parameters = with_lora(mid_size, cfg, dtype)
    accelerator = z.make_accelerator(cfg)
    transformer, optimizer = accelerator.prepare(transformer, z.make_optimizer(parameters, cfg))
    batch = make_batch(size, side, dtype=dtype)
    batch = batch._replace(
        latents=torch.randn(size, 16, side, side), prompt_embeds=[torch.randn(100, 32).to(dtype) for _ in range(size)]
    )
    weights = sum(stored_bytes(parameter) for parameter in transformer.parameters())
    gc.collect()
    with z.MemoryCounter(torch.Tensor, nn.Parameter) as memory:
        for tensor in [
            *itertools.chain(*map(inner_tensors, transformer.parameters())),
            batch.latents,
            *batch.prompt_embeds,
        ]:
            memory.living.add(tensor.untyped_storage())  # a view of it allocates nothing
        steps = z.train(make_run(cfg, transformer, optimizer, accelerator), itertools.repeat(batch))
        for _ in range(2):
            next(steps)
    assert (weights + memory.peak) / expected.peak == pytest.approx(1, abs=0.02)
    frozen = sum(stored_bytes(parameter) for parameter in transformer.parameters() if not parameter.requires_grad)
    assert expected.weights == pytest.approx(frozen, rel=0.01)


class Pair(nn.Module):
    """Two blocks that are recomputed together."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, *inputs):
        """Apply both."""
        for block in self.blocks:
            x = block(x, *inputs)
        return x


H100 = {  # GiB: SimpleTuner's documentation, rank 64, attention, 512 px, batch 1, one H100
    "none": (21.25, 15.60), "all": (12.87, 7.25), "segments of two": (13.04, 7.41), "two of four": (16.88, 11.25),
}  # fmt: skip


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", H100)
def test_published_measurements_are_simulated(name, bits, full_size, monkeypatch):
    """Within 5% of what others measured on an H100, with the libraries' layers in place of the lean ones."""
    prepare = z.prepare_blocks

    def original(transformer, cfg):
        monkeypatch.setattr(z, "LEAN", {})
        if name == "segments of two":
            blocks = list(transformer.layers)
            transformer.layers = nn.ModuleList([Pair(*blocks[n : n + 2]) for n in range(0, 30, 2)])
        prepare(transformer, cfg)
        for module in transformer.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
        if name == "segments of two":
            transformer.enable_gradient_checkpointing()

    monkeypatch.setattr(z, "prepare_blocks", original)
    loss = z.training_loss
    with_autocast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(z, "training_loss", lambda *args: with_autocast(loss)(*args))
    cfg = dataclasses.replace(
        BF16, rank=64, **ATTENTION_LORA, quantization={16: None, 8: "int8"}[bits],
        gradient_checkpointing=None if name == "two of four" else name != "none",
        checkpoint_blocks="16" if name == "two of four" else None,
    )  # fmt: skip
    measured = H100[name][bits == 8]
    assert simulated(full_size, cfg, 512).peak / z.GIB == pytest.approx(measured, rel=0.05)


TARGETS = {  # GiB at 1024 px, batch 1, 128 tokens, rank 16
    31.8: {}, 20.1: {"checkpoint_blocks": "attention"} | ATTENTION_LORA, 13.8: {"gradient_checkpointing": True},
    8.2: {"gradient_checkpointing": True, "quantization": "fp8"},
    5.5: {"gradient_checkpointing": True, "quantization": "nf4"},
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_size_step_needs_at_most(target, full_size):
    cfg = dataclasses.replace(BF16, rank=16, **TARGETS[target])
    assert simulated(full_size, cfg, 1024).peak / z.GIB <= target


def test_the_flops_of_a_step_and_the_host_memory(full_size):
    """By hand: every product forward, backward to its input, and forward again if recomputed; all micro-batches."""
    dim, hidden, caption = 3840, 10240, 128
    for side, changes, passes, attention_passes in (
        (512, {"gradient_checkpointing": False}, 2, 3),
        (1024, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "offload": True}, 2 * 3, 2 * 4),
    ):
        cfg, image = dataclasses.replace(BF16, rank=16, **ATTENTION_LORA, **changes), (side // 16) ** 2
        report = "\n".join(z.describe_costs(cfg, workload_of(full_size, cfg, side, tokens=caption), []))
        lengths = [image + caption] * 30 + [image, caption] * 2  # main blocks, refiners
        linear = 2 * (4 * dim**2 + 3 * dim * hidden) * sum(lengths)
        attention = 4 * dim * sum(length**2 for length in lengths)
        expected = (passes * linear + attention_passes * attention) / 1e12
        assert float(re.search(r"compute: ([\d.]+) TFLOP", report)[1]) == pytest.approx(expected, rel=0.01)
        assert float(re.search(r"host memory: about ([\d.]+) GiB", report)[1]) > 7.3, "the text encoder in bf16"


def test_a_card_of_8_gb_can_train(full_size):
    """nf4, 1024 pixels, validation, and offloaded encoders: every phase below 7 GiB, encoding below 1."""
    cfg = dataclasses.replace(
        BF16, gradient_checkpointing=True, quantization="nf4", offload=True, validation_prompt=("a",)
    )
    work = workload_of(full_size, cfg, 1024)
    phases = [z.simulate_encoding(cfg, work), *z.simulate_transformer(cfg, work, z.simulate_vae(cfg, work))]
    assert [phase.name for phase in phases] == ["text encoding", "latents", "training", "validation"]
    assert phases[0].peak < z.GIB and max(phase.peak for phase in phases) < 7 * z.GIB
    assert z.simulate_encoding(dataclasses.replace(cfg, offload=False), work).peak > 7 * z.GIB


@pytest.mark.parametrize("changes", [{"optimizer": "prodigy"}, {"use_8bit_adam": True}, {}])
def test_stand_ins_have_the_size_of_the_real_state(changes, make_config):
    """An optimizer is simulated by tensors of exactly the size of its state."""
    cfg = make_config(rank=16, **changes)
    parameters = [
        nn.Parameter(torch.randn(16, 300)),
        nn.Parameter(torch.zeros(512, 16)),
        nn.Parameter(torch.randn(16, 64)),
    ]
    optimizer, state = z.make_optimizer(parameters, cfg), z.allocate_state(parameters, cfg)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for one in optimizer.state.values() for key, value in one.items() if torch.is_tensor(value)]
    shared = {tensor.data_ptr(): tensor for tensor in tensors if tensor.shape == (256,) and cfg.has_8bit_state}
    real = sum(tensor.nbytes for tensor in tensors if tensor.dim() and tensor.data_ptr() not in shared)
    assert sum(tensor.nbytes for tensor in state) == real


def needed_by(cfg, model, **changes):
    """Simulate every choice that a config leaves open: their memory with reserve, in order."""
    work, found = workload_of(model, cfg, cfg.resolution, **changes), []
    plan = z.Plan([], z.make_schedule(cfg, [sample(0)]), None)
    for option in z.list_choices(cfg, plan):
        phases = [z.simulate_encoding(cfg, work), *z.simulate_transformer(option, work, z.simulate_vae(cfg, work))]
        found.append(max(phase.peak for phase in phases) * z.RESERVE + z.CONTEXT)
    return found


LADDER = [
    ("bf16", "none"), ("fp8", "none"), ("bf16", "attention"), ("nf4", "none"), ("fp8", "attention"), ("bf16", "all"),
    ("nf4", "attention"), ("fp8", "all"), ("nf4", "all"),
]  # fmt: skip


def test_fit_takes_the_fastest_that_fits(mid_size, make_config, monkeypatch, capsys):
    """The ladder is climbed down until one fits; settings that were given stay; nothing fits: a sentence."""
    monkeypatch.setattr(z, "CONTEXT", 0)
    cfg = make_config(pretrained_model_name_or_path=str(mid_size), mixed_precision="bf16", resolution=256, fit="1000")
    Accelerator(cpu=True)
    work, plan = workload_of(mid_size, cfg, 256), z.Plan([], z.make_schedule(cfg, [sample(0)]), None)
    needed = needed_by(cfg, mid_size)
    assert len(needed) == 9 and needed[0] == max(needed) and needed[8] == min(needed)
    seen = set()
    for limit in sorted({*needed}):
        first = next(index for index, size in enumerate(needed) if size <= limit)
        chosen, phases = z.fit(dataclasses.replace(cfg, fit=f"{limit / z.GIB + 1e-9:.12f}"), plan, work)
        assert (chosen.storage, chosen.recomputed) == LADDER[first]
        assert max(phase.peak for phase in phases) * z.RESERVE == pytest.approx(needed[first])
        said = capsys.readouterr().out.splitlines()
        assert len(said) == first + 3 and said[-1].startswith("memory: ")
        seen.add(first)
    assert {0, 8} < seen
    fixed = dataclasses.replace(cfg, gradient_checkpointing=False, fit="1000")
    assert [(c.quantization, c.recomputed) for c in z.list_choices(fixed, plan)] == [
        (None, "none"), ("fp8", "none"), ("nf4", "none"),
    ]  # fmt: skip
    fixed = dataclasses.replace(cfg, quantization="int8")
    assert [c.recomputed for c in z.list_choices(fixed, plan)] == ["none", "attention", "all"]
    assert {c.quantization for c in z.list_choices(fixed, plan)} == {"int8"}
    with pytest.raises(
        UserError, match=r"--fit 0.0001: nothing fits: 0.\d of 0.0 GiB, simulated, with reserve; lower"
    ):
        z.fit(dataclasses.replace(cfg, fit="0.0001"), plan, work)
    with pytest.raises(UserError, match="--fit auto: torch sees no GPU; give a size, as in --fit 24"):
        z.fit(dataclasses.replace(cfg, fit="auto"), plan, work)


def test_fit_offloads_a_text_encoder_that_is_too_large(full_size, monkeypatch, capsys):
    Accelerator(cpu=True)
    cfg = dataclasses.replace(BF16, fit="7", gradient_checkpointing=True, quantization="nf4")
    plan, work = z.Plan([], z.make_schedule(cfg, [sample(0)]), None), workload_of(full_size, cfg, 1024)
    assert z.fit(cfg, plan, work)[0].offload and not z.fit(dataclasses.replace(cfg, fit="12"), plan, work)[0].offload


@pytest.mark.parametrize("given", [None, True, False])
def test_on_a_gpu_only_recomputation_is_chosen(given, mid_size, make_config, monkeypatch, capsys, tmp_path):
    """At the defaults, with a GPU's free memory: one line says what was chosen; the LoRA does not change."""
    monkeypatch.setattr(z, "CONTEXT", 0)
    cfg = make_config(gradient_checkpointing=given, pretrained_model_name_or_path=str(mid_size), resolution=256)
    needed = needed_by(dataclasses.replace(cfg, gradient_checkpointing=None), cfg.pretrained_model_name_or_path)
    assert len(needed) == 3
    with monkeypatch.context() as patch:
        patch.setattr(z, "find_limit", lambda _: (needed[0] + needed[1]) / 2)
        run(cfg)
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said.count("memory:") == 1 and "GiB, simulated, with reserve, with " in said
    if given is None:
        assert record["environment"]["chosen"] in (
            {"checkpoint_blocks": "attention"},
            {"checkpoint_blocks": "all"},
        )
    else:
        assert record["environment"]["chosen"] == {} and record["gradient_checkpointing"] is given
    assert parse_config(["--config", str(tmp_path / "out" / "config.json")]).gradient_checkpointing is given
    assert ("warning: this may not fit; --fit auto" in said) == (given is False)
    plain = dataclasses.replace(cfg, output_dir=str(tmp_path / "plain"), gradient_checkpointing=False)
    run(plain)
    for name, tensor in load_file(tmp_path / "plain" / z.LORA_FILE).items():
        assert torch.allclose(tensor, load_file(tmp_path / "out" / z.LORA_FILE)[name], atol=1e-5)


def test_a_resumed_run_keeps_its_storage_on_another_card(make_config, monkeypatch, tmp_path, bitsandbytes_on_cpu):
    """`--fit` chose int8 or bf16 for the first card; the checkpoint decides, and only recomputation is chosen anew."""
    monkeypatch.setattr(z, "CONTEXT", 0)
    cfg = make_config(fit="1000", max_train_steps=1)
    run(cfg)
    choices = []
    monkeypatch.setattr(z, "list_choices", lambda *args, real=z.list_choices: choices.extend(real(*args)) or choices)
    run(dataclasses.replace(cfg, max_train_steps=2, resume_from_checkpoint="latest"))
    assert [(c.quantization, c.recomputed) for c in choices] == [(None, "none"), (None, "attention"), (None, "all")]
    assert len(losses_of(cfg)) == 2


def tree_of(*folders):
    """Every file below some folders, with its content."""
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_dry_run_reports_the_costs_and_writes_nothing(workplace, model):
    """Without a single weight on the disk; hub, cache, output, and working folders stay as they are."""
    shutil.copytree(model, workplace / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("hf", "cache", "tmp"):
        (workplace / name).mkdir()
    flags = [
        "--pretrained_model_name_or_path=model", "--instance_data_dir=dog", "--instance_prompt=a dog", "--dry_run",
        "--resolution=32", "--cache_dir=cache", "--fit=24", "--validation_prompt=x", "--cache_latents",
    ]  # fmt: skip
    before = tree_of(workplace)
    env = {"HF_HOME": str(workplace / "hf"), "TMPDIR": str(workplace / "tmp"), "HF_HUB_OFFLINE": "1"}
    done = run_script(*flags, cwd=workplace, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert tree_of(workplace) == before and not (workplace / "z-image-dreambooth-lora").exists()
    assert not list((workplace / "tmp").glob("z-image*"))
    for words in (
        "32 x 32         5", "steps: 1,500 x 1", "77,696 trainable parameters", "simulated, GiB", "text encoding",
        "latents", "training", "validation", "host memory: about", "TFLOP per step", "disk space: up to",
        "memory: 0.5 of 24.0 GiB, simulated, with reserve, with --checkpoint_blocks none",
    ):  # fmt: skip
        assert words in done.stdout, words
    listed = run_script(*(flag for flag in flags if flag != "--fit=24"), cwd=workplace, env=env)
    rows = re.findall(r"^ *(bf16|fp8|nf4) +(none|attention|all) ", listed.stdout, re.M)
    assert listed.returncode == 0 and rows == LADDER, listed.stderr[-2000:]  # with packages that the flags do not need
    for bad, words in {
        "--lora_layers=to_x": "no linear layer matches to_x", "--rank=0": "--rank must be at least 1",
        "--instance_data_dir=none": "does not exist", "--resolution=65536": "is too large for this model",
        "--push_to_hub": "z-image-dreambooth-lora cannot be used: Token is required",
        "--attention_backend=none": "does not work here",
    }.items():  # fmt: skip
        refused = run_script(*flags, bad, cwd=workplace, env=env)
        assert refused.returncode == 2 and words in refused.stderr, bad
    assert tree_of(workplace) == before


def test_a_dry_run_checks_what_resuming_needs(make_config, capsys, model):
    run(make_config(max_train_steps=1))
    before = tree_of(Path(make_config().output_dir))
    dry = {"dry_run": True, "resume_from_checkpoint": "latest", "fit": "24"}
    main(make_config(max_train_steps=2, **dry))
    assert "TFLOP per step" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"was saved with different settings or data: --rank 5 \(was 4\)"):
        main(make_config(max_train_steps=2, rank=5, **dry))
    assert tree_of(Path(make_config().output_dir)) == before


def test_a_dry_run_of_a_dataset_leaves_nothing(workplace, model):
    pytest.importorskip("datasets")
    (workplace / "tmp").mkdir()
    before = tree_of(workplace)
    env = {"HF_HOME": str(workplace / "hf"), "TMPDIR": str(workplace / "tmp"), "HF_HUB_OFFLINE": "1"}
    flags = [f"--pretrained_model_name_or_path={model}", "--dataset_name=dog", "--instance_prompt=p", "--dry_run"]
    done = run_script(*flags, "--resolution=32", "--fit=24", cwd=workplace, env=env)
    assert done.returncode == 0 and "TFLOP" in done.stdout, done.stderr[-2000:]
    assert tree_of(workplace) == before and not list((workplace / "tmp").glob("z-image-*"))


def test_the_simulation_does_not_depend_on_the_device(model, make_config, monkeypatch):
    """On a GPU, and in a group of processes on a CPU, whose device is cpu:0, as on a CPU alone."""
    found, cfg = {}, make_config(mixed_precision="bf16", validation_prompt=("a",), gradient_accumulation_steps=2)
    work = workload_of(model, cfg, 64, has_missing=True)
    for device in (CPU, torch.device("cpu", 0), torch.device("cuda", 0)):
        fake = property(lambda self, device=device: device, lambda self, _: None)
        monkeypatch.setattr(PartialState, "device", fake, raising=False)
        found[str(device)] = [z.simulate_encoding(cfg, work), *z.simulate_vae(cfg, work)]
        found[str(device)] += z.simulate_transformer(cfg, work, z.simulate_vae(cfg, work))
    assert found["cpu"] == found["cpu:0"] == found["cuda:0"]
    assert [phase.name for phase in found["cpu"][3:]] == ["class images", "latents", "training", "validation"]


def test_the_vae_stays_where_latents_are_not_cached(model, make_config):
    """It is part of the training, and works on whole batches; without a cache, there is no phase of its own."""
    found, bucket = {}, 128
    for is_cached in (True, False):
        cfg = make_config(cache_latents=is_cached, train_batch_size=4, resolution=bucket)
        work = workload_of(model, cfg, bucket)
        codec = z.simulate_vae(cfg, work)
        found[is_cached] = codec[0], {phase.name: phase for phase in z.simulate_transformer(cfg, work, codec)}
    (alone, cached), (batch, plain) = found[True], found[False]
    assert "latents" in cached and "latents" not in plain
    assert plain["training"].weights == cached["training"].weights + alone.weights
    assert batch.temporaries > 3 * alone.temporaries
    assert plain["training"].peak >= plain["training"].weights + plain["training"].state + batch.temporaries


def test_images_are_decoded_one_at_a_time(model, make_config):
    """Of a batch of class images, the VAE gets each on its own."""
    cfg = make_config()
    encodings, sizes = (Accelerator(cpu=True), encodings_of(cfg, model))[1], []
    z.fill_prompts_cache(tokens_of(model, ["a", ""]), encodings)
    pipeline = z.make_pipeline(z.load_transformer(model, cfg, torch.float32), encodings)
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    assert len(z.sample_images(pipeline, encodings, [("a", 0), ("a", 1)], 32)) == 2 and sizes == [1, 1]


def test_class_images_in_fp32_need_twice_as_much(model, make_config):
    cfg, peaks = make_config(mixed_precision="bf16"), []
    work = workload_of(model, cfg, 64, has_missing=True)
    for precision in ("bf16", "fp32"):
        cfg = dataclasses.replace(cfg, prior_generation_precision=precision)
        latents, decoding = z.simulate_vae(cfg, work)
        classes = z.simulate_transformer(cfg, work, (latents, decoding))[0]
        assert classes.name == "class images"
        peaks.append((classes.weights - decoding.weights, classes.temporaries))
    assert peaks[1] == (2 * peaks[0][0], 2 * peaks[0][1])


def test_a_finished_run_can_be_resumed_without_its_metrics(make_config, tmp_path):
    run(make_config())
    (tmp_path / "out" / "metrics.jsonl").unlink()
    run(make_config(resume_from_checkpoint="latest"))
    assert "seconds_per_step" not in json.loads((tmp_path / "out" / "config.json").read_text())["environment"]


def test_a_dry_run_of_a_hub_model_downloads_no_weights(make_config, monkeypatch, model):
    seen = []
    monkeypatch.setattr(z, "snapshot_download", lambda name, **options: seen.append(options) or str(model))
    Accelerator(cpu=True)
    cfg = make_config(pretrained_model_name_or_path="org/model", dry_run=True)
    assert z.find_model(cfg) == model
    (options,) = seen
    assert options["allow_patterns"] == ["*.json", "tokenizer/*"] and options["cache_dir"] is None


def test_too_little_disk_space_is_pointed_out(make_config, model, monkeypatch, tmp_path):
    plan = z.Plan([sample(0)], z.make_schedule(make_config(max_train_steps=10_000), [sample(0)]), None)
    work, empty = workload_of(model, make_config(), 32), z.make_empty_transformer(model)
    sizes = {}
    for name, changes in {"all": {}, "two": {"checkpoints_total_limit": 1}}.items():
        lines = list(z.describe_disk(make_config(**changes), plan, work, empty))
        sizes[name] = [float(re.search(r"up to ([\d.]+) GB", line)[1]) for line in lines]
        assert len(lines) == 2 and not any(line.startswith("warning") for line in lines)
    assert sizes["all"] >= sizes["two"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("Usage", "free")(10))
    lines = list(z.describe_disk(make_config(), plan, work, empty))
    assert all(line.startswith("warning: disk space: up to") for line in lines)


def test_measured_memory_is_shown_beside_the_simulated(make_config, monkeypatch, capsys, tmp_path):
    """On a GPU: in the last lines, config.json, and the model card; here, with a limit and peaks from outside."""
    monkeypatch.setattr(z, "find_limit", lambda _: 2**40)
    seen = []
    monkeypatch.setattr(
        z, "record_peak", lambda peaks, phase: seen.append(phase) or peaks.__setitem__(phase, 3 * 2**30)
    )
    cfg = make_config(validation_prompt=("a",))
    run(cfg)
    assert list(dict.fromkeys(seen)) == ["text encoding", "class images", "latents", "training", "validation"]
    assert seen.count("training") == 3, "before each validation, and after the last step"
    environment = json.loads((tmp_path / "out" / "config.json").read_text())["environment"]
    said, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    for phase in ("text encoding", "latents", "training", "validation"):
        assert environment[phase]["measured"] == 3.0 and 0 <= environment[phase]["simulated"] < 0.1
        assert (
            f"{phase}: {environment[phase]['simulated']:.3g} GiB simulated, 3 GiB measured" in said
            and f'"{phase}"' in card
        )
    assert environment["seconds_per_step"] > 0


def test_peaks_are_those_of_the_gpu(monkeypatch):
    cuda, resets = torch.device("cuda:0"), []
    peaks = {}
    z.record_peak(peaks, "training")
    assert peaks == {}, "a CPU has no such counter"
    monkeypatch.setattr(PartialState, "device", property(lambda self: cuda, lambda self, _: None), raising=False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    for size in (7, 5, 9):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device, size=size: size)
        z.record_peak(peaks, "training")
    assert peaks == {"training": 9} and len(resets) == 3


@pytest.mark.benchmark
def test_the_readmes_table_of_memory(full_size):
    """Print "Will it fit?" for README, and compare it."""
    table = fit_table(full_size)
    print(table)
    assert table in README


def fit_table(model):
    """The whole run's simulated peak, with the default layers, offloaded encoders, and a validation."""
    lines = ["| simulated, GiB | 512 px | 768 px | 1024 px |", "|---|---|---|---|"]
    for storage in (None, "fp8", "nf4"):
        for name, changes in {
            "nothing recomputed": {}, "attention recomputed": {"checkpoint_blocks": "attention"},
            "all blocks recomputed": {"gradient_checkpointing": True},
        }.items():  # fmt: skip
            cells = []
            for side in (512, 768, 1024):
                cfg = dataclasses.replace(
                    BF16, quantization=storage, resolution=side, validation_prompt=("a",), offload=True, **changes
                )
                work = workload_of(model, cfg, side)
                phases = [
                    z.simulate_encoding(cfg, work),
                    *z.simulate_transformer(cfg, work, z.simulate_vae(cfg, work)),
                ]
                cells.append(f"{max(phase.peak for phase in phases) / z.GIB:.1f}")
            lines.append(f"| {storage or 'bf16'}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# =====================================================================================================================
# Speed
# =====================================================================================================================


@pytest.fixture(scope="session")
def bench_model(tmp_path_factory):
    """A random model of medium size: 8 + 2 + 2 blocks of 1024 channels, 12 layers of text encoder, the real VAE."""
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    folder = tmp_path_factory.mktemp("bench") / "z-image"
    z.make_demo_model(folder)
    torch.manual_seed(0)
    AutoencoderKL(**FULL_VAE).to(torch.bfloat16).save_pretrained(folder / "vae")
    encoder = Qwen3Config(
        vocab_size=300, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    Qwen3Model(encoder).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    ZImageTransformer2DModel(
        dim=1024, n_layers=8, n_refiner_layers=2, n_heads=8, n_kv_heads=8, cap_feat_dim=1024,
        axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
    ).to(torch.bfloat16).save_pretrained(folder / "transformer")  # fmt: skip
    return folder


def alternate(rounds, **works):
    """Run works in turn; return the seconds of each one's fastest round."""
    seconds = collections.defaultdict(list)
    for _ in range(rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {name: min(values) for name, values in seconds.items()}


def bench_batch(side, length=40):
    """A bf16 batch of one image."""
    return make_batch(1)._replace(
        latents=torch.randn(1, 16, side // 8, side // 8), prompt_embeds=[torch.randn(length, 1024).bfloat16()]
    )


@pytest.mark.benchmark
def test_a_step_costs_little_more_than_forward_and_backward(bench_model, make_config):
    """At most 3% above the bare passes of the same transformer."""
    cfg = make_config(
        pretrained_model_name_or_path=str(bench_model), mixed_precision="bf16", rank=16, max_train_steps=99
    )
    transformer, parameters = with_lora(bench_model, cfg, torch.bfloat16)
    accelerator = z.make_accelerator(cfg)
    batch, optimizer = bench_batch(256), z.make_optimizer(parameters, cfg)
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    steps = z.train(make_run(cfg, transformer, optimizer, accelerator), itertools.repeat(batch))
    next(steps)

    def bare():
        velocity = z.predict_velocity(transformer, batch.latents.bfloat16(), torch.rand(1), batch.prompt_embeds)
        velocity.square().mean().backward()
        for parameter in parameters:
            parameter.grad = None

    seconds = alternate(8, step=lambda: next(steps), bare=bare)
    print(f"\na step / bare forward and backward: {seconds['step'] / seconds['bare']:.3f} ({seconds['bare']:.2f} s)")
    assert seconds["step"] < 1.03 * seconds["bare"]


@pytest.mark.benchmark
def test_compiled_steps_are_not_slower(bench_model, make_config, monkeypatch):
    """In any of three shapes, with the same graphs."""
    torch._dynamo.reset()
    cfg = make_config(pretrained_model_name_or_path=str(bench_model), mixed_precision="bf16", rank=16, compile=True)
    transformer, _ = with_lora(bench_model, cfg, torch.bfloat16)
    transformer.train()
    batches = {side: bench_batch(side) for side in (128, 256, 384)}
    for batch in [*batches.values()] * 2:
        z.training_loss(transformer, batch, cfg).mean().backward()
    print()
    for side, batch in batches.items():

        def compiled(batch=batch):
            z.training_loss(transformer, batch, cfg).mean().backward()

        def eager(work=compiled):
            with torch.compiler.set_stance("force_eager"):
                work()

        seconds = alternate(6, compiled=compiled, eager=eager)
        print(f"{side} px: compiled / eager {seconds['compiled'] / seconds['eager']:.3f}")
        assert seconds["compiled"] <= seconds["eager"]


@pytest.mark.benchmark
def test_a_warm_start_is_faster(bench_model, tmp_path):
    """From the command to the first step, with everything cached: at most 60% of a start without caches."""
    for number in range(10):
        draw(tmp_path / "dog" / f"{number}.png", (512, 512), (number * 20, 90, 30))
    flags = [
        f"--pretrained_model_name_or_path={bench_model}", f"--instance_data_dir={tmp_path}/dog", "--resolution=256",
        "--instance_prompt=a photo of sks dog", "--cache_latents", "--max_train_steps=1", "--skip_final_inference",
        f"--cache_dir={tmp_path / 'cache'}", "--num_validation_images=1", "--gradient_checkpointing=false",
    ]  # fmt: skip
    seconds = {}
    for name in ("cold", "warm"):
        started = time.perf_counter()
        done = run_script(*flags, f"--output_dir={tmp_path / name}", cwd=tmp_path)
        seconds[name] = time.perf_counter() - started
        assert done.returncode == 0, done.stderr[-2000:]
    print(f"\nwarm / cold: {seconds['warm']:.1f} / {seconds['cold']:.1f} s = {seconds['warm'] / seconds['cold']:.2f}")
    assert seconds["warm"] < 0.6 * seconds["cold"]


@pytest.mark.benchmark
def test_prompts_are_encoded_faster_at_their_true_length(bench_model):
    """At least 5 times faster than padded to 512 tokens, for a caption of 58 tokens."""
    Accelerator(cpu=True)
    encoder, tokens = z.load_text_encoder(bench_model, BF16), list(range(58))
    seconds = alternate(
        5, true=lambda: z.encode_prompt(encoder, tokens), padded=lambda: z.encode_prompt(encoder, tokens + [0] * 454)
    )
    print(f"\npadded / true length: {seconds['padded'] / seconds['true']:.1f}")
    assert seconds["padded"] > 5 * seconds["true"]


@pytest.mark.benchmark
def test_images_are_decoded_while_the_vae_works(bench_model, make_config, tmp_path, monkeypatch):
    """Caching large photos takes less time than decoding plus encoding them; with one thread for the VAE."""
    torch.set_num_threads(1)
    for number in range(4):
        image = Image.effect_noise((4000, 3000), 80 + number)
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.convert("RGB").save(tmp_path / "photos" / f"{number}.jpg", quality=95)
    cfg = make_config(
        pretrained_model_name_or_path=str(bench_model), instance_data_dir=str(tmp_path / "photos"), resolution=256,
        cache_dir=str(tmp_path / "cache"), mixed_precision="bf16",
    )  # fmt: skip
    Accelerator(cpu=True)
    encodings, samples = encodings_of(cfg, bench_model), z.plan_samples(cfg)

    def fill(load):
        shutil.rmtree(tmp_path / "cache" / "z-image-encodings" / "latents", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(z, "load_ahead", load)
            z.fill_latents_cache(samples, encodings)

    parallel, serial = z.load_ahead, lambda load, jobs, count: itertools.starmap(load, jobs)
    seconds = alternate(3, parallel=lambda: fill(parallel), serial=lambda: fill(serial))
    print(f"\nparallel / serial: {seconds['parallel'] / seconds['serial']:.2f}")
    assert seconds["parallel"] < seconds["serial"]


HOST_RUN = """import runpy, sys
from diffusers.quantizers.bitsandbytes import bnb_quantizer
bnb_quantizer.BnB4BitDiffusersQuantizer.validate_environment = lambda self, *_, **__: None
bnb_quantizer.BnB4BitDiffusersQuantizer.update_device_map = lambda self, _: {"": "cpu"}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def resident(process):
    """Return the resident and the anonymous memory of a process tree, in GiB."""
    total = collections.Counter()
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(OSError, TypeError):
            status = Path(f"/proc/{member.pid}/status").read_text()
            total.update({name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "RssAnon")})
    return total["VmRSS"] / 2**20, total["RssAnon"] / 2**20


@pytest.mark.benchmark
def test_host_memory_of_a_full_size_run(tmp_path):
    """256 px, rank 16, all recomputed: at most 13.5 GiB resident in bf16, 9 in nf4; 13.5 anonymous from fp32."""
    write_random_model(tmp_path / "model", "full")
    (tmp_path / "run.py").write_text(HOST_RUN)
    for number in range(2):
        draw(tmp_path / "dog" / f"{number}.png", (256, 256), (90 * number, 40, 200))
    flags = [
        f"--pretrained_model_name_or_path={tmp_path}/model", f"--instance_data_dir={tmp_path}/dog", "--resolution=256",
        "--instance_prompt=p", "--rank=16", "--gradient_checkpointing", "--cache_latents", "--max_train_steps=2",
        f"--cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    peaks = {}
    for name in ("bf16", "nf4", "fp32"):
        if name == "fp32":
            for path in (tmp_path / "model" / "transformer").glob("*.safetensors"):
                save_file({key: tensor.float() for key, tensor in load_file(path).items()}, path, {"format": "pt"})
        more = [f"--output_dir={tmp_path}/{name}", *["--quantization=nf4"] * (name == "nf4")]
        command = [sys.executable, *[str(tmp_path / "run.py")] * (name == "nf4"), str(SCRIPT), *flags, *more]
        with open(tmp_path / "log.txt", "w") as log:
            process = psutil.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "2"})
        peaks[name] = (0.0, 0.0)
        while process.poll() is None:
            peaks[name] = tuple(map(max, zip(peaks[name], resident(process))))
        assert process.returncode == 0, (tmp_path / "log.txt").read_text()[-2000:]
    print("\nhost memory in GiB (resident, anonymous):", {k: [round(x, 2) for x in v] for k, v in peaks.items()})
    assert peaks["bf16"][0] <= 13.5 and peaks["nf4"][0] <= 9 and peaks["fp32"][1] <= 13.5


# =====================================================================================================================
# The oldest versions
# =====================================================================================================================


@pytest.mark.oldest
def test_the_oldest_versions_run_the_demo(tmp_path):
    """The lower bounds of the requirements are true: a fresh environment of exactly these versions runs the demo."""
    versions = (HERE / "requirements_z_image.txt").read_text().replace(">=", "==").split()
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    for wanted in (versions[:1], versions):
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    done = subprocess.run([python, str(SCRIPT), "--demo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "LoRA      z-image-demo" in done.stdout, done.stderr[-3000:]
