"""Rules files: data from anywhere, which end as rules or as one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gradwatch.book import load_rules, run_rule_tests

from ..kind import Kind, Reading

TEXT = """extends: observe
rules:
  - exploding: {ratio: 10, z: 8}
    name: exploding-encoder
    paths: "encoder.*"
    for: 3
    labels: {team: vision}
    then: [{clip_by_global_norm: {max_norm: 1.0}}, {checkpoint: {filename: "at-{step}"}}]
  - expression: "max_over(update_ratio) > 1e-2 and step > 100"
    name: updates-too-large
    severity: critical
    then: [stop]
  - dead: {for_steps: 20}
inhibits: {updates-too-large: [exploding-encoder]}
silences: [{rules: dead, paths: "head.*", until: 500}]
tests:
  - name: a spike
    series:
      - {name: grad_norm, path: encoder.0.weight, values: "0.2+0.01x30 960 nan _ 0.2x20"}
      - {name: loss, values: "1-0.01x55"}
    incidents: [{rule: exploding-encoder, step: 31}]
"""

WORDS = ["&a [*a]", "*a", "!!python/object:os.system", "{{", "[[[[", "1e999", "9" * 60, "- ", ": ", "\t", "\x1b", "\0",
         "~", "module:Class", "../../x", "'", '"', "on", "<<: ", "\n", "%", "@", "null", "-1", "[]", "{}"]  # fmt: skip


class RulesFiles(Kind):
    name = "rules-files"

    def make(self, folder: Path) -> None:
        (folder / "rules.yaml").write_text(TEXT)

    def damage(self, folder: Path, rng: np.random.Generator) -> str:
        if rng.random() < 0.3:
            return super().damage(folder, rng)
        text, said = TEXT, []
        for _ in range(int(rng.integers(1, 4))):
            word, place = WORDS[int(rng.integers(len(WORDS)))], int(rng.integers(len(text)))
            end = place + int(rng.integers(0, 12))
            text = text[:place] + word + text[end:]
            said.append(f"{word!r} for {place}:{end}")
        (folder / "rules.yaml").write_text(text)
        return ", ".join(said)

    def read(self, folder: Path) -> Reading:
        load_rules(folder / "rules.yaml")
        run_rule_tests(folder / "rules.yaml")
        # What is in a file is what is meant: another rule is no missing one.
        return Reading({"read"})
