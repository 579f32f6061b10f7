"""Data, checkpoints and whole runs of train.py."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from training.checkpoint import Checkpoints, identity
from training.config import DataConfig, RunConfig
from training.data import batch_at, load_corpus, unigram_entropy, validation_batches
from training.errors import DataError
from training.program import Plan
from training.report import human_bytes
from training.state import learning_rate
from training.throughput import flops_per_token
from training.token_files import Tokens

ROOT = Path(__file__).parents[2]
SMALL = (
    "--num-layers 2 --embed-dim 32 --mlp-dim 64 --head-dim 8 --sequence 32 --batch 8"
    " --eval-batches 1 --log-every 1 --sample-bytes 4"
).split()


def write_text(folder, files=3, size=4000):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(files):
        text = bytes(generator.choice(np.frombuffer(b"def f(x):\n", np.uint8), size))
        (folder / f"{i}.py").write_bytes(text)
    return folder


# Data


def test_a_batch_is_a_function_of_seed_and_step():
    text = np.arange(200, dtype=np.uint8)
    first = np.asarray(batch_at(text, 1, 5, 4, 16))
    assert (first.shape, first.dtype) == ((4, 17), np.int32)
    np.testing.assert_array_equal(first, batch_at(text, 1, 5, 4, 16))
    assert not np.array_equal(first, batch_at(text, 1, 6, 4, 16))
    assert not np.array_equal(first, batch_at(text, 2, 5, 4, 16))
    np.testing.assert_array_equal(np.diff(first, axis=1), 1)


def test_a_part_of_a_batch_is_that_of_the_whole():
    batch = batch_at(np.arange(200, dtype=np.uint8), 1, 5, 8, 16)
    np.testing.assert_array_equal(batch[2:6, 3:], np.asarray(batch)[2:6, 3:])


def test_only_the_rows_of_a_device_are_read_and_each_once(tmp_path):
    """Four devices have two rows each, and four others the same."""

    class Counted(Tokens):
        def take(self, starts, length):
            taken.append(len(starts))
            return super().take(starts, length)

    np.arange(500, dtype=np.uint16).tofile(tmp_path / "a.bin")
    files = {"data": str(tmp_path / "a.bin"), "token_dtype": "uint16", "vocab_size": 500}
    tokens, taken = load_corpus(DataConfig(**files, sequence=16)).train, []
    batch = batch_at(Counted(**vars(tokens)), 0, 3, 8, 16)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    put = Plan.put(SimpleNamespace(batch_sharding=NamedSharding(mesh, P("data"))), batch)
    assert taken == [2, 2, 2, 2]
    np.testing.assert_array_equal(put, batch_at(tokens, 0, 3, 8, 16))


def test_batches_reach_both_ends_of_the_text():
    text = np.arange(20, dtype=np.uint8)
    seen = np.concatenate([batch_at(text, 0, step, 8, 15) for step in range(20)])
    assert (seen.min(), seen.max()) == (0, 19)


def test_validation_batches_are_the_same_each_time_and_cover_the_text():
    text = np.arange(250, dtype=np.uint8)
    first = np.stack(list(validation_batches(text, 3, 4, 16)))
    np.testing.assert_array_equal(first, np.stack(list(validation_batches(text, 3, 4, 16))))
    assert (first.min(), first.max()) == (0, 249)


def test_no_text_is_in_both_parts(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.py").write_text(f"{i:04d}" * 20)
    corpus = load_corpus(DataConfig(data=str(folder), sequence=16, validation=0.2))
    parts = [
        set(re.findall(rb"(?:\d{4}){20}", part.tobytes()))
        for part in (corpus.train, corpus.validation)
    ]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == corpus.num_files == 200
    assert 20 <= len(parts[1]) <= 60


def test_of_a_single_file_the_end_is_held_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(100)) * 10)
    corpus = load_corpus(DataConfig(data=str(path), sequence=16, validation=0.1))
    assert (len(corpus.train), len(corpus.validation)) == (900, 100)


def test_the_fingerprint_tells_a_changed_text(tmp_path):
    config = DataConfig(data=str(write_text(tmp_path / "text")), sequence=16)
    before = load_corpus(config)
    assert load_corpus(config).fingerprint == before.fingerprint
    (tmp_path / "text" / "1.py").write_bytes(b"x" * 4000)
    assert load_corpus(config).fingerprint != before.fingerprint


def test_too_little_text_is_an_error(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"x" * 100)
    with pytest.raises(DataError) as error:
        load_corpus(DataConfig(data=str(path)))
    assert str(error.value) == (
        f"--data {path}\n  why: its 1 files give 95 bytes to train on and 5 to validate;"
        " one example is --sequence 128 + 1 = 129 bytes\n"
        "  fix: name more data, or use a shorter --sequence"
    )


def test_a_folder_without_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds no file that matches --pattern \*\.py"):
        load_corpus(DataConfig(data=str(tmp_path)))


def test_the_default_text_is_the_standard_library():
    corpus = load_corpus(DataConfig())
    assert corpus.num_files > 100 and len(corpus.train) > 1_000_000
    assert 2.5 < unigram_entropy(corpus.validation) < 3.8


def test_unigram_entropy_of_equally_frequent_bytes():
    assert unigram_entropy(np.arange(64, dtype=np.uint8)) == pytest.approx(np.log(64))
    assert unigram_entropy(np.zeros(9, np.uint8)) == 0


# Parts


def test_the_learning_rate_rises_then_falls_to_a_tenth():
    config = dataclasses.replace(RunConfig().optimizer, learning_rate=1.0, warmup=0.1)
    rate = learning_rate(config, 100)
    assert [float(rate(step)) for step in (0, 5, 10, 100)] == pytest.approx([0, 0.5, 1, 0.1])


def test_flops_per_token_is_six_per_weight_plus_attention():
    model = RunConfig().model
    weights = 820_352 - 9 * 128  # all parameters of this model but the norms
    assert flops_per_token(model, 128) == 6 * weights + 12 * 4 * 128 * 128


def test_bytes_have_units():
    assert [human_bytes(n) for n in (512, 1536, 3 * 2**20)] == ["512 B", "1.5 KiB", "3.0 MiB"]


# Whole runs, each in a process of its own


def train(*options, folder, check=True):
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *options]
    command += ["--data", str(write_text(folder / "text"))]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def test_a_bad_option_ends_with_code_2_a_message_and_no_trace(tmp_path):
    done = train("--stepps", "3", "--batch", "7", folder=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: 2 problems\n(1) --stepps\n  why: there is no such option (did you mean"
        " '--steps'?)\n  fix: train.py --help lists the options\n(2) --batch 7\n"
        "  why: it is split over fsdp=4, 4 ways, and 7 = 1 x 4 + 3\n"
        "  fix: use --batch 4 or 8, or another --mesh\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


@pytest.mark.slow
def test_a_resumed_run_has_the_same_loss_bits_and_other_meshes_nearly(tmp_path):
    options = ["--steps", "8", "--checkpoint-every", "4", "--dropout", "0.1"]
    straight, resumed, other = (tmp_path / name for name in ("a", "b", "c"))
    train(*options, "--checkpoint-dir", str(straight), folder=tmp_path)
    for folder, mesh in ((resumed, []), (other, ["--mesh", "data=8", "--parallelism", "data"])):
        interrupted = [*options, "--checkpoint-dir", str(folder)]
        train(*interrupted, folder=tmp_path)
        # As if the run had ended after step 4.
        subprocess.run(["rm", "-r", str(folder / "8")], check=True)
        (folder / "metrics.jsonl").unlink()
        train(*interrupted, "--resume", "must", *mesh, folder=tmp_path)
    assert losses(resumed) == losses(straight)[4:]
    expected = [loss for _, loss in losses(straight)[4:]]
    np.testing.assert_allclose([loss for _, loss in losses(other)], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    options = ["--steps", "1", "--checkpoint-dir", "run"]
    train(*options, folder=tmp_path)
    done = train(*options, "--seed", "3", "--num-layers", "1", folder=tmp_path, check=False)
    assert done.returncode == 4
    why = "so the state would not mean the same"
    fix = "give this run the same value, or another --checkpoint-dir"
    assert done.stderr == (
        f"error: 2 problems\n"
        f"(1) run, step 1: num_layers is 2\n  why: this run has 1, {why}\n  fix: {fix}\n"
        f"(2) run, step 1: seed is 0\n  why: this run has 3, {why}\n  fix: {fix}\n"
    )
    done = train(*options, "--resume", "never", folder=tmp_path, check=False)
    assert (done.returncode, "holds step 1 of another run" in done.stderr) == (4, True)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    write_text(tmp_path / "text")
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--steps", "100000"]
    command += ["--data", str(tmp_path / "text")]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, **quiet)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    [folder] = tmp_path.glob("runs/*")
    first, again = stderr.strip().split("\n", 1)
    assert first == "SIGINT: saves after this step, then ends; again: ends at once"
    assert again.startswith("interrupted and saved; go on with:\n  python train.py")
    assert stderr.endswith(f"--checkpoint-dir runs/{folder.name} --resume must\n")
    step = losses(folder)[-1][0]
    assert Checkpoints(folder, keep=3).latest() == step


@pytest.mark.slow
def test_a_run_prints_its_plan_before_it_compiles_and_its_result_at_the_end(tmp_path):
    text = train("--steps", "2", folder=tmp_path).stdout
    order = [
        "configuration",
        "mesh: fsdp=4, tensor=2 (8 x cpu)",
        "parameters",
        "layers/mlp/gate",
        "collectives per step",
        "predicted memory: ",
        "compiled in",
        "step      2",
        "validation loss / entropy = ",
        "sample (cache (2, 4, 8, 2, 8) [-, fsdp, -, tensor, -]):",
        "\ndef ",
    ]
    positions = [text.find(part) for part in order]
    assert -1 not in positions and positions == sorted(positions), text


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_code_5_and_keeps_good_checkpoints(tmp_path):
    options = "--steps 20 --checkpoint-every 1 --checkpoint-dir run --learning-rate 3e38"
    options += " --clip-norm 1e38 --max-skipped 2 --profile 2:2 --debug-nans"
    done = train(*options.split(), folder=tmp_path, check=False)
    assert done.returncode == 5
    what, why, *_ = done.stderr.splitlines()
    assert what == "error: the loss was not finite in 2 steps in a row, up to step 4"
    assert re.match(r"  why: \w+ at models/\w+\.py:\d+ \(.*\) makes .* NaN of", why)
    assert "goodput" not in done.stdout and "step 3 was skipped" in done.stdout
    folder = tmp_path / "run"
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    assert [line["skipped_total"] for line in lines] == [0, 0, 1, 2]
    assert Checkpoints(folder, keep=3).latest() == 2
    assert (folder / "loss.svg").exists() and list(folder.glob("profile/**/*.xplane.pb"))


def test_the_record_of_a_checkpoint_leaves_out_how_the_model_is_computed(tmp_path):
    corpus = load_corpus(DataConfig(data=str(write_text(tmp_path / "text")), sequence=16))
    plain, other = (
        RunConfig(model=dataclasses.replace(RunConfig().model, remat=remat, dtype=dtype))
        for remat, dtype in (("none", "float32"), ("full", "bfloat16"))
    )
    assert identity(plain, corpus) == identity(other, corpus)
    assert json.loads(json.dumps(identity(plain, corpus))) == identity(plain, corpus)
    deeper = RunConfig(model=dataclasses.replace(RunConfig().model, num_layers=5))
    assert identity(plain, corpus) != identity(deeper, corpus)


def test_simulated_devices_are_there():
    assert jax.device_count() == 8
