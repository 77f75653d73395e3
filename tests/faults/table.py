"""The table of docs/FAULTS.md: `python -m tests.faults.table` runs the tests that it names and writes what they say.

How often a fault is tried is the number of cases that ran; a loss is a case that failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

PAGE = ROOT / "docs" / "FAULTS.md"
HEAD = """# Faults

What was broken on purpose, what is promised then, and the test that breaks it. Written by `python -m tests.faults.table`,
which runs these tests, the slow ones too; "tried" counts cases, and examples where hypothesis makes them. `make mutants` breaks
lines of fastconv one at a time and wants each to be seen.

| fault | promise | test | tried | losses |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Fault:
    """One row: the test function in its file, how many examples one case of it makes."""

    fault: str
    promise: str
    file: str
    test: str
    n_examples: int = 1


REPLIES, MEMORY, DISK, SECRETS = (
    f"faults/test_{n}.py" for n in ("judge_replies", "memory", "disk_and_ledger", "secrets")
)
FAULTS = (
    Fault("half an emoji, zero bytes, infinite numbers in a reply", "scored, or unscored with a reason", REPLIES,
          "test_text_that_cannot_be_stored_is_read_or_is_unscored"),
    Fault("token counts below zero, beyond reason, missing", "what is booked lies between 0 and the worst case", REPLIES,
          "test_what_is_booked_lies_between_nothing_and_the_worst_case"),
    Fault("a login page, or another body that is no message", "an outage; nothing stored, judged when it is back", REPLIES,
          "test_a_body_that_is_no_message_is_an_outage_and_is_asked_again"),
    Fault("any JSON or bytes as a reply", "safe to store, or none", REPLIES, "test_any_reply_is_stored_or_is_none", 150),
    Fault("any JSON as a local judge's completion", "read, or an outage", REPLIES,
          "test_any_completion_of_a_local_judge_is_read_or_is_an_outage", 100),
    Fault("a body without end", "not read to its end", REPLIES, "test_a_body_without_end_is_not_read_to_its_end"),
    Fault("control characters in an error's text", "one plain line", REPLIES,
          "test_a_servers_words_reach_the_terminal_as_one_plain_line"),
    Fault("a ledger writer that fails in any way", "those who wait for it end", REPLIES,
          "test_a_writer_that_fails_in_any_way_fails_those_who_wait_for_it"),
    Fault("an address that would get the key", "a key goes where the user said", REPLIES,
          "test_a_key_goes_where_the_user_said"),
    Fault("redirects to another host", "not followed", REPLIES, "test_no_redirect_is_followed"),
    Fault("results of a batch on another host", "not asked for", REPLIES,
          "test_results_of_a_batch_are_fetched_from_the_judge_alone"),
    Fault("HTTP_PROXY and a judge on the loopback", "asked directly", REPLIES, "test_the_loopback_is_asked_directly"),
    Fault("a judge that asks for ten minutes", "shown, and not sat out by a run that ends", "judge/test_live.py",
          "test_a_long_wait_is_shown_and_a_desk_that_is_closed_does_not_sit_it_out"),
    Fault("20 % faults of every kind while judging live", "every judgement once, none paid twice", "judge/test_live.py",
          "test_a_storm_of_faults_leaves_every_judgement_finished", 300),
    Fault("the same in batches", "every item paid once", "judge/test_batches.py",
          "test_a_storm_of_faults_pays_every_item_once", 300),
    Fault("SIGKILL at random moments of judging", "nothing lost, nothing paid twice", "judge/test_batches.py",
          "test_kills_at_random_moments"),
    Fault("secrets in the environment", "no child process gets one", SECRETS,
          "test_a_child_gets_what_it_needs_and_no_secret"),
    Fault("no memory in a pass", "half as much at a time, the same results", MEMORY,
          "test_a_pass_that_does_not_fit_is_halved_and_gives_the_same"),
    Fault("no memory for a single row", "one line, and the stack is whole after it", MEMORY,
          "test_memory_for_less_than_a_row_is_one_line"),
    Fault("no memory in a later step of sampling", "the same completions", MEMORY,
          "test_memory_that_runs_out_while_sampling_keeps_what_is_finished", 3),
    Fault("a ledger cut short, zeroed, overwritten", "doctor says so", DISK, "test_doctor_says_that_a_ledger_is_damaged"),
    Fault("every verb over such a ledger", "a line and an exit code", DISK,
          "test_every_verb_over_a_damaged_ledger_ends_in_a_line"),
    Fault("rows in a merged workspace that no fastconv wrote", "nothing is merged", DISK,
          "test_what_no_fastconv_wrote_is_not_merged"),
    Fault("costs and judgements in it that are no numbers", "nothing is merged", DISK,
          "test_judgements_and_costs_that_are_no_numbers_are_not_merged"),
    Fault("pipes, folders and loops in place of artefacts", "gone, and nobody waits", DISK,
          "test_an_artefact_that_is_no_file_is_gone_and_nobody_waits_for_it"),
    Fault("ENOSPC, EMFILE, EIO, EDQUOT at each step of a write", "one line, nothing half", DISK,
          "test_a_fault_at_any_step_of_a_write_is_one_line_and_leaves_nothing_half"),
    Fault("a power cut between file, folder and row", "the order of syncs holds", DISK,
          "test_a_new_artefact_is_synced_with_its_folder_and_the_folder_above"),
    Fault("a reader that goes away", "exit code 141 without a word", DISK,
          "test_a_reader_that_goes_away_ends_a_verb_without_a_word"),
    Fault("a full disk behind the output", "one line", DISK, "test_output_that_cannot_be_written_is_one_line"),
    Fault("any bytes as a recipe", "refused in one line", DISK, "test_any_bytes_as_a_recipe_are_refused_in_one_line", 60),
    Fault("TOML beyond reason", "refused wherever it is read", DISK,
          "test_toml_beyond_reason_is_refused_wherever_it_is_read"),
)  # fmt: skip


def counts() -> tuple[Counter[str], Counter[str]]:
    """Run the tests of the table: cases by test, and those of them that failed."""
    ran: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.xml"
        names = sorted({f"tests/{fault.file}::{fault.test}" for fault in FAULTS})
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", f"--junitxml={record}", *names]
        subprocess.run(command, cwd=ROOT, check=False)
        for case in ElementTree.parse(record).iter("testcase"):
            name = (case.get("name") or "").partition("[")[0]
            ran[name] += 1
            failed[name] += any(part.tag in ("failure", "error") for part in case)
    return ran, failed


def main() -> int:
    """Write the page; exit code 1 if anything was lost or not tried."""
    ran, failed = counts()
    lines = [
        f"| {one.fault} | {one.promise} | `{Path(one.file).stem}::{one.test}` | {ran[one.test] * one.n_examples:,} | {failed[one.test]} |"
        for one in FAULTS
    ]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")
    return int(any(failed.values()) or not all(ran[one.test] for one in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
