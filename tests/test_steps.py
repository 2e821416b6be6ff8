"""``train.steps``: a training of so many optimizer steps, whatever an epoch holds."""

from __future__ import annotations

import math

import pytest

from flatbench.config.sections import TrainOptions
from tests.process_cases import trainer_of


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_training_has_the_steps_that_it_is_given(extra: int) -> None:
    """Also where an epoch ends with them, and one step before and after; the schedule ends with them too."""
    epoch = len(trainer_of("plain").sampler)
    steps = 2 * epoch + extra
    trainer = trainer_of("plain", steps=steps)
    trainer.run()
    assert trainer.step == steps
    assert trainer.epoch == math.ceil(steps / epoch)
    rates = [row["lr"] for row in trainer.history]
    assert rates == pytest.approx([1e-2 * (1 - t / steps) for t in range(steps)])


def test_the_last_epoch_begins_as_a_whole_one_would() -> None:
    """The order of the examples does not depend on where the training ends."""
    epoch = len(trainer_of("plain").sampler)
    short, long = (
        trainer_of("plain", steps=epoch + 1, schedule="constant"),
        trainer_of("plain", steps=2 * epoch, schedule="constant"),
    )
    short.run()
    long.run()
    losses = [[row["loss"] for row in trainer.history] for trainer in (short, long)]
    assert losses[0] == losses[1][: epoch + 1]


def test_a_state_saved_at_the_end_of_a_short_epoch_is_finished() -> None:
    steps = len(trainer_of("plain").sampler) + 1
    trainer = trainer_of("plain", steps=steps)
    saved = []
    trainer.run(after_epoch=lambda t: saved.append(t.state_dict()))
    again = trainer_of("plain", steps=steps)
    again.load_state_dict(saved[-1])
    again.run()
    assert again.step == steps
    assert again.history == trainer.history


def test_a_study_without_steps_is_written_down_as_before() -> None:
    assert "steps" not in TrainOptions(epochs=2).model_dump(mode="json")
    assert TrainOptions(steps=7).model_dump(mode="json")["steps"] == 7
