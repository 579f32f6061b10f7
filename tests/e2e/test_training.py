"""Options, data, checkpoints and whole runs of train.py."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sharding.errors import Problem
from training.checkpoint import Checkpoints, identity
from training.cli import parse
from training.config import DataConfig, RunConfig, owners
from training.data import batch_at, load_corpus, unigram_entropy, validation_batches
from training.errors import CheckpointError, ConfigError
from training.report import human_bytes
from training.state import learning_rate
from training.throughput import flops_per_token
from training.validate import resolve_mesh, validate

ROOT = Path(__file__).parents[2]
SMALL = (
    "--num-layers 2 --embed-dim 32 --mlp-dim 64 --head-dim 8 --sequence 32 --batch 8"
    " --eval-batches 1 --log-every 1 --sample-bytes 4"
).split()


def configured(text, devices=8):
    """The configuration of a command line, and all that is wrong with it, as text."""
    run, problems = parse(text.split())
    return run, [str(problem) for problem in problems + validate(run, devices)]


def problems_of(text, devices=8):
    return configured(text, devices)[1]


def write_text(folder, files=3, size=4000):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(files):
        text = bytes(generator.choice(np.frombuffer(b"def f(x):\n", np.uint8), size))
        (folder / f"{i}.py").write_bytes(text)
    return folder


# Options


def test_the_defaults_have_no_problem():
    assert problems_of("") == []
    assert configured("")[0] == RunConfig()


def test_flags_are_frozen():
    """New options are made on purpose: in the component that owns them, and in this list."""
    assert " ".join(owners(RunConfig())) == (
        "devices mesh parallelism num_layers embed_dim mlp_dim num_heads num_kv_heads head_dim"
        " tied_embeddings dropout rope_base dtype scan_layers remat data pattern validation"
        " sequence learning_rate warmup weight_decay clip_norm beta1 beta2 batch steps seed"
        " eval_every eval_batches log_every checkpoint_dir checkpoint_every keep resume"
        " sample_bytes prompt temperature"
    )


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('steps = 7\nlearning-rate = 1\nscan_layers = false\nmesh = "data=8"\n')
    run, problems = parse(["--config", str(path), "--steps", "9", "--remat=full"])
    assert not problems
    assert (run.train.steps, run.optimizer.learning_rate, run.model.remat) == (9, 1.0, "full")
    assert (run.model.scan_layers, run.mesh.mesh, run.train.batch) == (False, "data=8", 16)


def test_booleans_are_switched_by_name():
    assert parse(["--no-scan-layers"])[0].model.scan_layers is False
    assert parse(["--scan-layers"])[0].model.scan_layers is True
    assert parse(["--tied-embeddings", "false"])[0].model.tied_embeddings is False


def test_all_offenders_are_reported_at_once():
    found = problems_of("--batchh 4 --steps 0 --learning-rate nan --resume mst --num-heads 5")
    assert found == [
        "--batchh\n  why: there is no such option (did you mean '--batch'?)\n"
        "  fix: train.py --help lists the options",
        "--learning-rate nan\n  why: a finite number is needed\n"
        "  fix: for instance --learning-rate 0.004",
        "--resume mst\n  why: the choices are auto, must, never (did you mean 'must'?)\n"
        "  fix: for instance --resume auto",
        "--steps 0\n  why: it must be 1 or more\n  fix: for instance --steps 300",
        "--num-heads 5 --num-kv-heads 2\n  why: each key/value head serves as many query heads,"
        " and 5 / 2 leaves 1\n  fix: use --num-kv-heads 1 or 5",
    ]


def test_unknown_keys_of_a_file_are_errors(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("stpes = 7\nbatch = true\nseed = 1.5\n")
    assert problems_of(f"--config {path}") == [
        f"stpes = 7 in {path}\n  why: there is no such key (did you mean 'steps'?)\n"
        "  fix: train.py --help lists the keys",
        f"batch = True in {path}\n  why: a whole number is needed\n  fix: for instance --batch 16",
        f"seed = 1.5 in {path}\n  why: a whole number is needed\n  fix: for instance --seed 0",
    ]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"steps = 1\nsteps = 2\n", "it is not TOML: Cannot overwrite a value"),
        (b"\xff\xfe", "it is not TOML: 'utf-8' codec can't decode"),
        (b"#" * 1_000_001, "it has 1000001 bytes; a configuration has fewer than 1000000"),
        (None, "it cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_no_configuration_is_an_error(tmp_path, content, why):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    [problem] = problems_of(f"--config {path}")
    assert problem.startswith(f"--config {path}\n  why: {why}")


@pytest.mark.parametrize(
    ("options", "why", "fix"),
    [
        ("--mesh data=3,fsdp=3,tensor=1", "data=3 x fsdp=3 x tensor=1 needs 9 devices and there"
         " are 8", "use sizes with the product 8, or -1 for one of them"),
        ("--mesh fsdp=2,tensor=2", "fsdp=2 x tensor=2 needs 4 devices and there are 8",
         "use sizes with the product 8, or -1 for one of them"),
        ("--mesh fsdp=3,tensor=-1", "the other sizes make 3, which does not divide the 8 devices",
         "use sizes whose product divides 8"),
        ("--mesh fsdp=-1,tensor=-1", "-1 stands for all devices that are left, so only one axis"
         " can have it", "give all axes but one a size"),
        ("--mesh fsdp=0,tensor=8", "axis 'fsdp' has size 0, and an axis holds at least one device",
         "use 1 or more, or -1 for all that is left"),
        ("--mesh fsdp=4,fsdp=2", "axis 'fsdp' is given twice", "give it one size"),
        ("--mesh fsdp:8", "'fsdp:8' is not of the form axis=size",
         "write it like data=2,tensor=4"),
        ("--mesh fsdp=4,tensro=2", "'tensro' is no mesh axis (did you mean 'tensor'?)",
         "the axes are data, fsdp, tensor, sequence, expert, stage"),
        ("--mesh fsdp=2,tensor=2,expert=2", "--parallelism fsdp+tensor shards nothing over"
         " 'expert': its 2 devices would all do the same work",
         "leave 'expert' out, or mix in a table that uses it"),
        ("--mesh fsdp=8", "--parallelism fsdp+tensor needs the axis tensor",
         "add tensor=2, or change the parallelism"),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_work_is_an_error(options, why, fix):
    assert problems_of(options) == [f"{options}\n  why: {why}\n  fix: {fix}"]


def test_dims_that_the_mesh_does_not_divide_are_errors():
    assert problems_of("--batch 15 --mlp-dim 383 --mesh fsdp=4,tensor=2") == [
        "--batch 15\n  why: it is split over fsdp=4, 4 ways, and 15 = 3 x 4 + 3\n"
        "  fix: use --batch 12 or 16, or another --mesh",
        "--mlp-dim 383\n  why: it is split over tensor=2, 2 ways, and 383 = 191 x 2 + 1\n"
        "  fix: use --mlp-dim 382 or 384, or another --mesh",
    ]


@pytest.mark.parametrize(
    "options",
    ["--learning-rate -1", "--learning-rate 0", "--learning-rate inf", "--seed -1", "--dropout 1",
     "--seed 4294967296", "--warmup 1", "--checkpoint-every -1", "--batch 0", "--sequence 0",
     "--validation 0", "--temperature -1", "--keep 0", "--devices 0", "--parallelism tesnor",
     "--parallelism fsdp+", "--head-dim 7", "--dtype float16", "--data /no/such/file"],
)  # fmt: skip
def test_a_value_out_of_range_is_an_error_that_names_its_option(options):
    [problem] = problems_of(options)
    assert problem.startswith(options + "\n  why: ")


def test_resuming_needs_a_folder(tmp_path):
    assert problems_of("--resume must") == [
        "--resume must\n  why: no --checkpoint-dir is given\n"
        "  fix: name the folder of the run to continue: --checkpoint-dir runs/..."
    ]
    (tmp_path / "run-a").mkdir()
    shown = f"--checkpoint-dir {tmp_path}/run-b"
    assert problems_of(f"--resume must {shown}") == [
        f"{shown}\n  why: --resume must needs a checkpoint, and the folder does not exist"
        " (did you mean 'run-a'?)\n  fix: name the folder of the run to continue"
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {"fsdp": 4, "tensor": 2}),
        ("--mesh data=-1,tensor=2 --parallelism tensor", {"data": 4, "tensor": 2}),
        ("--parallelism data", {"data": 8}),
        ("--parallelism fsdp", {"fsdp": 8}),
        ("--parallelism tensor --num-kv-heads 4", {"data": 2, "tensor": 4}),
    ],
)
def test_the_mesh_is_filled_in(options, expected):
    run, problems = configured(options)
    assert (resolve_mesh(run, 8), problems) == (expected, [])


# Data


def test_a_batch_is_a_function_of_seed_and_step():
    text = np.arange(200, dtype=np.uint8)
    first = batch_at(text, 1, 5, 4, 16)
    assert (first.shape, first.dtype) == ((4, 17), np.int32)
    np.testing.assert_array_equal(first, batch_at(text, 1, 5, 4, 16))
    assert not np.array_equal(first, batch_at(text, 1, 6, 4, 16))
    assert not np.array_equal(first, batch_at(text, 2, 5, 4, 16))
    np.testing.assert_array_equal(np.diff(first, axis=1), 1)


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
    parts = [set(re.findall(rb"(?:\d{4}){20}", part.tobytes())) for part in
             (corpus.train, corpus.validation)]  # fmt: skip
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
    with pytest.raises(ConfigError) as error:
        load_corpus(DataConfig(data=str(path)))
    assert str(error.value) == (
        f"--data {path}\n  why: its 1 files give 95 bytes to train on and 5 to validate;"
        " one example is --sequence 128 + 1 = 129 bytes\n"
        "  fix: name more text, or use a shorter --sequence"
    )


def test_a_folder_without_text_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no file that matches --pattern \*\.py"):
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


def test_a_failed_save_is_reported_once_and_three_in_a_row_end_the_run(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    error = OSError("disk full")
    assert checkpoints._failed(1, error) == Problem(
        f"step 1 was not saved in {tmp_path}",
        "disk full",
        "make room on the disk; the next checkpoint is tried all the same",
    )
    checkpoints._failed(2, error)
    with pytest.raises(CheckpointError, match="step 3 was not saved"):
        checkpoints._failed(3, error)


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
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    [folder] = tmp_path.glob("runs/*")
    assert stderr.startswith("interrupted and saved; go on with:\n  python train.py")
    assert stderr.endswith(f"--checkpoint-dir runs/{folder.name} --resume must\n")
    step = losses(folder)[-1][0]
    assert Checkpoints(folder, keep=3).latest() == step


@pytest.mark.slow
def test_a_run_prints_its_plan_before_it_compiles_and_its_result_at_the_end(tmp_path):
    text = train("--steps", "2", folder=tmp_path).stdout
    order = ["configuration", "mesh: fsdp=4, tensor=2 (8 x cpu)", "parameters",
             "layers/mlp/gate", "collectives per step", "predicted memory: ", "compiled in",
             "step      2", "validation loss", "validation loss / entropy = ",
             "sample (cache (2, 4, 8, 2, 8) PartitionSpec(None, 'fsdp', None, 'tensor'", "def "]  # fmt: skip
    positions = [text.find(part) for part in order]
    assert -1 not in positions and positions == sorted(positions), text


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
