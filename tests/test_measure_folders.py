"""`flatbench measure` on folders that others trained: a table, or one line that says what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, BitsAndBytesConfig, GPT2LMHeadModel

from flatbench.curvature.eigenpairs import room
from flatbench.curvature.eigenpairs.rows_elsewhere import FileStore
from flatbench.errors import InputError
from flatbench.notebook.many import grouped, measure_folders, places
from flatbench.notebook.tables import read_data
from flatbench.report import watched
from flatbench.subject.objective import rows
from tests.hub_cases import Hub, connect, hub  # noqa: F401 - a fixture
from tests.tasks.task_cases import bert_folder, gpt2_folder
from tests.test_cli import invoke

QUICK = "{name: critical_sharpness, passes: 8}"
VALUE = "critical_sharpness_merged.critical_sharpness"


def adapter_in(
    folder: Path, base: Path, seed: int = 1, kind: Any = BertForSequenceClassification, **options: Any
) -> Path:
    """An adapter with a B that is not zero, saved as peft does it."""
    torch.manual_seed(seed)
    model = kind.from_pretrained(base)
    names = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **{**names, **options}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, adapters and data, which the tests only read."""
    folder = tmp_path_factory.mktemp("made")
    with torch.random.fork_rng():
        base = bert_folder(folder / "base", BertForSequenceClassification, num_labels=2)
        adapter_in(folder / "adapter", base)
        adapter_in(folder / "another", base, seed=2)
        other = bert_folder(folder / "wider", BertForSequenceClassification, num_labels=2, hidden_size=24)
        adapter_in(folder / "of-wider", other)
        for step in range(1, 6):
            adapter_in(folder / "trained" / f"checkpoint-{step * 10}", base, seed=step)
        shutil.copytree(folder / "trained", folder / "ended")
        shutil.copytree(folder / "adapter", folder / "ended", dirs_exist_ok=True)
    texts = ["good film", "bad film", "a good one", "so bad", "fine", "no good", "well done", "dull"] * 4
    frame = pd.DataFrame({"sentence": texts, "label": [i % 2 for i in range(len(texts))], "note": "x"})
    frame.to_csv(folder / "data.csv", index=False)
    return folder


def measured(made: Path, *arguments: str, measure: str = QUICK) -> tuple[int, str]:
    return invoke("measure", *arguments, "--data", str(made / "data.csv"), "--measure", measure)


COLUMNS = ("--text-columns", "sentence", "--label-column", "label")


@pytest.mark.slow
def test_an_adapter_and_a_merged_model(made: Path, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained(made / "base"), made / "adapter"
    )
    merged = tmp_path / "merged"
    model.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(made / "base").save_pretrained(merged)
    code, text = measured(made, str(made / "adapter"), *COLUMNS, "--output", str(tmp_path / "out"))
    assert code == 0, text
    assert VALUE in text
    table = pd.read_csv(tmp_path / "out/sharpness.csv")
    assert table["checkpoint"].tolist() == ["adapter"]
    assert table["critical_sharpness_merged.upper_bound"].notna().all()
    assert (tmp_path / "out/sharpness.md").read_text().startswith("| checkpoint")
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "out/sharpness.parquet"), table, check_dtype=False
    )
    # the loss of the merged model is the adapter's: the same function
    data = {"data": read_data(str(made / "data.csv"), "--data")}
    whole = measure_folders([merged], data, [QUICK], text_columns=["sentence"]).table
    assert whole["critical_sharpness_all.loss"][0] == pytest.approx(
        table["critical_sharpness_merged.loss"][0]
    )


@pytest.mark.slow
def test_a_trainers_output_has_a_row_a_checkpoint_and_a_figure(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = measured(made, str(made / "trained"), *COLUMNS, "--output", str(out))
    assert code == 0, text
    table = pd.read_parquet(out / "sharpness.parquet")
    assert table["step"].tolist() == [10, 20, 30, 40, 50]
    assert table["checkpoint"].tolist() == [f"checkpoint-{step}" for step in (10, 20, 30, 40, 50)]
    assert {path.name for path in out.iterdir()} >= {"sharpness.png", "sharpness.svg", "sharpness.md"}
    found = places([made / "ended"])
    assert [(place.name, place.step) for place in found][-2:] == [("checkpoint-50", 50), ("end", None)]
    assert [place.name for place in places([made / "ended", made / "adapter"])][-2:] == [
        "ended/end",
        "adapter",
    ]


def test_a_checkpoint_that_is_damaged_leaves_its_reason(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    for step in (10, 20, 30):
        shutil.copytree(made / "trained" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    weights = folder / "checkpoint-20/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    code, text = measured(made, str(folder), *COLUMNS)
    assert code == 0, text
    assert "truncated" in text
    assert text.count("checkpoint-") >= 3


@pytest.mark.parametrize("layout", ["axolotl", "llama-factory"])
def test_other_tools_folders(layout: str, tmp_path: Path) -> None:
    """What stands around the adapter there: a copy of the base's config, tokenizers, logs, pickles."""
    base = gpt2_folder(tmp_path / "base", GPT2LMHeadModel)
    options = {"kind": GPT2LMHeadModel, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    folder = tmp_path / "out"
    adapter_in(folder / "checkpoint-5", base, seed=1, **options)
    adapter_in(folder, base, seed=2, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (base / name).is_file():
            shutil.copy(base / name, folder / name)
    for place in (folder, folder / "checkpoint-5"):
        (place / "README.md").write_text("---\nlibrary_name: peft\n---\n")
        (place / "training_args.bin").write_bytes(b"a pickle that nobody opens")
    (folder / "trainer_state.json").write_text("{}")
    if layout == "axolotl":
        shutil.copy(base / "config.json", folder / "config.json")
        (folder / "debug.log").write_text("")
        (folder / "runs").mkdir()
    else:
        for name in ("all_results.json", "train_results.json", "trainer_log.jsonl"):
            (folder / name).write_text("{}")
        (folder / "checkpoint-5/rng_state.pth").write_bytes(b"")
        (folder / "checkpoint-5/scheduler.pt").write_bytes(b"")
    data = tmp_path / "texts.jsonl"
    lines = [{"text": text} for text in ("a good film", "bad", "not so bad", "the film is fine")]
    data.write_text("\n".join(map(json.dumps, lines)))
    code, text = invoke(
        "measure", str(folder), "--data", str(data), "--measure", QUICK, "--output", str(tmp_path / "table")
    )
    assert code == 0, text
    table = pd.read_csv(tmp_path / "table/sharpness.csv")
    assert table["checkpoint"].tolist() == ["checkpoint-5", "end"]
    assert table["critical_sharpness_merged.loss"].notna().all()
    assert table["base"].nunique() == 1


@pytest.mark.slow
def test_two_adapters_end_with_differences(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pair = (str(made / "adapter"), str(made / "another"))
    code, text = measured(
        made, *pair, *COLUMNS, "--output", str(out), measure="{name: sam_sharpness, steps: 1}"
    )
    assert code == 0, text
    assert "first less second" in text
    found = pd.read_csv(out / "differences.csv").iloc[0]
    assert found["measure"] == "sam_sharpness_merged.sharpness"
    assert found["groups"] == 8
    assert found["low"] <= found["difference"] <= found["high"]
    # of the values that the table shows, not of their means over groups
    shown = pd.read_parquet(*out.glob("*.parquet"))["sam_sharpness_merged.sharpness"]
    assert found["difference"] == pytest.approx(shown[0] - shown[1], rel=1e-9)
    # of one with itself there is none
    data = {"data": read_data(str(made / "data.csv"), "--data")}
    options = {"wanted": ["{name: sam_sharpness, steps: 1}"], "text_columns": ["sentence"]}
    same = measure_folders([Path(pair[0])] * 2, data, **options).differences.iloc[0]
    assert (same["difference"], same["low"], same["high"]) == (0.0, 0.0, 0.0)
    assert same["tells"] == "no difference"


@pytest.mark.slow
def test_two_folders_with_different_bases(made: Path) -> None:
    pair = (str(made / "adapter"), str(made / "of-wider"))
    code, text = measured(made, *pair, *COLUMNS, measure="{name: sam_sharpness, steps: 1}")
    assert code == 0, text
    assert "different base models" in text
    assert "first less second" in text


def test_relative_to_other_data_and_to_the_base(made: Path) -> None:
    for against, name in (("other", "--other"), ("base", "")):
        more = (name, str(made / "data.csv")) if name else ()
        measure = f"{{name: relative_critical_sharpness, against: {against}}}"
        code, text = measured(made, str(made / "adapter"), *COLUMNS, *more, measure=measure)
        assert code == 0, text
        assert "relative_critical_sharpness_merged" in text


def test_an_adapter_that_names_neither_task_nor_base(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(made / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"task_type": None, "base_model_name_or_path": None, "auto_mapping": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    code, text = measured(made, str(folder), *COLUMNS)
    assert code == 2
    assert "names no base model" in text
    code, text = measured(made, str(folder), *COLUMNS, "--base", str(made / "base"), "--task", "SEQ_CLS")
    assert code == 0, text
    code, text = measured(made, str(folder), *COLUMNS, "--base", str(made / "base"), "--task", "SEQ_CLASS")
    assert code == 2
    assert "did you mean 'SEQ_CLS'" in text


def test_a_quantised_base_is_measured_in_the_space_of_the_adapter(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = bert_folder(tmp_path / "base", BertForSequenceClassification, num_labels=2, hidden_size=64)
    adapter_in(tmp_path / "adapter", base)
    how = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier"])
    quantised = BertForSequenceClassification.from_pretrained(base, quantization_config=how)
    quantised.save_pretrained(tmp_path / "quantised")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "quantised")
    code, text = measured(made, str(tmp_path / "adapter"), *COLUMNS, "--base", str(tmp_path / "quantised"))
    assert code == 0, text
    assert "critical_sharpness_adapter" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("EMPTY", *COLUMNS), "no checkpoint here"),
        (("MISSING", *COLUMNS), "no such folder"),
        (("ADAPTER", "--label-column", "labl"), "label_column"),
        (("ADAPTER", *COLUMNS, "--measure", "hesian"), "did you mean 'hessian'"),
        (("ADAPTER", *COLUMNS, "--base", "EMPTY"), "base model"),
    ],
)
def test_one_line_says_what_is_wrong(
    made: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": tmp_path / "empty", "MISSING": tmp_path / "missing", "ADAPTER": made / "adapter"}
    given = [str(names.get(a, a)) for a in arguments]
    code, text = invoke("measure", *given, "--data", str(made / "data.csv"))
    assert code == 2
    (line,) = [one for one in text.splitlines() if one.startswith("error: ")]
    assert message in line


def test_options_of_checkpoints_are_none_of_runs(made: Path, tmp_path: Path) -> None:
    code, text = invoke("measure", str(made / "adapter"))
    assert code == 2
    assert "--data" in text
    code, text = invoke("measure", str(made / "adapter"), "--base", "x")
    assert (code, "with --data" in text) == (2, True)
    (tmp_path / "run.json").write_text("{}")
    code, text = measured(made, str(tmp_path))
    assert (code, "brings its own data" in text) == (2, True)


def test_files_of_data(tmp_path: Path) -> None:
    rows_ = [{"text": "1", "label": 0}, {"text": "2", "label": 1}]
    frame = pd.DataFrame(rows_)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows_))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows_)))
    for ending in ("csv", "tsv", "parquet", "json", "jsonl"):
        assert read_data(str(tmp_path / f"a.{ending}"), "--data") == rows_
    nested = pd.DataFrame({"pixel_values": [[[[0.5, 1.0], [0.0, 2.0]]]] * 2, "labels": [0, 1]})
    nested.to_parquet(tmp_path / "images.parquet")
    assert torch.tensor(read_data(str(tmp_path / "images.parquet"), "--data")[0]["pixel_values"]).shape == (
        1,
        2,
        2,
    )
    (tmp_path / "b.json").write_text('{"a": 1}')
    for name, message in (
        ("b.json", "a list of objects"),
        ("c.csv", "no such file"),
        ("a:b:c:d", "expected NAME"),
    ):
        with pytest.raises(InputError, match=message):
            read_data(name if ":" in name else str(tmp_path / name), "--data")


@pytest.mark.parametrize(("sizes", "groups"), [((32, 32, 7), 8), ((5, 4), 2), ((3,), 1)])
def test_groups_hold_every_example_once(sizes: tuple[int, ...], groups: int) -> None:
    batches, start = [], 0
    for size in sizes:
        batches.append({"labels": torch.arange(start, start + size)})
        start += size
    found = grouped(batches)
    assert len(found) == groups
    assert torch.cat([b["labels"] for group in found for b in group]).tolist() == list(range(start))
    counts = [sum(map(rows, group)) for group in found]
    assert max(counts) - min(counts) <= 1


def test_a_watched_training_is_reported(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "step": [10, 20, 30],
            "a.critical_sharpness": [3.0, None, 4.5],
            "a.lower_bound": [2.9, None, 4.4],
            "a.upper_bound": [3.1, None, None],
            "a.left_out": [None, "budget", None],
            "b.sharpness": [0.1, 0.2, 0.3],
            "b.sampling_error": [0.01, 0.0, None],
            "train_seconds": [1.0, 2.0, 3.0],
            "measure_seconds": [0.1, 0.1, 0.2],
        }
    )
    (tmp_path / "trained").mkdir()
    table.to_parquet(tmp_path / "trained/sharpness.parquet", index=False)
    code, text = invoke("report", str(tmp_path / "trained"), "--output", str(tmp_path / "reports"))
    assert code == 0, text
    assert "budget" in text
    made = {path.name for path in (tmp_path / "reports/trained").iterdir()}
    assert {"sharpness.png", "sharpness.pdf", "sharpness.csv", "sharpness.md", "sharpness.parquet"} <= made
    assert watched.shown(table)["a.critical_sharpness"].tolist() == ["3", "budget", "4.5"]
    assert not watched.is_watched(tmp_path)


def test_data_from_the_hub(made: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    connect(hub, monkeypatch)
    found = read_data("nyu-mll/glue:rte:validation", "--data")
    assert hub.asked[-1][1:] == ("rte", None, "validation")
    data = {"data": found.select(range(8))}
    options = {"text_columns": ["sentence1", "sentence2"], "label_column": "label"}
    table = measure_folders([made / "adapter"], data, ["{name: sam_sharpness, steps: 1}"], **options).table
    assert table["sam_sharpness_merged.examples"].tolist() == [8]
    with pytest.raises(InputError, match="to be had from the hub"):
        read_data("nobody/nothing:test", "--data")


@pytest.mark.slow
def test_vectors_that_memory_does_not_hold_are_in_a_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: list[Path] = []

    class Watched(FileStore):
        def __init__(self, folder: Path, *given: Any) -> None:
            stores.append(folder)
            super().__init__(folder, *given)

    def eigenvalue(name: str, *options: str) -> float:
        code, text = measured(
            made, str(made / "adapter"), *COLUMNS, "--output", str(tmp_path / name), *options,
            measure="{name: hessian, products: exact}",
        )  # fmt: skip
        assert code == 0, text
        (table,) = (tmp_path / name).glob("*.parquet")
        return float(pd.read_parquet(table)["hessian_merged.eigenvalue_1"].iloc[0])

    plain = eigenvalue("plain")
    monkeypatch.setattr(room, "FileStore", Watched)
    monkeypatch.setattr(room, "_COMFORTABLE", 1000)  # more than a megabyte holds here
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert eigenvalue("far", "--memory", "1MB", "--scratch", str(scratch)) == pytest.approx(plain, rel=1e-3)
    assert stores
    assert set(stores) == {scratch}
    assert list(scratch.iterdir()) == []
    code, text = measured(
        made, str(made / "adapter"), *COLUMNS, "--memory", "1MB", "--scratch", "none", measure="hessian"
    )
    assert (code, "scratch: none is no folder" in text) == (2, True), text
