"""A study written, run and reported from Python; `flatbench run results/my-study.yaml` goes on with it."""

import flatbench

study = {
    "name": "my-study",
    "task": {"name": "digits", "train_size": 150, "test_size": 400, "label_noise": 0.2},
    "model": {"hidden_size": 32, "layers": 2, "heads": 4, "pretrain_epochs": 10},
    "adapter": {"name": "lora", "r": 4, "alpha": 8},
    "methods": ["lora", {"name": "eflat_lora", "grid": {"lr": [1e-2], "rho": [0.05, 0.5]}}],
    "tune": {"grid": {"lr": [3e-3, 1e-2]}, "seeds": [100]},
    "train": {"epochs": 5, "threads": 1},
    "seeds": [0, 1, 2],
    "measures": ["sam_sharpness", "cost"],
}
results = flatbench.run(study, overrides={"train.batch_size": 32})
print(results.final.groupby("method")[["test", "sam_sharpness_merged.sharpness"]].agg(["mean", "std"]))
print(flatbench.report(results, "reports").notes)
