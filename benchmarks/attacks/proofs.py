"""Which test proves which refusal: the second part of the table.

``tests/attacks/test_proofs.py`` insists that each of these tests exists.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """Who attacks, what they try, and the test that shows it fail: ``file::function``."""

    who: str
    what: str
    test: str


def _proofs(who: str, file: str, **tests: str) -> list[Proof]:
    return [
        Proof(who, what.replace("_", " "), f"tests/attacks/{file}.py::{name}")
        for what, name in tests.items()
    ]


PROOFS = [
    *_proofs(
        "contributor",
        "test_poisoning",
        a_broken_file="test_every_broken_file_is_refused_by_name_and_holds_up_nobody",
        a_replay_or_a_stale_base="test_what_is_old_is_refused",
        copies_under_other_names="test_copies_under_other_names_count_once",
        poison_by_three_of_ten="test_three_of_ten_cost_the_default_almost_nothing",
        poison_on_a_real_hub="test_seven_honest_outvote_three_hostile_on_a_real_hub",
    ),
    *_proofs(
        "contributor",
        "test_signatures",
        no_signature="test_a_record_without_a_signature_is_refused",
        a_false_signature="test_a_false_signature_is_refused_before_the_delta_is_fetched",
        the_work_of_somebody_else="test_a_record_cannot_be_moved_to_another_key",
        many_names_for_one_key="test_a_key_counts_once_a_round_whatever_its_names",
        a_copy_that_overtakes="test_a_copy_with_a_lower_id_does_not_make_the_original_the_replay",
    ),
    *_proofs(
        "evaluator",
        "test_lying_evaluators",
        one_liar_of_three="test_one_liar_of_three_is_caught_and_the_verdict_is_right",
        two_colluding_of_three="test_two_colluding_of_three_prove_only_that_they_lie",
        two_colluding_of_seven="test_two_colluding_are_outvoted_by_more_evaluators",
        all_external_ones_lying="test_when_everybody_lies_nothing_is_accepted",
        a_copier="test_a_copier_is_caught_by_its_private_sequences",
        a_late_revealer="test_who_comes_after_the_sealing_does_not_count",
        a_nonce_withheld="test_who_does_not_reveal_its_nonce_is_not_drawn",
        a_judge_of_their_own_work="test_nobody_evaluates_their_own_contribution",
        verdicts_that_do_not_follow="test_the_evidence_gives_the_verdicts_again_and_nothing_else_does",
    ),
    *_proofs(
        "hub",
        "test_signed_rounds",
        a_rollback="test_an_older_state_is_a_rollback",
        a_freeze="test_a_frozen_hub_leaves_the_reader_with_the_last_model_and_the_reason",
        tampering="test_an_altered_file_is_refused",
        mix_and_match="test_a_manifest_of_another_state_is_mixed",
        too_few_signatures="test_files_without_a_maintainers_signature_are_refused",
        no_signatures="test_an_unsigned_hub_is_refused",
        another_root="test_another_root_at_a_known_address_is_refused",
        a_root_of_its_own="test_a_root_that_the_old_keys_did_not_sign_is_refused",
        too_few_attestations="test_a_round_with_too_few_attestations_is_refused_by_policy",
        a_stolen_online_key="test_an_online_thief_can_freeze_but_not_forge_and_rotation_ends_it",
    ),
    *_proofs(
        "contributor",
        "test_odd_contributions",
        a_delta_that_is_no_file="test_a_delta_that_is_no_commit_of_one_file_holds_up_nobody",
        a_flood_of_branches="test_more_branches_are_cleaned_up_than_one_command_line_names",
    ),
    *_proofs(
        "hub",
        "test_lying_hub",
        a_rewound_history="test_an_older_latest_is_a_rewound_hub",
        a_rewritten_history="test_another_round_of_the_same_number_is_a_rewritten_history",
        a_rewound_main="test_a_main_that_was_forced_back_is_refused_where_it_is_read",
        a_round_with_other_weights="test_a_round_that_does_not_give_its_weights_is_refused",
        exchanged_bytes="test_an_update_whose_bytes_were_exchanged_is_refused",
        another_hub_in_its_place="test_a_new_hub_at_the_old_address_is_refused",
        enormous_promises="test_enormous_promises_take_no_disk_and_no_memory",
    ),
    *_proofs(
        "merger",
        "test_lying_hub",
        a_model_that_is_not_the_aggregate="test_a_model_that_is_not_the_mean_is_refused_and_the_audit_names_the_round",
        weights_that_break_the_rule="test_weights_of_contributions_that_break_the_rule_are_named",
        a_contribution_left_out="test_a_contribution_that_the_record_drops_is_missed",
        a_contribution_rewritten="test_a_contribution_that_the_merger_rewrote_is_found",
    ),
    *_proofs(
        "hub",
        "test_hostile_hub",
        names_that_escape="test_names_that_would_escape_never_enter_the_store",
        hooks_and_filters="test_a_hub_on_this_machine_runs_nothing_of_its_own",
        a_bomb_of_trees="test_a_tree_that_unfolds_without_end_is_cut_off",
        a_file_larger_than_announced="test_a_file_larger_than_announced_is_refused_for_a_kilobyte",
    ),
    *_proofs(
        "chance",
        "test_kills",
        a_merge_killed_at_any_moment="test_a_merge_killed_anywhere_can_be_done_again",
        a_sync_killed_at_any_moment="test_a_sync_killed_anywhere_never_leaves_half_a_model",
    ),
    *_proofs(
        "chance",
        "test_races",
        two_merges_at_once="test_contributions_that_arrive_while_a_merge_publishes_wait_for_the_next",
    ),
]
"""Every refusal that has a test of its own."""


def markdown() -> str:
    """The table."""
    lines = ["| who attacks | by | refused, as shown by |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {p.who} | {p.what} | `{p.test}` |" for p in PROOFS)])
