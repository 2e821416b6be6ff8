"""Run directories and the table over them: the only code that knows how results lie on disk.

::

    RESULTS/STUDY/
      study.json              what the study was resolved to, its runs, budget and selections
      runs/ID/
        run.json              the resolved configuration whose hash is ID, and the labels of the run
        environment.json      versions, git commit, device, threads
        claim-N.json          while a process works on the run: which
        events.jsonl          a line whenever something happened to the run
        run.log               warnings, if there were any
        trackers.json         what experiment trackers were sent, if there are any
        state.safetensors     while training: what resuming needs, with a checksum; state.previous… is older
        history.parquet       a row a logging step or evaluation
        adapter/              what was trained, as peft saves it
        result.json           losses, metrics, training cost
        measures/LABEL.json   one file a measure
        done.json             written last: the measures, and a checksum of every file
        failure.json          instead of done.json: what went wrong, with the traceback
      tensorboard/ID/         event files, if that tracker is asked for

Every file is written beside its place and moved there, so that a reader sees a whole file or none.
"""

from __future__ import annotations

from flatbench.store.run_directory import FORMAT, RunDirectory, digest, run_id
from flatbench.store.study_folder import StudyFolder
from flatbench.store.tables import environments, history, history_of, slices, spectra, table

__all__ = [
    "FORMAT",
    "RunDirectory",
    "StudyFolder",
    "digest",
    "environments",
    "history",
    "history_of",
    "run_id",
    "slices",
    "spectra",
    "table",
]
