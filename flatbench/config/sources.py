"""The one table of what tasks and studies take from the hub: data sets and models, as they were checked.

Nothing of it was opened on the hub itself: it is what stored copies of the repositories, their logs and the
published files say. Numbers of rows are those of the published files. `flatbench doctor STUDY` compares the
table with what is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: the branch on which the hub keeps a copy in Parquet of data sets whose main branch is a loading script
PARQUET = "refs/convert/parquet"
_CHECKED = "2026-11-28"


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        name: owner/name on the hub, or the name of published files that no hub has.
        configuration: of a repository with several.
        revision: the branch that is taken unless a study names another; None for main.
        splits: split -> rows.
        columns: what a column is for, as a study's ``columns:`` says it -> the column.
        labels: names of the classes in the order of their numbers; empty for a score or a text to generate.
        counts: training rows of each class, where they are not about the same.
        licence, gated: as its authors give it; whether its terms must be accepted on the hub first.
        megabytes: of the download, about.
        tokens: of an example's texts, as a vocabulary of 30,000 word pieces counts them: mean, and 95th
            percentile. Those of QQP, MNLI, QNLI, WNLI, SNLI, VizWiz and of prompts of images are guesses.
        checked, note: when; what is to be known.
    """

    name: str
    configuration: str | None
    splits: Mapping[str, int]
    columns: Mapping[str, str]
    labels: tuple[str, ...]
    licence: str
    megabytes: float
    tokens: tuple[float, float]
    revision: str | None = None
    gated: bool = False
    counts: tuple[int, ...] = ()
    checked: str = _CHECKED
    note: str = ""


@dataclass(frozen=True)
class Model:
    """A model.

    Attributes:
        name: owner/name on the hub.
        configuration: its model type and sizes, as its config.json has them: shapes without a download.
        megabytes: of its weights.
        safetensors: whether main has them; a pickle is never read.
        revision, licence, gated, checked, note: as of `Data`.
    """

    name: str
    configuration: Mapping[str, Any]
    licence: str
    megabytes: float
    safetensors: bool = True
    revision: str | None = None
    gated: bool = False
    checked: str = _CHECKED
    note: str = ""


GLUE = "nyu-mll/glue"
_PAIR = {"text": "sentence1", "text_pair": "sentence2", "label": "label"}
_ONE = {"text": "sentence", "label": "label"}
_SCRIPT = "main is a loading script, which datasets from version 4 on refuses"


def _glue(
    task: str,
    rows: tuple[int, ...],
    columns: Mapping[str, str],
    labels: tuple[str, ...],
    megabytes: float,
    tokens: tuple[float, float],
) -> Data:
    names: tuple[str, ...] = ("train", "validation", "test")
    if task == "mnli":
        names = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    splits = dict(zip(names, rows, strict=True))
    return Data(
        GLUE,
        task,
        splits,
        columns,
        labels,
        "as its sources'",
        megabytes,
        tokens,
        note="labels of the test splits are hidden (-1)",
    )


_NLI = ("entailment", "neutral", "contradiction")
_TWO = ("entailment", "not_entailment")
_PREMISE = {"text": "premise", "text_pair": "hypothesis", "label": "label"}
_TREC = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
_TREC_COUNTS = (86, 1250, 1162, 1223, 835, 896)

DATA = (
    _glue("cola", (8551, 1043, 1063), _ONE, ("unacceptable", "acceptable"), 0.4, (9, 18)),
    _glue("sst2", (67349, 872, 1821), _ONE, ("negative", "positive"), 3.3, (11, 31)),
    _glue("mrpc", (3668, 408, 1725), _PAIR, ("not_equivalent", "equivalent"), 1.0, (50, 71)),
    _glue("stsb", (5749, 1500, 1379), _PAIR, (), 1.1, (25, 57)),
    _glue(
        "qqp",
        (363846, 40430, 390965),
        {"text": "question1", "text_pair": "question2", "label": "label"},
        ("not_duplicate", "duplicate"),
        51,
        (27, 51),
    ),
    _glue("mnli", (392702, 9815, 9832, 9796, 9847), _PREMISE, _NLI, 57, (36, 68)),
    _glue(
        "qnli",
        (104743, 5463, 5463),
        {"text": "question", "text_pair": "sentence", "label": "label"},
        _TWO,
        18,
        (47, 86),
    ),
    _glue("rte", (2490, 277, 3000), _PAIR, _TWO, 1.1, (67, 154)),
    _glue("wnli", (635, 71, 146), _PAIR, ("not_entailment", "entailment"), 0.1, (36, 68)),
    Data(
        "stanfordnlp/snli",
        None,
        {"train": 550152, "validation": 10000, "test": 10000},
        _PREMISE,
        _NLI,
        "CC BY-SA 4.0",
        20,
        (25, 42),
        note="label -1 where annotators did not agree; those rows are left out",
    ),
    Data(
        "SetFit/sst5",
        None,
        {"train": 8544, "validation": 1101, "test": 2210},
        {"text": "text", "label": "label"},
        ("very negative", "negative", "neutral", "positive", "very positive"),
        "not stated",
        1.3,
        (23, 44),
        counts=(1092, 2218, 1624, 2322, 1288),
    ),
    Data(
        "CogComp/trec",
        None,
        {"train": 5452, "test": 500},
        {"text": "text", "label": "coarse_label"},
        _TREC,
        "not stated",
        0.4,
        (11, 19),
        revision=PARQUET,
        counts=_TREC_COUNTS,
        note=_SCRIPT,
    ),
    Data(
        "SetFit/TREC-QC",
        None,
        {"train": 5452, "test": 500},
        {"text": "text", "label": "label_coarse_original"},
        _TREC,
        "not stated",
        1.2,
        (11, 19),
        counts=_TREC_COUNTS,
        note="the numbers of its label_coarse stand in another order than those of CogComp/trec",
    ),
    Data(
        "tuetschek/e2e_nlg",
        None,
        {"train": 42061, "validation": 4672, "test": 4693},
        {"mr": "meaning_representation", "ref": "human_reference"},
        (),
        "CC BY-SA 4.0",
        2.0,
        (59, 84),
        revision=PARQUET,
        note=_SCRIPT,
    ),
    Data(
        "openai/gsm8k",
        "main",
        {"train": 7473, "test": 1319},
        {"question": "question", "answer": "answer"},
        (),
        "MIT",
        2.7,
        (156, 265),
    ),
    Data(
        "derek-thomas/ScienceQA",
        None,
        {"train": 12726, "validation": 4241, "test": 4241},
        {name: name for name in ("question", "choices", "answer", "hint", "image")},
        (),
        "CC BY-NC-SA 4.0",
        630,
        (56, 187),
        note="6,218, 2,097 and 2,017 of its questions have an image",
    ),
)

#: published files that are read from a folder alone: what is known of them before they are there
FILES = {
    "vizwiz": Data(
        "vizwiz",
        None,
        {"train": 20523, "validation": 4319},
        {"question": "question", "answers": "answers", "image": "image"},
        (),
        "CC BY 4.0",
        11_000,
        (12, 20),
        note="lmms-lab/VizWiz-VQA on the hub has no train split",
    ),
    **{
        name: Data(
            name,
            None,
            dict(zip(("train", "validation", "test"), rows, strict=True)),
            {"image": "image", "label": "label"},
            tuple(f"class {i}" for i in range(classes)),
            "as its authors'",
            megabytes,
            (5, 8),
        )
        for name, rows, classes, megabytes in (
            ("eurosat", (13500, 5400, 8100), 10, 95),
            ("oxford_pets", (2944, 736, 3669), 37, 810),
            ("oxford_flowers", (4093, 1633, 2463), 102, 350),
            ("caltech101", (4128, 1649, 2465), 100, 140),
            ("dtd", (2820, 1128, 1692), 47, 640),
        )
    },
}

_CLIP_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}

MODELS = (
    Model(
        "google-t5/t5-base",
        {
            "model_type": "t5",
            "d_model": 768,
            "d_ff": 3072,
            "d_kv": 64,
            "num_heads": 12,
            "num_layers": 12,
            "vocab_size": 32128,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
        "Apache 2.0",
        892,
        note="whether main has safetensors was not seen here",
    ),
    Model(
        "FacebookAI/roberta-large",
        {
            "model_type": "roberta",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        "MIT",
        1422,
    ),
    Model(
        "openai-community/gpt2-medium",
        {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
        "MIT",
        1520,
    ),
    Model(
        "openai-community/gpt2-large",
        {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
        "MIT",
        3247,
    ),
    Model(
        "google-t5/t5-base",
        {
            "model_type": "t5",
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 3072,
            "num_layers": 12,
            "num_heads": 12,
            "vocab_size": 32128,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        "Apache-2.0",
        892,
    ),
    Model(
        "openai/clip-vit-base-patch16",
        {
            "model_type": "clip",
            "projection_dim": 512,
            "text_config": {"model_type": "clip_text_model", **_CLIP_TEXT, "num_hidden_layers": 12},
            "vision_config": {"model_type": "clip_vision_model", "patch_size": 16, "image_size": 224},
        },
        "MIT",
        599,
        safetensors=False,
        note="convert it once: flatbench convert",
    ),
    Model(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        {
            "model_type": "qwen2_5_vl",
            "text_config": {
                "model_type": "qwen2_5_vl_text",
                "hidden_size": 2048,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "intermediate_size": 11008,
                "vocab_size": 151936,
                "max_position_embeddings": 128000,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1000000.0,
                    "mrope_section": [16, 24, 24],
                },
            },
            "vision_config": {
                "model_type": "qwen2_5_vl_vision",
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 2048,
            },
            "image_token_id": 151655,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "video_token_id": 151656,
            "tie_word_embeddings": True,
        },
        "Qwen Research",
        7510,
    ),
    Model(
        "meta-llama/Llama-2-7b-hf",
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
        },
        "Llama 2 Community",
        13_477,
        gated=True,
    ),
)

_DATA = {(data.name, data.configuration): data for data in DATA}
_MODELS = {model.name: model for model in MODELS}


def data(name: str, configuration: str | None = None) -> Data | None:
    """The entry of a data set's configuration, or None."""
    return _DATA.get((name, configuration))


def model(name: str) -> Model | None:
    """The entry of a model, or None."""
    return _MODELS.get(name)
