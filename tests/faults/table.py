"""The table of docs/FAULTS.md: `python -m tests.faults.table [WORD ...]` runs the tests that it names and writes what they say.

With words only tests whose file or name holds one of them run, and the other rows stay as they are. How often a fault is tried
is the number of cases that ran; a loss is a case that failed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

PAGE = ROOT / "docs" / "FAULTS.md"
HEAD = """# Faults

What was broken on purpose, what is promised then, and the test that breaks it. Written by `python -m tests.faults.table`,
which runs these tests, the slow ones too; "tried" counts cases, and examples where hypothesis makes them; a command stands there
where that tier has not been run for this page. `make mutants` breaks lines of fastconv one at a time and wants each to be seen.

| fault | promise | test | tried | losses |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Fault:
    """One row: the test function in its file, how many examples one case of it makes, and the tier that it belongs to if it is
    in none of `make test`."""

    fault: str
    promise: str
    file: str
    test: str
    n_examples: int = 1
    tier: str = ""

    @property
    def name(self) -> str:
        """The test as pytest's ids begin."""
        return f"{Path(self.file).stem}::{self.test}"


REPLIES, MEMORY, DISK, SECRETS, WHOLE, INPUTS, CARD, CONTENT = (
    f"faults/test_{n}.py"
    for n in (
        "judge_replies",
        "memory",
        "disk_and_ledger",
        "secrets",
        "whole_run",
        "hostile_inputs",
        "gpu_memory",
        "odd_content",
    )
)
LIVE, BATCHES, MONEY, LOCAL, DESK = (f"judge/test_{n}.py" for n in ("live", "batches", "money", "local", "desk"))
TRAIN, SERVER, CLIENT = "engine/test_train.py", "engine/vllm/test_server.py", "engine/vllm/test_client.py"
RUN, JUDGING, SERVED = "run/test_faults.py", "run/test_judging.py", "run/test_served_run.py"
STORE, MERGE, GC, CLUSTER = "store/test_store.py", "store/test_merge.py", "run/test_gc.py", "cluster/test_cluster.py"
SERVE, ANSWERS = "serve/test_hostile.py", "serve/test_serve.py"
HUB, TABLES, TRACKERS, CHAT = (
    "engine/test_locate.py",
    "datasets/test_tables.py",
    "show/test_trackers.py",
    "test_chat.py",
)

FAULTS = (
    # what a judge sends
    Fault("half an emoji, zero bytes, infinite numbers in a reply", "scored, or unscored with a reason", REPLIES,
          "test_text_that_cannot_be_stored_is_read_or_is_unscored"),
    Fault("token counts below zero, beyond reason, missing", "what is booked lies between 0 and the worst case", REPLIES,
          "test_what_is_booked_lies_between_nothing_and_the_worst_case"),
    Fault("a login page, or another body that is no message", "an outage; nothing stored, judged when it is back", REPLIES,
          "test_a_body_that_is_no_message_is_an_outage_and_is_asked_again"),
    Fault("a login page where it is asked whether the judge is there", "no answer", REPLIES,
          "test_a_login_page_is_no_answer_to_whether_the_judge_can_be_asked"),
    Fault("any JSON or bytes as a reply", "safe to store, or none", REPLIES, "test_any_reply_is_stored_or_is_none", 150),
    Fault("any JSON as a local judge's completion", "read, or an outage", REPLIES,
          "test_any_completion_of_a_local_judge_is_read_or_is_an_outage", 100),
    Fault("no completion of a local judge", "an outage, nothing stored", LOCAL,
          "test_an_endpoint_that_sends_no_completion_is_an_outage_and_nothing_is_stored"),
    Fault("no HTTP at a local judge's port", "an outage", LOCAL, "test_an_endpoint_that_sends_no_http_is_an_outage"),
    Fault("a reply nested without end", "no message, or an empty one", LIVE,
          "test_a_reply_nested_without_end_is_no_message_or_an_empty_one"),
    Fault("a body without end", "not read to its end", REPLIES, "test_a_body_without_end_is_not_read_to_its_end"),
    Fault("a packed reply, small until it is unpacked", "not asked for, not unpacked", REPLIES,
          "test_a_packed_reply_is_not_unpacked"),
    Fault("control characters in an error's text", "one plain line", REPLIES,
          "test_a_servers_words_reach_the_terminal_as_one_plain_line"),
    Fault("control characters in what a local judge refuses", "one plain line", REPLIES,
          "test_what_a_local_judge_refuses_is_one_plain_line"),
    Fault("a ledger writer that fails in any way", "those who wait for it end", REPLIES,
          "test_a_writer_that_fails_in_any_way_fails_those_who_wait_for_it"),
    Fault("a desk that is closed", "no writer of it is left", REPLIES, "test_the_writers_tasks_end_with_the_desk"),
    Fault("numbers and text that SQLite cannot hold", "a storage error", REPLIES,
          "test_what_sqlite_cannot_hold_is_a_storage_error"),
    Fault("judged text that gives the judge orders", "its own verdict, or none", LIVE,
          "test_a_judge_that_obeys_the_judged_text_gives_no_field_but_the_rubrics"),
    Fault("judged text that spells control tokens", "the resident base reads characters", INPUTS,
          "test_a_judged_answer_gives_the_resident_base_no_orders"),
    # keys and where they go
    Fault("an address that would get the key", "a key goes where the user said", REPLIES,
          "test_a_key_goes_where_the_user_said"),
    Fault("redirects to another host", "not followed", REPLIES, "test_no_redirect_is_followed"),
    Fault("a redirect within the judge's host", "not followed", REPLIES, "test_no_redirect_is_followed_within_the_host_either"),
    Fault("results of a batch on another host", "not asked for", REPLIES,
          "test_results_of_a_batch_are_fetched_from_the_judge_alone"),
    Fault("HTTP_PROXY and a judge on the loopback", "asked directly", REPLIES, "test_the_loopback_is_asked_directly"),
    Fault("a judge without a key on another host", "may stand in the user's network", REPLIES,
          "test_a_judge_without_a_key_may_stand_in_the_users_network"),
    Fault("a plan without a key", "nothing is sent", JUDGING, "test_a_plan_without_a_key_sends_nothing"),
    Fault("a server that gives the key away", "in no output, log or byte of the workspace", JUDGING,
          "test_a_server_that_gives_the_key_away_gets_it_into_no_output"),
    Fault("a recipe that names a file with a key", "refused", SECRETS, "test_a_recipe_cannot_name_a_file_that_holds_a_key"),
    Fault("secrets in the environment", "no child process gets one", SECRETS,
          "test_a_child_gets_what_it_needs_and_no_secret"),
    Fault("a child that is started with the whole environment", "none is", SECRETS,
          "test_every_process_is_started_with_an_environment_of_its_own"),
    Fault("Ray's processes", "started without the key", SECRETS,
          "test_rays_processes_are_started_without_the_key_that_only_the_driver_uses"),
    # judging: waits, outages, money
    Fault("a judge that asks for ten minutes", "shown, and not sat out by a run that ends", LIVE,
          "test_a_long_wait_is_shown_and_a_desk_that_is_closed_does_not_sit_it_out"),
    Fault("429 and 529 with a wait", "asked again no sooner", LIVE,
          "test_a_request_is_sent_again_no_sooner_than_the_server_asks"),
    Fault("a judge that is silent while a run is planned", "not waited for", JUDGING,
          "test_a_plan_does_not_wait_for_a_judge_that_is_silent"),
    Fault("each fault of a server alone", "got over", LIVE, "test_each_fault_alone_is_got_over"),
    Fault("20 % faults of every kind while judging live", "every judgement once, none paid twice", LIVE,
          "test_a_storm_of_faults_leaves_every_judgement_finished", 300),
    Fault("the same in batches", "every item paid once", BATCHES,
          "test_a_storm_of_faults_pays_every_item_once", 300),
    Fault("the same with two thousand judgements", "every judgement once, none paid twice", LIVE,
          "test_two_thousand_judgements_through_a_storm", 2000, "slow"),
    Fault("a batch that was taken and whose answer was lost", "found again, not paid again", BATCHES,
          "test_a_batch_taken_whose_answer_was_lost_is_found_again"),
    Fault("another user's batch of the same size", "not taken for ours", BATCHES,
          "test_another_users_batch_of_the_same_size_is_not_taken_for_ours"),
    Fault("an archived batch", "booked as lost, its items asked again", BATCHES,
          "test_an_archived_batch_is_closed_as_lost_and_its_items_are_asked_again"),
    Fault("results that always break off", "no other batch waits", BATCHES,
          "test_results_that_always_break_off_keep_no_other_batch_waiting"),
    Fault("an outage in a run", "pending, and finished by `judge`", JUDGING,
          "test_an_outage_leaves_stages_pending_and_the_judge_verb_finishes_them"),
    Fault("a spent budget", "judging stops, nothing else", JUDGING, "test_a_spent_budget_stops_judging_and_nothing_else"),
    Fault("two processes and one cap", "not exceeded together", MONEY, "test_two_processes_cannot_exceed_the_cap_together"),
    Fault("SIGKILL at random moments of judging", "nothing lost, nothing paid twice", BATCHES,
          "test_kills_at_random_moments"),
    Fault("SIGKILL of a run while it judges", "at most what was in flight is paid again", JUDGING,
          "test_kill_9_while_judging_pays_at_most_the_requests_in_flight_again", 1, "slow"),
    # a whole run
    Fault("SIGKILL at random moments of a judged run", "the same bits, one bill", WHOLE,
          "test_a_judged_run_that_is_killed_anywhere_ends_with_the_same_bits_and_one_bill", 1, "slow"),
    Fault("SIGKILL in training", "the same bits", RUN,
          "test_after_kill_9_in_convergence_training_the_run_goes_on_to_the_same_bits"),
    Fault("SIGKILL before an fsync", "the same bits", RUN,
          "test_after_kill_9_in_the_middle_of_a_write_the_run_goes_on_to_the_same_bits", 1, "slow"),
    Fault("SIGKILL anywhere else", "the same bits", RUN,
          "test_after_kill_9_anywhere_else_the_run_goes_on_to_the_same_bits", 1, "slow"),
    Fault("Ctrl-C", "whole steps are kept, the same bits", RUN,
          "test_an_interrupt_keeps_whole_steps_and_the_run_goes_on_to_the_same_bits"),
    Fault("a disk that fills up in training", "one line, and the same bits after it", RUN,
          "test_a_disk_that_fills_up_during_training_is_one_line_and_loses_nothing"),
    Fault("a damaged adapter", "found before it is used", RUN, "test_a_damaged_adapter_is_found_before_it_is_used"),
    Fault("weights that are not finite", "exit code 7 and no number", RUN,
          "test_a_model_with_nan_weights_stops_with_exit_code_7_and_no_number"),
    Fault("a gradient that is not finite beside a finite loss", "never applied", TRAIN,
          "test_a_gradient_that_is_not_finite_beside_a_finite_loss_is_never_applied"),
    Fault("a clock that jumps by a year and back", "the same bits, the same order", WHOLE,
          "test_a_clock_that_jumps_by_a_year_changes_nothing", 1, "slow"),
    Fault("a lease of a host with a wrong clock", "waited for by nobody", WHOLE,
          "test_a_lease_of_another_host_with_a_wrong_clock_is_waited_for_by_nobody"),
    Fault("a clock that goes back between runs", "their order stays", WHOLE,
          "test_the_first_run_stays_the_first_when_the_clock_goes_back"),
    Fault("two recipes at once in one workspace", "both end, no stage twice", WHOLE,
          "test_two_processes_with_two_recipes_in_one_workspace_share_it", 1, "slow"),
    Fault("a run in a second thread", "the same bits", WHOLE, "test_a_run_in_another_thread_is_the_same", 1, "slow"),
    Fault("eight threads that commit", "all there, no lease left", WHOLE, "test_many_threads_of_one_process_share_a_workspace"),
    Fault("six processes that begin a workspace at once", "all have it", WHOLE,
          "test_two_processes_that_begin_a_workspace_at_once_both_have_it"),
    Fault("300 cells in one process", "memory, files, threads and time for each stay flat", WHOLE,
          "test_three_hundred_cells_need_no_more_memory_files_or_time_for_each", 1, "long"),
    # memory
    Fault("no memory in a pass", "half as much at a time, the same results", MEMORY,
          "test_a_pass_that_does_not_fit_is_halved_and_gives_the_same"),
    Fault("no memory for the probe", "read row by row, the stack whole after it", MEMORY, "test_the_probe_is_read_row_by_row"),
    Fault("no memory for a single row", "one line, and the stack is whole after it", MEMORY,
          "test_memory_for_less_than_a_row_is_one_line"),
    Fault("no memory in a later step of sampling", "the same completions", MEMORY,
          "test_memory_that_runs_out_while_sampling_keeps_what_is_finished", 3),
    Fault("a whole run in little memory", "the same completions; the report says what was halved", MEMORY,
          "test_a_run_in_little_memory_ends_with_the_same_and_its_report_says_so", 1, "slow"),
    Fault("an error that only looks like want of memory", "raised as it is", MEMORY,
          "test_errors_that_are_no_want_of_memory_are_not_taken_for_it"),
    Fault("no memory in training", "smaller micro-batches, the same result", TRAIN,
          "test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else"),
    Fault("no memory while the base judges", "the rest stays pending with a line", DESK,
          "test_a_resident_base_without_memory_leaves_the_rest_pending_with_a_line"),
    Fault("a real card filled to its last 256 MiB", "every pass gives the same", CARD,
          "test_a_pass_on_a_card_that_is_nearly_full_gives_the_same", 1, "gpu"),
    Fault("the same in a whole run", "it ends, and its record says what was halved", CARD,
          "test_a_run_on_a_card_that_is_nearly_full_ends_and_says_what_was_halved", 1, "gpu"),
    # ledgers and disks
    Fault("a ledger cut short, zeroed, overwritten", "doctor says so", DISK, "test_doctor_says_that_a_ledger_is_damaged"),
    Fault("damage that every reader passes over", "doctor says so", DISK,
          "test_doctor_sees_damage_that_every_reader_passes_over"),
    Fault("views, triggers and virtual tables in a ledger", "refused before a row is read", DISK,
          "test_a_ledger_that_would_run_what_is_written_in_it_is_refused"),
    Fault("artefacts that are gone, cut short or overwritten", "doctor names them", DISK,
          "test_doctor_finds_a_whole_ledger_whole_and_looks_at_artefacts"),
    Fault("dead leases and stray files", "`doctor --fix` frees them and nothing else", DISK, "test_doctor_mends_what_is_safe"),
    Fault("escape codes in the names of a ledger", "escaped where they are shown", DISK,
          "test_names_in_a_ledger_do_not_write_to_the_terminal"),
    Fault("rows without JSON", "a damaged ledger, in one line", DISK, "test_a_row_that_holds_no_json_is_a_damaged_ledger"),
    Fault("every verb over such a ledger", "a line and an exit code", DISK,
          "test_every_verb_over_a_damaged_ledger_ends_in_a_line", 1, "slow"),
    Fault("rows of another kind", "a damaged ledger, in one line", DISK,
          "test_a_row_of_another_kind_is_a_damaged_ledger"),
    Fault("each column of a ledger holding something else", "every verb ends in a line", INPUTS,
          "test_every_column_of_a_ledger", 1, "slow"),
    Fault("any number of a sample in a ledger", "a name, never the size of an array", INPUTS, "test_any_number_of_a_sample"),
    Fault("content of the right type that cannot be in a ledger", "a damaged ledger, in one line", CONTENT,
          "test_content_that_cannot_be_is_a_damaged_ledger"),
    Fault("the same, before any verb reads it", "doctor says so", CONTENT, "test_doctor_sees_content_that_cannot_be"),
    Fault("judgements and replies that say no number", "doctor says so", CONTENT, "test_doctor_sees_judgements_that_cannot_be"),
    Fault("a judgement without what is measured", "a damaged ledger, in one line", CONTENT,
          "test_a_judgement_without_what_is_measured_is_a_damaged_ledger"),
    Fault("an older ledger without the letters' probability", "read", CONTENT,
          "test_an_older_ledger_without_the_letters_probability_is_read"),
    Fault("a ledger that names a file elsewhere", "it is neither read nor deleted", CONTENT,
          "test_a_name_in_a_ledger_leads_to_no_other_file"),
    Fault("any value anywhere in a ledger", "every verb ends in a line", INPUTS, "test_any_row_of_a_ledger", 10, "slow"),
    Fault("the same in a workspace that is merged", "merged, or refused in a line", INPUTS,
          "test_any_workspace_that_is_merged", 20, "slow"),
    Fault("rows in a merged workspace that no fastconv wrote", "nothing is merged", DISK,
          "test_what_no_fastconv_wrote_is_not_merged"),
    Fault("inputs without end in it", "nothing is merged", CONTENT, "test_inputs_that_have_no_end_are_not_merged"),
    Fault("costs and judgements in it that are no numbers", "nothing is merged", DISK,
          "test_judgements_and_costs_that_are_no_numbers_are_not_merged"),
    Fault("an artefact with other bytes in it", "never taken over", MERGE, "test_a_damaged_artefact_is_never_taken_over"),
    Fault("SIGKILL in a merge", "the same command goes on", MERGE, "test_a_merge_that_was_killed_goes_on"),
    Fault("SIGKILL while gc frees", "no row names a file that is gone", GC,
          "test_after_kill_9_in_the_middle_no_row_names_a_file_that_is_gone"),
    Fault("pipes, folders and loops in place of artefacts", "gone, and nobody waits", DISK,
          "test_an_artefact_that_is_no_file_is_gone_and_nobody_waits_for_it"),
    Fault("a folder, a pipe or a device in place of a ledger", "one line, and nobody waits", DISK,
          "test_a_ledger_that_is_no_file_is_one_line"),
    Fault("reports that cannot be written", "found before the computing", DISK,
          "test_reports_that_cannot_be_written_are_found_before_the_computing"),
    Fault("ENOSPC, EMFILE, EIO, EDQUOT at each step of a write", "one line, nothing half", DISK,
          "test_a_fault_at_any_step_of_a_write_is_one_line_and_leaves_nothing_half"),
    Fault("a limit on the ledger's size", "said as such, nothing lost", STORE,
          "test_a_full_ledger_is_said_as_such_and_loses_nothing"),
    Fault("a power cut between file, folder and row", "the order of syncs holds", DISK,
          "test_a_new_artefact_is_synced_with_its_folder_and_the_folder_above"),
    # pipes and terminals
    Fault("a reader that goes away", "exit code 141 without a word", DISK,
          "test_a_reader_that_goes_away_ends_a_verb_without_a_word"),
    Fault("a full disk behind the output", "one line", DISK, "test_output_that_cannot_be_written_is_one_line"),
    Fault("a full disk behind the errors", "the exit code stays", DISK,
          "test_an_error_that_nobody_can_be_told_keeps_its_exit_code"),
    Fault("closed streams", "what is printed goes nowhere", DISK, "test_streams_that_are_closed_are_nowhere"),
    Fault("locales without our characters, terminals of one column", "no verb breaks", DISK,
          "test_locales_and_tiny_terminals_break_no_verb"),
    Fault("tables in a tiny terminal", "drawn", DISK, "test_tiny_terminals_break_no_table", 1, "slow"),
    Fault("control characters in what is shown or stored", "one plain line, valid text", DISK,
          "test_what_is_shown_is_one_plain_line_and_what_is_stored_is_valid", 200),
    # files of a user
    Fault("any bytes as a recipe", "refused in one line", DISK, "test_any_bytes_as_a_recipe_are_refused_in_one_line", 60),
    Fault("TOML beyond reason", "refused wherever it is read", DISK,
          "test_toml_beyond_reason_is_refused_wherever_it_is_read"),
    Fault("any table as a recipe", "taken, or refused in a line", INPUTS, "test_any_table_as_a_recipe", 40),
    Fault("any recipe that is taken", "has stages, or says why not", INPUTS,
          "test_any_recipe_that_is_taken_has_stages_or_says_why_not", 40, "slow"),
    Fault("any personas and behaviors", "read, or refused in a line", INPUTS,
          "test_any_personas_and_behaviors_of_a_user", 40, "slow"),
    Fault("a pipe or a device that a recipe names as a file", "one line, and nobody waits", INPUTS,
          "test_a_pipe_or_a_device_in_place_of_a_file_is_one_line_and_nobody_waits"),
    Fault("any rubric, any prices", "read, or refused in a line", INPUTS, "test_any_rubric_and_any_prices", 30),
    Fault("an integer without end in a recipe", "refused in one line", CONTENT,
          "test_an_integer_without_end_in_a_recipe_is_refused"),
    Fault("a rubric that counts beyond its unit", "refused in a line", CONTENT,
          "test_a_rubric_that_counts_beyond_its_unit_is_refused"),
    Fault("prices and factors that cannot be booked", "refused in a line", CONTENT,
          "test_prices_that_cannot_be_booked_are_refused"),
    Fault("a labelled row whose grade is none", "refused in a line", CONTENT, "test_a_label_that_is_no_grade_is_refused"),
    Fault("a budget beyond reason", "a budget", CONTENT, "test_a_budget_beyond_reason_is_a_budget"),
    Fault("any rows and questions", "read, or refused in a line", INPUTS, "test_any_rows_of_a_user", 40),
    Fault("any bytes as rows, questions, rubric, prices, adapter", "read, or refused in a line", INPUTS,
          "test_any_bytes_as_rows_questions_rubric_prices_or_adapter", 30),
    Fault("any adapter", "loaded, or refused in a line", INPUTS, "test_any_adapter", 25),
    Fault("any base that an adapter names", "compared, or refused in a line", INPUTS, "test_any_base_that_an_adapter_names", 15),
    Fault("any model folder", "read, or refused in a line", INPUTS, "test_any_model_folder", 60, "slow"),
    Fault("sizes in a config that no model has", "one line", CONTENT,
          "test_a_size_of_a_config_that_no_model_has_is_one_line"),
    Fault("adapter settings nested without end", "one line", CONTENT, "test_adapter_settings_nested_without_end_are_one_line"),
    Fault("a longest row in it that no model has", "one line", CONTENT, "test_a_longest_row_that_no_model_has_is_one_line"),
    Fault("a config that is no table", "one line", CONTENT, "test_a_config_that_is_no_table_is_one_line"),
    Fault("a chat template that fails or reaches out", "one line", CHAT, "test_a_template_that_fails_or_reaches_out_is_one_line"),
    # hub, trackers, other machines
    Fault("every way the hub can fail", "one line with the mend", HUB,
          "test_every_way_the_hub_can_fail_is_one_line_with_the_mend"),
    Fault("a connection to the hub that breaks", "one line", HUB, "test_a_connection_that_breaks_is_one_line_too"),
    Fault("a data set that cannot be had", "one line", TABLES, "test_a_data_set_that_cannot_be_had_is_one_line"),
    Fault("an altered copy of it", "refused", TABLES, "test_an_altered_copy_is_refused"),
    Fault("a tracker that fails", "told once; the other gets everything", TRACKERS,
          "test_a_tracker_that_fails_is_told_and_the_other_gets_everything"),
    Fault("a tracker that hangs", "left behind", TRACKERS, "test_a_tracker_that_hangs_is_left_behind"),
    Fault("a worker that is lost", "replaced, nothing done twice", CLUSTER,
          "test_a_lost_worker_is_replaced_and_nothing_is_done_twice", 1, "slow"),
    Fault("an order that loses every worker", "one line", CLUSTER, "test_an_order_that_loses_every_worker_ends_with_one_line"),
    Fault("a sampling server that does not start", "one line with its last words", SERVER,
          "test_a_server_that_fails_to_start_is_one_line_with_its_last_words"),
    Fault("a parent that is killed", "no server and no file is left", SERVER,
          "test_a_parent_killed_at_once_leaves_no_server_and_no_files"),
    Fault("a sampling server that dies", "given up in a line", CLIENT, "test_a_server_that_dies_midway"),
    Fault("one that hangs", "given up in a line", CLIENT, "test_a_server_that_hangs_midway"),
    Fault("a reply that is not what was asked for", "refused", CLIENT, "test_a_reply_that_is_not_what_was_asked_for_is_refused"),
    Fault("the server of a run that dies", "the next run goes on", SERVED,
          "test_a_server_that_dies_midway_stops_the_run_and_the_next_one_goes_on"),
    # serve
    Fault("bodies that are no request", "refused with a reason", SERVE, "test_a_body_that_is_no_request"),
    Fault("fields that cannot be honoured", "refused by name", SERVE, "test_a_field_that_cannot_be_honoured"),
    Fault("prompts that cannot be continued", "refused with a reason", SERVE, "test_a_prompt_that_cannot_be_continued"),
    Fault("a body of a gigabyte", "refused by its length", SERVE, "test_a_body_of_a_gigabyte_is_refused_by_its_length_alone", 1, "slow"),
    Fault("a body without a length", "cut where it gets too long", SERVE,
          "test_a_body_without_a_length_is_cut_where_it_gets_too_long"),
    Fault("clients that say half of it", "hold nobody up", SERVE, "test_clients_that_say_nothing_or_half_of_it_hold_nobody_up"),
    Fault("a page elsewhere that asks", "refused", SERVE, "test_a_page_elsewhere_is_refused"),
    Fault("a flood of requests", "refused, not piled up", SERVE, "test_a_flood_is_refused_and_not_piled_up"),
    Fault("an error while drawing", "a server error; the next is answered", SERVE,
          "test_an_error_while_drawing_is_a_server_error_and_the_next_request_is_answered"),
    Fault("a client that goes midway", "the model is free again", ANSWERS, "test_a_client_that_goes_midway_frees_the_model"),
)  # fmt: skip


def counts(faults: Sequence[Fault]) -> tuple[Counter[str], Counter[str]]:
    """Run the tests of these rows: cases by test that were not skipped, and those of them that failed."""
    ran: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.xml"
        names = sorted({f"tests/{fault.file}::{fault.test}" for fault in faults})
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", f"--junitxml={record}", *names]
        subprocess.run(command, cwd=ROOT, check=False)
        for case in ElementTree.parse(record).iter("testcase"):
            if any(part.tag == "skipped" for part in case):
                continue
            test = (case.get("name") or "").partition("[")[0]
            name = f"{(case.get('classname') or '').rpartition('.')[2]}::{test}"
            ran[name] += 1
            failed[name] += any(part.tag in ("failure", "error") for part in case)
    return ran, failed


def rows_of(page: str) -> dict[str, tuple[str, str]]:
    """(tried, losses) by test, as a page has them."""
    rows = re.findall(r"^\| .+ \| .+ \| `(\w+::\w+)` \| (.+) \| (.+) \|$", page, re.MULTILINE)
    return {name: (tried, losses) for name, tried, losses in rows}


def main(words: Sequence[str]) -> int:
    """Write the page; exit code 1 if anything was lost, or belongs to `make test` and was not tried."""
    chosen = [one for one in FAULTS if not words or any(word in one.name for word in words)]
    ran, failed = counts(chosen)
    before = rows_of(PAGE.read_text()) if words else {}
    lines = []
    for one in FAULTS:
        entry = before.get(one.name, (f"`make test-{one.tier}`" if one.tier else "not tried", "-"))
        if ran[one.name]:
            entry = f"{ran[one.name] * one.n_examples:,}", str(failed[one.name])
        lines.append(f"| {one.fault} | {one.promise} | `{one.name}` | {entry[0]} | {entry[1]} |")
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")
    return int(any(failed.values()) or not all(ran[one.name] or one.tier for one in chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
