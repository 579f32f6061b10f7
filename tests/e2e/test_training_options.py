"""The options of train.py: where they come from, and what is wrong with them."""

import sys

import pytest

from training.cli import parse
from training.config import RunConfig, owners
from training.validate import resolve_mesh, validate


def configured(text, devices=8):
    """The configuration of a command line, and all that is wrong with it, as text."""
    run, problems = parse(text.split())
    return run, [str(problem) for problem in problems + validate(run, devices)]


def problems_of(text, devices=8):
    return configured(text, devices)[1]


def test_the_defaults_have_no_problem():
    assert problems_of("") == []
    assert configured("")[0] == RunConfig()


def test_flags_are_frozen():
    """New options are made on purpose: in the component that owns them, and in this list."""
    assert " ".join(owners(RunConfig())) == (
        "cluster coordinator num_processes process_id coordinator_bind start_timeout peer_timeout"
        " exit_timeout step_timeout devices mesh parallelism aot memory_limit ignore_memory_limit"
        " num_layers embed_dim mlp_dim num_heads num_kv_heads head_dim tied_embeddings dropout"
        " rope_base dtype scan_layers remat"
        " data pattern tokenizer token_dtype vocab_size validation sequence allow_data_change"
        " learning_rate warmup weight_decay clip_norm beta1 beta2"
        " batch steps seed eval_every eval_batches log_every max_skipped"
        " checkpoint_dir output_root run_name checkpoint_every keep resume elastic save_failures"
        " tensorboard profile debug_nans sample_bytes prompt temperature"
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
        "  fix: for instance --learning-rate 0.006",
        "--resume mst\n  why: the choices are auto, must, never (did you mean 'must'?)\n"
        "  fix: for instance --resume auto",
        "--steps 0\n  why: it must be from 1 to 2^31 - 1\n  fix: for instance --steps 400",
        "--num-heads 5 --num-kv-heads 2\n  why: each key/value head serves as many query heads,"
        " and 5 / 2 leaves 1\n  fix: use --num-kv-heads 1 or 5",
    ]


def test_unknown_keys_of_a_file_are_errors(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("stpes = 7\nbatch = true\nseed = 1.5\n")
    assert problems_of(f"--config {path}") == [
        f"stpes = 7 in {path}, line 1\n  why: there is no such key (did you mean 'steps'?)\n"
        "  fix: train.py --help lists the keys",
        f"batch = true in {path}, line 2\n  why: a whole number is needed\n"
        "  fix: for instance batch = 16",
        f"seed = 1.5 in {path}, line 3\n  why: a whole number is needed\n"
        "  fix: for instance seed = 0",
    ]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"steps = 1\nsteps = 2\n", "it is not TOML: Cannot overwrite a value"),
        (b"\xff\xfe", "it is not TOML: 'utf-8' codec can't decode"),
        (b"#" * 1_000_001, "it has 1000001 bytes; a configuration has at most 1000000"),
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
     "--parallelism fsdp+", "--head-dim 7", "--dtype float16", "--vocab-size -1",
     "--memory-limit -1", "--devices 4097", "--batch 2147483648", "--max-skipped 0",
     "--profile 3:401"],
)  # fmt: skip
def test_a_value_out_of_range_is_an_error_that_names_its_option(options):
    [problem] = problems_of(options)
    assert problem.startswith(options + "\n  why: ")


def test_tensorboard_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    [problem] = problems_of("--tensorboard")
    assert problem.startswith("--tensorboard\n  why: the package tensorboardX")


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
