"""Text generation: real files, which tokens the loss counts, padding, generated texts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from flatbench.errors import InputError
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.generation import data as generation_data
from flatbench.tasks.generation.causal_lm import IGNORED, CausalLM, Generation
from flatbench.training.trainer import fixed_batches
from tests.tasks.task_cases import decoder_folder, gpt2_folder, real, write_gsm8k

CPU = torch.device("cpu")
ARCHITECTURES = ["gpt2", "qwen2", "t5"]
RAGGED = range(0, 28, 4)  # examples of different lengths


@pytest.fixture(scope="module", params=ARCHITECTURES)
def language_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("lm") / request.param, request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("lm") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gsm8k(tmp_path_factory.mktemp("gsm8k"))


def make(folder: Path, data: Path, **options: Any) -> CausalLM:
    standard = {"max_length": 64, "validation_examples": 10, "generation": Generation(max_new_tokens=6)}
    return CausalLM(
        model=PretrainedModel(name_or_path=str(folder)),
        **{"dataset": "gsm8k", "data": str(data), **standard, **options},
    )


# -- real files -------------------------------------------------------------------------------------------


@pytest.mark.data
def test_e2e_parses_whole() -> None:
    found = generation_data.read("e2e", str(real("e2e")), None)
    assert {name: len(pairs) for name, pairs in found.items()} == {
        "train": 42061,
        "validation": 4672,
        "test": 4693,
    }
    assert len(set(found["test"].sources)) == 630
    assert (
        found["train"].fields[0]["mr"].startswith("name[The Vaults], eatType[pub], priceRange[more than £30]")
    )
    assert found["train"].references[0].endswith("5 star rating.  Prices start at £30.")
    meanings = [set(pairs.sources) for pairs in found.values()]
    assert not meanings[0] & meanings[2]
    assert not meanings[1] & meanings[2]


@pytest.mark.data
def test_gsm8k_parses_whole() -> None:
    found = generation_data.read("gsm8k", str(real("gsm8k")), None)
    assert {name: len(pairs) for name, pairs in found.items()} == {"train": 7473, "test": 1319}
    assert found["train"].fields[0]["question"].startswith("Natalia sold clips to 48 of her friends")


@pytest.mark.data
@pytest.mark.parametrize("dataset", ["e2e", "gsm8k"])
@pytest.mark.slow
def test_a_small_gpt2_trains_on_the_real_files(tmp_path: Path, dataset: str) -> None:
    """The loss falls from that of a uniform guess over 257 bytes."""
    folder = gpt2_folder(tmp_path / "gpt2", GPT2LMHeadModel, n_embd=32, n_positions=512)
    task = make(
        folder,
        real(dataset),
        dataset=dataset,
        max_length=512,
        train_examples=64,
        test_examples=5,
        generation=None,
    )
    assert task.describe()["sources"] | {"train": 0} == {"train": 0, "validation": 10, "test": 5}
    splits, model = task.splits(0), task.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = task.evaluate(model, fixed_batches(task, splits.validation, 16, CPU))["loss"]
    for batch in fixed_batches(task, splits.train, 16, CPU):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    after = task.evaluate(model, fixed_batches(task, splits.validation, 16, CPU))["loss"]
    assert before == pytest.approx(5.55, abs=0.1)
    assert after < before - 0.5


# -- what the loss counts ---------------------------------------------------------------------------------


def plain_loss(model: nn.Module, task: CausalLM, pair: int) -> tuple[float, int]:
    """Sum over the reference's tokens of -log p, one text at a time, without labels; and their number."""
    pairs, tokenizer = task.parts["train"], task._tokenizer
    prompt = tokenizer(task.prompt.format(**pairs.fields[pair]))["input_ids"]
    if task._two_sided:
        target = [*tokenizer(pairs.references[pair])["input_ids"], tokenizer.eos_token_id]
        decoder = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
    else:
        target = [*tokenizer(" " + pairs.references[pair])["input_ids"], tokenizer.eos_token_id]
        whole = torch.tensor([[*prompt, *target]])
        logits = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
    chosen = logits.double().log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]
    return -float(chosen.sum()), len(target)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_the_references_tokens(language_model: Path, data: Path, side: str) -> None:
    """Whatever the padding, the mean is over reference and end mark alone."""
    task = make(language_model, data, padding_side=side)
    model = task.build_model(0).eval()
    train = task.splits(0).train
    batch = task.collate([train[i] for i in RAGGED])
    assert len({len(train[i]["input_ids"]) for i in RAGGED}) > 1  # so there is padding
    with torch.no_grad():
        sums = [plain_loss(model, task, i) for i in RAGGED]
        expected = sum(s for s, _ in sums) / sum(n for _, n in sums)
        assert float(task.loss(model, batch)) == pytest.approx(expected, rel=1e-5)
    assert task.terms(batch) == sum(n for _, n in sums)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_tokens_do_not_matter(language_model: Path, data: Path, side: str) -> None:
    task = make(language_model, data, padding_side=side)
    model = task.build_model(0).eval()
    train = task.splits(0).train
    batch = task.collate([train[i] for i in RAGGED])
    changed = dict(batch)
    changed["input_ids"] = torch.where(batch["attention_mask"] == 0, 5, batch["input_ids"])
    assert not torch.equal(changed["input_ids"], batch["input_ids"])
    with torch.no_grad():
        assert torch.equal(task.loss(model, batch), task.loss(model, changed))


@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_is_learned_from_prompt_or_padding(language_model: Path, data: Path, side: str) -> None:
    """The loss has a gradient at the logits that predict the reference and none elsewhere.

    So what prompt and padding tokens are, as labels, cannot change it.
    """
    task = make(language_model, data, padding_side=side)
    model = task.build_model(0).eval()
    train = task.splits(0).train
    batch = task.collate([train[i] for i in RAGGED])
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, given, found: seen.append(found))
    loss = task.loss(model, batch)
    [gradient] = torch.autograd.grad(loss, seen)
    learned = gradient.abs().sum(-1) > 0
    counts = batch["labels"] != IGNORED
    # a decoder's logits stand one place before the token that they predict
    expected = counts if task._two_sided else torch.nn.functional.pad(counts[:, 1:], (0, 1))
    assert expected.any()
    assert torch.equal(learned, expected)


def test_labels_are_the_reference_and_nothing_else(language_model: Path, data: Path) -> None:
    task = make(language_model, data)
    train, pairs = task.splits(0).train, task.parts["train"]
    for i in range(len(train)):
        kept = [label for label in train[i]["labels"] if label != IGNORED]
        assert kept[-1] == task._tokenizer.eos_token_id
        assert task._tokenizer.decode(kept[:-1]).strip() == pairs.references[i]
    labels = task.collate([train[i] for i in range(5)])["labels"]
    assert int((labels != IGNORED).sum()) == sum(
        label != IGNORED for i in range(5) for label in train[i]["labels"]
    )


def test_batch_size_changes_no_metric(language_model: Path, data: Path) -> None:
    """Losses and generated texts alike, by beam search, with prompts of different lengths."""
    task = make(language_model, data, generation=Generation(beams=3, max_new_tokens=6))
    model = task.build_model(0)
    test = task.splits(0).test
    one, many = (
        task.evaluate(model, fixed_batches(task, test, size, CPU)) | task.test_metrics(model, test, size)
        for size in (1, 12)
    )
    assert many == pytest.approx(one, rel=1e-5)
    prompts = [prompt for prompt, _ in test.prompts]
    assert len({len(prompt) for prompt in prompts}) > 1
    assert task.generate(model, prompts, 1) == task.generate(model, prompts, 12)
    assert not any(text.startswith("Question") for text in task.generate(model, prompts, 12))


def test_token_accuracy(gpt2: Path, data: Path) -> None:
    task = make(gpt2, data)
    logits = torch.eye(4)[torch.tensor([[0, 1, 2, 0]])]
    assert task.metrics(logits, torch.tensor([[2, 0, 3, IGNORED]])) == {"token_accuracy": 0.5}


def test_truncation_is_counted(gpt2: Path, data: Path) -> None:
    whole, cut = make(gpt2, data), make(gpt2, data, max_length=38)
    assert whole.describe()["truncated"] == {"train": 0, "validation": 0, "test": 0}
    lengths = [len(example["input_ids"]) for example in whole.splits(0).train]
    assert cut.describe()["truncated"]["train"] == sum(length > 38 for length in lengths) > 0
    assert max(len(example["input_ids"]) for example in cut.splits(0).train) == 38


def test_tuning_chooses_by_likelihood(gpt2: Path, data: Path) -> None:
    assert make(gpt2, data).tuning_metric == "log_likelihood"
    assert make(gpt2, data).metric == "exact_match"
    assert make(gpt2, data, generation=None).metric == "log_likelihood"


# -- splits and bad input ---------------------------------------------------------------------------------


def write_e2e(folder: Path) -> Path:
    folder.mkdir()
    for name, start in (("trainset", 0), ("devset", 100), ("testset_w_refs", 200)):
        rows = [f'"name[{start + i // 3}], food[a, b]","text {start + i} ""q"""' for i in range(30)]
        content = "mr,ref\r\n" + "\r\n".join(rows) + "\r\n"
        (folder / f"{name}.csv.gz").write_bytes(gzip.compress(content.encode()))
    return folder


def test_a_meaning_keeps_all_of_its_references(gpt2: Path, tmp_path: Path) -> None:
    task = make(gpt2, write_e2e(tmp_path / "e2e"), dataset="e2e", train_examples=7, validation_examples=4,
                test_examples=5, generation=None)  # fmt: skip
    splits = task.splits(0)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [7, 12, 15]
    assert all(len(references) == 3 for _, references in splits.test.prompts)
    assert '"q"' in splits.test.prompts[0][1][0]


def test_validation_is_held_out_of_gsm8k(gpt2: Path, data: Path) -> None:
    parts = make(gpt2, data).parts
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [30, 10, 12]
    assert not set(parts["train"].sources) & set(parts["validation"].sources)
    fewer = make(gpt2, data, train_examples=5).parts
    assert fewer["validation"] == parts["validation"]
    assert make(gpt2, data, split_seed=1).parts["validation"] != parts["validation"]


def test_references_without_a_number_are_refused_where_numbers_are_compared(
    gpt2: Path, tmp_path: Path
) -> None:
    folder = write_gsm8k(tmp_path)
    path = folder / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["answer"] = "#### eleven"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="1 of 12 references of test have none, the first is '#### eleven'"):
        _ = make(gpt2, folder).parts
    generation = Generation(metrics=["bleu"])
    assert len(make(gpt2, folder, generation=generation).parts["test"]) == 12  # compared as texts


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: Any, revision: Any, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({"question": ["1?"], "answer": ["#### 1"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = generation_data.read("gsm8k", None, "r1")
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert found["test"].references == ("#### 1",)


def refused(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_offline(gpt2: Path) -> None:
    message = refused(lambda: CausalLM(
        model=PretrainedModel(name_or_path=str(gpt2)), dataset="gsm8k", max_length=64
    ).fingerprint())  # fmt: skip
    assert "data: openai/gsm8k: neither a local folder nor to be had from the hub" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "{query}"}, "prompt: '{query}': unknown field {query}; fields: question"),
        ({"prompt": "Answer:"}, "no field, so every prompt is the same"),
        ({"prompt": "{question"}, "prompt: '{question'"),
        ({"data_": "/nowhere/at/all"}, "data: no such folder"),
        ({"train_examples": 31}, "train_examples: 31 asked for, but only 30"),
        ({"validation_examples": 41}, "validation_examples: 41 asked for, but only 40"),
        ({"validation_examples": 40}, "train_examples: nothing is left"),
        ({"test_examples": 13}, "test_examples: 13 asked for, but only 12"),
        ({"max_length": 20}, "leaves no room for its reference within 20"),
        ({"max_length": 129}, "max_length: 129 is more than the model's 128"),
    ],
)
def test_bad_options(gpt2: Path, data: Path, options: dict[str, Any], said: str) -> None:
    data = Path(options.get("data_", data))
    assert said in refused(
        lambda: make(gpt2, data, **{k: v for k, v in options.items() if k != "data_"}).fingerprint()
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "1?"}', "test.jsonl, line 1: no column 'answer'; it has question"),
        ('{"question": "1?", "answer": " "}', "test.jsonl, line 1: 'answer' is empty"),
        ("{", "test.jsonl, line 1: not JSON"),
        ("[1]", "test.jsonl, line 1: expected an object"),
        ("", "test.jsonl: no rows"),
    ],
)
def test_bad_files(gpt2: Path, tmp_path: Path, content: str, said: str) -> None:
    data = write_gsm8k(tmp_path / "data")
    (data / "test.jsonl").write_text(content)
    assert said in refused(lambda: make(gpt2, data).fingerprint())


def test_a_file_that_is_cut_short(gpt2: Path, tmp_path: Path) -> None:
    data = write_e2e(tmp_path / "e2e")
    path = data / "devset.csv.gz"
    path.write_bytes(path.read_bytes()[:40])
    assert "devset.csv.gz: cannot be read" in refused(
        lambda: make(gpt2, data, dataset="e2e", generation=None).fingerprint()
    )
    path.unlink()
    assert "data: no devset.csv (or the same with .gz)" in refused(
        lambda: make(gpt2, data, dataset="e2e", generation=None).fingerprint()
    )


def test_gradient_checkpointing_and_half_precision_bases(gpt2: Path, data: Path) -> None:
    """The same gradient with less memory; a bfloat16 base on request."""

    def gradient(**model: Any) -> Tensor:
        task = CausalLM(
            model=PretrainedModel(name_or_path=str(gpt2), **model),
            dataset="gsm8k",
            data=str(data),
            max_length=64,
            validation_examples=10,
        )
        built = task.build_model(0)
        for module in built.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        built.train()
        train = task.splits(0).train
        task.loss(built, task.collate([train[i] for i in range(4)])).backward()
        found = built.transformer.h[0].attn.c_attn.weight.grad
        assert found is not None
        return found

    plain = gradient()
    torch.testing.assert_close(gradient(gradient_checkpointing=True), plain)
    half = gradient(dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain, rtol=0.2, atol=0.02)


# -- as in the LoRA paper's code --------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_label_smoothing_in_training_alone(language_model: Path, data: Path, side: str) -> None:
    """(1-ε)·nll + ε·mean over the vocabulary of -log p, token by token; evaluated without it."""
    task = make(language_model, data, padding_side=side, label_smoothing=0.1)
    model = task.build_model(0).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # T5's attention keeps its own
            module.dropout = 0.0
    train = task.splits(0).train
    batch = task.collate([train[i] for i in RAGGED])
    with torch.no_grad():
        logits = model.train()(**batch).logits
        labels = batch["labels"]
        if not task._two_sided:
            logits, labels = logits[:, :-1], labels[:, 1:]
        terms = []
        for row, marks in zip(logits, labels, strict=True):
            for place, label in zip(row, marks, strict=True):
                if int(label) != -100:
                    logp = place.double().log_softmax(-1)
                    terms.append(-0.9 * float(logp[label]) - 0.1 * float(logp.mean()))
        assert float(task.loss(model, batch)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        plain = make(language_model, data, padding_side=side)
        assert float(task.loss(model.eval(), batch)) == float(plain.loss(model, batch))
        assert len(terms) == task.terms(batch)


def test_e2es_meanings_in_a_line(gpt2: Path, tmp_path: Path) -> None:
    options = {"dataset": "e2e", "prompt": "{linearised}||", "validation_examples": None}
    task = make(gpt2, write_e2e(tmp_path / "e2e"), **options)
    meaning = "name[The Eagle], eatType[pub], priceRange[cheap], familyFriendly[yes], customer rating[low]"
    expected = "name : The Eagle | Type : pub | price : cheap | family friendly : yes | customer rating : low"
    assert task.published.values({"mr": meaning})["linearised"] == expected
    for rows in task.parts.values():
        for fields in rows.fields:
            assert "[" not in task.published.values(fields)["linearised"]
    with pytest.raises(InputError, match=r"no list of attribute\[value\]"):
        generation_data.linearised({"mr": "The Eagle is a pub"})
    with pytest.raises(InputError, match=r"unknown field \{linearised\}; fields: question"):
        make(gpt2, tmp_path / "e2e", prompt="{linearised}")


@pytest.mark.data
def test_every_meaning_of_e2e_is_linearised() -> None:
    found = generation_data.read("e2e", str(real("e2e")), None)
    meanings = {fields["mr"] for pairs in found.values() for fields in pairs.fields}
    lines = {generation_data.linearised({"mr": meaning}) for meaning in meanings}
    assert len(lines) == len(meanings)
    names = {part.partition(" : ")[0] for line in lines for part in line.split(" | ")}
    assert names == {
        "name",
        "Type",
        "food",
        "price",
        "customer rating",
        "area",
        "family friendly",
        "near",
    }
