"""Metrics of runs of an earlier version."""

from __future__ import annotations

import json

from docs.generate.metrics import METRICS
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.run.observers.renamed_metrics import RENAMED_METRICS, current_name


def test_the_table_leads_from_names_that_are_gone_to_documented_ones():
    names = {doc.name.split("/<")[0].split("/at_")[0] for doc in METRICS}
    for old, new in RENAMED_METRICS.items():
        assert old not in names
        assert new in names


def test_names_below_a_renamed_metric_are_renamed_with_it():
    assert current_name("advantage/effective_share/at_050") == "advantage/effective_fraction/at_050"
    assert current_name("policy/clipped_share_of_mine") == "policy/clipped_share_of_mine"
    assert current_name("reward/mean") == "reward/mean"


def test_a_log_of_an_earlier_version_is_read_under_present_names(directory: RunDirectory):
    values = {"policy/clipped_share": 0.25, "reward/mean": None}
    line = {"kind": "train", "step": 1, "time": 0.0, "values": values}
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.metrics.write_text(json.dumps(line) + "\n")
    (record,) = read_metrics(directory.metrics)
    assert set(record.values) == {"policy/clip_fraction", "reward/mean"}
    assert record.values["policy/clip_fraction"] == 0.25
