"""The demo and the command line, on the trained pocket LLaVA."""

import json

import pytest
from PIL import Image

pytest.importorskip("transformers")

import vtp_kernels as vtp
from vtp_kernels import cli, demo
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    picture = tmp_path_factory.mktemp("demo") / "kept.png"
    return demo.pocket(repeats=1, picture=picture)


def test_every_method_answers_every_question(comparison):
    assert [row.method for row in comparison.rows] == [demo.DENSE, *demo.pocket_methods()]
    assert len(comparison.prompts) == len(scenes.KINDS)
    for row in comparison.rows:
        assert len(row.answers) == len(comparison.prompts) and all(row.answers)
        assert row.correct == sum(
            a == e for a, e in zip(row.answers, comparison.expected, strict=True)
        )


def test_dense_has_every_token_and_the_methods_have_fewer(comparison):
    dense, *pruned = comparison.rows
    assert dense.visual_tokens_per_layer == [256] * 8
    assert dense.flops_reduction == 0 and dense.prefill_speedup == 1
    for row in pruned:
        assert row.visual_tokens_per_layer[-1] < 256
        assert 0 < row.flops_reduction < 1 and row.kv_bytes < dense.kv_bytes
        assert len(row.prefill_ms) == 1 and row.prefill_speedup > 0


def test_stages_group_equal_layers(comparison):
    fastv = next(row for row in comparison.rows if row.method == "FastV")
    assert fastv.stages() == "256 x2, 128 x6"


def test_picture_has_a_row_a_method(comparison):
    drawn = Image.open(comparison.picture)
    assert drawn.height % len(demo.pocket_methods()) == 0 and drawn.width > 224


def test_text_and_json_say_the_same(comparison):
    text, values = str(comparison), json.loads(json.dumps(comparison.to_dict()))
    for row in values["rows"]:
        assert row["method"] in text
    assert "(truth)" in text and values["expected"] == comparison.expected


def test_flops_that_are_not_known():
    row = demo.Row("dense", ["red"], [4], None, 1)
    assert "not known" in str(demo.Comparison(["what?"], [row], None))


def test_wrong_answers_are_marked():
    row = demo.Row("dense", ["red", "blue"], [4], 0.0, 1)
    text = str(demo.Comparison(["a", "b"], [row], ["red", "green"]))
    assert "blue (wrong)" in text and "red (wrong)" not in text


def test_a_picture_of_ones_own(tmp_path):
    Image.new("RGB", (300, 200), "navy").save(tmp_path / "own.png")
    out = tmp_path / "kept.png"
    comparison = demo.pocket(tmp_path / "own.png", repeats=1, picture=out)
    assert comparison.expected is None and out.exists()


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_demo_json(capsys, tmp_path):
    out = tmp_path / "kept.png"
    code, text, _ = run(capsys, "demo", "--json", "--repeats", "1", "--out", str(out))
    values = json.loads(text)
    assert code == 0 and out.exists()
    assert {row["method"] for row in values["rows"]} >= {"dense", "FastV"}
    assert values["info"]["versions"]["torch"]


def test_run_with_a_checkpoint_and_a_method_file(capsys, tmp_path):
    vtp.FastV(layer=3, keep=32).save(tmp_path / "method.json")
    Image.fromarray(scenes.scene("test", 0).image).save(tmp_path / "picture.png")
    code, text, _ = run(
        capsys,
        "run",
        *("--model", str(TRAINED), "--image", str(tmp_path / "picture.png")),
        *("--prompt", "how many shapes", "--prompt", "where is the circle"),
        *("--method", str(tmp_path / "method.json"), "--max-new-tokens", "4"),
        *("--out", str(tmp_path / "kept.png"), "--repeats", "1", "--json"),
    )
    rows = json.loads(text)["rows"]
    assert code == 0
    assert rows[1]["visual_tokens_per_layer"] == [256] * 3 + [32] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "no.png"), "image: no such file: 'no.png'"),
        (("--method", "fastest"), "fastest"),
        (("--method", "fastv:99"), "layer"),
        (("--method", "fastv:2:1.5"), "keep"),
    ],
)
def test_run_says_what_is_wrong_in_one_line(capsys, tmp_path, arguments, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    given = {"--image": str(tmp_path / "picture.png"), "--method": "fastv", "--prompt": "how many"}
    given |= {"--model": str(TRAINED), "--out": str(tmp_path / "out.png")}
    given |= dict([arguments])
    code, _, error = run(capsys, "run", *(part for pair in given.items() for part in pair))
    lines = [line for line in error.splitlines() if line.startswith("vtp-kernels run: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "--image, --video: expected at least one of them"),
        (["--video", "none"], "video: no such file or folder: 'none'"),
    ],
)
def test_run_wants_a_picture_or_a_video(capsys, files, message):
    code, _, error = run(capsys, "run", "--model", "none", "--prompt", "what", *files)
    assert code == 2 and error.splitlines()[-1] == f"vtp-kernels run: {message}"


def test_info(capsys):
    code, text, _ = run(capsys, "info")
    assert code == 0 and "attention_scores" in text
    code, text, _ = run(capsys, "info", "--json")
    assert code == 0 and json.loads(text)
