"""``ppsd generate`` as a user runs it: output, files, mistakes, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from cli_model import CONTEXT, LAYERS, Ppsd, save_cli_model, start
from models import Tiny, save_head
from safetensors.torch import load_file, save_file

import ppsd_cli

PROMPT = ("--prompt", "hello world")
CHAIN = ("--split", "2,2,2", "--devices", "cpu")
THREE = ("--stages", "3", "--devices", "cpu")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_cli_model(tmp_path_factory.mktemp("cli-model"))


@pytest.fixture
def ppsd(capsys, monkeypatch, model, tmp_path) -> Ppsd:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("PPSD_MODEL", raising=False)
    return Ppsd(capsys, monkeypatch, model)


@pytest.fixture
def broken(model, tmp_path):
    """A copy of the model that a test may spoil."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


def change_json(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def assert_error(result, code: int, *says: str) -> None:
    """One or two lines on stderr that say what is wrong; nothing on stdout, no traceback."""
    assert result.code == code, result.err
    lines = [line for line in result.err.splitlines() if not line.startswith("ppsd: decoder ar")]
    assert 1 <= len(lines) <= 2, result.err
    assert lines[-1].startswith("ppsd: ")
    assert "Traceback" not in result.err
    assert "internal error" not in result.err
    for part in says:
        assert part in result.err
    assert result.out.strip() == ""


# The answer


def test_text_is_the_models_and_the_same_for_every_decoder(ppsd):
    plain = ppsd.generate(*PROMPT, "-n", "24", "--decoder", "ar")
    assert plain.code == 0
    assert plain.out.endswith("\n")
    assert len(plain.out) > 20
    assert "plain decoding" in plain.err
    for shape in (CHAIN, ("--split", "1,5", "--devices", "cpu"), ("--exit-layer", "3")):
        chain = ppsd.generate(*PROMPT, "-n", "24", *shape, "--devices", "cpu")
        assert (chain.code, chain.out) == (0, plain.out)
        assert "raw exit" in chain.err
    naive = ppsd.generate(*PROMPT, "-n", "24", *CHAIN, "--decoder", "ar")
    assert naive.out == plain.out


@pytest.mark.parametrize("options", [(), ("--draft-length", "1"), ("--stages", "3")], ids=str)
def test_draft_then_verify(ppsd, options):
    plain = json.loads(ppsd.generate(*PROMPT, "-n", "24", "--decoder", "ar", "--json").out)
    eesd = ("--decoder", "eesd", *options)
    shown = ppsd.generate(*PROMPT, "-n", "24", *eesd)
    assert (shown.code, shown.out) == (0, plain["text"] + "\n")
    assert "draft, then verify (EESD)" in shown.err
    assert "tokens per burst" in shown.err
    report = json.loads(ppsd.generate(*PROMPT, "-n", "24", *eesd, "--json").out)
    assert report["token_ids"] == plain["token_ids"]
    assert (report["decoder"], report["head"]) == ("eesd", "raw")
    assert report["draft_length"] == (1 if "--draft-length" in options else 4)
    stages = 3 if "--stages" in options else 2
    assert len(report["split"]) == stages
    assert report["ticks"] == stages * (1 + report["bursts"])
    assert report["accepted"] + report["bursts"] == 23
    assert (plain["draft_length"], plain["bursts"]) == (None, None)


def test_a_draft_length_in_a_profile(ppsd, model, tmp_path):
    profile = tmp_path / "p.yaml"
    profile.write_text(f"name: p\nmodel: {model}\nsettings: {{decoder: eesd, draft_length: 3}}\n")
    base = ("generate", "--profile", str(profile), *PROMPT, "-n", "12", "--json")
    report = json.loads(ppsd.run(*base).out)
    assert (report["decoder"], report["draft_length"]) == ("eesd", 3)
    other = json.loads(ppsd.run(*base, "--decoder", "ar").out)
    assert (other["decoder"], other["draft_length"]) == ("ar", None)
    assert other["token_ids"] == report["token_ids"]


def test_transformers_says_the_same(ppsd, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = [{"role": "system", "content": "be nice"}, {"role": "user", "content": "hello world"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    reference = AutoModelForCausalLM.from_pretrained(model)
    expected = reference.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)
    result = ppsd.generate(*PROMPT, "--system", "be nice", "-n", "30", "--json", *CHAIN)
    report = json.loads(result.out)
    assert report["prompt_tokens"] == ids.shape[1]
    assert report["token_ids"] == expected[0, ids.shape[1] :].tolist()


def test_bare_text_differs_from_chat(ppsd):
    chat = json.loads(ppsd.generate(*PROMPT, "-n", "5", "--json").out)
    bare = json.loads(ppsd.generate(*PROMPT, "-n", "5", "--json", "--no-chat-template").out)
    assert chat["prompt_tokens"] == bare["prompt_tokens"] + 3
    assert chat["token_ids"] != bare["token_ids"]


def test_prompt_from_flag_file_and_pipe_are_the_same(ppsd, tmp_path):
    expected = ppsd.generate(*PROMPT, "-n", "12").out
    file = tmp_path / "prompt.txt"
    file.write_text("hello world")
    assert ppsd.generate("-f", str(file), "-n", "12").out == expected
    assert ppsd.generate("-n", "12", stdin=b"hello world").out == expected
    assert ppsd.generate("-p", "-", "-n", "12", stdin=b"hello world").out == expected
    given = ppsd.generate(*PROMPT, "-n", "12", stdin=b"ignored").out
    assert given == expected, "a prompt that is given wins over a pipe"


def test_stop_strings_end_the_answer_before_them(ppsd):
    whole = ppsd.generate(*PROMPT, "-n", "30").out.rstrip("\n")
    for begin, end in ((3, 6), (7, 8), (10, 16), (0, 2)):
        stop = whole[begin:end]
        result = ppsd.generate(*PROMPT, "-n", "30", "--stop", stop, "--stop", "never said", *CHAIN)
        assert result.code == 0
        assert result.out.rstrip("\n") == whole[: whole.index(stop)].rstrip("\n")
        report = json.loads(ppsd.generate(*PROMPT, "-n", "30", "--stop", stop, "--json").out)
        assert report["finish_reason"] == "stop"
        assert report["text"] == whole[: whole.index(stop)]


def test_end_of_text_and_ignore_eos(ppsd, broken):
    ids = json.loads(ppsd.generate(*PROMPT, "-n", "20", "--json").out)["token_ids"]
    change_json(broken / "generation_config.json", eos_token_id=[999, ids[6]])
    ppsd.model = str(broken)
    ended = json.loads(ppsd.generate(*PROMPT, "-n", "20", "--json", *CHAIN).out)
    first = ids.index(ids[6])
    assert ended["token_ids"] == ids[: first + 1]
    assert ended["finish_reason"] == "stop"
    ignoring = json.loads(ppsd.generate(*PROMPT, "-n", "20", "--json", "--ignore-eos").out)
    assert ignoring["token_ids"] == ids
    assert ignoring["finish_reason"] == "length"


def test_context_ends_the_answer(ppsd):
    report = json.loads(ppsd.generate(*PROMPT, "--context", "30", "--json", *CHAIN).out)
    assert report["finish_reason"] == "context"
    assert report["prompt_tokens"] + len(report["token_ids"]) == 30


def test_seeds_repeat_and_decoders_agree(ppsd):
    sampled = ("--temperature", "1.5", "--top-p", "0.95", "-n", "24")
    texts = {}
    for seed in ("1", "2"):
        plain = ppsd.generate(*PROMPT, *sampled, "--seed", seed, "--decoder", "ar").out
        assert ppsd.generate(*PROMPT, *sampled, "--seed", seed, *CHAIN).out == plain
        texts[seed] = plain
    assert texts["1"] != texts["2"]


def test_a_draft_vocabulary_asks_for_drafting(ppsd):
    report = json.loads(
        ppsd.generate(*PROMPT, "-n", "4", "--json", "--draft-vocab", "50", "--devices", "cpu").out
    )
    assert (report["decoder"], report["head"]) == ("ppsd", "raw")


# Forms of output


SCHEMA = Path(ppsd_cli.__file__).parent / "data" / "schema" / "generate.json"


@pytest.mark.parametrize(
    "options",
    [
        (),
        CHAIN,
        (*CHAIN, "--temperature", "0.9", "--seed", "-5"),
        ("--context", "20"),
        ("-n", "1"),
        (*CHAIN, "-n", "1"),
        ("--decoder", "eesd"),
        ("--decoder", "eesd", "-n", "1"),
        ("--dtype", "bfloat16"),
        ("--stop", "e"),
    ],
    ids=str,
)
def test_json_fits_its_schema(ppsd, options):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    result = ppsd.generate(*PROMPT, "-n", "12", "--json", *options)
    assert result.code == 0
    assert result.out.count("\n") == 1
    report = json.loads(result.out)
    jsonschema.Draft202012Validator(schema).validate(report)
    assert next(iter(report)) == "schema_version"
    assert list(report) == list(schema["properties"]), "fields in the order of the schema"
    assert report["incomplete"] is False
    if report["verified"]:
        assert report["acceptance_rate"] == report["accepted"] / report["verified"]


def test_docs_name_every_field():
    text = (Path(ppsd_cli.__file__).parents[1] / "docs" / "json.md").read_text()
    for field in json.loads(SCHEMA.read_text())["properties"]:
        assert f"`{field}`" in text


def test_output_file_and_trace(ppsd, tmp_path):
    expected = ppsd.generate(*PROMPT, "-n", "12").out.rstrip("\n")
    out, trace = tmp_path / "answer.txt", tmp_path / "trace.json"
    out.write_text("old")
    result = ppsd.generate(*PROMPT, "-n", "12", "-o", str(out), "--trace", str(trace), *CHAIN)
    assert result.code == 0
    assert result.out == ""
    assert out.read_text() == expected
    events = json.loads(trace.read_text())
    assert {e["ph"] for e in events} >= {"X", "M"}
    assert all("ts" in e and "dur" in e for e in events if e["ph"] == "X")
    assert sorted(p.name for p in tmp_path.glob("*answer*")) == ["answer.txt"], "nothing temporary"


def test_quiet_says_nothing_beside_the_answer(ppsd):
    result = ppsd.generate(*PROMPT, "-n", "5", "--quiet", *CHAIN)
    assert result.err == ""
    assert result.out.strip()


def test_timeline_in_a_pipe_goes_to_stderr(ppsd):
    plain = ppsd.generate(*PROMPT, "-n", "8", *CHAIN)
    drawn = ppsd.generate(*PROMPT, "-n", "8", "--timeline", *CHAIN)
    assert drawn.out == plain.out
    assert "stage 2  layers 4-5" in drawn.err
    assert "stage 2" not in plain.err
    assert "\x1b" not in drawn.out + drawn.err


def test_a_trained_head_by_flag_and_in_a_profile(ppsd, model, tmp_path):
    expected = ppsd.generate(*PROMPT, "-n", "12", "--decoder", "ar").out
    report = json.loads(ppsd.generate(*PROMPT, "-n", "1", "--json").out)
    head = tmp_path / "heads" / "mine"
    from transformers import AutoModelForCausalLM

    tiny = Tiny(model, AutoModelForCausalLM.from_pretrained(model))
    save_head(head, tiny, [(2, 0), (4, 1), (6, 2)], model_hash=report["model_hash"])
    result = ppsd.generate(*PROMPT, "-n", "12", "--head", str(head), "--devices", "cpu", "--json")
    report = json.loads(result.out)
    assert report["text"] == expected.rstrip("\n")
    assert (report["head"], report["split"], report["exit_layer"]) == ("mine", [2, 3, 1], 2)
    profile = tmp_path / "p.yaml"
    profile.write_text(
        f"name: p\nmodel: {model}\nsettings: {{head: heads/mine, devices: [cpu], split: [2,2,2]}}\n"
    )
    by_profile = ppsd.run("generate", "--profile", str(profile), *PROMPT, "-n", "12", "--json")
    report = json.loads(by_profile.out)
    assert report["text"] == expected.rstrip("\n")
    assert (report["head"], report["split"]) == ("mine", [2, 2, 2])
    other = ppsd.run("generate", "--profile", str(profile), *PROMPT, "--exit-layer", "3", "--json")
    assert other.code == 0, "another shape drops the profile's head"
    assert json.loads(other.out)["head"] == "raw"
    wrong = ppsd.generate(*PROMPT, "--head", str(head), "--exit-layer", "3", "--devices", "cpu")
    assert_error(wrong, 3, "layer 2", "layer is 3")
    save_head(head, tiny, [(2, 0), (6, 1)], model_hash="sha256:" + "0" * 64)
    assert_error(ppsd.generate(*PROMPT, "--head", str(head)), 3, "sha256:000000000000")
    (head / "head.safetensors").write_bytes(b"x")


# Mistakes


def test_help_and_version(ppsd):
    assert ppsd.run("--version").out.startswith("ppsd ")
    shown = ppsd.run("generate", "--help")
    assert shown.code == 0
    for flag in ("--exit-layer", "--prompt-file", "--trace", "--min-p"):
        assert flag in shown.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--exit-layer", str(LAYERS)), "choose 1 to 5"),
        (("--exit-layer", "99"), "choose 1 to 5"),
        (("--exit-layer", "0"), "--exit-layer 0"),
        (("--split", "2,2,3"), "adds up to 7"),
        (("--split", "a,b"), "10,10,10"),
        (("--split", "6,0"), "at least one layer"),
        (("--split", "2,4", "--stages", "3"), "disagree"),
        (("--split", "2,4", "--exit-layer", "3"), "disagree"),
        (("--stages", "9"), "only 6 layers"),
        (("--decoder", "magic"), "magic"),
        (("--decoder", "ppsd", "--stages", "1"), "two stages"),
        (("--decoder", "eesd", "--split", "6"), "--decoder eesd needs two stages"),
        (("--decoder", "eesd", "--draft-length", "0"), "--draft-length 0"),
        (("--decoder", "eesd", "--draft-length", "65"), "at most 64"),
        (("--draft-length", "4"), "for --decoder eesd, and this run's is ar"),
        (("--draft-length", "4", *CHAIN), "this run's is ppsd"),
        (("--devices", "cpu,cpu", "--stages", "3"), "2 devices for 3 stages"),
        (("--devices", "gpu"), "no device"),
        (("--temperature", "-1"), "--temperature -1"),
        (("--temperature", "nan"), "--temperature nan"),
        (("--temperature", "inf"), "--temperature inf"),
        (("--top-p", "0"), "--top-p 0"),
        (("--top-p", "nan"), "--top-p nan"),
        (("--top-k", "-3"), "--top-k -3"),
        (("--min-p", "2"), "--min-p 2"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0"),
        (("--context", "4096"), f"at most {CONTEXT}"),
        (("--context", "0"), "--context 0"),
        (("--dtype", "int4"), "int4"),
        (("--threads", "0"), "--threads 0"),
        (("--threads", "99999"), "--threads 99999"),
        (("--draft-vocab", "9999", *CHAIN), "--draft-vocab 9999"),
        (("--json", "--raw"), "--json and --raw"),
        (("--prompt-file", "x.txt"), "not both"),
        (("--system", "x", "--no-chat-template"), "--system"),
        (("--profile", "bad name"), "profile name"),
    ],
    ids=str,
)  # fmt: skip
def test_usage_mistakes(ppsd, options, says):
    assert_error(ppsd.generate(*PROMPT, *options), 2, says)


@pytest.mark.parametrize("options", [("--no-such-flag",), ("--seed", "x"), ("--top-k", "1.5")])
def test_flags_that_typer_refuses(ppsd, options):
    result = ppsd.generate(*PROMPT, *options)
    assert result.code == 2
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--model", "./nowhere"), 3, "nowhere"),
        (("--profile", "nothing"), 3, "no profile 'nothing'"),
        (("--head", "nothing"), 3, "no draft head 'nothing'"),
        (("--devices", "cuda:7"), 4, "cuda:7"),
        (("--trace", "/nowhere/x.json"), 3, "/nowhere"),
        (("--output", "/nowhere/x.txt"), 3, "/nowhere"),
        (("--output", "/"), 3, "folder"),
    ],
    ids=str,
)
def test_what_is_missing(ppsd, options, code, says):
    assert_error(ppsd.generate(*PROMPT, *options), code, says)


def test_output_is_checked_before_anything_is_read(ppsd, broken):
    (broken / "config.json").unlink()
    ppsd.model = str(broken)
    assert_error(ppsd.generate(*PROMPT, "-o", "/nowhere/x"), 3, "/nowhere")


def test_prompts_that_cannot_be(ppsd, tmp_path):
    assert_error(ppsd.generate("--prompt", ""), 2, "empty")
    assert_error(ppsd.generate("--prompt", "  \n "), 2, "empty")
    assert_error(ppsd.generate(stdin=b""), 2, "empty")
    assert_error(ppsd.generate(), 2, "no prompt")
    assert_error(ppsd.generate("--prompt", "word " * 500), 2, "tokens, the context holds 128")
    file = tmp_path / "prompt.txt"
    assert_error(ppsd.generate("-f", str(file)), 3, "prompt.txt")
    assert_error(ppsd.generate("-f", str(tmp_path)), 3, str(tmp_path))
    file.write_bytes(b"good so far \xff")
    assert_error(ppsd.generate("-f", str(file)), 3, "not UTF-8 at byte 12")
    assert_error(ppsd.generate(stdin=b"ab\xc3"), 3, "stdin: not UTF-8 at byte 2")


def test_a_prompt_that_just_fits(ppsd):
    ids = json.loads(ppsd.generate(*PROMPT, "-n", "1", "--json").out)["prompt_tokens"]
    exactly = ppsd.generate(*PROMPT, "--context", str(ids + 1), "--json", *CHAIN)
    assert len(json.loads(exactly.out)["token_ids"]) == 1
    assert_error(ppsd.generate(*PROMPT, "--context", str(ids), *CHAIN), 2, f"has {ids} tokens")


def test_no_model(ppsd):
    assert_error(ppsd.run("generate", *PROMPT), 2, "no model", "smollm2-135m")


def test_closed_stdin(ppsd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    from ppsd_cli.commands.prompts import PromptSource, read_prompt
    from ppsd_cli.errors import ConfigError

    with pytest.raises(ConfigError, match="no prompt"):
        read_prompt(PromptSource(None, None, None, True))
    with pytest.raises(ConfigError, match="stdin is closed"):
        read_prompt(PromptSource("-", None, None, True))
    assert ppsd.generate(*PROMPT, "-n", "2").code == 0


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (lambda f: (f / "model.safetensors").unlink(), 3, "safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), 3, "truncated"),
        (lambda f: os.truncate(f / "model.safetensors", 0), 3, "truncated"),
        (lambda f: (f / "config.json").unlink(), 3, "config.json"),
        (lambda f: (f / "config.json").write_text("{"), 3, "not valid JSON"),
        (lambda f: change_json(f / "config.json", model_type="gpt2"), 3, "llama, mistral, qwen2"),
        (lambda f: change_json(f / "config.json", num_hidden_layers=7), 3, "model.layers.6"),
        (lambda f: change_json(f / "config.json", hidden_size=64), 3, "shape"),
        (lambda f: (f / "tokenizer.json").write_text("{"), 3, "tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text('{"model": {}}'), 3, "tokenizer"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no') }}"), 3, "no"),
        (lambda f: (f / "chat_template.jinja").write_text("{% if %}"), 3, "chat template"),
        (lambda f: spoil(f, torch.nan), 5, "NaN"),
    ],
    ids=lambda value: None if callable(value) else str(value),
)  # fmt: skip
@pytest.mark.parametrize("shape", [("--decoder", "ar"), THREE], ids=["ar", "chain"])
def test_damaged_models(ppsd, broken, damage, code, says, shape):
    damage(broken)
    ppsd.model = str(broken)
    result = ppsd.generate(*PROMPT, "-n", "4", "--quiet", *shape)
    assert_error(result, code, says)


def spoil(folder: Path, value: float) -> None:
    """Put ``value`` into a weight of the last layer."""
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{LAYERS - 1}.mlp.down_proj.weight"][3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_nan_in_json(ppsd, broken):
    """A run that failed still gives its JSON, marked incomplete."""
    spoil(broken, torch.nan)
    ppsd.model = str(broken)
    result = ppsd.generate(*PROMPT, "--json", *CHAIN)
    assert result.code == 5
    report = json.loads(result.out)
    assert report["finish_reason"] == "failed"
    assert report["incomplete"] is True
    assert "NaN" in report["error"]
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(report)


def test_debug_shows_the_traceback(ppsd):
    result = ppsd.generate(*PROMPT, "--split", "1,1", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err


# As a process of its own

LONG = ("-n", "100", "--context", str(CONTEXT), "--ignore-eos", "--decoder", "ar")
SLOWED = """
import sys, time
from ppsd_cli.runtime import local
collect = local.LocalRunner.collect
def slow(self):
    time.sleep(0.1)
    print("tick", file=sys.stderr, flush=True)
    return collect(self)
local.LocalRunner.collect = slow
from ppsd_cli.cli import main
main(sys.argv[1:])
"""


def start_slowly(model: Path, *args: str) -> subprocess.Popen[bytes]:
    """``ppsd generate`` with ticks of a tenth of a second, so that a signal meets it at work."""
    command = [sys.executable, "-c", SLOWED, "generate", "--model", str(model), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, **pipes)


@pytest.mark.parametrize(
    ("number", "code", "form"),
    [(signal.SIGINT, 130, "text"), (signal.SIGTERM, 143, "json")],
    ids=["INT", "TERM"],
)
def test_signals_end_in_good_order(ppsd, model, number, code, form):
    whole = ppsd.generate(*PROMPT, *LONG).out
    trace = model.parent / f"trace-{number}-{form}.json"
    extra = ("--trace", str(trace), *(("--json",) if form == "json" else ()))
    process = start_slowly(model, *PROMPT, *LONG, *extra)
    assert process.stdout is not None
    assert process.stderr is not None
    if form == "text":
        seen = process.stdout.read(4)
    else:
        seen = b""
        assert [process.stderr.readline() for _ in range(4)] == [b"tick\n"] * 4
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert b"Traceback" not in err
    if form == "text":
        partial = (seen + out).decode()
        assert whole.startswith(partial.rstrip("\n"))
        assert len(partial) < len(whole)
    else:
        report = json.loads(out)
        assert report["finish_reason"] == "interrupted"
        assert report["incomplete"] is True
    assert isinstance(json.loads(trace.read_text()), list)


def test_interrupted_twice_ends_at_once(model):
    process = start_slowly(model, *PROMPT, *LONG)
    assert process.stdout is not None
    process.stdout.read(2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err


@pytest.mark.parametrize("extra", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_goes_away(model, extra):
    process = start(model, *PROMPT, *LONG, *extra)
    assert process.stdout is not None
    assert process.stderr is not None
    if not extra:
        process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=20) == 141
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


@pytest.mark.slow
def test_closed_streams(model):
    """No stdin, stdout or stderr, as under a daemon."""
    script = f'"{sys.executable}" -m ppsd_cli generate --model "{model}" -n 3'

    def run(rest: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["bash", "-c", f"{script} {rest}"], capture_output=True, check=False)

    done = run("-p hi <&- 2>&-")
    assert done.returncode == 0
    assert done.stdout.strip()
    assert run("-p hi >&-").returncode == 0
    done = run("<&-")
    assert done.returncode == 2
    assert b"no prompt" in done.stderr
    assert b"Traceback" not in done.stderr


def test_stage_processes_answer_the_same(ppsd, model):
    """The default on a CPU with several stages: a process each."""
    expected = ppsd.generate(*PROMPT, "-n", "20", "--decoder", "ar").out
    process = start(model, *PROMPT, "-n", "20", "--split", "3,3")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.decode() == expected
