"""The bad-input matrix, as far as it is train.py's: one case or more for each row, by its number.

Each ends with its exit code and a message of at most six lines, before anything is planned or
compiled, and writes nothing. Rows about the library are in tests/unit/test_bad_input_library.py.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

import train
from tests.faults import states
from training import hosts
from training.checkpoint import Checkpoints, identity
from training.errors import CheckpointError

TRAIN = pathlib.Path(train.__file__)
SMALL = "--num-layers 1 --embed-dim 32 --mlp-dim 64 --head-dim 8 --sequence 32 --batch 8"
TEXT = "--data text"
TOKENS = "--data tokens.bin --vocab-size 1000"


def write_files(folder):
    """What the cases read, beside what each writes itself."""
    (folder / "text").mkdir()
    (folder / "text" / "a.py").write_text("def f(x):\n    return x\n" * 100)
    np.arange(5000, dtype=np.uint16).clip(0, 999).tofile(folder / "tokens.bin")
    (folder / "tokens.json").write_text('{"dtype": "uint16"}')


def config(text):
    """A case that writes run.toml, in addition to what its options say."""
    return {"run.toml": text}


NEWLINES = r"\n" * 8
HELP = "  fix: train.py --help lists the options"
TOML = "  fix: name a TOML file with lines such as: steps = 100"
NAME = (
    "  why: a name has 1 to 64 letters, digits and . _ -, begins with a letter or digit, and has"
    " no two dots in a row\n  fix: for instance --run-name baseline-2"
)

# (row, options, files, exit code, message without "error: ")
CASES = [
    (1, "--mesh fsdp=3,tensor=3", {}, 2,
     "--mesh fsdp=3,tensor=3\n  why: fsdp=3 x tensor=3 needs 9 devices and there are 8\n"
     "  fix: use sizes with the product 8, or -1 for one of them"),
    (2, "--mesh fsdp=2,tensor=2", {}, 2,
     "--mesh fsdp=2,tensor=2\n  why: fsdp=2 x tensor=2 needs 4 devices and there are 8\n"
     "  fix: use sizes with the product 8, or -1 for one of them"),
    (3, "--mesh fsdp=0,tensor=8", {}, 2,
     "--mesh fsdp=0,tensor=8\n  why: axis 'fsdp' has size 0, and an axis holds at least one"
     " device\n  fix: use 1 or more, or -1 for all that is left"),
    (4, "--mesh fsdp=-1,tensor=-1", {}, 2,
     "--mesh fsdp=-1,tensor=-1\n  why: -1 stands for all devices that are left, so only one axis"
     " can have it\n  fix: give all axes but one a size"),
    (5, "--mesh fsdp=4,fsdp=2", {}, 2,
     "--mesh fsdp=4,fsdp=2\n  why: axis 'fsdp' is given twice\n  fix: give it one size"),
    (6, "--mesh fsdp", {}, 2,
     "--mesh fsdp\n  why: 'fsdp' is not of the form axis=size\n"
     "  fix: write it like data=2,tensor=4"),
    (7, "--mesh fsdp=4,tensro=2", {}, 2,
     "--mesh fsdp=4,tensro=2\n  why: 'tensro' is no mesh axis (did you mean 'tensor'?)\n"
     "  fix: the axes are data, fsdp, tensor, sequence, expert, stage"),
    (11, "--mlp-dim 63 --mesh fsdp=4,tensor=2", {}, 2,
     "--mlp-dim 63\n  why: it is split over tensor=2, 2 ways, and 63 = 31 x 2 + 1\n"
     "  fix: use --mlp-dim 62 or 64, or another --mesh"),
    (13, "--num-kv-heads 1 --num-heads 4 --mesh fsdp=2,tensor=4", {}, 2,
     "--num-kv-heads 1\n  why: it is split over tensor=4, 4 ways, and 1 = 0 x 4 + 1\n"
     "  fix: use --num-kv-heads 4, or another --mesh"),
    (18, "--parallelism fsdp+tensro", {}, 2,
     "--parallelism fsdp+tensro\n  why: there is no table 'tensro' (did you mean 'tensor'?)\n"
     "  fix: join tables with +, from data, fsdp, tensor, tensor_sequence, 2d"),
    (28, "--data tokens.bin --vocab-size 900", {}, 3,
     "tokens.bin, token 900 (byte 1800), has the id 900\n"
     "  why: the vocabulary has 900 ids, 0 to 899\n"
     "  fix: use the tokenizer that made the file, a larger --vocab-size, or the right"
     " --token-dtype"),
    (28, "--data ids.npy --vocab-size 1000", {"ids.npy": np.array([5] * 7 + [-1] * 93)}, 3,
     "ids.npy, token 7 (byte 184), has the id -1\n  why: the vocabulary has 1000 ids, 0 to 999\n"
     "  fix: use the tokenizer that made the file, a larger --vocab-size, or the right"
     " --token-dtype"),
    # Labels are the tokens one position on: what is a label is checked as a token.
    (29, "--data ids.npy --vocab-size 1000", {"ids.npy": np.array([5] * 99 + [1000])}, 3,
     "ids.npy, token 99 (byte 920), has the id 1000\n  why: the vocabulary has 1000 ids, 0 to 999\n"
     "  fix: use the tokenizer that made the file, a larger --vocab-size, or the right"
     " --token-dtype"),
    (30, "--batch 7", {}, 2,
     "--batch 7\n  why: it is split over fsdp=4, 4 ways, and 7 = 1 x 4 + 3\n"
     "  fix: use --batch 4 or 8, or another --mesh"),
    (31, "--batch 2", {}, 2,
     "--batch 2\n  why: it is split over fsdp=4, 4 ways, and 2 = 0 x 4 + 2\n"
     "  fix: use --batch 4, or another --mesh"),
    (32, "--steps 0", {}, 2,
     "--steps 0\n  why: it must be from 1 to 2^31 - 1\n  fix: for instance --steps 400"),
    (32, "--steps -1", {}, 2,
     "--steps -1\n  why: it must be from 1 to 2^31 - 1\n  fix: for instance --steps 400"),
    (32, "--checkpoint-every -1", {}, 2,
     "--checkpoint-every -1\n  why: it must be from 0 to 2^31 - 1\n"
     "  fix: for instance --checkpoint-every 100"),
    (33, "--learning-rate -1", {}, 2,
     "--learning-rate -1\n  why: it must be above 0\n  fix: for instance --learning-rate 0.006"),
    (33, "--learning-rate nan", {}, 2,
     "--learning-rate nan\n  why: a finite number is needed\n"
     "  fix: for instance --learning-rate 0.006"),
    (33, "--config run.toml", config('steps = 5\nlearning_rate = "1e-3"\n'), 2,
     "learning_rate = '1e-3' in run.toml, line 2\n  why: a finite number is needed\n"
     "  fix: for instance learning_rate = 0.006"),
    (34, "--warmup 1.5", {}, 2,
     "--warmup 1.5\n  why: it must be at least 0 and below 1\n  fix: for instance --warmup 0.1"),
    (35, "--seed -1", {}, 2,
     "--seed -1\n  why: it must be from 0 to 4294967295\n  fix: for instance --seed 0"),
    (35, "--seed 18446744073709551616", {}, 2,
     "--seed 18446744073709551616\n  why: it must be from 0 to 4294967295\n"
     "  fix: for instance --seed 0"),
    (35, "--seed 1.5", {}, 2,
     "--seed 1.5\n  why: a whole number is needed\n  fix: for instance --seed 0"),
    (36, "--config none.toml", {}, 2,
     f"--config none.toml\n  why: it cannot be read: No such file or directory\n{TOML}"),
    (36, "--config text", {}, 2, f"--config text\n  why: it is no file\n{TOML}"),
    (36, "--config /dev/zero", {}, 2, f"--config /dev/zero\n  why: it is no file\n{TOML}"),
    (36, "--config run.toml", config(""), 2,
     f"--config run.toml\n  why: it sets nothing; it has 0 bytes\n{TOML}"),
    (36, "--config run.toml", config(b"\0\1\2\3"), 2,
     f"--config run.toml\n  why: it is not TOML: Invalid statement (at line 1, column 1)\n{TOML}"),
    (36, "--config run.toml", config(b"a = '\xff'"), 2,
     "--config run.toml\n  why: it is not TOML: 'utf-8' codec can't decode byte 0xff in position 5:"
     f" invalid start byte\n{TOML}"),
    (36, "--config run.toml", config("#" * 1_000_001), 2,
     "--config run.toml\n  why: it has 1000001 bytes; a configuration has at most 1000000\n"
     f"{TOML}"),
    (36, "--config run.toml", config("steps = 1" + "0" * 5000), 2,
     "--config run.toml\n  why: it cannot be read: Exceeds the limit (4300 digits) for integer"
     f" string conversion: value has 5001 digits; use sys.set_int_max_str_digits() to increase the"
     f" limit\n{TOML}"),
    (37, "--config run.toml", config("# sizes\nbatch = 8\nstpes = 7\n"), 2,
     "stpes = 7 in run.toml, line 3\n  why: there is no such key (did you mean 'steps'?)\n"
     "  fix: train.py --help lists the keys"),
    (37, "--stpes 7", {}, 2,
     f"--stpes\n  why: there is no such option (did you mean '--steps'?)\n{HELP}"),
    (37, "--config run.toml", config("steps = 1\nsteps = 2\n"), 2,
     "--config run.toml\n  why: it is not TOML: Cannot overwrite a value (at line 2, column 10)\n"
     f"{TOML}"),
    (37, "--config run.toml", config("num_layers = 1\nnum-layers = 2\n"), 2,
     "num-layers = 2 in run.toml, line 2\n  why: the key is given twice, with - and with _\n"
     "  fix: keep one of them"),
    (37, "--config run.toml", config("steps = [1, 2]"), 2,
     "steps = [...] in run.toml, line 1\n  why: a whole number is needed\n"
     "  fix: for instance steps = 400"),
    (37, "--config run.toml", config("[model]\nnum_layers = 1\n"), 2,
     "model = {...} in run.toml, line 1\n  why: there is no such key; keys stand at the top,"
     " without tables\n  fix: train.py --help lists the keys"),
    (38, "--config run.toml", config("a = " + "[" * 100_000), 2,
     f"--config run.toml\n  why: it is nested too deeply, and a configuration not at all\n{TOML}"),
    (38, "--config run.toml", config("a." * 200_000 + "a = 1"), 2,
     f"--config run.toml\n  why: it is nested too deeply, and a configuration not at all\n{TOML}"),
    (38, "--config run.toml", config("b = {" + '"!" . ' * 17 + "a = 1}"), 2,
     f"--config run.toml\n  why: it is nested too deeply, and a configuration not at all\n{TOML}"),
    (38, "--config run.toml", config("a.b.c = 1"), 2,
     "a = {...} in run.toml, line 1\n  why: there is no such key; keys stand at the top, without"
     " tables\n  fix: train.py --help lists the keys"),
    (39, "--data txt", {}, 3,
     "--data txt\n  why: there is no such file or folder (did you mean 'text'?)\n"
     "  fix: name a file or folder of text, or of token ids (.bin, .npy)"),
    (39, "--data empty", {"empty/.keep": ""}, 3,
     "--data empty\n  why: the folder holds no file that matches --pattern *.py\n"
     "  fix: give a --pattern that does"),
    (39, "--data notes", {"notes/a.txt": "", "notes/b.txt": ""}, 3,
     "--data notes\n  why: the folder holds no file that matches --pattern *.py; it holds 2 of"
     " *.txt\n  fix: give a --pattern that does"),
    (39, "--data mixed --pattern *", {"mixed/a.txt": "a", "mixed/b.bin": "b"}, 3,
     "--data mixed\n  why: --pattern * matches token ids, b.bin, and text, a.txt\n"
     "  fix: use a --pattern for one of them, such as *.bin"),
    (39, "--data little.py", {"little.py": "x" * 50}, 3,
     "--data little.py\n  why: its 1 files give 48 bytes to train on and 2 to validate; one example"
     " is --sequence 32 + 1 = 33 bytes\n  fix: name more data, or use a shorter --sequence"),
    (39, "--data odd.bin --vocab-size 8",
     {"odd.bin": b"\0" * 101, "odd.json": '{"dtype":"uint32"}'}, 3,
     "odd.bin\n  why: its 101 bytes are no multiple of the 4 of a uint32\n"
     "  fix: write it again if it was cut short, or give the right --token-dtype"),
    (39, "--data x.bin --vocab-size 8", {"x.bin": b"\0" * 100, "tokens.json": "{}"}, 3,
     "x.bin\n  why: a .bin file does not say whether its ids are uint16 or uint32\n"
     '  fix: give --token-dtype uint16, or write {"dtype": "uint16"} into x.json'),
    (39, "--data x.bin", {"x.bin": b"\0" * 100}, 2,
     "--data x.bin\n  why: neither --tokenizer nor a .json beside the files says how many ids there"
     ' are\n  fix: give --vocab-size, or write {"vocab_size": N} into tokens.json'),
    (39, "--data x.bin", {"x.bin": b"\0" * 100, "x.json": '{"dtype": "int8"}'}, 3,
     "x.json\n  why: dtype is int8, and ids are uint16 or uint32\n"
     '  fix: write it like {"dtype": "uint16", "vocab_size": 32000}'),
    (39, "--data f.npy --vocab-size 8", {"f.npy": np.zeros(100)}, 3,
     "f.npy\n  why: it holds float64[100], and token ids are integers in one dim\n"
     "  fix: save ids.reshape(-1).astype(numpy.uint16), or uint32"),
    (39, "--data f.npy --vocab-size 8", {"f.npy": np.array([{}])}, 3,
     "f.npy\n  why: it is no whole .npy file: Array can't be memory-mapped: Python objects in"
     " dtype.\n  fix: write it with numpy.save"),
    (39, "--tokenizer run.toml", config("steps = 1"), 3,
     "--tokenizer run.toml\n  why: it is no tokenizer: expected value at line 1 column 1\n"
     "  fix: name a tokenizer.json"),
    (39, "--vocab-size 100", {}, 2,
     "--vocab-size 100\n  why: text without a --tokenizer has 256 ids\n"
     "  fix: use --vocab-size 256 or more, or leave it out"),
    (41, "--resume must", {}, 2,
     "--resume must\n  why: no --checkpoint-dir is given\n"
     "  fix: name the folder of the run to continue: --checkpoint-dir runs/..."),
    (41, "--resume must --checkpoint-dir txt", {}, 2,
     "--checkpoint-dir txt\n  why: --resume must needs a checkpoint, and the folder does not exist"
     " (did you mean 'text'?)\n  fix: name the folder of the run to continue"),
    (41, "--resume must --run-name b", {"runs/a/x": ""}, 2,
     "--run-name b --output-root runs\n  why: --resume must needs a checkpoint, and the folder does"
     " not exist\n  fix: name the folder of the run to continue"),
    (45, "--run-name ../x", {}, 2, f"--run-name ../x\n{NAME}"),
    (45, "--run-name a..b", {}, 2, f"--run-name a..b\n{NAME}"),
    (45, "--run-name /etc", {}, 2, f"--run-name /etc\n{NAME}"),
    (45, "--run-name a\0b", {}, 2, f"--run-name 'a\\x00b'\n{NAME}"),
    (45, f"--run-name {'a' * 300}", {}, 2, f"--run-name {'a' * 197}...\n{NAME}"),
    (45, "--run-name $(id)", {}, 2, f"--run-name $(id)\n{NAME}"),
    (45, f"--run-name {'a' + chr(10) * 9}", {}, 2, f"--run-name 'a{chr(92)}n{NEWLINES}'\n{NAME}"),
    (45, "--run-name \udcff", {}, 2, f"--run-name '\\udcff'\n{NAME}"),
    (45, "--checkpoint-dir " + "a" * 300, {}, 2,
     f"--checkpoint-dir {'a' * 197}...\n  why: file systems keep names of at most 255 bytes\n"
     "  fix: use a shorter name"),
    (45, "--checkpoint-dir a\0b", {}, 2,
     "--checkpoint-dir 'a\\x00b'\n  why: it is not a folder\n  fix: name a folder, or a new one"),
    (45, "--checkpoint-dir gs://bucket/a", {}, 2,
     "--checkpoint-dir gs://bucket/a\n  why: checkpoints are committed by a rename, which object"
     " stores do not have\n  fix: name a folder of a file system that is mounted"),
    (45, "--run-name a --checkpoint-dir b", {}, 2,
     "--run-name a --checkpoint-dir b\n  why: both say where the run has its folder\n"
     "  fix: keep one of them"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder; planning and compiling fail in it."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    # The backend of the tests runs already, with as many devices.
    monkeypatch.setattr(hosts, "simulate", lambda *devices: True)

    def too_late(*args, **options):
        raise AssertionError("planned before the message")

    monkeypatch.setattr(train, "plan", too_late)
    return tmp_path


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            np.save(path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def listed(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def words(options):
    """Options at single spaces; everything else is part of them."""
    given = options.split(" ")
    return [*SMALL.split(), *([] if "--data" in options else TEXT.split()), *given]


@pytest.mark.parametrize(
    ("row", "options", "files", "code", "message"),
    CASES,
    ids=[f"{case[0]}-{re.sub(r'[^ -~]', '', case[1])[:40]}" for case in CASES],
)
def test_bad_input_ends_with_its_code_and_message(
    row, options, files, code, message, folder, capsys
):
    write(folder, files)
    before, started = listed(folder), time.process_time()
    assert train.main(words(options)) == code
    assert time.process_time() - started < 2  # of this process: others may keep it waiting
    out, err = capsys.readouterr()
    assert err == f"error: {message}\n"
    assert len(err.splitlines()) <= 6
    assert "Traceback" not in out + err
    assert listed(folder) == before


def test_rows_of_options_and_data_are_all_here():
    """Rows 40 and 45 have tests of their own, too, row 46 is in test_memory_limit.py, and 42 to 44
    are those of checkpoints."""
    mine = {*range(1, 8), 11, 13, 18, *range(28, 40), 41, 45}
    assert {case[0] for case in CASES} == mine


def test_a_run_name_that_is_a_link_out_of_the_root_is_refused(folder, capsys):
    """Row 45."""
    (folder / "runs").mkdir()
    (folder / "runs" / "out").symlink_to(folder / "text")
    assert train.main(words("--run-name out")) == 2
    assert capsys.readouterr().err == (
        f"error: --run-name out\n  why: it is a link to {folder}/text, which is not in"
        " --output-root runs\n  fix: use another name, or remove the link\n"
    )


def test_dots_in_texts_are_no_depth(folder):
    prompt = "a." * 50
    (folder / "run.toml").write_text(f"prompt = '{prompt}'  # {prompt}\n")
    assert train.configure(words("--config run.toml"))[0].sample.prompt == prompt


def test_changed_data_is_refused_unless_that_is_allowed(folder):
    """Row 40."""
    console = Console(quiet=True)
    run, _ = train.configure(words("--run-name a"))
    corpus = train.load_corpus(run.data)
    checkpoints = Checkpoints(folder / "runs" / "a", keep=1)
    checkpoints.open()
    checkpoints.save(5, states.at(5, columns=1), identity(run, corpus))
    assert checkpoints.finish() is None

    def resumed(run, corpus):
        return train.resume(console, console, run, corpus, checkpoints).step

    assert resumed(run, corpus) == 5
    (folder / "text" / "a.py").write_text("def g(x):\n    return x\n" * 100)
    changed = train.load_corpus(run.data)
    with pytest.raises(CheckpointError) as error:
        resumed(run, changed)
    assert str(error.value) == (
        f"{folder}/runs/a, step 5: text is {corpus.fingerprint}\n  why: this run has"
        f" {changed.fingerprint}, so the state would not mean the same\n"
        "  fix: name the data that the run began with, or give --allow-data-change"
    )
    assert error.value.exit_code == 4
    allowed, _ = train.configure(words("--run-name a --allow-data-change"))
    assert resumed(allowed, changed) == 5
    checkpoints.close()


def test_many_unknown_keys_are_counted(folder, capsys):
    (folder / "run.toml").write_text("".join(f"key_{i} = {i}\n" for i in range(30_000)))
    assert train.main(words("--config run.toml")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 21 problems\n(1) key_0 = 0 in run.toml, line 1\n")
    assert "(21) 29980 more keys in run.toml\n" in err


def test_a_missing_tokenizers_package_is_a_clear_error(folder, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert train.main(words("--tokenizer t.json")) == 2
    assert capsys.readouterr().err == (
        "error: --tokenizer t.json\n  why: the package tokenizers, which reads it, is not"
        ' installed\n  fix: pip install -e ".[tokenizers]", or leave it out to learn bytes\n'
    )


def test_sidecars_say_dtype_and_vocabulary(folder, monkeypatch):
    (folder / "tokens.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 1024}))
    run, _ = train.configure(words("--data tokens.bin"))
    assert run.model.vocab_size == 1024


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--run-name ../x", 2, f"--run-name ../x\n{NAME}"),
        ("--data none", 3,
         "--data none\n  why: there is no such file or folder\n"
         "  fix: name a file or folder of text, or of token ids (.bin, .npy)"),
    ],
)  # fmt: skip
def test_whole_processes_end_so_too(options, code, message, tmp_path):
    write_files(tmp_path)
    before = listed(tmp_path)
    command = [sys.executable, str(TRAIN), *words(options)]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, f"error: {message}\n")
    assert listed(tmp_path) == before
